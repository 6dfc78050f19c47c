/**
 * Solving a checkpoint's layers on calibration data, as a step of the pipeline: candidates are solved one after the other, the one with the
 * smallest held-out distance is taken, and what is solved is kept on disk, so that a run that was stopped goes on.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import type { Config } from "../config.ts";
import { CalibrationError, ConfigError, InterruptedError, WeightsError } from "../errors.ts";
import { loadModel } from "../models/mod.ts";
import type { PackedTensor } from "../quant/mod.ts";
import type { Kernels } from "../native/mod.ts";
import { CALIBRATED_SOLVERS, DEFAULT_SOLVER_SETTINGS, type SolverSettings } from "../quant/solvers.ts";
import type { Checkpoint } from "../tensor/mod.ts";
import { modelFingerprint } from "../time/mod.ts";
import { type Calibrated, loadCalibration, withStatistics } from "./calibration_data.ts";
import { digestFile, quote, sha256 } from "./files.ts";
import type { Plan } from "./plan.ts";
import type { Progress, RunEvent, RunOptions } from "./rewrite.ts";
import { heldOutDistance, type SolvedLayer, solveModel } from "./solve.ts";
import { loadStatistics, saveStatistics, statisticsFiles } from "./saved_statistics.ts";
import { loadSolvedLayers, saveSolvedLayer } from "./solved_layers.ts";
import { type TimeWeightSettings, withTimeWeights } from "./time_weights.ts";

/** Data that lie beside a checkpoint and are used when none are named. */
const BESIDE = ["calibration.jsonl", "calibration_images.safetensors", "calibration.safetensors"];

/** Whether a configuration needs calibration data. */
export function isCalibrated(config: Config): boolean {
  return CALIBRATED_SOLVERS.includes(config.solver) || hasBudget(config) || wantsPhases(config);
}

/**
 * Refuses settings that contradict a calibrated solver.
 *
 * @throws {ConfigError} naming the key
 */
export function checkCalibratedConfig(config: Config): void {
  const { solver, minAccuracy, bitPlan, scaleBits } = config;
  const refuse = (key: string, value: unknown, expected: string) => {
    const problem = { key, value: String(value), expected, source: "configuration" };
    throw new ConfigError(
      `Cannot use configuration: 1 problem\n  "${key}": got ${value}, expected ${expected}`,
      [problem],
    );
  };
  if (CALIBRATED_SOLVERS.includes(solver) && minAccuracy > 0) {
    refuse(
      "min_accuracy",
      minAccuracy,
      `0 with solver ${solver}: the cosine of weights says nothing about what it aims at`,
    );
  }
  if ((bitPlan !== null || hasBudget(config)) && scaleBits !== 16) {
    refuse("scale_bits", scaleBits, "16 with a bit plan or a budget");
  }
  if (bitPlan !== null && hasBudget(config)) {
    refuse("bit_plan", bitPlan, "null with target_bits_per_weight or target_model_size_mb");
  }
}

/** Whether a configuration asks for a phase. */
export function wantsPhases({ thermodynamic }: Config): boolean {
  const { validation, boundarySmoothing, transitionOptimization } = thermodynamic;
  return validation.enabled || boundarySmoothing.enabled || transitionOptimization.enabled;
}

/** Whether bits are chosen by a budget. */
export function hasBudget({ targetBitsPerWeight, targetModelSizeMb }: Config): boolean {
  return targetBitsPerWeight !== null || targetModelSizeMb !== null;
}

/** The calibration data that lie beside a checkpoint, if any do. */
export function calibrationBeside(folder: string): string | undefined {
  return BESIDE.map((name) => join(folder, name)).find((path) => existsSync(path));
}

/**
 * The calibration data of a configuration: the file that it names, or what lies beside the checkpoint.
 *
 * @throws {CalibrationError} when there are none, saying how to give some
 */
export function calibrationSource(checkpoint: Checkpoint, config: Config): string {
  const { calibrationData, solver } = config;
  if (calibrationData !== null) return calibrationData;
  const beside = calibrationBeside(checkpoint.folder);
  if (beside !== undefined) return beside;
  throw new CalibrationError(
    `Cannot quantize ${quote(checkpoint.path)}: ${
      wantsPhases(config) ? "a phase" : `the solver "${solver}"`
    } needs calibration data, got none: name a file ` +
      "with --calibrate (calibration_data), or say --calibrate synthetic for made-up data",
    { path: checkpoint.path },
  );
}

