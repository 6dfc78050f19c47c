import { afterAll, expect, test } from "bun:test";
import { existsSync, mkdirSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { CheckpointError, FormatError } from "../../lib/errors.ts";
import { openCheckpoint, refuseForeign } from "../../lib/tensor/mod.ts";
import { type TestTensor, workplace, writeCheckpoint } from "../_checkpoints.ts";
import { thrown } from "./_files.ts";

const place = workplace();
afterAll(place.remove);

const BYTES: Record<string, number> = {
  U8: 1,
  I8: 1,
  F8_E4M3: 1,
  F8_E8M0: 1,
  F4: 0.5,
  F16: 2,
  BF16: 2,
  I16: 2,
  I32: 4,
  U32: 4,
  F32: 4,
};
/** Zeros of a type and shape, as in `U8 4096,1`. */
function tensor(text: string): TestTensor {
  const [dtype, sizes = ""] = text.split(" ") as [string, string?];
  const shape = sizes === "" ? [] : sizes.split(",").map(Number);
  return { dtype, shape, data: new Uint8Array(shape.reduce((a, b) => a * b, 1) * BYTES[dtype]!) };
}
const tensors = (entries: Record<string, string>, module = "model.layers.0.fc.") =>
  Object.fromEntries(Object.entries(entries).map(([name, text]) => [module + name, tensor(text)]));

test("weights of other quantizers are recognised by name", () => {
  const cases: [string, Record<string, string>][] = [
    ["bitsandbytes", { weight: "U8 64,1", "weight.absmax": "F32 2", "weight.quant_map": "F32 16" }],
    ["bitsandbytes", { weight: "U8 64,1", "weight.quant_state.bitsandbytes__nf4": "U8 90" }],
    ["bitsandbytes", { weight: "I8 8,8", SCB: "F32 8" }],
    ["GPTQ", { qweight: "I32 2,16", qzeros: "I32 1,2", scales: "F16 1,16", g_idx: "I32 16" }],
    ["GPTQ", { qweight: "I32 2,16", qzeros: "I32 1,2", scales: "F16 1,16" }],
    ["AWQ", { qweight: "I32 16,2", qzeros: "I32 1,2", scales: "F16 1,16" }],
    ["EETQ", { weight: "I8 8,8", weight_scales: "F16 8" }],
    ["HQQ", { W_q: "U8 8,8", scale: "F16 8,1", zero: "F16 8,1" }],
    ["AQLM", { codes: "I8 8,8,1", codebooks: "F16 1,256,1,8", scales: "F16 8,1,1,1" }],
    ["optimum-quanto", { "weight._data": "I8 8,8", "weight._scale": "F32 8,1" }],
    ["torchao", { _weight_qdata: "I8 8,8", _weight_scale: "F32 8,1" }],
    ["torchao", { "weight:_data": "I8 8,8" }],
    ["MLX", { weight: "U32 8,2", scales: "F16 8,1", biases: "F16 8,1" }],
    ["MLX", { weight: "I32 8,2", scales: "F16 8,1", biases: "F16 8,1" }],
    ["MXFP4", { gate_up_proj_blocks: "U8 2,4,2,16", gate_up_proj_scales: "U8 2,4,2" }],
    ["compressed-tensors", { weight_packed: "I32 8,2", weight_scale: "BF16 8,1" }],
    ["NVFP4", { weight: "U8 8,8", weight_scale: "F8_E4M3 8,1", weight_scale_2: "F32" }],
    ["Nunchaku", { qweight: "I8 8,8", wscales: "F16 1,8" }],
    ["integer or 4-bit weights", { weight: "I8 8,8" }],
    ["integer or 4-bit weights", { weight: "U8 8,8", weight_scale: "F32 8,1" }],
    ["integer or 4-bit weights", { weight: "I32 8,8", weight_scale: "F32 8,1" }],
    ["integer or 4-bit weights", { weight: "I16 8,8", scale: "F32 8,1" }],
    ["integer or 4-bit weights", { weight_int8: "I8 8,8", weight_scale: "F32 8,1" }],
    ["integer or 4-bit weights", { kernel: "I8 8,8", kernel_scale: "F32 8" }],
    ["VPTQ", { indices: "I32 1,8", "centroids.weight": "F32 1,8" }],
    ["integers for the most part", { dense_weights: "I32 4096", row_offsets: "I32 9", norm: "F32 64" }],
    ["NVFP4", { weight: "F4 8,8", weight_scale: "F8_E8M0 8,1" }],
  ];
  for (const [what, entries] of cases) {
    using checkpoint = openCheckpoint(writeCheckpoint(place.fresh(), tensors(entries), {}));
    expect(`${JSON.stringify(entries)} ${checkpoint.foreign}`).toContain(what);
    const error = thrown(() => refuseForeign(checkpoint, "quantize"));
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.message).toMatch(/take the original|merge/);
    const { tensor = "", path = "" } = error as CheckpointError;
    expect([tensor.startsWith("model.layers.0.fc."), existsSync(path)]).toEqual([true, true]);
    expect(path).toEndWith(".safetensors");
  }
});

test("names of those that stand for something else are none", () => {
  const plain = {
    W_q: "F32 8,8",
    W_k: "F32 8,8",
    scales: "F32 8",
    qweight: "F32 8,8",
    centroids: "F32 4,8",
    g_idx: "F32 8",
    mask: "U8 8,8",
    scale: "F32",
  };
  using checkpoint = openCheckpoint(
    writeCheckpoint(place.fresh(), tensors({ ...plain, weight: "F32 8,8" }), {}),
  );
  expect(checkpoint.foreign).toBe(undefined);
});

