import { describe, expect, test } from "bun:test";
import { convertFloats } from "../../lib/quant/convert.ts";
import { dequantize } from "../../lib/quant/dequantize.ts";
import { quantize } from "../../lib/quant/quantize.ts";
import { unpackCodes } from "../../lib/quant/codes.ts";
import { addRows, chooseExperts, gatherRows, scaleRows } from "../../lib/native/functions.ts";
import { withThreads } from "../../lib/native/mod.ts";
import { attention, MAX_POSITION, rotary, timestepEmbedding } from "../../lib/models/layers/attention.ts";
import { add, gateAdd, geluTanh, modulate, silu, siluMultiply } from "../../lib/models/layers/elementwise.ts";
import {
  linearPackedInt8,
  quantizeActivations,
  type QuantizedActivations,
  roundActivations,
} from "../../lib/models/layers/int8.ts";
import { type ActivationGrid, activationGrid } from "../../lib/time/mod.ts";
import { linear, type Matrix } from "../../lib/models/layers/linear.ts";
import { layerNorm, rmsNorm } from "../../lib/models/layers/norms.ts";
import { patchify, unpatchify } from "../../lib/models/layers/patches.ts";
import { BIT_WIDTHS, type OneLevelTensor } from "../../lib/quant/packed/layout.ts";
import { allInt8Kernels, allKernels, gaussians, randomStream } from "../_kernels.ts";

const everywhere = await allKernels();
const int8Everywhere = await allInt8Kernels();

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
            const out = linear(kernels, { weights: { rows, cols, dtype, data }, bias: b }, x, tokens);
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
              const out = linear(kernels, { weights, bias }, x, tokens);
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
        const one = linear(kernels, { weights }, x, tokens);
        for (const threads of [2, 3, 8]) {
          expect(linear(withThreads(kernels, threads), { weights }, x, tokens)).toEqual(one);
        }
        expect(linear(kernels, { weights }, x.slice(7 * cols, 16 * cols), 9)).toEqual(
          one.slice(7 * rows, 16 * rows),
        );
      }
    });

    test("norms", () => {
      for (const [rows, cols] of [[1, 1], [3, 5], [7, 33], [40, 100]] as const) {
        const x = gaussians(9, rows * cols), weight = gaussians(10, cols), bias = gaussians(11, cols);
        const rms = new Float64Array(x.length), layer = new Float64Array(x.length);
        for (let r = 0; r < rows; r++) {
          const row = Array.from(x.subarray(r * cols, (r + 1) * cols));
          const mean = row.reduce((a, b) => a + b) / cols;
          const squares = row.reduce((a, b) => a + b * b, 0) / cols;
          const variance = row.reduce((a, b) => a + (b - mean) ** 2, 0) / cols;
          row.forEach((v, i) => {
            rms[r * cols + i] = v / Math.sqrt(squares + Math.fround(1e-6)) * weight[i]!;
            layer[r * cols + i] = (v - mean) / Math.sqrt(variance + Math.fround(1e-5)) * weight[i]! +
              bias[i]!;
          });
        }
        const unit = (cols + 32) * EPSILON;
        expect(worst(rmsNorm(kernels, x, { rows, cols, weight, epsilon: 1e-6 }), rms, () => 4 * unit)).toBeLessThan(1);
        const norm = { rows, cols, weight, bias, epsilon: 1e-5 };
        const layered = layerNorm(kernels, x, norm);
        expect(worst(layered, layer, () => 8 * unit)).toBeLessThan(1);
        expect(layerNorm(withThreads(kernels, 3), x, norm, x.slice())).toEqual(
          layered,
        );
        const own = x.slice();
        expect(layerNorm(kernels, own, norm, own)).toBe(own);
        expect(own).toEqual(layered);
      }
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
        const out = attention(kernels, { q, k, v, keyMask }, shape);
        expect(worst(out, reference, () => 10 * (headSize + tokens) * EPSILON)).toBeLessThan(1);
        expect(attention(withThreads(kernels, 3), { q, k, v, keyMask }, shape)).toEqual(out);
      }
    });

    test("attention gives zeros where a batch item has no key", () => {
      const q = gaussians(16, 2 * 4 * 8);
      const out = attention(
        kernels,
        { q, k: q, v: q, keyMask: Uint8Array.of(0, 0, 0, 0, 1, 0, 0, 0) },
        { batch: 2, tokens: 4, heads: 1, headSize: 8 },
      );
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
      expect(rotary(kernels, own, positions, { heads, headSize, theta })).toBe(own);
      expect(worst(own, reference, () => 16 * EPSILON)).toBeLessThan(1);
      expect(rotary(withThreads(kernels, 3), x.slice(), positions, { heads, headSize, theta })).toEqual(own);
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
      expect(siluMultiply(kernels, own, b, own)).toEqual(siluMultiply(kernels, x, b));
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
      expect(worst(modulate(kernels, x, { scale, shift }, shape), modulated, unit)).toBeLessThan(1);
      const gated = Float64Array.from(x, (v, i) => residual[i]! + chunk(i, 5) * v);
      const own = residual.slice();
      gateAdd(withThreads(kernels, 2), own, chunks.subarray(5 * cols), x, shape, own);
      expect(worst(own, gated, unit)).toBeLessThan(1);
    });

    test("nothing in, nothing out", () => {
      const weights: Matrix = { rows: 2, cols: 3, dtype: "F32", data: new Float32Array(6) };
      expect(linear(kernels, { weights }, new Float32Array(0), 0).length).toBe(0);
      const empty: Matrix = { rows: 2, cols: 0, dtype: "F32", data: new Float32Array(0) };
      const bias = Float32Array.of(3, 4);
      expect([...linear(kernels, { weights: empty, bias }, new Float32Array(0), 1)]).toEqual([3, 4]);
      expect(silu(kernels, new Float32Array(0)).length).toBe(0);
      expect(
        attention(
          kernels,
          { q: new Float32Array(0), k: new Float32Array(0), v: new Float32Array(0) },
          { batch: 0, tokens: 4, heads: 2, headSize: 8 },
        ).length,
      ).toBe(0);
    });
  });
}

