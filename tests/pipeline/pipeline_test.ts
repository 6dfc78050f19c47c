import { afterAll, describe, expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import {
  appendFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statfsSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { DEFAULT_CONFIG, resolveConfig } from "../../lib/config/mod.ts";
import {
  CheckpointError,
  FormatError,
  IntegrityError,
  InterruptedError,
  OutputError,
  WeightsError,
} from "../../lib/errors.ts";
import { openKernels, withThreads } from "../../lib/native/mod.ts";
import {
  dequantizeCheckpoint,
  KEEP_RULES,
  MANIFEST_FILE,
  type Plan,
  planQuantization,
  quantizeCheckpoint,
  type QuantizeCheckpointOptions,
  readManifest,
  type RunEvent,
  TOOL_VERSION,
  verifyFiles,
  WORK_FOLDER,
} from "../../lib/pipeline/mod.ts";
import { withoutQuantizationConfig, withQuantizationConfig } from "../../lib/output/config_file.ts";
import { readJournal } from "../../lib/output/journal.ts";
import { TensorSink } from "../../lib/output/tensor_sink.ts";
import { openCheckpoint, SafetensorsWriter } from "../../lib/tensor/mod.ts";
import { EXIT_CODES } from "../../scripts/_command/run.ts";
import {
  contents,
  differences,
  gaussian,
  matrix,
  MODELS,
  rejection,
  ROOT,
  type TestTensor,
  workplace,
  writeCheckpoint,
  writeTensors,
} from "../_checkpoints.ts";
import { readIndependently } from "../tensor/_files.ts";

const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});

const DREAM = join(MODELS, "dream-mini");
const DIT = join(MODELS, "glyph-dit");

function configOf(overrides: Record<string, unknown> = {}) {
  return resolveConfig({ overrides: { num_threads: 1, ...overrides } }).config;
}

type Options = Partial<Omit<QuantizeCheckpointOptions, "config" | "dryRun" | "kernels">> & {
  config?: Record<string, unknown>;
};

function quantizeTo(output: string, input: string, { config, ...options }: Options = {}) {
  return quantizeCheckpoint({ kernels, ...options, input, output, config: configOf(config) });
}

/** A plan of tensors that exist in name and shape only. */
function planOf(tensors: Record<string, [string, number[]]>, config: Record<string, unknown> = {}): Plan {
  const bytes: Record<string, number> = { F32: 4, BF16: 2, I64: 8 };
  const folder = writeCheckpoint(
    place.fresh("plan"),
    Object.fromEntries(
      Object.entries(tensors).map(([name, [dtype, shape]]): [string, TestTensor] => [name, {
        dtype,
        shape,
        data: new Uint8Array(shape.reduce((a, b) => a * b, 1) * bytes[dtype]!),
      }]),
    ),
  );
  using checkpoint = openCheckpoint(folder);
  return planQuantization(checkpoint, configOf(config));
}

