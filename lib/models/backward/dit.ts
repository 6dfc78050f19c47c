/**
 * Gradients of a DiT with respect to its packed layers' scales, zero points and biases, the conditioning's
 * layers included. The forward pass is the model's, with a tape; blocks can be run twice instead, so that
 * memory does not grow with their number.
 */
import { type DitConfig, NORM_EPSILON, TIMESTEP_CHANNELS } from "../dit/config.ts";
import {
  type DitBlockValue,
  type DitPass,
  embed,
  embedTimesteps,
  type ImageConditions,
  modulationShape,
  type OutputValue,
  runBlock,
  runCondition,
  runOutput,
  tokensOf,
} from "../dit/forward.ts";
import type { DitModel } from "../dit/model.ts";
import type { DitBlock } from "../dit/weights.ts";
import { add, gateAdd, modulate } from "../layers/elementwise.ts";
import { Tape } from "../layers/tape.ts";
import {
  attentionBackward,
  columnSums,
  geluTanhBackward,
  layerNormBackward,
  siluBackward,
} from "./kernels.ts";
import { type GradientOptions, ModelGradients, RefinableLayers } from "./linear.ts";

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

/** A block on the way back. */
interface BlockCall {
  readonly call: Call;
  readonly block: DitBlock;
  readonly tape: Tape<DitBlockValue>;
  /** The gradient of the block's output, which becomes that of its input. */
  readonly gradient: Floats;
  /** The gradient of the block's modulation. */
  readonly dmodulation: Floats;
}

/** A DiT whose packed layers can be refined. */
export class DitGradients extends ModelGradients<Call, DitBlockValue> {
  readonly #pass: DitPass;
  #zeros = new Float32Array(0);
  readonly #finalTape: Tape<OutputValue>;

