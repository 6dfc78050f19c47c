/** Solvers of the weights alone: `round`, and `clip`, which weighs columns by their inputs where known. */
import { quantize, type WeightSolver } from "../quantize.ts";
import { dequantize } from "../dequantize.ts";
import type { PackedTensor } from "../packed/layout.ts";
import { outputPower } from "./factored_moment.ts";
import { clipped, objectiveOf } from "./steps.ts";
import type { Problem } from "./problem.ts";
import type { Solution } from "./settings.ts";

export const direct = (solver: WeightSolver) => (problem: Problem): Solution => {
  const { kernels, weights: data, rows, cols, bits, groupSize, zeroPoint, scaleBits } = problem;
  const options = { bits, groupSize, zeroPoint, scaleBits, solver } as const;
  const tensor = solver === "clip"
    ? clipped(problem)
    : quantize(kernels, { data, dtype: "F32" }, rows, cols, options);
  const { moment } = problem;
  const objective = moment === undefined || moment.block === cols
    ? objectiveOf(problem, tensor)
    : objectiveInBlocks(problem, tensor);
  return { tensor, objective, firstObjective: objective };
};

/** Σ over rows of the objective of a packed tensor, a block of the moment after the other. */
function objectiveInBlocks({ kernels, weights, rows, moment }: Problem, tensor: PackedTensor): number {
  const error = dequantize(kernels, tensor);
  for (let i = 0; i < error.length; i++) error[i] = weights[i]! - error[i]!;
  return outputPower(kernels, error, rows, moment!);
}
