/**
 * Steps that solvers are made of: scales and zero points to start from, error feedback, refits and descent.
 */
import { WeightsError } from "../../errors.ts";
import { type Doing, E_NONFINITE, E_RANGE, ZERO_POINT_NUMBERS } from "../../native/call.ts";
import * as call from "../../native/functions.ts";
import { takeMemory } from "../array_memory.ts";
import { packCodes, unpackCodes } from "../codes.ts";
import { groupCount, halfBits, halves, type OneLevelTensor, type PackedTensor } from "../packed/layout.ts";
import { groupAffine } from "../packed/two_level.ts";
import { quantize } from "../quantize.ts";
import { annealLayer } from "./annealing.ts";
import { throwIfStopped } from "../../progress.ts";
import { workspace } from "./factored_moment.ts";
import { diagonalOf } from "./moments.ts";
import type { MomentProblem, Problem } from "./problem.ts";
import { FEEDBACK_PASSES, GRADIENT_PASSES, ROUND_PASSES, type Steps } from "./effort.ts";

/** Codes with their scales and zero points, and each row's objective: what the steps below hand on. */
export interface Candidate {
  readonly codes: Uint8Array<ArrayBuffer>;
  readonly scale: Float32Array<ArrayBuffer>;
  readonly zeroPoint: Float32Array<ArrayBuffer>;
  readonly objective: Float64Array<ArrayBuffer>;
}

/** Scales and zero points: `f32[rows, groups]`. */
export type GroupScales = Pick<Candidate, "scale" | "zeroPoint">;

/** Refinement of codes; 0 rounds only measure. */
export type Refinement = Pick<Steps, "rounds" | "sweeps" | "refit">;

const EXPLAINED: Doing = {
  doing: "solve a layer",
  explain(status) {
    const wrong = {
      [E_NONFINITE]: "weights must be finite, got NaN or infinity",
      [E_RANGE]: "weights must allow half-precision scales, got too large ones",
    }[status];
    return wrong === undefined ? undefined : new WeightsError(`Cannot solve a layer: ${wrong}`);
  },
};

/** Scales and zero points of each group's range, shrunk by `ratio`. */
export function rangeScales(problem: Problem, ratio: number): GroupScales {
  const { kernels, weights, rows, cols, bits, groupSize } = problem;
  const groups = groupCount(cols, groupSize), kind = ZERO_POINT_NUMBERS[problem.zeroPoint];
  const scale = new Float32Array(rows * groups), zeroPoint = new Float32Array(rows * groups);
  call.clippedGrids(kernels, EXPLAINED, weights, rows, cols, bits, groupSize, kind, ratio, scale, zeroPoint);
  return { scale, zeroPoint };
}

/**
 * The codes that `clip` finds with the moment's diagonal as the columns' weights, all ones without a moment.
 */
export function clipped(problem: Problem): PackedTensor {
  const { kernels, weights: data, rows, cols, moment, bits, groupSize, zeroPoint, scaleBits } = problem;
  const columnWeights = moment && diagonalOf(moment.moment, cols, moment.block);
  const options = { bits, groupSize, zeroPoint, scaleBits, solver: "clip", columnWeights } as const;
  return quantize(kernels, { data, dtype: "F32" }, rows, cols, options);
}

/** Scale of a group whose weights are all its offset: any code stands for it, and a half float of it is 0. */
export const NO_SCALE = 2 ** -60;

/** Scales and zero points of a packed tensor. */
export function scalesOf(tensor: PackedTensor): GroupScales {
  if (tensor.scaleBits === undefined) {
    const { zeroPoint, bits } = tensor, scale = Float32Array.from(halves(tensor.scale));
    const middle = () => new Float32Array(scale.length).fill(2 ** (bits - 1));
    return { scale, zeroPoint: zeroPoint === undefined ? middle() : Float32Array.from(halves(zeroPoint)) };
  }
  const { scale, offset: zeroPoint } = groupAffine(tensor);
  for (let i = 0; i < scale.length; i++) {
    if (scale[i] === 0) scale[i] = NO_SCALE;
    zeroPoint[i] = -zeroPoint[i]! / scale[i]!;
  }
  return { scale, zeroPoint };
}

/** Error feedback with given scales and zero points. */
export function feedbackFrom(problem: MomentProblem, { scale, zeroPoint }: GroupScales): Candidate {
  const { kernels, rows, cols, bits, groupSize, moment: { block, factor, pivots, order } } = problem;
  const codes = new Uint8Array(takeMemory(rows * cols)); // all of them are written
  const objective = new Float64Array(rows), groups = scale.length / rows;
  const work = workspace(kernels, cols, groupSize);
  inParts(problem, FEEDBACK_PASSES, (begin, end) => {
    const part = <A extends Float32Array | Float64Array | Uint8Array>(array: A, width: number) =>
      array.subarray(begin * width, end * width) as A;
    const layer = [part(problem.weights, cols), end - begin, cols, bits, groupSize] as const;
    const grids = [part(scale, groups), part(zeroPoint, groups)] as const;
    const found = [part(codes, cols), part(objective, 1)] as const;
    call.quantizeFeedback(
      kernels,
      "feed errors back",
      ...layer,
      ...grids,
      block,
      factor,
      pivots,
      order,
      ...found,
      work,
    );
  });
  return { codes, scale, zeroPoint, objective };
}

