/**
 * Calibration data of the methods under comparison: those that the pipeline solves on, with their masks or
 * noise and the weights of their positions, collected by the pipeline's own pass.
 */
import { collectStatistics } from "../../calibration/collect.ts";
import { type Calibrated, type CalibrationOptions, loadCalibration } from "../../calibration/mod.ts";
import { calibrationGroups } from "../../calibration/saved_statistics.ts";
import { calibrationBeside, calibrationSource } from "../../calibration/source.ts";
import { resolveConfig } from "../../config/mod.ts";
import type { LoadedModel } from "../../models/mod.ts";
import type { Kernels } from "../../native/mod.ts";
import type { Checkpoint } from "../../tensor/mod.ts";
import type { LayerInputs } from "./method.ts";

/** How much each position counts: by its role, as the pipeline has it, or all alike, as in other projects. */
export type Positions = NonNullable<CalibrationOptions["weights"]>;

/** Keys of the configuration about calibration, the same for all methods; few samples for a quick look. */
export function calibrationKeys(path: string, quick: boolean): Readonly<Record<string, unknown>> {
  return {
    ...(calibrationBeside(path) === undefined ? { calibration_data: "synthetic" } : {}),
    ...(quick ? { calibration_samples: 32 } : {}),
  };
}

/** The calibration data that the pipeline uses for a checkpoint with these keys of the configuration. */
export function calibrationOf(
  full: LoadedModel,
  checkpoint: Checkpoint,
  keys: Readonly<Record<string, unknown>>,
  weights: Positions = "by_role",
): Promise<Calibrated> {
  const { config } = resolveConfig({ overrides: { solver: "feedback", ...keys } });
  const source = calibrationSource(checkpoint, config);
  const { calibrationSamples, calibrationSeed: seed } = config;
  return loadCalibration(full, { source, samples: calibrationSamples ?? undefined, seed, weights });
}

/** Whether some positions count more than others. */
export const hasPositionWeights = ({ data: { fit } }: Calibrated): boolean =>
  fit.some(({ weights }) => weights.some((weight) => weight !== 1));

/**
 * Runs a model, full precision or quantized, on calibration data and takes the second moment of every wanted
 * layer's inputs.
 *
 * @throws {TypeError} when the data are of another kind of model
 */
export async function collectInputs(
  { kind, model }: LoadedModel,
  calibrated: Calibrated,
  layers: Iterable<string>,
  kernels: Kernels,
): Promise<Map<string, LayerInputs>> {
  if ((kind === "dit") !== (calibrated.kind === "images")) {
    throw new TypeError(`Cannot calibrate a ${kind} model with ${calibrated.kind}`);
  }
  const names = new Set(layers), { source, isSynthetic, samples, axis } = calibrated.data;
  const statistics = await collectStatistics({ ...calibrated, model } as Calibrated, {
    kernels,
    names,
    fingerprint: "",
    groups: calibrationGroups(axis, 1),
    second: "total",
    run: { identity: "", source, isSynthetic, samples },
  });
  return new Map([...names].map((name) => {
    const { cols, second, weight } = statistics.moments(name);
    return [name, { cols, secondMoment: second.map((sum) => sum / weight) }];
  }));
}
