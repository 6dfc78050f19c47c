/**
 * The second moment of a layer's inputs prepared for solving: damped, ordered and factored; and the target
 * weights that make up for what was lost before the layer.
 */
import { WeightsError } from "../../errors.ts";
import { checkArray, checkCount, checkWhole, E_VALUE } from "../../native/call.ts";
import { momentElements } from "../../native/call_checks.ts";
import * as call from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";
import { throwIfStopped } from "../../progress.ts";
import { giveBack } from "../array_memory.ts";
import { findNonfinite } from "../convert.ts";
import type { GroupSize } from "../packed/layout.ts";
import { addProduct } from "../product.ts";
import { diagonalOf, type InputMoments, MAX_MOMENT_COLS, type MomentBlock, momentBlocks } from "./moments.ts";
import { type Correction, DEFAULT_DAMPING } from "./settings.ts";

/**
 * The second moment of a layer's inputs, damped, ordered and factored: all of it, or the blocks on its
 * diagonal one after the other (`momentBlocks`). Blocks know nothing of each other. Of a moment of which only
 * the diagonal is known the blocks have nothing beside it.
 */
export interface FactoredMoment {
  readonly cols: number;
  /** Columns of a block; `cols` where there is one. */
  readonly block: number;
  /** Mean of w x xᵀ with the damping on its diagonal: `f32[block, block]` for each block. */
  readonly moment: Float32Array<ArrayBuffer>;
  /** Columns of each block from the largest diagonal to the smallest: `i32[cols]`. */
  readonly order: Int32Array<ArrayBuffer>;
  /** U of each ordered block = U diag(pivots) Uᵀ: as `moment`. */
  readonly factor: Float32Array<ArrayBuffer>;
  /** `f32[cols]` */
  readonly pivots: Float32Array<ArrayBuffer>;
  /** Part of the mean diagonal that was added: more than asked for where a block was indefinite. */
  readonly damping: number;
  /** Columns that were 0 in every input. */
  readonly deadColumns: number;
  readonly tokens: number;
}

/** The smallest normal float32: of smaller ones each takes some processors a hundred cycles. */
const SMALLEST = 2 ** -126;

/** Least diagonal of a moment beside which subnormal numbers are nothing. */
const ORDINARY = 2 ** -60;

/** Makes numbers of a moment that are subnormal 0. */
function flush(values: Float32Array): void {
  for (let k = 0; k < values.length; k++) if (Math.abs(values[k]!) < SMALLEST) values[k] = 0;
}

/** Damping is raised tenfold at most this often before a moment counts as broken. */
const MAX_DAMPING_RAISES = 8;

