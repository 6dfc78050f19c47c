/**
 * The entries of a checkpoint that make up one packed tensor: their names, types and shapes, and the bytes
 * that they hold. The bytes are specified in docs/format.md.
 *
 * ```text
 * X.weight -> X.weight_packed      I32 [rows, words]   codes, a bit stream per row, least significant bits first
 *             X.weight_scale       F16 [rows, groups]
 *             X.weight_zero_point  real: F16 [rows, groups]; integer: I32 [ceil(rows * bits / 32), groups], a bit
 *                                  stream per column; symmetric: absent
 *             X.weight_shape       I64 [2] or [3]      rows, columns; of a stack of experts experts, rows, columns
 *
 * with two-level scales, in place of scale and zero point:
 *             X.weight_sub_scale   U8 [rows, sub-bytes]     a bit stream per row
 *             X.weight_sub_min     U8 [rows, sub-bytes]
 *             X.weight_super_scale F16 [rows, superblocks]
 *             X.weight_super_min   F16 [rows, superblocks]
 *
 * with scales and offsets that are half floats by themselves (`scaleBits` 16):
 *             X.weight_scale       F16 [rows, groups]
 *             X.weight_offset      F16 [rows, groups]
 *
 * with coded scales of trellis codes (`scaleBits` 3):
 *             X.weight_sub_scale   U8 [bytes]               one bit stream
 *             X.weight_super_scale F16 [2]                  the first scale, and the ratio of each to the next
 *
 * of rotated weights (`scaleBits` 0):
 *             X.weight_scale       F16 [1]
 *             X.weight_seed        I32 [1]                  of the rotations
 * ```
 */
import { BYTES_PER_ELEMENT, elementCount, type TensorSpec } from "../../tensor/mod.ts";
import {
  type BitWidth,
  CODED_SCALE_BITS,
  groupCount,
  isRotated,
  OFFSET_BITS,
  type PackedForm,
  type PackedTensor,
  packedWords,
  ROTATED_SCALE_BITS,
  type ScaleBits,
  subCodeBytes,
  superblockCount,
} from "./layout.ts";
import { scaleCodeBytes } from "./scale_codes.ts";

/** End of the name of a packed tensor's codes. */
export const PACKED_SUFFIX = "_packed";

/** Names of the checkpoint's entries that make up one quantized tensor. */
export interface PackedNames {
  readonly packed: string;
  /** Undefined with two-level scales. */
  readonly scale: string | undefined;
  /** Undefined when zero points are not stored (symmetric), and with two-level scales. */
  readonly zeroPoint: string | undefined;
  /** These four are undefined with plain scales. */
  readonly subScale: string | undefined;
  readonly subMin: string | undefined;
  readonly superScale: string | undefined;
  readonly superMin: string | undefined;
  /** Undefined where weights are not rotated. */
  readonly seed: string | undefined;
  readonly shape: string;
}

/** The checkpoint entries of a packed tensor, in the order in which they are stored. */
export function packedNames(
  name: string,
  { zeroPoint, scaleBits }: Pick<PackedForm, "zeroPoint" | "scaleBits">,
): PackedNames {
  const isPlain = scaleBits === undefined, isOffset = scaleBits === OFFSET_BITS;
  const isCoded = scaleBits === CODED_SCALE_BITS, isRotated = scaleBits === ROTATED_SCALE_BITS;
  const hasLevels = !isPlain && !isOffset && !isRotated;
  const entry = (isThere: boolean, part: string) => isThere ? `${name}_${part}` : undefined;
  return {
    packed: name + PACKED_SUFFIX,
    scale: entry(isPlain, "scale"),
    zeroPoint: entry(isPlain && zeroPoint !== "symmetric", "zero_point"),
    subScale: isOffset || isRotated ? `${name}_scale` : entry(hasLevels, "sub_scale"),
    subMin: isOffset ? `${name}_offset` : entry(hasLevels && !isCoded, "sub_min"),
    superScale: entry(hasLevels, "super_scale"),
    superMin: entry(hasLevels && !isCoded, "super_min"),
    seed: entry(isRotated, "seed"),
    shape: `${name}_shape`,
  };
}

/** Every name that an entry of a packed tensor may have, whatever its scales. */
export function allPackedNames(name: string): string[] {
  const forms: readonly (ScaleBits | undefined)[] = [undefined, 4, OFFSET_BITS, ROTATED_SCALE_BITS];
  const names = forms.flatMap((scaleBits) =>
    Object.values(packedNames(name, { zeroPoint: "real", scaleBits }))
  );
  return [...new Set(names as (string | undefined)[])].filter((part) => part !== undefined);
}

