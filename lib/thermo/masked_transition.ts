/**
 * Transitions of masked diffusion (Dream, LLaDA): the probability that a step writes a masked position, and
 * the KL divergence between two models' distributions of the token written there. Gaussian diffusion is in
 * transition.ts.
 */
import { throwIfStopped } from "../progress.ts";

/**
 * Probability ρ with which a step from time t to s writes a masked position: `(α_s − α_t)/(1 − α_t)` with α =
 * 1 − t, that is `1 − s/t`.
 *
 * @throws {RangeError} unless 0 ≤ s < t ≤ 1
 *
 * @example
 * ```ts
 * import { unmaskProbability } from "./masked_transition.ts";
 * console.log(unmaskProbability(0.5, 0.25)); // 0.5
 * ```
 */
export function unmaskProbability(from: number, to: number): number {
  if (!(to >= 0 && to < from && from <= 1)) {
    throw new RangeError(
      `Cannot compute a transition: times must be 0 ≤ to < from ≤ 1, got from ${from} to ${to}`,
    );
  }
  return (from - to) / from;
}

/** A vocabulary with its special tokens, as a model's configuration has them. */
export interface Vocabulary {
  readonly vocabularySize: number;
  readonly maskToken?: number | undefined;
  readonly padToken?: number | undefined;
  readonly eosToken?: number | undefined;
  /** Where there are several: each of them ends a text. */
  readonly eosTokens?: readonly number[] | undefined;
}

/**
 * Tokens that the sampler never writes, to which both models of a comparison give probability 0: the mask,
 * which is what a step replaces, and padding, unless the model ends its text with the same token (LLaDA) and
 * so does write it. Every token KL and every comparison of most probable tokens follows this one rule.
 */
export function unwrittenTokens({ maskToken, padToken, eosToken, eosTokens = [] }: Vocabulary): number[] {
  const isWritten = [eosToken, ...eosTokens].includes(padToken);
  return [maskToken, isWritten ? undefined : padToken].filter((token) => token !== undefined);
}

/** Settings of {@linkcode tokenKl}. */
export interface TokenKlOptions {
  /** Receives the divergence of each row, `f64[rows]`. */
  readonly out?: Float64Array<ArrayBuffer> | undefined;
  /** Receives `weight · (p_Q − p_F)`, the gradient by the quantized logits: `f32[rows, vocabulary]`. */
  readonly gradient?: Float32Array<ArrayBuffer> | undefined;
  /** Weight of each row in the gradient, `[rows]`. Default 1. */
  readonly weights?: ArrayLike<number> | undefined;
  /**
   * Temperature τ that both models' logits are divided by; divergences are multiplied by τ², so that
   * gradients keep their size (Hinton, Vinyals & Dean, https://arxiv.org/abs/1503.02531). The gradient is
   * then `weight · τ (p_Q − p_F)`. Default 1, the KL itself.
   */
  readonly temperature?: number | undefined;
}

/**
 * Token KL, in nats: `KL(p_F ‖ p_Q)` of every row over the tokens that can be written
 * ({@linkcode unwrittenTokens}); softmax and sum in float64. A step that writes each masked position with
 * probability ρ ({@linkcode unmaskProbability}) has the step KL `ρ · Σ tokenKl` exactly, because positions
 * are written independently.
 *
 * **Shapes** `full` and `quantized: f32[rows, vocabulary]` → `f64[rows]`
 *
 * @throws {TypeError} when the shapes do not fit
 * @throws {RangeError} when a logit that counts is NaN or infinite, every token is excluded, or the
 * temperature is not in [0.01, 100]
 *
 * @example
 * ```ts
 * import { tokenKl } from "./masked_transition.ts";
 * console.log(tokenKl(Float32Array.of(0, 0), Float32Array.of(0, 1), { vocabularySize: 2 })); // 0.1201
 * ```
 */
