import { afterAll, describe, expect, test } from "bun:test";
import { type BlockType, encodeBlocks } from "../../lib/interop/gguf/blocks.ts";
import { dequantize, quantize, type QuantizeOptions } from "../../lib/quant/mod.ts";
import { DECODERS } from "../../lib/tensor/gguf/blocks.ts";
import { ggmlType } from "../../lib/tensor/gguf/types.ts";
import { allKernels, gaussians } from "../_kernels.ts";

const every = await allKernels(), { kernels: first } = every[0]!;
afterAll(() => every.forEach(({ kernels }) => kernels.close()));

const symmetric = { zeroPoint: "symmetric" } as const, levels = { zeroPoint: "real" } as const;
/** Each type with grids that it holds, and columns that are no multiple of a superblock where it allows them. */
const GRIDS: readonly [type: BlockType, options: QuantizeOptions, cols: number][] = [
  ["Q2_0", { bits: 2, groupSize: 64, ...symmetric }, 320],
  ["Q2_0", { bits: 2, groupSize: 0, ...symmetric }, 192],
  ["Q4_0", { bits: 4, groupSize: 32, ...symmetric }, 288],
  ["Q4_0", { bits: 3, groupSize: 128, ...symmetric }, 256],
  ["Q4_0", { bits: 2, groupSize: 0, ...symmetric }, 96],
  ["Q4_1", { bits: 4, groupSize: 32, scaleBits: 16, ...levels }, 96],
  ["Q4_1", { bits: 3, groupSize: 64, scaleBits: 16, ...levels }, 320],
  ["Q8_0", { bits: 8, groupSize: 32, ...symmetric }, 288],
  ["Q2_K", { bits: 2, groupSize: 16, scaleBits: 4, ...levels }, 512],
  ["Q2_K", { bits: 2, groupSize: 128, scaleBits: 4, ...levels }, 256],
  ["Q3_K", { bits: 3, groupSize: 16, scaleBits: 8, ...symmetric }, 512],
  ["Q3_K", { bits: 3, groupSize: 64, scaleBits: 8, ...symmetric }, 768],
  ["Q4_K", { bits: 4, groupSize: 32, scaleBits: 6, ...levels }, 512],
  ["Q4_K", { bits: 2, groupSize: 64, scaleBits: 4, ...levels }, 256],
  ["Q6_K", { bits: 8, groupSize: 16, scaleBits: 8, ...symmetric }, 512],
  ["Q6_K", { bits: 8, groupSize: 32, scaleBits: 8, ...symmetric }, 256],
];
const ROWS = 9;

describe("blocks of ggml out of packed matrices", () => {
  test("decode to the packed weights, and are the same bytes on every backend", () => {
    for (const [type, options, cols] of GRIDS) {
      const data = gaussians(cols, ROWS * cols);
      data.fill(0, 0, cols); // a row of zeros
      data.fill(0, cols, cols + 32); // and a part of one
      const tensor = quantize(first, { data, dtype: "F32" }, ROWS, cols, options);
      const blocks = encodeBlocks(first, tensor, type), { weights, bytes } = ggmlType(type);
      const decoded = new Float32Array(ROWS * cols);
      for (let i = 0; i < decoded.length / weights; i++) {
        DECODERS[type]!(blocks, i * bytes, decoded, i * weights);
      }
      const wanted = dequantize(first, tensor), zero = type === "Q2_0" || type === "Q3_K" ? 0 : -0;
      // where a type has scales of the other sign, −0 + 0 = 0 makes zeros alike
      const bits = (values: Float32Array) => new Uint32Array(values.map((value) => value + zero).buffer);
      expect([type, bits(decoded)]).toEqual([type, bits(wanted)]);
      if (type === "Q3_K" || type === "Q6_K") {
        expect([type, ...decoded.subarray(0, cols).filter((value) => !Object.is(value, 0))]).toEqual([type]);
      }
      for (const { name, kernels } of every) {
        expect([name, Buffer.compare(encodeBlocks(kernels, tensor, type), blocks)]).toEqual([name, 0]);
      }
    }
  });

  test("are refused of a grid that the type does not have", () => {
    const data = gaussians(1, 2 * 256),
      of = (options: QuantizeOptions) => quantize(first, { data, dtype: "F32" }, 2, 256, options);
    const four = of({ bits: 4, groupSize: 16, zeroPoint: "symmetric" }), two = of({ bits: 2, scaleBits: 4 });
    expect(() => encodeBlocks(first, four, "Q4_0")).toThrow("Cannot store a matrix as Q4_0");
    expect(() => encodeBlocks(first, four, "Q8_0")).toThrow("Cannot store a matrix as Q8_0");
    expect(() => encodeBlocks(first, two, "Q3_K")).toThrow("Cannot store a matrix as Q3_K");
  });
});
