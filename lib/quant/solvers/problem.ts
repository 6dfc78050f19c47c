/** A layer to solve, as every solver and every step of one takes it. */
import { checkArray, checkCounts, checkMember } from "../../native/call.ts";
import type { Kernels } from "../../native/mod.ts";
import {
  BIT_WIDTHS,
  GROUP_SIZES,
  SCALE_BITS,
  TWO_LEVEL_GROUP_SIZES,
  type WeightFormat,
  ZERO_POINT_KINDS,
} from "../packed/layout.ts";
import { checkMoment, type FactoredMoment } from "./factored_moment.ts";

/** A layer to solve. */
export interface LayerProblem extends WeightFormat {
  /** The target, `f32[rows, cols]`: the layer's own weights or those of {@linkcode correctedTarget}. */
  readonly weights: Float32Array;
  readonly rows: number;
  readonly cols: number;
  /** Undefined for `round` and `clip` alone. */
  readonly moment?: FactoredMoment | undefined;
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
  const { weights, rows, cols, moment, bits, groupSize, zeroPoint, scaleBits } = problem;
  checkCounts(doing, { rows, cols });
  checkArray(doing, "weights", weights, rows * cols);
  checkMember(doing, "bits", bits, BIT_WIDTHS);
  checkMember(doing, "groupSize", groupSize, scaleBits === undefined ? GROUP_SIZES : TWO_LEVEL_GROUP_SIZES);
  checkMember(doing, "zeroPoint", zeroPoint, ZERO_POINT_KINDS);
  if (scaleBits !== undefined) checkMember(doing, "scaleBits", scaleBits, SCALE_BITS);
  if (moment !== undefined) checkMoment(doing, moment, cols);
}