/** Σ scale · (code − zero point) of both sides in float64, and Σ |terms| with code and zero point apart. */
function int8Reference(
  { tokens, cols, codes, scale, zeroPoint }: QuantizedActivations,
  weights: OneLevelTensor,
  wCodes: Uint8Array,
  bias: Float32Array | undefined,
) {
  const { rows, groupSize, bits } = weights;
  const groups = weights.scale.length / rows;
  const half = (bits: Uint16Array) => new Float16Array(bits.buffer, bits.byteOffset, bits.length);
  const wScale = half(weights.scale), wZero = weights.zeroPoint && half(weights.zeroPoint);
  const out = new Float64Array(tokens * rows), size = new Float64Array(tokens * rows);
  for (let t = 0; t < tokens; t++) {
    for (let n = 0; n < rows; n++) {
      let sum = bias?.[n] ?? 0, magnitude = Math.abs(sum);
      for (let k = 0; k < cols; k++) {
        const group = n * groups + (groupSize === 0 ? 0 : Math.floor(k / groupSize));
        const x = scale[t]! * (codes[t * cols + k]! - zeroPoint[t]!), s = wScale[group]!;
        const code = wCodes[n * cols + k]!, zero = wZero?.[group] ?? 2 ** (bits - 1);
        sum += x * s * (code - zero);
        magnitude += Math.abs(x * s) * (code + Math.abs(zero));
      }
      out[t * rows + n] = sum;
      size[t * rows + n] = magnitude;
    }
  }
  return { out, size };
}

