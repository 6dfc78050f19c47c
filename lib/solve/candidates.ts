/**
 * Solving a checkpoint's layers on calibration data, as a step of the pipeline: candidates are solved one
 * after the other, and the one with the smallest held-out distance is taken. Solved layers are kept on disk,
 * so that a stopped run can be resumed.
 */
import { DEFAULT_SOLVER_SETTINGS, type SolverSettings } from "../quant/solvers/settings.ts";
import { type Config, type ConfigInForce, wantsPhases } from "../config/mod.ts";
import { CALIBRATED_SOLVERS } from "../config/names.ts";
import { WeightsError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import type { PackedTensor } from "../quant/mod.ts";
import type { WeightFormat } from "../quant/packed/layout.ts";
import type { Solvable } from "../calibration/statistics/alone.ts";
import { sha256 } from "../files/whole.ts";
import { formatOf, isTokenTable, type Plan, type PlanRow } from "../plan/plan.ts";
import { listing } from "../tensor/mod.ts";
import { type RunEvent, type RunOptions, stoppable } from "../progress.ts";
import { HELD_OUT_METRICS, HeldOutMeter } from "../calibration/held_out.ts";
import { isRounded, quantizedByWeights, weightSolver } from "./by_weights.ts";
import { type SolvedOnDemand, solveModel, solveOnDemand, type SolveOptions } from "./solve_model.ts";
import { Team, type TeamPlace } from "./team.ts";
import { loadSolvedLayers, saveSolvedLayer, type SolvedLayer } from "./solved_layers.ts";
import { type TimeWeightSettings, withTimeWeights } from "../calibration/time_weights.ts";

/** Settings of the solver; annealing belongs to phase 3. */
export function solverSettings({ solverOptions, thermodynamic }: Config): SolverSettings {
  const { candidates: _, ...own } = solverOptions;
  const { enabled, entropyWeight } = thermodynamic.transitionOptimization;
  return {
    ...DEFAULT_SOLVER_SETTINGS,
    ...own,
    annealing: enabled ? entropyWeight : 0,
  };
}

/** Phase 3's weights by time. By default only image models have them; docs/solvers.md has why. */
function timeWeightSettings(
  { thermodynamic }: Config,
  { kind, data: { scheduler } }: Pick<Solvable, "kind" | "data">,
): TimeWeightSettings | undefined {
  const { enabled, timeWeights, betaSchedule } = thermodynamic.transitionOptimization;
  const isDrawn = kind === "images" || kind === "layers" && scheduler !== undefined;
  const sampler = timeWeights !== "auto" ? timeWeights : isDrawn ? "ddpm" : "none";
  return enabled && sampler !== "none" ? { sampler, schedule: betaSchedule } : undefined;
}

/** Message of a stopped run of several minutes. */
export const KEPT = "go on with --resume, what is solved is kept";

/** Time after which a layer that is solved says how far it is. */
const STEP_MILLISECONDS = 1000;

/** One way to solve a model. */
interface Candidate {
  readonly settings: SolverSettings;
  /** Samples count by the weights of their times. */
  readonly isWeighted: boolean;
}

/** Weights of layers above which a second candidate takes longer than it is worth. */
const MANY_WEIGHTS = 2 ** 26;

/**
 * The configured settings and the alternatives that are tried. Phase 3's terms are compared with solving
 * without them, unless one candidate is asked for; which of the others is best differs from model to model.
 */
function candidatesOf(calibrated: Solvable, config: ConfigInForce): Candidate[] {
  const { kind, model } = calibrated, { solver, solverOptions: { effort } } = config;
  const weights = model.stages.reduce(
    (sum, { layers }) => layers.reduce((own, { weights: { rows, cols } }) => own + rows * cols, sum),
    0,
  );
  const isOne = effort === "low" || effort === "medium" && weights > MANY_WEIGHTS;
  const candidates = config.solverOptions.candidates ?? (isOne ? 1 : 2);
  const settings = solverSettings(config), isWeighted = timeWeightSettings(config, calibrated) !== undefined;
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

/** How many candidates are solved: one where nothing is held out to choose by. */
export const candidateCount = (calibrated: Solvable, config: ConfigInForce): number =>
  calibrated.data.heldOut.length === 0 ? 1 : candidatesOf(calibrated, config).length;

/** Whether layers are solved as they are written: from statistics alone, unless phases need all before. */
export const solvesOnDemand = ({ data: { fit } }: Solvable, config: ConfigInForce): boolean =>
  CALIBRATED_SOLVERS.includes(config.solver) && fit.length === 0 && !wantsPhases(config);

/** A solved model. */
export interface SolvedModel {
  readonly layers: ReadonlyMap<string, SolvedLayer>;
  /** Their tensors and those of packed tables; one object a candidate of {@linkcode KnownSolutions}. */
  readonly tensors: ReadonlyMap<string, PackedTensor>;
  /** Held-out distance of each candidate, NaN where nothing was held out or it failed. */
  readonly distances: readonly number[];
  /** Index of the taken candidate. */
  readonly chosen: number;
  readonly source: string;
  /** Time of solving and measuring all candidates, also of those that were known. */
  readonly milliseconds: number;
}

/** A solved candidate. */
export interface KnownSolution {
  readonly layers: ReadonlyMap<string, SolvedLayer>;
  readonly tensors: ReadonlyMap<string, PackedTensor>;
  /** Held-out. */
  readonly distance: number;
  readonly milliseconds: number;
}

/** Candidates solved before on the same model and calibration data, by the text of their problem. */
export type KnownSolutions = Map<string, KnownSolution>;

/** A plan to solve. */
export interface SolveTask {
  readonly calibrated: Solvable;
  readonly plan: Plan;
  /** Names of the tensors that are this task's; default all. With fewer nothing is measured. */
  readonly only?: ReadonlySet<string> | undefined;
  /** Tasks that solve the model together: the data are this one's samples, `only` is what it writes. */
  readonly team?: TeamPlace | undefined;
  readonly config: ConfigInForce;
  readonly kernels: Kernels;
  /** Bytes that the process may take; any by default. */
  readonly memoryBytes?: number | undefined;
  /** Bytes of states between stages that stay in memory; what is more goes to the folder. Any by default. */
  readonly statesBytes?: number | undefined;
  /** Where solved layers are kept until the run is finished; undefined keeps none. */
  readonly folder?: string | undefined;
  /** Of the run: layers that another one left in the folder are not taken. */
  readonly identity?: string | undefined;
  /** Candidates that need not be solved again; those that are solved are added. */
  readonly known?: KnownSolutions | undefined;
}

/** Solves the layers of a plan. @throws {InterruptedError} when stopped; solved layers are kept */
export async function solvePlan(task: SolveTask, options: RunOptions): Promise<SolvedModel> {
  const { calibrated, config, known = new Map() } = task, { onEvent } = options;
  const event = (kind: RunEvent["kind"], message: string) => onEvent?.({ kind, message });
  const candidates = candidatesOf(calibrated, config);
  reportData(calibrated, candidates, event);
  const solver = new CandidateSolver(task, candidates.length, options);
  let milliseconds = 0, best: { readonly solution: KnownSolution; readonly index: number } | undefined;
  const distances: number[] = [];
  for (const [index, candidate] of candidates.entries()) {
    const problem = solver.problemOf(candidate);
    let solution = known.get(problem);
    try {
      if (solution === undefined) known.set(problem, solution = await solver.solve(candidate, index));
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
  const { solution: { layers, tensors }, index: chosen } = best!;
  reportChoice(calibrated, config, { distances, chosen, taken: candidates[chosen]! }, event);
  return { layers, tensors, distances, chosen, source: calibrated.data.source, milliseconds };
}

/**
 * The layers of a plan, solved from statistics alone when they are asked for: nothing is held out, so that
 * there is one candidate, and no layer waits for another.
 */
export function solvePlanOnDemand(task: SolveTask, options: RunOptions): SolvedOnDemand {
  const { calibrated, config } = task, candidates = candidatesOf(calibrated, config);
  const event = (kind: RunEvent["kind"], message: string) => options.onEvent?.({ kind, message });
  reportData(calibrated, candidates, event);
  const [taken] = candidates as [Candidate];
  reportChoice(calibrated, config, { distances: [NaN], chosen: 0, taken }, event);
  return new CandidateSolver(task, 1, options).onDemand(taken);
}

type Report = (kind: RunEvent["kind"], message: string) => void;

/** Reports the calibration data; where nothing is held out, one candidate is left. */
function reportData({ data }: Solvable, candidates: Candidate[], event: Report): void {
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
}

/** Reports the candidates' held-out distances, and whether phase 3's terms were kept. */
function reportChoice(
  calibrated: Solvable,
  config: Config,
  { distances, chosen, taken }: {
    readonly distances: readonly number[];
    readonly chosen: number;
    readonly taken: Candidate;
  },
  event: Report,
): void {
  const { kind, data } = calibrated;
  if (data.heldOut.length > 0 && kind !== "layers" && !distances.every(Number.isNaN)) {
    const values = distances.map((value) => Number.isNaN(value) ? "-" : value.toPrecision(3)).join(", ");
    event(
      "calibrate",
      `held out, ${HELD_OUT_METRICS[kind]}: ${values}${
        distances.length > 1 ? `; candidate ${chosen + 1} taken` : ""
      }`,
    );
  }
  const weights = timeWeightSettings(config, calibrated);
  if (weights !== undefined) {
    event("calibrate", `weights by time (${weights.sampler}): ${taken.isWeighted ? "kept" : "rejected"}`);
  }
  if (solverSettings(config).annealing > 0 && config.solver === "best") {
    event("calibrate", `annealed codes: ${taken.settings.annealing > 0 ? "kept" : "rejected"}`);
  }
}

/** Solves the candidates of one plan. */
class CandidateSolver {
  readonly #task: SolveTask;
  readonly #count: number;
  readonly #options: RunOptions;
  readonly #rows: ReadonlyMap<string, PlanRow>;
  /** Names of the layers that can be solved. */
  readonly #solvable: readonly string[];
  /** Those of them that are this task's. */
  readonly #wanted: readonly string[];
  /** The others' packed forms, once they are needed. */
  #fixed: ReadonlyMap<string, PackedTensor> | undefined;
  readonly #weights: TimeWeightSettings | undefined;
  readonly #byTime: Solvable | undefined;
  #weightsDone = 0;
  #work = 0;
  #shown = performance.now();
  #solved: readonly [done: number, of: number];
  /** Undefined where nothing runs. */
  readonly #heldOut: HeldOutMeter | undefined;

  constructor(task: SolveTask, count: number, options: RunOptions) {
    const { calibrated, plan, config } = task;
    [this.#task, this.#count, this.#options] = [task, count, options];
    this.#rows = new Map(
      plan.rows.filter(({ action }) => action === "quantize").map((row) => [row.name, row]),
    );
    const solvable = new Set(calibrated.model.stages.flatMap(({ layers }) => layers.map(({ name }) => name)));
    const solved = [...this.#rows.values()].filter((row) => !isTokenTable(row) && !isRounded(config, row));
    const isOwn = ({ name }: PlanRow) => task.team !== undefined || (task.only?.has(name) ?? true);
    const inModel = solved.filter(({ name }) => solvable.has(name));
    this.#solvable = inModel.map(({ name }) => name);
    this.#wanted = inModel.filter(isOwn).map(({ name }) => name);
    this.#reportOthers(solved.filter((row) => !solvable.has(row.name) && isOwn(row)));
    this.#solved = [0, this.#wanted.length];
    this.#weights = timeWeightSettings(config, calibrated);
    this.#byTime = this.#weights && withTimeWeights(calibrated, this.#weights);
    if (calibrated.kind === "layers") return;
    this.#heldOut = new HeldOutMeter(calibrated, {
      signal: options.signal,
      onShare: (share) => this.#measured(share),
    });
  }

  #event(kind: RunEvent["kind"], message: string): void {
    this.#options.onEvent?.({ kind, message });
  }

  /** Says which rows are quantized by their weights alone, and how. */
  #reportOthers(rows: readonly PlanRow[]): void {
    const { calibrated: { kind }, config } = this.#task;
    const how = (row: PlanRow) => weightSolver(config, row) === "clip" ? "clip search" : "rounded";
    if (kind !== "layers") {
      for (const row of rows) {
        this.#event("warning", `${row.name} is no linear layer: ${how(row)} without its inputs`);
      }
      return;
    }
    for (const [solver, own] of Map.groupBy(rows, how)) {
      const names = listing(own.map(({ name }) => name)), { length } = own;
      this.#event(
        "warning",
        `${length} of ${this.#rows.size} layers have no statistics: ${solver} (${names})`,
      );
    }
  }

  /** Text of everything that a candidate's solution depends on, beside model and data. */
  problemOf({ settings, isWeighted }: Candidate): string {
    const { solver, calibrationMode } = this.#task.config;
    const grids = [...this.#rows.keys()].map((name) => this.#formOf(name));
    return JSON.stringify([solver, calibrationMode, settings, isWeighted ? this.#weights : undefined, grids]);
  }

  async solve(candidate: Candidate, index: number): Promise<KnownSolution> {
    const { calibrated } = this.#task, begin = performance.now();
    return await stoppable(this.#options.signal, KEPT, async () => {
      const layers = await this.#solveLayers(candidate, index);
      const tensors = new Map([
        ...this.#byWeights(),
        ...[...layers].map(([name, { tensor }]) => [name, tensor] as const),
      ]);
      const isMeasured = calibrated.data.heldOut.length > 0 && this.#task.only === undefined;
      if (isMeasured) this.#event("stage", "held-out distance");
      const distance = isMeasured ? await this.#heldOut!.distance(tensors) : NaN;
      return { layers, tensors, distance, milliseconds: performance.now() - begin };
    });
  }

  #solveLayers({ settings, isWeighted }: Candidate, index: number): Promise<Map<string, SolvedLayer>> {
    const { calibrated, team, identity = "" } = this.#task;
    const folder = team?.folder ?? this.#task.folder;
    const own = sha256(JSON.stringify([identity, settings, isWeighted]));
    const solved = folder === undefined ? undefined : loadSolvedLayers(folder, index, own);
    if (solved !== undefined && solved.size > 0) {
      const counts = `${solved.size} of ${this.#wanted.length}`;
      this.#event("resume", `${counts} layers were solved before (candidate ${index + 1})`);
    }
    return solveModel(isWeighted ? this.#byTime! : calibrated, {
      ...this.#optionsOf(settings, index),
      only: team === undefined ? this.#task.only : undefined,
      team: team && new Team(team, index, own, this.#options),
      fixed: this.#byWeights(),
      solved,
      kept: { memoryBytes: this.#task.statesBytes, folder: this.#task.folder },
      onLayer: (layer, done, of, isNew) => {
        if (folder !== undefined && isNew) {
          saveSolvedLayer(folder, index, own, layer);
        }
        this.#work += this.#workOf(layer.name);
        this.#weightsDone += this.#weightsOf(layer.name);
        this.#solved = [done, of];
        this.#progress(layer.name, "solving", index);
        this.#reportLayer(layer, index);
      },
      onStep: (name, doing, share) => {
        if (performance.now() - this.#shown > STEP_MILLISECONDS) this.#progress(name, doing, index, share);
      },
    });
  }

  /** As {@linkcode solvePlanOnDemand}. */
  onDemand({ settings, isWeighted }: Candidate): SolvedOnDemand {
    const { calibrated, only } = this.#task;
    return solveOnDemand(isWeighted ? this.#byTime! : calibrated, {
      ...this.#optionsOf(settings, 0),
      only,
      onLayer: (layer) => this.#reportLayer(layer, 0),
    });
  }

  /** Options of solving that do not depend on where layers go. */
  #optionsOf(settings: SolverSettings, index: number): SolveOptions {
    const { config, kernels, memoryBytes } = this.#task, solvable = new Set(this.#solvable);
    return {
      ...{ kernels, settings, memoryBytes, solver: config.solver, mode: config.calibrationMode },
      gridOf: (name) => solvable.has(name) ? this.#formOf(name) : undefined,
      signal: this.#options.signal,
      keepsNonfinite: config.nonFinite === "keep",
      onWarning: (message) => index === 0 && this.#event("warning", message),
      onMoments: (message) => index === 0 && this.#event("calibrate", message),
    };
  }

  #reportLayer({ name, tensor: { bits }, relativeError: error }: SolvedLayer, index: number): void {
    const message = `${name}: solved to ${bits} bits, relative output error ${error.toPrecision(3)}`;
    const data = { stage: "solving", candidate: index + 1, name, bits, error };
    this.#options.onEvent?.({ kind: "layer", message, data });
  }

  #progress(name: string, doing: string, index: number, tensorShare?: number): void {
    const count = this.#count, [done, of] = this.#solved;
    const all = (each: (name: string) => number) =>
      count * this.#wanted.reduce((sum, own) => sum + each(own), 0);
    this.#shown = performance.now();
    // Reading inputs is a part of a stage, not of a layer.
    const share = doing === "solving" ? tensorShare ?? 0 : 0;
    this.#options.onProgress?.({
      stage: "solving",
      parts: "layers",
      tensor: `${name} (${doing}${count > 1 ? `, candidate ${index + 1}` : ""})`,
      tensorShare,
      tensorsDone: index * of + done,
      tensors: count * of,
      weightsDone: this.#weightsDone + share * this.#weightsOf(name),
      weights: all((own) => this.#weightsOf(own)),
      bytesDone: this.#work + share * this.#workOf(name),
      bytes: all((own) => this.#workOf(own)),
      bytesResumed: 0,
    });
  }

  #measured(share: number): void {
    this.#options.onProgress?.({
      stage: "held-out distance",
      parts: "steps",
      tensor: "",
      tensorsDone: Math.floor(share * 100),
      tensors: 100,
      weightsDone: 0,
      weights: 0,
      bytesDone: share,
      bytes: 1,
      bytesResumed: 0,
    });
  }

  /** A layer's time is about as its rows and the square of its columns. */
  #workOf(name: string): number {
    return this.#weightsOf(name) * this.#rows.get(name)!.shape[1]!;
  }

  #weightsOf(name: string): number {
    return this.#rows.get(name)!.shape.reduce((product, size) => product * size, 1);
  }

  #byWeights(): ReadonlyMap<string, PackedTensor> {
    const { calibrated, config, kernels, only, team } = this.#task;
    if (only !== undefined && team === undefined) return new Map(); // nothing reads them in a model that is not whole
    const others = [...this.#rows.values()].filter(({ name }) => !this.#solvable.includes(name));
    return this.#fixed ??= quantizedByWeights(calibrated.model, others, config, kernels);
  }

  #formOf(name: string): WeightFormat {
    return formatOf(this.#rows.get(name)!);
  }
}
