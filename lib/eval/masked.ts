/** Distance between two language models at masked positions: token KL and agreement. */
import { randomTokens } from "../calibration/random_tokens.ts";
import type { MaskedTransformer, MaskedTransformerConfig } from "../models/mod.ts";
import { RandomStream } from "../models/random.ts";
import { likeliestTokens, tokenKl, type Vocabulary } from "../thermo/masked_transition.ts";
import { type BootstrapOptions, bootstrapRatio, type Interval } from "./intervals.ts";

/** A sequence with some of its tokens masked. */
export interface MaskedSequence {
  /** Probability with which each position was masked. */
  readonly maskRatio: number;
  /** `i32[tokens]` */
  readonly tokens: Int32Array;
  /** Masked positions, at least one. */
  readonly places: readonly number[];
  /** Tokens that belong there, where they are known. */
  readonly targets?: readonly number[];
}

/**
 * Sequences of tokens drawn evenly from all but the special ones; mask ratios are spread evenly over (0, 1],
 * at least one position is masked.
 *
 * @throws {RangeError} when the vocabulary has nothing but special tokens
 *
 * @example
 * ```ts
 * import { openKernels } from "../native/mod.ts";
 * import { loadDream } from "../models/mod.ts";
 * import { compareMasked, syntheticSequences } from "./masked.ts";
 * const model = loadDream("tests/models/dream-mini", await openKernels());
 * const sequences = syntheticSequences(model.config, { sequences: 4, tokens: 16, seed: 1 });
 * console.log(compareMasked(model, model, sequences).at(-1)!.kl.value); // 0
 * ```
 */
export function syntheticSequences(
  { vocabularySize, maskToken, padToken, bosToken, eosToken, eosTokens = [] }: MaskedTransformerConfig,
  { sequences, tokens, seed = 0 }: {
    readonly sequences: number;
    readonly tokens: number;
    readonly seed?: number | undefined;
  },
): MaskedSequence[] {
  const special = new Set([maskToken, padToken, bosToken, eosToken, ...eosTokens]);
  return Array.from({ length: sequences }, (_, i) => {
    const random = new RandomStream(seed, i);
    const maskRatio = (i + 0.5) / sequences;
    const ids = Int32Array.from(randomTokens(random, tokens, { vocabularySize, excluded: special }));
    const places = [...ids.keys()].filter(() => random.uniform() < maskRatio);
    if (places.length === 0) places.push(random.below(tokens));
    for (const place of places) ids[place] = maskToken;
    return { maskRatio, tokens: ids, places };
  });
}

/**
 * Logits at the masked positions, sequence after sequence, those of `batch` sequences in one array.
 *
 * **Shapes** sequences of equal length → `f32[masked positions, vocabulary]` each
 */
export function maskedLogits(
  model: MaskedTransformer,
  sequences: readonly MaskedSequence[],
  batch = 100,
): Float32Array<ArrayBuffer>[] {
  const tokens = sequences[0]?.tokens.length ?? 0;
  return Array.from({ length: Math.ceil(sequences.length / batch) }, (_, b) => {
    const part = sequences.slice(b * batch, (b + 1) * batch);
    const ids = new Int32Array(part.length * tokens);
    for (const [i, own] of part.entries()) ids.set(own.tokens, i * tokens);
    const rows = Int32Array.from(
      part.flatMap(({ places }, i) => places.map((place) => model.logitRow(i * tokens + place, tokens))),
    );
    const t = part.map(({ maskRatio }) => maskRatio);
    return Float32Array.from(model.forward(ids, part.length, { rows, t }));
  });
}

/** Sums over the masked positions of one sequence. */
export interface SequenceDistance {
  readonly maskRatio: number;
  readonly positions: number;
  /** Token KL in nats. */
  readonly kl: number;
  /** Positions at which both models have the same most probable token. */
  readonly agreed: number;
  /** Positions at which the compared and the full-precision model have the right token; 0 without targets. */
  readonly right: number;
  readonly fullRight: number;
}

