/** Families told by names and config.json, what is kept of each, and the measurement that the rules rest on. */
import { afterAll, describe, expect, test } from "bun:test";
import { readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { imageModel, ownName } from "../../lib/names/image_names.ts";
import { FAMILIES, familyOf } from "../../lib/names/families.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { planQuantization } from "../../lib/pipeline/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { ROOT, workplace } from "../_checkpoints.ts";
import { readersPython, runReader } from "../_readers.ts";
import { configOf, pipelineRuns } from "../pipeline/_runs.ts";

const place = workplace(), kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});
const { planOf } = pipelineRuns(kernels, place);
const python = readersPython(), folder = place.fresh("families");
const made = python === undefined
  ? []
  : await runReader(python, "family_rules.py", ["make", folder]) as string[];
const withPython = python === undefined ? () => {} : describe;

/** The families that diffusers makes, by the script's names. */
const NAMES: Readonly<Record<string, string>> = {
  flux: "FLUX.1, FLUX.2 and Chroma",
  flux2: "FLUX.1, FLUX.2 and Chroma",
  sd3: "Stable Diffusion 3",
  qwen_image: "Qwen-Image",
  wan: "Wan",
  lumina2: "Lumina 2 and Z-Image",
  z_image: "Lumina 2 and Z-Image",
  sdxl: "Stable Diffusion XL",
  pixart: "PixArt",
  dit: "DiT",
};
const shapesOf = (path: string) => {
  using checkpoint = openCheckpoint(path);
  return Object.fromEntries(
    [...checkpoint.tensors.values()].map(({ info: { name, shape } }) => [name, [...shape]]),
  );
};
const page = readFileSync(join(ROOT, "docs", "models.md"), "utf8");

