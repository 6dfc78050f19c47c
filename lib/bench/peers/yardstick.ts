/** What a model of a family is measured by, beside full precision, on data that nothing was chosen with. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { type DitModel, type LoadedModel, loadScheduler, loadTokenizer } from "../../models/mod.ts";
import type { Kernels } from "../../native/mod.ts";
import { loadClassifier, loadFeatureStatistics } from "../../eval/classifier.ts";
import { drawImages, readImages, scoreImages, timestepErrors } from "../../eval/images.ts";
import {
  compareMasked,
  maskedSequences,
  type Puzzle,
  readPuzzles,
  scoreTasks,
  solvePuzzles,
  type TaskScore,
} from "../../eval/puzzles.ts";
import { FrechetReference } from "../../eval/frechet.ts";
import type { Interval } from "../../eval/intervals.ts";
import type { Unsupported } from "./method.ts";
import { syntheticImages, syntheticSequences } from "./inputs.ts";

/** Sequences for KL where a model has no puzzles. */
const SYNTHETIC_SEQUENCES = 300;
/** Images a timestep for the noise error. */
const IMAGES_PER_TIMESTEP = 32;
const QUICK_IMAGES_PER_TIMESTEP = 4;
const DRAWING = { sampler: "ddim", steps: 50, spacing: "linspace" } as const;

/** A model's worth. */
export interface Measurement {
  /** Beside full precision, ≥ 0: KL at masked positions in nats, or the mean over timesteps of ‖ε̂ − ε‖² / ‖ε‖². */
  readonly distance: Interval;
  /** Masked models: share of masked positions whose most probable token is the right one. */
  readonly tokenAccuracy?: Interval;
  /** Exact match by task and of all, or `recognized` glyphs; empty where there is nothing to solve. */
  readonly scores: readonly TaskScore[];
  /** Image models: the error at each timestep. */
  readonly byTimestep?: readonly { readonly timestep: number; readonly relativeError: Interval }[];
}

export interface Yardstick {
  /** Title of the column of {@linkcode Measurement.distance}. */
  readonly distance: string;
  /** Where the data come from, for the report. */
  readonly source: string;
  readonly tasks: readonly string[];
  /** What could not be measured, with the reason. */
  readonly missing: readonly string[];
  measure(model: LoadedModel): Measurement;
}

export interface YardstickOptions {
  readonly seed: number;
  /** Puzzles a task; images that are drawn. Without, all puzzles and no image: drawing takes most of the time. */
  readonly limit: number | undefined;
  /** Tasks of a masked model; undefined is all. */
  readonly tasks: readonly string[] | undefined;
  /** Fewer images a timestep: for a look, not for a report. */
  readonly quick: boolean;
}

/**
 * The yardstick for a model, from what lies beside its checkpoint; synthetic data, said to be such, where that lacks.
 *
 * @throws {FormatError | CheckpointError} when a file is there and not what it should be
 */
export async function yardstickOf(
  full: LoadedModel,
  path: string,
  kernels: Kernels,
  options: YardstickOptions,
): Promise<Yardstick | Unsupported> {
  return full.kind === "dit"
    ? imageYardstick(full.model, path, kernels, options)
    : await maskedYardstick(full, path, options);
}

