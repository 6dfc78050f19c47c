/**
 * Low-rank corrections: W ≈ Ŵ + A B, with A B the best matrix of rank r for what Ŵ leaves, weighed by the
 * inputs' second moment M (LQER, https://arxiv.org/abs/2402.02446; codes and correction in turn as in
 * CALDERA, https://arxiv.org/abs/2405.18886).
 *
 * With M = L Lᵀ the best A B is A (Aᵀ R), the columns of A the leading left singular vectors of R L, R = W −
 * Ŵ: no inverse of L is needed. They come from a seeded randomised subspace iteration (Halko, Martinsson and
 * Tropp, https://arxiv.org/abs/0909.4061).
 */
import type { Solver } from "../../config/names.ts";
import { checkArray } from "../../native/call.ts";
import type { Kernels } from "../../native/mod.ts";
import { dequantize } from "../dequantize.ts";
import { halfBits, type LowRank } from "../packed/layout.ts";
import { addLowRank } from "../packed/low_rank.ts";
import { outputPower, product } from "../product.ts";
import { factorize, substitute, symmetricEigen } from "../symmetric.ts";
import type { LayerProblem } from "./problem.ts";
import type { Solution, SolverSettings } from "./settings.ts";
import { solveLayer } from "./solve_layer.ts";

/** Directions that are followed beside those wanted. */
const OVERSAMPLING = 8;
/** Passes over R M Rᵀ: enough to separate singular values a few percent apart. */
const ITERATIONS = 12;
/** Times that codes and correction are solved in turn, from either start. */
const TURNS = 2;

function transposed(matrix: Float32Array, rows: number, cols: number): Float32Array<ArrayBuffer> {
  const out = new Float32Array(matrix.length);
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < cols; j++) out[j * rows + i] = matrix[i * cols + j]!;
  }
  return out;
}

/** Orthonormal rows in place, by Gram and Schmidt, twice; rows that depend on those before become 0. */
function orthonormalize(rows: Float64Array, count: number, width: number): void {
  for (let i = 0; i < count; i++) {
    const own = rows.subarray(i * width, (i + 1) * width);
    const before = norm(own);
    for (let pass = 0; pass < 2; pass++) {
      for (let j = 0; j < i; j++) {
        const other = rows.subarray(j * width, (j + 1) * width);
        const along = dot(own, other);
        for (let k = 0; k < width; k++) own[k]! -= along * other[k]!;
      }
    }
    const length = norm(own);
    const factor = length > 1e-7 * before && length > 0 ? 1 / length : 0;
    for (let k = 0; k < width; k++) own[k]! *= factor;
  }
}

function dot(a: Float64Array, b: Float64Array): number {
  let sum = 0;
  for (let k = 0; k < a.length; k++) sum += a[k]! * b[k]!;
  return sum;
}
const norm = (a: Float64Array): number => Math.sqrt(dot(a, a));

/** Numbers from −1 to 1 by Marsaglia's xorshift, the same everywhere. */
function* seeded(): Generator<number, never> {
  let state = 0x2545f491;
  while (true) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    yield state / 2 ** 31;
  }
}

/**
 * The best correction of rank `rank` for a residual R: A and B, as half floats, that bring tr((R − A B) M (R
 * − A B)ᵀ) down to what the discarded singular values leave.
 *
 * **Shapes** `residual: f32[rows, cols]`, `moment: f32[cols, cols]` symmetric positive semidefinite → `a:
 * f16[rows, rank]`, `b: f16[rank, cols]`
 *
 * @throws {RangeError} when the rank is not from 1 to the smaller size
 */