/** Multiply-adds between two looks for signals and reports of progress: some seconds. */
const PART_MULTIPLY_ADDS = 2e11;
/** Whole panels of rows of the kernels for four threads. */
const PART_ROWS = 672;

/** Runs over parts of a layer's rows, which are independent. @param passes of the work over the moment */
export function inParts(
  { rows, cols, moment: { block }, onShare }: MomentProblem,
  passes: number,
  run: (begin: number, end: number) => void,
): void {
  const count = Math.max(1, Math.ceil(PART_MULTIPLY_ADDS / (passes * cols * block) / PART_ROWS)) * PART_ROWS;
  for (let begin = 0; begin < rows; begin += count) {
    throwIfStopped();
    const end = Math.min(rows, begin + count);
    run(begin, end);
    onShare?.(end / rows);
  }
}

/** As many rounds of refits and descent as asked for, in place. */
export function refine(
  problem: MomentProblem,
  candidate: Candidate,
  { rounds, sweeps, refit }: Refinement,
): void {
  const { kernels, rows, cols, bits, groupSize, moment: { block, moment } } = problem;
  const { codes, scale, zeroPoint, objective } = candidate, groups = scale.length / rows;
  const work = workspace(kernels, cols, groupSize), kind = ZERO_POINT_NUMBERS[problem.zeroPoint];
  inParts(problem, GRADIENT_PASSES + ROUND_PASSES * rounds, (begin, end) => {
    const part = <A extends Float32Array | Float64Array | Uint8Array>(array: A, width: number) =>
      array.subarray(begin * width, end * width) as A;
    const layer = [
      part(problem.weights, cols),
      end - begin,
      cols,
      bits,
      groupSize,
      kind,
      block,
      moment,
    ] as const;
    const grids = [part(scale, groups), part(zeroPoint, groups)] as const;
    call.refineCodes(
      kernels,
      "refine codes",
      ...layer,
      refit ? 1 : 0,
      rounds,
      sweeps,
      part(codes, cols),
      ...grids,
      part(objective, 1),
      work,
    );
  });
}

/** Codes annealed from those of a candidate, then refined. The candidate is not changed. */
export function anneal(
  problem: MomentProblem,
  from: Candidate,
  how: Refinement & { annealing: number },
): Candidate {
  const found = {
    codes: from.codes.slice(),
    scale: from.scale.slice(),
    zeroPoint: from.zeroPoint.slice(),
    objective: from.objective.slice(),
  };
  const { weights: target, moment: { moment, block } } = problem;
  annealLayer({ ...problem, target, moment, block, ...found }, found.codes, how.annealing);
  refine({ ...problem, onShare: undefined }, found, how);
  return found;
}

/** Replaces the rows of `best` that `other` has a lower objective for. */
export function keepBetterRows(best: Candidate, other: Candidate): void {
  const rows = best.objective.length;
  for (let row = 0; row < rows; row++) {
    if (!(other.objective[row]! < best.objective[row]!)) continue;
    best.objective[row] = other.objective[row]!;
    for (const key of ["codes", "scale", "zeroPoint"] as const) {
      const width = best[key].length / rows;
      best[key].set(other[key].subarray(row * width, (row + 1) * width), row * width);
    }
  }
}

/** Codes on given scales, with their objectives. */
export function measured(problem: MomentProblem, codes: Candidate["codes"], scales: GroupScales): Candidate {
  const found = { codes, ...scales, objective: new Float64Array(problem.rows) };
  refine({ ...problem, onShare: undefined }, found, { rounds: 0, sweeps: 1, refit: false });
  return found;
}

/** Σ over rows of the objective of a packed tensor; NaN without a moment. */
export function objectiveOf(problem: Problem, tensor: PackedTensor): number {
  const { kernels, rows, cols, bits, moment } = problem;
  if (moment === undefined) return NaN;
  const codes = unpackCodes(kernels, tensor.packed, rows, cols, bits);
  return total(measured({ ...problem, moment }, codes, scalesOf(tensor)).objective);
}

/** Sum of rows' objectives. */
export const total = (values: Float64Array): number => values.reduce((sum, value) => sum + value, 0);

/** A candidate as a packed tensor of plain scales. */
export function packed(problem: Problem, { codes, scale, zeroPoint }: Candidate): OneLevelTensor {
  const { kernels, rows, cols, bits, groupSize, zeroPoint: zeroPointKind } = problem;
  return {
    rows,
    cols,
    bits,
    groupSize,
    zeroPointKind,
    packed: packCodes(kernels, codes, rows, cols, bits),
    scale: halfBits(scale),
    zeroPoint: zeroPointKind === "symmetric" ? undefined : halfBits(zeroPoint),
  };
}