const INT8_SHAPES = [[1, 1, 1], [1, 3, 31], [2, 17, 32], [3, 33, 33], [5, 31, 100], [36, 64, 160], [
  17,
  35,
  300,
], [
  1,
  40,
  4500,
]] as const;

describe("mixtures of experts", () => {
  for (const { name, kernels } of everywhere) {
    test(`${name}: a token's experts are those of the largest weights, of equals the first`, () => {
      for (const [rows, experts, perToken] of [[1, 1, 1], [5, 4, 2], [33, 64, 8], [3, 7, 7]] as const) {
        for (const bias of [null, gaussians(experts, experts).map((value) => 0.1 * value)]) {
          const logits = gaussians(rows, rows * experts).map((value, i) => i % 3 === 0 ? 1 : 5 * value);
          const expert = new Int32Array(rows * perToken), weight = new Float32Array(rows * perToken);
          chooseExperts(kernels, "choose", logits.slice(), bias, rows, experts, perToken, expert, weight);
          for (let row = 0; row < rows; row++) {
            const own = logits.subarray(row * experts, (row + 1) * experts), largest = Math.max(...own);
            const exponentials = Array.from(own, (value) => Math.exp(value - largest));
            const sum = exponentials.reduce((total, value) => total + value, 0);
            const weights = exponentials.map((value, e) => Math.fround(value / sum + (bias?.[e] ?? 0)));
            const wanted = [...weights.keys()].sort((a, b) => weights[b]! - weights[a]! || a - b).slice(0, perToken);
            const at = (of: ArrayLike<number>) => Array.from(of).slice(row * perToken, (row + 1) * perToken);
            expect(at(expert)).toEqual(wanted);
            for (const [k, value] of at(weight).entries()) {
              expect(Math.abs(value - weights[wanted[k]!]!)).toBeLessThanOrEqual(EPSILON * Math.abs(value));
            }
          }
        }
      }
      // Numbers of −∞ and NaN come last, each expert once still.
      const odd: (readonly [number[], number[], number[]])[] = [
        [[1, 1, 1, 1], [0, -Infinity, -Infinity, -Infinity], [0, 1, 2]],
        [[1, 1, 1, 1], [-Infinity, -Infinity, 0, -Infinity], [2, 0, 1]],
        [[1, 1, 1, 1], [NaN, -Infinity, 0, 1], [3, 2, 0]],
        [[1, NaN, 1, 1], [0, 0, 0, 0], [0, 1, 2]],
        [[-Infinity, -Infinity, -Infinity, -Infinity], [0, 0, 0, 0], [0, 1, 2]],
      ];
      for (const [logits, bias, wanted] of odd) {
        const expert = new Int32Array(3), weight = new Float32Array(3);
        const arrays = [Float32Array.from(logits), Float32Array.from(bias)] as const;
        chooseExperts(kernels, "choose", ...arrays, 1, 4, 3, expert, weight);
        expect([...expert]).toEqual(wanted);
      }
      const none = [new Int32Array(3), new Float32Array(3)] as const;
      expect(() => chooseExperts(kernels, "choose", new Float32Array(2), null, 1, 2, 3, ...none)).toThrow(/Cannot choose/);
    });

    test(`${name}: rows are gathered, scaled and added, and no place beyond them is taken`, () => {
      const x = Float32Array.of(1, 2, 3, 4, 5, 6), place = Int32Array.of(2, 0), out = new Float32Array(4);
      gatherRows(kernels, "take", x, place, 2, 3, 2, out);
      expect([...out]).toEqual([5, 6, 1, 2]);
      scaleRows(kernels, "scale", out, Float32Array.of(2, -1), 2, 2);
      expect([...out]).toEqual([10, 12, -1, -2]);
      addRows(kernels, "add", out, place, 2, 3, 2, x);
      expect([...x]).toEqual([0, 0, 3, 4, 15, 18]);
      for (const wrong of [-1, 3]) {
        place[1] = wrong;
        expect(() => gatherRows(kernels, "take", x, place, 2, 3, 2, out)).toThrow(/Cannot take/);
        expect(() => addRows(kernels, "add", out, place, 2, 3, 2, x)).toThrow(/Cannot add/);
      }
    });
  }
});

