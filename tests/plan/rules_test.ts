/** The rules by name, on names of published checkpoints, in original and in diffusers' spelling. */
import { closeSync, ftruncateSync, openSync, readFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "bun:test";
import { formatBytes } from "../../lib/eval/table.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { dequantizeCheckpoint, quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { planQuantization } from "../../lib/plan/plan.ts";
import { loadModel } from "../../lib/models/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { packedLayers } from "../../lib/quant/packed/checkpoint.ts";
import { ROOT, workplace, writeCheckpoint } from "../_checkpoints.ts";
import { configOf, DREAM, pipelineRuns } from "../pipeline/_runs.ts";

const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});
const { quantizeTo, planOf } = pipelineRuns(kernels, place);

/** A checkpoint whose weights are a hole in the file: planning reads names and shapes. */
function hollowCheckpoint(shapes: Readonly<Record<string, readonly number[]>>, config: unknown): string {
  const folder = writeCheckpoint(place.fresh("hollow"), {}, config);
  let end = 0;
  const header = JSON.stringify(Object.fromEntries(
    Object.entries(shapes).map(([name, shape]) => {
      const begin = end;
      end += 2 * shape.reduce((product, size) => product * size, 1);
      return [name, { dtype: "BF16", shape, data_offsets: [begin, end] }];
    }),
  ));
  const file = openSync(join(folder, "model.safetensors"), "w");
  writeSync(file, BigUint64Array.of(BigInt(header.length)));
  writeSync(file, header);
  ftruncateSync(file, 8 + header.length + end);
  closeSync(file);
  return folder;
}

/** Names and shapes of Dream 7B. */
function dream7b(): Record<string, number[]> {
  const hidden = 3584,
    wide = 18944,
    shapes: Record<string, number[]> = {
      "model.embed_tokens.weight": [152064, hidden],
      "lm_head.weight": [152064, hidden],
      "model.norm.weight": [hidden],
    };
  for (let i = 0; i < 28; i++) {
    const block = `model.layers.${i}`;
    Object.assign(shapes, {
      [`${block}.self_attn.q_proj.weight`]: [hidden, hidden],
      [`${block}.self_attn.k_proj.weight`]: [512, hidden],
      [`${block}.self_attn.v_proj.weight`]: [512, hidden],
      [`${block}.self_attn.o_proj.weight`]: [hidden, hidden],
      [`${block}.mlp.gate_proj.weight`]: [wide, hidden],
      [`${block}.mlp.up_proj.weight`]: [wide, hidden],
      [`${block}.mlp.down_proj.weight`]: [hidden, wide],
      [`${block}.self_attn.q_proj.bias`]: [hidden],
      [`${block}.self_attn.k_proj.bias`]: [512],
      [`${block}.self_attn.v_proj.bias`]: [512],
      [`${block}.input_layernorm.weight`]: [hidden],
      [`${block}.post_attention_layernorm.weight`]: [hidden],
    });
  }
  return shapes;
}

const dryRun = (input: string, overrides: Record<string, unknown>) =>
  quantizeCheckpoint({ input, output: place.fresh(), config: configOf(overrides), dryRun: true });

