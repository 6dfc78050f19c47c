/** Linear layers of full or packed weights. */
import type { Kernels } from "../../native/mod.ts";
import { checkPackedTensor, type PackedTensor } from "../../quant/packed/layout.ts";
import { rotateRows } from "../../quant/packed/rotation.ts";
import { check, checkCount, checkFloats } from "./_checks.ts";
import { add } from "./elementwise.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Element types that a linear layer reads without converting the whole matrix; the values are the header's. */
const DTYPES = { F32: 0, F16: 1, BF16: 2 } as const;
export type WeightDtype = keyof typeof DTYPES;

/** A matrix of weights as stored: float32 values, or the bits of half or bfloat16 values. */
export interface DenseMatrix {
  readonly rows: number;
  readonly cols: number;
  readonly dtype: WeightDtype;
  readonly data: Float32Array | Uint16Array;
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
 * `out[t, n] = Σ_k x[t, k] · weights[n, k] + bias[n]`. Packed weights are dequantized in blocks that stay in the
 * processor's caches, never as a whole.
 *
 * **Shapes** `x: f32[tokens, cols]` → `f32[tokens, rows]`. `out` must not be `x`.
 *
 * @throws {TypeError} when an array does not fit the sizes
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 *
 * const kernels = await openKernels();
 * const weights = { rows: 2, cols: 2, dtype: "F32", data: Float32Array.of(1, 2, 3, 4) } as const;
 * console.log(linear(kernels, { weights }, Float32Array.of(1, 1), 1)); // 3, 7
 * ```
 */
export function linear(
  kernels: Kernels,
  { weights, bias }: Linear,
  x: Float32Array,
  tokens: number,
  out: Floats = new Float32Array(tokens * weights.rows),
): Floats {
  const doing = "apply a linear layer";
  checkCount(doing, "tokens", tokens);
  checkMatrix(doing, weights);
  const { rows, cols } = weights;
  checkFloats(doing, "x", x, tokens * cols);
  if (bias !== undefined) checkFloats(doing, "bias", bias, rows);
  checkFloats(doing, "out", out, tokens * rows);
  const { calls, size, isaNumber: isa, threads } = kernels;
  const t = size(tokens), n = size(rows), k = size(cols), b = bias ?? null;
  if (!("packed" in weights)) {
    check(calls.aq_linear(x, t, weights.data, DTYPES[weights.dtype], b, n, k, out, isa, threads), doing);
    return out;
  }
  const { packed, bits, lowRank, rotation } = weights, g = size(weights.groupSize);
  if (lowRank !== undefined || rotation !== undefined) {
    return linearExtended(kernels, weights, bias, x, tokens, out);
  }
  if (weights.scaleBits === undefined) {
    const { scale, zeroPoint } = weights, z = zeroPoint ?? null;
    check(calls.aq_linear_packed(x, t, packed, scale, z, b, n, k, bits, g, out, isa, threads), doing);
    return out;
  }
  const { scaleBits, subScale: s, subMin: m, superScale: ss, superMin: sm } = weights;
  check(
    calls.aq_linear_two_level(x, t, packed, s, m, ss, sm, b, n, k, bits, g, scaleBits, out, isa, threads),
    doing,
  );
  return out;
}

/** With a rotation, `x ← H x`, and a low-rank correction, `+ A (B x)`, by the kernels for plain matrices. */
function linearExtended(
  kernels: Kernels,
  { lowRank, rotation, ...weights }: PackedTensor,
  bias: Float32Array | undefined,
  x: Float32Array,
  tokens: number,
  out: Floats,
): Floats {
  const { rows, cols } = weights;
  const input = rotation === undefined ? x : rotateRows(x.slice(), cols, rotation);
  linear(kernels, { weights, bias }, input, tokens, out);
  if (lowRank === undefined) return out;
  const { rank, a, b } = lowRank;
  const narrow = linear(kernels, { weights: { rows: rank, cols, dtype: "F16", data: b } }, input, tokens);
  const wide = linear(kernels, { weights: { rows, cols: rank, dtype: "F16", data: a } }, narrow, tokens);
  return add(kernels, out, wide, out);
}

function checkMatrix(doing: string, weights: Matrix): void {
  if ("packed" in weights) return checkPackedTensor(doing, weights);
  const { rows, cols, dtype, data } = weights;
  checkCount(doing, "rows", rows);
  checkCount(doing, "cols", cols);
  if (!(dtype in DTYPES)) {
    throw new TypeError(`Cannot ${doing}: weights must be F32, F16 or BF16, got ${JSON.stringify(dtype)}`);
  }
  const fits = dtype === "F32" ? data instanceof Float32Array : data instanceof Uint16Array;
  if (!fits || data.length !== rows * cols) {
    const wanted = dtype === "F32" ? "float32 values" : "16-bit words";
    throw new TypeError(`Cannot ${doing}: weights must be ${rows * cols} ${wanted}, got ${data?.length}`);
  }
}
