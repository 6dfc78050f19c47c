/**
 * The accuracy suite: models are run, at full precision and quantized, and what they still can do is counted: puzzles
 * solved by a masked language model, glyphs drawn recognizably by an image model. Both see the same prompts and noise.
 */
import { availableParallelism } from "node:os";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../config.ts";
import {
  type DitModel,
  encodePng,
  loadModel,
  loadScheduler,
  loadTokenizer,
  type MaskedTransformer,
  modelConfig,
  tileImages,
} from "../models/mod.ts";
import { quantizeCheckpoint } from "../pipeline.ts";
import { type BitWidth, MAX_THREADS, type Solver } from "../quant/mod.ts";
import { openCheckpoint, readJsonFile } from "../tensor/mod.ts";
import { measureStored } from "./checkpoint_suite.ts";
import { loadClassifier, loadFeatureStatistics } from "./classifier.ts";
import {
  drawImages,
  type DrawnImages,
  readImages,
  scoreImages,
  timestepErrors,
  trajectoryDrift,
} from "./dit_metrics.ts";
import {
  compareMasked,
  maskedSequences,
  readPuzzles,
  scoreTasks,
  type SolvedPuzzle,
  solvePuzzles,
} from "./dream_tasks.ts";
import { FrechetReference } from "./frechet.ts";
import { bootstrapMean, type Interval, pairedDifference } from "./intervals.ts";
import type {
  BenchContext,
  Goal,
  QuantizedSetting,
  Sample,
  Section,
  Skipped,
  Suite,
  SuiteReport,
} from "./suite.ts";
import { withTemporaryFolder } from "./temporary_folder.ts";

/** Images drawn at a setting unless `--limit` says otherwise: what keeps the whole suite within four minutes. */
const DEFAULT_IMAGES = 128;
const DRAWING = { sampler: "ddim", steps: 50, spacing: "linspace" } as const;

/** Samples of each model and setting that a report shows: the first of each task, or the first images. */
const SHOWN_IMAGES = 12;
const SHOWN_PUZZLES = 4;

/** A model as it is or quantized in one way. */
interface Setting {
  readonly name: string;
  readonly bits: BitWidth | undefined;
  readonly solver: Solver | undefined;
}

/** What a setting was measured to be; the rest is the family's. */
interface Measured {
  readonly setting: Setting;
  readonly bitsPerWeight: number | undefined;
  readonly relativeRmsError: number | undefined;
  readonly quantizeSeconds: number | undefined;
  readonly seconds: number;
  readonly quantized: QuantizedSetting | undefined;
}

const nameOf = (path: string) => path.replace(/[/\\]+$/, "").split(/[/\\]/).at(-1)!;
const span = ({ value, low, high }: Interval, digits = 2) =>
  `${value.toFixed(digits)} ${low.toFixed(digits)}–${high.toFixed(digits)}`;

function settingsOf({ options: { bits, solvers } }: BenchContext): Setting[] {
  return [
    { name: "full", bits: undefined, solver: undefined },
    ...bits.flatMap((width) =>
      solvers.map((solver): Setting => ({ name: `${width} ${solver}`, bits: width, solver }))
    ),
  ];
}

/** Runs `measure` on the model at `path` at every setting, each quantized into a temporary folder first. */
async function atEverySetting<Result>(
  context: BenchContext,
  path: string,
  measure: (folder: string, setting: Setting) => Result | Promise<Result>,
): Promise<(Measured & { readonly result: Result })[]> {
  const { kernels, options } = context;
  const measured: (Measured & { readonly result: Result })[] = [];
  await withTemporaryFolder(async (temporary) => {
    for (const setting of settingsOf(context)) {
      context.progress(`${nameOf(path)}, ${setting.name}`);
      let folder = path, stored, quantizeSeconds, quantized;
      if (setting.bits !== undefined) {
        folder = join(temporary, "quantized");
        const { config } = resolveConfig({
          overrides: {
            bit_width: setting.bits,
            group_size: options.groupSize,
            solver: setting.solver,
            num_threads: options.threads ?? 0,
          },
        });
        const begin = performance.now();
        const { layers, layerMilliseconds } = await quantizeCheckpoint({
          input: path,
          output: folder,
          config,
          kernels,
          force: true,
        });
        quantizeSeconds = (performance.now() - begin) / 1000;
        quantized = { model: nameOf(path), setting: setting.name, layers, layerMilliseconds };
        stored = measureStored(kernels, path, folder);
      }
      const begin = performance.now();
      const result = await measure(folder, setting);
      measured.push({
        setting,
        bitsPerWeight: stored?.bitsPerWeight,
        relativeRmsError: stored?.relativeRmsError,
        quantizeSeconds,
        seconds: (performance.now() - begin) / 1000,
        quantized,
        result,
      });
    }
  });
  return measured;
}

