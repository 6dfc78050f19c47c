/** Activation functions, sums, and the modulation of adaLN. Results go to `out`, by default a new array. */
import { checkArray, checkCounts, checkFloats } from "../../native/call.ts";
import * as native from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";

type Floats = Float32Array<ArrayBuffer>;

/** A function of each number as a function of arrays. */
const ofOne =
  (doing: string, kernel: typeof native.silu) =>
  (kernels: Kernels, x: Float32Array, out: Floats = new Float32Array(x.length)): Floats => {
    checkArray(doing, "out", out, x.length);
    kernel(kernels, doing, x, x.length, out);
    return out;
  };

/** A function of two numbers as a function of arrays; `second` is the name of the second for messages. */
const ofTwo =
  (doing: string, second: string, kernel: typeof native.add) =>
  (kernels: Kernels, a: Float32Array, b: Float32Array, out: Floats = new Float32Array(a.length)): Floats => {
    const n = a.length;
    checkFloats(doing, { [second]: [b, n], out: [out, n] });
    kernel(kernels, doing, a, b, n, out);
    return out;
  };

/** `x / (1 + exp(−x))`, element by element; `out` may be `x`. */
export const silu = ofOne("apply SiLU", native.silu);

/** `x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`, element by element; `out` may be `x`. */
export const geluTanh = ofOne("apply GELU", native.geluTanh);

/** `silu(gate) · up`, element by element; `out` may be either. */
export const siluMultiply = ofTwo("gate by SiLU", "up", native.siluMultiply);

/** `a + b`, element by element; `out` may be either. */
export const add = ofTwo("add", "b", native.add);

/** Sizes of a tensor `f32[batch, tokens, cols]` that is modulated by one row for each batch item. */
export interface ModulationShape {
  readonly batch: number;
  readonly tokens: number;
  readonly cols: number;
  /** Floats from one item's row to the next; default `cols`. Six chunks of a tensor have 6 · cols. */
  readonly stride?: number | undefined;
}

/** @throws {RangeError | TypeError} unless `tensors` are `f32[batch, tokens, cols]` and `rows` long enough */
export function checkModulation(
  doing: string,
  { batch, tokens, cols, stride = cols }: ModulationShape,
  tensors: Readonly<Record<string, Float32Array>>,
  rows: Readonly<Record<string, Float32Array>>,
): void {
  checkCounts(doing, { batch, tokens, cols, stride });
  for (const name in tensors) checkArray(doing, name, tensors[name], batch * tokens * cols);
  const least = batch === 0 ? 0 : (batch - 1) * stride + cols;
  for (const name in rows) {
    const row = rows[name];
    if (row instanceof Float32Array && row.length >= least) continue;
    throw new TypeError(
      `Cannot ${doing}: ${name} must be at least ${least} float32 values, got ${row?.length}`,
    );
  }
}

/**
 * `x (1 + scale) + shift`. `out` may be `x`.
 *
 * **Shapes** `x: f32[batch, tokens, cols]`; `scale` and `shift` begin at their first row and have `stride`
 * floats from one row to the next, so that chunks of one tensor are passed as `subarray`s of it.
 */
export function modulate(
  kernels: Kernels,
  x: Float32Array,
  { scale, shift }: { readonly scale: Float32Array; readonly shift: Float32Array },
  shape: ModulationShape,
  out: Floats = new Float32Array(x.length),
): Floats {
  const doing = "modulate";
  checkModulation(doing, shape, { x, out }, { scale, shift });
  const { batch, tokens, cols, stride = cols } = shape;
  native.modulate(kernels, doing, x, scale, shift, stride, batch, tokens, cols, out);
  return out;
}

/**
 * `residual + gate · x`. `out` may be `residual` or `x`.
 *
 * **Shapes** `residual` and `x: f32[batch, tokens, cols]`; `gate` as `scale` of {@linkcode modulate}
 */
export function gateAdd(
  kernels: Kernels,
  residual: Float32Array,
  gate: Float32Array,
  x: Float32Array,
  shape: ModulationShape,
  out: Floats = new Float32Array(x.length),
): Floats {
  const doing = "add a gated branch";
  checkModulation(doing, shape, { residual, x, out }, { gate });
  const { batch, tokens, cols, stride = cols } = shape;
  native.gateAdd(kernels, doing, residual, gate, x, stride, batch, tokens, cols, out);
  return out;
}
