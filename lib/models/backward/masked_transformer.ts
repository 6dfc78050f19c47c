/**
 * Gradients of a masked transformer (Dream, LLaDA) with respect to its packed layers' scales, zero points and
 * biases. The forward pass is the model's, with a tape; blocks can be run twice instead, so that memory does
 * not grow with their number.
 */
import { add } from "../layers/elementwise.ts";
import { rotary } from "../layers/attention.ts";
import type { Tape } from "../layers/tape.ts";
import {
  embed,
  positionsOf,
  runBlock,
  runHead,
  scaleInPlace,
  type SequenceCall,
  type TransformerBlockValue,
} from "../masked/forward.ts";
import type { MaskedTransformer } from "../masked/transformer.ts";
import type { TransformerPass } from "../masked/weights.ts";
import { attentionBackward, rmsNormBackward, siluMultiplyBackward } from "./kernels.ts";
import { type GradientOptions, ModelGradients, RefinableLayers } from "./linear.ts";

type Floats = Float32Array<ArrayBuffer>;

/** One call's input. */
interface Call extends SequenceCall {
  readonly rows: Int32Array;
  /** Time group of every position, and of the wanted rows. */
  readonly groups: Int32Array | undefined;
  readonly groupsOfRows: Int32Array | undefined;
}

/** A masked transformer whose packed layers can be refined. */
export class MaskedTransformerGradients extends ModelGradients<Call, TransformerBlockValue> {
  readonly #pass: TransformerPass;