withPython("families of diffusers", () => {
  test("are told by names alone, under the prefixes of whole checkpoints, and by config.json", () => {
    for (const family of made) {
      const path = join(folder, family), names = Object.keys(shapesOf(path));
      for (const prefix of ["", "model.diffusion_model."]) {
        expect([family, familyOf(names.map((name) => prefix + name), undefined)?.name]).toEqual([
          family,
          NAMES[family],
        ]);
      }
      const config = JSON.parse(readFileSync(join(path, "config.json"), "utf8"));
      const byClass = familyOf(["a.weight"], config)?.name; // a UNet's class is that of several families
      expect([family, byClass]).toEqual([family, NAMES[family]!]);
    }
  });

  test("at 2 bits no last layer, embedder or router has codes, and modulation has 4 bits or more, in both layouts", () => {
    for (const family of made) {
      const shapes = shapesOf(join(folder, family)), names = Object.keys(shapes);
      const model = imageModel(names);
      const own = Object.fromEntries(names.map((name) => [
        model === undefined ? name : ownName(model, name)?.own ?? name,
        shapes[name]!,
      ]));
      for (const layout of [shapes, own]) {
        const { rows } = planOf(
          Object.fromEntries(
            Object.entries(layout).map(([name, shape]) => [name, ["BF16", shape] as [string, number[]]]),
          ),
          { bit_width: 2 },
        );
        const bitsOf = (pattern: RegExp) =>
          rows.filter(({ name, shape }) =>
            shape.length === 2 && pattern.test(name) && name.endsWith(".weight")
          )
            .map(({ name, bits }) => [name, bits ?? 16] as const);
        const last = bitsOf(
          /^(?:(?:all_)?final_layer|norm_out|proj_out(?:_2)?\.weight|head\.|conv_out|out\.)/,
        );
        const early = bitsOf(
          /^(?:x_embedder|context_embedder|\w*time\w*_embed|t_embedder|cap_embedder|img_in|txt_in|time_in|vector_in|condition_embedder|caption_projection|add_embedding)\b/,
        );
        expect([family, last.filter(([, bits]) => bits < 8)]).toEqual([family, []]);
        expect([family, early.filter(([, bits]) => bits < 8)]).toEqual([family, []]);
        expect(last.length + early.length).toBeGreaterThan(0);
        const modulation = bitsOf(
          /(?:_mod\.|\.norm1(?:_context)?\.linear|adaLN_modulation|modulation_\w+\.lin|emb_layers|time_emb_proj)/,
        );
        expect([family, modulation.filter(([, bits]) => bits < 4)]).toEqual([family, []]);
        // the layers of blocks have what was asked for
        const layers = rows.filter(({ reason }) => reason === "bit_width");
        expect(layers.length).toBeGreaterThan(4);
        expect(layers.every(({ bits, name }) => bits === 2 && /\d/.test(name))).toBe(true);
      }
    }
  });

  test("what the rules keep costs most: docs/models.md has the figures", async () => {
    const rules: Record<string, Record<string, string[]>> = {};
    for (const family of made) {
      using checkpoint = openCheckpoint(join(folder, family));
      const groups: Record<string, string[]> = {};
      for (const { name, shape, reason } of planQuantization(checkpoint, configOf({ bit_width: 2 })).rows) {
        if (shape.length === 2 && name.endsWith(".weight")) (groups[reason] ??= []).push(name);
      }
      rules[family] = groups;
    }
    const list = join(place.path, "rules.json");
    writeFileSync(list, JSON.stringify(rules));
    type Figures = { weights: number; 2: number; 4: number; 8: number };
    const measured = await runReader(python!, "family_rules.py", ["measure", folder, list]) as Record<
      string,
      Record<string, Figures>
    >;
    const percent = (value: number) => (100 * value).toFixed(2);
    for (const [family, groups] of Object.entries(measured)) {
      const layers = groups["bit_width"]!, head = groups["head"];
      // a weight of the last layers costs more than a hundred times one of a block, but in SDXL, which ends
      // in a convolution
      if (family !== "sdxl") {
        expect(head![2] / head!.weights).toBeGreaterThan(30 * layers[2] / layers.weights);
      }
      // what is kept at 2 bits would cost more than all layers of the blocks together
      if (family !== "sdxl") expect(head![2]).toBeGreaterThan(layers[2]);
      const cell = (rule: string) => {
        const own = groups[rule];
        return own === undefined ? "–" : `${(100 * own.weights).toFixed(1)} %: ${percent(own[2])} %`;
      };
      const modulation = groups["modulation"];
      const line = `| ${family} | ${cell("embedder")} | ${cell("head")} | ${cell("modulation")} | ${
        modulation === undefined ? "–" : `${percent(modulation[4])} %`
      } | ${cell("bit_width")} |`;
      expect(page).toContain(line);
    }
  });
});

test("language models are told by config.json", () => {
  const cases: [Record<string, unknown>, string | undefined][] = [
    [{ model_type: "Dream", architectures: ["DreamModel"] }, "Dream"],
    [{ model_type: "llada", architectures: ["LLaDAModelLM"] }, "LLaDA"],
    [{ model_type: "llada", architectures: ["LLaDAMoEModelLM"] }, "LLaDA-MoE"],
    [{ model_type: "llada2_moe", architectures: ["LLaDA2MoeModelLM"] }, "LLaDA2"],
    [{ model_type: "sdar", architectures: ["SDARForCausalLM"] }, "SDAR"],
    [{ model_type: "sdar_moe", architectures: ["SDARMoeForCausalLM"] }, "SDAR-MoE"],
    [{ model_type: "diffusion_gemma", architectures: ["DiffusionGemmaForBlockDiffusion"] }, "DiffusionGemma"],
    [{ model_type: "mystery" }, undefined],
    [{}, undefined],
  ];
  for (const [config, name] of cases) {
    expect([config, familyOf(["a.weight"], config)?.name]).toEqual([config, name]);
  }
});

