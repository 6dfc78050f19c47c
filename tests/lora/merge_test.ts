/** LoRAs merged into checkpoints, against W + alpha / rank · up · down in float64. */
import { afterAll, describe, expect, test } from "bun:test";
import { cpSync, existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { CheckpointError } from "../../lib/errors.ts";
import { quantizeFor } from "../../lib/interop/mod.ts";
import { loraEvents, mergeLoras } from "../../lib/lora/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { quantizeCheckpoint, type RunReport } from "../../lib/pipeline/mod.ts";
import { openCheckpoint, SafetensorsFile } from "../../lib/tensor/mod.ts";
import {
  gaussian,
  matrix,
  rejection,
  run as runCommand,
  type TestTensor,
  workplace,
  writeCheckpoint,
  writeTensors,
} from "../_checkpoints.ts";
import { thrown } from "../tensor/_files.ts";
import { configOf, DREAM } from "../pipeline/_runs.ts";

const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});

const RANK = 6;
let seed = 100;
const random = (rows: number, cols: number) => matrix(rows, cols, gaussian(rows * cols, seed++, 0.3));
const scalar = (value: number): TestTensor => ({ dtype: "F32", shape: [], data: Float32Array.of(value) });
const valuesOf = ({ data }: TestTensor) => data as Float32Array;

/** W + factor · up · down for rows `[from, from + rows of W)` of up. */
function product(
  weight: TestTensor,
  up: TestTensor,
  down: TestTensor,
  factor: number,
  from = 0,
): Float64Array {
  const [rows = 0] = weight.shape, cols = valuesOf(weight).length / rows, rank = down.shape[0]!;
  const out = Float64Array.from(valuesOf(weight));
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < cols; c++) {
      for (let k = 0; k < rank; k++) {
        out[r * cols + c]! += factor * valuesOf(up)[(from + r) * rank + k]! * valuesOf(down)[k * cols + c]!;
      }
    }
  }
  return out;
}

function loraFile(tensors: Record<string, TestTensor>, name = "lora.safetensors", config?: unknown): string {
  const folder = place.fresh("lora");
  mkdirSync(folder);
  writeTensors(join(folder, name), tensors);
  if (config !== undefined) writeFileSync(join(folder, "adapter_config.json"), JSON.stringify(config));
  return join(folder, name);
}

/** What a checkpoint reads for a tensor with LoRAs in it. */
function merged(
  model: string,
  loras: { path: string; scale?: number }[],
  name: string,
): Float32Array {
  using checkpoint = openCheckpoint(model);
  using result = mergeLoras(checkpoint, loras);
  expect(result.checkpoint.tensors.get(name)!.info.dtype).toBe("F32");
  const all = result.checkpoint.read(name);
  for (const [start, end] of [[5, 6], [0, 8], [all.length - 9, all.length]]) {
    expect(result.checkpoint.read(name, start, end)).toEqual(all.slice(start, end));
  }
  return new Float32Array(all.buffer);
}

function expectClose(got: Float32Array, wanted: Float64Array): void {
  expect(got.length).toBe(wanted.length);
  for (const [i, value] of wanted.entries()) {
    if (Math.abs(got[i]! - value) > 1e-7 * (1 + Math.abs(value))) {
      throw new Error(`${i}: ${got[i]}, wanted ${value}`);
    }
  }
}

