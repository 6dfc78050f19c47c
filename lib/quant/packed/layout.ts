/**
 * The packed layout: allowed widths and group sizes, and how many words, groups and bytes a matrix takes. The
 * bytes themselves are specified in docs/format.md.
 */
import {
  BIT_WIDTHS,
  type BitWidth,
  CODES,
  type Codes,
  GROUP_SIZES,
  type GroupSize,
  OFFSET_BITS,
  ROTATED_SCALE_BITS,
  SCALE_BITS,
  type ScaleBits,
  TRELLIS_BITS,
  TRELLIS_SCALE_BITS,
  TWO_LEVEL_GROUP_SIZES,
  ZERO_POINT_KINDS,
  type ZeroPointKind,
} from "../../config/names.ts";
import { checkArray, checkCounts, checkMember } from "../../native/call.ts";
import type { ScaleGrid } from "./scale_codes.ts";

export * from "../../config/names.ts";

/** Weights of a row that share the two half floats of two-level scales; the last may be fewer. */
export const SUPERBLOCK_SIZE = 256;

/** Most weights of a row, which is never divided: 2 GiB of float32, as every runtime's arrays hold. */
export const MAX_ROW_WEIGHTS = 2 ** 29;

/** The codes of a matrix. */
interface PackedCodes {
  readonly rows: number;
  readonly cols: number;
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
  readonly packed: Uint32Array<ArrayBuffer>;
}

/**
 * A matrix of codes with a scale and a zero point for each group: `w = scale · (code − zero point)`.
 *
 * **Shapes** `packed: u32[rows, packedWords(cols, bits)]`; `scale` and `zeroPoint: f16[rows, groups]`
 */
export interface OneLevelTensor extends PackedCodes {
  readonly scaleBits?: undefined;
  readonly zeroPointKind: ZeroPointKind;
  /** Bits of half floats. */
  readonly scale: Uint16Array<ArrayBuffer>;
  /** Bits of half floats; undefined when symmetric. */
  readonly zeroPoint: Uint16Array<ArrayBuffer> | undefined;
}

/** The two levels of the scales and minima of a matrix's groups. */
export interface TwoLevelScales {
  readonly scaleBits: ScaleBits;
  /** Codes of `scaleBits` bits, a bit stream a row as the weights' codes are, but in whole bytes. */
  readonly subScale: Uint8Array<ArrayBuffer>;
  readonly subMin: Uint8Array<ArrayBuffer>;
  /** Bits of half floats, one a superblock. */
  readonly superScale: Uint16Array<ArrayBuffer>;
  readonly superMin: Uint16Array<ArrayBuffer>;
}

/**
 * A matrix of codes whose groups' scales and minima are codes themselves, multiples of two half floats a
 * superblock: `w = (super scale · sub-scale) · code − super minimum · sub-minimum`, as in ggml's Q2_K. With
 * `scaleBits` 16 the sub-codes are half floats, a scale and an offset a group, the super scales 1 and the
 * super minima −1: `w = scale · code + offset`, as in MLX and in ggml's Q4_1; trellis codes have no super
 * scales.
 *
 * **Shapes** `packed: u32[rows, packedWords(cols, bits)]`; `subScale` and `subMin: u8[rows,
 * subCodeBytes(…)]`; `superScale` and `superMin: f16[rows, superblockCount(cols)]`
 */
export interface TwoLevelTensor extends PackedCodes, TwoLevelScales {
  /**
   * `trellis`: in place of the code stands a level that the codes before it choose, too, `w = scale · level +
   * offset`; `scaleBits` is 16, and groups have any size.
   */
  readonly codes?: Codes | undefined;
  /** The grid on which the scales of trellis codes lie, where they are stored in few bits; offsets are 0. */
  readonly scaleGrid?: ScaleGrid | undefined;
  /**
   * Seed of the rotations on both sides of the weights that trellis codes stand for; all rows have one scale
   * and no offset, and no row means anything without the others.
   */
  readonly rotationSeed?: number | undefined;
}

/** A matrix whose weights are rotated. */
export type RotatedTensor = TwoLevelTensor & { readonly rotationSeed: number };

/** A packed matrix; `scaleBits` tells the two kinds apart. */
export type PackedTensor = OneLevelTensor | TwoLevelTensor;

