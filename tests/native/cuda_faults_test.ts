import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { withCuda } from "../../lib/native/cuda/kernels.ts";
import { type Kernels, openKernels } from "../../lib/native/mod.ts";
import { CUDA_SIGNATURES, SIGNATURES } from "../../lib/native/signatures.ts";
import { dequantize, quantize } from "../../lib/quant/mod.ts";
import { IntegerProducts } from "../../lib/models/layers/integer_products.ts";
import { takesIntegers } from "../../lib/models/layers/int8.ts";
import { fitTwoLevel } from "../../lib/quant/packed/two_level.ts";
import { linear } from "../../lib/models/layers/linear.ts";
import { factorMoments } from "../../lib/quant/solvers/factored_moment.ts";
import { emptyMoments } from "../../lib/quant/solvers/moments.ts";
import { solveLayer } from "../../lib/quant/solvers/solve_layer.ts";
import { answered, device, E_MEMORY, LOST } from "./_cuda.ts";

/** Two levels of scales on a symmetric grid, and for given scales. */
function twoLevels(kernels: Kernels, weights: Float32Array, rows: number, cols: number): unknown[] {
  const grid = { bits: 3, groupSize: 16, zeroPoint: "symmetric", scaleBits: 8, solver: "round" } as const;
  const scales = new Float32Array(rows * cols / 16).fill(1), shape = { rows, cols, groupSize: 16 } as const;
  return [
    quantize(kernels, { data: weights, dtype: "F32" }, rows, cols, grid),
    fitTwoLevel(kernels, { ...shape, scaleBits: 4 }, scales, scales),
  ];
}

/** Calls of all kinds: with arrays for the call, constant ones, held ones, copies ahead; their results. */
function work(kernels: Kernels): unknown[] {
  const [rows, cols, tokens] = [5, 32, 3];
  const values = (count: number, step: number) =>
    Float32Array.from({ length: count }, (_, i) => Math.sin(step * i * i) * 0.1);
  const weights = kernels.arrays.constant(values(rows * cols, 1)), x = values(tokens * cols, 2);
  const packed = quantize(kernels, { data: weights, dtype: "F32" }, rows, cols, { bits: 4, groupSize: 16 });
  const moments = emptyMoments(cols, cols), out = new Float32Array(tokens * rows);
  for (let i = 0; i < cols; i++) moments.second[i * (cols + 1)] = 1 + i % 3;
  moments.tokens = moments.weight = tokens;
  const moment = factorMoments(kernels, moments);
  const problem = { bits: 2, groupSize: 16, zeroPoint: "real", weights, rows, cols, moment } as const;
  const coming = [3, 4].map((step) => kernels.arrays.constant(values(rows * cols, step)));
  kernels.arrays.open();
  kernels.arrays.ahead(0, coming.map((array) => ({ array, bytesRead: 0 })).values());
  kernels.arrays.hold(out, true);
  linear(kernels, { weights: packed, bias: undefined }, x, tokens, out);
  const held = kernels.arrays.release(out).slice();
  const products = new IntegerProducts(kernels, "model", "int8");
  const integers = [undefined, { scale: 0.001, zeroPoint: 100 }].map((grid) => {
    if (!takesIntegers(packed)) throw new Error("expected one level of scales");
    const layer = { name: "layer", weights: packed, bias: undefined };
    products.multiply(layer, packed, x, tokens, kernels.arrays.hold(out, true), { grid });
    return kernels.arrays.release(out).slice();
  });
  kernels.arrays.drop();
  const again = linear(kernels, { weights: { rows, cols, dtype: "F32", data: coming[1]! } }, x, tokens);
  return [
    [dequantize(kernels, packed), ...twoLevels(kernels, weights, rows, cols)],
    solveLayer(kernels, "feedback", problem),
    integers,
    held,
    again,
  ];
}

describe("faults of a device", () => {
  test("without memory from any call on, results are the CPU's and nothing stays allocated", async () => {
    using cuda = await device();
    if (cuda === undefined) return;
    using base = await openKernels({ backend: "cpu" });
    const whole = answered(cuda, () => undefined);
    const expected = work(withCuda({ ...base, close() {} }, whole.library));
    const lines = new Set<string>();
    for (let first = 1; first <= whole.count(); first++) {
      for (const last of [first, Infinity]) { // once, and for good
        const { library, buffers } = answered(
          cuda,
          (name, number) =>
            name !== "aq_cuda_free" && name !== "aq_cuda_create_stream" && !name.includes("load") &&
              number >= first && number <= last
              ? E_MEMORY
              : undefined,
        );
        const gpu = withCuda({ ...base, close() {} }, library, (line) => lines.add(line));
        const found = work(gpu);
        gpu.close();
        expect([first, last, found.slice(0, 3)]).toEqual([first, last, expected.slice(0, 3)]);
        for (const [at, most] of [[3, 1e-6], [4, 2e-5]] as const) {
          const [own, wanted] = [found[at], expected[at]] as [Float32Array, Float32Array];
          for (const [i, value] of own.entries()) expect(Math.abs(value - wanted[i]!)).toBeLessThan(most);
        }
        expect([first, last, buffers.size]).toEqual([first, last, 0]);
      }
    }
    expect([...lines].every((line) => /^cuda: no room on the device for \w+: the CPU does it$/.test(line)))
      .toBe(true);
    expect(lines.size).toBeGreaterThan(4);
  }, 240_000);

  test("a device that is lost at any call is an error that names the way out, and closes", async () => {
    using cuda = await device();
    if (cuda === undefined) return;
    using base = await openKernels({ backend: "cpu" });
    const whole = answered(cuda, () => undefined), kernels = withCuda({ ...base, close() {} }, whole.library);
    work(kernels);
    const calls = whole.count();
    kernels.close();
    expect(calls).toBeGreaterThan(30);
    for (let first = 1; first <= calls; first++) {
      const { library } = answered(cuda, (_, number) => number >= first ? LOST : undefined);
      let failure: unknown;
      try {
        const gpu = withCuda({ ...base, close() {} }, library);
        try {
          work(gpu);
        } finally {
          gpu.close();
        }
      } catch (error) {
        failure = error;
      }
      expect([first, (failure as Error)?.name, (failure as { status?: number })?.status]).toEqual([
        first,
        "KernelError",
        LOST,
      ]);
      expect((failure as Error).message).toMatch(/^Cannot go on with the GPU: .*--resume.*"cpu"/);
    }
  }, 240_000);
});

test("every function of the CUDA library has a caller in lib", () => {
  const lib = fileURLToPath(new URL("../../lib", import.meta.url));
  const generated = ["functions.ts", "signatures.ts"].map((name) => join(lib, "native", name));
  const text = readdirSync(lib, { recursive: true, encoding: "utf8" }).filter((name) => name.endsWith(".ts"))
    .map((name) => join(lib, name)).filter((path) => !generated.includes(path))
    .map((path) => readFileSync(path, "utf8")).join("\n");
  const without = Object.keys(CUDA_SIGNATURES).filter((name) => {
    const function_ = name.slice("aq_cuda_".length).replace(
      /_(\w)/g,
      (_, letter: string) => letter.toUpperCase(),
    );
    // by itself, or in place of the CPU's function of that name
    const isReplaced = name.replace("aq_cuda_", "aq_") in SIGNATURES &&
      new RegExp(`\\b${function_}\\b[(,]`).test(text);
    return !text.includes(`.${name}(`) && !isReplaced;
  });
  expect(without).toEqual([]);
});
