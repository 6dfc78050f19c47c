/** Tables, rows, samples and goals of the accuracy suite. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { type Difference, type Interval, pairedDifference } from "../../eval/intervals.ts";
import { byMaskRatio, type MaskedComparison } from "../../eval/masked.ts";
import type { SolvedPuzzle } from "../../eval/puzzles.ts";
import {
  DRAWING,
  type ImageYardstick,
  type MaskedYardstick,
  type Measurement,
} from "../../eval/yardstick.ts";
import { encodePng, tileImages } from "../../models/mod.ts";
import { readJsonFile } from "../../files/json.ts";
import { nameOfPath } from "../../files/whole.ts";
import { circumstances, type Measured, type Setting, span } from "../settings.ts";
import {
  type BenchContext,
  type CellColumn,
  type Goal,
  type Sample,
  type Section,
  type SuiteReport,
  tableOf,
} from "../suite.ts";
import type { ModelPlan } from "./plan.ts";

/** Samples of each model and setting that a report shows: the first of each task, or the first images. */
const SHOWN_IMAGES = 12;
const SHOWN_PUZZLES = 4;
/** Mask ratios of a table by bins, for puzzles and for the few synthetic sequences. */
const BINS = 10, SYNTHETIC_BINS = 4;
/** Error of the noise that counts as visible where no other width was measured. */
const VISIBLE_NOISE_ERROR = 0.01;

type MeasuredSetting = Measured & { readonly result: Measurement };
/** The same with the difference of its solved prompts to full precision's. */
type Compared = MeasuredSetting & { readonly lost: Difference | undefined };

/** Report of a model from its measurements; full precision's come first. */
export function accuracyReport(
  context: BenchContext,
  plan: ModelPlan,
  measured: readonly MeasuredSetting[],
): SuiteReport<AccuracyRow> {
  const { yardstick } = plan, { seed } = context.options, base = measured[0]!.result.solved;
  const rows = measured.map((entry): Compared => ({
    ...entry,
    lost: base && pairedDifference(base, entry.result.solved!, { seed }),
  }));
  const report = yardstick.kind === "masked"
    ? maskedReport(context, plan, yardstick, rows)
    : imageReport(context, plan, yardstick, rows);
  return { ...report, quantized: rows.flatMap(({ quantized }) => quantized ?? []) };
}

export type AccuracyRow = ReturnType<typeof maskedRow> | ReturnType<typeof imageRow>;

function maskedRow(
  context: BenchContext,
  path: string,
  row: Compared,
  bins: readonly MaskedComparison[],
  hasTasks: boolean,
) {
  const common = circumstances(context, path, row);
  return hasTasks
    ? {
      ...common,
      kind: "masked language model" as const,
      exactMatch: row.result.scores,
      differenceToFull: row.lost,
      byMaskRatio: bins,
    }
    : {
      ...common,
      kind: "masked language model, synthetic sequences" as const,
      byMaskRatio: bins.map(({ accuracy: _, fullAccuracy: __, ...bin }) => bin),
    };
}

function imageRow(
  context: BenchContext,
  path: string,
  { lost, result, ...measured }: Compared,
  images: number,
) {
  const { drawn, distance, byTimestep, drift } = result;
  const common = {
    ...circumstances(context, path, measured),
    images,
    noiseError: distance,
    byTimestep: byTimestep!.map(({ perImage: _, ...error }) => error),
    drift: drift!,
  };
  if (drawn === undefined) return { ...common, kind: "image model, synthetic trajectories" as const };
  const { classAccuracy, frechetDistance } = drawn.scores;
  return { ...common, kind: "image model" as const, classAccuracy, frechetDistance, differenceToFull: lost };
}

/** A published score compared with the interval of this run; none where the file is not there. */
function referenceGoal(path: string, what: string, keys: readonly string[], measured: Interval): Goal[] {
  const file = join(path, "reference_scores.json");
  if (!existsSync(file)) return [];
  let value: unknown = readJsonFile(file);
  for (const key of keys) value = (value as Record<string, unknown> | undefined)?.[key];
  if (typeof value !== "number") return [];
  return [{
    goal: `${nameOfPath(path)}, full precision: ${what} as published`,
    wanted: `${value.toFixed(3)} inside`,
    measured: span(measured, 3),
    met: value >= measured.low - 1e-6 && value <= measured.high + 1e-6,
  }];
}

