/** naive placeholder */
import type { Kernels } from "../native/mod.ts";
import { dequantize } from "../quant/mod.ts";
import type { LinearLayer } from "./tensors.ts";

const cache = new WeakMap<LinearLayer, Float32Array>();
export class Operations {
  constructor(readonly kernels: Kernels, readonly threads: number) {}
  linear(layer: LinearLayer, x: Float32Array, tokens: number, out: Float32Array): void {
    let w = cache.get(layer);
    const { rows, cols } = layer;
    if (!w) {
      if (layer.packed) w = dequantize(this.kernels, layer.packed);
      else if (layer.full!.dtype === "F32") w = layer.full!.data as Float32Array;
      else if (layer.full!.dtype === "BF16") {
        const u = Uint32Array.from(layer.full!.data as Uint16Array, (v) => v << 16);
        w = new Float32Array(u.buffer);
      } else w = Float32Array.from(new Float16Array(layer.full!.data.buffer as ArrayBuffer));
      cache.set(layer, w);
    }
    for (let t = 0; t < tokens; t++) {
      for (let r = 0; r < rows; r++) {
        let s = 0;
        for (let c = 0; c < cols; c++) s += w[r * cols + c]! * x[t * cols + c]!;
        out[t * rows + r] = s + (layer.bias?.[r] ?? 0);
      }
    }
  }
  rmsNorm(
    x: Float32Array,
    weight: Float32Array,
    rows: number,
    cols: number,
    eps: number,
    out: Float32Array,
  ): void {
    for (let t = 0; t < rows; t++) {
      let s = 0;
      for (let c = 0; c < cols; c++) s += x[t * cols + c]! ** 2;
      const k = 1 / Math.sqrt(s / cols + eps);
      for (let c = 0; c < cols; c++) out[t * cols + c] = x[t * cols + c]! * k * weight[c]!;
    }
  }
  layerNorm(
    x: Float32Array,
    weight: Float32Array | undefined,
    bias: Float32Array | undefined,
    rows: number,
    cols: number,
    eps: number,
    out: Float32Array,
  ): void {
    for (let t = 0; t < rows; t++) {
      let s = 0, q = 0;
      for (let c = 0; c < cols; c++) s += x[t * cols + c]!;
      const m = s / cols;
      for (let c = 0; c < cols; c++) q += (x[t * cols + c]! - m) ** 2;
      const k = 1 / Math.sqrt(q / cols + eps);
      for (let c = 0; c < cols; c++) {
        out[t * cols + c] = (x[t * cols + c]! - m) * k * (weight?.[c] ?? 1) + (bias?.[c] ?? 0);
      }
    }
  }
  attention(
    q: Float32Array,
    k: Float32Array,
    v: Float32Array,
    keyMask: Uint8Array | undefined,
    batch: number,
    tokens: number,
    heads: number,
    kvHeads: number,
    headSize: number,
    out: Float32Array,
  ): void {
    const scale = 1 / Math.sqrt(headSize), rep = heads / kvHeads;
    const p = new Float64Array(tokens);
    for (let b = 0; b < batch; b++) {
      for (let h = 0; h < heads; h++) {
        const g = Math.floor(h / rep);
        for (let i = 0; i < tokens; i++) {
          let max = -Infinity;
          for (let j = 0; j < tokens; j++) {
            let s = 0;
            for (let d = 0; d < headSize; d++) {
              s += q[((b * tokens + i) * heads + h) * headSize + d]! *
                k[((b * tokens + j) * kvHeads + g) * headSize + d]!;
            }
            p[j] = keyMask && keyMask[b * tokens + j] === 0 ? -Infinity : s * scale;
            if (p[j]! > max) max = p[j]!;
          }
          let z = 0;
          for (let j = 0; j < tokens; j++) z += p[j] = Math.exp(p[j]! - max);
          for (let d = 0; d < headSize; d++) {
            let s = 0;
            for (let j = 0; j < tokens; j++) s += p[j]! * v[((b * tokens + j) * kvHeads + g) * headSize + d]!;
            out[((b * tokens + i) * heads + h) * headSize + d] = s / z;
          }
        }
      }
    }
  }
  rotary(x: Float32Array, positions: Int32Array, heads: number, headSize: number, theta: number): void {
    const half = headSize / 2;
    for (let t = 0; t < positions.length; t++) {
      for (let h = 0; h < heads; h++) {
        const o = (t * heads + h) * headSize;
        for (let d = 0; d < half; d++) {
          const a = positions[t]! * theta ** (-d / half);
          const [c, s, u, w] = [Math.cos(a), Math.sin(a), x[o + d]!, x[o + d + half]!];
          x[o + d] = u * c - w * s;
          x[o + d + half] = w * c + u * s;
        }
      }
    }
  }
  siluMultiply(gate: Float32Array, up: Float32Array, out: Float32Array): void {
    for (let i = 0; i < out.length; i++) out[i] = gate[i]! / (1 + Math.exp(-gate[i]!)) * up[i]!;
  }
  silu(x: Float32Array, out: Float32Array): void {
    for (let i = 0; i < out.length; i++) out[i] = x[i]! / (1 + Math.exp(-x[i]!));
  }
  geluTanh(x: Float32Array, out: Float32Array): void {
    for (let i = 0; i < out.length; i++) {
      const v = x[i]!;
      out[i] = 0.5 * v * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (v + 0.044715 * v ** 3)));
    }
  }
  modulate(
    x: Float32Array,
    scale: Float32Array,
    shift: Float32Array,
    stride: number,
    batch: number,
    tokens: number,
    cols: number,
    out: Float32Array,
  ): void {
    for (let b = 0; b < batch; b++) {
      for (let t = 0; t < tokens; t++) {
        for (let c = 0; c < cols; c++) {
          const i = (b * tokens + t) * cols + c;
          out[i] = x[i]! * (1 + scale[b * stride + c]!) + shift[b * stride + c]!;
        }
      }
    }
  }
  gateAdd(
    residual: Float32Array,
    gate: Float32Array,
    x: Float32Array,
    stride: number,
    batch: number,
    tokens: number,
    cols: number,
    out: Float32Array,
  ): void {
    for (let b = 0; b < batch; b++) {
      for (let t = 0; t < tokens; t++) {
        for (let c = 0; c < cols; c++) {
          const i = (b * tokens + t) * cols + c;
          out[i] = residual[i]! + gate[b * stride + c]! * x[i]!;
        }
      }
    }
  }
  add(a: Float32Array, b: Float32Array, out: Float32Array): void {
    for (let i = 0; i < out.length; i++) out[i] = a[i]! + b[i]!;
  }
}
