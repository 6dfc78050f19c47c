/**
 * What a row of the phase suite is measured by, on evaluation data that nothing was chosen with: tasks, and the step KL sample by sample, so that
 * rows can be compared in pairs. Where a model has no evaluation data, synthetic ones are made, and no accuracy is given.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { type DitModel, type LoadedModel, loadScheduler, loadTokenizer } from "../../models/mod.ts";
import type { Kernels } from "../../native/mod.ts";
import { imageStepKl, stepWeights } from "../../calibration/step_kl.ts";
import { tokenKl } from "../../thermo/mod.ts";
import { DRAWING } from "../accuracy/plan.ts";
import { loadClassifier, loadFeatureStatistics } from "../../eval/classifier.ts";
import { drawImages, readImages, scoreImages } from "../../eval/images.ts";
import {
  type MaskedSequence,
  maskedSequences,
  type Puzzle,
  readPuzzles,
  scoreTasks,
  solvePuzzles,
  type TaskScore,
} from "../../eval/puzzles.ts";
import { FrechetReference } from "../../eval/frechet.ts";
import { bootstrapRatio, type Interval } from "../../eval/intervals.ts";
import { syntheticImages, syntheticSequences } from "../peers/inputs.ts";
import { imageNoise } from "../../models/random.ts";

/** Times that the puzzles are masked for the step KL: rare large errors decide its mean. */
const REPEATS = 3;
const SYNTHETIC_SEQUENCES = 300;
const IMAGES_PER_TIMESTEP = 32;
const QUICK_IMAGES_PER_TIMESTEP = 4;
/** Sequences of one forward pass. */
const BATCH = 100;

/** A model's worth. */
export interface PhaseMeasurement {
  /** Mean of the samples' step KL: at masked positions in nats, or `ω_t ‖Δ prediction‖²` an image. */
  readonly stepKl: Interval;
  /** `[samples]`, the same samples for every model; the mean is Σ sums / Σ counts. */
  readonly sums: Float64Array;
  readonly counts: Float64Array;
  /** Image models: mean ‖ε̂ − ε‖² / ‖ε‖². */
  readonly noiseError: Interval | undefined;
  readonly scores: readonly TaskScore[];
  /** 1 for each prompt solved, 0 for the others; undefined where there is nothing to solve. */
  readonly solved: readonly number[] | undefined;
}

export interface PhaseYardstick {
  readonly source: string;
  readonly stepKl: string;
  readonly tasks: readonly string[];
  readonly missing: readonly string[];
  measure(model: LoadedModel): PhaseMeasurement;
}

export interface PhaseYardstickOptions {
  readonly seed: number;
  /** Prompts a task; images drawn, none without it. */
  readonly limit: number | undefined;
  readonly tasks: readonly string[] | undefined;
  readonly quick: boolean;
}

/**
 * The yardstick of a model, from what lies beside its checkpoint.
 *
 * @throws {FormatError | CheckpointError} when a file is there and not what it should be
 */
export async function phaseYardstick(
  full: LoadedModel,
  path: string,
  kernels: Kernels,
  options: PhaseYardstickOptions,
): Promise<PhaseYardstick> {
  return full.kind === "dit"
    ? imageYardstick(full.model, path, kernels, options)
    : await maskedYardstick(full, path, options);
}

async function maskedYardstick(
  full: Exclude<LoadedModel, { readonly kind: "dit" }>,
  path: string,
  { seed, limit = Infinity, tasks, quick }: PhaseYardstickOptions,
): Promise<PhaseYardstick> {
  const missing = full.kind === "llada"
    ? ["puzzles: they are posed as Dream's are trained"]
    : ["tokenizer.json", "eval.jsonl"].filter((name) => !existsSync(join(path, name))).map((name) =>
      `puzzles: there is no ${name}`
    );
  let sequences: readonly MaskedSequence[], puzzles: readonly Puzzle[] = [], names: readonly string[] = [];
  const tokenizer = missing.length > 0 ? undefined : await loadTokenizer(path);
  if (tokenizer === undefined) {
    sequences = syntheticSequences(full.model, quick ? 40 : SYNTHETIC_SEQUENCES, seed);
  } else {
    const all = readPuzzles(join(path, "eval.jsonl"));
    const known = [...new Set(all.map(({ task }) => task))];
    names = tasks === undefined ? known : known.filter((task) => tasks.includes(task));
    puzzles = names.flatMap((task) => all.filter((puzzle) => puzzle.task === task).slice(0, limit));
    if (puzzles.length === 0) {
      throw new RangeError(`Cannot measure ${tasks?.join(", ")}: tasks must be of ${known.join(", ")}`);
    }
    sequences = maskedSequences(full.model, tokenizer, puzzles, { seed, repeats: REPEATS });
  }
  let teacher: Float32Array[] | undefined;
  return {
    source: tokenizer === undefined
      ? `${sequences.length} synthetic sequences (random tokens)`
      : `${puzzles.length} puzzles of eval.jsonl, ${sequences.length} masked sequences of them`,
    stepKl: "step KL, nats",
    tasks: names,
    missing,
    measure(loaded) {
      if (loaded.kind === "dit") {
        throw new TypeError("Cannot compare a language model with one that draws images");
      }
      teacher ??= logitsOf(full, sequences);
      const own = loaded.model === full.model ? teacher : logitsOf(loaded, sequences);
      const kl = teacher.flatMap((logits, i) => [...tokenKl(logits, own[i]!, full.model.config)]);
      let row = 0;
      const sums = Float64Array.from(sequences, ({ places }) => {
        let sum = 0;
        for (let i = 0; i < places.length; i++) sum += kl[row++]!;
        return sum;
      });
      const counts = Float64Array.from(sequences, ({ places }) => places.length);
      const solved = tokenizer === undefined ? undefined : solvePuzzles(loaded.model, tokenizer, puzzles);
      return {
        stepKl: bootstrapRatio(sums, counts, { seed }),
        sums,
        counts,
        noiseError: undefined,
        scores: solved === undefined ? [] : scoreTasks(solved),
        solved: solved?.map(({ isCorrect }) => Number(isCorrect)),
      };
    },
  };
}

