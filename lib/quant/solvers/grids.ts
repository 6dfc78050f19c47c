/** Grids that solvers start from, and what they do on one: error feedback, refits and descent. What they are chained to is solvers.ts's. */
import { WeightsError } from "../../errors.ts";
import type { Kernels } from "../../native/mod.ts";
import { annealLayer } from "./annealing.ts";
import { diagonalOf, type FactoredMoment, fail, workspace } from "./factored_moment.ts";
import { quantize, unpackCodes } from "../kernels.ts";
import {
  type BitWidth,
  groupCount,
  type GroupSize,
  type PackedTensor,
  type ScaleBits,
  ZERO_POINT_KINDS,
  type ZeroPointKind,
} from "../packed/layout.ts";
import { groupAffine } from "../packed/two_level.ts";

/** The grid that codes are on. */
export interface GridOptions {
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
  readonly zeroPoint: ZeroPointKind;
  /** Bits of the sub-codes of two-level scales; undefined for plain half floats. They need real zero points. */
  readonly scaleBits?: ScaleBits | undefined;
}

/** Codes with the grid they are on, and each row's objective: what the steps below hand on. */
export interface Candidate {
  readonly codes: Uint8Array<ArrayBuffer>;
  readonly scale: Float32Array<ArrayBuffer>;
  readonly zeroPoint: Float32Array<ArrayBuffer>;
  readonly objective: Float64Array<ArrayBuffer>;
}

/** Scales and zero points: `f32[rows, groups]`. */
export type Grid = Pick<Candidate, "scale" | "zeroPoint">;

/** The grid of each group's range, shrunk by `ratio`. */
export function rangeGrid(
  kernels: Kernels,
  weights: Float32Array,
  rows: number,
  cols: number,
  { bits, groupSize, zeroPoint: kind }: GridOptions,
  ratio: number,
): Grid {
  const groups = groupCount(cols, groupSize);
  const scale = new Float32Array(rows * groups), zeroPoint = new Float32Array(rows * groups);
  const status = kernels.calls.aq_clipped_grids(
    weights,
    kernels.size(rows),
    kernels.size(cols),
    bits,
    kernels.size(groupSize),
    ZERO_POINT_KINDS.indexOf(kind),
    ratio,
    scale,
    zeroPoint,
    kernels.threads,
  );
  if (status === -4) {
    throw new WeightsError("Cannot solve a layer: weights must be finite, got NaN or infinity");
  }
  if (status === -5) {
    throw new WeightsError(
      "Cannot solve a layer: weights must allow half-precision scales, got too large ones",
    );
  }
  if (status !== 0) fail("solve a layer", status);
  return { scale, zeroPoint };
}

/** The grid that `clip` finds with the moment's diagonal as the columns' weights. */
export function clipGrid(
  kernels: Kernels,
  weights: Float32Array,
  rows: number,
  cols: number,
  options: GridOptions,
  moment: Float32Array,
): Grid {
  const columnWeights = diagonalOf(moment, cols);
  const tensor = quantize(kernels, { data: weights, dtype: "F32" }, rows, cols, {
    ...options,
    solver: "clip",
    columnWeights,
  });
  return gridOf(tensor);
}

/** Scale of a group whose weights are all its offset: any code stands for it. */
const NO_SCALE = 2 ** -60;

/** Scales and zero points of a packed tensor. */
export function gridOf(tensor: PackedTensor): Grid {
  const wide = (bits: Uint16Array<ArrayBuffer>) =>
    Float32Array.from(new Float16Array(bits.buffer, bits.byteOffset, bits.length));
  if (tensor.scaleBits === undefined) {
    const { scale, zeroPoint, bits } = tensor;
    return {
      scale: wide(scale),
      zeroPoint: zeroPoint === undefined
        ? new Float32Array(scale.length).fill(2 ** (bits - 1))
        : wide(zeroPoint),
    };
  }
  const { scale, offset } = groupAffine(tensor);
  for (let i = 0; i < scale.length; i++) if (scale[i] === 0) scale[i] = NO_SCALE;
  return { scale, zeroPoint: offset.map((value, i) => -value / scale[i]!) };
}

