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
 * model.weights            F32 [layers, 8]             some weights of each layer of `model`, may be left out
 * __metadata__: format, version, fingerprint (may be left out), model (JSON: name, and layers with rows and columns; may be left out where there is a fingerprint), axis, bins, second, inputs (JSON: layers by input, and the columns of a block of its moment where it is not whole), runs (JSON), and parts_done of an unfinished one
 * ```
 *
 * docs/statistics.md says it for those who write such files.
 */
import { CalibrationError } from "../errors.ts";
import { momentElements } from "../native/call_checks.ts";
import { giveBack } from "../quant/array_memory.ts";
import { diagonalOf, MAX_MOMENT_COLS, momentBlocks } from "../quant/solvers/moments.ts";
import { MAX_TENSORS, SafetensorsFile, type TensorSpec } from "../tensor/mod.ts";
import { ActivationHistogram, HISTOGRAM_BINS } from "./activation_range.ts";
import {
  type CalibrationRun,
  CalibrationStatistics,
  hasHistograms,
  type InputStatistics,
  type LayerInput,
  type LoadMoments,
  MAX_CALIBRATION_RUNS,
  MODEL_SAMPLES,
  type Moments,
  SECOND_MOMENTS,
  type SecondMoments,
  statisticsBytes,
  type StatisticsModel,
} from "./calibration.ts";
import type { TimeGroups } from "./groups.ts";
import {
  BOUNDARIES,
  checkFormat,
  type Malformed,
  malformedIn,
  readGroups,
  readValues,
  type TensorEntry,
  type TimeDtype,
  type TimeValues,
  writeTimeFile,
} from "./time_file.ts";

/** `format` and `version` in the file's metadata. */
const FORMAT = "arrowquant calibration statistics";
const VERSION = "2";
/** Parts of an input, `histograms` apart, by what they are called in the file. */
const PARTS = [
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

/** Tensor of some weights of each layer of the model. */
const MODEL_WEIGHTS = "model.weights";
/** Second moments of larger statistics are read when they are asked for, not kept. */
const KEPT_BYTES = 2 ** 28;
/** Largest file: moments of all time groups of a model of 70 B weights. */
const MAX_FILE_BYTES = 2 ** 42;

/** Most that rounding takes from a sum of squares, as a part of it: 2⁻⁵³ for each of 2³³ samples. */
const MAX_LOW_SHARE = 2 ** -20;

/** Most by which sums of the same products differ, as a part: TF32 and bfloat16 are that rough. */
const SUM_TOLERANCE = 1 / 16;
/** Most that an input counts: masked positions count 1. */
const MOST_WEIGHT = 2 ** 32;
/** Below the smallest normal float32 sums are lost. */
const TINY = 2 ** -120;

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
function entriesOf(
  name: string,
  input: InputStatistics,
  groups: number,
  kind: Kind & Partial<Pick<CalibrationStatistics, "momentsOf">>,
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
    entries.push({
      spec: { name: MODEL_WEIGHTS, dtype: "F32", shape: [layers.length, MODEL_SAMPLES] },
      values: () => Float32Array.from(layers.flatMap(([name]) => [...samples.get(name)!])),
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

/** Ending of a tensor in place of a second moment. */
const CORRELATIONS = ".correlations";

/** The tensor that a file has for a second moment: of that name, or correlations in its place. */
function momentTensor({ tensors }: SafetensorsFile, second: string): string {
  const other = second.replace(/\.second$/, CORRELATIONS);
  return tensors.has(second) || !tensors.has(other) ? second : other;
}

/** Numbers below the diagonals of blocks. */
function belowDiagonal(cols: number, block: number): number {
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
function readMoments(
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

function readFinite(
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

function parseList(text: string | undefined, what: string, malformed: Malformed): unknown[] {
  let value: unknown;
  try {
    value = JSON.parse(text ?? "");
  } catch (cause) {
    throw malformed(`${what} must be a list in JSON`, undefined, cause);
  }
  if (!Array.isArray(value)) throw malformed(`${what} must be a list in JSON, got something else`);
  return value;
}

function parseInputs(
  text: string | undefined,
  file: SafetensorsFile,
  malformed: Malformed,
): Map<string, LayerInput> {
  const inputs = new Map<string, LayerInput>();
  let count = 0;
  for (const entry of parseList(text, "inputs", malformed)) {
    const [name, layers, block] = Array.isArray(entry) ? entry as unknown[] : [];
    if (
      typeof name !== "string" || inputs.has(name) || !Array.isArray(layers) || layers.length === 0 ||
      !layers.every((layer) => typeof layer === "string") || (count += layers.length) > MAX_TENSORS
    ) {
      throw malformed("inputs must be new names, each with names of layers");
    }
    const cols = file.tensors.get(`${name}.sum`)?.shape[1];
    if (cols === undefined || cols < 1 || cols > MAX_MOMENT_COLS) {
      const got = cols === undefined ? "none of this layer" : cols;
      throw malformed(`it must hold sums of 1 to ${MAX_MOMENT_COLS} columns, got ${got}`, `${name}.sum`);
    }
    const isBlock = typeof block === "number" && Number.isSafeInteger(block) && block >= 1 && block < cols;
    if (block !== undefined && !isBlock) {
      throw malformed(
        `blocks of a moment must be of 1 to ${cols - 1} columns, got ${String(block)}`,
        `${name}.second`,
      );
    }
    inputs.set(name, isBlock ? { cols, block, layers } : { cols, layers });
  }
  if (inputs.size === 0) throw malformed("inputs must be at least one, got none");
  return inputs;
}

/** What a file says of its model. */
function readModel(file: SafetensorsFile, malformed: Malformed): StatisticsModel | undefined {
  const text = file.metadata["model"];
  if (text === undefined) return undefined;
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw malformed("model must be an object in JSON", undefined, cause);
  }
  const { name, layers } = (value ?? {}) as Record<string, unknown>;
  if (typeof name !== "string" || !Array.isArray(layers) || layers.length > MAX_TENSORS) {
    throw malformed(`model must have a name and at most ${MAX_TENSORS} layers`);
  }
  const shapes = new Map<string, readonly [number, number]>();
  for (const entry of layers) {
    const [layer, ...shape] = Array.isArray(entry) ? entry as unknown[] : [];
    const isShape = shape.length === 2 &&
      shape.every((size) => Number.isSafeInteger(size) && Number(size) >= 1);
    if (typeof layer !== "string" || shapes.has(layer) || !isShape) {
      throw malformed("layers of a model must be new names, each with rows and columns");
    }
    shapes.set(layer, shape as [number, number]);
  }
  if (!file.tensors.has(MODEL_WEIGHTS)) return { name, layers: shapes };
  const spec = { name: MODEL_WEIGHTS, dtype: "F32", shape: [shapes.size, MODEL_SAMPLES] } as const;
  const weights = readFinite(file, spec, malformed) as Float32Array;
  const samples = new Map(
    [...shapes.keys()].map((layer, i) => [layer, weights.slice(i * MODEL_SAMPLES, (i + 1) * MODEL_SAMPLES)]),
  );
  return { name, layers: shapes, samples };
}

function parseRuns(text: string | undefined, malformed: Malformed): CalibrationRun[] {
  const runs = parseList(text, "runs", malformed);
  if (runs.length === 0 || runs.length > MAX_CALIBRATION_RUNS) {
    throw malformed(`runs must be 1 to ${MAX_CALIBRATION_RUNS}, got ${runs.length}`);
  }
  return runs.map((run): CalibrationRun => {
    const { identity, source, isSynthetic, samples, shard } = (run ?? {}) as Record<string, unknown>;
    if (
      typeof identity !== "string" || typeof source !== "string" || typeof isSynthetic !== "boolean" ||
      typeof samples !== "number" || !Number.isSafeInteger(samples) || samples < 1
    ) {
      throw malformed("each run must have an identity, a source, isSynthetic and samples");
    }
    const own = { identity, source, isSynthetic, samples };
    return shard === undefined ? own : { ...own, shard: parseRunShard(shard, malformed) };
  });
}

function parseRunShard(value: unknown, malformed: Malformed): NonNullable<CalibrationRun["shard"]> {
  const { index, count, of } = (value ?? {}) as Record<string, unknown>;
  const isWhole = (number: unknown): number is number => Number.isSafeInteger(number) && Number(number) >= 1;
  if (
    isWhole(index) && isWhole(count) && index <= count && count <= MAX_CALIBRATION_RUNS &&
    typeof of === "string"
  ) {
    return { index, count, of };
  }
  throw malformed(
    `a run's shard must have an index, a count of at most ${MAX_CALIBRATION_RUNS} and the run that it is of`,
  );
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
      giveBack(moments);
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

