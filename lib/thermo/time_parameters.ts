/**
 * The phases' work on a layer's time parameters: activation ranges that pass continuously from group to group
 * (phase 2), and output corrections of all groups at once under the Gauss-Markov prior (phase 3). lib/time
 * defines, stores and selects time parameters.
 */
import type { Kernels } from "../native/mod.ts";
import {
  activationGrid,
  type ActivationParameters,
  outputCorrection,
  type OutputParameters,
  type QuantizedMatrix,
  type TimeGroupMoments,
  type TimeGroups,
} from "../time/mod.ts";
import { solveGaussMarkov } from "./gauss_markov.ts";
import { smoothActivation, type SmoothingOptions } from "./smoother.ts";

/**
 * A layer's static quantization parameters, one pair a bin instead of one a group, blended by
 * {@linkcode smoothActivation} and rounded to whole zero points that still cover the calibrated range; bins
 * outside every window keep their group's parameters to the bit.
 *
 * @throws {TypeError} when there is not one pair for each group
 * @throws {RangeError} when an option is not allowed
 *
 * @example
 * ```ts
 * import { equalTimeGroups, timestepAxis } from "../time/mod.ts";
 * import { smoothActivationParameters } from "./time_parameters.ts";
 * const groups = equalTimeGroups(timestepAxis(100), 2);
 * const grids = { bits: 8, scale: Float32Array.of(0.1, 0.2), zeroPoint: Int32Array.of(0, 0) } as const;
 * console.log(smoothActivationParameters(groups, grids).scale.subarray(47, 51)); // 0.13, 0.15, 0.19, 0.2
 * ```
 */
export function smoothActivationParameters(
  groups: TimeGroups,
  activation: ActivationParameters,
  options: SmoothingOptions = {},
): ActivationParameters {
  const { bits } = activation;
  const smooth = smoothActivation(groups, activation, options);
  const { bins } = groups.axis, top = 2 ** bits - 1;
  const scale = new Float32Array(bins), zeroPoint = new Int32Array(bins);
  for (let bin = 0; bin < bins; bin++) {
    const s = smooth.scale[bin]!, z = smooth.zeroPoint[bin]!, g = groups.groupOfBin(bin);
    const isOwn = s === activation.scale[g] && z === activation.zeroPoint[g];
    const grid = isOwn ? { scale: s, zeroPoint: z } : activationGrid(-s * z, s * (top - z), bits);
    scale[bin] = grid.scale;
    zeroPoint[bin] = grid.zeroPoint;
  }
  return { bits, scale, zeroPoint };
}

/** A time group's input moments, and how much its errors count. */
export interface WeightedMoments extends TimeGroupMoments {
  /** ω of the group; default 1. */
  readonly weight?: number | undefined;
}

/**
 * Output corrections of every time group, output by output the minimum of
 * `Σ_g ω_g E_g[(y − gain_g ŷ − bias_g)²] + λ Σ_g ‖θ_{g+1} − θ_g‖²` around the shrunk closed form of each
 * group; λ is relative to the data term.
 *
 * **Shapes** `weights` and `quantized: f32[rows, cols]`; `moments` one a group → `gain` and
 * `bias: f32[groups, rows]`
 *
 * @throws as `outputCorrection` and `solveGaussMarkov`
 */
export function correctOutputs(
  kernels: Kernels,
  matrix: QuantizedMatrix,
  moments: readonly WeightedMoments[],
  markovWeight = 0,
): OutputParameters {
  const { quantized, rows, cols } = matrix, groups = moments.length;
  const gain = new Float32Array(groups * rows), bias = new Float32Array(groups * rows);
  const curvature = new Float64Array(rows * groups * 4);
  for (const [g, group] of moments.entries()) {
    const { weight = 1 } = group;
    if (!(weight >= 0 && weight < Infinity)) {
      throw new RangeError(
        `Cannot correct a layer's output: weights must be numbers ≥ 0, got ${weight} for group ${g}`,
      );
    }
    const own = outputCorrection(kernels, matrix, group);
    gain.set(own.gain, g * rows);
    bias.set(own.bias, g * rows);
    if (markovWeight === 0) continue;
    for (let row = 0; row < rows; row++) {
      let mean = 0, square = 0;
      for (let i = 0; i < cols; i++) {
        const q = quantized[row * cols + i]!;
        mean += q * group.mean[i]!;
        let sum = 0;
        for (let j = 0; j < cols; j++) sum += group.second[i * cols + j]! * quantized[row * cols + j]!;
        square += q * sum;
      }
      curvature.set([weight * square, weight * mean, weight * mean, weight], (row * groups + g) * 4);
    }
  }
  if (markovWeight === 0 || groups < 2) return { gain, bias };
  const target = new Float64Array(groups * 2);
  for (let row = 0; row < rows; row++) {
    const own = curvature.subarray(row * groups * 4, (row + 1) * groups * 4);
    if (!isDetermined(own, groups)) continue;
    for (let g = 0; g < groups; g++) {
      target[2 * g] = gain[g * rows + row]!;
      target[2 * g + 1] = bias[g * rows + row]!;
    }
    const theta = solveGaussMarkov({ curvature: own, target, n: 2 }, markovWeight);
    for (let g = 0; g < groups; g++) {
      gain[g * rows + row] = theta[2 * g]!;
      bias[g * rows + row] = theta[2 * g + 1]!;
    }
  }
  return { gain, bias };
}

/** True where gain and bias are determined: an output that is always 0 has no gain. */
function isDetermined(curvature: Float64Array, groups: number): boolean {
  let squares = 0, weights = 0;
  for (let g = 0; g < groups; g++) {
    squares += curvature[4 * g]!;
    weights += curvature[4 * g + 3]!;
  }
  return squares > 0 && weights > 0;
}
