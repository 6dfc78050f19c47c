/**
 * The phases suite: full precision, the baseline and the three phases of a model, ablations and comparisons,
 * each written by the pipeline with the configuration of its row, and measured from its files. Rows: rows.ts.
 * Tables: report.ts. Goals: goals.ts.
 */
import { basename, join } from "node:path";
import { calibrationBeside, calibrationSource } from "../../calibration/source.ts";
import { bootstrapRatio, pairedDifference } from "../../eval/intervals.ts";
import { type LayerError, layerErrors } from "../../eval/layer_errors.ts";
import { type Yardstick, yardstickOf } from "../../eval/yardstick.ts";
import type { LoadedModel } from "../../models/mod.ts";
import type { PhaseContext } from "../../phases/context.ts";
import type { BitWidth } from "../../quant/mod.ts";
import { equalTimeGroups, type TimeGroups } from "../../time/mod.ts";
import { nameOfPath } from "../../files/whole.ts";
import {
  type BenchContext,
  mergeReports,
  type Skipped,
  type Suite,
  type SuiteReport,
  type TimedSetting,
} from "../suite.ts";
import { readStored } from "../layers_over_time.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";
import { phaseGoals } from "./goals.ts";
import { phaseMemory } from "./memory.ts";
import { type About, claimSection, phaseSections, type Row } from "./report.ts";
import {
  BEST_ROW,
  DYNAMIC_ROW,
  type RowSetting,
  rowSettings,
  rowsLeftOut,
  SAMPLER_ROW,
  STATIC_ROW,
  UNREFINED_ROW,
} from "./rows.ts";
import { loadRow, outputDigests, RowRunner } from "./run_row.ts";
import { type SamplerRow, samplerSections } from "./sampler.ts";
import { phaseScale, type ScaleRow } from "./scale.ts";
import { forwardRatio, overhead, pipelineSeconds, selectionShare } from "./time.ts";

/** Runs of a row with a small overhead, fewer where one takes long, one where it takes very long. */
const RUNS = 5, FEW_RUNS = 3, LONG_SECONDS = 1, VERY_LONG_SECONDS = 5;
/** Rows that run again: their overheads are small, and have goals. */
const TIMED_ROWS = ["phase1", "phase2", UNREFINED_ROW];
/** The reference models, all rows, two cores. */
const MOST_MINUTES = 6;
/** Times that the puzzles are masked for the step KL: rare large errors decide its mean. */
const REPEATS = 3;
/** Amounts of evaluation and calibration data. */
const AMOUNTS = { sequences: 300, images: 32, puzzles: undefined };
const QUICK_AMOUNTS = { sequences: 40, images: 4, puzzles: 10 }, QUICK_SAMPLES = 64;

interface Measured {
  readonly context: BenchContext;
  readonly name: string;
  readonly runner: RowRunner;
  readonly full: LoadedModel;
  readonly yardstick: Yardstick;
  readonly groups: TimeGroups;
  readonly phaseContext: PhaseContext;
  /** Of the rows' outputs. */
  readonly folder: string;
}

async function measureModel(
  context: BenchContext,
  path: string,
  bits: BitWidth,
): Promise<SuiteReport<PhasesRow>> {
  const { kernels, options } = context, { seed, quick, phase = "all", groupSize, limit } = options;
  const name = nameOfPath(path);
  using runner = await RowRunner.open(path, kernels, {
    bit_width: bits,
    group_size: groupSize,
    num_threads: kernels.threads,
    num_time_groups: options.timeGroups,
    calibration_data: calibrationBeside(path) === undefined ? "synthetic" : undefined,
    calibration_samples: quick ? QUICK_SAMPLES : undefined,
    "solver_options.candidates": quick ? 1 : undefined,
  });
  const { checkpoint, calibrated } = runner, config = runner.configOf({ overrides: {} });
  const phaseContext: PhaseContext = {
    checkpoint,
    calibrated,
    kernels,
    source: calibrationSource(checkpoint, config),
    seed: config.calibrationSeed,
  };
  const groups = equalTimeGroups(calibrated.data.axis, config.numTimeGroups); // refused before anything is measured
  const full = { kind: checkpoint.kind, model: calibrated.model } as LoadedModel;
  const amounts = quick ? QUICK_AMOUNTS : AMOUNTS;
  const yardstick = await yardstickOf(checkpoint, kernels, {
    ...amounts,
    seed,
    tasks: options.tasks,
    puzzles: limit ?? amounts.puzzles,
    drawn: limit,
    repeats: REPEATS,
  });
  return await withTemporaryFolder(async (folder) => {
    const measured = { context, name, runner, full, yardstick, groups, phaseContext, folder };
    const rows = await measureRows(
      measured,
      rowSettings(groups.count, calibrated.kind, phase, quick),
    );
    const { source, isSynthetic } = calibrated.data;
    const about: About = {
      name,
      family: full.kind,
      calibration: source.replaceAll(JSON.stringify(phaseContext.source), basename(phaseContext.source)) +
        (isSynthetic ? " - NOT real data" : ""),
      yardstick,
      bits,
      groupSize,
      timeGroups: groups.count,
    };
    return await reportOf(measured, about, rows);
  });
}

