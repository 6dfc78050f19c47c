/** The report of a run: a record for each tensor, and sums over all of them. */
import type { LoraReport } from "../lora/mod.ts";
import type { LayerRecord } from "../output/record.ts";
import type { RewriteResult } from "../output/rewrite.ts";
import type { PhasesReport } from "../phases/mod.ts";
import type { Plan, PlanRow } from "../plan/plan.ts";
import type { Shard } from "../output/shard_folders.ts";
import { addStatistics, cosine, NO_STATISTICS, relativeRmsError } from "../quant/mod.ts";
import { type Checkpoint, elementCount } from "../tensor/mod.ts";

/** Sums over a run. */
export interface Totals {
  /** Tensors that were quantized (or dequantized), and their weights. */
  readonly tensors: number;
  readonly weights: number;
  readonly tensorsKept: number;
  /** Bytes of the packed form of those tensors · 8 / weights. */
  readonly bitsPerWeight: number;
  /** Bytes of all tensors · 8 / their weights, kept ones included. */
  readonly bitsPerWeightOfAll: number;
  /** Bytes of all safetensors files. */
  readonly fileBytesBefore: number;
  readonly fileBytesAfter: number;
  /** Of all quantized weights together; undefined when there is nothing to compare. */
  readonly relativeRmsError: number | undefined;
  readonly cosine: number | undefined;
}

/** Distance of the packed model from full precision on samples that nothing was solved on. */
export interface HeldOutError {
  /** As in `KL at masked positions, nats`. */
  readonly metric: string;
  readonly value: number;
}

/** Result of a run, or of its plan alone. */
export interface RunReport {
  readonly input: string;
  readonly output: string;
  readonly modelKind: Checkpoint["kind"];
  readonly dryRun: boolean;
  /** The solver in force, and why `auto` chose it; undefined of another operation. */
  readonly solver?: { readonly name: string; readonly why: string | undefined } | undefined;
  readonly plan: Plan;
  /** What became of LoRAs that were merged into the weights, in their order. */
  readonly loras?: readonly LoraReport[] | undefined;
  /** The part of the checkpoint that this run did; undefined where it did all of it. */
  readonly shard?: Shard | undefined;
  /** A record for each tensor; none on a dry run. */
  readonly layers: readonly LayerRecord[];
  /** Time of each: read, quantize, verify, write; null where an earlier run had done it. */
  readonly layerMilliseconds: readonly (number | null)[];
  readonly totals: Totals;
  /** Undefined without calibration, where nothing is held out, and where an earlier run had finished. */
  readonly heldOut?: HeldOutError | undefined;
  /** Programs that read the result, and what would make others. */
  readonly opensIn: string;
  /** Files beside the weights that were copied, and those that were not. */
  readonly copied: readonly string[];
  readonly left: readonly string[];
  /** Tensors that an earlier run had finished. */
  readonly tensorsResumed: number;
  /** The kernels that ran, as they describe themselves; undefined on a dry run. */
  readonly backend: string | undefined;
  readonly threads: number;
  /** Undefined where no phase was asked for, or an earlier run had finished. */
  readonly phases?: PhasesReport | undefined;
}

/** The report of a run that was written, but for what its own operation adds. */
export function writtenReport(
  checkpoint: Checkpoint,
  { manifest, tensorsResumed, milliseconds }: RewriteResult,
): Pick<RunReport, "dryRun" | "layers" | "totals" | "layerMilliseconds" | "tensorsResumed"> {
  const { layers, files } = manifest;
  const own = new Set(layers.map(({ file }) => file));
  const written = Object.entries(files).filter(([name]) => own.has(name));
  const totals = totalsOf(checkpoint, layers, sum(written.map(([, { bytes }]) => bytes)));
  return { dryRun: false, layers, totals, layerMilliseconds: milliseconds, tensorsResumed };
}

/** Relative errors of the solved layers' outputs, the largest first. */
export function outputErrors(
  layers: readonly LayerRecord[],
): readonly { readonly name: string; readonly bits: number; readonly error: number }[] {
  return layers.flatMap(({ name, bits = 16, solved }) =>
    solved === undefined ? [] : [{ name, bits, error: solved.relativeError }]
  ).sort((a, b) => b.error - a.error);
}

/** Sums over the rows of a plan, or over what became of them. */
export function totalsOf(
  { files }: Checkpoint,
  rows: readonly (PlanRow | LayerRecord)[],
  fileBytesAfter: number,
): Totals {
  const changed = rows.filter(({ action }) => action !== "keep");
  const weights = sum(changed.map(({ shape }) => elementCount(shape) ?? 0));
  const packed = sum(changed.map((row) => row.action === "dequantize" ? row.bytesBefore : row.bytesAfter));
  const all = changed.flatMap((row) =>
    "statistics" in row && row.statistics !== undefined ? [row.statistics] : []
  );
  const allWeights = sum(rows.map(({ shape }) => elementCount(shape) ?? 0));
  const isRestored = rows.some(({ action }) => action === "dequantize");
  const allBytes = sum(rows.map((row) => isRestored ? row.bytesBefore : row.bytesAfter));
  const statistics = all.length === 0 ? undefined : all.reduce(addStatistics, NO_STATISTICS);
  return {
    tensors: changed.length,
    weights,
    tensorsKept: rows.length - changed.length,
    bitsPerWeight: weights === 0 ? 0 : packed * 8 / weights,
    bitsPerWeightOfAll: allWeights === 0 ? 0 : allBytes * 8 / allWeights,
    fileBytesBefore: sum(files.map(({ file }) => file.fileBytes)),
    fileBytesAfter,
    relativeRmsError: statistics === undefined ? undefined : relativeRmsError(statistics),
    cosine: statistics === undefined ? undefined : cosine(statistics),
  };
}

export const sum = (values: readonly number[]): number => values.reduce((total, value) => total + value, 0);
