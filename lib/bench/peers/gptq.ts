/**
 * Plain GPTQ, re-implemented: Frantar et al., https://arxiv.org/abs/2210.17323, with the choices of the reference code
 * (github.com/IST-DASLab/gptq, gptq.py): minimum–maximum grid, columns by falling diagonal (act-order) with the groups fixed before,
 * damping of a hundredth of the mean diagonal. A rival for the bench, slow and plain; nothing of ours uses it.
 */
import { WeightsError } from "../../errors.ts";
import type { Kernels } from "../../native/mod.ts";
import { groupCount, packedBytes, quantize as quantizeKernel } from "../../quant/mod.ts";
import { choleskyFactor, choleskyInverse } from "./cholesky.ts";
import {
  checkLayer,
  gridName,
  type GridSetting,
  type LayerInputs,
  type Method,
  neededInputs,
} from "./method.ts";

export interface GptqOptions {
  /** Columns by falling diagonal of the second moment, else as they come. Default true. */
  readonly actOrder?: boolean;
  /** Added to the diagonal, in units of its mean. Default 0.01. */
  readonly damping?: number;
}

/** Damping grows tenfold until the matrix can be factored; past this many times the mean diagonal it is no second moment. */
const MAX_DAMPING = 10;

/** A grid a group: `w ≈ scale · (code − zeroPoint)`, `f32[rows, groups]` each. */
export interface Grid {
  readonly scale: Float32Array;
  readonly zeroPoint: Float32Array;
}

/** What {@linkcode feedbackErrors} works with: the columns' order and the upper factor of the damped inverse in that order. */
export interface FeedbackFactor {
  readonly order: Int32Array;
  /** `f64[cols, cols]`, U with `H⁻¹ = Uᵀ U`, rows and columns in `order` */
  readonly upper: Float64Array;
  /** Columns that no input ever reached. */
  readonly dead: readonly number[];
  /** In units of the mean diagonal. */
  readonly damping: number;
}

/**
 * Orders, damps, inverts and factors a second moment, as GPTQ needs it. Dead columns get 1 on the diagonal.
 *
 * @throws {WeightsError} when the matrix cannot be factored with ten times its mean diagonal added: it is no second moment
 *
 * @example
 * ```ts
 * import { feedbackFactor } from "./gptq.ts";
 * const { order, damping } = feedbackFactor({ cols: 2, secondMoment: Float64Array.of(1, 0.5, 0.5, 2) });
 * console.log(order, damping); // 1 0, 0.01
 * ```
 */
export function feedbackFactor(
  { cols, secondMoment }: LayerInputs,
  { actOrder = true, damping: firstDamping = 0.01 }: GptqOptions = {},
): FeedbackFactor {
  const diagonal = Float64Array.from({ length: cols }, (_, i) => secondMoment[i * cols + i]!);
  const dead = [...diagonal.keys()].filter((i) => diagonal[i] === 0);
  for (const i of dead) diagonal[i] = 1;
  const order = Int32Array.from(diagonal.keys());
  if (actOrder) order.sort((a, b) => diagonal[b]! - diagonal[a]! || a - b);
  const mean = diagonal.reduce((sum, value) => sum + value, 0) / cols;
  for (let damping = firstDamping; damping <= MAX_DAMPING; damping = damping === 0 ? 1e-6 : damping * 10) {
    const matrix = new Float64Array(cols * cols);
    for (let i = 0; i < cols; i++) {
      for (let j = 0; j < cols; j++) matrix[i * cols + j] = secondMoment[order[i]! * cols + order[j]!]!;
      matrix[i * cols + i] = diagonal[order[i]!]! + damping * mean;
    }
    const factor = choleskyFactor(matrix, cols);
    const lower = factor && choleskyFactor(choleskyInverse(factor, cols), cols);
    if (lower === undefined) continue;
    const upper = new Float64Array(cols * cols);
    for (let i = 0; i < cols; i++) for (let j = 0; j <= i; j++) upper[j * cols + i] = lower[i * cols + j]!;
    return { order, upper, dead, damping };
  }
  throw new WeightsError(
    `Cannot invert a second moment: it must be positive definite with ${MAX_DAMPING} times its mean diagonal ` +
      `added, got a mean diagonal of ${mean}`,
  );
}