describe("8-bit activations", () => {
  const scalar = int8Everywhere.find(({ kernels }) => kernels.isa === "scalar")!.kernels;

  test("every backend and instruction set gives the same bytes, and those are right", () => {
    let seed = 100;
    for (const [tokens, rows, cols] of INT8_SHAPES) {
      for (const bits of BIT_WIDTHS) {
        for (const groupSize of [0, 16, 64, 128] as const) {
          const zeroPoint = seed % 3 === 0 ? "symmetric" : "real";
          const raw = gaussians(seed++, rows * cols), x = gaussians(seed++, tokens * cols);
          const bias = seed % 2 ? gaussians(seed++, rows) : undefined;
          const weights = quantize(scalar, { data: raw, dtype: "F32" }, rows, cols, {
            bits,
            groupSize,
            zeroPoint,
            solver: "round",
          });
          const activations = quantizeActivations(scalar, x, tokens, cols);
          const expected = linearPackedInt8(scalar, { weights, bias }, activations);
          const codes = unpackCodes(scalar, weights.packed, rows, cols, bits);
          const { out, size } = int8Reference(activations, weights, codes, bias);
          expect(worst(expected, out, (i) => (cols / 16 + 8) * EPSILON * (size[i]! + 1e-30))).toBeLessThan(1);
          for (const { kernels } of int8Everywhere) {
            expect(quantizeActivations(kernels, x, tokens, cols)).toEqual(activations);
            expect(linearPackedInt8(kernels, { weights, bias }, activations)).toEqual(expected);
          }
        }
      }
    }
  });

  test("rows longer than 65536 columns do not overflow, at the ends of both ranges", () => {
    const [tokens, rows, cols] = [3, 2, 70_000];
    const packed = new Uint32Array(rows * cols / 4).fill(0xffffffff);
    const weights: OneLevelTensor = {
      rows,
      cols,
      bits: 8,
      groupSize: 0,
      zeroPointKind: "real",
      packed,
      scale: new Uint16Array(rows).fill(0x3c00),
      zeroPoint: new Uint16Array(rows),
    };
    const activations: QuantizedActivations = {
      tokens,
      cols,
      bits: 8,
      codes: new Uint8Array(tokens * cols).fill(255).fill(0, 2 * cols),
      scale: Float32Array.of(1, 1, 1),
      zeroPoint: Int32Array.of(0, 128, 255),
    };
    const exact = [255, 127, -255].flatMap((x) => [x * 255 * cols, x * 255 * cols]);
    const wanted = linearPackedInt8(scalar, { weights }, activations);
    wanted.forEach((value, i) => expect(Math.abs(value / exact[i]! - 1)).toBeLessThan(1e-5));
    for (const { kernels } of int8Everywhere) {
      expect(linearPackedInt8(kernels, { weights }, activations)).toEqual(wanted);
    }
  });

  for (const { name, kernels } of int8Everywhere) {
    test(`${name}: a token's own range keeps every value within half a step, at every width`, () => {
      for (const cols of [1, 31, 32, 33, 257]) {
        for (const bits of [2, 3, 4, 5, 6, 7, 8]) {
          const tokens = 4, x = gaussians(cols + bits, tokens * cols);
          x.fill(0, 0, cols); // a token of zeros
          for (let i = cols; i < 2 * cols; i++) x[i] = Math.abs(x[i]!) + 1; // zero is not among it
          const out = quantizeActivations(kernels, x, tokens, cols, { bits });
          for (let i = 0; i < x.length; i++) {
            const t = Math.floor(i / cols), s = out.scale[t]!;
            const back = s * (out.codes[i]! - out.zeroPoint[t]!);
            expect(Math.abs(back - x[i]!)).toBeLessThanOrEqual(s * 0.50001);
            expect(out.codes[i]! < 2 ** bits).toBe(true);
          }
          expect(quantizeActivations(withThreads(kernels, 3), x, tokens, cols, { bits })).toEqual(out);
        }
      }
    });

    test(`${name}: a static grid clips what lies beyond it, rounds ties to even`, () => {
      const x = Float32Array.of(-100, -1.5, -0.5, 0, 0.5, 1.5, 2.5, 100, 3e38, -3e38);
      const grid = { scale: 1, zeroPoint: 8 };
      const one = quantizeActivations(kernels, x, 1, x.length, { bits: 4, grid });
      expect([...one.codes]).toEqual([0, 6, 8, 8, 8, 10, 10, 15, 15, 0]);
      const grids = [grid, { scale: 0.5, zeroPoint: 0 }];
      const two = quantizeActivations(kernels, x, 2, 5, { bits: 4, grid: grids });
      expect([...two.codes]).toEqual([0, 6, 8, 8, 8, 3, 5, 15, 15, 0]);
      expect([[...two.scale], [...two.zeroPoint]]).toEqual([[1, 0.5], [8, 0]]);
      const again = quantizeActivations(kernels, x, 2, 5, { bits: 4, grid: grids, out: two });
      expect(again).toBe(two);
    });

    test(`${name}: activations that stay float32 have the values of their codes, or of the narrowest range's`, () => {
      /** `activationGrid` and codes in float64, where a float32 quotient is rounded but once. */
      const reference = (x: Float32Array, { scale, zeroPoint }: ActivationGrid, bits: number) =>
        x.map((value) => {
          const position = Math.fround(value / scale), whole = Math.floor(position), part = position - whole;
          const nearest = part > 0.5 || (part === 0.5 && whole % 2 !== 0) ? whole + 1 : whole;
          const code = Math.min(Math.max(nearest + zeroPoint, 0), 2 ** bits - 1);
          return scale * (code - zeroPoint);
        });
      for (const cols of [1, 31, 32, 33, 257]) {
        for (const bits of [4, 8] as const) {
          const tokens = 7, x = gaussians(cols + bits, tokens * cols), token = (t: number) => x.subarray(t * cols, (t + 1) * cols);
          token(0).fill(0);
          token(1).forEach((value, i, own) => own[i] = Math.abs(value) + 1);
          token(2).forEach((value, i, own) => own[i] = -Math.abs(value));
          token(3).forEach((value, i, own) => own[i] = i % 5 === 4 ? -1e-4 : Math.abs(value)); // almost on one side
          token(4).forEach((value, i, own) => own[i] = i % 5 === 4 ? 1e-4 : -Math.abs(value));
          token(5).forEach((_, i, own) => own[i] = i % 2 === 0 ? 1e-44 : -1e-40);
          const grid = { scale: Math.fround(0.3), zeroPoint: bits };
          const out = roundActivations(kernels, x, tokens, { bits, grid }, new Float32Array(x.length));
          expect(out).toEqual(reference(x, grid, bits));
          const own = roundActivations(kernels, x, tokens, { bits }, x.slice());
          for (let t = 0; t < tokens; t++) {
            const range = activationGrid(Math.min(0, ...token(t)), Math.max(0, ...token(t)), bits);
            expect(own.subarray(t * cols, (t + 1) * cols)).toEqual(reference(token(t), range, bits));
          }
          expect(roundActivations(withThreads(kernels, 3), x, tokens, { bits }, x.slice())).toEqual(own);
          x[3] = NaN;
          expect(() => roundActivations(kernels, x, tokens, { bits }, out)).toThrow(/NaN or infinity/);
        }
      }
    });

    test(`${name}: NaN and infinity are refused`, () => {
      for (const bad of [NaN, Infinity, -Infinity]) {
        for (const at of [0, 32, 36]) {
          const x = gaussians(7, 37);
          x[at] = bad;
          expect(() => quantizeActivations(kernels, x, 1, 37)).toThrow(/NaN or infinity/);
          expect(() => quantizeActivations(kernels, x, 1, 37, { grid: { scale: 1, zeroPoint: 0 } })).toThrow(
            /NaN or infinity/,
          );
        }
      }
    });

    test(`${name}: the same bytes for any number of threads, for a token alone, and nothing behind the end`, () => {
      const [tokens, rows, cols] = [70, 193, 900];
      const x = gaussians(8, tokens * cols), raw = gaussians(9, rows * cols);
      const weights = quantize(kernels, { data: raw, dtype: "F32" }, rows, cols, { bits: 3 });
      const activations = quantizeActivations(kernels, x, tokens, cols);
      const buffer = new Float32Array(tokens * rows + 16).fill(1234.5);
      const one = linearPackedInt8(kernels, { weights }, activations, buffer.subarray(0, tokens * rows));
      expect([...buffer.subarray(tokens * rows)]).toEqual(new Array(16).fill(1234.5));
      for (const threads of [2, 3, 8]) {
        expect(linearPackedInt8(withThreads(kernels, threads), { weights }, activations)).toEqual(one.slice());
      }
      const alone = quantizeActivations(kernels, x.slice(5 * cols, 6 * cols), 1, cols);
      expect(linearPackedInt8(kernels, { weights }, alone)).toEqual(one.slice(5 * rows, 6 * rows));
    });

    test(`${name}: nothing in, nothing out`, () => {
      const none = quantizeActivations(kernels, new Float32Array(0), 0, 5);
      expect(none.codes.length).toBe(0);
      const weights = quantize(kernels, { data: new Float32Array(10), dtype: "F32" }, 2, 5, { bits: 4 });
      expect(linearPackedInt8(kernels, { weights }, none).length).toBe(0);
      const empty = quantize(kernels, { data: new Float32Array(0), dtype: "F32" }, 2, 0, { bits: 4 });
      const bare = quantizeActivations(kernels, new Float32Array(0), 1, 0);
      expect([...linearPackedInt8(kernels, { weights: empty, bias: Float32Array.of(3, 4) }, bare)]).toEqual([3, 4]);
    });
  }

  test("arguments are checked before the kernel sees them", () => {
    const x = new Float32Array(6);
    const quantized = (options: object) => () => quantizeActivations(scalar, x, 2, 3, options);
    expect(() => quantizeActivations(scalar, x, 2, 4)).toThrow(/x must be 8 float32 values, got 6/);
    expect(quantized({ bits: 9 })).toThrow(/2 to 8, got 9/);
    expect(quantized({ bits: 1.5 })).toThrow(RangeError);
    expect(quantized({ grid: { scale: 0, zeroPoint: 0 } })).toThrow(/at least 2\^-126, got 0/);
    expect(quantized({ grid: { scale: NaN, zeroPoint: 0 } })).toThrow(RangeError);
    expect(quantized({ grid: { scale: 1e39, zeroPoint: 0 } })).toThrow(RangeError);
    expect(quantized({ grid: { scale: 1, zeroPoint: 16 }, bits: 4 })).toThrow(/from 0 to 15, got 16/);
    expect(quantized({ grid: { scale: 1, zeroPoint: 0.5 } })).toThrow(/whole number/);
    expect(quantized({ grid: [{ scale: 1, zeroPoint: 0 }] })).toThrow(
      /2 tokens must have parameters each, got 1/,
    );
    const activations = quantizeActivations(scalar, x, 2, 3);
    expect(quantized({ bits: 4, out: activations })).toThrow(/of 4 bits, got 2 × 3 of 8/);
    const weights = quantize(scalar, { data: x, dtype: "F32" }, 2, 3, { bits: 4 });
    const product = (change: object, of: object = {}) => () =>
      linearPackedInt8(scalar, { weights: { ...weights, ...of } }, { ...activations, ...change });
    expect(product({ codes: new Uint8Array(5) })).toThrow(/codes must be 6 bytes, got 5/);
    expect(product({ scale: new Float64Array(2) })).toThrow(TypeError);
    expect(product({ zeroPoint: Int32Array.of(0, 256) })).toThrow(/0 to 255, got 256/);
    expect(product({ zeroPoint: Int32Array.of(-1, 0) })).toThrow(RangeError);
    expect(product({ cols: 2, codes: new Uint8Array(4) })).toThrow(/must have 3 columns, got 2/);
    expect(product({}, { scale: new Uint16Array(1) })).toThrow(/scale must be 2/);
    expect(() => linearPackedInt8(scalar, { weights, bias: new Float32Array(3) }, activations)).toThrow(
      /bias must be 2/,
    );
    const full = { rows: 2, cols: 3, dtype: "F32", data: x } as never;
    expect(() => linearPackedInt8(scalar, { weights: full }, activations)).toThrow(/must be packed/);
    const two = quantize(scalar, { data: x, dtype: "F32" }, 2, 3, { bits: 2, scaleBits: 4 }) as never;
    expect(() => linearPackedInt8(scalar, { weights: two }, activations)).toThrow(/must have one level of scales/);
  });
});

