/** The time parameters beside a quantized checkpoint, checked against the model they are loaded for. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { groupCount, packedLayers } from "../quant/mod.ts";
import { type Checkpoint, SIDECAR_FILE } from "../tensor/mod.ts";
import { modelFingerprint, readTimeParameters, type TimeParameters } from "../time/mod.ts";
import { loadScheduler } from "./schedulers.ts";

/** Requirements on a sidecar, beside fitting the model. */
export interface StoredTimeOptions {
  /** Wanted number of time groups; any by default. */
  readonly groups?: number | undefined;
}

/**
 * The time parameters beside a checkpoint, undefined where there are none.
 *
 * @throws {FormatError} when the file is not what its format promises
 * @throws {CheckpointError} when it belongs to another model, or has another axis or number of time groups
 */
export function storedTimeParameters(
  checkpoint: Checkpoint,
  { groups }: StoredTimeOptions = {},
): TimeParameters | undefined {
  if (!existsSync(join(checkpoint.folder, SIDECAR_FILE))) return undefined;
  return readTimeParameters(checkpoint.folder, {
    fingerprint: modelFingerprint(checkpoint),
    layers: new Map(
      [...packedLayers(checkpoint)].map((
        [name, { rows, cols, groupSize }],
      ) => [name, { rows, weightGroups: groupCount(cols, groupSize) }]),
    ),
    groups,
    axis: checkpoint.kind === "dit"
      ? { kind: "timesteps", bins: loadScheduler(checkpoint.folder, "ddim").config.trainTimesteps }
      : undefined,
  });
}
