/**
 * Phase 2: time parameters become continuous. Within a window of a boundary between time groups the
 * parameters of the two neighbours blend, all computed from the groups' parameters, so that order does not
 * matter. Held-out error decides which layers keep it.
 */
import { checkWhole } from "../native/call.ts";
import type { TimeGroups } from "../time/mod.ts";
import { type MarkovReport, markovReport, type ParameterSeries } from "./validator.ts";

/** Shape of a blend across a boundary. */
export type Interpolation = "linear" | "cubic" | "sigmoid";
/** The shapes that a blend can have. */
export const INTERPOLATIONS: readonly Interpolation[] = ["linear", "cubic", "sigmoid"];

/** Widest window, in bins. */
const MAX_WINDOW_SIZE = 1000;
/** Slope of the sigmoid over the whole window; its ends are moved to 0 and 1 exactly. */
const SIGMOID_SLOPE = 10;

/** How values blend across a boundary. */
export interface SmoothingOptions {
  /** Bins on either side of a boundary within which parameters blend. Default 5. */
  readonly windowSize?: number | undefined;
  /** Default `linear`. */
  readonly interpolation?: Interpolation | undefined;
}

/**
 * Weight of a blend at position 0 ≤ a ≤ 1: a, `3a² − 2a³`, or a sigmoid from 0 to 1; 0.5 in the middle.
 *
 * @throws {RangeError} when `a` is outside [0, 1] or the interpolation is none
 */
export function blendWeight(a: number, interpolation: Interpolation): number {
  if (!(a >= 0 && a <= 1)) {
    throw new RangeError(`Cannot smooth time parameters: a must lie in [0, 1], got ${a}`);
  }
  if (interpolation === "linear") return a;
  if (interpolation === "cubic") return a * a * (3 - 2 * a);
  if (interpolation === "sigmoid") {
    const sigmoid = (x: number) => 1 / (1 + Math.exp(-SIGMOID_SLOPE * (x - 0.5)));
    const low = sigmoid(0);
    return Math.min(1, (sigmoid(a) - low) / (1 - 2 * low));
  }
  throw new RangeError(
    `Cannot smooth time parameters: interpolation must be one of ${INTERPOLATIONS.join(", ")}, got ${
      JSON.stringify(interpolation)
    }`,
  );
}

/**
 * Weights of the left and right neighbours in each bin:
 * `θ(t) = (1 − left − right) θ_g + left θ_{g−1} + right θ_{g+1}`. At a boundary both sides reach one half;
 * outside every window both are 0. One table serves all layers.
 *
 * @throws {RangeError} when `windowSize` is not a whole number from 1 to {@linkcode MAX_WINDOW_SIZE}
 */
export function blendTable(
  groups: TimeGroups,
  options: SmoothingOptions = {},
): { readonly left: Float64Array<ArrayBuffer>; readonly right: Float64Array<ArrayBuffer> } {
  const { windowSize = 5, interpolation = "linear" } = options;
  checkWhole("smooth time parameters", "windowSize", windowSize, 1, MAX_WINDOW_SIZE);
  blendWeight(0, interpolation);
  const { bins } = groups.axis;
  const left = new Float64Array(bins), right = new Float64Array(bins);
  for (let g = 0; g < groups.count; g++) {
    const { start, end } = groups.range(g);
    for (let bin = start; bin < end; bin++) {
      // From the middle of the bin, so that a boundary lies half-way between its neighbours.
      const fromLeft = bin + 0.5 - start, fromRight = end - bin - 0.5;
      if (g > 0 && fromLeft < windowSize) {
        left[bin] = blendWeight((windowSize - fromLeft) / (2 * windowSize), interpolation);
      }
      if (g < groups.count - 1 && fromRight < windowSize) {
        right[bin] = blendWeight((windowSize - fromRight) / (2 * windowSize), interpolation);
      }
    }
  }
  return { left, right };
}

/** A scale and a zero point for each bin of the axis. */
export interface SmoothSeries {
  /** `f64[bins]` */
  readonly scale: Float64Array<ArrayBuffer>;
  /** `f64[bins]`, real-valued */
  readonly zeroPoint: Float64Array<ArrayBuffer>;
  readonly bits: number;
}

/**
 * Activation parameters for each bin. The ends of the ranges blend: towards a boundary each end moves from
 * the group's value to the wider of the two neighbours', so that they are continuous there and no bin's range
 * is smaller than the calibrated range of its group.
 *
 * @throws {TypeError} when there is not one scale and one zero point for each group
 * @throws {RangeError} when a scale is not above 0, a value is not finite or an option is not allowed
 *
 * @example
 * ```ts
 * import { equalTimeGroups, timestepAxis } from "../time/mod.ts";
 * import { smoothActivation } from "./smoother.ts";
 * const groups = equalTimeGroups(timestepAxis(20), 2);
 * const { scale } = smoothActivation(groups, { scale: [1, 2], zeroPoint: [0, 0], bits: 8 }, { windowSize: 2 });
 * console.log(scale.subarray(7, 12)); // 1, 1.25, 1.75, 2, 2
 * ```
 */
