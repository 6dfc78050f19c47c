/** Quantization of matrices by their weights alone: round to nearest, and search of clipped ranges. */
import { WeightsError } from "../errors.ts";
import {
  checkCounts,
  checkMember,
  type Doing,
  DTYPE_NUMBERS,
  E_NONFINITE,
  E_RANGE,
  ZERO_POINT_NUMBERS,
} from "../native/call.ts";
import * as call from "../native/functions.ts";
import type { Kernels } from "../native/mod.ts";
import { BYTES_PER_ELEMENT } from "../tensor/mod.ts";
import { findNonfinite } from "./convert.ts";
import {
  type BitWidth,
  checkFormat,
  defaultTwoLevelGroupSize,
  emptyLevels,
  groupCount,
  type GroupSize,
  halves,
  halvesInBytes,
  levelsOf,
  OFFSET_BITS,
  type OneLevelTensor,
  packedRows,
  type PackedTensor,
  packedWords,
  type ScaleBits,
  type WeightFormat,
  type ZeroPointKind,
} from "./packed/layout.ts";
import { symmetricLevels } from "./packed/symmetric_levels.ts";
import { callBlocks, checkImportance, weightBytes, type Weights } from "./weights.ts";

/** `clip`: search of clipped ranges, then a least-squares fit; `round`: the range from minimum to maximum. */
export type WeightSolver = "round" | "clip";
export const WEIGHT_SOLVERS: readonly WeightSolver[] = ["clip", "round"];

/** How a matrix is quantized. */
export interface QuantizeOptions {
  /** Bits of a weight. */
  readonly bits: BitWidth;
  /** Default 64; with two-level scales 16 for 2 and 3 bits, 32 for 4 and 8. */
  readonly groupSize?: GroupSize | undefined;
  /** Default `clip`. */
  readonly solver?: WeightSolver | undefined;
  /** Default `real`. */
  readonly zeroPoint?: ZeroPointKind | undefined;
  /**
   * Two-level scales with sub-codes of this many bits, or 16: a scale and an offset that are half floats,
   * `w = scale · code + offset`; default a scale and a zero point.
   */
  readonly scaleBits?: ScaleBits | undefined;
  /** Importance of each input column, finite and ≥ 0; default all ones. Only `clip` uses it. */
  readonly columnWeights?: Float32Array | undefined;
}

/**
 * Quantizes a matrix, group by group along its rows.
 *
 * **Shapes** `weights: [rows, cols]` row-major, `columnWeights: f32[cols]`. Rows are independent: quantizing
 * a matrix in blocks of rows gives the same bytes.
 *
 * @throws {WeightsError} when a weight is NaN, infinite (naming row and column) or too large for half scales
 * @throws {TypeError | RangeError} when an argument has the wrong type, shape or value
 *
 * @example
 * ```ts
 * import { openKernels } from "../native/mod.ts";
 *
 * const kernels = await openKernels();
 * const weights = { data: Float32Array.of(0.1, -0.2, 0.3, 0.4), dtype: "F32" } as const;
 * const packed = quantize(kernels, weights, 2, 2, { bits: 4 });
 * console.log(packed.scale); // a half float a row
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
  checkCounts(doing, { rows, cols });
  const settings = checkOptions(doing, options, cols);
  const { bits, groupSize, solver, zeroPoint: kind, columnWeights, scaleBits } = settings;
  const bytes = weightBytes(doing, weights, rows * cols), dtype = DTYPE_NUMBERS[weights.dtype];
  if (scaleBits === 8) return quantizeSymmetric(kernels, weights, rows, cols, settings);
  const tensor = emptyTensor(rows, cols, settings), rowBytes = cols * BYTES_PER_ELEMENT[weights.dtype];
  if (cols === 0) return tensor;
  for (const [begin, end] of callBlocks(kernels, rows, cols)) {
    const data = bytes.subarray(begin * rowBytes, end * rowBytes), part = packedRows(tensor, begin, end);
    const explain = (status: number) =>
      weightsError(kernels, doing, status, { data, dtype: weights.dtype }, [begin, end], cols);
    const from: Doing = { doing, explain }, sizes = [end - begin, cols, bits, groupSize] as const;
    if (part.scaleBits !== undefined && part.scaleBits !== OFFSET_BITS) {
      const how = [part.scaleBits, solver === "round" ? 0 : 1, columnWeights] as const;
      call.quantizeTwoLevel(kernels, from, data, dtype, ...sizes, ...how, part.packed, ...levelsOf(part));
      continue;
    }
    const out = part.scaleBits === undefined
      ? [part.packed, part.scale, part.zeroPoint] as const
      : [part.packed, halvesInBytes(part.subScale), halvesInBytes(part.subMin)] as const;
    const number = ZERO_POINT_NUMBERS[part.scaleBits === undefined ? kind : "offset"];
    if (solver === "round") call.quantizeRound(kernels, from, data, dtype, ...sizes, number, ...out);
    else call.quantizeClip(kernels, from, data, dtype, ...sizes, number, columnWeights, ...out);
  }
  return tensor;
}

/** A matrix on a symmetric two-level grid, from the scales of its plain one where that has as many codes. */
function quantizeSymmetric(
  kernels: Kernels,
  given: Weights,
  rows: number,
  cols: number,
  { bits, groupSize, solver, columnWeights }: Settings,
): PackedTensor {
  const shape = { rows, cols, bits, groupSize };
  if (bits === 3 && solver === "clip") { // which refuses what is not finite, too
    const how = { bits, groupSize, zeroPoint: "symmetric", solver, columnWeights } as const;
    const scale = Float32Array.from(halves(quantize(kernels, given, rows, cols, how).scale));
    const { levels, packed } = symmetricLevels(kernels, shape, { weights: given, scale, columnWeights });
    return { ...shape, ...levels, packed };
  }
  const doing = "quantize a matrix", bad = findNonfinite(kernels, given, rows * cols);
  if (bad >= 0) throw nonfinite(doing, Math.floor(bad / cols), bad % cols);
  const { levels, packed } = symmetricLevels(kernels, shape, { weights: given, columnWeights });
  return { ...shape, ...levels, packed };
}

