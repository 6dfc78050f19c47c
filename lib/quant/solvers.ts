/**
 * The solver ladder: from a layer's weights and the moments of its inputs to packed codes. `round` and `clip` look at the
 * weights; `feedback` carries each column's error over to the columns that come later (GPTQ, https://arxiv.org/abs/2210.17323; in the
 * form of LDLQ, https://arxiv.org/abs/2307.13304); `best` tries several grids, refits scales and zero points and descends over
 * codes, and can aim at what undoes the errors made before the layer. What each step gains is in docs/solvers.md.
 */
import { KernelError, WeightsError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import { findNonfinite, MAX_THREADS, packCodes, quantize, unpackCodes } from "./kernels.ts";
import {
  BIT_WIDTHS,
  type BitWidth,
  GROUP_SIZES,
  groupCount,
  type GroupSize,
  type OneLevelTensor,
  type PackedTensor,
  packedWords,
  type ScaleBits,
  type TwoLevelScales,
  ZERO_POINT_KINDS,
  type ZeroPointKind,
} from "./layout.ts";
import { annealLayer } from "./annealing.ts";
import { fitTwoLevel, groupAffine } from "./two_level.ts";
import { type InputMoments, MAX_MOMENT_COLS } from "./moments.ts";

/** How scales, zero points and codes are found; each needs more of the layer's inputs and time than the one before. */
export type Solver = "round" | "clip" | "feedback" | "best";
export const SOLVERS: readonly Solver[] = ["clip", "round", "feedback", "best"];
/** Solvers that need {@linkcode InputMoments}. */
export const CALIBRATED_SOLVERS: readonly Solver[] = ["feedback", "best"];

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
  damping: 0.01,
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

/** The grid that codes are on. */
export interface GridOptions {
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
  readonly zeroPoint: ZeroPointKind;
  /** Bits of the sub-codes of two-level scales; undefined for plain half floats. They need real zero points. */
  readonly scaleBits?: ScaleBits | undefined;
  /** Default 1. Never changes a byte. */
  readonly threads?: number | undefined;
}

/** The moment of a layer's inputs made fit for solving: damped, ordered and factored. */
export interface FactoredMoment {
  readonly cols: number;
  /** Mean of w x xᵀ with the damping on its diagonal: `f32[cols, cols]`. */
  readonly moment: Float32Array<ArrayBuffer>;
  /** Columns from the largest diagonal to the smallest: `i32[cols]`. */
  readonly order: Int32Array<ArrayBuffer>;
  /** U of the ordered moment = U diag(pivots) Uᵀ: `f32[cols, cols]`. */
  readonly factor: Float32Array<ArrayBuffer>;
  readonly pivots: Float32Array<ArrayBuffer>;
  /** Part of the mean diagonal that was added at last; more than was asked for where the moment was not positive definite. */
  readonly damping: number;
  /** Columns that were 0 in every input. */
  readonly deadColumns: number;
  readonly tokens: number;
}

/** What a solver made of a layer. */
export interface Solution {
  readonly tensor: PackedTensor;
  /** Σ over rows of Δ M Δᵀ, Δ the error against the target and M the damped moment; NaN without one. */
  readonly objective: number;
  /** The same of the grid that was tried first, to see what trying others and refining gained. */
  readonly firstObjective: number;
}

/** Damping is raised tenfold at most this often before a moment counts as broken. */
const MAX_DAMPING_RAISES = 8;

function fail(what: string, status: number): never {
  throw new KernelError(`Cannot ${what}: the kernel reports status ${status}`, { status });
}

/** Scratch that the kernels need, kept between calls and grown. */
let scratch = new Float32Array(0);
function workspace(kernels: Kernels, cols: number, groupSize: GroupSize, threads: number): Float32Array {
  const floats = new BigUint64Array(1);
  const status = kernels.calls.aq_solver_work(kernels.size(cols), kernels.size(groupSize), threads, floats);
  if (status !== 0) fail(`solve a layer of ${cols} columns`, status);
  if (scratch.length < Number(floats[0])) scratch = new Float32Array(Number(floats[0]));
  return scratch;
}

function checkSettings(
  doing: string,
  { damping, ratios, rounds, correction, residualCorrection }: SolverSettings,
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
}

function checkThreads(doing: string, threads: number): void {
  if (!Number.isInteger(threads) || threads < 1 || threads > MAX_THREADS) {
    throw new RangeError(
      `Cannot ${doing}: threads must be a whole number from 1 to ${MAX_THREADS}, got ${threads}`,
    );
  }
}

/**
 * Damps, orders and factors the moment of a layer's inputs.
 *
 * Where it is not positive definite the damping is raised tenfold until it is, and the result says so: codes are never made from
 * NaN. Columns that no input ever reached keep only the damping.
 *
 * @throws {WeightsError} when the moment holds NaN or infinity, a negative diagonal, or stays indefinite
 *
 * @example
 * ```ts
 * import { openKernels } from "../native/mod.ts";
 * import { accumulateMoment, emptyMoments } from "./moments.ts";
 *
 * const kernels = await openKernels();
 * const moments = emptyMoments(2);
 * accumulateMoment(kernels, Float32Array.of(1, 2, 3, 4), undefined, undefined, 2, moments.second);
 * moments.tokens = moments.weight = 2;
 * console.log(factorMoments(kernels, moments).order); // column 1 first: its inputs are larger
 * ```
 */
export function factorMoments(
  kernels: Kernels,
  moments: InputMoments,
  { damping = DEFAULT_SOLVER_SETTINGS.damping, threads = 1 }: {
    readonly damping?: number | undefined;
    readonly threads?: number | undefined;
  } = {},
): FactoredMoment {
  const doing = "factor a moment";
  const { cols, second, weight, tokens } = moments;
  checkThreads(doing, threads);
  if (!(cols >= 1 && cols <= MAX_MOMENT_COLS) || second.length !== cols * cols) {
    throw new TypeError(`Cannot ${doing}: second must be ${cols} × ${cols} sums, got ${second.length}`);
  }
  if (!(weight > 0) || weight === Infinity) {
    throw new WeightsError(`Cannot ${doing}: the inputs' weights must add up to a number > 0, got ${weight}`);
  }
  if (findNonfinite(kernels, { data: second, dtype: "F32" }, second.length) >= 0) {
    throw new WeightsError(`Cannot ${doing}: it must be finite, got NaN or infinity`);
  }
  const moment = second.map((value) => value / weight);
  let mean = 0, deadColumns = 0;
  for (let k = 0; k < cols; k++) {
    const diagonal = moment[k * cols + k]!;
    if (diagonal < 0) throw new WeightsError(`Cannot ${doing}: its diagonal must be ≥ 0, got ${diagonal}`);
    if (diagonal === 0) deadColumns++;
    mean += diagonal;
  }
  // With inputs that were all 0 any codes do: plain rounding comes out of the unit moment.
  mean = mean === 0 ? 1 : mean / cols;
  const diagonal = diagonalOf(moment, cols);
  const order = Int32Array.from({ length: cols }, (_, k) => k);
  order.sort((a, b) => diagonal[b]! - diagonal[a]! || a - b);
  const factor = new Float32Array(cols * cols), pivots = new Float32Array(cols);
  const work = workspace(kernels, cols, 0, threads);
  let used = damping;
  for (let raises = 0;; raises++) {
    for (let k = 0; k < cols; k++) moment[k * cols + k] = diagonal[k]! + used * mean;
    for (let i = 0; i < cols; i++) {
      const row = order[i]! * cols;
      for (let j = i; j < cols; j++) factor[i * cols + j] = moment[row + order[j]!]!;
    }
    const status = kernels.calls.aq_factor_moment(
      factor,
      kernels.size(cols),
      pivots,
      work,
      kernels.isaNumber,
      threads,
    );
    if (status === 0) break;
    if (status !== -3) fail(doing, status);
    if (raises === MAX_DAMPING_RAISES) {
      throw new WeightsError(
        `Cannot ${doing}: it must be positive semidefinite, got an indefinite one even with damping ${used}`,
      );
    }
    used = used === 0 ? 1e-6 : used * 10;
  }
  return { cols, moment, order, factor, pivots, damping: used, deadColumns, tokens };
}

/**
 * The weights whose outputs on the inputs as they are come nearest to the full-precision outputs on the inputs as they should
 * have been: `W + (correction · W · cross + residual) M⁻¹`. The idea is GPTAQ's (https://arxiv.org/abs/2504.02692); that the stream which
 * the output is added to is mended, too, is ours.
 *
 * **Shapes** `weights: f32[rows, cols]`, `cross: f32[cols, cols]` and `residual: f32[rows, cols]` as mean sums → `f32[rows, cols]`
 */
export function correctedTarget(
  kernels: Kernels,
  weights: Float32Array,
  rows: number,
  { cols, factor, pivots, order }: FactoredMoment,
  cross: Float32Array | undefined,
  residual: Float32Array | undefined,
  settings: Pick<SolverSettings, "correction" | "residualCorrection">,
  threads = 1,
): Float32Array<ArrayBuffer> {
  const wanted = new Float32Array(rows * cols);
  if (cross !== undefined && settings.correction > 0) {
    // out[t, n] = Σ x[t, k] w[n, k]: the cross moment's columns are the rows that a product takes
    const turned = new Float32Array(cols * cols);
    for (let i = 0; i < cols; i++) {
      for (let j = 0; j < cols; j++) turned[j * cols + i] = settings.correction * cross[i * cols + j]!;
    }
    const status = kernels.calls.aq_linear(
      weights,
      kernels.size(rows),
      turned,
      0,
      null,
      kernels.size(cols),
      kernels.size(cols),
      wanted,
      kernels.isaNumber,
      threads,
    );
    if (status !== 0) fail("correct a layer's target", status);
  }
  if (residual !== undefined) {
    for (let i = 0; i < wanted.length; i++) wanted[i]! += settings.residualCorrection * residual[i]!;
  }
  const ordered = new Float32Array(rows * cols);
  for (let row = 0; row < rows * cols; row += cols) {
    for (let k = 0; k < cols; k++) ordered[row + k] = wanted[row + order[k]!]!;
  }
  const status = kernels.calls.aq_solve_moment(
    factor,
    pivots,
    kernels.size(cols),
    ordered,
    kernels.size(rows),
    workspace(kernels, cols, 0, threads),
    kernels.isaNumber,
    threads,
  );
  if (status !== 0) fail("correct a layer's target", status);
  for (let row = 0; row < rows * cols; row += cols) {
    for (let k = 0; k < cols; k++) wanted[row + order[k]!] = weights[row + order[k]!]! + ordered[row + k]!;
  }
  return wanted;
}

/** Codes with the grid they are on, and each row's objective: what the steps below hand on. */
interface Candidate {
  readonly codes: Uint8Array<ArrayBuffer>;
  readonly scale: Float32Array<ArrayBuffer>;
  readonly zeroPoint: Float32Array<ArrayBuffer>;
  readonly objective: Float64Array<ArrayBuffer>;
}

type Grid = Pick<Candidate, "scale" | "zeroPoint">;

/** The grid of each group's range, shrunk by `ratio`. */
function rangeGrid(
  kernels: Kernels,
  weights: Float32Array,
  rows: number,
  cols: number,
  { bits, groupSize, zeroPoint: kind, threads = 1 }: GridOptions,
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
    threads,
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

/** How much each column counts by itself. */
const diagonalOf = (moment: Float32Array, cols: number): Float32Array<ArrayBuffer> =>
  Float32Array.from({ length: cols }, (_, k) => moment[k * cols + k]!);

/** The grid that `clip` finds with the moment's diagonal as the columns' weights. */
function clipGrid(
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

function gridOf(tensor: PackedTensor): Grid {
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

/** A grid of two-level scales. */
interface TwoLevelGrid extends Grid {
  readonly levels: TwoLevelScales;
}

/** The grid of two-level scales nearest to a real one. */
function twoLevelGrid(
  kernels: Kernels,
  { scale, zeroPoint }: Grid,
  rows: number,
  cols: number,
  { bits, groupSize, scaleBits }: GridOptions,
): TwoLevelGrid {
  const minimum = scale.map((value, i) => value * zeroPoint[i]!);
  const levels = fitTwoLevel(kernels, { rows, cols, groupSize, scaleBits: scaleBits! }, scale, minimum);
  const packed = new Uint32Array(rows * packedWords(cols, bits));
  return { ...gridOf({ ...levels, rows, cols, bits, groupSize, packed }), levels };
}

/** Error feedback on a grid, then as many rounds of refitting and descent as asked for: 0 only measures. */
function solveOnGrid(
  kernels: Kernels,
  target: Float32Array,
  rows: number,
  factored: FactoredMoment,
  options: GridOptions,
  grid: Grid,
  rounds: number,
  refit: boolean,
): Candidate {
  const { cols, factor, order } = factored, { bits, groupSize, threads = 1 } = options;
  const codes = new Uint8Array(rows * cols);
  const { scale, zeroPoint } = grid;
  const work = workspace(kernels, cols, groupSize, threads);
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
    threads,
  );
  if (status !== 0) fail("feed errors back", status);
  return refineCodes(kernels, target, rows, factored, options, { codes, scale, zeroPoint }, rounds, refit);
}

/** As many rounds of refitting and descent as asked for, in place; 0 only measures. */
function refineCodes(
  kernels: Kernels,
  target: Float32Array,
  rows: number,
  { cols, moment }: Pick<FactoredMoment, "cols" | "moment">,
  { bits, groupSize, zeroPoint: kind, threads = 1 }: GridOptions,
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
    workspace(kernels, cols, groupSize, threads),
    kernels.isaNumber,
    threads,
  );
  if (status !== 0) fail("refine codes", status);
  return { codes, scale, zeroPoint, objective };
}

/** Replaces the rows of `best` that `other` has a lower objective for. */
function keepBetterRows(best: Candidate, other: Candidate, cols: number): void {
  const rows = best.objective.length, groups = best.scale.length / rows;
  for (let row = 0; row < rows; row++) {
    if (!(other.objective[row]! < best.objective[row]!)) continue;
    best.objective[row] = other.objective[row]!;
    best.codes.set(other.codes.subarray(row * cols, (row + 1) * cols), row * cols);
    best.scale.set(other.scale.subarray(row * groups, (row + 1) * groups), row * groups);
    best.zeroPoint.set(other.zeroPoint.subarray(row * groups, (row + 1) * groups), row * groups);
  }
}

function packed(
  kernels: Kernels,
  { codes, scale, zeroPoint }: Candidate,
  rows: number,
  cols: number,
  { bits, groupSize, zeroPoint: zeroPointKind, threads = 1 }: GridOptions,
): OneLevelTensor {
  const halves = (values: Float32Array) => new Uint16Array(Float16Array.from(values).buffer);
  return {
    rows,
    cols,
    bits,
    groupSize,
    zeroPointKind,
    packed: packCodes(kernels, codes, rows, cols, bits, threads),
    scale: halves(scale),
    zeroPoint: zeroPointKind === "symmetric" ? undefined : halves(zeroPoint),
  };
}

const total = (values: Float64Array): number => values.reduce((sum, value) => sum + value, 0);

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
 * import { openKernels } from "../native/mod.ts";
 * import { accumulateMoment, emptyMoments } from "./moments.ts";
 * import { factorMoments, solveLayer } from "./solvers.ts";
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
  checkThreads("solve a layer", options.threads ?? 1);
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
    return solveTwoLevel(kernels, weights, rows, moment, options, settings, rounds);
  }
  const solve = (grid: Grid) =>
    solveOnGrid(kernels, weights, rows, moment, options, grid, rounds, settings.refit);
  const best = solve(clipGrid(kernels, weights, rows, cols, options, moment.moment));
  const firstObjective = total(best.objective);
  for (const ratio of solver === "best" ? settings.ratios : [1]) {
    keepBetterRows(best, solve(rangeGrid(kernels, weights, rows, cols, options, ratio)), cols);
  }
  if (solver === "best" && settings.annealing > 0) {
    const codes = best.codes.slice(), scale = best.scale.slice(), zeroPoint = best.zeroPoint.slice();
    annealLayer(
      { target: weights, rows, cols, ...options, moment: moment.moment, scale, zeroPoint },
      codes,
      settings.annealing,
    );
    const other = refineCodes(
      kernels,
      weights,
      rows,
      moment,
      options,
      { codes, scale, zeroPoint },
      rounds,
      settings.refit,
    );
    if (process.env.ANNEAL_LOG) {
      console.error(
        rows,
        cols,
        total(other.objective) / total(best.objective),
        other.objective.filter((v, i) => v < best.objective[i]!).length / rows,
      );
    }
    keepBetterRows(best, other, cols);
  }
  return {
    tensor: packed(kernels, best, rows, cols, options),
    objective: total(best.objective),
    firstObjective,
  };
}