/** Text that stands for the data's bytes. */
export async function calibrationDigest(source: string): Promise<string> {
  const paths = source === "synthetic" ? undefined : existsSync(source) ? [source] : statisticsFiles(source);
  if (paths === undefined) return source;
  const digests: string[] = [];
  for (const path of paths) digests.push((await digestFile(path)).sha256);
  return digests.join();
}

/** Statistics to be saved. */
export interface SaveCalibration {
  /** A safetensors file. */
  readonly path: string;
  /** Also the second moment of each time group, which output corrections need. */
  readonly groupMoments?: boolean | undefined;
}

/** A checkpoint's model with its calibration data, or with the statistics that were saved of them. */
export async function openCalibration(
  checkpoint: Checkpoint,
  config: Config,
  kernels: Kernels,
  threads: number,
  save: SaveCalibration | undefined,
  options: RunOptions & { readonly force?: boolean | undefined },
): Promise<Calibrated> {
  const source = calibrationSource(checkpoint, config), files = statisticsFiles(source);
  const fingerprint = files === undefined && save === undefined ? "" : modelFingerprint(checkpoint);
  const statistics = files && loadStatistics(files, fingerprint);
  const loaded = loadModel(checkpoint.path, kernels, { threads });
  const samples = config.calibrationSamples, seed = config.calibrationSeed;
  const calibrated = statistics === undefined
    ? await loadCalibration(loaded, { source, samples, seed })
    : withStatistics(loaded, statistics);
  if (save === undefined) return calibrated;
  const { path, groupMoments = false } = save, { signal, onEvent, onProgress, force = false } = options;
  const dataIdentity = JSON.stringify([await calibrationDigest(source), samples, seed]);
  const saved = await stoppable(
    signal,
    "give the same command again, what is collected is kept",
    () =>
      saveStatistics(calibrated, {
        path,
        force,
        second: groupMoments ? "groups" : "total",
        groups: config.numTimeGroups,
        fingerprint,
        dataIdentity,
        kernels,
        threads,
        signal,
        onEvent,
        onProgress,
      }),
  );
  const isUsed = statistics !== undefined || config.calibrationMode === "once" || hasBudget(config);
  return isUsed ? { ...calibrated, statistics: saved } : calibrated;
}

/** The solver's settings of a configuration; annealing is phase 3's. */
export function solverSettings({ solverOptions, calibrationSeed, thermodynamic }: Config): SolverSettings {
  const { candidates: _, ...own } = solverOptions;
  const { enabled, entropyWeight } = thermodynamic.transitionOptimization;
  return {
    ...DEFAULT_SOLVER_SETTINGS,
    ...own,
    annealing: enabled ? entropyWeight : 0,
    rotationSeed: calibrationSeed,
  };
}

/** Weights by time that a configuration asks for: phase 3's. */
export function timeWeightSettings({ thermodynamic }: Config): TimeWeightSettings | undefined {
  const { enabled, timeWeights, betaSchedule } = thermodynamic.transitionOptimization;
  return enabled && timeWeights !== "none" ? { sampler: timeWeights, schedule: betaSchedule } : undefined;
}

/** One way to solve a model. */
interface Candidate {
  readonly settings: SolverSettings;
  /** Whether samples count by the weights of their times. */
  readonly isWeighted: boolean;
}

/**
 * What is tried beside the configured settings. Phase 3's terms are held against doing without them, unless there is to be one candidate; what
 * else is best differs from model to model.
 */