export function fitLowRank(
  kernels: Kernels,
  residual: Float32Array,
  rows: number,
  cols: number,
  moment: Float32Array,
  rank: number,
): LowRank {
  const doing = "fit a low-rank correction";
  if (!Number.isInteger(rank) || rank < 1 || rank > Math.min(rows, cols)) {
    throw new RangeError(
      `Cannot ${doing}: rank must be a whole number from 1 to ${Math.min(rows, cols)}, got ${rank}`,
    );
  }
  checkArray(doing, "residual", residual, rows * cols);
  checkArray(doing, "moment", moment, cols * cols);
  const count = Math.min(rank + OVERSAMPLING, rows, cols);
  const turned = transposed(residual, rows, cols);
  const times = (x: Float32Array, tokens: number, w: Float32Array, height: number, width: number) =>
    product(kernels, doing, x, w, { tokens, rows: height, cols: width });
  const random = seeded();
  // Rows of `basis` are directions in the space of outputs.
  const basis = Float64Array.from({ length: count * rows }, () => random.next().value);
  orthonormalize(basis, count, rows);
  /** Rows times R M Rᵀ. */
  const applied = (): Float32Array<ArrayBuffer> => {
    const inputs = times(Float32Array.from(basis), count, turned, cols, rows);
    return times(times(inputs, count, moment, cols, cols), count, residual, rows, cols);
  };
  for (let i = 0; i < ITERATIONS; i++) {
    basis.set(applied());
    orthonormalize(basis, count, rows);
  }
  const image = Float64Array.from(applied()), small = new Float64Array(count * count);
  for (let i = 0; i < count; i++) {
    for (let j = 0; j <= i; j++) {
      const value = dot(image.subarray(i * rows, (i + 1) * rows), basis.subarray(j * rows, (j + 1) * rows));
      small[i * count + j] = small[j * count + i] = value;
    }
  }
  const { values, vectors } = symmetricEigen(small);
  const order = Array.from(values.keys()).sort((i, j) => values[j]! - values[i]! || i - j);
  const left = new Float32Array(rank * rows); // Aᵀ
  for (let i = 0; i < rank; i++) {
    for (let j = 0; j < count; j++) {
      const part = vectors[order[i]! * count + j]!;
      for (let row = 0; row < rows; row++) left[i * rows + row]! += part * basis[j * rows + row]!;
    }
  }
  // Half floats have the finest steps where A and B are of one size.
  const right = times(left, rank, turned, cols, rows);
  for (let i = 0; i < rank; i++) {
    const ofA = largest(left.subarray(i * rows, (i + 1) * rows));
    const ofB = largest(right.subarray(i * cols, (i + 1) * cols));
    const factor = ofA > 0 && ofB > 0 ? Math.sqrt(ofB / ofA) : 0;
    for (let row = i * rows; row < (i + 1) * rows; row++) left[row] = Math.f16round(left[row]! * factor);
  }
  return {
    rank,
    a: halfBits(transposed(left, rank, rows)),
    b: halfBits(bestRight(left, rank, rows, times(left, rank, turned, cols, rows), cols)),
  };
}

const largest = (values: Float32Array): number => values.reduce((max, v) => Math.max(max, Math.abs(v)), 0);

/** B = (AᵀA)⁻¹ Aᵀ R: the best for A as it is rounded, whatever M is. Rows of A that are 0 get rows of 0. */
function bestRight(
  left: Float32Array,
  rank: number,
  rows: number,
  products: Float32Array,
  cols: number,
): Float32Array {
  const gram = new Float64Array(rank * rank), wide = Float64Array.from(left);
  const row = (i: number) => wide.subarray(i * rows, (i + 1) * rows);
  for (let i = 0; i < rank; i++) {
    for (let j = 0; j <= i; j++) gram[i * rank + j] = dot(row(i), row(j));
  }
  const out = Float64Array.from(products);
  factorize(gram, rank, () => Infinity);
  substitute(gram, rank, out, cols);
  return Float32Array.from(out);
}

/**
 * Solves a layer with a low-rank correction of rank `settings.lowRank`: codes for what the correction leaves
 * and the correction for what the codes leave, in turn, begun with either; the least objective is kept. It is
 * never above that of the codes alone.
 *
 * **Shapes** as {@linkcode solveLayer}; the rank is at most the smaller size.
 *
 * @throws as {@linkcode solveLayer}; {@linkcode TypeError} without a moment
 */
export function solveLowRankLayer(
  kernels: Kernels,
  solver: Solver,
  problem: LayerProblem,
  settings: SolverSettings,
): Solution {
  const { weights, rows, cols } = problem, rank = Math.min(settings.lowRank, rows, cols);
  const moment = problem.moment?.moment;
  if (moment === undefined) {
    throw new TypeError("Cannot solve a layer: a low-rank correction needs the moments of its inputs");
  }
  const plain = solveLayer(kernels, solver, problem, settings);
  const nothing: LowRank = { rank, a: new Uint16Array(rows * rank), b: new Uint16Array(rank * cols) };
  let best: Solution = { ...plain, tensor: { ...plain.tensor, lowRank: nothing } };
  const fit = (residual: Float32Array) => fitLowRank(kernels, residual, rows, cols, moment, rank);
  /** The correction of a solution's residual, kept if it is the best so far. */
  const refit = ({ tensor }: Solution): LowRank => {
    const other = dequantize(kernels, tensor, "F32"), residual = weights.map((value, i) => value - other[i]!);
    const lowRank = fit(residual);
    addLowRank(residual, lowRank, rows, cols, -1);
    const objective = outputPower(kernels, residual, rows, moment);
    if (objective < best.objective) best = { ...best, tensor: { ...tensor, lowRank }, objective };
    return lowRank;
  };
  for (const start of [refit(plain), fit(weights)]) {
    let lowRank = start;
    for (let turn = 0; turn < TURNS; turn++) {
      const target = weights.slice();
      addLowRank(target, lowRank, rows, cols, -1);
      lowRank = refit(solveLayer(kernels, solver, { ...problem, weights: target }, settings));
    }
  }
  return best;
}