describe("token tables", () => {
  const input = hollowCheckpoint(dream7b(), { model_type: "Dream", tie_word_embeddings: false });

  test("Dream 7B at 2 bits is smaller than llama.cpp's Q2_K of it, 3.0 GB", async () => {
    const { totals, plan } = await dryRun(input, { bit_width: 2 });
    expect(totals.fileBytesAfter).toBeLessThan(3.0e9);
    const bits = Object.fromEntries(plan.rows.map(({ name, bits }) => [name, bits]));
    expect(bits).toMatchObject({ "model.embed_tokens.weight": 4, "lm_head.weight": 8 });
    const weights = Object.values(dream7b()).reduce(
      (sum, shape) => sum + shape.reduce((a, b) => a * b, 1),
      0,
    );
    expect(totals.bitsPerWeightOfAll).toBeCloseTo(totals.fileBytesAfter * 8 / weights, 3);
    const [three, four] = [await dryRun(input, { bit_width: 3 }), await dryRun(input, { bit_width: 4 })];
    const sizes = [totals, three.totals, four.totals].map(({ fileBytesAfter }) =>
      formatBytes(fileBytesAfter)
    );
    expect(sizes).toEqual(["2.93 GB", "3.74 GB", "4.83 GB"]);
    const read = (path: string) => readFileSync(join(ROOT, path), "utf8").replace(/\s+/g, " ");
    expect(read("README.md")).toContain(
      `become ${sizes[0]} at 2 bits, ${sizes[1]} at 3 and ${sizes[2]} at 4`,
    );
    expect(read("docs/solvers.md")).toContain(`takes ${sizes[0]} at 2 bits`);
    expect(read("docs/solvers.md")).toContain(`and ${sizes[2]} at 4`);
    const kept = await dryRun(input, { bit_width: 2, embedding_bits: 16, head_bits: 16 });
    expect(kept.totals.fileBytesAfter).toBeGreaterThan(4.2e9);
    expect(kept.totals.bitsPerWeight).toBeCloseTo(2.5, 3);
  });

  test("have the bits that are set, and plain scales beside two levels of them", async () => {
    const { plan } = await dryRun(input, { embedding_bits: 3, head_bits: 2, scale_bits: 4, bit_width: 2 });
    const tables = plan.rows.filter(({ reason }) => reason.endsWith("_bits"));
    expect(tables.map(({ bits, groupSize, scaleBits }) => [bits, groupSize, scaleBits])).toEqual([
      [3, 64, undefined],
      [2, 64, undefined],
    ]);
  });

  test("a tied table is the head; those of other forms and small ones stay", async () => {
    const { "lm_head.weight": _, ...tied } = dream7b();
    const bitsOf = async (path: string, config: Record<string, unknown> = {}) =>
      (await dryRun(path, { bit_width: 4, ...config })).plan.rows[0]!.bits;
    expect(await bitsOf(hollowCheckpoint(tied, { model_type: "Dream", tie_word_embeddings: true }))).toBe(8);
    expect(await bitsOf(hollowCheckpoint(tied, { model_type: "Dream" }))).toBe(8);
    expect(await bitsOf(hollowCheckpoint(tied, { tie_word_embeddings: false }))).toBe(8);
    expect(await bitsOf(hollowCheckpoint(tied, { tie_word_embeddings: false }), { bit_width: 3 })).toBe(4);
    expect(await bitsOf(input, { zero_point: "symmetric" })).toBeUndefined();
    const small = { "model.embed_tokens.weight": [1000, 64], "lm_head.weight": [1024, 64] };
    expect((await dryRun(hollowCheckpoint(small, {}), {})).plan.rows.map(({ bits }) => bits)).toEqual([
      undefined,
      8,
    ]);
  });

  test("of LLaDA by its own names, under a prefix, and in a text encoder", () => {
    const T: [string, number[]] = ["BF16", [1024, 64]];
    const { rows } = planOf({
      "model.transformer.wte.weight": T,
      "module.model.transformer.ff_out.weight": T,
      "model.transformer.blocks.0.ff_out.weight": T,
      "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": T,
    }, { bit_width: 2 });
    expect(rows.map(({ reason, bits }) => [reason, bits])).toEqual([
      ["embedding_bits", 4],
      ["head_bits", 8],
      ["bit_width", 2],
      ["embedding", undefined],
    ]);
  });

  test("a packed embedding and head run, as what they dequantize to", async () => {
    const [packed, plain] = [place.fresh(), place.fresh()];
    await quantizeTo(packed, DREAM, { config: { bit_width: 3, embedding_bits: 4, head_bits: 8 } });
    await dequantizeCheckpoint({ input: packed, output: plain, kernels, dtype: "F32" });
    using checkpoint = openCheckpoint(packed);
    const bits = new Map([...packedLayers(checkpoint).values()].map(({ name, bits }) => [name, bits]));
    expect([bits.get("model.embed_tokens.weight"), bits.get("lm_head.weight")]).toEqual([4, 8]);
    const ids = Int32Array.of(2, 7, 11, 1, 1, 20, 9, 1);
    const logits = [packed, plain].map((folder) => {
      const loaded = loadModel(folder, kernels);
      if (loaded.kind === "dit") throw new Error("must be a language model");
      return [...loaded.model.forward(ids, 1)];
    });
    for (const [i, value] of logits[0]!.entries()) expect(value).toBeCloseTo(logits[1]![i]!, 3);
  });

  test("what is held out is measured with packed tables, and phases write what they measured", async () => {
    const distances = async (config: Record<string, unknown>) => {
      const lines: string[] = [];
      await quantizeTo(place.fresh(), DREAM, {
        config: { bit_width: 8, solver: "feedback", calibration_samples: 32, ...config },
        onEvent: ({ message }) => lines.push(message),
      });
      return Number(/held out, [^:]*: ([\d.e+-]+)/.exec(lines.join("\n"))![1]);
    };
    expect(await distances({ embedding_bits: 2, head_bits: 2 })).toBeGreaterThan(20 * await distances({}));
  });
});

const MATRIX: [string, number[]] = ["BF16", [32, 64]];

