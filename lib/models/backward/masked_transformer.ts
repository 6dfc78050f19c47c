/**
 * Gradients of a masked transformer (Dream, LLaDA) with respect to its packed layers' scales, zero points and biases. The forward pass is that of
 * ../masked_transformer.ts with what the way back needs kept; blocks can be run twice instead, so that memory does not grow with their number.
 */
import type { TimeGroups } from "../../time/mod.ts";
import type { AttentionShape } from "../layers/kernels.ts";
import { gather, type MaskedTransformer, positionsOf, type TransformerBlock } from "../masked/transformer.ts";
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

type Floats = Float32Array<ArrayBuffer>;

/** A block's linear layers. */
const LINEARS = ["query", "key", "value", "attentionOutput", "gate", "up", "down"] as const;
type BlockLinears = Readonly<Record<typeof LINEARS[number], RefinableLinear>>;

export interface GradientOptions {
  /** What is refined. Default scales, zero points and biases. */
  readonly parts?: Partial<Omit<RefinedParts, "timeGroups">> | undefined;
  /** Keep only the blocks' inputs and run each block again on the way back: less memory, a third more time. Default false. */
  readonly recompute?: boolean | undefined;
  /** Groups that get a bias each in every packed layer, beside the layer's own. Default none. */
  readonly timeGroups?: TimeGroups | undefined;
}

/** One call's input. */
interface Call {
  readonly batch: number;
  readonly tokens: number;
  readonly positions: Int32Array;
  readonly backwards: Int32Array;
  readonly rows: Int32Array;
  readonly attentionMask: Uint8Array | undefined;
  readonly shape: AttentionShape;
  /** Time group of every position, and of the wanted rows. */
  readonly groups: Int32Array | undefined;
  readonly groupsOfRows: Int32Array | undefined;
}

/** What a block's backward pass reads. */
interface BlockTape {
  readonly input: Floats;
  readonly normed: Floats;
  readonly query: Floats;
  readonly key: Floats;
  readonly value: Floats;
  readonly attended: Floats;
  readonly attendedRows: Floats;
  readonly middle: Floats;
  readonly normedAgain: Floats;
  readonly gate: Floats;
  readonly up: Floats;
  readonly gated: Floats;
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
  /** Every linear layer, in the order of the forward pass. */
  readonly layers: readonly RefinableLinear[];
  readonly #blocks: readonly BlockLinears[];
  readonly #head: RefinableLinear;
  readonly #operations: Operations;
  readonly #backward: BackwardOperations;
  readonly #workspace = new Workspace();
  readonly #context: BackwardContext;
  readonly #recompute: boolean;
  readonly #timeGroups: TimeGroups | undefined;
  #call: Call | undefined;

  constructor(readonly model: MaskedTransformer, options: GradientOptions = {}) {
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
    const { blocks, head, embedding } = model.parts;
    const refinable = (layer: LinearLayer) => new RefinableLinear(layer, parts);
    this.#blocks = blocks.map((block) =>
      Object.fromEntries(LINEARS.map((name) => [name, refinable(block[name])])) as BlockLinears
    );
    // A head that is the embedding, too, stays as it is.
    this.#head = head.weights === embedding.weights
      ? new RefinableLinear(head, { scales: false, zeroPoints: false, biases: false, timeGroups: 0 })
      : refinable(head);
    this.layers = [...this.#blocks.flatMap((block) => LINEARS.map((name) => block[name])), this.#head];
  }

