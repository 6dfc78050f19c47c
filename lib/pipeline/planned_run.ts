/** Which tensors of a run are quantized, and to how many bits: by names and shapes, or by a budget. */
import { type Config, hasBudget, isCalibrated } from "../config/mod.ts";
import type { Kernels } from "../native/mod.ts";
import type { Rewrite } from "../output/rewrite.ts";
import type { BitPlan } from "../plan/budget.ts";
import { checkPlan, type Plan, planQuantization } from "../plan/plan.ts";
import { stoppable } from "../progress.ts";
import { KEPT } from "../solve/candidates.ts";
import { MeasuredLayers } from "../solve/measured_layers.ts";
import { budgetBytes, isChosen, planByBudget } from "../solve/sensitivity.ts";
import { type Beside, filesBeside } from "./beside.ts";
import { configuredPlan } from "./choose_solver.ts";
import { announce } from "./forecast/announce.ts";
import { checkDivisible, dividePlan, shardSummary } from "./sharded_run.ts";
import type { QuantizeRun } from "./open_run.ts";

/** The plan of a run. */
export interface PlannedRun {
  /** The tensors of this run: of a shard its own. */
  readonly plan: Plan;
  /** All tensors of the checkpoint. */
  readonly whole: Plan;
  /** Undefined where neither a plan nor a budget chooses the bits. */
  readonly bitPlan: BitPlan | undefined;
  readonly beside: Beside;
}

/** Whether a budget chooses the bits. */
export const measuresBits = (config: Config): boolean => config.bitPlan === null && hasBudget(config);

/**
 * Plan: which tensors are quantized, and to how many bits. With a budget it calibrates.
 *
 * @param output keeps what a budget measures, for a run that is stopped
 * @throws {CheckpointError} when names leave no room for those of packed parts
 * @throws {CalibrationError} when calibration data are needed and there are none, or no plan fits the budget
 */
export async function planRun(
  run: QuantizeRun<Kernels | undefined>,
  output?: Rewrite,
): Promise<PlannedRun> {
  const first = await firstPlan(run);
  if (!measuresBits(run.config)) return first;
  const bitPlan = await planOfBudget(run, output);
  const plan = planQuantization(run.checkpoint, run.config, bitPlan);
  return { ...first, bitPlan, plan, whole: plan };
}

/** The part of a plan that a run does: all of it, or its shard's. @throws as {@linkcode checkDivisible} */
function shardPlan(
  { checkpoint, config, options: { shard, togetherMilliseconds, onEvent } }: QuantizeRun<Kernels | undefined>,
  whole: Plan,
): Plan {
  if (shard === undefined) return whole;
  checkDivisible(checkpoint, config, whole, togetherMilliseconds !== undefined);
  const divided = dividePlan(whole, config, shard.count);
  onEvent?.({ kind: "shard", ...shardSummary(shard, divided) });
  return { rows: divided.shards[shard.index - 1]!, warnings: whole.warnings };
}

/** What is known of the plan before a budget has measured anything. @throws as {@linkcode planRun} */
export async function firstPlan(run: QuantizeRun<Kernels | undefined>): Promise<PlannedRun> {
  const { checkpoint, config, calibration, options } = run;
  if (isCalibrated(config)) await calibration.digest(); // an error at once where data are missing
  const bitPlan = configuredPlan(checkpoint, config);
  const whole = planQuantization(checkpoint, config, bitPlan);
  checkPlan(whole, checkpoint);
  if (measuresBits(config)) budgetBytes(whole.rows, config);
  return { plan: shardPlan(run, whole), whole, bitPlan, beside: filesBeside(checkpoint, options) };
}

/** Bits by layer of a budget: measured, or those of an output that is complete. */
async function planOfBudget(
  { checkpoint, config, kernels, calibration, options }: QuantizeRun<Kernels | undefined>,
  output: Rewrite | undefined,
): Promise<BitPlan> {
  if (output?.manifest !== undefined) {
    return new Map(
      output.manifest.layers.flatMap(({ name, bits, groupSize, zeroPoint }) =>
        bits === undefined ? [] : [[name, { bits, groupSize: groupSize!, zeroPoint: zeroPoint! }] as const]
      ),
    );
  }
  const calibrated = await calibration.open(output), { memory } = calibration;
  const { rows } = planQuantization(checkpoint, config), folder = output?.work;
  const kept = output && new MeasuredLayers(output.work, JSON.stringify(output.identity));
  const known = kept?.layers.size ?? 0, of = rows.filter(isChosen).length;
  if (known > 0) {
    const message = `sensitivities of ${known} of ${of} layers were measured before`;
    options.onEvent?.({ kind: "resume", message });
  }
  return await stoppable(
    options.signal,
    output === undefined ? "give the same command again; sensitivities are measured anew" : KEPT,
    () => {
      const measuredShare = known / Math.max(1, of);
      announce(
        { checkpoint, config, kernels: kernels!, memory, folder, options, measuredShare },
        calibrated,
        rows,
      );
      return planByBudget(checkpoint, calibrated, config, kernels!, { ...options, kept });
    },
  );
}
