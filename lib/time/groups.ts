/**
 * Time groups: contiguous ranges of an axis's bins that share parameters, of equal width or with boundaries
 * put where input statistics change. parameters.ts has the parameters of each group.
 */
import { checkWhole } from "../native/call.ts";
import type { TimeAxis } from "./axis.ts";

/** Most groups: more than one parameter set for ten of the usual thousand timesteps is no grouping. */
export const MAX_TIME_GROUPS = 100;
/** Most observed bins of {@linkcode adaptiveTimeGroups}: its table of costs has their square. */
export const MAX_OBSERVED_BINS = 4096;

/** Bins `[start, end)`. */
export interface TimeGroup {
  readonly start: number;
  readonly end: number;
}

/** Groups that cover an axis without gap or overlap. */
export class TimeGroups {
  /** `i32[count + 1]`: group g has the bins `[boundaries[g], boundaries[g + 1])`. */
  readonly boundaries: Int32Array<ArrayBuffer>;
  readonly count: number;
  readonly #groupOfBin: Uint8Array<ArrayBuffer>;

  /**
   * Groups with given boundaries.
   *
   * @throws {RangeError} when there are more groups than bins or than {@linkcode MAX_TIME_GROUPS}, or one is
   * empty, or they do not cover the axis
   */
  constructor(readonly axis: TimeAxis, boundaries: ArrayLike<number>) {
    const count = boundaries.length - 1;
    checkGroupCount(axis, count);
    for (let g = 0; g <= count; g++) {
      const at = boundaries[g]!;
      const wanted = g === 0 ? 0 : g === count ? axis.bins : undefined;
      if (!Number.isInteger(at) || (wanted !== undefined && at !== wanted)) {
        throw new RangeError(
          `Cannot group times: boundaries must be whole numbers from 0 to ${axis.bins}, got ${at} at ${g}`,
        );
      }
      if (g > 0 && at <= boundaries[g - 1]!) {
        throw new RangeError(
          `Cannot group times: no group may be empty, got [${boundaries[g - 1]}, ${at}) for group ${g - 1}`,
        );
      }
    }
    this.boundaries = Int32Array.from(boundaries);
    this.count = count;
    this.#groupOfBin = new Uint8Array(axis.bins);
    for (let g = 0; g < count; g++) this.#groupOfBin.fill(g, boundaries[g]!, boundaries[g + 1]!);
  }

  /** The group of a time, without allocation. @throws {RangeError} when `t` is outside the axis */
  groupOf(t: number): number {
    return this.#groupOfBin[this.axis.binOf(t)]!;
  }

  /** The group of a bin. @throws {RangeError} when there is no such bin */
  groupOfBin(bin: number): number {
    const group = this.#groupOfBin[bin];
    if (group === undefined) {
      throw new RangeError(
        `Cannot look up a time: a bin must be a whole number from 0 to ${this.axis.bins - 1}, got ${bin}`,
      );
    }
    return group;
  }

  /** Bins of a group. @throws {RangeError} when there is no such group */
  range(group: number): TimeGroup {
    const start = this.boundaries[group], end = this.boundaries[group + 1];
    if (start === undefined || end === undefined) {
      throw new RangeError(
        `Cannot look up a time group: it must be a whole number from 0 to ${this.count - 1}, got ${group}`,
      );
    }
    return { start, end };
  }
}

function checkGroupCount(axis: TimeAxis, count: number): void {
  checkWhole("group times", "groups", count, 1, MAX_TIME_GROUPS);
  if (count > axis.bins) {
    throw new RangeError(
      `Cannot group times: groups must be at most the ${axis.bins} bins of the axis, got ${count}`,
    );
  }
}

/**
 * Groups of equal width; where the bins do not divide evenly, widths differ by one.
 *
 * @throws {RangeError} when `count` is not a whole number from 1 to {@linkcode MAX_TIME_GROUPS} and to the
 * axis's bins
 *
 * @example
 * ```ts
 * import { timestepAxis } from "./axis.ts";
 * import { equalTimeGroups } from "./groups.ts";
 * const groups = equalTimeGroups(timestepAxis(1000), 10);
 * console.log(groups.groupOf(99), groups.groupOf(100)); // 0 1
 * ```
 */
export function equalTimeGroups(axis: TimeAxis, count: number): TimeGroups {
  checkGroupCount(axis, count);
  return new TimeGroups(axis, Array.from({ length: count + 1 }, (_, g) => Math.floor(g * axis.bins / count)));
}

/** Statistics of a layer's (or all layers') inputs at some bins of an axis. */
export interface BinStatistics {
  /** Observed bins, ascending. */
  readonly bins: ArrayLike<number>;
  /** `[bins.length, dimensions]`: what was measured at each. Dimensions count as they are. */
  readonly values: ArrayLike<number>;
  /** Weight of each observed bin; default 1. */
  readonly weights?: ArrayLike<number> | undefined;
}

