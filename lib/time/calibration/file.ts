/**
 * Calibration statistics on disk, finished or on their way:
 *
 * ```text
 * time_groups.boundaries   I32 [groups + 1]
 * <input>.weight           F64 [groups]
 * <input>.tokens           F64 [groups]                whole numbers
 * <input>.samples          F64 [groups]                whole numbers
 * <input>.sum              F64 [groups, cols]          Σ w x
 * <input>.squares          F64 [groups, cols]          Σ w x²
 * <input>.range            F64 [groups, 3]             minimum, maximum, reach of the histogram
 * <input>.histogram        F64 [groups, 2048]          whole numbers; it and the range may be left out together
 * <input>.second           F32 [cols, cols]            Σ w x xᵀ, unless `second` is none; of blocks on the diagonal
 *                              [numbers of all blocks], one block after the other
 * <input>.correlations     F16 [numbers]               in place of `second`: what is below the diagonal of each block, row
 *                              by row, divided by the roots of both columns' sums of squares
 * <input>.group_second     F32 [groups, cols, cols]    where `second` is groups
 * <input>.sum_low          F64 [groups, cols]          of a part of a pass, or one on its way: what rounding took from
 * <input>.squares_low      F64 [groups, cols]          the sums; `second` and `group_second` are F64 then
 * model.weights            F32 [layers, 8]             some weights of each layer of `model`, NaN where not known; may be left out
 * __metadata__: format, version, fingerprint (may be left out), model (JSON: name, and layers with rows and columns; may be left out where there is a fingerprint), axis, bins, second, inputs (JSON: layers by input, and the columns of a block of its moment where it is not whole), runs (JSON), and parts_done of an unfinished one
 * ```
 *
 * docs/statistics.md says it for those who write such files.
 */
import { CalibrationError } from "../../errors.ts";
import { momentElements } from "../../native/call_checks.ts";
import { setAside } from "../../quant/array_memory.ts";
import { SafetensorsFile } from "../../tensor/mod.ts";
import { ActivationHistogram, HISTOGRAM_BINS } from "../activation_range.ts";
import type { TimeGroups } from "../groups.ts";
import {
  BOUNDARIES,
  checkFormat,
  type Malformed,
  malformedIn,
  readGroups,
  type TimeValues,
  writeTimeFile,
} from "../time_file.ts";
import { checkDiagonal, checkSums } from "./checks.ts";
import { type LoadMoments, SECOND_MOMENTS, type SecondMoments, statisticsBytes } from "./contents.ts";
import { MODEL_WEIGHTS, parseInputs, parseRuns, readModel } from "./metadata.ts";
import { MODEL_SAMPLES } from "./model.ts";
import { CalibrationStatistics } from "./statistics.ts";
import {
  belowDiagonal,
  CORRELATIONS,
  entriesOf,
  momentTensor,
  PARTS,
  readFinite,
  readMoments,
} from "./tensors.ts";

/** `format` and `version` in the file's metadata. */
const FORMAT = "arrowquant calibration statistics";
const VERSION = "2";
/** Second moments of larger statistics are read when they are asked for, not kept. */
const KEPT_BYTES = 2 ** 28;
/** Largest file: moments of all time groups of a model of 70 B weights. */
const MAX_FILE_BYTES = 2 ** 42;

/**
 * Writes statistics, in one step: a file of that name is replaced when the new one is whole.
 *
 * @param partsDone of a pass that is not finished: how much of its data is in
 * @throws {OutputError} when it cannot be written
 */
export function writeCalibrationStatistics(
  path: string,
  statistics: CalibrationStatistics,
  partsDone?: number,
): void {
  const { groups, fingerprint, model, second, inputs, runs } = statistics;
  const layers = [...model?.layers ?? []], samples = model?.samples;
  const metadata = {
    format: FORMAT,
    version: VERSION,
    ...(fingerprint === "" ? {} : { fingerprint }),
    ...(model === undefined ? {} : {
      model: JSON.stringify({ name: model.name, layers: layers.map(([name, shape]) => [name, ...shape]) }),
    }),
    axis: groups.axis.kind,
    bins: String(groups.axis.bins),
    second,
    inputs: JSON.stringify(
      [...inputs].map(([name, { cols, block = cols, layers }]) =>
        block < cols ? [name, layers, block] : [name, layers]
      ),
    ),
    runs: JSON.stringify(runs),
    ...(partsDone === undefined ? {} : { parts_done: String(partsDone) }),
  };
  const entries = [...inputs].flatMap(([name, input]) => entriesOf(name, input, groups.count, statistics));
  if (samples !== undefined) {
    const unknown = new Array<number>(MODEL_SAMPLES).fill(NaN);
    entries.push({
      spec: { name: MODEL_WEIGHTS, dtype: "F32", shape: [layers.length, MODEL_SAMPLES] },
      values: () => Float32Array.from(layers.flatMap(([name]) => [...samples.get(name) ?? unknown])),
    });
  }
  writeTimeFile(path, groups, metadata, entries);
}