test("routers are kept and experts have the bits asked for, by the names of each mixture", () => {
  const { rows } = planOf({
    "model.layers.1.mlp.gate.weight": ["BF16", [64, 2048]], // LLaDA-MoE, LLaDA2, SDAR-MoE
    "model.layers.1.mlp.gate.expert_bias": ["F32", [64]],
    "model.layers.1.mlp.experts.7.gate_proj.weight": ["BF16", [512, 2048]],
    "model.layers.1.mlp.shared_experts.up_proj.weight": ["BF16", [512, 2048]],
    "model.layers.1.shared_expert.up_proj.weight": ["BF16", [512, 2048]],
    "model.layers.1.attention.query_key_value.weight": ["BF16", [3072, 2048]],
    "model.layers.1.router.proj.weight": ["BF16", [64, 2048]], // DiffusionGemma
    "model.layers.1.feed_forward.router.weight": ["BF16", [64, 2048]],
    "double_stream_blocks.0.block.ff_i.gate.weight": ["BF16", [4, 2560]], // HiDream
  }, { bit_width: 2 });
  expect(rows.map(({ reason, bits }) => [reason, bits])).toEqual([
    ["router", undefined],
    ["not a matrix", undefined],
    ["bit_width", 2],
    ["bit_width", 2],
    ["bit_width", 2],
    ["bit_width", 2],
    ["router", undefined],
    ["router", undefined],
    ["router", undefined],
  ]);
});

test("of an unknown family what is outside its numbered blocks is kept, and a warning says so", () => {
  const tensors: Record<string, [string, number[]]> = {
    "stem.weight": ["BF16", [64, 64]],
    "units.0.mix.weight": ["BF16", [64, 64]],
    "units.1.mix.weight": ["BF16", [64, 64]],
    "readout.weight": ["BF16", [64, 64]],
  };
  const folder = join(place.path, "unknown");
  const plan = planOf(tensors, { bit_width: 2 });
  expect(plan.family).toBe("Dream"); // planOf's config.json says so
  expect(plan.rows.every(({ action }) => action === "quantize")).toBe(true);
  rmSync(folder, { recursive: true, force: true });
  const path = join(place.path, readdirSync(place.path).find((name) => name.startsWith("plan"))!);
  for (
    const [names, kept] of [[Object.keys(tensors), ["stem.weight", "readout.weight"]], [[
      "a.weight",
      "b.weight",
    ], []]] as const
  ) {
    writeFileSync(join(path, "config.json"), JSON.stringify({ model_type: "mystery" }));
    const rows = unknownPlan(path, names);
    expect(rows.kept).toEqual([...kept]);
    expect(rows.warnings.filter((text) => text.includes("family is not known"))).toEqual([
      expect.stringContaining(kept.length > 0 ? 'kept, as "stem.weight"' : "no numbered blocks"),
    ]);
  }
});

/** A plan of matrices with these names, of a family that is not known. */
function unknownPlan(path: string, names: readonly string[]) {
  const header = JSON.stringify(Object.fromEntries(names.map((name, i) => [
    name,
    { dtype: "BF16", shape: [64, 64], data_offsets: [8192 * i, 8192 * (i + 1)] },
  ])));
  const bytes = new Uint8Array(8 + header.length + 8192 * names.length);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(header.length), true);
  bytes.set(new TextEncoder().encode(header), 8);
  writeFileSync(join(path, "model.safetensors"), bytes);
  using checkpoint = openCheckpoint(path);
  const { rows, warnings } = planQuantization(checkpoint, configOf({ bit_width: 2 }));
  return { kept: rows.filter(({ reason }) => reason === "unknown family").map(({ name }) => name), warnings };
}

test("docs/models.md has a line for each family", () => {
  for (const { name, runs } of FAMILIES) {
    const line = page.split("\n").find((line) => line.startsWith(`| ${name} |`));
    expect([name, line?.split("|")[2]?.trim().startsWith(runs ? "yes" : "no")]).toEqual([name, true]);
  }
});