export function smoothActivation(
  groups: TimeGroups,
  { scale, zeroPoint, bits }: ParameterSeries,
  options: SmoothingOptions = {},
): SmoothSeries {
  const bad = [scale.length, zeroPoint.length].find((length) => length !== groups.count);
  if (bad !== undefined) {
    throw new TypeError(
      `Cannot smooth time parameters: every one of ${groups.count} groups must have a pair of parameters, got ${bad}`,
    );
  }
  const { left, right } = blendTable(groups, options);
  const top = 2 ** bits - 1, { bins } = groups.axis;
  const lows = Float64Array.from(scale, (s, g) => -s * zeroPoint[g]!);
  const highs = Float64Array.from(scale, (s, g) => s * (top - zeroPoint[g]!));
  for (let g = 0; g < groups.count; g++) {
    if (!(scale[g]! > 0 && Number.isFinite(lows[g]!) && Number.isFinite(highs[g]!))) {
      throw new RangeError(
        `Cannot smooth time parameters: scales must be above 0 and all values finite, got ${scale[g]} and ${
          zeroPoint[g]
        } for group ${g}`,
      );
    }
  }
  const out = { scale: new Float64Array(bins), zeroPoint: new Float64Array(bins), bits };
  for (let bin = 0; bin < bins; bin++) {
    const g = groups.groupOfBin(bin);
    // The blend reaches one half at the boundary, the wider end is reached there in full.
    const toLeft = 2 * left[bin]!, toRight = 2 * right[bin]!;
    const reach = (ends: Float64Array, wider: (a: number, b: number) => number) => {
      const own = ends[g]!;
      const there = (weight: number, other: number) => own + weight * (wider(own, other) - own);
      const atLeft = toLeft > 0 ? there(toLeft, ends[g - 1]!) : own;
      return wider(atLeft, toRight > 0 ? there(toRight, ends[g + 1]!) : own);
    };
    const low = reach(lows, Math.min), high = reach(highs, Math.max);
    if (low === lows[g] && high === highs[g]) {
      out.scale[bin] = scale[g]!; // to the bit
      out.zeroPoint[bin] = zeroPoint[g]!;
    } else {
      out.scale[bin] = (high - low) / top;
      out.zeroPoint[bin] = -low / out.scale[bin]!;
    }
  }
  return out;
}

/**
 * The Markov score of smooth parameters: the jump of a boundary is the largest between neighbouring bins that
 * belong to it, from the middle of one group to the middle of the next, so that the score is comparable with
 * that of the groups, and equal to it without smoothing.
 *
 * @throws as `validateMarkov`
 */
export function validateSmooth(
  groups: TimeGroups,
  { scale, zeroPoint, bits }: SmoothSeries,
  smoothnessThreshold: number,
): MarkovReport {
  const scaleJumps: number[] = [], zeroPointJumps: number[] = [];
  const codes = 2 ** bits - 1;
  const middle = (g: number) => {
    const { start, end } = groups.range(g);
    return Math.floor((start + end - 1) / 2);
  };
  for (let g = 0; g + 1 < groups.count; g++) {
    let scaleJump = 0, zeroPointJump = 0;
    for (let bin = middle(g); bin < middle(g + 1); bin++) {
      scaleJump = Math.max(scaleJump, Math.abs(scale[bin + 1]! - scale[bin]!) / scale[bin]!);
      zeroPointJump = Math.max(zeroPointJump, Math.abs(zeroPoint[bin + 1]! - zeroPoint[bin]!) / codes);
    }
    scaleJumps.push(scaleJump);
    zeroPointJumps.push(zeroPointJump);
  }
  return markovReport(scaleJumps, zeroPointJumps, smoothnessThreshold);
}

/** A layer's held-out error without and with a change. */
export interface HeldOutErrors {
  readonly before: number;
  readonly after: number;
}

/** Layers that keep a change, and the errors that decided. */
export interface GuardReport {
  readonly kept: readonly string[];
  readonly rejected: readonly string[];
  readonly errors: ReadonlyMap<string, HeldOutErrors>;
}

/**
 * Keeps a change in the layers whose held-out error does not rise.
 *
 * @param measure a layer's held-out error with its old and with its new parameters
 * @throws {RangeError} when an error is not a number ≥ 0
 *
 * @example
 * ```ts
 * import { keepWhereErrorDoesNotRise } from "./smoother.ts";
 * const { kept, rejected } = keepWhereErrorDoesNotRise(["a", "b"], (name) => ({ before: 1, after: name === "a" ? 0.9 : 1.1 }));
 * console.log(kept, rejected); // ["a"] ["b"]
 * ```
 */
export function keepWhereErrorDoesNotRise(
  layers: Iterable<string>,
  measure: (layer: string) => HeldOutErrors,
): GuardReport {
  const kept: string[] = [], rejected: string[] = [];
  const errors = new Map<string, HeldOutErrors>();
  for (const layer of layers) {
    const { before, after } = measure(layer);
    if (!(before >= 0 && after >= 0)) {
      throw new RangeError(
        `Cannot decide on ${
          JSON.stringify(layer)
        }: held-out errors must be numbers ≥ 0, got ${before} before and ${after} after`,
      );
    }
    errors.set(layer, { before, after });
    (after <= before ? kept : rejected).push(layer);
  }
  return { kept, rejected, errors };
}
