/**
 * Static quantization of activations, `x ≈ scale (code − zeroPoint)` with whole codes and zero points: the
 * calibrated values of a layer's input as a histogram that grows with its range, and the parameters that
 * follow from it by minimum and maximum, percentile or least squared error.
 */

/** Bins of a histogram: at 8 bits eight of them a code, before a range is cut. */
export const HISTOGRAM_BINS = 2048;
/** Ends tried by the search for the least squared error, each 4 % nearer to 0: down to a thirteenth. */
const MSE_STEPS = 64;
const MSE_CUT = 0.96;
/** Smallest scale, the least normal float32: below it a code's value loses bits. */
const MIN_SCALE = 2 ** -126;

/** Bits of a statically quantized activation. */
export type ActivationBits = 4 | 8;
/** `minmax` clips nothing, `percentile` the tails, `mse` values that cost less to clip than to resolve. */
export type RangeMethod = "minmax" | "percentile" | "mse";
/** Ways to choose a range from a histogram. */
export const RANGE_METHODS: readonly RangeMethod[] = ["minmax", "percentile", "mse"];

/** Quantization parameters of activations. */
export interface ActivationGrid {
  /** A float32. */
  readonly scale: number;
  /** A whole number in `[0, 2^bits − 1]`: the code of 0. */
  readonly zeroPoint: number;
}

function checkBits(bits: number): void {
  if (bits !== 4 && bits !== 8) {
    throw new RangeError(`Cannot quantize activations: bits must be 4 or 8, got ${bits}`);
  }
}

/**
 * The smallest scale with a whole zero point whose range covers `[low, high]` and 0.
 *
 * @throws {RangeError} when the ends are not finite or in order, or bits are not 4 or 8
 *
 * @example
 * ```ts
 * import { activationGrid } from "./activation_range.ts";
 * console.log(activationGrid(-1, 2, 8)); // { scale: 0.0117…, zeroPoint: 85 }
 * ```
 */
export function activationGrid(low: number, high: number, bits: ActivationBits): ActivationGrid {
  checkBits(bits);
  if (!(Number.isFinite(low) && Number.isFinite(high) && low <= high)) {
    throw new RangeError(
      `Cannot quantize activations: the range must be finite and in order, got [${low}, ${high}]`,
    );
  }
  const top = 2 ** bits - 1, below = Math.max(0, -low), above = Math.max(0, high);
  if (below === 0 && above === 0) return { scale: 1, zeroPoint: 0 };
  const ideal = Math.min(top, top * (below / (below + above)));
  let best: ActivationGrid | undefined;
  for (const zeroPoint of [Math.floor(ideal), Math.ceil(ideal)]) {
    if ((zeroPoint === 0 && below > 0) || (zeroPoint === top && above > 0)) continue;
    const scale = Math.max(
      zeroPoint === 0 ? 0 : below / zeroPoint,
      zeroPoint === top ? 0 : above / (top - zeroPoint),
    );
    if (best === undefined || scale < best.scale) best = { scale, zeroPoint };
  }
  // A range that lies almost on one side leaves the other at least one code.
  best ??= ideal < 1
    ? { scale: Math.max(below, above / (top - 1)), zeroPoint: 1 }
    : { scale: Math.max(above, below / (top - 1)), zeroPoint: top - 1 };
  let scale = Math.fround(best.scale);
  if (scale < best.scale) scale = Math.fround(best.scale * (1 + 2 ** -23));
  return { scale: Math.max(scale, MIN_SCALE), zeroPoint: best.zeroPoint };
}

/** Content of a histogram, for storing. */
export interface HistogramState {
  /** 0 where nothing was seen, as the maximum and the reach are then. */
  readonly minimum: number;
  readonly maximum: number;
  /** A power of two: bins are equal parts of `[−reach, reach]`. */
  readonly reach: number;
  /** Values in each bin, {@linkcode HISTOGRAM_BINS} whole numbers. */
  readonly counts: Float64Array<ArrayBuffer>;
}

/** Values that a layer's input had: minimum, maximum, and how often what. */
export class ActivationHistogram {
  #minimum = Infinity;
  #maximum = -Infinity;
  #count = 0;
  /** Bins over `[−reach, reach]`; reach is a power of two and only grows. */
  #reach = 0;
  #counts = new Float64Array(0);

  /** Values seen. */
  get count(): number {
    return this.#count;
  }

