/**
 * What the accuracy suite will do with each model, and what that needs, decided before the first weight is read: which tasks lie beside it, whether
 * its tensors and the tasks fit it, memory and time. A model without tasks is held against its own full precision instead.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { CheckpointError, ConfigError } from "../../errors.ts";
import {
  type DitConfig,
  forwardCost,
  loadScheduler,
  loadTokenizer,
  type MaskedTransformerConfig,
  type ModelRequirements,
  modelRequirements,
  type Scheduler,
} from "../../models/mod.ts";
import { quantize } from "../../quant/mod.ts";
import { openCheckpoint } from "../../tensor/mod.ts";
import { type Puzzle, PUZZLE_TOKENS, puzzleCanvas, readPuzzles } from "../../eval/puzzles.ts";
import { type SyntheticSequence, syntheticSequences } from "./fidelity.ts";
import {
  checkMemory,
  forecastMemory,
  forecastTime,
  memoryText,
  secondsText,
  sizeText,
  timeText,
} from "../../eval/forecast.ts";
import { gaussianWeights } from "../random.ts";
import { nameOf, type Setting, settingsOf } from "../settings.ts";
import type { BenchContext } from "../suite.ts";

/** Images drawn at a setting unless `--limit` says otherwise: what keeps the whole suite within four minutes. */
const DEFAULT_IMAGES = 128;
export const DRAWING = { sampler: "ddim", steps: 50, spacing: "linspace" } as const;

/** Synthetic inputs of a model without tasks, unless `--limit` says otherwise: large models take seconds for each. */
const SYNTHETIC = { sequences: 16, tokens: 32, images: 4, steps: 10 } as const;
/** Images of one forward pass along a trajectory. */
const TRAJECTORY_BATCH = 16;

interface PlanBase {
  /** As it was given. */
  readonly path: string;
  /** Where the files beside the weights are. */
  readonly folder: string;
}

/** A masked language model with puzzles and a tokenizer. */
export interface PuzzlePlan extends PlanBase {
  readonly route: "puzzles";
  readonly puzzles: readonly Puzzle[];
}

/** An image model with a classifier and real images. */
export interface GlyphPlan extends PlanBase {
  readonly route: "glyphs";
  readonly scheduler: Scheduler;
  readonly images: number;
}

/** A masked language model without tasks. */
export interface SequencePlan extends PlanBase {
  readonly route: "sequences";
  readonly kind: "dream" | "llada";
  readonly config: MaskedTransformerConfig;
  readonly sequences: readonly SyntheticSequence[];
  /** Why there are no tasks. */
  readonly reason: string;
}

/** An image model without classifier or images. */
export interface TrajectoryPlan extends PlanBase {
  readonly route: "trajectories";
  readonly config: DitConfig;
  readonly scheduler: Scheduler;
  readonly images: number;
  readonly steps: number;
  readonly batch: number;
  readonly reason: string;
}

export type ModelPlan = PuzzlePlan | GlyphPlan | SequencePlan | TrajectoryPlan;

const MASKED_FILES = ["tokenizer.json", "eval.jsonl"];
const IMAGE_FILES = ["classifier.safetensors", "reference_features.safetensors", "eval_images.safetensors"];

/**
 * Plans every model of a run and says what each will need.
 *
 * @throws {CheckpointError | FormatError} when a model cannot be loaded or its tasks do not fit it
 * @throws {ConfigError} when there are no such tasks
 * @throws {MemoryError} when a model does not fit, unless the run ignores that
 */
export async function planModels(context: BenchContext): Promise<ModelPlan[]> {
  const { options } = context;
  const planned: [ModelPlan, ModelRequirements][] = [];
  for (const path of options.models) planned.push(await planModel(context, path));
  if (options.tasks !== undefined && !planned.some(([{ route }]) => route === "puzzles")) {
    throw new ConfigError(
      `Cannot measure ${options.tasks.join(", ")}: tasks need a model with ${
        MASKED_FILES.join(" and ")
      }, got none`,
    );
  }
  for (const [plan, needs] of planned) announce(context, plan, needs);
  return planned.map(([plan]) => plan);
}