function candidatesOf({ kind }: Calibrated, config: Config): Candidate[] {
  const { solver, solverOptions: { candidates } } = config;
  const settings = solverSettings(config), isWeighted = timeWeightSettings(config) !== undefined;
  const isAnnealed = solver === "best" && settings.annealing > 0;
  const own = { settings, isWeighted };
  const without = { ...settings, annealing: 0 };
  const guards = [
    ...(isWeighted || isAnnealed ? [{ settings: without, isWeighted: false }] : []),
    ...(isWeighted && isAnnealed ? [{ settings: without, isWeighted }, { settings, isWeighted: false }] : []),
  ];
  if (solver !== "best") return [own, ...guards].slice(0, candidates);
  const { correction, residualCorrection, damping } = settings;
  const others = kind === "sequences"
    ? [
      { residualCorrection: residualCorrection / 2 },
      { correction: correction / 2, residualCorrection: residualCorrection / 2 },
      { damping: damping / 10 },
    ]
    : [{ damping: damping / 10 }, { correction: correction / 2 }, { correction: 0 }];
  return [own, ...guards, ...others.map((other) => ({ settings: { ...settings, ...other }, isWeighted }))]
    .slice(0, candidates);
}

/** What solving made of a model. */
export interface SolvedModel {
  readonly layers: ReadonlyMap<string, SolvedLayer>;
  /** Their tensors; the same object for the same candidate among {@linkcode KnownSolutions}. */
  readonly tensors: ReadonlyMap<string, PackedTensor>;
  /** Held-out distance of each candidate, and which was taken. */
  readonly distances: readonly number[];
  readonly chosen: number;
  readonly source: string;
  /** Of solving and measuring all candidates, also of those that were known. */
  readonly milliseconds: number;
}

/** A candidate as solved. */
export interface KnownSolution {
  readonly layers: ReadonlyMap<string, SolvedLayer>;
  readonly tensors: ReadonlyMap<string, PackedTensor>;
  /** Held-out. */
  readonly distance: number;
  readonly milliseconds: number;
}

/** Candidates solved before on the same model and calibration data, by what they were solved with. */
export type KnownSolutions = Map<string, KnownSolution>;

/**
 * Solves the layers of a plan.
 *
 * @param folder where solved layers are kept until the run is finished
 * @param known candidates that need not be solved again; those that are solved are added
 * @throws {InterruptedError} when the signal stopped it; what is solved is kept
 */
