/**
 * Plain GPTQ, re-implemented: Frantar et al., https://arxiv.org/abs/2210.17323, with the choices of the
 * reference code (github.com/IST-DASLab/gptq, gptq.py): minimum–maximum ranges, columns by falling diagonal
 * (act-order) with the groups fixed before, damping of a hundredth of the mean diagonal. A peer for the
 * bench, slow and plain; nothing else uses it.
 */
import { type FactoredMoment, factorMoments } from "../../quant/solvers/factored_moment.ts";
import type { Kernels } from "../../native/mod.ts";
import { groupCount, quantize } from "../../quant/mod.ts";
import { type GroupScales, scalesOf } from "../../quant/solvers/steps.ts";
import { type GridSetting, type LayerInputs, type Method, reimplementation } from "./method.ts";

/** Added to the diagonal of a second moment, in units of its mean. */
const DAMPING = 0.01;

/** Columns that no input ever reached: GPTQ sets their weights to 0 and their diagonal to 1. */
const deadColumns = ({ cols, secondMoment }: LayerInputs): number[] =>
  Array.from({ length: cols }, (_, i) => i).filter((i) => secondMoment[i * cols + i] === 0);

/** The damped second moment M = U D Uᵀ, columns by falling diagonal. */
function factored(kernels: Kernels, inputs: LayerInputs): FactoredMoment {
  const { cols } = inputs, second = Float32Array.from(inputs.secondMoment);
  for (const i of deadColumns(inputs)) second[i * cols + i] = 1;
  return factorMoments(kernels, { cols, second, tokens: 1, weight: 1 }, { damping: DAMPING });
}

/**
 * Error feedback: columns are rounded one after the other, each after it has taken over the errors of those
 * before it, `w_j ← w_j + Σ_{i<j} (w_i − ŵ_i) U_ij`. GPTQ's updates through the inverse of M are the same
 * numbers in another order (theorem 6 of https://arxiv.org/abs/2307.13304).
 *
 * **Shapes** `weights: f32[rows, cols]` → `f32[rows, cols]`
 */
function feedbackErrors(
  weights: Float32Array,
  rows: number,
  { bits, groupSize }: GridSetting,
  { scale, zeroPoint }: GroupScales,
  { cols, order, factor }: FactoredMoment,
  dead: readonly number[],
): Float32Array<ArrayBuffer> {
  const groups = groupCount(cols, groupSize), size = groupSize === 0 ? cols : groupSize, top = 2 ** bits - 1;
  const restored = new Float32Array(rows * cols);
  const left = new Float64Array(cols);
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < cols; i++) left[i] = weights[row * cols + order[i]!]!;
    for (const column of dead) left[order.indexOf(column)] = 0;
    const original = left.slice();
    for (let i = 0; i < cols; i++) {
      const column = order[i]!, group = row * groups + Math.floor(column / size);
      const s = scale[group]!, z = zeroPoint[group]!;
      const value = s * (Math.min(top, Math.max(0, Math.round(left[i]! / s + z))) - z);
      restored[row * cols + column] = value;
      const error = original[i]! - value;
      for (let j = i + 1; j < cols; j++) left[j]! += error * factor[i * cols + j]!;
    }
  }
  return restored;
}

/**
 * Plain GPTQ as a method. Zero points are real halves, as our solvers', where the reference code has whole
 * numbers.
 *
 * @throws {WeightsError} by its `quantize`, when the second moment is indefinite even with damping far above
 * its mean diagonal
 */
export function gptq(kernels: Kernels, setting: GridSetting): Method {
  return reimplementation("GPTQ", setting, true, (weights, rows, cols, given) => {
    const inputs = given!, moment = factored(kernels, inputs);
    const options = { ...setting, solver: "round" } as const;
    const rounded = quantize(kernels, { data: weights, dtype: "F32" }, rows, cols, options);
    return {
      weights: feedbackErrors(weights, rows, setting, scalesOf(rounded), moment, deadColumns(inputs)),
      ...(moment.damping > DAMPING ? { note: `damping raised from ${DAMPING} to ${moment.damping}` } : {}),
    };
  });
}