/** Whether a file holds calibration statistics. @throws {FormatError} when it is no safetensors file */
export function isCalibrationStatistics(path: string): boolean {
  using file = SafetensorsFile.open(path);
  return file.metadata["format"] === FORMAT;
}

/** Requirements on a file. */
export interface StatisticsExpectation {
  /** Of the model; a file that has none is taken, and its model is up to the caller to compare. */
  readonly fingerprint: string;
  /** Wanted groups; undefined: whatever the file has. */
  readonly groups?: TimeGroups | undefined;
  /** Whether the pass may be unfinished; default false. */
  readonly allowUnfinished?: boolean | undefined;
  /** Second moments that are not kept are read and checked at once as well, before work begins. */
  readonly checksAll?: boolean | undefined;
}

/**
 * Reads and checks statistics.
 *
 * @param keptBytes second moments of more are read and checked only when they are asked for
 * @returns them, and how many parts of the data are in where the pass is not finished
 * @throws {FormatError} when the file is not what its format promises, or holds NaN or impossible counts
 * @throws {CalibrationError} when it belongs to another model, has other groups than wanted, or is unfinished
 */
export function readCalibrationStatistics(
  path: string,
  expected: StatisticsExpectation,
  keptBytes = KEPT_BYTES,
): { readonly statistics: CalibrationStatistics; readonly partsDone: number | undefined } {
  using file = SafetensorsFile.open(path);
  const malformed = malformedIn(path);
  checkFormat(file, FORMAT, VERSION, malformed);
  const { fingerprint = "", axis, bins, second, inputs: inputText, runs: runText, parts_done } =
    file.metadata;
  if (file.fileBytes > MAX_FILE_BYTES) {
    throw malformed(`it must have at most ${MAX_FILE_BYTES} bytes, got ${file.fileBytes}`);
  }
  if (parts_done !== undefined && !/^\d{1,9}$/.test(parts_done)) {
    throw malformed(`parts_done must be a whole number, got ${parts_done}`);
  }
  const groups = readGroups(file, axis, bins, malformed);
  checkExpected(path, { fingerprint, parts_done, groups }, expected);
  if (!SECOND_MOMENTS.includes(second as SecondMoments)) {
    throw malformed(`second must be one of ${SECOND_MOMENTS.join(", ")}, got ${second}`);
  }
  const inputs = parseInputs(inputText, file, malformed), runs = parseRuns(runText, malformed);
  const bytes = statisticsBytes(inputs.values(), groups.count, second as SecondMoments);
  let least = bytes - 8 * groups.count * (HISTOGRAM_BINS + 3) * inputs.size;
  for (const [name, { cols, block = cols }] of inputs) {
    if (!momentTensor(file, `${name}.second`).endsWith(CORRELATIONS)) continue;
    least -= 4 * momentElements(cols, cols, block) - 2 * belowDiagonal(cols, block);
  }
  if (least > file.fileBytes) {
    throw malformed(`it must hold its inputs' ${least} bytes of statistics, got ${file.fileBytes} bytes`);
  }
  const model = readModel(file, malformed);
  if (fingerprint === "" && model === undefined) {
    throw malformed("metadata must have a fingerprint or a model, got neither");
  }
  /** Reads second moments, and checks them unless that was done. */
  const load: LoadMoments = (name, which) => {
    using own = SafetensorsFile.open(path);
    const input = statistics.inputs.get(name)!;
    const part = `${name}.${which === "second" ? "second" : "group_second"}`;
    const { spec } = entriesOf(name, input, groups.count, statistics).find((entry) =>
      entry.spec.name === part
    )!;
    return readMoments(own, spec, input, malformed, expected.checksAll === true);
  };
  let statistics: CalibrationStatistics;
  try {
    statistics = new CalibrationStatistics({
      fingerprint,
      model,
      groups,
      inputs,
      second: second as SecondMoments,
      runs,
      load: bytes > keptBytes ? load : undefined,
      isFresh: bytes > keptBytes,
    });
  } catch (cause) {
    if (!(cause instanceof RangeError) || cause instanceof CalibrationError) throw cause;
    throw malformed(cause.message, undefined, cause);
  }
  if (file.tensors.has(`${inputs.keys().next().value}.sum_low`)) statistics.markExact();
  const known = new Set<string>([BOUNDARIES, MODEL_WEIGHTS]);
  for (const name of statistics.inputs.keys()) {
    readInput(file, name, statistics, { known, checksAll: expected.checksAll === true }, malformed);
  }
  const other = file.tensors.keys().find((name) => !known.has(name));
  if (other !== undefined) throw malformed("every tensor must be a part of an input, got another", other);
  return { statistics, partsDone: parts_done === undefined ? undefined : Number(parts_done) };
}