describe("spellings of a module", () => {
  const MODULE = "transformer_blocks.0.attn1.to_q", weight = random(10, 12);
  const model = writeCheckpoint(place.fresh("model"), {
    [`${MODULE}.weight`]: weight,
    "transformer_blocks.0.attn1.to_out.0.weight": random(12, 12),
    "proj_in.weight": random(12, 12),
  }, {});
  const up = random(10, RANK), down = random(RANK, 12);

  const CASES: [name: string, tensors: Record<string, TestTensor>, factor: number][] = [
    ["PEFT without a configuration", {
      [`base_model.model.${MODULE}.lora_A.weight`]: down,
      [`base_model.model.${MODULE}.lora_B.weight`]: up,
    }, 1],
    ["PEFT with the adapter's name", {
      [`base_model.model.${MODULE}.lora_A.default.weight`]: down,
      [`base_model.model.${MODULE}.lora_B.default.weight`]: up,
    }, 1],
    ["diffusers", {
      [`transformer.${MODULE}.lora_A.weight`]: down,
      [`transformer.${MODULE}.lora_B.weight`]: up,
    }, 1],
    ["diffusers with alpha", {
      [`unet.${MODULE}.lora_A.weight`]: down,
      [`unet.${MODULE}.lora_B.weight`]: up,
      [`unet.${MODULE}.alpha`]: scalar(3),
    }, 3 / RANK],
    [
      "older diffusers",
      { [`unet.${MODULE}.lora.down.weight`]: down, [`unet.${MODULE}.lora.up.weight`]: up },
      1,
    ],
    ["diffusers' processors", {
      "transformer_blocks.0.attn1.processor.to_q_lora.down.weight": down,
      "transformer_blocks.0.attn1.processor.to_q_lora.up.weight": up,
    }, 1],
    ["kohya", {
      "lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight": down,
      "lora_unet_transformer_blocks_0_attn1_to_q.lora_up.weight": up,
      "lora_unet_transformer_blocks_0_attn1_to_q.alpha": scalar(12),
    }, 12 / RANK],
    ["ComfyUI", {
      [`diffusion_model.${MODULE}.lora_down.weight`]: down,
      [`diffusion_model.${MODULE}.lora_up.weight`]: up,
    }, 1],
  ];
  for (const [name, tensors, factor] of CASES) {
    test(name, () => {
      const path = loraFile(tensors);
      expectClose(merged(model, [{ path }], `${MODULE}.weight`), product(weight, up, down, factor));
      expectClose(
        merged(model, [{ path, scale: -0.5 }], `${MODULE}.weight`),
        product(weight, up, down, -0.5 * factor),
      );
    });
  }

  test("alpha of PEFT's configuration, by pattern and by the square root of the rank", () => {
    const tensors = {
      [`base_model.model.${MODULE}.lora_A.weight`]: down,
      [`base_model.model.${MODULE}.lora_B.weight`]: up,
    };
    for (
      const [config, factor] of [
        [{ lora_alpha: 16 }, 16 / RANK],
        [{ lora_alpha: 16, use_rslora: true }, 16 / Math.sqrt(RANK)],
        [{ lora_alpha: 16, alpha_pattern: { "attn1.to_q": 2 } }, 2 / RANK],
        [{ lora_alpha: 16, alpha_pattern: { ".*to_[qk]": 2 } }, 2 / RANK],
        [{ lora_alpha: 16, alpha_pattern: { "^transformer_blocks\\.\\d+\\.attn1\\.to_q": 2 } }, 2 / RANK],
        [{ lora_alpha: 16, alpha_pattern: { "to_": 2 } }, 16 / RANK],
      ] as const
    ) {
      const path = loraFile(tensors, "adapter_model.safetensors", config);
      for (const given of [path, join(path, "..")]) {
        expectClose(merged(model, [{ path: given }], `${MODULE}.weight`), product(weight, up, down, factor));
      }
    }
  });

  test("of PEFT's files another name finds the configuration, and a lack of it is told", () => {
    const tensors = {
      [`base_model.model.${MODULE}.lora_A.weight`]: down,
      [`base_model.model.${MODULE}.lora_B.weight`]: up,
    };
    const path = loraFile(tensors, "mine.safetensors", { lora_alpha: 16 });
    expectClose(merged(model, [{ path }], `${MODULE}.weight`), product(weight, up, down, 16 / RANK));
    using checkpoint = openCheckpoint(model);
    for (const [given, lacks] of [[path, false], [loraFile(tensors), true]] as const) {
      using result = mergeLoras(checkpoint, [{ path: given }]);
      expect(result.reports[0]!.lacksAlpha).toBe(lacks);
      expect(JSON.stringify(loraEvents(result.reports)).includes("taken to be the rank")).toBe(lacks);
    }
  });

  test("what is no LoRA of the model as it is, or has whole weights, is refused", () => {
    const tensors = {
      [`base_model.model.${MODULE}.lora_A.weight`]: down,
      [`base_model.model.${MODULE}.lora_B.weight`]: up,
    };
    const whole = { ...tensors, [`base_model.model.${MODULE}.weight`]: weight };
    const cases: [Record<string, TestTensor>, unknown, RegExp][] = [
      [tensors, { lora_alpha: 8, peft_type: "LOHA" }, /peft_type must be LORA/],
      [tensors, { lora_alpha: 8, init_lora_weights: "pissa_niter_16" }, /must leave the base model as it is/],
      [tensors, { lora_alpha: 8, layer_replication: [[0, 2]] }, /layer_replication/],
      [tensors, { lora_alpha: 8, alpha_pattern: { "(": 2 } }, /alpha_pattern must have patterns/],
      [whole, { lora_alpha: 8 }, /got a weight itself, .*to_q\.weight/],
    ];
    using checkpoint = openCheckpoint(model);
    for (const [file, config, message] of cases) {
      const path = loraFile(file, "adapter_model.safetensors", config);
      const error = thrown(() => mergeLoras(checkpoint, [{ path }]));
      expect(error).toBeInstanceOf(CheckpointError);
      expect(error.message).toMatch(message);
    }
  });

  test("two files add up, in half and bfloat16 weights too", () => {
    const first = loraFile({ [`${MODULE}.lora_A.weight`]: down, [`${MODULE}.lora_B.weight`]: up });
    const wanted = product(weight, up, down, 0.25), base = Float64Array.from(valuesOf(weight));
    const twice = wanted.map((value, i) => value + 2 * (value - base[i]!));
    expectClose(
      merged(model, [{ path: first, scale: 0.25 }, { path: first, scale: 0.5 }], `${MODULE}.weight`),
      twice,
    );
    const words = Uint16Array.from(
      valuesOf(weight),
      (value) => new Uint32Array(Float32Array.of(value).buffer)[0]! >>> 16,
    );
    const rounded = matrix(
      10,
      12,
      Float32Array.from(words, (word) => new Float32Array(Uint32Array.of(word << 16).buffer)[0]!),
    );
    const half = writeCheckpoint(place.fresh("model"), {
      [`${MODULE}.weight`]: { ...weight, dtype: "BF16", data: words },
    }, {});
    expectClose(merged(half, [{ path: first }], `${MODULE}.weight`), product(rounded, up, down, 1));
  });

  test("whole differences, biases, convolutions, and what was to_out before it was to_out.0", () => {
    const conv: TestTensor = { dtype: "F32", shape: [4, 3, 3, 3], data: gaussian(108, 7) };
    const bias: TestTensor = { dtype: "F32", shape: [4], data: gaussian(4, 8) };
    const out = random(12, 12), difference = random(12, 12);
    const model = writeCheckpoint(place.fresh("model"), {
      "a.conv.weight": conv,
      "a.conv.bias": bias,
      "attn.to_out.0.weight": out,
      "norm.weight": { dtype: "F32", shape: [4], data: gaussian(4, 9) },
    }, {});
    const down: TestTensor = { dtype: "F32", shape: [2, 3, 3, 3], data: gaussian(54, 10) };
    const up: TestTensor = { dtype: "F32", shape: [4, 2, 1, 1], data: gaussian(8, 11) };
    const lost: TestTensor = { dtype: "F32", shape: [12], data: gaussian(12, 13) };
    const added: TestTensor = { dtype: "F32", shape: [4], data: gaussian(4, 12) };
    const path = loraFile({
      "a.conv.lora_down.weight": down,
      "a.conv.lora_up.weight": up,
      "a.conv.alpha": { dtype: "I64", shape: [], data: BigInt64Array.of(4n) },
      "a.conv.diff_b": added,
      "attn.to_out.diff": difference,
      "attn.to_out.diff_b": lost, // the layer has no bias
      "norm.w_norm": added,
    });
    {
      using checkpoint = openCheckpoint(model);
      using result = mergeLoras(checkpoint, [{ path }]);
      expect(result.reports[0]!.unmatched).toEqual(["attn.to_out.diff_b"]);
    }
    expectClose(merged(model, [{ path }], "a.conv.weight"), product(conv, up, down, 2));
    expectClose(
      merged(model, [{ path, scale: 3 }], "a.conv.bias"),
      Float64Array.from(valuesOf(bias), (value, i) => value + 3 * valuesOf(added)[i]!),
    );
    expectClose(
      merged(model, [{ path, scale: 2 }], "norm.weight"),
      Float64Array.from(gaussian(4, 9), (value, i) => value + 2 * valuesOf(added)[i]!),
    );
    expectClose(
      merged(model, [{ path }], "attn.to_out.0.weight"),
      Float64Array.from(valuesOf(out), (value, i) => value + valuesOf(difference)[i]!),
    );
  });
});