/** @throws {FormatError} by `malformed`, when counts, weights and sums of an input are none, or do not fit */
function checkSums(name: string, input: InputStatistics, malformed: Malformed): void {
  const { cols, weight, tokens, samples, sum, squares, squaresLow } = input;
  for (const [part, counts] of [["tokens", tokens], ["samples", samples]] as const) {
    const bad = counts.find((count) => !Number.isSafeInteger(count) || count < 0);
    if (bad !== undefined) throw malformed(`counts must be whole numbers ≥ 0, got ${bad}`, `${name}.${part}`);
  }
  const badWeight = weight.findIndex((value, g) => value < 0 || value > MOST_WEIGHT * tokens[g]!);
  if (badWeight >= 0) {
    throw malformed(
      `weights must be ≥ 0, at most ${MOST_WEIGHT} an input, got ${weight[badWeight]} of ${
        tokens[badWeight]
      }`,
      `${name}.weight`,
    );
  }
  const badSquare = squares.findIndex((value) => value < 0);
  if (badSquare >= 0) {
    throw malformed(`sums of squares must be ≥ 0, got ${squares[badSquare]}`, `${name}.squares`);
  }
  const badSum = sum.findIndex((value, i) =>
    value ** 2 > (1 + SUM_TOLERANCE) ** 2 * weight[Math.floor(i / cols)]! * squares[i]! + TINY
  );
  if (badSum >= 0) {
    const most = Math.sqrt(weight[Math.floor(badSum / cols)]! * squares[badSum]!);
    throw malformed(
      `sums must be at most √(weight · squares), ${most} in column ${badSum % cols}, got ${sum[badSum]}`,
      `${name}.sum`,
    );
  }
  const badLow = squaresLow.findIndex((low, i) => Math.abs(low) > MAX_LOW_SHARE * squares[i]!);
  if (badLow >= 0) {
    throw malformed(
      `rounding must have taken at most ${MAX_LOW_SHARE} of a sum of squares, got ${squaresLow[badLow]} of ${
        squares[badLow]
      }`,
      `${name}.squares_low`,
    );
  }
}

