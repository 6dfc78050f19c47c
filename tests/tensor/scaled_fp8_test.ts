import { afterAll, describe, expect, test } from "bun:test";
import { rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { type TestTensor, workplace, writeCheckpoint, writeTensors } from "../_checkpoints.ts";
import { fileBytes, randomIntegers } from "./_files.ts";

const place = workplace();
afterAll(place.remove);

/** An FP8 code as a number, by its definition: sign, exponent, fraction. */
function decoded(code: number, dtype: string): number {
  const [bits, bias] = dtype === "F8_E5M2" ? [2, 15] : [3, 7];
  const exponent = (code & 127) >> bits, fraction = (code & ((1 << bits) - 1)) / (1 << bits);
  const size = exponent === 0 ? fraction * 2 ** (1 - bias) : (1 + fraction) * 2 ** (exponent - bias);
  return code < 128 ? size : -size;
}

const random = randomIntegers(7);
/** Codes without NaN and infinity. */
const codes = (shape: readonly number[], dtype = "F8_E4M3"): TestTensor => ({
  dtype,
  shape,
  data: Uint8Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => random(0x7c) | random(2) << 7),
});
const floats = (shape: readonly number[], values?: readonly number[]): TestTensor => ({
  dtype: "F32",
  shape,
  data: Float32Array.from(
    { length: shape.reduce((a, b) => a * b, 1) },
    (_, i) => values?.[i] ?? (1 + random(999)) / 4096,
  ),
});
const FP8 = { model_type: "x", quantization_config: { quant_method: "fp8" } };

/** What a checkpoint reads for a tensor, against codes times scales: `scaleAt` gives the scale's index. */
function expectProducts(
  tensors: Record<string, TestTensor>,
  name: string,
  scaleAt: (row: number, col: number) => number,
  config: unknown = {},
) {
  using checkpoint = openCheckpoint(writeCheckpoint(place.fresh("in"), tensors, config));
  expect(checkpoint.foreign).toBe(undefined);
  const { data, dtype, shape } = tensors[name]!, [rows, cols] = shape as [number, number];
  const scale =
    Object.entries(tensors).find(([key]) =>
      /scale$|scale_inv$|scale_weight$/.test(key) && !/input/.test(key)
    )![1];
  const wanted = Float32Array.from(
    data as Uint8Array,
    (code, i) =>
      decoded(code, dtype) * (scale.data as Float32Array)[scaleAt(Math.floor(i / cols), i % cols)]!,
  );
  expect(checkpoint.tensors.get(name)!.info).toMatchObject({
    dtype: "F32",
    shape,
    byteLength: 4 * rows * cols,
  });
  const read = checkpoint.read(name);
  expect(new Float32Array(read.buffer)).toEqual(wanted);
  // any range of bytes, as copies and digests read them
  for (
    const [start, end] of [[5, 6], [0, 4 * cols], [4 * cols - 3, 8 * cols + 2], [
      read.length - 7,
      read.length,
    ]]
  ) {
    expect(checkpoint.read(name, start, end)).toEqual(read.slice(start, end));
  }
  expect([...checkpoint.tensors.keys()]).toEqual([name]);
}

test("sizes are those of the file, of codes and of what says how to read them", () => {
  const scale = floats([3, 1]);
  const fp8 = writeCheckpoint(
    place.fresh("in"),
    { "a.weight": codes([3, 64]), "a.weight_scale": scale },
    FP8,
  );
  const weights = { num_bits: 4, type: "int", group_size: 32, symmetric: true };
  const packing = {
    quant_method: "compressed-tensors",
    format: "pack-quantized",
    config_groups: { g: { weights } },
  };
  const packed = {
    "a.weight_packed": { dtype: "I32", shape: [3, 8], data: new Int32Array(24) },
    "a.weight_scale": floats([3, 2]),
    "a.weight_shape": { dtype: "I64", shape: [2], data: BigInt64Array.of(3n, 64n) },
  };
  const folder = writeCheckpoint(place.fresh("in"), packed, { quantization_config: packing });
  for (const [path, type, bytes] of [[fp8, /F8_E4M3/, 192 + 12], [folder, /4 bits/, 96 + 24 + 16]] as const) {
    using checkpoint = openCheckpoint(path);
    const { stored } = checkpoint.tensors.get("a.weight")!.info;
    expect(stored!.type).toMatch(type);
    expect(stored!.bytes).toBe(bytes);
  }
});

