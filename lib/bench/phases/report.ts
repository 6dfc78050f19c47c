/** What the phase suite prints of its rows: tables, the comparison claimed / measured, and goals. */
import type { PhaseModel } from "../../phases/context.ts";
import type { PhasesReport } from "../../phases/mod.ts";
import type { BitWidth } from "../../quant/mod.ts";
import { bootstrapRatio, type Difference, type Interval, wilsonInterval } from "../../eval/intervals.ts";
import { type Measurement, STEP_KL_TITLES, type Yardstick } from "../../eval/yardstick.ts";
import type { PhaseMemory } from "./memory.ts";
import { DYNAMIC_ROW, MIXED_ROW, type RowSetting, STATIC_ROW } from "./rows.ts";
import { overhead, type PhaseTimes, type PipelineRun } from "./time.ts";
import { span } from "../settings.ts";
import type { Summary } from "../../eval/statistics.ts";
import type { Goal, Section } from "../suite.ts";

/** What the seed system published for 2 bits; its own notes call the figures synthetic. */
const CLAIMED: Readonly<Record<string, { accuracy: number; markov: number; overhead: number }>> = {
  phase1: { accuracy: 0.0009, markov: 0.71, overhead: 0.005 },
  phase2: { accuracy: 0.0418, markov: 0.85, overhead: 0.068 },
  phase3_full: { accuracy: 0.0936, markov: 0.92, overhead: 0.227 },
};

/** A row as measured; of full precision there is the measurement alone. */
export interface Row {
  readonly setting: RowSetting | undefined;
  readonly measurement: Measurement;
  readonly report?: PhasesReport;
  readonly bitsPerWeight?: number;
  /** Of the pipeline, cheap parts run again and again. */
  readonly runs?: readonly PipelineRun[];
  /** Of the calibrated solver, 0 for rounding. */
  readonly solveSeconds?: number;
  /** Whole pipeline, median. */
  readonly seconds?: number;
  /** Over the round baseline: rounding, static activations, no phase. */
  readonly overRound?: number | undefined;
  /** Over the calibrating baseline: `best`, static activations, no phase; of rows with a calibrated solver. */
  readonly overBest?: number | undefined;
  readonly differenceToBaseline?: Difference | undefined;
  /** Its step KL as a multiple of another row's, over the same samples. */
  readonly over?: (Interval & { readonly row: string }) | undefined;
  readonly model?: PhaseModel;
  /** SHA-256 of what would be stored. */
  readonly digest?: string;
  /** Time of selecting θ over that of a forward pass. */
  readonly selection?: number | undefined;
}

/** What all rows have in common. */
export interface About {
  readonly name: string;
  readonly full: string;
  /** Where the calibration data come from. */
  readonly calibration: string;
  readonly yardstick: Yardstick;
  readonly bits: BitWidth;
  readonly groupSize: number;
  readonly timeGroups: number;
}

const percent = (value: number) =>
  `${value >= 0 ? "+" : ""}${(100 * value).toFixed(Math.abs(value) < 10 ? 2 : 0)} %`;

/** What became of the guarded parts of a row, in words. */
function guardText({ smoothing, refinement }: PhasesReport): string | undefined {
  const parts = [
    ...(smoothing === undefined
      ? []
      : [`θ ${smoothing.kept.length}/${smoothing.kept.length + smoothing.rejected.length}`]),
    ...(refinement === undefined ? [] : [`gradient ${refinement.kept ? "kept" : "rejected"}`]),
  ];
  return parts.length === 0 ? undefined : parts.join(", ");
}