async function measureRows(
  { context: { kernels, options, progress }, name, runner, full, yardstick, groups, folder }: Measured,
  settings: readonly RowSetting[],
): Promise<Row[]> {
  const { seed, quick } = options;
  const rows: Row[] = [{ setting: undefined, measurement: yardstick.measure(full) }];
  const find = (wanted: string | undefined) =>
    rows.find(({ setting }) => setting !== undefined && setting.name === wanted);
  for (const [i, setting] of settings.entries()) {
    progress(`${name}, ${setting.name}`);
    const { dynamicBits } = setting;
    const written = dynamicBits === undefined
      ? await runner.write(setting, join(folder, String(i)))
      : undefined;
    const own = written ?? find(BEST_ROW)!;
    const runs = written === undefined ? [] : [written.times];
    if (TIMED_ROWS.includes(setting.name)) {
      const seconds = pipelineSeconds(runs, 0);
      const most = quick || seconds > LONG_SECONDS
        ? quick || seconds < VERY_LONG_SECONDS ? FEW_RUNS : 1
        : RUNS;
      while (runs.length < most) {
        runs.push((await runner.write(setting, join(folder, "again"), true)).times);
      }
    }
    const loaded = loadRow(own.folder!, kernels, { dynamicBits }, groups);
    const digests = written && outputDigests(written.folder);
    // Equal bytes measure the same.
    const same = digests && rows.find((row) => row.digests?.all === digests.all);
    const measurement = same?.measurement ?? yardstick.measure(loaded);
    const other = find(setting.over), { timeParameters } = loaded.model;
    const { solved } = measurement, base = find("baseline")?.measurement.solved;
    rows.push({
      setting,
      measurement,
      ...written,
      bitsPerWeight: own.bitsPerWeight!,
      runs,
      digests,
      over: other && {
        row: other.setting!.name,
        ...bootstrapRatio(measurement.stepKl.sums, other.measurement.stepKl.sums, { seed }),
      },
      timeParameterBytes: written && timeParameters?.bytes,
      selection: written && timeParameters && selectionShare(loaded, timeParameters),
      differenceToBaseline: base && solved && pairedDifference(base, solved, { seed }),
    });
  }
  const best = find(BEST_ROW)?.solveSeconds;
  return rows.map((row): Row => {
    const { runs = [], solveSeconds = 0, report } = row;
    if (runs.length === 0) return row;
    return {
      ...row,
      seconds: pipelineSeconds(runs, solveSeconds),
      overRound: report && overhead(runs, solveSeconds, 0),
      // A phase's way of solving counts as the phase's.
      overBest: report && solveSeconds > 0 ? overhead(runs, solveSeconds, best ?? solveSeconds) : undefined,
    };
  });
}

async function reportOf(
  measured: Measured,
  about: About,
  rows: readonly Row[],
): Promise<SuiteReport<PhasesRow>> {
  const { context, name, runner, yardstick, groups } = measured, { kernels, options, commandOf } = context;
  const { phase = "all", seed } = options, isAll = phase === "all", { calibrated, checkpoint } = runner;
  if (isAll) context.progress(`${name}, memory`);
  const memory = isAll && commandOf !== undefined
    ? await phaseMemory(commandOf, {
      path: checkpoint.path,
      source: measured.phaseContext.source,
      bits: about.bits,
      groupSize: about.groupSize,
      groups: groups.count,
      threads: kernels.threads,
    })
    : undefined;
  const load = (wanted: string, isPlain = false) => {
    const row = rows.find(({ setting }) => setting?.name === wanted), dynamicBits = row?.setting?.dynamicBits;
    const folder = dynamicBits === undefined
      ? row?.folder
      : rows.find(({ setting }) => setting?.name === BEST_ROW)?.folder;
    return folder === undefined ? undefined : loadRow(folder, kernels, { dynamicBits, isPlain }, groups);
  };
  const [fixed, dynamic] = [load(STATIC_ROW), load(DYNAMIC_ROW)];
  const sampler = samplerReport(measured, load(SAMPLER_ROW, true), load(SAMPLER_ROW));
  const skipped: Skipped[] = [...yardstick.missing, ...(isAll ? rowsLeftOut(calibrated.kind) : [])];
  return {
    sections: [...phaseSections(about, rows), ...claimSection(about, rows), ...sampler.sections],
    rows: [...rows.map((row) => jsonRow(context, about, row)), ...sampler.rows],
    goals: phaseGoals({
      name,
      family: about.family,
      seed,
      memory,
      staticOverDynamic: fixed && dynamic && forwardRatio(fixed, dynamic),
    }, rows),
    skipped: skipped.map(({ what, reason }) => ({ what: `${name}: ${what}`, reason })),
    timed: timedSettings(measured, rows, `${about.bits} bits`),
  };
}

