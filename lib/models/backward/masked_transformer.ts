/**
 * Gradients of a masked transformer (Dream, LLaDA) with respect to its packed layers' scales, zero points and biases. The
 * forward pass is the model's, with a tape; blocks can be run twice instead, so that memory does not grow with their
 * number.
 */
import { add } from "../layers/elementwise.ts";
import { rotary } from "../layers/attention.ts";
import type { LinearLayer } from "../layers/tensors.ts";
import {
  type BlockTape,
  embed,
  positionsOf,
  runBlock,
  runHead,
  scaleInPlace,
  type SequenceCall,
  type TransformerPass,
} from "../masked/forward.ts";
import type { MaskedTransformer } from "../masked/transformer.ts";
import { attentionBackward, rmsNormBackward, siluMultiplyBackward } from "./kernels.ts";
import { type GradientOptions, RefinableLayers, type RefinableLinear } from "./linear.ts";

type Floats = Float32Array<ArrayBuffer>;

/** One call's input. */
interface Call extends SequenceCall {
  readonly rows: Int32Array;
  /** Time group of every position, and of the wanted rows. */
  readonly groups: Int32Array | undefined;
  readonly groupsOfRows: Int32Array | undefined;
}

/**
 * A masked transformer whose packed layers can be refined.
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 * import { loadDream } from "../masked/dream.ts";
 * import { MaskedTransformerGradients } from "./masked_transformer.ts";
 * const model = loadDream("tests/models/dream-mini", await openKernels());
 * const gradients = new MaskedTransformerGradients(model);
 * const logits = gradients.forward(Int32Array.of(2, 8, 11, 14), 1, Int32Array.of(3));
 * gradients.backward(logits.map(() => 1)); // of the sum of the logits; nothing is packed here, nothing to refine
 * console.log(gradients.layers.flatMap((layer) => layer.parameters).length); // 0
 * ```
 */
export class MaskedTransformerGradients {
  readonly #linears: RefinableLayers;
  readonly #pass: TransformerPass;
  #call: Call | undefined;