const threadsOf = ({ kernels, options }: BenchContext) =>
  kernels.backend === "wasm" ? 1 : options.threads ?? Math.min(MAX_THREADS, availableParallelism());

/** Rows of the JSON report: every measurement with its circumstances. */
function circumstances(context: BenchContext, path: string, measured: Measured) {
  const { environment, options } = context;
  return {
    suite: "accuracy",
    model: nameOf(path),
    setting: measured.setting.name,
    bits: measured.setting.bits ?? null,
    solver: measured.setting.solver ?? null,
    groupSize: options.groupSize,
    bitsPerWeight: measured.bitsPerWeight ?? null,
    relativeRmsError: measured.relativeRmsError ?? null,
    quantizeSeconds: measured.quantizeSeconds ?? null,
    seconds: measured.seconds,
    threads: threadsOf(context),
    backend: environment.backend,
    isa: environment.isa,
    runtime: environment.runtime,
    processor: environment.processor,
  };
}

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

async function measureMasked(context: BenchContext, path: string): Promise<SuiteReport> {
  const { kernels, options } = context;
  const tokenizer = await loadTokenizer(path);
  const load = (folder: string) => {
    const loaded = loadModel(folder, kernels, { threads: threadsOf(context) });
    if (loaded.kind === "dit") throw new TypeError(`Cannot solve puzzles with ${folder}: it draws images`);
    return loaded.model;
  };
  const all = readPuzzles(join(path, "eval.jsonl"));
  const wanted = options.tasks ?? [...new Set(all.map(({ task }) => task))];
  const limit = options.limit ?? (options.quick ? 20 : Infinity);
  const puzzles = wanted.flatMap((task) => all.filter((puzzle) => puzzle.task === task).slice(0, limit));
  if (puzzles.length === 0) {
    const tasks = [...new Set(all.map(({ task }) => task))].join(", ");
    return skippedReport(nameOf(path), `no puzzles of ${wanted.join(", ")}: its tasks are ${tasks}`);
  }
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
  return {
    sections: [section],
    rows: rows.map((row) => ({
      ...circumstances(context, path, row),
      kind: "masked language model",
      exactMatch: row.result.scores,
      differenceToFull: row.lost,
      byMaskRatio: row.result.masked,
    })),
    goals: [
      ...tasks.filter(({ task }) => task !== "all").flatMap(({ task, exactMatch }) =>
        referenceGoal(path, `exact match of ${task}`, ["exact_match", task], exactMatch)
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

function measureImagesModel(context: BenchContext, path: string): Promise<SuiteReport> {
  const { kernels, options } = context;
  const threads = threadsOf(context);
  const load = (folder: string): DitModel => {
    const loaded = loadModel(folder, kernels, { threads });
    if (loaded.kind !== "dit") throw new TypeError(`Cannot draw images with ${folder}: it writes text`);
    return loaded.model;
  };
  const scheduler = loadScheduler(path);
  const classifier = loadClassifier(join(path, "classifier.safetensors"), kernels, threads);
  const reference = new FrechetReference(loadFeatureStatistics(join(path, "reference_features.safetensors")));
  const real = readImages(join(path, "eval_images.safetensors"));
  const count = options.limit ?? (options.quick ? 20 : DEFAULT_IMAGES);
  const seeded = { seed: options.seed };
  return (async () => {
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
      meanError: bootstrapMean(entry.result.errors.map(({ relativeError }) => relativeError.value), seeded),
    }));
    const section: Section = {
      title: `${nameOf(path)}: ${count} glyphs drawn, DDIM, ${DRAWING.steps} steps`,
      notes: [
        "Recognized: share that the shipped classifier reads as the class asked for, with its 95 % interval (Wilson).",
        `Fréchet distance of its features, of ${count} images: it falls with their number. Noise error: mean over ten`,
        "timesteps of ‖ε̂ − ε‖² / ‖ε‖² against full precision. Drift: ‖x̂ − x‖² / ‖x‖² of the finished images, same noise.",
      ],
      columns: [
        { key: "setting", title: "setting" },
        { key: "bitsPerWeight", title: "bits/weight", digits: 3 },
        { key: "recognized", title: "recognized" },
        { key: "frechet", title: "Fréchet distance" },
        { key: "error", title: "noise error" },
        { key: "drift", title: "drift" },
        { key: "worse", title: "worse" },
        { key: "seconds", title: "s", digits: 1 },
      ],
      rows: rows.map(({ setting, bitsPerWeight, result, lost, meanError, seconds }) => ({
        setting: setting.name,
        bitsPerWeight,
        recognized: span(result.scores.classAccuracy),
        frechet: span(result.scores.frechetDistance, 1),
        error: setting.bits === undefined ? undefined : span(meanError, 4),
        drift: setting.bits === undefined ? undefined : span(result.drift.at(-1)!.relativeDistance, 3),
        worse: setting.bits === undefined ? undefined : lost.high < 0,
        seconds,
      })),
    };
    return {
      sections: [section],
      rows: rows.map((row) => ({
        ...circumstances(context, path, row),
        kind: "image model",
        images: count,
        classAccuracy: row.result.scores.classAccuracy,
        frechetDistance: row.result.scores.frechetDistance,
        differenceToFull: row.lost,
        byTimestep: row.result.errors,
        drift: row.result.drift,
      })),
      goals: [
        ...referenceGoal(
          path,
          "class accuracy",
          ["class_accuracy_of_samples"],
          rows[0]!.result.scores.classAccuracy,
        ),
        ...(count >= 1000
          ? referenceGoal(
            path,
            "Fréchet distance",
            ["frechet_distance"],
            rows[0]!.result.scores.frechetDistance,
          )
          : []),
        ...sensitivityGoal(path, "recognized glyphs", rows),
      ],
      skipped: [],
      quantized: rows.flatMap(({ quantized }) => quantized ?? []),
      samples: rows.flatMap(({ result }) => result.shown),
    };
  })();
}

function skippedReport(what: string, reason: string): SuiteReport {
  return { sections: [], rows: [], goals: [], skipped: [{ what, reason } satisfies Skipped] };
}

/** What a model of a family is measured with, beside its weights. */
const NEEDED = {
  masked: ["tokenizer.json", "eval.jsonl"],
  image: [
    "scheduler_config.json",
    "classifier.safetensors",
    "reference_features.safetensors",
    "eval_images.safetensors",
  ],
};

async function measureModel(context: BenchContext, path: string): Promise<SuiteReport> {
  const { kind, bytes } = (() => {
    using checkpoint = openCheckpoint(path);
    const sizes = checkpoint.files.map(({ file }) => file.fileBytes);
    return { kind: modelConfig(checkpoint).kind, bytes: sizes.reduce((sum, size) => sum + size, 0) };
  })();
  const missing = NEEDED[kind === "dit" ? "image" : "masked"].filter((name) => !existsSync(join(path, name)));
  if (missing.length > 0) {
    return skippedReport(
      `${nameOf(path)} (${kind})`,
      `nothing to measure it with: it lacks ${missing.join(", ")}`,
    );
  }
  const settings = settingsOf(context).length;
  context.progress(
    `${nameOf(path)} (${kind}), ${settings} settings; needs about ${
      (bytes * 2 / 1e6).toFixed(0)
    } MB of memory ` +
      `and ${(bytes / 1e6).toFixed(0)} MB of temporary files`,
  );
  return await (kind === "dit" ? measureImagesModel(context, path) : measureMasked(context, path));
}

/** The reference models, or those of `--model`, run at full precision and quantized. */
export const accuracySuite: Suite = {
  name: "accuracy",
  summary: "models run at full precision and quantized: puzzles solved, glyphs drawn",
  run: async (context) => {
    const reports: SuiteReport[] = [];
    for (const path of context.options.models) reports.push(await measureModel(context, path));
    return {
      sections: reports.flatMap(({ sections }) => sections),
      rows: reports.flatMap(({ rows }) => rows),
      goals: reports.flatMap(({ goals }) => goals),
      skipped: reports.flatMap(({ skipped }) => skipped),
      quantized: reports.flatMap(({ quantized = [] }) => quantized),
      samples: reports.flatMap(({ samples = [] }) => samples),
    };
  },
};
