/** Adding statistics of other runs up: what must be alike, and sums in the precision that both have. */
import { CalibrationError } from "../../errors.ts";
import { listing } from "../../tensor/mod.ts";
import type { TimeGroups } from "../groups.ts";
import type { CalibrationRun, InputStatistics, Moments, SecondMoments } from "./contents.ts";
import { otherLayer, type StatisticsModel } from "./model.ts";

export const asFloats = (moments: Moments): Float32Array<ArrayBuffer> =>
  moments instanceof Float32Array ? moments : new Float32Array(moments);

/** `sums += more`. @returns sums */
export function addTo<T extends Float32Array | Float64Array>(sums: T, more: Float32Array | Float64Array): T {
  for (let i = 0; i < sums.length; i++) sums[i]! += more[i]!;
  return sums;
}

/** Sum of moments, in double where both are. @param isFirst whether the first may become it */
export function added(first: Moments, second: Moments, isFirst = false): Moments {
  const isDouble = first instanceof Float64Array && second instanceof Float64Array;
  const sums = isDouble ? first : asFloats(first);
  return addTo(isFirst || sums !== first ? sums : sums.slice(), isDouble ? second : asFloats(second));
}

/** `sums += more`, and what rounding took is added to `low` (Knuth's two-sum). */
export function addExactly(
  sums: Float64Array,
  low: Float64Array,
  more: Float64Array,
  moreLow?: Float64Array,
): void {
  for (let i = 0; i < sums.length; i++) {
    const a = sums[i]!, b = more[i]!, sum = a + b, own = sum - a;
    sums[i] = sum;
    low[i]! += (a - (sum - own)) + (b - own) + (moreLow?.[i] ?? 0);
  }
}

/** Statistics, as far as others are held against them. */
export interface Summed {
  readonly fingerprint: string;
  readonly model: StatisticsModel | undefined;
  readonly groups: TimeGroups;
  readonly second: SecondMoments;
  readonly runs: readonly CalibrationRun[];
  readonly inputs: ReadonlyMap<string, InputStatistics>;
}

const layersOf = ({ inputs }: Summed): string[] => [...inputs.values()].flatMap(({ layers }) => layers);

/** @throws {CalibrationError} when others cannot be added to these */
export function checkMerge(one: Summed, other: Summed): void {
  const fail = (reason: string) => new CalibrationError(`Cannot merge calibration statistics: ${reason}`);
  if (other.fingerprint !== one.fingerprint) {
    throw fail(
      `they must be of one model (${one.fingerprint.slice(0, 12)}…), got ${other.fingerprint.slice(0, 12)}…`,
    );
  }
  const { axis, boundaries } = one.groups, { axis: otherAxis, boundaries: otherBoundaries } = other.groups;
  if (
    axis.kind !== otherAxis.kind || axis.bins !== otherAxis.bins ||
    boundaries.join() !== otherBoundaries.join()
  ) {
    throw fail(
      `they must have the same time groups, got ${
        boundaries.length - 1
      } of ${axis.bins} ${axis.kind} bins and ` +
        `${otherBoundaries.length - 1} of ${otherAxis.bins} ${otherAxis.kind} bins` +
        (boundaries.length === otherBoundaries.length ? " with other boundaries" : ""),
    );
  }
  if (one.second !== other.second) {
    throw fail(`they must keep the same second moments, got ${one.second} and ${other.second}`);
  }
  // Another program may look at some layers at a time: what only one has is taken from it.
  const isPart = one.model !== undefined && other.model !== undefined;
  const layout = ({ inputs }: Summed) =>
    JSON.stringify(
      [...inputs].filter(([name]) => !isPart || one.inputs.has(name) && other.inputs.has(name)).sort()
        .map(([name, { cols, layers }]) => [name, cols, layers]),
    );
  if (layout(one) !== layout(other)) {
    const lacking = (a: Summed, b: Summed) => {
      const known = new Set(layersOf(b));
      return layersOf(a).filter((layer) => !known.has(layer));
    };
    const different = [...lacking(one, other), ...lacking(other, one)];
    throw fail(
      `they must be of the same layers, got ${
        different.length === 0 ? "others" : listing(different)
      } in one of them`,
    );
  }
  const otherBlock = [...one.inputs].find(([name, { block }]) =>
    other.inputs.has(name) && other.inputs.get(name)!.block !== block
  );
  if (otherBlock !== undefined) {
    const [name, { block }] = otherBlock;
    throw fail(
      `moments must be of the same blocks, got blocks of ${block} and of ${
        other.inputs.get(name)!.block
      } columns for ${JSON.stringify(name)}`,
    );
  }
  const changed = otherLayer(one.model, other.model);
  if (changed !== undefined) {
    throw fail(`they must be of one model, got other weights in ${JSON.stringify(changed)}`);
  }
  const known = new Set(one.runs.map(({ identity }) => identity));
  const twice = other.runs.find(({ identity }) => known.has(identity));
  if (twice !== undefined) {
    throw fail(`their data or seeds must differ, got the same run twice: ${twice.source}`);
  }
}
