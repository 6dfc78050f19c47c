/**
 * Solving with two-level scales: several starts whose scales are fitted to two levels, each row from the one
 * that does best.
 */
import { packCodes, unpackCodes } from "../codes.ts";
import {
  levelsOf,
  mapLevels,
  packedWords,
  rowsOf,
  type TwoLevelScales,
  type TwoLevelTensor,
} from "../packed/layout.ts";
import { symmetricLevels } from "../packed/symmetric_levels.ts";
import { fitTwoLevel } from "../packed/two_level.ts";
import {
  anneal,
  type Candidate,
  clipped,
  type GroupScales,
  keepBetterRows,
  measured,
  rangeScales,
  scalesOf,
  solveWithScales,
  total,
} from "./steps.ts";
import type { MomentProblem } from "./problem.ts";
import type { Solution, SolverSettings } from "./settings.ts";

/** Scales and zero points with the two levels that they come from. */
interface TwoLevelStart extends GroupScales {
  readonly levels: TwoLevelScales;
}

/** The two-level scales nearest to real ones. */
function twoLevelStart(problem: MomentProblem, { scale, zeroPoint }: GroupScales): TwoLevelStart {
  const { kernels, rows, cols, bits, groupSize, scaleBits } = problem;
  const shape = { rows, cols, bits, groupSize };
  const minimum = () => scale.map((value, i) => value * zeroPoint[i]!);
  const levels = scaleBits === 8
    ? symmetricLevels(kernels, shape, { scale }).levels
    : fitTwoLevel(kernels, { ...shape, scaleBits: scaleBits! }, scale, minimum());
  const packed = new Uint32Array(rows * packedWords(cols, bits));
  return { ...scalesOf({ ...levels, ...shape, packed }), levels };
}

/**
 * Solves a layer with two-level scales: ranges as for plain ones, their scales fitted to two levels, then
 * feedback and descent on what that left; the plain solution with its refitted scales is one more start.
 */
export function solveTwoLevel(
  problem: MomentProblem,
  { ratios, rounds, refit, annealing }: Pick<SolverSettings, "ratios" | "rounds" | "refit" | "annealing">,
): Solution {
  const { kernels, rows, cols, bits, groupSize } = problem, fixed = { rounds, refit: false };
  const searched = clipped(problem);
  const onLevels: MomentProblem = { ...problem, zeroPoint: "real" };
  if (problem.scaleBits === 8 && bits === 8) {
    return solveSixBits(onLevels, searched as TwoLevelTensor, rounds);
  }
  const starts: TwoLevelStart[] = [{
    ...scalesOf(searched),
    levels: searched as typeof searched & TwoLevelScales,
  }];
  for (const ratio of rounds > 0 ? ratios : [1]) {
    const plain = rangeScales(problem, ratio);
    starts.push(twoLevelStart(problem, plain));
    if (rounds > 0 && refit) {
      starts.push(twoLevelStart(problem, solveWithScales(problem, plain, { rounds, refit: true })));
    }
  }
  const [first, ...others] = starts as [TwoLevelStart, ...TwoLevelStart[]];
  const best: Candidate = solveWithScales(onLevels, first, fixed);
  const levels = mapLevels(first.levels, (array) => array.slice() as typeof array);
  const firstObjective = total(best.objective);
  for (const start of others) {
    const candidate = solveWithScales(onLevels, start, fixed);
    for (let row = 0; row < rows; row++) {
      if (candidate.objective[row]! < best.objective[row]!) copyLevelsRow(levels, start.levels, row, rows);
    }
    keepBetterRows(best, candidate);
  }
  if (annealing > 0) keepBetterRows(best, anneal(onLevels, best, { annealing, ...fixed }));
  const packed = packCodes(kernels, best.codes, rows, cols, bits);
  const tensor = { ...levels, rows, cols, bits, groupSize, packed };
  return { tensor, objective: total(best.objective), firstObjective };
}

/**
 * Q6_K's grid, whose codes end at 63 where the kernels' end at 255: feedback and descent on the levels of the search,
 * what goes beyond cut off, and each row the better of that and of the search itself.
 */
function solveSixBits(problem: MomentProblem, searched: TwoLevelTensor, rounds: number): Solution {
  const { kernels, rows, cols, bits } = problem, scales = scalesOf(searched);
  const best = measured(problem, unpackCodes(kernels, searched.packed, rows, cols, bits), scales);
  const firstObjective = total(best.objective);
  const { codes } = solveWithScales(problem, scales, { rounds, refit: false });
  keepBetterRows(best, measured(problem, codes.map((code) => Math.min(code, 63)), scales));
  const packed = packCodes(kernels, best.codes, rows, cols, bits);
  return { tensor: { ...searched, packed }, objective: total(best.objective), firstObjective };
}

/** Copies a row of the scales of a matrix of `rows` rows. */
function copyLevelsRow(to: TwoLevelScales, from: TwoLevelScales, row: number, rows: number): void {
  const part = rowsOf(rows, row, row + 1), sources = levelsOf(from);
  for (const [i, target] of levelsOf(to).entries()) part(target).set(part(sources[i]!));
}
