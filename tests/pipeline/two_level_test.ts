import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { CheckpointError, FormatError, InterruptedError, WeightsError } from "../../lib/errors.ts";
import { diffusionGenerate, loadDream } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import {
  dequantizeCheckpoint,
  quantizeCheckpoint,
  readManifest,
  verifyFiles,
} from "../../lib/pipeline/mod.ts";
import { dequantize } from "../../lib/quant/mod.ts";
import { packedLayers, readPackedTensor } from "../../lib/quant/packed/checkpoint.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import {
  gaussian,
  matrix,
  MODELS,
  type TestTensor,
  workplace,
  writeCheckpoint,
  writeTensors,
} from "../_checkpoints.ts";
import { relativeError } from "../_reference.ts";
import { readIndependently, thrown } from "../tensor/_files.ts";

const DREAM = join(MODELS, "dream-mini");
const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});

const [ROWS, COLS] = [45, 600];
const input = writeCheckpoint(place.fresh("input"), {
  "a.weight": matrix(ROWS, COLS, gaussian(ROWS * COLS, 1)),
  "b.weight": matrix(7, 40, gaussian(280, 2)),
});

const configOf = (overrides: object) =>
  resolveConfig({ overrides: { solver: "clip", bit_width: 2, scale_bits: 4, ...overrides } }).config;

/** The input quantized; once for each configuration. */
const outputs = new Map<string, Promise<string>>();
function packed(overrides: object = {}, from = input): Promise<string> {
  const key = JSON.stringify([overrides, from]);
  const made = outputs.get(key) ?? (async () => {
    const output = place.fresh();
    await quantizeCheckpoint({ kernels, input: from, output, config: configOf(overrides) });
    return output;
  })();
  outputs.set(key, made);
  return made;
}

/** Code `index` of a little-endian bit stream, bit by bit. */
function bitsAt(stream: Uint8Array, start: number, index: number, bits: number): number {
  let code = 0;
  for (let b = 0; b < bits; b++) {
    const at = index * bits + b;
    code += ((stream[start + (at >> 3)]! >> (at & 7)) & 1) << b;
  }
  return code;
}

