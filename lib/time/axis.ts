/**
 * The denoising axis in bins: timesteps of Gaussian diffusion, or mask ratios of masked diffusion, behind one
 * interface. Bin 0 is the cleanest, as timestep 0 is. Groups of bins are in groups.ts.
 */

/** Most bins of an axis: published schedules have 1000 timesteps, some 4000; tables over it stay small. */
export const MAX_TIME_BINS = 100_000;

/** Where a step of a diffusion model is along its denoising, as one of `bins` whole numbers. */
export interface TimeAxis {
  /** `timesteps`: t is a timestep in [0, bins); `mask_ratio`: t is the share of masks in (0, 1]. */
  readonly kind: "timesteps" | "mask_ratio";
  readonly bins: number;
  /** The bin of a time; allocates nothing. @throws {RangeError} when `t` is outside the axis */
  binOf(t: number): number;
}

function checkBins(doing: string, bins: number): void {
  if (!Number.isInteger(bins) || bins < 1 || bins > MAX_TIME_BINS) {
    throw new RangeError(
      `Cannot ${doing}: the axis must have a whole number of bins from 1 to ${MAX_TIME_BINS}, got ${bins}`,
    );
  }
}

/**
 * Timesteps 0 … `timesteps` − 1 of Gaussian diffusion, one bin each. A time between two timesteps belongs to
 * the lower one.
 *
 * @throws {RangeError} when `timesteps` is not a whole number from 1 to {@linkcode MAX_TIME_BINS}
 *
 * @example
 * ```ts
 * import { timestepAxis } from "./axis.ts";
 * console.log(timestepAxis(1000).binOf(999)); // 999
 * ```
 */
export function timestepAxis(timesteps: number): TimeAxis {
  checkBins("divide timesteps", timesteps);
  return {
    kind: "timesteps",
    bins: timesteps,
    binOf(t) {
      if (!(t >= 0 && t < timesteps)) {
        throw new RangeError(`Cannot look up a time: a timestep must lie in [0, ${timesteps}), got ${t}`);
      }
      return Math.floor(t);
    },
  };
}

/**
 * Mask ratios in (0, 1] of masked diffusion: bin i holds the ratios in (i/bins, (i + 1)/bins].
 *
 * @throws {RangeError} when `bins` is not a whole number from 1 to {@linkcode MAX_TIME_BINS}
 *
 * @example
 * ```ts
 * import { maskRatioAxis } from "./axis.ts";
 * const axis = maskRatioAxis(10);
 * console.log(axis.binOf(1), axis.binOf(0.1), axis.binOf(0.001)); // 9 0 0
 * ```
 */
export function maskRatioAxis(bins: number): TimeAxis {
  checkBins("divide mask ratios", bins);
  return {
    kind: "mask_ratio",
    bins,
    binOf(t) {
      if (!(t > 0 && t <= 1)) {
        throw new RangeError(`Cannot look up a time: a mask ratio must lie in (0, 1], got ${t}`);
      }
      return Math.ceil(t * bins) - 1;
    },
  };
}