  constructor(readonly model: MaskedTransformer, options: GradientOptions = {}) {
    const { kernels, config, parts } = model, { head, embedding } = parts;
    // A head that is the embedding, too, stays as it is.
    const frozen = head.weights === embedding.weights ? head : undefined;
    const linears = new RefinableLayers(model, options, frozen);
    super(linears);
    const linear: TransformerPass["linear"] = (layer, x, count, out, positions) => {
      const { groups, groupsOfRows } = this.call!;
      linears.forward(layer, x, count, out, positions === undefined ? groups : groupsOfRows);
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
    const groups = this.linears.groupsOf(times, batch, tokens);
    const groupsOfRows = groups && rows.map((row) => groups[row]!);
    const positions = positionsOf(batch, tokens, attentionMask);
    const call: Call = { batch, tokens, positions, attentionMask, rows, groups, groupsOfRows };
    this.call = call;
    const input = this.take("input.0", batch * tokens, hiddenSize);
    embed(this.#pass, inputIds, input);
    const hidden = this.runBlocks(
      blocks,
      input,
      (index, x, tape) => runBlock(this.#pass, index, call, x, tape),
    );
    return runHead(this.#pass, hidden, rows, this.take("final", rows.length, hiddenSize));
  }

  /**
   * Adds to the layers' gradients those of a loss with this gradient of the last call's logits.
   *
   * **Shapes** `dlogits: f32[n, vocabulary]`
   *
   * @throws {TypeError} when there was no forward pass, or the shape is not that of its logits
   */
  backward(dlogits: Float32Array): void {
    const { kernels, config, parts } = this.model, { hiddenSize, vocabularySize, normEpsilon } = config;
    const call = this.callBehind("dlogits", dlogits, ({ rows }) => [rows.length, vocabularySize]);
    const count = call.rows.length;
    let dy = dlogits as Floats;
    if (config.logitScale !== 1) {
      dy = this.take("logit gradient", count, vocabularySize);
      dy.set(dlogits);
      scaleInPlace(dy, config.logitScale);
    }
    let gradient = this.take("hidden gradient", count, hiddenSize);
    const input = this.take("final", count, hiddenSize);
    this.linears.backward([[parts.head, dy]], input, gradient, call.groupsOfRows);
    const last = this.take(`input.${config.blocks}`, count, hiddenSize);
    const norm = { rows: count, cols: hiddenSize, weight: parts.finalNorm, epsilon: normEpsilon };
    rmsNormBackward(kernels, last, gradient, norm, gradient);
    for (let index = config.blocks - 1; index >= 0; index--) {
      gradient = this.#blockBackward(index, call, gradient);
    }
  }

  /** The gradient of a block's input; the layers' gradients grow. */
  #blockBackward(index: number, call: Call, doutput: Floats): Floats {
    const { config } = this.model, tape = this.tapes[index]!;
    const input = this.take(`input.${index}`, call.batch * call.tokens, config.hiddenSize);
    if (this.linears.recompute) runBlock(this.#pass, index, call, input, tape);
    // Behind the last attention no position reads another: the last block ends on the wanted rows alone.
    const rows = index === config.blocks - 1 ? call.rows : undefined;
    const groups = rows === undefined ? call.groups : call.groupsOfRows;
    const dmiddle = this.#feedForwardBackward(index, tape, doutput, groups);
    const attended = tape.get(rows === undefined ? "attended" : "attendedRows");
    const dattended = this.take("attended rows gradient", 1, attended.length);
    this.linears.backward(
      [[this.model.parts.blocks[index]!.attentionOutput, dmiddle]],
      attended,
      dattended,
      groups,
    );
    if (rows === undefined) return this.#attentionBackward(index, call, tape, input, dattended, dmiddle);
    const everywhere = (values: Floats, of: number, name: string) =>
      scatter(values, rows, values.length / rows.length, this.take(name, 1, of));
    const dall = everywhere(dattended, tape.get("attended").length, "attended gradient");
    const dinput = everywhere(dmiddle, input.length, "input.gradient");
    return this.#attentionBackward(index, call, tape, input, dall, dinput);
  }

  /** The gradient of `middle`, in place of that of the block's output. */
  #feedForwardBackward(
    index: number,
    tape: Tape<TransformerBlockValue>,
    doutput: Floats,
    groups: Int32Array | undefined,
  ): Floats {
    const { kernels, config: { hiddenSize: cols, intermediateSize, normEpsilon: epsilon }, parts } =
      this.model;
    const block = parts.blocks[index]!, { gate, up, down } = block.feedForward!, rows = doutput.length / cols;
    const dgate = this.take("gated gradient", rows, intermediateSize);
    const dup = this.take("up gradient", rows, intermediateSize);
    this.linears.backward([[down, doutput]], tape.get("gated"), dgate, groups);
    siluMultiplyBackward(kernels, { gate: tape.get("gate"), up: tape.get("up") }, dgate, { dgate, dup });
    const dnormed = this.take("normed gradient", rows, cols);
    this.linears.backward([[gate, dgate], [up, dup]], tape.get("normedAgain"), dnormed, groups);
    const norm = { rows, cols, weight: block.feedForwardNorm, epsilon };
    rmsNormBackward(kernels, tape.get("middle"), dnormed, norm, dnormed);
    return add(kernels, doutput, dnormed, doutput);
  }

  /** The gradient of the block's input: that of attention is added to `dinput`, that of the residual. */
  #attentionBackward(
    index: number,
    { batch, tokens, positions, attentionMask: keyMask, groups }: Call,
    tape: Tape<TransformerBlockValue>,
    input: Floats,
    dattended: Floats,
    dinput: Floats,
  ): Floats {
    const { kernels, config, parts } = this.model, block = parts.blocks[index]!, rows = batch * tokens;
    const { hiddenSize: cols, heads, keyValueHeads: kvHeads, headSize, rotaryTheta: theta } = config;
    const dq = this.take("query gradient", rows, heads * headSize);
    const dk = this.take("key gradient", rows, kvHeads * headSize);
    const dv = this.take("value gradient", rows, kvHeads * headSize);
    const inputs = { q: tape.get("query"), k: tape.get("key"), v: tape.get("value"), keyMask };
    const shape = { batch, tokens, heads, kvHeads, headSize };
    attentionBackward(kernels, { ...inputs, out: tape.get("attended") }, dattended, shape, { dq, dk, dv });
    const backwards = positions.map((position) => -position);
    rotary(kernels, dq, backwards, { heads, headSize, theta });
    rotary(kernels, dk, backwards, { heads: kvHeads, headSize, theta });
    // Nothing in front of the first block is refined.
    const dnormed = index === 0 ? undefined : this.take("attention's normed gradient", rows, cols);
    const { query, key, value } = block;
    this.linears.backward([[query, dq], [key, dk], [value, dv]], tape.get("normed"), dnormed, groups);
    if (dnormed === undefined) return dinput;
    const norm = { rows, cols, weight: block.attentionNorm, epsilon: config.normEpsilon };
    rmsNormBackward(kernels, input, dnormed, norm, dnormed);
    return add(kernels, dinput, dnormed, dinput);
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
