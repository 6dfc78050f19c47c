/** What tasks that solve a model together do about each other, without a model. */
import { afterAll, describe, expect, test } from "bun:test";
import { saveSolvedLayer } from "../../lib/solve/solved_layers.ts";
import { Team } from "../../lib/solve/team.ts";
import { rejection, workplace } from "../_checkpoints.ts";

const place = workplace();
afterAll(() => place.remove());

const STAGE = "stage";
const sumsOf = (...values: number[]) => ({ counts: [3], sums: [Float64Array.from(values)] });

/** Two tasks with one folder. */
function pair(waitMilliseconds = 50): readonly [Team, Team] {
  const folder = place.fresh();
  const of = (index: number) =>
    new Team({ shard: { index, count: 2 }, folder, waitMilliseconds }, 0, "same", {});
  return [of(1), of(2)];
}

/** A layer as the other task leaves it. */
function solve({ place: { folder } }: Team, name: string): void {
  const tensor = { rows: 1, cols: 32, bits: 2, groupSize: 0, zeroPointKind: "symmetric" } as const;
  const arrays = { packed: new Uint32Array(2), scale: new Uint16Array(1), zeroPoint: undefined };
  const numbers = { relativeError: 0, gain: 1, damping: 0, deadColumns: 0, inputs: 1, milliseconds: 1 };
  saveSolvedLayer(folder, 0, "same", { name, tensor: { ...tensor, ...arrays }, moment: "full", ...numbers });
}

test("sums and counts of all tasks are added up", async () => {
  const [first, second] = pair();
  second.publish(STAGE, "inputs", { counts: [4], sums: [Float64Array.of(10, 20)] });
  expect(await first.all(STAGE, "inputs", sumsOf(1, 2))).toEqual({
    counts: [7],
    sums: [Float64Array.of(11, 22)],
  });
});

test("sums of another size are refused, with the setting that makes them alike", async () => {
  const [first, second] = pair();
  second.publish(STAGE, "inputs", { counts: [4], sums: [new Float64Array(1)] });
  const { message } = await rejection(first.all(STAGE, "inputs", sumsOf(1, 2)));
  expect(message).toMatch(/shard 2\/2 must have 2 numbers, as this one, got 1: .*--max-memory/);
});

describe("sums that are gone", () => {
  test("are not waited for where others have solved all layers that need them", async () => {
    const [first] = pair();
    for (const name of ["a", "b"]) solve(first, name);
    expect(await first.unlessSolved(["a", "b"], () => first.all(STAGE, "inputs", sumsOf(1, 2))))
      .toBeUndefined();
  });

  test("are waited for while one of the layers is not solved", async () => {
    const [first] = pair();
    solve(first, "a");
    const waits = first.unlessSolved(["a", "b"], () => first.all(STAGE, "inputs", sumsOf(1, 2)));
    expect((await rejection(waits)).message).toContain("from shard 2/2 must be in");
  });
});
