/** Fréchet distance between feature distributions taken as Gaussian, in float64, with the eigenvalues by Jacobi's rotations. */
import { RandomStream } from "../models/random.ts";
import { type BootstrapOptions, DEFAULT_CONFIDENCE, type Interval, percentileInterval } from "./intervals.ts";

/** Mean and covariance of features. */
export interface FeatureStatistics {
  /** `f64[size]` */
  readonly mean: Float64Array;
  /** `f64[size, size]` */
  readonly covariance: Float64Array;
}

/** Sweeps after which Jacobi's method has converged for any matrix met in practice; it takes about eight. */
const MAX_SWEEPS = 60;

/**
 * Eigenvalues, and eigenvectors as columns, of a symmetric matrix: cyclic Jacobi (Golub and Van Loan, 8.5).
 *
 * **Shapes** `matrix: f64[n, n]`, not changed → `values: f64[n]`, `vectors: f64[n, n]`
 */
export function symmetricEigen(
  matrix: Float64Array,
  wantsVectors = true,
): { readonly values: Float64Array; readonly vectors: Float64Array } {
  const n = Math.sqrt(matrix.length);
  if (!Number.isInteger(n)) {
    throw new TypeError(`Cannot find eigenvalues: the matrix must be square, got ${matrix.length} numbers`);
  }
  const a = matrix.slice();
  const vectors = new Float64Array(wantsVectors ? n * n : 0);
  if (wantsVectors) { for (let i = 0; i < n; i++) vectors[i * n + i] = 1; }
  let norm = 0;
  for (const value of a) norm += value * value;
  for (let sweep = 0; sweep < MAX_SWEEPS; sweep++) {
    let off = 0;
    for (let p = 0; p < n; p++) for (let q = p + 1; q < n; q++) off += a[p * n + q]! ** 2;
    if (off <= 1e-30 * norm) break;
    for (let p = 0; p < n; p++) {
      for (let q = p + 1; q < n; q++) rotate(a, vectors, n, p, q, wantsVectors);
    }
  }
  return { values: Float64Array.from({ length: n }, (_, i) => a[i * n + i]!), vectors };
}

/** One rotation that makes `a[p, q]` 0. */
function rotate(
  a: Float64Array,
  vectors: Float64Array,
  n: number,
  p: number,
  q: number,
  wantsVectors: boolean,
): void {
  const apq = a[p * n + q]!;
  if (apq === 0) return;
  const theta = (a[q * n + q]! - a[p * n + p]!) / (2 * apq);
  const t = Math.sign(theta || 1) / (Math.abs(theta) + Math.sqrt(theta * theta + 1));
  const c = 1 / Math.sqrt(t * t + 1), s = t * c;
  for (let k = 0; k < n; k++) {
    const kp = a[k * n + p]!, kq = a[k * n + q]!;
    a[k * n + p] = c * kp - s * kq;
    a[k * n + q] = s * kp + c * kq;
  }
  for (let k = 0; k < n; k++) {
    const pk = a[p * n + k]!, qk = a[q * n + k]!;
    a[p * n + k] = c * pk - s * qk;
    a[q * n + k] = s * pk + c * qk;
  }
  if (!wantsVectors) return;
  for (let k = 0; k < n; k++) {
    const kp = vectors[k * n + p]!, kq = vectors[k * n + q]!;
    vectors[k * n + p] = c * kp - s * kq;
    vectors[k * n + q] = s * kp + c * kq;
  }
}

/** The symmetric square root of a symmetric matrix; eigenvalues below 0, from rounding, count as 0. */
export function symmetricSquareRoot(matrix: Float64Array): Float64Array {
  const { values, vectors } = symmetricEigen(matrix);
  const n = values.length;
  const root = new Float64Array(n * n);
  for (let k = 0; k < n; k++) {
    const weight = Math.sqrt(Math.max(0, values[k]!));
    for (let i = 0; i < n; i++) {
      const left = weight * vectors[i * n + k]!;
      for (let j = 0; j < n; j++) root[i * n + j]! += left * vectors[j * n + k]!;
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
    for (const value of symmetricEigen(product, false).values) distance -= 2 * Math.sqrt(Math.max(0, value));
    return Math.max(0, distance);
  }

  /**
   * The distance of samples with a bootstrap interval. Resampling adds to the distance, as fewer distinct samples do, so the interval is that of
   * the resampled distances moved back by their mean's excess.
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
