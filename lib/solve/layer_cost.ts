/** What a tensor of a plan costs, from names, shapes and settings alone: the same on every machine. */
import { chooseMoment } from "../calibration/moment_structure.ts";
import type { ConfigInForce } from "../config/mod.ts";
import { CALIBRATED_SOLVERS } from "../config/names.ts";
import { formatOf, isTokenTable, type PlanRow } from "../plan/plan.ts";
import {
  FEEDBACK_PASSES,
  GRADIENT_PASSES,
  ROUND_PASSES,
  settingsFor,
  stepsOf,
  trellisPasses,
} from "../quant/solvers/effort.ts";
import { matrixSizes } from "../quant/packed/layout.ts";
import type { SolverSettings } from "../quant/solvers/settings.ts";
import { elementCount } from "../tensor/mod.ts";
import { isRounded, weightSolver } from "./by_weights.ts";
import { solverSettings } from "./candidates.ts";

/**
 * Nominal seconds of pieces of work, on two cores of an ordinary server: only their relations matter. Bytes
 * are read, hashed and written; weights are packed and measured.
 */
const SECONDS = { byte: 2e-9, round: 4e-9, clip: 4e-8, multiplyAdd: 2.5e-11 } as const;

/** Whether a row's layer is solved on what it reads, where the model has it as a linear layer. */
const isSolved = (config: ConfigInForce, row: PlanRow): boolean =>
  row.action === "quantize" && CALIBRATED_SOLVERS.includes(config.solver) && !isTokenTable(row) &&
  !isRounded(config, row);

/** Passes over a layer's moment, for each of its rows. */
function passesOf(config: ConfigInForce, settings: SolverSettings, bits: number): number {
  if (config.solver === "feedback") return FEEDBACK_PASSES;
  const { starts, refinesEach, rounds, ratios } = stepsOf(settings, bits),
    count = Math.min(starts, 1 + ratios.length);
  const refined = rounds * (GRADIENT_PASSES + ROUND_PASSES);
  return count * FEEDBACK_PASSES + (refinesEach ? count : 1) * refined;
}

/** Nominal seconds that a tensor takes. */
export function layerCost(config: ConfigInForce, row: PlanRow): number {
  const moved = SECONDS.byte * (row.bytesBefore + 2 * row.bytesAfter);
  if (row.action === "keep") return moved;
  const weights = elementCount(row.shape)!, byWeights = moved + weights * SECONDS[weightSolver(config, row)];
  if (!isSolved(config, row)) return byWeights;
  const { rows, cols } = matrixSizes(row.shape), settings = solverSettings(config);
  const form = formatOf(row);
  const { block } = chooseMoment(settings, { cols, positions: Infinity, formats: [form] });
  if (block === 1) return byWeights;
  const steps = settingsFor(settings, { rows, cols, block });
  const passes = row.codes === "trellis"
    ? trellisPasses(stepsOf(steps, row.bits!), {
      bits: row.bits!,
      block,
      scaleBits: row.scaleBits,
    })
    : passesOf(config, steps, row.bits!);
  // Its moment is factored for it as well.
  return moved + SECONDS.multiplyAdd * (passes * rows * cols * block + cols * block * block / 3);
}
