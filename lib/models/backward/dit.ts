/**
 * Gradients of a DiT with respect to its packed layers' scales, zero points and biases, the conditioning's layers included. The forward pass is
 * that of ../dit.ts with what the way back needs kept; blocks can be run twice instead, so that memory does not grow with their number.
 */
import {
  type DitBlock,
  type DitModel,
  NORM_EPSILON,
  TIMESTEP_CHANNELS,
  unpatchifyBackward,
} from "../dit/model.ts";
import type { TimeGroups } from "../../time/mod.ts";
import type { AttentionShape, ModulationShape } from "../layers/kernels.ts";
import { Operations } from "../layers/operations.ts";
import { type LinearLayer, lookUpRows } from "../layers/tensors.ts";
import { Workspace } from "../layers/workspace.ts";
import { BackwardOperations } from "./kernels.ts";
import {
  type BackwardContext,
  backwardLinears,
  groupsOfTokens,
  RefinableLinear,
  type RefinedParts,
  refuseTimeParameters,
} from "./linear.ts";
import type { GradientOptions } from "./masked_transformer.ts";

type Floats = Float32Array<ArrayBuffer>;

/** A block's linear layers. */
const LINEARS = [
  "timestep1",
  "timestep2",
  "modulation",
  "query",
  "key",
  "value",
  "attentionOutput",
  "feedForward1",
  "feedForward2",
] as const;
type BlockLinears = Readonly<Record<typeof LINEARS[number], RefinableLinear>>;

/** One call's input. */
interface Call {
  readonly timesteps: ArrayLike<number>;
  readonly labels: ArrayLike<number>;
  readonly batch: number;
  readonly tokens: number;
  readonly shape: AttentionShape;
  /** Time group of every token, and of every image. */
  readonly groups: Int32Array | undefined;
  readonly groupsOfImages: Int32Array | undefined;
}

/** What the way back through a block's conditioning reads. */
interface ConditionTape {
  readonly inner: Floats;
  readonly activated: Floats;
  readonly sum: Floats;
  readonly condition: Floats;
}

/** What the way back through a block reads. */
interface BlockTape {
  readonly input: Floats;
  readonly modulation: Floats;
  readonly normed: Floats;
  readonly modulated: Floats;
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
}

/**
 * A DiT whose packed layers can be refined.
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 * import { loadDit } from "../dit/model.ts";
 * import { DitGradients } from "./dit.ts";
 * const model = loadDit("tests/models/glyph-dit", await openKernels());
 * const gradients = new DitGradients(model);
 * const epsilon = gradients.forward(new Float32Array(256), [500], [3]);
 * gradients.backward(epsilon.map((value) => 2 * value)); // of the sum of squares; nothing is packed here, nothing to refine
 * console.log(gradients.layers.flatMap((layer) => layer.parameters).length); // 0
 * ```
 */
export class DitGradients {
  /** Every linear layer, in the order of the forward pass. */
  readonly layers: readonly RefinableLinear[];
  readonly #patch: RefinableLinear;
  readonly #blocks: readonly BlockLinears[];
  readonly #output1: RefinableLinear;
  readonly #output2: RefinableLinear;
  readonly #operations: Operations;
  readonly #backward: BackwardOperations;
  readonly #workspace = new Workspace();
  readonly #context: BackwardContext;
  readonly #recompute: boolean;
  readonly #timeGroups: TimeGroups | undefined;
  #zeros = new Float32Array(0);
  #call: Call | undefined;

