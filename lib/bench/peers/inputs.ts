/**
 * What the layers of a model see on calibration data: `E[x xᵀ]` of each, taken while the model runs as it really runs, a masked language
 * model on masked sequences in both directions, an image model on noised images of all timesteps. For the peers' suite alone, all
 * positions weighted alike.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import {
  type DitModel,
  imageNoise,
  type LayerObserver,
  type LoadedModel,
  loadScheduler,
  loadTokenizer,
  type MaskedTransformer,
  RandomStream,
} from "../../models/mod.ts";
import { linear } from "../../models/layers/kernels.ts";
import type { Kernels } from "../../native/mod.ts";
import { type LabelledImages, readImages } from "../../eval/images.ts";
import { type MaskedSequence, maskedSequences, PUZZLE_TOKENS, readPuzzles } from "../../eval/puzzles.ts";
import type { LayerInputs } from "./method.ts";

/** Noised images that a DiT sees: with 64 positions each, many times as many as its widest layer has columns. */
const CALIBRATION_IMAGES = 512;
const QUICK_IMAGES = 64;
/** Sequences where there are no real ones. */
const SYNTHETIC_SEQUENCES = 400;
/** One in so many sequences is used for a quick look. */
const QUICK_SHARE = 6;
/** Sequences, or images, of one forward pass. */
const BATCH = 64;

/** Calibration data, ready to be run. */
export interface Calibration {
  /** For the report: where it comes from. */
  readonly source: string;
  run(model: LoadedModel, observe: LayerObserver): void;
}

/**
 * Sequences of random tokens, some masked, for a model without data of its own: layout and mask ratios as
 * {@linkcode maskedSequences}, tokens without meaning.
 */
export function syntheticSequences(model: MaskedTransformer, count: number, seed: number): MaskedSequence[] {
  const { vocabularySize, maskToken, padToken = -1, maxTokens } = model.config;
  const length = Math.min(PUZZLE_TOKENS, maxTokens);
  return Array.from({ length: count }, (_, i): MaskedSequence => {
    const random = new RandomStream(seed, i);
    const maskRatio = 0.001 + 0.999 * random.uniform();
    const places: number[] = [], targets: number[] = [];
    const tokens = Int32Array.from({ length }, (_, place) => {
      let token = maskToken;
      while (token === maskToken || token === padToken) token = random.below(vocabularySize);
      if (place === 0 || random.uniform() >= maskRatio) return token;
      places.push(place);
      targets.push(token);
      return maskToken;
    });
    return { task: "synthetic", maskRatio, tokens, places, targets };
  }).filter(({ places }) => places.length > 0);
}

/** Pure noise in place of images, all classes in turn. */
export function syntheticImages(model: DitModel, count: number, seed: number): LabelledImages {
  return {
    images: imageNoise(seed, 0, count, model.imageElements),
    labels: Int32Array.from({ length: count }, (_, i) => i % model.config.classes),
  };
}

function runSequences(sequences: readonly MaskedSequence[], source: string): Calibration {
  return {
    source,
    run({ kind, model }, observe) {
      if (kind === "dit") throw new TypeError("Cannot calibrate an image model with sequences of tokens");
      for (let begin = 0; begin < sequences.length; begin += BATCH) {
        const part = sequences.slice(begin, begin + BATCH);
        const ids = new Int32Array(part.length * part[0]!.tokens.length);
        for (const [i, { tokens }] of part.entries()) ids.set(tokens, i * tokens.length);
        model.forward(ids, part.length, { observe });
      }
    },
  };
}

function runImages(
  { images, labels }: LabelledImages,
  source: string,
  folder: string,
  seed: number,
  count: number,
): Calibration {
  return {
    source: `${count} ${source}`,
    run({ kind, model }, observe) {
      if (kind !== "dit") throw new TypeError("Cannot calibrate a language model with images");
      const scheduler = loadScheduler(folder), { trainTimesteps } = scheduler.config;
      const elements = model.imageElements;
      const random = new RandomStream(seed, 0x10000);
      for (let begin = 0; begin < count; begin += BATCH) {
        const part = Math.min(BATCH, count - begin);
        const noisy = imageNoise(seed, begin, part, elements);
        const picked = Array.from({ length: part }, () => random.below(labels.length));
        // One of equal parts of the schedule each: all timesteps alike, without gaps.
        const times = picked.map((_, i) =>
          Math.floor((begin + i + random.uniform()) / count * trainTimesteps)
        );
        for (const [i, image] of picked.entries()) {
          const noise = noisy.subarray(i * elements, (i + 1) * elements);
          scheduler.addNoise(
            images.subarray(image * elements, (image + 1) * elements),
            noise,
            times[i]!,
            noise,
          );
        }
        model.forward(noisy, times, picked.map((image) => labels[image]!), { observe });
      }
    },
  };
}