/** @throws {FormatError} by `malformed`, unless a moment has the sums of squares on its diagonal */
function checkDiagonal(
  moments: Moments,
  name: string,
  { cols, block = cols, squares }: InputStatistics,
  malformed: Malformed,
): void {
  const groups = squares.length / cols,
    isByGroup = name.endsWith(".group_second"),
    total = new Float64Array(cols);
  for (const [i, value] of squares.entries()) total[i % cols]! += value;
  for (let g = 0; g < (isByGroup ? groups : 1); g++) {
    const own = isByGroup ? squares.subarray(g * cols, (g + 1) * cols) : total;
    const diagonal = diagonalOf(
      isByGroup ? moments.subarray(g * cols * cols, (g + 1) * cols * cols) : moments,
      cols,
      isByGroup ? cols : block,
    );
    const bad = diagonal.findIndex((value, k) =>
      Math.abs(value - own[k]!) > SUM_TOLERANCE * Math.max(value, own[k]!) + TINY
    );
    if (bad < 0) continue;
    throw malformed(
      `the diagonal must have the sums of squares, ${own[bad]} in column ${bad}, got ${diagonal[bad]}`,
      name,
    );
  }
}

/** Sums of squares are not negative, sums of products symmetric and at most what squares allow. */
function checkMoment(second: Moments, cols: number, tensor: string, malformed: Malformed): void {
  const most = new Float64Array(cols);
  for (let i = 0; i < cols; i++) {
    if (second[i * cols + i]! < 0) {
      throw malformed(`sums of squares must be ≥ 0, got ${second[i * cols + i]}`, tensor);
    }
    most[i] = (1 + SUM_TOLERANCE) * Math.sqrt(second[i * cols + i]! + TINY);
  }
  for (let first = 0; first < cols; first += TILE) {
    for (let left = 0; left <= first; left += TILE) checkTile(second, most, first, left, tensor, malformed);
  }
}

/** Rows and columns that are compared with their mirror image at once: both lie in the cache. */
const TILE = 32;

/**
 * @param most by column, the root of what its sum of squares may be
 * @throws {FormatError} by `malformed`, unless a tile of a moment is its mirror image's transpose
 */
function checkTile(
  second: Moments,
  most: Float64Array,
  first: number,
  left: number,
  tensor: string,
  malformed: Malformed,
): void {
  const cols = most.length, end = Math.min(cols, first + TILE), right = Math.min(cols, left + TILE);
  for (let i = first; i < end; i++) {
    for (let j = left; j < Math.min(right, i); j++) {
      const value = second[i * cols + j]!;
      if (value !== second[j * cols + i]) {
        throw malformed(`a moment must be symmetric, got another one at [${i}, ${j}]`, tensor);
      }
      if (Math.abs(value) <= most[i]! * most[j]!) continue;
      const squares = `${second[i * (cols + 1)]} and ${second[j * (cols + 1)]}`;
      throw malformed(
        `sums of products must fit those of squares, got ${value} at [${i}, ${j}] of ${squares}`,
        tensor,
      );
    }
  }
}
