/**
 * Output corrections: a gain and a bias for every output of a quantized layer and every time group,
 * `y = gain ⊙ (Ŵ x) + bias`, in closed form from the inputs' moments, shrunk towards (1, 0) as far as the
 * samples leave them uncertain.
 */
import type { Kernels } from "../native/mod.ts";
import { product } from "../quant/product.ts";

/** Means over a layer's inputs in one time group; `InputMoments` of lib/quant are sums over all of them. */
export interface TimeGroupMoments {
  /** `f32[cols, cols]`: `E[x xᵀ | t]` */
  readonly second: Float32Array;
  /** `f32[cols]`: `E[x | t]` */
  readonly mean: Float32Array;
  /** Number of independent samples behind them: sequences or images, not tokens. */
  readonly samples: number;
}

/** A layer's weights before and after quantization, `f32[rows, cols]` each. */
export interface QuantizedMatrix {
  readonly weights: Float32Array;
  readonly quantized: Float32Array;
  readonly rows: number;
  readonly cols: number;
}

/** `f32[rows]` each. */
export interface OutputCorrection {
  readonly gain: Float32Array<ArrayBuffer>;
  readonly bias: Float32Array<ArrayBuffer>;
}

/**
 * The correction that brings `gain ⊙ (Ŵ x) + bias` nearest to `W x`, output by output: the regression of y on
 * ŷ, its slope and its mean error each shrunk by `a²/(a² + var(a))`, where var(a) is the residual variance
 * over the number of samples.
 *
 * **Shapes** `weights` and `quantized: f32[rows, cols]` → `gain` and `bias: f32[rows]`
 *
 * @throws {TypeError} when the shapes do not fit
 * @throws {RangeError} when a moment is not finite or there are fewer than two samples
 *
 * @example
 * ```ts
 * import { openKernels } from "../native/mod.ts";
 * import { outputCorrection } from "./output_correction.ts";
 * const moments = { second: Float32Array.of(1), mean: Float32Array.of(0), samples: 1000 };
 * const matrix = { weights: Float32Array.of(2), quantized: Float32Array.of(1), rows: 1, cols: 1 };
 * const { gain } = outputCorrection(await openKernels(), matrix, moments);
 * console.log(gain[0]); // 2
 * ```
 */
export function outputCorrection(
  kernels: Kernels,
  { weights, quantized, rows, cols }: QuantizedMatrix,
  { second, mean, samples }: TimeGroupMoments,
): OutputCorrection {
  const doing = "correct a layer's output";
  if (
    weights.length !== rows * cols || quantized.length !== rows * cols || second.length !== cols * cols ||
    mean.length !== cols
  ) {
    throw new TypeError(
      `Cannot ${doing}: weights must be [${rows}, ${cols}] twice, moments [${cols}, ${cols}] and [${cols}], got ${weights.length}, ${quantized.length}, ${second.length} and ${mean.length} numbers`,
    );
  }
  if (!(samples >= 2 && samples < Infinity)) {
    throw new RangeError(`Cannot ${doing}: there must be at least 2 samples, got ${samples}`);
  }
  // Centred moments: variances are not differences of large numbers then.
  const covariance = new Float32Array(cols * cols);
  for (let i = 0; i < cols; i++) {
    for (let j = 0; j < cols; j++) covariance[i * cols + j] = second[i * cols + j]! - mean[i]! * mean[j]!;
  }
  const sizes = { tokens: rows, rows: cols, cols };
  const spread = product(kernels, doing, quantized, covariance, sizes); // Ŵ C
  const other = product(kernels, doing, weights, covariance, sizes); // W C
  const gain = new Float32Array(rows), bias = new Float32Array(rows);
  for (let row = 0; row < rows; row++) {
    let variance = 0, shared = 0, whole = 0, average = 0, error = 0;
    for (let i = row * cols, col = 0; col < cols; i++, col++) {
      const w = weights[i]!, q = quantized[i]!;
      variance += q * spread[i]!;
      shared += w * spread[i]!;
      whole += w * other[i]!;
      average += q * mean[col]!;
      error += (w - q) * mean[col]!;
    }
    if (!Number.isFinite(variance + shared + whole + average + error)) {
      throw new RangeError(`Cannot ${doing}: moments must be finite, got others for output ${row}`);
    }
    const isDetermined = variance > 1e-12 * Math.max(whole, 1e-30);
    const slope = isDetermined ? shared / variance - 1 : 0;
    const residual = Math.max(0, whole - (isDetermined ? shared * shared / variance : 0));
    const factor = 1 + slope * kept(slope, isDetermined ? residual / variance : 0, samples);
    gain[row] = factor;
    bias[row] = (1 - factor) * average + error * kept(error, residual, samples);
  }
  return { gain, bias };
}

/** Factor that shrinks an estimate by its variance. */
function kept(estimate: number, residual: number, samples: number): number {
  const square = estimate * estimate;
  return square === 0 ? 0 : square / (square + residual / samples);
}