  /** Range seen. @throws {RangeError} when nothing was */
  get range(): { readonly low: number; readonly high: number } {
    if (this.#count === 0) {
      throw new RangeError("Cannot find a range of activations: some must have been seen, got none");
    }
    return { low: this.#minimum, high: this.#maximum };
  }

  /** Bytes held. */
  get bytes(): number {
    return this.#counts.byteLength;
  }

  /** Adds values. @throws {RangeError} when one is NaN or infinite; nothing is added then */
  add(values: Float32Array): void {
    let low = Infinity, high = -Infinity;
    for (let i = 0; i < values.length; i++) {
      const value = values[i]!;
      if (!Number.isFinite(value)) {
        throw new RangeError(`Cannot find a range of activations: they must be finite, got ${value} at ${i}`);
      }
      if (value < low) low = value;
      if (value > high) high = value;
    }
    if (values.length === 0) return;
    this.#grow(Math.max(-low, high));
    this.#minimum = Math.min(this.#minimum, low);
    this.#maximum = Math.max(this.#maximum, high);
    this.#count += values.length;
    const factor = HISTOGRAM_BINS / 2 / this.#reach;
    for (let i = 0; i < values.length; i++) {
      this.#counts[Math.min(HISTOGRAM_BINS - 1, Math.floor(values[i]! * factor) + HISTOGRAM_BINS / 2)]!++;
    }
  }

  /** A copy of what it holds. */
  get state(): HistogramState {
    if (this.#count === 0) {
      return { minimum: 0, maximum: 0, reach: 0, counts: new Float64Array(HISTOGRAM_BINS) };
    }
    return {
      minimum: this.#minimum,
      maximum: this.#maximum,
      reach: this.#reach,
      counts: this.#counts.slice(),
    };
  }

  /**
   * The histogram that had a state.
   *
   * @throws {RangeError} when no histogram can have it
   *
   * @example
   * ```ts
   * import { ActivationHistogram } from "./activation_range.ts";
   * const histogram = new ActivationHistogram();
   * histogram.add(Float32Array.of(-1, 0, 2));
   * console.log(ActivationHistogram.from(histogram.state).range); // { low: -1, high: 2 }
   * ```
   */
  static from({ minimum, maximum, reach, counts }: HistogramState): ActivationHistogram {
    const doing = "restore a histogram of activations";
    const histogram = new ActivationHistogram();
    if (
      counts.length !== HISTOGRAM_BINS || !counts.every((count) => Number.isSafeInteger(count) && count >= 0)
    ) {
      throw new RangeError(`Cannot ${doing}: it must have ${HISTOGRAM_BINS} counts, whole numbers ≥ 0`);
    }
    const count = counts.reduce((sum, value) => sum + value, 0);
    if (!Number.isSafeInteger(count)) {
      throw new RangeError(`Cannot ${doing}: counts add up to too much, ${count}`);
    }
    if (count === 0) {
      if (minimum === 0 && maximum === 0 && reach === 0) return histogram;
      throw new RangeError(
        `Cannot ${doing}: without counts its range must be 0, got [${minimum}, ${maximum}]`,
      );
    }
    const isPower = reach >= 2 ** -60 && reach <= 2 ** 128 && Number.isInteger(Math.log2(reach));
    if (!isPower || !(minimum <= maximum) || !(Math.max(-minimum, maximum) <= reach)) {
      throw new RangeError(
        `Cannot ${doing}: its range must lie within a power of two, got [${minimum}, ${maximum}] and ${reach}`,
      );
    }
    [histogram.#minimum, histogram.#maximum, histogram.#reach] = [minimum, maximum, reach];
    [histogram.#count, histogram.#counts] = [count, counts.slice()];
    return histogram;
  }

  /** Adds what another histogram has seen. */
  merge(other: ActivationHistogram): void {
    if (other.#count === 0) return;
    this.#grow(other.#reach);
    let counts = other.#counts;
    for (let reach = other.#reach; reach < this.#reach; reach *= 2) counts = halved(counts);
    for (let i = 0; i < HISTOGRAM_BINS; i++) this.#counts[i]! += counts[i]!;
    this.#minimum = Math.min(this.#minimum, other.#minimum);
    this.#maximum = Math.max(this.#maximum, other.#maximum);
    this.#count += other.#count;
  }

  #grow(magnitude: number): void {
    if (this.#reach === 0) {
      this.#counts = new Float64Array(HISTOGRAM_BINS);
      this.#reach = 2 ** Math.ceil(Math.log2(Math.max(magnitude, 2 ** -60)));
    }
    while (this.#reach < magnitude) {
      this.#counts = halved(this.#counts);
      this.#reach *= 2;
    }
  }

  /**
   * The quantization parameters that a method derives from the values seen.
   *
   * @param percentile of `percentile`: the share in percent kept between the cut tails, half of the rest each
   * @throws {RangeError} when nothing was seen, the method is none or the percentile is outside (0, 100]
   *
   * @example
   * ```ts
   * import { ActivationHistogram } from "./activation_range.ts";
   * const histogram = new ActivationHistogram();
   * histogram.add(Float32Array.of(-1, 0, 2));
   * console.log(histogram.grid("minmax", 8).zeroPoint); // 85
   * ```
   */
  grid(method: RangeMethod, bits: ActivationBits, percentile = 99.9): ActivationGrid {
    checkBits(bits);
    const { low, high } = this.range;
    switch (method) {
      case "minmax":
        return activationGrid(low, high, bits);
      case "percentile": {
        if (!(percentile > 0 && percentile <= 100)) {
          throw new RangeError(
            `Cannot find a range of activations: the percentile must lie in (0, 100], got ${percentile}`,
          );
        }
        const tail = (1 - percentile / 100) / 2;
        return activationGrid(this.quantile(tail), this.quantile(1 - tail), bits);
      }
      case "mse":
        return this.#leastError(bits);
      default:
        throw new RangeError(
          `Cannot find a range of activations: the method must be one of ${RANGE_METHODS.join(", ")}, got ${
            JSON.stringify(method)
          }`,
        );
    }
  }

  /** The value below which a share of those seen lies, to the width of a bin; 0 and 1 are exact. */
  quantile(share: number): number {
    const { low, high } = this.range;
    if (share <= 0) return low;
    if (share >= 1) return high;
    const width = 2 * this.#reach / HISTOGRAM_BINS;
    let left = share * this.#count;
    for (let i = 0; i < HISTOGRAM_BINS; i++) {
      const count = this.#counts[i]!;
      if (left <= count) {
        const value = -this.#reach + (i + (count === 0 ? 0 : left / count)) * width;
        return Math.min(high, Math.max(low, value));
      }
      left -= count;
    }
    return high;
  }

  /** Parameters of the least squared error: both ends cut by the same share, then each by another. */
  #leastError(bits: ActivationBits): ActivationGrid {
    const { low, high } = this.range;
    let best = activationGrid(low, high, bits), least = this.#squaredError(best, bits);
    let cutLow = 0, cutHigh = 0;
    const consider = (lowStep: number, highStep: number) => {
      const grid = activationGrid(low * MSE_CUT ** lowStep, high * MSE_CUT ** highStep, bits);
      const error = this.#squaredError(grid, bits);
      if (!(error < least)) return;
      [least, best, cutLow, cutHigh] = [error, grid, lowStep, highStep];
    };
    for (let step = 1; step < MSE_STEPS; step++) consider(step, step);
    for (let step = 0; step < MSE_STEPS; step++) consider(step, cutHigh);
    for (let step = 0; step < MSE_STEPS; step++) consider(cutLow, step);
    return best;
  }

  /** Expected over a bin: inside a code's cell `s²/12`, which single points of a coarse histogram miss. */
  #squaredError({ scale, zeroPoint }: ActivationGrid, bits: ActivationBits): number {
    const width = 2 * this.#reach / HISTOGRAM_BINS, top = 2 ** bits - 1;
    const first = -scale * (zeroPoint + 0.5), last = scale * (top - zeroPoint + 0.5);
    let sum = 0;
    for (let i = 0; i < HISTOGRAM_BINS; i++) {
      const count = this.#counts[i]!;
      if (count === 0) continue;
      const value = -this.#reach + (i + 0.5) * width;
      const clipped = value < first
        ? value - (first + scale / 2)
        : value > last
        ? value - (last - scale / 2)
        : undefined;
      sum += count * (clipped === undefined ? scale * scale / 12 : clipped * clipped);
    }
    return sum;
  }
}

/** Counts over twice the range: two bins become one. */
function halved(counts: Float64Array): Float64Array<ArrayBuffer> {
  const wider = new Float64Array(HISTOGRAM_BINS);
  for (let i = 0; i < HISTOGRAM_BINS; i++) wider[(i + HISTOGRAM_BINS / 2) >> 1]! += counts[i]!;
  return wider;
}
