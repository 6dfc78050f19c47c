/**
 * The phase suite: full precision, the baseline and the three phases of a model, their ablations and rivals, each measured on evaluation data, beside
 * what the seed system claimed. Which rows there are is phase_rows.ts's, what they are measured by phase_measure.ts's, what is printed of them
 * phase_report.ts's.
 */
import { basename } from "node:path";
import { type Config, resolveConfig } from "../../config/mod.ts";
import { CalibrationError } from "../../errors.ts";
import { type DitModel, type LoadedModel, modelFrom } from "../../models/mod.ts";
import { loadPhaseModel, type PhaseContext, type PhaseModel } from "../../phases/context.ts";
import { type PhaseResult, runPhases } from "../../phases/mod.ts";
import { calibrationSource } from "../../calibration/source.ts";
import type { KnownSolutions } from "../../solve/candidates.ts";
import { loadCalibration } from "../../calibration/mod.ts";
import { equalTimeGroups, type TimeGroups } from "../../time/mod.ts";
import type { BitWidth } from "../../quant/mod.ts";
import { packedByteLength } from "../../quant/packed/layout.ts";
import { type Checkpoint, openCheckpoint } from "../../tensor/mod.ts";
import { bootstrapRatio, pairedDifference } from "../../eval/intervals.ts";
import { type Codes, codesOf } from "./codes.ts";
import { phaseScale } from "./scale.ts";
import { layerErrors } from "../../eval/layer_errors.ts";
import { yardstickOf } from "../../eval/yardstick.ts";
import { modelDigest } from "./digest.ts";
import { phaseMemory } from "./memory.ts";
import { claimSection, phaseGoals, phaseSections, type Row } from "./report.ts";
import { DYNAMIC_ROW, type RowSetting, rowSettings, rowsLeftOut, SAMPLER_ROW, STATIC_ROW } from "./rows.ts";
import { samplerSections } from "./sampler.ts";
import {
  forwardRatio,
  overhead,
  phaseTimes,
  type PipelineRun,
  pipelineSeconds,
  selectionShare,
  writeSeconds,
} from "./time.ts";
import { DEFAULT_TIME_GROUPS } from "../options.ts";
import { nameOf } from "../settings.ts";
import {
  type BenchContext,
  mergeReports,
  type Skipped,
  type Suite,
  type SuiteReport,
  type TimedSetting,
} from "../suite.ts";

/** Runs of a row with a phase, fewer where one takes long. */
const RUNS = 5, FEW_RUNS = 3, LONG_SECONDS = 1;

/** Times that the puzzles are masked for the step KL: rare large errors decide its mean. */
const REPEATS = 3;
/** The reference models, all rows, two cores. */
const MOST_MINUTES = 6;

/** Rows that run again: their overheads are small, and have goals. What solving and gradients add to phase 3 is large in any run. */
const TIMED_ROWS = ["phase1", "phase2", "without refinement"];

/** A row before it is held against the others. */
type MeasuredRow =
  & Required<
    Pick<Row, "measurement" | "report" | "bitsPerWeight" | "runs" | "solveSeconds" | "model" | "digest">
  >
  & Pick<Row, "over" | "selection">
  & { readonly setting: RowSetting };

/** Calibration data that lie beside the checkpoint; made-up ones, which the report says, where there are none. */
function besideOrSynthetic(checkpoint: Checkpoint, config: Config): string {
  try {
    return calibrationSource(checkpoint, config);
  } catch (error) {
    if (!(error instanceof CalibrationError)) throw error;
    return "synthetic";
  }
}

/** Bits that the packed layers take for each weight. */
function bitsPerWeightOf({ weights }: PhaseModel): number {
  let bytes = 0, count = 0;
  for (const tensor of weights.values()) {
    bytes += packedByteLength(tensor);
    count += tensor.rows * tensor.cols;
  }
  return bytes * 8 / count;
}

