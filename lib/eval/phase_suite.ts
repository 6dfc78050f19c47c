/**
 * The phase suite: full precision, the baseline and the three phases of a model, their ablations and rivals, each measured on evaluation data, beside
 * what the seed system claimed. Which rows there are is phase_rows.ts's, what they are measured by phase_measure.ts's, what is printed of them
 * phase_report.ts's.
 */
import { availableParallelism } from "node:os";
import { basename } from "node:path";
import { type Config, resolveConfig } from "../config.ts";
import { CalibrationError } from "../errors.ts";
import { modelFrom } from "../models/mod.ts";
import {
  loadPhaseModel,
  type PhaseContext,
  type PhaseModel,
  schedulerOf,
} from "../pipeline/phase_context.ts";
import { type PhaseResult, runPhases } from "../pipeline/phases.ts";
import { timeAxisOf } from "../pipeline/step_kl.ts";
import { calibrationSource } from "../pipeline/calibrated.ts";
import type { KnownSolutions } from "../pipeline/solve_plan.ts";
import { loadCalibration } from "../pipeline/calibration_data.ts";
import { equalTimeGroups } from "../time/mod.ts";
import { type BitWidth, MAX_THREADS } from "../quant/mod.ts";
import { packedByteLength } from "../quant/layout.ts";
import { type Checkpoint, openCheckpoint } from "../tensor/mod.ts";
import { bootstrapRatio, pairedDifference } from "./intervals.ts";
import { type Codes, codesOf } from "./phase_codes.ts";
import { phaseYardstick } from "./phase_measure.ts";
import { claimSection, phaseGoals, phaseSections, type Row } from "./phase_report.ts";
import { DEFAULT_TIME_GROUPS, rowSettings, rowsLeftOut } from "./phase_rows.ts";
import { nameOf } from "./settings.ts";
import type { BenchContext, Skipped, Suite, SuiteReport } from "./suite.ts";

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

/** Whether two models have the same bytes: codes, scales, zero points, biases and θ. */
export function sameModel(a: PhaseModel, b: PhaseModel): boolean {
  const text = ({ weights, biases, timeParameters }: PhaseModel) => {
    const plain = (value: unknown): unknown =>
      ArrayBuffer.isView(value) ? Array.from(value as Uint8Array) : value;
    return JSON.stringify([
      [...weights],
      [...biases],
      timeParameters && [[...timeParameters.groups.boundaries], [...timeParameters.layers]],
    ], (_, value) => plain(value));
  };
  return text(a) === text(b);
}

