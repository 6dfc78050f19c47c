/**
 * The phase suite: full precision, the baseline and the three phases of a model, their ablations and rivals, each measured on evaluation data, beside
 * what the seed system claimed. How a row is made is here; what it is measured by is phase_measure.ts's.
 */
import { availableParallelism } from "node:os";
import { basename } from "node:path";
import { type Config, resolveConfig } from "../config.ts";
import { CalibrationError, CheckpointError } from "../errors.ts";
import { modelFrom } from "../models/mod.ts";
import {
  loadPhaseModel,
  type PhaseContext,
  type PhaseModel,
  type PhaseResult,
  type PhaseSettings,
  type PhasesReport,
  runPhases,
  schedulerOf,
} from "../pipeline/phases.ts";
import { timeAxisOf } from "../pipeline/step_kl.ts";
import { calibrationSource, solvePlan } from "../pipeline/calibrated.ts";
import { loadCalibration } from "../pipeline/calibration_data.ts";
import { planQuantization } from "../pipeline/plan.ts";
import { denseWeights } from "../pipeline/solve.ts";
import { equalTimeGroups } from "../time/mod.ts";
import { type BitWidth, MAX_THREADS, type PackedTensor, quantize } from "../quant/mod.ts";
import { packedByteLength } from "../quant/layout.ts";
import { type Checkpoint, openCheckpoint } from "../tensor/mod.ts";
import { bootstrapRatio, type Difference, pairedDifference } from "./intervals.ts";
import { type PhaseMeasurement, type PhaseYardstick, phaseYardstick } from "./phase_measure.ts";
import { nameOf, span } from "./settings.ts";
import type { BenchContext, Goal, PhaseName, Section, Skipped, Suite, SuiteReport } from "./suite.ts";

/** Time groups unless `--groups` says otherwise. */
export const DEFAULT_TIME_GROUPS = 5;
/** Phase 2's window and phase 1's threshold: the configuration's defaults. */
const SMOOTHING = { windowSize: 5, interpolation: "linear" } as const;
const VALIDATION = { smoothnessThreshold: 0.3 } as const;
/** Steps of the gradient refinement, by family: an image model's step costs as much as twenty of a small language model's. */
const REFINEMENT = {
  sequences: { learningRate: 0.01, maxIterations: 300, convergenceThreshold: 1e-4 },
  images: { learningRate: 0.004, maxIterations: 60, convergenceThreshold: 1e-4 },
} as const;
const QUICK_ITERATIONS = 6;

/** What the seed system published for 2 bits; its own notes call the figures synthetic. */
const CLAIMED: Readonly<Record<string, { accuracy: number; markov: number; overhead: number }>> = {
  phase1: { accuracy: 0.0009, markov: 0.71, overhead: 0.005 },
  phase2: { accuracy: 0.0418, markov: 0.85, overhead: 0.068 },
  phase3_full: { accuracy: 0.0936, markov: 0.92, overhead: 0.227 },
};

/** How a row is made. */
interface RowSetting {
  readonly name: string;
  readonly phase: PhaseName;
  readonly solver: "round" | "best";
  readonly phases: PhaseSettings;
  /** Activations on a grid of their own for each token, in place of static ones. */
  readonly dynamicBits?: 4 | 8;
}

interface Row {
  readonly setting: RowSetting | undefined;
  readonly measurement: PhaseMeasurement;
  readonly report: PhasesReport | undefined;
  readonly bitsPerWeight: number | undefined;
  /** Whole pipeline; of it the phases. */
  readonly seconds: number | undefined;
  readonly overhead: number | undefined;
  readonly differenceToBaseline: Difference | undefined;
  readonly model: PhaseModel | undefined;
}

