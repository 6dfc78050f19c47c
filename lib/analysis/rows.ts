/** Rows of the tables from measurements: from the report of the pipeline and from the suites of the bench. */
import { Buffer } from "node:buffer";
import type { StepDrift, TimestepError } from "../eval/images.ts";
import type { MaskedComparison } from "../eval/masked.ts";
import type { Interval } from "../eval/intervals.ts";
import type { TaskScore } from "../eval/puzzles.ts";
import type { AccuracyRow, CheckpointRow, KernelRow, PeersRow, PhaseRow, SuiteRow } from "../bench/rows.ts";
import type { Sample, SuiteReport, TimedSetting } from "../bench/suite.ts";
import type { LayerRecord } from "../pipeline/mod.ts";
import type { LossHistory } from "../thermo/mod.ts";
import { cosine, relativeRmsError } from "../quant/mod.ts";
import type { TimeGroups, TimeParameters } from "../time/mod.ts";
import type { RowOf, TableName } from "./schema.ts";
import { isTableName } from "./table_files.ts";
import { type ColumnTable, tableFromRows } from "./tables.ts";

/** Tables of a run, without empty ones. */
export type Tables = { readonly [Name in TableName]?: ColumnTable };

/** Kinds of tensors by name; the first that matches. */
const KINDS: readonly (readonly [kind: string, pattern: RegExp])[] = [
  ["modulation", /(?:timestep|time)_?embed|t_embedder|adaLN|(?:norm1|norm_out)\.linear|proj_out_1/i],
  ["embedding", /embed|wte|wpe/i],
  ["attention", /attn|attention|\.att_|[qkv]_proj|to_[qkvo](?:ut)?\b|qkv/i],
  ["feed-forward", /mlp|ffn|feed_?forward|\.ff[._]|ff_proj|up_proj|down_proj|gate_proj|\.fc\d/i],
  ["norm", /norm|\bln_/i],
  ["head", /lm_head|proj_out|score|classifier|^head|output/i],
];

/**
 * The kind of a tensor, read off its name.
 *
 * @example
 * ```ts
 * import { layerKind } from "./rows.ts";
 * console.log(layerKind("model.layers.0.self_attn.q_proj.weight")); // attention
 * ```
 */
export function layerKind(name: string): string {
  return KINDS.find(([, pattern]) => pattern.test(name))?.[0] ?? "other";
}

/** One row a tensor of what the pipeline did. @param milliseconds its report's `layerMilliseconds` */
export function layerRowsOf(
  layers: readonly LayerRecord[],
  milliseconds: readonly (number | null)[],
  { model, setting }: { readonly model: string; readonly setting: string },
): RowOf<"layers">[] {
  return layers.map((layer, i): RowOf<"layers"> => {
    const { name, reason, bits = null, groupSize = null, bytesBefore, bytesAfter, statistics } = layer;
    const weights = layer.shape.reduce((product, size) => product * size, 1);
    const quantized = layer.tried === undefined ? "quantized" : "fallback";
    return {
      ...{ model, setting, name, reason, bits, groupSize, weights, bytesBefore, bytesAfter },
      kind: layerKind(name),
      action: layer.action === "keep" ? "kept" : quantized,
      bitsPerWeight: weights === 0 ? null : bytesAfter * 8 / weights,
      outputError: layer.solved?.relativeError ?? null,
      relativeRmsError: statistics === undefined ? null : relativeRmsError(statistics),
      cosine: statistics === undefined ? null : cosine(statistics),
      maxError: statistics?.maxError ?? null,
      milliseconds: milliseconds[i] ?? null,
    };
  });
}

/** A value and the ends of its interval as the tables' columns have them. */
type Intervalled<Name extends string> = { readonly [Key in Name | `${Name}Low` | `${Name}High`]: number };

const spread = <Name extends string>(name: Name, { value, low, high }: Interval): Intervalled<Name> =>
  ({ [name]: value, [`${name}Low`]: low, [`${name}High`]: high }) as Intervalled<Name>;