  constructor(readonly model: DitModel, options: GradientOptions = {}) {
    refuseTimeParameters(model);
    const parts: RefinedParts = {
      scales: true,
      zeroPoints: true,
      biases: true,
      ...options.parts,
      timeGroups: options.timeGroups?.count ?? 0,
    };
    this.#operations = new Operations(model.kernels);
    this.#backward = new BackwardOperations(model.kernels);
    this.#context = {
      operations: this.#operations,
      backward: this.#backward,
      workspace: this.#workspace,
    };
    this.#recompute = options.recompute ?? false;
    this.#timeGroups = options.timeGroups;
    const { patch, blocks, output1, output2 } = model.parts;
    const refinable = (layer: LinearLayer) => new RefinableLinear(layer, parts);
    this.#patch = refinable(patch);
    this.#blocks = blocks.map((block) =>
      Object.fromEntries(LINEARS.map((name) => [name, refinable(block[name])])) as BlockLinears
    );
    this.#output1 = refinable(output1);
    this.#output2 = refinable(output2);
    this.layers = [
      this.#patch,
      ...this.#blocks.flatMap((block) => LINEARS.map((name) => block[name])),
      this.#output1,
      this.#output2,
    ];
  }

  /** Bytes of scratch, tape included. */
  get scratchBytes(): number {
    return this.#workspace.bytes;
  }

  /**
   * What the model predicts, with the parameters as they were stored last.
   *
   * **Shapes** as `DitModel.forward`; the result is scratch
   *
   * @throws {TypeError | RangeError} when the input does not fit the model
   */
  forward(samples: Float32Array, timesteps: ArrayLike<number>, labels: ArrayLike<number>): Floats {
    const { config, parts } = this.model;
    const { hiddenSize: width, heads, headSize, sampleSize, patchSize } = config;
    const batch = this.model.checkInput(samples, timesteps, labels);
    const tokens = (sampleSize / patchSize) ** 2, count = batch * tokens;
    const call: Call = {
      timesteps,
      labels,
      batch,
      tokens,
      shape: { batch, tokens, heads, headSize },
      groups: groupsOfTokens(this.#timeGroups, timesteps, batch, tokens),
      groupsOfImages: groupsOfTokens(this.#timeGroups, timesteps, batch, 1),
    };
    this.#call = call;
    const patches = this.#take("patches", count, this.#patch.cols);
    const image = { batch, height: sampleSize, width: sampleSize, patch: config.patchSize };
    this.#operations.patchify(samples, { ...image, channels: config.channels }, patches);
    let hidden = this.#take("input.0", count, width);
    this.#patch.forward(this.#operations, patches, count, hidden, call.groups);
    for (let begin = 0; begin < hidden.length; begin += parts.positions.length) {
      for (let i = 0; i < parts.positions.length; i++) hidden[begin + i]! += parts.positions[i]!;
    }
    const waves = this.#take("waves", batch, TIMESTEP_CHANNELS);
    this.#operations.timestepEmbedding(timesteps, TIMESTEP_CHANNELS, { flipSinToCos: true }, waves);
    for (let index = 0; index < this.#blocks.length; index++) hidden = this.#runBlock(index, call);
    const { condition } = this.#runCondition(0, call); // of block 0, as diffusers has it
    const modulation = this.#take("final modulation", batch, 2 * width);
    this.#output1.forward(this.#operations, condition, batch, modulation, call.groupsOfImages);
    const normed = this.#take("final normed", count, width);
    this.#operations.layerNorm(hidden, undefined, undefined, count, width, NORM_EPSILON, normed);
    const modulated = this.#take("final modulated", count, width);
    this.#operations.modulate(
      normed,
      modulation.subarray(width),
      modulation,
      this.#modulationShape(2),
      modulated,
    );
    const pixels = this.#take("pixels", count, this.#output2.rows);
    this.#output2.forward(this.#operations, modulated, count, pixels, call.groups);
    const output = this.#take("output", batch, config.outputChannels * sampleSize ** 2);
    this.#operations.unpatchify(pixels, { ...image, channels: config.outputChannels }, output);
    return output;
  }

  /**
   * Adds to the layers' gradients what a gradient of the last call's output means for them.
   *
   * **Shapes** `doutput: f32[batch, output channels, size, size]`
   *
   * @throws {TypeError} when there was no forward pass, or the shape is not that of its output
   */
  backward(doutput: Float32Array): void {
    const call = this.#call;
    const { config } = this.model;
    const { hiddenSize: width } = config;
    if (call === undefined) {
      throw new TypeError("Cannot compute gradients: a forward pass must come before, got none");
    }
    const { batch, tokens } = call, count = batch * tokens;
    const elements = batch * config.outputChannels * config.sampleSize ** 2;
    if (doutput.length !== elements) {
      throw new TypeError(
        `Cannot compute gradients: doutput must be ${elements} numbers, got ${doutput.length}`,
      );
    }
    const dpixels = this.#take("pixel gradient", count, this.#output2.rows);
    unpatchifyBackward(doutput, config, dpixels);
    const dmodulated = this.#take("modulated gradient", count, width);
    const normed = this.#take("final normed", count, width);
    backwardLinears(
      this.#context,
      [[this.#output2, dpixels]],
      this.#take("final modulated", count, width),
      count,
      dmodulated,
      call.groups,
    );
    const modulation = this.#take("final modulation", batch, 2 * width);
    const dmodulation = this.#take("final modulation gradient", batch, 2 * width);
    this.#modulateBackward(dmodulated, normed, modulation.subarray(width), dmodulation, 0, 1, 2, dmodulated);
    const { condition } = this.#conditionTape(0, call);
    if (this.#recompute) this.#runCondition(0, call);
    const dcondition = this.#take("final condition gradient", batch, width);
    backwardLinears(
      this.#context,
      [[this.#output1, dmodulation]],
      condition,
      batch,
      dcondition,
      call.groupsOfImages,
    );
    const last = this.#take(`input.${this.#blocks.length}`, count, width);
    const gradient = this.#take("hidden gradient", count, width);
    this.#backward.layerNorm(last, dmodulated, undefined, count, width, NORM_EPSILON, gradient);
    for (let index = this.#blocks.length - 1; index >= 0; index--) {
      this.#blockBackward(index, call, gradient, index === 0 ? dcondition : undefined);
    }
    backwardLinears(
      this.#context,
      [[this.#patch, gradient]],
      this.#take("patches", count, this.#patch.cols),
      count,
      undefined,
      call.groups,
    );
  }

  #take(name: string, rows: number, cols: number): Floats {
    return this.#workspace.take(name, rows * cols);
  }

  #modulationShape(parts: number): ModulationShape {
    const { batch, tokens } = this.#call!, cols = this.model.config.hiddenSize;
    return { batch, tokens, cols, stride: parts * cols };
  }

  /** `n` zeros. */
  #zero(n: number): Float32Array {
    if (this.#zeros.length < n) this.#zeros = new Float32Array(n);
    return this.#zeros.subarray(0, n);
  }

  #conditionTape(index: number, { batch }: Call): ConditionTape {
    const { hiddenSize: width } = this.model.config;
    const suffix = this.#recompute ? "" : `.${index}`;
    const take = (name: string) => this.#take(`condition's ${name}${suffix}`, batch, width);
    return {
      inner: take("inner"),
      activated: take("activated"),
      sum: take("sum"),
      condition: take("output"),
    };
  }

  /** Runs a block's embedding of timestep and label. */
  #runCondition(index: number, call: Call): ConditionTape {
    const { batch, labels } = call, operations = this.#operations;
    const tape = this.#conditionTape(index, call), linears = this.#blocks[index]!;
    const embedding = this.#take("label embedding", batch, this.model.config.hiddenSize);
    const waves = this.#take("waves", batch, TIMESTEP_CHANNELS);
    linears.timestep1.forward(operations, waves, batch, tape.inner, call.groupsOfImages);
    operations.silu(tape.inner, tape.activated);
    linears.timestep2.forward(operations, tape.activated, batch, tape.sum, call.groupsOfImages);
    lookUpRows(this.model.kernels, this.model.parts.blocks[index]!.labels, labels, embedding);
    operations.add(tape.sum, embedding, tape.sum);
    operations.silu(tape.sum, tape.condition);
    return tape;
  }

  #tapeOf(index: number, { batch, tokens }: Call): BlockTape {
    const { hiddenSize: width } = this.model.config;
    const count = batch * tokens, suffix = this.#recompute ? "" : `.${index}`;
    const take = (name: string, cols = width) => this.#take(name + suffix, count, cols);
    return {
      input: this.#take(`input.${index}`, count, width),
      modulation: this.#take(`modulation${suffix}`, batch, 6 * width),
      normed: take("normed"),
      modulated: take("modulated"),
      query: take("query"),
      key: take("key"),
      value: take("value"),
      attended: take("attended"),
      attentionDelta: take("attention delta"),
      middle: take("middle"),
      normedAgain: take("normed again"),
      modulatedAgain: take("modulated again"),
      inner: take("inner", 4 * width),
      activated: take("activated", 4 * width),
      feedForwardDelta: take("feed-forward delta"),
    };
  }

  /** Runs a block on `input.<index>`; its output is `input.<index + 1>`. */
  #runBlock(index: number, call: Call): Floats {
    const { config, parts } = this.model;
    const { hiddenSize: width } = config;
    const operations = this.#operations, count = call.batch * call.tokens;
    const block: DitBlock = parts.blocks[index]!, linears = this.#blocks[index]!;
    const tape = this.#tapeOf(index, call), shape = this.#modulationShape(6);
    const part = (i: number) => tape.modulation.subarray(i * width);
    const { condition } = this.#runCondition(index, call);
    linears.modulation.forward(operations, condition, call.batch, tape.modulation, call.groupsOfImages);
    operations.layerNorm(tape.input, undefined, undefined, count, width, NORM_EPSILON, tape.normed);
    operations.modulate(tape.normed, part(1), part(0), shape, tape.modulated);
    linears.query.forward(operations, tape.modulated, count, tape.query, call.groups);
    linears.key.forward(operations, tape.modulated, count, tape.key, call.groups);
    linears.value.forward(operations, tape.modulated, count, tape.value, call.groups);
    operations.attention(tape.query, tape.key, tape.value, call.shape, undefined, tape.attended);
    linears.attentionOutput.forward(operations, tape.attended, count, tape.attentionDelta, call.groups);
    operations.gateAdd(tape.input, part(2), tape.attentionDelta, shape, tape.middle);
    const { normWeight, normBias } = block;
    operations.layerNorm(
      tape.middle,
      normWeight,
      normBias,
      count,
      width,
      config.normEpsilon,
      tape.normedAgain,
    );
    operations.modulate(tape.normedAgain, part(4), part(3), shape, tape.modulatedAgain);
    linears.feedForward1.forward(operations, tape.modulatedAgain, count, tape.inner, call.groups);
    operations.geluTanh(tape.inner, tape.activated);
    linears.feedForward2.forward(operations, tape.activated, count, tape.feedForwardDelta, call.groups);
    const output = this.#take(`input.${index + 1}`, count, width);
    operations.gateAdd(tape.middle, part(5), tape.feedForwardDelta, shape, output);
    return output;
  }

  /** The way back of `modulate`: `dx` may be `dy`; the gradients of shift and scale go into two of `parts` chunks of `dmodulation`. */
  #modulateBackward(
    dy: Floats,
    x: Float32Array,
    scale: Float32Array,
    dmodulation: Floats,
    shiftPart: number,
    scalePart: number,
    parts: number,
    dx: Floats,
  ): void {
    const shape = this.#modulationShape(parts), { cols } = shape;
    this.#backward.columnSums(dy, undefined, shape, dmodulation.subarray(shiftPart * cols));
    this.#backward.columnSums(dy, x, shape, dmodulation.subarray(scalePart * cols));
    this.#operations.modulate(dy, scale, this.#zero(scale.length), shape, dx);
  }

  /** Turns the gradient of a block's output into that of its input, in place; the layers' gradients grow. */
  #blockBackward(index: number, call: Call, gradient: Floats, dconditionOfOutput: Floats | undefined): void {
    if (this.#recompute) this.#runBlock(index, call);
    const { config, parts } = this.model;
    const { hiddenSize: width } = config;
    const { batch, tokens } = call, count = batch * tokens;
    const backward = this.#backward, operations = this.#operations, context = this.#context;
    const block: DitBlock = parts.blocks[index]!, linears = this.#blocks[index]!;
    const tape = this.#tapeOf(index, call), shape = this.#modulationShape(6);
    const part = (i: number) => tape.modulation.subarray(i * width);
    const dmodulation = this.#take("modulation gradient", batch, 6 * width);
    const delta = this.#take("delta gradient", count, width), zeros = this.#zero(count * width);

    backward.columnSums(gradient, tape.feedForwardDelta, shape, dmodulation.subarray(5 * width));
    operations.gateAdd(zeros, part(5), gradient, shape, delta);
    const dinner = this.#take("inner gradient", count, 4 * width);
    backwardLinears(context, [[linears.feedForward2, delta]], tape.activated, count, dinner, call.groups);
    backward.geluTanh(tape.inner, dinner, dinner);
    backwardLinears(
      context,
      [[linears.feedForward1, dinner]],
      tape.modulatedAgain,
      count,
      delta,
      call.groups,
    );
    this.#modulateBackward(delta, tape.normedAgain, part(4), dmodulation, 3, 4, 6, delta);
    backward.layerNorm(tape.middle, delta, block.normWeight, count, width, config.normEpsilon, delta);
    operations.add(gradient, delta, gradient);

    backward.columnSums(gradient, tape.attentionDelta, shape, dmodulation.subarray(2 * width));
    operations.gateAdd(zeros, part(2), gradient, shape, delta);
    const dattended = this.#take("attended gradient", count, width);
    backwardLinears(
      context,
      [[linears.attentionOutput, delta]],
      tape.attended,
      count,
      dattended,
      call.groups,
    );
    const [dq, dk, dv] = ["query", "key", "value"].map((name) =>
      this.#take(`${name} gradient`, count, width)
    ) as [Floats, Floats, Floats];
    const { query: q, key: k, value: v, attended: out } = tape;
    backward.attention({ q, k, v, out }, dattended, call.shape, undefined, { dq, dk, dv });
    backwardLinears(
      context,
      [[linears.query, dq], [linears.key, dk], [linears.value, dv]],
      tape.modulated,
      count,
      delta,
      call.groups,
    );
    this.#modulateBackward(delta, tape.normed, part(1), dmodulation, 0, 1, 6, delta);
    backward.layerNorm(tape.input, delta, undefined, count, width, NORM_EPSILON, delta);
    operations.add(gradient, delta, gradient);

    const condition = this.#conditionTape(index, call);
    const dcondition = this.#take("condition gradient", batch, width);
    backwardLinears(
      context,
      [[linears.modulation, dmodulation]],
      condition.condition,
      batch,
      dcondition,
      call.groupsOfImages,
    );
    if (dconditionOfOutput !== undefined) operations.add(dcondition, dconditionOfOutput, dcondition);
    backward.silu(condition.sum, dcondition, dcondition);
    const dactivated = this.#take("activated gradient", batch, width);
    backwardLinears(
      context,
      [[linears.timestep2, dcondition]],
      condition.activated,
      batch,
      dactivated,
      call.groupsOfImages,
    );
    backward.silu(condition.inner, dactivated, dactivated);
    const waves = this.#take("waves", batch, TIMESTEP_CHANNELS);
    backwardLinears(context, [[linears.timestep1, dactivated]], waves, batch, undefined, call.groupsOfImages);
  }
}