describe("names of another layout", () => {
  const D = 8, M = 20;
  const diffusers: Record<string, TestTensor> = {
    "x_embedder.weight": random(D, 4),
    "transformer_blocks.0.attn.norm_added_q.weight": { dtype: "F32", shape: [D], data: gaussian(D, 1) },
    "transformer_blocks.0.attn.to_q.weight": random(D, D),
    "transformer_blocks.0.attn.to_k.weight": random(D, D),
    "transformer_blocks.0.attn.to_v.weight": random(D, D),
    "transformer_blocks.0.norm1.linear.weight": random(6 * D, D),
    "single_transformer_blocks.0.attn.to_q.weight": random(D, D),
    "single_transformer_blocks.0.attn.to_k.weight": random(D, D),
    "single_transformer_blocks.0.attn.to_v.weight": random(D, D),
    "single_transformer_blocks.0.proj_mlp.weight": random(M, D),
    "norm_out.linear.weight": random(2 * D, D),
  };
  const own: Record<string, TestTensor> = {
    "model.diffusion_model.double_blocks.0.img_attn.proj.weight": random(D, D),
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": random(3 * D, D),
    "model.diffusion_model.single_blocks.0.linear1.weight": random(3 * D + M, D),
    "model.diffusion_model.final_layer.adaLN_modulation.1.weight": random(2 * D, D),
  };
  const pair = (rows: number) => ({ up: random(rows, RANK), down: random(RANK, D) });

  test("fused rows of FLUX's own names go to diffusers' tensors", () => {
    const model = writeCheckpoint(place.fresh("flux"), diffusers, {});
    const qkv = pair(3 * D), linear1 = pair(3 * D + M), modulation = pair(2 * D);
    const path = loraFile({
      "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": qkv.down,
      "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": qkv.up,
      "lora_unet_double_blocks_0_img_attn_qkv.alpha": scalar(1),
      "diffusion_model.single_blocks.0.linear1.lora_A.weight": linear1.down,
      "diffusion_model.single_blocks.0.linear1.lora_B.weight": linear1.up,
      "lora_unet_final_layer_adaLN_modulation_1.lora_down.weight": modulation.down,
      "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight": modulation.up,
    });
    for (const [i, part] of ["to_q", "to_k", "to_v"].entries()) {
      const name = `transformer_blocks.0.attn.${part}.weight`;
      expectClose(
        merged(model, [{ path }], name),
        product(diffusers[name]!, qkv.up, qkv.down, 1 / RANK, i * D),
      );
    }
    for (const [part, from] of [["attn.to_k", D], ["proj_mlp", 3 * D]] as const) {
      const name = `single_transformer_blocks.0.${part}.weight`;
      expectClose(
        merged(model, [{ path }], name),
        product(diffusers[name]!, linear1.up, linear1.down, 1, from),
      );
    }
    // shift and scale have changed places
    const weight = diffusers["norm_out.linear.weight"]!;
    const swapped = Float32Array.from(
      { length: 2 * D * RANK },
      (_, i) => valuesOf(modulation.up)[(i + D * RANK) % (2 * D * RANK)]!,
    );
    expectClose(
      merged(model, [{ path }], "norm_out.linear.weight"),
      product(weight, matrix(2 * D, RANK, swapped), modulation.down, 1),
    );
  });

  test("diffusers' names go to rows of fused tensors", () => {
    const model = writeCheckpoint(place.fresh("flux"), own, {}), k = pair(D), mlp = pair(M);
    const path = loraFile({
      "transformer.transformer_blocks.0.attn.to_k.lora_A.weight": k.down,
      "transformer.transformer_blocks.0.attn.to_k.lora_B.weight": k.up,
      "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": mlp.down,
      "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight": mlp.up,
    });
    const check = (name: string, { up, down }: typeof k, row: number) => {
      const weight = own[name]!, wanted = Float64Array.from(valuesOf(weight)), [rows = 0] = up.shape;
      const part = matrix(rows, D, valuesOf(weight).slice(row * D, (row + rows) * D));
      wanted.set(product(part, up, down, 1), row * D);
      expectClose(merged(model, [{ path }], name), wanted);
    };
    check("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", k, D);
    check("model.diffusion_model.single_blocks.0.linear1.weight", mlp, 3 * D);
  });

  test("XLabs' names of FLUX's attention, in both layouts", () => {
    // As diffusers converts them: qkv_lora of a single block has no rows of its feed-forward.
    const image = pair(3 * D),
      single = pair(3 * D),
      path = loraFile({
        "double_blocks.0.processor.qkv_lora1.down.weight": image.down,
        "double_blocks.0.processor.qkv_lora1.up.weight": image.up,
        "single_blocks.0.processor.qkv_lora.down.weight": single.down,
        "single_blocks.0.processor.qkv_lora.up.weight": single.up,
      });
    const split = writeCheckpoint(place.fresh("flux"), diffusers, {});
    for (const [i, part] of ["to_q", "to_k", "to_v"].entries()) {
      for (const [block, { up, down }] of [["", image], ["single_", single]] as const) {
        const name = `${block}transformer_blocks.0.attn.${part}.weight`;
        expectClose(merged(split, [{ path }], name), product(diffusers[name]!, up, down, 1, i * D));
      }
    }
    const fused = writeCheckpoint(place.fresh("flux"), own, {});
    const linear1 = "model.diffusion_model.single_blocks.0.linear1.weight", weight = valuesOf(own[linear1]!);
    const wanted = Float64Array.from(weight), begin = matrix(3 * D, D, weight.slice(0, 3 * D * D));
    wanted.set(product(begin, single.up, single.down, 1));
    expectClose(merged(fused, [{ path }], linear1), wanted);
  });

  test("copies of split modules in fused form are left out and told, half a copy is refused", () => {
    const model = writeCheckpoint(place.fresh("flux"), diffusers, {});
    const parts = ["to_q", "to_k", "to_v"], pairs = parts.map(() => pair(D)), fused = pair(3 * D);
    const split = Object.fromEntries(parts.flatMap((part, i) => [
      [`transformer_blocks.0.attn.${part}.lora_A.weight`, pairs[i]!.down],
      [`transformer_blocks.0.attn.${part}.lora_B.weight`, pairs[i]!.up],
    ]));
    const both = {
      "double_blocks.0.img_attn.qkv.lora_A.weight": fused.down,
      "double_blocks.0.img_attn.qkv.lora_B.weight": fused.up,
    };
    const path = loraFile({ ...both, ...split }), name = "transformer_blocks.0.attn.to_k.weight";
    expectClose(
      merged(model, [{ path }], name),
      product(diffusers[name]!, pairs[1]!.up, pairs[1]!.down, 1),
    );
    using checkpoint = openCheckpoint(model);
    using result = mergeLoras(checkpoint, [{ path }]);
    expect(loraEvents(result.reports).map(({ message }) => message)).toContainEqual(
      expect.stringContaining(
        '1 modules are for rows that others are for, too, and left out: "double_blocks',
      ),
    );
    const half = Object.fromEntries(Object.entries(split).slice(0, 2));
    expect(() => mergeLoras(checkpoint, [{ path: loraFile({ ...both, ...half }) }])).toThrow(
      /rows of "transformer_blocks\.0\.attn\.to_q\.weight" must have one module, got "double_blocks/,
    );
  });

  test("SDXL in both spellings", () => {
    const pairs: [original: string, diffusers: string][] = [
      [
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
      ],
      ["input_blocks.8.1.proj_in", "down_blocks.2.attentions.1.proj_in"],
      ["input_blocks.7.0.in_layers.2", "down_blocks.2.resnets.0.conv1"],
      ["middle_block.1.proj_out", "mid_block.attentions.0.proj_out"],
      ["middle_block.2.emb_layers.1", "mid_block.resnets.1.time_emb_proj"],
      [
        "output_blocks.5.1.transformer_blocks.1.ff.net.2",
        "up_blocks.1.attentions.2.transformer_blocks.1.ff.net.2",
      ],
      ["input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"],
      ["output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"],
    ];
    const weight = random(D, D), { up, down } = pair(D);
    for (const [original, other] of pairs) {
      const spellings = [[`model.diffusion_model.${original}`, other], [other, original]];
      // where the upsampler stands depends on attention: only one way is told by the name
      for (const [own, foreign] of other.includes("upsamplers") ? spellings.slice(0, 1) : spellings) {
        const model = writeCheckpoint(place.fresh("sdxl"), { [`${own}.weight`]: weight }, {});
        const key = `lora_unet_${foreign!.replaceAll(".", "_")}`;
        const path = loraFile({ [`${key}.lora_down.weight`]: down, [`${key}.lora_up.weight`]: up });
        expectClose(merged(model, [{ path }], `${own}.weight`), product(weight, up, down, 1));
      }
    }
  });
});

