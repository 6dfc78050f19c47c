/** Normalization of rows. */
import type { Kernels } from "../../native/mod.ts";
import { check, checkCount, checkFloats } from "./_checks.ts";

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
  checkCount(doing, "rows", rows);
  checkCount(doing, "cols", cols);
  for (const name in arrays) checkFloats(doing, name, arrays[name], rows * cols);
  if (weight !== undefined) checkFloats(doing, "weight", weight, cols);
}

/**
 * `x / √(mean(x²) + epsilon) · weight`, by rows.
 *
 * **Shapes** `x: f32[rows, cols]` → the same; `out` may be `x`
 */
export function rmsNorm(
  kernels: Kernels,
  x: Float32Array,
  norm: Norm,
  out: Floats = new Float32Array(x.length),
): Floats {
  const doing = "normalize by the root mean square";
  checkNorm(doing, norm, { x, out });
  const { rows, cols, weight, epsilon } = norm, { calls, size, isaNumber, threads } = kernels;
  check(
    calls.aq_rms_norm(x, size(rows), size(cols), weight ?? null, epsilon, out, isaNumber, threads),
    doing,
  );
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
  const doing = "normalize rows";
  checkNorm(doing, norm, { x, out });
  const { rows, cols, weight, bias, epsilon } = norm, { calls, size, isaNumber, threads } = kernels;
  if (bias !== undefined) checkFloats(doing, "bias", bias, cols);
  const r = size(rows), c = size(cols);
  check(calls.aq_layer_norm(x, r, c, weight ?? null, bias ?? null, epsilon, out, isaNumber, threads), doing);
  return out;
}