/**
 * The calibration data beside a checkpoint, `calibration.jsonl` or `calibration_images.safetensors`; where they are not there, synthetic
 * data that say so. The evaluation's data are never used.
 *
 * @throws {FormatError | CheckpointError} when a file is there and not what it should be
 */
export async function calibrationOf(
  loaded: LoadedModel,
  path: string,
  { seed, quick = false }: { readonly seed: number; readonly quick?: boolean },
): Promise<Calibration> {
  if (loaded.kind === "dit") {
    const file = join(path, "calibration_images.safetensors");
    const count = quick ? QUICK_IMAGES : CALIBRATION_IMAGES;
    return existsSync(file)
      ? runImages(readImages(file), "noised images of calibration_images.safetensors", path, seed, count)
      : runImages(syntheticImages(loaded.model, count, seed), "synthetic images (noise)", path, seed, count);
  }
  const some = (sequences: readonly MaskedSequence[]) =>
    sequences.filter((_, i) => !quick || i % QUICK_SHARE === 0);
  const file = join(path, "calibration.jsonl");
  if (!existsSync(file) || !existsSync(join(path, "tokenizer.json"))) {
    const sequences = some(syntheticSequences(loaded.model, SYNTHETIC_SEQUENCES, seed + 1));
    return runSequences(sequences, `${sequences.length} synthetic sequences (random tokens)`);
  }
  const tokenizer = await loadTokenizer(path);
  const sequences = some(maskedSequences(loaded.model, tokenizer, readPuzzles(file), { seed: seed + 1 }));
  return runSequences(sequences, `${sequences.length} masked sequences of calibration.jsonl`);
}

/**
 * Runs a model on calibration data and takes the second moment of every wanted layer's inputs.
 *
 * Products of a batch are summed in float32 by the kernels, batches in float64.
 *
 * @example
 * ```ts
 * import { loadModel } from "../../models/mod.ts";
 * import { openKernels } from "../../native/mod.ts";
 * import { calibrationOf, collectInputs } from "./inputs.ts";
 * const kernels = await openKernels();
 * const model = loadModel("tests/models/dream-mini", kernels);
 * const calibration = await calibrationOf(model, "tests/models/dream-mini", { seed: 1 });
 * const inputs = collectInputs(model, calibration, ["model.layers.0.mlp.down_proj.weight"], kernels);
 * console.log(inputs.get("model.layers.0.mlp.down_proj.weight")?.cols); // 160
 * ```
 */
export function collectInputs(
  model: LoadedModel,
  calibration: Calibration,
  layers: Iterable<string>,
  kernels: Kernels,
  threads = 1,
): Map<string, LayerInputs> {
  const wanted = new Set(layers);
  const sums = new Map<string, { cols: number; tokens: number; sum: Float64Array }>();
  // Layers that follow one another often have the same input: its product is taken once.
  let last: { x: Float32Array; product: Float32Array } | undefined;
  calibration.run(model, ({ name, weights: { cols } }, x, tokens) => {
    if (!wanted.has(name)) return;
    const values = x.subarray(0, tokens * cols);
    if (last === undefined || !sameValues(last.x, values)) {
      last = { x: values.slice(), product: gram(values, tokens, cols, kernels, threads) };
    }
    const entry = sums.get(name) ?? { cols, tokens: 0, sum: new Float64Array(cols * cols) };
    sums.set(name, entry);
    entry.tokens += tokens;
    for (let i = 0; i < entry.sum.length; i++) entry.sum[i]! += last.product[i]!;
  });
  return new Map(
    [...sums].map((
      [name, { cols, tokens, sum }],
    ) => [name, { cols, secondMoment: sum.map((value) => value / tokens) }]),
  );
}

function sameValues(a: Float32Array, b: Float32Array): boolean {
  if (a.length !== b.length) return false;
  for (let i = 0; i < a.length; i++) if (a[i] !== b[i]) return false;
  return true;
}

/** `x: f32[tokens, cols]` → `xᵀ x: f32[cols, cols]` */
function gram(
  x: Float32Array,
  tokens: number,
  cols: number,
  kernels: Kernels,
  threads: number,
): Float32Array {
  const transposed = new Float32Array(x.length);
  for (let t = 0; t < tokens; t++) {
    for (let c = 0; c < cols; c++) transposed[c * tokens + t] = x[t * cols + c]!;
  }
  const matrix = { rows: cols, cols: tokens, dtype: "F32", data: transposed } as const;
  return linear(kernels, transposed, cols, matrix, undefined, { threads });
}
