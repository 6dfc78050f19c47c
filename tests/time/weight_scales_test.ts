import { afterAll, describe, expect, test } from "bun:test";
import { dequantize, quantize } from "../../lib/quant/mod.ts";
import { timeWeightScales } from "../../lib/time/mod.ts";
import { allKernels, gaussians } from "../_kernels.ts";

const everywhere = await allKernels();
const { kernels } = everywhere[0]!;
afterAll(() => {
  for (const { kernels: each } of everywhere) each.close();
});

const ROWS = 5, COLS = 32;
const half = (values: Uint16Array<ArrayBuffer>) =>
  new Float16Array(values.buffer, values.byteOffset, values.length);

/** Inputs with a mean, their moments, and weights with codes. */
function layer(seed: number, groupSize: 0 | 16, zeroPoint: "real" | "symmetric") {
  const inputs = 200;
  const data = gaussians(seed, ROWS * COLS);
  const x = Float64Array.from(gaussians(seed + 100, inputs * COLS), (v, i) => v * (1 + i % COLS / 8) + 0.5);
  const second = new Float32Array(COLS * COLS);
  for (let i = 0; i < COLS; i++) {
    for (let j = 0; j < COLS; j++) {
      let sum = 0;
      for (let t = 0; t < inputs; t++) sum += x[t * COLS + i]! * x[t * COLS + j]!;
      second[i * COLS + j] = sum / inputs;
    }
  }
  const packed = quantize(kernels, { data, dtype: "F32" }, ROWS, COLS, { bits: 2, groupSize, zeroPoint });
  return { data, packed, moments: { second, mean: new Float32Array(COLS), samples: inputs }, x, inputs };
}

/** Mean squared error of a layer's outputs, input by input. */
function errorOf({ data, x, inputs }: ReturnType<typeof layer>, quantized: Float32Array): number {
  let sum = 0;
  for (let t = 0; t < inputs; t++) {
    for (let row = 0; row < ROWS; row++) {
      let y = 0;
      for (let k = 0; k < COLS; k++) {
        y += (data[row * COLS + k]! - quantized[row * COLS + k]!) * x[t * COLS + k]!;
      }
      sum += y * y / inputs;
    }
  }
  return sum;
}

describe("weight scales by time group", () => {
  test("lower the output's error at its own inputs, whatever the groups and zero points", () => {
    for (const groupSize of [0, 16] as const) {
      for (const zeroPoint of ["real", "symmetric"] as const) {
        const own = layer(3, groupSize, zeroPoint);
        const { scale, zeroPoint: zeros } = timeWeightScales(kernels, own.data, own.packed, [own.moments]);
        const before = errorOf(own, dequantize(kernels, own.packed));
        const after = errorOf(own, dequantize(kernels, { ...own.packed, scale, zeroPoint: zeros }));
        expect(after).toBeLessThan(0.99 * before);
        expect(zeros === undefined).toBe(zeroPoint === "symmetric");
      }
    }
  });

  test("no pair near the one found is better, where the group is the row", () => {
    const own = layer(5, 0, "real");
    const found = timeWeightScales(kernels, own.data, own.packed, [own.moments]);
    const at = (byScale: number, byZero: number) => {
      const scale = found.scale.slice(), zeroPoint = found.zeroPoint!.slice();
      for (let i = 0; i < ROWS; i++) {
        half(scale)[i] = half(scale)[i]! * byScale;
        half(zeroPoint)[i] = half(zeroPoint)[i]! + byZero;
      }
      return errorOf(own, dequantize(kernels, { ...own.packed, scale, zeroPoint }));
    };
    const least = at(1, 0);
    // The ridge keeps it a little short of the least squares.
    for (const [scale, zero] of [[1.1, 0], [0.9, 0], [1, 0.15], [1, -0.15]] as const) {
      expect(at(scale, zero)).toBeGreaterThan(least);
    }
  });

  test("a group's scales follow its own moments; twice the weights have twice the scales", () => {
    const own = layer(7, 0, "real"), other = layer(8, 0, "real");
    const both = timeWeightScales(kernels, own.data, own.packed, [own.moments, other.moments]);
    expect(both.scale.length).toBe(2 * ROWS);
    const alone = timeWeightScales(kernels, own.data, own.packed, [other.moments]);
    expect(both.scale.slice(ROWS)).toEqual(alone.scale);
    const twice = timeWeightScales(kernels, own.data.map((v) => 2 * v), own.packed, [own.moments]);
    for (let i = 0; i < ROWS; i++) {
      expect(Math.abs(half(twice.scale)[i]! / half(both.scale)[i]! - 2)).toBeLessThan(0.15);
    }
  });

  test("inputs that are always 0 leave what is stored", () => {
    const own = layer(9, 16, "real");
    const nothing = { ...own.moments, second: new Float32Array(COLS * COLS) };
    const { scale, zeroPoint } = timeWeightScales(kernels, own.data, own.packed, [nothing]);
    expect(scale).toEqual(own.packed.scale);
    const stored = half(own.packed.zeroPoint!);
    half(zeroPoint!).forEach((value, i) => expect(Math.abs(value - stored[i]!)).toBeLessThan(2e-3));
  });

  test("bad input", () => {
    const { data, packed, moments } = layer(11, 0, "real");
    expect(() => timeWeightScales(kernels, data.subarray(1), packed, [moments])).toThrow(TypeError);
    const short = { ...moments, second: new Float32Array(3) };
    expect(() => timeWeightScales(kernels, data, packed, [short])).toThrow("must be [32, 32], got 3");
    const broken = { ...moments, second: moments.second.map((v, i) => i === 4 ? NaN : v) };
    expect(() => timeWeightScales(kernels, data, packed, [broken])).toThrow("moments must be finite");
  });
});