/** @throws {CalibrationError} when a file is of another model or other groups, or unfinished */
function checkExpected(
  path: string,
  { fingerprint, parts_done, groups }: {
    readonly fingerprint: string;
    readonly parts_done: string | undefined;
    readonly groups: TimeGroups;
  },
  expected: StatisticsExpectation,
): void {
  const mismatched = (reason: string) =>
    new CalibrationError(`Cannot use ${JSON.stringify(path)}: ${reason}`, { path });
  if (fingerprint !== "" && fingerprint !== expected.fingerprint) {
    const [wanted, got] = [expected.fingerprint.slice(0, 12), fingerprint.slice(0, 12)];
    throw mismatched(
      `it must be of the model that is quantized (${wanted}…), got statistics of another one (${got}…)`,
    );
  }
  if (parts_done !== undefined && expected.allowUnfinished !== true) {
    throw mismatched(
      `it must be finished, got a calibration that was stopped after ${parts_done} parts of its data: repeat its command`,
    );
  }
  const wanted = expected.groups;
  if (wanted === undefined) return;
  if (wanted.axis.kind !== groups.axis.kind || wanted.boundaries.join() !== groups.boundaries.join()) {
    throw mismatched(
      `it must have the ${wanted.count} time groups of the configuration, got ${groups.count} others`,
    );
  }
}

/** Fills an input from the file. */
function readInput(
  file: SafetensorsFile,
  name: string,
  statistics: CalibrationStatistics,
  { known, checksAll }: { readonly known: Set<string>; readonly checksAll: boolean },
  malformed: Malformed,
): void {
  const { inputs, groups: { count: groups }, isLoaded } = statistics;
  const read = new Map<string, TimeValues>(), input = inputs.get(name)!;
  const hasRange = ["range", "histogram"].some((part) => file.tensors.has(`${name}.${part}`));
  const isRange = (tensor: string) => tensor.endsWith(".range") || tensor.endsWith(".histogram");
  const isMoments = (tensor: string) => /\.(?:group_)?second$/.test(tensor.slice(name.length));
  const specs = entriesOf(name, input, groups, statistics).map(({ spec }) => spec);
  for (const spec of specs.filter((spec) => !isMoments(spec.name))) {
    if (!hasRange && isRange(spec.name)) continue;
    known.add(spec.name);
    read.set(spec.name.slice(name.length + 1), readFinite(file, spec, malformed));
  }
  for (const [part, key] of PARTS) {
    const values = read.get(part);
    if (values !== undefined) input[key]!.set(values);
  }
  checkSums(name, input, malformed);
  for (const spec of specs.filter((spec) => isMoments(spec.name))) {
    const tensor = momentTensor(file, spec.name);
    known.add(tensor);
    if (isLoaded && !checksAll) continue;
    const moments = readMoments(file, spec, input, malformed);
    checkDiagonal(moments, tensor, input, malformed);
    if (isLoaded) {
      setAside(moments);
      continue;
    }
    statistics.takeMoments(name, spec.name === `${name}.second` ? "second" : "groupSecond", moments);
  }
  if (!hasRange) return;
  const { cols, tokens } = input;
  const range = read.get("range")!, counts = read.get("histogram") as Float64Array<ArrayBuffer>;
  for (const [g, histogram] of input.histograms.entries()) {
    try {
      const minimum = range[3 * g]!, maximum = range[3 * g + 1]!, reach = range[3 * g + 2]!;
      const own = counts.slice(g * HISTOGRAM_BINS, (g + 1) * HISTOGRAM_BINS);
      histogram.merge(ActivationHistogram.from({ minimum, maximum, reach, counts: own }));
    } catch (cause) {
      if (!(cause instanceof RangeError)) throw cause;
      throw malformed(cause.message, `${name}.histogram`, cause);
    }
    if (histogram.count !== tokens[g]! * cols) {
      throw malformed(
        `a histogram must have seen the ${tokens[g]! * cols} values of its group, got ${histogram.count}`,
        `${name}.histogram`,
      );
    }
  }
}
