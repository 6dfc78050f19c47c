/**
 * Confidence intervals for what a run measured: Wilson's for proportions, the bootstrap for means, ratios and
 * differences of pairs. A difference counts as one only when its interval leaves out 0.
 */
import { checkWhole } from "../native/call.ts";
import { RandomStream } from "../models/random.ts";

/** A measured value and the interval it may lie in, at `confidence`. */
export interface Interval {
  readonly value: number;
  readonly low: number;
  readonly high: number;
  /** As 0.95. */
  readonly confidence: number;
}

export const DEFAULT_CONFIDENCE = 0.95;
/** Resamples of a bootstrap: quantiles of 2.5 % then rest on 50 of them. */
const DEFAULT_RESAMPLES = 2000;

/** Options of intervals. */
export interface BootstrapOptions {
  /** Default 0.95. */
  readonly confidence?: number | undefined;
  /** Default 2000. */
  readonly resamples?: number | undefined;
  /** Default 0. */
  readonly seed?: number | undefined;
}

function checkConfidence(confidence: number): void {
  if (!(confidence > 0 && confidence < 1)) {
    throw new RangeError(`Cannot compute an interval: confidence must lie in (0, 1), got ${confidence}`);
  }
}

/**
 * Quantile of the standard normal distribution, by Newton's method on Φ from Acklam's kind of start.
 *
 * @throws {RangeError} unless `probability` lies in (0, 1)
 */
export function normalQuantile(probability: number): number {
  if (!(probability > 0 && probability < 1)) {
    throw new RangeError(`Cannot compute a quantile: probability must lie in (0, 1), got ${probability}`);
  }
  let low = -40, high = 40;
  while (high - low > 1e-13 * Math.max(1, Math.abs(low))) {
    const middle = (low + high) / 2;
    if (middle === low || middle === high) break;
    if (normalDistribution(middle) < probability) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}

/** Φ(x) to about 1e-15: a series in the middle, a continued fraction in the tails. */
function normalDistribution(x: number): number {
  const magnitude = Math.abs(x);
  const density = Math.exp(-x * x / 2) / Math.sqrt(2 * Math.PI);
  let tail: number;
  if (magnitude < 3) {
    let term = magnitude, sum = magnitude;
    for (let n = 3; term > 1e-17 * sum; n += 2) sum += term *= magnitude * magnitude / n;
    tail = 0.5 - density * sum;
  } else {
    let fraction = 0;
    for (let n = 200; n > 0; n--) fraction = n / (magnitude + fraction);
    tail = density / (magnitude + fraction);
  }
  return x < 0 ? tail : 1 - tail;
}

/**
 * A proportion with Wilson's interval (https://doi.org/10.1080/01621459.1927.10502953), which stays inside
 * [0, 1] and has a width at 0 and 1 too.
 *
 * @throws {RangeError} unless 0 ≤ successes ≤ trials, trials ≥ 1
 *
 * @example
 * ```ts
 * import { wilsonInterval } from "./intervals.ts";
 * console.log(wilsonInterval(300, 300).low); // 0.987
 * ```
 */
export function wilsonInterval(successes: number, trials: number, confidence = DEFAULT_CONFIDENCE): Interval {
  checkConfidence(confidence);
  const whole = Number.isSafeInteger(successes) && Number.isSafeInteger(trials);
  if (!whole || successes < 0 || trials < 1 || successes > trials) {
    throw new RangeError(
      `Cannot compute an interval: successes must be from 0 to the trials, got ${successes} of ${trials}`,
    );
  }
  const z = normalQuantile((1 + confidence) / 2), share = successes / trials;
  const scale = 1 + z * z / trials;
  const middle = (share + z * z / (2 * trials)) / scale;
  const half = z / scale * Math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials));
  return {
    value: share,
    low: successes === 0 ? 0 : middle - half,
    high: successes === trials ? 1 : middle + half,
    confidence,
  };
}

/** Quantile of ascending values, between two by straight line. */
function quantile(ascending: Float64Array, share: number): number {
  const at = share * (ascending.length - 1), below = Math.floor(at);
  const low = ascending[below]!, high = ascending[Math.min(below + 1, ascending.length - 1)]!;
  return low + (high - low) * (at - below);
}

/** The middle part of bootstrap values. */
export function percentileInterval(value: number, resampled: Float64Array, confidence: number): Interval {
  checkConfidence(confidence);
  const ascending = resampled.slice().sort();
  const rest = (1 - confidence) / 2;
  return { value, low: quantile(ascending, rest), high: quantile(ascending, 1 - rest), confidence };
}

