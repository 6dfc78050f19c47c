/**
 * Gradients of a DiT with respect to its packed layers' scales, zero points and biases, the conditioning's layers
 * included. The forward pass is the model's, with a tape; blocks can be run twice instead, so that memory does not grow
 * with their number.
 */
import { type DitConfig, NORM_EPSILON, TIMESTEP_CHANNELS } from "../dit/config.ts";
import {
  type BlockTape,
  type ConditionTape,
  type DitPass,
  embed,
  embedTimesteps,
  type ImageConditions,
  modulationShape,
  type ModulationTape,
  runBlock,
  runCondition,
  runOutput,
  tokensOf,
} from "../dit/forward.ts";
import type { DitModel } from "../dit/model.ts";
import { add, gateAdd, modulate } from "../layers/elementwise.ts";
import type { LinearLayer } from "../layers/tensors.ts";
import {
  attentionBackward,
  columnSums,
  geluTanhBackward,
  layerNormBackward,
  siluBackward,
} from "./kernels.ts";
import { type GradientOptions, RefinableLayers, type RefinableLinear } from "./linear.ts";

type Floats = Float32Array<ArrayBuffer>;

/** One call's input. */
interface Call extends ImageConditions {
  readonly batch: number;
  /** Tokens of all images. */
  readonly count: number;
  /** Time group of every token, and of every image. */
  readonly groups: Int32Array | undefined;
  readonly groupsOfImages: Int32Array | undefined;
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
  readonly #linears: RefinableLayers;
  readonly #pass: DitPass;
  #zeros = new Float32Array(0);
  #call: Call | undefined;

