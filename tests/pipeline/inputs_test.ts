import { afterAll, describe, expect, test } from "bun:test";
import {
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { CheckpointError, InterruptedError, OutputError } from "../../lib/errors.ts";
import { openKernels } from "../../lib/native/mod.ts";
import {
  dequantizeCheckpoint,
  quantizeCheckpoint,
  readManifest,
  verifyFiles,
} from "../../lib/pipeline/mod.ts";
import type { RunEvent } from "../../lib/progress.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { contents, gaussian, matrix, rejection, workplace, writeCheckpoint } from "../_checkpoints.ts";
import { readIndependently } from "../tensor/_files.ts";
import { configOf, DIT, DREAM, pipelineRuns } from "./_runs.ts";

const kernels = await openKernels();
const place = workplace();
afterAll(() => {
  kernels.close();
  place.remove();
});
const { quantizeTo } = pipelineRuns(kernels, place);

test("scaled FP8 weights are quantized as what they stand for, and nothing of them is left", async () => {
  const values = gaussian(64 * 128, 1), scale = 0.001;
  // E4M3 codes of the weights: of all codes the nearest, by way of half precision
  const all = Array.from(
    { length: 0x7f },
    (_, code) => new DataView(Uint16Array.of(code << 7).buffer).getFloat16(0, true) * 256,
  );
  const codes = Uint8Array.from(values, (value) => {
    const wanted = Math.abs(value) / scale;
    const nearest = all.reduce(
      (best, it, i) => Math.abs(it - wanted) < Math.abs(all[best]! - wanted) ? i : best,
      0,
    );
    return nearest | (value < 0 ? 128 : 0);
  });
  const weight = { dtype: "F8_E4M3", shape: [64, 128], data: codes };
  const input = writeCheckpoint(
    place.fresh("fp8"),
    {
      "a.weight": weight,
      "a.weight_scale_inv": { dtype: "F32", shape: [1, 1], data: Float32Array.of(scale) },
      "a.input_scale": { dtype: "F32", shape: [], data: Float32Array.of(3) },
      "lm_head.weight": weight,
      "lm_head.weight_scale_inv": { dtype: "F32", shape: [1, 1], data: Float32Array.of(2 * scale) },
    },
    { quantization_config: { quant_method: "fp8", weight_block_size: [128, 128] } },
  );
  const output = place.fresh(), plain = place.fresh();
  await quantizeTo(output, input, { config: { bit_width: 8, keep_patterns: ["^lm_head"] } });
  await dequantizeCheckpoint({ kernels, input: output, output: plain, dtype: "F32" });
  const stored = readIndependently(join(plain, "model.safetensors")).tensors;
  expect(Object.keys(stored)).toEqual(["a.weight", "lm_head.weight"]);
  const back = new Float32Array(stored["a.weight"]!.data.slice().buffer);
  const head = new Float32Array(stored["lm_head.weight"]!.data.slice().buffer);
  const error = Math.hypot(...back.map((it, i) => it - values[i]!)) / Math.hypot(...values);
  expect(error).toBeLessThan(0.03); // FP8's own 2.6 % and a little of 8 bits
  expect(Math.hypot(...head) / Math.hypot(...values)).toBeCloseTo(2, 2);
  const config = JSON.parse(readFileSync(join(output, "config.json"), "utf8"));
  expect(config.quantization_config.quant_method).toBe("arrowquant");
});

test("types that are no weights are kept to the byte", async () => {
  const types: [string, number[]][] = [
    ["C64", [4]],
    ["C128", [1, 2]],
    ["F8_E8M0", [32]],
    ["F4", [2, 32]],
    ["F6_E2M3", [4, 4]],
    ["F6_E3M2", [8]],
    ["F8_E4M3FNUZ", [12]],
    ["I4", [6]],
    ["U16", [16]],
    ["BOOL", [12]],
  ];
  const sizes = [32, 32, 32, 32, 12, 6, 12, 3, 32, 12];
  const tensors = Object.fromEntries(
    types.map(([dtype, shape], i) =>
      [`buffer_${i}`, {
        dtype,
        shape,
        data: Uint8Array.from({ length: sizes[i]! }, (_, at) => 7 * at + i),
      }] as const
    ),
  );
  const input = writeCheckpoint(place.fresh("types"), {
    ...tensors,
    "a.weight": matrix(16, 64, gaussian(1024, 2)),
  });
  const output = place.fresh();
  await quantizeTo(output, input);
  using before = openCheckpoint(input);
  using after = openCheckpoint(output);
  for (const name of Object.keys(tensors)) {
    expect(after.tensors.get(name)!.info).toMatchObject({
      dtype: tensors[name]!.dtype,
      shape: tensors[name]!.shape,
    });
    expect(after.read(name)).toEqual(before.read(name));
  }
});

describe("a run says", () => {
  /** Events of a run, as `kind: message`, and its report. */
  async function eventsOf(input: string, config: Record<string, unknown> = {}, dryRun = false) {
    const events: string[] = [],
      onEvent = ({ kind, message }: RunEvent) => void events.push(`${kind}: ${message}`);
    const options = { input, output: place.fresh(), config: configOf(config), onEvent };
    const report = dryRun
      ? await quantizeCheckpoint({ ...options, dryRun })
      : await quantizeCheckpoint({ ...options, kernels });
    return { events: events.join("\n"), report };
  }

  test("that nothing is quantized, and why", async () => {
    const input = writeCheckpoint(place.fresh("none"), {
      "a.bias": { dtype: "F32", shape: [2], data: Float32Array.of(1, 2) },
      "ids": { dtype: "I64", shape: [1], data: BigInt64Array.of(1n) },
    });
    const { events, report } = await eventsOf(input);
    expect(events).toContain(
      "warning: nothing is quantized: every tensor is kept (1 not a matrix, 1 not floating)",
    );
    expect((await eventsOf(input, {}, true)).report.plan.warnings).toEqual(report.plan.warnings);
  });

  test("that an architecture cannot run here, and refuses to calibrate it", async () => {
    const matrices = { "model.layers.0.q.weight": matrix(32, 64, gaussian(2048, 3)) };
    const unknown = { architectures: ["LlamaForCausalLM"], model_type: "llama" };
    const unlike = { ...JSON.parse(readFileSync(join(DREAM, "config.json"), "utf8")), hidden_act: "gelu" };
    for (const [config, wanted] of [[unknown, '"llama"'], [unlike, '"hidden_act"']] as const) {
      const input = writeCheckpoint(place.fresh("unknown"), matrices, config);
      const { events, report } = await eventsOf(input);
      expect(events).toContain("input: weights alone are quantized");
      expect(events).toContain(wanted);
      expect(report.totals.tensors).toBe(1);
      const output = place.fresh();
      for (const solver of ["best", "clip"]) {
        const settings = { config: { solver, calibration_data: "synthetic" } };
        const error = await rejection(quantizeTo(output, input, settings));
        expect(error).toBeInstanceOf(CheckpointError);
        expect(error.message).toContain("the solvers clip and round need no run of the model");
      }
      const settings = { config: { solver: "best", calibration_data: "gone.safetensors" } };
      const { message } = await rejection(quantizeTo(output, input, settings));
      expect(message).toContain('there is no file "gone.safetensors"');
      expect(existsSync(output)).toBe(false);
    }
    expect((await eventsOf(DREAM)).events).not.toContain("input:");
  });

  test("what others have quantized, and writes nothing", async () => {
    const input = writeCheckpoint(place.fresh("gptq"), {
      "a.qweight": { dtype: "I32", shape: [2, 16], data: new Int32Array(32) },
      "a.scales": { dtype: "F16", shape: [1, 16], data: new Uint16Array(16) },
    }, {});
    const output = place.fresh();
    for (const run of [quantizeTo(output, input), dequantizeCheckpoint({ kernels, input, output })]) {
      const error = await rejection(run);
      expect(error).toBeInstanceOf(CheckpointError);
      expect(error.message).toContain("GPTQ weights");
    }
    expect(existsSync(output)).toBe(false);
  });
});

describe("a diffusers pipeline", () => {
  const components = {
    transformer: ["diffusers", "DiTTransformer2DModel"],
    scheduler: ["diffusers", "DDIMScheduler"],
  };
  const files: Record<string, string> = {
    "model_index.json": JSON.stringify({
      ...components,
      vae: ["diffusers", "AutoencoderKL"],
      text_encoder: [null, null],
    }),
    "scheduler/scheduler_config.json": readFileSync(join(DIT, "scheduler_config.json"), "utf8"),
    "vae/config.json": "{}",
    "vae/diffusion_pytorch_model.safetensors": "x".repeat(5 * 2 ** 20),
    "vae/diffusion_pytorch_model.bin": "a pickle of the same",
    "LICENSE": "free",
    "README.md": "left",
    "samples/a.png": "left",
  };

  function pipeline(): string {
    const root = place.fresh("root");
    for (const [name, content] of Object.entries(files)) {
      mkdirSync(join(root, name, ".."), { recursive: true });
      writeFileSync(join(root, name), content);
    }
    mkdirSync(join(root, "transformer"));
    for (const name of ["config.json", "diffusion_pytorch_model.safetensors"]) {
      cpSync(join(DIT, name), join(root, "transformer", name));
    }
    return root;
  }

  test("whose links lead in circles is given up soon", async () => {
    const input = pipeline();
    for (let i = 0; i < 60; i++) symlinkSync(".", join(input, "vae", `circle${i}`));
    const { message } = await rejection(quantizeTo(place.fresh(), input));
    expect(message).toContain("at most 10000 files and folders");
  });

  test("goes in, and one that draws comes out, is verified, replaced and turned back", async () => {
    const input = pipeline(), output = place.fresh();
    symlinkSync("loop", join(input, "loop"));
    symlinkSync("nowhere", join(input, "vae", "gone.json"));
    const { copied, left } = await quantizeTo(output, input);
    const kept = Object.keys(files).filter((name) => !/README|samples|\.bin$/.test(name)).sort();
    expect([...copied].sort()).toEqual(kept);
    expect([...left].sort()).toEqual([
      "README.md",
      "loop",
      "samples",
      "vae/diffusion_pytorch_model.bin",
      "vae/gone.json",
    ]);
    const alone = place.fresh();
    await quantizeTo(alone, join(input, "transformer"));
    const written = contents(output), reference = contents(alone);
    for (const name of ["config.json", "diffusion_pytorch_model.safetensors"]) {
      expect(written[`transformer/${name}`] === reference[name]).toBe(true);
    }
    for (const name of kept) expect(written[name]).toBe(Buffer.from(files[name]!).toString("base64"));
    expect(Object.keys(written).length).toBe(kept.length + 3);
    expect(await verifyFiles(output, readManifest(output)!)).toEqual([]);
    using checkpoint = openCheckpoint(output);
    expect([checkpoint.kind, checkpoint.subfolder, checkpoint.root]).toEqual(["dit", "transformer", output]);

    await quantizeTo(output, input, { force: true, config: { bit_width: 2 } });
    expect(Object.keys(contents(output)).sort()).toEqual(Object.keys(written).sort());
    const plain = place.fresh();
    await dequantizeCheckpoint({ kernels, input: output, output: plain });
    expect(Object.keys(contents(plain)).sort()).toEqual(Object.keys(written).sort());
    // a file of the input's name in place of another folder: only ours are replaced
    await quantizeTo(output, join(input, "transformer"), { force: true });
    expect(readdirSync(output).sort()).toEqual([
      "arrowquant.manifest.json",
      "config.json",
      "diffusion_pytorch_model.safetensors",
      "scheduler_config.json",
    ]);
  });

  test("that lacks a part which its index names is quantized, with a warning", async () => {
    const input = pipeline(), warnings: string[] = [], index = join(input, "model_index.json");
    const parts = JSON.parse(readFileSync(index, "utf8"));
    writeFileSync(
      index,
      JSON.stringify({
        ...parts,
        text_encoder_2: ["transformers", "T5EncoderModel"],
        safety_checker: [null, null],
        requires_safety_checker: false,
      }),
    );
    const onEvent = ({ kind, message }: RunEvent) => {
      if (kind === "warning") warnings.push(message!);
    };
    await quantizeTo(place.fresh(), input, { onEvent });
    expect(warnings.filter((text) => text.includes("model_index.json"))).toEqual([
      `model_index.json names "text_encoder_2", which "${input}" lacks, and so will the output`,
    ]);
  });

  test("with two denoisers gets both quantized, in two runs", async () => {
    const input = pipeline(), first = place.fresh(), second = place.fresh();
    cpSync(join(input, "transformer"), join(input, "transformer_2"), { recursive: true });
    const index = join(input, "model_index.json"), components = JSON.parse(readFileSync(index, "utf8"));
    writeFileSync(index, JSON.stringify({ ...components, transformer_2: components.transformer }));
    expect((await rejection(quantizeTo(first, input))).message).toContain("choose with --subfolder");
    await quantizeTo(first, input, { subfolder: "transformer" });
    await quantizeTo(second, first, { subfolder: "transformer_2" });
    const written = contents(second), half = contents(first);
    expect(Object.keys(written).sort()).toEqual(Object.keys(half).sort());
    for (const name of ["config.json", "diffusion_pytorch_model.safetensors"]) {
      expect(written[`transformer/${name}`] === half[`transformer/${name}`]).toBe(true);
      expect(written[`transformer_2/${name}`] === half[`transformer/${name}`]).toBe(true);
    }
    expect(await verifyFiles(second, readManifest(second)!)).toEqual([]);
  });

  test("'s denoiser alone, or a model with its schedule in a folder, draws as well", async () => {
    const below = place.fresh("below"), schedule = files["scheduler/scheduler_config.json"]!;
    cpSync(
      join(DIT, "diffusion_pytorch_model.safetensors"),
      join(below, "diffusion_pytorch_model.safetensors"),
    );
    cpSync(join(DIT, "config.json"), join(below, "config.json"));
    mkdirSync(join(below, "scheduler"));
    writeFileSync(join(below, "scheduler", "scheduler_config.json"), schedule);
    for (const input of [join(pipeline(), "transformer"), below]) {
      const output = place.fresh(), { copied } = await quantizeTo(output, input);
      expect(copied).toEqual(["scheduler_config.json"]);
      expect(readFileSync(join(output, "scheduler_config.json"), "utf8")).toBe(schedule);
    }
  });

  test("is resumed where it was stopped", async () => {
    const input = pipeline(), [output, whole] = [place.fresh(), place.fresh()], stop = new AbortController();
    const onProgress = ({ tensorsDone }: { tensorsDone: number }) => tensorsDone > 60 && stop.abort("SIGINT");
    const error = await rejection(quantizeTo(output, input, { onProgress, signal: stop.signal }));
    expect(error).toBeInstanceOf(InterruptedError);
    const { tensorsResumed } = await quantizeTo(output, input, { resume: true });
    expect(tensorsResumed).toBeGreaterThan(50);
    await quantizeTo(whole, input);
    expect(contents(output)).toEqual(contents(whole));
  });

  test("writes into no folder that a link leads to", async () => {
    const input = pipeline(), output = place.fresh(), elsewhere = place.fresh("elsewhere");
    await quantizeTo(output, join(input, "transformer"));
    mkdirSync(elsewhere);
    symlinkSync(elsewhere, join(output, "vae"));
    const error = await rejection(quantizeTo(output, input, { force: true }));
    expect(error).toBeInstanceOf(OutputError);
    expect(readdirSync(elsewhere)).toEqual([]);
    expect(await verifyFiles(output, readManifest(output)!)).toEqual([]);
  });
});
