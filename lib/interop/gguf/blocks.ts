/** ggml's blocks out of packed matrices whose grid is a type's own: its dequantized weights are ours. */
import * as call from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";
import { checkPackedTensor, levelsOf, packedRows, type PackedTensor } from "../../quant/packed/layout.ts";
import { callBlocks } from "../../quant/weights.ts";
import { GGML_TYPES, type GgmlType, rowBytes } from "./types.ts";

/** Types whose blocks are made of packed matrices. */
export type BlockType = Exclude<GgmlType, "F32" | "F16" | "BF16">;
export const isBlockType = (type: GgmlType): type is BlockType => GGML_TYPES[type].block > 1;

/**
 * The blocks of some rows of a packed matrix, whose grid must be the type's. A weight 0 may be −0 there: Q2_0
 * has the opposite scale, Q3_K negative ones.
 *
 * @throws {TypeError | RangeError} when the arrays do not fit the tensor's sizes, or the type has no such
 * grid
 */
export function encodeBlocks(
  kernels: Kernels,
  tensor: PackedTensor,
  type: BlockType,
): Uint8Array<ArrayBuffer> {
  const doing = `store a matrix as ${type}`;
  checkPackedTensor(doing, tensor);
  const { rows, cols, bits, groupSize } = tensor, { id } = GGML_TYPES[type], width = rowBytes(type, cols);
  const blocks = new Uint8Array(rows * width);
  for (const [begin, end] of callBlocks(kernels, rows, cols)) {
    const part = packedRows(tensor, begin, end), out = blocks.subarray(begin * width, end * width);
    const sizes = [end - begin, cols, bits, groupSize] as const, { packed } = part;
    if (part.scaleBits === undefined) {
      call.ggmlBlocks(kernels, doing, packed, part.scale, part.zeroPoint, ...sizes, id, out);
    } else {
      call.ggmlTwoLevelBlocks(kernels, doing, packed, ...levelsOf(part), ...sizes, part.scaleBits, id, out);
    }
  }
  return blocks;
}