test("a LoRA alone is no model, one in a model is left to its keep rules", () => {
  const peft = { "lora_A.weight": "F32 4,8", "lora_B.weight": "F32 8,4" };
  const diffusers = { "lora.down.weight": "F16 4,8", "lora.up.weight": "F16 8,4" };
  const kohya = { "lora_down.weight": "F16 4,8", "lora_up.weight": "F16 8,4", alpha: "F32" };
  for (const entries of [peft, diffusers, kohya]) {
    using alone = openCheckpoint(writeCheckpoint(place.fresh(), tensors(entries, "unet_mid_block_fc."), {}));
    expect(alone.foreign).toContain("--lora");
    using beside = openCheckpoint(
      writeCheckpoint(place.fresh(), tensors({ ...entries, "base_layer.weight": "F32 8,8" }), {}),
    );
    expect(beside.foreign).toBe(undefined);
  }
});

test("a configuration names the quantization, in each key that tools write", () => {
  const plain = { "a.weight": tensor("F32 8,8") };
  const cases: [string, unknown][] = [
    ["gptq", { quantization_config: { quant_method: "gptq", bits: 4 } }],
    ["bitsandbytes", { quantization_config: { quant_method: "bitsandbytes", load_in_4bit: true } }],
    ["fp8", { quantization_config: { quant_method: "fp8" } }],
    ["NVFP4", { quantization_config: { quant_algo: "NVFP4" } }],
    ["compression_config", { compression_config: {} }],
    ["a quantization of 4", { quantization: { group_size: 64, bits: 4 } }],
  ];
  for (const [wanted, config] of cases) {
    using checkpoint = openCheckpoint(writeCheckpoint(place.fresh(), plain, config));
    expect(checkpoint.foreign ?? "nothing").toContain(wanted);
  }
  for (const config of [{}, { quantization_config: null }, { quantization_config: { arrowquant: {} } }]) {
    using checkpoint = openCheckpoint(writeCheckpoint(place.fresh(), plain, config));
    expect(checkpoint.foreign).toBe(undefined);
  }
});

/** The message of opening a folder with these files, or one of them. */
function refusal(files: Record<string, string | Uint8Array>, name = ""): string {
  const folder = place.fresh("folder");
  mkdirSync(folder);
  for (const [file, content] of Object.entries(files)) {
    mkdirSync(join(folder, file, ".."), { recursive: true });
    writeFileSync(join(folder, file), content);
  }
  const error = thrown(() => openCheckpoint(join(folder, name)));
  expect(error instanceof CheckpointError || error instanceof FormatError).toBe(true);
  return error.message;
}

test("a link whose file is missing, as in a cache that was cleaned, is told from a file that never was", () => {
  const folder = place.fresh("cleaned");
  mkdirSync(folder);
  symlinkSync("../blobs/0f", join(folder, "model.safetensors"));
  expect(thrown(() => openCheckpoint(folder)).message).toContain("a link that leads nowhere");
});

test("files of other formats are told by their names and by what is in them, with the way out", () => {
  const pickle = Uint8Array.of(0x80, 2, 0x63);
  const zip = new TextEncoder().encode("PK\x03\x04");
  const cases: [string, Record<string, string | Uint8Array>, string?][] = [
    ["the version must end inside the file of 4 bytes", { "x.gguf": "GGUF" }],
    ['must begin with "GGUF", got other bytes', { "x.gguf": "<!DOCTYPE html>" }, "x.gguf"],
    ["must have one model, got", { "x.gguf": "GGUF", "y.gguf": "GGUF" }],
    ["a GGUF file under another name: rename it to *.gguf", {
      "model.safetensors": `GGUF${"\0".repeat(40)}`,
    }],
    ["a pickle of PyTorch", { "pytorch_model.bin": pickle, "config.json": "{}" }],
    ["a pickle of PyTorch", { "x.ckpt": zip }, "x.ckpt"],
    ["a pickle of PyTorch", { "model.safetensors": zip }],
    ["an ONNX graph", { "onnx_model.onnx": "" }],
    ["a git-lfs pointer", {
      "model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    }],
    ["a git-lfs pointer", {
      "model.safetensors": "",
      "config.json": "version https://git-lfs.github.com/spec/v1\n",
    }],
    ["a web page", { "model.safetensors": "<!DOCTYPE html><html>" }, "model.safetensors"],
    ["a server's error", { "model.safetensors": '{"error":"Repository not found"}' }],
    ["an index of shards", { "model.safetensors.index.json": "{}" }, "model.safetensors.index.json"],
    ["weights in another format", { "tf_model.h5": "" }],
    ["another adapter alone", { "adapter_config.json": "{}", "adapter_model.bin": pickle }],
    ["an empty folder", {}],
    ["an unfinished download", { "model.safetensors.incomplete": "" }],
    ["an unfinished download", { "model.safetensors.part": "" }, "model.safetensors.part"],
    ["without a byte order mark", { "model.safetensors": "", "config.json": "\ufeff{}" }],
    ["one folder lower: give", { "fp16/model.safetensors": "", "other/x": "" }],
  ];
  for (const [wanted, files, name] of cases) {
    expect(refusal(files, name)).toContain(wanted);
  }
  for (const id of ["org/name-7B", "https://huggingface.co/org/name-7B/tree/main", "hf://org/name-7B"]) {
    expect(thrown(() => openCheckpoint(id)).message).toContain("hf download org/name-7B --local-dir name-7B");
  }
});