/**
 * Solves a layer with two-level scales: ranges as for plain ones, their scales fitted to two levels, then feedback and descent on what
 * that left; the plain solution with its refitted scales is one more start.
 */
function solveTwoLevel(
  kernels: Kernels,
  weights: Float32Array,
  rows: number,
  moment: FactoredMoment,
  options: GridOptions,
  settings: SolverSettings,
  rounds: number,
): Solution {
  const { cols } = moment, { bits, groupSize } = options;
  const columnWeights = diagonalOf(moment.moment, cols);
  const searched = quantize(kernels, { data: weights, dtype: "F32" }, rows, cols, {
    ...options,
    solver: "clip",
    columnWeights,
  });
  const starts: TwoLevelGrid[] = [{ ...gridOf(searched), levels: searched as PackedTensor & TwoLevelScales }];
  for (const ratio of rounds > 0 ? settings.ratios : [1]) {
    const plain = rangeGrid(kernels, weights, rows, cols, options, ratio);
    starts.push(twoLevelGrid(kernels, plain, rows, cols, options));
    if (rounds === 0 || !settings.refit) continue;
    const refitted = solveOnGrid(kernels, weights, rows, moment, options, plain, rounds, true);
    starts.push(twoLevelGrid(kernels, refitted, rows, cols, options));
  }
  let best: (Candidate & { levels: TwoLevelScales }) | undefined;
  let firstObjective = NaN;
  for (const start of starts) {
    const { levels } = start;
    const candidate = {
      ...solveOnGrid(kernels, weights, rows, moment, options, start, rounds, false),
      levels,
    };
    if (best === undefined) {
      firstObjective = total(candidate.objective);
      best = { ...candidate, levels: copyLevels(levels) };
      continue;
    }
    for (let row = 0; row < rows; row++) {
      if (candidate.objective[row]! < best.objective[row]!) copyLevelsRow(best.levels, levels, row, rows);
    }
    keepBetterRows(best, candidate, cols);
  }
  const { codes, levels, objective } = best!;
  const tensor: PackedTensor = {
    ...levels,
    rows,
    cols,
    bits,
    groupSize,
    packed: packCodes(kernels, codes, rows, cols, bits, options.threads ?? 1),
  };
  return { tensor, objective: total(objective), firstObjective };
}

const LEVEL_ARRAYS = ["subScale", "subMin", "superScale", "superMin"] as const;

function copyLevels({ scaleBits, subScale, subMin, superScale, superMin }: TwoLevelScales): TwoLevelScales {
  return {
    scaleBits,
    subScale: subScale.slice(),
    subMin: subMin.slice(),
    superScale: superScale.slice(),
    superMin: superMin.slice(),
  };
}

function copyLevelsRow(to: TwoLevelScales, from: TwoLevelScales, row: number, rows: number): void {
  for (const key of LEVEL_ARRAYS) {
    const width = to[key].length / rows;
    to[key].set(from[key].subarray(row * width, (row + 1) * width), row * width);
  }
}

/** A packed tensor's codes and grid with each row's objective. */
function measure(
  kernels: Kernels,
  weights: Float32Array,
  rows: number,
  factored: FactoredMoment,
  options: GridOptions,
  tensor: PackedTensor,
): Candidate {
  const { scale, zeroPoint } = gridOf(tensor);
  const codes = unpackCodes(kernels, tensor.packed, rows, factored.cols, options.bits, options.threads);
  return refineCodes(kernels, weights, rows, factored, options, { codes, scale, zeroPoint }, 0, false);
}
