/**
 * The sampler's correction for a quantized model of Gaussian diffusion (He et al., "PTQD",
 * https://arxiv.org/abs/2305.10657): at each timestep the quantized prediction is taken as
 * `ε_Q = gain · ε_F + bias + noise`; the sampler divides by the gain, takes the bias away and the noise's
 * variance out of the step's own. Three numbers a timestep.
 */
/** Effect of quantization on the predictions at one timestep. */
export interface SamplerCorrection {
  readonly gain: number;
  readonly bias: number;
  /** Variance of what is left, of one number. */
  readonly noiseVariance: number;
}

/** Sums of pairs of predictions; what they say of the correction. */
export class PredictionRegression {
  #count = 0;
  #meanFull = 0;
  #meanQuantized = 0;
  #squares = 0;
  #products = 0;
  #quantizedSquares = 0;

  /** Pairs seen. */
  get count(): number {
    return this.#count;
  }

  /**
   * Adds predictions of both models on the same inputs.
   *
   * **Shapes** both `f32[n]`
   *
   * @throws {TypeError} when lengths differ
   * @throws {RangeError} when a prediction is not finite; nothing is added then
   */
  add(full: ArrayLike<number>, quantized: ArrayLike<number>): void {
    if (full.length !== quantized.length) {
      throw new TypeError(
        `Cannot correct a sampler: predictions must be equally many, got ${full.length} and ${quantized.length}`,
      );
    }
    for (let i = 0; i < full.length; i++) {
      if (!Number.isFinite(full[i]!) || !Number.isFinite(quantized[i]!)) {
        throw new RangeError(
          `Cannot correct a sampler: predictions must be finite, got ${full[i]} and ${quantized[i]} at ${i}`,
        );
      }
    }
    // Welford's updates: no difference of large sums.
    for (let i = 0; i < full.length; i++) {
      const x = full[i]!, y = quantized[i]!;
      this.#count++;
      const fromFull = x - this.#meanFull, fromQuantized = y - this.#meanQuantized;
      this.#meanFull += fromFull / this.#count;
      this.#meanQuantized += fromQuantized / this.#count;
      this.#squares += fromFull * (x - this.#meanFull);
      this.#products += fromFull * (y - this.#meanQuantized);
      this.#quantizedSquares += fromQuantized * (y - this.#meanQuantized);
    }
  }

  /**
   * The least-squares correction; gain 1 where all full predictions are alike or the regression would not
   * give a gain above 0.
   *
   * @throws {RangeError} when fewer than two pairs were seen
   *
   * @example
   * ```ts
   * import { PredictionRegression } from "./sampler_correction.ts";
   * const regression = new PredictionRegression();
   * regression.add([0, 1, 2], [1, 3, 5]);
   * console.log(regression.correction()); // { gain: 2, bias: 1, noiseVariance: 0 }
   * ```
   */
  correction(): SamplerCorrection {
    if (this.#count < 2) {
      throw new RangeError(
        `Cannot correct a sampler: there must be at least 2 predictions, got ${this.#count}`,
      );
    }
    const slope = this.#squares > 0 ? this.#products / this.#squares : 1;
    const gain = slope > 0 ? slope : 1;
    const residual = this.#quantizedSquares - 2 * gain * this.#products + gain * gain * this.#squares;
    return {
      gain,
      bias: this.#meanQuantized - gain * this.#meanFull,
      noiseVariance: Math.max(0, residual) / this.#count,
    };
  }
}

/**
 * Takes gain and bias out of quantized predictions: `(ε_Q − bias)/gain`.
 *
 * **Shapes** `predictions: f32[n]` → `out: f32[n]`, which may be `predictions`
 */
export function correctPredictions(
  predictions: Float32Array,
  { gain, bias }: SamplerCorrection,
  out: Float32Array,
): void {
  for (let i = 0; i < predictions.length; i++) out[i] = (predictions[i]! - bias) / gain;
}

/**
 * A step's deviation without the variance that quantization noise brings into its mean already:
 * `√(σ² − (c noise/gain)²)` with c what the step multiplies ε with, and 0 where the noise is more than σ.
 */
export function correctedDeviation(
  { ofEpsilon, deviation }: { readonly ofEpsilon: number; readonly deviation: number },
  { gain, noiseVariance }: SamplerCorrection,
): number {
  return Math.sqrt(
    Math.max(0, deviation * deviation - ofEpsilon * ofEpsilon * noiseVariance / (gain * gain)),
  );
}
