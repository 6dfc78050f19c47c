/**
 * The solver ladder: from a layer's weights and the moments of its inputs to packed codes. `round` and `clip` look at the
 * weights; `feedback` carries each column's error over to the columns that come later (GPTQ, https://arxiv.org/abs/2210.17323; in the
 * form of LDLQ, https://arxiv.org/abs/2307.13304); `best` tries several grids, refits scales and zero points and descends over
 * codes, and can aim at what undoes the errors made before the layer. What each step gains is in docs/solvers.md.
 */
import type { Kernels } from "../../native/mod.ts";
import { checkTemperature } from "./annealing.ts";
import { DEFAULT_DAMPING, diagonalOf, type FactoredMoment } from "./factored_moment.ts";
import { packCodes, quantize } from "../kernels.ts";
import {
  BIT_WIDTHS,
  GROUP_SIZES,
  type OneLevelTensor,
  type PackedTensor,
  ZERO_POINT_KINDS,
} from "../packed/layout.ts";
import {
  anneal,
  type Candidate,
  clipGrid,
  type Grid,
  type GridOptions,
  keepBetterRows,
  measure,
  rangeGrid,
  solveOnGrid,
  total,
} from "./grids.ts";
import type { Solver } from "../../config/names.ts";
import { solveTwoLevel } from "./two_level.ts";

export { CALIBRATED_SOLVERS, type Solver, SOLVERS } from "../../config/names.ts";
export { correctedTarget, type FactoredMoment, factorMoments } from "./factored_moment.ts";
export type { GridOptions } from "./grids.ts";

/** Settings of `feedback` and `best`. */
export interface SolverSettings {
  /** Part of the moment's mean diagonal that is added to its diagonal. Default 0.01. */
  readonly damping: number;
  /** Ranges that `best` tries, as parts of the group's own, beside the grids of `clip`. */
  readonly ratios: readonly number[];
  /** Times that `best` refits scales and zero points and descends over codes. */
  readonly rounds: number;
  /** Whether scales and zero points are refitted, too. */
  readonly refit: boolean;
  /** How much of the error made before the layer it should undo, 0 to 1. */
  readonly correction: number;
  /** The same for the error of the stream that the layer's output is added to. */
  readonly residualCorrection: number;
  /** Temperature at which `best` begins to anneal codes, in squared steps of the grid; 0 does not. */
  readonly annealing: number;
  /** Rank of a low-rank correction, 0 for none. {@linkcode solveLayer} makes none: `solveLowRankLayer` does. */
  readonly lowRank: number;
  /** Of a layer's inputs, before it is solved. {@linkcode solveLayer} rotates nothing: its caller does. */
  readonly rotation: "none" | "hadamard";
  readonly rotationSeed: number;
}

export const DEFAULT_SOLVER_SETTINGS: SolverSettings = {
  damping: DEFAULT_DAMPING,
  ratios: [1, 0.85, 0.7, 0.55],
  rounds: 4,
  refit: true,
  correction: 1,
  residualCorrection: 1,
  annealing: 0,
  lowRank: 0,
  rotation: "none",
  rotationSeed: 0,
};

/** What a solver made of a layer. */
export interface Solution {
  readonly tensor: PackedTensor;
  /** Σ over rows of Δ M Δᵀ, Δ the error against the target and M the damped moment; NaN without one. */
  readonly objective: number;
  /** The same of the grid that was tried first, to see what trying others and refining gained. */
  readonly firstObjective: number;
}

function checkSettings(
  doing: string,
  { damping, ratios, rounds, correction, residualCorrection, annealing }: SolverSettings,
) {
  const check = (name: string, value: number, low: number, high: number) => {
    if (!(value >= low && value <= high)) {
      throw new RangeError(`Cannot ${doing}: ${name} must be from ${low} to ${high}, got ${value}`);
    }
  };
  check("damping", damping, 0, 10);
  for (const ratio of ratios) check("ratios", ratio, 0.01, 1);
  if (ratios.length > 32) {
    throw new RangeError(`Cannot ${doing}: ratios must be at most 32 numbers, got ${ratios.length}`);
  }
  check("rounds", rounds, 0, 100);
  if (!Number.isInteger(rounds)) {
    throw new RangeError(`Cannot ${doing}: rounds must be a whole number, got ${rounds}`);
  }
  check("correction", correction, 0, 1);
  check("residualCorrection", residualCorrection, 0, 1);
  checkTemperature(annealing);
}