  /** Bytes of scratch, tape included. */
  get scratchBytes(): number {
    return this.#workspace.bytes;
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
    const { config } = this.model;
    const { heads, keyValueHeads: kvHeads, headSize, hiddenSize, vocabularySize } = config;
    this.model.checkInput(inputIds, batch, { rows, attentionMask });
    const tokens = inputIds.length / batch;
    const positions = positionsOf(batch, tokens, attentionMask);
    const groups = groupsOfTokens(this.#timeGroups, times, batch, tokens);
    this.#call = {
      groups,
      groupsOfRows: groups && rows.map((row) => groups[row]!),
      batch,
      tokens,
      positions,
      backwards: positions.map((position) => -position),
      rows,
      attentionMask,
      shape: { batch, tokens, heads, kvHeads, headSize },
    };
    let hidden = this.#take("input.0", batch * tokens, hiddenSize);
    lookUpRows(this.model.kernels, this.model.parts.embedding, inputIds, hidden);
    if (config.embeddingScale !== 1) {
      for (let i = 0; i < hidden.length; i++) hidden[i]! *= config.embeddingScale;
    }
    for (let index = 0; index < this.#blocks.length; index++) hidden = this.#runBlock(index, this.#call);
    const normed = this.#take("final", rows.length, hiddenSize);
    const { finalNorm } = this.model.parts;
    this.#operations.rmsNorm(hidden, finalNorm, rows.length, hiddenSize, config.normEpsilon, normed);
    const logits = this.#take("logits", rows.length, vocabularySize);
    this.#head.forward(this.#operations, normed, rows.length, logits, this.#call.groupsOfRows);
    if (config.logitScale !== 1) { for (let i = 0; i < logits.length; i++) logits[i]! *= config.logitScale; }
    return logits;
  }

  /**
   * Adds to the layers' gradients what a gradient of the last call's logits means for them.
   *
   * **Shapes** `dlogits: f32[n, vocabulary]`
   *
   * @throws {TypeError} when there was no forward pass, or the shape is not that of its logits
   */
  backward(dlogits: Float32Array): void {
    const call = this.#call;
    const { config, parts } = this.model;
    const { hiddenSize, vocabularySize, normEpsilon } = config;
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
    if (config.logitScale !== 1) { for (let i = 0; i < dy.length; i++) dy[i]! *= config.logitScale; }
    const dhidden = this.#take("hidden gradient", count, hiddenSize);
    backwardLinears(
      this.#context,
      [[this.#head, dy]],
      this.#take("final", count, hiddenSize),
      count,
      dhidden,
      call.groupsOfRows,
    );
    const last = this.#take(`input.${this.#blocks.length}`, count, hiddenSize);
    this.#backward.rmsNorm(last, dhidden, parts.finalNorm, count, hiddenSize, normEpsilon, dhidden);
    let gradient = dhidden;
    for (let index = this.#blocks.length - 1; index >= 0; index--) {
      gradient = this.#blockBackward(index, call, gradient);
    }
  }

  #take(name: string, rows: number, cols: number): Floats {
    return this.#workspace.take(name, rows * cols);
  }

  /** Positions that a block's output has: behind the last attention only those that are wanted. */
  #rowsBehind(index: number, { batch, tokens, rows }: Call): number {
    return index === this.#blocks.length - 1 ? rows.length : batch * tokens;
  }

  #groupsBehind(index: number, { groups, groupsOfRows }: Call): Int32Array | undefined {
    return index === this.#blocks.length - 1 ? groupsOfRows : groups;
  }