/** The rows of a run; ablations and rivals come with `all`. */
function rowSettings(
  groups: number,
  kind: "sequences" | "images",
  phase: PhaseName,
  quick: boolean,
): RowSetting[] {
  const static8 = { groups, bits: 8 } as const;
  const refinement = quick ? { ...REFINEMENT[kind], maxIterations: QUICK_ITERATIONS } : REFINEMENT[kind];
  const main: RowSetting[] = [
    { name: "baseline", phase: "baseline", solver: "round", phases: { activations: static8 } },
    {
      name: "phase1",
      phase: "phase1",
      solver: "round",
      phases: { activations: static8, validation: VALIDATION },
    },
    {
      name: "phase2",
      phase: "phase2",
      solver: "round",
      phases: { activations: static8, validation: VALIDATION, smoothing: SMOOTHING },
    },
    {
      name: "phase3_full",
      phase: "phase3_full",
      solver: "best",
      phases: { activations: static8, validation: VALIDATION, smoothing: SMOOTHING, refinement },
    },
  ];
  if (phase !== "all") return main.filter((row) => row.phase === phase || row.phase === "baseline");
  const row = (
    name: string,
    solver: RowSetting["solver"],
    phases: PhaseSettings,
    dynamicBits?: 4 | 8,
  ): RowSetting => ({
    name,
    phase: "all",
    solver,
    phases,
    ...(dynamicBits === undefined ? {} : { dynamicBits }),
  });
  return [
    ...main,
    row("without refinement", "best", { activations: static8, validation: VALIDATION, smoothing: SMOOTHING }),
    row("round alone", "round", {}),
    row("round + refinement", "round", { refinement }),
    row("best alone", "best", {}),
    row("best + refinement", "best", { refinement }),
    row("best, static 8 bits, G 1", "best", { activations: { groups: 1, bits: 8 } }),
    row(`best, static 8 bits, G ${groups}`, "best", { activations: static8 }),
    row("best, dynamic 8 bits", "best", {}, 8),
    row("best, static 4 bits, G 1", "best", { activations: { groups: 1, bits: 4, range: "mse" } }),
    row("best, static 4 bits, G 10", "best", { activations: { groups: 10, bits: 4, range: "mse" } }),
    row("best, dynamic 4 bits", "best", {}, 4),
  ];
}

/** Calibration data that lie beside the checkpoint; made-up ones, which the report says, where there are none. */
function besideOrSynthetic(checkpoint: Checkpoint, config: Config): string {
  try {
    return calibrationSource(checkpoint, config);
  } catch (error) {
    if (!(error instanceof CalibrationError)) throw error;
    return "synthetic";
  }
}

/** Codes by a solver, with the seconds that they took. */
interface Codes {
  readonly weights: ReadonlyMap<string, PackedTensor>;
  readonly seconds: number;
}

