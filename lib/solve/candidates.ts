/**
 * Solving a checkpoint's layers on calibration data, as a step of the pipeline: candidates are solved one after the other, the one with the
 * smallest held-out distance is taken, and what is solved is kept on disk, so that a run that was stopped goes on.
 */
import { DEFAULT_SOLVER_SETTINGS, type SolverSettings } from "../quant/solvers/settings.ts";
import type { Config } from "../config/mod.ts";
import { WeightsError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import type { PackedTensor } from "../quant/mod.ts";
import type { Calibrated } from "../calibration/mod.ts";
import { sha256 } from "../files/whole.ts";
import type { Plan } from "../plan/plan.ts";
import { type Progress, type RunEvent, type RunOptions, stoppable } from "../progress.ts";
import { heldOutDistance } from "../calibration/held_out.ts";
import { type SolvedLayer, solveModel } from "./solve_model.ts";
import { loadSolvedLayers, saveSolvedLayer } from "./solved_layers.ts";
import { type TimeWeightSettings, withTimeWeights } from "../calibration/time_weights.ts";

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

/** Weights by time that a configuration asks for: phase 3's. Without being named they are image models' alone; docs/solvers.md has why. */
export function timeWeightSettings(
  { thermodynamic }: Config,
  kind: Calibrated["kind"],
): TimeWeightSettings | undefined {
  const { enabled, timeWeights, betaSchedule } = thermodynamic.transitionOptimization;
  const sampler = timeWeights !== "auto" ? timeWeights : kind === "images" ? "ddpm" : "none";
  return enabled && sampler !== "none" ? { sampler, schedule: betaSchedule } : undefined;
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
  const settings = solverSettings(config), isWeighted = timeWeightSettings(config, kind) !== undefined;
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
  const weights = timeWeightSettings(config, calibrated.kind);
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
