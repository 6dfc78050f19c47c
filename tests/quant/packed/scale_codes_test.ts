/** Coded scales: grids of any range, and codes in one bit stream. */
import { expect, test } from "bun:test";
import {
  fittedGrid,
  gridOver,
  gridScales,
  isScaleGrid,
  nearestScale,
  packScaleCodes,
  scalesBeside,
  unpackScaleCodes,
} from "../../../lib/quant/packed/scale_codes.ts";
import { gaussians } from "../../_kernels.ts";

test("a grid reaches from the least to the most scale, whatever they are", () => {
  const ends = [2 ** -24, 7e-8, 1e-7, 1e-6, 0.0123, 0.5, 1, 1.0003, 7, 59999, 60000];
  for (const least of ends) {
    for (const most of ends.filter((end) => end >= least)) {
      const grid = gridOver(least, most), scales = gridScales(grid);
      expect(grid).toEqual([Math.f16round(grid[0]), Math.f16round(grid[1])]);
      expect([least, most, isScaleGrid(grid)]).toEqual([least, most, true]);
      expect(scales[0]!).toBeLessThanOrEqual(least);
      expect(scales[7]!).toBeGreaterThanOrEqual(most);
      for (const [code, scale] of scales.entries()) {
        expect(scales[nearestScale(scales, scale)]).toBe(scale);
        if (scale !== scales[code - 1]) expect(nearestScale(scales, scale)).toBe(code);
      }
    }
  }
  for (const grid of [[0, 1], [-1, 1], [1, 0.5], [1, 6], [NaN, 1], [1, NaN], [Infinity, 1]] as const) {
    expect([grid, isScaleGrid(grid)]).toEqual([grid, false]);
  }
});

test("a grid for scales leaves out what weighs little, unless that is not allowed", () => {
  const scales = Float32Array.from({ length: 100 }, (_, i) => i === 7 ? 2 ** -7 : 1 + (i % 10) / 20);
  const weights = (outlier: number) => Float64Array.from(scales, (_, i) => i === 7 ? outlier : 1);
  const leastOf = (outlier: number, isAllowed = (_: Float64Array) => true) =>
    fittedGrid(scales, weights(outlier), isAllowed)?.[0];
  expect(leastOf(1e-9)).toBe(1);
  expect(leastOf(100)).toBe(2 ** -7);
  expect(leastOf(1e-9, ([first]) => first! < 0.5)).toBe(2 ** -7);
  expect(leastOf(1e-9, () => false)).toBeUndefined();
});

test("scales beside others are a code away in both passes of a pair, then two, and never off the grid", () => {
  const grid = gridOver(1, 4), scales = gridScales(grid), codes = [0, 1, 2, 3, 4, 5, 6, 7];
  const own = Float32Array.from(codes, (code) => scales[code]!);
  const moves = [2, 3, 4, 5].map((pass) =>
    [...scalesBeside(own, grid, pass)].map((scale, i) => nearestScale(scales, scale) - codes[i]!)
  );
  expect(moves.map((all) => all.map(Math.abs))).toEqual(
    [1, 1, 2, 2].map((distance) => codes.map(() => distance)),
  );
  for (const code of [2, 3, 4, 5]) {
    expect([moves[0]![code]! + moves[1]![code]!, moves[2]![code]! + moves[3]![code]!]).toEqual([0, 0]);
  }
  expect(new Set(moves[0]!.slice(1, 7)).size).toBe(2);
});

test("codes of any groups come back from the stream, three bits each", () => {
  const codes = Uint8Array.from(gaussians(3, 83), (value) => Math.abs(value * 64) & 7);
  const bytes = packScaleCodes(codes);
  expect(bytes.length).toBe(32);
  let stream = 0n;
  codes.forEach((code, i) => stream |= BigInt(code) << BigInt(3 * i));
  expect([...bytes]).toEqual(Array.from({ length: 32 }, (_, i) => Number(stream >> BigInt(8 * i) & 255n)));
  for (const [begin, end] of [[0, 83], [1, 2], [5, 80], [8, 16], [82, 83]] as const) {
    const part = bytes.slice(Math.floor(begin * 3 / 8), Math.ceil(end * 3 / 8));
    expect(unpackScaleCodes(part, begin, end)).toEqual(codes.slice(begin, end));
  }
});

test("codes of more groups than a bit's number has 31 bits for stand where they belong", () => {
  const at = Math.ceil(2 ** 31 / 3), codes = { length: at + 1, entries: () => [[at, 5]] };
  const bytes = packScaleCodes(codes as unknown as Uint8Array);
  expect(unpackScaleCodes(bytes.subarray(Math.floor(at * 3 / 8)), at, at + 1)).toEqual(Uint8Array.of(5));
});