export function tokenKl(
  full: Float32Array,
  quantized: Float32Array,
  vocabulary: Vocabulary,
  { out, gradient, weights, temperature = 1 }: TokenKlOptions = {},
): Float64Array<ArrayBuffer> {
  const tokens = vocabulary.vocabularySize;
  const rows = full.length / tokens;
  const fail = (reason: string) => `Cannot compute a KL divergence: ${reason}`;
  if (!Number.isInteger(rows) || quantized.length !== full.length) {
    throw new TypeError(
      fail(`logits must be [rows, ${tokens}] twice, got ${full.length} and ${quantized.length} numbers`),
    );
  }
  if (out !== undefined && out.length !== rows) {
    throw new TypeError(fail(`out must be ${rows} numbers, got ${out.length}`));
  }
  if (gradient !== undefined && gradient.length !== full.length) {
    throw new TypeError(fail(`gradient must be ${full.length} numbers, got ${gradient.length}`));
  }
  if (weights !== undefined && weights.length !== rows) {
    throw new TypeError(fail(`weights must be ${rows} numbers, got ${weights.length}`));
  }
  if (!(temperature >= 0.01 && temperature <= 100)) {
    throw new RangeError(fail(`the temperature must lie in [0.01, 100], got ${temperature}`));
  }
  const share = 1 / temperature, counts = countedTokens(vocabulary);
  const result = out ?? new Float64Array(rows);
  for (let row = 0; row < rows; row++) {
    const begin = row * tokens;
    throwIfStopped();
    const logFull = logPartition(full, begin, counts, share);
    const logQuantized = logPartition(quantized, begin, counts, share);
    if (!Number.isFinite(logFull) || !Number.isFinite(logQuantized)) {
      throw new RangeError(fail(`logits must be finite, got others in row ${row}`));
    }
    let sum = 0;
    const weight = (weights?.[row] ?? 1) * temperature;
    for (let token = 0; token < tokens; token++) {
      if (counts[token] === 0) {
        if (gradient !== undefined) gradient[begin + token] = 0;
        continue;
      }
      const p = full[begin + token]! * share - logFull, q = quantized[begin + token]! * share - logQuantized;
      const probability = Math.exp(p);
      sum += probability * (p - q);
      if (gradient !== undefined) gradient[begin + token] = weight * (Math.exp(q) - probability);
    }
    result[row] = Math.max(0, sum) * temperature ** 2; // rounding may leave −1e-17
  }
  return result;
}

/** log Σ exp of the logits that count, times `share`. */
function logPartition(logits: Float32Array, begin: number, counts: Uint8Array, share: number): number {
  let largest = -Infinity;
  for (let token = 0; token < counts.length; token++) {
    if (counts[token] === 1 && !(logits[begin + token]! <= largest)) largest = logits[begin + token]!;
  }
  let sum = 0;
  for (let token = 0; token < counts.length; token++) {
    if (counts[token] === 1) sum += Math.exp((logits[begin + token]! - largest) * share);
  }
  return largest * share + Math.log(sum);
}

/**
 * The most probable token of each row among those that can be written; the lower of equal ones.
 *
 * **Shapes** `logits: f32[rows, vocabulary]` → `i32[rows]`
 *
 * @throws {RangeError} when every token is excluded
 *
 * @example
 * ```ts
 * import { likeliestTokens } from "./masked_transition.ts";
 * console.log(likeliestTokens(Float32Array.of(9, 1, 2), { vocabularySize: 3, maskToken: 0 })); // 2
 * ```
 */
export function likeliestTokens(logits: Float32Array, vocabulary: Vocabulary): Int32Array<ArrayBuffer> {
  const { vocabularySize } = vocabulary, counts = countedTokens(vocabulary), first = counts.indexOf(1);
  return Int32Array.from({ length: logits.length / vocabularySize }, (_, row) => {
    const begin = row * vocabularySize;
    let best = first;
    for (let token = first + 1; token < vocabularySize; token++) {
      if (counts[token] === 1 && logits[begin + token]! > logits[begin + best]!) best = token;
    }
    return best;
  });
}

/** 1 for each token that can be written, 0 for the others. */
function countedTokens(vocabulary: Vocabulary): Uint8Array {
  const { vocabularySize } = vocabulary, counts = new Uint8Array(vocabularySize).fill(1);
  for (const token of unwrittenTokens(vocabulary)) {
    if (!(Number.isInteger(token) && token >= 0 && token < vocabularySize)) {
      throw new RangeError(
        `Cannot compare tokens: excluded tokens must be from 0 to ${vocabularySize - 1}, got ${token}`,
      );
    }
    counts[token] = 0;
  }
  if (!counts.includes(1)) {
    throw new RangeError("Cannot compare tokens: some token must not be excluded, got none");
  }
  return counts;
}
