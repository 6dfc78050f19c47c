/**
 * The moment of a layer's inputs made fit for solving, and the weights that undo what was lost before a layer. Codes are found in
 * solvers.ts.
 */
import { KernelError, WeightsError } from "../../errors.ts";
import type { Kernels } from "../../native/mod.ts";
import { findNonfinite } from "../kernels.ts";
import type { GroupSize } from "../packed/layout.ts";
import { type InputMoments, MAX_MOMENT_COLS } from "./moments.ts";

/** The moment of a layer's inputs made fit for solving: damped, ordered and factored. */
export interface FactoredMoment {
  readonly cols: number;
  /** Mean of w x xᵀ with the damping on its diagonal: `f32[cols, cols]`. */
  readonly moment: Float32Array<ArrayBuffer>;
  /** Columns from the largest diagonal to the smallest: `i32[cols]`. */
  readonly order: Int32Array<ArrayBuffer>;
  /** U of the ordered moment = U diag(pivots) Uᵀ: `f32[cols, cols]`. */
  readonly factor: Float32Array<ArrayBuffer>;
  readonly pivots: Float32Array<ArrayBuffer>;
  /** Part of the mean diagonal that was added at last; more than was asked for where the moment was not positive definite. */
  readonly damping: number;
  /** Columns that were 0 in every input. */
  readonly deadColumns: number;
  readonly tokens: number;
}

/** Damping is raised tenfold at most this often before a moment counts as broken. */
const MAX_DAMPING_RAISES = 8;

/** Part of a moment's mean diagonal that is added to it unless settings say otherwise. */
export const DEFAULT_DAMPING = 0.01;

/** How much of what was lost before a layer is to be undone. */
export interface Correction {
  /** How much of the error made before the layer it should undo, 0 to 1. */
  readonly correction: number;
  /** The same for the error of the stream that the layer's output is added to. */
  readonly residualCorrection: number;
}

export function fail(what: string, status: number): never {
  throw new KernelError(`Cannot ${what}: the kernel reports status ${status}`, { status });
}

/** Scratch that the kernels need, kept between calls and grown. */
let scratch = new Float32Array(0);
export function workspace(
  kernels: Kernels,
  cols: number,
  groupSize: GroupSize,
): Float32Array {
  const floats = new BigUint64Array(1);
  const status = kernels.calls.aq_solver_work(
    kernels.size(cols),
    kernels.size(groupSize),
    kernels.threads,
    floats,
  );
  if (status !== 0) fail(`solve a layer of ${cols} columns`, status);
  if (scratch.length < Number(floats[0])) scratch = new Float32Array(Number(floats[0]));
  return scratch;
}

/**
 * Damps, orders and factors the moment of a layer's inputs.
 *
 * Where it is not positive definite the damping is raised tenfold until it is, and the result says so: codes are never made from
 * NaN. Columns that no input ever reached keep only the damping.
 *
 * @throws {WeightsError} when the moment holds NaN or infinity, a negative diagonal, or stays indefinite
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 * import { accumulateMoment, emptyMoments } from "./moments.ts";
 *
 * const kernels = await openKernels();
 * const moments = emptyMoments(2);
 * accumulateMoment(kernels, Float32Array.of(1, 2, 3, 4), undefined, undefined, 2, moments.second);
 * moments.tokens = moments.weight = 2;
 * console.log(factorMoments(kernels, moments).order); // column 1 first: its inputs are larger
 * ```
 */
