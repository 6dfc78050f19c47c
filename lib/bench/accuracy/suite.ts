/**
 * The accuracy suite: models are run, at full precision and quantized, and what they still can do is counted: puzzles
 * solved by a masked language model, glyphs drawn recognizably by an image model. Both see the same prompts and noise.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import {
  type DitModel,
  encodePng,
  loadStoredModel,
  loadTokenizer,
  type MaskedTransformer,
  tileImages,
} from "../../models/mod.ts";
import { readJsonFile } from "../../tensor/mod.ts";
import { DRAWING, type GlyphPlan, type ModelPlan, planModels, type PuzzlePlan } from "./plan.ts";
import { loadClassifier, loadFeatureStatistics } from "../../eval/classifier.ts";
import {
  drawImages,
  type DrawnImages,
  readImages,
  scoreImages,
  timestepErrors,
  trajectoryDrift,
} from "../../eval/images.ts";
import {
  compareMasked,
  type MaskedComparison,
  maskedSequences,
  scoreTasks,
  type SolvedPuzzle,
  solvePuzzles,
} from "../../eval/puzzles.ts";
import { measureSequences, measureTrajectories } from "./fidelity_report.ts";
import { FrechetReference } from "../../eval/frechet.ts";
import { type Interval, pairedDifference, stratifiedMean } from "../../eval/intervals.ts";
import { atEverySetting, circumstances, nameOf, type Setting, span } from "../settings.ts";
import {
  type BenchContext,
  type Goal,
  mergeReports,
  type Sample,
  type Section,
  type Suite,
  type SuiteReport,
} from "../suite.ts";

/** Samples of each model and setting that a report shows: the first of each task, or the first images. */
const SHOWN_IMAGES = 12;
const SHOWN_PUZZLES = 4;

/** A published score against the interval of this run; nothing to compare where the file is not there. */
function referenceGoal(path: string, what: string, keys: readonly string[], measured: Interval): Goal[] {
  const file = join(path, "reference_scores.json");
  if (!existsSync(file)) return [];
  let value: unknown = readJsonFile(file);
  for (const key of keys) value = (value as Record<string, unknown> | undefined)?.[key];
  if (typeof value !== "number") return [];
  return [{
    goal: `${nameOf(path)}, full precision: ${what} as published`,
    wanted: `${value.toFixed(3)} inside`,
    measured: span(measured, 3),
    met: value >= measured.low - 1e-6 && value <= measured.high + 1e-6,
  }];
}

/** Round to nearest at the fewest bits must be visibly worse: otherwise this measure sees nothing. */
function sensitivityGoal(
  path: string,
  what: string,
  rows: readonly { setting: Setting; lost: Interval }[],
): Goal[] {
  const widths = rows.flatMap(({ setting: { bits, solver } }) =>
    solver === "round" && bits === 2 ? [bits] : []
  );
  if (widths.length === 0) return [];
  const { lost } = rows.find(({ setting }) => setting.solver === "round" && setting.bits === 2)!;
  return [{
    goal: `${nameOf(path)}, 2 bits, round: ${what}, less full precision's`,
    wanted: "all of it below 0",
    measured: span(lost, 3),
    met: lost.high < 0,
  }];
}

/** A table with a column a bin of the denoising axis: what it costs there. */
function byBin(
  title: string,
  bins: readonly string[],
  digits: number,
  rows: readonly { readonly setting: Setting; readonly values: readonly number[] }[],
): Section {
  return {
    title,
    notes: ["Means; their intervals are in the JSON report (--json, --out)."],
    columns: [
      { key: "setting", title: "setting" },
      ...bins.map((bin) => ({ key: bin, title: bin, digits })),
    ],
    rows: rows.map(({ setting, values }) => ({
      setting: setting.name,
      ...Object.fromEntries(bins.map((bin, i) => [bin, values[i]])),
    })),
  };
}

/** Error of the noise that counts as visible where no other width was measured. */
const VISIBLE_NOISE_ERROR = 0.01;