/**
 * Distance of each sequence from its logits.
 *
 * @param full as {@linkcode maskedLogits} returns them, and `other` with the same batches
 */
export function maskedDistances(
  vocabulary: Vocabulary,
  sequences: readonly MaskedSequence[],
  full: readonly Float32Array[],
  other: readonly Float32Array[],
): SequenceDistance[] {
  const kl = full.flatMap((logits, b) => [...tokenKl(logits, other[b]!, vocabulary)]);
  const bestOf = (all: readonly Float32Array[]) =>
    all.flatMap((logits) => [...likeliestTokens(logits, vocabulary)]);
  const fullBest = bestOf(full), best = bestOf(other);
  let row = 0;
  return sequences.map(({ maskRatio, places, targets }) => {
    let sum = 0, agreed = 0, right = 0, fullRight = 0;
    for (let i = 0; i < places.length; i++, row++) {
      sum += kl[row]!;
      if (best[row] === fullBest[row]) agreed++;
      if (best[row] === targets?.[i]) right++;
      if (fullBest[row] === targets?.[i]) fullRight++;
    }
    return { maskRatio, positions: places.length, kl: sum, agreed, right, fullRight };
  });
}

/** Distance to full precision at masked positions of sequences in a range of mask ratios. */
export interface MaskedComparison {
  /** Mask ratios (low, high]. */
  readonly low: number;
  readonly high: number;
  readonly sequences: number;
  readonly positions: number;
  /** Mean token KL in nats. */
  readonly kl: Interval;
  /** Share of masked positions with the same most probable token. */
  readonly agreement: Interval;
  /** Share of masked positions with the right token, and full precision's; 0 without targets. */
  readonly accuracy: Interval;
  readonly fullAccuracy: Interval;
}

/** Distances by mask ratio, the last over all; intervals by a bootstrap over sequences. */
export function byMaskRatio(
  distances: readonly SequenceDistance[],
  { bins = 10, ...bootstrap }: BootstrapOptions & { readonly bins?: number | undefined } = {},
): MaskedComparison[] {
  const summary = (low: number, high: number): MaskedComparison[] => {
    const part = distances.filter(({ maskRatio }) => maskRatio > low && maskRatio <= high);
    if (part.length === 0) return [];
    const positions = part.map((each) => each.positions);
    const ratio = (key: "kl" | "agreed" | "right" | "fullRight") =>
      bootstrapRatio(part.map((each) => each[key]), positions, bootstrap);
    return [{
      low,
      high,
      sequences: part.length,
      positions: positions.reduce((sum, count) => sum + count, 0),
      kl: ratio("kl"),
      agreement: ratio("agreed"),
      accuracy: ratio("right"),
      fullAccuracy: ratio("fullRight"),
    }];
  };
  const ranges = Array.from({ length: bins }, (_, i) => summary(i / bins, (i + 1) / bins));
  return [...ranges.flat(), ...summary(0, 1)];
}

/**
 * Distance of a model to the full-precision one at masked positions, by mask ratio; the last entry is over
 * all.
 *
 * @throws {TypeError} when the models have different vocabularies
 */
export function compareMasked(
  full: MaskedTransformer,
  other: MaskedTransformer,
  sequences: readonly MaskedSequence[],
  options: BootstrapOptions & { readonly bins?: number | undefined } = {},
): MaskedComparison[] {
  const { vocabularySize } = full.config;
  if (other.config.vocabularySize !== vocabularySize) {
    throw new TypeError(
      `Cannot compare models: both must have ${vocabularySize} tokens, got ${other.config.vocabularySize}`,
    );
  }
  const logits = maskedLogits(full, sequences),
    own = other === full ? logits : maskedLogits(other, sequences);
  return byMaskRatio(maskedDistances(full.config, sequences, logits, own), options);
}