describe("images", () => {
  for (const { name, kernels } of everywhere.filter(({ kernels }) => /scalar|simd128/.test(kernels.isa))) {
    test(`${name}: patches are rows of channel, line and column, and tokens put together have channels last`, () => {
      const shape = { batch: 2, channels: 3, height: 6, width: 4, patch: 2 };
      const images = gaussians(30, 2 * 3 * 6 * 4), tokens = patchify(kernels, images, shape);
      const back = unpatchify(kernels, images, shape);
      let at = 0;
      for (let b = 0; b < 2; b++) {
        for (let y = 0; y < 3; y++) {
          for (let x = 0; x < 2; x++) {
            for (let i = 0; i < 12; i++, at++) {
              const pixel = (c: number, p: number, q: number) =>
                ((b * 3 + c) * 6 + y * 2 + p) * 4 + x * 2 + q;
              expect(tokens[at]).toBe(images[pixel(Math.floor(i / 4), Math.floor(i / 2) % 2, i % 2)]!);
              expect(back[pixel(i % 3, Math.floor(i / 6), Math.floor(i / 3) % 2)]).toBe(images[at]!);
            }
          }
        }
      }
      expect(patchify(withThreads(kernels, 3), images, shape)).toEqual(tokens);
      expect(() => patchify(kernels, images, { ...shape, patch: 4 })).toThrow(/must divide 6 × 4/);
      expect(() => unpatchify(kernels, images, { ...shape, patch: 0 })).toThrow(RangeError);
      expect(() => patchify(kernels, images, { ...shape, batch: 3 })).toThrow(/images must be 216/);
      expect(patchify(kernels, new Float32Array(0), { ...shape, batch: 0 }).length).toBe(0);
    });

    test(`${name}: timesteps are embedded as diffusers does`, () => {
      const timesteps = [0, 1, 37.5, 999];
      for (const [channels, flipSinToCos, downscaleFreqShift] of [[256, true, 1], [7, false, 0]] as const) {
        const out = timestepEmbedding(kernels, timesteps, channels, { flipSinToCos, downscaleFreqShift });
        const half = Math.floor(channels / 2);
        const expected = timesteps.flatMap((t) => {
          const angles = Array.from(
            { length: half },
            (_, i) => t * 10_000 ** (-i / (half - downscaleFreqShift)),
          );
          const sines = angles.map(Math.sin), cosines = angles.map(Math.cos);
          const row = flipSinToCos ? [...cosines, ...sines] : [...sines, ...cosines];
          return channels % 2 ? [...row, 0] : row;
        });
        // a float32 angle: an exponent near 9 and the angle near 999 are each rounded to 2^-24 of themselves
        expect(worst(out, expected, (i) => (12 * timesteps[Math.floor(i / channels)]! + 2) * EPSILON))
          .toBeLessThan(1);
      }
      expect(() => timestepEmbedding(kernels, [NaN], 4)).toThrow(/timesteps must be within/);
      expect(() => timestepEmbedding(kernels, [2e6], 4)).toThrow(RangeError);
      expect(() => timestepEmbedding(kernels, [1], 2)).toThrow(/less than 1, half the channels, got 1/);
      expect(() => timestepEmbedding(kernels, [1], 4, { maxPeriod: 0 })).toThrow(/maxPeriod/);
      expect(timestepEmbedding(kernels, [], 4).length).toBe(0);
    });
  }
});

