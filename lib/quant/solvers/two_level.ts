/** Solving with two-level scales: several starts whose scales are fitted to two levels, each row from the one that does best. */
import type { Kernels } from "../../native/mod.ts";
import { diagonalOf, type FactoredMoment } from "./factored_moment.ts";
import { packCodes, quantize } from "../kernels.ts";
import { type PackedTensor, packedWords, type TwoLevelScales } from "../packed/layout.ts";
import {
  anneal,
  type Candidate,
  type Grid,
  gridOf,
  type GridOptions,
  keepBetterRows,
  rangeGrid,
  solveOnGrid,
  total,
} from "./grids.ts";
import type { Solution, SolverSettings } from "./solve_layer.ts";
import { fitTwoLevel } from "../packed/two_level.ts";

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

/**
 * Solves a layer with two-level scales: ranges as for plain ones, their scales fitted to two levels, then feedback and descent on what
 * that left; the plain solution with its refitted scales is one more start.
 */
export function solveTwoLevel(
  kernels: Kernels,
  weights: Float32Array,
  rows: number,
  moment: FactoredMoment,
  options: GridOptions,
  { ratios, rounds, refit, annealing }: Pick<SolverSettings, "ratios" | "rounds" | "refit" | "annealing">,
): Solution {
  const { cols } = moment, { bits, groupSize } = options;
  const columnWeights = diagonalOf(moment.moment, cols);
  const searched = quantize(kernels, { data: weights, dtype: "F32" }, rows, cols, {
    ...options,
    solver: "clip",
    columnWeights,
  });
  const starts: TwoLevelGrid[] = [{ ...gridOf(searched), levels: searched as PackedTensor & TwoLevelScales }];
  for (const ratio of rounds > 0 ? ratios : [1]) {
    const plain = rangeGrid(kernels, weights, rows, cols, options, ratio);
    starts.push(twoLevelGrid(kernels, plain, rows, cols, options));
    if (rounds === 0 || !refit) continue;
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
  if (annealing > 0) {
    keepBetterRows(
      best!,
      anneal(kernels, weights, rows, moment, options, best!, { annealing, rounds, refit: false }),
      cols,
    );
  }
  const { codes, levels, objective } = best!;
  const tensor: PackedTensor = {
    ...levels,
    rows,
    cols,
    bits,
    groupSize,
    packed: packCodes(kernels, codes, rows, cols, bits),
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
