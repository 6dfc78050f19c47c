/**
 * DiT: class-conditional image diffusion by a transformer with adaLN-zero (https://arxiv.org/abs/2212.09748), with the names and
 * the configuration of diffusers' `DiTTransformer2DModel`. Noise schedules are in schedulers.ts, the sampler is in image_sampler.ts.
 */
import { CheckpointError, WeightsError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import { type Checkpoint, openCheckpoint } from "../tensor/mod.ts";
import type { TimeParameters } from "../time/mod.ts";
import type { LoadOptions } from "./dream.ts";
import type { LayerObserver, TransformerOptions } from "./masked_transformer.ts";
import { ConfigFields, MAX_BLOCKS, shown } from "./model_config.ts";
import { Operations } from "./operations.ts";
import {
  type EmbeddingTable,
  type LinearLayer,
  lookUpRows,
  ModelTensors,
  type WantedTensor,
} from "./tensors.ts";
import { TimeAwareLayers } from "./time_aware.ts";
import { Workspace } from "./workspace.ts";

/** Inputs of the timestep's embedding: diffusers fixes it. */
export const TIMESTEP_CHANNELS = 256;
/** Epsilon of the norms in front of attention and of the output; that in front of the feed-forward is configured. */
export const NORM_EPSILON = 1e-6;

/** Sizes and constants of a DiT. */
export interface DitConfig {
  /** Height and width of the input, in pixels (or latents). */
  readonly sampleSize: number;
  readonly patchSize: number;
  readonly channels: number;
  /** `channels`, or twice as many where the variance is learned. */
  readonly outputChannels: number;
  readonly learnsVariance: boolean;
  readonly blocks: number;
  readonly heads: number;
  readonly headSize: number;
  readonly hiddenSize: number;
  /** Label `classes` stands for no class, for guidance. */
  readonly classes: number;
  /** Epsilon of the norm in front of the feed-forward. */
  readonly normEpsilon: number;
  readonly attentionBias: boolean;
  readonly normHasWeights: boolean;
}

/** One block's weights. */
export interface DitBlock {
  readonly name: string;
  readonly timestep1: LinearLayer;
  readonly timestep2: LinearLayer;
  readonly labels: EmbeddingTable;
  readonly modulation: LinearLayer;
  readonly query: LinearLayer;
  readonly key: LinearLayer;
  readonly value: LinearLayer;
  readonly attentionOutput: LinearLayer;
  readonly normWeight: Float32Array<ArrayBuffer> | undefined;
  readonly normBias: Float32Array<ArrayBuffer> | undefined;
  readonly feedForward1: LinearLayer;
  readonly feedForward2: LinearLayer;
}

/** DiT's sizes out of config.json. @throws {CheckpointError} naming the key that is missing, wrong or not supported */
export function ditConfig(fields: ConfigFields): DitConfig {
  fields.choice("norm_type", ["ada_norm_zero"], "ada_norm_zero");
  fields.choice("activation_fn", ["gelu-approximate"], "gelu-approximate");
  // Of the older class Transformer2DModel, which has other inputs too.
  fields.refuse("cross_attention_dim");
  fields.refuse("num_vector_embeds");
  fields.refuse("use_linear_projection", false);
  fields.refuse("only_cross_attention", false);
  fields.refuse("double_self_attention", false);
  fields.refuse("caption_channels");
  const heads = fields.count("num_attention_heads", 16), headSize = fields.count("attention_head_dim", 72);
  const patchSize = fields.count("patch_size", 2), sampleSize = fields.count("sample_size", 32);
  const channels = fields.count("in_channels", 4), outputChannels = fields.count("out_channels", channels);
  if (sampleSize % patchSize !== 0) {
    throw fields.fault("sample_size", `a multiple of the patch size ${patchSize}`, sampleSize);
  }
  if (outputChannels !== channels && outputChannels !== 2 * channels) {
    throw fields.fault(
      "out_channels",
      `${channels} or, with a learned variance, ${2 * channels}`,
      outputChannels,
    );
  }
  const hiddenSize = heads * headSize;
  if (hiddenSize % 4 !== 0) {
    throw fields.fault(
      "attention_head_dim",
      `such that ${heads} heads make a width divisible by 4`,
      headSize,
    );
  }
  return {
    sampleSize,
    patchSize,
    channels,
    outputChannels,
    learnsVariance: outputChannels === 2 * channels,
    blocks: fields.count("num_layers", 28, 1, MAX_BLOCKS),
    heads,
    headSize,
    hiddenSize,
    classes: fields.count("num_embeds_ada_norm", 1000),
    normEpsilon: fields.positive("norm_eps", 1e-5),
    attentionBias: fields.flag("attention_bias", true),
    normHasWeights: fields.flag("norm_elementwise_affine", false),
  };
}

const blockPrefix = (index: number) => `transformer_blocks.${index}`;

function wantedDitTensors(config: DitConfig): WantedTensor[] {
  const { hiddenSize: width, patchSize, channels, outputChannels } = config;
  const linear = (name: string, rows: number, cols: number, bias = true): WantedTensor[] => [
    { name: `${name}.weight`, shape: [rows, cols] },
    ...(bias ? [{ name: `${name}.bias`, shape: [rows] }] : []),
  ];
  const blocks = Array.from({ length: config.blocks }, (_, i) => {
    const prefix = blockPrefix(i);
    return [
      ...linear(`${prefix}.norm1.emb.timestep_embedder.linear_1`, width, TIMESTEP_CHANNELS),
      ...linear(`${prefix}.norm1.emb.timestep_embedder.linear_2`, width, width),
      {
        name: `${prefix}.norm1.emb.class_embedder.embedding_table.weight`,
        shape: [config.classes + 1, width],
      },
      ...linear(`${prefix}.norm1.linear`, 6 * width, width),
      ...["to_q", "to_k", "to_v"].flatMap((name) =>
        linear(`${prefix}.attn1.${name}`, width, width, config.attentionBias)
      ),
      ...linear(`${prefix}.attn1.to_out.0`, width, width),
      ...(config.normHasWeights
        ? ["weight", "bias"].map((part) => ({ name: `${prefix}.norm3.${part}`, shape: [width] }))
        : []),
      ...linear(`${prefix}.ff.net.0.proj`, 4 * width, width),
      ...linear(`${prefix}.ff.net.2`, width, 4 * width),
    ];
  });
  return [
    { name: "pos_embed.proj.weight", shape: [width, channels, patchSize, patchSize] },
    { name: "pos_embed.proj.bias", shape: [width] },
    ...blocks.flat(),
    ...linear("proj_out_1", 2 * width, width),
    ...linear("proj_out_2", patchSize * patchSize * outputChannels, width),
  ];
}

/** The weights of a DiT, and the embedding of its positions. */
export interface DitParts {
  readonly patch: LinearLayer;
  /** `f32[tokens, width]` */
  readonly positions: Float32Array<ArrayBuffer>;
  readonly blocks: readonly DitBlock[];
  readonly output1: LinearLayer;
  readonly output2: LinearLayer;
}

export interface DitForwardOptions {
  /** For calibration. */
  readonly observe?: LayerObserver | undefined;
}

/** A loaded DiT: noisy images, timesteps and classes in, the prediction out. */
export class DitModel {
  readonly #operations: Operations;
  readonly #workspace = new Workspace();
  readonly #patch: LinearLayer;
  readonly #positions: Float32Array<ArrayBuffer>;
  readonly #blocks: readonly DitBlock[];
  readonly #output1: LinearLayer;
  readonly #output2: LinearLayer;
  readonly #timeAware: TimeAwareLayers | undefined;
  /** Bytes of the weights as they are held. */
  readonly weightBytes: number;
  readonly threads: number;
  /** What it selects by time, undefined for nothing. */
  readonly timeParameters: TimeParameters | undefined;

  constructor(
    /** Path of the checkpoint, for messages. */
    readonly path: string,
    readonly config: DitConfig,
    readonly kernels: Kernels,
    tensors: ModelTensors,
    { threads = 1, timeParameters }: TransformerOptions = {},
  ) {
    this.threads = threads;
    this.timeParameters = timeParameters;
    this.#operations = new Operations(kernels, threads);
    const linear = (name: string, bias = true) =>
      tensors.linear(`${name}.weight`, bias ? `${name}.bias` : undefined);
    this.#patch = linear("pos_embed.proj");
    this.#positions = positionEmbedding(config.sampleSize / config.patchSize, config.hiddenSize);
    this.#blocks = Array.from({ length: config.blocks }, (_, i) => {
      const prefix = blockPrefix(i);
      return {
        name: prefix,
        timestep1: linear(`${prefix}.norm1.emb.timestep_embedder.linear_1`),
        timestep2: linear(`${prefix}.norm1.emb.timestep_embedder.linear_2`),
        labels: tensors.table(`${prefix}.norm1.emb.class_embedder.embedding_table.weight`),
        modulation: linear(`${prefix}.norm1.linear`),
        query: linear(`${prefix}.attn1.to_q`, config.attentionBias),
        key: linear(`${prefix}.attn1.to_k`, config.attentionBias),
        value: linear(`${prefix}.attn1.to_v`, config.attentionBias),
        attentionOutput: linear(`${prefix}.attn1.to_out.0`),
        normWeight: config.normHasWeights ? tensors.vector(`${prefix}.norm3.weight`) : undefined,
        normBias: config.normHasWeights ? tensors.vector(`${prefix}.norm3.bias`) : undefined,
        feedForward1: linear(`${prefix}.ff.net.0.proj`),
        feedForward2: linear(`${prefix}.ff.net.2`),
      };
    });
    this.#output1 = linear("proj_out_1");
    this.#output2 = linear("proj_out_2");
    this.weightBytes = tensors.bytes;
    this.#timeAware = timeParameters &&
      new TimeAwareLayers(timeParameters, this.#operations, this.#linearLayers(), path);
  }

  *#linearLayers(): Generator<LinearLayer> {
    yield this.#patch;
    for (const block of this.#blocks) {
      yield* [block.timestep1, block.timestep2, block.modulation, block.query, block.key, block.value];
      yield* [block.attentionOutput, block.feedForward1, block.feedForward2];
    }
    yield* [this.#output1, this.#output2];
  }

  /** The weights as they are held, for what computes gradients. */
  get parts(): DitParts {
    return {
      patch: this.#patch,
      positions: this.#positions,
      blocks: this.#blocks,
      output1: this.#output1,
      output2: this.#output2,
    };
  }

  /** Bytes of scratch held for the largest call so far. */
  get scratchBytes(): number {
    return this.#workspace.bytes;
  }

  /** Numbers of one input image. */
  get imageElements(): number {
    return this.config.channels * this.config.sampleSize ** 2;
  }

  /**
   * What the model predicts of each image.
   *
   * **Shapes** `samples: f32[batch, channels, size, size]`, `timesteps` and `labels: [batch]` →
   * `f32[batch, output channels, size, size]`. The result is scratch: the next call overwrites it.
   *
   * @throws {TypeError} when a shape does not fit
   * @throws {RangeError} when a label or a timestep is not allowed
   * @throws {WeightsError} when values come out NaN or infinite, naming the first block that made one
   */
  forward(
    samples: Float32Array,
    timesteps: ArrayLike<number>,
    labels: ArrayLike<number>,
    options: DitForwardOptions = {},
  ): Float32Array {
    const batch = this.checkInput(samples, timesteps, labels);
    const output = this.#run(samples, timesteps, labels, batch, options, undefined);
    if (allFinite(output)) return output;
    this.#run(samples, timesteps, labels, batch, options, (place, values) => {
      const bad = values.findIndex((value) => !Number.isFinite(value));
      if (bad < 0) return;
      throw new WeightsError(
        `Cannot run ${shown(this.path)}: every value must be finite, got ${values[bad]} from ${shown(place)}`,
        { path: this.path, tensor: place },
      );
    });
    return output;
  }

  /** Images of a batch. @throws as {@linkcode DitModel.forward} */
  checkInput(samples: Float32Array, timesteps: ArrayLike<number>, labels: ArrayLike<number>): number {
    const fail = (reason: string) => `Cannot run ${shown(this.path)}: ${reason}`;
    const batch = samples.length / this.imageElements;
    if (!(samples instanceof Float32Array) || !Number.isInteger(batch) || batch < 1) {
      const { channels, sampleSize } = this.config;
      throw new TypeError(
        fail(
          `samples must be f32[batch, ${channels}, ${sampleSize}, ${sampleSize}], got ${samples?.length} numbers`,
        ),
      );
    }
    if (timesteps.length !== batch || labels.length !== batch) {
      throw new TypeError(
        fail(
          `${batch} images must have a timestep and a label each, got ${timesteps.length} and ${labels.length}`,
        ),
      );
    }
    for (let i = 0; i < batch; i++) {
      const label = labels[i]!, timestep = timesteps[i]!;
      if (!Number.isInteger(label) || label < 0 || label > this.config.classes) {
        throw new RangeError(
          fail(`labels must be from 0 to ${this.config.classes}, the last for no class, got ${label}`),
        );
      }
      if (!(timestep >= 0 && timestep < Infinity)) {
        throw new RangeError(fail(`timesteps must be numbers ≥ 0, got ${timestep}`));
      }
    }
    return batch;
  }

  #run(
    samples: Float32Array,
    timesteps: ArrayLike<number>,
    labels: ArrayLike<number>,
    batch: number,
    { observe }: DitForwardOptions,
    inspect: ((place: string, values: Float32Array) => void) | undefined,
  ): Float32Array {
    const { config } = this;
    const { hiddenSize: width, heads, headSize } = config;
    const operations = this.#operations, timeAware = this.#timeAware;
    timeAware?.begin(timesteps, batch);
    const side = config.sampleSize / config.patchSize, tokens = side * side, count = batch * tokens;
    const take = (name: string, rows: number, cols: number) => this.#workspace.take(name, rows * cols);
    const linear = (layer: LinearLayer, x: Float32Array, rows: number, out: Float32Array<ArrayBuffer>) => {
      observe?.(layer, x, rows);
      if (timeAware === undefined) operations.linear(layer, x, rows, out);
      else timeAware.linear(layer, x, rows, out);
    };

    const patches = take("patches", count, this.#patch.weights.cols);
    patchify(samples, config, patches);
    const hidden = take("hidden", count, width);
    linear(this.#patch, patches, count, hidden);
    const positions = this.#positions;
    for (let begin = 0; begin < hidden.length; begin += positions.length) {
      for (let i = 0; i < positions.length; i++) hidden[begin + i]! += positions[i]!;
    }
    inspect?.(this.#patch.name, hidden);
    const waves = take("waves", batch, TIMESTEP_CHANNELS);
    timestepWaves(timesteps, waves);

    const conditionOf = (block: DitBlock) => {
      const condition = take("condition", batch, width), inner = take("conditionInner", batch, width);
      linear(block.timestep1, waves, batch, inner);
      operations.silu(inner, inner);
      linear(block.timestep2, inner, batch, condition);
      lookUpRows(this.kernels, block.labels, labels, inner);
      operations.add(condition, inner, condition);
      operations.silu(condition, condition);
      return condition;
    };
    const stride = 6 * width;
    const shape = { batch, tokens, cols: width, stride };
    for (const block of this.#blocks) {
      const modulation = take("modulation", batch, stride);
      linear(block.modulation, conditionOf(block), batch, modulation);
      const part = (index: number) => modulation.subarray(index * width);
      const normed = take("normed", count, width), delta = take("delta", count, width);
      operations.layerNorm(hidden, undefined, undefined, count, width, NORM_EPSILON, normed);
      operations.modulate(normed, part(1), part(0), shape, normed);
      const query = take("query", count, width),
        key = take("key", count, width),
        value = take("value", count, width);
      linear(block.query, normed, count, query);
      linear(block.key, normed, count, key);
      linear(block.value, normed, count, value);
      operations.attention(query, key, value, { batch, tokens, heads, headSize }, undefined, normed);
      linear(block.attentionOutput, normed, count, delta);
      operations.gateAdd(hidden, part(2), delta, shape, hidden);
      operations.layerNorm(
        hidden,
        block.normWeight,
        block.normBias,
        count,
        width,
        config.normEpsilon,
        normed,
      );
      operations.modulate(normed, part(4), part(3), shape, normed);
      const inner = take("inner", count, 4 * width);
      linear(block.feedForward1, normed, count, inner);
      operations.geluTanh(inner, inner);
      linear(block.feedForward2, inner, count, delta);
      operations.gateAdd(hidden, part(5), delta, shape, hidden);
      inspect?.(block.name, hidden);
    }
    const modulation = take("modulation", batch, 2 * width);
    linear(this.#output1, conditionOf(this.#blocks[0]!), batch, modulation);
    const normed = take("normed", count, width);
    operations.layerNorm(hidden, undefined, undefined, count, width, NORM_EPSILON, normed);
    operations.modulate(
      normed,
      modulation.subarray(width),
      modulation,
      { ...shape, stride: 2 * width },
      normed,
    );
    const pixels = take("pixels", count, this.#output2.weights.rows);
    linear(this.#output2, normed, count, pixels);
    const output = take("output", batch, config.outputChannels * config.sampleSize ** 2);
    unpatchify(pixels, config, output);
    inspect?.(this.#output2.name, output);
    return output;
  }
}

/** A DiT out of an open checkpoint, full precision or packed. @throws as {@linkcode loadDit} */
export function ditFrom(checkpoint: Checkpoint, kernels: Kernels, options: LoadOptions = {}): DitModel {
  if (checkpoint.kind !== "dit") {
    throw new CheckpointError(
      `Cannot load ${shown(checkpoint.path)}: _class_name must be "DiTTransformer2DModel", got ${
        shown(checkpoint.config?.["_class_name"])
      }`,
      { path: checkpoint.path },
    );
  }
  const config = ditConfig(ConfigFields.of(checkpoint));
  const tensors = new ModelTensors(checkpoint, kernels, wantedDitTensors(config), [/^pos_embed\.pos_embed$/]);
  return new DitModel(checkpoint.path, config, kernels, tensors, options);
}

/**
 * Loads a DiT, full precision or packed. Weights stay as they are stored.
 *
 * @throws {CheckpointError} when config.json or the tensors are not a DiT's: everything missing or in excess is listed
 * @throws {FormatError} when a file is not what its format promises
 *
 * @example
 * ```ts
 * import { openKernels } from "../native/mod.ts";
 * import { loadDit } from "./dit.ts";
 * const model = loadDit("tests/models/glyph-dit", await openKernels());
 * const epsilon = model.forward(new Float32Array(model.imageElements), [999], [3]);
 * console.log(epsilon.length); // 256
 * ```
 */
export function loadDit(path: string, kernels: Kernels, options: LoadOptions = {}): DitModel {
  using checkpoint = openCheckpoint(path);
  return ditFrom(checkpoint, kernels, options);
}

/** diffusers' `Timesteps` with cosines first and a frequency shift of 1. */
export function timestepWaves(timesteps: ArrayLike<number>, out: Float32Array): void {
  const half = TIMESTEP_CHANNELS / 2;
  for (let b = 0; b < timesteps.length; b++) {
    for (let i = 0; i < half; i++) {
      // float32 as in PyTorch: at t near 1000 the rounding of the angle is not negligible
      const frequency = Math.fround(Math.exp(Math.fround(-Math.log(10_000) * i / (half - 1))));
      const angle = Math.fround(timesteps[b]! * frequency);
      out[b * TIMESTEP_CHANNELS + i] = Math.cos(angle);
      out[b * TIMESTEP_CHANNELS + half + i] = Math.sin(angle);
    }
  }
}

/** diffusers' 2-D sine-cosine positions: the first half of a row is the column's (width), the second the row's. */
function positionEmbedding(side: number, width: number): Float32Array<ArrayBuffer> {
  const out = new Float32Array(side * side * width);
  const half = width / 2, quarter = width / 4;
  const wave = (position: number, at: number) => {
    for (let i = 0; i < quarter; i++) {
      const angle = position / 10_000 ** (i / quarter);
      out[at + i] = Math.sin(angle);
      out[at + quarter + i] = Math.cos(angle);
    }
  };
  for (let y = 0; y < side; y++) {
    for (let x = 0; x < side; x++) {
      wave(x, (y * side + x) * width);
      wave(y, (y * side + x) * width + half);
    }
  }
  return out;
}

/** `f32[batch, channels, size, size]` → `f32[batch * patches, channels * patch * patch]` */
export function patchify(
  images: Float32Array,
  { channels, sampleSize: size, patchSize: patch }: DitConfig,
  out: Float32Array,
): void {
  const side = size / patch, batch = images.length / (channels * size * size);
  let at = 0;
  for (let b = 0; b < batch; b++) {
    for (let y = 0; y < side; y++) {
      for (let x = 0; x < side; x++) {
        for (let c = 0; c < channels; c++) {
          for (let p = 0; p < patch; p++) {
            const from = ((b * channels + c) * size + y * patch + p) * size + x * patch;
            for (let q = 0; q < patch; q++) out[at++] = images[from + q]!;
          }
        }
      }
    }
  }
}

/** The way back of `unpatchify`. */
export function unpatchifyBackward(images: Float32Array, config: DitConfig, out: Float32Array): void {
  const { outputChannels: channels, sampleSize: size, patchSize: patch } = config;
  const side = size / patch, batch = images.length / (channels * size * size);
  let at = 0;
  for (let b = 0; b < batch; b++) {
    for (let y = 0; y < side; y++) {
      for (let x = 0; x < side; x++) {
        for (let p = 0; p < patch; p++) {
          for (let q = 0; q < patch; q++) {
            for (let c = 0; c < channels; c++) {
              out[at++] = images[((b * channels + c) * size + y * patch + p) * size + x * patch + q]!;
            }
          }
        }
      }
    }
  }
}

/** `f32[batch * patches, patch * patch * output channels]` → `f32[batch, output channels, size, size]` */
export function unpatchify(
  pixels: Float32Array,
  { outputChannels: channels, sampleSize: size, patchSize: patch }: DitConfig,
  out: Float32Array,
): void {
  const side = size / patch, batch = out.length / (channels * size * size);
  let at = 0;
  for (let b = 0; b < batch; b++) {
    for (let y = 0; y < side; y++) {
      for (let x = 0; x < side; x++) {
        for (let p = 0; p < patch; p++) {
          for (let q = 0; q < patch; q++) {
            for (let c = 0; c < channels; c++) {
              out[((b * channels + c) * size + y * patch + p) * size + x * patch + q] = pixels[at++]!;
            }
          }
        }
      }
    }
  }
}

function allFinite(values: Float32Array): boolean {
  for (let i = 0; i < values.length; i++) if (!Number.isFinite(values[i]!)) return false;
  return true;
}