/** Drift of drawings with the sampler's correction and without; nothing where it was rejected. */
function samplerReport(
  { context: { options: { seed, quick } }, name, full, phaseContext }: Measured,
  plain: LoadedModel | undefined,
  corrected: LoadedModel | undefined,
): Pick<SuiteReport<SamplerRow>, "sections" | "rows"> {
  const { scheduler } = phaseContext.calibrated.data;
  if (full.kind !== "dit" || plain?.kind !== "dit" || corrected?.kind !== "dit" || scheduler === undefined) {
    return { sections: [], rows: [] };
  }
  if (corrected.model.timeParameters?.sampler === undefined) return { sections: [], rows: [] };
  const models = { full: full.model, plain: plain.model, corrected: corrected.model };
  return samplerSections(name, models, scheduler, { seed, quick });
}

export type PhasesRow = PhaseRow | SamplerRow | ScaleRow;
/** A model at a row's configuration, or in full precision. */
export type PhaseRow = ReturnType<typeof jsonRow>;

function jsonRow({ kernels, environment, options: { seed } }: BenchContext, about: About, row: Row) {
  const { setting, measurement, report } = row, { groupSize, bits, yardstick } = about;
  const { backend, isa, runtime, processor } = environment;
  return {
    suite: "phases" as const,
    model: about.name,
    family: about.family,
    phase: setting?.name ?? "full precision",
    configuration: setting?.overrides ?? null,
    bits: setting === undefined ? null : bits,
    groupSize: setting === undefined ? null : setting.overrides["group_size"] ?? groupSize,
    timeGroups: report?.groups ?? null,
    bitsPerWeight: row.bitsPerWeight ?? null,
    timeParameterBytes: row.timeParameterBytes ?? 0,
    stepKl: measurement.stepKl.mean,
    stepKlOver: row.over ?? null,
    noiseError: yardstick.kind === "images" ? measurement.distance : null,
    accuracy: measurement.scores,
    differenceToBaseline: row.differenceToBaseline ?? null,
    seconds: row.seconds ?? null,
    overhead: row.overRound ?? null,
    overheadOverBest: row.overBest ?? null,
    solveSeconds: row.solveSeconds ?? null,
    pipelineRuns: row.runs ?? null,
    selection: row.selection ?? null,
    digest: row.digests?.all ?? null,
    weightsDigest: row.digests?.weights ?? null,
    metrics: report ?? null,
    calibration: about.calibration,
    evaluation: yardstick.source,
    seed,
    threads: kernels.threads,
    ...{ backend, isa, runtime, processor },
  };
}

/** The main rows along the time axis: held-out step KL, errors of the layers, θ of phases 1 and 2. */
function timedSettings(
  { name, full, groups, phaseContext }: Measured,
  rows: readonly Row[],
  bits: string,
): TimedSetting[] {
  const of = (...wanted: string[]) => rows.filter(({ setting }) => wanted.includes(setting?.name ?? ""));
  const base = ({ setting }: Row) => ({ model: name, setting: `${bits}, ${setting!.name}`, groups });
  const compared = of("baseline", "phase3_full");
  const errors: LayerError[][] = layerErrors(
    phaseContext,
    full,
    compared.map(({ folder }) => readStored(folder!)),
    groups,
  );
  const theta = (stage: "before" | "after", row: Row | undefined): TimedSetting[] => {
    const parameters = row && readStored(row.folder!).timeParameters;
    return parameters === undefined ? [] : [{ ...base(row!), setting: bits, theta: { stage, parameters } }];
  };
  return [
    ...of("phase1", "phase2", "phase3_full").flatMap((row): TimedSetting[] => {
      const stepKl = row.report?.validation?.stepKlByGroup;
      return stepKl === undefined ? [] : [{ ...base(row), stepKl }];
    }),
    ...compared.map((row, i): TimedSetting => ({ ...base(row), layerErrors: errors[i] })),
    ...theta("before", of("phase1")[0]),
    ...theta("after", of("phase2")[0]),
  ];
}

/** The phases on the reference models, or those of `--model`. */
export const phasesSuite: Suite<PhasesRow> = {
  name: "phases",
  summary: "baseline and the three phases: accuracy, step KL, Markov score, overhead (--phase)",
  defaults: { bits: [2], groupSizes: [0] },
  run: async (context) => {
    if (context.options.modelSize !== undefined) return await phaseScale(context);
    const reports: SuiteReport<PhasesRow>[] = [], begin = performance.now();
    for (const path of context.options.models) {
      for (const bits of context.options.bits) reports.push(await measureModel(context, path, bits));
    }
    const report = mergeReports(reports), minutes = (performance.now() - begin) / 60_000;
    if (context.options.phase !== "all") return report;
    const time = {
      goal: "this run",
      wanted: `below ${MOST_MINUTES} minutes`,
      measured: minutes.toFixed(1),
      met: minutes < MOST_MINUTES,
    };
    return { ...report, goals: [...report.goals, time] };
  },
};