/** Round to nearest at 2 bits must be visibly worse: otherwise this measure sees nothing. */
function sensitivityGoal(path: string, rows: readonly Compared[]): Goal[] {
  const two = rows.find(({ setting }) => setting.solver === "round" && setting.bits === 2)?.lost;
  if (two === undefined) return [];
  return [{
    goal: `${nameOfPath(path)}, 2 bits, round: puzzles, less full precision's`,
    wanted: "all of it below 0",
    measured: span(two, 3),
    met: two.high < 0,
  }];
}

/**
 * Round to nearest at 2 bits must be visibly worse than at the most bits. A hundred glyphs are too few for
 * the classifier to tell, so the error of the predicted noise decides, which is 0 for full precision.
 */
function noiseGoal(path: string, rows: readonly Compared[]): Goal[] {
  const rounded = rows.filter(({ setting: { solver } }) => solver === "round");
  const two = rounded.find(({ setting: { bits } }) => bits === 2);
  if (two === undefined) return [];
  const most = rounded.reduce((a, b) => (b.setting.bits ?? 0) > (a.setting.bits ?? 0) ? b : a);
  const [own, other] = [two.result.distance, most.result.distance];
  const least = most === two ? VISIBLE_NOISE_ERROR : Math.max(VISIBLE_NOISE_ERROR, other.high);
  return [{
    goal: `${nameOfPath(path)}, 2 bits, round: noise error against full precision`,
    wanted: most === two
      ? `all of it above ${least}`
      : `all of it above ${least} and above that of ${most.setting.bits} bits`,
    measured: most === two ? span(own, 4) : `${span(own, 4)} and ${span(other, 4)}`,
    met: own.low > least,
  }];
}

/** A table with a column for each bin of the denoising axis. */
function byBin(
  title: string,
  bins: readonly string[],
  digits: number,
  rows: readonly { readonly setting: Setting; readonly values: readonly number[] }[],
): Section {
  const columns = bins.map((bin, i): CellColumn<(typeof rows)[number]> => [
    bin,
    bin,
    ({ values }) => values[i],
    digits,
  ]);
  return tableOf(title, ["Means; their intervals are in the JSON report (--json, --out)."], rows, [
    ["setting", "setting", ({ setting }) => setting.name],
    ...columns,
  ]);
}

const column = (
  title: string,
  cell: CellColumn<Compared>[2],
  digits = 0,
): CellColumn<Compared> => [title, title, cell, digits];

/** The same without full precision's value, which would be 0 by definition. */
const ofQuantized = (title: string, cell: CellColumn<Compared>[2], digits?: number): CellColumn<Compared> =>
  column(title, (row, i) => row.setting.bits === undefined ? undefined : cell(row, i), digits);

const bySetting = (
  title: string,
  notes: readonly string[],
  rows: readonly Compared[],
  own: readonly CellColumn<Compared>[],
): Section =>
  tableOf(
    title,
    [...notes, "Stored bits per weight of the quantized tensors and, in total, of all; size of the files."],
    rows,
    [
      column("setting", ({ setting }) => setting.name),
      column("bits", ({ bitsPerWeight }) => bitsPerWeight, 2),
      column("total", ({ bitsPerWeightOfAll }) => bitsPerWeightOfAll, 2),
      column("MB", ({ fileBytes }) => fileBytes / 1e6, 2),
      ...own,
    ],
  );

const WEIGHT_ERROR = column("rel. RMS error", ({ relativeRmsError }) => relativeRmsError, 4);
/** Whether full precision is better with the whole interval of the difference. */
const worse = (title: string) => ofQuantized(title, ({ lost }) => lost!.high < 0);