type Rows = { readonly [Name in TableName]?: readonly RowOf<Name>[] };

/** The model and setting of rows. */
export interface RowSource {
  readonly model: string;
  readonly setting: string;
}

/** KL along the mask ratio as rows of the time axis, without empty bins and the last one, of all ratios. */
export function maskRatioRows(
  bins: readonly Pick<MaskedComparison, "low" | "high" | "sequences" | "kl">[],
  source: RowSource,
): RowOf<"time">[] {
  return bins.slice(0, -1).filter(({ sequences }) => sequences > 0).map(({ low, high, sequences, kl }) => ({
    ...source,
    tUnit: "mask ratio",
    tBegin: low,
    tEnd: high,
    samples: sequences,
    ...spread("kl", kl),
  }));
}

/** Errors of a predicted noise along the timesteps as rows of the time axis. */
export function timestepRows(
  errors: readonly (Omit<TimestepError, "images" | "perImage"> & { readonly images?: number })[],
  source: RowSource,
): RowOf<"time">[] {
  return errors.map(({ timestep, images, relativeError }) => ({
    ...source,
    tUnit: "timestep",
    tBegin: timestep,
    tEnd: timestep + 1,
    samples: images ?? null,
    ...spread("relativeError", relativeError),
  }));
}

/** Activation ranges along the time axis: stretch i is `[boundaries[i], boundaries[i + 1])`. */
export interface ActivationSeries {
  readonly boundaries: ArrayLike<number>;
  /** One a stretch. */
  readonly scale: ArrayLike<number>;
  /** One a stretch, in codes. */
  readonly zeroPoint: ArrayLike<number>;
  /** Of the codes. */
  readonly bits: number;
}

/**
 * A layer's time parameters as rows of the time axis; neighbours that are equal become one.
 *
 * @throws {TypeError} when there is not one scale and zero point for each stretch
 *
 * @example
 * ```ts
 * import { activationRows } from "./rows.ts";
 * const series = { boundaries: [0, 10, 20], scale: [0.5, 1], zeroPoint: [1, 1], bits: 2 };
 * const source = { model: "m", setting: "s", layer: "l", tUnit: "timestep", stage: "before" } as const;
 * console.log(activationRows(series, source)[1]?.activationHigh); // 2
 * ```
 */
export function activationRows(
  { boundaries, scale, zeroPoint, bits }: ActivationSeries,
  source: RowSource & {
    readonly layer: string;
    readonly tUnit: "timestep" | "mask ratio";
    readonly stage: "before" | "after";
  },
): RowOf<"time">[] {
  const count = boundaries.length - 1;
  if (scale.length !== count || zeroPoint.length !== count) {
    throw new TypeError(
      `Cannot make rows of time parameters: each of ${count} stretches must have a scale and a zero point, got ` +
        `${scale.length} and ${zeroPoint.length}`,
    );
  }
  const begins = Array.from(scale, (_, i) => i).filter((i) =>
    i === 0 || scale[i] !== scale[i - 1] || zeroPoint[i] !== zeroPoint[i - 1]
  );
  return begins.map((i, k) => {
    const s = scale[i]!, z = zeroPoint[i]!;
    return {
      ...source,
      tBegin: boundaries[i]!,
      tEnd: boundaries[begins[k + 1] ?? count]!,
      scale: s,
      zeroPoint: z,
      activationLow: -s * z,
      activationHigh: s * (2 ** bits - 1 - z),
    };
  });
}

/** Bins of an axis as the tables have them, as timesteps or as mask ratios, and columns of a group. */
function timesOf({ axis: { kind, bins }, boundaries }: TimeGroups) {
  const tUnit = kind === "timesteps" ? "timestep" : "mask ratio" as const;
  const at = (bin: number) => kind === "timesteps" ? bin : bin / bins;
  const place = (timeGroup: number) => ({
    tUnit,
    timeGroup,
    tBegin: at(boundaries[timeGroup]!),
    tEnd: at(boundaries[timeGroup + 1]!),
  });
  return { tUnit, at, place } as const;
}