/**
 * Groups whose boundaries minimise the weighted variance of the statistics inside the groups, exactly, by
 * dynamic programming over all divisions (Fisher, "On Grouping for Maximum Homogeneity", 1958). Between two
 * observed bins the boundary lies in the middle. Ties go to the earlier boundary.
 *
 * @throws {TypeError} when the arrays' lengths do not fit each other
 * @throws {RangeError} when `count` is not allowed, groups would be empty (more groups than observed bins),
 * bins do not ascend inside the axis, or a statistic or weight is not finite
 *
 * @example
 * ```ts
 * import { timestepAxis } from "./axis.ts";
 * import { adaptiveTimeGroups } from "./groups.ts";
 * const values = [1, 1, 1, 5, 5, 5, 5, 5]; // jumps between bins 2 and 3
 * const groups = adaptiveTimeGroups(timestepAxis(8), 2, { bins: values.keys().toArray(), values });
 * console.log(groups.boundaries); // 0, 3, 8
 * ```
 */
export function adaptiveTimeGroups(axis: TimeAxis, count: number, statistics: BinStatistics): TimeGroups {
  checkGroupCount(axis, count);
  const { bins, values, weights } = statistics;
  const n = bins.length;
  checkStatistics(axis, count, statistics);
  const cost = groupCosts(values, n, weights);
  // best[j]: least cost of the first j + 1 observed bins in so many groups; from[g, j]: where the last of g +
  // 1 groups begins
  let best = cost.slice(0, n);
  const from = new Int32Array(count * n);
  for (let g = 1; g < count; g++) {
    const next = new Float64Array(n).fill(Infinity);
    for (let j = g; j < n; j++) {
      for (let i = g; i <= j; i++) {
        const total = best[i - 1]! + cost[i * n + j]!;
        if (total < next[j]!) {
          next[j] = total;
          from[g * n + j] = i;
        }
      }
    }
    best = next;
  }
  const boundaries = new Array<number>(count + 1);
  boundaries[0] = 0;
  boundaries[count] = axis.bins;
  for (let g = count - 1, j = n - 1; g > 0; g--) {
    const first = from[g * n + j]!;
    boundaries[g] = Math.ceil((bins[first - 1]! + 1 + bins[first]!) / 2);
    j = first - 1;
  }
  return new TimeGroups(axis, boundaries);
}

function checkStatistics(axis: TimeAxis, count: number, { bins, values, weights }: BinStatistics): void {
  const fail = (reason: string) => `Cannot group times: ${reason}`;
  const n = bins.length;
  if (n > MAX_OBSERVED_BINS) {
    throw new RangeError(fail(`statistics must be of at most ${MAX_OBSERVED_BINS} bins, got ${n}`));
  }
  if (count > n) {
    throw new RangeError(
      fail(`every group must have a bin with statistics, got ${n} such bins for ${count} groups`),
    );
  }
  if (values.length === 0 || values.length % n !== 0) {
    throw new TypeError(fail(`statistics must be [${n}, dimensions], got ${values.length} numbers`));
  }
  if (weights !== undefined && weights.length !== n) {
    throw new TypeError(fail(`weights must be ${n} numbers, got ${weights.length}`));
  }
  for (let i = 0; i < n; i++) {
    const bin = bins[i]!;
    if (!Number.isInteger(bin) || bin < 0 || bin >= axis.bins || (i > 0 && bin <= bins[i - 1]!)) {
      throw new RangeError(fail(`observed bins must ascend from 0 to ${axis.bins - 1}, got ${bin} at ${i}`));
    }
    const weight = weights?.[i] ?? 1;
    if (!(weight > 0 && weight < Infinity)) {
      throw new RangeError(fail(`weights must be finite and above 0, got ${weight} at bin ${bin}`));
    }
  }
  for (let i = 0; i < values.length; i++) {
    if (!Number.isFinite(values[i]!)) {
      const bin = bins[Math.floor(i / (values.length / n))];
      throw new RangeError(fail(`statistics must be finite, got ${values[i]} at bin ${bin}`));
    }
  }
}

/** `f64[n, n]`: at `[i, j]` the weighted squares around their mean of the statistics at bins i … j. */
function groupCosts(
  values: ArrayLike<number>,
  n: number,
  weights: ArrayLike<number> | undefined,
): Float64Array<ArrayBuffer> {
  const dimensions = values.length / n;
  const costs = new Float64Array(n * n);
  const mean = new Float64Array(dimensions);
  // Welford's update from each first bin on: no difference of large sums.
  for (let i = 0; i < n; i++) {
    mean.fill(0);
    let total = 0, squares = 0;
    for (let j = i; j < n; j++) {
      const weight = weights?.[j] ?? 1;
      total += weight;
      for (let d = 0; d < dimensions; d++) {
        const value = values[j * dimensions + d]!;
        const delta = value - mean[d]!;
        mean[d]! += delta * weight / total;
        squares += weight * delta * (value - mean[d]!);
      }
      costs[i * n + j] = squares;
    }
  }
  return costs;
}
