/** Codes of a row of the phase suite: what the pipeline chooses before the phases, with the time that it took. */
import type { Config } from "../../config/mod.ts";
import { CheckpointError } from "../../errors.ts";
import type { BitPlan } from "../../plan/budget.ts";
import { type KnownSolutions, solvePlan } from "../../solve/candidates.ts";
import type { PhaseContext } from "../../phases/context.ts";
import { planQuantization } from "../../plan/plan.ts";
import { planByBudget } from "../../solve/sensitivity.ts";
import { denseWeights } from "../../solve/solve_model.ts";
import { type GroupSize, type PackedTensor, quantize } from "../../quant/mod.ts";

/** How codes are chosen. */
export interface CodesSetting {
  readonly solver: "round" | "best";
  /** Samples count by the weight of their time's step, of the model's own schedule unless there is another. */
  readonly timeWeights?: "ddpm" | "ddim";
  readonly betaSchedule?: "linear" | "cosine";
  /** Temperature at which codes begin to be annealed. */
  readonly annealing?: number;
  /** Whether these two are held against doing without; otherwise they are taken whatever they do. */
  readonly isGuarded?: boolean;
  /** Settings that `best` tries; default: the run's. */
  readonly candidates?: number;
  /** Default: the run's. */
  readonly groupSize?: GroupSize;
  /** Bits and group sizes by budget. */
  readonly targetBitsPerWeight?: number;
}

/** Codes by a solver, with the seconds that they took. */
export interface Codes {
  /** The same object for settings that came to the same candidate. */
  readonly weights: ReadonlyMap<string, PackedTensor>;
  readonly seconds: number;
}

/** A configuration that chooses codes so. */
export function configOf(config: Config, setting: CodesSetting): Config {
  const { solver, timeWeights, betaSchedule, annealing = 0, isGuarded = false, groupSize } = setting;
  const hasTerms = timeWeights !== undefined || annealing > 0;
  const isAlone = hasTerms && !isGuarded, { thermodynamic, solverOptions } = config;
  const { candidates } = solverOptions;
  return {
    ...config,
    solver,
    groupSize: groupSize ?? config.groupSize,
    targetBitsPerWeight: setting.targetBitsPerWeight ?? null,
    solverOptions: { ...solverOptions, candidates: setting.candidates ?? (isAlone ? 1 : candidates) },
    thermodynamic: {
      ...thermodynamic,
      transitionOptimization: {
        ...thermodynamic.transitionOptimization,
        enabled: hasTerms,
        timeWeights: timeWeights ?? "none",
        betaSchedule: betaSchedule ?? "auto",
        entropyWeight: annealing,
      },
    },
  };
}

/**
 * Codes of a setting.
 *
 * @param known candidates that other settings have solved
 * @throws {CheckpointError} when there is nothing to quantize
 */
export async function codesOf(
  context: PhaseContext,
  given: Config,
  setting: CodesSetting,
  known: KnownSolutions,
): Promise<Codes> {
  const { checkpoint, calibrated, kernels, signal } = context;
  const config = configOf(given, setting);
  const begin = performance.now();
  const bitPlan: BitPlan | undefined = config.targetBitsPerWeight === null
    ? undefined
    : await planByBudget(checkpoint, calibrated, config, kernels, { signal });
  const plan = planQuantization(checkpoint, config, bitPlan);
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
  const planSeconds = (performance.now() - begin) / 1000;
  if (config.solver === "best") {
    const solved = await solvePlan(
      calibrated,
      plan,
      config,
      kernels,
      undefined,
      "",
      { signal },
      known,
    );
    return {
      weights: solved.tensors,
      seconds: planSeconds + solved.milliseconds / 1000,
    };
  }
  const weights = new Map(rows.map(({ name, shape, bits, groupSize, zeroPoint, scaleBits }) => {
    const [height, width] = shape as [number, number];
    const data = denseWeights(kernels, layers.get(name)!);
    return [
      name,
      quantize(kernels, { data, dtype: "F32" }, height, width, {
        bits: bits!,
        groupSize: groupSize!,
        zeroPoint: zeroPoint!,
        scaleBits,
        solver: "round",
      }),
    ];
  }));
  return { weights, seconds: (performance.now() - begin) / 1000 };
}
