/** Runs of the commands, a bench or a quantization, in the form that a report is made from. */
import { homedir } from "node:os";
import process from "node:process";
import type { Environment } from "../eval/environment.ts";
import type { BenchOptions } from "../bench/options.ts";
import type { SuiteRow } from "../bench/rows.ts";
import type { Goal, SuiteReport, TimedSetting } from "../bench/suite.ts";
import { formatConfig, type ResolvedConfig, withPhaseSolver } from "../config/mod.ts";
import { outputErrors, type RunReport } from "../pipeline/mod.ts";
import type { PhasesReport } from "../phases/mod.ts";
import { nameOfPath } from "../files/whole.ts";
import { TOOL_VERSION } from "../output/record.ts";
import type { TimeParameters } from "../time/mod.ts";
import type { Json } from "./_chart.ts";
import { benchTables, layerRowsOf, lossRows, type Tables, tablesOf, thetaRows, timedRows } from "./rows.ts";
import type { Run, SummaryItem } from "./run.ts";
import type { RowOf } from "./schema.ts";
import { rowsOf } from "./tables.ts";

/** A measured object as JSON; values that JSON lacks become null or are dropped. */
const asJson = (value: unknown) => JSON.parse(JSON.stringify(value)) as Readonly<Record<string, Json>>;

/** The result of a bench. */
export interface BenchResult {
  readonly suite: string;
  readonly command: string;
  readonly environment: Environment;
  readonly options: BenchOptions;
  readonly seconds: number;
  readonly otherCores: number | undefined;
  readonly report: SuiteReport<SuiteRow>;
}

/** Settings of a bench, as its run has them. */
export const benchConfiguration = (options: BenchOptions): Run["configuration"] =>
  asJson({ ...options, models: options.models.map(nameOfPath) });

/** A bench as a run. @throws {TypeError} when rows of the suite do not fit their table */
export async function benchRun(name: string, result: BenchResult): Promise<Run> {
  const { suite, command, environment, options, seconds, otherCores, report } = result;
  const tables = await benchTables(report);
  const { date, ...where } = environment;
  return {
    name,
    title: `bench, suite ${suite}${options.quick ? "; --quick: too few samples for a report" : ""}`,
    command,
    date,
    seconds,
    toolVersion: TOOL_VERSION,
    environment: asJson({ ...where, otherCoresBusy: otherCores ?? null }),
    configuration: benchConfiguration(options),
    summary: benchSummary(report.goals, tables),
    sections: report.sections,
    goals: report.goals,
    skipped: report.skipped,
    tables,
  };
}

/** The lines above a bench's tables: goals, and the accuracy of its models. */
export function benchSummary(goals: readonly Goal[], { peers }: Tables): SummaryItem[] {
  const count = (isSo: (goal: Goal) => boolean) => goals.filter(isSo).length;
  const met = `${count(({ met }) => met === true)} of ${count(({ met }) => met !== null)}`;
  return [
    ...(goals.length === 0 ? [] : [{ label: "goals met", value: met }]),
    ...(peers === undefined ? [] : accuracySummary(rowsOf("peers", peers))),
  ];
}

const percent = (share: number) => `${(100 * share).toFixed(1)}\u00a0%`;

/** By model: accuracy of full precision, and the fewest bits per weight whose interval reaches it. */
function accuracySummary(rows: readonly RowOf<"peers">[]): SummaryItem[] {
  return [...Map.groupBy(rows, ({ model }) => model)].flatMap(([model, own]) => {
    const isAll = (row: RowOf<"peers">) => row.task === "all" || row.task === "recognized";
    const full = own.find((row) => row.method === "full" && isAll(row));
    if (full === undefined || typeof full.accuracy !== "number") return [];
    const wanted = full.accuracyLow ?? full.accuracy;
    const within = own.filter((row) =>
      isAll(row) && typeof row.bitsPerWeight === "number" && typeof row.accuracyHigh === "number" &&
      row.accuracyHigh >= wanted
    ).toSorted((a, b) =>
      a.bitsPerWeight! - b.bitsPerWeight! || b.accuracy! - a.accuracy!
    )[0];
    return [
      { label: `${model}, full precision`, value: percent(full.accuracy) },
      {
        label: `${model}, fewest bits per weight whose interval meets that`,
        value: within === undefined
          ? "none measured"
          : `${within.bitsPerWeight!.toFixed(3)} (${within.method}, ${percent(within.accuracy!)})`,
      },
    ];
  });
}

/** The result of a quantization. */
export interface QuantizeResult {
  readonly command: string;
  readonly report: RunReport;
  readonly resolved: ResolvedConfig;
  readonly seconds: number;
  /** ISO 8601, of the end. */
  readonly date: string;
  readonly environment: Readonly<Record<string, Json>>;
  /** Rows of the codes' table, where they were counted. */
  readonly codes?: readonly RowOf<"codes">[] | undefined;
  /** Errors of the layers along the time axis, where they were measured. */
  readonly timed?: TimedSetting | undefined;
  /** θ that the phases stored. */
  readonly timeParameters?: TimeParameters | undefined;
}

