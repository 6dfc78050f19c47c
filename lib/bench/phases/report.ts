/** Tables of the phases suite, and the comparison claimed / measured. */
import type { PhasesReport } from "../../phases/mod.ts";
import type { BitWidth } from "../../quant/mod.ts";
import type { Difference, Interval } from "../../eval/intervals.ts";
import { type Measurement, STEP_KL_TITLES, type Yardstick } from "../../eval/yardstick.ts";
import type { RowSetting } from "./rows.ts";
import type { WrittenRow } from "./run_row.ts";
import type { PipelineRun } from "./time.ts";
import { span } from "../settings.ts";
import { type CellColumn, type Section, tableOf } from "../suite.ts";

/** Claims, for 2 bits, of the system that is re-implemented here; its own notes call them synthetic. */
const CLAIMED: Readonly<Record<string, { accuracy: number; markov: number; overhead: number }>> = {
  phase1: { accuracy: 0.0009, markov: 0.71, overhead: 0.005 },
  phase2: { accuracy: 0.0418, markov: 0.85, overhead: 0.068 },
  phase3_full: { accuracy: 0.0936, markov: 0.92, overhead: 0.227 },
};

/** A row as measured; of full precision there is the measurement alone. */
export interface Row
  extends Partial<Pick<WrittenRow, "folder" | "bitsPerWeight" | "report" | "solveSeconds">> {
  readonly setting: RowSetting | undefined;
  readonly measurement: Measurement;
  /** Runs of the pipeline: one, and repeated ones of rows with small overheads. */
  readonly runs?: readonly PipelineRun[] | undefined;
  /** Whole pipeline, median. */
  readonly seconds?: number | undefined;
  /** Solving and phases over the same pipeline with rounding and without phases. */
  readonly overRound?: number | undefined;
  /** The same over the pipeline with `best` and without phases; of rows with a calibrated solver. */
  readonly overBest?: number | undefined;
  readonly differenceToBaseline?: Difference | undefined;
  /** Its step KL as a multiple of another row's, over the same samples. */
  readonly over?: (Interval & { readonly row: string }) | undefined;
  readonly timeParameterBytes?: number | undefined;
  /** SHA-256 of the tensors that it wrote, and of the weights among them. */
  readonly digests?: { readonly all: string; readonly weights: string } | undefined;
  /** Time of selecting θ over that of a forward pass. */
  readonly selection?: number | undefined;
}

/** Circumstances that all rows of a model have in common. */
export interface About {
  readonly name: string;
  readonly family: string;
  /** Origin of the calibration data. */
  readonly calibration: string;
  readonly yardstick: Yardstick;
  readonly bits: BitWidth;
  readonly groupSize: number;
  readonly timeGroups: number;
}

/** A share with its sign. */
export const percent = (value: number) =>
  `${value >= 0 ? "+" : ""}${(100 * value).toFixed(Math.abs(value) < 10 ? 2 : 0)} %`;

const nameOf = ({ setting }: Row) => setting?.name ?? "full precision";

/** Guarded parts of a row that were kept, and those that were rejected, in words. */
function guardText({ smoothing, refinement, output, timeScales, sampler }: PhasesReport): string | undefined {
  const guarded = { gradient: refinement, corrections: output, scales: timeScales, sampler };
  const parts = [
    ...(smoothing === undefined
      ? []
      : [`θ ${smoothing.kept.length}/${smoothing.kept.length + smoothing.rejected.length}`]),
    ...Object.entries(guarded).flatMap(([name, part]) =>
      part === undefined ? [] : [`${name} ${part.kept ? "kept" : "rejected"}`]
    ),
  ];
  return parts.length === 0 ? undefined : parts.join(", ");
}

export function phaseSections(about: About, rows: readonly Row[]): Section[] {
  const { name, family, bits, groupSize, timeGroups } = about, size = groupSize === 0 ? "row" : groupSize;
  const title = `${name} (${family}), ${bits} bits, group size ${size}, ${timeGroups} time groups`;
  const section = (
    what: string,
    notes: readonly string[],
    own: readonly Row[],
    columns: readonly CellColumn<Row>[],
  ): Section => tableOf(`${title}: ${what}`, notes, own, [["phase", "phase", nameOf], ...columns]);
  const tasks = rows[0]!.measurement.scores.map(({ task }) => task);
  const compared = rows.filter(({ over }) => over !== undefined);
  return [
    ...(tasks.length === 0 ? [] : [section(
      "accuracy",
      [
        `Measured on ${about.yardstick.source}. 95 % intervals (Wilson);`,
        "Δ: less the baseline's on the same prompts (bootstrap over pairs).",
      ],
      rows,
      [
        ...tasks.map((
          task,
          i,
        ): CellColumn<Row> => [task, task, ({ measurement }) => span(measurement.scores[i]!.exactMatch)]),
        [
          "difference",
          "Δ",
          (row) =>
            row.differenceToBaseline && nameOf(row) !== "baseline"
              ? span(row.differenceToBaseline, 3)
              : undefined,
        ],
      ],
    )]),
    section("step KL on evaluation data", stepKlNotes(about), rows.slice(1), stepKlColumns(about)),
    ...(compared.length === 0 ? [] : [section(
      "step KL as a multiple of another row's",
      ["Over the same samples, with 95 % intervals (bootstrap over pairs)."],
      compared,
      [["over", "beside", ({ over }) => over!.row], ["ratio", "×", ({ over }) => span(over!, 3)]],
    )]),
    section("time, and what was kept", COST_NOTES, rows.slice(1), COST_COLUMNS),
  ];
}

