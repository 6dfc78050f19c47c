/**
 * Solving for trellis codes: 2 or 3 bits whose level depends on the codes before them, found by a beam search
 * whose survivors each feed their own errors back. The codes are those of QTIP
 * (https://arxiv.org/abs/2406.11235), which feeds errors back between tiles of columns.
 */
import { WeightsError } from "../../errors.ts";
import * as call from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";
import { packCodes } from "../codes.ts";
import { convertFloats } from "../convert.ts";
import {
  emptyLevels,
  groupCount,
  halfBits,
  linesOf,
  OFFSET_BITS,
  type PackedTensor,
  ROTATED_SCALE_BITS,
  type TwoLevelTensor,
  type WeightFormat,
} from "../packed/layout.ts";
import {
  fittedGrid,
  gridOver,
  gridScales,
  MOST_SCALE,
  nearestScale,
  type ScaleGrid,
  scalesBeside,
  TINY,
} from "../packed/scale_codes.ts";
import { quantize, type WeightSolver } from "../quantize.ts";
import type { Weights } from "../weights.ts";
import { NO_STEPS, searchMultiplyAdds, type Steps, trellisRatios } from "./effort.ts";
import { factorMoments, inOwnOrder, workspace } from "./factored_moment.ts";
import { checkProblem, type MomentProblem } from "./problem.ts";
import { rotated, ROTATION_SEED, rowLosses } from "./rotated.ts";
import type { Solution } from "./settings.ts";
import { type Candidate, inParts, keepBetterRows, NO_SCALE, total } from "./steps.ts";

/** Deviation of numbers that a table's levels are made for, by bits; feedback's targets are wider. */
const TABLE_DEVIATIONS: Readonly<Record<number, number>> = { 2: 24.5 / 32, 3: 20.08 / 32 };

/** Rounds of least squares and descent behind each search. */
const SETTLING_ROUNDS = 2;

/** What least squares fits, `AQ_REFIT_*` of kernels/include/arrowquant.h. */
const REFITS = { nothing: 0, lines: 1, scales: 2 } as const;

const tables = new Map<number, Float32Array<ArrayBuffer>>();
/** Levels by window. */
function tableOf(kernels: Kernels, bits: number): Float32Array<ArrayBuffer> {
  const known = tables.get(bits) ?? new Float32Array(2 ** (bits + 6));
  if (!tables.has(bits)) call.trellisTable(kernels, "solve a layer", bits, known);
  tables.set(bits, known);
  return known;
}

type Lines = Pick<Candidate, "scale" | "zeroPoint">;

/** Weights of group i, counted over all rows. */
function groupWeights({ weights, cols, groupSize }: MomentProblem, i: number): Float32Array {
  const groups = groupCount(cols, groupSize), size = groupSize === 0 ? cols : groupSize;
  const begin = i % groups * size, at = Math.floor(i / groups) * cols + begin;
  return weights.subarray(at, at + Math.min(size, cols - begin));
}

/** A problem whose rows are one after the other in a single one, as they have one scale. */
const asOneRow = (problem: MomentProblem): MomentProblem => ({
  ...problem,
  rows: 1,
  cols: problem.rows * problem.cols,
});

/** Scales and offsets of each group from the mean and the deviation of its weights, as half floats. */
function startLines(problem: MomentProblem, ratio: number): Lines {
  const { rows, cols, bits, groupSize, scaleBits } = problem, hasOffset = scaleBits === OFFSET_BITS;
  const groups = groupCount(cols, groupSize);
  const scale = new Float32Array(rows * groups), zeroPoint = new Float32Array(rows * groups);
  for (let i = 0; i < scale.length; i++) {
    const own = groupWeights(problem, i);
    let sum = 0, squares = 0;
    for (const weight of own) sum += weight;
    const mean = hasOffset ? sum / own.length : 0;
    for (const weight of own) squares += (weight - mean) ** 2;
    const wanted = ratio * Math.sqrt(squares / own.length) / TABLE_DEVIATIONS[bits]!;
    // A group of equal weights needs levels for what the half float of its mean leaves.
    scale[i] = Math.f16round(Math.max(wanted, Math.abs(mean) * 2 ** -12, TINY));
    zeroPoint[i] = Math.f16round(mean);
    if (Number.isFinite(scale[i]!) && Number.isFinite(zeroPoint[i]!)) continue;
    const isFinite = own.every(Number.isFinite);
    const wrong = isFinite
      ? "allow half-precision scales, got too large ones"
      : "be finite, got NaN or infinity";
    throw new WeightsError(`Cannot solve a layer: weights must ${wrong}`);
  }
  return { scale, zeroPoint };
}

