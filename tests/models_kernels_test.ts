import { describe, expect, test } from "bun:test";
import {
  add,
  attention,
  gateAdd,
  geluTanh,
  layerNorm,
  linear,
  type Matrix,
  MAX_POSITION,
  modulate,
  rmsNorm,
  rotary,
  silu,
  siluMultiply,
  softmax,
} from "../lib/models/kernels.ts";
import { convertFloats, dequantize, quantize } from "../lib/quant/kernels.ts";
import { BIT_WIDTHS } from "../lib/quant/layout.ts";
import { allKernels, gaussians, randomStream } from "./_kernels.ts";

const everywhere = await allKernels();

/** Largest |actual − expected| in units of `unit(i)`; the expectation is in float64. */
function worst(actual: Float32Array, expected: ArrayLike<number>, unit: (i: number) => number): number {
  expect(actual.length).toBe(expected.length);
  let largest = 0;
  for (let i = 0; i < actual.length; i++) {
    const error = Math.abs(actual[i]! - expected[i]!) / unit(i);
    if (!(error <= largest)) largest = error; // NaN stays
  }
  return largest;
}

const EPSILON = 2 ** -24;

/** x wᵀ + bias in float64, and Σ|x w| + |bias| beside it. */
function linearReference(
  x: Float32Array,
  w: Float32Array,
  bias: Float32Array | undefined,
  tokens: number,
  rows: number,
  cols: number,
) {
  const out = new Float64Array(tokens * rows), size = new Float64Array(tokens * rows);
  for (let t = 0; t < tokens; t++) {
    for (let n = 0; n < rows; n++) {
      let sum = bias?.[n] ?? 0, magnitude = Math.abs(sum);
      for (let k = 0; k < cols; k++) {
        const term = x[t * cols + k]! * w[n * cols + k]!;
        sum += term;
        magnitude += Math.abs(term);
      }
      out[t * rows + n] = sum;
      size[t * rows + n] = magnitude;
    }
  }
  return { out, size };
}

const SHAPES = [[1, 3, 5], [2, 17, 33], [5, 33, 100], [36, 64, 160], [17, 35, 300], [1, 40, 513]] as const;

