/** What the phase suite prints of its rows: tables, the comparison claimed / measured, and goals. */
import type { PhaseModel } from "../pipeline/phase_context.ts";
import type { PhasesReport } from "../pipeline/phases.ts";
import type { BitWidth } from "../quant/mod.ts";
import { bootstrapRatio, type Difference, type Interval } from "./intervals.ts";
import type { PhaseMeasurement, PhaseYardstick } from "./phase_measure.ts";
import type { RowSetting } from "./phase_rows.ts";
import { span } from "./settings.ts";
import type { Goal, Section } from "./suite.ts";

/** What the seed system published for 2 bits; its own notes call the figures synthetic. */
const CLAIMED: Readonly<Record<string, { accuracy: number; markov: number; overhead: number }>> = {
  phase1: { accuracy: 0.0009, markov: 0.71, overhead: 0.005 },
  phase2: { accuracy: 0.0418, markov: 0.85, overhead: 0.068 },
  phase3_full: { accuracy: 0.0936, markov: 0.92, overhead: 0.227 },
};

/** A row as measured. */
export interface Row {
  readonly setting: RowSetting | undefined;
  readonly measurement: PhaseMeasurement;
  readonly report: PhasesReport | undefined;
  readonly bitsPerWeight: number | undefined;
  /** Whole pipeline; of it the phases. */
  readonly seconds: number | undefined;
  readonly overhead: number | undefined;
  readonly differenceToBaseline: Difference | undefined;
  /** Its step KL as a multiple of another row's, over the same samples. */
  readonly over: (Interval & { readonly row: string }) | undefined;
  readonly model: PhaseModel | undefined;
}

/** What all rows have in common. */
export interface About {
  readonly name: string;
  readonly full: string;
  /** Where the calibration data come from. */
  readonly calibration: string;
  readonly yardstick: PhaseYardstick;
  readonly bits: BitWidth;
  readonly groupSize: number;
  readonly timeGroups: number;
}

const percent = (value: number) => `${value >= 0 ? "+" : ""}${(100 * value).toFixed(2)} %`;

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
  const isImage = rows[0]!.measurement.noiseError !== undefined;
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
      { key: "stepKl", title: yardstick.stepKl },
      ...(isImage ? [{ key: "noise", title: "noise error" }] : []),
      { key: "markov", title: "Markov", digits: 3 },
      { key: "violations", title: "violations" },
    ],
    rows: quantized.map((row) => ({
      phase: named(row),
      bitsPerWeight: row.bitsPerWeight,
      theta: row.model?.timeParameters === undefined ? undefined : row.model.timeParameters.bytes / 1000,
      stepKl: span(row.measurement.stepKl, 5),
      noise: row.measurement.noiseError && span(row.measurement.noiseError, 4),
      markov: row.report?.validation?.markovScore,
      violations: row.report?.validation?.violations.length,
    })),
  };
  const cost: Section = {
    title: `${about}: time, and what was kept`,
    notes: [
      "Seconds: calibrate, solve, phases. Overhead: phases 1 and 2 against the rest of their own run, the others against the",
      "baseline's run. Kept: layers whose smoothed θ stayed, and the gradient refinement, both by held-out step KL.",
    ],
    columns: [
      phase,
      { key: "seconds", title: "s", digits: 2 },
      { key: "overhead", title: "overhead" },
      { key: "iterations", title: "iterations" },
      { key: "converged", title: "converged" },
      { key: "kept", title: "kept" },
    ],
    rows: quantized.map((row) => ({
      phase: named(row),
      seconds: row.seconds,
      overhead: row.overhead === undefined ? undefined : percent(row.overhead),
      iterations: row.report?.refinement?.iterations,
      converged: row.report?.refinement?.converged,
      kept: row.report && guardText(row.report),
    })),
  };
  const compared = rows.filter(({ over }) => over !== undefined);
  const ratios: Section = {
    title: `${about}: step KL as a multiple of another row's`,
    notes: ["Over the same samples, with 95 % intervals (bootstrap over pairs)."],
    columns: [phase, { key: "over", title: "beside" }, { key: "ratio", title: "×" }],
    rows: compared.map((row) => ({ phase: named(row), over: row.over!.row, ratio: span(row.over!, 3) })),
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
    notes: ["Accuracy: relative to the baseline's. Measured accuracy and overhead are of the table above."],
    columns: [
      { key: "phase", title: "phase" },
      { key: "accuracy", title: "accuracy, claimed / measured" },
      { key: "markov", title: "Markov score" },
      { key: "overhead", title: "overhead" },
    ],
    rows: claimed.map((row) => {
      const claim = CLAIMED[row.setting!.name]!, accuracy = relativeAccuracy(row, baseline);
      const score = row.report?.validation?.markovScore;
      return {
        phase: row.setting!.name,
        accuracy: `${percent(claim.accuracy)} / ${
          accuracy === undefined ? "not measured" : percent(accuracy)
        }`,
        markov: `${claim.markov.toFixed(2)} / ${score === undefined ? "not measured" : score.toFixed(2)}`,
        overhead: `${percent(claim.overhead)} / ${
          row.overhead === undefined ? "not measured" : percent(row.overhead)
        }`,
      };
    }),
  }];
}