/** Logits of every masked place, a batch of sequences at a time. */
function logitsOf(
  { model }: Exclude<LoadedModel, { readonly kind: "dit" }>,
  sequences: readonly MaskedSequence[],
): Float32Array[] {
  const tokens = sequences[0]!.tokens.length;
  return Array.from({ length: Math.ceil(sequences.length / BATCH) }, (_, b) => {
    const part = sequences.slice(b * BATCH, (b + 1) * BATCH);
    const ids = new Int32Array(part.length * tokens);
    for (const [i, own] of part.entries()) ids.set(own.tokens, i * tokens);
    const rows = Int32Array.from(
      part.flatMap(({ places }, i) => places.map((place) => model.logitRow(i * tokens + place, tokens))),
    );
    return model.forward(ids, part.length, { rows, t: part.map(({ maskRatio }) => maskRatio) })
      .slice();
  });
}

function imageYardstick(
  full: DitModel,
  path: string,
  kernels: Kernels,
  { seed, limit, quick }: PhaseYardstickOptions,
): PhaseYardstick {
  const scheduler = loadScheduler(path), transitions = stepWeights(scheduler);
  const each = quick ? QUICK_IMAGES_PER_TIMESTEP : IMAGES_PER_TIMESTEP;
  const file = join(path, "eval_images.safetensors"), isReal = existsSync(file);
  const { images, labels } = isReal ? readImages(file) : syntheticImages(full, 10 * each, seed + 2);
  const needed = ["classifier.safetensors", "reference_features.safetensors"];
  const lacking = needed.filter((name) => !existsSync(join(path, name)));
  const draws = limit !== undefined && lacking.length === 0;
  const classifier = draws ? loadClassifier(join(path, needed[0]!), kernels) : undefined;
  const reference = draws ? new FrechetReference(loadFeatureStatistics(join(path, needed[1]!))) : undefined;
  const elements = full.imageElements;
  const timesteps = scheduler.timesteps(Math.min(10, scheduler.config.trainTimesteps), "linspace");
  const batches = Array.from(timesteps, (timestep, t) => {
    const picked = Array.from({ length: each }, (_, i) => (t * each + i) % labels.length);
    const noisy = new Float32Array(each * elements);
    for (const [i, image] of picked.entries()) {
      noisy.set(images.subarray(image * elements, (image + 1) * elements), i * elements);
    }
    scheduler.addNoise(noisy, imageNoise(seed, t * each, each, elements), timestep, noisy);
    return {
      noisy,
      times: new Array<number>(each).fill(timestep),
      labels: picked.map((image) => labels[image]!),
    };
  });
  const outputs = (model: DitModel) =>
    batches.map(({ noisy, times, labels }) => model.forward(noisy, times, labels).slice());
  let teacher: Float32Array[] | undefined;
  return {
    source: `${each} noised images at each of ${timesteps.length} timesteps, ${
      isReal ? "of eval_images.safetensors" : "synthetic (noise)"
    }${draws ? `; ${limit} glyphs drawn` : ""}`,
    stepKl: "step KL, ω‖Δε‖²",
    tasks: draws ? ["recognized"] : [],
    missing: draws ? [] : [
      `drawn glyphs: ${
        lacking.length > 0 ? `there is no ${lacking.join(", ")}` : "they take long, ask with --limit"
      }`,
    ],
    measure(loaded) {
      if (loaded.kind !== "dit") {
        throw new TypeError("Cannot compare an image model with one that writes text");
      }
      const { model } = loaded;
      teacher ??= outputs(full);
      const own = model === full ? teacher : outputs(model);
      const sums: number[] = [], errors: number[] = [];
      for (const [b, { times }] of batches.entries()) {
        const wanted = teacher[b]!, got = own[b]!, size = wanted.length / each;
        sums.push(...imageStepKl(full, transitions, wanted, got, times));
        for (let i = 0; i < each; i++) {
          let error = 0, norm = 0;
          for (let k = i * size; k < i * size + elements; k++) {
            error += (got[k]! - wanted[k]!) ** 2;
            norm += wanted[k]! ** 2;
          }
          errors.push(error / norm);
        }
      }
      const counts = new Float64Array(sums.length).fill(1);
      let scores: TaskScore[] = [], solved: number[] | undefined;
      if (classifier !== undefined && reference !== undefined) {
        const drawn = drawImages(model, scheduler, limit!, { ...DRAWING, seed });
        const { classAccuracy, isRecognized } = scoreImages(drawn, classifier, reference, { seed });
        solved = isRecognized.map(Number);
        scores = [{
          task: "recognized",
          solved: isRecognized.filter(Boolean).length,
          prompts: isRecognized.length,
          exactMatch: classAccuracy,
        }];
      }
      return {
        stepKl: bootstrapRatio(sums, counts, { seed }),
        sums: Float64Array.from(sums),
        counts,
        noiseError: bootstrapRatio(errors, counts, { seed }),
        scores,
        solved,
      };
    },
  };
}