  constructor(readonly model: DitModel, options: GradientOptions = {}) {
    const { kernels, config, parts } = model, linears = new RefinableLayers(model, options);
    this.#linears = linears;
    this.#pass = {
      kernels,
      config,
      parts,
      workspace: linears.workspace,
      linear: (layer, x, rows, out) => {
        const { batch, groups, groupsOfImages } = this.#call!;
        linears.forward(layer, x, rows, out, rows === batch ? groupsOfImages : groups);
      },
    };
  }

  /** Every linear layer, in the order of the forward pass. */
  get layers(): readonly RefinableLinear[] {
    return this.#linears.layers;
  }

  /** Bytes of scratch, tape included. */
  get scratchBytes(): number {
    return this.#linears.workspace.bytes;
  }

  /**
   * The model's prediction, with the parameters as they were stored last.
   *
   * **Shapes** as `DitModel.forward`; the result is scratch
   *
   * @throws {TypeError | RangeError} when the input does not fit the model
   */
  forward(samples: Float32Array, timesteps: ArrayLike<number>, labels: ArrayLike<number>): Floats {
    const { config } = this.model;
    const batch = this.model.checkInput(samples, timesteps, labels), tokens = tokensOf(config);
    const groups = this.#linears.groupsOf(timesteps, batch, tokens);
    const groupsOfImages = this.#linears.groupsOf(timesteps, batch, 1);
    const call: Call = { timesteps, labels, batch, count: batch * tokens, groups, groupsOfImages };
    this.#call = call;
    let hidden = this.#take("input.0", call.count, config.hiddenSize);
    embed(this.#pass, samples, batch, hidden);
    embedTimesteps(this.#pass, timesteps);
    for (let index = 0; index < config.blocks; index++) {
      hidden = runBlock(this.#pass, index, call, hidden, this.#tapeOf(index, call));
    }
    return runOutput(this.#pass, call, hidden, {
      ...this.#modulationTape((name) => `final ${name}`, 2, call),
      condition: this.#conditionTape(0, call),
    });
  }

  /**
   * Adds to the layers' gradients those of a loss with this gradient of the last call's output.
   *
   * **Shapes** `doutput: f32[batch, output channels, size, size]`
   *
   * @throws {TypeError} when there was no forward pass, or the shape is not that of its output
   */
  backward(doutput: Float32Array): void {
    const call = this.#call, { kernels, config, parts } = this.model, { hiddenSize: width } = config;
    if (call === undefined) {
      throw new TypeError("Cannot compute gradients: a forward pass must come before, got none");
    }
    const { batch, count, groups, groupsOfImages } = call, linears = this.#linears;
    const elements = batch * config.outputChannels * config.sampleSize ** 2;
    if (doutput.length !== elements) {
      throw new TypeError(
        `Cannot compute gradients: doutput must be ${elements} numbers, got ${doutput.length}`,
      );
    }
    const dpixels = this.#take("pixel gradient", count, parts.output2.weights.rows);
    unpatchifyBackward(doutput, config, dpixels);
    const tape = this.#modulationTape((name) => `final ${name}`, 2, call);
    const dmodulated = this.#take("modulated gradient", count, width);
    linears.backward([[parts.output2, dpixels]], tape.modulated, count, dmodulated, groups);
    const dmodulation = this.#take("final modulation gradient", batch, 2 * width);
    this.#modulateBackward(call, dmodulated, tape.normed, tape.modulation, dmodulation, [0, 1, 2]);
    const { condition } = this.#conditionTape(0, call);
    if (linears.recompute) runCondition(this.#pass, 0, call, this.#conditionTape(0, call));
    const dcondition = this.#take("final condition gradient", batch, width);
    linears.backward([[parts.output1, dmodulation]], condition, batch, dcondition, groupsOfImages);
    const last = this.#take(`input.${config.blocks}`, count, width);
    const gradient = this.#take("hidden gradient", count, width);
    const norm = { rows: count, cols: width, epsilon: NORM_EPSILON };
    layerNormBackward(kernels, last, dmodulated, norm, gradient);
    for (let index = config.blocks - 1; index >= 0; index--) {
      this.#blockBackward(index, call, gradient, index === 0 ? dcondition : undefined);
    }
    const patches = this.#take("patches", count, parts.patch.weights.cols);
    linears.backward([[parts.patch, gradient]], patches, count, undefined, groups);
  }

  #take(name: string, rows: number, cols: number): Floats {
    return this.#linears.take(name, rows, cols);
  }

  /** `n` zeros. */
  #zero(n: number): Float32Array {
    if (this.#zeros.length < n) this.#zeros = new Float32Array(n);
    return this.#zeros.subarray(0, n);
  }

  #modulationTape(nameOf: (name: string) => string, chunks: number, { batch, count }: Call): ModulationTape {
    const { hiddenSize: width } = this.model.config;
    return {
      modulation: this.#take(nameOf("modulation"), batch, chunks * width),
      normed: this.#take(nameOf("normed"), count, width),
      modulated: this.#take(nameOf("modulated"), count, width),
    };
  }

  #conditionTape(index: number, { batch }: Call): ConditionTape {
    const { hiddenSize: width } = this.model.config;
    const take = (name: string) =>
      this.#take(this.#linears.nameIn(index, `condition's ${name}`), batch, width);
    return {
      inner: take("inner"),
      activated: take("activated"),
      embedding: this.#take("label embedding", batch, width),
      sum: take("sum"),
      condition: take("output"),
    };
  }

  #tapeOf(index: number, call: Call): BlockTape {
    const { hiddenSize: width } = this.model.config, { count } = call;
    const nameOf = (name: string) => this.#linears.nameIn(index, name);
    const take = (name: string, cols = width) => this.#take(nameOf(name), count, cols);
    return {
      ...this.#modulationTape(nameOf, 6, call),
      condition: this.#conditionTape(index, call),
      input: this.#take(`input.${index}`, count, width),
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
      output: this.#take(`input.${index + 1}`, count, width),
    };
  }

  /**
   * The backward pass of `modulate`, in place. The gradients of shift and scale go into two chunks of `dmodulation`.
   *
   * @param chunks indices of shift and scale, and the number of chunks
   */
  #modulateBackward(
    call: Call,
    dy: Floats,
    x: Float32Array,
    modulation: Floats,
    dmodulation: Floats,
    [shift, scale, chunks]: readonly [shift: number, scale: number, chunks: number],
  ): void {
    const { kernels } = this.model, shape = modulationShape(this.#pass, call, chunks), { cols } = shape;
    columnSums(kernels, dy, undefined, shape, dmodulation.subarray(shift * cols));
    columnSums(kernels, dy, x, shape, dmodulation.subarray(scale * cols));
    const rows = modulation.subarray(scale * cols);
    modulate(kernels, dy, { scale: rows, shift: this.#zero(rows.length) }, shape, dy);
  }

  /** Turns the gradient of a block's output into that of its input, in place; the layers' gradients grow. */
  #blockBackward(index: number, call: Call, gradient: Floats, dconditionOfOutput: Floats | undefined): void {
    const tape = this.#tapeOf(index, call);
    if (this.#linears.recompute) runBlock(this.#pass, index, call, tape.input, tape);
    const dmodulation = this.#take("modulation gradient", call.batch, 6 * this.model.config.hiddenSize);
    this.#feedForwardBackward(index, call, tape, gradient, dmodulation);
    this.#attentionBackward(index, call, tape, gradient, dmodulation);
    this.#conditionBackward(index, call, tape, dmodulation, dconditionOfOutput);
  }

  #feedForwardBackward(
    index: number,
    call: Call,
    tape: BlockTape,
    gradient: Floats,
    dmodulation: Floats,
  ): void {
    const { kernels, config: { hiddenSize: width, normEpsilon: epsilon }, parts } = this.model;
    const { count, groups } = call, shape = modulationShape(this.#pass, call, 6), linears = this.#linears;
    const block = parts.blocks[index]!, delta = this.#take("delta gradient", count, width);
    columnSums(kernels, gradient, tape.feedForwardDelta, shape, dmodulation.subarray(5 * width));
    const gate = tape.modulation.subarray(5 * width);
    gateAdd(kernels, this.#zero(count * width), gate, gradient, shape, delta);
    const dinner = this.#take("inner gradient", count, 4 * width);
    linears.backward([[block.feedForward2, delta]], tape.activated, count, dinner, groups);
    geluTanhBackward(kernels, tape.inner, dinner, dinner);
    linears.backward([[block.feedForward1, dinner]], tape.modulatedAgain, count, delta, groups);
    this.#modulateBackward(call, delta, tape.normedAgain, tape.modulation, dmodulation, [3, 4, 6]);
    const norm = { rows: count, cols: width, weight: block.normWeight, epsilon };
    layerNormBackward(kernels, tape.middle, delta, norm, delta);
    add(kernels, gradient, delta, gradient);
  }

  #attentionBackward(
    index: number,
    call: Call,
    tape: BlockTape,
    gradient: Floats,
    dmodulation: Floats,
  ): void {
    const { kernels, config: { hiddenSize: width, heads, headSize }, parts } = this.model;
    const { batch, count, groups } = call,
      shape = modulationShape(this.#pass, call, 6),
      linears = this.#linears;
    const block = parts.blocks[index]!, delta = this.#take("delta gradient", count, width);
    columnSums(kernels, gradient, tape.attentionDelta, shape, dmodulation.subarray(2 * width));
    const gate = tape.modulation.subarray(2 * width);
    gateAdd(kernels, this.#zero(count * width), gate, gradient, shape, delta);
    const dattended = this.#take("attended gradient", count, width);
    linears.backward([[block.attentionOutput, delta]], tape.attended, count, dattended, groups);
    const dq = this.#take("query gradient", count, width), dk = this.#take("key gradient", count, width);
    const dv = this.#take("value gradient", count, width);
    const { query: q, key: k, value: v, attended: out } = tape;
    const attentionShape = { batch, tokens: shape.tokens, heads, headSize };
    attentionBackward(kernels, { q, k, v, out }, dattended, attentionShape, { dq, dk, dv });
    const read: readonly (readonly [LinearLayer, Floats])[] = [
      [block.query, dq],
      [block.key, dk],
      [block.value, dv],
    ];
    linears.backward(read, tape.modulated, count, delta, groups);
    this.#modulateBackward(call, delta, tape.normed, tape.modulation, dmodulation, [0, 1, 6]);
    layerNormBackward(kernels, tape.input, delta, { rows: count, cols: width, epsilon: NORM_EPSILON }, delta);
    add(kernels, gradient, delta, gradient);
  }

  #conditionBackward(
    index: number,
    { batch, groupsOfImages: groups }: Call,
    { condition: tape }: BlockTape,
    dmodulation: Floats,
    dconditionOfOutput: Floats | undefined,
  ): void {
    const { kernels, config: { hiddenSize: width }, parts } = this.model, linears = this.#linears;
    const block = parts.blocks[index]!, dcondition = this.#take("condition gradient", batch, width);
    linears.backward([[block.modulation, dmodulation]], tape.condition, batch, dcondition, groups);
    if (dconditionOfOutput !== undefined) add(kernels, dcondition, dconditionOfOutput, dcondition);
    siluBackward(kernels, tape.sum, dcondition, dcondition);
    const dactivated = this.#take("activated gradient", batch, width);
    linears.backward([[block.timestep2, dcondition]], tape.activated, batch, dactivated, groups);
    siluBackward(kernels, tape.inner, dactivated, dactivated);
    const waves = this.#take("waves", batch, TIMESTEP_CHANNELS);
    linears.backward([[block.timestep1, dactivated]], waves, batch, undefined, groups);
  }
}

/** The backward pass of `unpatchify`. */
function unpatchifyBackward(images: Float32Array, config: DitConfig, out: Float32Array): void {
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