async function measureModel(context: BenchContext, path: string, bits: BitWidth): Promise<SuiteReport> {
  const { kernels, environment, options, progress } = context;
  const { seed, quick, phase = "all", timeGroups = DEFAULT_TIME_GROUPS } = options;
  const name = nameOf(path);
  using checkpoint = openCheckpoint(path);
  const full = modelFrom(checkpoint, kernels);
  const { config } = resolveConfig({
    overrides: {
      bit_width: bits,
      group_size: options.groupSize,
      num_threads: kernels.threads,
      calibration_samples: quick ? 64 : 512,
    },
  });
  const source = besideOrSynthetic(checkpoint, config);
  const calibration = { source, samples: config.calibrationSamples, seed: config.calibrationSeed };
  const calibrated = await loadCalibration(full, calibration);
  const phaseContext: PhaseContext = {
    checkpoint,
    calibrated,
    kernels,
    source,
    seed: config.calibrationSeed,
  };
  const groups = equalTimeGroups(calibrated.data.axis, timeGroups); // refused before anything is measured
  const limit = options.limit ?? (quick && full.kind !== "dit" ? 10 : undefined);
  const yardstick = await yardstickOf(checkpoint, kernels, {
    seed,
    tasks: options.tasks,
    puzzles: limit,
    repeats: REPEATS,
    sequences: quick ? 40 : 300,
    images: quick ? 4 : 32,
    drawn: limit,
  });
  const fullMeasurement = yardstick.measure(full);
  const codes = new Map<string, Codes>(), known: KnownSolutions = new Map();
  const measured: MeasuredRow[] = [];
  const refinements = new Map<Codes["weights"], PhaseResult>();
  for (const setting of rowSettings(timeGroups, calibrated.kind, phase, quick)) {
    progress(`${name}, ${setting.name}`);
    const key = JSON.stringify(setting.codes);
    const own = codes.get(key) ?? await codesOf(phaseContext, config, setting.codes, known);
    codes.set(key, own);
    const { refinement, ...others } = setting.phases;
    // The same refinement in several rows runs once; its time counts in each.
    const refined = refinement === undefined
      ? undefined
      : refinements.get(own.weights) ?? await runPhases(phaseContext, own.weights, { refinement });
    if (refined !== undefined) refinements.set(own.weights, refined);
    const written = { ...config, groupSize: setting.codes.groupSize ?? config.groupSize };
    const timed = async () => {
      const begin = performance.now();
      await loadCalibration(full, calibration);
      const calibrate = (performance.now() - begin) / 1000;
      const result = await runPhases(phaseContext, own.weights, others, refined);
      const write = await writeSeconds(phaseContext, written, result.model);
      return { result, run: { calibrate, write, ...phaseTimes(result.report) } };
    };
    const { result: { model, report }, run } = await timed();
    const runs: PipelineRun[] = [run];
    // What is cheap runs again, for the medians of the rows that goals are about.
    if (others.validation !== undefined && TIMED_ROWS.includes(setting.name)) {
      const most = quick || pipelineSeconds(runs, 0) > LONG_SECONDS ? FEW_RUNS : RUNS;
      while (runs.length < most) runs.push((await timed()).run);
    }
    const loaded = loadPhaseModel(phaseContext, model);
    // Equal bytes measure the same.
    const digest = modelDigest(model), same = measured.find((row) => row.digest === digest);
    const measurement = same?.measurement ?? yardstick.measure(loaded);
    const other = measured.find((row) => row.setting.name === setting.over);
    // Rounding itself is part of writing.
    const hasSolving = setting.codes.solver === "best" || setting.codes.targetBitsPerWeight !== undefined;
    measured.push({
      setting,
      measurement,
      over: other && {
        row: other.setting.name,
        ...bootstrapRatio(measurement.stepKl.sums, other.measurement.stepKl.sums, { seed }),
      },
      solveSeconds: hasSolving ? own.seconds : 0,
      report,
      bitsPerWeight: bitsPerWeightOf(model),
      runs,
      model,
      digest,
      selection: model.timeParameters && selectionShare(loaded, model.timeParameters),
    });
  }
  const baseline = measured[0]!, best = codes.get(JSON.stringify({ solver: "best" }))?.seconds;
  const rows: Row[] = [
    { setting: undefined, measurement: fullMeasurement },
    ...measured.map((row): Row => {
      const { setting: { codes, phases }, runs, solveSeconds, measurement: { solved } } = row;
      const hasPhases = Object.keys(phases).some((key) => key !== "activations");
      return {
        ...row,
        seconds: pipelineSeconds(runs, solveSeconds),
        // Beside rounding with the same activations: a row that has them alone costs what its own do.
        overRound: row === baseline || !hasPhases ? undefined : overhead(runs, solveSeconds, 0),
        // A phase's own way of solving counts as the phase's.
        overBest: codes.solver === "best" && hasPhases
          ? overhead(runs, solveSeconds, best ?? solveSeconds)
          : undefined,
        differenceToBaseline:
          row === baseline || baseline.measurement.solved === undefined || solved === undefined
            ? undefined
            : pairedDifference(baseline.measurement.solved, solved, { seed }),
      };
    }),
  ];
  if (phase === "all") progress(`${name}, memory`);
  const memory = phase === "all" && context.commandOf !== undefined
    ? await phaseMemory(context.commandOf, {
      path,
      source,
      bits,
      groupSize: options.groupSize,
      groups: timeGroups,
      threads: kernels.threads,
    })
    : undefined;
  const skipped: Skipped[] = yardstick.missing.map(({ what, reason }) => ({
    what: `${name}: ${what}`,
    reason,
  }));
  if (phase === "all") {
    skipped.push(
      ...rowsLeftOut(calibrated.kind).map(({ what, reason }) => ({ what: `${name}: ${what}`, reason })),
    );
  }
  const calibratedOn = calibrated.data.source.replaceAll(JSON.stringify(source), basename(source)) +
    (calibrated.data.isSynthetic ? " - NOT real data" : "");
  const about = {
    name,
    full: full.kind,
    calibration: calibratedOn,
    yardstick,
    bits,
    groupSize: options.groupSize,
    timeGroups,
  };
  const modelOf = (wanted: string) => rows.find(({ setting }) => setting?.name === wanted)?.model;
  const [grids, tokenGrids] = [modelOf(STATIC_ROW), modelOf(DYNAMIC_ROW)];
  const staticOverDynamic = grids && tokenGrids &&
    forwardRatio(loadPhaseModel(phaseContext, grids), loadPhaseModel(phaseContext, tokenGrids));
  const withSampler = modelOf(SAMPLER_ROW), { scheduler } = phaseContext.calibrated.data;
  const drawing = withSampler === undefined || scheduler === undefined || full.kind !== "dit"
    ? undefined
    : samplerSections(
      name,
      {
        full: full.model,
        plain: ditOf(loadPhaseModel(phaseContext, { ...withSampler, timeParameters: undefined })),
        corrected: ditOf(loadPhaseModel(phaseContext, withSampler)),
      },
      scheduler,
      { seed, quick },
    );
  const report = {
    sections: [...phaseSections(about, rows), ...claimSection(about, rows)],
    rows: rows.map(({ setting, measurement, model, runs, ...row }) => ({
      suite: "phases",
      model: name,
      family: full.kind,
      phase: setting?.name ?? "full precision",
      solver: setting?.codes.solver ?? null,
      codes: setting?.codes ?? null,
      bits: setting === undefined ? null : bits,
      groupSize: setting === undefined ? null : setting.codes.groupSize ?? options.groupSize,
      timeGroups: row.report?.groups ?? null,
      bitsPerWeight: row.bitsPerWeight ?? null,
      timeParameterBytes: model?.timeParameters?.bytes ?? 0,
      stepKl: measurement.stepKl.mean,
      stepKlOver: row.over ?? null,
      noiseError: full.kind === "dit" ? measurement.distance : null,
      accuracy: measurement.scores,
      differenceToBaseline: row.differenceToBaseline ?? null,
      seconds: row.seconds ?? null,
      overhead: row.overRound ?? null,
      overheadOverBest: row.overBest ?? null,
      solveSeconds: row.solveSeconds ?? null,
      pipelineRuns: runs ?? null,
      selection: row.selection ?? null,
      digest: row.digest ?? null,
      metrics: row.report ?? null,
      calibration: calibratedOn,
      evaluation: yardstick.source,
      seed,
      threads: kernels.threads,
      backend: environment.backend,
      isa: environment.isa,
      runtime: environment.runtime,
      processor: environment.processor,
    })),
    goals: phaseGoals(
      { name, family: full.kind, seed, memory, staticOverDynamic },
      rows,
    ),
    skipped,
    timed: timedSettings(phaseContext, full, groups, rows, name, `${bits} bits`),
  };
  if (drawing === undefined) return report;
  return {
    ...report,
    sections: [...report.sections, ...drawing.sections],
    rows: [...report.rows, ...drawing.rows],
  };
}

