/**
 * Solvers against the second moment of a layer's inputs. `feedback` carries each column's error over to the
 * columns that come later (GPTQ, https://arxiv.org/abs/2210.17323; in the form of LDLQ,
 * https://arxiv.org/abs/2307.13304); `best` starts from several ranges, refits scales and zero points and
 * descends over codes. Either takes each row from the start that does best.
 */
import {
  anneal,
  clipped,
  type GroupScales,
  keepBetterRows,
  packed,
  rangeScales,
  scalesOf,
  solveWithScales,
  total,
} from "./steps.ts";
import { solveBlocks } from "./column_blocks.ts";
import type { MomentProblem } from "./problem.ts";
import type { Solution, SolverSettings } from "./settings.ts";
import { solveTwoLevel } from "./two_level.ts";

/** Error feedback from two ranges. */
export function feedback(problem: MomentProblem): Solution {
  return solve(problem, { ratios: [1], rounds: 0, refit: false, annealing: 0 });
}

/** Refits and descent from every range of the settings, then annealing where they ask for it. */
export function best(problem: MomentProblem, settings: SolverSettings): Solution {
  return solve(problem, settings);
}

type Steps = Pick<SolverSettings, "ratios" | "rounds" | "refit" | "annealing">;

function solve(problem: MomentProblem, steps: Steps): Solution {
  if (problem.moment.block < problem.cols) return solveBlocks(problem, steps, solve);
  if (problem.scaleBits !== undefined) return solveTwoLevel(problem, steps);
  const count = 1 + steps.ratios.length + (steps.annealing > 0 ? 1 : 0);
  let done = 0;
  const own = { ...problem, onShare: (share: number) => problem.onShare?.((done + share) / count) };
  const from = (grid: GroupScales) => {
    const candidate = solveWithScales(own, grid, steps);
    done++;
    return candidate;
  };
  const found = from(scalesOf(clipped(problem))), firstObjective = total(found.objective);
  for (const ratio of steps.ratios) keepBetterRows(found, from(rangeScales(problem, ratio)));
  if (steps.annealing > 0) keepBetterRows(found, anneal(own, found, steps));
  return { tensor: packed(problem, found), objective: total(found.objective), firstObjective };
}