export function factorMoments(
  kernels: Kernels,
  moments: InputMoments,
  { damping = DEFAULT_DAMPING }: {
    readonly damping?: number | undefined;
  } = {},
): FactoredMoment {
  const doing = "factor a moment";
  const { cols, second, weight, tokens } = moments;
  if (!(cols >= 1 && cols <= MAX_MOMENT_COLS) || second.length !== cols * cols) {
    throw new TypeError(`Cannot ${doing}: second must be ${cols} × ${cols} sums, got ${second.length}`);
  }
  if (!(weight > 0) || weight === Infinity) {
    throw new WeightsError(`Cannot ${doing}: the inputs' weights must add up to a number > 0, got ${weight}`);
  }
  if (findNonfinite(kernels, { data: second, dtype: "F32" }, second.length) >= 0) {
    throw new WeightsError(`Cannot ${doing}: it must be finite, got NaN or infinity`);
  }
  const moment = second.map((value) => value / weight);
  let mean = 0, deadColumns = 0;
  for (let k = 0; k < cols; k++) {
    const diagonal = moment[k * cols + k]!;
    if (diagonal < 0) throw new WeightsError(`Cannot ${doing}: its diagonal must be ≥ 0, got ${diagonal}`);
    if (diagonal === 0) deadColumns++;
    mean += diagonal;
  }
  // With inputs that were all 0 any codes do: plain rounding comes out of the unit moment.
  mean = mean === 0 ? 1 : mean / cols;
  const diagonal = diagonalOf(moment, cols);
  const order = Int32Array.from({ length: cols }, (_, k) => k);
  order.sort((a, b) => diagonal[b]! - diagonal[a]! || a - b);
  const factor = new Float32Array(cols * cols), pivots = new Float32Array(cols);
  const work = workspace(kernels, cols, 0);
  let used = damping;
  for (let raises = 0;; raises++) {
    for (let k = 0; k < cols; k++) moment[k * cols + k] = diagonal[k]! + used * mean;
    for (let i = 0; i < cols; i++) {
      const row = order[i]! * cols;
      for (let j = i; j < cols; j++) factor[i * cols + j] = moment[row + order[j]!]!;
    }
    const status = kernels.calls.aq_factor_moment(
      factor,
      kernels.size(cols),
      pivots,
      work,
      kernels.isaNumber,
      kernels.threads,
    );
    if (status === 0) break;
    if (status !== -3) fail(doing, status);
    if (raises === MAX_DAMPING_RAISES) {
      throw new WeightsError(
        `Cannot ${doing}: it must be positive semidefinite, got an indefinite one even with damping ${used}`,
      );
    }
    used = used === 0 ? 1e-6 : used * 10;
  }
  return { cols, moment, order, factor, pivots, damping: used, deadColumns, tokens };
}

/**
 * The weights whose outputs on the inputs as they are come nearest to the full-precision outputs on the inputs as they should
 * have been: `W + (correction · W · cross + residual) M⁻¹`. The idea is GPTAQ's (https://arxiv.org/abs/2504.02692); that the stream which
 * the output is added to is mended, too, is ours.
 *
 * **Shapes** `weights: f32[rows, cols]`, `cross: f32[cols, cols]` and `residual: f32[rows, cols]` as mean sums → `f32[rows, cols]`
 */
export function correctedTarget(
  kernels: Kernels,
  weights: Float32Array,
  rows: number,
  { cols, factor, pivots, order }: FactoredMoment,
  cross: Float32Array | undefined,
  residual: Float32Array | undefined,
  settings: Correction,
): Float32Array<ArrayBuffer> {
  const wanted = new Float32Array(rows * cols);
  if (cross !== undefined && settings.correction > 0) {
    // out[t, n] = Σ x[t, k] w[n, k]: the cross moment's columns are the rows that a product takes
    const turned = new Float32Array(cols * cols);
    for (let i = 0; i < cols; i++) {
      for (let j = 0; j < cols; j++) turned[j * cols + i] = settings.correction * cross[i * cols + j]!;
    }
    const status = kernels.calls.aq_linear(
      weights,
      kernels.size(rows),
      turned,
      0,
      null,
      kernels.size(cols),
      kernels.size(cols),
      wanted,
      kernels.isaNumber,
      kernels.threads,
    );
    if (status !== 0) fail("correct a layer's target", status);
  }
  if (residual !== undefined) {
    for (let i = 0; i < wanted.length; i++) wanted[i]! += settings.residualCorrection * residual[i]!;
  }
  const ordered = new Float32Array(rows * cols);
  for (let row = 0; row < rows * cols; row += cols) {
    for (let k = 0; k < cols; k++) ordered[row + k] = wanted[row + order[k]!]!;
  }
  const status = kernels.calls.aq_solve_moment(
    factor,
    pivots,
    kernels.size(cols),
    ordered,
    kernels.size(rows),
    workspace(kernels, cols, 0),
    kernels.isaNumber,
    kernels.threads,
  );
  if (status !== 0) fail("correct a layer's target", status);
  for (let row = 0; row < rows * cols; row += cols) {
    for (let k = 0; k < cols; k++) wanted[row + order[k]!] = weights[row + order[k]!]! + ordered[row + k]!;
  }
  return wanted;
}

/** How much each column counts by itself. */
export const diagonalOf = (moment: Float32Array, cols: number): Float32Array<ArrayBuffer> =>
  Float32Array.from({ length: cols }, (_, k) => moment[k * cols + k]!);