const stepKlNotes = ({ yardstick: { kind, source }, calibration }: About) => [
  `Measured on ${source}; calibrated on`,
  `${calibration}.`,
  kind === "images"
    ? "Step KL: mean of ω_t ‖Δε‖² an image, ω_t of DDPM cut at its 95th percentile. Noise error: ‖ε̂ − ε‖² / ‖ε‖²."
    : "Step KL: mean KL(full ‖ quantized) at a masked position; a step's is ρ times its sum over the masked positions.",
  "θ: bytes of time parameters, one range a timestep where smoothed. Violations: jumps above the threshold.",
];
const stepKlColumns = ({ yardstick: { kind } }: About): CellColumn<Row>[] => [
  ["bitsPerWeight", "bits/w", ({ bitsPerWeight }) => bitsPerWeight, 3],
  ["theta", "θ, kB", ({ timeParameterBytes: bytes }) => bytes && bytes / 1000, 1],
  ["stepKl", STEP_KL_TITLES[kind], ({ measurement }) => span(measurement.stepKl.mean, 5)],
  ...(kind === "images" ? [NOISE] : []),
  ["markov", "Markov", ({ report }) => report?.validation?.markovScore, 3],
  ["violations", "violations", ({ report }) => report?.validation?.violations.length],
];
const NOISE: CellColumn<Row> = ["noise", "noise error", ({ measurement }) => span(measurement.distance, 4)];

const COST_NOTES = [
  "Seconds: calibrate, solve, phases, write. Overhead: the pipeline with solving and phases / the same without - 1, medians",
  "of paired runs, solving timed once; / round: over rounding; / best: over solver best, which calibrates and has two",
  "candidates as phase 3 has. Static activations count to the pipeline without phases.",
  "Kept: layers whose smoothed θ stayed, and other parts that the held-out step KL decides. Digest: SHA-256 of the files of",
  "tensors and θ, its beginning: equal in two runs, equal bytes.",
];
const COST_COLUMNS: CellColumn<Row>[] = [
  ["seconds", "s", ({ seconds }) => seconds, 2],
  ["overRound", "/ round", ({ overRound }) => overRound === undefined ? undefined : percent(overRound)],
  ["overBest", "/ best", ({ overBest }) => overBest === undefined ? undefined : percent(overBest)],
  ["iterations", "iterations", ({ report }) => iterationsText(report?.refinement)],
  ["kept", "kept", ({ report }) => report && guardText(report)],
  ["digest", "digest", ({ digests }) => digests?.all.slice(0, 12)],
];
const iterationsText = (refinement: PhasesReport["refinement"]) =>
  refinement && `${refinement.iterations}${refinement.converged ? ", converged" : ""}`;

/** Share of prompts solved, relative to the baseline's. */
export function relativeAccuracy(row: Row, baseline: Row): number | undefined {
  const share = ({ measurement: { solved } }: Row) =>
    solved === undefined ? undefined : solved.reduce((a, b) => a + b, 0) / solved.length;
  const [own, base] = [share(row), share(baseline)];
  return own === undefined || base === undefined || base === 0 ? undefined : own / base - 1;
}

export function claimSection({ name }: About, rows: readonly Row[]): Section[] {
  const baseline = rows.find((row) => nameOf(row) === "baseline");
  const claimed = rows.filter((row) => nameOf(row) in CLAIMED);
  if (baseline === undefined || claimed.length === 0) return [];
  const beside = (claim: string, measured: string | undefined) => `${claim} / ${measured ?? "not measured"}`;
  const accuracyOf = (row: Row) => relativeAccuracy(row, baseline);
  const overheadOf = (row: Row) => nameOf(row) === "phase3_full" ? row.overBest : row.overRound;
  const shown = (share: number | undefined) => share === undefined ? undefined : percent(share);
  return [tableOf(
    `${name}: claimed (from a random number generator) / measured here`,
    ["Accuracy: relative to the baseline's. Overhead: over the round baseline, of phase 3 over the calibrating one."],
    claimed.map((row) => ({ row, claim: CLAIMED[nameOf(row)]! })),
    [
      ["phase", "phase", ({ row }) => nameOf(row)],
      [
        "accuracy",
        "accuracy, claimed / measured",
        ({ row, claim }) => beside(percent(claim.accuracy), shown(accuracyOf(row))),
      ],
      [
        "markov",
        "Markov score",
        ({ row, claim }) => beside(claim.markov.toFixed(2), row.report?.validation?.markovScore.toFixed(2)),
      ],
      ["overhead", "overhead", ({ row, claim }) => beside(percent(claim.overhead), shown(overheadOf(row)))],
    ],
  )];
}
