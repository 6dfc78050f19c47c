import { describe, expect, test } from "bun:test";
import {
  bootstrapMean,
  bootstrapRatio,
  normalQuantile,
  pairedDifference,
  wilsonInterval,
} from "../../lib/eval/intervals.ts";
import { featureStatistics, FrechetReference, symmetricSquareRoot } from "../../lib/eval/frechet.ts";
import { symmetricEigen } from "../../lib/quant/symmetric.ts";
import { RandomStream } from "../../lib/models/mod.ts";
import { gaussians } from "../_kernels.ts";
import { thrown } from "../tensor/_files.ts";

describe("intervals", () => {
  test("quantiles of the normal distribution are those of the tables", () => {
    for (
      const [p, z] of [[0.5, 0], [0.975, 1.959963984540054], [0.995, 2.5758293035489], [
        0.0001,
        -3.71901648545568,
      ]]
    ) {
      expect(normalQuantile(p!)).toBeCloseTo(z!, 10);
    }
    expect(normalQuantile(1e-12)).toBeCloseTo(-7.034483825, 6);
    expect(thrown(() => normalQuantile(1))).toBeInstanceOf(RangeError);
  });

  test("Wilson's are those of Newcombe's comparison of methods", () => {
    // R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    for (
      const [successes, trials, low, high] of [
        [81, 263, 0.2553, 0.3662],
        [15, 148, 0.0624, 0.1605],
        [0, 20, 0, 0.1611],
        [1, 29, 0.0061, 0.1718],
      ] as const
    ) {
      const interval = wilsonInterval(successes, trials);
      expect(interval.value).toBe(successes / trials);
      expect(interval.low).toBeCloseTo(low, 4);
      expect(interval.high).toBeCloseTo(high, 4);
    }
    expect(wilsonInterval(300, 300).high).toBe(1);
    expect(wilsonInterval(300, 300).low).toBeCloseTo(0.98736, 5);
    for (const [k, n] of [[3, 2], [-1, 4], [0, 0], [0.5, 2]] as const) {
      expect(thrown(() => wilsonInterval(k, n))).toBeInstanceOf(RangeError);
    }
  });

  test("the bootstrap's width is that of the normal approximation", () => {
    const values = gaussians(4, 400).map((v) => 3 + 2 * v);
    const { value, low, high } = bootstrapMean(values);
    const mean = values.reduce((sum, v) => sum + v, 0) / 400;
    const deviation = Math.sqrt(values.reduce((sum, v) => sum + (v - mean) ** 2, 0) / 400);
    expect(value).toBeCloseTo(mean, 10);
    expect((high - low) / (2 * 1.96 * deviation / 20)).toBeCloseTo(1, 1);
    expect(bootstrapMean(values)).toEqual({ value, low, high, confidence: 0.95 });
  });

  test("the bootstrap covers the mean about as often as it says", () => {
    let covered = 0;
    for (let seed = 0; seed < 200; seed++) {
      const { low, high } = bootstrapMean(gaussians(1000 + seed, 60), { resamples: 300, seed });
      if (low <= 0 && high >= 0) covered++;
    }
    // 95 % less what percentile intervals of 60 values lose, with four standard errors of 200 trials
    expect(covered).toBeGreaterThan(172);
    expect(covered).toBeLessThan(200);
  });

  test("a ratio's interval resamples pairs", () => {
    const exact = bootstrapRatio([2, 4, 6, 8], [1, 2, 3, 4]);
    expect([exact.value, exact.low, exact.high]).toEqual([2, 2, 2]);
    expect(bootstrapRatio([1, 0], [1, 3]).value).toBe(0.25);
    expect(thrown(() => bootstrapRatio([], []))).toBeInstanceOf(RangeError);
    expect(thrown(() => bootstrapRatio([1], [1, 2]))).toBeInstanceOf(RangeError);
    expect(thrown(() => bootstrapMean([1, NaN]))).toBeInstanceOf(RangeError);
  });

  test("a difference counts only outside its interval", () => {
    const before = gaussians(6, 300), noise = gaussians(7, 300);
    const shifted = before.map((v, i) => v + 0.5 + 0.1 * noise[i]!);
    expect(pairedDifference(before, shifted).isDifferent).toBe(true);
    expect(pairedDifference(before, before.map((v, i) => v + 0.1 * noise[i]!)).isDifferent).toBe(false);
    expect(pairedDifference(before, before)).toEqual({
      value: 0,
      low: 0,
      high: 0,
      confidence: 0.95,
      isDifferent: false,
    });
    const ones = new Array<number>(300).fill(1);
    expect(pairedDifference(ones, ones.map((v, i) => i === 0 ? 0 : v)).isDifferent).toBe(false);
  });

  test("random streams have the moments they should, and differ", () => {
    const n = 40_000, random = new RandomStream(1, 2);
    const uniform = Float64Array.from({ length: n }, () => random.uniform());
    const normal = Float64Array.from({ length: n }, () => random.normal());
    const mean = (values: Float64Array, power: number) => values.reduce((sum, v) => sum + v ** power, 0) / n;
    // within four standard errors
    expect(Math.abs(mean(uniform, 1) - 1 / 2)).toBeLessThan(4 * Math.sqrt(1 / 12 / n));
    expect(Math.abs(mean(uniform, 2) - 1 / 3)).toBeLessThan(4 * Math.sqrt(4 / 45 / n));
    expect(Math.abs(mean(normal, 1))).toBeLessThan(4 / Math.sqrt(n));
    expect(Math.abs(mean(normal, 2) - 1)).toBeLessThan(4 * Math.sqrt(2 / n));
    expect(Math.abs(mean(normal, 4) - 3)).toBeLessThan(4 * Math.sqrt(96 / n));
    const first = (seed: number, stream: number) => new RandomStream(seed, stream).uniform();
    const firsts = [first(0, 0), first(0, 1), first(1, 0), first(2 ** 40, 0), first(5, 0)];
    expect(new Set(firsts).size).toBe(5);
    expect(first(1, 2)).toBe(first(1, 2));
    expect(thrown(() => new RandomStream(-1))).toBeInstanceOf(RangeError);
  });
});

