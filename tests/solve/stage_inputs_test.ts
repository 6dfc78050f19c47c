import { expect, test } from "bun:test";
import { ReadyInputs, stageBytes, type StageInputs } from "../../lib/solve/stage_inputs.ts";

const COLS = 64;
/** Inputs with a moment and a factor of so many columns. */
function inputsOf(cols: number): StageInputs {
  const [moment, factor] = [new Float32Array(cols ** 2), new Float32Array(cols ** 2)];
  return { moment: { moment, factor }, residuals: new Map() } as unknown as StageInputs;
}

/** Takes stages of so many columns one after the other; bytes that were there once each was made. */
async function peaks(limit: number, widths: readonly number[]): Promise<number[]> {
  const ready = new ReadyInputs<number>(limit), made: StageInputs[] = [], bytes: number[] = [];
  for (const [i, cols] of widths.entries()) {
    await ready.take(i, stageBytes(cols, cols), () => {
      made.push(inputsOf(cols));
      bytes.push(
        made.reduce((sum, { moment: { moment, factor } }) => sum + moment.byteLength + factor.byteLength, 0),
      ); // of memory that was given back 0
      return Promise.resolve(made.at(-1)!);
    });
  }
  return bytes;
}

test("inputs that are kept make room before others are made", async () => {
  const one = 8 * COLS ** 2;
  expect(stageBytes(COLS, COLS)).toBe(one);
  expect(await peaks(2 * one, [COLS, COLS, COLS, COLS])).toEqual([one, 2 * one, 2 * one, 2 * one]);
  // Of stages that take more by themselves one is there at a time.
  expect(await peaks(one / 2, [COLS, COLS, COLS])).toEqual([one, one, one]);
  expect(await peaks(one, [COLS / 2, COLS / 2, COLS])).toEqual([one / 4, one / 2, one]);
});

test("inputs that are there are not made again", async () => {
  const ready = new ReadyInputs<string>();
  let made = 0;
  const take = () => ready.take("a", stageBytes(COLS, COLS), () => (made++, Promise.resolve(inputsOf(COLS))));
  expect(await take()).toBe(await take());
  expect(made).toBe(1);
});

test("the bytes of a stage are those of its blocks; a diagonal is solved in blocks of 256 columns", () => {
  expect(stageBytes(600, 256)).toBe(8 * (2 * 256 ** 2 + 88 ** 2));
  expect(stageBytes(600, 1)).toBe(stageBytes(600, 256));
  expect(stageBytes(60, 1)).toBe(8 * 60 ** 2);
});
