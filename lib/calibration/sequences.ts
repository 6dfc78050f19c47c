/** Calibration data of language models: records of text or tokens, with masks drawn as in training. */
import { quote } from "../files/whole.ts";
import {
  forwardCost,
  type LoadedModel,
  type MaskedTransformer,
  RandomStream,
  type SequenceBatch,
} from "../models/mod.ts";
import { maskRatioAxis } from "../time/mod.ts";
import {
  type CalibrationOptions,
  type CalibrationPart,
  type CalibrationSet,
  type Draw,
  draw,
  recordCount,
  recordWarnings,
  type SampleBounds,
  usualSamples,
} from "./draw.ts";
import { randomTokens } from "./random_tokens.ts";
import { readRecords, type SequenceRecords, writtenRecords } from "./records.ts";

/** Most tokens of a calibration sequence; longer records are cut. */
export const MAX_SEQUENCE_TOKENS = 2048;
/** Tokens of a synthetic sequence, at most. */
const SYNTHETIC_TOKENS = 128;
/** A pass over the samples of a large model takes a few seconds at 10¹¹ multiplications a second. */
const BOUNDS: SampleBounds = { multiplyAdds: 2.5e11, least: 8 };
/** Least mask ratio. */
const MIN_MASK_RATIO = 1e-3;

/**
 * Weight of a position: predicted tokens fully, because they are the loss; visible ones because
 * attention reads them; padding little, because most of it is alike. docs/decisions.md has the measurements.
 */
export const POSITION_WEIGHTS = { predicted: 1, visible: 0.3, padding: 0.1 };

/**
 * Bins of the axis of mask ratios: as many as image models mostly have timesteps, so that a window is the
 * same share of the axis.
 */
const MASK_RATIO_BINS = 1000;

/** Sequences of random tokens, for a model without data. */
function syntheticRecords({ config }: MaskedTransformer, count: number, seed: number): SequenceRecords {
  const { vocabularySize, maskToken, padToken, maxTokens } = config;
  const vocabulary = { vocabularySize, excluded: new Set([maskToken, padToken]) };
  const length = Math.min(SYNTHETIC_TOKENS, maxTokens);
  const sequences = Array.from({ length: count }, (_, i) => ({
    tokens: Int32Array.from(randomTokens(new RandomStream(seed + 1, i), length, vocabulary)),
    start: 0,
  }));
  return { sequences, count, cut: 0, warnings: [], isPredictable: () => true };
}

/** Length, seed and weights of batches. */
interface Masking {
  readonly length: number;
  readonly seed: number;
  readonly shift: number;
  readonly weights: typeof POSITION_WEIGHTS;
}

/**
 * A batch's sequences, masked, one after the other; without a padding token, shorter ones go on from their
 * beginning.
 */
function maskedBatch(
  { maskToken, padToken }: MaskedTransformer["config"],
  { sequences, isPredictable }: SequenceRecords,
  { length, seed, shift, weights: { predicted, visible, padding } }: Masking,
  part: readonly Draw[],
): CalibrationPart<SequenceBatch> {
  const inputIds = new Int32Array(part.length * length), weights = new Float32Array(part.length * length);
  for (const [i, { record, stream, time }] of part.entries()) {
    const { tokens, start, labelled } = sequences[record]!;
    const random = new RandomStream(seed, stream);
    const ids = inputIds.subarray(i * length, (i + 1) * length);
    const own = weights.subarray(i * length, (i + 1) * length);
    const used = Math.min(length, tokens.length);
    for (let at = 0; at < length; at++) {
      const isToken = at < used || padToken === undefined;
      ids[at] = isToken ? tokens[at % tokens.length]! : padToken;
      own[at] = isToken ? visible : padding;
    }
    const places: number[] = [];
    for (let at = start; at < used; at++) {
      if (labelled?.[at] !== 0 && isPredictable(tokens, at)) places.push(at);
    }
    const masked = places.filter(() => random.uniform() < Math.max(MIN_MASK_RATIO, time));
    if (masked.length === 0) masked.push(places[random.below(places.length)]!);
    for (const at of masked) ids[at] = maskToken;
    for (let at = 0; at < length; at++) {
      if (ids[at] === maskToken) own[at] = own[Math.max(0, at - shift)] = predicted;
    }
  }
  return {
    batch: { inputIds, batch: part.length },
    samples: part.length,
    weights,
    times: Float64Array.from(part, ({ time }) => Math.max(MIN_MASK_RATIO, time)),
  };
}