  constructor(readonly model: DitModel, options: GradientOptions = {}) {
    const { kernels, config, parts } = model, linears = new RefinableLayers(model, options);
    super(linears);
    this.#finalTape = new Tape(linears.workspace, (name) => name);
    const linear: DitPass["linear"] = (layer, x, rows, out) => {
      const { batch, groups, groupsOfImages } = this.call!;
      linears.forward(layer, x, rows, out, rows === batch ? groupsOfImages : groups);
    };
    this.#pass = {
      ...{ observe: undefined, run: linear, linear },
      kernels,
      config,
      parts,
      workspace: linears.workspace,
      table: (table) => table,
    };
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
    const groups = this.linears.groupsOf(timesteps, batch, tokens);
    const groupsOfImages = this.linears.groupsOf(timesteps, batch, 1);
    const call: Call = { timesteps, labels, batch, count: batch * tokens, groups, groupsOfImages };
    this.call = call;
    const input = this.take("input.0", call.count, config.hiddenSize);
    embed(this.#pass, samples, batch, input);
    embedTimesteps(this.#pass, timesteps);
    const hidden = this.runBlocks(
      config.blocks,
      input,
      (index, x, tape) => runBlock(this.#pass, index, call, x, tape),
    );
    return runOutput(this.#pass, call, hidden, this.#finalTape, this.tapes[0]);
  }

  /**
   * Adds to the layers' gradients those of a loss with this gradient of the last call's output.
   *
   * **Shapes** `doutput: f32[batch, output channels, size, size]`
   *
   * @throws {TypeError} when there was no forward pass, or the shape is not that of its output
   */
  backward(doutput: Float32Array): void {
    const { kernels, config, parts } = this.model, { hiddenSize: width } = config, { linears } = this;
    const { outputChannels, sampleSize: size } = config;
    const call = this.callBehind("doutput", doutput, ({ batch }) => [batch, outputChannels, size, size]);
    const { batch, count, groups, groupsOfImages } = call;
    const dpixels = this.take("pixel gradient", count, parts.output2.weights.rows);
    unpatchifyBackward(doutput, config, dpixels);
    const tape = this.#finalTape, first = this.tapes[0]!;
    const dmodulated = this.take("modulated gradient", count, width);
    linears.backward([[parts.output2, dpixels]], tape.get("finalModulated"), dmodulated, groups);
    const dmodulation = this.take("final modulation gradient", batch, 2 * width);
    const modulation = tape.get("finalModulation");
    this.#modulateBackward(call, dmodulated, tape.get("finalNormed"), modulation, dmodulation, [0, 1, 2]);
    if (linears.recompute) runCondition(this.#pass, 0, call, first);
    const dcondition = this.take("final condition gradient", batch, width);
    linears.backward([[parts.output1, dmodulation]], first.get("condition"), dcondition, groupsOfImages);
    const last = this.take(`input.${config.blocks}`, count, width);
    const gradient = this.take("hidden gradient", count, width);
    layerNormBackward(
      kernels,
      last,
      dmodulated,
      { rows: count, cols: width, epsilon: NORM_EPSILON },
      gradient,
    );
    for (let index = config.blocks - 1; index >= 0; index--) {
      this.#blockBackward(index, call, gradient, index === 0 ? dcondition : undefined);
    }
    const patches = this.take("patches", count, parts.patch.weights.cols);
    linears.backward([[parts.patch, gradient]], patches, undefined, groups);
  }

  /** `n` zeros. */
  #zero(n: number): Float32Array {
    if (this.#zeros.length < n) this.#zeros = new Float32Array(n);
    return this.#zeros.subarray(0, n);
  }

  /**
   * The backward pass of `modulate`, in place. The gradients of shift and scale go into two chunks of
   * `dmodulation`.
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
    const tape = this.tapes[index]!, { config: { hiddenSize: width }, parts } = this.model;
    const input = this.take(`input.${index}`, call.count, width);
    if (this.linears.recompute) runBlock(this.#pass, index, call, input, tape);
    const dmodulation = this.take("modulation gradient", call.batch, 6 * width);
    const own: BlockCall = { call, block: parts.blocks[index]!, tape, gradient, dmodulation };
    this.#feedForwardBackward(own);
    this.#attentionBackward(own, input);
    this.#conditionBackward(own, dconditionOfOutput);
  }

  /** The gradient of a branch from that of its gated sum; chunk `index` of `dmodulation` gets the gate's. */
  #gateBackward(
    { call, tape, gradient, dmodulation }: BlockCall,
    branch: "attentionDelta" | "feedForwardDelta",
    index: number,
  ): Floats {
    const { kernels } = this.model, shape = modulationShape(this.#pass, call, 6), at = index * shape.cols;
    const delta = this.take("delta gradient", call.count, shape.cols);
    columnSums(kernels, gradient, tape.get(branch), shape, dmodulation.subarray(at));
    const gate = tape.get("modulation").subarray(at);
    return gateAdd(kernels, this.#zero(delta.length), gate, gradient, shape, delta);
  }

  #feedForwardBackward(own: BlockCall): void {
    const { call, call: { count, groups }, block, tape, gradient, dmodulation } = own;
    const { kernels, config: { hiddenSize: width, normEpsilon: epsilon } } = this.model,
      linears = this.linears;
    const delta = this.#gateBackward(own, "feedForwardDelta", 5);
    const dinner = this.take("inner gradient", count, 4 * width);
    linears.backward([[block.feedForward2, delta]], tape.get("activated"), dinner, groups);
    geluTanhBackward(kernels, tape.get("inner"), dinner, dinner);
    linears.backward([[block.feedForward1, dinner]], tape.get("modulatedAgain"), delta, groups);
    const modulation = tape.get("modulation");
    this.#modulateBackward(call, delta, tape.get("normedAgain"), modulation, dmodulation, [3, 4, 6]);
    const norm = { rows: count, cols: width, weight: block.normWeight, epsilon };
    layerNormBackward(kernels, tape.get("middle"), delta, norm, delta);
    add(kernels, gradient, delta, gradient);
  }

  #attentionBackward(own: BlockCall, input: Floats): void {
    const { call, call: { batch, count, groups }, block, tape, gradient, dmodulation } = own;
    const { kernels, config: { hiddenSize: width, heads, headSize } } = this.model, linears = this.linears;
    const delta = this.#gateBackward(own, "attentionDelta", 2);
    const dattended = this.take("attended gradient", count, width), out = tape.get("attended");
    linears.backward([[block.attentionOutput, delta]], out, dattended, groups);
    const dq = this.take("query gradient", count, width), dk = this.take("key gradient", count, width);
    const dv = this.take("value gradient", count, width);
    const inputs = { q: tape.get("query"), k: tape.get("key"), v: tape.get("value"), out };
    const shape = { batch, tokens: count / batch, heads, headSize };
    attentionBackward(kernels, inputs, dattended, shape, { dq, dk, dv });
    const { query, key, value } = block;
    linears.backward([[query, dq], [key, dk], [value, dv]], tape.get("modulated"), delta, groups);
    const modulation = tape.get("modulation");
    this.#modulateBackward(call, delta, tape.get("normed"), modulation, dmodulation, [0, 1, 6]);
    layerNormBackward(kernels, input, delta, { rows: count, cols: width, epsilon: NORM_EPSILON }, delta);
    add(kernels, gradient, delta, gradient);
  }

  #conditionBackward(
    { call: { batch, groupsOfImages: groups }, block, tape, dmodulation }: BlockCall,
    dconditionOfOutput: Floats | undefined,
  ): void {
    const { kernels, config: { hiddenSize: width } } = this.model, linears = this.linears;
    const dcondition = this.take("condition gradient", batch, width);
    linears.backward([[block.modulation, dmodulation]], tape.get("condition"), dcondition, groups);
    if (dconditionOfOutput !== undefined) add(kernels, dcondition, dconditionOfOutput, dcondition);
    siluBackward(kernels, tape.get("conditionSum"), dcondition, dcondition);
    const dactivated = this.take("activated gradient", batch, width);
    linears.backward([[block.timestep2, dcondition]], tape.get("conditionActivated"), dactivated, groups);
    siluBackward(kernels, tape.get("conditionInner"), dactivated, dactivated);
    const waves = this.take("waves", batch, TIMESTEP_CHANNELS);
    linears.backward([[block.timestep1, dactivated]], waves, undefined, groups);
  }
}

/** The backward pass of `unpatchify`. */
function unpatchifyBackward(images: Float32Array, config: DitConfig, out: Float32Array): void {
  const { outputChannels: channels, sampleSize: size, patchSize: patch } = config;
  const side = size / patch, batch = images.length / (channels * size * size);
  for (let at = 0, token = 0; token < batch * side * side; token++) {
    const b = Math.floor(token / side ** 2), y = Math.floor(token / side) % side, x = token % side;
    for (let p = 0; p < patch; p++) {
      for (let q = 0; q < patch; q++) {
        for (let c = 0; c < channels; c++) {
          out[at++] = images[((b * channels + c) * size + y * patch + p) * size + x * patch + q]!;
        }
      }
    }
  }
}
