/**
 * The transformer that Dream and LLaDA share: RMSNorm, rotary positions, grouped heads, SwiGLU, attention in
 * both directions. Sizes are in config.ts, weights in weights.ts, the pass in forward.ts, generation in
 * dream.ts and llada.ts.
 */
import type { ModelSource } from "../family.ts";
import {
  type Blockwise,
  checkPlain,
  firstFault,
  heldPass,
  heldStages,
  type PassOptions,
  type Stage,
  type StagedRun,
} from "../layers/blockwise.ts";
import { type BlockPass, LoadedWeights } from "../layers/loaded_weights.ts";
import { shown } from "../model_config.ts";
import type { EmbeddingTable, LoadOptions } from "../layers/tensors.ts";
import type { MaskedTransformerConfig } from "./config.ts";
import {
  embed,
  positionsOf,
  runBlock,
  runHead,
  type SequenceCall,
  stageOfHead,
  stagesOfBlock,
} from "./forward.ts";
import { readTransformerParts, type TransformerNames, type TransformerParts } from "./weights.ts";

export interface ForwardOptions extends PassOptions {
  /** `u8[batch, tokens]`, 0 where a token is padding: nothing attends to it, and it has no position. */
  readonly attentionMask?: Uint8Array | undefined;
  /** Flat positions `sequence * tokens + position` whose logits are wanted, in this order; all by default. */
  readonly rows?: Int32Array | undefined;
  /** Mask ratio in (0, 1] of all sequences, or of each. Required by time parameters, otherwise ignored. */
  readonly t?: number | ArrayLike<number> | undefined;
}

/** Sequences that are run together, for a model run block by block. */
export interface SequenceBatch {
  /** `i32[batch, tokens]` */
  readonly inputIds: Int32Array;
  readonly batch: number;
  readonly attentionMask?: Uint8Array | undefined;
}

