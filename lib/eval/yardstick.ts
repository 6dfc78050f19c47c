/**
 * Yardsticks: the distance of quantized models to the full-precision one, and the tasks that they solve, on
 * evaluation data that nothing was chosen with. A model without evaluation data beside it is compared on
 * synthetic inputs, and no accuracy is given.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { imageStepKl, type StepKl, stepWeights } from "../calibration/step_kl.ts";
import { CheckpointError, ConfigError } from "../errors.ts";
import { quote } from "../files/whole.ts";
import {
  type LoadedModel,
  loadScheduler,
  loadTokenizer,
  type MaskedTransformerConfig,
  modelConfig,
  type Scheduler,
  type Tokenizer,
} from "../models/mod.ts";
import type { Kernels } from "../native/mod.ts";
import type { Checkpoint } from "../tensor/mod.ts";
import { type GlyphClassifier, loadClassifier, loadFeatureStatistics } from "./classifier.ts";
import { FrechetReference } from "./frechet.ts";
import {
  drawImages,
  type DrawnImages,
  type ImageScores,
  type LabelledImages,
  noisedImages,
  type NoisyImages,
  predictionErrors,
  predictionsAt,
  readImages,
  scoreImages,
  type StepDrift,
  type TimestepError,
  trajectoryDrift,
} from "./images.ts";
import { bootstrapRatio, type Interval, stratifiedMean } from "./intervals.ts";
import {
  maskedDistances,
  maskedLogits,
  type MaskedSequence,
  type SequenceDistance,
  syntheticSequences,
} from "./masked.ts";
import {
  maskedSequences,
  type Puzzle,
  PUZZLE_TOKENS,
  puzzleCanvas,
  readPuzzles,
  scoreTasks,
  type SolvedPuzzle,
  solvePuzzles,
  type TaskScore,
} from "./puzzles.ts";

/** How images of the glyph model are drawn. */
export const DRAWING = { sampler: "ddim", steps: 50, spacing: "linspace" } as const;
/** Steps of a trajectory that stands in for real images. */
const TRAJECTORY_STEPS = 10;
/** Images of one forward pass along it. */
const TRAJECTORY_BATCH = 16;
/** Tokens of a synthetic sequence, at most. */
const SYNTHETIC_TOKENS = 32;

/** Amounts that a yardstick measures. */
export interface YardstickOptions {
  /** Of masks, noise and resampling. */
  readonly seed: number;
  /** Tasks of a language model; default all. */
  readonly tasks?: readonly string[] | undefined;
  /** Puzzles a task; default all. */
  readonly puzzles?: number | undefined;
  /** Times that each puzzle is masked. Default 1. */
  readonly repeats?: number | undefined;
  /** Synthetic sequences of a language model without puzzles. */
  readonly sequences: number;
  /** Noised images a timestep. */
  readonly images: number;
  /** Trajectories of an image model without real images. Default {@linkcode images}. */
  readonly trajectories?: number | undefined;
  /** Images drawn and classified; default none. */
  readonly drawn?: number | undefined;
}

/** Measurements of one model. */
export interface Measurement {
  /** Mean token KL at masked positions, in nats; or mean over timesteps of ‖ε̂ − ε‖² / ‖ε‖². */
  readonly distance: Interval;
  /** Step KL of each sample: of a sequence its token KL at masked positions, of an image `ω_t ‖Δε‖²`. */
  readonly stepKl: StepKl & { readonly mean: Interval };
  /** Language models: share of masked positions whose most probable token is the right one. */
  readonly tokenAccuracy?: Interval | undefined;
  /** Language models: distances by sequence. */
  readonly sequences?: readonly SequenceDistance[] | undefined;
  /** Image models: the error at each timestep. */
  readonly byTimestep?: readonly TimestepError[] | undefined;
  /** Image models that draw: distance to the full-precision trajectory after each step. */
  readonly drift?: readonly StepDrift[] | undefined;
  /** Exact match by task and of all, or `recognized` glyphs; empty where there is nothing to solve. */
  readonly scores: readonly TaskScore[];
  /** 1 for each prompt solved, 0 for the others; undefined where there is nothing to solve. */
  readonly solved?: readonly number[] | undefined;
  readonly answers?: readonly SolvedPuzzle[] | undefined;
  readonly drawn?: { readonly images: DrawnImages; readonly scores: ImageScores } | undefined;
}