async function maskedYardstick(
  full: Extract<LoadedModel, { readonly kind: "dream" | "llada" }>,
  path: string,
  { seed, limit = Infinity, tasks }: YardstickOptions,
): Promise<Yardstick | Unsupported> {
  const missing = ["tokenizer.json", "eval.jsonl"].filter((name) => !existsSync(join(path, name)));
  const compare = (sequences: Parameters<typeof compareMasked>[2], { kind, model }: LoadedModel) => {
    if (kind === "dit") throw new TypeError("Cannot compare a language model with one that draws images");
    const { kl, accuracy } = compareMasked(full.model, model, sequences, { seed, bins: 1 }).at(-1)!;
    return { model, distance: kl, tokenAccuracy: accuracy };
  };
  const distance = "KL, nats";
  if (missing.length > 0) {
    const sequences = syntheticSequences(full.model, SYNTHETIC_SEQUENCES, seed);
    return {
      distance,
      source: `${sequences.length} synthetic sequences (random tokens)`,
      tasks: [],
      missing: [`puzzles: there is no ${missing.join(", ")}`],
      measure: (model) => ({ distance: compare(sequences, model).distance, scores: [] }),
    };
  }
  const tokenizer = await loadTokenizer(path);
  const all = readPuzzles(join(path, "eval.jsonl"));
  const known = [...new Set(all.map(({ task }) => task))];
  const wanted = tasks === undefined ? known : known.filter((task) => tasks.includes(task));
  const puzzles: Puzzle[] = wanted.flatMap((task) =>
    all.filter((puzzle) => puzzle.task === task).slice(0, limit)
  );
  if (puzzles.length === 0) {
    return { unsupported: `no puzzles of ${tasks?.join(", ")}: its tasks are ${known.join(", ")}` };
  }
  const sequences = maskedSequences(full.model, tokenizer, puzzles, { seed });
  return {
    distance,
    source: `${puzzles.length} puzzles of eval.jsonl, ${sequences.length} masked sequences of them`,
    tasks: wanted,
    missing: [],
    measure: (loaded) => {
      const { model, distance, tokenAccuracy } = compare(sequences, loaded);
      return { distance, tokenAccuracy, scores: scoreTasks(solvePuzzles(model, tokenizer, puzzles)) };
    },
  };
}

function imageYardstick(
  full: DitModel,
  path: string,
  kernels: Kernels,
  { seed, limit, quick }: YardstickOptions,
): Yardstick | Unsupported {
  const imagesPerTimestep = quick ? QUICK_IMAGES_PER_TIMESTEP : IMAGES_PER_TIMESTEP;
  if (!existsSync(join(path, "scheduler_config.json"))) {
    return { unsupported: "there is no scheduler_config.json, so no noise of a timestep" };
  }
  const scheduler = loadScheduler(path);
  const imageFile = join(path, "eval_images.safetensors");
  const isReal = existsSync(imageFile);
  const images = isReal ? readImages(imageFile) : syntheticImages(full, 10 * imagesPerTimestep, seed + 2);
  const needed = ["classifier.safetensors", "reference_features.safetensors"];
  const missing = needed.filter((name) => !existsSync(join(path, name)));
  const draws = limit !== undefined && missing.length === 0;
  const classifier = draws ? loadClassifier(join(path, needed[0]!), kernels) : undefined;
  const reference = draws ? new FrechetReference(loadFeatureStatistics(join(path, needed[1]!))) : undefined;
  return {
    distance: "noise error",
    source: `${imagesPerTimestep} noised images a timestep, ${
      isReal ? "of eval_images.safetensors" : "synthetic (noise)"
    }${draws ? `; ${limit} glyphs drawn` : ""}`,
    tasks: draws ? ["recognized"] : [],
    missing: draws ? [] : [
      `drawn glyphs: ${
        missing.length > 0 ? `there is no ${missing.join(", ")}` : "they take long, ask with --limit"
      }`,
    ],
    measure: ({ kind, model }) => {
      if (kind !== "dit") throw new TypeError("Cannot compare an image model with one that writes text");
      const byTimestep = timestepErrors(full, model, scheduler, images, {
        seed,
        imagesPerTimestep,
      });
      const scores: TaskScore[] = [];
      if (classifier !== undefined && reference !== undefined) {
        const drawn = drawImages(model, scheduler, limit!, { ...DRAWING, seed });
        const { classAccuracy, isRecognized } = scoreImages(drawn, classifier, reference, { seed });
        scores.push({
          task: "recognized",
          solved: isRecognized.filter(Boolean).length,
          prompts: isRecognized.length,
          exactMatch: classAccuracy,
        });
      }
      return {
        distance: meanOf(byTimestep.map(({ relativeError }) => relativeError)),
        byTimestep,
        scores,
      };
    },
  };
}

/** The mean of independent measurements: the sides of their intervals add in squares. */
export function meanOf(intervals: readonly Interval[]): Interval {
  const count = intervals.length;
  const mean = (of: (interval: Interval) => number) =>
    intervals.reduce((sum, each) => sum + of(each), 0) / count;
  const value = mean((each) => each.value);
  const side = (of: (interval: Interval) => number) => Math.sqrt(mean((each) => of(each) ** 2) / count);
  return {
    value,
    low: value - side((each) => each.value - each.low),
    high: value + side((each) => each.high - each.value),
    confidence: intervals[0]!.confidence,
  };
}