/**
 * Error feedback: columns are rounded to their group's grid one after the other, and what is still to come takes up the error,
 * `w_j ← w_j − (w_i − ŵ_i) U_ij / U_ii`. The reference code does so in blocks of 128 columns and brings the rest up to date after each,
 * which changes the order of additions and nothing else; here a row is finished before the next.
 *
 * **Shapes** `weights: f32[rows, cols]`, a grid for each of `groups` groups of `groupSize` columns → `f32[rows, cols]`
 */
export function feedbackErrors(
  weights: Float32Array,
  rows: number,
  cols: number,
  { bits, groupSize }: GridSetting,
  { scale, zeroPoint }: Grid,
  { order, upper, dead }: FeedbackFactor,
): Float32Array<ArrayBuffer> {
  const groups = groupCount(cols, groupSize), size = groupSize === 0 ? cols : groupSize, top = 2 ** bits - 1;
  const restored = new Float32Array(rows * cols);
  const left = new Float64Array(cols);
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < cols; i++) left[i] = weights[row * cols + order[i]!]!;
    for (const column of dead) left[order.indexOf(column)] = 0;
    for (let i = 0; i < cols; i++) {
      const column = order[i]!, group = row * groups + Math.floor(column / size);
      const s = scale[group]!, z = zeroPoint[group]!;
      const code = Math.min(top, Math.max(0, Math.round(left[i]! / s + z)));
      const value = s * (code - z);
      restored[row * cols + column] = value;
      const error = (left[i]! - value) / upper[i * cols + i]!;
      for (let j = i + 1; j < cols; j++) left[j]! -= error * upper[i * cols + j]!;
    }
  }
  return restored;
}

/** The grid of every group's minimum and maximum in half precision: that of the solver `round`. */
export function minMaxGrid(
  kernels: Kernels,
  weights: Float32Array,
  rows: number,
  cols: number,
  { bits, groupSize }: GridSetting,
): Grid {
  const packed = quantizeKernel(kernels, { data: weights, dtype: "F32" }, rows, cols, {
    bits,
    groupSize,
    solver: "round",
  });
  const halves = (values: Uint16Array<ArrayBuffer>) =>
    Float32Array.from(new Float16Array(values.buffer, values.byteOffset, values.length));
  return { scale: halves(packed.scale), zeroPoint: halves(packed.zeroPoint!) };
}

/**
 * Plain GPTQ as a method. The grid is that of the solver `round`, with a real half-precision zero point, where the reference code has an integer one.
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 * import { gptq } from "./gptq.ts";
 * const method = gptq(await openKernels(), { bits: 2, groupSize: 0 });
 * const inputs = { cols: 3, secondMoment: Float64Array.of(2, 1, 0, 1, 2, 0, 0, 0, 1) };
 * console.log(method.quantize(Float32Array.of(0.1, -0.4, 0.9), 1, 3, inputs));
 * ```
 */
export function gptq(kernels: Kernels, setting: GridSetting, options: GptqOptions = {}): Method {
  const name = gridName("GPTQ", setting);
  return {
    name,
    kind: "re-implementation",
    ...setting,
    needsInputs: true,
    quantize(weights, rows, cols, given) {
      const inputs = neededInputs(name, given);
      checkLayer(name, weights, rows, cols, inputs);
      const factor = feedbackFactor(inputs, options);
      const grid = minMaxGrid(kernels, weights, rows, cols, setting);
      const wanted = options.damping ?? 0.01;
      return {
        weights: feedbackErrors(weights, rows, cols, setting, grid, factor),
        storedBytes: packedBytes(rows, cols, setting.bits, setting.groupSize, "real"),
        ...(factor.damping > wanted ? { note: `damping raised from ${wanted} to ${factor.damping}` } : {}),
      };
    },
  };
}