describe("quantizing with a LoRA", () => {
  const weight = random(32, 64), up = random(32, RANK), down = random(RANK, 64);
  const tensors = {
    "layers.0.a.weight": weight,
    "layers.0.b.weight": random(16, 64),
    "x_in.bias": random(1, 4),
  };
  const model = writeCheckpoint(place.fresh("model"), tensors, {});
  const lora = loraFile({
    "transformer.layers.0.a.lora_A.weight": down,
    "transformer.layers.0.a.lora_B.weight": up,
    "text_encoder.layers.0.q_proj.lora_A.weight": down,
    "text_encoder.layers.0.q_proj.lora_B.weight": up,
    "transformer.layers.9.a.lora_A.weight": down,
    "transformer.layers.9.a.lora_B.weight": up,
    "note": scalar(1),
  });
  const run = (output: string, scale: number, options: { resume?: boolean } = {}) =>
    quantizeCheckpoint({
      input: model,
      output,
      kernels,
      config: configOf({ bit_width: 4, group_size: 32 }),
      loras: [{ path: lora, scale }],
      ...options,
    });

  test("gives the bytes of the merged model quantized, and a report", async () => {
    const product64 = product(weight, up, down, 0.5);
    const by = writeCheckpoint(place.fresh("merged"), {
      ...tensors,
      "layers.0.a.weight": matrix(32, 64, Float32Array.from(product64)),
    }, {});
    const [ours, theirs] = [place.fresh(), place.fresh()];
    const report = await run(ours, 0.5);
    await quantizeCheckpoint({
      input: by,
      output: theirs,
      kernels,
      config: configOf({ bit_width: 4, group_size: 32 }),
    });
    expect(readFileSync(join(ours, "model.safetensors"))).toEqual(
      readFileSync(join(theirs, "model.safetensors")),
    );
    expect(report.loras).toMatchObject([{
      path: lora,
      scale: 0.5,
      ...{ modules: 3, merged: 1, tensors: 1, textEncoders: 1 },
      unmatched: ["transformer.layers.9.a"],
      others: ["note"],
    }]);
    expect(report.loras![0]!.sha256).toMatch(/^[0-9a-f]{64}$/);
  });

  test("is part of what a resumed run must have in common", async () => {
    const output = place.fresh();
    await run(output, 1);
    expect((await run(output, 1, { resume: true })).tensorsResumed).toBe(3);
    let failed: unknown;
    await run(output, 2, { resume: true }).catch((error) => failed = error);
    expect(failed).toMatchObject({ name: "OutputError" });
  });

  test("is merged before calibration: layers are solved as those of the merged model", async () => {
    const name = "model.layers.0.self_attn.q_proj", [a, b] = [random(RANK, 64), random(64, RANK)];
    const path = loraFile(
      { [`base_model.model.${name}.lora_A.weight`]: a, [`base_model.model.${name}.lora_B.weight`]: b },
      "adapter_model.safetensors",
      { lora_alpha: 3 },
    );
    using plain = openCheckpoint(DREAM);
    using other = mergeLoras(plain, [{ path }]);
    const tensors = Object.fromEntries(
      [...other.checkpoint.tensors.values()].map(({ info: { name, dtype, shape } }): [string, TestTensor] => [
        name,
        { dtype, shape, data: other.checkpoint.read(name) },
      ]),
    );
    const by = writeCheckpoint(place.fresh("merged"), tensors, plain.config);
    for (const file of ["tokenizer.json", "tokenizer_config.json", "calibration.jsonl"]) {
      cpSync(join(DREAM, file), join(by, file));
    }
    const config = configOf({ bit_width: 2, group_size: 32, solver: "feedback", calibration_samples: 32 });
    const packed = async (input: string, loras?: { path: string }[]) => {
      const output = place.fresh();
      const { layers } = await quantizeCheckpoint({ input, output, kernels, config, loras });
      const { statistics, solved } = layers.find((layer) => layer.name === `${name}.weight`)!;
      using file = openCheckpoint(output);
      return { codes: file.read(`${name}.weight_packed`), statistics, error: solved!.relativeError };
    };
    const ours = await packed(DREAM, [{ path }]);
    expect(ours).toEqual(await packed(by));
    expect(ours.codes).not.toEqual((await packed(DREAM)).codes);
  });

  test("for another program: its file has the merged weights, and a plan shows them", async () => {
    const config = configOf({ target: "transformers", bit_width: 4, group_size: 32 });
    const output = place.fresh("for"),
      options = { input: model, config, loras: [{ path: lora, scale: 0.5 }] };
    const { exported } = await quantizeFor({ ...options, output, kernels });
    expect(exported).toBeDefined();
    using file = openCheckpoint(output);
    expect([...file.tensors.keys()].some((name) => name.startsWith("layers.0.a."))).toBe(true);
    const dry = await quantizeFor({ ...options, output: place.fresh(), kernels, dryRun: true });
    expect(dry.quantized.loras).toMatchObject([{ merged: 1 }]);
    const other = loraFile({ "nowhere.lora_A.weight": down, "nowhere.lora_B.weight": up });
    const none = place.fresh();
    const error = await rejection(
      quantizeFor({ ...options, loras: [{ path: other }], output: none, kernels }),
    );
    expect([error.message.includes("got none of 1"), existsSync(none), existsSync(`${none}.arrowquant`)])
      .toEqual([true, false, false]);
  });

  test("of the command: scales behind colons, and what was left out on stderr", () => {
    const output = place.fresh();
    const { code, stdout, stderr } = runCommand("quantize.ts", [
      ...[model, output, "--bits", "4", "--solver", "clip", "--json"],
      ...["--lora", `${lora}:0.25`, "--lora", lora],
    ]);
    expect([code, code === 0 ? "" : stderr]).toEqual([0, ""]);
    const { loras } = JSON.parse(stdout) as RunReport;
    expect(loras!.map(({ scale, merged }) => [scale, merged])).toEqual([[0.25, 1], [1, 1]]);
    const shard = runCommand("quantize.ts", [model, place.fresh(), "--lora", lora, "--shard", "1/2"]);
    expect([shard.code, shard.stderr.includes("--lora needs the whole model")]).toEqual([2, true]);
    expect(stderr).toContain("1 of 3 modules merged into 1 tensors");
    expect(stderr).toContain('1 modules have no place in the model: "transformer.layers.9.a"');
  });
});