/** Held-out sequences, as part of the others, and multiply-adds that a pass over them may take. */
const HELD_OUT_SHARE = 3, HELD_OUT_MULTIPLY_ADDS = 1e11;

/**
 * A few positions make up most of a KL: it tells candidates apart only over many sequences. There are more of
 * them where they cost a second or two.
 */
function heldOutShare(
  { kind, model: { config } }: Exclude<LoadedModel, { readonly kind: "dit" }>,
  samples: number,
  tokens: number,
): number {
  const { multiplyAdds } = forwardCost({ kind, config }, { batch: 1, tokens });
  return Math.min(HELD_OUT_SHARE, HELD_OUT_MULTIPLY_ADDS / (samples * multiplyAdds));
}

/**
 * Masked sequences for a language model.
 *
 * @throws {CalibrationError} when the file is not what the model reads
 */
export async function sequenceSet(
  loaded: Exclude<LoadedModel, { readonly kind: "dit" }>,
  options: CalibrationOptions,
): Promise<CalibrationSet<SequenceBatch>> {
  const { source, seed, weights = "by_role", own } = options, isSynthetic = source === "synthetic";
  const { kind, model } = loaded, { config } = model;
  const usual = (tokens: number) =>
    usualSamples(
      tokens,
      forwardCost({ kind, config }, { batch: 1, tokens, rows: 1 }).multiplyAdds,
      BOUNDS,
    );
  const { maxTokens, logitShift: shift } = model.config;
  const limit = Math.min(maxTokens, MAX_SEQUENCE_TOKENS);
  const records = isSynthetic
    ? syntheticRecords(
      model,
      options.samples ?? usual(Math.min(SYNTHETIC_TOKENS, config.maxTokens)).count,
      seed,
    )
    : own?.kind === "sequences"
    ? writtenRecords(loaded, own, limit)
    : await readRecords(loaded, source, limit);
  const { sequences, count, cut, warnings } = records, distinct = sequences.length;
  const length = sequences.reduce((longest, { tokens }) => Math.max(longest, tokens.length), 0);
  const { count: usualCount, isCostly } = usual(length), samples = options.samples ?? usualCount;
  const masking: Masking = {
    length,
    seed,
    shift,
    weights: weights === "alike" ? { predicted: 1, visible: 1, padding: 1 } : POSITION_WEIGHTS,
  };
  return {
    source: isSynthetic
      ? `${samples} synthetic sequences (random tokens)`
      : own !== undefined
      ? `${samples} masked sequences of the ${recordCount(distinct, count)} that the model wrote itself`
      : `${samples} masked sequences of the ${recordCount(distinct, count)} in ${quote(source)}`,
    isSynthetic,
    own,
    samples,
    warnings: [
      ...(cut > 0 ? [`${cut} of ${count} records are longer than ${limit} tokens and were cut`] : []),
      ...warnings,
      ...recordWarnings(distinct, count, isSynthetic || own !== undefined),
    ],
    distinctPositions: sequences.reduce((sum, { tokens }) => sum + tokens.length, 0),
    axis: maskRatioAxis(MASK_RATIO_BINS),
    ...draw(
      distinct,
      { ...options, samples },
      length,
      (part) => maskedBatch(model.config, records, masking, part),
      { share: heldOutShare(loaded, samples, length), isCostly },
    ),
  };
}
