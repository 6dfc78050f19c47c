import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { type Ggml, openGgml } from "../../lib/bench/ggml.ts";
import { relativeDifference } from "../../lib/bench/kernels/cases.ts";
import { gaussianWeights } from "../../lib/bench/random.ts";

const ROWS = 64, COLS = 1024;

describe("ggml over FFI", () => {
  let ggml: Ggml | undefined;

  beforeAll(async () => {
    const opened = await openGgml();
    if ("reason" in opened) console.log(`skipped: tests of ggml: ${opened.reason}`);
    else ggml = opened;
  });
  afterAll(() => ggml?.close());

  const weights = gaussianWeights(ROWS * COLS, 7);
  const packed = new Uint8Array(weights.length * 2);
  const restored = new Float32Array(weights.length);

  test("q8_0 gives the weights back to 1 %, in 8.5 bits a weight", () => {
    if (!ggml) return;
    const bytes = ggml.quantize("q8_0", weights, packed, ROWS, COLS);
    expect(bytes).toBe(weights.length * 34 / 32);
    ggml.dequantizeRow("q8_0", packed, restored, weights.length);
    const error = relativeDifference(restored, weights);
    expect(error).toBeGreaterThan(0.001);
    expect(error).toBeLessThan(0.01);
  });

  test("q4_0 is coarser than q4_K, which has the same size", () => {
    if (!ggml) return;
    const errors = (["q4_0", "q4_K"] as const).map((type) => {
      expect(ggml!.quantize(type, weights, packed, ROWS, COLS)).toBe(weights.length * 18 / 32);
      ggml!.dequantizeRow(type, packed, restored, weights.length);
      return relativeDifference(restored, weights);
    });
    expect(errors[0]!).toBeGreaterThan(errors[1]!);
    expect(errors[0]!).toBeLessThan(0.12);
  });

  test("the vectorized q8_0 writes blocks that the plain one reads", () => {
    if (!ggml) return;
    packed.fill(0);
    ggml.quantizeRowSimd("q8_0", weights, packed, weights.length);
    ggml.dequantizeRow("q8_0", packed, restored, weights.length);
    expect(relativeDifference(restored, weights)).toBeLessThan(0.01);
  });

  test("converts halves as a Float16Array does", () => {
    if (!ggml) return;
    const halves = new Float16Array([0, -0, 1.5, -65504, 6e-8, Infinity]);
    const out = new Float32Array(halves.length);
    for (const conversion of ["base f16 to f32", "simd f16 to f32"] as const) {
      out.fill(7);
      ggml.convert(conversion, new Uint16Array(halves.buffer), out, halves.length);
      expect([...out]).toEqual([...halves]);
    }
  });
});
