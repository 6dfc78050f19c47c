/** What runs measured as rows of the tables: from the pipeline's report and from the suites of the bench. */
import { Buffer } from "node:buffer";
import type { StepDrift, TimestepError } from "../eval/images.ts";
import type { MaskedComparison } from "../eval/masked.ts";
import type { TaskScore } from "../eval/puzzles.ts";
import type { Interval } from "../eval/intervals.ts";
import type { Sample, SuiteReport, TimedSetting } from "../bench/suite.ts";
import type { LayerRecord } from "../pipeline/mod.ts";
import type { PhasesReport } from "../phases/mod.ts";
import type { LossHistory } from "../thermo/mod.ts";
import { cosine, relativeRmsError } from "../quant/mod.ts";
import type { TimeGroups, TimeParameters } from "../time/mod.ts";
import type { RowOf, TableName } from "./schema.ts";
import { isTableName } from "./table_files.ts";
import { type ColumnTable, tableFromRows } from "./tables.ts";

/** Tables of a run; those that it has nothing for are absent. */
export type Tables = { readonly [Name in TableName]?: ColumnTable };

/** What a tensor is for, by its name; the first that matches. */
const KINDS: readonly (readonly [kind: string, pattern: RegExp])[] = [
  ["modulation", /(?:timestep|time)_?embed|t_embedder|adaLN|(?:norm1|norm_out)\.linear|proj_out_1/i],
  ["embedding", /embed|wte|wpe/i],
  ["attention", /attn|attention|\.att_|[qkv]_proj|to_[qkvo](?:ut)?\b|qkv/i],
  ["feed-forward", /mlp|ffn|feed_?forward|\.ff[._]|ff_proj|up_proj|down_proj|gate_proj|\.fc\d/i],
  ["norm", /norm|\bln_/i],
  ["head", /lm_head|proj_out|score|classifier|^head|output/i],
];

/**
 * What a tensor is for, read off its name.
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

/**
 * One row a tensor of what the pipeline did.
 *
 * @param milliseconds as `layerMilliseconds` of the pipeline's report
 */
export function layerRowsOf(
  layers: readonly LayerRecord[],
  milliseconds: readonly (number | null)[],
  { model, setting }: { readonly model: string; readonly setting: string },
): RowOf<"layers">[] {
  return layers.map((layer, i): RowOf<"layers"> => {
    const { name, action, reason, bits, groupSize, shape, bytesBefore, bytesAfter, statistics, tried } =
      layer;
    const weights = shape.reduce((product, size) => product * size, 1);
    return {
      model,
      setting,
      name,
      kind: layerKind(name),
      action: action === "keep" ? "kept" : tried === undefined ? "quantized" : "fallback",
      reason,
      bits: bits ?? null,
      groupSize: groupSize ?? null,
      weights,
      bitsPerWeight: weights === 0 ? null : bytesAfter * 8 / weights,
      relativeRmsError: statistics === undefined ? null : relativeRmsError(statistics),
      cosine: statistics === undefined ? null : cosine(statistics),
      maxError: statistics?.maxError ?? null,
      bytesBefore,
      bytesAfter,
      milliseconds: milliseconds[i] ?? null,
    };
  });
}

interface Summary {
  readonly median: number;
  readonly medianDeviation: number;
}

type Row = Readonly<Record<string, unknown>>;

/** A value and the ends of its interval as the tables' columns have them. */
type Intervalled<Name extends string> = { readonly [Key in Name | `${Name}Low` | `${Name}High`]: number };

const spread = <Name extends string>(name: Name, interval: Interval): Intervalled<Name> =>
  ({ [name]: interval.value, [`${name}Low`]: interval.low, [`${name}High`]: interval.high }) as Intervalled<
    Name
  >;

type Rows = { [Name in TableName]?: Row[] };

const methodOf = (row: Row) => ({
  model: row["model"],
  method: row["setting"] ?? `${row["bits"]} ${row["solver"]}`,
  library: "arrowquant",
  bits: row["bits"],
  bitsPerWeight: row["bitsPerWeight"] ?? null,
  relativeRmsError: row["relativeRmsError"] ?? null,
});

