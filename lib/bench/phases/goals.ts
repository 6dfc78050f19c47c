/** Goals of the phases, as far as the rows of a run are about them. */
import { bootstrapRatio, type Interval, wilsonInterval } from "../../eval/intervals.ts";
import type { Summary } from "../../eval/statistics.ts";
import { span } from "../settings.ts";
import type { Goal } from "../suite.ts";
import type { PhaseMemory } from "./memory.ts";
import { percent, relativeAccuracy, type Row } from "./report.ts";
import {
  BEST_ROW,
  DYNAMIC_ROW,
  MIXED_ROW,
  REFINED_ROW,
  STATIC4_ONE_ROW,
  STATIC4_ROW,
  STATIC_ROW,
  UNREFINED_ROW,
} from "./rows.ts";
import { overhead, type PhaseTimes } from "./time.ts";

/** Measurements beside the rows that goals are about. */
interface GoalOptions {
  readonly name: string;
  readonly family: string;
  readonly seed: number;
  readonly memory: PhaseMemory | undefined;
  /** Time of forward passes with static ranges over those with per-token ones, pair by pair. */
  readonly staticOverDynamic: Summary | undefined;
}

/** Goals met or missed; those that were not measured say why. */
export function phaseGoals(options: GoalOptions, rows: readonly Row[]): Goal[] {
  const { name, family, memory, staticOverDynamic } = options;
  const goals = new Goals(options, rows);
  const [baseline, one, two, three] = ["baseline", "phase1", "phase2", "phase3_full"].map((row) =>
    goals.row(row)
  );
  const unrefined = goals.row(UNREFINED_ROW);
  if (baseline !== undefined) {
    if (one !== undefined) phase1Goals(goals, baseline, [one, unrefined]);
    if (two !== undefined) phase2Goals(goals, baseline, one, [two, unrefined]);
    if (three !== undefined) phase3Goals(goals, rows[0]!, baseline, [three, unrefined]);
  }
  if (family === "dream") goals.ratio("refinement / best, step KL", REFINED_ROW, BEST_ROW, 0.6);
  goals.ratio("all static / dynamic 8 bits, step KL", STATIC_ROW, DYNAMIC_ROW, 1.1);
  goals.ratio("mostly static / dynamic 8 bits, step KL", MIXED_ROW, DYNAMIC_ROW, 1.1);
  if (staticOverDynamic !== undefined) {
    const { median, medianDeviation } = staticOverDynamic;
    const measured = `${median.toFixed(3)} × ± ${medianDeviation.toFixed(3)}`;
    goals.add("all static / dynamic 8 bits, time", "below 1 ×", measured, median < 1);
  }
  goals.ratio("4 bits, G 10 / G 1, step KL", STATIC4_ROW, STATIC4_ONE_ROW, 1, true);
  const selection = (two ?? one)?.selection;
  if (selection !== undefined) {
    goals.add(
      "selecting θ / forward pass",
      "below 1 %",
      `${(100 * selection).toFixed(2)} %`,
      selection < 0.01,
    );
  }
  if (memory !== undefined) {
    const { statistics, phases, baseline } = memory, share = statistics / baseline;
    // What is kept is the goal; the peaks beside it also have scratch, code and garbage.
    const peak = `${megabytes(phases)}, ${percent(phases / baseline - 1)}`;
    goals.add(
      "phases 1 and 2, memory kept / peak",
      "below 15 %",
      `${(100 * share).toFixed(2)} % of ${megabytes(baseline)}; peak ${peak}`,
      share < 0.15,
    );
  }
  return goals.all.map((goal) => ({ ...goal, goal: `${name}: ${goal.goal}` }));
}

const NO_TASKS = "no tasks, or none asked for (--limit)";
const megabytes = (bytes: number) => `${(bytes / 1e6).toFixed(0)} MB`;

class Goals {
  readonly all: Goal[] = [];
  readonly #seed: number;
  readonly #rows: readonly Row[];

  constructor({ seed }: GoalOptions, rows: readonly Row[]) {
    this.#seed = seed;
    this.#rows = rows;
  }

  row(name: string): Row | undefined {
    return this.#rows.find(({ setting }) => setting?.name === name);
  }

  add(goal: string, wanted: string, measured: string, met: boolean): void {
    this.all.push({ goal, wanted, measured, met });
  }