/** Format in which a matrix's codes, scales and zero points are stored. */
export interface WeightFormat {
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
  readonly zeroPoint: ZeroPointKind;
  /** Bits of the sub-codes of two-level scales, which need real zero points; undefined for plain ones. */
  readonly scaleBits?: ScaleBits | undefined;
  /**
   * Default `uniform`. Trellis codes have scales and offsets, `scaleBits` 16, coded scales, 3, or one scale,
   * 0.
   */
  readonly codes?: Codes | undefined;
}

/** Size of a packed matrix, and how it is stored. */
export interface PackedForm extends WeightFormat {
  readonly rows: number;
  readonly cols: number;
  /** Experts whose rows follow one another; undefined for a matrix. */
  readonly experts?: number | undefined;
}

/** A matrix as its rows and columns, and a stack of experts' matrices as that of all their rows. */
export function matrixSizes(
  shape: readonly number[],
): { readonly rows: number; readonly cols: number; readonly experts: number | undefined } {
  const cols = shape.at(-1)!, rows = shape.slice(0, -1).reduce((product, size) => product * size, 1);
  return { rows, cols, experts: shape.length === 3 ? shape[0] : undefined };
}

/** Words (u32) of one packed row. */
export function packedWords(cols: number, bits: BitWidth): number {
  return Math.ceil(cols * bits / 32);
}

/** Groups of one row; the last is shorter when the size does not divide `cols`. */
export function groupCount(cols: number, groupSize: GroupSize): number {
  if (cols === 0) return 0;
  return groupSize === 0 ? 1 : Math.ceil(cols / groupSize);
}

/** Superblocks of one row of two-level scales. */
export function superblockCount(cols: number): number {
  return Math.ceil(cols / SUPERBLOCK_SIZE);
}

/** Bytes of one row's sub-scales, and of its sub-minima. */
export function subCodeBytes(cols: number, groupSize: GroupSize, scaleBits: ScaleBits): number {
  return Math.ceil(groupCount(cols, groupSize) * scaleBits / 8);
}

/** The arrays of two-level scales, in the order of the kernels' arguments. */
export const levelsOf = ({ subScale, subMin, superScale, superMin }: TwoLevelScales) =>
  [subScale, subMin, superScale, superMin] as const;

type Words = Uint32Array<ArrayBuffer> | Uint16Array<ArrayBuffer> | Uint8Array<ArrayBuffer>;

/** Two-level scales whose arrays are made from those of others. */
export function mapLevels<Levels extends TwoLevelScales>(
  levels: Levels,
  map: <Array extends Words>(array: Array) => Array,
): Levels {
  const [subScale, subMin, superScale, superMin] = levelsOf(levels);
  const [scale, min] = [map(subScale), map(subMin)];
  return { ...levels, subScale: scale, subMin: min, superScale: map(superScale), superMin: map(superMin) };
}

/** A function that gives rows `[begin, end)` of any array of `rows` rows, as a view. */
export const rowsOf =
  (rows: number, begin: number, end: number) => <Array extends Words>(array: Array): Array => {
    const width = rows === 0 ? 0 : array.length / rows;
    return array.subarray(begin * width, end * width) as Array;
  };

/** Whether the weights of a packed matrix are rotated. */
export const isRotated = (tensor: PackedTensor): tensor is RotatedTensor =>
  tensor.scaleBits !== undefined && tensor.rotationSeed !== undefined;

/**
 * Rows `[begin, end)` of a packed matrix, as views of its arrays.
 *
 * @throws {RangeError} for some of the rows of a rotated matrix
 */
export function packedRows(tensor: PackedTensor, begin: number, end: number): PackedTensor {
  if (isRotated(tensor) && (begin !== 0 || end !== tensor.rows)) {
    throw new RangeError(
      `Cannot take rows of a packed matrix: all ${tensor.rows} of a rotated one are needed, got [${begin}, ${end})`,
    );
  }
  const part = rowsOf(tensor.rows, begin, end);
  const common = { rows: end - begin, packed: part(tensor.packed) };
  if (tensor.scaleBits === undefined) {
    const { scale, zeroPoint } = tensor;
    const zeroPoints = zeroPoint === undefined ? undefined : part(zeroPoint);
    return { ...tensor, ...common, scale: part(scale), zeroPoint: zeroPoints };
  }
  return { ...mapLevels(tensor, part), ...common };
}

