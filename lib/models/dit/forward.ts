/**
 * The forward pass of a DiT, for inference and for gradients: with a tape, every value that the backward pass reads gets
 * memory that nothing overwrites.
 */
import type { Kernels } from "../../native/mod.ts";
import { attention, timestepEmbedding } from "../layers/attention.ts";
import { add, gateAdd, geluTanh, modulate, type ModulationShape, silu } from "../layers/elementwise.ts";
import { layerNorm } from "../layers/norms.ts";
import { patchify, unpatchify } from "../layers/patches.ts";
import { type LinearLayer, lookUpRows } from "../layers/tensors.ts";
import type { Workspace } from "../layers/workspace.ts";
import { type DitConfig, NORM_EPSILON, TIMESTEP_CHANNELS } from "./config.ts";
import type { DitParts } from "./weights.ts";

type Floats = Float32Array<ArrayBuffer>;

/** A model's weights, and how a pass runs its linear layers. */
export interface DitPass {
  readonly kernels: Kernels;
  readonly config: DitConfig;
  readonly parts: DitParts;
  readonly workspace: Workspace;
  /** `x: f32[rows, cols]` → `out: f32[rows, rows of the layer]` */
  linear(layer: LinearLayer, x: Float32Array, rows: number, out: Floats): void;
}

/** Times and classes of the images of a call. */
export interface ImageConditions {
  readonly timesteps: ArrayLike<number>;
  readonly labels: ArrayLike<number>;
}

/** What the backward pass through a block's conditioning reads: `f32[batch, width]` each. */
export interface ConditionTape {
  readonly inner: Floats;
  readonly activated: Floats;
  readonly embedding: Floats;
  readonly sum: Floats;
  readonly condition: Floats;
}

/** What the backward pass through a modulated norm reads. */
export interface ModulationTape {
  readonly modulation: Floats;
  readonly normed: Floats;
  readonly modulated: Floats;
}

/** What the backward pass through a block reads. */
export interface BlockTape extends ModulationTape {
  readonly condition: ConditionTape;
  readonly input: Floats;
  readonly query: Floats;
  readonly key: Floats;
  readonly value: Floats;
  readonly attended: Floats;
  readonly attentionDelta: Floats;
  readonly middle: Floats;
  readonly normedAgain: Floats;
  readonly modulatedAgain: Floats;
  readonly inner: Floats;
  readonly activated: Floats;
  readonly feedForwardDelta: Floats;
  readonly output: Floats;
}

/** Tokens of an image. */
export const tokensOf = ({ sampleSize, patchSize }: DitConfig): number => (sampleSize / patchSize) ** 2;

/** Sizes of modulation by rows of so many chunks. */
export function modulationShape(
  { config }: DitPass,
  { labels: { length: batch } }: ImageConditions,
  chunks: number,
): ModulationShape {
  const cols = config.hiddenSize;
  return { batch, tokens: tokensOf(config), cols, stride: chunks * cols };
}

function imageShape({ sampleSize, patchSize }: DitConfig, batch: number, channels: number) {
  return { batch, channels, height: sampleSize, width: sampleSize, patch: patchSize };
}

/** Embeds patches and their positions. **Shapes** `samples: f32[batch, channels, size, size]` → `hidden: f32[batch · tokens, width]` */
export function embed(pass: DitPass, samples: Float32Array, batch: number, hidden: Floats): void {
  const { config, parts: { patch, positions } } = pass, count = batch * tokensOf(config);
  const patches = pass.workspace.take("patches", count * patch.weights.cols);
  patchify(pass.kernels, samples, imageShape(config, batch, config.channels), patches);
  pass.linear(patch, patches, count, hidden);
  for (let begin = 0; begin < hidden.length; begin += positions.length) {
    for (let i = 0; i < positions.length; i++) hidden[begin + i]! += positions[i]!;
  }
}

/** Sinusoids of the timesteps, which the blocks' conditioning reads: `f32[batch, TIMESTEP_CHANNELS]`, the buffer "waves". */
export function embedTimesteps({ kernels, workspace }: DitPass, timesteps: ArrayLike<number>): Floats {
  const waves = workspace.take("waves", timesteps.length * TIMESTEP_CHANNELS);
  return timestepEmbedding(kernels, timesteps, TIMESTEP_CHANNELS, { flipSinToCos: true }, waves);
}