  unknown(goal: string, wanted: string, reason: string): void {
    this.all.push({ goal, wanted, measured: null, met: null, reason });
  }

  /** Step KL of a row / another's. @param isSure the whole interval has to be below */
  ratio(goal: string, own: string, other: string, most: number, isSure = false): void {
    const [a, b] = [this.row(own)?.measurement.stepKl, this.row(other)?.measurement.stepKl];
    if (a === undefined || b === undefined) return;
    const { value, low, high } = bootstrapRatio(a.sums, b.sums, { seed: this.#seed });
    this.add(
      goal,
      isSure ? `surely below ${most} ×` : `at most ${Number(most.toFixed(2))} ×`,
      `${value.toFixed(3)} × ${low.toFixed(3)}–${high.toFixed(3)}`,
      isSure ? high < most : value <= most,
    );
  }

  /** Time of parts of a row's phases over the same row without them. */
  overOwn(goal: string, row: Row | undefined, most: number, parts: readonly (keyof PhaseTimes)[]): void {
    if (row === undefined) return;
    const value = overhead(row.runs!, row.solveSeconds!, row.solveSeconds!, parts);
    const solver = row.solveSeconds === 0 ? "round" : "best";
    this.add(`${goal} / ${solver}`, `below ${100 * most} %`, percent(value), value < most);
  }
}

function phase1Goals(goals: Goals, baseline: Row, rows: readonly (Row | undefined)[]): void {
  for (const row of rows) goals.overOwn("phase 1 itself, overhead", row, 0.01, ["scores", "stepKl"]);
  const isSame = rows[0]!.digests!.weights === baseline.digests!.weights;
  goals.add("phase 1, weights", "the baseline's", isSame ? "the same digest" : "another digest", isSame);
}

function phase2Goals(
  goals: Goals,
  baseline: Row,
  one: Row | undefined,
  rows: readonly (Row | undefined)[],
): void {
  for (const row of rows) goals.overOwn("phase 2 itself, overhead", row, 0.1, ["smoothing"]);
  const score = rows[0]!.report!.validation!.markovScore, before = one?.report?.validation?.markovScore;
  const text = `${score.toFixed(3)}${before === undefined ? "" : `, ${before.toFixed(3)} before`}`;
  goals.add("phase 2, Markov score", "at least 0.82", text, score >= 0.82);
  const own = exactMatch(rows[0]!), base = exactMatch(baseline);
  if (own === undefined || base === undefined) {
    return goals.unknown("phase 2, accuracy", "not below the baseline's", NO_TASKS);
  }
  // Not below the baseline's interval.
  const wanted = `at least ${base.low.toFixed(3)}`;
  goals.add("phase 2, accuracy", wanted, own.value.toFixed(3), own.value >= base.low);
}

function phase3Goals(goals: Goals, full: Row, baseline: Row, rows: readonly [Row, Row | undefined]): void {
  const [three] = rows, accuracy = relativeAccuracy(three, baseline), wanted = "+9.36 %, Δ above 0";
  const goal = "phase 3, accuracy / baseline";
  if (accuracy === undefined) goals.unknown(goal, wanted, NO_TASKS);
  else if (exactMatch(baseline)!.value >= exactMatch(full)!.low) {
    goals.unknown(goal, wanted, "at full precision: step KL decides");
  } else {
    const difference = three.differenceToBaseline!;
    const text = `${percent(accuracy)}, Δ ${span(difference, 3)}`;
    goals.add(goal, wanted, text, accuracy >= 0.0936 && difference.low > 0);
  }
  goals.ratio("phase 3, step KL / baseline", "phase3_full", "baseline", 1 / 3);
  const score = three.report!.validation!.markovScore;
  goals.add("phase 3, Markov score", "at least 0.90", score.toFixed(3), score >= 0.9);
  for (const [goal, row] of [["phase 3", three], ["phase 3 unrefined", rows[1]]] as const) {
    const more = row?.overBest;
    if (more !== undefined) goals.add(`${goal}, overhead / best`, "below 25 %", percent(more), more < 0.25);
  }
}

/** Share of all prompts solved, with its interval. */
function exactMatch({ measurement: { solved } }: Row): Interval | undefined {
  return solved === undefined || solved.length === 0
    ? undefined
    : wilsonInterval(solved.reduce((sum, one) => sum + one, 0), solved.length);
}
