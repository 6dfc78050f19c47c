/** What calibration statistics hold: inputs of layers with their sums, and the passes that they come from. */
import { momentElements } from "../../native/call_checks.ts";
import { type ActivationHistogram, HISTOGRAM_BINS } from "../activation_range.ts";

/** Second moments kept: none, one over all times, or also one a time group, at as much more memory. */
export type SecondMoments = "none" | "total" | "groups";
export const SECOND_MOMENTS: readonly SecondMoments[] = ["none", "total", "groups"];
/** Most runs in merged statistics. */
export const MAX_CALIBRATION_RUNS = 1024;

/** A pass over calibration data. */
export interface CalibrationRun {
  /** Stands for model, data, samples, seed and groups: the same pass has the same. */
  readonly identity: string;
  /** Where the data come from, for reports. */
  readonly source: string;
  readonly isSynthetic: boolean;
  readonly samples: number;
  /** Of a part of a pass: its number, of how many, and the identity of the whole pass. */
  readonly shard?: { readonly index: number; readonly count: number; readonly of: string } | undefined;
}

/** An input that one or several layers read. */
export interface LayerInput {
  readonly cols: number;
  /** Columns of a block of its second moment; all by default. */
  readonly block?: number | undefined;
  /** Names of the weights of the layers that read it. */
  readonly layers: readonly string[];
}

/** Sums over an input, by time group. */
export interface InputStatistics extends LayerInput {
  /** `f64[groups]`: Σ w */
  readonly weight: Float64Array<ArrayBuffer>;
  /** `f64[groups]`: inputs, and samples that they belong to; whole numbers. */
  readonly tokens: Float64Array<ArrayBuffer>;
  readonly samples: Float64Array<ArrayBuffer>;
  /** `f64[groups, cols]`: Σ w x */
  readonly sum: Float64Array<ArrayBuffer>;
  /** `f64[groups, cols]`: Σ w x² */
  readonly squares: Float64Array<ArrayBuffer>;
  /** What rounding took from the two while a pass is gathered, or of its part; else 0. */
  readonly sumLow: Float64Array<ArrayBuffer>;
  readonly squaresLow: Float64Array<ArrayBuffer>;
  /** `f32[cols, cols]`: Σ w x xᵀ over all groups; of blocks on the diagonal `f32[block, block]` each */
  readonly second: Float32Array<ArrayBuffer> | undefined;
  /** `f32[groups, cols, cols]`: the same for each, always whole */
  readonly groupSecond: Float32Array<ArrayBuffer> | undefined;
  /** One a group: every value of an input counts 1, whatever its weight. Empty where a file has none. */
  readonly histograms: readonly ActivationHistogram[];
}

/** Whether histograms have seen every value of an input. */
export const hasHistograms = (
  { cols, tokens, histograms }: Pick<InputStatistics, "cols" | "tokens" | "histograms">,
): boolean => histograms.every(({ count }, g) => count === tokens[g]! * cols);

/** Bytes that statistics take. */
export function statisticsBytes(
  inputs: Iterable<LayerInput>,
  groups: number,
  second: SecondMoments,
  bytesPerSum = 4,
): number {
  const wholes = second === "groups" ? groups : 0;
  let bytes = 0;
  for (const { cols, block = cols } of inputs) {
    const total = second === "none" ? 0 : momentElements(cols, cols, block);
    bytes += bytesPerSum * (total + wholes * cols * cols) + 8 * groups * (2 * cols + HISTOGRAM_BINS + 3);
  }
  return bytes;
}

/** Reads second moments of an input, as {@linkcode InputStatistics} has them. */
export type LoadMoments = (input: string, which: WhichMoments) => Moments;
export type WhichMoments = "second" | "groupSecond";
/** Float64 of a part of a pass: it is rounded when all are added up. */
export type Moments = Float32Array<ArrayBuffer> | Float64Array<ArrayBuffer>;
