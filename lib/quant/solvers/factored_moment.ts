/**
 * The second moment of a layer's inputs prepared for solving: damped, ordered and factored; and the target
 * weights that make up for what was lost before the layer.
 */
import { WeightsError } from "../../errors.ts";
import { checkArray, checkCount, E_VALUE } from "../../native/call.ts";
import * as call from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";
import { throwIfStopped } from "../../progress.ts";
import { findNonfinite } from "../convert.ts";
import type { GroupSize } from "../packed/layout.ts";
import { product } from "../product.ts";
import { type InputMoments, MAX_MOMENT_COLS } from "./moments.ts";
import { type Correction, DEFAULT_DAMPING } from "./settings.ts";

/** The second moment of a layer's inputs, damped, ordered and factored. */
export interface FactoredMoment {
  readonly cols: number;
  /** Mean of w x xᵀ with the damping on its diagonal: `f32[cols, cols]`. */
  readonly moment: Float32Array<ArrayBuffer>;
  /** Columns from the largest diagonal to the smallest: `i32[cols]`. */
  readonly order: Int32Array<ArrayBuffer>;
  /** U of the ordered moment = U diag(pivots) Uᵀ: `f32[cols, cols]`. */
  readonly factor: Float32Array<ArrayBuffer>;
  readonly pivots: Float32Array<ArrayBuffer>;
  /** Part of the mean diagonal that was added; more than asked for where the moment was indefinite. */
  readonly damping: number;
  /** Columns that were 0 in every input. */
  readonly deadColumns: number;
  readonly tokens: number;
}

/** Damping is raised tenfold at most this often before a moment counts as broken. */
const MAX_DAMPING_RAISES = 8;

/** Throws unless a factored moment has as many columns, and arrays of the right types and lengths. */
export function checkMoment(doing: string, factored: FactoredMoment, cols: number): void {
  const { moment, order, factor, pivots } = factored;
  if (factored.cols !== cols || !(cols >= 1 && cols <= MAX_MOMENT_COLS)) {
    throw new TypeError(`Cannot ${doing}: the moment must have ${cols} columns, got ${factored.cols}`);
  }
  checkArray(doing, "moment.moment", moment, cols * cols);
  checkArray(doing, "moment.factor", factor, cols * cols);
  checkArray(doing, "moment.pivots", pivots, cols);
  checkArray(doing, "moment.order", order, cols, "int32 values");
  const seen = new Uint8Array(cols);
  for (const column of order) seen[column] = 1; // what lies outside is dropped
  if (seen.includes(0)) throw new RangeError(`Cannot ${doing}: moment.order must hold every column once`);
}

/** Scratch that the kernels need, kept between calls and grown. */
let scratch = new Float32Array(0);
export function workspace(kernels: Kernels, cols: number, groupSize: GroupSize): Float32Array {
  const floats = new BigUint64Array(1);
  call.solverWork(kernels, `solve a layer of ${cols} columns`, cols, groupSize, floats);
  if (scratch.length < Number(floats[0])) scratch = new Float32Array(Number(floats[0]));
  return scratch;
}

