/** Layers and tables of a model quantized by their weights alone, without what they read. */
import type { ConfigInForce } from "../config/mod.ts";
import { WeightsError } from "../errors.ts";
import type { Blockwise } from "../models/mod.ts";
import type { Kernels } from "../native/mod.ts";
import { formatOf, type PlanRow } from "../plan/plan.ts";
import { LAYER_SOLVERS, type PackedTensor, quantizeByWeights, type WeightSolver } from "../quant/mod.ts";

type RowBits = Pick<PlanRow, "bits" | "scaleBits">;

/** Whether a row has codes of 8 bits: those of two levels of scales hold less, as Q6_K's 6. */
export const hasEightBits = ({ bits, scaleBits }: RowBits): boolean => bits === 8 && scaleBits !== 8;

/** Whether a row's layer is rounded although others are solved: at 8 bits, where `auto` chose the solver. */
export const isRounded = ({ chosen }: ConfigInForce, row: RowBits): boolean =>
  chosen?.roundsEight === true && hasEightBits(row);

/** The solver of a row by its weights alone. */
export function weightSolver(config: ConfigInForce, row: RowBits): WeightSolver {
  if (isRounded(config, row)) return "round";
  return config.chosen?.byWeights ?? LAYER_SOLVERS[config.solver].withoutMoment;
}

/**
 * Packed forms of a plan's rows as they are written, for those that are matrices of the model. One with NaN
 * or infinity is left out: the writing keeps it, or stops.
 */
export function quantizedByWeights<Batch>(
  { stages, tables }: Pick<Blockwise<Batch>, "stages" | "tables">,
  rows: readonly PlanRow[],
  config: ConfigInForce,
  kernels: Kernels,
): Map<string, PackedTensor> {
  const all = [...stages.flatMap(({ layers }) => layers), ...tables];
  const found = new Map(all.map(({ name, weights }) => [name, weights]));
  return new Map(rows.flatMap((row): [string, PackedTensor][] => {
    const weights = found.get(row.name);
    if (row.action === "keep" || weights === undefined || "packed" in weights) return [];
    const { rows: height, cols, dtype, data } = weights;
    const options = { ...formatOf(row), solver: weightSolver(config, row) };
    try {
      return [[row.name, quantizeByWeights(kernels, { data, dtype }, height, cols, options)]];
    } catch (error) {
      if (!(error instanceof WeightsError)) throw error;
      return [];
    }
  }));
}