/** Accuracy, step KL, time. */
export function phaseSections(
  { name, full, calibration, yardstick, bits, groupSize, timeGroups }: About,
  rows: readonly Row[],
): Section[] {
  const tasks = rows[0]!.measurement.scores.map(({ task }) => task);
  const isImage = yardstick.kind === "images";
  const about = `${name} (${full}), ${bits} bits, group size ${
    groupSize === 0 ? "row" : groupSize
  }, ${timeGroups} time groups`;
  const phase = { key: "phase", title: "phase" };
  const named = ({ setting }: Row) => setting?.name ?? "full precision";
  const quantized = rows.slice(1);
  const accuracy: Section = {
    title: `${about}: accuracy`,
    notes: [
      `Measured on ${yardstick.source}. 95 % intervals (Wilson);`,
      "Δ: less the baseline's on the same prompts (bootstrap over pairs).",
    ],
    columns: [phase, ...tasks.map((task) => ({ key: task, title: task })), { key: "difference", title: "Δ" }],
    rows: rows.filter(({ measurement }) => measurement.scores.length > 0).map((row) => ({
      phase: named(row),
      ...Object.fromEntries(row.measurement.scores.map(({ task, exactMatch }) => [task, span(exactMatch)])),
      difference: row.differenceToBaseline && named(row) !== "baseline"
        ? span(row.differenceToBaseline, 3)
        : undefined,
    })),
  };
  const stepKl: Section = {
    title: `${about}: step KL on evaluation data`,
    notes: [
      `Measured on ${yardstick.source}; calibrated on`,
      `${calibration}.`,
      isImage
        ? "Step KL: mean of ω_t ‖Δε‖² an image, ω_t of DDPM cut at its 95th percentile. Noise error: ‖ε̂ − ε‖² / ‖ε‖²."
        : "Step KL: mean KL(full ‖ quantized) at a masked position; a step's is ρ times its sum over the masked positions.",
      "θ: bytes of time parameters, where smoothed a grid a timestep. Violations: jumps above the threshold.",
    ],
    columns: [
      phase,
      { key: "bitsPerWeight", title: "bits/w", digits: 3 },
      { key: "theta", title: "θ, kB", digits: 1 },
      { key: "stepKl", title: STEP_KL_TITLES[yardstick.kind] },
      ...(isImage ? [{ key: "noise", title: "noise error" }] : []),
      { key: "markov", title: "Markov", digits: 3 },
      { key: "violations", title: "violations" },
    ],
    rows: quantized.map((row) => ({
      phase: named(row),
      bitsPerWeight: row.bitsPerWeight,
      theta: row.model?.timeParameters === undefined ? undefined : row.model.timeParameters.bytes / 1000,
      stepKl: span(row.measurement.stepKl.mean, 5),
      noise: isImage ? span(row.measurement.distance, 4) : undefined,
      markov: row.report?.validation?.markovScore,
      violations: row.report?.validation?.violations.length,
    })),
  };
  const compared = rows.filter(({ over }) => over !== undefined);
  const ratios: Section = {
    title: `${about}: step KL as a multiple of another row's`,
    notes: ["Over the same samples, with 95 % intervals (bootstrap over pairs)."],
    columns: [phase, { key: "over", title: "beside" }, { key: "ratio", title: "×" }],
    rows: compared.map((row) => ({ phase: named(row), over: row.over!.row, ratio: span(row.over!, 3) })),
  };
  const cost: Section = {
    title: `${about}: time, and what was kept`,
    notes: [
      "Seconds: calibrate, solve, phases, write. Overhead: the pipeline with the phases / the same without - 1, medians of",
      "paired runs, solving timed once; / round: over rounding with the same activations; / best: over solver best with them,",
      "which calibrates, and has two candidates as phase 3 has.",
      "Kept: layers whose smoothed θ stayed, and the gradient refinement, both by held-out step KL. Digest: SHA-256 of codes,",
      "scales, zero points, biases and θ, its beginning: equal in two runs, equal bytes.",
    ],
    columns: [
      phase,
      { key: "seconds", title: "s", digits: 2 },
      { key: "overRound", title: "/ round" },
      { key: "overBest", title: "/ best" },
      { key: "iterations", title: "iterations" },
      { key: "kept", title: "kept" },
      { key: "digest", title: "digest" },
    ],
    rows: quantized.map((row) => ({
      phase: named(row),
      seconds: row.seconds,
      overRound: row.overRound === undefined ? undefined : percent(row.overRound),
      overBest: row.overBest === undefined ? undefined : percent(row.overBest),
      iterations: row.report?.refinement &&
        `${row.report.refinement.iterations}${row.report.refinement.converged ? ", converged" : ""}`,
      kept: row.report && guardText(row.report),
      digest: row.digest?.slice(0, 12),
    })),
  };
  return [
    ...(tasks.length > 0 ? [accuracy] : []),
    stepKl,
    ...(compared.length > 0 ? [ratios] : []),
    cost,
  ];
}