for (const { name, kernels } of everywhere) {
  describe(name, () => {
    test("linear layers of float32, half and bfloat16 weights", () => {
      for (const [tokens, rows, cols] of SHAPES) {
        const x = gaussians(1, tokens * cols), raw = gaussians(2, rows * cols), bias = gaussians(3, rows);
        for (const dtype of ["F32", "F16", "BF16"] as const) {
          const bytes = convertFloats(kernels, { data: raw, dtype: "F32" }, raw.length, dtype);
          const data = dtype === "F32" ? new Float32Array(bytes.buffer) : new Uint16Array(bytes.buffer);
          const exact = new Float32Array(
            convertFloats(kernels, { data, dtype }, raw.length, "F32").buffer,
          );
          for (const b of [undefined, bias]) {
            const out = linear(kernels, x, tokens, { rows, cols, dtype, data }, b);
            const { out: reference, size } = linearReference(x, exact, b, tokens, rows, cols);
            expect(worst(out, reference, (i) => (cols + 8) * EPSILON * size[i]!)).toBeLessThan(1);
          }
        }
      }
    });

    test("linear layers of packed weights", () => {
      for (const [tokens, rows, cols] of SHAPES) {
        const x = gaussians(4, tokens * cols), raw = gaussians(5, rows * cols), bias = gaussians(6, rows);
        for (const bits of BIT_WIDTHS) {
          for (const groupSize of [0, 16, 64] as const) {
            for (const zeroPoint of ["real", "symmetric"] as const) {
              const weights = quantize(kernels, { data: raw, dtype: "F32" }, rows, cols, {
                bits,
                groupSize,
                zeroPoint,
                solver: "round",
              });
              const out = linear(kernels, x, tokens, weights, bias);
              const exact = dequantize(kernels, weights);
              const { out: reference, size } = linearReference(x, exact, bias, tokens, rows, cols);
              expect(worst(out, reference, (i) => (cols + 8) * EPSILON * size[i]!)).toBeLessThan(1);
            }
          }
        }
      }
    });

    test("gives the same bytes for any number of threads and for fewer tokens", () => {
      const [tokens, rows, cols] = [130, 192, 900];
      const x = gaussians(7, tokens * cols), raw = gaussians(8, rows * cols);
      const dense: Matrix = { rows, cols, dtype: "F32", data: raw };
      const packed = quantize(kernels, { data: raw, dtype: "F32" }, rows, cols, { bits: 3 });
      for (const weights of [dense, packed]) {
        const one = linear(kernels, x, tokens, weights);
        for (const threads of [2, 3, 8]) {
          expect(linear(kernels, x, tokens, weights, undefined, { threads })).toEqual(one);
        }
        expect(linear(kernels, x.slice(7 * cols, 16 * cols), 9, weights)).toEqual(
          one.slice(7 * rows, 16 * rows),
        );
      }
    });

    test("norms and softmax", () => {
      for (const [rows, cols] of [[1, 1], [3, 5], [7, 33], [40, 100]] as const) {
        const x = gaussians(9, rows * cols), weight = gaussians(10, cols), bias = gaussians(11, cols);
        const rms = new Float64Array(x.length), layer = new Float64Array(x.length);
        const soft = new Float64Array(x.length);
        for (let r = 0; r < rows; r++) {
          const row = Array.from(x.subarray(r * cols, (r + 1) * cols));
          const mean = row.reduce((a, b) => a + b) / cols;
          const squares = row.reduce((a, b) => a + b * b, 0) / cols;
          const variance = row.reduce((a, b) => a + (b - mean) ** 2, 0) / cols;
          const total = row.reduce((a, b) => a + Math.exp(b), 0);
          row.forEach((v, i) => {
            rms[r * cols + i] = v / Math.sqrt(squares + Math.fround(1e-6)) * weight[i]!;
            layer[r * cols + i] = (v - mean) / Math.sqrt(variance + Math.fround(1e-5)) * weight[i]! +
              bias[i]!;
            soft[r * cols + i] = Math.exp(v) / total;
          });
        }
        const unit = (cols + 32) * EPSILON;
        expect(worst(rmsNorm(kernels, x, rows, cols, weight, 1e-6), rms, () => 4 * unit)).toBeLessThan(1);
        const layered = layerNorm(kernels, x, rows, cols, weight, bias, 1e-5);
        expect(worst(layered, layer, () => 8 * unit)).toBeLessThan(1);
        expect(worst(softmax(kernels, x, rows, cols), soft, () => unit)).toBeLessThan(1);
        expect(layerNorm(kernels, x, rows, cols, weight, bias, 1e-5, { out: x.slice(), threads: 3 })).toEqual(
          layered,
        );
        const own = x.slice();
        expect(layerNorm(kernels, own, rows, cols, weight, bias, 1e-5, { out: own })).toBe(own);
        expect(own).toEqual(layered);
      }
    });

    test("softmax of extreme rows", () => {
      const far = softmax(kernels, Float32Array.of(1e30, -1e30, 0, -Infinity), 1, 4);
      expect([...far]).toEqual([1, 0, 0, 0]);
      expect([...softmax(kernels, Float32Array.of(NaN, 1, 2), 1, 3)]).toEqual([NaN, NaN, NaN]);
      expect([...softmax(kernels, Float32Array.of(-Infinity, -Infinity), 1, 2)]).toEqual([NaN, NaN]);
    });

    test("attention with grouped heads, a mask and more keys than a block", () => {
      for (
        const [batch, tokens, heads, kvHeads, headSize, masked] of [
          [2, 36, 4, 2, 16, false],
          [3, 5, 1, 1, 3, true],
          [1, 300, 2, 1, 33, true],
          [2, 17, 6, 2, 72, false],
        ] as const
      ) {
        const random = randomStream(12);
        const q = gaussians(13, batch * tokens * heads * headSize);
        const k = gaussians(14, batch * tokens * kvHeads * headSize);
        const v = gaussians(15, batch * tokens * kvHeads * headSize);
        const keyMask = masked
          ? Uint8Array.from({ length: batch * tokens }, (_, i) => random() < 0.6 || i % tokens === 0 ? 1 : 0)
          : undefined;
        const reference = new Float64Array(q.length);
        for (let b = 0; b < batch; b++) {
          for (let h = 0; h < heads; h++) {
            const kv = Math.floor(h / (heads / kvHeads));
            const at = (t: number) => ((b * tokens + t) * heads + h) * headSize;
            const from = (t: number) => ((b * tokens + t) * kvHeads + kv) * headSize;
            for (let t = 0; t < tokens; t++) {
              const p = Array.from({ length: tokens }, (_, key) => {
                if (keyMask?.[b * tokens + key] === 0) return 0;
                let dot = 0;
                for (let i = 0; i < headSize; i++) dot += q[at(t) + i]! * k[from(key) + i]!;
                return Math.exp(dot / Math.sqrt(headSize));
              });
              const total = p.reduce((a, c) => a + c);
              p.forEach((weight, key) => {
                for (let i = 0; i < headSize; i++) {
                  reference[at(t) + i]! += weight / total * v[from(key) + i]!;
                }
              });
            }
          }
        }
        const shape = { batch, tokens, heads, kvHeads, headSize };
        const out = attention(kernels, q, k, v, shape, { keyMask });
        expect(worst(out, reference, () => 10 * (headSize + tokens) * EPSILON)).toBeLessThan(1);
        expect(attention(kernels, q, k, v, shape, { keyMask, threads: 3 })).toEqual(out);
      }
    });

    test("attention gives zeros where a batch item has no key", () => {
      const q = gaussians(16, 2 * 4 * 8);
      const out = attention(kernels, q, q, q, { batch: 2, tokens: 4, heads: 1, headSize: 8 }, {
        keyMask: Uint8Array.of(0, 0, 0, 0, 1, 0, 0, 0),
      });
      expect([...out.subarray(0, 32)].every((value) => value === 0)).toBe(true);
      expect([...out.subarray(40, 48)]).toEqual([...q.subarray(32, 40)]);
    });

    test("rotary embedding turns halves, in place, and keeps lengths", () => {
      const [rows, heads, headSize, theta] = [40, 3, 20, 10000];
      const x = gaussians(17, rows * heads * headSize);
      const positions = Int32Array.from({ length: rows }, (_, i) => i % 2 ? i : i * 20011 - 300000);
      const reference = new Float64Array(x.length);
      for (let r = 0; r < rows; r++) {
        for (let h = 0; h < heads; h++) {
          for (let i = 0; i < headSize / 2; i++) {
            const angle = positions[r]! * theta ** (-2 * i / headSize);
            const a = (r * heads + h) * headSize + i, b = a + headSize / 2;
            reference[a] = x[a]! * Math.cos(angle) - x[b]! * Math.sin(angle);
            reference[b] = x[b]! * Math.cos(angle) + x[a]! * Math.sin(angle);
          }
        }
      }
      const own = x.slice();
      expect(rotary(kernels, own, positions, heads, headSize, theta)).toBe(own);
      expect(worst(own, reference, () => 16 * EPSILON)).toBeLessThan(1);
      expect(rotary(kernels, x.slice(), positions, heads, headSize, theta, 3)).toEqual(own);
    });

    test("SiLU, GELU and their products", () => {
      const x = Float32Array.of(...gaussians(18, 100).map((v) => v * 5), 0, 80, -80, 1e30, -1e30);
      const b = gaussians(19, x.length);
      const sigmoid = (v: number) => 1 / (1 + Math.exp(-v));
      const size = (i: number) => 16 * EPSILON * (Math.abs(x[i]!) + 1) * Math.max(1, Math.abs(b[i]!));
      const expected = Float64Array.from(x, (v) => v * sigmoid(v));
      expect(worst(silu(kernels, x), expected, size)).toBeLessThan(1);
      const product = expected.map((v, i) => v * b[i]!);
      expect(worst(siluMultiply(kernels, x, b), product, size)).toBeLessThan(1);
      const gelu = Float64Array.from(
        x,
        (v) => v / 2 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (v + 0.044715 * v ** 3))),
      );
      expect(worst(geluTanh(kernels, x), gelu, size)).toBeLessThan(1);
      const own = x.slice();
      expect(siluMultiply(kernels, own, b, { out: own })).toEqual(siluMultiply(kernels, x, b));
      expect([...add(kernels, x, b)]).toEqual([...x].map((v, i) => Math.fround(v + b[i]!)));
    });

    test("modulation and gates read chunks of one tensor", () => {
      const [batch, tokens, cols] = [3, 5, 19];
      const x = gaussians(20, batch * tokens * cols), residual = gaussians(21, x.length);
      const chunks = gaussians(22, batch * 6 * cols);
      const shape = { batch, tokens, cols, stride: 6 * cols };
      const chunk = (i: number, which: number) =>
        chunks[Math.floor(i / (tokens * cols)) * 6 * cols + which * cols + i % cols]!;
      const modulated = Float64Array.from(x, (v, i) => v * (1 + chunk(i, 4)) + chunk(i, 3));
      const scale = chunks.subarray(4 * cols), shift = chunks.subarray(3 * cols);
      const unit = () => 40 * EPSILON;
      expect(worst(modulate(kernels, x, scale, shift, shape), modulated, unit)).toBeLessThan(1);
      const gated = Float64Array.from(x, (v, i) => residual[i]! + chunk(i, 5) * v);
      const own = residual.slice();
      gateAdd(kernels, own, chunks.subarray(5 * cols), x, shape, { out: own, threads: 2 });
      expect(worst(own, gated, unit)).toBeLessThan(1);
    });

    test("nothing in, nothing out", () => {
      const weights: Matrix = { rows: 2, cols: 3, dtype: "F32", data: new Float32Array(6) };
      expect(linear(kernels, new Float32Array(0), 0, weights).length).toBe(0);
      expect([...linear(
        kernels,
        new Float32Array(0),
        1,
        { rows: 2, cols: 0, dtype: "F32", data: new Float32Array(0) },
        Float32Array.of(3, 4),
      )]).toEqual([3, 4]);
      expect(softmax(kernels, new Float32Array(0), 0, 4).length).toBe(0);
      expect(silu(kernels, new Float32Array(0)).length).toBe(0);
      expect(
        attention(kernels, new Float32Array(0), new Float32Array(0), new Float32Array(0), {
          batch: 0,
          tokens: 4,
          heads: 2,
          headSize: 8,
        }).length,
      ).toBe(0);
    });
  });
}

