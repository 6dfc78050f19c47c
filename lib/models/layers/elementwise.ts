/** Activation functions, sums, and the modulation of adaLN. Results go to `out`, by default a new array. */
import type { Kernels } from "../../native/mod.ts";
import { check, checkCount, checkFloats } from "./_checks.ts";

type Floats = Float32Array<ArrayBuffer>;

/** `x / (1 + exp(−x))`, element by element; `out` may be `x`. */
export function silu(kernels: Kernels, x: Float32Array, out: Floats = new Float32Array(x.length)): Floats {
  const doing = "apply SiLU";
  checkFloats(doing, "x", x, x.length);
  checkFloats(doing, "out", out, x.length);
  check(kernels.calls.aq_silu(x, kernels.size(x.length), out, kernels.isaNumber, kernels.threads), doing);
  return out;
}

/** `x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`, element by element; `out` may be `x`. */
export function geluTanh(
  kernels: Kernels,
  x: Float32Array,
  out: Floats = new Float32Array(x.length),
): Floats {
  const doing = "apply GELU", { calls, size, isaNumber, threads } = kernels;
  checkFloats(doing, "x", x, x.length);
  checkFloats(doing, "out", out, x.length);
  check(calls.aq_gelu_tanh(x, size(x.length), out, isaNumber, threads), doing);
  return out;
}

/** `silu(gate) · up`, element by element; `out` may be either. */
export function siluMultiply(
  kernels: Kernels,
  gate: Float32Array,
  up: Float32Array,
  out: Floats = new Float32Array(gate.length),
): Floats {
  const doing = "gate by SiLU", { calls, size, isaNumber, threads } = kernels;
  checkFloats(doing, "gate", gate, gate.length);
  checkFloats(doing, "up", up, gate.length);
  checkFloats(doing, "out", out, gate.length);
  check(calls.aq_silu_multiply(gate, up, size(gate.length), out, isaNumber, threads), doing);
  return out;
}

/** `a + b`, element by element; `out` may be either. */
export function add(
  kernels: Kernels,
  a: Float32Array,
  b: Float32Array,
  out: Floats = new Float32Array(a.length),
): Floats {
  const doing = "add", { calls, size, isaNumber, threads } = kernels;
  checkFloats(doing, "a", a, a.length);
  checkFloats(doing, "b", b, a.length);
  checkFloats(doing, "out", out, a.length);
  check(calls.aq_add(a, b, size(a.length), out, isaNumber, threads), doing);
  return out;
}

/** Sizes of a tensor `f32[batch, tokens, cols]` that is modulated by one row for each batch item. */
export interface ModulationShape {
  readonly batch: number;
  readonly tokens: number;
  readonly cols: number;
  /** Floats from one batch item's row to the next; default `cols`. Six chunks of one tensor have 6 · cols. */
  readonly stride?: number | undefined;
}

/** @throws {RangeError | TypeError} unless `tensors` are `f32[batch, tokens, cols]`, and `rows` reach their last row's end */
export function checkModulation(
  doing: string,
  { batch, tokens, cols, stride = cols }: ModulationShape,
  tensors: Readonly<Record<string, Float32Array>>,
  rows: Readonly<Record<string, Float32Array>>,
): void {
  checkCount(doing, "batch", batch);
  checkCount(doing, "tokens", tokens);
  checkCount(doing, "cols", cols);
  checkCount(doing, "stride", stride);
  for (const name in tensors) checkFloats(doing, name, tensors[name], batch * tokens * cols);
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
 * **Shapes** `x: f32[batch, tokens, cols]`; `scale` and `shift` begin at their first row and have `stride` floats from
 * one row to the next, so that chunks of one tensor are passed as `subarray`s of it.
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
  const { batch, tokens, cols, stride = cols } = shape, { calls, size, isaNumber, threads } = kernels;
  const s = size(stride), b = size(batch), t = size(tokens), c = size(cols);
  check(calls.aq_modulate(x, scale, shift, s, b, t, c, out, isaNumber, threads), doing);
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
  const { batch, tokens, cols, stride = cols } = shape, { calls, size, isaNumber, threads } = kernels;
  const s = size(stride), b = size(batch), t = size(tokens), c = size(cols);
  check(calls.aq_gate_add(residual, gate, x, s, b, t, c, out, isaNumber, threads), doing);
  return out;
}