describe("a checkpoint with two-level scales", () => {
  test("holds the entries of docs/format.md, from which its weights can be computed", async () => {
    for (const [bits, scaleBits, groupSize] of [[2, 4, 16], [3, 6, 32], [4, 6, 128], [8, 4, 64]] as const) {
      const folder = await packed({ bit_width: bits, scale_bits: scaleBits, group_size: groupSize });
      const { tensors } = readIndependently(join(folder, "model.safetensors"));
      const groups = Math.ceil(COLS / groupSize), supers = 3, subBytes = Math.ceil(groups * scaleBits / 8);
      const words = Math.ceil(COLS * bits / 32);
      const of = (suffix: string) => tensors[`a.weight_${suffix}`]!;
      const wanted: [string, string, number[]][] = [
        ["packed", "I32", [ROWS, words]],
        ["sub_scale", "U8", [ROWS, subBytes]],
        ["sub_min", "U8", [ROWS, subBytes]],
        ["super_scale", "F16", [ROWS, supers]],
        ["super_min", "F16", [ROWS, supers]],
        ["shape", "I64", [2]],
      ];
      expect(Object.keys(tensors).filter((name) => name.startsWith("a."))).toEqual(
        wanted.map(([suffix]) => `a.weight_${suffix}`),
      );
      for (const [suffix, dtype, shape] of wanted) {
        expect([suffix, of(suffix).dtype, of(suffix).shape]).toEqual([suffix, dtype, shape]);
      }
      const halves = (suffix: string) => new Float16Array(of(suffix).data.slice().buffer);
      const scales = halves("super_scale"), minima = halves("super_min");
      const f32 = Math.fround;
      const values = Float32Array.from({ length: ROWS * COLS }, (_, i) => {
        const row = Math.floor(i / COLS), col = i % COLS, group = Math.floor(col / groupSize);
        const at = row * supers + Math.floor(col / 256);
        const scale = f32(scales[at]! * bitsAt(of("sub_scale").data, row * subBytes, group, scaleBits));
        const minimum = f32(minima[at]! * bitsAt(of("sub_min").data, row * subBytes, group, scaleBits));
        return f32(f32(scale * bitsAt(of("packed").data, row * words * 4, col, bits)) - minimum);
      });
      using checkpoint = openCheckpoint(folder);
      const layer = packedLayers(checkpoint).get("a.weight")!;
      expect(layer).toMatchObject({ bits, groupSize, scaleBits, rows: ROWS, cols: COLS });
      expect(dequantize(kernels, readPackedTensor(checkpoint, layer))).toEqual(values);
      for (const [begin, end] of [[0, 1], [3, 9], [44, 45], [7, 7]] as const) {
        const part = dequantize(kernels, readPackedTensor(checkpoint, layer, begin, end));
        expect(part).toEqual(values.subarray(begin * COLS, end * COLS));
      }
      const bytes = wanted.reduce((sum, [suffix]) => sum + of(suffix).data.length, 0);
      expect(layer.bytes).toBe(bytes);
      expect(layer.bitsPerWeight).toBe(bytes * 8 / (ROWS * COLS));
      const plain = place.fresh();
      await dequantizeCheckpoint({ kernels, input: folder, output: plain });
      const restored = readIndependently(join(plain, "model.safetensors")).tensors["a.weight"]!;
      expect(new Float32Array(restored.data.slice().buffer)).toEqual(values);
      expect(Object.keys(readIndependently(join(plain, "model.safetensors")).tensors)).toEqual([
        "a.weight",
        "b.weight",
      ]);
    }
  });

  test("says in config.json that only this project reads it", async () => {
    const folder = await packed();
    const { quantization_config: section } = JSON.parse(readFileSync(join(folder, "config.json"), "utf8"));
    expect(section).toEqual({
      quant_method: "arrowquant",
      arrowquant: {
        format_version: 1,
        solver: "clip",
        zero_point: "real",
        layers: {
          "a.weight": { bits: 2, group_size: 16, scale_bits: 4, dtype: "F32" },
          "b.weight": { bits: 2, group_size: 16, scale_bits: 4, dtype: "F32" },
        },
      },
    });
  });

  test("is planned to the byte", async () => {
    for (const overrides of [{}, { bit_width: 4, scale_bits: 6 }, { bit_width: 3, group_size: 128 }]) {
      const config = configOf(overrides);
      const { plan, totals } = await quantizeCheckpoint({
        input,
        output: place.fresh(),
        config,
        dryRun: true,
      });
      const manifest = readManifest(await packed(overrides))!;
      expect(plan.rows.map(({ bytesAfter }) => bytesAfter)).toEqual(
        manifest.layers.map(({ bytesAfter }) => bytesAfter),
      );
      const weights = ROWS * COLS + 280;
      expect(totals.bitsPerWeight).toBe(
        plan.rows.reduce((sum, row) => sum + row.bytesAfter, 0) * 8 / weights,
      );
      expect(manifest.layers.every(({ scaleBits }) => scaleBits === config.scaleBits)).toBe(true);
    }
  });

  test("is verified, and resumed after a stop to the same bytes", async () => {
    const reference = await packed();
    expect(await verifyFiles(reference, readManifest(reference)!)).toEqual([]);
    const output = place.fresh(), config = configOf({});
    const controller = new AbortController();
    const stopped = quantizeCheckpoint({
      kernels,
      input,
      output,
      config,
      signal: controller.signal,
      onProgress: ({ tensorsDone }) => tensorsDone >= 1 && controller.abort("SIGINT"),
    });
    await expect(stopped).rejects.toBeInstanceOf(InterruptedError);
    const { tensorsResumed } = await quantizeCheckpoint({ kernels, input, output, config, resume: true });
    expect(tensorsResumed).toBe(1);
    for (const file of ["model.safetensors", "config.json", "arrowquant.manifest.json"]) {
      expect(readFileSync(join(output, file)).equals(readFileSync(join(reference, file)))).toBe(true);
    }
  });

  test("falls back to more bits where min_accuracy asks for them", async () => {
    const folder = await packed({ min_accuracy: 0.995 });
    const [layer] = readManifest(folder)!.layers;
    expect(layer).toMatchObject({ bits: 4, scaleBits: 4, groupSize: 16, reason: "min_accuracy" });
    using checkpoint = openCheckpoint(folder);
    expect(packedLayers(checkpoint).get("a.weight")!.bits).toBe(4);
  });

  test("NaN and weights beyond every scale are named", async () => {
    for (const [value, message] of [[NaN, /row 0, column 5/], [1e20, /too large/]] as const) {
      const data = gaussian(2 * 64, 1);
      data[5] = value;
      const from = writeCheckpoint(place.fresh("bad"), { "a.weight": matrix(2, 64, data) });
      const error = await packed({}, from).then(() => undefined, (e) => e);
      expect(error).toBeInstanceOf(WeightsError);
      expect(error.message).toMatch(message);
    }
  });

  test("a name that a part of it needs must be free", async () => {
    const from = writeCheckpoint(place.fresh("taken"), {
      "a.weight": matrix(2, 64, gaussian(128, 1)),
      "a.weight_super_min": matrix(1, 1, gaussian(1, 1)),
    });
    const error = await packed({}, from).then(() => undefined, (e) => e);
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.message).toContain('got "a.weight_super_min" beside them');
  });
});

