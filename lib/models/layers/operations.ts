/** The operations of a forward pass, bound to opened kernels. */
import type { Kernels } from "../../native/mod.ts";
import * as kernel from "./kernels.ts";
import type { LinearLayer } from "./tensors.ts";

type Floats = Float32Array<ArrayBuffer>;

/** What kernels.ts has, without the arguments that are the same for a whole model; results go to the last argument. */
export class Operations {
  readonly kernels: Kernels;

  constructor(kernels: Kernels) {
    this.kernels = kernels;
  }

  /** `x: f32[tokens, cols]` → `out: f32[tokens, rows]`; `out` must not be `x`. */
  linear({ weights, bias }: LinearLayer, x: Float32Array, tokens: number, out: Floats): void {
    kernel.linear(this.kernels, x, tokens, weights, bias, { out });
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
    kernel.rmsNorm(this.kernels, x, rows, cols, weight, epsilon, { out });
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
    kernel.layerNorm(this.kernels, x, rows, cols, weight, bias, epsilon, { out });
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
    kernel.attention(this.kernels, q, k, v, shape, { keyMask, out });
  }

  /** In place: `x: f32[positions, heads, headSize]`. */
  rotary(x: Floats, positions: Int32Array, heads: number, headSize: number, theta: number): void {
    kernel.rotary(this.kernels, x, positions, heads, headSize, theta);
  }

  siluMultiply(gate: Float32Array, up: Float32Array, out: Floats): void {
    kernel.siluMultiply(this.kernels, gate, up, { out });
  }

  silu(x: Float32Array, out: Floats): void {
    kernel.silu(this.kernels, x, { out });
  }

  geluTanh(x: Float32Array, out: Floats): void {
    kernel.geluTanh(this.kernels, x, { out });
  }

  /** `x (1 + scale) + shift`, one row of `scale` and `shift` a batch item. */
  modulate(
    x: Float32Array,
    scale: Float32Array,
    shift: Float32Array,
    shape: kernel.ModulationShape,
    out: Floats,
  ): void {
    kernel.modulate(this.kernels, x, scale, shift, shape, { out });
  }

  /** `residual + gate · x`, one row of `gate` a batch item. */
  gateAdd(
    residual: Float32Array,
    gate: Float32Array,
    x: Float32Array,
    shape: kernel.ModulationShape,
    out: Floats,
  ): void {
    kernel.gateAdd(this.kernels, residual, gate, x, shape, { out });
  }

  add(a: Float32Array, b: Float32Array, out: Floats): void {
    kernel.add(this.kernels, a, b, { out });
  }

  /** `images: f32[batch, channels, height, width]` → rows of a patch embedding; `out` must not be `images`. */
  patchify(images: Float32Array, shape: kernel.PatchShape, out: Floats): void {
    kernel.patchify(this.kernels, images, shape, { out });
  }

  /** Rows of patches, channels last → `out: f32[batch, channels, height, width]`; `out` must not be `tokens`. */
  unpatchify(tokens: Float32Array, shape: kernel.PatchShape, out: Floats): void {
    kernel.unpatchify(this.kernels, tokens, shape, { out });
  }

  /** `timesteps: [n]` → `out: f32[n, channels]` */
  timestepEmbedding(
    timesteps: ArrayLike<number>,
    channels: number,
    options: Omit<kernel.TimestepEmbeddingOptions, "out">,
    out: Floats,
  ): void {
    kernel.timestepEmbedding(this.kernels, timesteps, channels, { ...options, out });
  }
}
