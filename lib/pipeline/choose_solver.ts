/** The solver of a run: the configured one, or what `auto` chooses for a model and its bits. */
import { type Config, type ConfigInForce, hasBudget, isInForce, withPhaseSolver } from "../config/mod.ts";
import { hasStatistics } from "../calibration/source.ts";
import { knownSchedule } from "../calibration/mod.ts";
import { runLimits } from "../models/mod.ts";
import { schedulerFile } from "../models/schedulers.ts";
import { type BitPlan, readPlan } from "../plan/budget.ts";
import { isTokenTable, planQuantization } from "../plan/plan.ts";
import { hasEightBits } from "../solve/by_weights.ts";
import type { Checkpoint } from "../tensor/mod.ts";

/**
 * The weight-only solver that loses less, measured on both reference models (docs/solvers.md): clip search
 * for language models, rounding for image models and for what is unknown, which it harms least.
 */
function solverByWeights({ kind, config }: Checkpoint): "round" | "clip" {
  if (kind !== "unknown" && kind !== "dit") return "clip";
  const isLanguage = kind === "unknown" && typeof config?.["model_type"] === "string" &&
    config["_class_name"] === undefined;
  return isLanguage ? "clip" : "round";
}

/** Whether images can be noised, and drawn, as the model was trained. */
function hasSchedule({ folder }: Checkpoint): boolean {
  return knownSchedule(folder) !== undefined;
}

/** The plan that a configuration names, if it names one. @throws as {@linkcode readPlan} */
export function configuredPlan({ tensors }: Checkpoint, { bitPlan }: Config): BitPlan | undefined {
  if (bitPlan === null) return undefined;
  const matrices = [...tensors].filter(([, { info }]) => info.shape.length === 2);
  return readPlan(bitPlan, new Set(matrices.map(([name]) => name)));
}

/**
 * The configuration in force for a checkpoint: phase 3 has a calibrated solver, and `auto` is chosen. 8 bits
 * are rounded; fewer are solved by `best` where the model can run here, otherwise by its weights alone.
 *
 * @throws as {@linkcode configuredPlan}
 */
export function chooseSolver(checkpoint: Checkpoint, config: Config): ConfigInForce {
  const given = withPhaseSolver(config);
  if (config.solver !== "auto" && isInForce(given)) return given;
  const byWeights = solverByWeights(checkpoint);
  const chosen = (solver: ConfigInForce["solver"], why: string, roundsEight = true): ConfigInForce => ({
    ...config,
    solver,
    chosen: { byWeights, roundsEight, why },
  });
  if (isInForce(given)) return chosen(given.solver, "phase 3 needs a calibrated solver", false);
  if (hasBudget(config)) return chosen("best", "a budget calibrates");
  const rows = planQuantization(checkpoint, config, configuredPlan(checkpoint, config)).rows
    .filter(({ action }) => action === "quantize");
  const layers = rows.filter((row) => !isTokenTable(row));
  if (layers.every(hasEightBits)) {
    return chosen(layers.length === rows.length ? "round" : byWeights, "no layer has fewer than 8 bits");
  }
  if (config.minAccuracy > 0) return chosen(byWeights, "min_accuracy compares weights");
  const limits = runLimits(checkpoint);
  if (hasStatistics(config)) return chosen("best", "fewer than 8 bits, and there are statistics");
  if (limits !== undefined) return chosen(byWeights, "the model cannot run here");
  if (checkpoint.kind === "dit" && !hasSchedule(checkpoint)) {
    return chosen(
      byWeights,
      schedulerFile(checkpoint.folder) === undefined
        ? "the model cannot be calibrated without a noise schedule: copy scheduler_config.json of the " +
          "pipeline's folder scheduler beside the weights"
        : "the model cannot be calibrated: its noise schedule is not supported",
    );
  }
  return chosen("best", "fewer than 8 bits, and the model runs here");
}

/** What a run says of its solver where that is not the configured one; undefined where it is. */
export function choiceText(given: Config, { solver, chosen }: ConfigInForce): string | undefined {
  if (chosen !== undefined) return `${solver} (${chosen.why})`;
  return solver === given.solver
    ? undefined
    : `${solver} in place of ${given.solver} (phase 3 needs a calibrated solver)`;
}