  #tapeOf(index: number, call: Call): BlockTape {
    const { hiddenSize, intermediateSize, heads, keyValueHeads, headSize } = this.model.config;
    const all = call.batch * call.tokens, behind = this.#rowsBehind(index, call);
    const suffix = this.#recompute ? "" : `.${index}`;
    const take = (name: string, rows: number, cols: number) => this.#take(name + suffix, rows, cols);
    const attended = take("attended", all, heads * headSize);
    return {
      input: this.#take(`input.${index}`, all, hiddenSize),
      normed: take("normed", all, hiddenSize),
      query: take("query", all, heads * headSize),
      key: take("key", all, keyValueHeads * headSize),
      value: take("value", all, keyValueHeads * headSize),
      attended,
      attendedRows: index === this.#blocks.length - 1
        ? take("attendedRows", behind, heads * headSize)
        : attended,
      middle: take("middle", behind, hiddenSize),
      normedAgain: take("normedAgain", behind, hiddenSize),
      gate: take("gate", behind, intermediateSize),
      up: take("up", behind, intermediateSize),
      gated: take("gated", behind, intermediateSize),
    };
  }

  /** Runs a block on `input.<index>`; its output is `input.<index + 1>`. */
  #runBlock(index: number, call: Call): Floats {
    const { config } = this.model;
    const { hiddenSize, heads, keyValueHeads, headSize, normEpsilon, rotaryTheta } = config;
    const operations = this.#operations;
    const block = this.model.parts.blocks[index]!, linears = this.#blocks[index]!;
    const tape = this.#tapeOf(index, call);
    const all = call.batch * call.tokens, behind = this.#rowsBehind(index, call);
    const { groups } = call, behindGroups = this.#groupsBehind(index, call);
    operations.rmsNorm(tape.input, block.attentionNorm, all, hiddenSize, normEpsilon, tape.normed);
    linears.query.forward(operations, tape.normed, all, tape.query, groups);
    linears.key.forward(operations, tape.normed, all, tape.key, groups);
    linears.value.forward(operations, tape.normed, all, tape.value, groups);
    operations.rotary(tape.query, call.positions, heads, headSize, rotaryTheta);
    operations.rotary(tape.key, call.positions, keyValueHeads, headSize, rotaryTheta);
    operations.attention(tape.query, tape.key, tape.value, call.shape, call.attentionMask, tape.attended);
    let input = tape.input;
    if (tape.attendedRows !== tape.attended) {
      gather(tape.attended, call.rows, heads * headSize, tape.attendedRows);
      input = gather(tape.input, call.rows, hiddenSize, this.#take("input rows", behind, hiddenSize));
    }
    const delta = this.#take("delta", behind, hiddenSize);
    linears.attentionOutput.forward(operations, tape.attendedRows, behind, delta, behindGroups);
    operations.add(input, delta, tape.middle);
    operations.rmsNorm(tape.middle, block.feedForwardNorm, behind, hiddenSize, normEpsilon, tape.normedAgain);
    linears.gate.forward(operations, tape.normedAgain, behind, tape.gate, behindGroups);
    linears.up.forward(operations, tape.normedAgain, behind, tape.up, behindGroups);
    operations.siluMultiply(tape.gate, tape.up, tape.gated);
    linears.down.forward(operations, tape.gated, behind, delta, behindGroups);
    const output = this.#take(`input.${index + 1}`, behind, hiddenSize);
    operations.add(tape.middle, delta, output);
    return output;
  }

  /** The gradient of a block's input; the layers' gradients grow. */
  #blockBackward(index: number, call: Call, doutput: Floats): Floats {
    if (this.#recompute) this.#runBlock(index, call);
    const { config, parts } = this.model;
    const { hiddenSize, intermediateSize, heads, keyValueHeads, headSize, normEpsilon, rotaryTheta } = config;
    const backward = this.#backward, operations = this.#operations;
    const block: TransformerBlock = parts.blocks[index]!, linears = this.#blocks[index]!;
    const tape = this.#tapeOf(index, call);
    const all = call.batch * call.tokens, behind = this.#rowsBehind(index, call);
    const behindGroups = this.#groupsBehind(index, call);

    // doutput is the gradient of both the feed-forward's output and of `middle`.
    const dgated = this.#take("gated gradient", behind, intermediateSize);
    const dup = this.#take("up gradient", behind, intermediateSize);
    backwardLinears(this.#context, [[linears.down, doutput]], tape.gated, behind, dgated, behindGroups);
    backward.siluMultiply(tape.gate, tape.up, dgated, dgated, dup);
    const dnormed = this.#take("normed gradient", behind, hiddenSize);
    backwardLinears(
      this.#context,
      [[linears.gate, dgated], [linears.up, dup]],
      tape.normedAgain,
      behind,
      dnormed,
      behindGroups,
    );
    backward.rmsNorm(tape.middle, dnormed, block.feedForwardNorm, behind, hiddenSize, normEpsilon, dnormed);
    operations.add(doutput, dnormed, doutput);

    const dattendedRows = this.#take("attended rows gradient", behind, heads * headSize);
    backwardLinears(
      this.#context,
      [[linears.attentionOutput, doutput]],
      tape.attendedRows,
      behind,
      dattendedRows,
      behindGroups,
    );
    let dattended = dattendedRows, dinput = doutput;
    if (tape.attendedRows !== tape.attended) {
      dattended = scatter(
        dattendedRows,
        call.rows,
        heads * headSize,
        this.#take("attended gradient", all, heads * headSize),
      );
      dinput = scatter(doutput, call.rows, hiddenSize, this.#take("input.gradient", all, hiddenSize));
    }
    const dquery = this.#take("query gradient", all, heads * headSize);
    const dkey = this.#take("key gradient", all, keyValueHeads * headSize);
    const dvalue = this.#take("value gradient", all, keyValueHeads * headSize);
    backward.attention(
      { q: tape.query, k: tape.key, v: tape.value, out: tape.attended },
      dattended,
      call.shape,
      call.attentionMask,
      { dq: dquery, dk: dkey, dv: dvalue },
    );
    operations.rotary(dquery, call.backwards, heads, headSize, rotaryTheta);
    operations.rotary(dkey, call.backwards, keyValueHeads, headSize, rotaryTheta);
    // Nothing in front of the first block is refined.
    const dnormedAll = index === 0 ? undefined : this.#take("attention's normed gradient", all, hiddenSize);
    backwardLinears(
      this.#context,
      [[linears.query, dquery], [linears.key, dkey], [linears.value, dvalue]],
      tape.normed,
      all,
      dnormedAll,
      call.groups,
    );
    if (dnormedAll === undefined) return dinput;
    backward.rmsNorm(tape.input, dnormedAll, block.attentionNorm, all, hiddenSize, normEpsilon, dnormedAll);
    operations.add(dinput, dnormedAll, dinput);
    return dinput;
  }
}

/** The way back of `gather`: rows that stand several times add up, others are 0. */
function scatter(from: Float32Array, rows: Int32Array, cols: number, to: Floats): Floats {
  to.fill(0);
  for (let i = 0; i < rows.length; i++) {
    const begin = rows[i]! * cols;
    for (let col = 0; col < cols; col++) to[begin + col]! += from[i * cols + col]!;
  }
  return to;
}