/**
 * A model's θ as rows of the time axis: activation ranges, and by group the mean gain and root mean square
 * bias of output corrections.
 *
 * @param stage before or after boundary smoothing; default by the parameters: those with one range a bin are
 * smoothed
 */
export function thetaRows(
  { groups, layers }: TimeParameters,
  source: RowSource & { readonly stage?: "before" | "after" | undefined },
): RowOf<"time">[] {
  const { tUnit, at, place } = timesOf(groups), { bins } = groups.axis, { model, setting } = source;
  return [...layers].flatMap(([layer, { activation, output }]): RowOf<"time">[] => {
    const isByBin = activation !== undefined && activation.scale.length === bins && bins !== groups.count;
    const stage = source.stage ?? (isByBin ? "after" : "before");
    const grids = activation === undefined ? [] : activationRows({
      ...activation,
      boundaries: isByBin
        ? Array.from({ length: bins + 1 }, (_, bin) => at(bin))
        : Array.from(groups.boundaries, at),
    }, { ...source, layer, tUnit, stage });
    const size = output === undefined ? 0 : output.gain.length / groups.count;
    const corrections = output === undefined ? [] : Array.from({ length: groups.count }, (_, g) => {
      const own = (values: Float32Array) => values.subarray(g * size, (g + 1) * size);
      return {
        ...{ model, setting, layer, ...place(g) },
        gain: own(output.gain).reduce((sum, gain) => sum + gain, 0) / size,
        bias: Math.sqrt(own(output.bias).reduce((sum, bias) => sum + bias * bias, 0) / size),
      };
    });
    return [...grids, ...corrections];
  });
}

/** Measurements along the time axis of a model as rows of it. */
export function timedRows({ model, setting, groups, theta, stepKl = [], layerErrors = [] }: TimedSetting) {
  const source = { model, setting }, times = timesOf(groups);
  const place = (timeGroup: number) => ({ ...source, ...times.place(timeGroup) });
  return [
    ...(theta === undefined ? [] : thetaRows(theta.parameters, { ...source, stage: theta.stage })),
    ...stepKl.flatMap((value, g) => Number.isNaN(value) ? [] : [{ ...place(g), stepKl: value }]),
    ...layerErrors.map(({ layer, timeGroup, samples, relativeError }) => ({
      ...place(timeGroup),
      layer,
      samples,
      relativeError,
    })),
  ];
}

/** An optimizer's losses as rows of their table, the loss before the first step first. */
export function lossRows(
  { quantization, markov, entropy, total }: LossHistory,
  source: RowSource & { readonly layer?: string | undefined },
): RowOf<"losses">[] {
  return total.map((total, iteration) => ({
    ...source,
    iteration,
    total,
    quantization: quantization[iteration]!,
    markov: markov[iteration]!,
    entropy: entropy[iteration]!,
  }));
}

/** Drift by step as rows of its table. */
export function driftRows(steps: readonly StepDrift[], source: RowSource): RowOf<"drift">[] {
  return steps.map(({ step, relativeDistance }) => ({
    ...source,
    step,
    ...spread("relativeDistance", relativeDistance),
  }));
}

/** A row a task; the columns of `whole` are of the task named `together`. */
const taskRows = <Common extends object, Whole extends object>(
  tasks: readonly Omit<TaskScore, "solved">[],
  common: Common,
  whole: Whole,
  together = "all",
): (Common & Partial<Whole> & Intervalled<"accuracy"> & { task: string; samples: number })[] =>
  tasks.map(({ task, prompts, exactMatch }) => ({
    ...{ ...common, task, samples: prompts, ...spread("accuracy", exactMatch) },
    ...(task === together ? whole : {} as Partial<Whole>),
  }));

