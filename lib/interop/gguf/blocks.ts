/**
 * ggml's blocks out of packed matrices whose grid is a type's own, so that its dequantized weights are ours bit
 * for bit (ggml-common.h, ggml-quants.c). Half floats are copied; groups wider than a block repeat their scale.
 */
import { unpackCodes } from "../../quant/mod.ts";
import type { Kernels } from "../../native/mod.ts";
import {
  groupCount,
  halfBits,
  halves,
  type OneLevelTensor,
  type PackedTensor,
  subCodeBytes,
  SUPERBLOCK_SIZE,
  superblockCount,
  type TwoLevelTensor,
} from "../../quant/packed/layout.ts";
import { GGML_TYPES, type GgmlType, rowBytes } from "./types.ts";

/** A place in a matrix where a block begins, and its bytes. */
interface Block {
  /** Its first weight among the codes. */
  readonly at: number;
  /** Group of its first weight, among all of the matrix. */
  readonly group: number;
  /** Superblock, among all of the matrix. */
  readonly index: number;
  readonly out: Uint8Array<ArrayBuffer>;
}

type Encoder<Tensor> = (tensor: Tensor, codes: Uint8Array, block: Block) => void;

function putHalf(out: Uint8Array, at: number, bits: number): void {
  out[at] = bits & 255;
  out[at + 1] = bits >> 8;
}

/** Nibbles of 32 codes: element j low, j + 16 high. */
function putNibbles(out: Uint8Array, at: number, codes: Uint8Array, from: number, shift: number): void {
  for (let j = 0; j < 16; j++) out[at + j] = codes[from + j]! + shift | (codes[from + j + 16]! + shift) << 4;
}

/** s (q − 2^(b−1)) = d (q' − 8) with q' = q + 8 − 2^(b−1), for 2 to 4 bits. */
const q4_0: Encoder<OneLevelTensor> = ({ scale, bits }, codes, { at, group, out }) => {
  putHalf(out, 0, scale[group]!);
  putNibbles(out, 2, codes, at, 8 - 2 ** (bits - 1));
};

/** s q + β; or s (q − z) = d q + m with m = −s z, rounded to half precision. */
const q4_1: Encoder<PackedTensor> = (tensor, codes, { at, group, out }) => {
  if (tensor.scaleBits !== undefined) {
    out.set(tensor.subScale.subarray(2 * group, 2 * group + 2));
    out.set(tensor.subMin.subarray(2 * group, 2 * group + 2), 2);
    return putNibbles(out, 4, codes, at, 0);
  }
  const { scale, zeroPoint, bits } = tensor;
  putHalf(out, 0, scale[group]!);
  const zero = zeroPoint === undefined ? 2 ** (bits - 1) : halves(zeroPoint.subarray(group, group + 1))[0]!;
  const offset = -halves(scale.subarray(group, group + 1))[0]! * zero;
  putHalf(out, 2, halfBits(Float32Array.of(offset))[0]!);
  putNibbles(out, 4, codes, at, 0);
};

const q8_0: Encoder<OneLevelTensor> = ({ scale }, codes, { at, group, out }) => {
  putHalf(out, 0, scale[group]!);
  for (let j = 0; j < 32; j++) out[2 + j] = codes[at + j]! - 128;
};

/** s (q − 2) = d (q' − 1) with d = −s and q' = 3 − q. */
const q2_0: Encoder<OneLevelTensor> = ({ scale }, codes, { at, group, out }) => {
  putHalf(out, 0, scale[group]! ^ 0x8000);
  for (let j = 0; j < 16; j++) {
    const from = at + 4 * j, low = codes[from]! | codes[from + 1]! << 2;
    out[2 + j] = 255 - (low | codes[from + 2]! << 4 | codes[from + 3]! << 6);
  }
};

/** A two-level matrix with its sub-codes one a byte. */
interface Unpacked extends TwoLevelTensor {
  readonly scales: Uint8Array;
  readonly minima: Uint8Array;
}

const q2K: Encoder<Unpacked> = (tensor, codes, { at, group, index, out }) => {
  const { scales, minima, superScale, superMin, groupSize } = tensor;
  for (let j = 0; j < 16; j++) {
    const own = group + Math.floor(j * 16 / groupSize);
    out[j] = scales[own]! | minima[own]! << 4;
  }
  for (let n = 0; n < 2; n++) {
    for (let l = 0; l < 32; l++) {
      const from = at + 128 * n + l, low = codes[from]! | codes[from + 32]! << 2;
      out[16 + 32 * n + l] = low | codes[from + 64]! << 4 | codes[from + 96]! << 6;
    }
  }
  putHalf(out, 80, superScale[index]!);
  putHalf(out, 82, superMin[index]!);
};

const q4K: Encoder<Unpacked> = (tensor, codes, { at, group, index, out }) => {
  const { scales, minima, superScale, superMin, groupSize } = tensor;
  putHalf(out, 0, superScale[index]!);
  putHalf(out, 2, superMin[index]!);
  for (let j = 0; j < 4; j++) {
    const low = group + Math.floor(j * 32 / groupSize), high = group + Math.floor((j + 4) * 32 / groupSize);
    out[4 + j] = scales[low]! | scales[high]! >> 4 << 6;
    out[8 + j] = minima[low]! | minima[high]! >> 4 << 6;
    out[12 + j] = scales[high]! & 15 | (minima[high]! & 15) << 4;
  }
  for (let n = 0; n < 4; n++) {
    for (let l = 0; l < 32; l++) {
      const from = at + 64 * n + l;
      out[16 + 32 * n + l] = codes[from]! | codes[from + 32]! << 4;
    }
  }
};