/** Whose measurements rows hold. */
export interface RowSource {
  readonly model: string;
  readonly setting: string;
}

/** KL along the mask ratio as rows of the time axis; the comparison over all ratios, the last, and empty bins are left out. */
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

/** Activation grids along the time axis: stretch i is `[boundaries[i], boundaries[i + 1])`, as time groups or single bins. */
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
  const rows: RowOf<"time">[] = [];
  const begins: number[] = [];
  for (let i = 0; i < count; i++) {
    const same = i > 0 && scale[i] === scale[i - 1] && zeroPoint[i] === zeroPoint[i - 1];
    if (!same) begins.push(i);
  }
  begins.forEach((i, k) => {
    const s = scale[i]!, z = zeroPoint[i]!;
    rows.push({
      ...source,
      tBegin: boundaries[i]!,
      tEnd: boundaries[begins[k + 1] ?? count]!,
      scale: s,
      zeroPoint: z,
      activationLow: -s * z,
      activationHigh: s * (2 ** bits - 1 - z),
    });
  });
  return rows;
}

/** How a table's columns say a bin of an axis: as timestep, or as mask ratio. */
function timesOf({ axis: { kind, bins } }: TimeGroups): {
  readonly tUnit: "timestep" | "mask ratio";
  at(bin: number): number;
} {
  return kind === "timesteps"
    ? { tUnit: "timestep", at: (bin) => bin }
    : { tUnit: "mask ratio", at: (bin) => bin / bins };
}

/**
 * A model's θ as rows of the time axis: activation grids, and by group the mean gain and root mean square bias of output corrections.
 *
 * @param stage before or after boundary smoothing; by default what the parameters show: a grid a bin is smoothed
 */
export function thetaRows(
  { groups, layers }: TimeParameters,
  source: RowSource & { readonly stage?: "before" | "after" | undefined },
): RowOf<"time">[] {
  const { tUnit, at } = timesOf(groups);
  const { bins } = groups.axis;
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
        model: source.model,
        setting: source.setting,
        layer,
        tUnit,
        timeGroup: g,
        tBegin: at(groups.boundaries[g]!),
        tEnd: at(groups.boundaries[g + 1]!),
        gain: own(output.gain).reduce((sum, gain) => sum + gain, 0) / size,
        bias: Math.sqrt(own(output.bias).reduce((sum, bias) => sum + bias * bias, 0) / size),
      };
    });
    return [...grids, ...corrections];
  });
}

