/** Quantizes one tensor of a checkpoint, in chunks of rows, under `min_accuracy` and `non_finite`. */
import {
  packedEntries,
  packedNames,
  packedTensorSpecs,
  packZeroPoints,
  specBytes,
} from "../quant/packed/entries.ts";
import type { Config } from "../config/mod.ts";
import { WeightsError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import {
  addStatistics,
  BIT_WIDTHS,
  type BitWidth,
  convertFloats,
  cosine,
  type ErrorStatistics,
  findNonfinite,
  groupCount,
  LAYER_SOLVERS,
  packedErrorStatistics,
  packedRows,
  quantize,
  type Weights,
} from "../quant/mod.ts";
import { BYTES_PER_ELEMENT, type FloatDtype, isFloatDtype, type SafetensorsFile } from "../tensor/mod.ts";
import { quote } from "../files/whole.ts";
import type { PlanRow } from "../plan/plan.ts";
import type { LayerRecord } from "../output/record.ts";
import type { SolvedLayer } from "../solve/solve_model.ts";
import { CHUNK_BYTES, copyTensor, type TensorSink } from "../output/tensor_sink.ts";
import type { RunEvent } from "../progress.ts";

/** Rounding error of a cosine of three sums: equal weights must reach a `min_accuracy` of 1. */
const COSINE_ROUNDING = 1e-12;

/** Settings and solved layers that all tensors of a run share. */
export interface QuantizeContext {
  readonly config: Config;
  readonly kernels: Kernels;
  readonly onEvent: ((event: RunEvent) => void) | undefined;
  /** Layers solved on calibration data, by name. */
  readonly solved?: ReadonlyMap<string, SolvedLayer> | undefined;
  /** Refined biases by name, values of their tensor's type. */
  readonly biases?: ReadonlyMap<string, Float32Array<ArrayBuffer>> | undefined;
  /** Memory for one chunk of the input, at least {@linkcode CHUNK_BYTES}; grown for longer rows. */
  readonly buffer: (bytes: number) => Uint8Array<ArrayBuffer>;
}

/** Stores a tensor as planned, or with more bits or as it is where the configuration asks for that. */
export async function rewriteTensor(
  row: PlanRow,
  source: SafetensorsFile,
  sink: TensorSink,
  context: QuantizeContext,
): Promise<LayerRecord> {
  if (row.action === "keep") return await keepTensor(row, source, sink, context, row.reason);
  const { config: { minAccuracy, nonFinite, failFast }, onEvent } = context;
  const groupSize = row.groupSize!, zeroPoint = row.zeroPoint!, { scaleBits } = row;
  const solved = context.solved?.get(row.name);
  const tried: { bits: BitWidth; cosine: number }[] = [];
  const widths = BIT_WIDTHS.filter((bits) => bits === row.bits || (minAccuracy > 0 && bits > row.bits!));
  for (const bits of widths) {
    let statistics: ErrorStatistics;
    try {
      statistics = solved !== undefined && bits === row.bits
        ? await storeSolved(row, solved, source, sink, context)
        : await quantizeRows(row, bits, source, sink, context);
    } catch (error) {
      if (!(error instanceof WeightsError) || nonFinite === "fail") throw error;
      sink.discard();
      onEvent?.({ kind: "kept", message: `${error.message}; kept as it is (non_finite: keep)` });
      return await keepTensor(row, source, sink, context, "non_finite");
    }
    const reached = cosine(statistics);
    if (reached >= minAccuracy - COSINE_ROUNDING) {
      const [rows, cols] = row.shape as [number, number];
      const stored = tried.length > 0 ? undefined : solved?.tensor;
      const rank = stored?.lowRank?.rank, rotation = stored?.rotation;
      const specs = packedTensorSpecs(row.name, { rows, cols, bits, groupSize, zeroPoint, scaleBits, rank });
      const { name, file, dtype, shape, bytesBefore } = row;
      return {
        name,
        file,
        action: "quantize",
        reason: tried.length > 0 ? "min_accuracy" : row.reason,
        dtype,
        shape,
        bits,
        groupSize,
        zeroPoint,
        ...(scaleBits === undefined ? {} : { scaleBits }),
        ...(rank === undefined ? {} : { lowRank: rank }),
        ...(rotation === undefined ? {} : { rotation }),
        bytesBefore,
        bytesAfter: specBytes(specs),
        statistics,
        ...(tried.length > 0 ? { tried } : {}),
        ...(solved === undefined || tried.length > 0 ? {} : {
          solved: {
            relativeError: solved.relativeError,
            gain: solved.gain,
            damping: solved.damping,
            deadColumns: solved.deadColumns,
            inputs: solved.inputs,
          },
        }),
      };
    }
    tried.push({ bits, cosine: reached });
    sink.discard();
    onEvent?.({
      kind: "fallback",
      message: `${row.name}: cosine ${
        reached.toFixed(6)
      } at ${bits} bits is below min_accuracy ${minAccuracy}`,
    });
  }
  const best = tried.at(-1)!;
  if (failFast) {
    throw new WeightsError(
      `Cannot quantize ${quote(row.name)} of ${quote(source.path)}: cosine must be at least min_accuracy ` +
        `${minAccuracy}, got ${best.cosine} at ${best.bits} bits`,
      { path: source.path, tensor: row.name },
    );
  }
  return { ...await keepTensor(row, source, sink, context, "min_accuracy"), tried };
}

async function keepTensor(
  row: PlanRow,
  source: SafetensorsFile,
  sink: TensorSink,
  context: QuantizeContext,
  reason: string,
): Promise<LayerRecord> {
  const { name, file, dtype, shape, bytesBefore } = row;
  const { kernels, config: { nonFinite }, onEvent } = context;
  const refined = context.biases?.get(name);
  if (refined !== undefined) return await storeBias(row, refined, sink, context);
  let found: WeightsError | undefined;
  const readInto = (start: number, target: Uint8Array<ArrayBuffer>) => {
    source.readInto(name, start, target);
    if (found !== undefined || !isFloatDtype(dtype)) return;
    const index = findNonfiniteStored(
      kernels,
      { data: target, dtype },
      target.length / BYTES_PER_ELEMENT[dtype],
    );
    if (index < 0) return;
    found = new WeightsError(
      `Cannot copy ${quote(name)} of ${quote(source.path)}: weights must be finite, got NaN or infinity at ${
        placeOf(start / BYTES_PER_ELEMENT[dtype] + index, shape)
      }; set non_finite: keep to copy such a tensor as it is`,
      { path: source.path, tensor: name },
    );
    if (nonFinite === "fail") throw found;
  };
  await copyTensor(sink, { name, dtype, shape }, readInto, context.buffer(CHUNK_BYTES));
  const record = { name, file, dtype, shape, bytesBefore, bytesAfter: bytesBefore };
  if (found === undefined) return { ...record, action: "keep", reason };
  if (reason !== "non_finite") onEvent?.({ kind: "kept", message: `${found.message} (as it was)` });
  return { ...record, action: "keep", reason, nonFinite: true };
}

/** Stores a refined bias in the type that it had. */
async function storeBias(
  { name, file, dtype, shape, bytesBefore }: PlanRow,
  values: Float32Array<ArrayBuffer>,
  sink: TensorSink,
  { kernels }: QuantizeContext,
): Promise<LayerRecord> {
  sink.begin([{ name, dtype, shape }]);
  const wanted = dtype as "F32" | "F16" | "BF16";
  sink.write(
    name,
    wanted === "F32" ? values : convertFloats(kernels, { data: values, dtype: "F32" }, values.length, wanted),
  );
  await sink.advance(0, bytesBefore);
  return {
    name,
    file,
    action: "keep",
    reason: "refined",
    dtype,
    shape,
    bytesBefore,
    bytesAfter: bytesBefore,
  };
}

/** Position of the first NaN or infinity as they are stored: a float64 may be finite beyond float32. */
function findNonfiniteStored(kernels: Kernels, weights: Weights, elements: number): number {
  const first = findNonfinite(kernels, weights, elements);
  if (first < 0 || weights.dtype !== "F64") return first;
  const { buffer, byteOffset } = weights.data;
  const values = new Float64Array(buffer, byteOffset, elements);
  for (let i = first; i < elements; i++) if (!Number.isFinite(values[i])) return i;
  return -1;
}

/** An element's place in words. */
function placeOf(index: number, shape: readonly number[]): string {
  if (shape.length !== 2) return `element ${index}`;
  return `row ${Math.floor(index / shape[1]!)}, column ${index % shape[1]!}`;
}

/** Rows of `cols` elements that are handled at once. */
export function rowsPerChunk(cols: number, bytesPerElement: number): number {
  return Math.max(1, Math.floor(CHUNK_BYTES / (cols * bytesPerElement)));
}

/** Stores a tensor that was solved, in chunks of rows, and measures its error against the weights. */
async function storeSolved(
  row: PlanRow,
  { tensor }: SolvedLayer,
  source: SafetensorsFile,
  sink: TensorSink,
  context: QuantizeContext,
): Promise<ErrorStatistics> {
  const { kernels } = context;
  const { name, scaleBits } = row, zeroPoint = row.zeroPoint!;
  const { rows, cols, bits, groupSize, lowRank } = tensor;
  const dtype = row.dtype as FloatDtype;
  const rowBytes = cols * BYTES_PER_ELEMENT[dtype];
  const names = packedNames(name, { zeroPoint, scaleBits, rank: lowRank?.rank });
  sink.begin(
    packedTensorSpecs(name, { rows, cols, bits, groupSize, zeroPoint, scaleBits, rank: lowRank?.rank }),
  );
  for (const [entry, bytes] of packedEntries(names, tensor)) sink.write(entry, bytes);
  if (lowRank !== undefined) sink.write(names.lowRankB!, lowRank.b);
  if (zeroPoint === "integer" && tensor.scaleBits === undefined) {
    const groups = groupCount(cols, groupSize);
    const integers = Uint8Array.from(new Float16Array(tensor.zeroPoint!.buffer, 0, rows * groups));
    sink.write(names.zeroPoint!, packZeroPoints(integers, rows, groups, bits));
  }
  sink.write(names.shape, BigInt64Array.of(BigInt(rows), BigInt(cols)));
  let statistics: ErrorStatistics | undefined;
  const step = rowsPerChunk(cols, BYTES_PER_ELEMENT[dtype]);
  for (let begin = 0; begin < rows; begin += step) {
    const end = Math.min(rows, begin + step), count = end - begin;
    const data = context.buffer(count * rowBytes).subarray(0, count * rowBytes);
    source.readInto(name, begin * rowBytes, data);
    const part = packedRows(tensor, begin, end);
    const ofChunk = packedErrorStatistics(kernels, { data, dtype }, part);
    statistics = statistics === undefined ? ofChunk : addStatistics(statistics, ofChunk);
    await sink.advance(count * cols, data.length);
  }
  return statistics!;
}

async function quantizeRows(
  row: PlanRow,
  bits: BitWidth,
  source: SafetensorsFile,
  sink: TensorSink,
  context: QuantizeContext,
): Promise<ErrorStatistics> {
  const { config: { solver: configured }, kernels } = context;
  // For layers without calibration, and for solved ones that missed min_accuracy.
  const solver = LAYER_SOLVERS[configured].withoutMoment;
  const { name, scaleBits } = row, groupSize = row.groupSize!, zeroPoint = row.zeroPoint!;
  const [rows, cols] = row.shape as [number, number];
  const dtype = row.dtype as FloatDtype;
  const rowBytes = cols * BYTES_PER_ELEMENT[dtype];
  const step = rowsPerChunk(cols, BYTES_PER_ELEMENT[dtype]);
  const groups = groupCount(cols, groupSize);
  const names = packedNames(name, { zeroPoint, scaleBits });
  // A word of integer zero points spans rows of several chunks: they are few enough to wait for the end.
  const integers = zeroPoint === "integer" ? new Uint8Array(rows * groups) : undefined;
  sink.begin(packedTensorSpecs(name, { rows, cols, bits, groupSize, zeroPoint, scaleBits }));

  let statistics: ErrorStatistics | undefined;
  for (let begin = 0; begin < rows; begin += step) {
    const count = Math.min(step, rows - begin);
    const data = context.buffer(count * rowBytes).subarray(0, count * rowBytes);
    source.readInto(name, begin * rowBytes, data);
    const weights = { data, dtype };
    let tensor;
    try {
      tensor = quantize(kernels, weights, count, cols, {
        bits,
        groupSize,
        solver,
        zeroPoint,
        scaleBits,
      });
    } catch (error) {
      throw error instanceof WeightsError ? describe(error, begin) : error;
    }
    for (const [entry, bytes] of packedEntries(names, tensor)) sink.write(entry, bytes);
    if (integers !== undefined && tensor.scaleBits === undefined) {
      integers.set(new Float16Array(tensor.zeroPoint!.buffer), begin * groups);
    }
    // The sink has compared these bytes with those read back, so this is the error of what is stored.
    const ofChunk = packedErrorStatistics(kernels, weights, tensor);
    statistics = statistics === undefined ? ofChunk : addStatistics(statistics, ofChunk);
    await sink.advance(count * cols, data.length);
  }
  if (integers !== undefined) sink.write(names.zeroPoint!, packZeroPoints(integers, rows, groups, bits));
  sink.write(names.shape, BigInt64Array.of(BigInt(rows), BigInt(cols)));
  return statistics!;

  function describe(cause: WeightsError, begin: number): WeightsError {
    const count = Math.min(step, rows - begin);
    const data = context.buffer(count * rowBytes).subarray(0, count * rowBytes);
    const index = findNonfinite(kernels, { data, dtype }, count * cols);
    const reason = index < 0
      ? `weights in rows ${begin} to ${
        begin + count - 1
      } must allow half-precision scales, got too large ones`
      : `weights must be finite${dtype === "F64" ? " in float32" : ""}, got ${
        dtype === "F64"
          ? new Float64Array(data.buffer, data.byteOffset, count * cols)[index]
          : "NaN or infinity"
      } at ${placeOf(begin * cols + index, row.shape)}`;
    const hint = "; set non_finite: keep to store such a tensor unquantized";
    return new WeightsError(
      `Cannot quantize ${quote(name)} of ${quote(source.path)}: ${reason}${hint}`,
      { path: source.path, tensor: name, cause },
    );
  }
}