/** Error feedback on a grid, then as many rounds of refitting and descent as asked for: 0 only measures. */
export function solveOnGrid(
  kernels: Kernels,
  target: Float32Array,
  rows: number,
  factored: FactoredMoment,
  options: GridOptions,
  grid: Grid,
  rounds: number,
  refit: boolean,
): Candidate {
  const { cols, factor, order } = factored, { bits, groupSize } = options;
  const codes = new Uint8Array(rows * cols);
  const { scale, zeroPoint } = grid;
  const work = workspace(kernels, cols, groupSize);
  const { calls, isaNumber } = kernels;
  const [n, k, g] = [kernels.size(rows), kernels.size(cols), kernels.size(groupSize)];
  const status = calls.aq_quantize_feedback(
    target,
    n,
    k,
    bits,
    g,
    scale,
    zeroPoint,
    factor,
    order,
    codes,
    work,
    isaNumber,
    kernels.threads,
  );
  if (status !== 0) fail("feed errors back", status);
  return refineCodes(kernels, target, rows, factored, options, { codes, scale, zeroPoint }, rounds, refit);
}

/** As many rounds of refitting and descent as asked for, in place; 0 only measures. */
export function refineCodes(
  kernels: Kernels,
  target: Float32Array,
  rows: number,
  { cols, moment }: Pick<FactoredMoment, "cols" | "moment">,
  { bits, groupSize, zeroPoint: kind }: GridOptions,
  { codes, scale, zeroPoint }: Omit<Candidate, "objective">,
  rounds: number,
  refit: boolean,
): Candidate {
  const objective = new Float64Array(rows);
  const status = kernels.calls.aq_refine_codes(
    target,
    kernels.size(rows),
    kernels.size(cols),
    bits,
    kernels.size(groupSize),
    ZERO_POINT_KINDS.indexOf(kind),
    moment,
    refit ? 1 : 0,
    rounds,
    codes,
    scale,
    zeroPoint,
    objective,
    workspace(kernels, cols, groupSize),
    kernels.isaNumber,
    kernels.threads,
  );
  if (status !== 0) fail("refine codes", status);
  return { codes, scale, zeroPoint, objective };
}

/**
 * Codes annealed from those of a candidate, then refined. The candidate is not changed.
 */
export function anneal(
  kernels: Kernels,
  target: Float32Array,
  rows: number,
  factored: FactoredMoment,
  options: GridOptions,
  from: Candidate,
  { annealing, rounds, refit }: {
    readonly annealing: number;
    readonly rounds: number;
    readonly refit: boolean;
  },
): Candidate {
  const codes = from.codes.slice(), scale = from.scale.slice(), zeroPoint = from.zeroPoint.slice();
  const { cols, moment } = factored, { bits, groupSize } = options;
  annealLayer({ target, rows, cols, bits, groupSize, moment, scale, zeroPoint }, codes, annealing);
  return refineCodes(kernels, target, rows, factored, options, { codes, scale, zeroPoint }, rounds, refit);
}

/** Replaces the rows of `best` that `other` has a lower objective for. */
export function keepBetterRows(best: Candidate, other: Candidate, cols: number): void {
  const rows = best.objective.length, groups = best.scale.length / rows;
  for (let row = 0; row < rows; row++) {
    if (!(other.objective[row]! < best.objective[row]!)) continue;
    best.objective[row] = other.objective[row]!;
    best.codes.set(other.codes.subarray(row * cols, (row + 1) * cols), row * cols);
    best.scale.set(other.scale.subarray(row * groups, (row + 1) * groups), row * groups);
    best.zeroPoint.set(other.zeroPoint.subarray(row * groups, (row + 1) * groups), row * groups);
  }
}

/** A packed tensor's codes and grid with each row's objective. */
export function measure(
  kernels: Kernels,
  weights: Float32Array,
  rows: number,
  factored: FactoredMoment,
  options: GridOptions,
  tensor: PackedTensor,
): Candidate {
  const { scale, zeroPoint } = gridOf(tensor);
  const codes = unpackCodes(kernels, tensor.packed, rows, factored.cols, options.bits);
  return refineCodes(kernels, weights, rows, factored, options, { codes, scale, zeroPoint }, 0, false);
}

/** Sum of rows' objectives. */
export const total = (values: Float64Array): number => values.reduce((sum, value) => sum + value, 0);
