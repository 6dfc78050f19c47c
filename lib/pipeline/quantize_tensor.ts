/** Quantizes one tensor of a checkpoint, in chunks of rows, under `min_accuracy` and `non_finite`. */
import type { ConfigInForce } from "../config/mod.ts";
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
  matrixSizes,
  packedErrorStatistics,
  packedRows,
  type PackedTensor,
  quantizeByWeights,
  relativeRmsError,
  type Weights,
} from "../quant/mod.ts";
import {
  packedBytes,
  packedEntries,
  packedNames,
  packedTensorSpecs,
  packZeroPoints,
  shapeEntry,
} from "../quant/packed/entries.ts";
import {
  CODED_SCALE_BITS,
  halves,
  isRotated,
  linesOf,
  OFFSET_BITS,
  ROTATED_SCALE_BITS,
  type TwoLevelTensor,
} from "../quant/packed/layout.ts";
import { codesOnGrid, gridScales, packScaleCodes, type ScaleGrid } from "../quant/packed/scale_codes.ts";
import { BYTES_PER_ELEMENT, type FloatDtype, isFloatDtype } from "../tensor/mod.ts";
import { quote } from "../files/whole.ts";
import { formatOf, type PlanRow } from "../plan/plan.ts";
import type { LayerRecord } from "../output/record.ts";
import { weightSolver } from "../solve/by_weights.ts";
import type { SolvedLayer } from "../solve/solved_layers.ts";
import type { SolvedOnDemand } from "../solve/solve_model.ts";
import { CHUNK_BYTES, copyTensor, type TensorSink } from "../output/tensor_sink.ts";
import type { RunEvent } from "../progress.ts";
import type { TensorReader } from "../output/source_digest.ts";

/** A record before the digest of what was read is known. */
type UnhashedRecord = Omit<LayerRecord, "sourceSha256">;

/** Rounding error of a cosine of three sums: equal weights must reach a `min_accuracy` of 1. */
const COSINE_ROUNDING = 1e-12;

/** Settings and solved layers that all tensors of a run share. */
interface QuantizeContext {
  readonly config: ConfigInForce;
  readonly kernels: Kernels;
  readonly onEvent: ((event: RunEvent) => void) | undefined;
  /** Layers solved on calibration data, by name: before, or when they are asked for. */
  readonly solved?: ReadonlyMap<string, SolvedLayer> | SolvedOnDemand | undefined;
  /** Refined layers and tables by name. */
  readonly refined?: ReadonlyMap<string, PackedTensor> | undefined;
  /** Refined biases by name, values of their tensor's type. */
  readonly biases?: ReadonlyMap<string, Float32Array<ArrayBuffer>> | undefined;
  /** Memory for one chunk of the input, at least {@linkcode CHUNK_BYTES}; grown for longer rows. */
  readonly buffer: (bytes: number) => Uint8Array<ArrayBuffer>;
}

/** One tensor on its way from the checkpoint into the output. */
interface Task extends QuantizeContext {
  readonly row: PlanRow;
  readonly source: TensorReader;
  readonly sink: TensorSink;
}