/** Packed matrices of one form, the rows of each behind those of the one before. */
export function rowsJoined(tensors: readonly [PackedTensor, ...PackedTensor[]]): PackedTensor {
  const [first] = tensors, rows = tensors.reduce((sum, own) => sum + own.rows, 0);
  const joined = Object.entries(first).map(([key, value]) => {
    if (!ArrayBuffer.isView(value)) return [key, value] as const;
    const parts = tensors.map((own) => own[key as keyof PackedTensor] as unknown as Words);
    const array = new (value.constructor as new (length: number) => Words)(
      parts.reduce((sum, { length }) => sum + length, 0),
    );
    let at = 0;
    for (const part of parts) {
      array.set(part, at);
      at += part.length;
    }
    return [key, array] as const;
  });
  return { ...first, ...Object.fromEntries(joined), rows };
}

/** Bytes of a packed matrix's arrays in memory. */
export function packedByteLength(tensor: PackedTensor): number {
  const own = tensor.packed.byteLength;
  if (tensor.scaleBits === undefined) {
    return own + tensor.scale.byteLength + (tensor.zeroPoint?.byteLength ?? 0);
  }
  return levelsOf(tensor).reduce((sum, array) => sum + array.byteLength, own);
}

/** Bytes that a packed matrix's arrays will take in memory, by its form. */
export function heldBytes(form: PackedForm): number {
  const { rows, cols, bits, groupSize, zeroPoint, scaleBits, codes } = form;
  const words = 4 * rows * packedWords(cols, bits), halves = 2 * rows * groupCount(cols, groupSize);
  if (scaleBits === undefined) return words + halves * (zeroPoint === "symmetric" ? 1 : 2);
  // Also where fewer are stored.
  if (codes === "trellis") return words + 2 * halves;
  return words + 2 * rows * (subCodeBytes(cols, groupSize, scaleBits) + 2 * superblockCount(cols));
}

/** Half floats that stand in bytes: the same view each time, so that copies on a device find it again. */
const lines = new WeakMap<Uint8Array, Uint16Array<ArrayBuffer>>();
function lineOf(bytes: Uint8Array<ArrayBuffer>): Uint16Array<ArrayBuffer> {
  const line = lines.get(bytes) ?? halvesInBytes(bytes);
  lines.set(bytes, line);
  return line;
}

/** Scales and offsets of a tensor of trellis codes, the bits of half floats: `[rows, groups]` each. */
export const linesOf = ({ subScale, subMin }: TwoLevelScales) => [lineOf(subScale), lineOf(subMin)] as const;

/** The arrays that products with a packed matrix read. */
export function readArrays(tensor: PackedTensor): readonly (Uint32Array | Uint16Array | Uint8Array)[] {
  const { packed } = tensor;
  if (tensor.scaleBits === undefined) return [packed, tensor.scale, tensor.zeroPoint ?? []].flat();
  return [packed, ...(tensor.codes === "trellis" ? linesOf(tensor) : levelsOf(tensor))];
}

/** The half floats 1 and −1. */
const ONE = 0x3c00, MINUS_ONE = 0xbc00;

/**
 * Sub-codes and super scales of a matrix, all 0; the super scales of offsets are 1 and −1, and trellis codes
 * have none.
 */
export function emptyLevels(
  form: Pick<TwoLevelTensor, "rows" | "cols" | "groupSize" | "scaleBits" | "codes">,
): TwoLevelScales {
  const { rows, cols, groupSize, scaleBits } = form;
  const bytes = rows * subCodeBytes(cols, groupSize, scaleBits), supers = superScaleCount(form);
  return {
    scaleBits,
    subScale: new Uint8Array(bytes),
    subMin: new Uint8Array(bytes),
    superScale: new Uint16Array(supers).fill(scaleBits === OFFSET_BITS ? ONE : 0),
    superMin: new Uint16Array(supers).fill(scaleBits === OFFSET_BITS ? MINUS_ONE : 0),
  };
}

/** Zero points of a matrix with two-level scales; of 8 bits those of symmetric grids. */
export const zeroPointsOf = ({ scaleBits }: { readonly scaleBits: ScaleBits }): ZeroPointKind =>
  scaleBits === 8 ? "symmetric" : "real";

