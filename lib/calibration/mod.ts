/**
 * Calibration data made ready to run: sequences with masks drawn as in training, images noised to every timestep, each with the
 * weights of its positions, split into a part that is solved on and a part that is held out. Made-up data say so.
 */
import { existsSync, readFileSync, statSync } from "node:fs";
import { CalibrationError } from "../errors.ts";
import {
  type DitModel,
  type ImageBatch,
  imageNoise,
  type LoadedModel,
  loadScheduler,
  loadTokenizer,
  type MaskedTransformer,
  RandomStream,
  type Scheduler,
  type SequenceBatch,
} from "../models/mod.ts";
import { elementCount, SafetensorsFile } from "../tensor/mod.ts";
import { type CalibrationStatistics, maskRatioAxis, type TimeAxis, timestepAxis } from "../time/mod.ts";
import { inputError, quote } from "../files/whole.ts";

/** Largest file of calibration text: it is held as one text, and engines end those at half a gigabyte. */
export const MAX_CALIBRATION_BYTES = 256 * 2 ** 20;
/** Most tokens of a calibration sequence; longer records are cut. */
export const MAX_SEQUENCE_TOKENS = 2048;
/** Every eighth record is held out: nothing is solved on it, candidates are chosen by it. */
const HELD_OUT = 8;
/** Held-out samples, as part of the others and at least: rare large errors decide their mean. */
const HELD_OUT_SHARE = 0.5, MIN_HELD_OUT_SAMPLES = 256;
/** Positions of one forward pass, roughly. */
const BATCH_POSITIONS = 4096;

/**
 * How much a position counts: predicted tokens fully, because they are the loss; visible ones because attention reads them; padding
 * little, because most of it is alike. docs/decisions.md has the measurements.
 */
const WEIGHTS = { predicted: 1, visible: 0.3, padding: 0.1 };
/** Part of the images that are shown without their class, as guidance shows them. */
const UNCONDITIONAL = 0.1;

/** Bins of the axis of mask ratios. */
const MASK_RATIO_BINS = 1000;

/** Samples that run together. */
export interface CalibrationPart<Batch> {
  readonly batch: Batch;
  readonly samples: number;
  /** `f32[positions]`: how much each position of the batch counts. */
  readonly weights: Float32Array<ArrayBuffer>;
  /** `f32[samples]`: how much each sample counts for a layer that reads a row a sample; 1 by default. */
  readonly sampleWeights?: Float32Array<ArrayBuffer> | undefined;
  /** Of each sample: mask ratio in (0, 1], or timestep. */
  readonly times: Float64Array<ArrayBuffer>;
}

export interface CalibrationSet<Batch> {
  /** Where the data come from, as a report says it. */
  readonly source: string;
  readonly isSynthetic: boolean;
  readonly samples: number;
  /** What whoever calibrates should know. */
  readonly warnings: readonly string[];
  /** Positions of all records, each counted once however often it is used. */
  readonly distinctPositions: number;
  /** What the parts' times are on. */
  readonly axis: TimeAxis;
  /** What images were noised by; undefined for sequences. */
  readonly scheduler?: Scheduler | undefined;
  readonly fit: readonly CalibrationPart<Batch>[];
  readonly heldOut: readonly CalibrationPart<Batch>[];
}

export interface CalibrationOptions {
  /** A JSONL or safetensors file, or `synthetic`. */
  readonly source: string;
  /** Sequences or noised images; records are used again, with other masks and noise, when there are fewer. */
  readonly samples: number;
  readonly seed: number;
}

function fail(path: string, message: string, cause?: unknown): CalibrationError {
  return new CalibrationError(`Cannot calibrate with ${quote(path)}: ${message}`, { path, cause });
}

/** Fewer records than this are learnt by heart: neither what is solved nor what is held out says much. */
const FEW_RECORDS = 64;

