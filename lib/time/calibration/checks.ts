/** What numbers of a statistics file must be: counts, sums that fit each other, symmetric moments. */
import { diagonalOf } from "../../quant/solvers/moments.ts";
import type { Malformed } from "../time_file.ts";
import type { InputStatistics, Moments } from "./contents.ts";

/** Most that rounding takes from a sum of squares, as a part of it: 2⁻⁵³ for each of 2³³ samples. */
const MAX_LOW_SHARE = 2 ** -20;
/** Most by which sums of the same products differ, as a part: TF32 and bfloat16 are that rough. */
const SUM_TOLERANCE = 1 / 16;
/** Most that an input counts: masked positions count 1. */
const MOST_WEIGHT = 2 ** 32;
/** Below the smallest normal float32 sums are lost. */
const TINY = 2 ** -120;

/** @throws {FormatError} by `malformed`, when counts, weights and sums of an input are none, or do not fit */
export function checkSums(name: string, input: InputStatistics, malformed: Malformed): void {
  const { cols, weight, tokens, samples, sum, squares, squaresLow } = input;
  for (const [part, counts] of [["tokens", tokens], ["samples", samples]] as const) {
    const bad = counts.find((count) => !Number.isSafeInteger(count) || count < 0);
    if (bad !== undefined) throw malformed(`counts must be whole numbers ≥ 0, got ${bad}`, `${name}.${part}`);
  }
  const badWeight = weight.findIndex((value, g) => value < 0 || value > MOST_WEIGHT * tokens[g]!);
  if (badWeight >= 0) {
    throw malformed(
      `weights must be ≥ 0, at most ${MOST_WEIGHT} an input, got ${weight[badWeight]} of ${
        tokens[badWeight]
      }`,
      `${name}.weight`,
    );
  }
  const badSquare = squares.findIndex((value) => value < 0);
  if (badSquare >= 0) {
    throw malformed(`sums of squares must be ≥ 0, got ${squares[badSquare]}`, `${name}.squares`);
  }
  const badSum = sum.findIndex((value, i) =>
    value ** 2 > (1 + SUM_TOLERANCE) ** 2 * weight[Math.floor(i / cols)]! * squares[i]! + TINY
  );
  if (badSum >= 0) {
    const most = Math.sqrt(weight[Math.floor(badSum / cols)]! * squares[badSum]!);
    throw malformed(
      `sums must be at most √(weight · squares), ${most} in column ${badSum % cols}, got ${sum[badSum]}`,
      `${name}.sum`,
    );
  }
  const badLow = squaresLow.findIndex((low, i) => Math.abs(low) > MAX_LOW_SHARE * squares[i]!);
  if (badLow >= 0) {
    throw malformed(
      `rounding must have taken at most ${MAX_LOW_SHARE} of a sum of squares, got ${squaresLow[badLow]} of ${
        squares[badLow]
      }`,
      `${name}.squares_low`,
    );
  }
}

/** @throws {FormatError} by `malformed`, unless a moment has the sums of squares on its diagonal */
export function checkDiagonal(
  moments: Moments,
  name: string,
  { cols, block = cols, squares }: InputStatistics,
  malformed: Malformed,
): void {
  const groups = squares.length / cols,
    isByGroup = name.endsWith(".group_second"),
    total = new Float64Array(cols);
  for (const [i, value] of squares.entries()) total[i % cols]! += value;
  for (let g = 0; g < (isByGroup ? groups : 1); g++) {
    const own = isByGroup ? squares.subarray(g * cols, (g + 1) * cols) : total;
    const diagonal = diagonalOf(
      isByGroup ? moments.subarray(g * cols * cols, (g + 1) * cols * cols) : moments,
      cols,
      isByGroup ? cols : block,
    );
    const bad = diagonal.findIndex((value, k) =>
      Math.abs(value - own[k]!) > SUM_TOLERANCE * Math.max(value, own[k]!) + TINY
    );
    if (bad < 0) continue;
    throw malformed(
      `the diagonal must have the sums of squares, ${own[bad]} in column ${bad}, got ${diagonal[bad]}`,
      name,
    );
  }
}

/** Sums of squares are not negative, sums of products symmetric and at most what squares allow. */
export function checkMoment(second: Moments, cols: number, tensor: string, malformed: Malformed): void {
  const most = new Float64Array(cols);
  for (let i = 0; i < cols; i++) {
    if (second[i * cols + i]! < 0) {
      throw malformed(`sums of squares must be ≥ 0, got ${second[i * cols + i]}`, tensor);
    }
    most[i] = (1 + SUM_TOLERANCE) * Math.sqrt(second[i * cols + i]! + TINY);
  }
  for (let first = 0; first < cols; first += TILE) {
    for (let left = 0; left <= first; left += TILE) checkTile(second, most, first, left, tensor, malformed);
  }
}

/** Rows and columns that are compared with their mirror image at once: both lie in the cache. */
const TILE = 32;

/**
 * @param most by column, the root of what its sum of squares may be
 * @throws {FormatError} by `malformed`, unless a tile of a moment is its mirror image's transpose
 */
function checkTile(
  second: Moments,
  most: Float64Array,
  first: number,
  left: number,
  tensor: string,
  malformed: Malformed,
): void {
  const cols = most.length, end = Math.min(cols, first + TILE), right = Math.min(cols, left + TILE);
  for (let i = first; i < end; i++) {
    for (let j = left; j < Math.min(right, i); j++) {
      const value = second[i * cols + j]!;
      if (value !== second[j * cols + i]) {
        throw malformed(`a moment must be symmetric, got another one at [${i}, ${j}]`, tensor);
      }
      if (Math.abs(value) <= most[i]! * most[j]!) continue;
      const squares = `${second[i * (cols + 1)]} and ${second[j * (cols + 1)]}`;
      throw malformed(
        `sums of products must fit those of squares, got ${value} at [${i}, ${j}] of ${squares}`,
        tensor,
      );
    }
  }
}
