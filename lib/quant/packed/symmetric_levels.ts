/**
 * Symmetric grids under two levels of scales, as ggml's Q3_K and Q6_K have them: `w = d · v · (q − z)`. They
 * are stored as two-level scales of 8 bits; kernels/include/arrowquant.h says how. Those of 8 bits have codes
 * of 6, from 0 to 63.
 */
import { WeightsError } from "../../errors.ts";
import { checkArray, checkCounts, DTYPE_NUMBERS, E_NONFINITE, E_RANGE } from "../../native/call.ts";
import * as call from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";
import { BYTES_PER_ELEMENT } from "../../tensor/mod.ts";
import { callBlocks, checkImportance, weightBytes, type Weights } from "../weights.ts";
import {
  type BitWidth,
  checkFormat,
  emptyLevels,
  groupCount,
  type GroupSize,
  levelsOf,
  mapLevels,
  packedWords,
  rowsOf,
  type TwoLevelScales,
} from "./layout.ts";

/** Sizes of a matrix with such scales. */
export interface SymmetricShape {
  readonly rows: number;
  readonly cols: number;
  /** 3 or 8. */
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
}

/** What the search begins with and looks at; at least one of the first two. */
export interface SymmetricSearch {
  /** `[rows, cols]`, finite; without them only the levels nearest to `scale` are found. */
  readonly weights?: Weights | undefined;
  /** `f32[rows, groups]`, negative ones as well; default each group's range. */
  readonly scale?: Float32Array | undefined;
  readonly columnWeights?: Float32Array | undefined;
}

/**
 * The levels of a symmetric grid, and the packed codes of the weights where there are any.
 *
 * @throws {WeightsError} when a scale is NaN, infinite or too large
 * @throws {TypeError | RangeError} when an argument has the wrong type, shape or value
 */
export function symmetricLevels(
  kernels: Kernels,
  shape: SymmetricShape,
  { weights, scale, columnWeights }: SymmetricSearch,
): { readonly levels: TwoLevelScales; readonly packed: Uint32Array<ArrayBuffer> } {
  const doing = "fit a symmetric grid of two levels", { rows, cols, bits, groupSize } = shape;
  checkCounts(doing, { rows, cols });
  checkFormat(doing, { bits, groupSize, zeroPoint: "symmetric", scaleBits: 8 });
  const groups = groupCount(cols, groupSize), words = packedWords(cols, bits);
  if (scale !== undefined) checkArray(doing, "scale", scale, rows * groups);
  if (columnWeights !== undefined) checkImportance(doing, "columnWeights", columnWeights, cols);
  const bytes = weights && weightBytes(doing, weights, rows * cols);
  const { dtype = "F32" } = weights ?? {},
    number = DTYPE_NUMBERS[dtype],
    rowBytes = cols * BYTES_PER_ELEMENT[dtype];
  const levels = emptyLevels({ rows, cols, groupSize, scaleBits: 8 }), packed = new Uint32Array(rows * words);
  const explain = (status: number) => {
    if (status !== E_NONFINITE && status !== E_RANGE) return undefined;
    return new WeightsError(`Cannot ${doing}: scales must be finite and fit half floats, got others`);
  };
  for (const [begin, end] of callBlocks(kernels, rows, cols)) {
    const data = bytes?.subarray(begin * rowBytes, end * rowBytes);
    const given = [data, number, scale?.subarray(begin * groups, end * groups), columnWeights] as const;
    const sizes = [end - begin, cols, bits, groupSize, 8] as const;
    const out = levelsOf(mapLevels(levels, rowsOf(rows, begin, end))),
      codes = packed.subarray(begin * words, end * words);
    call.quantizeSymmetricLevels(kernels, { doing, explain }, ...given, ...sizes, codes, ...out);
  }
  return { levels, packed };
}