function ditOf(loaded: LoadedModel): DitModel {
  if (loaded.kind !== "dit") {
    throw new TypeError("Cannot correct a sampler: the model must draw, got one that writes");
  }
  return loaded.model;
}

/** The main rows along the time axis: held-out step KL, errors of the layers, and θ before (baseline) and after (phase 2) smoothing. */
function timedSettings(
  context: PhaseContext,
  full: LoadedModel,
  groups: TimeGroups,
  rows: readonly Row[],
  name: string,
  bits: string,
): TimedSetting[] {
  const of = (wanted: string) => rows.find(({ setting }) => setting?.name === wanted);
  const compared = [of("baseline"), of("phase3_full")].filter((row) => row !== undefined);
  const errors = layerErrors(context, full, compared.map(({ model }) => model!), groups);
  const theta = (row: Row | undefined, stage: "before" | "after"): TimedSetting[] => {
    const parameters = row?.model?.timeParameters;
    if (parameters === undefined) return [];
    return [{ model: name, setting: bits, groups, theta: { stage, parameters } }];
  };
  return [
    ...["phase1", "phase2", "phase3_full"].map(of).flatMap((row): TimedSetting[] => {
      const stepKl = row?.report?.validation?.stepKlByGroup;
      if (stepKl === undefined) return [];
      return [{ model: name, setting: `${bits}, ${row!.setting!.name}`, groups, stepKl }];
    }),
    ...compared.map(({ setting }, i): TimedSetting => ({
      model: name,
      setting: `${bits}, ${setting!.name}`,
      groups,
      layerErrors: errors[i],
    })),
    ...theta(of("baseline"), "before"),
    ...theta(of("phase2"), "after"),
  ];
}

/** The phases on the reference models, or those of `--model`. */
export const phasesSuite: Suite = {
  name: "phases",
  summary: "baseline and the three phases: accuracy, step KL, Markov score, overhead (--phase)",
  defaults: { bits: [2], groupSizes: [0] },
  run: async (context) => {
    if (context.options.modelSize !== undefined) return await phaseScale(context);
    const reports: SuiteReport[] = [], begin = performance.now();
    for (const path of context.options.models) {
      for (const bits of context.options.bits) reports.push(await measureModel(context, path, bits));
    }
    const minutes = (performance.now() - begin) / 60_000;
    const goals = reports.flatMap(({ goals }) => goals);
    if (context.options.phase === "all") {
      goals.push({
        goal: "this run",
        wanted: `below ${MOST_MINUTES} minutes`,
        measured: minutes.toFixed(1),
        met: minutes < MOST_MINUTES,
      });
    }
    return { ...mergeReports(reports), goals };
  },
};
