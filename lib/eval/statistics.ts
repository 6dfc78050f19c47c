/** Summaries of samples: medians and spreads, and ratios of samples that were taken in pairs. */

/** Summary of a series of samples; spreads rather than a standard deviation, because noise is one-sided. */
export interface Summary {
  readonly count: number;
  readonly median: number;
  readonly minimum: number;
  readonly maximum: number;
  /** Median of the absolute deviations from the median. */
  readonly medianDeviation: number;
}

function sorted(values: readonly number[]): number[] {
  if (values.length === 0) throw new RangeError("Cannot summarize samples: at least one is needed, got none");
  const bad = values.find((value) => Number.isNaN(value));
  if (bad !== undefined) {
    throw new RangeError("Cannot summarize samples: every one must be a number, got NaN");
  }
  return [...values].sort((a, b) => a - b);
}

/**
 * Middle of the values, the mean of the two middle ones when their count is even.
 *
 * @throws {RangeError} when there are none, or one is NaN
 */
export function median(values: readonly number[]): number {
  const ordered = sorted(values);
  const half = Math.floor(ordered.length / 2);
  return ordered.length % 2 === 1 ? ordered[half]! : (ordered[half - 1]! + ordered[half]!) / 2;
}

/** Median, spread and extremes. @throws {RangeError} as {@linkcode median} */
export function summarize(values: readonly number[]): Summary {
  const ordered = sorted(values);
  const middle = median(ordered);
  return {
    count: ordered.length,
    median: middle,
    minimum: ordered[0]!,
    maximum: ordered.at(-1)!,
    medianDeviation: median(ordered.map((value) => Math.abs(value - middle))),
  };
}

/** Deviation of timings from their median, in percent of it. */
export const spreadPercent = ({ median, medianDeviation }: Summary): number => 100 * medianDeviation / median;

/**
 * Ratios `numerators[i] / denominators[i]` of samples that were taken one after the other: what slows both
 * down drops out of each ratio, as it would not out of a ratio of medians.
 *
 * @throws {RangeError} when the counts differ, there are none, or a ratio is not a number
 */
export function pairedRatio(numerators: readonly number[], denominators: readonly number[]): Summary {
  if (numerators.length !== denominators.length) {
    throw new RangeError(
      `Cannot pair samples: both series must have the same count, got ${numerators.length} and ${denominators.length}`,
    );
  }
  return summarize(numerators.map((numerator, i) => numerator / denominators[i]!));
}

/**
 * `‖x − wanted‖²` and `‖wanted‖²` of each of `count` items. Where an item has more than `elements` numbers (a
 * learned variance follows an image model's prediction), the rest is left out.
 *
 * **Shapes** `x` and `wanted: f32[count, any]` → `f64[count]` each
 */
export function squaredDistances(
  x: Float32Array,
  wanted: Float32Array,
  count: number,
  elements: number = wanted.length / count,
): { readonly errors: Float64Array<ArrayBuffer>; readonly norms: Float64Array<ArrayBuffer> } {
  const errors = new Float64Array(count), norms = new Float64Array(count), size = wanted.length / count;
  for (let i = 0; i < count; i++) {
    for (let k = i * size; k < i * size + elements; k++) {
      errors[i]! += (x[k]! - wanted[k]!) ** 2;
      norms[i]! += wanted[k]! ** 2;
    }
  }
  return { errors, norms };
}