/** Tensors of published models that must keep their precision, by family. */
const KEPT: Readonly<Record<string, readonly string[]>> = {
  "FLUX.1": [
    "img_in.weight",
    "txt_in.weight",
    "time_in.in_layer.weight",
    "vector_in.out_layer.weight",
    "guidance_in.in_layer.weight",
    "final_layer.linear.weight",
    "final_layer.adaLN_modulation.1.weight",
  ],
  "FLUX of diffusers": [
    "x_embedder.weight",
    "context_embedder.weight",
    "time_text_embed.timestep_embedder.linear_1.weight",
    "time_text_embed.guidance_embedder.linear_2.weight",
    "time_text_embed.text_embedder.linear_1.weight",
    "time_guidance_embed.timestep_embedder.linear_1.weight",
    "norm_out.linear.weight",
    "proj_out.weight",
  ],
  "SD 3.5": [
    "t_embedder.mlp.0.weight",
    "y_embedder.mlp.2.weight",
    "x_embedder.proj.weight",
    "pos_embed.proj.weight",
  ],
  "Wan": [
    "patch_embedding.weight",
    "text_embedding.0.weight",
    "time_embedding.2.weight",
    "time_projection.1.weight",
    "img_emb.proj.1.weight",
    "head.head.weight",
    "condition_embedder.time_embedder.linear_1.weight",
    "condition_embedder.time_proj.weight",
  ],
  "Lumina 2, Z-Image": [
    "cap_embedder.1.weight",
    "all_x_embedder.2-1.weight",
    "all_final_layer.2-1.linear.weight",
    "all_final_layer.2-1.adaLN_modulation.1.weight",
    "time_caption_embed.caption_embedder.1.weight",
  ],
  "PixArt": [
    "adaln_single.linear.weight",
    "adaln_single.emb.timestep_embedder.linear_1.weight",
    "caption_projection.linear_1.weight",
    "t_block.1.weight",
    "y_embedder.y_proj.fc1.weight",
    "csize_embedder.mlp.0.weight",
  ],
  "DiT of diffusers": ["proj_out_2.weight"],
  "CogVideoX, EasyAnimate": ["ofs_embedding.linear_1.weight", "text_proj.weight", "text_proj_t5.1.weight"],
  "AuraFlow": ["time_step_proj.linear_1.weight", "init_x_linear.weight", "final_linear.weight"],
  "Stable Audio": ["timestep_proj.0.weight", "global_proj.2.weight", "cross_attention_proj.0.weight"],
  "Kandinsky 5": [
    "time_embeddings.in_layer.weight",
    "text_embeddings.in_layer.weight",
    "pooled_text_embeddings.in_layer.weight",
    "visual_embeddings.in_layer.weight",
    "out_layer.modulation.out_layer.weight",
    "out_layer.out_layer.weight",
  ],
  "Hunyuan-DiT": ["time_extra_emb.pooler.q_proj.weight", "text_embedder.linear_1.weight"],
  "MDLM, LLaDA-V": ["sigma_map.mlp.0.weight", "output_layer.linear.weight", "mm_projector.0.weight"],
  "SDXL": [
    "time_embed.0.weight",
    "label_emb.0.0.weight",
    "time_embedding.linear_1.weight",
    "add_embedding.linear_2.weight",
    "conv_in.weight",
    "out.2.weight",
  ],
  "mixtures of experts": [
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.block_sparse_moe.gate.weight",
    "model.layers.0.mlp.router.weight",
    "model.layers.0.mlp.shared_expert_gate.weight",
    "blk.0.ffn_gate_inp.weight",
  ],
};

/** What checkpoints put in front of names. */
const PREFIXES = [
  "",
  "model.diffusion_model.",
  "transformer.",
  "module.",
  "_orig_mod.",
  "net.",
  "base_model.model.",
  "ema.unet.module.",
];

