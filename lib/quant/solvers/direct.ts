/** Solvers of the weights alone: `round`, and `clip`, which weighs columns by their inputs where known. */
import { quantize, type WeightSolver } from "../quantize.ts";
import { clipped, objectiveOf } from "./steps.ts";
import type { Problem } from "./problem.ts";
import type { Solution } from "./settings.ts";

export const direct = (solver: WeightSolver) => (problem: Problem): Solution => {
  const { kernels, weights: data, rows, cols, bits, groupSize, zeroPoint, scaleBits } = problem;
  const options = { bits, groupSize, zeroPoint, scaleBits, solver } as const;
  const tensor = solver === "clip"
    ? clipped(problem)
    : quantize(kernels, { data, dtype: "F32" }, rows, cols, options);
  const objective = objectiveOf(problem, tensor);
  return { tensor, objective, firstObjective: objective };
};
