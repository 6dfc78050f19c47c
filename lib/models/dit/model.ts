/**
 * DiT: class-conditional image diffusion by a transformer with adaLN-zero (https://arxiv.org/abs/2212.09748), with the names and
 * the configuration of diffusers' `DiTTransformer2DModel`. Noise schedules are in schedulers.ts, the sampler is in image_sampler.ts.
 */
import { CheckpointError, WeightsError } from "../../errors.ts";
import type { Kernels } from "../../native/mod.ts";
import { type Checkpoint, openCheckpoint } from "../../tensor/mod.ts";
import type { TimeParameters } from "../../time/mod.ts";
import {
  type Blockwise,
  checkPlain,
  type LayerOptions,
  type Stage,
  withWeights,
} from "../layers/blockwise.ts";
import type { ForwardCost, TransformerOptions } from "../masked/transformer.ts";
import { ConfigFields, MAX_BLOCKS, shown } from "../layers/model_config.ts";
import { Operations } from "../layers/operations.ts";
import {
  type EmbeddingTable,
  type LinearLayer,
  type LoadOptions,
  lookUpRows,
  ModelTensors,
  type TensorList,
  type WantedTensor,
} from "../layers/tensors.ts";
import { TimeAwareLayers } from "../layers/time_aware.ts";
import { Workspace } from "../layers/workspace.ts";

/** Inputs of the timestep's embedding: diffusers fixes it. */
export const TIMESTEP_CHANNELS = 256;
/** Epsilon of the norms in front of attention and of the output; that in front of the feed-forward is configured. */
export const NORM_EPSILON = 1e-6;

