/** The forward pass of a DiT; with a tape, values for the backward pass are kept in separate memory. */
import { attention, timestepEmbedding } from "../layers/attention.ts";
import { add, gateAdd, geluTanh, modulate, type ModulationShape, silu } from "../layers/elementwise.ts";
import type { Pass } from "../layers/loaded_weights.ts";
import { layerNorm } from "../layers/norms.ts";
import { patchify, unpatchify } from "../layers/patches.ts";
import { type StagedRun, withoutStops } from "../layers/blockwise.ts";
import { lookUpRows } from "../layers/tensors.ts";
import { memoryFor, type Tape } from "../layers/tape.ts";
import { type DitConfig, NORM_EPSILON, TIMESTEP_CHANNELS } from "./config.ts";
import type { DitParts } from "./weights.ts";

type Floats = Float32Array<ArrayBuffer>;

export type DitPass = Pass<DitConfig, DitParts>;

/** Times and classes of the images of a call. */
export interface ImageConditions {
  readonly timesteps: ArrayLike<number>;
  readonly labels: ArrayLike<number>;
}

/** Values of a block's conditioning that its backward pass reads: `f32[batch, width]` each. */
export type ConditionValue = "conditionInner" | "conditionActivated" | "conditionSum" | "condition";
/** Values of the output that its backward pass reads. */
export type OutputValue = "finalModulation" | "finalNormed" | "finalModulated";
/** Values of a block that its backward pass reads. */
export type DitBlockValue =
  | ConditionValue
  | ("modulation" | "normed" | "modulated" | "query" | "key" | "value" | "attended" | "attentionDelta")
  | ("middle" | "normedAgain" | "modulatedAgain" | "inner" | "activated" | "feedForwardDelta" | "output");

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

/** Embeds patches and positions: `samples: f32[batch, channels, size, size]` → `hidden: f32[·, width]`. */
export function embed(pass: DitPass, samples: Float32Array, batch: number, hidden: Floats): void {
  const { config, parts: { patch, positions } } = pass, count = batch * tokensOf(config);
  const patches = pass.workspace.take("patches", count * patch.weights.cols);
  patchify(pass.kernels, samples, imageShape(config, batch, config.channels), patches);
  pass.linear(patch, patches, count, hidden);
  for (let begin = 0; begin < hidden.length; begin += positions.length) {
    for (let i = 0; i < positions.length; i++) hidden[begin + i]! += positions[i]!;
  }
}

/** Sinusoids of the timesteps, which the blocks' conditioning reads, in the buffer "waves". */
export function embedTimesteps({ kernels, workspace }: DitPass, timesteps: ArrayLike<number>): Floats {
  const waves = workspace.take("waves", timesteps.length * TIMESTEP_CHANNELS);
  return timestepEmbedding(kernels, timesteps, TIMESTEP_CHANNELS, { flipSinToCos: true }, waves);
}

/** The input of a block's modulation, from its embeddings of timestep and class: `f32[batch, width]`. */
export function runCondition(...condition: Parameters<typeof stagesOfCondition>): Floats {
  return withoutStops(stagesOfCondition(...condition));
}

function* stagesOfCondition(
  pass: DitPass,
  index: number,
  { labels }: ImageConditions,
  tape?: Tape<ConditionValue>,
): StagedRun<Floats> {
  const { kernels, config, parts, workspace, linear } = pass;
  const batch = labels.length, elements = batch * config.hiddenSize, block = parts.blocks[index]!;
  const take = (name: ConditionValue, shared?: string | Floats) =>
    memoryFor(pass, tape, name, elements, shared);
  const waves = workspace.take("waves", batch * TIMESTEP_CHANNELS), inner = take("conditionInner");
  yield { layers: [block.timestep1], x: waves, rows: batch };
  linear(block.timestep1, waves, batch, inner);
  const activated = silu(kernels, inner, take("conditionActivated", inner));
  const sum = take("conditionSum", "condition");
  yield { layers: [block.timestep2], x: activated, rows: batch };
  linear(block.timestep2, activated, batch, sum);
  const embedding = tape === undefined ? inner : workspace.take("label embedding", elements);
  lookUpRows(kernels, block.labels, labels, kernels.arrays.release(embedding));
  add(kernels, sum, embedding, sum);
  return silu(kernels, sum, take("condition", sum));
}

/** One block, in place; in other memory with a tape. */
export function runBlock(...block: Parameters<typeof stagesOfBlock>): Floats {
  return withoutStops(stagesOfBlock(...block));
}