/** Stores a tensor as planned, or with more bits or as it is where the configuration asks for that. */
export async function rewriteTensor(
  row: PlanRow,
  source: TensorReader,
  sink: TensorSink,
  context: QuantizeContext,
): Promise<UnhashedRecord> {
  const task: Task = { ...context, row, source, sink };
  if (row.action === "keep") return await keepTensor(task, row.reason);
  const { config: { minAccuracy, nonFinite, failFast }, onEvent } = context;
  const tried: { bits: BitWidth; cosine: number }[] = [];
  for (
    const bits of BIT_WIDTHS.filter((bits) => bits === row.bits || (minAccuracy > 0 && bits > row.bits!))
  ) {
    const solved = bits === row.bits && sink.isStored ? await context.solved?.get(row.name) : undefined;
    let statistics: ErrorStatistics, stored = row;
    try {
      const refined = bits === row.bits ? context.refined?.get(row.name) : undefined;
      ({ statistics, stored } = await storeRows(task, bits, refined ?? solved?.tensor));
    } catch (error) {
      if (!(error instanceof WeightsError) || nonFinite === "fail") throw error;
      sink.discard();
      onEvent?.({ kind: "kept", message: `${error.message}; kept as it is (non_finite: keep)` });
      return await keepTensor(task, "non_finite");
    }
    const reached = cosine(statistics);
    if (reached >= minAccuracy - COSINE_ROUNDING) {
      const error = relativeRmsError(statistics), { name } = row;
      const message = `${name}: ${bits} bits, relative RMS ${error.toPrecision(4)}`;
      onEvent?.({ kind: "layer", message, data: { stage: "writing", name, bits, error } });
      if (stored !== row) onEvent?.({ kind: "fallback", message: halfFloatsMessage(row, stored, bits) });
      return quantizedRecord(stored, bits, statistics, solved, tried);
    }
    tried.push({ bits, cosine: reached });
    sink.discard();
    const got = `cosine ${reached.toFixed(6)} at ${bits} bits`;
    onEvent?.({ kind: "fallback", message: `${row.name}: ${got} is below min_accuracy ${minAccuracy}` });
  }
  if (!failFast) return { ...await keepTensor(task, "min_accuracy"), tried };
  const best = tried.at(-1)!, reason = `cosine must be at least min_accuracy ${minAccuracy}`;
  throw weightsError("quantize", task, `${reason}, got ${best.cosine} at ${best.bits} bits`);
}

function weightsError(
  doing: string,
  { row: { name }, source: { path } }: Task,
  reason: string,
  cause?: unknown,
) {
  const message = `Cannot ${doing} ${quote(name)} of ${quote(path)}: ${reason}`;
  return new WeightsError(message, { path, tensor: name, cause });
}

function quantizedRecord(
  row: PlanRow,
  bits: BitWidth,
  statistics: ErrorStatistics,
  solved: SolvedLayer | undefined,
  tried: LayerRecord["tried"] & object,
): UnhashedRecord {
  const { name, file, dtype, shape, bytesBefore, scaleBits, codes } = row;
  const form = formOf(row, bits), { groupSize, zeroPoint } = form;
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
    scaleBits,
    codes,
    bytesBefore,
    bytesAfter: packedBytes(form),
    statistics,
    tried: tried.length > 0 ? tried : undefined,
    solved: solved && {
      relativeError: solved.relativeError,
      gain: solved.gain,
      moment: solved.moment,
      damping: solved.damping,
      deadColumns: solved.deadColumns,
      inputs: solved.inputs,
    },
  };
}

/** A row whose tensor could not have fewer scales without losing too much, as it is stored. */
const withHalfFloats = (row: PlanRow): PlanRow => ({
  ...row,
  scaleBits: OFFSET_BITS,
  reason: row.scaleBits === ROTATED_SCALE_BITS ? "one_scale" : "coded_scales",
});

/** Says why a tensor is larger than planned. */
function halfFloatsMessage(row: PlanRow, stored: PlanRow, bits: BitWidth): string {
  const [planned, bytes] = [row, stored].map((own) => packedBytes(formOf(own, bits)));
  const scales = row.scaleBits === ROTATED_SCALE_BITS ? "one scale" : `scales of ${CODED_SCALE_BITS} bits`;
  const why = `${scales} would lose too much of its rows`;
  return `${row.name}: ${why}; stored with half-precision scales and offsets, ${bytes} bytes instead of ${planned}`;
}

/** Size of a tensor and how it is packed. */
function formOf(row: PlanRow, bits: BitWidth) {
  return { ...matrixSizes(row.shape), ...formatOf(row, bits) };
}

