/** Layers and tables of a model quantized by their weights alone, without what they read. */
import type { Config } from "../config/mod.ts";
import { WeightsError } from "../errors.ts";
import type { Blockwise } from "../models/mod.ts";
import type { Kernels } from "../native/mod.ts";
import type { PlanRow } from "../plan/plan.ts";
import { LAYER_SOLVERS, type PackedTensor, quantize } from "../quant/mod.ts";

/**
 * Packed forms of a plan's rows as they are written, for those that are matrices of the model: rounded, with
 * searched ranges unless the solver is `round`. One with NaN or infinity is left out: the writing keeps it, or
 * stops.
 */
export function quantizedByWeights<Batch>(
  { stages, tables }: Pick<Blockwise<Batch>, "stages" | "tables">,
  rows: readonly PlanRow[],
  config: Config,
  kernels: Kernels,
): Map<string, PackedTensor> {
  const all = [...stages.flatMap(({ layers }) => layers), ...tables];
  const found = new Map(all.map(({ name, weights }) => [name, weights]));
  const solver = LAYER_SOLVERS[config.solver].withoutMoment;
  return new Map(rows.flatMap((row): [string, PackedTensor][] => {
    const weights = found.get(row.name);
    if (row.action === "keep" || weights === undefined || "packed" in weights) return [];
    const { bits, groupSize, zeroPoint, scaleBits } = row, { rows: height, cols, dtype, data } = weights;
    const options = { bits: bits!, groupSize: groupSize!, zeroPoint: zeroPoint!, scaleBits, solver };
    try {
      return [[row.name, quantize(kernels, { data, dtype }, height, cols, options)]];
    } catch (error) {
      if (!(error instanceof WeightsError)) throw error;
      return [];
    }
  }));
}
