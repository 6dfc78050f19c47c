/** Sizes of a masked transformer, and the cost of one of its forward passes. */
import type { ForwardCost, ForwardShape, GradientCost } from "../family.ts";

/** A mixture of experts: each token goes through the few that its router gives most weight. */
export interface MixtureConfig {
  readonly experts: number;
  /** Experts that a token goes through. */
  readonly perToken: number;
  /** Width inside an expert. */
  readonly expertSize: number;
  /** Width inside the expert that every token goes through; 0 for none. */
  readonly sharedSize: number;
  /** Experts have a number each that is added to their weights. */
  readonly hasBias: boolean;
  /** Blocks that have a feed-forward all the same. */
  readonly dense: readonly number[];
}

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
  /** Heads of queries and keys are normalized before they are turned, as in Qwen3. */
  readonly queryKeyNorm: boolean;
  /** Tokens of a block: attention sees keys up to the end of a token's own block. 0: all tokens. */
  readonly attentionBlock: number;
  /** Mixtures in place of feed-forwards; undefined where there are none. */
  readonly mixture: MixtureConfig | undefined;
  /** The head is the embedding. */
  readonly tiesHead: boolean;
  /** The logits at `i − logitShift` predict the token at i, those at 0 their own. Dream has 1. */
  readonly logitShift: 0 | 1;
  /** Factor on the logits, 1 for none. */
  readonly logitScale: number;
  /** Factor on the embeddings, 1 for none. */
  readonly embeddingScale: number;
  readonly maskToken: number;
  readonly padToken: number | undefined;
  readonly bosToken: number | undefined;
  /** The token written behind a text. */
  readonly eosToken: number | undefined;
  /** Each of them ends a text. */
  readonly eosTokens: readonly number[];
}

/** Elements of a weight's gradient that are held at once, and of a matrix that is transposed. */
const MATRIX_ELEMENTS = 2 ** 24;

/** Memory of a step of gradients: what each block keeps, its gradients on the way back, and logits. */
export function maskedGradientCost(
  config: MaskedTransformerConfig,
  { batch, tokens, rows }: ForwardShape,
): GradientCost {
  const { hiddenSize, intermediateSize, vocabularySize, heads, keyValueHeads, headSize, blocks } = config;
  const count = batch * tokens, last = rows ?? count;
  const width = heads * headSize, keyValueWidth = keyValueHeads * headSize;
  const kept = count * (3 * hiddenSize + 2 * width + 2 * keyValueWidth + 3 * intermediateSize);
  const inputs = (blocks + 1) * count * hiddenSize, widest = Math.max(hiddenSize, intermediateSize);
  const back = count * (4 * hiddenSize + 2 * width + 2 * keyValueWidth + 2 * intermediateSize + 2 * widest) +
    Math.max(count * widest, last * vocabularySize);
  const ends = last * ((config.logitScale === 1 ? 1 : 2) * vocabularySize + 3 * hiddenSize);
  const matrices = 2 * Math.min(MATRIX_ELEMENTS, hiddenSize * Math.max(widest, vocabularySize)) +
    Math.min(MATRIX_ELEMENTS / 4, hiddenSize * intermediateSize);
  const others = inputs + back + ends + matrices;
  return { scratchBytes: 4 * (blocks * kept + others), recomputedBytes: 4 * (kept + others) };
}

/** Numbers that a mixture keeps for a row: the router's, the sum, an expert's input, gate, up, output. */
const mixtureFloats = ({ experts, expertSize }: MixtureConfig, hiddenSize: number): number =>
  experts + 3 * hiddenSize + 2 * expertSize;

/** Cost of a forward pass: the model's `scratchBytes` behind it, and its products. */
export function maskedForwardCost(
  config: MaskedTransformerConfig,
  { batch, tokens, rows }: ForwardShape,
): ForwardCost {
  const { hiddenSize, intermediateSize, vocabularySize, heads, keyValueHeads, headSize, blocks } = config;
  const count = batch * tokens, last = rows ?? count; // the last block's second half runs on `last` positions
  const inner = blocks > 1 ? Math.max(count, last) : last;
  const { mixture } = config, mixed = mixture === undefined ? 0 : blocks - mixture.dense.length;
  const wide = Math.max(mixed < blocks ? intermediateSize : 0, mixed > 0 ? mixture!.sharedSize : 0);
  const width = heads * headSize, keyValueWidth = keyValueHeads * headSize;
  const floats = count * hiddenSize + Math.max(count, last) * hiddenSize + // hidden, normed
    2 * count * width + 2 * count * keyValueWidth + // query, attended, key, value
    (rows === undefined ? 0 : last * (width + hiddenSize)) + // attendedRows, hiddenRows
    inner * hiddenSize + 2 * inner * wide + // delta, gate, up
    (mixed === 0 ? 0 : inner * mixtureFloats(mixture!, hiddenSize)) +
    last * vocabularySize;
  const attention = 2 * count * tokens * width;
  const before = count * hiddenSize * (width + 2 * keyValueWidth) + attention;
  const ofMixture = mixture === undefined
    ? 0
    : mixture.experts + 3 * (mixture.perToken * mixture.expertSize + mixture.sharedSize);
  const after = hiddenSize * (width + ((blocks - mixed) * 3 * intermediateSize + mixed * ofMixture) / blocks);
  return {
    activationBytes: 4 * floats,
    multiplyAdds: blocks * before + ((blocks - 1) * count + last) * after +
      last * hiddenSize * vocabularySize,
  };
}