export async function solvePlan(
  calibrated: Calibrated,
  plan: Plan,
  config: Config,
  kernels: Kernels,
  threads: number,
  folder: string | undefined,
  identity: string,
  { signal, onEvent, onProgress }: RunOptions,
  known: KnownSolutions = new Map(),
): Promise<SolvedModel> {
  const rows = new Map(
    plan.rows.filter(({ action }) => action === "quantize").map((row) => [row.name, row]),
  );
  const candidates = candidatesOf(calibrated, config);
  const event = (kind: RunEvent["kind"], message: string) => onEvent?.({ kind, message });
  const { data, model } = calibrated;
  event("calibrate", `${data.source}${data.isSynthetic ? ": NOT real data" : ""}`);
  for (const warning of data.warnings) event("warning", warning);
  if (data.heldOut.length === 0 && candidates.length > 1) {
    event(
      "warning",
      data.fit.length === 0
        ? "saved statistics hold nothing out: the first candidate is taken unseen"
        : "too few records to hold any out: the first candidate is taken unseen",
    );
    candidates.length = 1;
  }
  if (data.fit.length === 0) {
    event(
      "calibrate",
      "all layers are solved on saved statistics of full precision (calibration_mode: once), nothing is held out",
    );
  }
  const solvable = new Set(model.stages.flatMap(({ layers }) => layers.map(({ name }) => name)));
  for (const { name } of rows.values()) {
    if (!solvable.has(name)) event("warning", `${name} is no linear layer: clip search without its inputs`);
  }
  const gridOf = (name: string) => {
    const row = rows.get(name);
    return row === undefined ? undefined : {
      bits: row.bits!,
      groupSize: row.groupSize!,
      zeroPoint: row.zeroPoint!,
      scaleBits: row.scaleBits,
    };
  };
  const weightsOf = (name: string) => rows.get(name)!.shape.reduce((product, size) => product * size, 1);
  const wanted = [...rows.keys()].filter((name) => solvable.has(name));
  const allWeights = wanted.reduce((sum, name) => sum + weightsOf(name), 0) * candidates.length;
  let weightsDone = 0, milliseconds = 0;
  let best: { readonly solution: KnownSolution; readonly index: number } | undefined;
  const distances: number[] = [];
  const weights = timeWeightSettings(config);
  const byTime = weights && withTimeWeights(calibrated, weights);
  for (const [index, { settings, isWeighted }] of candidates.entries()) {
    const own = sha256(JSON.stringify([identity, settings, isWeighted]));
    const solved = folder === undefined ? undefined : loadSolvedLayers(folder, index, own);
    if (solved !== undefined && solved.size > 0) {
      event(
        "resume",
        `${solved.size} of ${wanted.length} layers were solved before (candidate ${index + 1})`,
      );
    }
    const solveCandidate = () =>
      stoppable(
        signal,
        "go on with --resume, what is solved is kept",
        () =>
          solveModel(isWeighted ? byTime! : calibrated, {
            kernels,
            threads,
            solver: config.solver,
            settings,
            mode: config.calibrationMode,
            gridOf,
            solved,
            signal,
            keepsNonfinite: config.nonFinite === "keep",
            onWarning: (message) => index === 0 && event("warning", message),
            onLayer: (layer, done, of) => {
              if (folder !== undefined && solved?.has(layer.name) !== true) {
                saveSolvedLayer(folder, index, own, layer);
              }
              weightsDone += weightsOf(layer.name);
              onProgress?.(
                {
                  tensor: `${layer.name} (solving${candidates.length > 1 ? `, candidate ${index + 1}` : ""})`,
                  tensorsDone: index * of + done,
                  tensors: candidates.length * of,
                  weightsDone,
                  weights: allWeights,
                  bytesDone: weightsDone,
                  bytes: allWeights,
                  bytesResumed: 0,
                } satisfies Progress,
              );
            },
          }),
      );
    const problem = JSON.stringify([
      config.solver,
      config.calibrationMode,
      settings,
      isWeighted ? weights : undefined,
      wanted.map((name) => gridOf(name)),
    ]);
    let solution = known.get(problem);
    const begin = performance.now();
    try {
      if (solution === undefined) {
        const layers = await solveCandidate();
        const tensors = new Map([...layers].map(([name, { tensor }]) => [name, tensor]));
        const distance = data.heldOut.length > 0 ? heldOutDistance(calibrated, tensors) : NaN;
        solution = { layers, tensors, distance, milliseconds: performance.now() - begin };
        known.set(problem, solution);
      }
    } catch (error) {
      const isLast = index === candidates.length - 1 && best === undefined;
      if (!(error instanceof WeightsError) || isLast || candidates.length === 1) throw error;
      event("warning", `candidate ${index + 1} is left out: ${error.message}`);
      distances.push(NaN);
      continue;
    }
    milliseconds += solution.milliseconds;
    distances.push(solution.distance);
    const least = best?.solution.distance ?? NaN;
    if (best === undefined || solution.distance < least || Number.isNaN(least)) best = { solution, index };
  }
  const unit = calibrated.kind === "sequences" ? "KL at masked positions, nats" : "relative noise error";
  if (data.heldOut.length > 0) {
    event(
      "calibrate",
      `held out, ${unit}: ${
        distances.map((value) => Number.isNaN(value) ? "-" : value.toPrecision(3)).join(", ")
      }` +
        (distances.length > 1 ? `; candidate ${best!.index + 1} taken` : ""),
    );
  }
  const taken = candidates[best!.index]!;
  if (weights !== undefined) {
    event("calibrate", `weights by time (${weights.sampler}): ${taken.isWeighted ? "kept" : "rejected"}`);
  }
  if (solverSettings(config).annealing > 0 && config.solver === "best") {
    event("calibrate", `annealed codes: ${taken.settings.annealing > 0 ? "kept" : "rejected"}`);
  }
  const { layers, tensors } = best!.solution;
  return { layers, tensors, distances, chosen: best!.index, source: data.source, milliseconds };
}

/** An abort as the pipeline reports it. */
export async function stoppable<T>(
  signal: AbortSignal | undefined,
  remedy: string,
  run: () => Promise<T>,
): Promise<T> {
  try {
    return await run();
  } catch (error) {
    if (signal?.aborted !== true || error !== signal.reason) throw error;
    throw new InterruptedError(
      `Stopped by ${String(signal.reason)}: ${remedy}`,
      String(signal.reason),
    );
  }
}
