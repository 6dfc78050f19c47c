/**
 * Preparation of the accuracy suite: the yardstick of each model, whether its tensors and tasks fit, and a
 * forecast of memory and time, before the first weight is read.
 */
import { CheckpointError, ConfigError } from "../../errors.ts";
import { type DitConfig, forwardCost, type ModelRequirements, modelRequirements } from "../../models/mod.ts";
import { quantize } from "../../quant/mod.ts";
import { openCheckpoint } from "../../tensor/mod.ts";
import { checkMemory, forecastMemory, forecastTime, memoryText, timeText } from "../../eval/forecast.ts";
import { formatBytes, secondsText } from "../../eval/table.ts";
import {
  DRAWING,
  type ImageYardstick,
  type MaskedYardstick,
  type Yardstick,
  yardstickOf,
} from "../../eval/yardstick.ts";
import { gaussianWeights } from "../random.ts";
import { nameOfPath } from "../../files/whole.ts";
import { type Setting, settingsOf } from "../settings.ts";
import type { BenchContext } from "../suite.ts";

/** Images drawn at a setting: they keep the whole suite within four minutes. */
const DRAWN_IMAGES = 128, QUICK_DRAWN_IMAGES = 20;
/** Noised images a timestep, at most. */
const NOISED_IMAGES = 32;
const QUICK_PUZZLES = 20;
/** Synthetic inputs of a model without tasks: large models take seconds for each. */
const SYNTHETIC = { sequences: 16, trajectories: 4 }, QUICK_SYNTHETIC = { sequences: 4, trajectories: 2 };

export interface ModelPlan {
  /** As it was given. */
  readonly path: string;
  /** Folder of the files beside the weights. */
  readonly folder: string;
  readonly yardstick: Yardstick;
  readonly needs: ModelRequirements;
}

/**
 * Plans every model of a run and says how much memory and time each will take.
 *
 * @throws {CheckpointError | FormatError} when a model cannot be loaded or its tasks do not fit it
 * @throws {ConfigError} when there are no such tasks
 * @throws {MemoryError} when a model does not fit, unless the run ignores that
 */
export async function planModels(context: BenchContext): Promise<ModelPlan[]> {
  const { options: { models, tasks } } = context;
  const plans: ModelPlan[] = [];
  for (const path of models) plans.push(await planModel(context, path));
  const hasPuzzles = ({ yardstick }: ModelPlan) =>
    yardstick.kind === "masked" && yardstick.puzzles.length > 0;
  if (tasks !== undefined && !plans.some(hasPuzzles)) {
    throw new ConfigError(
      `Cannot measure ${tasks.join(", ")}: tasks need a model with tokenizer.json and eval.jsonl, got none`,
    );
  }
  for (const plan of plans) announce(context, plan);
  return plans;
}

async function planModel(context: BenchContext, path: string): Promise<ModelPlan> {
  const { kernels, options: { limit, quick, seed, tasks } } = context;
  using checkpoint = openCheckpoint(path);
  const needs = modelRequirements(checkpoint);
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
  const synthetic = quick ? QUICK_SYNTHETIC : SYNTHETIC;
  const drawn = limit ?? (quick ? QUICK_DRAWN_IMAGES : DRAWN_IMAGES);
  const yardstick = await yardstickOf(checkpoint, kernels, {
    seed,
    tasks,
    puzzles: limit ?? (quick ? QUICK_PUZZLES : undefined),
    sequences: limit ?? synthetic.sequences,
    trajectories: limit ?? synthetic.trajectories,
    drawn,
    images: Math.min(NOISED_IMAGES, drawn),
  });
  return { path, folder: checkpoint.root, yardstick, needs };
}

// Forecast --------------------------------------------------------------------------------------------------

/** Sizes of a run: bytes kept beside the model, multiply-adds of a setting, rows of a typical product. */
interface Load {
  readonly keptBytes: number;
  readonly activationBytes: number;
  readonly multiplyAdds: number;
  readonly rows: number;
}