describe("FP8 weights read as codes times scales", () => {
  const W = "a.b.weight";

  test("one for a tensor, in every spelling, with what lies beside them", () => {
    for (const dtype of ["F8_E4M3", "F8_E5M2"]) {
      for (const name of ["a.b.weight_scale", "a.b.scale_weight", "a.b.weight_scale_inv", "a.b.scale"]) {
        for (const shape of [[], [1], [1, 1]]) {
          const marker = { dtype, shape: [0], data: new Uint8Array(0) };
          const more = { "a.b.input_scale": floats([]), scaled_fp8: marker };
          expectProducts({ [W]: codes([3, 5], dtype), [name]: floats(shape), ...more }, W, () => 0);
        }
      }
    }
  });

  test("one a row, with and without the axis of columns", () => {
    for (const shape of [[6], [6, 1]]) {
      expectProducts({ [W]: codes([6, 6]), "a.b.weight_scale": floats(shape) }, W, (row) => row, FP8);
    }
  });

  test("one a block, whole or cut off at the edge, of the size that config.json gives or none", () => {
    for (const section of [{}, { weight_block_size: [128, 128] }]) {
      const config = { quantization_config: { quant_method: "fp8", ...section } };
      const tensors = { [W]: codes([130, 300]), "a.b.weight_scale_inv": floats([2, 3]) };
      expectProducts(tensors, W, (row, col) => 3 * Math.floor(row / 128) + Math.floor(col / 128), config);
    }
    const odd = { quantization_config: { config_groups: { g: { weights: { block_structure: [48, 80] } } } } };
    const tensors = { [W]: codes([100, 200]), "a.b.weight_scale": floats([3, 3]) };
    expectProducts(tensors, W, (row, col) => 3 * Math.floor(row / 48) + Math.floor(col / 80), odd);
  });

  test("of experts in one tensor, each with its blocks", () => {
    const tensors = { "experts.up": codes([2, 130, 40]), "experts.up_scale": floats([2, 2, 1]) };
    using checkpoint = openCheckpoint(writeCheckpoint(place.fresh("in"), tensors, FP8));
    const scales = tensors["experts.up_scale"].data as Float32Array,
      data = tensors["experts.up"].data as Uint8Array;
    const wanted = Float32Array.from(data, (code, i) => {
      const row = Math.floor(i / 40), expert = Math.floor(row / 130);
      return decoded(code, "F8_E4M3") * scales[2 * expert + Math.floor(row % 130 / 128)]!;
    });
    expect(new Float32Array(checkpoint.read("experts.up").buffer)).toEqual(wanted);
  });

  test("of a scale in another shard, as bfloat16 where the model has that type", () => {
    const folder = place.fresh("shards"), A = "model-00001-of-00002.safetensors", B = A.replace("1-", "2-");
    const half = { dtype: "BF16", shape: [], data: Uint16Array.of(0x3f40) }; // 0.75
    const weight = codes([4, 4]);
    writeCheckpoint(folder, {}, { torch_dtype: "bfloat16" });
    writeTensors(join(folder, A), { "a.weight": weight });
    writeTensors(join(folder, B), { "a.weight_scale": half });
    const index = { weight_map: { "a.weight": A, "a.weight_scale": B } };
    writeFileSync(join(folder, "model.safetensors.index.json"), JSON.stringify(index));
    rmSync(join(folder, "model.safetensors"));
    using checkpoint = openCheckpoint(folder);
    expect(checkpoint.tensors.get("a.weight")!.info.dtype).toBe("BF16");
    const words = new Uint16Array(checkpoint.read("a.weight").buffer);
    // 0.75 times a number of 4 bits needs 6: bfloat16 holds it exactly.
    const wanted = Float32Array.from(weight.data as Uint8Array, (code) => decoded(code, "F8_E4M3") * 0.75);
    expect(words).toEqual(new Uint16Array(wanted.buffer).filter((_, i) => i % 2 === 1));
    expect(checkpoint.notes.join()).toContain("1 FP8 tensors are read times their scales");
  });

  test("of scales that are powers of two alone", () => {
    const scale = { dtype: "F8_E8M0", shape: [2, 1], data: Uint8Array.of(127, 120) };
    using checkpoint = openCheckpoint(
      writeCheckpoint(place.fresh("in"), { [W]: codes([2, 2]), "a.b.weight_scale": scale }),
    );
    expect(checkpoint.read(W).length).toBe(16);
  });

  test("not where nothing says that they are scaled", () => {
    // scales of other tensors, as Flux has them, and those of a cache say nothing of the weights
    const others = { "norm.scale": codes([2]), "attn.k_scale": floats([1]), "a.bias": codes([2]) };
    for (const tensors of [{ [W]: codes([2, 2]) }, { [W]: codes([2, 2]), ...others }]) {
      using checkpoint = openCheckpoint(writeCheckpoint(place.fresh("in"), tensors));
      expect(checkpoint.tensors.get(W)!.info.dtype).toBe("F8_E4M3");
      expect(checkpoint.foreign).toBe(undefined);
    }
  });
});