/**
 * Round to nearest at 2 bits must be visibly worse than at the most bits: a hundred glyphs are too few for the classifier to tell, so the
 * error of the predicted noise decides, which is 0 for full precision.
 */
function noiseGoal(path: string, rows: readonly { setting: Setting; meanError: Interval }[]): Goal[] {
  const rounded = rows.filter(({ setting: { solver } }) => solver === "round");
  const two = rounded.find(({ setting: { bits } }) => bits === 2);
  if (two === undefined) return [];
  const most = rounded.reduce((a, b) => (b.setting.bits ?? 0) > (a.setting.bits ?? 0) ? b : a);
  const least = most === two ? VISIBLE_NOISE_ERROR : Math.max(VISIBLE_NOISE_ERROR, most.meanError.high);
  return [{
    goal: `${nameOf(path)}, 2 bits, round: noise error against full precision`,
    wanted: most === two
      ? `all of it above ${least}`
      : `all of it above ${least} and above that of ${most.setting.bits} bits`,
    measured: most === two
      ? span(two.meanError, 4)
      : `${span(two.meanError, 4)} and ${span(most.meanError, 4)}`,
    met: two.meanError.low > least,
  }];
}

async function measurePuzzles(
  context: BenchContext,
  { path, folder: beside, puzzles }: PuzzlePlan,
): Promise<SuiteReport> {
  const { kernels, options } = context;
  const tokenizer = await loadTokenizer(beside);
  const load = (folder: string) => {
    const loaded = loadStoredModel(folder, kernels);
    if (loaded.kind === "dit") throw new TypeError(`Cannot solve puzzles with ${folder}: it draws images`);
    return loaded.model;
  };
  let full: MaskedTransformer | undefined;
  const measured = await atEverySetting(context, path, (folder) => {
    const model = load(folder);
    full ??= model;
    const solved = solvePuzzles(model, tokenizer, puzzles);
    const masked = compareMasked(
      full,
      model,
      maskedSequences(model, tokenizer, puzzles, { seed: options.seed }),
      {
        seed: options.seed,
      },
    );
    return { solved, scores: scoreTasks(solved), masked, overall: masked.at(-1)! };
  });
  const right = (entry: typeof measured[number]) =>
    entry.result.solved.map(({ isCorrect }) => Number(isCorrect));
  const base = right(measured[0]!);
  const rows = measured.map((entry) => ({
    ...entry,
    lost: pairedDifference(base, right(entry), { seed: options.seed }),
  }));
  const tasks = rows[0]!.result.scores;
  const section: Section = {
    title: `${nameOf(path)}: puzzles solved, ${
      tasks.slice(0, -1).map(({ prompts, task }) => `${prompts} ${task}`).join(", ")
    }`,
    notes: [
      "Share of exact answers with its 95 % interval (Wilson); KL at masked positions against full precision, in nats",
      "(bootstrap over sequences). Worse: the paired difference to full precision lies below 0 with its whole interval.",
    ],
    columns: [
      { key: "setting", title: "setting" },
      { key: "bitsPerWeight", title: "bits/weight", digits: 3 },
      ...tasks.map(({ task }) => ({ key: task, title: task })),
      { key: "kl", title: "KL, nats" },
      { key: "worse", title: "worse" },
      { key: "seconds", title: "s", digits: 1 },
    ],
    rows: rows.map(({ setting, bitsPerWeight, result, lost, seconds }) => ({
      setting: setting.name,
      bitsPerWeight,
      ...Object.fromEntries(result.scores.map(({ task, exactMatch }) => [task, span(exactMatch)])),
      kl: setting.bits === undefined ? undefined : span(result.overall.kl, 4),
      worse: setting.bits === undefined ? undefined : lost.high < 0,
      seconds,
    })),
  };
  const ratios = rows[0]!.result.masked.slice(0, -1).map(({ low, high }) => `${low}–${high}`);
  const along = (title: string, digits: number, value: (bin: MaskedComparison) => number, part = rows) =>
    byBin(
      `${nameOf(path)}: ${title} by mask ratio`,
      ratios,
      digits,
      part.map(({ setting, result }) => ({
        setting,
        values: result.masked.slice(0, -1).map(value),
      })),
    );
  const sections = [
    section,
    along("KL at masked positions, nats,", 4, ({ kl }) => kl.value, rows.slice(1)),
    along("accuracy of single tokens", 3, ({ accuracy }) => accuracy.value),
  ];
  return {
    sections,
    rows: rows.map((row) => ({
      ...circumstances(context, path, row),
      kind: "masked language model",
      exactMatch: row.result.scores,
      differenceToFull: row.lost,
      byMaskRatio: row.result.masked,
    })),
    goals: [
      ...tasks.filter(({ task }) => task !== "all").flatMap(({ task, exactMatch }) =>
        referenceGoal(beside, `exact match of ${task}`, ["exact_match", task], exactMatch)
      ),
      ...sensitivityGoal(path, "puzzles", rows),
    ],
    skipped: [],
    quantized: rows.flatMap(({ quantized }) => quantized ?? []),
    samples: rows.flatMap(({ setting, result }) => shownPuzzles(nameOf(path), setting, result.solved)),
  };
}