async function planModel(context: BenchContext, path: string): Promise<[ModelPlan, ModelRequirements]> {
  const { options: { limit, quick, seed } } = context;
  const { needs, folder, weightsFolder } = (() => {
    using checkpoint = openCheckpoint(path);
    const weightsFolder = checkpoint.folder;
    // A pipeline's other files lie beside its transformer, not in it.
    return {
      needs: modelRequirements(checkpoint),
      folder: checkpoint.subfolder === undefined ? weightsFolder : path,
      weightsFolder,
    };
  })();
  const packed = needs.matrices.find(({ held }) => typeof held === "number");
  if (packed !== undefined) {
    throw new CheckpointError(
      `Cannot measure ${JSON.stringify(path)}: weights must be plain, got ${
        JSON.stringify(packed.name)
      } in ${packed.held} bits; ` +
        "measure it beside its original: --model ORIGINAL --packed " + path,
      { path, tensor: packed.name },
    );
  }
  const { kind, config } = needs.model;
  const base = { path, folder };
  const missing = (kind === "dit" ? IMAGE_FILES : MASKED_FILES).filter((name) =>
    !existsSync(join(folder, name))
  );
  let reason = `it lacks ${missing.join(", ")}`;
  if (kind === "dit") {
    const scheduler = loadScheduler(weightsFolder);
    if (missing.length === 0) {
      return [{ ...base, route: "glyphs", scheduler, images: limit ?? (quick ? 20 : DEFAULT_IMAGES) }, needs];
    }
    const images = limit ?? (quick ? 2 : SYNTHETIC.images);
    const steps = Math.min(SYNTHETIC.steps, scheduler.config.trainTimesteps);
    const batch = Math.min(TRAJECTORY_BATCH, images);
    return [{ ...base, route: "trajectories", config, scheduler, images, steps, batch, reason }, needs];
  }
  if (kind === "dream" && missing.length === 0) {
    return [{ ...base, route: "puzzles", puzzles: await choosePuzzles(context, folder, config) }, needs];
  }
  if (kind === "llada") reason = "the puzzles are posed as Dream's are trained";
  const sequences = sequencesOf(path, config, {
    sequences: limit ?? (quick ? 4 : SYNTHETIC.sequences),
    tokens: Math.min(SYNTHETIC.tokens, config.maxTokens),
    seed,
  });
  return [{ ...base, route: "sequences", kind, config, sequences, reason }, needs];
}

/** Synthetic sequences for a model; one whose vocabulary has no ordinary tokens is at fault. */
function sequencesOf(path: string, ...sizes: Parameters<typeof syntheticSequences>): SyntheticSequence[] {
  try {
    return syntheticSequences(...sizes);
  } catch (cause) {
    if (!(cause instanceof RangeError)) throw cause;
    throw new CheckpointError(`Cannot measure ${JSON.stringify(path)}: ${cause.message}`, { path, cause });
  }
}

/** The puzzles of the tasks asked for, each tried on the tokenizer. */
async function choosePuzzles(
  { options }: BenchContext,
  folder: string,
  config: MaskedTransformerConfig,
): Promise<Puzzle[]> {
  const path = join(folder, "eval.jsonl");
  const all = readPuzzles(path), known = [...new Set(all.map(({ task }) => task))];
  const wanted = options.tasks ?? known;
  const unknown = wanted.filter((task) => !known.includes(task));
  if (unknown.length > 0 || all.length === 0) {
    throw new ConfigError(
      `Cannot measure ${JSON.stringify(folder)}: tasks must be of ${
        known.join(", ") || "eval.jsonl, which is empty"
      }, got ${unknown.join(", ") || "none"}`,
    );
  }
  const limit = options.limit ?? (options.quick ? 20 : Infinity);
  const puzzles = wanted.flatMap((task) => all.filter((puzzle) => puzzle.task === task).slice(0, limit));
  const tokenizer = await loadTokenizer(folder);
  const fault = (reason: string, cause?: unknown) =>
    new CheckpointError(`Cannot use ${JSON.stringify(path)}: ${reason}`, { path, cause });
  const { maxTokens, vocabularySize } = config;
  if (maxTokens < PUZZLE_TOKENS) {
    throw fault(`the model must take the ${PUZZLE_TOKENS} tokens of a puzzle, got ${maxTokens}`);
  }
  for (const { prompt, answer } of puzzles) {
    let tokens: Int32Array;
    try {
      const answerTokens = tokenizer.encode(answer);
      const canvas = puzzleCanvas({ path: folder, config }, tokenizer, prompt, answerTokens.length);
      tokens = Int32Array.of(...canvas, ...answerTokens);
    } catch (cause) {
      if (!(cause instanceof RangeError)) throw cause;
      throw fault(cause.message, cause);
    }
    const bad = tokens.find((token) => token >= vocabularySize);
    if (bad !== undefined) {
      throw fault(`tokens of ${JSON.stringify(prompt)} must be below ${vocabularySize}, got ${bad}`);
    }
  }
  return puzzles;
}

// What it will need --------------------------------------------------------------------------------------------

/** A run's sizes: models held at once, bytes kept beside them, multiply-adds of a setting, rows of a typical product. */
interface Load {
  readonly models: number;
  readonly keptBytes: number;
  readonly activationBytes: number;
  readonly multiplyAdds: number;
  readonly rows: number;
}