describe("refuses with nothing written", () => {
  const model = writeCheckpoint(place.fresh("model"), { "layers.0.a.weight": random(8, 16) }, {});
  const A = "layers.0.a.lora_A.weight", B = "layers.0.a.lora_B.weight";
  const up = random(8, 4), down = random(4, 16);
  const CASES: [what: string, tensors: Record<string, TestTensor>, message: RegExp, config?: unknown][] = [
    [
      "no module of the model",
      { "layers.7.b.lora_A.weight": down, "layers.7.b.lora_B.weight": up },
      /got none of 1, as "layers\.7\.b".*"layers\.0\.a\.weight"/,
    ],
    [
      "another shape",
      { [A]: random(4, 12), [B]: up },
      /"layers\.0\.a\.lora_A\.weight" of .*must have 8 rows of 16 weights, got 8 rows of 12/,
    ],
    ["ranks that differ", { [A]: random(3, 16), [B]: up }, /up must be \[rows, rank\]/],
    ["half of a pair", { [A]: down }, /must come with its up/],
    [
      "NaN",
      { [A]: down, [B]: matrix(8, 4, Float32Array.from({ length: 32 }, (_, i) => i === 5 ? NaN : 1)) },
      /"layers\.0\.a\.lora_B\.weight": values must be finite, got NaN or infinity at 5/,
    ],
    ["DoRA", { [A]: down, [B]: up, "layers.0.a.lora_magnitude_vector": scalar(1) }, /got DoRA/],
    ["LoHa", { "layers.0.a.hada_w1_a": down }, /got LoHa/],
    ["LoKr", { "layers.0.a.lokr_w1": down }, /got LoKr/],
    // names as LyCORIS and PEFT save them, beside a LoRA of another module
    [
      "GLoRA",
      { [A]: down, [B]: up, "layers.0.b.a1.weight": down },
      /got GLoRA in "layers\.0\.b\.a1\.weight"/,
    ],
    ["IA3", { [A]: down, [B]: up, "layers.0.b.on_input": down }, /got IA3/],
    ["T-LoRA", { [A]: down, [B]: up, "layers.0.b.q_layer.weight": down }, /got T-LoRA/],
    ["VeRA", { [A]: down, [B]: up, "layers.0.b.vera_lambda_d": down }, /got VeRA/],
    [
      "no LoRA",
      { "layers.0.a.weight": down },
      /must have matrices as lora_A and lora_B .* got "layers\.0\.a\.weight"/,
    ],
    [
      "integers",
      { [A]: down, [B]: { dtype: "I32", shape: [8, 4], data: new Int32Array(32) } },
      /must have floats, got I32/,
    ],
    ["use_dora", { [A]: down, [B]: up }, /use_dora must be false/, { use_dora: true }],
    ["an alpha that is no number", { [A]: down, [B]: up }, /lora_alpha must be a number/, {
      lora_alpha: "much",
    }],
  ];
  for (const [what, tensors, message, config] of CASES) {
    test(what, async () => {
      const path = loraFile(tensors, "adapter_model.safetensors", config), output = place.fresh();
      let failed: unknown;
      await quantizeCheckpoint({ input: model, output, kernels, config: configOf(), loras: [{ path }] })
        .catch((error) => failed = error);
      expect(failed).toBeInstanceOf(CheckpointError);
      expect((failed as Error).message).toMatch(message);
      expect(existsSync(output)).toBe(false);
    });
  }

  test("a folder without one, a truncated file, a scale that is no number", () => {
    using checkpoint = openCheckpoint(model);
    const message = (path: string, scale = 1) =>
      thrown(() => mergeLoras(checkpoint, [{ path, scale }])).message;
    expect(message(model)).toContain("the folder must have adapter_model.safetensors or");
    const path = loraFile({ [A]: down, [B]: up });
    expect(message(path, NaN)).toContain("its scale must be a number, got NaN");
    writeFileSync(path, readFileSync(path).subarray(0, -8));
    expect(message(path)).toContain("Cannot read");
  });
});

