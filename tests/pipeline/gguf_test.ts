import { afterAll, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { CheckpointError } from "../../lib/errors.ts";
import { modelConfig, runLimits } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { dequantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { gaussian, rejection, type TestTensor, workplace } from "../_checkpoints.ts";
import { dreamCheckpoint, lladaCheckpoint, store } from "../_models.ts";
import { readIndependently } from "../tensor/_files.ts";
import { type FileTensor, ggufBytes, type Value } from "../tensor/gguf/_files.ts";
import { pipelineRuns } from "./_runs.ts";

const kernels = await openKernels();
const place = workplace();
afterAll(() => {
  kernels.close();
  place.remove();
});
const { quantizeTo } = pipelineRuns(kernels, place);

type Key = readonly [string, ...Value];

/** Names as llama.cpp's converter gives them: rules by regular expression, not the project's table. */
const RENAMES: readonly (readonly [RegExp, string])[] = [
  [/^model\.(?:embed_tokens|transformer\.wte)\./, "token_embd."],
  [/^model\.(?:norm|transformer\.ln_f)\./, "output_norm."],
  [/^(?:lm_head|model\.transformer\.ff_out)\./, "output."],
  [/^model\.(?:layers|transformer\.blocks)\./, "blk."],
  [/\.(?:input_layernorm|attn_norm)\./, ".attn_norm."],
  [/\.(?:post_attention_layernorm|ff_norm)\./, ".ffn_norm."],
  [/\.(?:self_attn\.)?([qkv])_proj\./, ".attn_$1."],
  [/\.(?:self_attn\.o_proj|attn_out)\./, ".attn_output."],
  [/\.(?:mlp\.gate_proj|ff_proj)\./, ".ffn_gate."],
  [/\.(?:mlp\.)?up_proj\./, ".ffn_up."],
  [/\.(?:mlp\.down_proj|ff_out)\./, ".ffn_down."],
];
const renamed = (name: string) => RENAMES.reduce((text, [pattern, to]) => text.replace(pattern, to), name);

/** Rows as `w.reshape(heads, 2, half, …).swapaxes(1, 2)` puts them. */
function paired(bytes: Uint8Array, rows: number, heads: number): Uint8Array {
  const width = bytes.length / rows, half = rows / heads / 2, out = new Uint8Array(bytes.length);
  let to = 0;
  for (let head = 0; head < heads; head++) {
    for (let i = 0; i < half; i++) {
      for (const side of [0, 1]) {
        const from = (head * 2 + side) * half + i;
        out.set(bytes.subarray(from * width, (from + 1) * width), to++ * width);
      }
    }
  }
  return out;
}

/** A language model's tensors and config.json as a GGUF file. */
function languageFile(
  tensors: Readonly<Record<string, TestTensor>>,
  config: Readonly<Record<string, unknown>>,
  architecture: "dream" | "llada",
): string {
  const pick = (...names: string[]) =>
    names.map((name) => config[name]).find((value) => value !== undefined) as number;
  const heads = pick("num_attention_heads", "n_heads"), keyHeads = pick("num_key_value_heads", "n_kv_heads");
  const number = (key: string, type: string, value: number): Key => [`${architecture}.${key}`, type, value];
  const keys: Key[] = [
    ["general.architecture", "string", architecture],
    number("context_length", "u32", pick("max_position_embeddings", "max_sequence_length")),
    number("embedding_length", "u32", pick("hidden_size", "d_model")),
    number("block_count", "u32", pick("num_hidden_layers", "n_layers")),
    number("feed_forward_length", "u32", pick("intermediate_size", "mlp_hidden_size")),
    number("attention.head_count", "u32", heads),
    number("attention.head_count_kv", "u32", keyHeads),
    number("attention.layer_norm_rms_epsilon", "f32", pick("rms_norm_eps")),
    number("rope.freq_base", "f32", pick("rope_theta")),
    ["tokenizer.ggml.mask_token_id", "u32", pick("mask_token_id")],
    ["tokenizer.ggml.eos_token_id", "u32", pick("eos_token_id")],
    ["tokenizer.ggml.padding_token_id", "u32", pick("pad_token_id")],
    ...(config["bos_token_id"] === undefined
      ? []
      : [["tokenizer.ggml.bos_token_id", "u32", pick("bos_token_id")] as const]),
  ];
  const stored = Object.entries(tensors).map(([own, { dtype, shape, data }]): FileTensor => {
    const name = renamed(own), bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    const pairs = architecture === "llada" && /attn_[qk]\./.test(name);
    const rows = pairs ? paired(bytes, shape[0]!, name.includes("attn_q") ? heads : keyHeads) : bytes;
    return { name, type: dtype, dimensions: [...shape].reverse(), data: rows };
  });
  const path = place.fresh("model") + ".gguf";
  writeFileSync(path, ggufBytes(keys, stored));
  return path;
}

for (
  const [family, { tensors, config }] of [
    ["dream", dreamCheckpoint()],
    ["dream", dreamCheckpoint(undefined, "BF16", true)],
    ["llada", lladaCheckpoint(undefined, "F16", true)],
  ] as const
) {
  test(`a GGUF file of ${family} is the model it was made of, and quantizes to the same bytes`, async () => {
    const folder = store(place.fresh(family), { tensors, config }),
      path = languageFile(tensors, config, family);
    using original = openCheckpoint(folder);
    using file = openCheckpoint(path);
    expect(runLimits(file)).toBeUndefined();
    expect(modelConfig(file)).toEqual(modelConfig(original));
    expect([...file.tensors.keys()].sort()).toEqual([...original.tensors.keys()].sort());
    for (const [name, { info }] of original.tensors) {
      expect(file.tensors.get(name)!.info.shape).toEqual(info.shape);
      expect([name, file.read(name)]).toEqual([name, original.read(name)]);
      const from = Math.floor(info.byteLength / 3), end = from + Math.floor(info.byteLength / 2);
      expect(file.read(name, from, end)).toEqual(original.read(name, from, end));
    }
    const outputs = [place.fresh("of-file"), place.fresh("of-folder")] as const;
    const settings = { bit_width: 2, solver: "round" };
    await quantizeTo(outputs[0], path, { config: settings });
    await quantizeTo(outputs[1], folder, { config: settings });
    const [ours, theirs] = outputs.map((output) =>
      readIndependently(join(output, "model.safetensors")).tensors
    );
    expect(Object.keys(ours!).sort()).toEqual(Object.keys(theirs!).sort());
    for (const name of Object.keys(ours!)) expect([name, ours![name]]).toEqual([name, theirs![name]]);
  });
}

/** An image model's file: Q8_0, a convolution that is stored as a matrix, and a vector. */
function imageFile(type: string, block: Uint8Array): { path: string; weights: number } {
  const weights = type === "Q8_0" ? 32 : 256, count = 16 * 256 / weights;
  const data = new Uint8Array(count * block.length);
  for (let i = 0; i < count; i++) data.set(block, i * block.length);
  const conv = gaussian(8 * 4 * 2 * 2, 3), path = place.fresh("image") + ".gguf";
  const plain = (name: string, dimensions: number[], values: Float32Array): FileTensor => (
    { name, type: "F32", dimensions, data: new Uint8Array(values.buffer) }
  );
  writeFileSync(
    path,
    ggufBytes([
      ["general.architecture", "string", "flux"],
      ["general.quantization_version", "u32", 2],
      ["comfy.gguf.orig_shape.img_in.weight", "array", ["i32", [8, 4, 2, 2]]],
    ], [
      { name: "double_blocks.0.img_attn.qkv.weight", type, dimensions: [256, 16], data },
      plain("img_in.weight", [16, 8], conv),
      plain("double_blocks.0.img_attn.norm.key_norm.scale", [16], gaussian(16, 5)),
    ]),
  );
  return { path, weights };
}

test("an image model's GGUF file reads by its names, with the shapes of before, and quantizes", async () => {
  const block = Uint8Array.from({ length: 34 }, (_, i) => i < 2 ? [0x66, 0x2e][i]! : i * 7);
  const { path } = imageFile("Q8_0", block), output = place.fresh("out");
  using file = openCheckpoint(path);
  expect(file.tensors.get("img_in.weight")!.info.shape).toEqual([8, 4, 2, 2]);
  const [scale] = new Float16Array(block.slice(0, 2).buffer);
  const values = new Float32Array(file.read("double_blocks.0.img_attn.qkv.weight").buffer);
  expect([...values.subarray(0, 32)]).toEqual(
    [...block.subarray(2)].map((code) => scale! * (code << 24 >> 24)),
  );
  const report = await quantizeTo(output, path, { config: { bit_width: 8, solver: "round" } });
  expect(report.totals.tensors).toBe(1);
  expect(report.totals.relativeRmsError).toBeLessThan(0.01);
});

test("codes of fewer bits are refused by quantize and become plain weights by dequantize", async () => {
  const block = Uint8Array.from({ length: 144 }, (_, i) => i < 4 ? [0x00, 0x3c, 0x00, 0x38][i]! : i * 5);
  const { path } = imageFile("Q4_K", block);
  const error = await rejection(quantizeTo(place.fresh("out"), path, {}));
  expect(error).toBeInstanceOf(CheckpointError);
  expect(error.message).toContain("a GGUF file with codes of Q4_K");
  const output = place.fresh("plain"), half = place.fresh("half");
  const { totals } = await dequantizeCheckpoint({ input: path, output, kernels });
  expect([totals.tensors, totals.tensorsKept, totals.bitsPerWeight]).toEqual([1, 2, 4.5]);
  const { tensors } = readIndependently(join(output, "model.safetensors"));
  using file = openCheckpoint(path);
  for (const [name, { dtype, shape, data }] of Object.entries(tensors)) {
    expect([name, dtype, shape]).toEqual([name, "F32", [...file.tensors.get(name)!.info.shape]]);
    expect([name, new Uint8Array(data)]).toEqual([name, file.read(name)]);
  }
  await dequantizeCheckpoint({ input: path, output: half, kernels, dtype: "F16" });
  const halves = readIndependently(join(half, "model.safetensors"))
    .tensors["double_blocks.0.img_attn.qkv.weight"]!;
  expect(halves.dtype).toBe("F16");
  const { buffer } = new Uint8Array(halves.data),
    whole = new Float32Array(file.read("double_blocks.0.img_attn.qkv.weight").buffer);
  expect(new Float16Array(buffer)).toEqual(Float16Array.from(whole));
});

test("types that need tables of codes are shown, and refused where they would be read", async () => {
  const path = place.fresh("table") + ".gguf";
  writeFileSync(
    path,
    ggufBytes([], [{ name: "a.weight", type: "IQ2_XS", dimensions: [256, 2], data: new Uint8Array(148) }]),
  );
  using file = openCheckpoint(path);
  expect(file.tensors.get("a.weight")!.info.stored).toEqual({ type: "IQ2_XS", bytes: 148 });
  const error = await rejection(dequantizeCheckpoint({ input: path, output: place.fresh("out"), kernels }));
  expect(error).toBeInstanceOf(CheckpointError);
  expect(error.message).toContain("got IQ2_XS, which needs tables of codes");
});
