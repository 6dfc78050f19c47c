/** Conversions between floating types, and the search for values that are not finite. */
import { checkCount, DTYPE_NUMBERS } from "../native/call.ts";
import * as call from "../native/functions.ts";
import type { Kernels } from "../native/mod.ts";
import { BYTES_PER_ELEMENT, type FloatDtype, isFloatDtype } from "../tensor/mod.ts";
import { callBlocks, weightBytes, type Weights } from "./weights.ts";

/**
 * Converts between floating types, round to nearest even; NaN stays NaN. F8_E4M3 has no infinity: what is
 * beyond its range becomes NaN.
 *
 * @param given where they go; default a new array
 * @returns the elements' bytes in `dtype`
 */
export function convertFloats(
  kernels: Kernels,
  weights: Weights,
  elements: number,
  dtype: FloatDtype,
  given?: Uint8Array<ArrayBuffer>,
): Uint8Array<ArrayBuffer> {
  const doing = `convert to ${dtype}`;
  checkCount(doing, "elements", elements);
  if (!isFloatDtype(dtype)) throw new TypeError(`Cannot ${doing}: not a floating type`);
  const bytes = weightBytes(doing, weights, elements);
  const from = BYTES_PER_ELEMENT[weights.dtype], to = BYTES_PER_ELEMENT[dtype];
  const source = DTYPE_NUMBERS[weights.dtype], target = DTYPE_NUMBERS[dtype];
  const out = given ?? new Uint8Array(elements * to);
  if (out.length !== elements * to) {
    throw new TypeError(`Cannot ${doing}: ${elements * to} bytes are needed for them, got ${out.length}`);
  }
  for (const [begin, end] of callBlocks(kernels, elements, 1)) {
    const input = bytes.subarray(begin * from, end * from), part = out.subarray(begin * to, end * to);
    call.convert(kernels, doing, input, source, part, target, end - begin);
  }
  return out;
}

/** Position of the first NaN or infinity (after conversion to float32), −1 if there is none. */
export function findNonfinite(kernels: Kernels, weights: Weights, elements: number): number {
  const doing = "look for NaN and infinity";
  checkCount(doing, "elements", elements);
  const bytes = weightBytes(doing, weights, elements);
  const width = BYTES_PER_ELEMENT[weights.dtype], dtype = DTYPE_NUMBERS[weights.dtype];
  const index = new BigUint64Array(1);
  for (const [begin, end] of callBlocks(kernels, elements, 1)) {
    call.findNonfinite(kernels, doing, bytes.subarray(begin * width, end * width), dtype, end - begin, index);
    if (Number(index[0]) < end - begin) return begin + Number(index[0]);
  }
  return -1;
}
