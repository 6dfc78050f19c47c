import { afterAll, describe, expect, test } from "bun:test";
import { openGgml } from "../../../lib/bench/ggml.ts";
import { dequantize, quantize, unpackCodes } from "../../../lib/quant/mod.ts";
import type { TwoLevelTensor } from "../../../lib/quant/mod.ts";
import { symmetricLevels } from "../../../lib/quant/packed/symmetric_levels.ts";
import { allKernels, gaussians } from "../../_kernels.ts";

const every = await allKernels(), { kernels: first } = every[0]!;
afterAll(() => every.forEach(({ kernels }) => kernels.close()));

const half = (bits: number) => new Float16Array(Uint16Array.of(bits).buffer)[0]!;
const errorOf = (weights: Float32Array, found: Float32Array) =>
  Math.sqrt(
    weights.reduce((sum, w, i) => sum + (w - found[i]!) ** 2, 0) / weights.reduce((sum, w) => sum + w * w, 0),
  );

describe("symmetric grids of two levels", () => {
  const shapes = [[3, 16, 5, 512], [3, 32, 3, 300], [8, 16, 4, 256], [8, 64, 2, 700]] as const;
  const form = { zeroPoint: "symmetric", scaleBits: 8 } as const;

  test("are the same bytes on every backend and instruction set, and what the formula says", () => {
    for (const [bits, groupSize, rows, cols] of shapes) {
      const weights = gaussians(bits + cols, rows * cols), importance = gaussians(3, cols).map((v) => v * v);
      const from = { data: weights, dtype: "F32" } as const, options = { ...form, bits, groupSize };
      const tensors = every.map(({ kernels }) =>
        quantize(kernels, from, rows, cols, { ...options, columnWeights: importance }) as TwoLevelTensor
      );
      const { packed, subScale, subMin, superScale, superMin } = tensors[0]!;
      for (const other of tensors) {
        expect([other.packed, other.subScale, other.subMin, other.superScale, other.superMin])
          .toEqual([packed, subScale, subMin, superScale, superMin]);
      }
      const codes = unpackCodes(first, packed, rows, cols, bits), groups = Math.ceil(cols / groupSize);
      const supers = Math.ceil(cols / 256);
      expect(Math.max(...codes)).toBeLessThan(bits === 3 ? 8 : 64);
      const wanted = Float32Array.from(codes, (code, i) => {
        const row = Math.floor(i / cols), col = i % cols, group = row * groups + Math.floor(col / groupSize);
        const v = subScale[group]!, d = half(superScale[row * supers + Math.floor(col / 256)]!);
        // the zero point is 32, or 4, or 3 where the scale is turned round
        const zero = bits === 8 ? 32 : v === 0 ? 4 : subMin[group]! / v;
        expect(bits === 8 ? [32] : [3, 4]).toContain(zero);
        return d * v * (code - zero) + 0;
      });
      for (const { kernels } of every) {
        expect(dequantize(kernels, tensors[0]!).map((value) => value + 0)).toEqual(wanted);
      }
    }
  });

  test("find levels again that are whole steps of a half float, of either sign", () => {
    const scale = Float32Array.from(
      { length: 32 },
      (_, i) => (i % 3 === 0 ? -1 : 1) * ((i * 7) % 31 + 1) / 1024,
    );
    scale[5] = scale[20] = 31 / 1024;
    for (const { kernels } of every) {
      const shape = { rows: 2, cols: 256, bits: 3, groupSize: 16 } as const;
      const { levels } = symmetricLevels(kernels, shape, { scale });
      expect(Array.from(levels.subScale, (v, i) => (scale[i]! < 0 ? -v : v) / 1024)).toEqual([...scale]);
      expect(Array.from(levels.superScale, half)).toEqual([1 / 1024, 1 / 1024]);
    }
  });

  test("have at most the error of ggml's own Q3_K", async () => {
    const ggml = await openGgml();
    if ("reason" in ggml) return console.log(`skipped: ${ggml.reason}`);
    for (const power of [1, 3]) {
      const weights = gaussians(power, 16 * 1024).map((v) => v ** power),
        packed = new Uint8Array(weights.length);
      const theirs = new Float32Array(weights.length);
      ggml.quantize("q3_K", weights, packed, 16, 1024);
      ggml.dequantizeRow("q3_K", packed, theirs, weights.length);
      const own = quantize(first, { data: weights, dtype: "F32" }, 16, 1024, {
        ...form,
        bits: 3,
        groupSize: 16,
      });
      expect(errorOf(weights, dequantize(first, own))).toBeLessThan(errorOf(weights, theirs));
    }
    ggml.close();
  });

  test("refuse weights that no half float is a step for", () => {
    for (const { kernels } of every) {
      for (const [bits, size] of [[3, 4e7], [8, 4e7], [3, 3e38], [8, 3e38]] as const) {
        const data = gaussians(1, 256).map((v) => v * size / 4), from = { data, dtype: "F32" } as const;
        expect(() => quantize(kernels, from, 1, 256, { ...form, bits, groupSize: 16, solver: "round" }))
          .toThrow(
            /scales must be finite and fit half floats/,
          );
      }
    }
  });

  test("refuse bits, groups and zero points that they do not have", () => {
    const from = { data: new Float32Array(256), dtype: "F32" } as const;
    const bad = (options: object) => () =>
      quantize(first, from, 1, 256, { bits: 3, groupSize: 16, ...form, ...options });
    expect(bad({ bits: 4 })).toThrow(/bits with two-level scales of 8 bits must be one of 3, 8/);
    expect(bad({ zeroPoint: "real" })).toThrow(/zeroPoint/);
    expect(bad({ groupSize: 256 })).toThrow(/groupSize/);
    from.data[3] = NaN;
    expect(bad({})).toThrow(/NaN or infinite/);
  });
});