describe("rules by name", () => {
  for (const [family, names] of Object.entries(KEPT)) {
    test(`${family}: kept under every prefix`, () => {
      const all = PREFIXES.flatMap((prefix) => names.map((name) => prefix + name));
      const { rows } = planOf(Object.fromEntries(all.map((name) => [name, MATRIX])), { bit_width: 2 });
      expect(rows.filter(({ action }) => action === "quantize").map(({ name }) => name)).toEqual([]);
    });
  }

  test("modulation of a block has 4 bits or more, but for layer_bit_widths", () => {
    // An embedder inside a block makes no difference to the modulation beside it.
    const embedder = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight";
    const names = [
      "proj_out_1.weight",
      "double_layers.0.modX.1.weight",
      "single_layers.3.modCX.1.weight",
      "modF.1.weight",
      "transformer_blocks.2.norm1.linear_2.weight",
      "distilled_guidance_layer.layers.0.in_layer.weight",
      "distilled_guidance_layer.out_proj.weight",
      "double_blocks.0.img_mod.lin.weight",
      "single_blocks.3.modulation.lin.weight",
      "double_stream_modulation_img.lin.weight",
      "transformer_blocks.0.norm1.linear.weight",
      "transformer_blocks.0.norm1_context.linear.weight",
      "single_transformer_blocks.0.norm.linear.weight",
      "transformer_blocks.0.img_mod.1.weight",
      "joint_blocks.0.x_block.adaLN_modulation.1.weight",
      "layers.0.adaLN_modulation.0.weight",
      "input_blocks.1.0.emb_layers.1.weight",
      "down_blocks.0.resnets.0.time_emb_proj.weight",
    ];
    const all = [...names, embedder].map((name) => [`model.diffusion_model.${name}`, MATRIX]);
    const bits = (config: Record<string, unknown>) =>
      planOf(Object.fromEntries(all), config).rows.map((row) => row.bits).slice(0, -1);
    expect(bits({ bit_width: 2 })).toEqual(names.map(() => 4));
    expect(bits({ bit_width: 8 })).toEqual(names.map(() => 8));
    expect(bits({ bit_width: 2, layer_bit_widths: { ".": 2 } })).toEqual(names.map(() => 2));
  });

  test("embedders that every block of a DiT has get 8 bits, large tables of classes the bits of tables", () => {
    const emb = "transformer_blocks.3.norm1.emb";
    const tensors: Record<string, [string, number[]]> = {
      [`${emb}.timestep_embedder.linear_1.weight`]: MATRIX,
      [`m.${emb}.class_embedder.embedding_table.weight`]: ["F32", [1001, 128]],
      [`${emb}.class_embedder.embedding_table.weight`]: MATRIX,
    };
    const bits = (config: Record<string, unknown>) => planOf(tensors, config).rows.map(({ bits }) => bits);
    expect(bits({ bit_width: 2 })).toEqual([8, 4, undefined]);
    expect(bits({ bit_width: 4 })).toEqual([8, 8, undefined]);
    expect(bits({ bit_width: 2, embedding_bits: 16 })).toEqual([8, undefined, undefined]);
    expect(bits({ bit_width: 2, layer_bit_widths: { timestep_embedder: 3 } })).toEqual([3, 4, undefined]);
    expect(bits({ bit_width: 4, skip_sensitive_layers: true })).toEqual([undefined, 8, undefined]);
  });

  test("layers of blocks are quantized, also those named like outer ones", () => {
    const names = [
      "double_blocks.0.img_attn.proj.weight",
      "single_transformer_blocks.7.proj_out.weight",
      "blocks.0.attn.out.weight",
      "model.layers.0.mlp.gate_proj.weight",
      "model.layers.0.mlp.experts.0.gate_proj.weight",
      "model.layers.0.output.dense.weight",
      "down_blocks.1.attentions.0.proj_in.weight",
      "blocks.2.mlp.head.weight",
    ];
    const { rows } = planOf({
      ...Object.fromEntries(names.map((name) => [name, MATRIX])),
      "model.layers.0.mlp.gate.weight": ["BF16", [128, 64]],
    }, { bit_width: 2 });
    expect(rows.map(({ bits }) => bits)).toEqual(rows.map(() => 2));
  });

  test("a pattern that meets a rule warns, a full name wins", () => {
    const tensors = { "lm_head.weight": MATRIX, "blocks.0.a.weight": MATRIX, "x_embedder.weight": MATRIX };
    const { rows, warnings } = planOf(tensors, { layer_bit_widths: { "head|embed": 3, "blocks": 8 } });
    expect(rows.map(({ bits }) => bits)).toEqual([undefined, 8, undefined]);
    expect(warnings).toEqual([
      'layer_bit_widths: the pattern "head|embed" does not change 1 tensor of the rule "head", as ' +
      '"lm_head.weight": a tensor\'s full name does',
      'layer_bit_widths: the pattern "head|embed" does not change 1 tensor of the rule "embedder", as ' +
      '"x_embedder.weight": a tensor\'s full name does',
    ]);
    const named = planOf(tensors, { layer_bit_widths: { lm_head: 3, "x_embedder.weight": 8 } });
    expect(named.rows.map(({ bits }) => bits)).toEqual([3, 4, 8]);
    expect(named.warnings).toEqual([]);
  });
});

