/** Calibration data of language models: records of text or tokens, with masks drawn as in training. */
import { parseJsonLine } from "../files/json.ts";
import { quote, readWhole } from "../files/whole.ts";
import { loadTokenizer, type MaskedTransformer, RandomStream, type SequenceBatch } from "../models/mod.ts";
import { SafetensorsFile } from "../tensor/mod.ts";
import { maskRatioAxis } from "../time/mod.ts";
import {
  calibrationFault as fail,
  type CalibrationOptions,
  type CalibrationPart,
  type CalibrationSet,
  type Draw,
  draw,
  fewRecords,
} from "./draw.ts";

/** Largest file of calibration text: it is held as one string, which engines limit to half a gigabyte. */
const MAX_CALIBRATION_BYTES = 256 * 2 ** 20;
/** Most tokens of a calibration sequence; longer records are cut. */
export const MAX_SEQUENCE_TOKENS = 2048;
/** Tokens of a synthetic sequence, at most. */
const SYNTHETIC_TOKENS = 128;
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

/** A record's tokens, and from where on they may be masked. */
interface Sequence {
  readonly tokens: readonly number[];
  readonly answerStart: number;
}

/** Text of a JSONL file. */
function readText(path: string): string {
  return new TextDecoder().decode(readWhole(path, MAX_CALIBRATION_BYTES, (reason) => fail(path, reason)));
}

/**
 * Records of a JSONL file: `{"prompt", "answer"}`, `{"text"}` or `{"input_ids", "prompt_length"?}` a line.
 */
async function readSequences(model: MaskedTransformer, folder: string, path: string): Promise<Sequence[]> {
  const { bosToken, eosToken, maskToken, padToken, vocabularySize } = model.config;
  let tokenizer: Awaited<ReturnType<typeof loadTokenizer>> | undefined;
  const bos = bosToken === undefined ? [] : [bosToken], eos = eosToken === undefined ? [] : [eosToken];
  const sequences: Sequence[] = [];
  for (const [i, line] of readText(path).replace(/^\ufeff/, "").split("\n").entries()) {
    if (line.trim() === "") continue;
    const wrong = (reason: string, cause?: unknown) => fail(path, `line ${i + 1} ${reason}`, cause);
    const encode = async (value: string) => {
      try {
        return (tokenizer ??= await loadTokenizer(folder)).encode(value);
      } catch (cause) {
        if (!(cause instanceof RangeError)) throw cause;
        throw wrong(`must be text of the model's vocabulary: ${cause.message}`, cause);
      }
    };
    let record: Record<string, unknown>;
    try {
      record = parseJsonLine(line) as Record<string, unknown>;
    } catch (cause) {
      throw wrong("must be JSON", cause);
    }
    const { prompt, answer, text, input_ids: ids, prompt_length: promptLength } = record ?? {};
    if (typeof prompt === "string" && typeof answer === "string") {
      const start = [...bos, ...await encode(prompt)], end = await encode(answer);
      if (end.length === 0) throw wrong("must have an answer, got an empty one");
      sequences.push({ tokens: [...start, ...end, ...eos], answerStart: start.length });
    } else if (typeof text === "string") {
      const tokens = await encode(text);
      if (tokens.length === 0) throw wrong("must have text, got an empty one");
      sequences.push({ tokens: [...bos, ...tokens, ...eos], answerStart: bos.length });
    } else if (Array.isArray(ids)) {
      const bad = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= vocabularySize);
      if (bad !== undefined || ids.length === 0) {
        throw wrong(
          `must have input_ids from 0 to ${vocabularySize - 1}, got ${ids.length === 0 ? "none" : bad}`,
        );
      }
      const answerStart = promptLength === undefined ? 0 : promptLength as number;
      if (!Number.isInteger(answerStart) || answerStart < 0 || answerStart >= ids.length) {
        throw wrong(
          `must have a prompt_length from 0 to ${ids.length - 1}, got ${JSON.stringify(promptLength)}`,
        );
      }
      if (!ids.some((id) => id !== maskToken && id !== padToken)) {
        throw wrong("must have tokens beside mask and padding, got none");
      }
      sequences.push({ tokens: ids as number[], answerStart });
    } else {
      throw wrong('must be {"prompt", "answer"}, {"text"} or {"input_ids", "prompt_length"?}');
    }
  }
  if (sequences.length === 0) throw fail(path, "it must hold records, got none");
  return sequences;
}

/** Records of a safetensors file: `input_ids: I32 or I64 [records, tokens]`. */
function readTokenTensor(model: MaskedTransformer, path: string): Sequence[] {
  using file = SafetensorsFile.open(path);
  const info = file.tensors.get("input_ids");
  if (info === undefined || (info.dtype !== "I32" && info.dtype !== "I64") || info.shape.length !== 2) {
    throw fail(path, 'it must hold "input_ids" as I32 or I64 [records, tokens]');
  }
  const bytes = file.read("input_ids");
  const { vocabularySize, maskToken, padToken } = model.config;
  const ids = info.dtype === "I32"
    ? Int32Array.from(new Int32Array(bytes.buffer, bytes.byteOffset, info.elements))
    : Float64Array.from(new BigInt64Array(bytes.buffer, bytes.byteOffset, info.elements), Number);
  const bad = ids.findIndex((id) => id < 0 || id >= vocabularySize);
  if (bad >= 0) {
    throw fail(path, `tokens must be from 0 to ${vocabularySize - 1}, got ${ids[bad]} at ${bad}`);
  }
  const [records, tokens] = info.shape as [number, number];
  if (records === 0 || tokens === 0) throw fail(path, "it must hold records, got none");
  return Array.from({ length: records }, (_, i): Sequence => {
    const all = Array.from(ids.subarray(i * tokens, (i + 1) * tokens));
    let end = all.length;
    while (end > 1 && padToken !== undefined && all[end - 1] === padToken) end--;
    if (!all.some((id) => id !== maskToken && id !== padToken)) {
      throw fail(path, `record ${i} must have tokens beside mask and padding, got none`);
    }
    return { tokens: all.slice(0, end), answerStart: 0 };
  });
}