/** Part of the median scale of groups below which a grid need not reach, see {@linkcode CODED_LOSS}. */
const LEAST_SCALE = 1 / 4;

/** A grid of coded scales on which all starts of a layer lie. */
function gridOf(problem: MomentProblem): ScaleGrid {
  const starts = startLines(problem, 1).scale.toSorted(), ratios = trellisRatios(problem.bits);
  const least = Math.max(starts[0]!, starts[starts.length >> 1]! * LEAST_SCALE) * Math.min(...ratios);
  const most = Math.min(Math.max(starts.at(-1)! * Math.max(...ratios), least), MOST_SCALE);
  return gridOver(Math.min(Math.max(least, TINY), most), most);
}

/** Most squared error as a multiple of that with half floats, of a row and in the mean of rows. */
const CODED_LOSS = { row: 8, mean: 1.75 }, ROTATED_LOSS = { row: 40, mean: 4 };

/** Whether half floats are needed: each row is one output, whatever its size beside the others. */
const areTooLarge = (losses: Float64Array, { row, mean }: typeof CODED_LOSS): boolean =>
  !losses.every((loss) => loss <= row) || total(losses) > mean * losses.length;

/**
 * Squared errors of rows on grids of coded scales as multiples of those with half floats. The error of a
 * group goes with the square of its scale; a scale that is too small loses as much by what lies beyond its
 * levels.
 */
function codedLosses(problem: MomentProblem): (scales: Float64Array) => Float64Array {
  const { rows, cols, groupSize } = problem, groups = groupCount(cols, groupSize);
  const { scale: wanted } = startLines(problem, 1);
  const { scale: half } = startLines({ ...problem, scaleBits: OFFSET_BITS }, 1);
  const lossOf = (row: number, scales: Float64Array) => {
    let coded = 0, plain = 0;
    for (let i = row * groups; i < (row + 1) * groups; i++) {
      const scale = scales[nearestScale(scales, wanted[i]!)]!, own = Math.max(scale, wanted[i]! ** 2 / scale);
      const width = Math.min(groupSize || cols, cols - i % groups * groupSize);
      coded += width * own ** 2;
      plain += width * half[i]! ** 2;
    }
    return coded / plain;
  };
  return (scales) => Float64Array.from({ length: rows }, (_, row) => lossOf(row, scales));
}

/** What a relative change of each group's scale means: its part of the objective of its row. */
function scaleWeights({ scale, objective }: Candidate): Float64Array {
  const weights = Float64Array.from(scale, (own) => own ** 2), groups = scale.length / objective.length;
  for (const [row, own] of objective.entries()) {
    const part = weights.subarray(row * groups, (row + 1) * groups), all = total(part);
    for (let g = 0; g < groups; g++) part[g]! *= own / all;
  }
  return weights;
}

/** The grid for fitted scales; that of the starts where a better one would lose too much. */
function gridFor(problem: MomentProblem, candidate: Candidate, start: ScaleGrid): ScaleGrid {
  const losses = codedLosses(problem),
    isAllowed = (scales: Float64Array) => !areTooLarge(losses(scales), CODED_LOSS);
  return fittedGrid(candidate.scale, scaleWeights(candidate), isAllowed) ?? start;
}