function fewRecords(count: number, isSynthetic: boolean): string[] {
  if (isSynthetic || count >= FEW_RECORDS) return [];
  return [
    `only ${count} records: what is solved on them may not hold for others, and a held-out error does not tell; ` +
    `give ${FEW_RECORDS} or more`,
  ];
}

/** Records in a random order, each once before any is used again. */
function pick(records: readonly number[], samples: number, random: RandomStream): number[] {
  const order: number[] = [];
  while (order.length < samples) {
    const round = [...records];
    for (let i = round.length - 1; i > 0; i--) {
      const j = random.below(i + 1);
      [round[i], round[j]] = [round[j]!, round[i]!];
    }
    order.push(...round);
  }
  return order.slice(0, samples);
}

/** A sample before it is drawn: its record, its own random stream, and where in the range of times it lies, in [0, 1). */
interface Draw {
  readonly record: number;
  readonly stream: number;
  readonly time: number;
}

/**
 * Draws samples of both parts. Each takes one of equal parts of the range of times, so that all times are there alike and without
 * gaps; their order is random, so that a batch has all.
 */
function draw<Batch>(
  records: number,
  samples: number,
  seed: number,
  positions: number,
  batchOf: (part: readonly Draw[]) => CalibrationPart<Batch>,
): Pick<CalibrationSet<Batch>, "fit" | "heldOut"> {
  const size = Math.max(1, Math.floor(BATCH_POSITIONS / positions));
  const random = new RandomStream(seed, 0x5eed);
  const indices = Array.from({ length: records }, (_, i) => i);
  const shuffled = pick(indices, records, random);
  const held = shuffled.slice(0, Math.floor(records / HELD_OUT)), fit = shuffled.slice(held.length);
  const part = (own: readonly number[], count: number, firstStream: number) => {
    if (own.length === 0) return [];
    const times = pick(Array.from({ length: count }, (_, i) => i), count, random);
    const draws = pick(own, count, random).map((record, i): Draw => ({
      record,
      stream: firstStream + i,
      time: (times[i]! + random.uniform()) / count,
    }));
    return Array.from(
      { length: Math.ceil(count / size) },
      (_, i) => batchOf(draws.slice(i * size, (i + 1) * size)),
    );
  };
  return {
    fit: part(fit, samples, 0),
    heldOut: part(held, Math.max(MIN_HELD_OUT_SAMPLES, Math.ceil(samples * HELD_OUT_SHARE)), 2 ** 20),
  };
}

// Sequences ----------------------------------------------------------------------------------------------------

/** A record's tokens, and from where on they may be masked. */
interface Sequence {
  readonly tokens: readonly number[];
  readonly answerStart: number;
}

