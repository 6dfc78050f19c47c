/** Products of float32 matrices: the same bytes for any number of threads. */
import { checkCounts, checkFloats, DTYPE_NUMBERS } from "../native/call.ts";
import * as call from "../native/functions.ts";
import type { Kernels } from "../native/mod.ts";

/**
 * `out[t, n] = Σ_k x[t, k] w[n, k]`
 *
 * **Shapes** `x: f32[tokens, cols]`, `w: f32[rows, cols]` → `f32[tokens, rows]`
 *
 * @param doing what the product is for, as messages say it
 * @throws {TypeError | RangeError} when an array does not fit the sizes
 */
export function product(
  kernels: Kernels,
  doing: string,
  x: Float32Array,
  w: Float32Array,
  { tokens, rows, cols }: { readonly tokens: number; readonly rows: number; readonly cols: number },
): Float32Array<ArrayBuffer> {
  checkCounts(doing, { tokens, rows, cols });
  checkFloats(doing, { x: [x, tokens * cols], weights: [w, rows * cols] });
  const out = new Float32Array(tokens * rows);
  call.linear(kernels, doing, x, tokens, w, DTYPE_NUMBERS.F32, null, rows, cols, out);
  return out;
}

/**
 * `out[i, j] += Σ_k a[i, k] b[k, j]`: each sum is one chain of fused multiply-adds, k ascending, so that
 * neither threads nor the instruction set change a byte.
 *
 * **Shapes** `a: f32[rows, k]`, `b: f32[k, cols]` → `out: f32[rows, cols]`, added to
 *
 * @throws {TypeError | RangeError} when an array does not fit the sizes
 */
export function addProduct(
  kernels: Kernels,
  doing: string,
  a: Float32Array,
  b: Float32Array,
  { rows, k, cols }: { readonly rows: number; readonly k: number; readonly cols: number },
  out: Float32Array,
): void {
  checkCounts(doing, { rows, k, cols });
  checkFloats(doing, { a: [a, rows * k], b: [b, k * cols], out: [out, rows * cols] });
  call.multiply(kernels, doing, a, b, rows, k, cols, out);
}