/** Takes scales to the nearest of a grid, in place, and offsets to 0. */
function toGrid({ scale, zeroPoint }: Lines, grid: ScaleGrid): void {
  const scales = gridScales(grid);
  for (let i = 0; i < scale.length; i++) scale[i] = scales[nearestScale(scales, scale[i]!)]!;
  zeroPoint.fill(0);
}

/** A problem as it is searched: with half floats, on a grid of coded scales, or rotated with one scale. */
interface Prepared {
  readonly problem: MomentProblem;
  readonly grid?: ScaleGrid | undefined;
  readonly rotationSeed?: number | undefined;
}

/** Prepares a problem; where fewer scales lose too much, with half floats. */
function prepared(problem: MomentProblem): Prepared {
  if (problem.scaleBits === OFFSET_BITS) return { problem };
  if (problem.scaleBits === ROTATED_SCALE_BITS && !areTooLarge(rowLosses(problem), ROTATED_LOSS)) {
    return { problem: rotated(problem), rotationSeed: ROTATION_SEED };
  }
  const grid = problem.scaleBits === ROTATED_SCALE_BITS ? undefined : gridOf(problem);
  if (grid !== undefined && !areTooLarge(codedLosses(problem)(gridScales(grid)), CODED_LOSS)) {
    return { problem, grid };
  }
  return { problem: { ...problem, scaleBits: OFFSET_BITS } };
}

/** Scales and offsets to search from. */
function startOf({ problem, grid, rotationSeed }: Prepared, ratio: number): Lines {
  if (rotationSeed !== undefined) {
    const { rows } = problem, { scale: [one] } = startLines(asOneRow(problem), ratio);
    return { scale: new Float32Array(rows).fill(one!), zeroPoint: new Float32Array(rows) };
  }
  const lines = startLines(problem, ratio);
  if (grid !== undefined) toGrid(lines, grid);
  return lines;
}

/** The parts of a layer's arrays that hold rows `[begin, end)`. */
const rowsPart =
  (begin: number, end: number) =>
  <A extends Float32Array | Float64Array | Uint8Array>(array: A, width: number) =>
    array.subarray(begin * width, end * width) as A;

/** Codes by the beam search for given scales and offsets. */
function searchFrom(
  problem: MomentProblem,
  { factor, pivots }: Pick<MomentProblem["moment"], "factor" | "pivots">,
  { scale, zeroPoint }: Lines,
): Candidate {
  const { kernels, rows, cols, bits, groupSize, moment: { block } } = problem, groups = scale.length / rows;
  const codes = new Uint8Array(rows * cols), objective = new Float64Array(rows);
  const table = tableOf(kernels, bits), work = workspace(kernels, cols, groupSize);
  inParts(problem, searchMultiplyAdds(bits) / block + 0.5, (begin, end) => {
    const part = rowsPart(begin, end),
      layer = [part(problem.weights, cols), end - begin, cols, bits, groupSize] as const;
    const lines = [part(scale, groups), part(zeroPoint, groups)] as const;
    const found = [part(codes, cols), part(objective, 1), work] as const;
    call.searchTrellis(
      kernels,
      "solve a layer",
      ...layer,
      table,
      0,
      ...lines,
      block,
      factor,
      pivots,
      ...found,
    );
  });
  return { codes, scale: scale.slice(), zeroPoint: zeroPoint.slice(), objective };
}

/**
 * Least squares of scales, of offsets too with `lines`, and descent over codes, in place; 0 rounds only
 * measure.
 */
function settle(
  problem: MomentProblem,
  { codes, scale, zeroPoint, objective }: Candidate,
  refit: keyof typeof REFITS,
  rounds = SETTLING_ROUNDS,
): void {
  const { kernels, rows, cols, bits, groupSize, moment: { block, moment } } = problem,
    groups = scale.length / rows;
  const table = tableOf(kernels, bits), work = workspace(kernels, cols, groupSize);
  inParts(problem, 1 + 2 * rounds, (begin, end) => {
    const part = rowsPart(begin, end),
      layer = [part(problem.weights, cols), end - begin, cols, bits, groupSize] as const;
    const steps = [REFITS[refit], rounds] as const;
    const lines = [part(scale, groups), part(zeroPoint, groups), part(objective, 1), work] as const;
    call.settleTrellis(
      kernels,
      "solve a layer",
      ...layer,
      table,
      block,
      moment,
      ...steps,
      part(codes, cols),
      ...lines,
    );
  });
}

