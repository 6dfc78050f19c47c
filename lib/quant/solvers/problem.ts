/** A layer to solve, as every solver and every step of one takes it. */
import { checkArray, checkCounts } from "../../native/call.ts";
import type { Kernels } from "../../native/mod.ts";
import { checkFormat, type WeightFormat } from "../packed/layout.ts";
import { checkMoment, type FactoredMoment } from "./factored_moment.ts";

/** A layer to solve. */
export interface LayerProblem extends WeightFormat {
  /** The target, `f32[rows, cols]`: the layer's own weights or those of {@linkcode correctedTarget}. */
  readonly weights: Float32Array;
  readonly rows: number;
  readonly cols: number;
  /** Undefined for `round` and `clip` alone. */
  readonly moment?: FactoredMoment | undefined;
  /** Called with the done part of the work, 0 to 1, where that takes long. */
  readonly onShare?: ((share: number) => void) | undefined;
}

/** A problem with the kernels that solve it. */
export interface Problem extends LayerProblem {
  readonly kernels: Kernels;
}

/** A problem whose inputs are known. */
export interface MomentProblem extends Problem {
  readonly moment: FactoredMoment;
}

/** Throws unless every argument has the right type, shape and value. */
export function checkProblem(doing: string, problem: LayerProblem): void {
  const { weights, rows, cols, moment } = problem;
  checkCounts(doing, { rows, cols });
  checkArray(doing, "weights", weights, rows * cols);
  checkFormat(doing, problem);
  if (moment !== undefined) checkMoment(doing, moment, cols);
}