/** The input of a block's modulation, from its embeddings of timestep and class: `f32[batch, width]`. */
export function runCondition(
  pass: DitPass,
  index: number,
  { labels }: ImageConditions,
  tape?: ConditionTape,
): Floats {
  const { kernels, parts, workspace } = pass,
    batch = labels.length,
    elements = batch * pass.config.hiddenSize;
  const block = parts.blocks[index]!, waves = workspace.take("waves", batch * TIMESTEP_CHANNELS);
  const inner = tape?.inner ?? workspace.take("conditionInner", elements);
  pass.linear(block.timestep1, waves, batch, inner);
  const activated = silu(kernels, inner, tape?.activated ?? inner);
  const sum = tape?.sum ?? workspace.take("condition", elements);
  pass.linear(block.timestep2, activated, batch, sum);
  const embedding = tape?.embedding ?? inner;
  lookUpRows(kernels, block.labels, labels, embedding);
  add(kernels, sum, embedding, sum);
  return silu(kernels, sum, tape?.condition ?? sum);
}

/** One block, in place; into `tape.output` with a tape. */
export function runBlock(
  pass: DitPass,
  index: number,
  call: ImageConditions,
  hidden: Floats,
  tape?: BlockTape,
): Floats {
  const { kernels, config, parts } = pass, block = parts.blocks[index]!;
  const { hiddenSize: width, heads, headSize } = config;
  const shape = modulationShape(pass, call, 6), { batch, tokens } = shape, count = batch * tokens;
  const take = (name: string, cols: number) => pass.workspace.take(name, count * cols);
  const modulation = tape?.modulation ?? pass.workspace.take("modulation", batch * 6 * width);
  pass.linear(block.modulation, runCondition(pass, index, call, tape?.condition), batch, modulation);
  const chunk = (i: number) => modulation.subarray(i * width);

  const normed = tape?.normed ?? take("normed", width), delta = tape?.attentionDelta ?? take("delta", width);
  layerNorm(kernels, hidden, { rows: count, cols: width, epsilon: NORM_EPSILON }, normed);
  const scaled = { scale: chunk(1), shift: chunk(0) };
  const modulated = modulate(kernels, normed, scaled, shape, tape?.modulated ?? normed);
  const q = tape?.query ?? take("query", width), k = tape?.key ?? take("key", width);
  const v = tape?.value ?? take("value", width);
  pass.linear(block.query, modulated, count, q);
  pass.linear(block.key, modulated, count, k);
  pass.linear(block.value, modulated, count, v);
  const attended = tape?.attended ?? normed;
  attention(kernels, { q, k, v }, { batch, tokens, heads, headSize }, attended);
  pass.linear(block.attentionOutput, attended, count, delta);
  const middle = gateAdd(kernels, hidden, chunk(2), delta, shape, tape?.middle ?? hidden);

  const normedAgain = tape?.normedAgain ?? normed, inner = tape?.inner ?? take("inner", 4 * width);
  const { normWeight: weight, normBias: bias } = block;
  const norm = { rows: count, cols: width, weight, bias, epsilon: config.normEpsilon };
  layerNorm(kernels, middle, norm, normedAgain);
  const scaledAgain = { scale: chunk(4), shift: chunk(3) };
  const again = modulate(kernels, normedAgain, scaledAgain, shape, tape?.modulatedAgain ?? normedAgain);
  pass.linear(block.feedForward1, again, count, inner);
  const activated = geluTanh(kernels, inner, tape?.activated ?? inner);
  const feedForwardDelta = tape?.feedForwardDelta ?? delta;
  pass.linear(block.feedForward2, activated, count, feedForwardDelta);
  return gateAdd(kernels, middle, chunk(5), feedForwardDelta, shape, tape?.output ?? middle);
}

/** The prediction of the last block's hidden states: `f32[batch, output channels, size, size]`, scratch. */
export function runOutput(
  pass: DitPass,
  call: ImageConditions,
  hidden: Float32Array,
  tape?: ModulationTape & { readonly condition: ConditionTape },
): Floats {
  const { kernels, config, parts: { output1, output2 }, workspace } = pass, width = config.hiddenSize;
  const shape = modulationShape(pass, call, 2), { batch, tokens } = shape, count = batch * tokens;
  const modulation = tape?.modulation ?? workspace.take("modulation", batch * 2 * width);
  pass.linear(output1, runCondition(pass, 0, call, tape?.condition), batch, modulation); // block 0's, as in diffusers
  const normed = tape?.normed ?? workspace.take("normed", count * width);
  layerNorm(kernels, hidden, { rows: count, cols: width, epsilon: NORM_EPSILON }, normed);
  const scaled = { scale: modulation.subarray(width), shift: modulation };
  const modulated = modulate(kernels, normed, scaled, shape, tape?.modulated ?? normed);
  const pixels = workspace.take("pixels", count * output2.weights.rows);
  pass.linear(output2, modulated, count, pixels);
  const output = workspace.take("output", batch * config.outputChannels * config.sampleSize ** 2);
  return unpatchify(kernels, pixels, imageShape(config, batch, config.outputChannels), output);
}