/**
 * Random tokens of a vocabulary, all alike but for some that do not occur.
 *
 * @throws {RangeError} when no token is left
 */
export function randomTokens(
  random: RandomStream,
  count: number,
  { vocabularySize, excluded }: { readonly vocabularySize: number; readonly excluded: ReadonlySet<unknown> },
): number[] {
  if (excluded.size >= vocabularySize) {
    throw new RangeError(
      `Cannot make sequences: the vocabulary must have ordinary tokens, got only ${vocabularySize} special ones`,
    );
  }
  return Array.from({ length: count }, () => {
    let token = random.below(vocabularySize);
    while (excluded.has(token)) token = random.below(vocabularySize);
    return token;
  });
}

/** Sequences of random tokens, for a model without data. */
function syntheticSequences({ config }: MaskedTransformer, count: number, seed: number): Sequence[] {
  const { vocabularySize, maskToken, padToken, maxTokens } = config;
  const vocabulary = { vocabularySize, excluded: new Set([maskToken, padToken]) };
  const length = Math.min(SYNTHETIC_TOKENS, maxTokens);
  return Array.from({ length: count }, (_, i) => ({
    tokens: randomTokens(new RandomStream(seed + 1, i), length, vocabulary),
    answerStart: 0,
  }));
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
  records: readonly Sequence[],
  { length, seed, shift, weights: { predicted, visible, padding } }: Masking,
  part: readonly Draw[],
): CalibrationPart<SequenceBatch> {
  const inputIds = new Int32Array(part.length * length), weights = new Float32Array(part.length * length);
  for (const [i, { record, stream, time }] of part.entries()) {
    const { tokens, answerStart } = records[record]!;
    const random = new RandomStream(seed, stream);
    const ids = inputIds.subarray(i * length, (i + 1) * length);
    const own = weights.subarray(i * length, (i + 1) * length);
    const used = Math.min(length, tokens.length), start = Math.min(answerStart, used - 1);
    for (let at = 0; at < length; at++) {
      const isToken = at < used || padToken === undefined;
      ids[at] = isToken ? tokens[at % tokens.length]! : padToken;
      own[at] = isToken ? visible : padding;
    }
    let masked = 0;
    for (let at = start; at < used; at++) {
      if (random.uniform() >= Math.max(MIN_MASK_RATIO, time)) continue;
      ids[at] = maskToken;
      masked++;
    }
    if (masked === 0) ids[start + random.below(used - start)] = maskToken;
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

/**
 * Masked sequences for a language model.
 *
 * @throws {CalibrationError} when the file is not what the model reads
 */
export async function sequenceSet(
  model: MaskedTransformer,
  folder: string,
  { source, samples, seed, weights = "by_role" }: CalibrationOptions,
): Promise<CalibrationSet<SequenceBatch>> {
  const isSynthetic = source === "synthetic";
  const records = isSynthetic
    ? syntheticSequences(model, samples, seed)
    : source.endsWith(".safetensors")
    ? readTokenTensor(model, source)
    : await readSequences(model, folder, source);
  const { maxTokens, logitShift: shift } = model.config;
  const limit = Math.min(maxTokens, MAX_SEQUENCE_TOKENS);
  const late = records.findIndex(({ answerStart }) => answerStart >= limit);
  if (late >= 0) {
    throw fail(
      source,
      `record ${late + 1} must leave room for what is predicted in ${limit} tokens, got a prompt of ${
        records[late]!.answerStart
      }`,
    );
  }
  const length = records.reduce(
    (longest, { tokens }) => Math.max(longest, Math.min(limit, tokens.length)),
    0,
  );
  const cut = records.filter(({ tokens }) => tokens.length > limit).length;
  const masking: Masking = {
    length,
    seed,
    shift,
    weights: weights === "alike" ? { predicted: 1, visible: 1, padding: 1 } : POSITION_WEIGHTS,
  };
  return {
    source: isSynthetic
      ? `${samples} synthetic sequences (random tokens)`
      : `${samples} masked sequences of the ${records.length} records in ${quote(source)}`,
    isSynthetic,
    samples,
    warnings: [
      ...(cut > 0
        ? [`${cut} of ${records.length} records are longer than ${limit} tokens and were cut`]
        : []),
      ...fewRecords(records.length, isSynthetic),
    ],
    distinctPositions: records.reduce((sum, { tokens }) => sum + Math.min(length, tokens.length), 0),
    axis: maskRatioAxis(MASK_RATIO_BINS),
    ...draw(
      records.length,
      samples,
      seed,
      length,
      (part) => maskedBatch(model.config, records, masking, part),
    ),
  };
}