function phaseSummary({ validation, smoothing, refinement }: PhasesReport): SummaryItem[] {
  const layers = (kept: number, rejected: number) => `kept in ${kept} of ${kept + rejected} layers`;
  return [
    ...(validation === undefined
      ? []
      : [{ label: "Markov score", value: validation.markovScore.toFixed(4) }]),
    ...(smoothing === undefined ? [] : [{
      label: "boundary smoothing",
      value: layers(smoothing.kept.length, smoothing.rejected.length),
    }]),
    ...(refinement === undefined ? [] : [{
      label: "refinement, held-out step KL",
      value: `${refinement.heldOutBefore.toPrecision(4)} → ${refinement.heldOutAfter.toPrecision(4)}`,
    }]),
  ];
}

/** The name of a configuration in the tables, as in `2 clip` or `2 clip, scales of 4 bits`. */
export function settingOf(
  { config }: ResolvedConfig,
  solver: string = withPhaseSolver(config).solver,
): string {
  const scales = config.scaleBits === 16
    ? ""
    : config.scaleBits === 0
    ? ", rotated"
    : `, scales of ${config.scaleBits} bits`;
  return `${config.bitWidth} ${solver}${scales}`;
}

/** Every key with its value and where that came from, from the configuration's own text. */
function configurationOf(resolved: ResolvedConfig): Record<string, string> {
  const parents: string[] = [];
  return Object.fromEntries(
    formatConfig(resolved).split("\n").flatMap((line): [string, string][] => {
      const [, indent, key, value, origin] = /^( *)([^\s:#-][^:]*):\s*(.*?)\s*(?:# from (.*))?$/.exec(line) ??
        [];
      if (key === undefined) return [];
      const depth = indent!.length / 2;
      parents.splice(depth, Infinity, key);
      return origin === undefined ? [] : [[parents.join("."), `${value} (from ${origin})`]];
    }),
  );
}

/** A quantization as a run. */
export async function quantizeRun(name: string, result: QuantizeResult): Promise<Run> {
  const { command, report, resolved, seconds, date, environment, codes = [], timed, timeParameters } = result;
  const { totals, layers, layerMilliseconds, threads, tensorsResumed } = report;
  const model = nameOfPath(report.input), setting = settingOf(resolved, report.solver?.name);
  const megabytes = (bytes: number) => `${(bytes / 1e6).toPrecision(4)} MB`;
  const { heldOut } = report, solved = outputErrors(layers);
  const errors = {
    metric: heldOut?.metric ?? "not measured",
    heldOut: heldOut?.value ?? null,
    output: solved[Math.floor(solved.length / 2)]?.error ?? null,
    weights: totals.relativeRmsError ?? null,
    bits: totals.bitsPerWeightOfAll,
  };
  const fallbacks = layers.filter(({ tried }) => tried !== undefined).length;
  return {
    name,
    title: `quantize, ${model} (${report.modelKind}), ${setting}`,
    command,
    date,
    seconds,
    toolVersion: TOOL_VERSION,
    environment: {
      ...environment,
      platform: `${process.platform} ${process.arch}`,
      backend: report.backend?.replaceAll(homedir(), "~") ?? null,
      threads,
    },
    configuration: configurationOf(resolved),
    summary: [
      { label: "bits per weight, all tensors", value: `${totals.bitsPerWeightOfAll.toFixed(3)} bits` },
      { label: "bits per weight, quantized layers", value: `${totals.bitsPerWeight.toFixed(3)} bits` },
      { label: "files", value: `${megabytes(totals.fileBytesBefore)} → ${megabytes(totals.fileBytesAfter)}` },
      ...(heldOut === undefined
        ? []
        : [{ label: `held out, ${heldOut.metric}`, value: heldOut.value.toPrecision(4) }]),
      ...(errors.output === null
        ? []
        : [{ label: "relative output error, median of layers", value: errors.output.toPrecision(3) }]),
      ...(totals.relativeRmsError === undefined ? [] : [{
        label: "relative RMS error of the weights (does not rank solvers)",
        value: totals.relativeRmsError.toPrecision(4),
      }]),
      { label: "opens in", value: report.opensIn },
      { label: "tensors", value: `${totals.tensors} quantized, ${totals.tensorsKept} kept` },
      ...(fallbacks > 0 ? [{ label: "more bits for min_accuracy", value: `${fallbacks} tensors` }] : []),
      ...(tensorsResumed > 0
        ? [{ label: "done by an earlier run", value: `${tensorsResumed} tensors` }]
        : []),
      ...(report.phases === undefined ? [] : phaseSummary(report.phases)),
      { label: "time", value: `${seconds.toFixed(2)} s` },
    ],
    errors,
    sections: [],
    goals: [],
    skipped: [],
    tables: await tablesOf({
      layers: layerRowsOf(layers, layerMilliseconds, { model, setting }),
      codes,
      time: [
        ...(timeParameters === undefined ? [] : thetaRows(timeParameters, { model, setting })),
        ...(timed === undefined ? [] : timedRows({ ...timed, model, setting })),
      ],
      losses: report.phases?.refinement === undefined
        ? []
        : lossRows(report.phases.refinement.losses, { model, setting }),
    }),
  };
}
