/**
 * The quantization kernels as functions: arguments checked on this side, rows handed over in blocks, a kernel's
 * status turned into an error that says what to do.
 */
import { KernelError, WeightsError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import { BYTES_PER_ELEMENT, type FloatDtype, isFloatDtype } from "../tensor/mod.ts";
import { rotateRows } from "./packed/rotation.ts";
import {
  BIT_WIDTHS,
  type BitWidth,
  checkPackedTensor,
  defaultTwoLevelGroupSize,
  GROUP_SIZES,
  groupCount,
  type GroupSize,
  type OneLevelTensor,
  packedRows,
  type PackedTensor,
  packedWords,
  SCALE_BITS,
  type ScaleBits,
  subCodeBytes,
  superblockCount,
  TWO_LEVEL_GROUP_SIZES,
  ZERO_POINT_KINDS,
  type ZeroPointKind,
} from "./packed/layout.ts";
import { addLowRank } from "./packed/low_rank.ts";

/** `clip`: search of clipped ranges, then least squares of scale and zero point; `round`: minimum and maximum. */
export type WeightSolver = "round" | "clip";
export const WEIGHT_SOLVERS: readonly WeightSolver[] = ["clip", "round"];

/** Weights in any floating type: the elements, or their bytes. */
export interface Weights {
  readonly data: Float32Array | Float64Array | Uint16Array | Uint8Array;
  readonly dtype: FloatDtype;
}

export interface QuantizeOptions {
  readonly bits: BitWidth;
  /** Default 64; with two-level scales 16 for 2 and 3 bits, 32 for 4 and 8. */
  readonly groupSize?: GroupSize | undefined;
  /** Default `clip`. */
  readonly solver?: WeightSolver | undefined;
  /** Default `real`. */
  readonly zeroPoint?: ZeroPointKind | undefined;
  /** Two-level scales with sub-codes of this many bits; default a half float a group. */
  readonly scaleBits?: ScaleBits | undefined;
  /** Importance of each input column, finite and ≥ 0; default all ones. Only `clip` uses it. */
  readonly columnWeights?: Float32Array | undefined;
}

/** Sums and maxima of `b` against `a`, in float64. */
export interface ErrorStatistics {
  /** Σ a² */
  readonly sumSquares: number;
  /** Σ b² */
  readonly sumSquaresOther: number;
  /** Σ a·b */
  readonly dot: number;
  /** Σ (a − b)² */
  readonly sumSquaredError: number;
  /** max |a − b| */
  readonly maxError: number;
  /** max |a| */
  readonly maxMagnitude: number;
}

/** The header's `AQ_F32`, …. */
const DTYPE_NUMBERS: Record<FloatDtype, number> = { F32: 0, F16: 1, BF16: 2, F8_E4M3: 3, F8_E5M2: 4, F64: 5 };
/** The header's `AQ_ZERO_POINT_*`. */
const ZERO_POINT_NUMBERS: Record<ZeroPointKind, number> = { real: 0, integer: 1, symmetric: 2 };

/**
 * Elements of a block of whole rows. WebAssembly gets a matrix block by block, because it copies a call's buffers
 * into a memory that never shrinks again; sums are taken block by block everywhere, so that they do not depend
 * on the backend.
 */
const BLOCK_ELEMENTS = 4 * 2 ** 20;

const STATUS_TEXT: Record<number, string> = {
  [-1]: "a null pointer or an unknown enumerator",
  [-2]: "a size that is not allowed or too large",
  [-3]: "a code that does not fit its bits, or a column weight that is negative or not finite",
  [-4]: "NaN or infinity among the weights",
  [-5]: "weights too large for a half-precision scale",
  [-6]: "an instruction set that this processor or build lacks",
};

function check(status: number, doing: string): void {
  if (status === 0) return;
  throw new KernelError(`Cannot ${doing}: the kernel reports ${STATUS_TEXT[status] ?? `status ${status}`}`, {
    status,
  });
}

function checkCount(doing: string, name: string, value: number): void {
  if (!Number.isSafeInteger(value) || value < 0) {
    throw new RangeError(`Cannot ${doing}: ${name} must be a whole number ≥ 0, got ${value}`);
  }
}

function checkMember<T>(doing: string, name: string, value: T, allowed: readonly T[]): void {
  if (!allowed.includes(value)) {
    throw new RangeError(
      `Cannot ${doing}: ${name} must be one of ${allowed.join(", ")}, got ${JSON.stringify(value)}`,
    );
  }
}

function bytesOf(data: ArrayBufferView<ArrayBufferLike>): Uint8Array {
  return new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
}

/** The weights' bytes, aligned for their type (a copy where the view is not). */
function weightBytes(doing: string, weights: Weights, elements: number): Uint8Array {
  if (!ArrayBuffer.isView(weights?.data)) {
    throw new TypeError(`Cannot ${doing}: weights.data must be a typed array, got ${typeof weights?.data}`);
  }
  if (!isFloatDtype(weights.dtype)) {
    throw new TypeError(
      `Cannot ${doing}: weights.dtype must be a floating type, got ${JSON.stringify(weights.dtype)}`,
    );
  }
  const width = BYTES_PER_ELEMENT[weights.dtype];
  if (weights.data.BYTES_PER_ELEMENT !== width && weights.data.BYTES_PER_ELEMENT !== 1) {
    throw new TypeError(
      `Cannot ${doing}: ${weights.dtype} has ${width} bytes an element, weights.data ${weights.data.BYTES_PER_ELEMENT}`,
    );
  }
  if (weights.data.byteLength !== elements * width) {
    throw new TypeError(
      `Cannot ${doing}: ${elements} elements of ${weights.dtype} are ${
        elements * width
      } bytes, got ${weights.data.byteLength}`,
    );
  }
  const bytes = bytesOf(weights.data);
  return bytes.byteOffset % width === 0 ? bytes : bytes.slice();
}

/** Blocks of whole rows as [begin, end). */
function* rowBlocks(rows: number, cols: number): Generator<[number, number]> {
  const step = Math.max(1, Math.floor(BLOCK_ELEMENTS / Math.max(1, cols)));
  for (let begin = 0; begin < rows; begin += step) yield [begin, Math.min(begin + step, rows)];
}

/** Blocks for a kernel whose results do not depend on them: all rows at once for a native library. */
function* callBlocks(kernels: Kernels, rows: number, cols: number): Generator<[number, number]> {
  if (kernels.backend === "wasm") yield* rowBlocks(rows, cols);
  else if (rows > 0) yield [0, rows];
}

/**
 * Quantizes a matrix, group by group along its rows.
 *
 * **Shapes** `weights: [rows, cols]` row-major, `columnWeights: f32[cols]`. Rows are independent: quantizing a
 * matrix in blocks of rows gives the same bytes.
 *
 * @throws {WeightsError} when a weight is NaN or infinite (naming row and column) or too large for a half-precision scale
 * @throws {TypeError | RangeError} when an argument has the wrong type, shape or value
 *
 * @example
 * ```ts
 * import { openKernels } from "../native/mod.ts";
 *
 * const kernels = await openKernels();
 * const weights = { data: Float32Array.of(0.1, -0.2, 0.3, 0.4), dtype: "F32" } as const;
 * const packed = quantize(kernels, weights, 2, 2, { bits: 4 });
 * console.log(dequantize(kernels, packed));
 * ```
 */
export function quantize(
  kernels: Kernels,
  weights: Weights,
  rows: number,
  cols: number,
  options: QuantizeOptions & { readonly scaleBits?: undefined },
): OneLevelTensor;
export function quantize(
  kernels: Kernels,
  weights: Weights,
  rows: number,
  cols: number,
  options: QuantizeOptions,
): PackedTensor;
export function quantize(
  kernels: Kernels,
  weights: Weights,
  rows: number,
  cols: number,
  options: QuantizeOptions,
): PackedTensor {
  const doing = "quantize a matrix";
  const {
    bits,
    scaleBits,
    groupSize = scaleBits === undefined ? 64 : defaultTwoLevelGroupSize(bits),
    solver = "clip",
    zeroPoint: zeroPointKind = "real",
    columnWeights,
  } = options;
  checkCount(doing, "rows", rows);
  checkCount(doing, "cols", cols);
  checkMember(doing, "bits", bits, BIT_WIDTHS);
  checkMember(doing, "groupSize", groupSize, scaleBits === undefined ? GROUP_SIZES : TWO_LEVEL_GROUP_SIZES);
  if (scaleBits !== undefined) {
    checkMember(doing, "scaleBits", scaleBits, SCALE_BITS);
    checkMember(doing, "zeroPoint with two-level scales", zeroPointKind, ["real"]);
  }
  checkMember(doing, "solver", solver, WEIGHT_SOLVERS);
  checkMember(doing, "zeroPoint", zeroPointKind, ZERO_POINT_KINDS);
  if (columnWeights !== undefined) {
    if (!(columnWeights instanceof Float32Array) || columnWeights.length !== cols) {
      throw new TypeError(
        `Cannot ${doing}: columnWeights must be ${cols} float32 values, got ${columnWeights?.length}`,
      );
    }
    if (solver !== "clip") {
      throw new RangeError(`Cannot ${doing}: columnWeights need the solver "clip", got "${solver}"`);
    }
    const bad = columnWeights.findIndex((weight) => !(weight >= 0 && weight < Infinity));
    if (bad >= 0) {
      throw new RangeError(
        `Cannot ${doing}: columnWeights must be finite and ≥ 0, got ${columnWeights[bad]} at ${bad}`,
      );
    }
  }
  const bytes = weightBytes(doing, weights, rows * cols);
  const tensor = emptyTensor(rows, cols, bits, groupSize, zeroPointKind, scaleBits);
  const dtype = DTYPE_NUMBERS[weights.dtype], kind = ZERO_POINT_NUMBERS[zeroPointKind];
  const rowBytes = cols * BYTES_PER_ELEMENT[weights.dtype];
  const { calls, isaNumber } = kernels;
  for (const [begin, end] of callBlocks(kernels, rows, cols)) {
    if (cols === 0) break;
    const block = bytes.subarray(begin * rowBytes, end * rowBytes);
    const [n, k, g] = [kernels.size(end - begin), kernels.size(cols), kernels.size(groupSize)];
    const part = packedRows(tensor, begin, end);
    const h = columnWeights ?? null;
    let status: number;
    if (part.scaleBits !== undefined) {
      status = calls.aq_quantize_two_level(
        block,
        dtype,
        n,
        k,
        bits,
        g,
        part.scaleBits,
        solver === "round" ? 0 : 1,
        h,
        part.packed,
        part.subScale,
        part.subMin,
        part.superScale,
        part.superMin,
        isaNumber,
        kernels.threads,
      );
    } else {
      const { packed, scale: s, zeroPoint } = part;
      const z = zeroPoint ?? null;
      status = solver === "round"
        ? calls.aq_quantize_round(block, dtype, n, k, bits, g, kind, packed, s, z, isaNumber, kernels.threads)
        : calls.aq_quantize_clip(
          block,
          dtype,
          n,
          k,
          bits,
          g,
          kind,
          h,
          packed,
          s,
          z,
          isaNumber,
          kernels.threads,
        );
    }
    if (status === -4) {
      const index = findNonfinite(kernels, { data: block, dtype: weights.dtype }, (end - begin) * cols);
      throw new WeightsError(
        `Cannot ${doing}: the weight at row ${begin + Math.floor(index / cols)}, column ${
          index % cols
        } is NaN or infinite`,
      );
    }
    if (status === -5) {
      throw new WeightsError(
        `Cannot ${doing}: weights in rows ${begin} to ${
          end - 1
        } are too large for a half-precision scale (largest 65504)`,
      );
    }
    check(status, doing);
  }
  return tensor;
}

function emptyTensor(
  rows: number,
  cols: number,
  bits: BitWidth,
  groupSize: GroupSize,
  zeroPointKind: ZeroPointKind,
  scaleBits: ScaleBits | undefined,
): PackedTensor {
  const common = { rows, cols, bits, groupSize, packed: new Uint32Array(rows * packedWords(cols, bits)) };
  if (scaleBits !== undefined) {
    const bytes = rows * subCodeBytes(cols, groupSize, scaleBits), supers = rows * superblockCount(cols);
    return {
      ...common,
      scaleBits,
      subScale: new Uint8Array(bytes),
      subMin: new Uint8Array(bytes),
      superScale: new Uint16Array(supers),
      superMin: new Uint16Array(supers),
    };
  }
  const groups = rows * groupCount(cols, groupSize);
  return {
    ...common,
    zeroPointKind,
    scale: new Uint16Array(groups),
    zeroPoint: zeroPointKind === "symmetric" ? undefined : new Uint16Array(groups),
  };
}

/**
 * The weights of a packed matrix, row-major: float32, or the bits of half or bfloat16 values.
 *
 * @throws {TypeError} when the arrays do not fit the tensor's sizes
 */
export function dequantize(
  kernels: Kernels,
  tensor: PackedTensor,
  dtype?: "F32",
): Float32Array<ArrayBuffer>;
export function dequantize(
  kernels: Kernels,
  tensor: PackedTensor,
  dtype: "F16" | "BF16",
): Uint16Array<ArrayBuffer>;
export function dequantize(
  kernels: Kernels,
  tensor: PackedTensor,
  dtype?: "F32" | "F16" | "BF16",
): Float32Array<ArrayBuffer> | Uint16Array<ArrayBuffer>;
export function dequantize(
  kernels: Kernels,
  tensor: PackedTensor,
  dtype: "F32" | "F16" | "BF16" = "F32",
): Float32Array<ArrayBuffer> | Uint16Array<ArrayBuffer> {
  const doing = "dequantize a matrix";
  checkPackedTensor(doing, tensor);
  checkMember(doing, "dtype", dtype, ["F32", "F16", "BF16"]);
  if (tensor.lowRank !== undefined || tensor.rotation !== undefined) {
    return dequantizeExtended(kernels, tensor, dtype);
  }
  const { rows, cols, bits } = tensor;
  const out = dtype === "F32" ? new Float32Array(rows * cols) : new Uint16Array(rows * cols);
  const { calls, isaNumber } = kernels;
  const k = kernels.size(cols), g = kernels.size(tensor.groupSize), d = DTYPE_NUMBERS[dtype];
  for (const [begin, end] of callBlocks(kernels, rows, cols)) {
    const part = packedRows(tensor, begin, end);
    const n = kernels.size(end - begin), target = out.subarray(begin * cols, end * cols);
    const status = part.scaleBits === undefined
      ? calls.aq_dequantize(
        part.packed,
        part.scale,
        part.zeroPoint ?? null,
        n,
        k,
        bits,
        g,
        target,
        d,
        isaNumber,
        kernels.threads,
      )
      : calls.aq_dequantize_two_level(
        part.packed,
        part.subScale,
        part.subMin,
        part.superScale,
        part.superMin,
        n,
        k,
        bits,
        g,
        part.scaleBits,
        target,
        d,
        isaNumber,
        kernels.threads,
      );
    check(status, doing);
  }
  return out;
}

/** Codes, then the low-rank correction, then the way back from the rotation: in float32, then rounded once. */
function dequantizeExtended(
  kernels: Kernels,
  { lowRank, rotation, ...codes }: PackedTensor,
  dtype: "F32" | "F16" | "BF16",
): Float32Array<ArrayBuffer> | Uint16Array<ArrayBuffer> {
  const { rows, cols } = codes;
  const values = dequantize(kernels, codes, "F32");
  if (lowRank !== undefined) addLowRank(values, lowRank, rows, cols);
  if (rotation !== undefined && cols > 0) rotateRows(values, cols, rotation, { inverse: true });
  if (dtype === "F32") return values;
  const bytes = convertFloats(kernels, { data: values, dtype: "F32" }, values.length, dtype);
  return new Uint16Array(bytes.buffer);
}

/**
 * Packs codes into words, row by row, least significant bits first.
 *
 * **Shapes** `codes: u8[rows, cols]` → `u32[rows, packedWords(cols, bits)]`
 * @throws {RangeError} when a code is above 2^bits − 1
 */
export function packCodes(
  kernels: Kernels,
  codes: Uint8Array,
  rows: number,
  cols: number,
  bits: BitWidth,
): Uint32Array<ArrayBuffer> {
  const doing = "pack codes";
  checkCount(doing, "rows", rows);
  checkCount(doing, "cols", cols);
  checkMember(doing, "bits", bits, BIT_WIDTHS);
  if (!(codes instanceof Uint8Array) || codes.length !== rows * cols) {
    throw new TypeError(`Cannot ${doing}: codes must be ${rows * cols} bytes, got ${codes?.length}`);
  }
  const words = packedWords(cols, bits);
  const packed = new Uint32Array(rows * words);
  for (const [begin, end] of callBlocks(kernels, rows, cols)) {
    const status = kernels.calls.aq_pack_codes(
      codes.subarray(begin * cols, end * cols),
      kernels.size(end - begin),
      kernels.size(cols),
      bits,
      packed.subarray(begin * words, end * words),
      kernels.isaNumber,
      kernels.threads,
    );
    if (status === -3) {
      throw new RangeError(
        `Cannot ${doing}: codes of ${bits} bits are at most ${2 ** bits - 1}, some are larger`,
      );
    }
    check(status, doing);
  }
  return packed;
}

/** Codes of packed words: `u32[rows, packedWords(cols, bits)]` → `u8[rows, cols]`. */
export function unpackCodes(
  kernels: Kernels,
  packed: Uint32Array,
  rows: number,
  cols: number,
  bits: BitWidth,
): Uint8Array<ArrayBuffer> {
  const doing = "unpack codes";
  checkCount(doing, "rows", rows);
  checkCount(doing, "cols", cols);
  checkMember(doing, "bits", bits, BIT_WIDTHS);
  const words = packedWords(cols, bits);
  if (!(packed instanceof Uint32Array) || packed.length !== rows * words) {
    throw new TypeError(`Cannot ${doing}: packed must be ${rows * words} u32 words, got ${packed?.length}`);
  }
  const codes = new Uint8Array(rows * cols);
  for (const [begin, end] of callBlocks(kernels, rows, cols)) {
    const status = kernels.calls.aq_unpack_codes(
      packed.subarray(begin * words, end * words),
      kernels.size(end - begin),
      kernels.size(cols),
      bits,
      codes.subarray(begin * cols, end * cols),
      kernels.isaNumber,
      kernels.threads,
    );
    check(status, doing);
  }
  return codes;
}

/**
 * Converts between floating types, round to nearest even; NaN stays NaN. F8_E4M3 has no infinity: what is beyond
 * its range becomes NaN.
 *
 * @returns the elements' bytes in `dtype`
 */
export function convertFloats(
  kernels: Kernels,
  weights: Weights,
  elements: number,
  dtype: FloatDtype,
): Uint8Array<ArrayBuffer> {
  const doing = `convert to ${dtype}`;
  checkCount(doing, "elements", elements);
  if (!isFloatDtype(dtype)) throw new TypeError(`Cannot ${doing}: not a floating type`);
  const bytes = weightBytes(doing, weights, elements);
  const from = BYTES_PER_ELEMENT[weights.dtype], to = BYTES_PER_ELEMENT[dtype];
  const out = new Uint8Array(elements * to);
  for (const [begin, end] of callBlocks(kernels, elements, 1)) {
    const status = kernels.calls.aq_convert(
      bytes.subarray(begin * from, end * from),
      DTYPE_NUMBERS[weights.dtype],
      out.subarray(begin * to, end * to),
      DTYPE_NUMBERS[dtype],
      kernels.size(end - begin),
      kernels.isaNumber,
      kernels.threads,
    );
    check(status, doing);
  }
  return out;
}

/** Position of the first NaN or infinity (after conversion to float32), −1 if there is none. */
export function findNonfinite(kernels: Kernels, weights: Weights, elements: number): number {
  const doing = "look for NaN and infinity";
  checkCount(doing, "elements", elements);
  const bytes = weightBytes(doing, weights, elements);
  const width = BYTES_PER_ELEMENT[weights.dtype];
  const index = new BigUint64Array(1);
  for (const [begin, end] of callBlocks(kernels, elements, 1)) {
    const block = bytes.subarray(begin * width, end * width);
    const status = kernels.calls.aq_find_nonfinite(
      block,
      DTYPE_NUMBERS[weights.dtype],
      kernels.size(end - begin),
      index,
      kernels.isaNumber,
      1,
    );
    check(status, doing);
    if (Number(index[0]) < end - begin) return begin + Number(index[0]);
  }
  return -1;
}

const NO_STATISTICS: ErrorStatistics = {
  sumSquares: 0,
  sumSquaresOther: 0,
  dot: 0,
  sumSquaredError: 0,
  maxError: 0,
  maxMagnitude: 0,
};

function statisticsFrom(raw: Float64Array): ErrorStatistics {
  const [sumSquares = 0, sumSquaresOther = 0, dot = 0, sumSquaredError = 0, maxError = 0, maxMagnitude = 0] =
    raw;
  return { sumSquares, sumSquaresOther, dot, sumSquaredError, maxError, maxMagnitude };
}

/** Statistics of two runs of elements together. */
export function addStatistics(a: ErrorStatistics, b: ErrorStatistics): ErrorStatistics {
  return {
    sumSquares: a.sumSquares + b.sumSquares,
    sumSquaresOther: a.sumSquaresOther + b.sumSquaresOther,
    dot: a.dot + b.dot,
    sumSquaredError: a.sumSquaredError + b.sumSquaredError,
    maxError: Math.max(a.maxError, b.maxError),
    maxMagnitude: Math.max(a.maxMagnitude, b.maxMagnitude),
  };
}

/** Root of Σ(a − b)² / Σa²; 0 when both are zero, infinite when only the reference is. */
export function relativeRmsError(statistics: ErrorStatistics): number {
  if (statistics.sumSquaredError === 0) return 0;
  return Math.sqrt(statistics.sumSquaredError / statistics.sumSquares);
}

/** Cosine of a and b as vectors; 1 when both are zero, 0 when only one is. */
export function cosine(statistics: ErrorStatistics): number {
  const { sumSquares, sumSquaresOther, dot } = statistics;
  if (sumSquares === 0 && sumSquaresOther === 0) return 1;
  if (sumSquares === 0 || sumSquaresOther === 0) return 0;
  return Math.min(1, dot / (Math.sqrt(sumSquares) * Math.sqrt(sumSquaresOther)));
}

/** Statistics of the packed matrix's weights against `weights`, without holding the dequantized matrix. */
export function packedErrorStatistics(
  kernels: Kernels,
  weights: Weights,
  tensor: PackedTensor,
): ErrorStatistics {
  const doing = "measure the error of a packed matrix";
  checkPackedTensor(doing, tensor);
  const { rows, cols, bits } = tensor;
  const bytes = weightBytes(doing, weights, rows * cols);
  const rowBytes = cols * BYTES_PER_ELEMENT[weights.dtype];
  if (tensor.lowRank !== undefined || tensor.rotation !== undefined) {
    let sums = NO_STATISTICS;
    for (const [begin, end] of rowBlocks(rows, cols)) {
      const a = { data: bytes.subarray(begin * rowBytes, end * rowBytes), dtype: weights.dtype };
      const data = dequantize(kernels, packedRows(tensor, begin, end), "F32");
      sums = addStatistics(sums, errorStatistics(kernels, a, { data, dtype: "F32" }, data.length));
    }
    return sums;
  }
  const { calls, isaNumber } = kernels;
  const k = kernels.size(cols), g = kernels.size(tensor.groupSize), dtype = DTYPE_NUMBERS[weights.dtype];
  const raw = new Float64Array(6);
  let total = NO_STATISTICS;
  for (const [begin, end] of rowBlocks(rows, cols)) {
    const part = packedRows(tensor, begin, end);
    const n = kernels.size(end - begin), block = bytes.subarray(begin * rowBytes, end * rowBytes);
    const status = part.scaleBits === undefined
      ? calls.aq_packed_error_statistics(
        block,
        dtype,
        part.packed,
        part.scale,
        part.zeroPoint ?? null,
        n,
        k,
        bits,
        g,
        raw,
        isaNumber,
        kernels.threads,
      )
      : calls.aq_two_level_error_statistics(
        block,
        dtype,
        part.packed,
        part.subScale,
        part.subMin,
        part.superScale,
        part.superMin,
        n,
        k,
        bits,
        g,
        part.scaleBits,
        raw,
        isaNumber,
        kernels.threads,
      );
    check(status, doing);
    total = addStatistics(total, statisticsFrom(raw));
  }
  return total;
}

/** Statistics of `b` against `a`, element by element. */
export function errorStatistics(
  kernels: Kernels,
  a: Weights,
  b: Weights,
  elements: number,
): ErrorStatistics {
  const doing = "measure an error";
  checkCount(doing, "elements", elements);
  const left = weightBytes(doing, a, elements), right = weightBytes(doing, b, elements);
  const leftWidth = BYTES_PER_ELEMENT[a.dtype], rightWidth = BYTES_PER_ELEMENT[b.dtype];
  const raw = new Float64Array(6);
  let total = NO_STATISTICS;
  for (const [begin, end] of rowBlocks(elements, 1)) {
    const status = kernels.calls.aq_error_statistics(
      left.subarray(begin * leftWidth, end * leftWidth),
      DTYPE_NUMBERS[a.dtype],
      right.subarray(begin * rightWidth, end * rightWidth),
      DTYPE_NUMBERS[b.dtype],
      kernels.size(end - begin),
      raw,
      kernels.isaNumber,
      kernels.threads,
    );
    check(status, doing);
    total = addStatistics(total, statisticsFrom(raw));
  }
  return total;
}