describe("arguments", () => {
  const { kernels } = everywhere[0]!;
  const weights: Matrix = { rows: 2, cols: 3, dtype: "F32", data: new Float32Array(6) };

  test("sizes are checked before the kernel sees them", () => {
    expect(() => linear(kernels, { weights }, new Float32Array(5), 2)).toThrow(
      /x must be 6 float32 values, got 5/,
    );
    expect(() => linear(kernels, { weights: { ...weights, rows: 3 } }, new Float32Array(3), 1)).toThrow(
      /9 float32 values/,
    );
    expect(() => linear(kernels, { weights, bias: new Float32Array(3) }, new Float32Array(3), 1)).toThrow(
      /bias must be 2/,
    );
    expect(() => linear(kernels, { weights }, new Float32Array(3), 1, new Float32Array(3)))
      .toThrow(/out must be 2/);
    expect(() => linear(kernels, { weights }, new Float32Array(3), -1)).toThrow(RangeError);
    expect(() => linear(kernels, { weights: { ...weights, dtype: "F64" as never } }, new Float32Array(3), 1)).toThrow(
      /F32, F16 or BF16/,
    );
    expect(() => linear(kernels, { weights: { ...weights, dtype: "BF16" } }, new Float32Array(3), 1)).toThrow(/16-bit/);
    const packed = quantize(kernels, { data: new Float32Array(6), dtype: "F32" }, 2, 3, { bits: 4 });
    expect(() => linear(kernels, { weights: { ...packed, scale: new Uint16Array(1) } }, new Float32Array(3), 1)).toThrow(
      /scale must be 2/,
    );
    expect(() => linear(kernels, { weights: { ...packed, zeroPoint: undefined } }, new Float32Array(3), 1)).toThrow(
      /zero points/,
    );
    expect(() => silu(kernels, new Float64Array(3) as never)).toThrow(TypeError);
    expect(() =>
      modulate(kernels, new Float32Array(12), { scale: new Float32Array(5), shift: new Float32Array(6) }, {
        batch: 2,
        tokens: 2,
        cols: 3,
      })
    ).toThrow(/scale must be at least 6/);
  });

  test("heads and positions are checked", () => {
    const x = new Float32Array(8);
    expect(() => attention(kernels, { q: x, k: x, v: x }, { batch: 1, tokens: 1, heads: 4, kvHeads: 3, headSize: 2 }))
      .toThrow(/kvHeads must divide 4 heads/);
    expect(() => rotary(kernels, x, Int32Array.of(MAX_POSITION + 1), { heads: 1, headSize: 8, theta: 1e4 })).toThrow(/1048577/);
    expect(() => rotary(kernels, x, Int32Array.of(0), { heads: 8, headSize: 1, theta: 1e4 })).toThrow(/even/);
    expect(() => rotary(kernels, x, Int32Array.of(0), { heads: 1, headSize: 8, theta: 0 })).toThrow(/theta/);
  });
});
