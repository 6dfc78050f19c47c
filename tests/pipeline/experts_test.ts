/** Experts stored as one tensor of three dimensions: quantized each for itself, dequantized to the same tensor. */
import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { EXPORT_FORMATS, exportCheckpoint, quantizeFor } from "../../lib/interop/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { dequantizeCheckpoint, quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { packedLayers } from "../../lib/quant/packed/checkpoint.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { gaussian, matrix, rejection, type TestTensor, workplace, writeCheckpoint } from "../_checkpoints.ts";
import { configOf } from "./_runs.ts";

const kernels = await openKernels(), place = workplace();
afterAll(() => {
  kernels.close();
  place.remove();
});

const E = 3, N = 20, K = 64, CONFIG = { model_type: "diffusion_gemma" };
const GATE = "model.layers.0.experts.gate_up_proj", DOWN = "model.layers.0.experts.down_proj.weight";
const stack = (rows: number, cols: number, seed: number): TestTensor => ({
  dtype: "F32",
  shape: [E, rows, cols],
  data: gaussian(E * rows * cols, seed),
});
const stacks = { [GATE]: stack(N, K, 1), [DOWN]: stack(K, 32, 2) };
const others = {
  "model.layers.0.router.proj.weight": matrix(E, K, gaussian(E * K, 3)),
  "model.layers.0.experts.gate_up_proj_bias": matrix(E, N, gaussian(E * N, 4)),
  "model.layers.0.conv.weight": { dtype: "F32", shape: [4, 4, 3], data: gaussian(48, 5) },
};
const input = writeCheckpoint(place.fresh("stacks"), { ...stacks, ...others }, CONFIG);
/** The same experts as matrices of their own. */
const apart = writeCheckpoint(
  place.fresh("apart"),
  Object.fromEntries(
    Object.entries(stacks).flatMap(([name, { shape: [, rows, cols], data }]) =>
      Array.from({ length: E }, (_, e) => [
        `${name.replace(/\.weight$/, "").replace("experts.", `experts.${e}.`)}.weight`,
        matrix(
          rows!,
          cols!,
          (data as Float32Array<ArrayBuffer>).slice(e * rows! * cols!, (e + 1) * rows! * cols!),
        ),
      ])
    ),
  ),
  CONFIG,
);

describe("experts in one tensor", () => {
  for (
    const [bits, overrides] of [[2, { scale_bits: 4, group_size: 16 }], [3, {
      zero_point: "integer",
      group_size: 32,
    }], [4, {}]] as const
  ) {
    test(`at ${bits} bits have the weights of experts apart, and come back as they were`, async () => {
      const config = configOf({ bit_width: bits, ...overrides });
      const [packed, packedApart] = [place.fresh(), place.fresh()];
      const report = await quantizeCheckpoint({ input, output: packed, kernels, config });
      await quantizeCheckpoint({ input: apart, output: packedApart, kernels, config });
      expect(
        report.layers.filter(({ action }) => action === "quantize").map(({ name, shape }) => [name, shape]),
      ).toEqual([
        [GATE, [E, N, K]],
        [DOWN, [E, K, 32]],
      ]);
      const [plain, plainApart] = [place.fresh(), place.fresh()];
      await dequantizeCheckpoint({ input: packed, output: plain, kernels });
      await dequantizeCheckpoint({ input: packedApart, output: plainApart, kernels });
      using whole = openCheckpoint(plain);
      using parts = openCheckpoint(plainApart);
      for (const [name, { shape }] of Object.entries(stacks)) {
        expect(whole.tensors.get(name)!.info).toMatchObject({ shape, dtype: "F32" });
        const all = whole.read(name), size = all.length / E;
        for (let e = 0; e < E; e++) {
          const own = `${name.replace(/\.weight$/, "").replace("experts.", `experts.${e}.`)}.weight`;
          expect(all.slice(e * size, (e + 1) * size)).toEqual(parts.read(own));
        }
      }
      for (const name of Object.keys(others)) {
        expect(whole.read(name)).toEqual(openCheckpoint(input).read(name));
      }
    });
  }

  test("readers see experts, rows and columns", async () => {
    const output = place.fresh(), config = configOf({ bit_width: 2, zero_point: "symmetric" });
    await quantizeCheckpoint({ input, output, kernels, config });
    using checkpoint = openCheckpoint(output);
    expect(packedLayers(checkpoint).get(GATE)).toMatchObject({ rows: E * N, cols: K, experts: E });
    expect([...new BigInt64Array(checkpoint.read(`${GATE}_shape`).buffer)]).toEqual([
      BigInt(E),
      BigInt(N),
      BigInt(K),
    ]);
    // compressed-tensors has no such tensor: its readers must not take the checkpoint for theirs
    expect(JSON.parse(readFileSync(join(output, "config.json"), "utf8")).quantization_config.quant_method)
      .toBe("arrowquant");
  });

  test("are kept for other programs, and refused by exports of a packed checkpoint", async () => {
    const output = place.fresh();
    const config = configOf({ bit_width: 4, target: "transformers", group_size: 32 });
    const { quantized } = await quantizeFor({ input: apartAndStacks(), output, kernels, config });
    expect(quantized.layers.find(({ name }) => name === GATE)).toMatchObject({
      action: "keep",
      reason: "target",
    });
    const packed = place.fresh(), format = EXPORT_FORMATS.find(({ name }) => name === "compressed-tensors")!;
    await quantizeCheckpoint({
      input,
      output: packed,
      kernels,
      config: configOf({ zero_point: "symmetric", group_size: 32 }),
    });
    const error = await rejection(
      exportCheckpoint({ input: packed, output: place.fresh(), format, kernels }),
    );
    expect([error.message, error.tensor]).toEqual([expect.stringContaining("experts in one tensor"), GATE]);
  });

  test("a NaN is named with its expert, row and column", async () => {
    const data = gaussian(E * N * K, 1);
    data[2 * N * K + 3 * K + 5] = NaN;
    const broken = writeCheckpoint(
      place.fresh("nan"),
      { [GATE]: { dtype: "F32", shape: [E, N, K], data } },
      CONFIG,
    );
    const error = await rejection(
      quantizeCheckpoint({ input: broken, output: place.fresh(), kernels, config: configOf() }),
    );
    expect(error.message).toContain("expert 2, row 3, column 5");
  });
});

/** Stacks and a matrix, for a target that holds the latter. */
function apartAndStacks(): string {
  return writeCheckpoint(place.fresh("both"), {
    ...stacks,
    "model.layers.0.self_attn.q_proj.weight": matrix(N, K, gaussian(N * K, 9)),
  }, CONFIG);
}