async function codesOf(
  context: PhaseContext,
  config: Config,
  solver: RowSetting["solver"],
): Promise<Codes> {
  const { checkpoint, calibrated, kernels, threads, signal } = context;
  const begin = performance.now();
  const plan = planQuantization(checkpoint, { ...config, solver });
  const layers = new Map(
    calibrated.model.stages.flatMap(({ layers }) => layers.map((layer) => [layer.name, layer])),
  );
  const rows = plan.rows.filter(({ action, name }) => action === "quantize" && layers.has(name));
  if (rows.length === 0) {
    throw new CheckpointError(
      `Cannot measure ${JSON.stringify(checkpoint.path)}: it must have layers to quantize, got none`,
      {
        path: checkpoint.path,
      },
    );
  }
  let weights: Map<string, PackedTensor>;
  if (solver === "best") {
    const solved = await solvePlan(calibrated, plan, { ...config, solver }, kernels, threads, undefined, "", {
      signal,
    });
    weights = new Map([...solved.layers].map(([name, { tensor }]) => [name, tensor]));
  } else {
    weights = new Map(rows.map(({ name, shape, bits, groupSize, zeroPoint, scaleBits }) => {
      const [height, width] = shape as [number, number];
      const data = denseWeights(kernels, layers.get(name)!, threads);
      return [
        name,
        quantize(kernels, { data, dtype: "F32" }, height, width, {
          bits: bits!,
          groupSize: groupSize!,
          zeroPoint: zeroPoint!,
          scaleBits,
          solver: "round",
          threads,
        }),
      ];
    }));
  }
  return { weights, seconds: (performance.now() - begin) / 1000 };
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
  const codes = new Map<RowSetting["solver"], Codes>();
  const rows: Row[] = [{
    setting: undefined,
    measurement: yardstick.measure(full),
    report: undefined,
    bitsPerWeight: undefined,
    seconds: undefined,
    overhead: undefined,
    differenceToBaseline: undefined,
    model: undefined,
  }];
  const refinements = new Map<RowSetting["solver"], PhaseResult>();
  let baseline: Row | undefined;
  for (const setting of rowSettings(timeGroups, calibrated.kind, phase, quick)) {
    progress(`${name}, ${setting.name}`);
    const { solver } = setting;
    const own = codes.get(solver) ?? await codesOf(phaseContext, config, solver);
    codes.set(solver, own);
    const { refinement, ...others } = setting.phases;
    // The same refinement in several rows runs once; its time counts in each.
    const refined = refinement === undefined
      ? undefined
      : refinements.get(solver) ?? await runPhases(phaseContext, own.weights, { refinement });
    if (refined !== undefined) refinements.set(solver, refined);
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
      solver: setting?.solver ?? null,
      bits: setting === undefined ? null : bits,
      groupSize: setting === undefined ? null : options.groupSize,
      timeGroups: row.report?.groups ?? null,
      bitsPerWeight: row.bitsPerWeight ?? null,
      timeParameterBytes: model?.timeParameters?.bytes ?? 0,
      stepKl: measurement.stepKl,
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

interface About {
  readonly name: string;
  readonly full: string;
  /** Where the calibration data come from. */
  readonly calibration: string;
  readonly yardstick: PhaseYardstick;
  readonly bits: BitWidth;
  readonly groupSize: number;
  readonly timeGroups: number;
}

const percent = (value: number) => `${value >= 0 ? "+" : ""}${(100 * value).toFixed(2)} %`;

/** What became of the guarded parts of a row, in words. */
function guardText({ smoothing, refinement }: PhasesReport): string | undefined {
  const parts = [
    ...(smoothing === undefined
      ? []
      : [`θ ${smoothing.kept.length}/${smoothing.kept.length + smoothing.rejected.length}`]),
    ...(refinement === undefined ? [] : [`gradient ${refinement.kept ? "kept" : "rejected"}`]),
  ];
  return parts.length === 0 ? undefined : parts.join(", ");
}

function phaseSections(
  { name, full, calibration, yardstick, bits, groupSize, timeGroups }: About,
  rows: readonly Row[],
): Section[] {
  const tasks = rows[0]!.measurement.scores.map(({ task }) => task);
  const isImage = rows[0]!.measurement.noiseError !== undefined;
  const about = `${name} (${full}), ${bits} bits, group size ${
    groupSize === 0 ? "row" : groupSize
  }, ${timeGroups} time groups`;
  const phase = { key: "phase", title: "phase" };
  const named = ({ setting }: Row) => setting?.name ?? "full precision";
  const quantized = rows.slice(1);
  const accuracy: Section = {
    title: `${about}: accuracy`,
    notes: [
      `Measured on ${yardstick.source}. 95 % intervals (Wilson);`,
      "Δ: less the baseline's on the same prompts (bootstrap over pairs).",
    ],
    columns: [phase, ...tasks.map((task) => ({ key: task, title: task })), { key: "difference", title: "Δ" }],
    rows: rows.filter(({ measurement }) => measurement.scores.length > 0).map((row) => ({
      phase: named(row),
      ...Object.fromEntries(row.measurement.scores.map(({ task, exactMatch }) => [task, span(exactMatch)])),
      difference: row.differenceToBaseline && named(row) !== "baseline"
        ? span(row.differenceToBaseline, 3)
        : undefined,
    })),
  };
  const stepKl: Section = {
    title: `${about}: step KL on evaluation data`,
    notes: [
      `Measured on ${yardstick.source}; calibrated on`,
      `${calibration}.`,
      isImage
        ? "Step KL: mean of ω_t ‖Δε‖² an image, ω_t of DDPM cut at its 95th percentile. Noise error: ‖ε̂ − ε‖² / ‖ε‖²."
        : "Step KL: mean KL(full ‖ quantized) at a masked position; a step's is ρ times its sum over the masked positions.",
      "θ: bytes of time parameters, where smoothed a grid a timestep. Violations: jumps above the threshold.",
    ],
    columns: [
      phase,
      { key: "bitsPerWeight", title: "bits/w", digits: 3 },
      { key: "theta", title: "θ, kB", digits: 1 },
      { key: "stepKl", title: yardstick.stepKl },
      ...(isImage ? [{ key: "noise", title: "noise error" }] : []),
      { key: "markov", title: "Markov", digits: 3 },
      { key: "violations", title: "violations" },
    ],
    rows: quantized.map((row) => ({
      phase: named(row),
      bitsPerWeight: row.bitsPerWeight,
      theta: row.model?.timeParameters === undefined ? undefined : row.model.timeParameters.bytes / 1000,
      stepKl: span(row.measurement.stepKl, 5),
      noise: row.measurement.noiseError && span(row.measurement.noiseError, 4),
      markov: row.report?.validation?.markovScore,
      violations: row.report?.validation?.violations.length,
    })),
  };
  const cost: Section = {
    title: `${about}: time, and what was kept`,
    notes: [
      "Seconds: calibrate, solve, phases. Overhead: phases 1 and 2 against the rest of their own run, the others against the",
      "baseline's run. Kept: layers whose smoothed θ stayed, and the gradient refinement, both by held-out step KL.",
    ],
    columns: [
      phase,
      { key: "seconds", title: "s", digits: 2 },
      { key: "overhead", title: "overhead" },
      { key: "iterations", title: "iterations" },
      { key: "converged", title: "converged" },
      { key: "kept", title: "kept" },
    ],
    rows: quantized.map((row) => ({
      phase: named(row),
      seconds: row.seconds,
      overhead: row.overhead === undefined ? undefined : percent(row.overhead),
      iterations: row.report?.refinement?.iterations,
      converged: row.report?.refinement?.converged,
      kept: row.report && guardText(row.report),
    })),
  };
  return tasks.length > 0 ? [accuracy, stepKl, cost] : [stepKl, cost];
}

/** Share of prompts solved, relative to the baseline's. */
function relativeAccuracy(row: Row, baseline: Row): number | undefined {
  const share = ({ measurement: { solved } }: Row) =>
    solved === undefined ? undefined : solved.reduce((a, b) => a + b, 0) / solved.length;
  const [own, base] = [share(row), share(baseline)];
  return own === undefined || base === undefined || base === 0 ? undefined : own / base - 1;
}

/** What the seed system claimed beside what this run measured. */
function claimSection({ name }: About, rows: readonly Row[]): Section[] {
  const baseline = rows.find(({ setting }) => setting?.name === "baseline");
  const claimed = rows.filter(({ setting }) => setting !== undefined && setting.name in CLAIMED);
  if (baseline === undefined || claimed.length === 0) return [];
  return [{
    title: `${name}: claimed by the seed system (from a random number generator) / measured here`,
    notes: ["Accuracy: relative to the baseline's. Measured accuracy and overhead are of the table above."],
    columns: [
      { key: "phase", title: "phase" },
      { key: "accuracy", title: "accuracy, claimed / measured" },
      { key: "markov", title: "Markov score" },
      { key: "overhead", title: "overhead" },
    ],
    rows: claimed.map((row) => {
      const claim = CLAIMED[row.setting!.name]!, accuracy = relativeAccuracy(row, baseline);
      const score = row.report?.validation?.markovScore;
      return {
        phase: row.setting!.name,
        accuracy: `${percent(claim.accuracy)} / ${
          accuracy === undefined ? "not measured" : percent(accuracy)
        }`,
        markov: `${claim.markov.toFixed(2)} / ${score === undefined ? "not measured" : score.toFixed(2)}`,
        overhead: `${percent(claim.overhead)} / ${
          row.overhead === undefined ? "not measured" : percent(row.overhead)
        }`,
      };
    }),
  }];
}

function phaseGoals(
  name: string,
  family: string,
  rows: readonly Row[],
  groups: number,
  seed: number,
): Goal[] {
  const find = (wanted: string) => rows.find(({ setting }) => setting?.name === wanted);
  const baseline = find("baseline");
  const goals: Goal[] = [];
  const at = (goal: string, wanted: string, measured: string, met: boolean) =>
    goals.push({ goal: `${name}: ${goal}`, wanted, measured, met });
  const ratio = (goal: string, own: string, other: string, most: number) => {
    const [a, b] = [find(own)?.measurement, find(other)?.measurement];
    if (a === undefined || b === undefined) return;
    const { value, low, high } = bootstrapRatio(a.sums, b.sums, { seed });
    at(
      goal,
      `at most ${Number(most.toFixed(2))} ×`,
      `${value.toFixed(3)} × ${low.toFixed(3)}–${high.toFixed(3)}`,
      value <= most,
    );
  };
  const [one, two, three] = [find("phase1"), find("phase2"), find("phase3_full")];
  if (one?.report?.validation !== undefined) {
    const { milliseconds, stepKlMilliseconds } = one.report.validation;
    const rest = one.seconds! * 1000 - milliseconds - stepKlMilliseconds;
    at(
      "phase 1, overhead",
      "below 1 %",
      `${percent(milliseconds / rest)} scores, ${percent(one.overhead!)} with step KL`,
      one.overhead! < 0.01,
    );
  }
  if (two?.report?.validation !== undefined && baseline !== undefined) {
    const { validation, smoothing } = two.report;
    const own = (smoothing!.milliseconds + validation.milliseconds) / 1000;
    const overhead = own / (two.seconds! - own - validation.stepKlMilliseconds / 1000);
    at("phase 2, overhead", "below 10 %", percent(overhead), overhead < 0.1);
    at(
      "phase 2, Markov score",
      "at least 0.82",
      validation.markovScore.toFixed(3),
      validation.markovScore >= 0.82,
    );
    ratio("phase 2, step KL / baseline", "phase2", "baseline", 1);
  }
  if (three !== undefined && baseline !== undefined) {
    const accuracy = relativeAccuracy(three, baseline);
    if (accuracy !== undefined) {
      at(
        "phase 3, accuracy / baseline",
        "+9.36 %, Δ above 0",
        `${percent(accuracy)}, Δ ${span(three.differenceToBaseline!, 3)}`,
        accuracy >= 0.0936 && three.differenceToBaseline!.low > 0,
      );
    }
    ratio("phase 3, step KL / baseline", "phase3_full", "baseline", 1 / 3);
    const score = three.report!.validation!.markovScore;
    at("phase 3, Markov score", "at least 0.90", score.toFixed(3), score >= 0.9);
    at("phase 3, overhead", "below 25 %", percent(three.overhead!), three.overhead! < 0.25);
    const without = find("without refinement");
    if (without !== undefined) {
      at(
        "phase 3 less refinement, overhead",
        "below 25 %",
        percent(without.overhead!),
        without.overhead! < 0.25,
      );
    }
  }
  if (family === "dream") ratio("refinement / best, step KL", "best + refinement", "best alone", 0.6);
  ratio(
    "static / dynamic 8 bits, step KL",
    `best, static 8 bits, G ${groups}`,
    "best, dynamic 8 bits",
    1.1,
  );
  ratio("4 bits, G 10 / G 1, step KL", "best, static 4 bits, G 10", "best, static 4 bits, G 1", 1);
  return goals;
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