/**
 * Σ numerators / Σ denominators with a percentile interval of the bootstrap over the pairs: for means of
 * things that come in clusters, as positions in sequences or pixels in images.
 *
 * @throws {RangeError} when the counts differ, there are none, or a value is not finite
 */
export function bootstrapRatio(
  numerators: ArrayLike<number>,
  denominators: ArrayLike<number>,
  { confidence = DEFAULT_CONFIDENCE, resamples = DEFAULT_RESAMPLES, seed = 0 }: BootstrapOptions = {},
): Interval {
  const count = numerators.length;
  if (count === 0 || denominators.length !== count) {
    throw new RangeError(
      `Cannot compute an interval: it needs pairs, got ${count} numerators and ${denominators.length} denominators`,
    );
  }
  checkWhole("compute an interval", "resamples", resamples, 1);
  let above = 0, below = 0;
  for (let i = 0; i < count; i++) {
    if (!Number.isFinite(numerators[i]!) || !Number.isFinite(denominators[i]!)) {
      throw new RangeError(
        `Cannot compute an interval: values must be finite, got ${numerators[i]} / ${denominators[i]}`,
      );
    }
    above += numerators[i]!;
    below += denominators[i]!;
  }
  const random = new RandomStream(seed);
  const values = new Float64Array(resamples);
  for (let r = 0; r < resamples; r++) {
    let up = 0, down = 0;
    for (let i = 0; i < count; i++) {
      const pick = random.below(count);
      up += numerators[pick]!;
      down += denominators[pick]!;
    }
    values[r] = up / down;
  }
  return percentileInterval(above / below, values.filter(Number.isFinite), confidence);
}

/**
 * Mean over strata of their means, with a percentile interval of the bootstrap inside each stratum: for
 * values that are expected to differ between the strata - errors at different timesteps - so that only chance
 * inside them makes the interval.
 *
 * @throws {RangeError} when there is no stratum, one is empty, or a value is not finite
 *
 * @example
 * ```ts
 * import { stratifiedMean } from "./intervals.ts";
 * console.log(stratifiedMean([[1, 2, 3], [100, 102]]).value); // 51.5
 * ```
 */
export function stratifiedMean(
  strata: readonly ArrayLike<number>[],
  { confidence = DEFAULT_CONFIDENCE, resamples = DEFAULT_RESAMPLES, seed = 0 }: BootstrapOptions = {},
): Interval {
  if (strata.length === 0) throw new RangeError("Cannot compute an interval: it needs a stratum, got none");
  let value = 0;
  const sums = new Float64Array(resamples);
  for (const [i, stratum] of strata.entries()) {
    // another stream for each, or all strata would draw the same places
    const random = new RandomStream(seed, i);
    value += bootstrapMean(stratum, { confidence, resamples: 1 }).value / strata.length;
    for (let r = 0; r < resamples; r++) {
      let sum = 0;
      for (let k = 0; k < stratum.length; k++) sum += stratum[random.below(stratum.length)]!;
      sums[r]! += sum / (stratum.length * strata.length);
    }
  }
  return percentileInterval(value, sums, confidence);
}

/** Mean with a percentile interval of the bootstrap. @throws as {@linkcode bootstrapRatio} */
export function bootstrapMean(values: ArrayLike<number>, options: BootstrapOptions = {}): Interval {
  return bootstrapRatio(values, new Float64Array(values.length).fill(1), options);
}

/** A difference of two measurements of the same things. */
export interface Difference extends Interval {
  /** Whether the interval leaves out 0: otherwise no difference was found. */
  readonly isDifferent: boolean;
}

/**
 * Mean of `after − before` over pairs - the same prompts, the same noise - with its interval.
 *
 * @throws as {@linkcode bootstrapRatio}
 */
export function pairedDifference(
  before: ArrayLike<number>,
  after: ArrayLike<number>,
  options: BootstrapOptions = {},
): Difference {
  if (before.length !== after.length) {
    throw new RangeError(
      `Cannot compare: both must have the same count, got ${before.length} and ${after.length}`,
    );
  }
  const interval = bootstrapMean(Float64Array.from(before, (value, i) => after[i]! - value), options);
  return { ...interval, isDifferent: interval.low > 0 || interval.high < 0 };
}