describe("a broken checkpoint with two-level scales", () => {
  type Tensors = Record<string, TestTensor>;
  // deno-lint-ignore no-explicit-any -- JSON, to be broken
  type Change = (tensors: Tensors, layer: any, section: any) => void;
  const bytes = (count: number) => new Uint8Array(count);
  const layerOf = "quantization_config.arrowquant.layers";
  const cases: [what: string, message: string, change: Change][] = [
    ["no super scale", '"a.weight_super_scale" must be F16 [45,3], got no such tensor', (tensors) => {
      delete tensors["a.weight_super_scale"];
    }],
    ["no sub-minimum", '"a.weight_sub_min" must be U8 [45,19], got no such tensor', (tensors) => {
      delete tensors["a.weight_sub_min"];
    }],
    [
      "a super minimum of another shape",
      '"a.weight_super_min" must be F16 [45,3], got F16 [45,2]',
      (tensors) => {
        tensors["a.weight_super_min"] = { dtype: "F16", shape: [45, 2], data: bytes(180) };
      },
    ],
    ["sub-scales of another type", '"a.weight_sub_scale" must be U8 [45,19], got I32 [45,5]', (tensors) => {
      tensors["a.weight_sub_scale"] = { dtype: "I32", shape: [45, 5], data: bytes(900) };
    }],
    ["a plain scale beside them", '"a.weight_scale" must not be there', (tensors) => {
      tensors["a.weight_scale"] = { dtype: "F16", shape: [45, 38], data: bytes(45 * 38 * 2) };
    }],
    [
      "other scale bits",
      `${layerOf}["a.weight"].scale_bits must be one of 4, 6, 8, 16, or absent, got 5`,
      (_, layer) => {
        layer.scale_bits = 5;
      },
    ],
    ["scale bits as text", '.scale_bits must be one of 4, 6, 8, 16, or absent, got "4"', (_, layer) => {
      layer.scale_bits = "4";
    }],
    [
      "scale bits that the bytes contradict",
      '"a.weight_sub_scale" must be U8 [45,29], got U8 [45,19]',
      (_, layer) => {
        layer.scale_bits = 6;
      },
    ],
    [
      "a group size without superblocks",
      ".group_size must be one of 16, 32, 64, 128, got 256",
      (_, layer) => {
        layer.group_size = 256;
      },
    ],
    ["scale bits left out", '"a.weight_scale" must be F16 [45,38], got no such tensor', (_, layer) => {
      delete layer.scale_bits;
    }],
  ];
  for (const [what, message, change] of cases) {
    test(`${what}: refused`, async () => {
      const from = await packed();
      const tensors = Object.fromEntries(
        Object.entries(readIndependently(join(from, "model.safetensors")).tensors).map((
          [name, { dtype, shape, data }],
        ) => [name, { dtype, shape, data: data as Uint8Array<ArrayBuffer> }]),
      ) as Tensors;
      const config = JSON.parse(readFileSync(join(from, "config.json"), "utf8"));
      const section = config.quantization_config.arrowquant;
      change(tensors, section.layers["a.weight"], section);
      const folder = writeCheckpoint(place.fresh("changed"), {}, config);
      writeTensors(join(folder, "model.safetensors"), tensors);
      writeFileSync(join(folder, "config.json"), JSON.stringify(config));
      using checkpoint = openCheckpoint(folder);
      const error = thrown(() => packedLayers(checkpoint));
      expect(error).toBeInstanceOf(FormatError);
      expect(error.message).toContain(message);
    });
  }
});

describe("dream-mini with two-level scales", () => {
  test("runs packed as it runs dequantized, and takes fewer bits than groups with half floats", async () => {
    const folder = await packed({}, DREAM), plain = place.fresh();
    await dequantizeCheckpoint({ kernels, input: folder, output: plain, dtype: "F32" });
    const model = loadDream(folder, kernels), full = loadDream(plain, kernels);
    const tokens = Int32Array.from({ length: 2 * 36 }, (_, i) => 2 + i * 7 % 33);
    const wanted = full.forward(tokens, 2);
    expect(relativeError(model.forward(tokens, 2), [...wanted])).toBeLessThan(1e-5);
    expect(model.weightBytes).toBeLessThan(full.weightBytes / 3);
    const { totals } = await quantizeCheckpoint({
      input: DREAM,
      output: place.fresh(),
      config: configOf({}),
      dryRun: true,
    });
    const oneLevel = resolveConfig({ overrides: { solver: "clip", bit_width: 2, group_size: 16 } }).config;
    const { totals: other } = await quantizeCheckpoint({
      input: DREAM,
      output: place.fresh(),
      config: oneLevel,
      dryRun: true,
    });
    expect(totals.bitsPerWeight).toBeLessThan(3.1);
    expect(other.bitsPerWeight).toBeGreaterThan(4);
  });

  test("still adds, with 4-bit codes", async () => {
    const folder = await packed({ bit_width: 4, scale_bits: 6 }, DREAM);
    const canvas = new Int32Array(36);
    canvas.set([2, 8, 11, 14, 7, 12, 15, 1, 1, 1, 1]); // <bos> 47+38= and four masks
    const { sequences } = diffusionGenerate(loadDream(folder, kernels), canvas, 1, {
      algorithm: "maskgit_plus",
      excludedTokens: [0, 1],
    });
    expect([...sequences.subarray(7, 10)]).toEqual([4, 12, 9]); // 0 8 5
  });
});
