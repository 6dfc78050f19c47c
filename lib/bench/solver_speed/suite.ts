/**
 * The suite of the calibrated solver's speed: its kernels at the widths of Dream 7B as shares of the same
 * run's own product of matrices (SGEMM), whole runs of `best`, and a forecast for published models from the
 * rates of this run. Weights and inputs are random: no accuracy. Each part is a file beside this one.
 */
import { withThreads } from "../../native/mod.ts";
import { SOLVER_SPEED_PARTS, type SolverSpeedPart } from "../options.ts";
import { type BenchContext, type Goal, mergeReports, type Suite, type SuiteReport } from "../suite.ts";
import { type EffortForm, type EffortRow, effortSection, measureEffort } from "./effort.ts";
import {
  measureFromStatistics,
  statisticsGoals,
  type StatisticsRow,
  statisticsSection,
} from "./from_statistics.ts";
import { type MeasuredStep, measureKernels } from "./kernel_steps.ts";
import { type Forecast, forecastPublished } from "./published.ts";
import { FULL_SCALE, type PartRun, QUICK_SCALE, shapesAsked, type SolverSpeedScale } from "./scale.ts";
import { measureWholeRuns, type WholeRun } from "./whole_runs.ts";

/** Forms of the layer that is solved with more and more steps. */
const EFFORT_FORMS: readonly EffortForm[] = [
  { bits: 2, groupSize: 0 },
  { bits: 2, groupSize: 64 },
  { bits: 4, groupSize: 64 },
];

/** What a part measures. */
type Measured = MeasuredStep | Forecast | WholeRun | StatisticsRow | (EffortRow & EffortForm);

function measureEfforts(
  { context, kernels, scale: { effort } }: PartRun,
): SuiteReport<EffortRow & EffortForm> {
  const measured = EFFORT_FORMS.map((form) => {
    const { bits, groupSize } = form, groups = groupSize === 0 ? "whole rows" : `groups of ${groupSize}`;
    context.progress(`what further passes gain, ${bits} bits, ${groups}`);
    return { form, rows: measureEffort(kernels, effort, form, context.options.seed) };
  });
  return {
    sections: measured.map(({ rows, form }) => effortSection(rows, effort, form)),
    rows: measured.flatMap(({ rows, form }) => rows.map((row) => ({ ...row, ...form }))),
    goals: [],
    skipped: [],
  };
}

async function measureStatistics(
  { context, kernels, scale: { statistics } }: PartRun,
): Promise<SuiteReport<StatisticsRow>> {
  const rows = await measureFromStatistics(context, kernels, statistics);
  const goals = statisticsGoals(rows, statistics === FULL_SCALE.statistics);
  return { sections: [statisticsSection(rows)], rows, goals, skipped: [] };
}

/** The parts, in the order in which they run. */
const PARTS: Readonly<
  Record<SolverSpeedPart, (run: PartRun) => SuiteReport<Measured> | Promise<SuiteReport<Measured>>>
> = {
  kernels: measureKernels,
  published: forecastPublished,
  models: measureWholeRuns,
  statistics: measureStatistics,
  effort: measureEfforts,
};

const PARTS_WITH_GOALS = SOLVER_SPEED_PARTS.filter((part) => part !== "effort");

/** A row of the JSON report: what a part measured, with its circumstances. */
export type SolverSpeedRow = ReturnType<typeof rowOf>;

function rowOf({ environment }: BenchContext, threads: number, measured: Measured) {
  const { backend, isa, runtime, processor } = environment;
  return { suite: "solver-speed" as const, threads, backend, isa, runtime, processor, ...measured };
}

/** Goals of the calibrated solver that other suites measure. */
const MEASURED_ELSEWHERE: readonly Goal[] = [
  { goal: "a step of 256 positions / llama.cpp's", wanted: "≥ 1 × its speed", suite: "steps" },
  { goal: "held-out error of best, own / real data", wanted: "≤ 1.5", suite: "defaults" },
  { goal: "held-out error of best, more bits / fewer", wanted: "≤ 1", suite: "defaults" },
].map(({ suite, ...goal }) => ({
  ...goal,
  measured: null,
  met: null,
  reason: `--suite ${suite} measures it`,
}));

async function measure(context: BenchContext, full: SolverSpeedScale): Promise<SuiteReport<SolverSpeedRow>> {
  const { options: { threads = 2, parts = PARTS_WITH_GOALS, shapes } } = context;
  const scale = shapes === undefined ? full : { ...full, shapes: shapesAsked(shapes) };
  const run = { context, kernels: withThreads(context.kernels, threads), scale };
  const reports: SuiteReport<Measured>[] = [];
  for (const part of SOLVER_SPEED_PARTS) {
    if (parts.includes(part)) reports.push(await PARTS[part](run));
  }
  const left = SOLVER_SPEED_PARTS.filter((part) => !parts.includes(part));
  const { sections, rows, goals, skipped } = mergeReports(reports);
  return {
    sections: sections.filter(({ rows }) => rows.length > 0),
    rows: rows.map((row) => rowOf(context, threads, row)),
    goals: [...goals, ...MEASURED_ELSEWHERE],
    skipped: [
      ...skipped,
      ...left.map((part) => ({
        what: `the part ${part}`,
        reason: part === "effort" ? "--parts effort measures it" : "--parts or --shapes leave it out",
      })),
    ],
  };
}

/** The suite at other sizes, for tests. */
export const solverSpeedSuiteOf = (scale: SolverSpeedScale | undefined): Suite<SolverSpeedRow> => ({
  name: "solver-speed",
  summary: "the calibrated solver's kernels beside SGEMM, whole runs, and a forecast for published models",
  run: (context) => measure(context, scale ?? (context.options.quick ? QUICK_SCALE : FULL_SCALE)),
});

/** Speed of the calibrated solver. */
export const solverSpeedSuite = solverSpeedSuiteOf(undefined);