  constructor(readonly model: MaskedTransformer, options: GradientOptions = {}) {
    const { kernels, config, parts } = model, { head, embedding } = parts;
    // A head that is the embedding, too, stays as it is.
    const linears = new RefinableLayers(
      model,
      options,
      head.weights === embedding.weights ? head : undefined,
    );
    this.#linears = linears;
    this.#pass = {
      kernels,
      config,
      parts,
      workspace: linears.workspace,
      linear: (layer, x, count, out, positions) => {
        const { groups, groupsOfRows } = this.#call!;
        linears.forward(layer, x, count, out, positions === undefined ? groups : groupsOfRows);
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
   * Logits of the wanted rows, with the parameters as they were stored last.
   *
   * **Shapes** `inputIds: i32[batch, tokens]`, `rows: i32[n]` flat positions → `f32[n, vocabulary]`, scratch
   *
   * @throws {TypeError | RangeError} when the input does not fit the model
   */
  forward(
    inputIds: Int32Array,
    batch: number,
    rows: Int32Array,
    attentionMask?: Uint8Array,
    times?: ArrayLike<number>,
  ): Floats {
    const { hiddenSize, blocks } = this.model.config;
    const tokens = this.model.checkInput(inputIds, batch, { rows, attentionMask });
    const groups = this.#linears.groupsOf(times, batch, tokens);
    const groupsOfRows = groups && rows.map((row) => groups[row]!);
    const positions = positionsOf(batch, tokens, attentionMask);
    const call: Call = { batch, tokens, positions, attentionMask, rows, groups, groupsOfRows };
    this.#call = call;
    let hidden = this.#take("input.0", batch * tokens, hiddenSize);
    embed(this.#pass, inputIds, hidden);
    for (let index = 0; index < blocks; index++) {
      hidden = runBlock(this.#pass, index, call, hidden, this.#tapeOf(index, call));
    }
    return runHead(this.#pass, hidden, rows, this.#take("final", rows.length, hiddenSize));
  }

  /**
   * Adds to the layers' gradients those of a loss with this gradient of the last call's logits.
   *
   * **Shapes** `dlogits: f32[n, vocabulary]`
   *
   * @throws {TypeError} when there was no forward pass, or the shape is not that of its logits
   */
  backward(dlogits: Float32Array): void {
    const call = this.#call;
    const { kernels, config, parts } = this.model, { hiddenSize, vocabularySize, normEpsilon } = config;
    if (call === undefined) {
      throw new TypeError("Cannot compute gradients: a forward pass must come before, got none");
    }
    const count = call.rows.length;
    if (dlogits.length !== count * vocabularySize) {
      throw new TypeError(
        `Cannot compute gradients: dlogits must be [${count}, ${vocabularySize}], got ${dlogits.length} numbers`,
      );
    }
    const dy = this.#take("logit gradient", count, vocabularySize);
    dy.set(dlogits);
    scaleInPlace(dy, config.logitScale);
    const dhidden = this.#take("hidden gradient", count, hiddenSize);
    const input = this.#take("final", count, hiddenSize);
    this.#linears.backward([[parts.head, dy]], input, count, dhidden, call.groupsOfRows);
    const last = this.#take(`input.${config.blocks}`, count, hiddenSize);
    const norm = { rows: count, cols: hiddenSize, weight: parts.finalNorm, epsilon: normEpsilon };
    rmsNormBackward(kernels, last, dhidden, norm, dhidden);
    let gradient = dhidden;
    for (let index = config.blocks - 1; index >= 0; index--) {
      gradient = this.#blockBackward(index, call, gradient);
    }
  }

  #take(name: string, rows: number, cols: number): Floats {
    return this.#linears.take(name, rows, cols);
  }

  /** Whether a block ends on the wanted rows alone: behind the last attention no position reads another. */
  #endsOnRows(index: number): boolean {
    return index === this.model.config.blocks - 1;
  }

  #tapeOf(index: number, { batch, tokens, rows }: Call): BlockTape {
    const { hiddenSize, intermediateSize, heads, keyValueHeads, headSize } = this.model.config;
    const all = batch * tokens, behind = this.#endsOnRows(index) ? rows.length : all;
    const take = (name: string, rows: number, cols: number) =>
      this.#take(this.#linears.nameIn(index, name), rows, cols);
    const width = heads * headSize, attended = take("attended", all, width);
    return {
      input: this.#take(`input.${index}`, all, hiddenSize),
      normed: take("normed", all, hiddenSize),
      query: take("query", all, width),
      key: take("key", all, keyValueHeads * headSize),
      value: take("value", all, keyValueHeads * headSize),
      attended,
      attendedRows: this.#endsOnRows(index) ? take("attendedRows", behind, width) : attended,
      middle: take("middle", behind, hiddenSize),
      normedAgain: take("normedAgain", behind, hiddenSize),
      gate: take("gate", behind, intermediateSize),
      up: take("up", behind, intermediateSize),
      gated: take("gated", behind, intermediateSize),
      output: this.#take(`input.${index + 1}`, behind, hiddenSize),
    };
  }

  /** The gradient of a block's input; the layers' gradients grow. */
  #blockBackward(index: number, call: Call, doutput: Floats): Floats {
    const tape = this.#tapeOf(index, call);
    if (this.#linears.recompute) runBlock(this.#pass, index, call, tape.input, tape);
    return this.#attentionBackward(index, call, tape, this.#feedForwardBackward(index, call, tape, doutput));
  }

  /** The gradient of `middle`, in place of that of the block's output. */
  #feedForwardBackward(index: number, call: Call, tape: BlockTape, doutput: Floats): Floats {
    const { kernels, config: { hiddenSize, intermediateSize, normEpsilon }, parts } = this.model;
    const block = parts.blocks[index]!, linears = this.#linears;
    const count = doutput.length / hiddenSize, groups = this.#groupsBehind(index, call);
    const dgated = this.#take("gated gradient", count, intermediateSize);
    const dup = this.#take("up gradient", count, intermediateSize);
    linears.backward([[block.down, doutput]], tape.gated, count, dgated, groups);
    siluMultiplyBackward(kernels, tape, dgated, { dgate: dgated, dup });
    const dnormed = this.#take("normed gradient", count, hiddenSize);
    const read: readonly (readonly [LinearLayer, Floats])[] = [[block.gate, dgated], [block.up, dup]];
    linears.backward(read, tape.normedAgain, count, dnormed, groups);
    const norm = { rows: count, cols: hiddenSize, weight: block.feedForwardNorm, epsilon: normEpsilon };
    rmsNormBackward(kernels, tape.middle, dnormed, norm, dnormed);
    return add(kernels, doutput, dnormed, doutput);
  }

  /** The gradient of the block's input from that of `middle`. */
  #attentionBackward(index: number, call: Call, tape: BlockTape, dmiddle: Floats): Floats {
    const { kernels, config, parts } = this.model, { batch, tokens, positions, rows } = call;
    const { hiddenSize, heads, keyValueHeads: kvHeads, headSize, normEpsilon, rotaryTheta: theta } = config;
    const block = parts.blocks[index]!, linears = this.#linears, width = heads * headSize;
    const all = batch * tokens, count = dmiddle.length / hiddenSize;
    const dattendedRows = this.#take("attended rows gradient", count, width);
    const groupsBehind = this.#groupsBehind(index, call);
    linears.backward(
      [[block.attentionOutput, dmiddle]],
      tape.attendedRows,
      count,
      dattendedRows,
      groupsBehind,
    );
    let dattended = dattendedRows, dinput = dmiddle;
    if (this.#endsOnRows(index)) {
      dattended = scatter(dattendedRows, rows, width, this.#take("attended gradient", all, width));
      dinput = scatter(dmiddle, rows, hiddenSize, this.#take("input.gradient", all, hiddenSize));
    }
    const dq = this.#take("query gradient", all, width);
    const dk = this.#take("key gradient", all, kvHeads * headSize);
    const dv = this.#take("value gradient", all, kvHeads * headSize);
    const { query: q, key: k, value: v, attended: out } = tape, keyMask = call.attentionMask;
    const shape = { batch, tokens, heads, kvHeads, headSize };
    attentionBackward(kernels, { q, k, v, keyMask, out }, dattended, shape, { dq, dk, dv });
    const backwards = positions.map((position) => -position);
    rotary(kernels, dq, backwards, { heads, headSize, theta });
    rotary(kernels, dk, backwards, { heads: kvHeads, headSize, theta });
    // Nothing in front of the first block is refined.
    const dnormed = index === 0 ? undefined : this.#take("attention's normed gradient", all, hiddenSize);
    const read: readonly (readonly [LinearLayer, Floats])[] = [
      [block.query, dq],
      [block.key, dk],
      [block.value, dv],
    ];
    linears.backward(read, tape.normed, all, dnormed, call.groups);
    if (dnormed === undefined) return dinput;
    const norm = { rows: all, cols: hiddenSize, weight: block.attentionNorm, epsilon: normEpsilon };
    rmsNormBackward(kernels, tape.input, dnormed, norm, dnormed);
    return add(kernels, dinput, dnormed, dinput);
  }

  #groupsBehind(index: number, { groups, groupsOfRows }: Call): Int32Array | undefined {
    return this.#endsOnRows(index) ? groupsOfRows : groups;
  }
}

/** The backward pass of `gather`: rows that stand several times add up, others are 0. */
function scatter(from: Float32Array, rows: Int32Array, cols: number, to: Floats): Floats {
  to.fill(0);
  for (let i = 0; i < rows.length; i++) {
    const begin = rows[i]! * cols;
    for (let col = 0; col < cols; col++) to[begin + col]! += from[i * cols + col]!;
  }
  return to;
}
