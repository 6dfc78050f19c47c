/** A layer to solve, as every solver and every step of one takes it. */
import { checkArray, checkCounts, checkMember } from "../../native/call.ts";
import type { Kernels } from "../../native/mod.ts";
import {
  BIT_WIDTHS,
  type GridOptions,
  GROUP_SIZES,
  SCALE_BITS,
  TWO_LEVEL_GROUP_SIZES,
  ZERO_POINT_KINDS,
} from "../packed/layout.ts";
import type { FactoredMoment } from "./factored_moment.ts";
import { MAX_MOMENT_COLS } from "./moments.ts";

/** A layer to solve. */
export interface LayerProblem extends GridOptions {
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

/** Throws unless a factored moment has as many columns, and arrays of the right types and lengths. */
export function checkMoment(doing: string, factored: FactoredMoment, cols: number): void {
  const { moment, order, factor, pivots } = factored;
  if (factored.cols !== cols || !(cols >= 1 && cols <= MAX_MOMENT_COLS)) {
    throw new TypeError(`Cannot ${doing}: the moment must have ${cols} columns, got ${factored.cols}`);
  }
  checkArray(doing, "moment.moment", moment, cols * cols);
  checkArray(doing, "moment.factor", factor, cols * cols);
  checkArray(doing, "moment.pivots", pivots, cols);
  checkArray(doing, "moment.order", order, cols, "int32 values");
  const seen = new Uint8Array(cols);
  for (const column of order) seen[column] = 1; // what lies outside is dropped
  if (seen.includes(0)) throw new RangeError(`Cannot ${doing}: moment.order must hold every column once`);
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