describe("PEFT's own merge (tests/lora/peft_golden.py)", () => {
  const GOLDEN = join(import.meta.dirname!, "peft");
  for (const name of ["plain", "rslora", "patterns"]) {
    test(`${name}: its names are found, and its weights come out within 1e-6`, () => {
      const folder = join(GOLDEN, name), model = place.fresh("base");
      mkdirSync(model);
      cpSync(join(folder, "base.safetensors"), join(model, "model.safetensors"));
      using base = openCheckpoint(model);
      using wanted = SafetensorsFile.open(join(folder, "merged.safetensors"));
      using result = mergeLoras(base, [{ path: join(folder, "adapter") }]);
      const read = (file: { read(name: string): { buffer: ArrayBufferLike } }, tensor: string) =>
        new Float32Array(file.read(tensor).buffer);
      const changed = [...wanted.tensors.keys()];
      expect(changed.length).toBe(4);
      for (const tensor of base.tensors.keys()) {
        const got = read(result.checkpoint, tensor), own = read(base, tensor);
        if (!changed.includes(tensor)) {
          expect(got).toEqual(own);
          continue;
        }
        const merged = read(wanted, tensor);
        expect(Math.max(...got.map((value, i) => Math.abs(value - merged[i]!)))).toBeLessThan(1e-6);
        expect(Math.max(...got.map((value, i) => Math.abs(value - own[i]!)))).toBeGreaterThan(0.01);
      }
    });
  }
});
