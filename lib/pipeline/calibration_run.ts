/** Calibration as a part of quantizing: data opened once when first needed, bits by plan or budget, and what to warn of. */
import type { Config } from "../config/mod.ts";
import type { Kernels } from "../native/mod.ts";
import { CALIBRATED_SOLVERS } from "../quant/solvers/solve_layer.ts";
import type { Checkpoint } from "../tensor/mod.ts";
import { type BitPlan, readPlan } from "../plan/budget.ts";
import {
  calibrationDigest,
  calibrationSource,
  hasBudget,
  isCalibrated,
  openCalibration,
  type SaveCalibration,
  wantsPhases,
} from "../calibration/source.ts";
import type { Calibrated } from "../calibration/mod.ts";
import { quote } from "../files/whole.ts";
import type { Plan } from "../plan/plan.ts";
import { type RunOptions, stoppable } from "../progress.ts";
import { planByBudget } from "../solve/sensitivity.ts";

/** What of a run's options calibration needs. */
export interface CalibrationRunOptions extends RunOptions {
  readonly config: Config;
  /** Undefined on a dry run that needs none. */
  readonly kernels?: Kernels | undefined;
  readonly dryRun?: boolean | undefined;
  readonly force?: boolean | undefined;
  readonly saveCalibration?: SaveCalibration | undefined;
}

/** Saved beside the weights when a budget or a plan chose the bits. */
export const PLAN_FILE = "arrowquant.plan.json";

/** The calibration data of a run: their digest, and the model with them, opened once when first needed. */
export async function calibrationOf(
  checkpoint: Checkpoint,
  options: CalibrationRunOptions,
  threads: number,
): Promise<{ readonly digest: string | undefined; open(): Promise<Calibrated> }> {
  const { config, kernels, dryRun = false, saveCalibration } = options;
  let opened: Promise<Calibrated> | undefined;
  const open = () => {
    if (kernels === undefined) {
      throw new TypeError("Cannot calibrate: a budget's plan needs kernels, got none");
    }
    return opened ??= openCalibration(
      checkpoint,
      config,
      kernels,
      threads,
      dryRun ? undefined : saveCalibration,
      options,
    );
  };
  if (!isCalibrated(config)) return { digest: undefined, open };
  return { digest: await calibrationDigest(calibrationSource(checkpoint, config)), open };
}

/** Bits by layer where a plan or a budget asks for them. */
export async function bitPlanOf(
  checkpoint: Checkpoint,
  { config, kernels, onEvent, onProgress, signal }: CalibrationRunOptions,
  open: () => Promise<Calibrated>,
  threads: number,
): Promise<BitPlan | undefined> {
  if (config.bitPlan !== null) {
    const known = [...checkpoint.tensors].filter(([, { info }]) => info.shape.length === 2).map(([name]) =>
      name
    );
    return readPlan(config.bitPlan, new Set(known));
  }
  if (!hasBudget(config)) return undefined;
  const calibrated = await open();
  return await stoppable(
    signal,
    "give the same command again; sensitivities are measured anew",
    () => planByBudget(checkpoint, calibrated, config, kernels!, threads, { onEvent, onProgress, signal }),
  );
}

/** What of a configuration and a bit plan has no effect or leaves layers out. */
export function calibrationWarnings(plan: Plan, config: Config, bitPlan: BitPlan | undefined): string[] {
  const warnings: string[] = [];
  if (config.calibrationData !== null && !isCalibrated(config)) {
    warnings.push(
      `calibration_data has no effect with solver ${config.solver}: ${
        CALIBRATED_SOLVERS.join(" and ")
      } calibrate`,
    );
  }
  const hasTime = wantsPhases(config) && config.enableTimeAware;
  const ofTime = {
    time_groups: config.timeGroups !== "equal",
    output_correction: config.outputCorrection,
    time_scales: config.timeScales !== "shared",
    sampler_correction: config.samplerCorrection,
  };
  for (const [key, isOn] of Object.entries(ofTime)) {
    if (!isOn || hasTime) continue;
    warnings.push(
      `${key} has no effect ${
        config.enableTimeAware
          ? "without a phase: thermodynamic enables them"
          : "where enable_time_aware is false"
      }`,
    );
  }
  const unplanned = bitPlan === undefined
    ? []
    : plan.rows.filter(({ action, name }) => action === "quantize" && !bitPlan.has(name));
  if (unplanned.length > 0) {
    warnings.push(
      `the plan leaves out ${unplanned.length} layers, the first ${
        quote(unplanned[0]!.name)
      }: they get bit_width ${config.bitWidth}`,
    );
  }
  return warnings;
}
