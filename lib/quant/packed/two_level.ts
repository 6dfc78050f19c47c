/**
 * Scales of groups by themselves: reading the real scale and offset of every group of a packed matrix, and two-level
 * scales for given real ones, for solvers that fix the scales before they choose codes.
 */
import { KernelError, WeightsError } from "../../errors.ts";
import type { Kernels } from "../../native/mod.ts";
import {
  checkPackedTensor,
  groupCount,
  type GroupSize,
  type PackedTensor,
  SCALE_BITS,
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

/** Groups handed to the kernel at once, in whole rows: WebAssembly copies them. */
const BLOCK_GROUPS = 2 ** 20;

/**
 * Scale and offset of every group, such that `w = scale · code + offset`, for either kind of scales. Both are exact:
 * a product of two half floats, or of a half float and a code of at most 6 bits, is a float32.
 *
 * **Shapes** → `scale` and `offset: f32[rows, groups]`
 *
 * @throws {TypeError | RangeError} when the arrays do not fit the tensor's sizes
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 * import { quantize, unpackCodes } from "../kernels.ts";
 * import { groupAffine } from "./two_level.ts";
 *
 * const kernels = await openKernels();
 * const weights = { data: Float32Array.from({ length: 64 }, (_, i) => Math.sin(i)), dtype: "F32" } as const;
 * const packed = quantize(kernels, weights, 1, 64, { bits: 2, scaleBits: 4 });
 * const { scale, offset } = groupAffine(packed);
 * const codes = unpackCodes(kernels, packed.packed, 1, 64, 2);
 * console.log(scale[0]! * codes[0]! + offset[0]!); // near sin 0
 * ```
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
  const superScale = halves(tensor.superScale), superMin = halves(tensor.superMin);
  const bytes = subCodeBytes(cols, groupSize, scaleBits), supers = superblockCount(cols);
  const superGroups = SUPERBLOCK_SIZE / groupSize;
  for (let row = 0, i = 0; row < rows; row++) {
    for (let group = 0; group < groups; group++, i++) {
      const at = row * supers + Math.floor(group / superGroups);
      scale[i] = superScale[at]! * readCode(subScale, row * bytes, group, scaleBits);
      offset[i] = -superMin[at]! * readCode(subMin, row * bytes, group, scaleBits);
    }
  }
  return { scale, offset };
}

/**
 * Two-level scales nearest to given real ones: for each superblock the half-precision step whose multiples are
 * nearest to the scales in least squares, among several ranges as ggml's `make_qp_quants` tries them, and the same for
 * the minima. Codes have no sign: a scale (or minimum) whose sign is not that of its superblock's weighted sum
 * becomes 0.
 *
 * **Shapes** `scale`, `minimum` and `groupWeights: f32[rows, groups]`, with `w = scale · code − minimum`
 *
 * @param groupWeights how much each group counts, finite and ≥ 0; default all ones
 * @throws {WeightsError} when a scale or minimum is NaN, infinite or too large
 * @throws {TypeError | RangeError} when an argument has the wrong type, shape or value
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 * import { fitTwoLevel } from "./two_level.ts";
 *
 * const kernels = await openKernels();
 * const shape = { rows: 1, cols: 64, groupSize: 16, scaleBits: 4 } as const;
 * const scales = fitTwoLevel(kernels, shape, Float32Array.of(1, 2, 3, 4), Float32Array.of(4, 3, 2, 1));
 * console.log(scales.superScale.length, scales.subScale.length); // 1 1
 * ```
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
  for (const [name, value] of [["rows", rows], ["cols", cols]] as const) {
    if (Number.isSafeInteger(value) && value >= 0) continue;
    throw new RangeError(`Cannot ${doing}: ${name} must be a whole number ≥ 0, got ${value}`);
  }
  if (!TWO_LEVEL_GROUP_SIZES.includes(groupSize)) {
    throw new RangeError(
      `Cannot ${doing}: groupSize must be one of ${TWO_LEVEL_GROUP_SIZES.join(", ")}, got ${groupSize}`,
    );
  }
  if (!SCALE_BITS.includes(scaleBits)) {
    throw new RangeError(
      `Cannot ${doing}: scaleBits must be one of ${SCALE_BITS.join(", ")}, got ${scaleBits}`,
    );
  }
  const groups = groupCount(cols, groupSize);
  for (const [name, array] of Object.entries({ scale, minimum, groupWeights })) {
    if (name === "groupWeights" && array === undefined) continue;
    if (array instanceof Float32Array && array.length === rows * groups) continue;
    throw new TypeError(
      `Cannot ${doing}: ${name} must be ${rows * groups} float32 values, got ${array?.length}`,
    );
  }
  const bad = groupWeights?.findIndex((weight) => !(weight >= 0 && weight < Infinity)) ?? -1;
  if (bad >= 0) {
    throw new RangeError(
      `Cannot ${doing}: groupWeights must be finite and ≥ 0, got ${groupWeights![bad]} at ${bad}`,
    );
  }
  const bytes = subCodeBytes(cols, groupSize, scaleBits), supers = superblockCount(cols);
  const result = {
    scaleBits,
    subScale: new Uint8Array(rows * bytes),
    subMin: new Uint8Array(rows * bytes),
    superScale: new Uint16Array(rows * supers),
    superMin: new Uint16Array(rows * supers),
  };
  const step = Math.max(1, Math.floor(BLOCK_GROUPS / Math.max(1, groups)));
  for (let begin = 0; begin < rows; begin += step) {
    const end = Math.min(rows, begin + step);
    const status = kernels.calls.aq_fit_two_level(
      scale.subarray(begin * groups, end * groups),
      minimum.subarray(begin * groups, end * groups),
      groupWeights?.subarray(begin * groups, end * groups) ?? null,
      kernels.size(end - begin),
      kernels.size(cols),
      kernels.size(groupSize),
      scaleBits,
      result.subScale.subarray(begin * bytes, end * bytes),
      result.subMin.subarray(begin * bytes, end * bytes),
      result.superScale.subarray(begin * supers, end * supers),
      result.superMin.subarray(begin * supers, end * supers),
    );
    if (status === 0) continue;
    if (status !== -4 && status !== -5) {
      throw new KernelError(`Cannot ${doing}: the kernel reports status ${status}`, { status });
    }
    const most = 65504 * (2 ** scaleBits - 1);
    throw new WeightsError(
      `Cannot ${doing}: scales and minima must be finite and at most ${most}, got others in rows ${begin} to ${
        end - 1
      }`,
    );
  }
  return result;
}

function halves({ buffer, byteOffset, length }: Uint16Array<ArrayBuffer>): Float16Array {
  return new Float16Array(buffer, byteOffset, length);
}

/** Code `index` of a bit stream that starts at byte `start`. */
function readCode(stream: Uint8Array, start: number, index: number, bits: number): number {
  const bit = index * bits, shift = bit % 8, at = start + (bit - shift) / 8;
  const next = shift + bits > 8 ? stream[at + 1]! : 0;
  return (stream[at]! | next << 8) >> shift & (2 ** bits - 1);
}