/** Something that cannot be measured, and why. */
export interface Missing {
  readonly what: string;
  readonly reason: string;
}

/** A yardstick of either kind of model. */
export type Yardstick = MaskedYardstick | ImageYardstick;

/** Title of the step KL of a kind of model, with its unit. */
export const STEP_KL_TITLES = { masked: "step KL, nats", images: "step KL, ω‖Δε‖²" } as const;
/** Title of the distance of a kind of model, with its unit. */
export const DISTANCE_TITLES = { masked: "KL, nats", images: "noise error" } as const;

const MASKED_FILES = ["tokenizer.json", "eval.jsonl"] as const;
const IMAGE_FILES = [
  "classifier.safetensors",
  "reference_features.safetensors",
  "eval_images.safetensors",
] as const;

/** Compares language models at masked positions, and lets them solve puzzles. */
export class MaskedYardstick {
  readonly kind = "masked";
  #full: Float32Array[] | undefined;

  constructor(
    readonly config: MaskedTransformerConfig,
    /** Origin of the sequences, for a report. */
    readonly source: string,
    readonly sequences: readonly MaskedSequence[],
    readonly puzzles: readonly Puzzle[],
    readonly missing: readonly Missing[],
    readonly tokenizer: Tokenizer | undefined,
    readonly options: YardstickOptions,
  ) {}

  /** Sequences of one forward pass: one where a large model may have no tasks, for the memory. */
  get batch(): number {
    return this.puzzles.length === 0 ? 1 : 100;
  }

  /** Tasks that are solved. */
  get tasks(): string[] {
    return [...new Set(this.puzzles.map(({ task }) => task))];
  }

  /**
   * Measures a model. The first one is the full-precision model, whose logits are kept.
   *
   * @throws {TypeError} when it is an image model
   */
  measure(loaded: LoadedModel): Measurement {
    if (loaded.kind === "dit") {
      throw new TypeError("Cannot compare a language model with one that draws images");
    }
    const { options: { seed }, sequences, batch, puzzles, tokenizer } = this;
    const logits = maskedLogits(loaded.model, sequences, batch);
    const distances = maskedDistances(this.config, sequences, this.#full ??= logits, logits);
    const answers = tokenizer && solvePuzzles(loaded.model, tokenizer, puzzles);
    const stepKl = {
      sums: Float64Array.from(distances, ({ kl }) => kl),
      counts: Float64Array.from(distances, ({ positions }) => positions),
      times: Float64Array.from(distances, ({ maskRatio }) => maskRatio),
    };
    const distance = bootstrapRatio(stepKl.sums, stepKl.counts, { seed });
    return {
      distance,
      stepKl: { ...stepKl, mean: distance },
      tokenAccuracy: answers && bootstrapRatio(distances.map(({ right }) => right), stepKl.counts, { seed }),
      sequences: distances,
      scores: answers === undefined ? [] : scoreTasks(answers),
      solved: answers?.map(({ isCorrect }) => Number(isCorrect)),
      answers,
    };
  }
}

/** Compares predictions of image models for noisy images, and lets them draw. */
export class ImageYardstick {
  readonly kind = "images";
  #full: readonly Float32Array[] | undefined;
  #states: readonly NoisyImages[] | undefined;
  #drawn: DrawnImages | undefined;

  constructor(
    readonly scheduler: Scheduler,
    /** Origin of the images, for a report. */
    readonly source: string,
    /** Undefined where full precision's own trajectories stand in for them. */
    readonly real: LabelledImages | undefined,
    readonly missing: readonly Missing[],
    readonly readers:
      | { readonly classifier: GlyphClassifier; readonly reference: FrechetReference }
      | undefined,
    readonly options: YardstickOptions,
  ) {}

  /** Tasks that are solved. */
  get tasks(): string[] {
    return this.readers === undefined ? [] : ["recognized"];
  }

  /** Trajectories that are drawn where there are no real images. */
  get trajectories(): number {
    return this.options.trajectories ?? this.options.images;
  }

  /** Steps of a drawing. */
  get steps(): number {
    return this.readers === undefined
      ? Math.min(TRAJECTORY_STEPS, this.scheduler.config.trainTimesteps)
      : DRAWING.steps;
  }

