/**
 * Samples of calibration data: drawn from records with a random time each, in batches, split into a part to
 * solve on and a held-out part.
 */
import { createHash } from "node:crypto";
import { CalibrationError } from "../errors.ts";
import { quote } from "../files/whole.ts";
import { RandomStream, type Scheduler } from "../models/mod.ts";
import type { TimeAxis } from "../time/mod.ts";
import type { OwnSamples } from "./own_samples.ts";

/** Every eighth record is held out: nothing is solved on it, and it chooses between candidates. */
const HELD_OUT = 8;
/**
 * Held-out samples, as part of the others and at least: rare large errors decide their mean. The least is
 * fewer where samples are long: positions cost time, and of sequences are what is averaged. Where a pass
 * takes minutes half as many do: most such models are solved once, and nothing is chosen by them.
 */
const HELD_OUT_SHARE = 0.5,
  COSTLY_HELD_OUT_SHARE = 0.25,
  MIN_HELD_OUT_SAMPLES = 256,
  MIN_HELD_OUT_POSITIONS = 4096;
/** Positions of one forward pass, roughly, unless memory asks for fewer. */
export const BATCH_POSITIONS = 4096;

/** Samples where none are asked for; positions that are worth the time of any model. */
const SAMPLES = 512, LEAST_POSITIONS = 4096;

/** What bounds the samples of a large model where none are asked for. */
export interface SampleBounds {
  /** Multiplications with an addition of a pass over all samples. */
  readonly multiplyAdds: number;
  /** The fewest samples, each with a time of its own. */
  readonly least: number;
}

/**
 * Samples to solve on where none are asked for: 512, fewer where a pass over them costs more than is allowed;
 * and whether it does.
 *
 * @param positions of a sample
 * @param cost multiplications with an addition of a pass over a sample
 */
export function usualSamples(
  positions: number,
  cost: number,
  { multiplyAdds, least }: SampleBounds,
): { readonly count: number; readonly isCostly: boolean } {
  const fewest = Math.max(least, Math.ceil(LEAST_POSITIONS / positions));
  const count = Math.min(SAMPLES, Math.max(fewest, Math.floor(multiplyAdds / cost)));
  return { count, isCostly: count < SAMPLES };
}

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
  /**
   * Samples whose second moments are summed up in float32: sums of chunks are added in double, so that a pass
   * that is divided between chunks has the same bytes. By default all are one chunk.
   */
  readonly chunk?: number | undefined;
  /** Where the data come from, for reports. */
  readonly source: string;
  readonly isSynthetic: boolean;
  /** What the model made itself, where that is what samples are drawn from. */
  readonly own?: OwnSamples | undefined;
  readonly samples: number;
  /** For whoever calibrates. */
  readonly warnings: readonly string[];
  /** Positions of all records, each counted once however often it is used. */
  readonly distinctPositions: number;
  /** Axis of the parts' times. */
  readonly axis: TimeAxis;
  /** Noises images; undefined for sequences. */
  readonly scheduler?: Scheduler | undefined;
  readonly fit: readonly CalibrationPart<Batch>[];
  readonly heldOut: readonly CalibrationPart<Batch>[];
}

/** Which calibration data are loaded, and how many samples are drawn. */
export interface CalibrationOptions {
  /** A JSONL or safetensors file, `synthetic`, or `self`: {@linkcode own}. */
  readonly source: string;
  /** What the model made itself. */
  readonly own?: OwnSamples | undefined;
  /**
   * Sequences or noised images; records are used again, with other masks and noise, when there are fewer. By
   * default
   * {@linkcode usualSamples}.
   */
  readonly samples?: number | undefined;
  /** Seed of masks, noise and the choice of records. */
  readonly seed: number;
  /** Weights of positions: `POSITION_WEIGHTS` of sequences.ts, the default, or all alike. */
  readonly weights?: "by_role" | "alike" | undefined;
  /** Positions of one forward pass, roughly; default 4096. Solutions do not depend on it, memory does. */
  readonly batchPositions?: number | undefined;
  /** No batch is of several chunks, so that a part of them can be taken. */
  readonly byChunk?: boolean | undefined;
}

/** The error of calibration data that cannot be used. */
export function calibrationFault(path: string, message: string, cause?: unknown): CalibrationError {
  return new CalibrationError(`Cannot calibrate with ${quote(path)}: ${message}`, { path, cause });
}

/** Fewer records than this are overfitted, and the held-out ones tell little. */
const FEW_RECORDS = 64;
/** A smaller part of distinct records than this is warned of. */
const MANY_COPIES = 0.99;

