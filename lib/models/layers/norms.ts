/** Normalization of rows. */
import { checkArray, checkCounts, checkFloats } from "../../native/call.ts";
import * as native from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Sizes and parameters of a norm over rows. */
export interface Norm {
  readonly rows: number;
  readonly cols: number;
  /** `f32[cols]`, ones by default. */
  readonly weight?: Float32Array | undefined;
  readonly epsilon: number;
}

/** @throws {RangeError | TypeError} unless every array is `f32[rows, cols]` */
export function checkNorm(doing: string, norm: Norm, arrays: Readonly<Record<string, Float32Array>>): void {
  const { rows, cols, weight } = norm;
  checkCounts(doing, { rows, cols });
  for (const name in arrays) checkArray(doing, name, arrays[name], rows * cols);
  checkFloats(doing, { weight: [weight, cols] });
}

/** `x / √(mean(x²) + epsilon) · weight`, by rows of `x: f32[rows, cols]`; `out` may be `x`. */
export function rmsNorm(
  kernels: Kernels,
  x: Float32Array,
  norm: Norm,
  out: Floats = new Float32Array(x.length),
): Floats {
  const doing = "normalize by the root mean square", { rows, cols, weight, epsilon } = norm;
  checkNorm(doing, norm, { x, out });
  native.rmsNorm(kernels, doing, x, rows, cols, weight, epsilon, out);
  return out;
}

/**
 * `(x − mean) / √(variance + epsilon) · weight + bias`, by rows.
 *
 * **Shapes** `x: f32[rows, cols]` → the same; `bias: f32[cols]`, zeros by default; `out` may be `x`
 */
export function layerNorm(
  kernels: Kernels,
  x: Float32Array,
  norm: Norm & { readonly bias?: Float32Array | undefined },
  out: Floats = new Float32Array(x.length),
): Floats {
  const doing = "normalize rows", { rows, cols, weight, bias, epsilon } = norm;
  checkNorm(doing, norm, { x, out });
  checkFloats(doing, { bias: [bias, cols] });
  native.layerNorm(kernels, doing, x, rows, cols, weight, bias, epsilon, out);
  return out;
}
