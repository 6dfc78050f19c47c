/** θ of a quantized checkpoint, for tables and charts: its model is not loaded. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { groupCount } from "../quant/mod.ts";
import { packedLayers } from "../quant/packed_checkpoint.ts";
import { openCheckpoint, SIDECAR_FILE } from "../tensor/mod.ts";
import { modelFingerprint, readTimeParameters, type TimeParameters } from "../time/mod.ts";

/**
 * The time parameters that lie beside a quantized checkpoint, undefined where there are none.
 *
 * @throws {CheckpointError | FormatError} when they cannot be read, or belong to another model
 */
export function storedTimeParameters(folder: string): TimeParameters | undefined {
  if (!existsSync(join(folder, SIDECAR_FILE))) return undefined;
  using checkpoint = openCheckpoint(folder);
  const layers = new Map(
    [...packedLayers(checkpoint)].map(([name, { rows, cols, groupSize }]) => [
      name,
      { rows, weightGroups: groupCount(cols, groupSize) },
    ]),
  );
  return readTimeParameters(folder, { fingerprint: modelFingerprint(checkpoint), layers });
}