/** {@linkcode runBlock} with a stop before every stage. */
export function* stagesOfBlock(
  pass: DitPass,
  index: number,
  call: ImageConditions,
  hidden: Floats,
  tape?: Tape<DitBlockValue>,
): StagedRun<Floats> {
  const { kernels, config, parts } = pass, block = parts.blocks[index]!;
  const { hiddenSize: width, heads, headSize, normEpsilon } = config;
  const shape = modulationShape(pass, call, 6), { batch, tokens } = shape, count = batch * tokens;
  const take = (name: DitBlockValue, shared?: string | Floats, cols = width) =>
    memoryFor(pass, tape, name, count * cols, shared);
  const modulation = memoryFor(pass, tape, "modulation", batch * 6 * width);
  const condition = yield* stagesOfCondition(pass, index, call, tape), kept = [modulation];
  yield { layers: [block.modulation], x: condition, rows: batch };
  pass.linear(block.modulation, condition, batch, modulation);
  const chunk = (i: number) => modulation.subarray(i * width);

  const normed = take("normed"), norm = { rows: count, cols: width };
  layerNorm(kernels, hidden, { ...norm, epsilon: NORM_EPSILON }, normed);
  const scaled = { scale: chunk(1), shift: chunk(0) };
  const modulated = modulate(kernels, normed, scaled, shape, take("modulated", normed));
  const q = take("query"), k = take("key"), v = take("value");
  yield { layers: [block.query, block.key, block.value], x: modulated, rows: count, kept };
  pass.linear(block.query, modulated, count, q);
  pass.linear(block.key, modulated, count, k);
  pass.linear(block.value, modulated, count, v);
  const attended = take("attended", normed), delta = take("attentionDelta", "delta");
  attention(kernels, { q, k, v }, { batch, tokens, heads, headSize }, attended);
  yield { layers: [block.attentionOutput], x: attended, rows: count, kept };
  pass.linear(block.attentionOutput, attended, count, delta);
  const middle = gateAdd(kernels, hidden, chunk(2), delta, shape, take("middle", hidden));

  const normedAgain = take("normedAgain", normed), inner = take("inner", "inner", 4 * width);
  const { normWeight: weight, normBias: bias } = block;
  layerNorm(kernels, middle, { ...norm, weight, bias, epsilon: normEpsilon }, normedAgain);
  const scaledAgain = { scale: chunk(4), shift: chunk(3) };
  const again = modulate(kernels, normedAgain, scaledAgain, shape, take("modulatedAgain", normedAgain));
  yield { layers: [block.feedForward1], x: again, rows: count, kept };
  pass.linear(block.feedForward1, again, count, inner);
  const activated = geluTanh(kernels, inner, take("activated", inner, 4 * width));
  const feedForwardDelta = take("feedForwardDelta", delta);
  yield { layers: [block.feedForward2], x: activated, rows: count, kept };
  pass.linear(block.feedForward2, activated, count, feedForwardDelta);
  return gateAdd(kernels, middle, chunk(5), feedForwardDelta, shape, take("output", middle));
}

/**
 * The prediction of the last block's hidden states: `f32[batch, output channels, size, size]`, scratch.
 *
 * @param conditionTape tape of block 0, whose conditioning the output shares, as in diffusers
 */
export function runOutput(...output: Parameters<typeof stagesOfOutput>): Floats {
  return withoutStops(stagesOfOutput(...output));
}

/** {@linkcode runOutput} with a stop before every stage. */
export function* stagesOfOutput(
  pass: DitPass,
  call: ImageConditions,
  hidden: Float32Array,
  tape?: Tape<OutputValue>,
  conditionTape?: Tape<ConditionValue>,
): StagedRun<Floats> {
  const { kernels, config, parts: { output1, output2 }, workspace } = pass, width = config.hiddenSize;
  const shape = modulationShape(pass, call, 2), { batch, tokens } = shape, count = batch * tokens;
  const take = (name: OutputValue, shared: string | Floats, elements = count * width) =>
    memoryFor(pass, tape, name, elements, shared);
  const modulation = take("finalModulation", "modulation", batch * 2 * width);
  const condition = yield* stagesOfCondition(pass, 0, call, conditionTape);
  yield { layers: [output1], x: condition, rows: batch };
  pass.linear(output1, condition, batch, modulation);
  const normed = take("finalNormed", "normed");
  layerNorm(kernels, hidden, { rows: count, cols: width, epsilon: NORM_EPSILON }, normed);
  const scaled = { scale: modulation.subarray(width), shift: modulation };
  const modulated = modulate(kernels, normed, scaled, shape, take("finalModulated", normed));
  const pixels = workspace.take("pixels", count * output2.weights.rows);
  yield { layers: [output2], x: modulated, rows: count };
  pass.linear(output2, modulated, count, pixels);
  const output = workspace.take("output", batch * config.outputChannels * config.sampleSize ** 2);
  return unpatchify(kernels, pixels, imageShape(config, batch, config.outputChannels), output);
}
