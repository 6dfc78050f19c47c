/** Solving with a plain scale and zero point for each group. */
import type { Steps } from "./effort.ts";
import type { MomentProblem } from "./problem.ts";
import { bestStarts, fromStarts, rangeStarts } from "./starts.ts";
import { anneal, type Candidate, keepBetterRows } from "./steps.ts";

/** Error feedback from the best ranges, refits and descent, then annealing where the steps have it. */
export function solvePlain(
  problem: MomentProblem,
  steps: Steps,
): { readonly candidate: Candidate; readonly firstObjective: number } {
  const isAnnealed = steps.annealing > 0, refined = isAnnealed ? 0.75 : 1;
  const share = (from: number, to: number) => (part: number) => problem.onShare?.(from + part * (to - from));
  const starts = bestStarts(problem, rangeStarts(steps.ratios), steps.starts);
  const { best, firstObjective } = fromStarts({ ...problem, onShare: share(0, refined) }, starts, steps);
  if (isAnnealed) keepBetterRows(best, anneal({ ...problem, onShare: share(refined, 1) }, best, steps));
  return { candidate: best, firstObjective };
}
