/** Linear layers of full or packed weights. */
import { checkArray, checkCount, DTYPE_NUMBERS } from "../../native/call.ts";
import * as native from "../../native/functions.ts";
import type { ComingArray, Kernels } from "../../native/mod.ts";
import {
  checkPackedTensor,
  isRotated,
  levelsOf,
  linesOf,
  type PackedTensor,
  type RotatedTensor,
} from "../../quant/packed/layout.ts";
import { restoreOutputs, rotateInputs } from "../../quant/rotation.ts";
import { modulate } from "./elementwise.ts";
import { Workspace } from "./workspace.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Element types that a linear layer reads without converting the whole matrix. */
export type WeightDtype = "F32" | "F16" | "BF16";

/** A matrix of weights as stored: float32 values, or the bits of half or bfloat16 values. */
export interface DenseMatrix {
  readonly rows: number;
  readonly cols: number;
  readonly dtype: WeightDtype;
  readonly data: Float32Array | Uint16Array;
  /** Reads values from an element on into memory that is given, where `data` would have to be read first. */
  readonly floats?: ((start: number, out: Floats) => void) | undefined;
  /**
   * `data` before it is needed, where it may have to be read; without it where that would take memory of
   * matrices that are `needed`, by their names.
   */
  readonly ahead?: ((needed: ReadonlySet<string>) => ComingArray) | undefined;
}

/** Weights of a linear layer, full or packed. */
export type Matrix = DenseMatrix | PackedTensor;

/** Weights and bias: `y = W x + bias`. */
export interface Linear {
  /** `[rows, cols]` */
  readonly weights: Matrix;
  /** `f32[rows]` */
  readonly bias?: Float32Array | undefined;
}

/**
 * `out[t, n] = Σ_k x[t, k] · weights[n, k] + bias[n]`. Packed weights are dequantized in blocks that stay in
 * the processor's caches, never as a whole.
 *
 * **Shapes** `x: f32[tokens, cols]` → `f32[tokens, rows]`. `out` must not be `x`.
 *
 * @param scratch for inputs of rotated weights, of this function alone
 * @throws {TypeError} when an array does not fit the sizes
 */
export function linear(
  kernels: Kernels,
  { weights, bias }: Linear,
  x: Float32Array,
  tokens: number,
  out: Floats = new Float32Array(tokens * weights.rows),
  scratch?: Workspace,
): Floats {
  const doing = "apply a linear layer", { rows, cols } = weights;
  // one by one: this runs for every layer, and small layers show what a check costs
  checkCount(doing, "tokens", tokens);
  checkMatrix(doing, weights);
  checkArray(doing, "x", x, tokens * cols);
  if (bias !== undefined) checkArray(doing, "bias", bias, rows);
  checkArray(doing, "out", out, tokens * rows);
  if (!("packed" in weights)) {
    const { dtype, data } = weights;
    native.linear(kernels, doing, x, tokens, data, DTYPE_NUMBERS[dtype], bias, rows, cols, out);
    return out;
  }
  if (isRotated(weights)) return linearRotated(kernels, { weights, bias }, x, tokens, out, scratch);
  const { packed, bits, groupSize } = weights;
  const sizes = [rows, cols, bits, groupSize] as const;
  if (weights.scaleBits === undefined) {
    const { scale, zeroPoint } = weights;
    native.linearPacked(kernels, doing, x, tokens, packed, scale, zeroPoint, bias, ...sizes, out);
    return out;
  }
  if (weights.codes === "trellis") {
    native.linearTrellis(kernels, doing, x, tokens, packed, ...linesOf(weights), bias, ...sizes, out);
    return out;
  }
  const { scaleBits } = weights, scales = levelsOf(weights);
  native.linearTwoLevel(kernels, doing, x, tokens, packed, ...scales, bias, ...sizes, scaleBits, out);
  return out;
}

/** Rotates the inputs, multiplies, takes the rotation of the outputs back and adds the bias. */
function linearRotated(
  kernels: Kernels,
  { weights, bias }: Linear & { readonly weights: RotatedTensor },
  x: Float32Array,
  tokens: number,
  out: Floats,
  scratch = new Workspace(),
): Floats {
  const { rotationSeed, ...rotated } = weights, { rows, cols } = rotated;
  const own = kernels.arrays.hold(scratch.take("rotated inputs", tokens * cols), true);
  rotateInputs(kernels, x, tokens, cols, rotationSeed, own);
  linear(kernels, { weights: rotated }, own, tokens, out);
  restoreOutputs(kernels, out, tokens, rows, rotationSeed);
  if (bias === undefined) return out;
  const scale = kernels.arrays.constant(scratch.take(`zeros of ${rows}`, rows)); // which nobody writes to
  modulate(kernels, out, { scale, shift: bias }, { batch: 1, tokens, cols: rows }, out);
  return out;
}

function checkMatrix(doing: string, weights: Matrix): void {
  if ("packed" in weights) return checkPackedTensor(doing, weights);
  const { rows, cols, dtype, data } = weights;
  checkCount(doing, "rows", rows);
  checkCount(doing, "cols", cols);
  if (dtype !== "F32" && dtype !== "F16" && dtype !== "BF16") {
    throw new TypeError(`Cannot ${doing}: weights must be F32, F16 or BF16, got ${JSON.stringify(dtype)}`);
  }
  const fits = dtype === "F32" ? data instanceof Float32Array : data instanceof Uint16Array;
  if (!fits || data.length !== rows * cols) {
    const wanted = dtype === "F32" ? "float32 values" : "16-bit words";
    throw new TypeError(`Cannot ${doing}: weights must be ${rows * cols} ${wanted}, got ${data?.length}`);
  }
}