/** Warnings about data with few records, and with many copies. @param isMade whether nobody gave them */
export function recordWarnings(distinct: number, count: number, isMade: boolean): string[] {
  const few =
    `only ${distinct} records: what is solved on them may not hold for others, and a held-out error does ` +
    `not tell; give ${FEW_RECORDS} or more`;
  const copies = `${recordCount(distinct, count)}: copies of a record count once`;
  return [
    ...(distinct < MANY_COPIES * count ? [copies] : []),
    ...(isMade || distinct >= FEW_RECORDS ? [] : [few]),
  ];
}

/** How many records there are, and how many of them differ if not all do. */
export function recordCount(distinct: number, count: number): string {
  return distinct === count ? `${count} records` : `${count} records, ${distinct} distinct`;
}

/** Numbers of the records that are no copies of earlier ones; `partsOf` has all that tells a record apart. */
export function distinctRecords(
  count: number,
  partsOf: (record: number) => readonly (Uint8Array | Int32Array)[],
): number[] {
  const seen = new Set<string>(), distinct: number[] = [];
  for (let i = 0; i < count; i++) {
    const hash = createHash("sha256");
    for (const part of partsOf(i)) hash.update(part);
    const digest = hash.digest("base64");
    if (!seen.has(digest)) distinct.push(i);
    seen.add(digest);
  }
  return distinct;
}

/** Records in a random order, each once before any is used again. */
function pick(records: readonly number[], samples: number, random: RandomStream): number[] {
  const order: number[] = [];
  while (order.length < samples) {
    const round = records.slice();
    for (let i = round.length - 1; i > 0; i--) {
      const j = random.below(i + 1);
      [round[i], round[j]] = [round[j]!, round[i]!];
    }
    for (const record of round) order.push(record); // a spread of many ends the stack
  }
  return order.slice(0, samples);
}

/** A sample to be drawn: its record, its random stream, and its place in the range of times, in [0, 1). */
export interface Draw {
  readonly record: number;
  readonly stream: number;
  readonly time: number;
}

/** How many held-out samples are wanted beside the others. */
export interface HeldOutWish {
  /** As part of the others, where more are wanted than usual. */
  readonly share?: number | undefined;
  /** Whether a pass over the usual number of samples takes too long: there is no least number of them. */
  readonly isCostly: boolean;
}

/** Held-out samples beside so many samples of so many positions. */
function heldOutSamples(samples: number, positions: number, { share = 0, isCostly }: HeldOutWish): number {
  const least = Math.min(MIN_HELD_OUT_SAMPLES, Math.ceil(MIN_HELD_OUT_POSITIONS / positions));
  const usual = isCostly ? COSTLY_HELD_OUT_SHARE : HELD_OUT_SHARE;
  return Math.max(isCostly ? 1 : least, Math.ceil(samples * Math.max(share, usual)));
}

/** Most positions of a chunk, chunks that are wanted, and fewer where each would be short. */
const CHUNK_POSITIONS = 4096, CHUNKS = 32, FEW_CHUNKS = 8, FEW_POSITIONS = 512;

/**
 * Samples of a chunk, a power of two: of many positions, as adding it to a float64 moment takes as long as
 * some 80 positions (docs/decisions.md), and few enough that tasks can share the pass.
 */
function chunkSamples(samples: number, positions: number): number {
  const wanted = Math.max(samples / CHUNKS, Math.min(samples / FEW_CHUNKS, FEW_POSITIONS / positions));
  return 2 ** Math.floor(Math.log2(Math.max(1, Math.min(wanted, CHUNK_POSITIONS / positions))));
}

/** Samples that run together: whole chunks, or a whole part of one. */
function batchSamples(positions: number, batchPositions: number, chunk: number): number {
  const size = Math.max(1, Math.floor(batchPositions / positions));
  return size >= chunk ? size - size % chunk : 2 ** Math.floor(Math.log2(size));
}

/**
 * Draws samples of both parts. The range of times is divided equally among the samples, so that no time is
 * missing; their order is random, so that each batch has all kinds.
 */
export function draw<Batch>(
  records: number,
  { samples, seed, batchPositions = BATCH_POSITIONS, byChunk = false }: CalibrationOptions & {
    readonly samples: number;
  },
  positions: number,
  batchOf: (part: readonly Draw[]) => CalibrationPart<Batch>,
  heldOut: HeldOutWish,
): Pick<CalibrationSet<Batch>, "chunk" | "fit" | "heldOut"> {
  const chunk = chunkSamples(samples, positions), most = batchSamples(positions, batchPositions, chunk);
  const size = byChunk ? Math.min(most, chunk) : most;
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
    chunk,
    fit: part(fit, samples, 0),
    heldOut: part(held, heldOutSamples(samples, positions, heldOut), 2 ** 20),
  };
}