/** Share of prompts solved, relative to the baseline's. */
function relativeAccuracy(row: Row, baseline: Row): number | undefined {
  const share = ({ measurement: { solved } }: Row) =>
    solved === undefined ? undefined : solved.reduce((a, b) => a + b, 0) / solved.length;
  const [own, base] = [share(row), share(baseline)];
  return own === undefined || base === undefined || base === 0 ? undefined : own / base - 1;
}

/** What the seed system claimed beside what this run measured. */
export function claimSection({ name }: About, rows: readonly Row[]): Section[] {
  const baseline = rows.find(({ setting }) => setting?.name === "baseline");
  const claimed = rows.filter(({ setting }) => setting !== undefined && setting.name in CLAIMED);
  if (baseline === undefined || claimed.length === 0) return [];
  return [{
    title: `${name}: claimed by the seed system (from a random number generator) / measured here`,
    notes: [
      "Accuracy: relative to the baseline's. Overhead: over the round baseline, of phase 3 over the calibrating one.",
    ],
    columns: [
      { key: "phase", title: "phase" },
      { key: "accuracy", title: "accuracy, claimed / measured" },
      { key: "markov", title: "Markov score" },
      { key: "overhead", title: "overhead" },
    ],
    rows: claimed.map((row) => {
      const claim = CLAIMED[row.setting!.name]!, accuracy = relativeAccuracy(row, baseline);
      const score = row.report?.validation?.markovScore;
      const overhead = row.setting!.name === "phase3_full" ? row.overBest : row.overRound;
      return {
        phase: row.setting!.name,
        accuracy: `${percent(claim.accuracy)} / ${
          accuracy === undefined ? "not measured" : percent(accuracy)
        }`,
        markov: `${claim.markov.toFixed(2)} / ${score === undefined ? "not measured" : score.toFixed(2)}`,
        overhead: `${percent(claim.overhead)} / ${
          overhead === undefined ? "not measured" : percent(overhead)
        }`,
      };
    }),
  }];
}

const NO_TASKS = "no tasks, or none asked for (--limit)";

/** What else the goals are about. */
export interface GoalOptions {
  readonly name: string;
  readonly family: string;
  readonly seed: number;
  readonly memory: PhaseMemory | undefined;
  /** Forward passes with static grids for all layers over such with grids of each token's own, pair by pair. */
  readonly staticOverDynamic: Summary | undefined;
}