async function keepTensor(task: Task, reason: string): Promise<UnhashedRecord> {
  const { row: { name, file, dtype, shape, bytesBefore }, source, sink, kernels, onEvent } = task;
  const refined = task.biases?.get(name);
  // the order of the fields is that of the manifest's bytes
  const sizes = { dtype, shape, bytesBefore, bytesAfter: bytesBefore };
  if (refined !== undefined) {
    await storeBias(task, refined);
    return { name, file, action: "keep", reason: "refined", ...sizes };
  }
  let found: WeightsError | undefined;
  const readInto = (start: number, target: Uint8Array<ArrayBuffer>) => {
    source.readInto(name, start, target);
    if (found !== undefined || !isFloatDtype(dtype)) return;
    const width = BYTES_PER_ELEMENT[dtype];
    const index = findNonfiniteStored(kernels, { data: target, dtype }, target.length / width);
    if (index < 0) return;
    const got = `NaN or infinity at ${placeOf(start / width + index, shape)}`;
    const remedy = "set non_finite: keep to copy such a tensor as it is";
    found = weightsError("copy", task, `weights must be finite, got ${got}; ${remedy}`);
    if (task.config.nonFinite === "fail") throw found;
  };
  await copyTensor(sink, { name, dtype, shape }, readInto, task.buffer(CHUNK_BYTES));
  if (found === undefined) return { name, file, ...sizes, action: "keep", reason };
  if (reason !== "non_finite") onEvent?.({ kind: "kept", message: `${found.message} (as it was)` });
  return { name, file, ...sizes, action: "keep", reason, nonFinite: true };
}

/** Stores a refined bias in the type that it had. */
async function storeBias(
  { row: { name, dtype, shape, bytesBefore }, sink, kernels }: Task,
  values: Float32Array<ArrayBuffer>,
): Promise<void> {
  sink.begin([{ name, dtype, shape }]);
  const wanted = dtype as "F32" | "F16" | "BF16", weights = { data: values, dtype: "F32" } as const;
  sink.write(name, wanted === "F32" ? values : convertFloats(kernels, weights, values.length, wanted));
  await sink.advance(0, bytesBefore);
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
  if (shape.length === 3) {
    const size = shape[1]! * shape[2]!;
    return `expert ${Math.floor(index / size)}, ${placeOf(index % size, shape.slice(1))}`;
  }
  if (shape.length !== 2) return `element ${index}`;
  return `row ${Math.floor(index / shape[1]!)}, column ${index % shape[1]!}`;
}

/** Rows of `cols` elements that are handled at once. */
export function rowsPerChunk(cols: number, bytesPerElement: number): number {
  return Math.max(1, Math.floor(CHUNK_BYTES / (cols * bytesPerElement)));
}

/** What became of a tensor: its error, and its row with the scales that were stored. */
interface Stored {
  readonly statistics: ErrorStatistics;
  readonly stored: PlanRow;
}