/** Most numbers of the table of positions, 1 GiB: no tensor has a size that would speak against a larger image. */
const MAX_POSITION_ELEMENTS = 2 ** 28;

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
  const most = Math.floor(Math.sqrt(MAX_POSITION_ELEMENTS / hiddenSize)) * patchSize;
  if (sampleSize > most) {
    throw fields.fault(
      "sample_size",
      `at most ${most} with patches of ${patchSize} and this width`,
      sampleSize,
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

/** What a DiT of these sizes has. */
export function ditTensors(config: DitConfig): TensorList {
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
  const wanted = [
    { name: "pos_embed.proj.weight", shape: [width, channels, patchSize, patchSize] },
    { name: "pos_embed.proj.bias", shape: [width] },
    ...blocks.flat(),
    ...linear("proj_out_1", 2 * width, width),
    ...linear("proj_out_2", patchSize * patchSize * outputChannels, width),
  ];
  return { wanted, ignored: [/^pos_embed\.pos_embed$/] };
}

/** What a forward pass of `batch` images takes: {@linkcode DitModel.scratchBytes} afterwards, and its products. */
export function ditForwardCost(config: DitConfig, batch: number): ForwardCost {
  const { hiddenSize: width, sampleSize, patchSize, channels, outputChannels, blocks } = config;
  const tokens = (sampleSize / patchSize) ** 2, count = batch * tokens;
  const patch = patchSize ** 2 * channels, pixels = patchSize ** 2 * outputChannels;
  const floats = count * patch + 10 * count * width + // patches; hidden, normed, delta, query, key, value, inner (4)
    batch * (TIMESTEP_CHANNELS + 8 * width) + // waves, condition, conditionInner, modulation
    count * pixels + batch * outputChannels * sampleSize ** 2 + tokens * width; // pixels, output, positions
  const condition = batch * width * (TIMESTEP_CHANNELS + width);
  const block = condition + 6 * batch * width ** 2 + 12 * count * width ** 2 + 2 * count * tokens * width;
  return {
    activationBytes: 4 * floats,
    multiplyAdds: count * patch * width + blocks * block + condition + 2 * batch * width ** 2 +
      count * width * pixels,
  };
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

/** Noisy images that are run together, for a model run block by block. */
export interface ImageBatch {
  /** `f32[batch, channels, size, size]` */
  readonly samples: Float32Array;
  readonly timesteps: ArrayLike<number>;
  readonly labels: ArrayLike<number>;
}

/** A loaded DiT: noisy images, timesteps and classes in, the prediction out. */
export class DitModel implements Blockwise<ImageBatch> {
  readonly #operations: Operations;
  readonly #workspace: Workspace;
  readonly #patch: LinearLayer;
  readonly #positions: Float32Array<ArrayBuffer>;
  readonly #blocks: readonly DitBlock[];
  readonly #output1: LinearLayer;
  readonly #output2: LinearLayer;
  readonly #timeAware: TimeAwareLayers | undefined;
  /** Bytes of the weights as they are held. */
  readonly weightBytes: number;
  /** What it selects by time, undefined for nothing. */
  readonly timeParameters: TimeParameters | undefined;

  constructor(
    /** Path of the checkpoint, for messages. */
    readonly path: string,
    readonly config: DitConfig,
    readonly kernels: Kernels,
    tensors: ModelTensors,
    { timeParameters, workspace = new Workspace() }: TransformerOptions = {},
  ) {
    this.timeParameters = timeParameters;
    this.#workspace = workspace;
    this.#operations = new Operations(kernels);
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
      new TimeAwareLayers(timeParameters, this.#operations, this.#linearLayers(), path, workspace);
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

  /** Bytes of positions and of scratch held for the largest call so far. */
  get scratchBytes(): number {
    return this.#positions.byteLength + this.#workspace.bytes;
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
    options: LayerOptions = {},
  ): Float32Array {
    const batch = this.checkInput(samples, timesteps, labels);
    if (options.weights !== undefined) checkPlain(this);
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
    options: LayerOptions,
    inspect: ((place: string, values: Float32Array) => void) | undefined,
  ): Float32Array {
    this.#timeAware?.begin(timesteps, batch);
    const hidden = this.#workspace.take("hidden", batch * this.#tokens * this.config.hiddenSize);
    this.#embed(samples, batch, hidden, options);
    inspect?.(this.#patch.name, hidden);
    const waves = this.#waves(timesteps);
    for (const block of this.#blocks) {
      this.#runBlock(block, hidden, waves, labels, batch, options);
      inspect?.(block.name, hidden);
    }
    const output = this.#runOutput(hidden, waves, labels, batch, options);
    inspect?.(this.#output2.name, output);
    return output;
  }

  get #tokens(): number {
    return (this.config.sampleSize / this.config.patchSize) ** 2;
  }

  #image(batch: number): { batch: number; height: number; width: number; patch: number } {
    const { sampleSize, patchSize } = this.config;
    return { batch, height: sampleSize, width: sampleSize, patch: patchSize };
  }

  #take(name: string, rows: number, cols: number): Float32Array<ArrayBuffer> {
    return this.#workspace.take(name, rows * cols);
  }

  #linear(
    layer: LinearLayer,
    x: Float32Array,
    rows: number,
    out: Float32Array<ArrayBuffer>,
    { observe, weights }: LayerOptions,
  ): void {
    observe?.(layer, x, rows);
    const timeAware = this.#timeAware;
    if (timeAware === undefined) this.#operations.linear(withWeights(layer, weights), x, rows, out);
    else timeAware.linear(layer, x, rows, out);
  }

  #embed(
    samples: Float32Array,
    batch: number,
    hidden: Float32Array<ArrayBuffer>,
    options: LayerOptions,
  ): void {
    const count = batch * this.#tokens;
    const patches = this.#take("patches", count, this.#patch.weights.cols);
    const { channels } = this.config;
    this.#operations.patchify(samples, { ...this.#image(batch), channels }, patches);
    this.#linear(this.#patch, patches, count, hidden, options);
    const positions = this.#positions;
    for (let begin = 0; begin < hidden.length; begin += positions.length) {
      for (let i = 0; i < positions.length; i++) hidden[begin + i]! += positions[i]!;
    }
  }

  #waves(timesteps: ArrayLike<number>): Float32Array<ArrayBuffer> {
    const waves = this.#take("waves", timesteps.length, TIMESTEP_CHANNELS);
    this.#operations.timestepEmbedding(timesteps, TIMESTEP_CHANNELS, { flipSinToCos: true }, waves);
    return waves;
  }

  /** What a block's modulation is computed from: its embeddings of the timesteps and the classes. */
  #condition(
    block: DitBlock,
    waves: Float32Array,
    labels: ArrayLike<number>,
    batch: number,
    options: LayerOptions,
  ): Float32Array<ArrayBuffer> {
    const operations = this.#operations, width = this.config.hiddenSize;
    const condition = this.#take("condition", batch, width),
      inner = this.#take("conditionInner", batch, width);
    this.#linear(block.timestep1, waves, batch, inner, options);
    operations.silu(inner, inner);
    this.#linear(block.timestep2, inner, batch, condition, options);
    lookUpRows(this.kernels, block.labels, labels, inner);
    operations.add(condition, inner, condition);
    operations.silu(condition, condition);
    return condition;
  }

  /** One block, in place. */
  #runBlock(
    block: DitBlock,
    hidden: Float32Array<ArrayBuffer>,
    waves: Float32Array,
    labels: ArrayLike<number>,
    batch: number,
    options: LayerOptions,
  ): void {
    const { hiddenSize: width, heads, headSize, normEpsilon } = this.config;
    const operations = this.#operations, tokens = this.#tokens, count = batch * tokens;
    const stride = 6 * width, shape = { batch, tokens, cols: width, stride };
    const modulation = this.#take("modulation", batch, stride);
    this.#linear(
      block.modulation,
      this.#condition(block, waves, labels, batch, options),
      batch,
      modulation,
      options,
    );
    const part = (index: number) => modulation.subarray(index * width);
    const normed = this.#take("normed", count, width), delta = this.#take("delta", count, width);
    operations.layerNorm(hidden, undefined, undefined, count, width, NORM_EPSILON, normed);
    operations.modulate(normed, part(1), part(0), shape, normed);
    const query = this.#take("query", count, width),
      key = this.#take("key", count, width),
      value = this.#take("value", count, width);
    this.#linear(block.query, normed, count, query, options);
    this.#linear(block.key, normed, count, key, options);
    this.#linear(block.value, normed, count, value, options);
    operations.attention(query, key, value, { batch, tokens, heads, headSize }, undefined, normed);
    this.#linear(block.attentionOutput, normed, count, delta, options);
    operations.gateAdd(hidden, part(2), delta, shape, hidden);
    operations.layerNorm(hidden, block.normWeight, block.normBias, count, width, normEpsilon, normed);
    operations.modulate(normed, part(4), part(3), shape, normed);
    const inner = this.#take("inner", count, 4 * width);
    this.#linear(block.feedForward1, normed, count, inner, options);
    operations.geluTanh(inner, inner);
    this.#linear(block.feedForward2, inner, count, delta, options);
    operations.gateAdd(hidden, part(5), delta, shape, hidden);
  }

  #runOutput(
    hidden: Float32Array,
    waves: Float32Array,
    labels: ArrayLike<number>,
    batch: number,
    options: LayerOptions,
  ): Float32Array<ArrayBuffer> {
    const { config } = this;
    const operations = this.#operations, width = config.hiddenSize;
    const tokens = this.#tokens, count = batch * tokens;
    const modulation = this.#take("modulation", batch, 2 * width);
    const condition = this.#condition(this.#blocks[0]!, waves, labels, batch, options);
    this.#linear(this.#output1, condition, batch, modulation, options);
    const normed = this.#take("normed", count, width);
    operations.layerNorm(hidden, undefined, undefined, count, width, NORM_EPSILON, normed);
    const shape = { batch, tokens, cols: width, stride: 2 * width };
    operations.modulate(normed, modulation.subarray(width), modulation, shape, normed);
    const pixels = this.#take("pixels", count, this.#output2.weights.rows);
    this.#linear(this.#output2, normed, count, pixels, options);
    const output = this.#take("output", batch, config.outputChannels * config.sampleSize ** 2);
    operations.unpatchify(pixels, { ...this.#image(batch), channels: config.outputChannels }, output);
    return output;
  }

  // A block at a time ------------------------------------------------------------------------------------------

  get stages(): readonly Stage[] {
    return [
      ...this.#blocks.flatMap((block, index) =>
        [
          [block.timestep1],
          [block.timestep2],
          [block.modulation],
          [block.query, block.key, block.value],
          [block.attentionOutput],
          [block.feedForward1],
          [block.feedForward2],
        ].map((layers) => ({ block: index, layers }))
      ),
      { block: this.#blocks.length, layers: [this.#output1] },
      { block: this.#blocks.length, layers: [this.#output2] },
    ];
  }

  /** @throws {TypeError} on a model with time parameters, too */
  start({ samples, timesteps, labels }: ImageBatch): Float32Array<ArrayBuffer> {
    checkPlain(this);
    const batch = this.checkInput(samples, timesteps, labels);
    const hidden = new Float32Array(batch * this.#tokens * this.config.hiddenSize);
    this.#embed(samples, batch, hidden, {});
    return hidden;
  }

  runBlock(
    block: number,
    { timesteps, labels }: ImageBatch,
    hidden: Float32Array<ArrayBuffer>,
    options: LayerOptions,
  ): void {
    this.#runBlock(this.#blocks[block]!, hidden, this.#waves(timesteps), labels, timesteps.length, options);
  }

  finish({ timesteps, labels }: ImageBatch, hidden: Float32Array, options: LayerOptions): Float32Array {
    return this.#runOutput(hidden, this.#waves(timesteps), labels, timesteps.length, options);
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
  const tensors = new ModelTensors(checkpoint, kernels, ditTensors(config), options);
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
 * import { openKernels } from "../../native/mod.ts";
 * import { loadDit } from "./model.ts";
 * const model = loadDit("tests/models/glyph-dit", await openKernels());
 * const epsilon = model.forward(new Float32Array(model.imageElements), [999], [3]);
 * console.log(epsilon.length); // 256
 * ```
 */
export function loadDit(path: string, kernels: Kernels, options: LoadOptions = {}): DitModel {
  using checkpoint = openCheckpoint(path);
  return ditFrom(checkpoint, kernels, options);
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

function allFinite(values: Float32Array): boolean {
  for (let i = 0; i < values.length; i++) if (!Number.isFinite(values[i]!)) return false;
  return true;
}
