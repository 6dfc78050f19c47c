/**
 * Solvers against the second moment of a layer's inputs. `feedback` carries each column's error over to the
 * columns that come later (GPTQ, https://arxiv.org/abs/2210.17323; in the form of LDLQ,
 * https://arxiv.org/abs/2307.13304); `best` starts from several ranges, refits scales and zero points and
 * descends over codes. Either takes each row from the start that does best.
 */
import { NO_STEPS, type Steps, stepsOf } from "./effort.ts";
import { solvePlain } from "./plain.ts";
import type { MomentProblem } from "./problem.ts";
import type { Solution, SolverSettings } from "./settings.ts";
import { packed, total } from "./steps.ts";
import { solveTrellis } from "./trellis.ts";
import { solveTwoLevel } from "./two_level.ts";

export function feedback(problem: MomentProblem): Solution {
  return solve(problem, NO_STEPS);
}

/** Refits and descent from the best ranges, then annealing where the settings ask for it. */
export function best(problem: MomentProblem, settings: SolverSettings): Solution {
  return solve(problem, stepsOf(settings, problem.bits));
}

function solve(problem: MomentProblem, steps: Steps): Solution {
  if (problem.codes === "trellis") return solveTrellis(problem, steps);
  if (problem.scaleBits !== undefined) return solveTwoLevel(problem, steps);
  const { candidate, firstObjective } = solvePlain(problem, steps);
  return { tensor: packed(problem, candidate), objective: total(candidate.objective), firstObjective };
}