/** Quantizes a tensor, or takes what was solved, and stores it in chunks of rows. */
async function storeRows(task: Task, bits: BitWidth, solved?: PackedTensor): Promise<Stored> {
  const { row, source, sink, config, kernels, buffer } = task, { name } = row;
  const { rows, cols, groupSize, zeroPoint, scaleBits } = formOf(row, bits), format = formatOf(row, bits);
  const groups = groupCount(cols, groupSize);
  let stored = row, form = formOf(row, bits), names = packedNames(name, form);
  const dtype = row.dtype as FloatDtype, rowBytes = cols * BYTES_PER_ELEMENT[dtype];
  const isCoded = scaleBits === CODED_SCALE_BITS, isOne = scaleBits === ROTATED_SCALE_BITS;
  // Coded scales share one grid, and rotations take all rows.
  const isWhole = isOne || (isCoded && solved === undefined);
  const step = isWhole ? rows : rowsPerChunk(cols, BYTES_PER_ELEMENT[dtype]);
  // For layers without calibration, and for solved ones that missed min_accuracy.
  const solver = weightSolver(config, { bits, scaleBits });
  // A word of integer zero points spans rows of several chunks: they are few enough to wait for the end.
  const integers = zeroPoint === "integer" ? new Uint8Array(rows * groups) : undefined;
  // So do coded scales, whose stream has no rows.
  const coded = isCoded ? new Uint8Array(rows * groups) : undefined;
  let grid: Float16Array<ArrayBuffer> | undefined;
  let statistics: ErrorStatistics | undefined;
  for (let begin = 0; begin < rows; begin += step) {
    const end = Math.min(rows, begin + step), count = end - begin;
    const data = buffer(count * rowBytes).subarray(0, count * rowBytes), weights = { data, dtype };
    source.readInto(name, begin * rowBytes, data);
    let part: PackedTensor;
    try {
      part = solved === undefined
        ? quantizeByWeights(kernels, weights, count, cols, { ...format, solver })
        : packedRows(solved, begin, end);
    } catch (error) {
      throw error instanceof WeightsError ? chunkError(task, weights, begin, count, error) : error;
    }
    if (begin === 0) {
      // A tensor that has more scales than it should has them as half floats in all rows.
      if ((isCoded || isOne) && !hasFewerScales(part)) {
        stored = withHalfFloats(row);
        form = formOf(stored, bits);
        names = packedNames(name, form);
      }
      sink.begin(packedTensorSpecs(name, form));
    }
    for (const [entry, bytes] of packedEntries(names, part)) sink.write(entry, bytes);
    if (integers !== undefined && part.scaleBits === undefined) {
      const { buffer, byteOffset, length } = part.zeroPoint!;
      integers.set(new Float16Array(buffer, byteOffset, length), begin * groups);
    }
    if (coded !== undefined && part.scaleBits !== undefined && part.scaleGrid !== undefined) {
      grid = Float16Array.from(part.scaleGrid);
      coded.set(codedScales(task, part, part.scaleGrid), begin * groups);
    }
    // The sink has compared these bytes with those read back, so this is the error of what is stored.
    const ofChunk = packedErrorStatistics(kernels, weights, part);
    statistics = statistics === undefined ? ofChunk : addStatistics(statistics, ofChunk);
    await sink.advance(count * cols, data.length);
  }
  if (integers !== undefined) sink.write(names.zeroPoint!, packZeroPoints(integers, rows, groups, bits));
  if (coded !== undefined && grid !== undefined) {
    sink.write(names.subScale!, packScaleCodes(coded));
    sink.write(names.superScale!, grid);
  }
  sink.write(names.shape, shapeEntry(form));
  return { statistics: statistics!, stored };
}

/** Whether trellis codes have other scales than a half float a group. */
const hasFewerScales = (part: PackedTensor): boolean =>
  isRotated(part) || (part.scaleBits !== undefined && part.scaleGrid !== undefined);

/** Codes of a part's scales. @throws {TypeError} when they would not give its scales and offsets again */
function codedScales({ row }: Task, part: TwoLevelTensor, grid: ScaleGrid): Uint8Array {
  const [scales, offsets] = linesOf(part).map(halves),
    codes = codesOnGrid(scales!, grid),
    all = gridScales(grid);
  if (!offsets!.some((offset) => offset !== 0) && codes.every((code, i) => all[code] === scales![i])) {
    return codes;
  }
  const reason = "coded scales must lie on the grid, without offsets, got others";
  throw new TypeError(`Cannot store ${quote(row.name)}: ${reason}`);
}

/** The error of a chunk of rows that cannot be quantized, with its reason. */
function chunkError(
  task: Task,
  weights: Weights,
  begin: number,
  count: number,
  cause: WeightsError,
): WeightsError {
  const { row: { shape }, kernels } = task,
    { data: { buffer, byteOffset }, dtype } = weights,
    cols = shape.at(-1)!;
  const index = findNonfinite(kernels, weights, count * cols), isDouble = dtype === "F64";
  const hint = "set non_finite: keep to store such a tensor unquantized";
  if (index < 0) {
    const rows = `weights in rows ${begin} to ${begin + count - 1}`;
    const reason = `${rows} must allow half-precision scales, got too large ones`;
    return weightsError("quantize", task, `${reason}; ${hint}`, cause);
  }
  const value = isDouble ? new Float64Array(buffer, byteOffset, count * cols)[index] : "NaN or infinity";
  const wanted = `weights must be finite${isDouble ? " in float32" : ""}`;
  return weightsError(
    "quantize",
    task,
    `${wanted}, got ${value} at ${placeOf(begin * cols + index, shape)}; ${hint}`,
    cause,
  );
}