function maskedReport(
  context: BenchContext,
  { path, folder, needs: { model: { kind } } }: ModelPlan,
  { puzzles, sequences, missing }: MaskedYardstick,
  rows: readonly Compared[],
): SuiteReport<AccuracyRow> {
  const { seed } = context.options, hasTasks = puzzles.length > 0, name = nameOfPath(path);
  const bins = rows.map(({ result }) =>
    byMaskRatio(result.sequences!, { seed, bins: hasTasks ? BINS : SYNTHETIC_BINS })
  );
  const tasks = rows[0]!.result.scores, counted = tasks.slice(0, -1);
  const overall = (title: string, digits: number, of: (all: MaskedComparison) => Interval) =>
    ofQuantized(title, (_, i) => span(of(bins[i]!.at(-1)!), digits));
  const kl = overall("KL, nats", 4, (all) => all.kl);
  const along = (title: string, digits: number, begin: number, value: (bin: MaskedComparison) => number) =>
    byBin(
      `${name}: ${title} by mask ratio`,
      bins[0]!.slice(0, -1).map(({ low, high }) => `${low}–${high}`),
      digits,
      rows.slice(begin).map(({ setting }, i) => ({
        setting,
        values: bins[begin + i]!.slice(0, -1).map(value),
      })),
    );
  const sections = hasTasks
    ? [
      bySetting(
        `${name}: puzzles solved, ${counted.map(({ prompts, task }) => `${prompts} ${task}`).join(", ")}`,
        PUZZLE_NOTES,
        rows,
        [
          ...tasks.map(({ task }, t) => column(task, ({ result }) => span(result.scores[t]!.exactMatch))),
          kl,
          worse("worse"),
        ],
      ),
      along("KL at masked positions, nats,", 4, 1, ({ kl }) => kl.value),
      along("accuracy of single tokens", 3, 0, ({ accuracy }) => accuracy.value),
    ]
    : [bySetting(
      `${name} (${kind}): ${sequences.length} synthetic sequences, ${
        bins[0]!.at(-1)!.positions
      } masks - no accuracy`,
      SEQUENCE_NOTES,
      rows,
      [WEIGHT_ERROR, kl, overall("same token", 3, (all) => all.agreement)],
    )];
  return {
    sections,
    rows: rows.map((row, i) => maskedRow(context, path, row, bins[i]!, hasTasks)),
    goals: [
      ...counted.flatMap(({ task, exactMatch }) =>
        referenceGoal(folder, `exact match of ${task}`, ["exact_match", task], exactMatch)
      ),
      ...sensitivityGoal(path, rows),
    ],
    skipped: noAccuracy(path, kind, missing),
    samples: rows.flatMap(({ setting, result }) => shownPuzzles(name, setting, result.answers ?? [])),
  };
}

const PUZZLE_NOTES = [
  "Share of exact answers with its 95 % interval (Wilson); KL at masked positions beside full precision, in nats",
  "(bootstrap over sequences). Worse: the paired difference to full precision lies below 0 with its whole interval.",
];
const SEQUENCE_NOTES = [
  "Random tokens, not text: KL beside full precision at masked positions, in nats, and share of them with the same",
  "most probable token, with 95 % intervals (bootstrap over sequences). They say how far the distributions moved,",
  "not how many answers are right.",
];

const noAccuracy = (path: string, kind: string, missing: readonly { readonly reason: string }[]) =>
  missing.map(({ reason }) => ({
    what: `${nameOfPath(path)} (${kind}): accuracy`,
    reason: `${reason}; distance to full precision on synthetic inputs instead`,
  }));

function shownPuzzles(model: string, setting: Setting, solved: readonly SolvedPuzzle[]): Sample[] {
  const shown = [...Map.groupBy(solved, ({ puzzle }) => puzzle.task).values()].flatMap((own) =>
    own.slice(0, SHOWN_PUZZLES)
  );
  return shown.map(({ puzzle, answer, isCorrect }, sample) => ({
    model,
    setting: setting.name,
    sample,
    label: puzzle.task,
    prompt: puzzle.prompt,
    expected: puzzle.answer,
    answer,
    isCorrect,
  }));
}

