/**
 * Scales of few bits: a code a group into eight half floats, `first · ratio^code`, and no offset. The codes
 * are one bit stream over the groups of all rows, least significant bits first (docs/format.md).
 */
import { CODED_SCALE_BITS } from "../../config/names.ts";

/** Two half floats: the smallest scale of a tensor, and by how much the next one is larger. */
export type ScaleGrid = readonly [first: number, ratio: number];

/** Number of scales. */
const COUNT = 2 ** CODED_SCALE_BITS;

/** The scales of a grid, products in float64 rounded to half floats; not finite where a grid is none. */
export function gridScales([first, ratio]: ScaleGrid): Float64Array {
  const scales = new Float64Array(COUNT);
  for (let i = 0, scale = first; i < COUNT; i++, scale *= ratio) scales[i] = Math.f16round(scale);
  return scales;
}

/** Whether two half floats of a file are a grid. */
export const isScaleGrid = (grid: ScaleGrid): boolean =>
  grid[0] > 0 && grid[1] >= 1 && gridScales(grid).every(Number.isFinite);

/** The smallest half float above 0. */
export const TINY = 2 ** -24;

/** The grid whose scales go from at most `least` to at least `most`, both 2⁻²⁴ or more. */
export function gridOver(least: number, most: number): ScaleGrid {
  let first = Math.f16round(least), ratio = Math.f16round((most / least) ** (1 / (COUNT - 1)));
  if (first > least) first = Math.max(Math.f16round(first - Math.max(first * 2 ** -10, TINY)), TINY);
  while (gridScales([first, ratio])[COUNT - 1]! < most) ratio = Math.f16round(ratio * (1 + 2 ** -10));
  return [first, Math.max(1, ratio)];
}

/** Code of the scale of `scales` that is nearest, by its ratio to `wanted`. */
export function nearestScale(scales: Float64Array, wanted: number): number {
  let code = 0;
  while (code + 1 < COUNT && wanted * wanted > scales[code]! * scales[code + 1]!) code++;
  return code;
}

/** The largest scale of a grid: rounding its ratio leaves room below the largest half float. */
export const MOST_SCALE = 60000;

/** Parts of the smallest and of the largest scales that a grid need not reach. */
const OUTLIERS = [0, 0.02, 0.1];

/**
 * The allowed grid, of some that leave outliers out, to which scales are rounded with the least loss: squares
 * of their relative changes by weight. **Shapes** `scales, weights: [groups]`
 */
export function fittedGrid(
  scales: Float32Array,
  weights: Float64Array,
  isAllowed: (scales: Float64Array) => boolean,
): ScaleGrid | undefined {
  const sorted = scales.map((own) => Math.min(Math.max(Math.abs(own), TINY), MOST_SCALE)).sort();
  const at = (part: number) => sorted[Math.round(part * (sorted.length - 1))]!;
  let best: ScaleGrid | undefined, least = Infinity;
  for (const below of OUTLIERS) {
    for (const above of OUTLIERS) {
      const grid = gridOver(at(below), at(1 - above)), own = gridScales(grid);
      let loss = 0;
      for (const [i, wanted] of scales.entries()) {
        loss += weights[i]! * (own[nearestScale(own, wanted)]! / wanted - 1) ** 2;
      }
      if (loss >= least || !isAllowed(own)) continue;
      least = loss;
      best = grid;
    }
  }
  return best;
}

/**
 * Scales on a grid beside these, for a pass from the third, 2, on: one code away, up for one half of the
 * groups and down for the other, then the other way around, then two codes.
 */
export function scalesBeside(scales: Float32Array, grid: ScaleGrid, pass: number): Float32Array<ArrayBuffer> {
  const all = gridScales(grid), distance = pass >> 1;
  return Float32Array.from(scales, (own, i) => {
    const code = nearestScale(all, own), isUp = (i >> (distance - 1) & 1) === (pass & 1);
    const [next, other] = isUp ? [code + distance, code - distance] : [code - distance, code + distance];
    return all[next] ?? all[other] ?? own;
  });
}

/** Codes of scales that lie on a grid. **Shapes** `halves: f16[groups]` */
export function codesOnGrid(halves: Float16Array, grid: ScaleGrid): Uint8Array<ArrayBuffer> {
  const scales = gridScales(grid);
  return Uint8Array.from(halves, (scale) => nearestScale(scales, scale));
}

/** Bytes of the codes of so many groups. */
export const scaleCodeBytes = (groups: number): number => Math.ceil(groups * CODED_SCALE_BITS / 8);

/** Packs codes. **Shapes** `codes: u8[groups]` → `u8[scaleCodeBytes(groups)]` */
export function packScaleCodes(codes: Uint8Array): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(scaleCodeBytes(codes.length));
  for (const [i, code] of codes.entries()) {
    const bit = i * CODED_SCALE_BITS, at = Math.floor(bit / 8), word = code << bit % 8;
    bytes[at]! |= word;
    if (word > 255) bytes[at + 1]! |= word >> 8;
  }
  return bytes;
}

/** Codes of groups `[begin, end)`; `bytes` begin with that of group `begin`. */
export function unpackScaleCodes(bytes: Uint8Array, begin: number, end: number): Uint8Array<ArrayBuffer> {
  const codes = new Uint8Array(end - begin), from = Math.floor(begin * CODED_SCALE_BITS / 8);
  for (let i = begin; i < end; i++) {
    const bit = i * CODED_SCALE_BITS, at = Math.floor(bit / 8) - from;
    codes[i - begin] = (bytes[at]! | (bytes[at + 1] ?? 0) << 8) >> bit % 8 & (COUNT - 1);
  }
  return codes;
}
