/**
 * Solving with two-level scales: several starts whose scales are fitted to two levels, each row from the one
 * that does best.
 */
import { giveBack, setAside } from "../array_memory.ts";
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
  clipped,
  feedbackFrom,
  type GroupScales,
  keepBetterRows,
  measured,
  rangeScales,
  refine,
  scalesOf,
  total,
} from "./steps.ts";
import { solvePlain } from "./plain.ts";
import type { MomentProblem } from "./problem.ts";
import type { Steps } from "./effort.ts";
import type { Solution } from "./settings.ts";
import { bestStarts, fromStarts, type Start } from "./starts.ts";

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
 * Solves a layer with two-level scales: ranges as for plain ones, their scales fitted to two levels, and one
 * more start from the plain solution with its refitted scales; then descent on what that left.
 */
export function solveTwoLevel(problem: MomentProblem, steps: Steps): Solution {
  const { kernels, rows, cols, bits, groupSize, zeroPoint } = problem;
  const { ratios, rounds, sweeps, refit, annealing } = steps;
  const share = (from: number, to: number) => (part: number) => problem.onShare?.(from + part * (to - from));
  const isSixBits = problem.scaleBits === 8 && bits === 8;
  const plainShare = rounds > 0 && refit && !isSixBits ? 0.4 : 0;
  const onLevels: MomentProblem = { ...problem, zeroPoint: "real", onShare: share(plainShare, 1) };
  if (isSixBits) return solveSixBits(onLevels, clipped(problem) as TwoLevelTensor, steps);
  const starts: Start<TwoLevelStart>[] = [
    (own) => {
      const levels = clipped({ ...own, zeroPoint }) as TwoLevelTensor, scales = scalesOf(levels);
      giveBack(levels.packed); // the search's own codes
      return { ...scales, levels };
    },
    ...(rounds > 0 ? ratios : ratios.filter((ratio) => ratio === 1)).map(
      (ratio): Start<TwoLevelStart> => (own) => twoLevelStart(own, rangeScales({ ...own, zeroPoint }, ratio)),
    ),
  ];
  if (plainShare > 0) {
    starts.push((own) => {
      const plain = { ...own, zeroPoint, scaleBits: undefined, onShare: own.onShare && share(0, plainShare) };
      return twoLevelStart(own, solvePlain(plain, { ...steps, annealing: 0 }).candidate);
    });
  }
  const fixed = { rounds, sweeps, refit: false, refinesEach: steps.refinesEach };
  const found = fromStarts(onLevels, bestStarts(onLevels, starts, steps.starts), fixed);
  const { best, scales, taken, firstObjective } = found;
  const levels = mapLevels(scales[0]!.levels, (array) => array.slice() as typeof array);
  for (const [row, start] of taken.entries()) copyLevelsRow(levels, scales[start]!.levels, row, rows);
  if (annealing > 0) {
    keepBetterRows(best, anneal({ ...onLevels, onShare: undefined }, best, { annealing, ...fixed }));
  }
  const packed = packCodes(kernels, best.codes, rows, cols, bits);
  const tensor = { ...levels, rows, cols, bits, groupSize, packed };
  setAside(best.codes);
  giveBack(
    best.scale,
    best.zeroPoint,
    ...scales.flatMap(({ scale, zeroPoint }) => [scale, zeroPoint]),
  );
  return { tensor, objective: total(best.objective), firstObjective };
}

/**
 * Q6_K's grid, whose codes end at 63 where the kernels' end at 255: feedback and descent on the levels of the
 * search, what goes beyond cut off, and each row the better of that and of the search itself.
 */
function solveSixBits(problem: MomentProblem, searched: TwoLevelTensor, { rounds, sweeps }: Steps): Solution {
  const { kernels, rows, cols, bits } = problem, scales = scalesOf(searched);
  const best = measured(problem, unpackCodes(kernels, searched.packed, rows, cols, bits), scales);
  const firstObjective = total(best.objective);
  const solved = feedbackFrom(problem, scales);
  if (rounds > 0) refine(problem, solved, { rounds, sweeps, refit: false });
  keepBetterRows(best, measured(problem, solved.codes.map((code) => Math.min(code, 63)), scales));
  const packed = packCodes(kernels, best.codes, rows, cols, bits);
  return { tensor: { ...searched, packed }, objective: total(best.objective), firstObjective };
}

/** Copies a row of the scales of a matrix of `rows` rows. */
function copyLevelsRow(to: TwoLevelScales, from: TwoLevelScales, row: number, rows: number): void {
  const part = rowsOf(rows, row, row + 1), sources = levelsOf(from);
  for (const [i, target] of levelsOf(to).entries()) part(target).set(part(sources[i]!));
}