/** The first images, as files; none of a model whose channels are no colours. */
function shownImages(
  model: string,
  setting: Setting,
  { images: { images, labels, elements }, scores }: NonNullable<Measurement["drawn"]>,
  channels: number,
): Sample[] {
  if (channels !== 1 && channels !== 3) return [];
  const size = Math.sqrt(elements / channels);
  return Array.from(labels.subarray(0, SHOWN_IMAGES), (label, sample) => {
    const image = images.subarray(sample * elements, (sample + 1) * elements);
    const { pixels, width, height } = tileImages(image, channels, size, 1);
    return {
      model,
      setting: setting.name,
      sample,
      label: String(label),
      isCorrect: scores.isRecognized[sample]!,
      png: encodePng(pixels, width, height, channels),
    };
  });
}

function imageReport(
  context: BenchContext,
  { path, folder, needs: { model } }: ModelPlan,
  { readers, steps, trajectories, missing, options }: ImageYardstick,
  rows: readonly Compared[],
): SuiteReport<AccuracyRow> {
  const name = nameOfPath(path), images = readers === undefined ? trajectories : options.drawn!;
  const { channels } = model.config as { readonly channels: number };
  const of = (title: string, digits: number, value: (result: Measurement) => Interval, make = ofQuantized) =>
    make(title, ({ result }) => span(value(result), digits));
  const drift = of("drift", 3, (result) => result.drift!.at(-1)!.relativeDistance);
  if (readers === undefined) {
    const title = `${name} (${model.kind}): ${images} trajectories of ${steps} steps, DDIM - no accuracy`;
    const columns = [WEIGHT_ERROR, of("prediction error", 4, ({ distance }) => distance), drift];
    return {
      sections: [bySetting(title, TRAJECTORY_NOTES, rows, columns)],
      rows: rows.map((row) => imageRow(context, path, row, images)),
      goals: [],
      skipped: noAccuracy(path, model.kind, missing),
    };
  }
  const full = rows[0]!.result.drawn!.scores;
  return {
    sections: [
      bySetting(`${name}: ${images} glyphs drawn, DDIM, ${DRAWING.steps} steps`, glyphNotes(images), rows, [
        of("recognized", 2, ({ drawn }) => drawn!.scores.classAccuracy, column),
        of("Fréchet distance", 1, ({ drawn }) => drawn!.scores.frechetDistance, column),
        of("noise error", 4, ({ distance }) => distance),
        drift,
        worse("fewer"),
      ]),
      byBin(
        `${name}: noise error by timestep`,
        rows[0]!.result.byTimestep!.map(({ timestep }) => `${timestep}`),
        4,
        rows.slice(1).map(({ setting, result }) => ({
          setting,
          values: result.byTimestep!.map(({ relativeError }) => relativeError.value),
        })),
      ),
    ],
    rows: rows.map((row) => imageRow(context, path, row, images)),
    goals: [
      ...referenceGoal(folder, "class accuracy", ["class_accuracy_of_samples"], full.classAccuracy),
      ...(images >= 1000
        ? referenceGoal(folder, "Fréchet distance", ["frechet_distance"], full.frechetDistance)
        : []),
      ...noiseGoal(path, rows),
    ],
    skipped: [],
    samples: rows.flatMap(({ setting, result }) => shownImages(name, setting, result.drawn!, channels)),
  };
}

const TRAJECTORY_NOTES = [
  "No classifier and no real images lie beside it. Prediction error: mean over steps of ‖ε̂ − ε‖² / ‖ε‖² at the states",
  "of the full-precision model's trajectory; drift: ‖x̂ − x‖² / ‖x‖² of the finished images, from the same noise; 95 %",
  "intervals by a bootstrap over images.",
];
const glyphNotes = (images: number) => [
  "Recognized: share that the shipped classifier reads as the class asked for, with its 95 % interval (Wilson).",
  `Fréchet distance on its features, of ${images} images: biased upwards for few. Noise error: mean over ten`,
  "timesteps of ‖ε̂ − ε‖² / ‖ε‖² beside full precision. Drift: ‖x̂ − x‖² / ‖x‖² of the finished images, same noise.",
  "Fewer: the paired difference of recognized glyphs to full precision lies below 0 with its whole interval.",
];
