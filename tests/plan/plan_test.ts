import { afterAll, describe, expect, test } from "bun:test";
import { DEFAULT_CONFIG } from "../../lib/config/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { KEEP_RULES, planQuantization } from "../../lib/pipeline/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { workplace } from "../_checkpoints.ts";
import { DIT, DREAM, pipelineRuns } from "../pipeline/_runs.ts";

const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});
const { quantizeTo, planOf } = pipelineRuns(kernels, place);

describe("planQuantization", () => {
  const M = [32, 64];
  const decisions: [name: string, dtype: string, shape: number[], reason: string][] = [
    ["model.layers.0.mlp.up_proj.weight", "BF16", M, "bit_width"],
    ["model.layers.0.mlp.up_proj.bias", "BF16", [32], "not a matrix"],
    ["model.embed_tokens.weight", "BF16", M, "embedding"],
    ["lm_head.weight", "BF16", M, "head"],
    ...[
      ["token_embedding", "embedder"],
      ["shared", "bit_width"],
      ["embed_in", "embedder"],
      ["embeddings", "bit_width"],
      ["embedding", "bit_width"],
      ["embed_positions", "bit_width"],
      ["patch_embedding", "embedder"],
    ]
      .flatMap(([module, ofParts]): [string, string, number[], string][] => [
        [`${module}.weight`, "F32", M, "embedding"],
        [`encoder.${module}.weight`, "F32", M, "embedding"],
        [`${module}.proj.weight`, "F32", M, ofParts!],
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
    ["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight", "F32", M, "block embedder"],
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
      expect(row!.action).toBe(["bit_width", "block embedder"].includes(reason) ? "quantize" : "keep");
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
    expect(counts).toEqual([4 * 7, 6 * 9 + 1]); // DiT: two of time, adaLN, four of attention, two of ff
  });

  const tensors: Record<string, [string, number[]]> = {
    "a.1.weight": ["F32", M],
    "a.2.weight": ["F32", M],
    "lm_head.weight": ["F32", M],
    "u.0.time_embed.0.weight": ["F32", M],
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

  test("warns about trellis codes that no layer has", () => {
    const warningsAt = (bit_width: number) =>
      planOf({ "blocks.0.proj.weight": ["F32", [64, 64]], "blocks.1.proj.weight": ["F32", [64, 64]] }, {
        ...{ bit_width, solver: "best", codes: "trellis", keep_patterns: ["nowhere"] },
      }).warnings;
    expect(warningsAt(2)).toHaveLength(1);
    expect(warningsAt(4)).toHaveLength(2);
    expect(warningsAt(4)[0]).toContain("no layer has trellis codes, which are of 2 or 3 bits");
  });

  test("codes the scales of matrices, not those of stacks of experts", () => {
    const { rows } = planOf({
      "blocks.0.proj.weight": ["F32", [64, 64]],
      "blocks.0.experts.proj.weight": ["F32", [2, 64, 64]],
    }, {
      ...{ bit_width: 2, solver: "best", codes: "trellis", scale_bits: 3 },
    });
    const forms = rows.map(({ name, scaleBits, bytesAfter }) => [name, scaleBits, bytesAfter]);
    expect(new Map(forms.map(([name, ...form]) => [name, form]))).toEqual(
      new Map([
        ["blocks.0.proj.weight", [3, 64 * 16 + 64 * 3 / 8 + 4 + 16]],
        ["blocks.0.experts.proj.weight", [16, 128 * 16 + 128 * 4 + 24]],
      ]),
    );
  });

  test("gives each matrix a grid that the target stores exactly, and says where rows rule it out", () => {
    const matrices: Record<string, [string, number[]]> = {
      "a.proj.weight": ["F32", [64, 256]],
      "b.proj.weight": ["F32", [64, 96]],
      "c.proj.weight": ["F32", [64, 40]],
    };
    const grids = (target: string, bit_width: number, more: object = {}) => {
      const { rows, warnings } = planOf(matrices, { target, bit_width, ...more });
      const forms = rows.map((
        { type, groupSize, zeroPoint, scaleBits },
      ) => [type, groupSize, scaleBits ?? zeroPoint]);
      return [forms, warnings.length];
    };
    const kept = [undefined, undefined, undefined];
    expect(grids("vllm", 3)).toEqual([[["W3A16", 128, "symmetric"], ["W3A16", 32, "symmetric"], kept], 2]);
    expect(grids("mlx", 2)).toEqual([[["AFFINE2", 64, 16], ["AFFINE2", 32, 16], kept], 2]);
    expect(grids("mlx", 8, { group_size: 32 })).toEqual([
      [["AFFINE8", 32, 16], ["AFFINE8", 32, 16], kept],
      1,
    ]);
    expect(grids("comfy_quant", 4)).toEqual([[["AWQ_W4A16", 64, 16], kept, kept], 2]);
    const rows = Array.from({ length: 3 }, () => ["INT8_TENSORWISE", 0 as const, "symmetric"]);
    expect(grids("comfy_quant", 8)).toEqual([rows, 0]);
    expect(() => grids("comfy_quant", 2)).toThrow(
      /"bit_width": got 2, expected one of 4, 8 with target comfy_quant/,
    );
  });

  test("predicts the bytes that are written", async () => {
    for (const zero_point of ["real", "integer", "symmetric", "offset"]) {
      const { plan, layers } = await quantizeTo(place.fresh(), DREAM, {
        config: { zero_point, bit_width: 3 },
      });
      expect(layers.map((layer) => layer.bytesAfter)).toEqual(plan.rows.map((row) => row.bytesAfter));
    }
  });
});