/** Columns of a quantized model in the table of peers. */
const ownMethod = (row: AccuracyRow | CheckpointRow, method: string) => ({
  model: row.model,
  method,
  library: "arrowquant",
  bits: row.bits,
  bitsPerWeight: row.bitsPerWeight,
  relativeRmsError: row.relativeRmsError,
});

function accuracyRows(row: AccuracyRow): Rows {
  const { model, setting } = row, source = { model, setting }, isFull = setting === "full";
  const method = { ...ownMethod(row, setting), seconds: row.quantizeSeconds };
  if ("byMaskRatio" in row) {
    const all = row.byMaskRatio.at(-1)!, kl = isFull ? {} : spread("kl", all.kl);
    return {
      peers: "exactMatch" in row
        ? taskRows(row.exactMatch, method, kl)
        : [{ ...method, samples: all.sequences, ...kl }],
      time: isFull ? [] : maskRatioRows(row.byMaskRatio, source),
    };
  }
  const common = {
    ...method,
    samples: row.images,
    ...(isFull ? {} : spread("relativeError", row.noiseError)),
  };
  const drawn = "classAccuracy" in row && {
    task: "recognized",
    ...spread("accuracy", row.classAccuracy),
    frechetDistance: row.frechetDistance.value,
  };
  return {
    peers: [{ ...common, ...drawn }],
    time: isFull ? [] : timestepRows(row.byTimestep, source),
    drift: isFull ? [] : driftRows(row.drift, source),
  };
}

function kernelRow({ suite: _, runtime: __, processor: ___, ...row }: KernelRow): RowOf<"kernels"> {
  const { weightsPerSecond, bytesPerSecond, bytesAgainstMemcpy, shape: [rows, cols] = [] } = row;
  const { group, kernel, library, backend, isa, dtype, place, threads, samples } = row;
  return {
    ...{ group, kernel, library, backend, isa, dtype, place, threads, samples, rows, cols },
    weightsPerSecond: weightsPerSecond?.median,
    weightsPerSecondDeviation: weightsPerSecond?.medianDeviation,
    bytesPerSecond: bytesPerSecond?.median,
    bytesPerSecondDeviation: bytesPerSecond?.medianDeviation,
    timesMemcpy: bytesAgainstMemcpy?.median,
    bitsPerWeight: row.bitsPerWeight,
    relativeRmsError: row.relativeRmsError,
  };
}

/** A row of a sample, its picture as a URL. */
function sampleRow({ png, ...sample }: Sample): RowOf<"samples"> {
  if (png === undefined) return sample;
  return { ...sample, image: `data:image/png;base64,${Buffer.from(png).toString("base64")}` };
}

const LIBRARIES = { "ours": "arrowquant", "peer library": "ggml", "re-implementation": "re-implementation" };

function peersRows(row: PeersRow): Rows {
  const { model, bits, bitsPerWeight, relativeRmsError, exactMatch: tasks } = row;
  const isFull = bitsPerWeight === null, method = isFull ? "full" : row.method;
  const common = {
    ...{ model, method, bits, bitsPerWeight, relativeRmsError },
    library: LIBRARIES[row.kind ?? "ours"],
    seconds: row.quantizeSeconds,
  };
  const distance = isFull ? {} : spread(row.family === "dit" ? "relativeError" : "kl", row.distance);
  return {
    peers: tasks.length === 0
      ? [{ ...common, ...distance }]
      : taskRows(tasks, common, distance, tasks.length === 1 ? tasks[0]!.task : "all"),
    time: isFull ? [] : timestepRows(row.byTimestep ?? [], { model, setting: method }),
  };
}

