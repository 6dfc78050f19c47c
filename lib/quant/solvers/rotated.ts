/** Problems whose weights and inputs are rotated before solving. */
import { rotateMatrix, rotateMoment, rotationBlock } from "../rotation.ts";
import { isUnitMoment, momentBlocks } from "./moments.ts";
import type { MomentProblem } from "./problem.ts";

/** Seed of the rotations that the solver writes; a reader takes any. */
export const ROTATION_SEED = 0;

/** A problem of rotated weights and inputs, with the same objective. */
export function rotated(problem: MomentProblem): MomentProblem {
  const { kernels, rows, cols, moment: { block, moment } } = problem;
  const weights = problem.weights.slice();
  rotateMatrix(kernels, weights, rows, cols, ROTATION_SEED, "forth");
  if (isUnitMoment(problem.moment)) return { ...problem, weights };
  const whole = new Float32Array(cols * cols);
  // a rotation mixes the columns of several blocks
  for (const { first, cols: own, at } of momentBlocks(cols, block)) {
    for (let i = 0; i < own; i++) {
      whole.set(moment.subarray(at + i * own, at + (i + 1) * own), (first + i) * cols + first);
    }
  }
  rotateMoment(kernels, whole, cols, ROTATION_SEED);
  kernels.arrays.constant(whole);
  return { ...problem, weights, moment: { ...problem.moment, block: cols, moment: whole } };
}

/**
 * What the square of a row's mean counts: rotated codes have no offsets, and the means of many rows do not
 * become Gaussian as the rest does.
 */
const MEAN_WEIGHT = 4;

/**
 * Errors of rows with one scale as multiples of those with scales and offsets of their own: a rotation
 * spreads a block's errors evenly over its rows, whatever their sizes.
 */
export function rowLosses({ weights, rows, cols }: MomentProblem): Float64Array {
  const squares = new Float64Array(rows), raw = new Float64Array(rows), block = rotationBlock(rows);
  for (let row = 0; row < rows; row++) {
    const own = weights.subarray(row * cols, (row + 1) * cols);
    const mean = own.reduce((sum, weight) => sum + weight, 0) / cols;
    squares[row] = own.reduce((sum, weight) => sum + (weight - mean) ** 2, 0);
    raw[row] = squares[row]! + MEAN_WEIGHT * cols * mean ** 2;
  }
  return squares.map((own, row) => {
    const begin = row - row % block, all = raw.subarray(begin, begin + block);
    const mean = all.reduce((sum, value) => sum + value, 0) / block;
    return mean === own ? 1 : mean / own;
  });
}
