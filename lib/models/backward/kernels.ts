/**
 * The gradients' kernels as functions. For a loss L, `dy` stands for ∂L/∂y. Tensors are flat float32 arrays,
 * row-major; results go to the last argument. They depend neither on the number of threads nor on the
 * instruction set.
 */
import { checkCounts, checkFloats } from "../../native/call.ts";
import * as native from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";
import {
  groupCount,
  type OneLevelTensor,
  packedWords,
  type TwoLevelTensor,
} from "../../quant/packed/layout.ts";
import { type AttentionInputs, type AttentionShape, checkAttention } from "../layers/attention.ts";
import { checkModulation, type ModulationShape } from "../layers/elementwise.ts";
import { checkNorm, type Norm } from "../layers/norms.ts";

type Floats = Float32Array<ArrayBuffer>;

/** `x: f32[rows, cols]` → `out: f32[cols, rows]`; `out` must not be `x`. */
export function transpose(kernels: Kernels, x: Float32Array, rows: number, cols: number, out: Floats): void {
  const doing = "transpose a matrix";
  checkCounts(doing, { rows, cols });
  checkFloats(doing, { x: [x, rows * cols], out: [out, rows * cols] });
  native.transpose(kernels, doing, x, rows, cols, out);
}

/**
 * Gradients of scales and zero points from that of the weights `s (q − z)`: `Σ dw (q − z)` and `−s Σ dw` over
 * each group.
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
  checkCounts(doing, { rows, cols });
  const groups = rows * groupCount(cols, groupSize);
  checkFloats(doing, { dw: [dw, rows * cols], dscale: [dscale, groups], dzero: [dzero, groups] });
  const fits = packed.length === rows * packedWords(cols, bits) && scale.length === groups;
  if (!fits || (zeroPoint !== undefined && zeroPoint.length !== groups)) {
    throw new TypeError(`Cannot ${doing}: the packed tensor must have ${groups} scales, got ${scale.length}`);
  }
  if (dzero !== undefined && zeroPoint === undefined) {
    throw new TypeError(`Cannot ${doing}: dzero must be undefined for symmetric weights, got an array`);
  }
  const sizes = [rows, cols, bits, groupSize] as const;
  native.packedGradient(kernels, doing, dw, packed, scale, zeroPoint, ...sizes, dscale, dzero);
}

/**
 * Gradients of scales and offsets of trellis codes from that of the weights: `Σ dw · level` and `Σ dw` over
 * each group.
 *
 * **Shapes** `dw: f32[rows, cols]` → `dscale` and `doffset: f32[rows, groups]`
 */
export function trellisGradient(
  kernels: Kernels,
  dw: Float32Array,
  { rows, cols, bits, groupSize, packed }: TwoLevelTensor,
  dscale: Floats,
  doffset: Floats,
): void {
  const doing = "find the gradient of scales", groups = rows * groupCount(cols, groupSize);
  checkFloats(doing, { dw: [dw, rows * cols], dscale: [dscale, groups], doffset: [doffset, groups] });
  native.trellisGradient(kernels, doing, dw, packed, rows, cols, bits, groupSize, dscale, doffset);
}

const normBackward =
  (kernel: typeof native.rmsNormBackward) =>
  (kernels: Kernels, x: Float32Array, dy: Float32Array, norm: Norm, dx: Floats): void => {
    const doing = "find the gradient of a norm", { rows, cols, weight, epsilon } = norm;
    checkNorm(doing, norm, { x, dy, dx });
    kernel(kernels, doing, x, dy, rows, cols, weight, epsilon, dx);
  };

/** `dx` of `rmsNorm` at `x: f32[rows, cols]`; `dx` may be `dy`. */
export const rmsNormBackward = normBackward(native.rmsNormBackward);

/** `dx` of `layerNorm` at `x: f32[rows, cols]`; `dx` may be `dy`. */
export const layerNormBackward = normBackward(native.layerNormBackward);

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
  const { batch, tokens, heads, kvHeads = heads, headSize } = shape, scale = 1 / Math.sqrt(headSize);
  const sizes = [batch, tokens, heads, kvHeads, headSize] as const;
  native.attentionBackward(kernels, doing, q, k, v, out, dout, keyMask, ...sizes, scale, dq, dk, dv);
}

/** `dgate` and `dup` of `siluMultiply`; `dgate` may be `gate` or `dy`, `dup` may be `up`. */
export function siluMultiplyBackward(
  kernels: Kernels,
  { gate, up }: { readonly gate: Float32Array; readonly up: Float32Array },
  dy: Float32Array,
  { dgate, dup }: { readonly dgate: Floats; readonly dup: Floats },
): void {
  const doing = "find the gradient of SiLU", n = gate.length;
  checkFloats(doing, { up: [up, n], dy: [dy, n], dgate: [dgate, n], dup: [dup, n] });
  native.siluMultiplyBackward(kernels, doing, gate, up, dy, n, dgate, dup);
}

const activationBackward =
  (name: string, kernel: typeof native.siluBackward) =>
  (kernels: Kernels, x: Float32Array, dy: Float32Array, dx: Floats): void => {
    const doing = `find the gradient of ${name}`, n = x.length;
    checkFloats(doing, { dy: [dy, n], dx: [dx, n] });
    kernel(kernels, doing, x, dy, n, dx);
  };

/** `dx` of `silu`; may be `x` or `dy`. */
export const siluBackward = activationBackward("SiLU", native.siluBackward);

/** `dx` of `geluTanh`; may be `x` or `dy`. */
export const geluTanhBackward = activationBackward("GELU", native.geluTanhBackward);

/**
 * Sums over tokens of `a`, or of `a · b`.
 *
 * **Shapes** `a` and `b: f32[batch, tokens, cols]` → `out: f32[batch, cols]`, `stride` floats from one batch
 * item to the next
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
  const { batch, tokens, cols, stride = cols } = shape;
  native.columnSums(kernels, doing, a, b, batch, tokens, cols, stride, out);
}
