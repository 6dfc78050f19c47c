import { afterAll, describe, expect, test } from "bun:test";
import {
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { DEFAULT_CONFIG } from "../../lib/config/mod.ts";
import { CheckpointError, FormatError, WeightsError } from "../../lib/errors.ts";
import { openKernels } from "../../lib/native/mod.ts";
import {
  dequantizeCheckpoint,
  KEEP_RULES,
  MANIFEST_FILE,
  quantizeCheckpoint,
  readManifest,
  type RunEvent,
  TOOL_VERSION,
  verifyFiles,
  WORK_FOLDER,
} from "../../lib/pipeline/mod.ts";
import { EXIT_CODES } from "../../scripts/_command/run.ts";
import {
  contents,
  differences,
  gaussian,
  matrix,
  rejection,
  ROOT,
  workplace,
  writeCheckpoint,
} from "../_checkpoints.ts";
import { readIndependently } from "../tensor/_files.ts";
import { configOf, DIT, DREAM, pipelineRuns } from "./_runs.ts";

const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});
const { quantizeTo, twoShards } = pipelineRuns(kernels, place);

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
      expect(contents(fromFile)[name]).toBe(contents(join(fromFolder, "transformer"))[name]!);
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

  test("that has scales beside integer weights is refused", async () => {
    const input = writeCheckpoint(place.fresh("input"), {
      "a.weight": { dtype: "I8", shape: [16, 16], data: new Uint8Array(256) },
      "a.weight_scale": { dtype: "F32", shape: [], data: Float32Array.of(2) },
      "b.weight": matrix(16, 16, gaussian(256, 1)),
    });
    const error = await rejection(quantizeTo(place.fresh(), input));
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.message).toContain('"a.weight", I8 [16, 16]');
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
