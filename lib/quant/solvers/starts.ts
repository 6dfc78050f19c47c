/**
 * Where solvers start: codes by error feedback at several ranges of the groups. Its objective costs half a
 * pass over the moment, so that ranges are compared by it, on some rows first, and only what is best is
 * refined.
 */
import { sampleRows } from "./factored_moment.ts";
import type { MomentProblem } from "./problem.ts";
import { SAMPLE_ROWS, type Steps } from "./effort.ts";
import {
  type Candidate,
  clipped,
  feedbackFrom,
  type GroupScales,
  keepBetterRows,
  rangeScales,
  refine,
  scalesOf,
  total,
} from "./steps.ts";

/** A way to scales and zero points. */
export type Start<Scales extends GroupScales = GroupScales> = (problem: MomentProblem) => Scales;

/** Ranges that the weights alone choose, then the groups' own shrunk by ratios. */
export const rangeStarts = (ratios: readonly number[]): Start[] => [
  (problem) => scalesOf(clipped(problem)),
  ...ratios.map((ratio): Start => (problem) => rangeScales(problem, ratio)),
];

/**
 * The starts that do best by error feedback on a sample of the rows, as many as asked for, in their order;
 * all of them for a layer that is no larger than the sample.
 */
export function bestStarts<S extends GroupScales>(
  problem: MomentProblem,
  all: readonly Start<S>[],
  count: number,
): readonly Start<S>[] {
  if (all.length <= count || problem.rows <= SAMPLE_ROWS) return all;
  const sample: MomentProblem = {
    ...problem,
    weights: sampleRows(problem.weights, problem.cols, SAMPLE_ROWS),
    rows: SAMPLE_ROWS,
    onShare: undefined,
  };
  const objectives = all.map((start) => total(feedbackFrom(sample, start(sample)).objective));
  const least = [...objectives].sort((a, b) => a - b)[count - 1]!;
  return all.filter((_, i) => objectives[i]! <= least).slice(0, count);
}

/** Every row from the start that does best for it. */
export interface FromStarts<S extends GroupScales> {
  readonly best: Candidate;
  /** Scales of each start. */
  readonly scales: readonly S[];
  /** Start of each row. */
  readonly taken: Uint8Array;
  /** Objective of all rows from the first start, by error feedback. */
  readonly firstObjective: number;
}

/** Solves from several starts: error feedback, then refining of each, or of each row's best alone. */
export function fromStarts<S extends GroupScales>(
  problem: MomentProblem,
  starts: readonly Start<S>[],
  { refinesEach, ...refinement }: Pick<Steps, "rounds" | "sweeps" | "refit" | "refinesEach">,
): FromStarts<S> {
  const taken = new Uint8Array(problem.rows), scales: S[] = [], isRefined = refinement.rounds > 0;
  const feedbackShare = !isRefined ? 1 : refinesEach ? 0.2 : 0.4;
  const count = starts.length;
  const part = (from: number, to: number): MomentProblem => ({
    ...problem,
    onShare: (share) => problem.onShare?.(from + share * (to - from)),
  });
  let best: Candidate | undefined, firstObjective = NaN;
  for (const [i, start] of starts.entries()) {
    const own = start(problem);
    scales.push(own);
    const copy = { scale: own.scale.slice(), zeroPoint: own.zeroPoint.slice() };
    const middle = refinesEach || !isRefined ? (i + feedbackShare) / count : (i + 1) / count * feedbackShare;
    const from = refinesEach || !isRefined ? i / count : i / count * feedbackShare;
    const candidate = feedbackFrom(part(from, middle), copy);
    if (i === 0) firstObjective = total(candidate.objective);
    if (isRefined && refinesEach) refine(part(middle, (i + 1) / count), candidate, refinement);
    if (best === undefined) {
      best = candidate;
      continue;
    }
    for (let row = 0; row < problem.rows; row++) {
      if (candidate.objective[row]! < best.objective[row]!) taken[row] = i;
    }
    keepBetterRows(best, candidate);
  }
  if (isRefined && !refinesEach) refine(part(feedbackShare, 1), best!, refinement);
  return { best: best!, scales, taken, firstObjective };
}