/**
 * Damps, orders and factors the moment of a layer's inputs.
 *
 * Where it is not positive definite the damping is raised tenfold until it is, and the result says so: codes
 * are never made from NaN. Columns that no input ever reached keep only the damping.
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
  { damping = DEFAULT_DAMPING }: { readonly damping?: number | undefined } = {},
): FactoredMoment {
  const doing = "factor a moment";
  const { cols, second, weight, tokens } = moments;
  if (!(Number.isInteger(cols) && cols >= 1 && cols <= MAX_MOMENT_COLS)) {
    throw new TypeError(`Cannot ${doing}: it must have 1 to ${MAX_MOMENT_COLS} columns, got ${cols}`);
  }
  checkArray(doing, "second", second, cols * cols);
  if (!(weight > 0) || weight === Infinity) {
    throw new WeightsError(`Cannot ${doing}: the inputs' weights must add up to a number > 0, got ${weight}`);
  }
  if (findNonfinite(kernels, { data: second, dtype: "F32" }, second.length) >= 0) {
    throw new WeightsError(`Cannot ${doing}: it must be finite, got NaN or infinity`);
  }
  const moment = new Float32Array(second.length);
  for (let row = 0; row < moment.length; row += cols) {
    throwIfStopped();
    for (let k = row; k < row + cols; k++) moment[k] = second[k]! / weight;
  }
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
      throwIfStopped();
      for (let j = i; j < cols; j++) factor[i * cols + j] = moment[row + order[j]!]!;
    }
    if (isFactored(kernels, doing, { factor, cols, pivots }, work)) break;
    if (raises === MAX_DAMPING_RAISES) {
      throw new WeightsError(
        `Cannot ${doing}: it must be positive semidefinite, got an indefinite one even with damping ${used}`,
      );
    }
    used = used === 0 ? 1e-6 : used * 10;
  }
  return { cols, moment, order, factor, pivots, damping: used, deadColumns, tokens };
}

/** Factors an ordered moment in place; false where it is not positive definite. */
function isFactored(
  kernels: Kernels,
  doing: string,
  { factor, cols, pivots }: Pick<FactoredMoment, "factor" | "cols" | "pivots">,
  work: Float32Array,
): boolean {
  const indefinite = new WeightsError(`Cannot ${doing}: it must be positive definite`);
  const explain = (status: number) => status === E_VALUE ? indefinite : undefined;
  try {
    call.factorMoment(kernels, { doing, explain }, factor, cols, pivots, work);
    return true;
  } catch (error) {
    if (error === indefinite) return false;
    throw error;
  }
}

/** A layer's weights, and the mean sums of what its inputs lost before it. */
export interface LossBefore {
  /** `f32[rows, cols]` */
  readonly weights: Float32Array;
  readonly rows: number;
  readonly moment: FactoredMoment;
  /** Σ w (x° − x) xᵀ of the layer's inputs, x° those of full precision: `f32[cols, cols]`. */
  readonly cross?: Float32Array | undefined;
  /** Σ (r° − r) xᵀ of the stream r that the output is added to: `f32[rows, cols]`. */
  readonly residual?: Float32Array | undefined;
}

/**
 * The weights whose outputs on the inputs of the quantized model come nearest to the full-precision outputs
 * on full-precision inputs: `W + (correction · W · cross + residual) M⁻¹`, as in GPTAQ
 * (https://arxiv.org/abs/2504.02692); `residual` also corrects the stream that the output is added to.
 *
 * **Shapes** → `f32[rows, cols]`
 *
 * @throws {TypeError | RangeError} when an array does not fit the sizes
 */
export function correctedTarget(
  kernels: Kernels,
  { weights, rows, moment, cross, residual }: LossBefore,
  settings: Correction,
): Float32Array<ArrayBuffer> {
  const doing = "correct a layer's target", { cols, factor, pivots, order } = moment;
  checkCount(doing, "rows", rows);
  checkMoment(doing, moment, cols);
  checkArray(doing, "weights", weights, rows * cols);
  if (cross !== undefined) checkArray(doing, "cross", cross, cols * cols);
  if (residual !== undefined) checkArray(doing, "residual", residual, rows * cols);
  let wanted = new Float32Array(rows * cols);
  if (cross !== undefined && settings.correction > 0) {
    // a product takes the cross moment's columns as rows
    const turned = new Float32Array(cols * cols);
    for (let i = 0; i < cols; i++) {
      throwIfStopped();
      for (let j = 0; j < cols; j++) turned[j * cols + i] = settings.correction * cross[i * cols + j]!;
    }
    wanted = product(kernels, doing, weights, turned, { tokens: rows, rows: cols, cols });
  }
  if (residual !== undefined) {
    for (let i = 0; i < wanted.length; i++) wanted[i]! += settings.residualCorrection * residual[i]!;
  }
  const ordered = new Float32Array(rows * cols);
  for (let row = 0; row < rows * cols; row += cols) {
    for (let k = 0; k < cols; k++) ordered[row + k] = wanted[row + order[k]!]!;
  }
  call.solveMoment(kernels, doing, factor, pivots, cols, ordered, rows, workspace(kernels, cols, 0));
  for (let row = 0; row < rows * cols; row += cols) {
    for (let k = 0; k < cols; k++) wanted[row + order[k]!] = weights[row + order[k]!]! + ordered[row + k]!;
  }
  return wanted;
}

/** Weight of each column by itself. */
export const diagonalOf = (moment: Float32Array, cols: number): Float32Array<ArrayBuffer> =>
  Float32Array.from({ length: cols }, (_, k) => moment[k * cols + k]!);
