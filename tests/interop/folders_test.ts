/** Folders for transformers, MLX, GPTQ's readers, AutoRound and ComfyUI, as those programs read them. */
import { afterAll, describe, expect, test } from "bun:test";
import { copyFileSync, existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { EXPORT_FORMATS, exportCheckpoint, type ExportReport, quantizeFor } from "../../lib/interop/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { dequantizeCheckpoint, quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { SafetensorsFile } from "../../lib/tensor/mod.ts";
import {
  differences,
  gaussian,
  matrix,
  MODELS,
  rejection,
  type TestTensor,
  workplace,
  writeCheckpoint,
} from "../_checkpoints.ts";
import { readersPython, runReader } from "../_readers.ts";
import { readWeights } from "../_reference.ts";

const kernels = await openKernels({ threads: 1 }), place = workplace(), python = readersPython();
afterAll(() => {
  kernels.close();
  place.remove();
});

const WIDTH = 64, INNER = 128, VOCABULARY = 96;

/** A small Llama, which transformers has in its tree. */
function llama(): string {
  const tensors: Record<string, TestTensor> = {};
  let seed = 0;
  const add = (name: string, rows: number, cols: number) => {
    tensors[`${name}.weight`] = matrix(rows, cols, gaussian(rows * cols, ++seed));
  };
  const norm = (name: string) =>
    tensors[`${name}.weight`] = { dtype: "F32", shape: [WIDTH], data: gaussian(WIDTH, 1, 1) };
  add("model.embed_tokens", VOCABULARY, WIDTH);
  for (const layer of ["model.layers.0", "model.layers.1"]) {
    for (const name of ["q", "o"]) add(`${layer}.self_attn.${name}_proj`, WIDTH, WIDTH);
    for (const name of ["k", "v"]) add(`${layer}.self_attn.${name}_proj`, WIDTH / 2, WIDTH);
    for (const name of ["gate", "up"]) add(`${layer}.mlp.${name}_proj`, INNER, WIDTH);
    add(`${layer}.mlp.down_proj`, WIDTH, INNER);
    norm(`${layer}.input_layernorm`);
    norm(`${layer}.post_attention_layernorm`);
  }
  norm("model.norm");
  add("lm_head", VOCABULARY, WIDTH);
  const config = {
    ...{
      architectures: ["LlamaForCausalLM"],
      model_type: "llama",
      hidden_size: WIDTH,
      intermediate_size: INNER,
    },
    ...{ num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, vocab_size: VOCABULARY },
    ...{ max_position_embeddings: 64, rms_norm_eps: 1e-6, tie_word_embeddings: false, dtype: "float32" },
  };
  return writeCheckpoint(place.fresh("llama"), tensors, config);
}

const input = llama();
/** The same weights without a config.json that says what they are, as ComfyUI's files are. */
const unnamed = place.fresh("unnamed");
mkdirSync(unnamed);
copyFileSync(join(input, "model.safetensors"), join(unnamed, "model.safetensors"));
/** What a reader gets in place of a language model. */
const inputs: Readonly<Record<string, string>> = { comfy: unnamed, diffusers: join(MODELS, "glyph-dit") };

async function packed(config: Record<string, unknown>, from = input): Promise<string> {
  const output = place.fresh("packed"), overrides = { num_threads: 1, solver: "round", ...config };
  await quantizeCheckpoint({ input: from, output, kernels, config: resolveConfig({ overrides }).config });
  return output;
}

const exported = (input: string, to: string, allowRounding = false): Promise<ExportReport> =>
  exportCheckpoint({
    ...{ input, output: place.fresh(to), kernels, allowRounding },
    format: EXPORT_FORMATS.find(({ name }) => name === to)!,
  });

async function inOneGo(config: Record<string, unknown>, input: string): Promise<ExportReport> {
  const overrides = { num_threads: 1, solver: "round", ...config };
  const output = place.fresh("one_go"), resolved = resolveConfig({ overrides }).config;
  return (await quantizeFor({ input, output, kernels, config: resolved })).exported!;
}

interface Case {
  /** Behind `--to`. */
  readonly to: string;
  readonly reader: string;
  readonly config: Record<string, unknown>;
}

const BITS = [2, 3, 4, 8];
const down = "model.layers.1.mlp.down_proj";
const CASES: readonly Case[] = [
  ...BITS.map((bit_width): Case => ({
    to: "compressed-tensors",
    reader: "transformers",
    config: { bit_width, group_size: bit_width === 2 ? 0 : 32, zero_point: "symmetric" },
  })),
  {
    to: "compressed-tensors",
    reader: "transformers",
    config: { bit_width: 4, group_size: 64, zero_point: "integer" },
  },
  {
    to: "compressed-tensors",
    reader: "transformers",
    config: {
      bit_width: 4,
      group_size: 64,
      zero_point: "symmetric",
      embedding_bits: 4,
      layer_bit_widths: { [down]: 3 },
    },
  },
  ...BITS.map((bit_width): Case => ({
    to: "mlx",
    reader: "mlx",
    config: {
      bit_width,
      group_size: 32,
      zero_point: "offset",
      embedding_bits: 8,
      layer_bit_widths: { [down]: 4 },
    },
  })),
  { to: "mlx", reader: "mlx", config: { bit_width: 4, group_size: 64, zero_point: "symmetric" } },
  ...BITS.map((bit_width): Case => ({
    to: "gptq",
    reader: "gptq",
    config: {
      bit_width,
      group_size: bit_width === 8 ? 0 : 32,
      zero_point: bit_width % 2 ? "symmetric" : "integer",
    },
  })),
  ...BITS.map((bit_width): Case => ({
    to: "auto-round",
    reader: "transformers",
    config: {
      ...{ bit_width, group_size: 32, zero_point: bit_width === 4 ? "integer" : "symmetric" },
      layer_bit_widths: { [down]: bit_width === 3 ? 3 : 4, [down.replace("down", "up")]: 16 },
    },
  })),
  { to: "auto-round", reader: "diffusers", config: { target: "auto-round", bit_width: 4, group_size: 32 } },
  { to: "comfy", reader: "comfy", config: { bit_width: 8, group_size: 0, zero_point: "symmetric" } },
  { to: "comfy", reader: "comfy", config: { bit_width: 4, group_size: 64, zero_point: "offset" } },
  { to: "comfy", reader: "comfy", config: { bit_width: 4, group_size: 64, zero_point: "symmetric" } },
  { to: "comfy", reader: "comfy", config: { bit_width: 4, group_size: 64, zero_point: "integer" } },
  {
    to: "compressed-tensors",
    reader: "transformers",
    config: { target: "vllm", bit_width: 3, embedding_bits: 8 },
  },
  { to: "mlx", reader: "mlx", config: { target: "mlx", bit_width: 2, embedding_bits: 8, group_size: 32 } },
  { to: "gptq", reader: "gptq", config: { target: "gptq", bit_width: 4 } },
  { to: "comfy", reader: "comfy", config: { target: "comfy_quant", bit_width: 8 } },
  { to: "comfy", reader: "comfy", config: { target: "comfy_quant", bit_width: 4 } },
];

/** Dequantizes a folder to float32. */
async function plain(input: string): Promise<SafetensorsFile> {
  const output = place.fresh("plain");
  await dequantizeCheckpoint({ input, output, kernels, dtype: "F32" });
  expect(readFileSync(join(output, "config.json"), "utf8")).not.toContain("quantization");
  return SafetensorsFile.open(join(output, "model.safetensors"));
}

/** What comes back of an export is what was packed. */
async function expectBack(to: string, folder: string, exported: string): Promise<void> {
  if (to !== "mlx" && to !== "compressed-tensors") return;
  using back = await plain(exported);
  using wanted = await plain(folder);
  expect([...back.tensors.keys()].sort()).toEqual([...wanted.tensors.keys()].sort());
  for (const name of wanted.tensors.keys()) {
    const [ours, theirs] = [back, wanted].map((file) => new Float32Array(file.read(name).buffer));
    expect([name, ours!.findIndex((value, i) => value !== theirs![i])]).toEqual([name, -1]);
  }
}

/** Folders that MLX and compressed-tensors write themselves, and their weights: made along with the reading. */
const others = ["mlx's own", "compressed-tensors' own"].map((kind) => [
  kind,
  place.fresh("others"),
  place.fresh("weights"),
]);

describe("weights as their readers see them", () => {
  test("equal ours bit for bit", async () => {
    const made = [];
    for (const { to, reader, config } of CASES) {
      const from = inputs[reader] ?? input, folder = await packed(config, from);
      const report = "target" in config ? await inOneGo(config, from) : await exported(folder, to);
      expect(report.format).toBe(to);
      expect(report.rows.filter(({ rounding }) => rounding)).toEqual([]);
      // AutoRound computes in half precision, and so loads what is plain.
      const layers = new Set(
        report.rows.flatMap(({ name, tensor: { layer } }) => layer === undefined ? [] : [name]),
      );
      const isRead = (tensor: string) => to !== "auto-round" || layers.has(tensor);
      made.push({
        to,
        isRead,
        name: `${to} ${JSON.stringify(config)}`,
        folder,
        reader,
        report,
        layers: layers.size,
        weights: place.fresh("read"),
      });
    }
    for (const { to, folder, report } of made) await expectBack(to, folder, report.output);
    if (python === undefined) return;
    const args = made.flatMap(({ reader, report, weights }) => [reader, report.output, weights]);
    await runReader(python, "read_folders.py", [...args, ...others.flat(), ...await rotated()]);
    for (const { name, folder, weights, isRead, layers } of made) {
      const ours = readWeights(folder, kernels);
      using theirs = SafetensorsFile.open(weights);
      expect(theirs.tensors.size).toBeGreaterThanOrEqual(layers);
      for (const [tensor] of theirs.tensors) {
        if (!isRead(tensor)) continue;
        const found = new Float32Array(theirs.read(tensor).buffer), wanted = Float32Array.from(ours(tensor));
        const at = wanted.findIndex((value, i) => !(found[i]! + 0 === value + 0));
        expect([name, tensor, at, found.length]).toEqual([name, tensor, -1, wanted.length]);
      }
    }
  }, 120000);
});

describe("folders that others wrote", () => {
  test("dequantize as their own programs do, and are refused by quantize", async () => {
    if (python === undefined) return;
    for (const [, folder, weights] of others) {
      using found = await plain(folder!);
      using wanted = SafetensorsFile.open(weights!);
      for (const name of wanted.tensors.keys()) {
        expect([name, found.read(name)]).toEqual([name, wanted.read(name)]);
      }
      const run = { input: folder!, output: place.fresh("no"), kernels, config: resolveConfig({}).config };
      expect((await rejection(quantizeCheckpoint(run))).message).toMatch(/already quantized/);
      const path = join(folder!, "config.json"), text = readFileSync(path, "utf8");
      writeFileSync(path, text.replace(/"(bits|num_bits)": \d/g, '"$1": 7'));
      const refused = await rejection(plain(folder!));
      expect(refused.message).toMatch(/which dequantizing cannot read: .*up_proj.* which is (?:not )?what/);
    }
  });
});

/** A plain model exported in ComfyUI's rotated form, for the reader. */
async function rotated(): Promise<readonly string[]> {
  const output = place.fresh("rotated"), format = EXPORT_FORMATS.find(({ name }) => name === "comfy")!;
  const types = [{ pattern: /proj/, type: "INT8_CONVROT" }];
  await exportCheckpoint({ input: plainModel, output, kernels, format, types });
  return ["comfy", output, rotatedWeights];
}

const proj = "blocks.0.proj.weight", norm = "blocks.0.norm.weight";
const plainModel = writeCheckpoint(place.fresh("wide"), {
  [proj]: matrix(24, 512, gaussian(24 * 512, 7)),
  [norm]: { dtype: "F32", shape: [512], data: gaussian(512, 8) },
}, {});
const rotatedWeights = place.fresh("weights");

describe("weights that are rotated for ComfyUI", () => {
  test("come back within the rounding of 8 bits", () => {
    if (python === undefined) return;
    using found = SafetensorsFile.open(rotatedWeights);
    using wanted = SafetensorsFile.open(join(plainModel, "model.safetensors"));
    const values = (file: SafetensorsFile) => new Float32Array(file.read(proj).buffer);
    const [theirs, ours] = [values(found), values(wanted)];
    const squares = (difference: (i: number) => number) =>
      ours.reduce((sum, _, i) => sum + difference(i) ** 2, 0);
    expect(squares((i) => theirs[i]! - ours[i]!) / squares((i) => ours[i]!)).toBeLessThan(0.01 ** 2);
    expect(found.read(norm)).toEqual(wanted.read(norm));
  });

  test("are plain matrices whose rows are multiples of 256", async () => {
    const format = EXPORT_FORMATS.find(({ name }) => name === "comfy")!, output = place.fresh("refused");
    const types = [{ pattern: /q_proj/, type: "INT8_CONVROT" }];
    const fault = await rejection(exportCheckpoint({ input: unnamed, output, kernels, format, types }));
    expect(fault.message).toMatch(/as INT8_CONVROT: rows must be a multiple of 256, got 64/);
  });
});

describe("a folder in one go", () => {
  const config =
    resolveConfig({ overrides: { bit_width: 4, solver: "round", target: "mlx", num_threads: 1 } }).config;
  const run = (output: string, more: object = {}) => quantizeFor({ input, output, kernels, config, ...more });

  test("is refused before any work where something else stands", async () => {
    const output = place.fresh("taken");
    mkdirSync(output);
    writeFileSync(join(output, "mine.txt"), "");
    const fault = await rejection(run(output, { onProgress: () => expect("no work").toBe("done") }));
    expect(fault.message).toMatch(/must be empty or an output of this tool/);
  });

  test("stopped while it is written, it resumes to the same bytes", async () => {
    const [whole, stopped] = [place.fresh("whole"), place.fresh("stopped")], stop = new AbortController();
    await run(whole);
    const onProgress = () => existsSync(join(stopped, "arrowquant.partial")) && stop.abort();
    expect((await rejection(run(stopped, { signal: stop.signal, onProgress }))).message).toContain(
      "--resume",
    );
    await run(stopped, { resume: true });
    expect(differences(whole, stopped)).toEqual([]);
    expect(existsSync(`${stopped}.arrowquant`)).toBe(false);
  });
});

describe("what a format cannot hold", () => {
  test("is refused by name and reason, and with rounding stored as near as it can be", async () => {
    const folder = await packed({ bit_width: 4, group_size: 64, zero_point: "real", embedding_bits: 8 });
    for (const to of ["compressed-tensors", "gptq", "auto-round", "mlx"]) {
      const fault = await rejection(exported(folder, to));
      expect(fault.code).toBe("AQ_CHECKPOINT");
      expect(fault.message).toMatch(/14 of 21 tensors|15 of 21 tensors/);
      expect(fault.message).toContain("4 bits, groups of 64, real zero points");
      const report = await exported(folder, to, true);
      const row = report.rows.find(({ name }) => name.endsWith(".mlp.up_proj.weight"))!;
      expect([row.type, row.rounding !== undefined]).toEqual([to === "mlx" ? "affine, 4 bits" : "F32", true]);
      if (to !== "mlx") continue;
      using file = SafetensorsFile.open(join(report.output, "model.safetensors"));
      const module = "model.layers.0.mlp.up_proj",
        read = (part: string) => file.read(`${module}.${part}`).buffer;
      const scales = new Float16Array(read("scales")), biases = new Float16Array(read("biases"));
      const codes = new Uint32Array(read("weight")), ours = readWeights(folder, kernels)(`${module}.weight`);
      ours.forEach((weight, i) => {
        const group = Math.floor(i / WIDTH), code = codes[Math.floor(i / 8)]! >>> i % 8 * 4 & 15;
        expect(Math.abs(scales[group]! * code + biases[group]! - weight)).toBeLessThan(2 ** -11 * 0.2);
      });
    }
  });

  test("a model of another kind is refused before any work", async () => {
    const dit = join(MODELS, "glyph-dit");
    for (const [from, to, wanted] of [[input, "comfy", "an image"], [dit, "gptq", "a language"]] as const) {
      const fault = await rejection(exported(from, to));
      expect(fault.message).toContain(`must get ${wanted} model, got`);
    }
  });

  test("an offset that half precision cannot hold is found while it is written", async () => {
    const tensors = { [proj]: matrix(2, 64, Float32Array.from({ length: 128 }, (_, i) => (i - 60) * 1e4)) };
    const folder = await packed(
      { bit_width: 8, group_size: 32, zero_point: "symmetric" },
      writeCheckpoint(place.fresh("large"), tensors, {}),
    );
    const fault = await rejection(exported(folder, "mlx"));
    expect(fault.message).toMatch(/blocks.0.proj.weight.*an offset must be a half float, got -?\d+/);
  });

  test("what is not quantized gets the type that is asked for", async () => {
    const folder = await packed({ bit_width: 4, group_size: 32, zero_point: "offset" }),
      output = place.fresh("typed");
    const format = EXPORT_FORMATS.find(({ name }) => name === "mlx")!, name = "model.norm.weight";
    const ask = (type: string) => ({
      input: folder,
      output,
      kernels,
      format,
      types: [{ pattern: /norm/, type }],
    });
    expect((await rejection(exportCheckpoint(ask("F16")))).message).toContain("F16 is asked for");
    expect((await rejection(exportCheckpoint(ask("Q4_0")))).message).toContain("as Q4_0: its layers have");
    await exportCheckpoint({ ...ask("F16"), allowRounding: true });
    using file = SafetensorsFile.open(join(output, "model.safetensors"));
    const stored = new Float16Array(file.read(name).buffer), ours = readWeights(folder, kernels)(name);
    expect(Array.from(stored)).toEqual(Array.from(ours, Math.f16round));
  });

  test("tables and odd widths are stored plain, and listed", async () => {
    const folder = await packed({
      bit_width: 4,
      group_size: 128,
      zero_point: "symmetric",
      embedding_bits: 8,
    });
    const report = await exported(folder, "gptq");
    const listed = report.rows.filter(({ fallback }) => fallback).map(({ name, type }) => [name, type]);
    expect(listed).toContainEqual(["model.embed_tokens.weight", "F32"]);
    const config = JSON.parse(readFileSync(join(report.output, "config.json"), "utf8"));
    expect(config.quantization_config).toMatchObject({
      quant_method: "gptq",
      checkpoint_format: "gptq_v2",
      bits: 4,
    });
    using file = SafetensorsFile.open(join(report.output, "model.safetensors"));
    const stored = new Float32Array(file.read("model.embed_tokens.weight").buffer);
    expect(stored).toEqual(Float32Array.from(readWeights(folder, kernels)("model.embed_tokens.weight")));
  });
});