function maskedLoad(
  { config, puzzles, sequences, batch }: MaskedYardstick,
  { model }: ModelRequirements,
): Load {
  const tokens = sequences[0]!.tokens.length, count = Math.min(batch, sequences.length);
  const positions = sequences.reduce((sum, { places }) => sum + places.length, 0);
  const cost = (rows: number) => forwardCost(model, { batch: 1, tokens, rows }).multiplyAdds;
  const masks = puzzles.map(({ answer }) => answer.length + 1);
  // A step of solving for each mask, and the comparison.
  const passes = [
    ...masks.flatMap((count) => Array.from({ length: count }, (_, i) => i + 1)),
    ...sequences.map(({ places }) => places.length),
  ];
  const most = Math.max(...masks, ...sequences.map(({ places }) => places.length));
  return {
    keptBytes: 2 * 4 * positions * config.vocabularySize,
    activationBytes: forwardCost(model, { batch: count, tokens, rows: count * most }).activationBytes,
    multiplyAdds: passes.reduce((sum, rows) => sum + cost(rows), 0),
    rows: count * tokens,
  };
}

function imageLoad(
  { real, readers, steps, trajectories, options }: ImageYardstick,
  { model }: ModelRequirements,
): Load {
  const { channels, sampleSize, patchSize } = model.config as DitConfig;
  const bytes = 4 * channels * sampleSize ** 2, drawn = readers === undefined ? 0 : options.drawn!;
  const batch = Math.min(real === undefined ? 16 : 64, real === undefined ? trajectories : options.drawn!);
  const states = real === undefined ? steps * trajectories : 10 * options.images;
  const trajectory = readers === undefined
    ? (steps + 1) * (real === undefined ? trajectories : 0)
    : (DRAWING.steps + 1) * drawn;
  const one = forwardCost(model, { batch: 1, tokens: 0 }).multiplyAdds;
  return {
    // Trajectories and predictions, which may have a learned variance, of full precision and of the model
    // beside it.
    keptBytes: 2 * (trajectory + 2 * states) * bytes,
    activationBytes: forwardCost(model, { batch, tokens: 0 }).activationBytes,
    multiplyAdds: (trajectory + states) * one,
    rows: batch * (sampleSize / patchSize) ** 2,
  };
}

/** Memory of the pipeline while it quantizes, in chunks. */
const PIPELINE_BYTES = 96e6;
/** Weights quantized to see how fast that is. */
const QUANTIZED_SAMPLE = { rows: 256, cols: 1024 };

/** Says how much a model's measurement takes. @throws {MemoryError} when that is more than there is */
function announce(context: BenchContext, { path, yardstick, needs }: ModelPlan): void {
  const { kernels, options, progress } = context;
  const load = yardstick.kind === "masked" ? maskedLoad(yardstick, needs) : imageLoad(yardstick, needs);
  const largest = Math.max(...needs.matrices.map(({ bytes }) => bytes));
  const memory = forecastMemory(kernels, needs, {
    // Stored weights are read back, a matrix at a time, beside those they were made from.
    activationBytes: load.activationBytes + load.keptBytes + PIPELINE_BYTES + 2 * largest,
    rows: load.rows,
  });
  if (options.ignoresMemory !== true) {
    const wayOut = "free some, measure less at a time with --limit, or try anyway with --ignore-memory";
    checkMemory(path, memory, wayOut);
  }
  const settings = settingsOf(context, path);
  const time = forecastTime(kernels, needs, settings.length * load.multiplyAdds, load.rows);
  const quantizing = quantizeSeconds(context, settings, needs.matrixWeights);
  const name = `${nameOfPath(path)} (${needs.model.kind}), ${settings.length} settings`;
  progress(
    `${name}: needs ${memoryText(memory)}, ${formatBytes(needs.weightBytes)} of temporary files at most`,
  );
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
      // Calibrated solvers take longer, depending on their data and the model: counted as clip search here.
      solver: solver === "round" ? "round" : "clip",
      groupSize,
    });
    return sum + (performance.now() - begin) / 1000 * weights / (rows * cols);
  }, 0);
}
