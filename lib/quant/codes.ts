/** Codes between bytes and packed words. */
import { checkArray, checkCounts, checkMember, E_VALUE } from "../native/call.ts";
import * as call from "../native/functions.ts";
import type { Kernels } from "../native/mod.ts";
import { BIT_WIDTHS, type BitWidth, packedWords } from "./packed/layout.ts";
import { callBlocks } from "./weights.ts";

/**
 * Packs codes into words, row by row, least significant bits first.
 *
 * **Shapes** `codes: u8[rows, cols]` → `u32[rows, packedWords(cols, bits)]`
 * @throws {RangeError} when a code is above 2^bits − 1
 */
export function packCodes(
  kernels: Kernels,
  codes: Uint8Array,
  rows: number,
  cols: number,
  bits: BitWidth,
): Uint32Array<ArrayBuffer> {
  const doing = "pack codes";
  checkCounts(doing, { rows, cols });
  checkMember(doing, "bits", bits, BIT_WIDTHS);
  checkArray(doing, "codes", codes, rows * cols, "bytes");
  const explain = (status: number) =>
    status !== E_VALUE ? undefined : new RangeError(
      `Cannot ${doing}: codes of ${bits} bits are at most ${2 ** bits - 1}, some are larger`,
    );
  const words = packedWords(cols, bits), packed = new Uint32Array(rows * words);
  for (const [begin, end] of callBlocks(kernels, rows, cols)) {
    const part = codes.subarray(begin * cols, end * cols), out = packed.subarray(begin * words, end * words);
    call.packCodes(kernels, { doing, explain }, part, end - begin, cols, bits, out);
  }
  return packed;
}

/** Codes of packed words: `u32[rows, packedWords(cols, bits)]` → `u8[rows, cols]`. */
export function unpackCodes(
  kernels: Kernels,
  packed: Uint32Array,
  rows: number,
  cols: number,
  bits: BitWidth,
): Uint8Array<ArrayBuffer> {
  const doing = "unpack codes";
  checkCounts(doing, { rows, cols });
  checkMember(doing, "bits", bits, BIT_WIDTHS);
  const words = packedWords(cols, bits), codes = new Uint8Array(rows * cols);
  checkArray(doing, "packed", packed, rows * words, "u32 words");
  for (const [begin, end] of callBlocks(kernels, rows, cols)) {
    const part = packed.subarray(begin * words, end * words), out = codes.subarray(begin * cols, end * cols);
    call.unpackCodes(kernels, doing, part, end - begin, cols, bits, out);
  }
  return codes;
}
