/** Output errors of a quantized folder's layers along the time axis. */
import { thatRuns } from "../calibration/statistics/alone.ts";
import { calibrationBeside, calibrationSource, openCalibration } from "../calibration/source.ts";
import { type Config, DEFAULT_CONFIG } from "../config/mod.ts";
import { layerErrors } from "../eval/layer_errors.ts";
import { nameOfPath } from "../files/whole.ts";
import { type LoadedModel, storedTimeParameters } from "../models/mod.ts";
import type { Kernels } from "../native/mod.ts";
import type { PhaseModel } from "../phases/context.ts";
import { packedLayers, readPackedTensor } from "../quant/packed/checkpoint.ts";
import { openCheckpoint } from "../tensor/mod.ts";
import { equalTimeGroups } from "../time/mod.ts";
import { type Section, tableOf, type TimedSetting } from "./suite.ts";

/** The errors, and where the inputs come from. */
export interface LayersOverTime extends TimedSetting {
  readonly source: string;
}

/** Packed tensors and time parameters of a written model. */
export function readStored(folder: string): Pick<PhaseModel, "weights" | "timeParameters"> {
  using checkpoint = openCheckpoint(folder);
  return {
    weights: new Map(
      [...packedLayers(checkpoint)].map(([name, layer]) => [name, readPackedTensor(checkpoint, layer)]),
    ),
    timeParameters: storedTimeParameters(checkpoint),
  };
}

/**
 * The relative output error of every layer of a quantized folder in every time group, on held-out calibration
 * data of its original: those that the configuration names, or lie beside it, or synthetic ones. No errors
 * where the configuration names saved statistics, which hold nothing out.
 *
 * @throws {CheckpointError} when the original cannot be run here
 */
export async function layersOverTime(
  kernels: Kernels,
  original: string,
  folder: string,
  config: Config = DEFAULT_CONFIG,
): Promise<LayersOverTime> {
  using checkpoint = openCheckpoint(original);
  const hasData = config.calibrationData !== null ||
    [checkpoint.folder, checkpoint.root].some((beside) => calibrationBeside(beside) !== undefined);
  const chosen = hasData ? config : { ...config, calibrationData: "synthetic" };
  const calibrated = thatRuns(
    await openCalibration(checkpoint, chosen, kernels, undefined, {}),
    "measure layers over time",
  );
  const stored = readStored(folder), { axis, source } = calibrated.data;
  const groups = stored.timeParameters?.groups ?? equalTimeGroups(axis, config.numTimeGroups);
  const context = {
    ...{ checkpoint, calibrated, kernels },
    source: calibrationSource(checkpoint, chosen),
    seed: config.calibrationSeed,
  };
  const full = { kind: checkpoint.kind, model: calibrated.model } as LoadedModel;
  const [errors] = layerErrors(context, full, [stored], groups);
  return { model: nameOfPath(original), setting: nameOfPath(folder), groups, layerErrors: errors, source };
}

/** A row a layer, the worst first. */
export function layerSection({ setting, groups, layerErrors = [], source }: LayersOverTime): Section {
  const rows = [...Map.groupBy(layerErrors, ({ layer }) => layer)].map(([layer, own]) => {
    const byGroup = Array.from(
      { length: groups.count },
      (_, g) => own.find(({ timeGroup }) => timeGroup === g)?.relativeError,
    );
    return { layer, byGroup, worst: Math.max(...own.map(({ relativeError }) => relativeError)) };
  });
  return tableOf(
    `${setting}: output error of its layers by time group`,
    [`‖ŷ − y‖² / ‖y‖² on the inputs of full precision's layer, held out of ${source}; the worst layer first.`],
    rows.sort((a, b) => b.worst - a.worst),
    [
      ["layer", "layer", ({ layer }) => layer],
      ...Array.from(
        { length: groups.count },
        (_, g) => [`group${g}`, `group ${g}`, ({ byGroup }: typeof rows[number]) => byGroup[g], 5] as const,
      ),
    ],
  );
}