describe("arguments", () => {
  const { kernels } = everywhere[0]!;
  const weights: Matrix = { rows: 2, cols: 3, dtype: "F32", data: new Float32Array(6) };

  test("sizes are checked before the kernel sees them", () => {
    expect(() => linear(kernels, new Float32Array(5), 2, weights)).toThrow(
      /x must be 6 float32 values, got 5/,
    );
    expect(() => linear(kernels, new Float32Array(3), 1, { ...weights, rows: 3 })).toThrow(
      /9 float32 values/,
    );
    expect(() => linear(kernels, new Float32Array(3), 1, weights, new Float32Array(3))).toThrow(
      /bias must be 2/,
    );
    expect(() => linear(kernels, new Float32Array(3), 1, weights, undefined, { out: new Float32Array(3) }))
      .toThrow(/out must be 2/);
    expect(() => linear(kernels, new Float32Array(3), -1, weights)).toThrow(RangeError);
    expect(() => linear(kernels, new Float32Array(3), 1, { ...weights, dtype: "F64" as never })).toThrow(
      /F32, F16 or BF16/,
    );
    expect(() => linear(kernels, new Float32Array(3), 1, { ...weights, dtype: "BF16" })).toThrow(/16-bit/);
    const packed = quantize(kernels, { data: new Float32Array(6), dtype: "F32" }, 2, 3, { bits: 4 });
    expect(() => linear(kernels, new Float32Array(3), 1, { ...packed, scale: new Uint16Array(1) })).toThrow(
      /scale must be 2/,
    );
    expect(() => linear(kernels, new Float32Array(3), 1, { ...packed, zeroPoint: undefined })).toThrow(
      /zero points/,
    );
    expect(() => silu(kernels, new Float64Array(3) as never)).toThrow(TypeError);
    expect(() => silu(kernels, new Float32Array(3), { threads: 65 })).toThrow(/1 to 64/);
    expect(() =>
      modulate(kernels, new Float32Array(12), new Float32Array(5), new Float32Array(6), {
        batch: 2,
        tokens: 2,
        cols: 3,
      })
    ).toThrow(/scale must be at least 6/);
  });

  test("heads and positions are checked", () => {
    const x = new Float32Array(8);
    expect(() => attention(kernels, x, x, x, { batch: 1, tokens: 1, heads: 4, kvHeads: 3, headSize: 2 }))
      .toThrow(/kvHeads must divide 4 heads/);
    expect(() => rotary(kernels, x, Int32Array.of(MAX_POSITION + 1), 1, 8, 1e4)).toThrow(/1048577/);
    expect(() => rotary(kernels, x, Int32Array.of(0), 8, 1, 1e4)).toThrow(/even/);
    expect(() => rotary(kernels, x, Int32Array.of(0), 1, 8, 0)).toThrow(/theta/);
  });
});
