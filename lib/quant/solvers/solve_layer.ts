/**
 * The table of solvers: from a layer's weights and the moment of its inputs to packed codes. What each one
 * gains is in docs/solvers.md.
 */
import { type Solver, SOLVERS } from "../../config/names.ts";
import { checkMember } from "../../native/call.ts";
import type { Kernels } from "../../native/mod.ts";
import type { WeightSolver } from "../quantize.ts";
import { direct } from "./direct.ts";
import { best, feedback } from "./feedback.ts";
import { checkProblem, type LayerProblem, type MomentProblem, type Problem } from "./problem.ts";
import { checkSettings, DEFAULT_SOLVER_SETTINGS, type Solution, type SolverSettings } from "./settings.ts";

/** A solver of layers. */
interface LayerSolver {
  /** Solver of layers whose inputs are not known. */
  readonly withoutMoment: WeightSolver;
  solve(problem: Problem, settings: SolverSettings): Solution;
}

/** A solver that needs the moment of the layer's inputs. */
function calibrated(
  name: Solver,
  solve: (problem: MomentProblem, settings: SolverSettings) => Solution,
): LayerSolver {
  return {
    withoutMoment: "clip",
    solve(problem, settings) {
      if (problem.moment !== undefined) return solve(problem as MomentProblem, settings);
      throw new TypeError(`Cannot solve a layer: the solver "${name}" needs the moments of its inputs`);
    },
  };
}

/** Every solver, by its name in the configuration. */
export const LAYER_SOLVERS: Readonly<Record<Solver, LayerSolver>> = {
  round: { withoutMoment: "round", solve: direct("round") },
  clip: { withoutMoment: "clip", solve: direct("clip") },
  feedback: calibrated("feedback", feedback),
  best: calibrated("best", best),
};

/**
 * Solves a layer.
 *
 * Rows are independent. `moment` may be undefined for `round` and `clip` alone; `clip` takes its diagonal for
 * the columns' weights. With a unit moment `feedback` equals `clip`: no column's error tells anything about
 * another.
 *
 * @throws {TypeError | RangeError} when an argument has the wrong type, shape or value
 * @throws {WeightsError} when weights are NaN, infinite or too large for half-precision scales
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 * import { factorMoments } from "./factored_moment.ts";
 * import { accumulateMoment, emptyMoments } from "./moments.ts";
 * import { solveLayer } from "./solve_layer.ts";
 *
 * const kernels = await openKernels();
 * const moments = emptyMoments(2);
 * accumulateMoment(kernels, Float32Array.of(1, 2, 3, 4), undefined, undefined, 2, moments.second);
 * moments.tokens = moments.weight = 2;
 * const { tensor } = solveLayer(kernels, "feedback", {
 *   weights: Float32Array.of(0.3, -0.2, 0.1, 0.7),
 *   rows: 2,
 *   cols: 2,
 *   moment: factorMoments(kernels, moments),
 *   bits: 2,
 *   groupSize: 0,
 *   zeroPoint: "real",
 * });
 * console.log(tensor.packed.length); // a word a row
 * ```
 */
export function solveLayer(
  kernels: Kernels,
  solver: Solver,
  problem: LayerProblem,
  settings: SolverSettings = DEFAULT_SOLVER_SETTINGS,
): Solution {
  const doing = "solve a layer";
  checkMember(doing, "solver", solver, SOLVERS);
  checkProblem(doing, problem);
  checkSettings(doing, settings);
  return LAYER_SOLVERS[solver].solve({ ...problem, kernels }, settings);
}