test("FP8 weights whose scales cannot be read are none, by name", () => {
  const W = "a.weight", weight = codes([64, 64]), u8 = (shape: number[]) => codes(shape, "U8");
  const label = (format: string) => {
    const data = new TextEncoder().encode(JSON.stringify({ format }));
    return { dtype: "U8", shape: [data.length], data };
  };
  const cases: [string, Record<string, TestTensor>, unknown?][] = [
    ["no scale", { [W]: weight }, FP8],
    ["no scale", { [W]: weight, scaled_fp8: codes([2]) }],
    ["no scale", { [W]: weight, "b.weight": codes([2, 2]), "b.weight_scale": floats([]) }],
    ['scales "a.weight_scale" and "a.scale_weight"', {
      [W]: weight,
      "a.weight_scale": floats([]),
      "a.scale_weight": floats([]),
    }],
    ["F32 [3] for [64, 64]", { [W]: weight, "a.weight_scale": floats([3]) }],
    ["F32 [64, 3] for [64, 64]", { [W]: weight, "a.weight_scale": floats([64, 3]) }],
    ["F32 [0] for", { [W]: weight, "a.weight_scale": floats([0]) }],
    ["U8 [64, 2]", { [W]: weight, "a.weight_scale": u8([64, 2]) }],
    ['and "a.weight_scale_2"', { [W]: weight, "a.weight_scale": floats([]), "a.weight_scale_2": floats([]) }],
    ["mxfp8", { [W]: weight, "a.weight_scale": floats([]), "a.comfy_quant": label("mxfp8") }],
    ["transform_config", { [W]: weight, "a.weight_scale": floats([]) }, {
      quantization_config: { transform_config: { config_groups: {} } },
    }],
  ];
  const scaled = { [W]: weight, scaled_fp8: codes([2]), "a.scale_weight": floats([]) };
  const plain = { "b.weight": floats([4, 4]) }, scale = { "b.scale_weight": floats([], [2]) };
  for (
    const [what, tensors] of [['"b.scale_weight" without "b.weight"', scale], [
      '"b.weight" in F32 with "b.scale_weight"',
      { ...plain, ...scale },
    ]] as const
  ) {
    using checkpoint = openCheckpoint(writeCheckpoint(place.fresh("in"), { ...scaled, ...tensors }, {}));
    expect(checkpoint.foreign ?? "read").toContain(what);
  }
  {
    const one = { ...scaled, ...plain, "b.scale_weight": floats([], [1]) };
    using checkpoint = openCheckpoint(writeCheckpoint(place.fresh("in"), one, {}));
    expect([...checkpoint.tensors.keys()].sort()).toEqual([W, "b.weight"]);
    expect(checkpoint.foreign).toBe(undefined);
  }
  // spellings of nobody that is known: raw codes are no weights beside any of them
  const STRANGE =
    "weight_scaling weight_scales w_scale scales scale_inv weight.scale weight_quant_scale dequant_scale weight_amax weight_s qscale scale_w weight_offset";
  for (const name of STRANGE.split(" ")) {
    cases.push([`FP8 with "a.${name}", which`, { [W]: weight, [`a.${name}`]: floats([64, 1]) }]);
  }
  for (const name of ["scale_dict.a", "scales.a.weight", "fp8.scale.a"]) {
    cases.push([`FP8 with "${name}", which`, { [W]: weight, [name]: floats([1]) }]);
  }
  cases.push(['FP8 with "a_scale", which', { [W]: weight, a_scale: floats([1]) }]);
  for (const [wanted, tensors, config] of cases) {
    using checkpoint = openCheckpoint(writeCheckpoint(place.fresh("in"), tensors, config ?? {}));
    expect(checkpoint.foreign ?? "read").toContain(wanted);
    expect(checkpoint.tensors.get(W)!.info.dtype).toBe("F8_E4M3");
  }
});

test("metadata in the file's header say that FP8 weights have scales", () => {
  const layers = JSON.stringify({ layers: { a: { format: "float8_e4m3fn" } } });
  const header = (metadata: unknown) =>
    JSON.stringify({
      __metadata__: metadata,
      "a.weight": { dtype: "F8_E4M3", shape: [4, 4], data_offsets: [0, 16] },
    });
  const opened = (metadata: unknown) => {
    const path = place.fresh("file") + ".safetensors";
    writeFileSync(path, fileBytes(header(metadata), new Uint8Array(16)));
    using checkpoint = openCheckpoint(path);
    return checkpoint.foreign ?? "read";
  };
  expect(opened({ _quantization_metadata: layers })).toContain("no scale");
  expect(opened({ format: "pt" })).toBe("read");
});
