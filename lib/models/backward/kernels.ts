/**
 * The gradients' kernels as functions. For a loss L, `dy` stands for ∂L/∂y. Tensors are flat float32 arrays, row-major;
 * results go to the last argument. They depend neither on the number of threads nor on the instruction set.
 */
import type { Kernels } from "../../native/mod.ts";
import { groupCount, type OneLevelTensor, packedWords } from "../../quant/packed/layout.ts";
import { type AttentionInputs, type AttentionShape, checkAttention } from "../layers/attention.ts";
import { check, checkCount, checkFloats } from "../layers/_checks.ts";
import { checkModulation, type ModulationShape } from "../layers/elementwise.ts";
import { checkNorm, type Norm } from "../layers/norms.ts";

type Floats = Float32Array<ArrayBuffer>;

/** `x: f32[rows, cols]` → `out: f32[cols, rows]`; `out` must not be `x`. */
export function transpose(kernels: Kernels, x: Float32Array, rows: number, cols: number, out: Floats): void {
  const doing = "transpose a matrix", { calls, size, isaNumber, threads } = kernels;
  checkCount(doing, "rows", rows);
  checkCount(doing, "cols", cols);
  checkFloats(doing, "x", x, rows * cols);
  checkFloats(doing, "out", out, rows * cols);
  check(calls.aq_transpose(x, size(rows), size(cols), out, isaNumber, threads), doing);
}

/**
 * Gradients of scales and zero points from that of the weights `s (q − z)`: `Σ dw (q − z)` and `−s Σ dw` over each group.
 *
 * **Shapes** `dw: f32[rows, cols]` → `dscale` and `dzero: f32[rows, groups]`; `dzero` undefined: not wanted
 */
export function packedGradient(
  kernels: Kernels,
  dw: Float32Array,
  weights: OneLevelTensor,
  dscale: Floats,
  dzero: Floats | undefined,
): void {
  const doing = "find the gradient of scales";
  const { rows, cols, bits, groupSize, packed, scale, zeroPoint } = weights;
  checkCount(doing, "rows", rows);
  checkCount(doing, "cols", cols);
  const groups = rows * groupCount(cols, groupSize);
  checkFloats(doing, "dw", dw, rows * cols);
  checkFloats(doing, "dscale", dscale, groups);
  if (dzero !== undefined) checkFloats(doing, "dzero", dzero, groups);
  const fits = packed.length === rows * packedWords(cols, bits) && scale.length === groups;
  if (!fits || (zeroPoint !== undefined && zeroPoint.length !== groups)) {
    throw new TypeError(`Cannot ${doing}: the packed tensor must have ${groups} scales, got ${scale.length}`);
  }
  if (dzero !== undefined && zeroPoint === undefined) {
    throw new TypeError(`Cannot ${doing}: dzero must be undefined for symmetric weights, got an array`);
  }
  const { calls, size, isaNumber: isa, threads } = kernels, z = zeroPoint ?? null, dz = dzero ?? null;
  const n = size(rows), k = size(cols), g = size(groupSize);
  check(calls.aq_packed_gradient(dw, packed, scale, z, n, k, bits, g, dscale, dz, isa, threads), doing);
}

/** `dx` of `rmsNorm` at `x: f32[rows, cols]`; `dx` may be `dy`. */
export function rmsNormBackward(
  kernels: Kernels,
  x: Float32Array,
  dy: Float32Array,
  norm: Norm,
  dx: Floats,
): void {
  normBackward(kernels, "aq_rms_norm_backward", x, dy, norm, dx);
}

/** `dx` of `layerNorm` at `x: f32[rows, cols]`; `dx` may be `dy`. */
export function layerNormBackward(
  kernels: Kernels,
  x: Float32Array,
  dy: Float32Array,
  norm: Norm,
  dx: Floats,
): void {
  normBackward(kernels, "aq_layer_norm_backward", x, dy, norm, dx);
}

