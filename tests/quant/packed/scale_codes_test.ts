/** Coded scales: grids of any range, and codes in one bit stream. */
import { expect, test } from "bun:test";
import {
  gridOver,
  gridScales,
  isScaleGrid,
  nearestScale,
  packScaleCodes,
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
