/**
 * Transitions of masked diffusion (Dream, LLaDA): the probability that a step writes a masked position, and the step KL that two models'
 * logits make. Gaussian diffusion is in transition.ts.
 */

/**
 * Probability ρ with which a step from time t to s writes a masked position: `(α_s − α_t)/(1 − α_t)` with α = 1 − t, that is `1 − s/t`.
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

export interface MaskedKlOptions {
  /** Tokens that are never written, as `<mask>`: both models give them probability 0. */
  readonly excludedTokens?: readonly number[] | undefined;
  /** Where the rows' divergences go, `f64[rows]`. */
  readonly out?: Float64Array<ArrayBuffer> | undefined;
  /** Where `weight · (p_Q − p_F)` goes, the gradient by the quantized logits of the weighted sum: `f32[rows, vocabulary]`. */
  readonly gradient?: Float32Array<ArrayBuffer> | undefined;
  /** Weight of each row in the gradient, `[rows]`. Default 1. */
  readonly weights?: ArrayLike<number> | undefined;
  /**
   * Temperature τ that both models' logits are divided by; divergences are multiplied by τ², so that gradients keep their size (Hinton, Vinyals
   * & Dean, https://arxiv.org/abs/1503.02531). The gradient is then `weight · τ (p_Q − p_F)`. Default 1, the step KL itself.
   */
  readonly temperature?: number | undefined;
}

/**
 * `KL(p_F ‖ p_Q)` of every row, softmax and sum in float64.
 *
 * **Shapes** `full` and `quantized: f32[rows, vocabulary]` → `f64[rows]`
 *
 * @throws {TypeError} when the shapes do not fit
 * @throws {RangeError} when a logit that counts is NaN or infinite, every token is excluded, or the temperature is not in [0.01, 100]
 *
 * @example
 * ```ts
 * import { tokenKl } from "./masked_transition.ts";
 * console.log(tokenKl(Float32Array.of(0, 0), Float32Array.of(0, 1), 2)); // 0.1201
 * ```
 */
export function tokenKl(
  full: Float32Array,
  quantized: Float32Array,
  vocabulary: number,
  { excludedTokens = [], out, gradient, weights, temperature = 1 }: MaskedKlOptions = {},
): Float64Array<ArrayBuffer> {
  const rows = full.length / vocabulary;
  const fail = (reason: string) => `Cannot compute a KL divergence: ${reason}`;
  if (!Number.isInteger(rows) || quantized.length !== full.length) {
    throw new TypeError(
      fail(`logits must be [rows, ${vocabulary}] twice, got ${full.length} and ${quantized.length} numbers`),
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
  const counts = new Uint8Array(vocabulary).fill(1), share = 1 / temperature;
  for (const token of excludedTokens) {
    if (!(Number.isInteger(token) && token >= 0 && token < vocabulary)) {
      throw new RangeError(
        fail(`excluded tokens must be from 0 to ${vocabulary - 1}, got ${token}`),
      );
    }
    counts[token] = 0;
  }
  if (!counts.includes(1)) throw new RangeError(fail("some token must not be excluded, got none"));
  const result = out ?? new Float64Array(rows);
  for (let row = 0; row < rows; row++) {
    const begin = row * vocabulary;
    const logFull = logPartition(full, begin, counts, share);
    const logQuantized = logPartition(quantized, begin, counts, share);
    if (!Number.isFinite(logFull) || !Number.isFinite(logQuantized)) {
      throw new RangeError(fail(`logits must be finite, got others in row ${row}`));
    }
    let sum = 0;
    const weight = (weights?.[row] ?? 1) * temperature;
    for (let token = 0; token < vocabulary; token++) {
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
 * The KL divergence of a whole step: each masked position is written with probability ρ, independently, so that it is
 * `ρ · Σ KL(p_F ‖ p_Q)` over the masked positions exactly (DESIGN.md §3).
 *
 * **Shapes** `full` and `quantized: f32[masked positions, vocabulary]`
 *
 * @throws as {@linkcode tokenKl} and {@linkcode unmaskProbability}
 */
export function maskedStepKl(
  full: Float32Array,
  quantized: Float32Array,
  vocabulary: number,
  step: { readonly from: number; readonly to: number },
  options: MaskedKlOptions = {},
): number {
  const rho = unmaskProbability(step.from, step.to);
  return rho * tokenKl(full, quantized, vocabulary, options).reduce((sum, kl) => sum + kl, 0);
}