/** What was measured along a model's time axis as rows of it. */
function timedRows({ model, setting, groups, theta, stepKl = [], layerErrors = [] }: TimedSetting) {
  const { tUnit, at } = timesOf(groups);
  const source = { model, setting };
  const place = (timeGroup: number) => ({
    ...source,
    tUnit,
    timeGroup,
    tBegin: at(groups.boundaries[timeGroup]!),
    tEnd: at(groups.boundaries[timeGroup + 1]!),
  });
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

function accuracyRows(row: Row): Rows {
  const source = { model: String(row["model"]), setting: String(row["setting"]) };
  const isFull = source.setting === "full";
  const method = { ...methodOf(row), seconds: row["quantizeSeconds"] ?? null };
  if (row["kind"] === "masked language model") {
    const tasks = row["exactMatch"] as readonly TaskScore[];
    const bins = row["byMaskRatio"] as readonly Pick<MaskedComparison, "low" | "high" | "sequences" | "kl">[];
    return {
      peers: tasks.map(({ task, prompts, exactMatch }) => ({
        ...method,
        task,
        samples: prompts,
        ...spread("accuracy", exactMatch),
        ...(task === "all" && !isFull ? spread("kl", bins.at(-1)!.kl) : {}),
      })),
      time: isFull ? [] : maskRatioRows(bins, source),
    };
  }
  if (row["kind"] === "masked language model, synthetic sequences") {
    const bins = row["byMaskRatio"] as readonly MaskedComparison[];
    return {
      peers: [{
        ...method,
        samples: bins.at(-1)!.sequences,
        ...(isFull ? {} : spread("kl", bins.at(-1)!.kl)),
      }],
      time: isFull ? [] : maskRatioRows(bins, source),
    };
  }
  const errors = row["byTimestep"] as readonly Omit<TimestepError, "perImage">[];
  const common = {
    ...method,
    samples: row["images"],
    ...(isFull ? {} : spread("relativeError", row["noiseError"] as Interval)),
  };
  return {
    peers: [
      row["kind"] === "image model, synthetic trajectories" ? common : {
        ...common,
        task: "recognized",
        ...spread("accuracy", row["classAccuracy"] as Interval),
        frechetDistance: (row["frechetDistance"] as Interval).value,
      },
    ],
    time: isFull ? [] : timestepRows(errors, source),
    drift: isFull ? [] : driftRows(row["drift"] as readonly StepDrift[], source),
  };
}

function kernelRow(row: Row): Row {
  const shape = row["shape"] as readonly number[] | null | undefined;
  const summary = (name: string) => row[name] as Summary | null | undefined;
  const same = ["group", "kernel", "library", "backend", "isa", "dtype", "place", "threads", "samples"];
  return {
    ...Object.fromEntries(same.map((name) => [name, row[name] ?? null])),
    rows: shape?.[0] ?? null,
    cols: shape?.[1] ?? null,
    weightsPerSecond: summary("weightsPerSecond")?.median ?? null,
    weightsPerSecondDeviation: summary("weightsPerSecond")?.medianDeviation ?? null,
    bytesPerSecond: summary("bytesPerSecond")?.median ?? null,
    bytesPerSecondDeviation: summary("bytesPerSecond")?.medianDeviation ?? null,
    timesMemcpy: summary("bytesAgainstMemcpy")?.median ?? null,
    bitsPerWeight: row["bitsPerWeight"] ?? null,
    relativeRmsError: row["relativeRmsError"] ?? null,
  };
}

/** A row of a sample, its picture as a URL. */
export function sampleRowOf({ png, ...sample }: Sample): RowOf<"samples"> {
  if (png === undefined) return sample;
  return { ...sample, image: `data:image/png;base64,${Buffer.from(png).toString("base64")}` };
}

function peersRows(row: Row): Rows {
  const isFull = row["bitsPerWeight"] === null;
  const kind = String(row["kind"] ?? "ours");
  const masked = row["family"] !== "dit";
  const method = {
    ...methodOf(row),
    method: isFull ? "full" : row["method"],
    library: kind === "ours" ? "arrowquant" : kind === "peer library" ? "ggml" : kind,
    seconds: row["quantizeSeconds"] ?? null,
  };
  const distance = isFull ? {} : spread(masked ? "kl" : "relativeError", row["distance"] as Interval);
  const tasks = row["exactMatch"] as readonly TaskScore[];
  const byTimestep = (row["byTimestep"] ?? []) as Parameters<typeof timestepRows>[0];
  return {
    peers: tasks.length === 0
      ? [{ ...method, ...distance }]
      : tasks.map(({ task, prompts, exactMatch }, i) => ({
        ...method,
        task,
        samples: prompts,
        ...spread("accuracy", exactMatch),
        ...(task === "all" || tasks.length === 1 && i === 0 ? distance : {}),
      })),
    time: isFull ? [] : timestepRows(byTimestep, {
      model: String(row["model"]),
      setting: String(method.method),
    }),
  };
}

/** Rows of one suite come in their order: full precision stands before the rows of the same bits. */
function phasesRows(row: Row, all: readonly Row[]): Rows {
  if (row["stepKl"] === undefined) return {}; // times at a large model's sizes: nothing of a phase's worth
  const at = all.indexOf(row), isFull = row["bits"] === null;
  const quantized = isFull ? all.slice(at).find(({ bits }) => bits !== null) : row;
  const source = { model: String(row["model"]), setting: `${quantized?.["bits"]} bits` };
  const phase = isFull ? "full" : String(row["phase"]);
  const metrics = row["metrics"] as PhasesReport | null;
  const { smoothing, refinement, validation } = metrics ?? {};
  const tasks = row["accuracy"] as readonly TaskScore[];
  // A row without tasks stands beside those that have some.
  const others = all.find((other) => other["model"] === row["model"] && (other["accuracy"] as []).length > 0);
  const [only, ...more] = (others?.["accuracy"] ?? []) as readonly TaskScore[];
  const together = only === undefined || more.length > 0 ? "all" : only.task;
  const difference = row["differenceToBaseline"] as Interval | null;
  const common = { ...source, phase, bits: row["bits"], bitsPerWeight: row["bitsPerWeight"] };
  const whole = {
    ...(isFull ? {} : spread("stepKl", row["stepKl"] as Interval)),
    ...(difference === null || phase === "baseline" ? {} : spread("delta", difference)),
    markovScore: validation?.markovScore ?? null,
    seconds: row["seconds"],
    overhead: row["overhead"],
    iterations: refinement?.iterations ?? null,
    converged: refinement?.converged ?? null,
    layersKept: smoothing?.kept.length ?? null,
    layersRejected: smoothing?.rejected.length ?? null,
  };
  // The same refinement in several rows ran once.
  const isFirst = refinement !== undefined &&
    all.findIndex((other) =>
        (other["metrics"] as PhasesReport | null)?.refinement?.losses === refinement.losses
      ) === at;
  return {
    phases: tasks.length === 0 ? [{ ...common, task: together, ...whole }] : tasks.map(
      ({ task, prompts, exactMatch }) => ({
        ...common,
        task,
        samples: prompts,
        ...spread("accuracy", exactMatch),
        ...(task === together ? whole : {}),
      }),
    ),
    losses: isFirst ? lossRows(refinement.losses, { ...source, setting: `${source.setting}, ${phase}` }) : [],
  };
}

/** How the rows of a suite become rows of tables. A suite that is not here gives its tables itself. */
const SUITE_ROWS: Readonly<Record<string, (row: Row, all: readonly Row[]) => Rows>> = {
  accuracy: accuracyRows,
  checkpoint: (row) => ({
    peers: [{ ...methodOf(row), seconds: (row["seconds"] as Summary).median }],
  }),
  kernels: (row) => ({ kernels: [kernelRow(row)] }),
  peers: peersRows,
  phases: phasesRows,
};

/**
 * The tables of a bench run: from the rows of the suites that are known here, and those that a suite gives itself.
 *
 * @throws {TypeError} when rows do not fit their table
 */
export async function benchTables(
  { rows, tables = {}, quantized = [], samples = [], timed = [] }: Pick<
    SuiteReport,
    "rows" | "tables" | "quantized" | "samples" | "timed"
  >,
): Promise<Tables> {
  const collected = new Map<TableName, Row[]>();
  const add = (name: string, more: readonly Row[]) => {
    if (!isTableName(name)) {
      throw new TypeError(`Cannot make tables of a run: there is no table ${JSON.stringify(name)}`);
    }
    collected.set(name, [...collected.get(name) ?? [], ...more]);
  };
  for (const row of rows) {
    const made = SUITE_ROWS[String(row["suite"])]?.(row, rows) ?? {};
    for (const [name, more] of Object.entries(made)) add(name, more);
  }
  for (const each of quantized) add("layers", layerRowsOf(each.layers, each.layerMilliseconds, each));
  for (const each of timed) add("time", timedRows(each));
  if (samples.length > 0) add("samples", samples.map(sampleRowOf));
  for (const [name, more] of Object.entries(tables)) add(name, more);
  return await tablesOf(Object.fromEntries(collected) as { [Name in TableName]?: RowOf<Name>[] });
}

/** Tables of plain rows; without those that have none. */
export async function tablesOf(
  rows: { readonly [Name in TableName]?: readonly RowOf<Name>[] },
): Promise<Tables> {
  const made: { [Name in TableName]?: ColumnTable } = {};
  for (const name of Object.keys(rows) as TableName[]) {
    const own = rows[name];
    if (own !== undefined && own.length > 0) {
      made[name] = await tableFromRows(name, own as unknown as RowOf<typeof name>[]);
    }
  }
  return made;
}