function normBackward(
  { calls, size, isaNumber, threads }: Kernels,
  call: "aq_rms_norm_backward" | "aq_layer_norm_backward",
  x: Float32Array,
  dy: Float32Array,
  norm: Norm,
  dx: Floats,
): void {
  const doing = "find the gradient of a norm", { rows, cols, weight, epsilon } = norm;
  checkNorm(doing, norm, { x, dy, dx });
  check(calls[call](x, dy, size(rows), size(cols), weight ?? null, epsilon, dx, isaNumber, threads), doing);
}

/** `dq`, `dk`, `dv` of `attention`; `out` is its result. No gradient may be one of the inputs. */
export function attentionBackward(
  kernels: Kernels,
  { q, k, v, keyMask, out }: AttentionInputs & { readonly out: Float32Array },
  dout: Float32Array,
  shape: AttentionShape,
  { dq, dk, dv }: { readonly dq: Floats; readonly dk: Floats; readonly dv: Floats },
): void {
  const doing = "find the gradient of attention";
  checkAttention(doing, shape, keyMask, { q, out, dout, dq }, { k, v, dk, dv });
  const { batch, tokens, heads, kvHeads = heads, headSize } = shape;
  const { calls, size, isaNumber: isa, threads } = kernels, mask = keyMask ?? null;
  const b = size(batch), t = size(tokens), h = size(heads), kv = size(kvHeads), d = size(headSize);
  const scale = 1 / Math.sqrt(headSize), { aq_attention_backward: call } = calls;
  check(call(q, k, v, out, dout, mask, b, t, h, kv, d, scale, dq, dk, dv, isa, threads), doing);
}

/** `dgate` and `dup` of `siluMultiply`; `dgate` may be `gate` or `dy`, `dup` may be `up`. */
export function siluMultiplyBackward(
  kernels: Kernels,
  { gate, up }: { readonly gate: Float32Array; readonly up: Float32Array },
  dy: Float32Array,
  { dgate, dup }: { readonly dgate: Floats; readonly dup: Floats },
): void {
  const doing = "find the gradient of SiLU", n = gate.length;
  checkFloats(doing, "up", up, n);
  checkFloats(doing, "dy", dy, n);
  checkFloats(doing, "dgate", dgate, n);
  checkFloats(doing, "dup", dup, n);
  const { calls, size, isaNumber, threads } = kernels;
  check(calls.aq_silu_multiply_backward(gate, up, dy, size(n), dgate, dup, isaNumber, threads), doing);
}

/** `dx` of `silu`; may be `x` or `dy`. */
export function siluBackward(kernels: Kernels, x: Float32Array, dy: Float32Array, dx: Floats): void {
  elementwiseBackward(kernels, "aq_silu_backward", x, dy, dx);
}

/** `dx` of `geluTanh`; may be `x` or `dy`. */
export function geluTanhBackward(kernels: Kernels, x: Float32Array, dy: Float32Array, dx: Floats): void {
  elementwiseBackward(kernels, "aq_gelu_tanh_backward", x, dy, dx);
}

function elementwiseBackward(
  { calls, size, isaNumber, threads }: Kernels,
  call: "aq_silu_backward" | "aq_gelu_tanh_backward",
  x: Float32Array,
  dy: Float32Array,
  dx: Floats,
): void {
  const doing = "find the gradient of an activation";
  checkFloats(doing, "dy", dy, x.length);
  checkFloats(doing, "dx", dx, x.length);
  check(calls[call](x, dy, size(x.length), dx, isaNumber, threads), doing);
}

/**
 * Sums over tokens of `a`, or of `a · b`.
 *
 * **Shapes** `a` and `b: f32[batch, tokens, cols]` → `out: f32[batch, cols]`, `stride` floats from one batch item to the
 * next
 */
export function columnSums(
  kernels: Kernels,
  a: Float32Array,
  b: Float32Array | undefined,
  shape: ModulationShape,
  out: Floats,
): void {
  const doing = "sum over tokens";
  checkModulation(doing, shape, b === undefined ? { a } : { a, b }, { out });
  const { batch, tokens, cols, stride = cols } = shape, { calls, size, isaNumber, threads } = kernels;
  const n = size(batch), t = size(tokens), c = size(cols), s = size(stride);
  check(calls.aq_column_sums(a, b ?? null, n, t, c, s, out, isaNumber, threads), doing);
}
