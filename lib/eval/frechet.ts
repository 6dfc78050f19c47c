/** Fréchet distance between feature distributions taken as Gaussian, in float64. */
import { RandomStream } from "../models/random.ts";
import { symmetricEigen } from "../quant/symmetric.ts";
import { type BootstrapOptions, DEFAULT_CONFIDENCE, type Interval, percentileInterval } from "./intervals.ts";

/** Mean and covariance of features. */
export interface FeatureStatistics {
  /** `f64[size]` */
  readonly mean: Float64Array;
  /** `f64[size, size]` */
  readonly covariance: Float64Array;
}

/** The symmetric square root of a symmetric matrix; eigenvalues below 0, from rounding, count as 0. */
export function symmetricSquareRoot(matrix: Float64Array): Float64Array {
  const { values, vectors } = symmetricEigen(matrix);
  const n = values.length;
  const root = new Float64Array(n * n);
  for (let k = 0; k < n; k++) {
    const weight = Math.sqrt(Math.max(0, values[k]!));
    for (let i = 0; i < n; i++) {
      const left = weight * vectors[k * n + i]!;
      for (let j = 0; j < n; j++) root[i * n + j]! += left * vectors[k * n + j]!;
    }
  }
  return root;
}

/**
 * Mean and unbiased covariance of rows, all or those in `picked`.
 *
 * **Shapes** `features: f32[count, size]`
 *
 * @throws {RangeError} when there are fewer than two rows
 */
export function featureStatistics(
  features: Float32Array,
  size: number,
  picked?: Int32Array,
): FeatureStatistics {
  const rows = picked ?? Int32Array.from({ length: features.length / size }, (_, i) => i);
  if (rows.length < 2) {
    throw new RangeError(`Cannot estimate a covariance: at least 2 rows are needed, got ${rows.length}`);
  }
  const mean = new Float64Array(size), covariance = new Float64Array(size * size);
  for (const row of rows) for (let i = 0; i < size; i++) mean[i]! += features[row * size + i]! / rows.length;
  const centred = new Float64Array(size);
  for (const row of rows) {
    for (let i = 0; i < size; i++) centred[i] = features[row * size + i]! - mean[i]!;
    for (let i = 0; i < size; i++) {
      const left = centred[i]!;
      if (left === 0) continue;
      for (let j = i; j < size; j++) covariance[i * size + j]! += left * centred[j]!;
    }
  }
  for (let i = 0; i < size; i++) {
    for (let j = i; j < size; j++) {
      covariance[j * size + i] = covariance[i * size + j]! /= rows.length - 1;
    }
  }
  return { mean, covariance };
}

/** Fréchet distances to one fixed distribution, whose root is found once. */
export class FrechetReference {
  readonly #root: Float64Array;
  readonly #trace: number;

  constructor(readonly statistics: FeatureStatistics) {
    this.#root = symmetricSquareRoot(statistics.covariance);
    this.#trace = trace(statistics.covariance);
  }

  /** ‖μ₁ − μ₂‖² + tr(C₁) + tr(C₂) − 2 tr((C₁^½ C₂ C₁^½)^½). @throws {TypeError} when the sizes differ */
  distance({ mean, covariance }: FeatureStatistics): number {
    const own = this.statistics.mean, n = own.length;
    if (mean.length !== n) {
      throw new TypeError(`Cannot compare features: both must have ${n}, got ${mean.length}`);
    }
    let distance = this.#trace + trace(covariance);
    for (let i = 0; i < n; i++) distance += (own[i]! - mean[i]!) ** 2;
    const product = multiply(multiply(this.#root, covariance, n), this.#root, n);
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < i; j++) {
        product[i * n + j] = product[j * n + i] = (product[i * n + j]! + product[j * n + i]!) / 2;
      }
    }
    for (const value of symmetricEigen(product).values) distance -= 2 * Math.sqrt(Math.max(0, value));
    return Math.max(0, distance);
  }

  /**
   * The distance of samples with a bootstrap interval. Resampling adds to the distance, as fewer distinct
   * samples do, so the interval is that of the resampled distances moved back by their mean's excess.
   *
   * **Shapes** `features: f32[count, size]`
   */
  distanceOf(
    features: Float32Array,
    { confidence = DEFAULT_CONFIDENCE, resamples = 100, seed = 0 }: BootstrapOptions = {},
  ): Interval {
    const size = this.statistics.mean.length, count = features.length / size;
    const value = this.distance(featureStatistics(features, size));
    const random = new RandomStream(seed);
    const resampled = Float64Array.from({ length: resamples }, () => {
      const picked = Int32Array.from({ length: count }, () => random.below(count));
      return this.distance(featureStatistics(features, size, picked));
    });
    const excess = resampled.reduce((sum, each) => sum + each / resamples, 0) - value;
    return percentileInterval(value, resampled.map((each) => Math.max(0, each - excess)), confidence);
  }
}

function trace(matrix: Float64Array): number {
  const n = Math.sqrt(matrix.length);
  let sum = 0;
  for (let i = 0; i < n; i++) sum += matrix[i * n + i]!;
  return sum;
}

function multiply(a: Float64Array, b: Float64Array, n: number): Float64Array {
  const out = new Float64Array(n * n);
  for (let i = 0; i < n; i++) {
    for (let k = 0; k < n; k++) {
      const left = a[i * n + k]!;
      for (let j = 0; j < n; j++) out[i * n + j]! += left * b[k * n + j]!;
    }
  }
  return out;
}