/** Everything that the phases are to reach, as far as the rows of a run are about it; what was not measured says why. */
export function phaseGoals(
  { name, family, seed, memory, staticOverDynamic }: GoalOptions,
  rows: readonly Row[],
): Goal[] {
  const find = (wanted: string) => rows.find(({ setting }) => setting?.name === wanted);
  const baseline = find("baseline");
  const goals: Goal[] = [];
  const at = (goal: string, wanted: string, measured: string, met: boolean) =>
    goals.push({ goal: `${name}: ${goal}`, wanted, measured, met });
  const unknown = (goal: string, wanted: string, reason: string) =>
    goals.push({ goal: `${name}: ${goal}`, wanted, measured: null, met: null, reason });
  /** Step KL of a row / another's. @param isSure the whole interval has to be below */
  const ratio = (goal: string, own: string, other: string, most: number, isSure = false) => {
    const [a, b] = [find(own)?.measurement, find(other)?.measurement];
    if (a === undefined || b === undefined) return;
    const { value, low, high } = bootstrapRatio(a.stepKl.sums, b.stepKl.sums, { seed });
    at(
      goal,
      isSure ? `surely below ${most} ×` : `at most ${Number(most.toFixed(2))} ×`,
      `${value.toFixed(3)} × ${low.toFixed(3)}–${high.toFixed(3)}`,
      isSure ? high < most : value <= most,
    );
  };
  /** Time of parts of a row's phases over the same row without them. */
  const overOwn = (
    goal: string,
    row: Row | undefined,
    most: number,
    parts: readonly (keyof PhaseTimes)[],
  ) => {
    if (row === undefined) return;
    const value = overhead(row.runs!, row.solveSeconds!, row.solveSeconds!, parts);
    at(`${goal} / ${row.setting!.codes.solver}`, `below ${100 * most} %`, percent(value), value < most);
  };
  // Phases 1 and 2 with the calibrated solver.
  const without = find("without refinement");
  const [one, two, three] = [find("phase1"), find("phase2"), find("phase3_full")];
  if (one?.report?.validation !== undefined && baseline !== undefined) {
    for (const row of [one, without]) overOwn("phase 1 itself, overhead", row, 0.01, ["scores", "stepKl"]);
    const isSame = one.digest === baseline.digest;
    at("phase 1, bytes", "the baseline's", isSame ? "the same digest" : "another digest", isSame);
  }
  if (two?.report?.validation !== undefined && baseline !== undefined) {
    for (const row of [two, without]) overOwn("phase 2 itself, overhead", row, 0.1, ["smoothing"]);
    const score = two.report.validation.markovScore;
    const before = one?.report?.validation?.markovScore;
    at(
      "phase 2, Markov score",
      "at least 0.82",
      `${score.toFixed(3)}${before === undefined ? "" : `, ${before.toFixed(3)} before`}`,
      score >= 0.82,
    );
    const own = exactMatch(two), base = exactMatch(baseline);
    if (own === undefined || base === undefined) {
      unknown("phase 2, accuracy", "not below the baseline's", NO_TASKS);
    } else {
      // Not below the baseline's interval.
      at("phase 2, accuracy", `at least ${base.low.toFixed(3)}`, own.value.toFixed(3), own.value >= base.low);
    }
  }
  if (three?.report?.validation !== undefined && baseline !== undefined) {
    const accuracy = relativeAccuracy(three, baseline), wanted = "+9.36 %, Δ above 0";
    const best = exactMatch(rows[0]!), base = exactMatch(baseline);
    if (accuracy === undefined) {
      unknown("phase 3, accuracy / baseline", wanted, NO_TASKS);
    } else if (base!.value >= best!.low) {
      const reason = "at full precision: step KL decides";
      unknown("phase 3, accuracy / baseline", wanted, reason);
    } else {
      at(
        "phase 3, accuracy / baseline",
        wanted,
        `${percent(accuracy)}, Δ ${span(three.differenceToBaseline!, 3)}`,
        accuracy >= 0.0936 && three.differenceToBaseline!.low > 0,
      );
    }
    ratio("phase 3, step KL / baseline", "phase3_full", "baseline", 1 / 3);
    const score = three.report.validation.markovScore;
    at("phase 3, Markov score", "at least 0.90", score.toFixed(3), score >= 0.9);
    for (const [goal, row] of [["phase 3", three], ["phase 3 unrefined", without]] as const) {
      const more = row?.overBest;
      if (more !== undefined) at(`${goal}, overhead / best`, "below 25 %", percent(more), more < 0.25);
    }
  }
  if (family === "dream") ratio("refinement / best, step KL", "best + refinement", "best alone", 0.6);
  ratio("all static / dynamic 8 bits, step KL", STATIC_ROW, DYNAMIC_ROW, 1.1);
  ratio("mostly static / dynamic 8 bits, step KL", MIXED_ROW, DYNAMIC_ROW, 1.1);
  if (staticOverDynamic !== undefined) {
    const { median, medianDeviation } = staticOverDynamic;
    at(
      "all static / dynamic 8 bits, time",
      "below 1 ×",
      `${median.toFixed(3)} × ± ${medianDeviation.toFixed(3)}`,
      median < 1,
    );
  }
  ratio("4 bits, G 10 / G 1, step KL", "best, static 4 bits, G 10", "best, static 4 bits, G 1", 1, true);
  const selected = [two ?? one ?? baseline].flatMap((row) => row?.selection ?? []);
  for (const share of selected) {
    at("selecting θ / forward pass", "below 1 %", `${(100 * share).toFixed(2)} %`, share < 0.01);
  }
  if (memory !== undefined) {
    const { statistics, phases, baseline } = memory, share = statistics / baseline;
    // What is kept is the goal; the peaks beside it also have scratch, code and garbage.
    const peak = `${megabytes(phases)}, ${percent(phases / baseline - 1)}`;
    at(
      "phases 1 and 2, memory kept / peak",
      "below 15 %",
      `${(100 * share).toFixed(2)} % of ${megabytes(baseline)}; peak ${peak}`,
      share < 0.15,
    );
  }
  return goals;
}

const megabytes = (bytes: number) => `${(bytes / 1e6).toFixed(0)} MB`;

/** Share of all prompts solved, with its interval. */
function exactMatch({ measurement: { solved } }: Row): Interval | undefined {
  return solved === undefined || solved.length === 0
    ? undefined
    : wilsonInterval(solved.reduce((sum, one) => sum + one, 0), solved.length);
}