/** Records of a JSONL file: `{"prompt", "answer"}`, `{"text"}` or `{"input_ids", "prompt_length"?}` a line. */
async function readSequences(model: MaskedTransformer, folder: string, path: string): Promise<Sequence[]> {
  let text: string;
  try {
    const { size } = statSync(path);
    if (size > MAX_CALIBRATION_BYTES) {
      throw fail(path, `the file may have ${MAX_CALIBRATION_BYTES} bytes, got ${size}`);
    }
    text = readFileSync(path, "utf8");
  } catch (cause) {
    if (cause instanceof CalibrationError) throw cause;
    throw inputError(path, cause);
  }
  const { bosToken, eosToken, maskToken, padToken, vocabularySize } = model.config;
  let tokenizer: Awaited<ReturnType<typeof loadTokenizer>> | undefined;
  const encode = async (value: string) => (tokenizer ??= await loadTokenizer(folder)).encode(value);
  const bos = bosToken === undefined ? [] : [bosToken], eos = eosToken === undefined ? [] : [eosToken];
  const sequences: Sequence[] = [];
  for (const [i, line] of text.replace(/^\ufeff/, "").split("\n").entries()) {
    if (line.trim() === "") continue;
    const wrong = (reason: string, cause?: unknown) => fail(path, `line ${i + 1} ${reason}`, cause);
    let record: Record<string, unknown>;
    try {
      record = JSON.parse(line) as Record<string, unknown>;
    } catch (cause) {
      throw wrong("must be JSON", cause);
    }
    const { prompt, answer, text, input_ids: ids, prompt_length: promptLength } = record ?? {};
    if (typeof prompt === "string" && typeof answer === "string") {
      try {
        const start = [...bos, ...await encode(prompt)], end = await encode(answer);
        if (end.length === 0) throw wrong("must have an answer, got an empty one");
        sequences.push({ tokens: [...start, ...end, ...eos], answerStart: start.length });
      } catch (cause) {
        if (!(cause instanceof RangeError)) throw cause;
        throw wrong(`must be text of the model's vocabulary: ${cause.message}`, cause);
      }
    } else if (typeof text === "string") {
      try {
        const tokens = await encode(text);
        if (tokens.length === 0) throw wrong("must have text, got an empty one");
        sequences.push({ tokens: [...bos, ...tokens, ...eos], answerStart: bos.length });
      } catch (cause) {
        if (!(cause instanceof RangeError)) throw cause;
        throw wrong(`must be text of the model's vocabulary: ${cause.message}`, cause);
      }
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

/** Sequences of random tokens: what a model sees when nobody has real ones. */
function madeUpSequences(model: MaskedTransformer, count: number, seed: number): Sequence[] {
  const { vocabularySize, maskToken, padToken, maxTokens } = model.config;
  const length = Math.min(128, maxTokens);
  return Array.from({ length: count }, (_, i) => {
    const random = new RandomStream(seed + 1, i);
    const tokens = Array.from({ length }, () => {
      let token = random.below(vocabularySize);
      while (token === maskToken || token === padToken) token = random.below(vocabularySize);
      return token;
    });
    return { tokens, answerStart: 0 };
  });
}

async function sequenceSet(
  model: MaskedTransformer,
  folder: string,
  { source, samples, seed }: CalibrationOptions,
  shift: number,
): Promise<CalibrationSet<SequenceBatch>> {
  const isSynthetic = source === "synthetic";
  const records = isSynthetic
    ? madeUpSequences(model, samples, seed)
    : source.endsWith(".safetensors")
    ? readTokenTensor(model, source)
    : await readSequences(model, folder, source);
  const { maskToken, padToken, maxTokens } = model.config;
  const limit = Math.min(maxTokens, MAX_SEQUENCE_TOKENS);
  let longest = 0, cut = 0;
  for (const [i, { tokens, answerStart }] of records.entries()) {
    longest = Math.max(longest, tokens.length);
    if (tokens.length > limit) cut++;
    if (answerStart < limit) continue;
    throw fail(
      source,
      `record ${
        i + 1
      } must leave room for what is predicted in ${limit} tokens, got a prompt of ${answerStart}`,
    );
  }
  const length = Math.min(limit, longest);
  const warnings = [
    ...(cut > 0 ? [`${cut} of ${records.length} records are longer than ${limit} tokens and were cut`] : []),
    ...fewRecords(records.length, isSynthetic),
  ];
  /** A batch's sequences, one after the other; where there is no padding, shorter ones go on from their beginning. */
  const batchOf = (part: readonly Draw[]): CalibrationPart<SequenceBatch> => {
    const inputIds = new Int32Array(part.length * length), weights = new Float32Array(part.length * length);
    for (const [i, { record, stream, time }] of part.entries()) {
      const { tokens, answerStart } = records[record]!;
      const random = new RandomStream(seed, stream);
      const ids = inputIds.subarray(i * length, (i + 1) * length);
      const own = weights.subarray(i * length, (i + 1) * length);
      const used = Math.min(length, tokens.length), start = Math.min(answerStart, used - 1);
      for (let at = 0; at < length; at++) {
        ids[at] = at < used || padToken === undefined ? tokens[at % tokens.length]! : padToken;
        own[at] = at < used || padToken === undefined ? WEIGHTS.visible : WEIGHTS.padding;
      }
      let masked = 0;
      for (let at = start; at < used; at++) {
        if (random.uniform() >= Math.max(1e-3, time)) continue;
        ids[at] = maskToken;
        masked++;
      }
      if (masked === 0) ids[start + random.below(used - start)] = maskToken;
      for (let at = 0; at < length; at++) {
        if (ids[at] === maskToken) own[at] = own[Math.max(0, at - shift)] = WEIGHTS.predicted;
      }
    }
    return {
      batch: { inputIds, batch: part.length },
      samples: part.length,
      weights,
      times: Float64Array.from(part, ({ time }) => Math.max(1e-3, time)),
    };
  };
  return {
    source: isSynthetic
      ? `${samples} synthetic sequences (random tokens)`
      : `${samples} masked sequences of the ${records.length} records in ${quote(source)}`,
    isSynthetic,
    samples,
    warnings,
    distinctPositions: records.reduce((sum, { tokens }) => sum + Math.min(length, tokens.length), 0),
    axis: maskRatioAxis(MASK_RATIO_BINS),
    ...draw(records.length, samples, seed, length, batchOf),
  };
}

// Images -------------------------------------------------------------------------------------------------------

/** Images in [−1, 1] with their classes: `images: U8, F32 or F16 [n, …]`, `labels: U8, I32 or I64 [n]`. */
function readImages(model: DitModel, path: string): { images: Float32Array; labels: Int32Array } {
  using file = SafetensorsFile.open(path);
  const images = file.tensors.get("images"), labels = file.tensors.get("labels");
  const elements = model.imageElements;
  if (images === undefined || !["U8", "F32", "F16"].includes(images.dtype)) {
    throw fail(path, 'it must hold "images" as U8, F32 or F16');
  }
  const count = images.shape[0] ?? 0;
  if (count === 0 || elementCount(images.shape) !== count * elements) {
    throw fail(
      path,
      `images must have ${elements} numbers each, as the model's, got [${images.shape.join(", ")}]`,
    );
  }
  if (labels === undefined || elementCount(labels.shape) !== count) {
    throw fail(path, `it must hold "labels" for ${count} images, got ${labels?.shape.join(", ") ?? "none"}`);
  }
  const bytes = file.read("images");
  const data = images.dtype === "U8"
    ? Float32Array.from(bytes, (value) => value / 127.5 - 1)
    : images.dtype === "F32"
    ? new Float32Array(bytes.slice().buffer)
    : Float32Array.from(new Float16Array(bytes.slice().buffer));
  const bad = data.findIndex((value) => !Number.isFinite(value));
  if (bad >= 0) throw fail(path, `images must be finite, got ${data[bad]} at ${bad}`);
  const labelBytes = file.read("labels").slice();
  const classes = labels.dtype === "U8"
    ? Int32Array.from(labelBytes)
    : labels.dtype === "I32"
    ? new Int32Array(labelBytes.buffer)
    : labels.dtype === "I64"
    ? Int32Array.from(new BigInt64Array(labelBytes.buffer), Number)
    : undefined;
  if (classes === undefined) throw fail(path, `labels must be U8, I32 or I64, got ${labels.dtype}`);
  const badLabel = classes.findIndex((label) => label < 0 || label > model.config.classes);
  if (badLabel >= 0) {
    throw fail(
      path,
      `labels must be from 0 to ${model.config.classes}, got ${classes[badLabel]} at ${badLabel}`,
    );
  }
  return { images: data, labels: classes };
}

function imageSet(
  model: DitModel,
  folder: string,
  { source, samples, seed }: CalibrationOptions,
): CalibrationSet<ImageBatch> {
  const isSynthetic = source === "synthetic";
  const elements = model.imageElements, { classes } = model.config;
  const { images, labels } = isSynthetic
    ? {
      images: imageNoise(seed + 1, 0, samples, elements),
      labels: Int32Array.from({ length: samples }, (_, i) => i % classes),
    }
    : readImages(model, source);
  const scheduler = loadScheduler(folder);
  const { trainTimesteps } = scheduler.config;
  const { channels, sampleSize, patchSize } = model.config;
  const positions = (sampleSize / patchSize) ** 2;
  const batchOf = (part: readonly Draw[]): CalibrationPart<ImageBatch> => {
    const noisy = new Float32Array(part.length * elements);
    const shown: number[] = [];
    const timesteps = part.map(({ time }) => Math.min(trainTimesteps - 1, Math.floor(time * trainTimesteps)));
    for (const [i, { record, stream }] of part.entries()) {
      const noise = imageNoise(seed, stream, 1, elements);
      scheduler.addNoise(
        images.subarray(record * elements, (record + 1) * elements),
        noise,
        timesteps[i]!,
        noise,
      );
      noisy.set(noise, i * elements);
      shown.push(new RandomStream(seed + 2, stream).uniform() < UNCONDITIONAL ? classes : labels[record]!);
    }
    return {
      batch: { samples: noisy, timesteps, labels: shown },
      samples: part.length,
      weights: new Float32Array(part.length * positions).fill(1),
      times: Float64Array.from(timesteps),
    };
  };
  return {
    source: isSynthetic
      ? `${samples} synthetic images (noise), ${channels} channels`
      : `${samples} noised images of the ${labels.length} in ${quote(source)}`,
    isSynthetic,
    samples,
    warnings: fewRecords(labels.length, isSynthetic),
    distinctPositions: labels.length * positions,
    axis: timestepAxis(trainTimesteps),
    scheduler,
    ...draw(labels.length, samples, seed, positions, batchOf),
  };
}

/** A model with the calibration data that it reads, and what was gathered of them before, if anything was. */
export type Calibrated =
  & { readonly statistics?: CalibrationStatistics | undefined }
  & (
    | {
      readonly kind: "sequences";
      readonly model: MaskedTransformer;
      /** Position `i` is predicted by the logits at `i − shift`. */
      readonly shift: number;
      readonly data: CalibrationSet<SequenceBatch>;
    }
    | { readonly kind: "images"; readonly model: DitModel; readonly data: CalibrationSet<ImageBatch> }
  );

/** A model with saved statistics in place of data: nothing is run, nothing is held out. */
export function withStatistics(loaded: LoadedModel, statistics: CalibrationStatistics): Calibrated {
  const { source, isSynthetic, samples, groups: { axis } } = statistics;
  const data = {
    source,
    isSynthetic,
    samples,
    warnings: [],
    distinctPositions: Infinity,
    axis,
    fit: [],
    heldOut: [],
  };
  return loaded.kind === "dit"
    ? { kind: "images", model: loaded.model, data, statistics }
    : { kind: "sequences", model: loaded.model, shift: loaded.model.config.logitShift, data, statistics };
}

/**
 * Loads a model's calibration data.
 *
 * @throws {CalibrationError} when the file is not what the model reads: another vocabulary, another image size, an unknown form
 */
export async function loadCalibration(
  loaded: LoadedModel,
  options: CalibrationOptions,
): Promise<Calibrated> {
  const { source, samples } = options;
  if (!Number.isInteger(samples) || samples < 1) {
    throw new RangeError(`Cannot calibrate: samples must be a whole number ≥ 1, got ${samples}`);
  }
  if (source !== "synthetic" && !existsSync(source)) {
    throw fail(source, 'it must be a JSONL or safetensors file, or "synthetic", got nothing there');
  }
  if (loaded.kind === "dit") {
    if (source !== "synthetic" && !source.endsWith(".safetensors")) {
      throw fail(source, "an image model reads images and labels from a safetensors file");
    }
    return { kind: "images", model: loaded.model, data: imageSet(loaded.model, loaded.folder, options) };
  }
  const shift = loaded.model.config.logitShift;
  return {
    kind: "sequences",
    model: loaded.model,
    shift,
    data: await sequenceSet(loaded.model, loaded.folder, options, shift),
  };
}