/** A loaded model: token sequences in, logits out. */
export class MaskedTransformer extends LoadedWeights<MaskedTransformerConfig, TransformerParts>
  implements Blockwise<SequenceBatch> {
  constructor(
    source: ModelSource<MaskedTransformerConfig>,
    names: TransformerNames,
    options: LoadOptions = {},
  ) {
    super(source, readTransformerParts(source.config, names, source.tensors), options);
  }

  /**
   * Logits of every position, or of those in `rows`.
   *
   * **Shapes** `inputIds: i32[batch, tokens]` → `f32[batch * tokens or rows, vocabulary]`. The result is
   * scratch: the next call overwrites it.
   *
   * @throws {RangeError} when a token is outside the vocabulary or the sequences are longer than the model
   * allows
   * @throws {TypeError} when `weights` are given to a model with time parameters
   * @throws {WeightsError} when logits come out NaN or infinite, naming the first block that made such a
   * value
   */
  forward(inputIds: Int32Array, batch: number, options: ForwardOptions = {}): Float32Array {
    const { attentionMask, rows, t } = options;
    const tokens = this.checkInput(inputIds, batch, options);
    if (options.weights !== undefined) checkPlain(this);
    const pass = this.pass(options, tokens);
    const isWatched = options.observe !== undefined;
    const call = { ...this.#call({ inputIds, batch, attentionMask }), rows, isWatched };
    this.timeAware?.begin(t, batch);
    const logits = this.#run(pass, inputIds, call);
    if (isFinite(sum(logits)) || logits.every((value) => Number.isFinite(value))) return logits;
    this.#run(pass, inputIds, call, firstFault(this.path));
    return logits;
  }

  #run(
    pass: BlockPass<MaskedTransformerConfig, TransformerParts>,
    inputIds: Int32Array,
    call: SequenceCall,
    inspect?: (place: string, values: Float32Array) => void,
  ): Float32Array {
    const { embedding, blocks, head } = this.parts, { arrays } = this.kernels;
    const first = this.workspace.take("hidden", inputIds.length * this.config.hiddenSize);
    embed(pass, inputIds, first);
    inspect?.(embedding.name, first);
    const logits = heldPass(this.kernels, first, () => {
      let hidden = first;
      for (const [index, { name }] of blocks.entries()) {
        pass.begin(index, true);
        hidden = runBlock(pass, index, call, hidden);
        if (inspect === undefined) continue;
        inspect(name, arrays.release(hidden));
        arrays.hold(hidden);
      }
      pass.begin(blocks.length, true);
      return runHead(pass, hidden, call.rows);
    });
    inspect?.(head.name, logits);
    return logits;
  }

  #call({ inputIds, batch, attentionMask }: SequenceBatch): SequenceCall {
    const tokens = inputIds.length / batch, positions = positionsOf(batch, tokens, attentionMask);
    return { batch, tokens, positions, attentionMask, rows: undefined };
  }

  /** Flat position of the logits that predict the token at flat position `place`, `tokens` a sequence. */
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
    const { length } = inputIds, tokens = length / batch;
    if (!Number.isInteger(batch) || batch < 1 || !Number.isInteger(tokens) || tokens < 1) {
      throw new TypeError(
        fail(`${length} tokens must be a whole number of sequences, got a batch of ${batch}`),
      );
    }
    if (tokens > maxTokens) {
      throw new RangeError(fail(`sequences may have ${maxTokens} tokens, got ${tokens}`));
    }
    const bad = inputIds.findIndex((token) => token < 0 || token >= vocabularySize);
    if (bad >= 0) {
      const got = `${inputIds[bad]} at position ${bad % tokens}`;
      throw new RangeError(fail(`tokens must be from 0 to ${vocabularySize - 1}, got ${got}`));
    }
    if (attentionMask !== undefined && attentionMask.length !== length) {
      throw new TypeError(fail(`attentionMask must have ${length} entries, got ${attentionMask.length}`));
    }
    const badRow = rows?.find((row) => row < 0 || row >= length);
    if (badRow !== undefined) {
      throw new RangeError(fail(`rows must be from 0 to ${length - 1}, got ${badRow}`));
    }
    return tokens;
  }

  // A block at a time ---------------------------------------------------------------------------------------

  get stages(): readonly Stage[] {
    return [
      ...this.parts.blocks.flatMap((
        { query, key, value, attentionOutput, mixture, feedForward },
        block,
      ) => {
        const forwards = [...mixture?.experts ?? [], ...(feedForward === undefined ? [] : [feedForward])];
        return [
          [query, key, value],
          [attentionOutput],
          ...(mixture === undefined ? [] : [[mixture.router]]),
          ...forwards.flatMap(({ gate, up, down }) => [[gate, up], [down]]),
        ].map((layers) => ({ block, layers }));
      }),
      { block: this.parts.blocks.length, layers: [this.parts.head] },
    ];
  }

  override get tables(): readonly EmbeddingTable[] {
    return [this.parts.embedding];
  }

  /** @throws {TypeError} on a model with time parameters, too */
  start(
    { inputIds, batch, attentionMask }: SequenceBatch,
    options: PassOptions = {},
  ): Float32Array<ArrayBuffer> {
    checkPlain(this);
    const tokens = this.checkInput(inputIds, batch, { attentionMask });
    const hidden = new Float32Array(inputIds.length * this.config.hiddenSize);
    embed(this.pass(options, tokens), inputIds, hidden);
    return hidden;
  }

  runBlock(
    block: number,
    batch: SequenceBatch,
    hidden: Float32Array<ArrayBuffer>,
    options: PassOptions,
  ): void {
    const call = { ...this.#call(batch), isWatched: options.observe !== undefined };
    heldPass(this.kernels, hidden, () => {
      const pass = this.pass(options, call.tokens);
      pass.begin(block);
      return runBlock(pass, block, call, hidden);
    });
  }

  stagesOf(
    block: number,
    batch: SequenceBatch,
    hidden: Float32Array<ArrayBuffer>,
    options: PassOptions,
  ): StagedRun<Float32Array> {
    const call = { ...this.#call(batch), isWatched: true }, pass = this.pass(options, call.tokens);
    const isHead = block === this.parts.blocks.length;
    const run = isHead ? stageOfHead(pass, hidden, undefined) : stagesOfBlock(pass, block, call, hidden);
    return heldStages(this.kernels, hidden, run, () => pass.begin(block));
  }

  finish({ inputIds, batch }: SequenceBatch, hidden: Float32Array, options: PassOptions): Float32Array {
    const pass = this.pass(options, inputIds.length / batch);
    return heldPass(this.kernels, hidden, () => runHead(pass, hidden, undefined));
  }
}

function sum(values: Float32Array): number {
  let total = 0;
  for (let i = 0; i < values.length; i++) total += values[i]!;
  return total;
}