/** Of the sub-blocks of one block: 7 where codes are turned round, 0 elsewhere. */
const FLIPS = new Uint8Array(16);

/** d v (q − z) with z = 4, or z = 3 where the scale is negative: there d (−v) (q' − 4) with q' = 7 − q. */
const q3K: Encoder<Unpacked> = (tensor, codes, { at, group, index, out }) => {
  const { scales, minima, superScale, groupSize } = tensor;
  putHalf(out, 108, superScale[index]!);
  for (let j = 0; j < 16; j++) {
    const own = group + Math.floor(j * 16 / groupSize), v = scales[own]!, isTurned = minima[own]! < 4 * v;
    const sub = 32 + (isTurned ? -v : v);
    FLIPS[j] = isTurned ? 7 : 0;
    out[96 + j % 8]! |= (sub & 15) << (j < 8 ? 0 : 4);
    out[104 + j % 4]! |= sub >> 4 << 2 * (j >> 2);
  }
  for (let l = 0; l < 32; l++) {
    let high = 0;
    for (let n = 0; n < 2; n++) {
      const from = at + 128 * n + l, sub = 8 * n + (l >> 4);
      const a = codes[from]! ^ FLIPS[sub]!, b = codes[from + 32]! ^ FLIPS[sub + 2]!;
      const c = codes[from + 64]! ^ FLIPS[sub + 4]!, d = codes[from + 96]! ^ FLIPS[sub + 6]!;
      out[32 + 32 * n + l] = a & 3 | (b & 3) << 2 | (c & 3) << 4 | (d & 3) << 6;
      high |= (a >> 2 | b >> 2 << 1 | c >> 2 << 2 | d >> 2 << 3) << 4 * n;
    }
    out[l] = high;
  }
};

/** d v (q − 32). */
const q6K: Encoder<Unpacked> = (tensor, codes, { at, group, index, out }) => {
  const { scales, superScale, groupSize } = tensor;
  for (let n = 0; n < 2; n++) {
    for (let l = 0; l < 32; l++) {
      const from = at + 128 * n + l, code = (j: number) => codes[from + 32 * j]!;
      out[64 * n + l] = code(0) & 15 | (code(2) & 15) << 4;
      out[64 * n + 32 + l] = code(1) & 15 | (code(3) & 15) << 4;
      out[128 + 32 * n + l] = code(0) >> 4 | code(1) >> 4 << 2 | code(2) >> 4 << 4 | code(3) >> 4 << 6;
    }
  }
  for (let j = 0; j < 16; j++) out[192 + j] = scales[group + Math.floor(j * 16 / groupSize)]!;
  putHalf(out, 208, superScale[index]!);
};

const ONE_LEVEL = { Q2_0: q2_0, Q4_0: q4_0, Q4_1: q4_1, Q8_0: q8_0 } as const;
const TWO_LEVEL = { Q2_K: q2K, Q3_K: q3K, Q4_K: q4K, Q6_K: q6K } as const;

/** Types whose blocks are made of packed matrices. */
export type BlockType = keyof typeof ONE_LEVEL | keyof typeof TWO_LEVEL;
export const isBlockType = (type: GgmlType): type is BlockType => type in ONE_LEVEL || type in TWO_LEVEL;

/** Codes of a stream of whole bytes a row, one a byte. */
function unpackSubCodes(
  stream: Uint8Array,
  rows: number,
  groups: number,
  bytes: number,
  bits: number,
): Uint8Array {
  const codes = new Uint8Array(rows * groups), mask = 2 ** bits - 1;
  for (let row = 0, i = 0; row < rows; row++) {
    for (let group = 0; group < groups; group++, i++) {
      const bit = group * bits, at = row * bytes + (bit >> 3);
      codes[i] = (stream[at]! | (stream[at + 1] ?? 0) << 8) >> (bit & 7) & mask;
    }
  }
  return codes;
}

/** The blocks of some rows of a packed matrix, whose grid must be the type's. */
export function encodeBlocks(
  kernels: Kernels,
  tensor: PackedTensor,
  type: BlockType,
): Uint8Array<ArrayBuffer> {
  const { rows, cols, groupSize, bits } = tensor, { block, bytes } = GGML_TYPES[type];
  const codes = unpackCodes(kernels, tensor.packed, rows, cols, bits);
  const out = new Uint8Array(rows * rowBytes(type, cols)), groups = groupCount(cols, groupSize);
  const supers = superblockCount(cols);
  const each = (encode: (block: Block) => void) => {
    for (let row = 0, to = 0; row < rows; row++) {
      for (let col = 0; col < cols; col += block, to += bytes) {
        encode({
          at: row * cols + col,
          group: row * groups + (groupSize === 0 ? 0 : Math.floor(col / groupSize)),
          index: row * supers + Math.floor(col / SUPERBLOCK_SIZE),
          out: out.subarray(to, to + bytes),
        });
      }
    }
  };
  if (tensor.scaleBits === undefined || type === "Q4_1") {
    const encode = ONE_LEVEL[type as keyof typeof ONE_LEVEL] as Encoder<PackedTensor>;
    each((place) => encode(tensor, codes, place));
    return out;
  }
  const { scaleBits, subScale, subMin } = tensor, width = subCodeBytes(cols, groupSize, scaleBits);
  const [scales, minima] = [subScale, subMin].map((stream) =>
    unpackSubCodes(stream, rows, groups, width, scaleBits)
  );
  const unpacked: Unpacked = { ...tensor, scales: scales!, minima: minima! };
  const encode = TWO_LEVEL[type as keyof typeof TWO_LEVEL];
  each((place) => encode(unpacked, codes, place));
  return out;
}
