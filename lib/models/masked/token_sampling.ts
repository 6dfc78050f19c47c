/** From one position's logits to a proposed token and the model's confidence in it. */
import { checkWhole } from "../../native/call.ts";
import { throwIfStopped } from "../../progress.ts";
import type { RandomStream } from "../random.ts";

/** Measure of confidence: a token's probability, its lead over the second, or the negative entropy of all. */
export type Confidence = "probability" | "margin" | "negative_entropy";

export interface TokenSamplingOptions {
  /** 0 takes the most probable token. Default 0. */
  readonly temperature?: number | undefined;
  /** Keeps the fewest tokens whose probabilities reach this sum. Default 1, all. */
  readonly topP?: number | undefined;
  /** Keeps this many tokens. Default all. */
  readonly topK?: number | undefined;
  /** Tokens whose probability is taken as 0. */
  readonly excludedTokens?: readonly number[] | undefined;
}

/** @throws {RangeError} when an option is out of its range */
export function checkSamplingOptions(
  doing: string,
  options: TokenSamplingOptions,
  vocabularySize: number,
): void {
  const { temperature = 0, topP = 1, topK, excludedTokens = [] } = options;
  if (!(temperature >= 0 && temperature < Infinity)) {
    throw new RangeError(`Cannot ${doing}: temperature must be a number ≥ 0, got ${temperature}`);
  }
  if (!(topP > 0 && topP <= 1)) throw new RangeError(`Cannot ${doing}: topP must lie in (0, 1], got ${topP}`);
  if (topK !== undefined) checkWhole(doing, "topK", topK, 1);
  const bad = excludedTokens.find((token) =>
    !Number.isInteger(token) || token < 0 || token >= vocabularySize
  );
  if (bad !== undefined) {
    throw new RangeError(
      `Cannot ${doing}: excluded tokens must be from 0 to ${vocabularySize - 1}, got ${bad}`,
    );
  }
  if (new Set(excludedTokens).size >= vocabularySize) {
    throw new RangeError(
      `Cannot ${doing}: excluded tokens must leave one of ${vocabularySize}, got none left`,
    );
  }
}

/** A proposal for one position. */
export interface Proposal {
  readonly token: number;
  readonly confidence: number;
}

/** Proposes tokens for positions one after the other. */
export class TokenSampler {
  readonly #probabilities: Float64Array;
  readonly #options: TokenSamplingOptions;
  readonly #confidence: Confidence;

  constructor(vocabularySize: number, options: TokenSamplingOptions, confidence: Confidence) {
    checkSamplingOptions("sample tokens", options, vocabularySize);
    this.#probabilities = new Float64Array(vocabularySize);
    this.#options = options;
    this.#confidence = confidence;
  }

  /** Dream's `sample_tokens`: temperature, top-p, top-k, softmax. **Shapes** `logits: f32[vocabulary]` */
  propose(logits: Float32Array, random: RandomStream): Proposal {
    const { temperature = 0, topP = 1, topK, excludedTokens = [] } = this.#options;
    const p = this.#probabilities;
    throwIfStopped();
    for (let i = 0; i < p.length; i++) p[i] = logits[i]!;
    for (const token of excludedTokens) p[token] = -Infinity;
    if (temperature > 0) { for (let i = 0; i < p.length; i++) p[i]! /= temperature; }
    if (topP < 1) keepTopP(p, topP);
    if (topK !== undefined && topK < p.length) keepTopK(p, topK);
    softmaxInPlace(p);
    const token = temperature > 0 ? draw(p, random) : indexOfLargest(p);
    return { token, confidence: this.#confidenceOf(p, token) };
  }

  #confidenceOf(p: Float64Array, token: number): number {
    if (this.#confidence === "probability") return p[token]!;
    if (this.#confidence === "negative_entropy") {
      let sum = 0;
      for (let i = 0; i < p.length; i++) sum += p[i]! * Math.log(p[i]! + 1e-10);
      return sum;
    }
    let first = 0, second = 0;
    for (let i = 0; i < p.length; i++) {
      const value = p[i]!;
      if (value > first) [second, first] = [first, value];
      else if (value > second) second = value;
    }
    return first - second;
  }
}

/** Turns logits into probabilities; `-Infinity` becomes 0. */
export function softmaxInPlace(values: Float64Array): void {
  let largest = -Infinity;
  for (let i = 0; i < values.length; i++) if (values[i]! > largest) largest = values[i]!;
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += values[i] = Math.exp(values[i]! - largest);
  for (let i = 0; i < values.length; i++) values[i]! /= sum;
}

/** The first of the largest. */
export function indexOfLargest(values: ArrayLike<number>): number {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i]! > values[best]!) best = i;
  return best;
}

/** An index drawn with these probabilities. */
function draw(probabilities: Float64Array, random: RandomStream): number {
  let left = random.uniform();
  let last = 0;
  for (let i = 0; i < probabilities.length; i++) {
    const p = probabilities[i]!;
    if (p === 0) continue;
    last = i;
    left -= p;
    if (left < 0) return i;
  }
  return last; // rounding left the sum a little below 1
}

/** Keeps the fewest most probable tokens whose sum is above `topP`; sets the others to -Infinity. */
function keepTopP(logits: Float64Array, topP: number): void {
  const probabilities = logits.slice();
  softmaxInPlace(probabilities);
  const order = new Uint32Array(logits.length).map((_, i) => i)
    .sort((a, b) => probabilities[b]! - probabilities[a]! || a - b);
  let sum = 0;
  let keeps = true;
  for (const index of order) {
    if (!keeps) logits[index] = -Infinity;
    sum += probabilities[index]!;
    keeps = sum <= topP;
  }
}

/** Sets logits below the `topK`-th largest to -Infinity. */
function keepTopK(logits: Float64Array, topK: number): void {
  const threshold = logits.slice().sort()[logits.length - topK]!;
  for (let i = 0; i < logits.length; i++) if (logits[i]! < threshold) logits[i] = -Infinity;
}

/**
 * The indices of the `count` largest confidences, the first of equal ones first; with a temperature, drawn
 * without replacement with probabilities `softmax(confidence / temperature)`.
 */
export function selectMostConfident(
  confidences: readonly number[],
  count: number,
  temperature: number,
  random: RandomStream,
): number[] {
  const keys = temperature > 0
    // Gumbel's trick: the largest of log p + noise are a draw without replacement.
    ? confidences.map((value) => value / temperature - Math.log(-Math.log(random.uniform())))
    : confidences;
  return keys.map((_, i) => i).sort((a, b) => keys[b]! - keys[a]! || a - b).slice(0, count);
}