describe("Fréchet distance", () => {
  const n = 24;
  /** A random covariance. */
  const covariance = (seed: number) => {
    const rows = gaussians(seed, 60 * n);
    return featureStatistics(rows, n).covariance;
  };
  const multiply = (a: Float64Array, b: Float64Array) =>
    Float64Array.from({ length: n * n }, (_, at) => {
      let sum = 0;
      for (let k = 0; k < n; k++) sum += a[Math.floor(at / n) * n + k]! * b[k * n + at % n]!;
      return sum;
    });

  test("eigenvalues and vectors put the matrix together again", () => {
    const matrix = covariance(1);
    const { values, vectors } = symmetricEigen(matrix);
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < n; j++) {
        let sum = 0, dot = 0;
        for (let k = 0; k < n; k++) {
          sum += vectors[k * n + i]! * values[k]! * vectors[k * n + j]!;
          dot += vectors[i * n + k]! * vectors[j * n + k]!;
        }
        expect(Math.abs(sum - matrix[i * n + j]!)).toBeLessThan(1e-12);
        expect(Math.abs(dot - (i === j ? 1 : 0))).toBeLessThan(1e-12);
      }
    }
    expect([...symmetricEigen(Float64Array.of(2, 1, 1, 2)).values].sort()).toEqual([
      expect.closeTo(1, 14),
      expect.closeTo(3, 14),
    ]);
    expect(thrown(() => symmetricEigen(new Float64Array(5)))).toBeInstanceOf(TypeError);
  });

  test("the square root is one, also of a singular matrix", () => {
    const matrix = covariance(2);
    const root = symmetricSquareRoot(matrix);
    const squared = multiply(root, root);
    for (const [i, value] of squared.entries()) expect(Math.abs(value - matrix[i]!)).toBeLessThan(1e-12);
    const singular = symmetricSquareRoot(Float64Array.of(1, 1, 1, 1));
    for (const value of singular) expect(value).toBeCloseTo(Math.SQRT1_2, 7);
  });

  test("has the closed form of independent features", () => {
    const diagonal = (values: readonly number[]) => {
      const matrix = new Float64Array(values.length ** 2);
      for (const [i, value] of values.entries()) matrix[i * values.length + i] = value;
      return matrix;
    };
    const a = { mean: Float64Array.of(1, 2, 3), covariance: diagonal([1, 4, 9]) };
    const b = { mean: Float64Array.of(1, 0, 3), covariance: diagonal([4, 4, 1]) };
    // Σ (μ₁ − μ₂)² + Σ (σ₁ − σ₂)² = 4 + 1 + 0 + 4
    expect(new FrechetReference(a).distance(b)).toBeCloseTo(9, 12);
    expect(new FrechetReference(b).distance(a)).toBeCloseTo(9, 12);
    expect(new FrechetReference(a).distance(a)).toBeCloseTo(0, 12);
    const small = { mean: Float64Array.of(0), covariance: Float64Array.of(1) };
    expect(thrown(() => new FrechetReference(a).distance(small))).toBeInstanceOf(TypeError);
  });

  test("is symmetric and grows by the square of a shift", () => {
    const [one, two] = [covariance(3), covariance(4)].map((c) => ({
      mean: new Float64Array(n),
      covariance: c,
    }));
    const there = new FrechetReference(one!).distance(two!);
    expect(new FrechetReference(two!).distance(one!)).toBeCloseTo(there, 10);
    const shifted = { ...two!, mean: new Float64Array(n).fill(0.5) };
    expect(new FrechetReference(one!).distance(shifted) - there).toBeCloseTo(n / 4, 10);
  });

  test("its interval holds the distance to another sample of the same distribution", () => {
    const features = (seed: number) => gaussians(seed, 800 * n);
    const reference = new FrechetReference(featureStatistics(features(10), n));
    const { value, low, high } = reference.distanceOf(features(11), { resamples: 40 });
    expect(low).toBeLessThanOrEqual(value);
    expect(high).toBeGreaterThanOrEqual(value);
    const other = reference.distance(featureStatistics(features(12), n));
    expect(other).toBeGreaterThan(low - 0.05);
    expect(other).toBeLessThan(high + 0.05);
    expect(thrown(() => featureStatistics(new Float64Array(n) as unknown as Float32Array, n))).toBeInstanceOf(
      RangeError,
    );
  });
});