/** Takes all rows to the one scale that is best for their codes, in place: the least of a parabola. */
function fitOneScale(problem: MomentProblem, { codes, scale, zeroPoint, objective }: Candidate): void {
  const own = scale[0]!;
  const at = (share: number): number => {
    const measured = {
      codes,
      scale: scale.map((own) => share * own),
      zeroPoint,
      objective: objective.slice(),
    };
    settle({ ...problem, onShare: undefined }, measured, "nothing", 0);
    return total(measured.objective);
  };
  const half = at(0.5), one = total(objective), slope = 2 * (one - half);
  const curvature = (at(2) - one - slope) / 1.5, best = Math.f16round(own * (0.75 - slope / (2 * curvature)));
  if (best > 0 && best < Infinity) scale.fill(best);
}

/** Behind a search: codes descend on the best scales of a grid, in place; the first ones choose the grid. */
function settleOnGrid(
  problem: MomentProblem,
  candidate: Candidate,
  refit: boolean,
  start: ScaleGrid,
  chosen: ScaleGrid | undefined,
): ScaleGrid {
  settle(problem, candidate, refit ? "scales" : "nothing");
  const grid = chosen ?? gridFor(problem, candidate, start);
  toGrid(candidate, grid);
  settle(problem, candidate, "nothing");
  return grid;
}

/** Behind a search: codes descend, and once more on the one scale that fits them best, in place. */
function settleOneScale(problem: MomentProblem, candidate: Candidate, refit: boolean): void {
  settle(problem, candidate, "nothing");
  if (!refit) return;
  fitOneScale(problem, candidate);
  settle(problem, candidate, "nothing");
}

/**
 * A candidate with zeros for groups of weights that are smaller than any half float, which no scale fits;
 * undefined without such groups. Of a grid, which has no scale of 0, only whole rows count.
 */
function withZeros({ problem, grid, rotationSeed }: Prepared, best: Candidate): Candidate | undefined {
  const whole = grid === undefined ? problem : { ...problem, groupSize: 0 as const };
  const layer = rotationSeed === undefined ? whole : asOneRow(problem);
  const count = layer.rows * groupCount(layer.cols, layer.groupSize);
  const scales = best.scale.length / count, scale = best.scale.slice(), zeroPoint = best.zeroPoint.slice();
  const isTiny = (weights: Float32Array) =>
    weights.reduce((sum, weight) => sum + weight ** 2, 0) < weights.length * TINY ** 2;
  let found = 0;
  for (let i = 0; i < count; i++) {
    if (!isTiny(groupWeights(layer, i))) continue;
    scale.fill(NO_SCALE, i * scales, (i + 1) * scales);
    zeroPoint.fill(0, i * scales, (i + 1) * scales);
    found++;
  }
  if (found === 0) return undefined;
  const zeros = { codes: best.codes, scale, zeroPoint, objective: best.objective.slice() };
  settle({ ...problem, onShare: undefined }, zeros, "nothing", 0);
  return zeros;
}

/**
 * Searches, fits scales and offsets and descends over codes, as often as the steps have rounds; each row
 * keeps the best of all passes and starts, or all rows together where they have one scale. The scales that
 * the first pass fits choose the grid of coded ones; on a grid passes from the third on start beside the best
 * scales, as from the same ones they would find the same again. Where fewer scales than half floats lose too
 * much the tensor has half floats, and neither `scaleGrid` nor `rotationSeed`. Tiny weights are never worse
 * than zeros.
 */