async function measureModel(context: BenchContext, path: string, bits: BitWidth): Promise<SuiteReport> {
  const { kernels, environment, options, progress } = context;
  const { seed, quick, phase = "all", timeGroups = DEFAULT_TIME_GROUPS } = options;
  const threads = kernels.backend === "wasm"
    ? 1
    : options.threads ?? Math.min(MAX_THREADS, availableParallelism());
  const name = nameOf(path);
  using checkpoint = openCheckpoint(path);
  const full = modelFrom(checkpoint, kernels, { threads });
  const { config } = resolveConfig({
    overrides: {
      bit_width: bits,
      group_size: options.groupSize,
      num_threads: threads,
      calibration_samples: quick ? 64 : 512,
    },
  });
  const source = besideOrSynthetic(checkpoint, config);
  const begin = performance.now();
  const calibrated = await loadCalibration(full, {
    source,
    samples: config.calibrationSamples,
    seed: config.calibrationSeed,
  });
  const calibrationSeconds = (performance.now() - begin) / 1000;
  const phaseContext: PhaseContext = {
    checkpoint,
    calibrated,
    kernels,
    threads,
    source,
    seed: config.calibrationSeed,
  };
  const scheduler = schedulerOf(phaseContext);
  equalTimeGroups(timeAxisOf(scheduler), timeGroups); // refused before anything is measured
  const yardstick = await phaseYardstick(full, path, kernels, {
    seed,
    threads,
    limit: options.limit ?? (quick && full.kind !== "dit" ? 10 : undefined),
    tasks: options.tasks,
    quick,
  });
  const codes = new Map<string, Codes>(), known: KnownSolutions = new Map();
  const rows: Row[] = [{
    setting: undefined,
    measurement: yardstick.measure(full),
    report: undefined,
    bitsPerWeight: undefined,
    seconds: undefined,
    overhead: undefined,
    differenceToBaseline: undefined,
    over: undefined,
    model: undefined,
  }];
  const refinements = new Map<Codes["weights"], PhaseResult>();
  let baseline: Row | undefined;
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
    const between = performance.now();
    const { model, report } = await runPhases(phaseContext, own.weights, others, refined);
    const phaseSeconds = (performance.now() - between + (refined?.report.refinement?.milliseconds ?? 0)) /
      1000;
    const seconds = calibrationSeconds + own.seconds + phaseSeconds;
    const { validation, smoothing } = report;
    // Phases 1 and 2 against the rest of the same run; phase 3 against the baseline.
    const extra = ((validation?.milliseconds ?? 0) + (validation?.stepKlMilliseconds ?? 0) +
      (smoothing?.milliseconds ?? 0)) / 1000;
    const measurement = yardstick.measure(loadPhaseModel(phaseContext, model), setting.dynamicBits);
    const { over } = setting, other = rows.find(({ setting }) => setting?.name === over);
    const row: Row = {
      setting,
      measurement,
      report,
      bitsPerWeight: bitsPerWeightOf(model),
      seconds,
      overhead: setting.name === "phase1" || setting.name === "phase2"
        ? extra / (seconds - extra)
        : baseline === undefined
        ? undefined
        : seconds / baseline.seconds! - 1,
      differenceToBaseline: baseline?.measurement.solved === undefined || measurement.solved === undefined
        ? undefined
        : pairedDifference(baseline.measurement.solved, measurement.solved, { seed }),
      over: over === undefined || other === undefined ? undefined : {
        row: over,
        ...bootstrapRatio(measurement.sums, other.measurement.sums, { seed }),
      },
      model,
    };
    if (setting.name === "baseline") baseline = row;
    if (setting.name === "phase1" && !sameModel(baseline!.model!, model)) {
      throw new Error(`Cannot report phase 1 of ${JSON.stringify(path)}: it must change no byte, but it did`);
    }
    rows.push(row);
  }
  const skipped: Skipped[] = yardstick.missing.map((text) => {
    const [what, reason] = text.split(": ") as [string, string];
    return { what: `${name}: ${what}`, reason };
  });
  if (phase === "all") {
    skipped.push(
      ...rowsLeftOut(calibrated.kind).map(({ what, reason }) => ({ what: `${name}: ${what}`, reason })),
    );
  }
  const calibration = calibrated.data.source.replaceAll(JSON.stringify(source), basename(source)) +
    (calibrated.data.isSynthetic ? " - NOT real data" : "");
  const about = {
    name,
    full: full.kind,
    calibration,
    yardstick,
    bits,
    groupSize: options.groupSize,
    timeGroups,
  };
  return {
    sections: [...phaseSections(about, rows), ...claimSection(about, rows)],
    rows: rows.map(({ setting, measurement, model, ...row }) => ({
      suite: "phases",
      model: name,
      family: full.kind,
      phase: setting?.name ?? "full precision",
      solver: setting?.codes.solver ?? null,
      codes: setting?.codes ?? null,
      bits: setting === undefined ? null : bits,
      groupSize: setting === undefined ? null : options.groupSize,
      timeGroups: row.report?.groups ?? null,
      bitsPerWeight: row.bitsPerWeight ?? null,
      timeParameterBytes: model?.timeParameters?.bytes ?? 0,
      stepKl: measurement.stepKl,
      stepKlOver: row.over ?? null,
      noiseError: measurement.noiseError ?? null,
      accuracy: measurement.scores,
      differenceToBaseline: row.differenceToBaseline ?? null,
      seconds: row.seconds ?? null,
      overhead: row.overhead ?? null,
      metrics: row.report ?? null,
      calibration,
      evaluation: yardstick.source,
      seed,
      threads,
      backend: environment.backend,
      isa: environment.isa,
      runtime: environment.runtime,
      processor: environment.processor,
    })),
    goals: phaseGoals(name, full.kind, rows, timeGroups, seed),
    skipped,
  };
}

/** The phases on the reference models, or those of `--model`. */
export const phasesSuite: Suite = {
  name: "phases",
  summary: "baseline and the three phases: accuracy, step KL, Markov score, overhead (--phase)",
  defaults: { bits: [2], groupSizes: [0] },
  run: async (context) => {
    const reports: SuiteReport[] = [];
    for (const path of context.options.models) {
      for (const bits of context.options.bits) reports.push(await measureModel(context, path, bits));
    }
    return {
      sections: reports.flatMap(({ sections }) => sections),
      rows: reports.flatMap(({ rows }) => rows),
      goals: reports.flatMap(({ goals }) => goals),
      skipped: reports.flatMap(({ skipped }) => skipped),
    };
  },
};
