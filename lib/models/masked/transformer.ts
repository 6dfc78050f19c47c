/**
 * The transformer that Dream and LLaDA share: RMSNorm, rotary positions, grouped heads, SwiGLU, attention in both
 * directions. Names and config keys of either are in dream.ts and llada.ts; what is done with the logits is there too.
 */
import { WeightsError } from "../../errors.ts";
import type { Kernels } from "../../native/mod.ts";
import type { TimeParameters } from "../../time/mod.ts";
import {
  type Blockwise,
  checkPlain,
  type LayerOptions,
  type Stage,
  withWeights,
} from "../layers/blockwise.ts";
import { shown } from "../layers/model_config.ts";
import { Operations } from "../layers/operations.ts";
import {
  type EmbeddingTable,
  type LinearLayer,
  lookUpRows,
  type ModelTensors,
  type WantedTensor,
} from "../layers/tensors.ts";
import { TimeAwareLayers } from "../layers/time_aware.ts";
import { Workspace } from "../layers/workspace.ts";

/** Sizes and constants of a masked diffusion language model. */
export interface MaskedTransformerConfig {
  /** Rows of the embedding and of the head. */
  readonly vocabularySize: number;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly blocks: number;
  readonly heads: number;
  readonly keyValueHeads: number;
  readonly headSize: number;
  /** Most tokens of a sequence. */
  readonly maxTokens: number;
  readonly normEpsilon: number;
  readonly rotaryTheta: number;
  /** The head is the embedding. */
  readonly tiesHead: boolean;
  /** The token at position i is predicted by the logits at `i − logitShift`, that at position 0 by its own: 1 in Dream, else 0. */
  readonly logitShift: 0 | 1;
  /** Factor on the logits, 1 for none. */
  readonly logitScale: number;
  /** Factor on the embeddings, 1 for none. */
  readonly embeddingScale: number;
  readonly maskToken: number;
  readonly padToken: number | undefined;
  readonly bosToken: number | undefined;
  readonly eosToken: number | undefined;
}

/** Where a block's tensors are: names without `.weight` and `.bias`. */
export interface BlockNames {
  readonly attentionNorm: string;
  readonly query: string;
  readonly key: string;
  readonly value: string;
  readonly attentionOutput: string;
  readonly feedForwardNorm: string;
  readonly gate: string;
  readonly up: string;
  readonly down: string;
}

/** Where a model's tensors are: names without `.weight` and `.bias`. */
export interface TransformerNames {
  readonly embedding: string;
  readonly finalNorm: string;
  readonly head: string;
  block(index: number): BlockNames;
  /** Query, key and value have a bias. */
  readonly queryKeyValueBias: boolean;
  /** Every other linear layer has one. */
  readonly otherBias: boolean;
}

/** One block's weights. */
export interface TransformerBlock {
  readonly name: string;
  readonly attentionNorm: Float32Array<ArrayBuffer>;
  readonly query: LinearLayer;
  readonly key: LinearLayer;
  readonly value: LinearLayer;
  readonly attentionOutput: LinearLayer;
  readonly feedForwardNorm: Float32Array<ArrayBuffer>;
  readonly gate: LinearLayer;
  readonly up: LinearLayer;
  readonly down: LinearLayer;
}

/** The weights of a masked transformer. */
export interface TransformerParts {
  readonly embedding: EmbeddingTable;
  readonly blocks: readonly TransformerBlock[];
  readonly finalNorm: Float32Array<ArrayBuffer>;
  readonly head: LinearLayer;
}

export interface ForwardOptions extends LayerOptions {
  /** `u8[batch, tokens]`, 0 where a token is padding that nothing may attend to; positions then count real tokens only. */
  readonly attentionMask?: Uint8Array | undefined;
  /** Flat positions `sequence * tokens + position` whose logits are wanted, in this order; all by default. */
  readonly rows?: Int32Array | undefined;
  /** Time of the sequences, or of each: the mask ratio in (0, 1]. Needed where the model has time parameters, otherwise ignored. */
  readonly t?: number | ArrayLike<number> | undefined;
}

/** How a model runs. */
export interface TransformerOptions {
  /** What the runtime selects by time; default none. */
  readonly timeParameters?: TimeParameters | undefined;
  /** Scratch shared with models that take turns with this one; default the model's own. */
  readonly workspace?: Workspace | undefined;
}

/** Sequences that are run together, for a model run block by block. */
export interface SequenceBatch {
  /** `i32[batch, tokens]` */
  readonly inputIds: Int32Array;
  readonly batch: number;
  readonly attentionMask?: Uint8Array | undefined;
}

