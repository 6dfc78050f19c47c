/** The tensors of an input in a statistics file, as file.ts lists them, and its second moments. */
import { momentElements } from "../../native/call_checks.ts";
import { momentBlocks } from "../../quant/solvers/moments.ts";
import type { SafetensorsFile, TensorSpec } from "../../tensor/mod.ts";
import { HISTOGRAM_BINS } from "../activation_range.ts";
import {
  type Malformed,
  readValues,
  type TensorEntry,
  type TimeDtype,
  type TimeValues,
} from "../time_file.ts";
import { checkMoment } from "./checks.ts";
import { hasHistograms, type InputStatistics, type Moments } from "./contents.ts";
import type { CalibrationStatistics } from "./statistics.ts";

/** Parts of an input, `histograms` apart, by what they are called in the file. */
export const PARTS = [
  ["weight", "weight", "F64"],
  ["tokens", "tokens", "F64"],
  ["samples", "samples", "F64"],
  ["sum", "sum", "F64"],
  ["squares", "squares", "F64"],
  ["sum_low", "sumLow", "F64"],
  ["squares_low", "squaresLow", "F64"],
  ["second", "second", "F32"],
  ["group_second", "groupSecond", "F32"],
] as const satisfies readonly (readonly [string, keyof InputStatistics, TimeDtype])[];

/** What statistics have: of an unfinished pass, or a part of one, sums are exact. */
type Kind = Pick<CalibrationStatistics, "second" | "isExact">;

/** Whether statistics have a part. */
const hasPart = ({ second, isExact }: Kind, key: keyof InputStatistics): boolean =>
  key === "second"
    ? second !== "none"
    : key === "groupSecond"
    ? second === "groups"
    : isExact || key !== "sumLow" && key !== "squaresLow";

/** The tensors of an input. */
export function entriesOf(
  name: string,
  input: InputStatistics,
  groups: number,
  kind: Kind & Partial<Pick<CalibrationStatistics, "momentsOf" | "isFresh">>,
): TensorEntry[] {
  const { cols, block = cols, histograms } = input;
  const shapes = {
    weight: [groups],
    tokens: [groups],
    samples: [groups],
    sum: [groups, cols],
    squares: [groups, cols],
    sum_low: [groups, cols],
    squares_low: [groups, cols],
    second: block < cols ? [momentElements(cols, cols, block)] : [cols, cols],
    group_second: [groups, cols, cols],
  };
  const entries = PARTS.filter(([, key]) => hasPart(kind, key)).map((
    [part, key, dtype],
  ): TensorEntry => ({
    spec: { name: `${name}.${part}`, dtype: kind.isExact ? "F64" : dtype, shape: shapes[part] },
    // Only now: it may have to be read.
    values: () => (key === "second" || key === "groupSecond" ? kind.momentsOf!(name, key) : input[key])!,
    isFresh: kind.isFresh === true && (key === "second" || key === "groupSecond"),
  }));
  const range = () =>
    Float64Array.from(
      histograms.flatMap(({ state: { minimum, maximum, reach } }) => [minimum, maximum, reach]),
    );
  const counts = () => {
    const all = new Float64Array(groups * HISTOGRAM_BINS);
    for (const [g, { state }] of histograms.entries()) all.set(state.counts, g * HISTOGRAM_BINS);
    return all;
  };
  if (!hasHistograms(input)) return entries;
  return [
    ...entries,
    { spec: { name: `${name}.range`, dtype: "F64", shape: [groups, 3] }, values: range },
    { spec: { name: `${name}.histogram`, dtype: "F64", shape: [groups, HISTOGRAM_BINS] }, values: counts },
  ];
}

/** Ending of a tensor in place of a second moment. */
export const CORRELATIONS = ".correlations";

/** The tensor that a file has for a second moment: of that name, or correlations in its place. */
export function momentTensor({ tensors }: SafetensorsFile, second: string): string {
  const other = second.replace(/\.second$/, CORRELATIONS);
  return tensors.has(second) || !tensors.has(other) ? second : other;
}

/** Numbers below the diagonals of blocks. */
export function belowDiagonal(cols: number, block: number): number {
  let count = 0;
  for (const { cols: own } of momentBlocks(cols, block)) count += own * (own - 1) / 2;
  return count;
}

/** A second moment of the correlations that a file has in its place, and sums of squares. */
function fromCorrelations(
  file: SafetensorsFile,
  name: string,
  { cols, block = cols, squares }: InputStatistics,
  malformed: Malformed,
): Float32Array<ArrayBuffer> {
  const info = file.tensors.get(name)!, count = belowDiagonal(cols, block);
  if (info.dtype !== "F16" || info.shape.join() !== `${count}`) {
    const got = `${info.dtype} [${info.shape.join(", ")}]`;
    throw malformed(`${JSON.stringify(name)} must be F16 [${count}], got ${got}`, name);
  }
  const values = new Float16Array(file.read(name).buffer);
  const second = new Float32Array(momentElements(cols, cols, block)), sums = new Float64Array(cols);
  for (const [i, value] of squares.entries()) sums[i % cols]! += value;
  let next = 0;
  for (const { first, cols: own, at } of momentBlocks(cols, block)) {
    for (let i = 0; i < own; i++) {
      const root = Math.sqrt(sums[first + i]!);
      for (let k = 0; k < i; k++) {
        const value = values[next++]!;
        if (!(Math.abs(value) <= 1)) {
          throw malformed(`correlations must be −1 to 1, got ${value} at ${next - 1}`, name);
        }
        second[at + i * own + k] = second[at + k * own + i] = value * root * Math.sqrt(sums[first + k]!);
      }
      second[at + i * (own + 1)] = sums[first + i]!;
    }
  }
  return second;
}

/**
 * Second moments of a tensor, one after the other.
 *
 * @param isChecked whether its numbers were looked through before
 */
export function readMoments(
  file: SafetensorsFile,
  spec: TensorSpec,
  own: InputStatistics,
  malformed: Malformed,
  isChecked = false,
): Moments {
  const { cols, block = cols } = own, tensor = momentTensor(file, spec.name);
  if (tensor !== spec.name) return fromCorrelations(file, tensor, own, malformed);
  if (isChecked) {
    return readValues(file, spec.name, spec.dtype as TimeDtype, [spec.shape], malformed) as Moments;
  }
  const values = readFinite(file, spec, malformed) as Moments;
  if (spec.shape.length === 1) {
    for (const { cols: own, at } of momentBlocks(cols, block)) {
      checkMoment(values.subarray(at, at + own * own), own, spec.name, malformed);
    }
    return values;
  }
  for (let at = 0; at < values.length; at += cols * cols) {
    checkMoment(values.subarray(at, at + cols * cols), cols, spec.name, malformed);
  }
  return values;
}

export function readFinite(
  file: SafetensorsFile,
  { name, dtype, shape }: TensorSpec,
  malformed: Malformed,
): TimeValues {
  const values = readValues(file, name, dtype as TimeDtype, [shape], malformed);
  if (values instanceof Float32Array && isFinite32(values)) return values;
  const bad = values.findIndex((value) => !Number.isFinite(value));
  if (bad >= 0) throw malformed(`numbers must be finite, got ${values[bad]} at ${bad}`, name);
  return values;
}

function isFinite32(values: Float32Array): boolean {
  let nothing = 0; // NaN where any is not finite
  for (let i = 0; i < values.length; i++) nothing += values[i]! * 0;
  return nothing === 0;
}