/** The checkpoint entries of a packed tensor with their element types and shapes, in the order of storage. */
export function packedTensorSpecs(name: string, form: PackedForm): TensorSpec[] {
  const { rows, cols, bits, groupSize, zeroPoint, scaleBits, experts } = form;
  const groups = groupCount(cols, groupSize), supers = superblockCount(cols);
  const subBytes = scaleBits === undefined ? 0 : subCodeBytes(cols, groupSize, scaleBits);
  const zeroPoints = zeroPoint === "integer"
    ? { dtype: "I32", shape: [zeroPointWords(rows, bits), groups] } as const
    : { dtype: "F16", shape: [rows, groups] } as const;
  const isCoded = scaleBits === CODED_SCALE_BITS;
  const subCodes = scaleBits === OFFSET_BITS || scaleBits === ROTATED_SCALE_BITS
    ? { dtype: "F16", shape: scaleBits === OFFSET_BITS ? [rows, groups] : [1] } as const
    : { dtype: "U8", shape: [rows, subBytes] } as const;
  const parts: Record<keyof PackedNames, Omit<TensorSpec, "name">> = {
    packed: { dtype: "I32", shape: [rows, packedWords(cols, bits)] },
    scale: { dtype: "F16", shape: [rows, groups] },
    zeroPoint: zeroPoints,
    subScale: isCoded ? { dtype: "U8", shape: [scaleCodeBytes(rows * groups)] } : subCodes,
    subMin: subCodes,
    superScale: { dtype: "F16", shape: isCoded ? [2] : [rows, supers] },
    superMin: { dtype: "F16", shape: [rows, supers] },
    seed: { dtype: "I32", shape: [1] },
    shape: { dtype: "I64", shape: [experts === undefined ? 2 : 3] },
  };
  return Object.entries(packedNames(name, form)).flatMap(([part, entry]: [string, string | undefined]) =>
    entry === undefined ? [] : [{ name: entry, ...parts[part as keyof PackedNames] }]
  );
}

/** Bytes of some entries. */
export function specBytes(specs: readonly TensorSpec[]): number {
  return specs.reduce(
    (sum, { dtype, shape }) => sum + (elementCount(shape) ?? 0) * BYTES_PER_ELEMENT[dtype],
    0,
  );
}

/** Content of the entry that holds the shape. */
export const shapeEntry = (
  { rows, cols, experts }: Pick<PackedForm, "rows" | "cols" | "experts">,
): BigInt64Array<ArrayBuffer> =>
  BigInt64Array.from((experts === undefined ? [rows, cols] : [experts, rows / experts, cols]).map(BigInt));

/** Bytes that a packed tensor takes in a checkpoint. */
export const packedBytes = (form: PackedForm): number => specBytes(packedTensorSpecs("", form));

/**
 * Arrays to store for some rows of a packed tensor, entry by entry in the order of storage; without the shape
 * and integer zero points and coded scales, which do not go by rows.
 */
export function packedEntries(
  names: PackedNames,
  tensor: PackedTensor,
): [string, ArrayBufferView<ArrayBuffer>][] {
  if (tensor.scaleBits !== undefined) {
    if (tensor.scaleGrid !== undefined) return [[names.packed, tensor.packed]];
    if (isRotated(tensor)) {
      return [
        [names.packed, tensor.packed],
        [names.subScale!, tensor.subScale.slice(0, 2)],
        [names.seed!, Int32Array.of(tensor.rotationSeed)],
      ];
    }
    const { superScale, superMin } = names;
    return [
      [names.packed, tensor.packed],
      [names.subScale!, tensor.subScale],
      [names.subMin!, tensor.subMin],
      ...(superScale === undefined
        ? []
        : [[superScale, tensor.superScale] as [string, Uint16Array<ArrayBuffer>]]),
      ...(superMin === undefined ? [] : [[superMin, tensor.superMin] as [string, Uint16Array<ArrayBuffer>]]),
    ];
  }
  const { packed, scale, zeroPoint, zeroPointKind } = tensor;
  return [
    [names.packed, packed],
    [names.scale!, scale],
    ...(zeroPointKind === "real" ? [[names.zeroPoint!, zeroPoint!] as [string, typeof scale]] : []),
  ];
}

/** Words of one column of integer zero points. */
export function zeroPointWords(rows: number, bits: BitWidth): number {
  return Math.ceil(rows * bits / 32);
}

/** Half floats of the integers a zero point can be. */
const HALVES: Uint16Array = new Uint16Array(Float16Array.from({ length: 256 }, (_, i) => i).buffer);

/**
 * Packs integer zero points as they are stored: a bit stream down each column, least significant bits first.
 *
 * Shapes: `codes: u8[rows, groups]` → `u32[ceil(rows * bits / 32), groups]`.
 */
export function packZeroPoints(
  codes: Uint8Array,
  rows: number,
  groups: number,
  bits: BitWidth,
): Uint32Array<ArrayBuffer> {
  const words = new Uint32Array(zeroPointWords(rows, bits) * groups);
  for (let row = 0; row < rows; row++) {
    const shift = row * bits % 32;
    const base = (row * bits - shift) / 32 * groups;
    for (let group = 0; group < groups; group++) {
      const code = codes[row * groups + group]!;
      words[base + group]! |= code << shift;
      if (shift + bits > 32) words[base + groups + group]! |= code >>> (32 - shift);
    }
  }
  return words;
}

/** Inverse of {@linkcode packZeroPoints} for some rows, as half floats; `words` begins at row `firstWord`. */
export function unpackZeroPoints(
  words: Uint32Array,
  firstWord: number,
  rowBegin: number,
  rowEnd: number,
  groups: number,
  bits: BitWidth,
): Uint16Array<ArrayBuffer> {
  const halves = new Uint16Array((rowEnd - rowBegin) * groups);
  const mask = 2 ** bits - 1;
  for (let row = rowBegin, i = 0; row < rowEnd; row++) {
    const shift = row * bits % 32;
    const base = ((row * bits - shift) / 32 - firstWord) * groups;
    for (let group = 0; group < groups; group++, i++) {
      let code = words[base + group]! >>> shift;
      if (shift + bits > 32) code |= words[base + groups + group]! << (32 - shift);
      halves[i] = HALVES[code & mask]!;
    }
  }
  return halves;
}