  /**
   * Measures a model. The first one is the full-precision model, whose predictions and drawings are kept.
   *
   * @throws {TypeError} when it is a language model
   */
  measure(loaded: LoadedModel): Measurement {
    if (loaded.kind !== "dit") {
      throw new TypeError("Cannot compare an image model with one that writes text");
    }
    const { model } = loaded, { scheduler, real, readers, steps, trajectories } = this;
    const { seed, images, drawn } = this.options;
    const kept = { seed, trajectory: true } as const;
    const own = readers !== undefined
      ? drawImages(model, scheduler, drawn!, { ...DRAWING, ...kept })
      : real === undefined
      ? drawImages(model, scheduler, trajectories, {
        sampler: "ddim",
        steps,
        batch: TRAJECTORY_BATCH,
        ...kept,
      })
      : undefined;
    this.#drawn ??= own;
    const states = this.#states ??= real === undefined
      ? trajectoryStates(own!, scheduler.timesteps(steps))
      : noisedImages(scheduler, real, { imagesPerTimestep: images, seed });
    const predictions = predictionsAt(model, states, real === undefined ? TRAJECTORY_BATCH : undefined);
    const full = this.#full ??= predictions;
    const byTimestep = predictionErrors(states, full, predictions, model.imageElements, { seed });
    const transitions = stepWeights(scheduler);
    const times = states.map(({ timestep, labels }) => new Array<number>(labels.length).fill(timestep));
    const sums = times.flatMap((own, i) => [
      ...imageStepKl(model, transitions, full[i]!, predictions[i]!, own),
    ]);
    const counts = new Float64Array(sums.length).fill(1);
    const scores = readers && scoreImages(own!, readers.classifier, readers.reference, { seed });
    return {
      distance: stratifiedMean(byTimestep.map(({ perImage }) => perImage), { seed }),
      stepKl: {
        sums: Float64Array.from(sums),
        counts,
        times: Float64Array.from(times.flat()),
        mean: bootstrapRatio(sums, counts, { seed }),
      },
      byTimestep,
      drift: own && trajectoryDrift(this.#drawn!, own, { seed }),
      scores: scores === undefined ? [] : [{
        task: "recognized",
        solved: scores.isRecognized.filter(Boolean).length,
        prompts: scores.images,
        exactMatch: scores.classAccuracy,
      }],
      solved: scores?.isRecognized.map(Number),
      drawn: scores && { images: own!, scores },
    };
  }
}

/** States of drawings before each step. */
export function trajectoryStates(
  { trajectory, labels }: DrawnImages,
  timesteps: ArrayLike<number>,
): NoisyImages[] {
  return Array.from(timesteps, (timestep, step) => ({ timestep, samples: trajectory![step]!, labels }));
}

/**
 * The yardstick of a model, from the files beside its checkpoint; reads no weights of it.
 *
 * @throws {CheckpointError | FormatError} when a file is there and not as it should be, or tasks do not fit
 *   the model
 * @throws {ConfigError} when there are no such tasks
 *
 * @example
 * ```ts
 * import { loadModel } from "../models/mod.ts";
 * import { openKernels } from "../native/mod.ts";
 * import { openCheckpoint } from "../tensor/mod.ts";
 * import { yardstickOf } from "./yardstick.ts";
 * const kernels = await openKernels(), path = "tests/models/dream-mini";
 * const yardstick = await yardstickOf(openCheckpoint(path), kernels, { seed: 1, puzzles: 5, sequences: 16, images: 4 });
 * console.log(yardstick.measure(loadModel(path, kernels)).distance.value); // 0: full precision beside itself
 * ```
 */
export async function yardstickOf(
  checkpoint: Checkpoint,
  kernels: Kernels,
  options: YardstickOptions,
): Promise<Yardstick> {
  const { kind, config } = modelConfig(checkpoint);
  const folder = checkpoint.root; // a pipeline's other files lie beside its transformer, not in it
  if (kind === "dit") return imageYardstick(folder, loadScheduler(checkpoint.folder), kernels, options);
  const lacking = MASKED_FILES.filter((name) => !existsSync(join(folder, name)));
  if (kind === "dream" && lacking.length === 0) return await puzzleYardstick(folder, config, options);
  let sequences: readonly MaskedSequence[];
  try {
    const tokens = Math.min(SYNTHETIC_TOKENS, config.maxTokens);
    sequences = syntheticSequences(config, { sequences: options.sequences, tokens, seed: options.seed });
  } catch (cause) {
    if (!(cause instanceof RangeError)) throw cause;
    const { path } = checkpoint;
    throw new CheckpointError(`Cannot measure ${quote(path)}: ${cause.message}`, { path, cause });
  }
  const reason = kind !== "dream"
    ? "they are posed as Dream's are trained"
    : `there is no ${lacking.join(", ")}`;
  const source = `${sequences.length} synthetic sequences (random tokens)`;
  const missing = [{ what: "puzzles", reason }];
  return new MaskedYardstick(config, source, sequences, [], missing, undefined, options);
}

async function puzzleYardstick(
  folder: string,
  config: MaskedTransformerConfig,
  options: YardstickOptions,
): Promise<MaskedYardstick> {
  const path = join(folder, MASKED_FILES[1]), tokenizer = await loadTokenizer(folder);
  const all = readPuzzles(path), known = [...new Set(all.map(({ task }) => task))];
  const wanted = options.tasks ?? known, unknown = wanted.filter((task) => !known.includes(task));
  if (unknown.length > 0 || all.length === 0) {
    throw new ConfigError(
      `Cannot measure ${quote(folder)}: tasks must be of ${
        known.join(", ") || "eval.jsonl, which is empty"
      }, got ${unknown.join(", ") || "none"}`,
    );
  }
  const puzzles = wanted.flatMap((task) =>
    all.filter((puzzle) => puzzle.task === task).slice(0, options.puzzles)
  );
  checkPuzzles(path, config, tokenizer, puzzles);
  const model = { path: folder, config };
  const sequences = maskedSequences(model, tokenizer, puzzles, options);
  const source = `${puzzles.length} puzzles of eval.jsonl, ${sequences.length} masked sequences of them`;
  return new MaskedYardstick(config, source, sequences, puzzles, [], tokenizer, options);
}

/** @throws {CheckpointError} when a puzzle does not fit the model */
function checkPuzzles(
  path: string,
  config: MaskedTransformerConfig,
  tokenizer: Tokenizer,
  puzzles: readonly Puzzle[],
): void {
  const fault = (reason: string, cause?: unknown) =>
    new CheckpointError(`Cannot use ${quote(path)}: ${reason}`, { path, cause });
  const { maxTokens, vocabularySize } = config;
  if (maxTokens < PUZZLE_TOKENS) {
    throw fault(`the model must take the ${PUZZLE_TOKENS} tokens of a puzzle, got ${maxTokens}`);
  }
  for (const { prompt, answer } of puzzles) {
    let tokens: Int32Array;
    try {
      const answerTokens = tokenizer.encode(answer);
      tokens = Int32Array.of(
        ...puzzleCanvas({ path, config }, tokenizer, prompt, answerTokens.length),
        ...answerTokens,
      );
    } catch (cause) {
      if (!(cause instanceof RangeError)) throw cause;
      throw fault(cause.message, cause);
    }
    const bad = tokens.find((token) => token >= vocabularySize);
    if (bad !== undefined) {
      throw fault(`tokens of ${quote(prompt)} must be below ${vocabularySize}, got ${bad}`);
    }
  }
}

function imageYardstick(
  folder: string,
  scheduler: Scheduler,
  kernels: Kernels,
  options: YardstickOptions,
): ImageYardstick {
  const { images, drawn, trajectories = images } = options;
  const steps = Math.min(TRAJECTORY_STEPS, scheduler.config.trainTimesteps);
  const file = join(folder, IMAGE_FILES[2]);
  const lacking = IMAGE_FILES.filter((name) => !existsSync(join(folder, name)));
  const readers = drawn === undefined || lacking.length > 0 ? undefined : {
    classifier: loadClassifier(join(folder, IMAGE_FILES[0]), kernels),
    reference: new FrechetReference(loadFeatureStatistics(join(folder, IMAGE_FILES[1]))),
  };
  const real = existsSync(file) ? readImages(file) : undefined;
  const source =
    (real === undefined
      ? `${trajectories} synthetic trajectories of ${steps} steps, DDIM`
      : `${images} noised images of ${IMAGE_FILES[2]} at each of ${steps} timesteps`) +
    (readers === undefined ? "" : `; ${drawn} glyphs drawn`);
  const reason = lacking.length > 0
    ? `there is no ${lacking.join(", ")}`
    : "they take long, ask with --limit";
  const missing = readers === undefined ? [{ what: "drawn glyphs", reason }] : [];
  return new ImageYardstick(scheduler, source, real, missing, readers, options);
}