export function solveTrellis(asked: MomentProblem, steps: Steps): Solution {
  const { refinesEach, rounds, refit } = steps;
  const start = prepared(asked), { problem, rotationSeed } = start, isOne = rotationSeed !== undefined;
  const own = inOwnOrder(problem.kernels, problem.moment), passes = Math.max(1, rounds);
  const all = trellisRatios(problem.bits),
    ratios = refinesEach ? all : all.slice(0, 1),
    count = ratios.length * passes;
  let best: Candidate | undefined, grid: ScaleGrid | undefined, firstObjective = NaN, done = 0;
  const part = (share: number): MomentProblem => ({
    ...problem,
    onShare: (part) => problem.onShare?.((done + share * part) / count),
  });
  const better = (one: Candidate | undefined, other: Candidate): Candidate => {
    if (one === undefined) return other;
    if (isOne) return total(other.objective) < total(one.objective) ? other : one;
    keepBetterRows(one, other);
    return one;
  };
  for (const ratio of ratios) {
    let found: Candidate | undefined, lines = startOf({ ...start, grid }, ratio);
    for (let pass = 0; pass < passes; pass++, done++) {
      if (grid !== undefined && pass > 1) {
        lines = { ...lines, scale: scalesBeside(lines.scale, grid, pass) };
      }
      const candidate = searchFrom(part(0.8), own, lines);
      if (done === 0) firstObjective = total(candidate.objective);
      if (isOne) settleOneScale(part(1), candidate, refit);
      else if (start.grid !== undefined) grid = settleOnGrid(part(1), candidate, refit, start.grid, grid);
      else settle(part(1), candidate, refit ? "lines" : "nothing");
      found = better(found, candidate);
      lines = found;
    }
    best = better(best, found!);
  }
  const zeros = withZeros(start, best!);
  if (zeros !== undefined && start.grid !== undefined) {
    const isBetter = zeros.objective.some((own, row) => own < best!.objective[row]!);
    if (isBetter) return solveTrellis({ ...asked, scaleBits: OFFSET_BITS, onShare: undefined }, steps);
  } else if (zeros !== undefined) best = better(best, zeros);
  return {
    tensor: packedTrellis({ ...start, grid }, best!),
    objective: total(best!.objective),
    firstObjective,
  };
}

/** A candidate as a packed tensor. */
function packedTrellis(
  { problem, grid: scaleGrid, rotationSeed }: Prepared,
  { codes, scale, zeroPoint }: Candidate,
): TwoLevelTensor {
  const { kernels, rows, cols, bits, groupSize } = problem,
    shape = { rows, cols, groupSize, scaleBits: OFFSET_BITS, codes: "trellis" } as const;
  const tensor = {
    ...shape,
    bits,
    packed: packCodes(kernels, codes, rows, cols, bits),
    ...emptyLevels(shape),
    ...(scaleGrid === undefined ? {} : { scaleGrid }),
    ...(rotationSeed === undefined ? {} : { rotationSeed }),
  } as const satisfies TwoLevelTensor;
  const [scales, offsets] = linesOf(tensor);
  scales.set(halfBits(scale));
  offsets.set(halfBits(zeroPoint));
  return tensor;
}

/** As `quantize`, for trellis codes as well: those are searched as if inputs were independent. */
export function quantizeByWeights(
  kernels: Kernels,
  weights: Weights,
  rows: number,
  cols: number,
  options: WeightFormat & { readonly solver: WeightSolver },
): PackedTensor {
  const { codes, ...plain } = options;
  if (codes !== "trellis") return quantize(kernels, weights, rows, cols, plain);
  const values = new Float32Array(convertFloats(kernels, weights, rows * cols, "F32").buffer);
  const unit = { cols, block: 1, tokens: 1, weight: 1, second: new Float32Array(cols).fill(1) };
  const problem = {
    ...options,
    kernels,
    weights: values,
    rows,
    cols,
    moment: factorMoments(kernels, unit, { damping: 0 }),
  };
  checkProblem("quantize a matrix", problem);
  return solveTrellis(problem, { ...NO_STEPS, rounds: 2, refit: true }).tensor;
}
