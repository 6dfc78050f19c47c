/** Calibration within a run: data opened once when first needed, bits by plan or budget, and warnings. */
import {
  calibrationDigest,
  calibrationSource,
  openCalibration,
  type SaveCalibration,
} from "../calibration/source.ts";
import type { OwnSampleWork } from "../calibration/own_samples.ts";
import { KeptSamples } from "../calibration/kept_samples.ts";
import type { Calibrated } from "../calibration/mod.ts";
import type { Solvable } from "../calibration/statistics/alone.ts";
import { type Config, type ConfigInForce, isCalibrated, wantsPhases } from "../config/mod.ts";
import { CALIBRATED_SOLVERS } from "../config/names.ts";
import { MemoryError } from "../errors.ts";
import { quote } from "../files/positional.ts";
import { modelRequirements, runLimits } from "../models/mod.ts";
import type { Kernels } from "../native/mod.ts";
import type { Rewrite } from "../output/rewrite.ts";
import type { BitPlan } from "../plan/budget.ts";
import { isTokenTable, type Plan } from "../plan/plan.ts";
import { MemoryShares } from "./forecast/memory_shares.ts";
import { formatBytes, type RunOptions } from "../progress.ts";
import type { Checkpoint } from "../tensor/mod.ts";

/** Saved beside the weights when a budget or a plan chose the bits. */
export const PLAN_FILE = "arrowquant.plan.json";

/** The calibration data of a run. */
export interface RunCalibration {
  /** Text that stands for the data's bytes. @throws {CalibrationError} when there are none */
  digest(): Promise<string>;
  /**
   * The model with the data, opened by the first call: its weights are read when they are needed.
   *
   * @param output keeps what the model makes itself, for a run that is stopped
   * @param onDraft called before a model makes its own samples, with a draft of them and what making them
   * takes
   */
  open(
    output?: Pick<Rewrite, "work" | "identity">,
    onDraft?: (draft: Calibrated, work: OwnSampleWork) => void,
  ): Promise<Solvable>;
  readonly memory: MemoryShares;
}

/** Options of a run that concern calibration. */
interface CalibrationOptions extends RunOptions {
  readonly config: Config;
  readonly kernels: Kernels | undefined;
  readonly saveCalibration?: SaveCalibration | undefined;
  readonly force?: boolean | undefined;
  /** Where shards solve together, a task takes whole chunks of the samples. */
  readonly togetherMilliseconds?: number | undefined;
  /** Bytes that the process may take. */
  readonly memoryBytes: number;
}

/** The calibration data of a run, opened when first needed. */
export function runCalibration(checkpoint: Checkpoint, options: CalibrationOptions): RunCalibration {
  const { config, kernels, saveCalibration } = options;
  const memory = new MemoryShares(options.memoryBytes);
  let digest: Promise<string> | undefined, opened: Promise<Solvable> | undefined;
  return {
    memory,
    digest: async () => await (digest ??= calibrationDigest(calibrationSource(checkpoint, config))),
    open(output, onDraft) {
      if (kernels === undefined) {
        throw new TypeError("Cannot calibrate: a budget's plan needs kernels, got none");
      }
      if (opened === undefined) checkWeights(checkpoint, memory);
      return opened ??= openCalibration(checkpoint, config, kernels, saveCalibration, {
        ...options,
        kept: output && new KeptSamples(output.work, JSON.stringify(output.identity)),
        held: memory.held,
        onDraft,
        bytesAtOnce: Math.min(STATISTICS_BYTES, memory.roomBytes / 4),
        batchPositions: runLimits(checkpoint) === undefined ? memory.batchPositions(checkpoint) : undefined,
        byChunk: options.togetherMilliseconds !== undefined,
      });
    },
  };
}

/** Bytes of saved statistics that are gathered at once, at most. */
const STATISTICS_BYTES = 2 * 2 ** 30;

const most = <T extends { readonly bytes: number }>(all: readonly T[]): T =>
  all.reduce((a, b) => b.bytes > a.bytes ? b : a, all[0]!);

/** @throws {MemoryError} when the largest matrix alone does not fit, before a weight is read */
function checkWeights(checkpoint: Checkpoint, { limitBytes, residentBytes }: MemoryShares): void {
  const largest = runLimits(checkpoint) === undefined ? most(modelRequirements(checkpoint).matrices) : most(
    [...checkpoint.tensors.values()].map(({ info: { name, byteLength: bytes } }) => ({ name, bytes })),
  );
  const needed = residentBytes + largest.bytes;
  if (needed <= limitBytes) return;
  throw new MemoryError(
    `Cannot calibrate ${quote(checkpoint.path)}: ${quote(largest.name)} must fit into ${
      formatBytes(limitBytes)
    } (--max-memory), got ${formatBytes(largest.bytes)} beside ${
      formatBytes(residentBytes)
    } of the process; ` +
      "with --solver clip and without phases and budgets some rows at a time are in memory",
    needed,
    limitBytes,
    { path: checkpoint.path },
  );
}

/** Warns of keys without effect, and of layers that a bit plan leaves out. */
export function calibrationWarnings(
  plan: Plan,
  config: ConfigInForce,
  bitPlan: BitPlan | undefined,
): string[] {
  const warnings: string[] = [];
  if (config.calibrationData !== null && !isCalibrated(config)) {
    const why = `${CALIBRATED_SOLVERS.join(" and ")} calibrate`;
    warnings.push(`calibration_data has no effect with solver ${config.solver}: ${why}`);
  }
  const isSet = {
    activation_bits: config.activationBits !== 8,
    time_groups: config.timeGroups !== "equal",
    output_correction: config.outputCorrection,
    time_scales: config.timeScales !== "shared",
    sampler_correction: config.samplerCorrection,
  };
  const why = config.enableTimeAware
    ? "without a phase: thermodynamic enables them"
    : "where enable_time_aware is false";
  if (!wantsPhases(config) || !config.enableTimeAware) {
    warnings.push(
      ...Object.entries(isSet).filter(([, isOn]) => isOn).map(([key]) => `${key} has no effect ${why}`),
    );
  }
  const left = plan.rows.filter((row) =>
    row.action === "quantize" && !isTokenTable(row) && bitPlan?.has(row.name) === false
  );
  if (left.length > 0) {
    const which = `${left.length} layers, the first ${quote(left[0]!.name)}`;
    warnings.push(`the plan leaves out ${which}: they get bit_width ${config.bitWidth}`);
  }
  return warnings;
}