/** Every tensor of a model with these sizes. */
export function wantedTensors(config: MaskedTransformerConfig, names: TransformerNames): WantedTensor[] {
  const { hiddenSize, intermediateSize, vocabularySize, heads, keyValueHeads, headSize } = config;
  const linear = (name: string, rows: number, cols: number, bias: boolean): WantedTensor[] => [
    { name: `${name}.weight`, shape: [rows, cols] },
    ...(bias ? [{ name: `${name}.bias`, shape: [rows] }] : []),
  ];
  const norm = (name: string): WantedTensor => ({ name: `${name}.weight`, shape: [hiddenSize] });
  const blocks = Array.from({ length: config.blocks }, (_, i) => {
    const block = names.block(i);
    return [
      norm(block.attentionNorm),
      ...linear(block.query, heads * headSize, hiddenSize, names.queryKeyValueBias),
      ...linear(block.key, keyValueHeads * headSize, hiddenSize, names.queryKeyValueBias),
      ...linear(block.value, keyValueHeads * headSize, hiddenSize, names.queryKeyValueBias),
      ...linear(block.attentionOutput, hiddenSize, heads * headSize, names.otherBias),
      norm(block.feedForwardNorm),
      ...linear(block.gate, intermediateSize, hiddenSize, names.otherBias),
      ...linear(block.up, intermediateSize, hiddenSize, names.otherBias),
      ...linear(block.down, hiddenSize, intermediateSize, names.otherBias),
    ];
  });
  return [
    { name: `${names.embedding}.weight`, shape: [vocabularySize, hiddenSize] },
    ...blocks.flat(),
    norm(names.finalNorm),
    ...(config.tiesHead ? [] : linear(names.head, vocabularySize, hiddenSize, names.otherBias)),
  ];
}

/** Sizes of one forward pass. */
export interface ForwardShape {
  readonly batch: number;
  /** Tokens of a sequence. */
  readonly tokens: number;
  /** Positions of all sequences whose logits are wanted; all by default. */
  readonly rows?: number | undefined;
}

/** What one forward pass takes, from sizes alone. */
export interface ForwardCost {
  /** Bytes of scratch, which a model keeps for the next pass. */
  readonly activationBytes: number;
  /** Multiplications with an addition, in linear layers and attention. */
  readonly multiplyAdds: number;
}

/** What a forward pass takes: {@linkcode MaskedTransformer.scratchBytes} afterwards, and its products. */
export function maskedForwardCost(
  config: MaskedTransformerConfig,
  { batch, tokens, rows }: ForwardShape,
): ForwardCost {
  const { hiddenSize, intermediateSize, vocabularySize, heads, keyValueHeads, headSize, blocks } = config;
  const count = batch * tokens, last = rows ?? count; // the last block's second half runs on `last` positions
  const inner = blocks > 1 ? Math.max(count, last) : last;
  const width = heads * headSize, keyValueWidth = keyValueHeads * headSize;
  const floats = count * hiddenSize + Math.max(count, last) * hiddenSize + // hidden, normed
    2 * count * width + 2 * count * keyValueWidth + // query, attended, key, value
    (rows === undefined ? 0 : last * (width + hiddenSize)) + // attendedRows, hiddenRows
    inner * hiddenSize + 2 * inner * intermediateSize + // delta, gate, up
    last * vocabularySize;
  const attention = 2 * count * tokens * width;
  const before = count * hiddenSize * (width + 2 * keyValueWidth) + attention;
  const after = hiddenSize * (width + 3 * intermediateSize);
  return {
    activationBytes: 4 * floats,
    multiplyAdds: blocks * before + ((blocks - 1) * count + last) * after +
      last * hiddenSize * vocabularySize,
  };
}

/** What linear layers of one run need to know. */
interface LinearRun extends LayerOptions {
  /** Tokens of a sequence. */
  readonly tokens: number;
  /** The positions that are run, undefined for all of them. */
  readonly rows?: Int32Array | undefined;
}

/** A loaded model: token sequences in, logits out. */
export class MaskedTransformer implements Blockwise<SequenceBatch> {
  readonly #operations: Operations;
  readonly #workspace: Workspace;
  readonly #embedding: EmbeddingTable;
  readonly #blocks: readonly TransformerBlock[];
  readonly #finalNorm: Float32Array<ArrayBuffer>;
  readonly #head: LinearLayer;
  readonly #timeAware: TimeAwareLayers | undefined;
  /** Bytes of the weights as they are held. */
  readonly weightBytes: number;
  /** What it selects by time, undefined for nothing. */
  readonly timeParameters: TimeParameters | undefined;

