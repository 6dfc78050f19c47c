/**
 * Scales of groups by themselves: reading the real scale and offset of every group of a packed matrix, and
 * two-level scales for given real ones, for solvers that fix the scales before they choose codes.
 */
import { WeightsError } from "../../errors.ts";
import { checkArray, checkCounts, checkMember, E_NONFINITE, E_RANGE } from "../../native/call.ts";
import * as call from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";
import { checkImportance } from "../weights.ts";
import {
  checkPackedTensor,
  emptyLevels,
  groupCount,
  type GroupSize,
  halfBits,
  halves,
  halvesInBytes,
  levelsOf,
  mapLevels,
  OFFSET_BITS,
  type PackedTensor,
  rowsOf,
  type ScaleBits,
  subCodeBytes,
  SUPERBLOCK_SIZE,
  superblockCount,
  TWO_LEVEL_GROUP_SIZES,
  type TwoLevelScales,
} from "./layout.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Scale and offset of every group: `w = scale · code + offset`. */
export interface GroupAffine {
  /** f32[rows, groups] */
  readonly scale: Floats;
  /** f32[rows, groups] */
  readonly offset: Floats;
}

/** Sizes of a matrix with two-level scales. */
export interface TwoLevelShape {
  readonly rows: number;
  readonly cols: number;
  /** 16, 32, 64 or 128. */
  readonly groupSize: GroupSize;
  readonly scaleBits: ScaleBits;
}

/** Sub-codes of 8 bits hold symmetric grids alone, which have their own fit. */
const FITTED_SCALE_BITS: readonly ScaleBits[] = [4, 6, OFFSET_BITS];
/** Groups handed to the kernel at once, in whole rows: WebAssembly copies them. */
const BLOCK_GROUPS = 2 ** 20;

/**
 * Scale and offset of every group, such that `w = scale · code + offset`, for either kind of scales. Both are
 * exact: a product of two half floats, or of a half float and a code of at most 6 bits, is a float32.
 *
 * **Shapes** → `scale` and `offset: f32[rows, groups]`
 *
 * @throws {TypeError | RangeError} when the arrays do not fit the tensor's sizes
 */
export function groupAffine(tensor: PackedTensor): GroupAffine {
  checkPackedTensor("read the scales of a packed matrix", tensor);
  const { rows, cols, groupSize, bits } = tensor;
  const groups = groupCount(cols, groupSize);
  const scale = new Float32Array(rows * groups), offset = new Float32Array(rows * groups);
  if (tensor.scaleBits === undefined) {
    const scales = halves(tensor.scale);
    const zeroPoints = tensor.zeroPoint === undefined ? undefined : halves(tensor.zeroPoint);
    for (let i = 0; i < scale.length; i++) {
      scale[i] = scales[i]!;
      offset[i] = -scales[i]! * (zeroPoints?.[i] ?? 2 ** (bits - 1));
    }
    return { scale, offset };
  }
  const { scaleBits, subScale, subMin } = tensor;
  if (scaleBits === OFFSET_BITS) {
    scale.set(halves(halvesInBytes(subScale)));
    offset.set(halves(halvesInBytes(subMin)));
    return { scale, offset };
  }
  const superScale = halves(tensor.superScale), superMin = halves(tensor.superMin);
  const bytes = subCodeBytes(cols, groupSize, scaleBits), supers = superblockCount(cols);
  const superGroups = SUPERBLOCK_SIZE / groupSize;
  for (let row = 0, i = 0; row < rows; row++) {
    const start = row * bytes;
    for (let own = 0, group = 0; own < supers; own++) {
      const step = superScale[row * supers + own]!, least = -superMin[row * supers + own]!;
      for (const end = Math.min(groups, group + superGroups); group < end; group++, i++) {
        scale[i] = step * readCode(subScale, start, group, scaleBits);
        offset[i] = least * readCode(subMin, start, group, scaleBits);
      }
    }
  }
  return { scale, offset };
}

/**
 * Two-level scales nearest to given real ones: for each superblock the half-precision step whose multiples
 * are nearest to the scales in least squares, among several ranges as ggml's `make_qp_quants` tries them, and
 * the same for the minima. Codes have no sign: a scale (or minimum) whose sign is not that of its
 * superblock's weighted sum becomes 0. With `scaleBits` 16 they are the nearest half floats.
 *
 * **Shapes** `scale`, `minimum` and `groupWeights: f32[rows, groups]`, with `w = scale · code − minimum`
 *
 * @param groupWeights how much each group counts, finite and ≥ 0; default all ones
 * @throws {WeightsError} when a scale or minimum is NaN, infinite or too large
 * @throws {TypeError | RangeError} when an argument has the wrong type, shape or value
 */
export function fitTwoLevel(
  kernels: Kernels,
  shape: TwoLevelShape,
  scale: Float32Array,
  minimum: Float32Array,
  groupWeights?: Float32Array,
): TwoLevelScales {
  const doing = "fit two-level scales";
  const { rows, cols, groupSize, scaleBits } = shape;
  checkCounts(doing, { rows, cols });
  checkMember(doing, "groupSize", groupSize, TWO_LEVEL_GROUP_SIZES);
  checkMember(doing, "scaleBits", scaleBits, FITTED_SCALE_BITS);
  const groups = groupCount(cols, groupSize), length = rows * groups;
  checkArray(doing, "scale", scale, length);
  checkArray(doing, "minimum", minimum, length);
  if (groupWeights !== undefined) checkImportance(doing, "groupWeights", groupWeights, length);
  const result = emptyLevels(shape);
  if (scaleBits === OFFSET_BITS) {
    halvesInBytes(result.subScale).set(halfBits(scale));
    halvesInBytes(result.subMin).set(halfBits(minimum.map((value) => -value)));
    const isUsable = [result.subScale, result.subMin].every((bytes) =>
      halves(halvesInBytes(bytes)).every(isFinite)
    );
    if (isUsable) return result;
    throw new WeightsError(
      `Cannot ${doing}: scales and offsets must be finite and at most 65504, got others`,
    );
  }
  const step = Math.max(1, Math.floor(BLOCK_GROUPS / Math.max(1, groups)));
  for (let begin = 0; begin < rows; begin += step) {
    const end = Math.min(rows, begin + step);
    const own = (floats: Float32Array) => floats.subarray(begin * groups, end * groups);
    const explain = (status: number) => {
      if (status !== E_NONFINITE && status !== E_RANGE) return undefined;
      const most = 65504 * (2 ** scaleBits - 1), where = `rows ${begin} to ${end - 1}`;
      return new WeightsError(
        `Cannot ${doing}: scales and minima must be finite and at most ${most}, got others in ${where}`,
      );
    };
    const given = [own(scale), own(minimum), groupWeights && own(groupWeights)] as const;
    const out = levelsOf(mapLevels(result, rowsOf(rows, begin, end)));
    call.fitTwoLevel(kernels, { doing, explain }, ...given, end - begin, cols, groupSize, scaleBits, ...out);
  }
  return result;
}

/** Code `index` of a bit stream that starts at byte `start`. */
function readCode(stream: Uint8Array, start: number, index: number, bits: number): number {
  const bit = index * bits, shift = bit & 7, at = start + (bit - shift) / 8;
  const next = shift + bits > 8 ? stream[at + 1]! : 0;
  return (stream[at]! | next << 8) >> shift & ((1 << bits) - 1);
}
