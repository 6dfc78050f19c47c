/** Weights of packed matrices. */
import { checkFloats, checkMember, DTYPE_NUMBERS } from "../native/call.ts";
import * as call from "../native/functions.ts";
import type { Kernels } from "../native/mod.ts";
import { convertFloats } from "./convert.ts";
import {
  checkPackedTensor,
  isRotated,
  levelsOf,
  linesOf,
  packedRows,
  type PackedTensor,
  type RotatedTensor,
} from "./packed/layout.ts";
import { rotateMatrix } from "./rotation.ts";
import { callBlocks } from "./weights.ts";

type PlainDtype = "F32" | "F16" | "BF16";
type Plain = Float32Array<ArrayBuffer> | Uint16Array<ArrayBuffer>;

/**
 * The weights of a packed matrix, row-major: float32, or the bits of half or bfloat16 values.
 *
 * @param target memory of float32 weights; new by default
 * @throws {TypeError} when the arrays do not fit the tensor's sizes
 */
export function dequantize(
  kernels: Kernels,
  tensor: PackedTensor,
  dtype?: "F32",
  target?: Float32Array<ArrayBuffer>,
): Float32Array<ArrayBuffer>;
export function dequantize(
  kernels: Kernels,
  tensor: PackedTensor,
  dtype: "F16" | "BF16",
): Uint16Array<ArrayBuffer>;
export function dequantize(kernels: Kernels, tensor: PackedTensor, dtype?: PlainDtype): Plain;
export function dequantize(
  kernels: Kernels,
  tensor: PackedTensor,
  dtype: PlainDtype = "F32",
  given?: Float32Array<ArrayBuffer>,
): Plain {
  const doing = "dequantize a matrix";
  checkPackedTensor(doing, tensor);
  checkMember(doing, "dtype", dtype, ["F32", "F16", "BF16"]);
  const { rows, cols, bits, groupSize } = tensor, number = DTYPE_NUMBERS[dtype];
  if (given !== undefined) checkFloats(doing, { target: [given, rows * cols] });
  if (isRotated(tensor)) return dequantizeRotated(kernels, tensor, dtype, given);
  const out = given ?? (dtype === "F32" ? new Float32Array(rows * cols) : new Uint16Array(rows * cols));
  for (const [begin, end] of callBlocks(kernels, rows, cols)) {
    const part = packedRows(tensor, begin, end), target = out.subarray(begin * cols, end * cols);
    const sizes = [end - begin, cols, bits, groupSize] as const;
    if (part.scaleBits === undefined) {
      const { packed, scale, zeroPoint } = part;
      call.dequantize(kernels, doing, packed, scale, zeroPoint, ...sizes, target, number);
    } else if (part.codes === "trellis") {
      call.dequantizeTrellis(kernels, doing, part.packed, ...linesOf(part), ...sizes, target, number);
    } else {
      const { packed, scaleBits } = part;
      call.dequantizeTwoLevel(kernels, doing, packed, ...levelsOf(part), ...sizes, scaleBits, target, number);
    }
  }
  return out;
}

/** The weights of a matrix before they were rotated. */
function dequantizeRotated(
  kernels: Kernels,
  { rotationSeed, ...rotated }: RotatedTensor,
  dtype: PlainDtype,
  given?: Float32Array<ArrayBuffer>,
): Plain {
  const { rows, cols } = rotated, weights = dequantize(kernels, rotated, "F32", given);
  rotateMatrix(kernels, weights, rows, cols, rotationSeed, "back");
  if (dtype === "F32") return weights;
  return new Uint16Array(
    convertFloats(kernels, { data: weights, dtype: "F32" }, rows * cols, dtype).buffer,
  );
}