/** The first puzzles of each task. */
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

/** The first images, as files. */
function shownImages(
  model: string,
  setting: Setting,
  { images, labels, elements }: DrawnImages,
  isRecognized: readonly boolean[],
  channels: number,
): Sample[] {
  if (channels !== 1 && channels !== 3) return []; // not a picture that a PNG of this kind can hold
  const size = Math.sqrt(elements / channels);
  return Array.from(labels.subarray(0, SHOWN_IMAGES), (label, sample) => {
    const image = images.subarray(sample * elements, (sample + 1) * elements);
    const { pixels, width, height } = tileImages(image, channels, size, 1);
    return {
      model,
      setting: setting.name,
      sample,
      label: String(label),
      isCorrect: isRecognized[sample]!,
      png: encodePng(pixels, width, height, channels),
    };
  });
}

async function measureGlyphs(
  context: BenchContext,
  { path, folder: beside, scheduler, images: count }: GlyphPlan,
): Promise<SuiteReport> {
  const { kernels, options } = context;
  const load = (folder: string): DitModel => {
    const loaded = loadStoredModel(folder, kernels);
    if (loaded.kind !== "dit") throw new TypeError(`Cannot draw images with ${folder}: it writes text`);
    return loaded.model;
  };
  const classifier = loadClassifier(join(beside, "classifier.safetensors"), kernels);
  const reference = new FrechetReference(
    loadFeatureStatistics(join(beside, "reference_features.safetensors")),
  );
  const real = readImages(join(beside, "eval_images.safetensors"));
  const seeded = { seed: options.seed };
  let full: DitModel | undefined;
  let fullDrawn: ReturnType<typeof drawImages> | undefined;
  const measured = await atEverySetting(context, path, (folder, setting) => {
    const model = load(folder);
    full ??= model;
    const drawn = drawImages(model, scheduler, count, { ...DRAWING, ...seeded, trajectory: true });
    fullDrawn ??= drawn;
    const scores = scoreImages(drawn, classifier, reference, seeded);
    return {
      scores,
      shown: shownImages(nameOf(path), setting, drawn, scores.isRecognized, model.config.channels),
      errors: timestepErrors(full, model, scheduler, real, {
        ...seeded,
        imagesPerTimestep: Math.min(32, count),
      }),
      drift: trajectoryDrift(fullDrawn, drawn, seeded),
    };
  });
  const recognized = (entry: typeof measured[number]) => entry.result.scores.isRecognized.map(Number);
  const base = recognized(measured[0]!);
  const rows = measured.map((entry) => ({
    ...entry,
    lost: pairedDifference(base, recognized(entry), seeded),
    meanError: stratifiedMean(entry.result.errors.map(({ perImage }) => perImage), seeded),
  }));
  const section: Section = {
    title: `${nameOf(path)}: ${count} glyphs drawn, DDIM, ${DRAWING.steps} steps`,
    notes: [
      "Recognized: share that the shipped classifier reads as the class asked for, with its 95 % interval (Wilson).",
      `Fréchet distance of its features, of ${count} images: it falls with their number. Noise error: mean over ten`,
      "timesteps of ‖ε̂ − ε‖² / ‖ε‖² against full precision. Drift: ‖x̂ − x‖² / ‖x‖² of the finished images, same noise.",
      "Fewer: the paired difference of recognized glyphs to full precision lies below 0 with its whole interval.",
    ],
    columns: [
      { key: "setting", title: "setting" },
      { key: "bitsPerWeight", title: "bits/weight", digits: 3 },
      { key: "recognized", title: "recognized" },
      { key: "frechet", title: "Fréchet distance" },
      { key: "error", title: "noise error" },
      { key: "drift", title: "drift" },
      { key: "fewer", title: "fewer" },
      { key: "seconds", title: "s", digits: 1 },
    ],
    rows: rows.map(({ setting, bitsPerWeight, result, lost, meanError, seconds }) => ({
      setting: setting.name,
      bitsPerWeight,
      recognized: span(result.scores.classAccuracy),
      frechet: span(result.scores.frechetDistance, 1),
      error: setting.bits === undefined ? undefined : span(meanError, 4),
      drift: setting.bits === undefined ? undefined : span(result.drift.at(-1)!.relativeDistance, 3),
      fewer: setting.bits === undefined ? undefined : lost.high < 0,
      seconds,
    })),
  };
  const timesteps = rows[0]!.result.errors.map(({ timestep }) => `${timestep}`);
  const byTimestep = byBin(
    `${nameOf(path)}: noise error by timestep`,
    timesteps,
    4,
    rows.slice(1).map(({ setting, result }) => ({
      setting,
      values: result.errors.map(({ relativeError }) => relativeError.value),
    })),
  );
  return {
    sections: [section, byTimestep],
    rows: rows.map((row) => ({
      ...circumstances(context, path, row),
      kind: "image model",
      images: count,
      classAccuracy: row.result.scores.classAccuracy,
      frechetDistance: row.result.scores.frechetDistance,
      differenceToFull: row.lost,
      noiseError: row.meanError,
      byTimestep: row.result.errors.map(({ perImage: _, ...error }) => error),
      drift: row.result.drift,
    })),
    goals: [
      ...referenceGoal(
        beside,
        "class accuracy",
        ["class_accuracy_of_samples"],
        rows[0]!.result.scores.classAccuracy,
      ),
      ...(count >= 1000
        ? referenceGoal(
          beside,
          "Fréchet distance",
          ["frechet_distance"],
          rows[0]!.result.scores.frechetDistance,
        )
        : []),
      ...noiseGoal(path, rows),
    ],
    skipped: [],
    quantized: rows.flatMap(({ quantized }) => quantized ?? []),
    samples: rows.flatMap(({ result }) => result.shown),
  };
}

function measure(context: BenchContext, plan: ModelPlan): Promise<SuiteReport> {
  switch (plan.route) {
    case "puzzles":
      return measurePuzzles(context, plan);
    case "glyphs":
      return measureGlyphs(context, plan);
    case "sequences":
      return measureSequences(context, plan);
    case "trajectories":
      return measureTrajectories(context, plan);
  }
}

/** The reference models, or those of `--model`, run at full precision and quantized. */
export const accuracySuite: Suite = {
  name: "accuracy",
  summary: "models run at full precision and quantized: puzzles solved, glyphs drawn",
  defaults: { bits: [8, 4, 3, 2], groupSizes: [64], solvers: ["round", "clip", "best"] },
  run: async (context) => {
    const reports: SuiteReport[] = [];
    // What is wrong with the last model is found out before the first is measured.
    for (const plan of await planModels(context)) reports.push(await measure(context, plan));
    return mergeReports(reports);
  },
};