  constructor(
    /** Path of the checkpoint, for messages. */
    readonly path: string,
    readonly config: MaskedTransformerConfig,
    readonly kernels: Kernels,
    tensors: ModelTensors,
    names: TransformerNames,
    { timeParameters, workspace = new Workspace() }: TransformerOptions = {},
  ) {
    this.timeParameters = timeParameters;
    this.#workspace = workspace;
    this.#operations = new Operations(kernels);
    const linear = (name: string, bias: boolean) =>
      tensors.linear(`${name}.weight`, bias ? `${name}.bias` : undefined);
    this.#embedding = tensors.table(`${names.embedding}.weight`);
    this.#blocks = Array.from({ length: config.blocks }, (_, i) => {
      const block = names.block(i);
      return {
        name: block.query.replace(/(\.\d+)\..*$/, "$1"),
        attentionNorm: tensors.vector(`${block.attentionNorm}.weight`),
        query: linear(block.query, names.queryKeyValueBias),
        key: linear(block.key, names.queryKeyValueBias),
        value: linear(block.value, names.queryKeyValueBias),
        attentionOutput: linear(block.attentionOutput, names.otherBias),
        feedForwardNorm: tensors.vector(`${block.feedForwardNorm}.weight`),
        gate: linear(block.gate, names.otherBias),
        up: linear(block.up, names.otherBias),
        down: linear(block.down, names.otherBias),
      };
    });
    this.#finalNorm = tensors.vector(`${names.finalNorm}.weight`);
    this.#head = config.tiesHead
      ? { ...this.#embedding, bias: undefined }
      : linear(names.head, names.otherBias);
    this.weightBytes = tensors.bytes;
    this.#timeAware = timeParameters &&
      new TimeAwareLayers(timeParameters, this.#operations, this.#linearLayers(), path, workspace);
  }

  *#linearLayers(): Generator<LinearLayer> {
    for (const block of this.#blocks) {
      const { query, key, value, attentionOutput, gate, up, down } = block;
      yield* [query, key, value, attentionOutput, gate, up, down];
    }
    yield this.#head;
  }

  /** The weights as they are held, for what computes gradients. */
  get parts(): TransformerParts {
    return {
      embedding: this.#embedding,
      blocks: this.#blocks,
      finalNorm: this.#finalNorm,
      head: this.#head,
    };
  }

  /** Bytes of scratch held for the largest call so far. */
  get scratchBytes(): number {
    return this.#workspace.bytes;
  }

  /**
   * Logits of every position, or of those in `rows`.
   *
   * **Shapes** `inputIds: i32[batch, tokens]` → `f32[batch * tokens or rows, vocabulary]`. The result is scratch: the next call
   * overwrites it.
   *
   * @throws {RangeError} when a token is outside the vocabulary or the sequences are longer than the model allows
   * @throws {TypeError} when `weights` are given to a model with time parameters
   * @throws {WeightsError} when logits come out NaN or infinite, naming the first block that made such a value
   */
  forward(inputIds: Int32Array, batch: number, options: ForwardOptions = {}): Float32Array {
    const tokens = this.checkInput(inputIds, batch, options);
    if (options.weights !== undefined) checkPlain(this);
    const logits = this.#run(inputIds, batch, tokens, options, undefined);
    if (isFinite(sum(logits))) return logits;
    if (logits.every((value) => Number.isFinite(value))) return logits; // only their sum is not
    this.#run(inputIds, batch, tokens, options, (place, values) => {
      const bad = values.findIndex((value) => !Number.isFinite(value));
      if (bad < 0) return;
      throw new WeightsError(
        `Cannot run ${shown(this.path)}: every value must be finite, got ${values[bad]} from ${shown(place)}`,
        { path: this.path, tensor: place },
      );
    });
    return logits;
  }

  /** Flat position of the logits that predict the token at `place`, a flat position of sequences of so many tokens. */
  logitRow(place: number, tokens: number): number {
    const { logitShift } = this.config;
    return place % tokens < logitShift ? place : place - logitShift;
  }

  /** Tokens of a sequence. @throws as {@linkcode MaskedTransformer.forward} */
  checkInput(inputIds: Int32Array, batch: number, { attentionMask, rows }: ForwardOptions): number {
    const { maxTokens, vocabularySize } = this.config;
    const fail = (reason: string) => `Cannot run ${shown(this.path)}: ${reason}`;
    if (!(inputIds instanceof Int32Array)) {
      throw new TypeError(fail(`inputIds must be an Int32Array, got ${typeof inputIds}`));
    }
    const tokens = inputIds.length / batch;
    if (!Number.isInteger(batch) || batch < 1 || !Number.isInteger(tokens) || tokens < 1) {
      throw new TypeError(
        fail(`${inputIds.length} tokens must be a whole number of sequences, got a batch of ${batch}`),
      );
    }
    if (tokens > maxTokens) {
      throw new RangeError(fail(`sequences may have ${maxTokens} tokens, got ${tokens}`));
    }
    const bad = inputIds.findIndex((token) => token < 0 || token >= vocabularySize);
    if (bad >= 0) {
      throw new RangeError(
        fail(
          `tokens must be from 0 to ${vocabularySize - 1}, got ${inputIds[bad]} at position ${bad % tokens}`,
        ),
      );
    }
    if (attentionMask !== undefined && attentionMask.length !== inputIds.length) {
      throw new TypeError(
        fail(`attentionMask must have ${inputIds.length} entries, got ${attentionMask.length}`),
      );
    }
    const badRow = rows?.find((row) => row < 0 || row >= inputIds.length);
    if (badRow !== undefined) {
      throw new RangeError(fail(`rows must be from 0 to ${inputIds.length - 1}, got ${badRow}`));
    }
    return tokens;
  }

  #run(
    inputIds: Int32Array,
    batch: number,
    tokens: number,
    options: ForwardOptions,
    inspect: ((place: string, values: Float32Array) => void) | undefined,
  ): Float32Array {
    const { hiddenSize } = this.config;
    const { attentionMask, rows, t } = options;
    this.#timeAware?.begin(t, batch);
    const positions = positionsOf(batch, tokens, attentionMask);
    let hidden = this.#workspace.take("hidden", batch * tokens * hiddenSize);
    this.#embed(inputIds, hidden);
    inspect?.(this.#embedding.name, hidden);
    for (const [index, block] of this.#blocks.entries()) {
      // Behind the last attention no position reads another: the rest of the model runs on the wanted ones alone.
      const wanted = index === this.#blocks.length - 1 ? rows : undefined;
      hidden = this.#runBlock(block, hidden, batch, tokens, positions, attentionMask, wanted, options);
      inspect?.(block.name, hidden);
    }
    const logits = this.#runHead(hidden, hidden.length / hiddenSize, tokens, rows, options);
    inspect?.(this.#head.name, logits);
    return logits;
  }

  #embed(inputIds: Int32Array, hidden: Float32Array): void {
    const { embeddingScale } = this.config;
    lookUpRows(this.kernels, this.#embedding, inputIds, hidden);
    if (embeddingScale !== 1) { for (let i = 0; i < hidden.length; i++) hidden[i]! *= embeddingScale; }
  }

  /** One block, in place; with `rows`, those positions alone, in other memory. */
  #runBlock(
    block: TransformerBlock,
    hidden: Float32Array<ArrayBuffer>,
    batch: number,
    tokens: number,
    positions: Int32Array,
    attentionMask: Uint8Array | undefined,
    rows: Int32Array | undefined,
    options: LayerOptions,
  ): Float32Array<ArrayBuffer> {
    const { hiddenSize, intermediateSize, heads, keyValueHeads, headSize, normEpsilon, rotaryTheta } =
      this.config;
    const operations = this.#operations;
    let count = batch * tokens;
    const take = (name: string, cols: number) => this.#workspace.take(name, count * cols);
    let run: LinearRun = { observe: options.observe, weights: options.weights, tokens };
    const normed = take("normed", hiddenSize);
    operations.rmsNorm(hidden, block.attentionNorm, count, hiddenSize, normEpsilon, normed);
    const query = take("query", heads * headSize);
    const key = take("key", keyValueHeads * headSize), value = take("value", keyValueHeads * headSize);
    this.#linear(block.query, normed, count, query, run);
    this.#linear(block.key, normed, count, key, run);
    this.#linear(block.value, normed, count, value, run);
    operations.rotary(query, positions, heads, headSize, rotaryTheta);
    operations.rotary(key, positions, keyValueHeads, headSize, rotaryTheta);
    let attended = take("attended", heads * headSize);
    const shape = { batch, tokens, heads, kvHeads: keyValueHeads, headSize };
    operations.attention(query, key, value, shape, attentionMask, attended);
    if (rows !== undefined) {
      count = rows.length;
      run = { ...run, rows };
      attended = gather(attended, rows, heads * headSize, take("attendedRows", heads * headSize));
      hidden = gather(hidden, rows, hiddenSize, take("hiddenRows", hiddenSize));
    }
    const delta = take("delta", hiddenSize);
    this.#linear(block.attentionOutput, attended, count, delta, run, hidden);
    operations.add(hidden, delta, hidden);
    const normedAgain = take("normed", hiddenSize);
    operations.rmsNorm(hidden, block.feedForwardNorm, count, hiddenSize, normEpsilon, normedAgain);
    const gate = take("gate", intermediateSize), up = take("up", intermediateSize);
    this.#linear(block.gate, normedAgain, count, gate, run);
    this.#linear(block.up, normedAgain, count, up, run);
    operations.siluMultiply(gate, up, gate);
    this.#linear(block.down, gate, count, delta, run, hidden);
    operations.add(hidden, delta, hidden);
    return hidden;
  }

  /** With `rows`, the hidden states are of those positions. */
  #runHead(
    hidden: Float32Array,
    count: number,
    tokens: number,
    rows: Int32Array | undefined,
    options: LayerOptions,
  ): Float32Array<ArrayBuffer> {
    const { hiddenSize, vocabularySize, normEpsilon, logitScale } = this.config;
    const normed = this.#workspace.take("normed", count * hiddenSize);
    this.#operations.rmsNorm(hidden, this.#finalNorm, count, hiddenSize, normEpsilon, normed);
    const logits = this.#workspace.take("logits", count * vocabularySize);
    this.#linear(this.#head, normed, count, logits, { ...options, tokens, rows });
    if (logitScale !== 1) { for (let i = 0; i < logits.length; i++) logits[i]! *= logitScale; }
    return logits;
  }

  #linear(
    layer: LinearLayer,
    x: Float32Array,
    count: number,
    out: Float32Array<ArrayBuffer>,
    { observe, weights, tokens, rows }: LinearRun,
    residual?: Float32Array,
  ): void {
    observe?.(layer, x, count, residual);
    const timeAware = this.#timeAware;
    if (timeAware === undefined) this.#operations.linear(withWeights(layer, weights), x, count, out);
    else timeAware.linear(layer, x, count, out, rows, tokens);
  }

  // A block at a time ------------------------------------------------------------------------------------------

  get stages(): readonly Stage[] {
    return [
      ...this.#blocks.flatMap(({ query, key, value, attentionOutput, gate, up, down }, block) =>
        [[query, key, value], [attentionOutput], [gate, up], [down]].map((layers) => ({ block, layers }))
      ),
      { block: this.#blocks.length, layers: [this.#head] },
    ];
  }

  /** @throws {TypeError} on a model with time parameters, too */
  start({ inputIds, batch, attentionMask }: SequenceBatch): Float32Array<ArrayBuffer> {
    checkPlain(this);
    this.checkInput(inputIds, batch, { attentionMask });
    const hidden = new Float32Array(inputIds.length * this.config.hiddenSize);
    this.#embed(inputIds, hidden);
    return hidden;
  }

  runBlock(
    block: number,
    { inputIds, batch, attentionMask }: SequenceBatch,
    hidden: Float32Array<ArrayBuffer>,
    options: LayerOptions,
  ): void {
    const tokens = inputIds.length / batch;
    const positions = positionsOf(batch, tokens, attentionMask);
    this.#runBlock(this.#blocks[block]!, hidden, batch, tokens, positions, attentionMask, undefined, options);
  }

  finish({ inputIds, batch }: SequenceBatch, hidden: Float32Array, options: LayerOptions): Float32Array {
    return this.#runHead(hidden, inputIds.length, inputIds.length / batch, undefined, options);
  }
}

function sum(values: Float32Array): number {
  let total = 0;
  for (let i = 0; i < values.length; i++) total += values[i]!;
  return total;
}

/** Rows of a matrix, one after the other. */
export function gather(
  from: Float32Array,
  rows: Int32Array,
  cols: number,
  to: Float32Array<ArrayBuffer>,
): Float32Array<ArrayBuffer> {
  for (let i = 0; i < rows.length; i++) {
    to.set(from.subarray(rows[i]! * cols, (rows[i]! + 1) * cols), i * cols);
  }
  return to;
}

/** Rotary positions: 0, 1, … in each sequence; behind padding they count real tokens, as in Dream's own code. */
export function positionsOf(
  batch: number,
  tokens: number,
  attentionMask: Uint8Array | undefined,
): Int32Array {
  const positions = new Int32Array(batch * tokens);
  for (let b = 0; b < batch; b++) {
    for (let t = 0, next = 0; t < tokens; t++) {
      const i = b * tokens + t;
      if (attentionMask === undefined) positions[i] = t;
      else if (attentionMask[i] === 0) positions[i] = 1;
      else positions[i] = next++;
    }
  }
  return positions;
}