/** Throws unless a factored moment has as many columns, and arrays of the right types and lengths. */
export function checkMoment(doing: string, factored: FactoredMoment, cols: number): void {
  const { block, moment, order, factor, pivots } = factored;
  if (factored.cols !== cols || !(cols >= 1 && cols <= MAX_MOMENT_COLS)) {
    throw new TypeError(`Cannot ${doing}: the moment must have ${cols} columns, got ${factored.cols}`);
  }
  checkWhole(doing, "moment.block", block, 1, cols);
  const elements = momentElements(cols, cols, block);
  checkArray(doing, "moment.moment", moment, elements);
  checkArray(doing, "moment.factor", factor, elements);
  checkArray(doing, "moment.pivots", pivots, cols);
  checkArray(doing, "moment.order", order, cols, "int32 values");
  const seen = new Uint8Array(cols);
  for (const [k, column] of order.entries()) {
    if (Math.floor(column / block) === Math.floor(k / block)) seen[column] = 1; // what lies outside is dropped
  }
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

/** Options of {@linkcode factorMoments}. */
export interface FactorOptions {
  /** Part of the mean diagonal that is added to it; default {@linkcode DEFAULT_DAMPING}. */
  readonly damping?: number | undefined;
  /** The sums are no longer needed: their memory becomes the moment's. */
  readonly takesSums?: boolean | undefined;
}

/**
 * Damps, orders and factors the moment of a layer's inputs, each block by itself.
 *
 * Where a block is not positive definite its damping is raised tenfold until it is, and the result says so:
 * codes are never made from NaN. Columns that no input ever reached keep only the damping.
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
  { damping = DEFAULT_DAMPING, takesSums = false }: FactorOptions = {},
): FactoredMoment {
  const doing = "factor a moment";
  const { cols, second, weight, tokens } = moments, given = moments.block ?? cols;
  if (!(Number.isInteger(cols) && cols >= 1 && cols <= MAX_MOMENT_COLS)) {
    throw new TypeError(`Cannot ${doing}: it must have 1 to ${MAX_MOMENT_COLS} columns, got ${cols}`);
  }
  checkWhole(doing, "columns of a block", given, 1, cols);
  checkArray(doing, "second", second, momentElements(cols, cols, given));
  if (!(weight > 0) || weight === Infinity) {
    throw new WeightsError(`Cannot ${doing}: the inputs' weights must add up to a number > 0, got ${weight}`);
  }
  if (findNonfinite(kernels, { data: second, dtype: "F32" }, second.length) >= 0) {
    throw new WeightsError(`Cannot ${doing}: it must be finite, got NaN or infinity`);
  }
  const mean = takesSums ? second : new Float32Array(second.length);
  for (let begin = 0; begin < mean.length; begin += PART) {
    throwIfStopped();
    const end = Math.min(begin + PART, mean.length);
    for (let k = begin; k < end; k++) mean[k] = second[k]! / weight;
  }
  const { moment, block } = solvable(mean, cols, given);
  const diagonal = diagonalOf(moment, cols, block);
  let power = 0, deadColumns = 0;
  for (const value of diagonal) {
    if (value < 0) throw new WeightsError(`Cannot ${doing}: its diagonal must be ≥ 0, got ${value}`);
    if (value === 0) deadColumns++;
    power += value;
  }
  if (power >= ORDINARY) flush(moment);
  // With inputs that were all 0 any codes do: plain rounding comes out of the unit moment.
  power = power === 0 ? 1 : power / cols;
  const order = Int32Array.from({ length: cols }, (_, k) => k);
  const factor = new Float32Array(moment.length), pivots = new Float32Array(cols);
  let used = damping;
  for (const own of momentBlocks(cols, block)) {
    order.subarray(own.first, own.first + own.cols).sort((a, b) => diagonal[b]! - diagonal[a]! || a - b);
    const end = own.at + own.cols ** 2;
    const part = { moment: moment.subarray(own.at, end), factor: factor.subarray(own.at, end) };
    used = Math.max(
      used,
      factorBlock(kernels, doing, own, { ...part, order, diagonal, pivots }, damping, power),
    );
  }
  for (const array of [moment, order, factor, pivots]) kernels.arrays.constant(array);
  return { cols, block, moment, order, factor, pivots, damping: used, deadColumns, tokens };
}

/**
 * Sums of blocks as solvers take them: of a diagonal alone blocks of {@linkcode DIAGONAL_BLOCK} columns are
 * made, with nothing beside it.
 */
export function solvable(
  sums: Float32Array<ArrayBuffer>,
  cols: number,
  block: number,
): { readonly moment: Float32Array<ArrayBuffer>; readonly block: number } {
  if (block > 1 || cols === 1) return { moment: sums, block };
  const own = solvableBlock(cols, block), moment = new Float32Array(momentElements(cols, cols, own));
  for (const { first, cols: count, at } of momentBlocks(cols, own)) {
    for (let k = 0; k < count; k++) moment[at + k * (count + 1)] = sums[first + k]!;
  }
  return { moment, block: own };
}

/** Columns of a block of {@linkcode solvable}'s moment. */
export const solvableBlock = (cols: number, block: number): number =>
  block > 1 ? block : Math.min(cols, DIAGONAL_BLOCK);

/** Columns of the blocks in which a diagonal is solved: whole groups and superblocks of every size. */
const DIAGONAL_BLOCK = 256;

/** Numbers that are gone through between two looks for a signal. */
const PART = 1 << 22;

/** Arrays of a moment: `moment` and `factor` of a block, the others of all columns. */
type BlockArrays =
  & Pick<FactoredMoment, "moment" | "order" | "factor" | "pivots">
  & { readonly diagonal: Float32Array };

/** Damps and factors a block. @returns the damping that it took */
function factorBlock(
  kernels: Kernels,
  doing: string,
  { first, cols }: MomentBlock,
  { moment, order, factor, pivots, diagonal }: BlockArrays,
  damping: number,
  mean: number,
): number {
  let used = damping;
  for (let raises = 0;; raises++) {
    for (let k = 0; k < cols; k++) moment[k * cols + k] = diagonal[first + k]! + used * mean;
    for (let i = 0; i < cols; i++) {
      const row = (order[first + i]! - first) * cols - first;
      throwIfStopped();
      for (let j = i; j < cols; j++) factor[i * cols + j] = moment[row + order[first + j]!]!;
    }
    if (isFactored(kernels, doing, factor, cols, pivots.subarray(first, first + cols))) return used;
    if (raises === MAX_DAMPING_RAISES) {
      throw new WeightsError(
        `Cannot ${doing}: it must be positive semidefinite, got an indefinite one even with damping ${used}`,
      );
    }
    used = used === 0 ? 1e-6 : used * 10;
  }
}

/** Factors an ordered block in place; false where it is not positive definite. */
function isFactored(
  kernels: Kernels,
  doing: string,
  factor: Float32Array,
  cols: number,
  pivots: Float32Array,
): boolean {
  if (cols === 1) { // as the kernel does, without a call for each of many columns
    pivots[0] = factor[0]!;
    factor[0] = 1;
    return pivots[0]! > 0 && pivots[0]! < Infinity;
  }
  const indefinite = new WeightsError(`Cannot ${doing}: it must be positive definite`);
  const explain = (status: number) => status === E_VALUE ? indefinite : undefined;
  try {
    call.factorMoment(kernels, { doing, explain }, factor, cols, pivots, workspace(kernels, cols, 0));
    flush(factor);
    return true;
  } catch (error) {
    if (error === indefinite) return false;
    throw error;
  }
}

/**
 * The factor of a moment whose columns keep their order, as a search that goes through a row needs it.
 *
 * @throws {WeightsError} when a block stays indefinite
 */
export function inOwnOrder(
  kernels: Kernels,
  { cols, block, moment }: FactoredMoment,
): Pick<FactoredMoment, "factor" | "pivots"> {
  const order = Int32Array.from({ length: cols }, (_, k) => k), diagonal = diagonalOf(moment, cols, block);
  const factor = new Float32Array(moment.length), pivots = new Float32Array(cols);
  const mean = diagonal.reduce((sum, value) => sum + value, 0) / cols;
  for (const own of momentBlocks(cols, block)) {
    const { first, cols: width, at } = own, end = at + width ** 2;
    const part = { moment: moment.subarray(at, end), factor: factor.subarray(at, end) };
    factorBlock(kernels, "factor a moment", own, { ...part, order, diagonal, pivots }, 0, mean);
    for (let k = 0; k < width; k++) part.moment[k * (width + 1)] = diagonal[first + k]!; // without what damped it
  }
  for (const array of [factor, pivots]) kernels.arrays.constant(array);
  return { factor, pivots };
}

/** A layer's weights, and the mean sums of what its inputs lost before it. */
export interface LossBefore {
  /** `f32[rows, cols]` */
  readonly weights: Float32Array;
  readonly rows: number;
  readonly moment: FactoredMoment;
  /** Σ w (x° − x) xᵀ of the layer's inputs, x° those of full precision: of the moment's blocks. */
  readonly cross?: Float32Array | undefined;
  /** Σ (r° − r) xᵀ of the stream r that the output is added to: `f32[rows, cols]`. */
  readonly residual?: Float32Array | undefined;
}

/**
 * The weights whose outputs on the inputs of the quantized model come nearest to the full-precision outputs
 * on full-precision inputs: `W + (correction · W · cross + residual) M⁻¹`, as in GPTAQ
 * (https://arxiv.org/abs/2504.02692), for each block of the moment; `residual` also corrects the stream that
 * the output is added to.
 *
 * **Shapes** → `f32[rows, cols]`
 *
 * @throws {TypeError | RangeError} when an array does not fit the sizes
 */
export function correctedTarget(
  kernels: Kernels,
  { weights, rows, moment, cross, residual }: LossBefore,
  { correction, residualCorrection }: Correction,
): Float32Array<ArrayBuffer> {
  const doing = "correct a layer's target", { cols, factor } = moment;
  checkCount(doing, "rows", rows);
  checkMoment(doing, moment, cols);
  checkArray(doing, "weights", weights, rows * cols);
  if (cross !== undefined) checkArray(doing, "cross", cross, factor.length);
  if (residual !== undefined) checkArray(doing, "residual", residual, rows * cols);
  const sums = new Float32Array(rows * cols);
  if (cross !== undefined && correction > 0) addLost(kernels, doing, { weights, rows, moment, cross }, sums);
  for (let k = 0; k < sums.length; k++) {
    const stream = residual === undefined ? 0 : residualCorrection * residual[k]!;
    sums[k] = correction * sums[k]! + stream;
  }
  const target = timesInverse(kernels, doing, moment, sums, rows, sums);
  for (let k = 0; k < target.length; k++) target[k]! += weights[k]!;
  return target;
}

/** `sums += W · cross`, for each block of the moment. **Shapes** `sums: f32[rows, cols]`, 0 */
function addLost(
  kernels: Kernels,
  doing: string,
  { weights, rows, moment: { cols, block }, cross }: LossBefore & { readonly cross: Float32Array },
  sums: Float32Array<ArrayBuffer>,
): void {
  if (block >= cols) return addProduct(kernels, doing, weights, cross, { rows, k: cols, cols }, sums);
  const part = new Float32Array(rows * block), lost = new Float32Array(rows * block);
  for (const { first, cols: own, at } of momentBlocks(cols, block)) {
    throwIfStopped();
    const size = { rows, k: own, cols: own }, count = rows * own;
    const columns = columnsOf(weights, rows, first, own, part.subarray(0, count));
    const products = lost.subarray(0, count).fill(0);
    addProduct(kernels, doing, columns, cross.subarray(at, at + own * own), size, products);
    for (let row = 0; row < rows; row++) {
      sums.set(products.subarray(row * own, (row + 1) * own), row * cols + first);
    }
  }
  giveBack(part, lost);
}

/**
 * `B M⁻¹`, for each block of the moment.
 *
 * **Shapes** `b: f32[rows, cols]` → `out: f32[rows, cols]`, which may be `b`
 */
export function timesInverse(
  kernels: Kernels,
  doing: string,
  { cols, block, factor, pivots, order }: FactoredMoment,
  b: Float32Array,
  rows: number,
  out = new Float32Array(rows * cols),
): Float32Array<ArrayBuffer> {
  const memory = new Float32Array(rows * Math.min(block, cols));
  for (const { first, cols: own, at } of momentBlocks(cols, block)) {
    throwIfStopped();
    const ordered = memory.subarray(0, rows * own);
    for (let row = 0; row < rows; row++) {
      for (let k = 0, to = row * own, from = row * cols; k < own; k++) {
        ordered[to + k] = b[from + order[first + k]!]!;
      }
    }
    const columns = pivots.subarray(first, first + own);
    call.solveMoment(kernels, doing, factor.subarray(at, at + own * own), columns, own, ordered, rows);
    for (let row = 0; row < rows; row++) {
      for (let k = 0, from = row * own, to = row * cols; k < own; k++) {
        out[to + order[first + k]!] = ordered[from + k]!;
      }
    }
  }
  giveBack(memory);
  return out;
}

/** Columns [first, first + count) of a matrix. */
export function columnsOf(
  matrix: Float32Array,
  rows: number,
  first: number,
  count: number,
  out = new Float32Array(rows * count),
): Float32Array<ArrayBuffer> {
  const cols = matrix.length / rows;
  for (let row = 0; row < rows; row++) {
    out.set(matrix.subarray(row * cols + first, row * cols + first + count), row * count);
  }
  return out;
}

/** Rows of a matrix at even distances. **Shapes** `matrix: f32[rows, cols]` → `f32[count, cols]` */
export function sampleRows(matrix: Float32Array, cols: number, count: number): Float32Array<ArrayBuffer> {
  const rows = matrix.length / cols, sample = new Float32Array(count * cols);
  for (let i = 0; i < count; i++) {
    const row = Math.floor((i + 0.5) * rows / count);
    sample.set(matrix.subarray(row * cols, (row + 1) * cols), i * cols);
  }
  return sample;
}

/** Most rows of which {@linkcode typicalPower} takes all. */
const POWER_ROWS = 256;

/** {@linkcode outputPower}, of many rows by some of them: a report needs no more. */
export function typicalPower(
  kernels: Kernels,
  w: Float32Array,
  rows: number,
  moment: FactoredMoment,
): number {
  if (rows <= POWER_ROWS) return outputPower(kernels, w, rows, moment);
  const sample = sampleRows(w, moment.cols, POWER_ROWS);
  const power = outputPower(kernels, sample, POWER_ROWS, moment) * rows / POWER_ROWS;
  giveBack(sample);
  return power;
}

/**
 * Mean power of outputs, Σ over rows of w M wᵀ, damping and all.
 *
 * **Shapes** `w: f32[rows, cols]`
 */
export function outputPower(
  kernels: Kernels,
  w: Float32Array,
  rows: number,
  { cols, block, moment }: FactoredMoment,
): number {
  let sum = 0;
  for (const { first, cols: own, at } of momentBlocks(cols, block)) {
    const products = new Float32Array(rows * own), size = { rows, k: own, cols: own };
    const part = own === cols ? w : columnsOf(w, rows, first, own);
    addProduct(kernels, "measure outputs", part, moment.subarray(at, at + own * own), size, products);
    for (let i = 0; i < products.length; i++) sum += products[i]! * part[i]!;
    giveBack(products, part === w ? undefined : part as Float32Array<ArrayBuffer>);
  }
  return sum;
}