function loadOf(plan: ModelPlan, { model }: ModelRequirements): Load {
  const tokens = PUZZLE_TOKENS;
  switch (plan.route) {
    case "puzzles": {
      const masks = plan.puzzles.map(({ answer }) => answer.length + 1);
      const batch = Math.min(100, masks.length);
      const { activationBytes } = forwardCost(model, { batch, tokens, rows: batch * Math.max(...masks) });
      const passes = masks.flatMap((count) => [
        ...Array.from({ length: count }, (_, i) => i + 1), // a step a mask
        ...Array<number>(2).fill(Math.ceil(count / 2)), // the comparison of both models
      ]);
      const multiplyAdds = passes.reduce(
        (sum, rows) => sum + forwardCost(model, { batch: 1, tokens, rows }).multiplyAdds,
        0,
      );
      return { models: 2, keptBytes: activationBytes, activationBytes, multiplyAdds, rows: batch * tokens };
    }
    case "glyphs": {
      const batch = Math.min(64, plan.images), config = model.config as DitConfig;
      const cost = forwardCost(model, { batch, tokens: 0 });
      const one = forwardCost(model, { batch: 1, tokens: 0 }).multiplyAdds;
      const passes = DRAWING.steps * plan.images + 2 * 10 * Math.min(32, plan.images);
      const kept = 2 * (DRAWING.steps + 1) * plan.images * elementsOf(config) * 4;
      return {
        models: 2,
        keptBytes: cost.activationBytes + kept,
        activationBytes: cost.activationBytes,
        multiplyAdds: passes * one,
        rows: batch * patchesOf(config),
      };
    }
    case "sequences": {
      const costs = plan.sequences.map(({ tokens: ids, places }) =>
        forwardCost(model, { batch: 1, tokens: ids.length, rows: places.length })
      );
      const positions = plan.sequences.reduce((sum, { places }) => sum + places.length, 0);
      return {
        models: 1,
        keptBytes: 2 * 4 * positions * plan.config.vocabularySize,
        activationBytes: Math.max(...costs.map(({ activationBytes }) => activationBytes)),
        multiplyAdds: costs.reduce((sum, cost) => sum + cost.multiplyAdds, 0),
        rows: SYNTHETIC.tokens,
      };
    }
    case "trajectories": {
      const { images, steps, batch } = plan;
      return {
        models: 1,
        keptBytes: 2 * (2 * steps + 1) * images * elementsOf(plan.config) * 4,
        activationBytes: forwardCost(model, { batch, tokens: 0 }).activationBytes,
        multiplyAdds: 2 * steps * images * forwardCost(model, { batch: 1, tokens: 0 }).multiplyAdds,
        rows: batch * patchesOf(plan.config),
      };
    }
  }
}

/** Tokens of an image. */
const patchesOf = ({ sampleSize, patchSize }: DitConfig) => (sampleSize / patchSize) ** 2;
const elementsOf = ({ channels, sampleSize }: DitConfig) => channels * sampleSize ** 2;

/** What the pipeline takes while it quantizes, in chunks. */
const PIPELINE_BYTES = 96e6;
/** Weights quantized to see how fast that is. */
const QUANTIZED_SAMPLE = { rows: 256, cols: 1024 };

/** Says what a model's measurement needs. @throws {MemoryError} when that is more than there is */
function announce(context: BenchContext, plan: ModelPlan, needs: ModelRequirements): void {
  const { kernels, options, progress } = context;
  const load = loadOf(plan, needs);
  const largest = Math.max(...needs.matrices.map(({ bytes }) => bytes));
  const memory = forecastMemory(kernels, needs, {
    weightBytes: load.models * needs.weightBytes,
    // Stored weights are read back, a matrix at a time, beside those they were made from.
    activationBytes: load.activationBytes + load.keptBytes + PIPELINE_BYTES + 2 * largest,
    rows: load.rows,
  });
  if (options.ignoresMemory !== true) {
    const wayOut = "free some, measure less at a time with --limit, or try anyway with --ignore-memory";
    checkMemory(plan.path, memory, wayOut);
  }
  const settings = settingsOf(context, plan.path);
  const time = forecastTime(kernels, needs, settings.length * load.multiplyAdds, load.rows);
  const quantizing = quantizeSeconds(context, settings, needs.matrixWeights);
  const name = `${nameOf(plan.path)} (${needs.model.kind}), ${settings.length} settings`;
  progress(`${name}: needs ${memoryText(memory)}, ${sizeText(needs.weightBytes)} of temporary files at most`);
  progress(
    `${name}: takes ${timeText(time)}` +
      (quantizing > 0 ? ` and ${secondsText(quantizing)} to quantize` : ""),
  );
}

/** Time to quantize so many weights at every setting, from a small matrix quantized now. */
function quantizeSeconds(context: BenchContext, settings: readonly Setting[], weights: number): number {
  const { kernels, options: { groupSize } } = context;
  const { rows, cols } = QUANTIZED_SAMPLE;
  const data = gaussianWeights(rows * cols, 1);
  return settings.reduce((sum, { bits, solver }) => {
    if (bits === undefined || solver === undefined) return sum;
    const begin = performance.now();
    quantize(kernels, { data, dtype: "F32" }, rows, cols, {
      bits,
      // Calibrated solvers take longer, by what their data and the model ask for: counted as clip search here.
      solver: solver === "round" ? "round" : "clip",
      groupSize,
    });
    return sum + (performance.now() - begin) / 1000 * weights / (rows * cols);
  }, 0);
}