interface Settings extends WeightFormat {
  readonly solver: WeightSolver;
  readonly columnWeights: Float32Array | undefined;
}

/** The options with their defaults. @throws {TypeError | RangeError} when one is not allowed */
function checkOptions(doing: string, options: QuantizeOptions, cols: number): Settings {
  const { bits, scaleBits, columnWeights } = options;
  const {
    groupSize = scaleBits === undefined || scaleBits === OFFSET_BITS ? 64 : defaultTwoLevelGroupSize(bits),
  } = options;
  const { solver = "clip", zeroPoint = "real" } = options;
  checkFormat(doing, { bits, groupSize, zeroPoint, scaleBits });
  checkMember(doing, "solver", solver, WEIGHT_SOLVERS);
  if (columnWeights !== undefined) {
    if (solver !== "clip") {
      throw new RangeError(`Cannot ${doing}: columnWeights need the solver "clip", got "${solver}"`);
    }
    checkImportance(doing, "columnWeights", columnWeights, cols);
  }
  return { bits, groupSize, solver, zeroPoint, scaleBits, columnWeights };
}

/** The error of the weights of rows `[begin, end)` that a kernel's status reports. */
function weightsError(
  kernels: Kernels,
  doing: string,
  status: number,
  weights: Weights,
  [begin, end]: readonly [number, number],
  cols: number,
): WeightsError | undefined {
  if (status === E_NONFINITE) {
    const index = findNonfinite(kernels, weights, (end - begin) * cols);
    return nonfinite(doing, begin + Math.floor(index / cols), index % cols);
  }
  if (status !== E_RANGE) return undefined;
  return new WeightsError(
    `Cannot ${doing}: weights in rows ${begin} to ${
      end - 1
    } are too large for a half-precision scale (largest 65504)`,
  );
}

const nonfinite = (doing: string, row: number, column: number) =>
  new WeightsError(`Cannot ${doing}: the weight at row ${row}, column ${column} is NaN or infinite`);

function emptyTensor(rows: number, cols: number, settings: Settings): PackedTensor {
  const { bits, groupSize, zeroPoint, scaleBits } = settings;
  const common = { rows, cols, bits, groupSize, packed: new Uint32Array(rows * packedWords(cols, bits)) };
  if (scaleBits !== undefined) {
    return { ...common, ...emptyLevels({ rows, cols, groupSize, scaleBits }) };
  }
  const groups = rows * groupCount(cols, groupSize);
  return {
    ...common,
    zeroPointKind: zeroPoint,
    scale: new Uint16Array(groups),
    zeroPoint: zeroPoint === "symmetric" ? undefined : new Uint16Array(groups),
  };
}