/** Rows of one suite come in their order: full precision stands before the rows of the same bits. */
function phaseRows(row: PhaseRow, all: readonly PhaseRow[]): Rows {
  const { model, bits, bitsPerWeight, stepKl, accuracy: tasks, differenceToBaseline: difference } = row;
  const at = all.indexOf(row), isFull = bits === null;
  const quantized = isFull ? all.slice(at).find((other) => other.bits !== null) : row;
  const source = { model, setting: `${quantized?.bits} bits` }, phase = isFull ? "full" : row.phase;
  const { smoothing, refinement, validation } = row.metrics ?? {};
  // A row without tasks stands beside those that have some.
  const [only, ...more] = all.find((other) => other.model === model && other.accuracy.length > 0)?.accuracy ??
    [];
  const together = only === undefined || more.length > 0 ? "all" : only.task;
  const common = { ...source, phase, bits, bitsPerWeight };
  const whole = {
    ...(isFull ? {} : spread("stepKl", stepKl)),
    ...(difference === null || phase === "baseline" ? {} : spread("delta", difference)),
    markovScore: validation?.markovScore,
    seconds: row.seconds,
    overhead: row.overhead,
    iterations: refinement?.iterations,
    converged: refinement?.converged,
    layersKept: smoothing?.kept.length,
    layersRejected: smoothing?.rejected.length,
  };
  const hasLosses = refinement !== undefined && refinement.losses.total.length > 1;
  return {
    phases: tasks.length === 0
      ? [{ ...common, task: together, ...whole }]
      : taskRows(tasks, common, whole, together),
    losses: hasLosses
      ? lossRows(refinement.losses, { ...source, setting: `${source.setting}, ${phase}` })
      : [],
  };
}

/** Times at a large model's sizes and drawings of a sampler have no step KL. */
const isPhase = (row: SuiteRow): row is PhaseRow => row.suite === "phases" && "stepKl" in row;

/** Rows of tables from a row of a suite; `all` are those of the run. */
function tableRows(row: SuiteRow, all: readonly SuiteRow[]): Rows {
  switch (row.suite) {
    case "accuracy":
      return accuracyRows(row);
    case "checkpoint":
      return { peers: [{ ...ownMethod(row, `${row.bits} ${row.solver}`), seconds: row.seconds.median }] };
    case "kernels":
      return { kernels: [kernelRow(row)] };
    case "peers":
      return peersRows(row);
    case "phases":
      return isPhase(row) ? phaseRows(row, all.filter(isPhase)) : {};
    case "codes":
    case "process":
    case "solver-speed":
    case "steps":
      return {};
  }
}

/**
 * The tables of a bench run: from the rows of its suite, and those that a suite gives itself.
 *
 * @throws {TypeError} when rows do not fit their table
 */
export async function benchTables(
  report: Pick<SuiteReport<SuiteRow>, "rows" | "tables" | "quantized" | "samples" | "timed">,
): Promise<Tables> {
  const { rows, tables = {}, quantized = [], samples = [], timed = [] } = report;
  const collected = new Map<TableName, object[]>();
  const add = (name: string, more: readonly object[]) => {
    if (!isTableName(name)) {
      throw new TypeError(`Cannot make tables of a run: there is no table ${JSON.stringify(name)}`);
    }
    collected.set(name, [...collected.get(name) ?? [], ...more]);
  };
  for (const row of rows) {
    for (const [name, more] of Object.entries(tableRows(row, rows))) add(name, more);
  }
  for (const each of quantized) add("layers", layerRowsOf(each.layers, each.layerMilliseconds, each));
  for (const each of timed) add("time", timedRows(each));
  add("samples", samples.map(sampleRow));
  for (const [name, more] of Object.entries(tables)) add(name, more);
  return await tablesOf(Object.fromEntries(collected) as Rows);
}

/** Tables of plain rows; without those that have none. */
export async function tablesOf(rows: Rows): Promise<Tables> {
  const made: { [Name in TableName]?: ColumnTable } = {};
  for (const name of Object.keys(rows) as TableName[]) {
    const own = rows[name];
    if (own !== undefined && own.length > 0) made[name] = await tableFromRows(name, own);
  }
  return made;
}