function checkProblem(
  weights: Float32Array,
  rows: number,
  cols: number,
  { bits, groupSize, zeroPoint }: GridOptions,
) {
  const doing = "solve a layer";
  if (!(weights instanceof Float32Array) || weights.length !== rows * cols) {
    throw new TypeError(`Cannot ${doing}: weights must be ${rows} × ${cols} float32, got ${weights?.length}`);
  }
  for (
    const [name, value, allowed] of [
      ["bits", bits, BIT_WIDTHS],
      ["groupSize", groupSize, GROUP_SIZES],
      ["zeroPoint", zeroPoint, ZERO_POINT_KINDS],
    ] as const
  ) {
    if (!(allowed as readonly unknown[]).includes(value)) {
      throw new RangeError(`Cannot ${doing}: ${name} must be one of ${allowed.join(", ")}, got ${value}`);
    }
  }
}

/**
 * Solves a layer.
 *
 * **Shapes** `weights: f32[rows, cols]`: what the solver aims at, the layer's own or {@linkcode correctedTarget}. Rows are
 * independent. `moment` may be undefined for `round` and `clip` alone; `clip` takes its diagonal for the columns' weights.
 *
 * With a unit moment `feedback` equals `clip`: no column's error tells anything about another.
 *
 * @throws {TypeError | RangeError} when an argument has the wrong type, shape or value
 * @throws {WeightsError} when weights are NaN, infinite or too large for half-precision scales
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 * import { accumulateMoment, emptyMoments } from "./moments.ts";
 * import { factorMoments, solveLayer } from "./solve_layer.ts";
 *
 * const kernels = await openKernels();
 * const moments = emptyMoments(2);
 * accumulateMoment(kernels, Float32Array.of(1, 2, 3, 4), undefined, undefined, 2, moments.second);
 * moments.tokens = moments.weight = 2;
 * const { tensor } = solveLayer(
 *   kernels,
 *   "feedback",
 *   Float32Array.of(0.3, -0.2, 0.1, 0.7),
 *   2,
 *   2,
 *   factorMoments(kernels, moments),
 *   { bits: 2, groupSize: 0, zeroPoint: "real" },
 * );
 * console.log(tensor.packed.length); // a word a row
 * ```
 */
export function solveLayer(
  kernels: Kernels,
  solver: Solver,
  weights: Float32Array,
  rows: number,
  cols: number,
  moment: FactoredMoment | undefined,
  options: GridOptions,
  settings: SolverSettings = DEFAULT_SOLVER_SETTINGS,
): Solution {
  checkProblem(weights, rows, cols, options);
  checkSettings("solve a layer", settings);
  if (moment !== undefined && moment.cols !== cols) {
    throw new TypeError(`Cannot solve a layer: the moment must have ${cols} columns, got ${moment.cols}`);
  }
  if (solver === "round" || solver === "clip") {
    const columnWeights = solver === "round" || moment === undefined
      ? undefined
      : diagonalOf(moment.moment, cols);
    const tensor = quantize(kernels, { data: weights, dtype: "F32" }, rows, cols, {
      ...options,
      solver,
      columnWeights,
    });
    const objective = moment === undefined
      ? NaN
      : total(measure(kernels, weights, rows, moment, options, tensor).objective);
    return { tensor, objective, firstObjective: objective };
  }
  if (moment === undefined) {
    throw new TypeError(`Cannot solve a layer: the solver "${solver}" needs the moments of its inputs`);
  }
  const rounds = solver === "best" ? settings.rounds : 0;
  if (options.scaleBits !== undefined) {
    const annealing = solver === "best" ? settings.annealing : 0;
    return solveTwoLevel(kernels, weights, rows, moment, options, { ...settings, rounds, annealing });
  }
  const solve = (grid: Grid) =>
    solveOnGrid(kernels, weights, rows, moment, options, grid, rounds, settings.refit);
  const best = solve(clipGrid(kernels, weights, rows, cols, options, moment.moment));
  const firstObjective = total(best.objective);
  for (const ratio of solver === "best" ? settings.ratios : [1]) {
    keepBetterRows(best, solve(rangeGrid(kernels, weights, rows, cols, options, ratio)), cols);
  }
  if (solver === "best" && settings.annealing > 0) {
    const other = anneal(kernels, weights, rows, moment, options, best, settings);
    keepBetterRows(best, other, cols);
  }
  return {
    tensor: packed(kernels, best, rows, cols, options),
    objective: total(best.objective),
    firstObjective,
  };
}

function packed(
  kernels: Kernels,
  { codes, scale, zeroPoint }: Candidate,
  rows: number,
  cols: number,
  { bits, groupSize, zeroPoint: zeroPointKind }: GridOptions,
): OneLevelTensor {
  const halves = (values: Float32Array) => new Uint16Array(Float16Array.from(values).buffer);
  return {
    rows,
    cols,
    bits,
    groupSize,
    zeroPointKind,
    packed: packCodes(kernels, codes, rows, cols, bits),
    scale: halves(scale),
    zeroPoint: zeroPointKind === "symmetric" ? undefined : halves(zeroPoint),
  };
}
