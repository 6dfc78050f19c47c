/**
 * The packed layout: allowed widths and group sizes, and how many words, groups and bytes a matrix takes. The
 * bytes themselves are docs/format.md's.
 */

export type BitWidth = 2 | 3 | 4 | 8;
/** Weights of one row that share a scale; 0 is the whole row. */
export type GroupSize = 0 | 16 | 32 | 64 | 128 | 256;
/** `real`: any half float; `integer`: a whole number in [0, 2^bits − 1]; `symmetric`: fixed at 2^(bits − 1). */
export type ZeroPointKind = "real" | "integer" | "symmetric";

export const BIT_WIDTHS: readonly BitWidth[] = [2, 3, 4, 8];
export const GROUP_SIZES: readonly GroupSize[] = [0, 16, 32, 64, 128, 256];
export const ZERO_POINT_KINDS: readonly ZeroPointKind[] = ["real", "integer", "symmetric"];

/**
 * A matrix of codes with a scale and a zero point for each group: `w = scale · (code − zero point)`.
 *
 * **Shapes** `packed: u32[rows, packedWords(cols, bits)]`, `scale` and `zeroPoint: f16[rows, groupCount(cols, groupSize)]`
 */
export interface PackedTensor {
  readonly rows: number;
  readonly cols: number;
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
  readonly zeroPointKind: ZeroPointKind;
  readonly packed: Uint32Array<ArrayBuffer>;
  /** Bits of half floats. */
  readonly scale: Uint16Array<ArrayBuffer>;
  /** Bits of half floats; undefined when symmetric. */
  readonly zeroPoint: Uint16Array<ArrayBuffer> | undefined;
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

/**
 * Bytes that a packed matrix takes in a checkpoint: codes, scales, zero points (halves when real, packed codes down
 * the columns when integer) and the two numbers of its shape.
 */
export function packedBytes(
  rows: number,
  cols: number,
  bits: BitWidth,
  groupSize: GroupSize,
  zeroPointKind: ZeroPointKind,
): number {
  const groups = groupCount(cols, groupSize);
  const zeroPoints = { real: rows * groups * 2, integer: packedWords(rows, bits) * groups * 4, symmetric: 0 };
  return rows * packedWords(cols, bits) * 4 + rows * groups * 2 + zeroPoints[zeroPointKind] + 16;
}