/** Super scales of a matrix, and super minima. */
const superScaleCount = ({ rows, cols, codes }: Pick<TwoLevelTensor, "rows" | "cols" | "codes">): number =>
  codes === "trellis" ? 0 : rows * superblockCount(cols);

/** Throws unless a format's parts are among those allowed, and fit each other. */
export function checkFormat(
  doing: string,
  { bits, groupSize, zeroPoint, scaleBits, codes = "uniform" }: WeightFormat,
): void {
  const isTrellis = codes === "trellis", hasAnyGroup = scaleBits === undefined || isTrellis;
  checkMember(doing, "codes", codes, CODES);
  checkMember(doing, "bits", bits, isTrellis ? TRELLIS_BITS : BIT_WIDTHS);
  checkMember(doing, "groupSize", groupSize, hasAnyGroup ? GROUP_SIZES : TWO_LEVEL_GROUP_SIZES);
  if (isTrellis) checkMember(doing, "scaleBits of trellis codes", scaleBits, TRELLIS_SCALE_BITS);
  checkMember(doing, "zeroPoint", zeroPoint, ZERO_POINT_KINDS);
  if (scaleBits === undefined) return;
  if (scaleBits === ROTATED_SCALE_BITS) checkMember(doing, "groupSize with one scale", groupSize, [0]);
  if (!isTrellis) checkMember(doing, "scaleBits", scaleBits, SCALE_BITS);
  if (scaleBits !== 8) return checkMember(doing, "zeroPoint with two-level scales", zeroPoint, ["real"]);
  checkMember(doing, "zeroPoint with two-level scales of 8 bits", zeroPoint, ["symmetric"]);
  checkMember(doing, "bits with two-level scales of 8 bits", bits, [3, 8]);
}

/**
 * Checks that a packed matrix's arrays have the types and lengths that its sizes ask for.
 *
 * @param doing what is being done, for the message
 * @throws {TypeError} when an array has another type or length
 * @throws {RangeError} when bits or group size are none that packed matrices have
 */
export function checkPackedTensor(doing: string, tensor: PackedTensor): void {
  const { rows, cols, bits, groupSize, packed, scaleBits } = tensor;
  checkCounts(doing, { rows, cols });
  const kind = tensor.scaleBits === undefined ? tensor.zeroPointKind : zeroPointsOf(tensor);
  const codes = tensor.scaleBits === undefined ? undefined : tensor.codes;
  checkFormat(doing, { bits, groupSize, zeroPoint: kind, scaleBits, codes });
  checkArray(doing, "packed", packed, rows * packedWords(cols, bits), "u32 words");
  if (scaleBits !== undefined) {
    const bytes = rows * subCodeBytes(cols, groupSize, scaleBits), supers = superScaleCount(tensor);
    checkArray(doing, "subScale", tensor.subScale, bytes, "bytes");
    checkArray(doing, "subMin", tensor.subMin, bytes, "bytes");
    checkArray(doing, "superScale", tensor.superScale, supers, "half floats");
    checkArray(doing, "superMin", tensor.superMin, supers, "half floats");
    return;
  }
  const { zeroPointKind, scale, zeroPoint } = tensor;
  const groups = rows * groupCount(cols, groupSize);
  checkArray(doing, "scale", scale, groups, "half floats");
  if (zeroPointKind !== "symmetric") checkArray(doing, "the zero points", zeroPoint, groups, "half floats");
  else if (zeroPoint !== undefined) {
    throw new TypeError(
      `Cannot ${doing}: the zero points must be absent, got ${(zeroPoint as Uint16Array).length}`,
    );
  }
}

/** The bits of half floats that stand in bytes, as sub-codes of {@linkcode OFFSET_BITS} do. */
export const halvesInBytes = (
  { buffer, byteOffset, length }: Uint8Array<ArrayBuffer>,
): Uint16Array<ArrayBuffer> => new Uint16Array(buffer, byteOffset, length / 2);

/** Half floats of their bits. */
export function halves({ buffer, byteOffset, length }: Uint16Array<ArrayBuffer>): Float16Array<ArrayBuffer> {
  return new Float16Array(buffer, byteOffset, length);
}

/** The bits of values as half floats. */
export const halfBits = (values: Float32Array): Uint16Array<ArrayBuffer> =>
  new Uint16Array(Float16Array.from(values).buffer);
