/**
 * The transformer that Dream and LLaDA share: RMSNorm, rotary positions, grouped heads, SwiGLU, attention in both
 * directions. Names and config keys of either are in dream.ts and llada.ts; what is done with the logits is there too.
 */
import { WeightsError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import type { TimeParameters } from "../time/mod.ts";
import { shown } from "./model_config.ts";
import { Operations } from "./operations.ts";
import {
  type EmbeddingTable,
  type LinearLayer,
  lookUpRows,
  type ModelTensors,
  type WantedTensor,
} from "./tensors.ts";
import { TimeAwareLayers } from "./time_aware.ts";
import { Workspace } from "./workspace.ts";

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

/** Sees the input of every linear layer: `x: f32[tokens, cols]`, valid only during the call. */
export type LayerObserver = (layer: LinearLayer, x: Float32Array, tokens: number) => void;

export interface ForwardOptions {
  /** `u8[batch, tokens]`, 0 where a token is padding that nothing may attend to; positions then count real tokens only. */
  readonly attentionMask?: Uint8Array | undefined;
  /** Flat positions `sequence * tokens + position` whose logits are wanted, in this order; all by default. */
  readonly rows?: Int32Array | undefined;
  /** For calibration. */
  readonly observe?: LayerObserver | undefined;
  /** Time of the sequences, or of each: the mask ratio in (0, 1]. Needed where the model has time parameters, otherwise ignored. */
  readonly t?: number | ArrayLike<number> | undefined;
}

/** How a model runs. */
export interface TransformerOptions {
  /** Threads of the kernels; never changes a result. Default 1. */
  readonly threads?: number | undefined;
  /** What the runtime selects by time; default none. */
  readonly timeParameters?: TimeParameters | undefined;
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

/** A loaded model: token sequences in, logits out. */
export class MaskedTransformer {
  readonly #operations: Operations;
  readonly #workspace = new Workspace();
  readonly #embedding: EmbeddingTable;
  readonly #blocks: readonly TransformerBlock[];
  readonly #finalNorm: Float32Array<ArrayBuffer>;
  readonly #head: LinearLayer;
  readonly #timeAware: TimeAwareLayers | undefined;
  /** Bytes of the weights as they are held. */
  readonly weightBytes: number;
  readonly threads: number;
  /** What it selects by time, undefined for nothing. */
  readonly timeParameters: TimeParameters | undefined;

  constructor(
    /** Path of the checkpoint, for messages. */
    readonly path: string,
    readonly config: MaskedTransformerConfig,
    readonly kernels: Kernels,
    tensors: ModelTensors,
    names: TransformerNames,
    { threads = 1, timeParameters }: TransformerOptions = {},
  ) {
    this.threads = threads;
    this.timeParameters = timeParameters;
    this.#operations = new Operations(kernels, threads);
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
      new TimeAwareLayers(timeParameters, this.#operations, this.#linearLayers(), path);
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
   * @throws {WeightsError} when logits come out NaN or infinite, naming the first block that made such a value
   */
  forward(inputIds: Int32Array, batch: number, options: ForwardOptions = {}): Float32Array {
    const tokens = this.checkInput(inputIds, batch, options);
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
    { attentionMask, rows, observe, t }: ForwardOptions,
    inspect: ((place: string, values: Float32Array) => void) | undefined,
  ): Float32Array {
    const { config } = this;
    const { hiddenSize, intermediateSize, heads, keyValueHeads, headSize, normEpsilon, rotaryTheta } = config;
    const operations = this.#operations, timeAware = this.#timeAware;
    timeAware?.begin(t, batch);
    let rowsRun: Int32Array | undefined; // undefined: all of them
    const take = (name: string, cols: number, count = batch * tokens) =>
      this.#workspace.take(name, count * cols);
    const linear = (layer: LinearLayer, x: Float32Array, count: number, out: Float32Array<ArrayBuffer>) => {
      observe?.(layer, x, count);
      if (timeAware === undefined) operations.linear(layer, x, count, out);
      else timeAware.linear(layer, x, count, out, rowsRun, tokens);
    };
    const shape = { batch, tokens, heads, kvHeads: keyValueHeads, headSize };
    const positions = positionsOf(batch, tokens, attentionMask);

    let hidden = take("hidden", hiddenSize);
    lookUpRows(this.kernels, this.#embedding, inputIds, hidden);
    if (config.embeddingScale !== 1) {
      for (let i = 0; i < hidden.length; i++) hidden[i]! *= config.embeddingScale;
    }
    inspect?.(this.#embedding.name, hidden);
    let count = batch * tokens;
    for (const [index, block] of this.#blocks.entries()) {
      const normed = take("normed", hiddenSize);
      operations.rmsNorm(hidden, block.attentionNorm, count, hiddenSize, normEpsilon, normed);
      const query = take("query", heads * headSize);
      const key = take("key", keyValueHeads * headSize), value = take("value", keyValueHeads * headSize);
      linear(block.query, normed, count, query);
      linear(block.key, normed, count, key);
      linear(block.value, normed, count, value);
      operations.rotary(query, positions, heads, headSize, rotaryTheta);
      operations.rotary(key, positions, keyValueHeads, headSize, rotaryTheta);
      let attended = take("attended", heads * headSize);
      operations.attention(query, key, value, shape, attentionMask, attended);
      if (rows !== undefined && index === this.#blocks.length - 1) {
        // Behind the last attention no position reads another: the rest of the model runs on the wanted ones alone.
        count = rows.length;
        rowsRun = rows;
        attended = gather(attended, rows, heads * headSize, take("attendedRows", heads * headSize, count));
        hidden = gather(hidden, rows, hiddenSize, take("hiddenRows", hiddenSize, count));
      }
      const delta = take("delta", hiddenSize, count);
      linear(block.attentionOutput, attended, count, delta);
      operations.add(hidden, delta, hidden);
      const normedAgain = take("normed", hiddenSize, count);
      operations.rmsNorm(hidden, block.feedForwardNorm, count, hiddenSize, normEpsilon, normedAgain);
      const gate = take("gate", intermediateSize, count), up = take("up", intermediateSize, count);
      linear(block.gate, normedAgain, count, gate);
      linear(block.up, normedAgain, count, up);
      operations.siluMultiply(gate, up, gate);
      linear(block.down, gate, count, delta);
      operations.add(hidden, delta, hidden);
      inspect?.(block.name, hidden);
    }
    const normed = take("normed", hiddenSize, count);
    operations.rmsNorm(hidden, this.#finalNorm, count, hiddenSize, normEpsilon, normed);
    const logits = take("logits", config.vocabularySize, count);
    linear(this.#head, normed, count, logits);
    if (config.logitScale !== 1) { for (let i = 0; i < logits.length; i++) logits[i]! *= config.logitScale; }
    inspect?.(this.#head.name, logits);
    return logits;
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