/** The goals that the rows of a run can answer. */
export function phaseGoals(
  name: string,
  family: string,
  rows: readonly Row[],
  groups: number,
  seed: number,
): Goal[] {
  const find = (wanted: string) => rows.find(({ setting }) => setting?.name === wanted);
  const baseline = find("baseline");
  const goals: Goal[] = [];
  const at = (goal: string, wanted: string, measured: string, met: boolean) =>
    goals.push({ goal: `${name}: ${goal}`, wanted, measured, met });
  const ratio = (goal: string, own: string, other: string, most: number) => {
    const [a, b] = [find(own)?.measurement, find(other)?.measurement];
    if (a === undefined || b === undefined) return;
    const { value, low, high } = bootstrapRatio(a.sums, b.sums, { seed });
    at(
      goal,
      `at most ${Number(most.toFixed(2))} ×`,
      `${value.toFixed(3)} × ${low.toFixed(3)}–${high.toFixed(3)}`,
      value <= most,
    );
  };
  const [one, two, three] = [find("phase1"), find("phase2"), find("phase3_full")];
  if (one?.report?.validation !== undefined) {
    const { milliseconds, stepKlMilliseconds } = one.report.validation;
    const rest = one.seconds! * 1000 - milliseconds - stepKlMilliseconds;
    at(
      "phase 1, overhead",
      "below 1 %",
      `${percent(milliseconds / rest)} scores, ${percent(one.overhead!)} with step KL`,
      one.overhead! < 0.01,
    );
  }
  if (two?.report?.validation !== undefined && baseline !== undefined) {
    const { validation, smoothing } = two.report;
    const own = (smoothing!.milliseconds + validation.milliseconds) / 1000;
    const overhead = own / (two.seconds! - own - validation.stepKlMilliseconds / 1000);
    at("phase 2, overhead", "below 10 %", percent(overhead), overhead < 0.1);
    at(
      "phase 2, Markov score",
      "at least 0.82",
      validation.markovScore.toFixed(3),
      validation.markovScore >= 0.82,
    );
    ratio("phase 2, step KL / baseline", "phase2", "baseline", 1);
  }
  if (three !== undefined && baseline !== undefined) {
    const accuracy = relativeAccuracy(three, baseline);
    if (accuracy !== undefined) {
      at(
        "phase 3, accuracy / baseline",
        "+9.36 %, Δ above 0",
        `${percent(accuracy)}, Δ ${span(three.differenceToBaseline!, 3)}`,
        accuracy >= 0.0936 && three.differenceToBaseline!.low > 0,
      );
    }
    ratio("phase 3, step KL / baseline", "phase3_full", "baseline", 1 / 3);
    const score = three.report!.validation!.markovScore;
    at("phase 3, Markov score", "at least 0.90", score.toFixed(3), score >= 0.9);
    at("phase 3, overhead", "below 25 %", percent(three.overhead!), three.overhead! < 0.25);
    const without = find("without refinement");
    if (without !== undefined) {
      at(
        "phase 3 less refinement, overhead",
        "below 25 %",
        percent(without.overhead!),
        without.overhead! < 0.25,
      );
    }
  }
  if (family === "dream") ratio("refinement / best, step KL", "best + refinement", "best alone", 0.6);
  ratio(
    "static / dynamic 8 bits, step KL",
    `best, static 8 bits, G ${groups}`,
    "best, dynamic 8 bits",
    1.1,
  );
  ratio("4 bits, G 10 / G 1, step KL", "best, static 4 bits, G 10", "best, static 4 bits, G 1", 1);
  return goals;
}
