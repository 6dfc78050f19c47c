/** Error of one run of weights against another, and of packed matrices against their weights. */
import { checkCount, DTYPE_NUMBERS } from "../native/call.ts";
import * as call from "../native/functions.ts";
import type { Kernels } from "../native/mod.ts";
import { BYTES_PER_ELEMENT } from "../tensor/mod.ts";
import { dequantize } from "./dequantize.ts";
import {
  checkPackedTensor,
  isRotated,
  levelsOf,
  linesOf,
  packedRows,
  type PackedTensor,
} from "./packed/layout.ts";
import { rowBlocks, weightBytes, type Weights } from "./weights.ts";

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

/** The statistics in the order of the kernels' results. */
const NAMES: readonly (keyof ErrorStatistics)[] = [
  "sumSquares",
  "sumSquaresOther",
  "dot",
  "sumSquaredError",
  "maxError",
  "maxMagnitude",
];

const statisticsFrom = (raw: ArrayLike<number>): ErrorStatistics =>
  Object.fromEntries(NAMES.map((name, i) => [name, raw[i]!])) as unknown as ErrorStatistics;

/** Statistics of no elements. */
export const NO_STATISTICS: ErrorStatistics = statisticsFrom([0, 0, 0, 0, 0, 0]);

/** Statistics of two runs of elements together. */
export function addStatistics(a: ErrorStatistics, b: ErrorStatistics): ErrorStatistics {
  return statisticsFrom(
    NAMES.map((name) => name.startsWith("max") ? Math.max(a[name], b[name]) : a[name] + b[name]),
  );
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
  const { rows, cols, bits, groupSize } = tensor;
  if (isRotated(tensor)) {
    const data = dequantize(kernels, tensor);
    return errorStatistics(kernels, weights, { data, dtype: "F32" }, rows * cols);
  }
  const bytes = weightBytes(doing, weights, rows * cols), dtype = DTYPE_NUMBERS[weights.dtype];
  const rowBytes = cols * BYTES_PER_ELEMENT[weights.dtype];
  const raw = new Float64Array(6);
  let total = NO_STATISTICS;
  for (const [begin, end] of rowBlocks(rows, cols)) {
    const part = packedRows(tensor, begin, end), count = end - begin;
    const block = bytes.subarray(begin * rowBytes, end * rowBytes);
    if (part.scaleBits === undefined) {
      const { packed, scale, zeroPoint } = part, sizes = [count, cols, bits, groupSize] as const;
      call.packedErrorStatistics(kernels, doing, block, dtype, packed, scale, zeroPoint, ...sizes, raw);
    } else if (part.codes === "trellis") {
      const { packed } = part, sizes = [count, cols, bits, groupSize] as const;
      call.trellisErrorStatistics(kernels, doing, block, dtype, packed, ...linesOf(part), ...sizes, raw);
    } else {
      const { packed, scaleBits } = part, sizes = [count, cols, bits, groupSize, scaleBits] as const;
      call.twoLevelErrorStatistics(kernels, doing, block, dtype, packed, ...levelsOf(part), ...sizes, raw);
    }
    total = addStatistics(total, statisticsFrom(raw));
  }
  return total;
}

/** Statistics of `b` against `a`, element by element. */
export function errorStatistics(kernels: Kernels, a: Weights, b: Weights, elements: number): ErrorStatistics {
  const doing = "measure an error";
  checkCount(doing, "elements", elements);
  const [left, right] = [a, b].map((weights) => {
    const bytes = weightBytes(doing, weights, elements), width = BYTES_PER_ELEMENT[weights.dtype];
    return (begin: number, end: number) => bytes.subarray(begin * width, end * width);
  });
  const [from, to] = [DTYPE_NUMBERS[a.dtype], DTYPE_NUMBERS[b.dtype]];
  const raw = new Float64Array(6);
  let total = NO_STATISTICS;
  for (const [begin, end] of rowBlocks(elements, 1)) {
    call.errorStatistics(kernels, doing, left!(begin, end), from, right!(begin, end), to, end - begin, raw);
    total = addStatistics(total, statisticsFrom(raw));
  }
  return total;
}
