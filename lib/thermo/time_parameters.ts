/**
 * The phases' work on θ as a whole: activation grids that pass continuously from group to group (phase 2), and output corrections of all groups
 * at once under the Gauss-Markov prior (phase 3). What θ is and how it is selected is lib/time's.
 */
import type { Kernels } from "../native/mod.ts";
import {
  activationGrid,
  type ActivationParameters,
  type LayerParameters,
  outputCorrection,
  type OutputParameters,
  type TimeGroupMoments,
  type TimeGroups,
  TimeParameters,
} from "../time/mod.ts";
import { solveGaussMarkov } from "./gauss_markov.ts";
import { smoothActivation, type SmoothingOptions } from "./smoother.ts";

/**
 * A layer's static grids, one a bin instead of one a group, blended as {@linkcode smoothActivation} does and put on whole zero points that still
 * cover what calibration saw; bins outside every window keep their group's grid to the bit.
 *
 * @throws {TypeError} when there is not one grid for each group
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

/**
 * Phase 2 for a model: θ with smooth activation grids where `keeps` says so; everything else is the same.
 *
 * @param keeps which layers; default all. What `keepWhereErrorDoesNotRise` kept
 * @throws as {@linkcode smoothActivationParameters}, or when a layer's grids are one a bin already
 */
export function smoothTimeParameters(
  parameters: TimeParameters,
  options: SmoothingOptions = {},
  keeps: (layer: string) => boolean = () => true,
): TimeParameters {
  const { groups, fingerprint, sampler } = parameters;
  const layers = new Map<string, LayerParameters>();
  for (const [name, layer] of parameters.layers) {
    layers.set(
      name,
      layer.activation !== undefined && keeps(name)
        ? { ...layer, activation: smoothActivationParameters(groups, layer.activation, options) }
        : layer,
    );
  }
  return new TimeParameters(groups, layers, fingerprint, sampler);
}

/** A time group's input moments, and how much its errors count. */
export interface WeightedMoments extends TimeGroupMoments {
  /** ω of the group; default 1. */
  readonly weight?: number | undefined;
}

/**
 * Output corrections of every time group, output by output the minimum of
 * `Σ_g ω_g E_g[(y − gain_g ŷ − bias_g)²] + λ Σ_g ‖θ_{g+1} − θ_g‖²` around the shrunk closed form of each group; λ is relative to the data term.
 *
 * **Shapes** `weights` and `quantized: f32[rows, cols]`; `moments` one a group → `gain` and `bias: f32[groups, rows]`
 *
 * @throws as `outputCorrection` and `solveGaussMarkov`
 */
export function correctOutputs(
  kernels: Kernels,
  weights: Float32Array,
  quantized: Float32Array,
  rows: number,
  cols: number,
  moments: readonly WeightedMoments[],
  markovWeight = 0,
): OutputParameters {
  const groups = moments.length;
  const gain = new Float32Array(groups * rows), bias = new Float32Array(groups * rows);
  const curvature = new Float64Array(rows * groups * 4);
  for (const [g, group] of moments.entries()) {
    const { weight = 1 } = group;
    if (!(weight >= 0 && weight < Infinity)) {
      throw new RangeError(
        `Cannot correct a layer's output: weights must be numbers ≥ 0, got ${weight} for group ${g}`,
      );
    }
    const own = outputCorrection(kernels, weights, quantized, rows, cols, group);
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

/** An output that is always 0 leaves its gain to nobody. */
function isDetermined(curvature: Float64Array, groups: number): boolean {
  let squares = 0, weights = 0;
  for (let g = 0; g < groups; g++) {
    squares += curvature[4 * g]!;
    weights += curvature[4 * g + 3]!;
  }
  return squares > 0 && weights > 0;
}
