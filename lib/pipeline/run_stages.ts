/** The stages of a run between its plan and its files: calibrate, solve, phases. They hand values on. */
import { type Solvable, thatRuns } from "../calibration/statistics/alone.ts";
import type { OwnSampleWork } from "../calibration/own_samples.ts";
import { wantsPhases } from "../config/mod.ts";
import { CALIBRATED_SOLVERS } from "../config/names.ts";
import { sha256 } from "../files/whole.ts";
import type { Rewrite } from "../output/rewrite.ts";
import { runConfiguredPhases } from "../phases/configured.ts";
import type { PhaseResult } from "../phases/mod.ts";
import type { Plan } from "../plan/plan.ts";
import { stoppable } from "../progress.ts";
import {
  KEPT,
  type KnownSolutions,
  type SolvedModel,
  solvePlan,
  solvePlanOnDemand,
  solvesOnDemand,
} from "../solve/candidates.ts";
import type { SolvedOnDemand } from "../solve/solve_model.ts";
import { isRounded } from "../solve/by_weights.ts";
import { GRADIENT_SHARE } from "./forecast/memory_shares.ts";
import { announce } from "./forecast/announce.ts";
import type { QuantizeRun } from "./open_run.ts";
import { measuresBits, type PlannedRun } from "./planned_run.ts";
import type { TeamOfRun } from "./sharded_run.ts";

const quantizedRows = ({ rows }: Plan) => rows.filter(({ action }) => action === "quantize");

/**
 * Calibrate: the model with its calibration data, undefined where neither solver nor phases need them.
 *
 * @param output what an earlier run has finished needs no calibration
 * @throws {CalibrationError} when data cannot be used
 */
export async function calibrateRun(
  run: QuantizeRun,
  { plan, whole, bitPlan }: PlannedRun,
  output?: Rewrite,
): Promise<Solvable | undefined> {
  const { checkpoint, config, kernels, calibration, options } = run, { onEvent } = options;
  if (output?.isComplete) return undefined;
  // Others need this task's samples whatever it writes.
  const rows = quantizedRows(options.togetherMilliseconds === undefined ? plan : whole);
  if (wantsPhases(config) && rows.length === 0) {
    onEvent?.({ kind: "warning", message: "the phases have nothing to do: no layer is quantized" });
    return undefined;
  }
  const isSolved = CALIBRATED_SOLVERS.includes(config.solver) &&
    rows.some((row) => !isRounded(config, row) && !output?.isDone(row.name));
  if (!isSolved && !wantsPhases(config)) return undefined;
  const { memory } = calibration;
  const say = (data: Solvable, ownSamples?: OwnSampleWork) =>
    announce(
      {
        ...{ checkpoint, config, kernels, memory, folder: output?.work, options },
        isTogether: options.togetherMilliseconds !== undefined,
      },
      data,
      plan.rows,
      ownSamples,
    );
  const calibrated = await calibration.open(output, say);
  if (bitPlan === undefined || !measuresBits(config)) {
    await stoppable(options.signal, KEPT, () => say(calibrated));
  }
  return calibrated;
}

/**
 * Solve: codes on calibration data, undefined where the solver looks at weights alone.
 *
 * @param output keeps what is solved, for a run that is stopped
 * @param known candidates that need not be solved again; those that are solved are added
 */
export async function solveRun(
  { config, kernels, calibration, memoryBytes, options }: QuantizeRun,
  { plan, whole }: PlannedRun,
  calibrated: Solvable | undefined,
  { output, known, team }: {
    readonly output?: Rewrite | undefined;
    readonly known?: KnownSolutions;
    readonly team?: TeamOfRun | undefined;
  } = {},
): Promise<SolvedModel | undefined> {
  if (calibrated === undefined || !CALIBRATED_SOLVERS.includes(config.solver)) return undefined;
  const identity = team?.identity ?? (output === undefined ? "" : JSON.stringify(output.identity));
  const only = options.shard && new Set(plan.rows.map(({ name }) => name));
  return await solvePlan(
    {
      ...{
        calibrated,
        plan: whole,
        only,
        team,
        config,
        kernels,
        memoryBytes,
        folder: output?.work,
        identity,
        known,
      },
      statesBytes: calibration.memory.statesBytes,
    },
    options,
  );
}

/**
 * Solve while writing: layers solved as they are written, undefined where a run or its phases need all of
 * them before. The weights are read for both at once, and no packed model is held or kept.
 */
export function solveWhileWriting(
  { config, kernels, memoryBytes, options }: QuantizeRun,
  { plan, whole }: PlannedRun,
  calibrated: Solvable | undefined,
): SolvedOnDemand | undefined {
  if (calibrated === undefined || !solvesOnDemand(calibrated, config)) return undefined;
  const only = options.shard && new Set(plan.rows.map(({ name }) => name));
  return solvePlanOnDemand({ calibrated, plan: whole, only, config, kernels, memoryBytes }, options);
}

/** Phases: what the configuration asks for on those codes, undefined where it asks for none. */
export async function phasesRun(
  { checkpoint, config, kernels, calibration: { memory }, memoryBytes, options }: QuantizeRun,
  { plan }: PlannedRun,
  calibrated: Solvable | undefined,
  solved: SolvedModel | undefined,
  output?: Rewrite,
): Promise<PhaseResult | undefined> {
  if (calibrated === undefined || !wantsPhases(config)) return undefined;
  const { validation, boundarySmoothing } = config.thermodynamic;
  if (calibrated.kind === "layers" && !validation.enabled && !boundarySmoothing.enabled) {
    const message =
      "phase 3 solves codes with its weights by time and annealing; refinement needs a model that runs here";
    options.onEvent?.({ kind: "warning", message });
    return undefined;
  }
  const phases = {
    checkpoint,
    calibrated: thatRuns(calibrated, "run the phases"),
    plan,
    config,
    kernels,
    held: memory.held,
    gradientBytes: GRADIENT_SHARE * memoryBytes,
    place: output && { folder: output.work, identity: sha256(JSON.stringify(output.identity)) },
    solved: solved?.layers,
  };
  return await stoppable(options.signal, KEPT, () => runConfiguredPhases(phases, options));
}
