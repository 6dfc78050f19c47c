/** Counting the codes of a quantized checkpoint. */
import type { Kernels } from "../native/mod.ts";
import { unpackCodes } from "../quant/mod.ts";
import { packedLayers, readPackedTensor } from "../quant/packed/checkpoint.ts";
import { ROTATED_SCALE_BITS } from "../quant/packed/layout.ts";
import { openCheckpoint } from "../tensor/mod.ts";
import type { RowOf } from "./schema.ts";

/** Rows of a layer that are counted, in evenly spaced blocks: enough for shares to a tenth of a percent. */
const COUNTED_ROWS = 256;
const BLOCK_ROWS = 32;

/**
 * How often each code occurs in each quantized layer of a checkpoint; of layers with more than 256 rows, in
 * 256 of them, evenly spread.
 *
 * @throws {CheckpointError | FormatError} when the checkpoint cannot be read
 *
 * @example
 * ```ts
 * import { mkdtempSync } from "node:fs";
 * import { tmpdir } from "node:os";
 * import { DEFAULT_CONFIG } from "../config/mod.ts";
 * import { openKernels } from "../native/mod.ts";
 * import { quantizeCheckpoint } from "../pipeline/mod.ts";
 * import { countCodes } from "./codes.ts";
 *
 * using kernels = await openKernels();
 * const output = `${mkdtempSync(`${tmpdir()}/example-`)}/packed`;
 * await quantizeCheckpoint({ input: "tests/models/dream-mini", output, config: DEFAULT_CONFIG, kernels });
 * console.log(countCodes(kernels, output, { model: "dream-mini", setting: "4 clip" }).length);
 * ```
 */
export function countCodes(
  kernels: Kernels,
  folder: string,
  { model, setting }: { readonly model: string; readonly setting: string },
): RowOf<"codes">[] {
  using checkpoint = openCheckpoint(folder);
  return [...packedLayers(checkpoint).values()].flatMap((layer) => {
    const { name, rows, cols, bits } = layer;
    const counts = new Array<number>(2 ** bits).fill(0);
    for (
      const [begin, end] of layer.scaleBits === ROTATED_SCALE_BITS ? [[0, rows] as const] : rowBlocks(rows)
    ) {
      const { packed } = readPackedTensor(checkpoint, layer, begin, end);
      for (const code of unpackCodes(kernels, packed, end - begin, cols, bits)) counts[code]!++;
    }
    return counts.map((count, code): RowOf<"codes"> => ({ model, setting, layer: name, bits, code, count }));
  });
}

function rowBlocks(rows: number): [number, number][] {
  if (rows <= COUNTED_ROWS) return [[0, rows]];
  const blocks = COUNTED_ROWS / BLOCK_ROWS;
  return Array.from({ length: blocks }, (_, i) => {
    const begin = Math.floor(i * (rows - BLOCK_ROWS) / (blocks - 1));
    return [begin, begin + BLOCK_ROWS];
  });
}
