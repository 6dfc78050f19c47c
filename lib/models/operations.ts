/** The operations of a forward pass, bound to opened kernels and a number of threads. */
import type { Kernels } from "../native/mod.ts";
import * as kernel from "./kernels.ts";
import type { LinearLayer } from "./tensors.ts";

type Floats = Float32Array<ArrayBuffer>;

/**
 * Work that is worth a thread: about a tenth of a millisecond, several times what starting one costs. Multiply-adds of products, elements of
 * the rest. Results do not depend on threads, so this is about time alone.
 */
const PRODUCTS_PER_THREAD = 4_000_000;
const ELEMENTS_PER_THREAD = 100_000;

/** What kernels.ts has, without the arguments that are the same for a whole model; results go to the last argument. */
export class Operations {
  readonly kernels: Kernels;
  readonly threads: number;

  constructor(kernels: Kernels, threads: number) {
    this.kernels = kernels;
    this.threads = threads;
  }

  #threadsFor(work: number, workPerThread: number): number {
    return Math.max(1, Math.min(this.threads, Math.floor(work / workPerThread)));
  }

  /** Options of an operation on the elements of `out`. */
  #into(out: Floats): kernel.RunOptions {
    return { out, threads: this.#threadsFor(out.length, ELEMENTS_PER_THREAD) };
  }

  /** `x: f32[tokens, cols]` → `out: f32[tokens, rows]`; `out` must not be `x`. */
  linear({ weights, bias }: LinearLayer, x: Float32Array, tokens: number, out: Floats): void {
    const threads = this.#threadsFor(tokens * weights.rows * weights.cols, PRODUCTS_PER_THREAD);
    kernel.linear(this.kernels, x, tokens, weights, bias, { out, threads });
  }

  /** `x: f32[rows, cols]`; `out` may be `x`. */
  rmsNorm(
    x: Float32Array,
    weight: Float32Array,
    rows: number,
    cols: number,
    epsilon: number,
    out: Floats,
  ): void {
    kernel.rmsNorm(this.kernels, x, rows, cols, weight, epsilon, this.#into(out));
  }

  /** `x: f32[rows, cols]`; `out` may be `x`. */
  layerNorm(
    x: Float32Array,
    weight: Float32Array | undefined,
    bias: Float32Array | undefined,
    rows: number,
    cols: number,
    epsilon: number,
    out: Floats,
  ): void {
    kernel.layerNorm(this.kernels, x, rows, cols, weight, bias, epsilon, this.#into(out));
  }

  /** `q: f32[batch, tokens, heads, headSize]`, `k` and `v: f32[batch, tokens, kvHeads, headSize]` → like `q`. */
  attention(
    q: Float32Array,
    k: Float32Array,
    v: Float32Array,
    shape: kernel.AttentionShape,
    keyMask: Uint8Array | undefined,
    out: Floats,
  ): void {
    const threads = this.#threadsFor(2 * q.length * shape.tokens, PRODUCTS_PER_THREAD);
    kernel.attention(this.kernels, q, k, v, shape, { keyMask, out, threads });
  }

  /** In place: `x: f32[positions, heads, headSize]`. */
  rotary(x: Floats, positions: Int32Array, heads: number, headSize: number, theta: number): void {
    kernel.rotary(
      this.kernels,
      x,
      positions,
      heads,
      headSize,
      theta,
      this.#threadsFor(x.length, ELEMENTS_PER_THREAD),
    );
  }

  siluMultiply(gate: Float32Array, up: Float32Array, out: Floats): void {
    kernel.siluMultiply(this.kernels, gate, up, this.#into(out));
  }

  silu(x: Float32Array, out: Floats): void {
    kernel.silu(this.kernels, x, this.#into(out));
  }

  geluTanh(x: Float32Array, out: Floats): void {
    kernel.geluTanh(this.kernels, x, this.#into(out));
  }

  /** `x (1 + scale) + shift`, one row of `scale` and `shift` a batch item. */
  modulate(
    x: Float32Array,
    scale: Float32Array,
    shift: Float32Array,
    shape: kernel.ModulationShape,
    out: Floats,
  ): void {
    kernel.modulate(this.kernels, x, scale, shift, shape, this.#into(out));
  }

  /** `residual + gate · x`, one row of `gate` a batch item. */
  gateAdd(
    residual: Float32Array,
    gate: Float32Array,
    x: Float32Array,
    shape: kernel.ModulationShape,
    out: Floats,
  ): void {
    kernel.gateAdd(this.kernels, residual, gate, x, shape, this.#into(out));
  }

  add(a: Float32Array, b: Float32Array, out: Floats): void {
    kernel.add(this.kernels, a, b, this.#into(out));
  }
}