test("embedders, heads and modulation of further published families are kept or have 4 bits", () => {
  const kept =
    "audio_patchify_proj audio_adaln_single.linear audio_caption_projection.linear_1 audio_proj_out " +
    "av_ca_video_scale_shift_adaln_single.linear crossattn_proj.0 time_token.mlp.0 t5_yproj vae2llm llm2vae " +
    "timestep_emb.mlp.0 vision_aligner.layers.0 to_timestep_embed.0 to_cond_embed.0 transformer.project_in " +
    "transformer.project_out lyric_embs lyric_proj text_embed.text_embed input_embed.proj decoder_pred " +
    "context_embed byt5_in.fc1 vision_in.proj.1 map_noise map_layer0 time_mlp.0 clip_mapper " +
    "self_conditioning.up_proj final_layers.0.linear heads.0.proj final.0.fc proj_out.0.linear unpatchify.fc.0.lin";
  const modulation =
    "blocks.0.mod_x transformer_blocks.0.attn_norm.linear blocks.0.ada_ln blocks.0.AdaLN.1 " +
    "blocks.0.film blocks.0.cond_proj blocks.0.scale_shift_proj blocks.0.norm1.proj blocks.0.modulator.1 blocks.0.ada.1";
  const layers =
    "blocks.0.mlp.fc1 transformer_blocks.0.attn.to_out.0 blocks.0.attn.out_proj blocks.0.proj_in blocks.0.mlp.c_proj";
  // The config names a family, so that no rule of unknown ones helps.
  const config = { _class_name: "FluxTransformer2DModel" };
  for (const prefix of ["", "model.diffusion_model.", "transformer."]) {
    const names = [kept, modulation, layers].flatMap((text) => text.split(" "));
    const shapes = Object.fromEntries(names.map((name) => [`${prefix}${name}.weight`, [512, 512]]));
    using checkpoint = openCheckpoint(hollowCheckpoint(shapes, config));
    const { rows } = planQuantization(checkpoint, configOf({ bit_width: 2 }));
    const bits = new Map(rows.map((row) => [row.name, row.bits ?? 16]));
    const bitsOf = (text: string) => text.split(" ").map((name) => bits.get(`${prefix}${name}.weight`));
    expect(bitsOf(kept)).toEqual(kept.split(" ").map(() => 16));
    expect(bitsOf(modulation)).toEqual(modulation.split(" ").map(() => 4));
    expect(bitsOf(layers)).toEqual(layers.split(" ").map(() => 2));
  }
});

test("text encoders and autoencoders in one file with a denoiser are kept, alone they are quantized", () => {
  const others = [
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1",
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1",
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    "text_encoders.t5xxl.transformer.shared",
    "first_stage_model.decoder.mid.0.to_q",
    "vae.decoder.up.0.fc",
  ];
  const reasonsWith = (names: readonly string[]) => {
    const shapes = Object.fromEntries(names.map((name) => [`${name}.weight`, [512, 512]]));
    using checkpoint = openCheckpoint(hollowCheckpoint(shapes, { _class_name: "UNet2DConditionModel" }));
    const { rows } = planQuantization(checkpoint, configOf({ bit_width: 2 }));
    return rows.map(({ bits, reason }) => bits ?? reason);
  };
  for (const prefix of ["model.diffusion_model.", "diffusion_model.", "unet."]) {
    const own = `${prefix}blocks.0.attn1.to_q`;
    expect(reasonsWith([own, ...others])).toEqual([2, ...others.map(() => "other model")]);
  }
  expect(reasonsWith(others)).toEqual([2, 2, 2, 8, 2, 2]);
});

test("a matrix of few rows that is named like a router is one, a layer of that name is not", () => {
  const names = "gate.linear moe_gate gating_network.0 topk_router.fc switch ffn.gate_inp wg router_proj"
    .split(" ");
  const layers = "wg switch mlp.gate_proj w_gate".split(" ");
  const shapes = Object.fromEntries([
    ...names.map((name) => [`blocks.0.${name}.weight`, [8, 512]]),
    ...layers.map((name) => [`blocks.1.${name}.weight`, [1024, 512]]),
    ["blocks.0.mlp.experts.0.w_gate.weight", [64, 512]],
    ["blocks.0.mlp.gate_proj.weight", [64, 512]],
  ]);
  using checkpoint = openCheckpoint(hollowCheckpoint(shapes, { _class_name: "FluxTransformer2DModel" }));
  const { rows } = planQuantization(checkpoint, configOf({ bit_width: 2 }));
  expect(rows.filter(({ action }) => action === "keep").map(({ name }) => name).sort()).toEqual(
    names.map((name) => `blocks.0.${name}.weight`).sort(),
  );
});