/** Three matrices and what is kept, in two shards with an index. */
function twoShards(): string {
  const folder = place.fresh("input");
  mkdirSync(folder);
  const first = {
    "model.embed_tokens.weight": matrix(10, 64, gaussian(640, 1)),
    "model.layers.0.a.weight": matrix(33, 96, gaussian(33 * 96, 2)),
    "model.layers.0.a.bias": { dtype: "F32", shape: [33], data: gaussian(33, 3) },
    "model.layers.0.b.weight": matrix(48, 64, gaussian(48 * 64, 4)),
  };
  const second = {
    "model.layers.1.a.weight": matrix(70, 100, gaussian(7000, 5)),
    "model.norm.weight": { dtype: "F32", shape: [64], data: gaussian(64, 6) },
    "lm_head.weight": matrix(10, 64, gaussian(640, 7)),
  };
  const files = { "model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second };
  const map = Object.entries(files).flatMap(([file, tensors]) => {
    writeTensors(join(folder, file), tensors);
    return Object.keys(tensors).map((name) => [name, file]);
  });
  writeFileSync(
    join(folder, "model.safetensors.index.json"),
    JSON.stringify({
      metadata: { total_size: 1, note: "kept" },
      weight_map: Object.fromEntries(map),
      exporter: ["kept"],
    }),
  );
  writeFileSync(join(folder, "config.json"), '{\n  "model_type": "Dream",\n  "rope_theta": 10000.0\n}\n');
  writeFileSync(join(folder, "tokenizer.json"), "{}");
  writeFileSync(join(folder, "LICENSE"), "MIT");
  writeFileSync(join(folder, "eval.jsonl"), "{}");
  mkdirSync(join(folder, "onnx"));
  return folder;
}

describe("planQuantization", () => {
  const M = [32, 64];
  const decisions: [name: string, dtype: string, shape: number[], reason: string][] = [
    ["model.layers.0.mlp.up_proj.weight", "BF16", M, "bit_width"],
    ["model.layers.0.mlp.up_proj.bias", "BF16", [32], "not a matrix"],
    ["model.embed_tokens.weight", "BF16", M, "embedding"],
    ["lm_head.weight", "BF16", M, "head"],
    ...[
      "token_embedding",
      "shared",
      "embed_in",
      "embeddings",
      "embedding",
      "embed_positions",
      "patch_embedding",
    ]
      .flatMap((module): [string, string, number[], string][] => [
        [`${module}.weight`, "F32", M, "embedding"],
        [`encoder.${module}.weight`, "F32", M, "embedding"],
        [`${module}.proj.weight`, "F32", M, "bit_width"],
      ]),
    ...["embed_out", "score", "classifier"].flatMap((module): [string, string, number[], string][] => [
      [`${module}.weight`, "F32", M, "head"],
      [`model.${module}.weight`, "F32", M, "head"],
      [`${module}.dense.weight`, "F32", M, "bit_width"],
    ]),
    ["mlp.shared_expert.weight", "BF16", M, "bit_width"],
    ["underscore.weight", "BF16", M, "bit_width"],
    ["model.norm.weight", "BF16", [64], "not a matrix"],
    ["model.layers.0.q_norm.weight", "BF16", M, "norm"],
    ["model.transformer.wte.weight", "BF16", M, "embedding"],
    ["model.transformer.ff_out.weight", "BF16", M, "head"],
    ["model.transformer.ln_f.weight", "BF16", M, "norm"],
    ["model.transformer.blocks.3.ff_out.weight", "BF16", M, "bit_width"],
    ["transformer_blocks.0.norm1.linear.weight", "F32", M, "bit_width"],
    ["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight", "F32", M, "bit_width"],
    ["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight", "F32", M, "embedding"],
    ["pos_embed.proj.weight", "F32", [8, 1, 2, 2], "not a matrix"],
    ["pos_embed.table.weight", "F32", M, "embedding"],
    ["proj_out_1.weight", "F32", M, "bit_width"],
    ["proj_out_2.weight", "F32", M, "head"],
    ["rotary.table", "F32", M, "not named .weight"],
    ["mask.weight", "I64", M, "not floating"],
    ["hollow.weight", "F32", [0, 64], "empty"],
    ["thin.weight", "F32", [1, 1], "bit_width"],
  ];
  for (const [name, dtype, shape, reason] of decisions) {
    test(`${name} ${dtype} [${shape}]: ${reason}`, () => {
      const { rows: [row] } = planOf({ [name]: [dtype, shape] });
      expect(row!.reason).toBe(reason);
      expect(row!.action).toBe(reason === "bit_width" ? "quantize" : "keep");
    });
  }

  test("gives every kept tensor a rule of the table", () => {
    const rules: string[] = KEEP_RULES.map(({ rule }) => rule);
    for (const model of [DREAM, DIT]) {
      using checkpoint = openCheckpoint(model);
      for (const row of planQuantization(checkpoint, DEFAULT_CONFIG).rows) {
        if (row.action === "keep") expect(rules).toContain(row.reason);
      }
    }
  });

  test("quantizes the linear layers of both reference models", () => {
    const counts = [DREAM, DIT].map((model) => {
      using checkpoint = openCheckpoint(model);
      return planQuantization(checkpoint, DEFAULT_CONFIG).rows.filter((row) => row.action === "quantize")
        .length;
    });
    expect(counts).toEqual([4 * 7, 6 * 9 + 1]); // DiT: two of the embedder, adaLN, four of attention, two of ff
  });

  const tensors: Record<string, [string, number[]]> = {
    "a.1.weight": ["F32", M],
    "a.2.weight": ["F32", M],
    "lm_head.weight": ["F32", M],
    "time_embed.0.weight": ["F32", M],
  };
  const reasons = (config: Record<string, unknown>) =>
    planOf(tensors, config).rows.map(({ reason, bits }) => bits ?? reason);

  test("takes bits from names and patterns; an own name also reaches a head", () => {
    const config = { layer_bit_widths: { "a\\.": 3, "a.1": 8, lm_head: 8 } };
    expect(reasons(config)).toEqual([8, 3, 8, 4]);
  });

  test("does not quantize a head by a pattern", () => {
    expect(reasons({ layer_bit_widths: { ".": 8 } })).toEqual([8, 8, "head", 8]);
  });

  test("keeps by 16 bits, keep_patterns and skip_sensitive_layers", () => {
    const config = {
      layer_bit_widths: { "a.1.weight": 16 },
      keep_patterns: ["2\\.weight"],
      skip_sensitive_layers: true,
    };
    expect(reasons(config)).toEqual(["layer_bit_widths 16", "keep_patterns", "head", "sensitive"]);
  });

  test("names sensitive layers only when they are skipped", () => {
    const config = { sensitive_layer_names: ["a.1"], sensitive_layer_patterns: ["^a\\.2"] };
    expect(reasons(config)).toEqual([4, 4, "head", 4]);
    expect(reasons({ ...config, skip_sensitive_layers: true })).toEqual([
      "sensitive",
      "sensitive",
      "head",
      "sensitive",
    ]);
  });

  test("warns about names and patterns that concern nothing", () => {
    const { warnings } = planOf(tensors, {
      layer_bit_widths: { "a.1": 3, "layers.9": 3 },
      keep_patterns: ["nowhere"],
      sensitive_layer_names: ["a.2", "a.3"],
      sensitive_layer_patterns: ["^b"],
    });
    expect(warnings.map((line) => line.split(" concerns")[0])).toEqual([
      'layer_bit_widths: "layers.9"',
      'keep_patterns: "nowhere"',
      'sensitive_layer_names: "a.3"',
      'sensitive_layer_patterns: "^b"',
    ]);
  });

  test("predicts the bytes that are written", async () => {
    for (const zero_point of ["real", "integer", "symmetric"]) {
      const { plan, layers } = await quantizeTo(place.fresh(), DREAM, {
        config: { zero_point, bit_width: 3 },
      });
      expect(layers.map((layer) => layer.bytesAfter)).toEqual(plan.rows.map((row) => row.bytesAfter));
    }
  });
});

describe("quantization_config in config.json", () => {
  const texts = [
    '{\n  "a": 1e-06,\n  "b": [1, {"c": "}"}],\n  "d": "x, \\"y\\""\n}\n',
    '{"a": 10000.0, "quantization_config_not": {"x": 1}}',
    '{\n    "a": 1\n}',
    "{}",
    "{ }\n",
    "{\n}\n",
    '\n {\t"a":{"quantization_config":{"b":2}} } ',
  ];
  for (const text of texts) {
    test(`goes into ${JSON.stringify(text)} and comes out again`, () => {
      const value = { quant_method: "arrowquant", list: [1, "}"], nested: { key: null } };
      const changed = withQuantizationConfig(text, value);
      expect(JSON.parse(changed)).toEqual({ ...JSON.parse(text), quantization_config: value });
      expect(withoutQuantizationConfig(changed)).toBe(text);
    });
  }

  test("comes out of the front and the middle too", () => {
    expect(JSON.parse(withoutQuantizationConfig('{"quantization_config": {"a": [1, 2]}, "b": 1}'))).toEqual({
      b: 1,
    });
    expect(JSON.parse(withoutQuantizationConfig('{"a": 1, "quantization_config": "x,y", "b": 1}')))
      .toEqual({ a: 1, b: 1 });
  });
});

describe("a quantization_config of null in config.json", () => {
  for (
    const text of [
      '{"quantization_config": null}',
      '{"quantization_config":null,\n"a": 1}',
      '{"a": 1, "quantization_config": null }',
    ]
  ) {
    test(`is replaced in ${text}, and gone after the way back`, async () => {
      const input = writeCheckpoint(place.fresh("input"), { "a.weight": matrix(4, 64, gaussian(256, 1)) });
      writeFileSync(join(input, "config.json"), text);
      const output = place.fresh();
      await quantizeTo(output, input);
      const written = readFileSync(join(output, "config.json"), "utf8");
      expect(written.split('"quantization_config"').length).toBe(2);
      await dequantizeCheckpoint({ kernels, input: output, output: `${output}-plain` });
      const { quantization_config: _, ...rest } = JSON.parse(text);
      expect(JSON.parse(readFileSync(join(`${output}-plain`, "config.json"), "utf8"))).toEqual(rest);
    });
  }
});

describe("quantizeCheckpoint writes", () => {
  test("shards, index, config and the model's small files, and nothing else", async () => {
    const input = twoShards();
    const output = place.fresh();
    const { copied, left } = await quantizeTo(output, input, { config: { bit_width: 3 } });
    expect(copied).toEqual(["LICENSE", "tokenizer.json"]);
    expect(left).toEqual(["eval.jsonl", "onnx"]);
    expect(readdirSync(output).sort()).toEqual([
      "LICENSE",
      MANIFEST_FILE,
      "config.json",
      "model-00001-of-00002.safetensors",
      "model-00002-of-00002.safetensors",
      "model.safetensors.index.json",
      "tokenizer.json",
    ].sort());
    const index = JSON.parse(readFileSync(join(output, "model.safetensors.index.json"), "utf8"));
    const shard = readIndependently(join(output, "model-00002-of-00002.safetensors"));
    const mapped = Object.keys(index.weight_map).filter((name) =>
      index.weight_map[name].includes("00002-of")
    );
    expect(mapped.sort()).toEqual(Object.keys(shard.tensors).sort());
    expect(Object.keys(shard.tensors)).toEqual([
      "model.layers.1.a.weight_packed",
      "model.layers.1.a.weight_scale",
      "model.layers.1.a.weight_zero_point",
      "model.layers.1.a.weight_shape",
      "model.norm.weight",
      "lm_head.weight",
    ]);
    const total = readdirSync(output).filter((name) => name.endsWith(".safetensors"))
      .flatMap((name) => Object.values(readIndependently(join(output, name)).tensors))
      .reduce((sum, { data }) => sum + data.length, 0);
    expect(index.metadata).toEqual({ total_size: total, note: "kept" });
    expect(index.exporter).toEqual(["kept"]);
    expect(readFileSync(join(output, "config.json"), "utf8")).toContain('"rope_theta": 10000.0,');
    const original = readIndependently(join(input, "model-00002-of-00002.safetensors"));
    expect(shard.tensors["lm_head.weight"]).toEqual(original.tensors["lm_head.weight"]);
    expect(shard.metadata).toEqual(original.metadata);
  });

  test("a manifest that matches every file", async () => {
    const output = place.fresh();
    const { layers } = await quantizeTo(output, DREAM);
    const manifest = readManifest(output)!;
    expect(Object.keys(manifest.files).sort()).toEqual(
      readdirSync(output).filter((name) => name !== MANIFEST_FILE).sort(),
    );
    expect(await verifyFiles(output, manifest)).toEqual([]);
    expect(manifest.layers).toEqual(JSON.parse(JSON.stringify(layers)));
    writeFileSync(
      join(output, "tokenizer.json"),
      readFileSync(join(output, "tokenizer.json"), "utf8").replace("a", "b"),
    );
    truncateSync(join(output, "model-00001-of-00002.safetensors"), 100);
    const mismatches = await verifyFiles(output, manifest);
    expect(mismatches.map(({ name }) => name)).toEqual([
      "model-00001-of-00002.safetensors",
      "tokenizer.json",
    ]);
  });

  test("the same bytes with other threads, backend and chunks of work", async () => {
    using wasm = await openKernels({ backend: "wasm" });
    for (const zero_point of ["real", "integer", "symmetric"]) {
      const outputs = [place.fresh(), place.fresh(), place.fresh()] as const;
      const config = { bit_width: 3, zero_point };
      await quantizeTo(outputs[0], DIT, { config });
      await quantizeTo(outputs[1], DIT, { config: { ...config, num_threads: 2 } });
      await quantizeCheckpoint({ kernels: wasm, input: DIT, output: outputs[2], config: configOf(config) });
      expect(differences(outputs[0], outputs[1])).toEqual([]);
      expect(differences(outputs[0], outputs[2])).toEqual([]);
    }
  });

  test("an error that an independent reader measures too", async () => {
    const output = place.fresh();
    const weights = gaussian(24 * 80, 11);
    const input = writeCheckpoint(place.fresh("input"), { "a.weight": matrix(24, 80, weights) });
    const { totals } = await quantizeTo(output, input, { config: { bit_width: 2, group_size: 16 } });
    await dequantizeCheckpoint({ kernels, input: output, output: `${output}-plain` });
    const { data } = readIndependently(join(`${output}-plain`, "model.safetensors")).tensors["a.weight"]!;
    const back = new Float32Array(data.slice().buffer);
    let [squares, error] = [0, 0];
    weights.forEach((weight, i) => {
      squares += weight * weight;
      error += (weight - back[i]!) ** 2;
    });
    expect(totals.relativeRmsError).toBeCloseTo(Math.sqrt(error / squares), 12);
    expect(totals.relativeRmsError!).toBeGreaterThan(0.2);
    const stored = readIndependently(join(output, "model.safetensors"));
    const bytes = Object.values(stored.tensors).reduce((sum, tensor) => sum + tensor.data.length, 0);
    expect(totals.bitsPerWeight).toBe(bytes * 8 / weights.length);
  });

  test("tensors smaller than a group, of one row, all zero, constant and empty", async () => {
    const output = place.fresh();
    const constant = new Float32Array(130).fill(0.5);
    const tensors = {
      "small.weight": matrix(3, 5, gaussian(15, 21)),
      "row.weight": matrix(1, 100, gaussian(100, 22)),
      "zero.weight": matrix(4, 70, new Float32Array(280)),
      "constant.weight": matrix(1, 130, constant),
      "empty.weight": matrix(0, 64, new Float32Array(0)),
      "empty.bias": { dtype: "F32", shape: [0], data: new Float32Array(0) },
    };
    const input = writeCheckpoint(place.fresh("input"), tensors);
    for (const [i, zero_point] of ["real", "integer", "symmetric"].entries()) {
      const { layers, totals } = await quantizeTo(output + i, input, {
        config: { bit_width: 8, zero_point },
      });
      expect(Number.isFinite(totals.relativeRmsError)).toBe(true);
      expect(layers.find(({ name }) => name === "empty.weight")!.reason).toBe("empty");
      await dequantizeCheckpoint({ kernels, input: output + i, output: `${output}${i}-plain` });
      const back = readIndependently(join(`${output}${i}-plain`, "model.safetensors")).tensors;
      expect(Object.keys(back)).toEqual(Object.keys(tensors));
      expect(back["zero.weight"]!.data).toEqual(new Uint8Array(1120));
      if (zero_point === "real") {
        expect(back["constant.weight"]!.data).toEqual(new Uint8Array(constant.buffer));
      }
      expect(back["empty.weight"]!.shape).toEqual([0, 64]);
    }
  });

  test("every element type, and plain types after the way back", async () => {
    const bits = (values: number[], Type: Uint16ArrayConstructor | Uint8ArrayConstructor) =>
      Type.from(values);
    const input = writeCheckpoint(place.fresh("input"), {
      "f64.weight": { dtype: "F64", shape: [2, 4], data: Float64Array.from([1, 2, 3, 4, 5, 6, 7, 8]) },
      "f16.weight": { dtype: "F16", shape: [1, 2], data: bits([0x3c00, 0x4000], Uint16Array) },
      "bf16.weight": { dtype: "BF16", shape: [1, 2], data: bits([0x3f80, 0x4000], Uint16Array) },
      "e4m3.weight": { dtype: "F8_E4M3", shape: [1, 2], data: bits([0x38, 0x40], Uint8Array) },
    });
    const output = place.fresh();
    await quantizeTo(output, input, { config: { bit_width: 8 } });
    await dequantizeCheckpoint({ kernels, input: output, output: `${output}-plain` });
    const plain = readIndependently(join(`${output}-plain`, "model.safetensors")).tensors;
    expect(Object.values(plain).map(({ dtype }) => dtype)).toEqual(["F32", "F16", "BF16", "F16"]);
    expect([...new Uint16Array(plain["bf16.weight"]!.data.slice().buffer)]).toEqual([0x3f80, 0x4000]);
    await dequantizeCheckpoint({ kernels, input: output, output: `${output}-f32`, dtype: "F32" });
    const wide = readIndependently(join(`${output}-f32`, "model.safetensors")).tensors;
    const [one, two] = new Float32Array(wide["e4m3.weight"]!.data.slice().buffer);
    expect(one).toBeCloseTo(1, 3);
    expect(two).toBeCloseTo(2, 3);
  });

  test("a single file, and a pipeline's transformer", async () => {
    const file = join(DIT, "diffusion_pytorch_model.safetensors");
    const [fromFile, fromFolder] = [place.fresh(), place.fresh()];
    const { copied } = await quantizeTo(fromFile, file);
    expect(copied).toEqual([]);
    const pipeline = place.fresh("pipeline");
    mkdirSync(pipeline);
    writeFileSync(join(pipeline, "model_index.json"), "{}");
    cpSync(DIT, join(pipeline, "transformer"), { recursive: true });
    await quantizeTo(fromFolder, pipeline);
    for (const name of ["config.json", "diffusion_pytorch_model.safetensors"]) {
      expect(contents(fromFile)[name]).toBe(contents(fromFolder)[name]!);
    }
  });

  test("nothing on a dry run", async () => {
    const output = place.fresh();
    const report = await quantizeCheckpoint({ input: DREAM, output, config: DEFAULT_CONFIG, dryRun: true });
    expect(existsSync(output)).toBe(false);
    expect(report.totals.tensors).toBe(28);
    const done = await quantizeTo(output, DREAM);
    expect(report.totals.bitsPerWeight).toBe(done.totals.bitsPerWeight);
  });
});

describe("compressed-tensors", () => {
  test("is named for symmetric and integer zero points, with exact targets", async () => {
    const output = place.fresh();
    await quantizeTo(output, twoShards(), {
      config: {
        zero_point: "symmetric",
        group_size: 32,
        layer_bit_widths: { "layers.0.b": 8 },
        keep_patterns: ["1.a"],
      },
    });
    const { quantization_config: config } = JSON.parse(readFileSync(join(output, "config.json"), "utf8"));
    expect(config.quant_method).toBe("compressed-tensors");
    expect(config.format).toBe("pack-quantized");
    expect(config.ignore).toEqual(["model.layers.1.a", "lm_head"]);
    expect(Object.values(config.config_groups).map((group) => (group as { targets: string[] }).targets))
      .toEqual([
        ["model.layers.0.a"],
        ["model.layers.0.b"],
      ]);
    expect(config.config_groups.group_0.weights).toEqual({
      num_bits: 4,
      type: "int",
      symmetric: true,
      strategy: "group",
      group_size: 32,
      dynamic: false,
      actorder: null,
      block_structure: null,
      observer: "minmax",
      observer_kwargs: {},
    });
    expect(config.config_groups.group_1.weights.num_bits).toBe(8);
  });

  test("has whole rows as channels", async () => {
    const output = place.fresh();
    await quantizeTo(output, DREAM, { config: { zero_point: "integer", group_size: 0 } });
    const { quantization_config: config } = JSON.parse(readFileSync(join(output, "config.json"), "utf8"));
    expect(config.config_groups.group_0.weights.strategy).toBe("channel");
    expect(config.config_groups.group_0.weights.symmetric).toBe(false);
  });

  test("is not claimed where it cannot say what was done", async () => {
    for (const config of [{ zero_point: "real" }, { zero_point: "symmetric", group_size: 64 }]) {
      const output = place.fresh();
      await quantizeTo(output, twoShards(), { config }); // 96 columns are no whole groups of 64
      const { quantization_config: written } = JSON.parse(readFileSync(join(output, "config.json"), "utf8"));
      expect(written.quant_method).toBe("arrowquant");
      expect(written.config_groups).toBe(undefined);
    }
  });
});

describe("min_accuracy", () => {
  test("widens a tensor until it is reached and records each try", async () => {
    const output = place.fresh();
    const events: RunEvent[] = [];
    const input = twoShards();
    const { layers } = await quantizeTo(output, input, {
      config: { bit_width: 2, min_accuracy: 0.992 },
      onEvent: (event) => events.push(event),
    });
    const quantized = layers.filter(({ action }) => action === "quantize");
    expect(quantized.map(({ bits }) => bits)).toEqual([4, 4, 4]);
    for (const { tried, reason, statistics } of quantized) {
      expect(reason).toBe("min_accuracy");
      expect(tried!.map(({ bits }) => bits)).toEqual([2, 3]);
      expect(tried!.every(({ cosine }) => cosine < 0.992)).toBe(true);
      expect(statistics!.dot / Math.sqrt(statistics!.sumSquares * statistics!.sumSquaresOther))
        .toBeGreaterThan(0.992);
    }
    expect(events.filter(({ kind }) => kind === "fallback").length).toBe(6);
    const direct = place.fresh();
    await quantizeTo(direct, input, { config: { bit_width: 4 } });
    for (const name of readdirSync(direct).filter((file) => file.endsWith(".safetensors"))) {
      expect(readIndependently(join(output, name)).tensors).toEqual(
        readIndependently(join(direct, name)).tensors,
      );
    }
  });

  test("of 1 is reached by weights that come back equal", async () => {
    const input = writeCheckpoint(place.fresh("input"), {
      "a.weight": matrix(3, 130, new Float32Array(390).fill(0.5)),
    });
    const { layers } = await quantizeTo(place.fresh(), input, { config: { min_accuracy: 1, bit_width: 4 } });
    expect(layers.map(({ action, bits }) => [action, bits])).toEqual([["quantize", 4]]);
  });

  test("keeps what 8 bits do not reach, or fails fast", async () => {
    const config = { bit_width: 4, min_accuracy: 1 };
    const { layers, totals } = await quantizeTo(place.fresh(), twoShards(), { config });
    expect(totals.tensors).toBe(0);
    expect(layers.filter(({ reason }) => reason === "min_accuracy").length).toBe(3);
    const output = place.fresh();
    const error = await rejection(
      quantizeTo(output, twoShards(), { config: { ...config, fail_fast: true } }),
    );
    expect(error).toBeInstanceOf(WeightsError);
    expect(error.tensor).toBe("model.layers.0.a.weight");
    expect(existsSync(output)).toBe(false);
  });
});

describe("weights that are not finite", () => {
  function broken(): string {
    const [first, second] = [gaussian(200 * 64, 31), gaussian(64, 32)];
    first[150 * 64 + 7] = NaN;
    second[3] = -Infinity;
    return writeCheckpoint(place.fresh("input"), {
      "a.weight": matrix(200, 64, first),
      "b.weight": matrix(4, 16, gaussian(64, 33)),
      "c.weight": matrix(1, 64, second),
    });
  }

  test("are named with file, tensor, row and column, all of them, and leave nothing", async () => {
    const output = place.fresh();
    const input = broken();
    const error = await rejection(quantizeTo(output, input));
    expect(error).toBeInstanceOf(WeightsError);
    expect(error.path).toBe(join(input, "model.safetensors"));
    expect(error.tensor).toBe("a.weight");
    expect(error.message).toContain('"a.weight"');
    expect(error.message).toContain("row 150, column 7");
    expect(error.message).toContain('"c.weight"');
    expect(error.message).toContain("row 0, column 3");
    expect(existsSync(output)).toBe(false);
  });

  test("end the run at the first with fail_fast", async () => {
    const error = await rejection(quantizeTo(place.fresh(), broken(), { config: { fail_fast: true } }));
    expect(error.message).not.toContain("c.weight");
  });

  test("are kept as they are with non_finite: keep", async () => {
    const output = place.fresh();
    const input = broken();
    const { layers } = await quantizeTo(output, input, { config: { non_finite: "keep" } });
    expect(layers.map(({ action, reason }) => [action, reason])).toEqual([
      ["keep", "non_finite"],
      ["quantize", "bit_width"],
      ["keep", "non_finite"],
    ]);
    const [before, after] = [input, output].map((folder) =>
      readIndependently(join(folder, "model.safetensors"))
    );
    expect(after!.tensors["a.weight"]).toEqual(before!.tensors["a.weight"]);
  });

  const kept: [dtype: string, data: ArrayBufferView<ArrayBuffer>][] = [
    ["F64", Float64Array.of(1, 1e300, -Infinity, 1)],
    ["F32", Float32Array.of(1, 2, NaN, 1)],
    ["F16", Uint16Array.of(0x3c00, 0, 0x7e00, 0)],
    ["BF16", Uint16Array.of(0x3f80, 0, 0xff80, 0)],
    ["F8_E4M3", Uint8Array.of(1, 2, 0xff, 3)],
    ["F8_E5M2", Uint8Array.of(1, 2, 0x7c, 3)],
  ];
  for (const [dtype, data] of kept) {
    test(`are found in kept tensors too: ${dtype}`, async () => {
      const input = writeCheckpoint(place.fresh("input"), {
        "a.bias": { dtype, shape: [4], data },
        "wte.weight": { dtype, shape: [2, 2], data },
        "b.weight": matrix(4, 16, gaussian(64, 33)),
      });
      const output = place.fresh();
      const error = await rejection(quantizeTo(output, input));
      expect(error).toBeInstanceOf(WeightsError);
      expect(error.tensor).toBe("a.bias");
      expect(error.message).toContain("element 2");
      expect(error.message).toContain("row 1, column 0");
      expect(existsSync(output)).toBe(false);
      const { layers } = await quantizeTo(output, input, { config: { non_finite: "keep" } });
      expect(layers.map(({ reason, nonFinite }) => [reason, nonFinite])).toEqual([
        ["not a matrix", true],
        ["embedding", true],
        ["bit_width", undefined],
      ]);
      expect(readManifest(output)!.layers[0]!.nonFinite).toBe(true);
      const [before, after] = [input, output].map((folder) =>
        readIndependently(join(folder, "model.safetensors")).tensors["wte.weight"]
      );
      expect(after).toEqual(before!);
    });
  }

  test("beyond float32 are named so where they are float64, and only where they are quantized", async () => {
    const data = Float64Array.of(1, 2, 3, 1e300);
    const tensor = { dtype: "F64", shape: [2, 2], data };
    const quantized = writeCheckpoint(place.fresh("input"), { "a.weight": tensor });
    const error = await rejection(quantizeTo(place.fresh(), quantized));
    expect(error.message).toContain("finite in float32, got 1e+300 at row 1, column 1");
    const asTable = writeCheckpoint(place.fresh("input"), { "wte.weight": tensor });
    expect((await quantizeTo(place.fresh(), asTable)).totals.tensorsKept).toBe(1);
  });

  test("and weights too large for half-precision scales are refused, a finished output left alone", async () => {
    const output = place.fresh();
    await quantizeTo(output, DREAM);
    const before = contents(output);
    const huge = Float32Array.from({ length: 64 }, (_, i) => i % 2 === 0 ? 3e38 : -3e38);
    const input = writeCheckpoint(place.fresh("input"), { "a.weight": matrix(1, 64, huge) });
    const error = await rejection(quantizeTo(output, input, { force: true }));
    expect(error).toBeInstanceOf(WeightsError);
    expect(error.message).toContain("half-precision");
    expect(contents(output)).toEqual(before);
  });
});

describe("a stopped run", () => {
  const reference = place.fresh("reference");
  const input = twoShards();
  const config = { bit_width: 3, zero_point: "integer" };
  const ready = quantizeTo(reference, input, { config });

  /** Runs until `tensors` tensors are done, then stops by signal. */
  async function stopAfter(output: string, tensors: number, options: Options = {}): Promise<Error> {
    const controller = new AbortController();
    return await rejection(quantizeTo(output, input, {
      config,
      ...options,
      signal: controller.signal,
      onProgress: ({ tensorsDone }) => {
        if (tensorsDone >= tensors) controller.abort("SIGINT");
      },
    }));
  }

  test("can be resumed from each tensor on, to the same bytes", async () => {
    await ready;
    for (let tensors = 0; tensors <= 7; tensors++) {
      const output = place.fresh();
      const error = await stopAfter(output, tensors);
      expect(error).toBeInstanceOf(InterruptedError);
      expect(error.message).toContain("--resume");
      expect(readdirSync(output)).toEqual([WORK_FOLDER]);
      const { tensorsResumed } = await quantizeTo(output, input, { config, resume: true });
      expect(tensorsResumed).toBeGreaterThanOrEqual(Math.max(0, tensors - 1));
      expect(differences(output, reference)).toEqual([]);
    }
  });

  test("can be stopped again and again", async () => {
    await ready;
    const output = place.fresh();
    await stopAfter(output, 1);
    for (let tensors = 2; tensors <= 6; tensors++) await stopAfter(output, tensors, { resume: true });
    await quantizeTo(output, input, { config, resume: true });
    expect(differences(output, reference)).toEqual([]);
  });

  test("is not taken for a checkpoint", async () => {
    const output = place.fresh();
    await stopAfter(output, 5);
    expect(() => openCheckpoint(output)).toThrow(/stopped/);
  });

  test("needs --resume or --force", async () => {
    await ready;
    const output = place.fresh();
    await stopAfter(output, 3);
    const error = await rejection(quantizeTo(output, input, { config }));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("--resume");
    expect(error.message).toContain("--force");
    await quantizeTo(output, input, { config, force: true });
    expect(differences(output, reference)).toEqual([]);
  });

  test("is not resumed with another configuration or input", async () => {
    const output = place.fresh();
    await stopAfter(output, 3);
    const other = await rejection(
      quantizeTo(output, input, { config: { ...config, bit_width: 8 }, resume: true }),
    );
    expect(other).toBeInstanceOf(OutputError);
    expect(other.message).toContain("bit_width 3, not 8");
    const changed = await rejection(quantizeTo(output, DREAM, { config, resume: true }));
    expect(changed.message).toContain("another input");
    const threads = await quantizeTo(output, input, { config: { ...config, num_threads: 2 }, resume: true });
    expect(threads.tensorsResumed).toBeGreaterThanOrEqual(2);
  });

  test("is not resumed once the input was written again, not even with the same bytes", async () => {
    const copy = place.fresh("input");
    cpSync(input, copy, { recursive: true });
    const output = place.fresh();
    const controller = new AbortController();
    await rejection(quantizeTo(output, copy, {
      config,
      signal: controller.signal,
      onProgress: ({ tensorsDone }) => tensorsDone >= 3 && controller.abort("SIGINT"),
    }));
    utimesSync(join(copy, "model-00002-of-00002.safetensors"), new Date(1e12), new Date(1e12));
    const error = await rejection(quantizeTo(output, copy, { config, resume: true }));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("must not have changed");
  });

  test("counts only whole lines of its journal", async () => {
    const output = place.fresh();
    await stopAfter(output, 3);
    const path = join(output, WORK_FOLDER, "progress.jsonl");
    const { length } = readJournal(path).entries;
    expect(length).toBeGreaterThanOrEqual(2);
    truncateSync(path, readFileSync(path).length - 1); // the line feed alone: the rest still parses
    expect(readJournal(path).entries.length).toBe(length - 1);
  });

  test("is done again where its bytes or its journal are damaged", async () => {
    await ready;
    const damages: ((work: string) => void)[] = [
      (work) => {
        const path = join(work, "model-00001-of-00002.safetensors.partial");
        const bytes = readFileSync(path);
        bytes[bytes.length - 20]! ^= 1;
        writeFileSync(path, bytes);
      },
      (work) => truncateSync(join(work, "model-00001-of-00002.safetensors.partial"), 3000),
      (work) => rmSync(join(work, "model-00001-of-00002.safetensors.partial")),
      (work) => appendFileSync(join(work, "model-00001-of-00002.safetensors.partial"), "junk"),
      (work) => appendFileSync(join(work, "progress.jsonl"), '{"record":{"name":"model.la'),
      (work) => {
        const path = join(work, "progress.jsonl");
        truncateSync(path, readFileSync(path).length - 10);
      },
      (work) => truncateSync(join(work, "progress.jsonl"), 20),
      (work) => rmSync(join(work, "progress.jsonl")),
    ];
    for (const damage of damages) {
      const output = place.fresh();
      await stopAfter(output, 3);
      damage(join(output, WORK_FOLDER));
      await quantizeTo(output, input, { config, resume: true });
      expect(differences(output, reference)).toEqual([]);
    }
  });

  test("with damage is resumed twice", async () => {
    await ready;
    const output = place.fresh();
    await stopAfter(output, 6);
    const shard = join(output, WORK_FOLDER, "model-00001-of-00002.safetensors");
    const bytes = readFileSync(shard);
    bytes[bytes.length - 20]! ^= 1;
    writeFileSync(shard, bytes);
    await stopAfter(output, 3, { resume: true });
    await quantizeTo(output, input, { config, resume: true });
    expect(differences(output, reference)).toEqual([]);
  });

  test("is finished from every state of the last step", async () => {
    await ready;
    const names = readdirSync(reference).filter((name) => name !== MANIFEST_FILE);
    for (let moved = 0; moved <= names.length; moved++) {
      const output = place.fresh();
      await stopAfter(output, 7);
      const work = join(output, WORK_FOLDER);
      for (const name of [...names, MANIFEST_FILE]) cpSync(join(reference, name), join(work, name));
      for (const name of names.slice(0, moved)) renameSync(join(work, name), join(output, name));
      await quantizeTo(output, input, { config, resume: true });
      expect(differences(output, reference)).toEqual([]);
    }
  });

  test("that was cut off in the last step can be started over", async () => {
    await ready;
    const output = place.fresh();
    await stopAfter(output, 7);
    const work = join(output, WORK_FOLDER);
    for (const name of readdirSync(reference)) cpSync(join(reference, name), join(work, name));
    renameSync(join(work, "config.json"), join(output, "config.json"));
    const stopped = await stopAfter(output, 2, { force: true });
    expect(stopped).toBeInstanceOf(InterruptedError);
    expect(readdirSync(output)).toEqual([WORK_FOLDER]);
    await quantizeTo(output, input, { config, force: true });
    expect(differences(output, reference)).toEqual([]);
  });

  test("that was cut off behind the last step only cleans up", async () => {
    await ready;
    const output = place.fresh();
    await stopAfter(output, 2);
    for (const name of readdirSync(reference)) cpSync(join(reference, name), join(output, name));
    const { tensorsResumed } = await quantizeTo(output, input, { config, resume: true });
    expect(tensorsResumed).toBe(7);
    expect(differences(output, reference)).toEqual([]);
    const again = await quantizeTo(output, input, { config, resume: true });
    expect(again.tensorsResumed).toBe(7);
    appendFileSync(join(output, "config.json"), " ");
    expect(await rejection(quantizeTo(output, input, { config, resume: true }))).toBeInstanceOf(
      IntegrityError,
    );
  });

  test("before its first tensor, and a fresh folder, are resumed too", async () => {
    await ready;
    const output = place.fresh();
    await quantizeTo(output, input, { config, resume: true });
    expect(differences(output, reference)).toEqual([]);
  });

  test("of the way back is resumed to the same bytes", async () => {
    await ready;
    const [plain, output] = [place.fresh("plain"), place.fresh()];
    await dequantizeCheckpoint({ kernels, input: reference, output: plain });
    const controller = new AbortController();
    const stopped = await rejection(dequantizeCheckpoint({
      kernels,
      input: reference,
      output,
      signal: controller.signal,
      onProgress: ({ tensorsDone }) => {
        if (tensorsDone >= 3) controller.abort("SIGTERM");
      },
    }));
    expect(stopped).toBeInstanceOf(InterruptedError);
    await dequantizeCheckpoint({ kernels: withThreads(kernels, 2), input: reference, output, resume: true });
    expect(differences(output, plain)).toEqual([]);
    expect(contents(plain)["config.json"]).toBe(contents(input)["config.json"]!);
    expect(contents(plain)["tokenizer.json"]).toBe(contents(input)["tokenizer.json"]!);
  });
});

describe("the output folder", () => {
  test("is refused when it is finished, and replaced with force", async () => {
    const output = place.fresh();
    await quantizeTo(output, twoShards());
    writeFileSync(join(output, "notes.txt"), "mine");
    const error = await rejection(quantizeTo(output, DIT));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("--force");
    await quantizeTo(output, DIT, { force: true });
    expect(readdirSync(output).sort()).toEqual([
      MANIFEST_FILE,
      "config.json",
      "diffusion_pytorch_model.safetensors",
      "notes.txt",
      "scheduler_config.json",
    ]);
    expect(readFileSync(join(output, "notes.txt"), "utf8")).toBe("mine");
    openCheckpoint(output).close();
  });

  test("stays as it is while a forced run is not finished", async () => {
    const output = place.fresh();
    await quantizeTo(output, DREAM);
    const before = contents(output);
    const controller = new AbortController();
    await rejection(quantizeTo(output, DIT, {
      force: true,
      signal: controller.signal,
      onProgress: ({ tensorsDone }) => tensorsDone > 50 && controller.abort("SIGINT"),
    }));
    rmSync(join(output, WORK_FOLDER), { recursive: true });
    expect(contents(output)).toEqual(before);
  });

  test("of somebody else is refused, also with force, and left alone", async () => {
    for (const force of [false, true]) {
      const output = place.fresh();
      mkdirSync(output);
      writeFileSync(join(output, "config.json"), "precious");
      const error = await rejection(quantizeTo(output, DREAM, { force }));
      expect(error).toBeInstanceOf(OutputError);
      expect(error.message).toContain("--force does not delete");
      expect(contents(output)).toEqual({ "config.json": btoa("precious") });
    }
  });

  test("is not taken for ours by a manifest or a journal that names files elsewhere", async () => {
    const outer = place.fresh("outer");
    const output = join(outer, "out");
    const victim = join(outer, "victim");
    for (const name of ["../victim", victim, ".."]) {
      await quantizeTo(output, DREAM, { force: true });
      writeFileSync(victim, "precious");
      const path = join(output, MANIFEST_FILE);
      const text = readFileSync(path, "utf8");
      const manifest = JSON.parse(text);
      manifest.files[name] = { bytes: 8, sha256: "" };
      writeFileSync(path, JSON.stringify(manifest));
      const error = await rejection(quantizeTo(output, DREAM, { force: true }));
      expect(error).toBeInstanceOf(OutputError);
      writeFileSync(path, text);
      const work = join(output, WORK_FOLDER);
      mkdirSync(work);
      const header = {
        journal: 1,
        identity: manifest.identity,
        sourceTimes: [],
        files: [`../${name}`, name],
      };
      writeFileSync(join(work, "progress.jsonl"), `${JSON.stringify(header)}\n`);
      await quantizeTo(output, DREAM, { force: true });
      expect(readFileSync(victim, "utf8")).toBe("precious");
    }
  });

  test("that is finished and another one is not resumed but replaced", async () => {
    const output = place.fresh();
    await quantizeTo(output, DIT);
    const error = await rejection(quantizeTo(output, DIT, { config: { bit_width: 8 }, resume: true }));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("no stopped run but a finished output with bit_width 4, not 8");
    expect(error.message).toContain("replace it with --force instead of --resume");
  });

  test("with a file of somebody else under a name that is needed is refused", async () => {
    const output = place.fresh();
    await quantizeTo(output, DIT);
    writeFileSync(join(output, "tokenizer.json"), "precious");
    const error = await rejection(quantizeTo(output, DREAM, { force: true }));
    expect(error.message).toContain('"tokenizer.json"');
    expect(readFileSync(join(output, "tokenizer.json"), "utf8")).toBe("precious");
  });

  test("must not be an empty text, nor the input", async () => {
    const folder = process.cwd();
    const here = place.fresh("here");
    mkdirSync(here);
    writeFileSync(join(here, "config.json"), "precious");
    process.chdir(here); // what an empty path would mean
    try {
      for (const options of [{}, { force: true }, { resume: true }, { dryRun: true as const }]) {
        const error = await rejection(
          quantizeCheckpoint({ kernels, ...options, input: DREAM, output: "", config: configOf() }),
        );
        expect(error).toBeInstanceOf(OutputError);
      }
      const back = await rejection(dequantizeCheckpoint({ kernels, input: DREAM, output: "" }));
      expect(back).toBeInstanceOf(OutputError);
      for (
        const work of [quantizeTo("out", ""), dequantizeCheckpoint({ kernels, input: "", output: "out" })]
      ) {
        expect(await rejection(work)).toBeInstanceOf(CheckpointError);
      }
      expect(contents(here)).toEqual({ "config.json": btoa("precious") });
    } finally {
      process.chdir(folder);
    }
  });

  test("may be there and empty", async () => {
    const output = place.fresh();
    mkdirSync(output);
    await quantizeTo(output, DREAM);
    expect(readdirSync(output)).toContain(MANIFEST_FILE);
  });

  test("must not be the input, by whatever path", async () => {
    const input = place.fresh("input");
    cpSync(DREAM, input, { recursive: true });
    const before = contents(input);
    const [link, outer] = [place.fresh("link"), place.fresh("outer")];
    symlinkSync(input, link);
    mkdirSync(outer);
    symlinkSync(link, join(outer, "nested"));
    const shards = place.fresh("shards"); // as a download cache does it: a folder of links to files elsewhere
    mkdirSync(shards);
    for (const name of readdirSync(input)) symlinkSync(join(input, name), join(shards, name));
    for (
      const [from, to] of [
        [input, input],
        [input, link],
        [link, input],
        [input, join(outer, "nested")],
        [
          input,
          join(input, "..", input.split("/").at(-1)!),
        ],
        [shards, input],
        [join(input, "model-00001-of-00002.safetensors"), input],
      ] as const
    ) {
      for (const force of [false, true]) {
        const error = await rejection(quantizeTo(to, from, { force }));
        expect(error).toBeInstanceOf(OutputError);
        expect(error.message).toContain("must not be the input's folder");
      }
    }
    expect(contents(input)).toEqual(before);
  });

  test("that cannot be made is refused with its path", async () => {
    const file = place.fresh("file");
    writeFileSync(file, "");
    for (const output of [file, join(file, "below"), "/proc/arrowquant-test"]) {
      const error = await rejection(quantizeTo(output, DREAM));
      expect(error).toBeInstanceOf(OutputError);
      expect(error.message).toContain(output);
    }
    expect(readFileSync(file, "utf8")).toBe("");
  });

  test("takes one run at a time", async () => {
    const output = place.fresh();
    let second: Promise<Error> | undefined;
    await quantizeTo(output, DREAM, {
      onProgress: () => second ??= rejection(quantizeTo(output, DREAM, { force: true })),
    });
    const error = await second!;
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("one run at a time");
    expect(await verifyFiles(output, readManifest(output)!)).toEqual([]);
  });

  test("is free again when its holder is dead", async () => {
    const output = place.fresh();
    const work = join(output, WORK_FOLDER);
    const host = hostname().replace(/[^\w.-]/g, "_");
    // A number that a process has which started at another time; one that nobody has; this process before it was this.
    for (const holder of ["1-00000000.5", `${2 ** 22 + 1}-0`, `${process.pid}-0`]) {
      mkdirSync(work, { recursive: true });
      writeFileSync(join(work, `lock-${host}-${holder}-0`), "");
      await quantizeTo(output, DREAM, { force: true });
      expect(existsSync(work)).toBe(false);
    }
    mkdirSync(work);
    writeFileSync(join(work, "lock-elsewhere.invalid-1-0-0"), "");
    const error = await rejection(quantizeTo(output, DREAM, { force: true }));
    expect(error.message).toContain("elsewhere.invalid");
  });
});

describe("a matrix of several chunks", () => {
  const [rows, cols] = [2600, 1024]; // 2048 rows are one chunk
  const weights = gaussian(rows * cols, 41);
  for (let i = 0; i < 2048 * cols; i++) weights[i]! += 0.2; // so that zero points differ from chunk to chunk

  for (const zero_point of ["real", "integer"]) {
    test(`comes back row by row, with the error that is reported: ${zero_point}`, async () => {
      const input = writeCheckpoint(place.fresh("input"), { "a.weight": matrix(rows, cols, weights) });
      const output = place.fresh();
      const { layers: [layer] } = await quantizeTo(output, input, { config: { zero_point, bit_width: 4 } });
      await dequantizeCheckpoint({ kernels, input: output, output: `${output}-plain` });
      const { data } = readIndependently(join(`${output}-plain`, "model.safetensors")).tensors["a.weight"]!;
      const back = new Float32Array(data.slice().buffer);
      let [squares, error, worst] = [0, 0, 0];
      for (let i = 0; i < weights.length; i++) {
        squares += weights[i]! ** 2;
        error += (weights[i]! - back[i]!) ** 2;
        worst = Math.max(worst, Math.abs(weights[i]! - back[i]!));
      }
      expect(layer!.statistics!.sumSquares / squares).toBeCloseTo(1, 10);
      expect(layer!.statistics!.sumSquaredError / error).toBeCloseTo(1, 8);
      expect(layer!.statistics!.maxError).toBeCloseTo(worst, 6);
      expect(Math.sqrt(error / squares)).toBeLessThan(0.1);
    });
  }

  test("names the row of a NaN in a later chunk, quantized or kept", async () => {
    const broken = weights.slice();
    broken[2300 * cols + 5] = NaN;
    const input = writeCheckpoint(place.fresh("input"), {
      "a.weight": matrix(rows, cols, broken),
      "wte.weight": matrix(rows, cols, broken),
    });
    const { message } = await rejection(quantizeTo(place.fresh(), input));
    expect(message.split("row 2300, column 5").length).toBe(3);
  });
});

describe("faults of the disk", () => {
  test("that gives back other bytes than were written are found", () => {
    const spec = { name: "a", dtype: "U8", shape: [4] } as const;
    using writer = SafetensorsWriter.create(place.fresh("file"), {
      reservedHeaderBytes: SafetensorsWriter.headerBytes([spec]),
    });
    const sink = new TensorSink(writer, () => Promise.resolve());
    sink.begin([spec]);
    sink.write("a", Uint8Array.of(1, 2));
    const readInto = writer.readInto.bind(writer);
    writer.readInto = (name, byteStart, target) => {
      readInto(name, byteStart, target);
      target[1]! ^= 0x10;
    };
    expect(() => sink.write("a", Uint8Array.of(3, 4))).toThrow(IntegrityError);
  });

  test("that show in a background sync end the run", async () => {
    const input = writeCheckpoint(place.fresh("input"), {
      // More than is written between two syncs.
      "a.bias": { dtype: "U8", shape: [100 * 2 ** 20], data: new Uint8Array(100 * 2 ** 20) },
    });
    const output = place.fresh();
    const partial = join(output, WORK_FOLDER, "model.safetensors.partial");
    const error = await rejection(quantizeTo(output, input, {
      // The file under another name cannot be opened for the sync; back again, nothing else notices.
      onProgress: ({ bytesDone, bytes }) => {
        if (bytesDone === 8 * 2 ** 20) renameSync(partial, `${partial}.away`);
        if (bytesDone === bytes && existsSync(`${partial}.away`)) renameSync(`${partial}.away`, partial);
      },
    }));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("Cannot sync");
  });
});

describe("a full disk", () => {
  /** A small file system of its own; undefined where mounting is not permitted. */
  function mountSmall(megabytes: number): string | undefined {
    const path = place.fresh("disk");
    mkdirSync(path);
    const { status } = spawnSync("mount", ["-t", "tmpfs", "-o", `size=${megabytes}m`, "tmpfs", path]);
    if (status === 0) return path;
    console.log("skipped: no permission to mount a small file system");
    return undefined;
  }

  test("is noticed before anything is written", async () => {
    const disk = mountSmall(1);
    if (disk === undefined) return;
    try {
      const output = join(disk, "out");
      const error = await rejection(quantizeTo(output, DIT, { config: { bit_width: 8 } }));
      expect(error).toBeInstanceOf(OutputError);
      expect(error.message).toContain("free bytes");
      expect(existsSync(output)).toBe(false);
    } finally {
      spawnSync("umount", [disk]);
    }
  });

  test("in the middle names file and need, and can be resumed once there is room", async () => {
    const disk = mountSmall(8);
    if (disk === undefined) return;
    try {
      const [output, filler, reference] = [join(disk, "out"), join(disk, "filler"), place.fresh()];
      const config = { bit_width: 8 };
      await quantizeTo(reference, DIT, { config });
      let isFull = false;
      const error = await rejection(quantizeTo(output, DIT, {
        config,
        onProgress: ({ tensorsDone }) => {
          if (tensorsDone < 20 || isFull) return;
          isFull = true;
          const { bavail, bsize } = statfsSync(disk);
          writeFileSync(filler, new Uint8Array(bavail * bsize - 100_000));
        },
      }));
      expect(error).toBeInstanceOf(OutputError);
      expect(error.message).toContain("diffusion_pytorch_model.safetensors.partial");
      expect(error.message).toMatch(/\d+ more bytes are needed/);
      expect(readdirSync(output)).toEqual([WORK_FOLDER]);
      rmSync(filler);
      const { tensorsResumed } = await quantizeTo(output, DIT, { config, resume: true });
      expect(tensorsResumed).toBeGreaterThanOrEqual(20);
      expect(differences(output, reference)).toEqual([]);
    } finally {
      spawnSync("umount", [disk]);
    }
  });
});

describe("bad input", () => {
  test("that is quantized already, or not at all, is refused", async () => {
    const output = place.fresh();
    await quantizeTo(output, DREAM);
    const error = await rejection(quantizeTo(place.fresh(), output));
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.message).toContain("dequantize it first");
    const back = await rejection(dequantizeCheckpoint({ kernels, input: DREAM, output: place.fresh() }));
    expect(back).toBeInstanceOf(CheckpointError);
  });

  test("that has a scale beside its weights is refused, and can be kept", async () => {
    const input = writeCheckpoint(place.fresh("input"), {
      "a.weight": { dtype: "F8_E4M3", shape: [16, 16], data: new Uint8Array(256) },
      "a.weight_scale": { dtype: "F32", shape: [], data: Float32Array.of(2) },
      "b.weight": matrix(16, 16, gaussian(256, 1)),
    });
    const error = await rejection(quantizeTo(place.fresh(), input));
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.tensor).toBe("a.weight");
    const { totals } = await quantizeTo(place.fresh(), input, { config: { keep_patterns: ["^a\\."] } });
    expect(totals.tensors).toBe(1);
  });

  test("that becomes shorter during the run names file and tensor", async () => {
    const input = place.fresh("input");
    cpSync(DIT, input, { recursive: true });
    const output = place.fresh();
    const file = join(input, "diffusion_pytorch_model.safetensors");
    const error = await rejection(quantizeTo(output, input, {
      onProgress: ({ tensorsDone }) => tensorsDone === 30 && truncateSync(file, 1_000_000),
    }));
    expect(error).toBeInstanceOf(FormatError);
    expect(error.path).toBe(file);
    expect(error.tensor).toMatch(/weight|bias/);
    expect(readdirSync(output)).toEqual([WORK_FOLDER]);
  });

  test("that has a name too long for its parts is refused before any work, and can be kept", async () => {
    const longest = (length: number) => `${"n".repeat(length - ".weight".length)}.weight`;
    const inputOf = (length: number) =>
      writeCheckpoint(place.fresh("input"), { [longest(length)]: matrix(2, 32, gaussian(64, 1)) });
    const output = place.fresh();
    for (const [zero_point, most] of [["real", 1013], ["symmetric", 1017]] as const) {
      const error = await rejection(quantizeTo(output, inputOf(most + 1), { config: { zero_point } }));
      expect(error).toBeInstanceOf(CheckpointError);
      expect(error.message).toContain(`at most ${most} characters`);
      expect(error.tensor).toBe(longest(most + 1));
      expect(existsSync(output)).toBe(false);
      const { totals } = await quantizeTo(place.fresh(), inputOf(most), { config: { zero_point } });
      expect(totals.tensors).toBe(1);
    }
    const kept = await quantizeTo(place.fresh(), inputOf(1024), { config: { keep_patterns: ["^n"] } });
    expect(kept.totals.tensorsKept).toBe(1);
  });

  test("resume and force together are refused", async () => {
    const error = await rejection(quantizeTo(place.fresh(), DREAM, { resume: true, force: true }));
    expect(error).toBeInstanceOf(RangeError);
  });
});

test("the tool's version is the package's", () => {
  for (const file of ["deno.json", "package.json"]) {
    expect(JSON.parse(readFileSync(join(ROOT, file), "utf8")).version).toBe(TOOL_VERSION);
  }
});

test("docs/format.md has every rule, docs/errors.md every code with its exit code", () => {
  const [format, errors] = ["format.md", "errors.md"].map((name) =>
    readFileSync(join(ROOT, "docs", name), "utf8")
  );
  for (const { rule, pattern, why } of KEEP_RULES) {
    const cell = pattern === undefined ? "" : `\`${pattern.replaceAll("|", "\\|")}\``;
    expect(format).toContain(`| ${rule} | ${cell}${cell === "" ? "" : " "}| ${why} |`);
  }
  for (const [code, exitCode] of Object.entries(EXIT_CODES)) {
    expect(errors).toMatch(new RegExp(`^\\| ${exitCode} .*\`${code}\``, "m"));
  }
});
