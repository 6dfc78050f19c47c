import { afterAll, describe, expect, test } from "bun:test";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { EXPORT_FORMATS, exportCheckpoint, quantizeFor } from "../../lib/interop/mod.ts";
import { IMAGE_FAMILIES } from "../../lib/names/image_families.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { dequantizeCheckpoint, quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { gaussian, matrix, rejection, type TestTensor, workplace, writeTensors } from "../_checkpoints.ts";
import { readersPython, runReader } from "../_readers.ts";

const kernels = await openKernels();
const place = workplace();
afterAll(() => {
  kernels.close();
  place.remove();
});
const format = EXPORT_FORMATS.find(({ name }) => name === "gguf")!;

/** A folder of weights without config.json, as diffusers' `transformer` is to this tool. */
function store(tensors: Readonly<Record<string, TestTensor>>): string {
  const folder = place.fresh("model");
  mkdirSync(folder);
  writeTensors(join(folder, "diffusion_pytorch_model.safetensors"), tensors);
  return folder;
}

const SIZE = 256;
const linear = (rows: number, seed: number) => matrix(rows, SIZE, gaussian(rows * SIZE, seed));
const vector = (size: number, seed: number): TestTensor => ({
  dtype: "F32",
  shape: [size],
  data: gaussian(size, seed),
});

/** Some tensors of FLUX.1 in diffusers' names. */
function flux(): Record<string, TestTensor> {
  const double = "transformer_blocks.0.", single = "single_transformer_blocks.0.";
  const linears: Record<string, number> = {
    "x_embedder": SIZE,
    "norm_out.linear": 2 * SIZE,
    "proj_out": 16,
    [`${double}norm1.linear`]: 6 * SIZE,
    ...Object.fromEntries(
      ["to_q", "to_k", "to_v", "to_out.0"].map((name) => [`${double}attn.${name}`, SIZE]),
    ),
    ...Object.fromEntries(["attn.to_q", "attn.to_k", "attn.to_v"].map((name) => [single + name, SIZE])),
    [`${single}proj_mlp`]: 4 * SIZE,
  };
  let seed = 1;
  return {
    ...Object.fromEntries(
      Object.entries(linears).flatMap(([name, rows]) => [
        [`${name}.weight`, linear(rows, seed++)],
        [`${name}.bias`, vector(rows, seed++)],
      ]),
    ),
    [`${double}attn.norm_added_q.weight`]: vector(64, 99),
  };
}

async function exported(input: string): Promise<string> {
  const output = `${place.fresh("out")}.gguf`;
  await exportCheckpoint({ input, output, kernels, format });
  return output;
}

const values = (tensor: TestTensor) => [...tensor.data as Float32Array];

describe("GGUF of image models", () => {
  test("diffusers' names become the model's own: split rows follow one another, halves are swapped", async () => {
    const tensors = flux();
    using file = openCheckpoint(await exported(store(tensors)));
    const read = (name: string) => [...new Float32Array(file.read(name).buffer)];
    const parts = (...names: string[]) => names.flatMap((name) => values(tensors[name]!));
    for (const kind of ["weight", "bias"]) {
      const [q, k, v] = ["q", "k", "v"].map((name) => `transformer_blocks.0.attn.to_${name}.${kind}`) as [
        string,
        string,
        string,
      ];
      expect(read(`double_blocks.0.img_attn.qkv.${kind}`)).toEqual(parts(q, k, v));
      expect(read(`single_blocks.0.linear1.${kind}`)).toEqual(
        parts(
          ...["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"].map((name) =>
            `single_transformer_blocks.0.${name}.${kind}`
          ),
        ),
      );
      const all = values(tensors[`norm_out.linear.${kind}`]!), half = all.length / 2;
      expect(read(`final_layer.adaLN_modulation.1.${kind}`)).toEqual([
        ...all.slice(half),
        ...all.slice(0, half),
      ]);
    }
    expect(read("double_blocks.0.txt_attn.norm.query_norm.scale")).toEqual(
      parts("transformer_blocks.0.attn.norm_added_q.weight"),
    );
    expect(file.gguf!.keys.get("general.architecture")!.value).toBe("flux");
  });

  test("quantized for ComfyUI keeps what its tools never quantize, also where rules by name would not", async () => {
    const tensors = {
      "cap_embedder.1.weight": linear(SIZE, 1),
      "context_refiner.0.attention.qkv.weight": linear(3 * SIZE, 2),
      "layers.0.attention.qkv.weight": linear(3 * SIZE, 3),
      "layers.0.feed_forward.w2.weight": matrix(SIZE, 96, gaussian(SIZE * 96, 4)),
      "x_pad_token": matrix(1, SIZE, gaussian(SIZE, 5)),
    };
    const output = `${place.fresh("out")}.gguf`;
    const { config } = resolveConfig({ overrides: { target: "comfyui", bit_width: 4, solver: "round" } });
    await quantizeFor({ input: store(tensors), output, kernels, config });
    using file = openCheckpoint(output);
    const types = [...file.tensors].map(([name, { info }]) => [name, info.stored?.type ?? info.dtype]);
    expect(Object.fromEntries(types)).toEqual({
      "cap_embedder.1.weight": "F32",
      "context_refiner.0.attention.qkv.weight": "F32",
      "layers.0.attention.qkv.weight": "Q4_K",
      "layers.0.feed_forward.w2.weight": "Q4_1",
      "x_pad_token": "F32",
    });
    expect(file.gguf!.keys.get("general.architecture")!.value).toBe("lumina2");
  });

  test("whole checkpoints give their image model alone", async () => {
    const own = { "double_blocks.0.img_attn.proj.weight": linear(SIZE, 1), "img_in.weight": linear(SIZE, 2) };
    const prefixed = Object.fromEntries(
      Object.entries(own).map(([name, tensor]) => [`model.diffusion_model.${name}`, tensor]),
    );
    using file = openCheckpoint(
      await exported(store({ ...prefixed, "first_stage_model.a.weight": linear(4, 3) })),
    );
    expect([...file.tensors.keys()].sort()).toEqual(Object.keys(own).sort());
  });

  const { "transformer_blocks.0.attn.to_k.weight": key, ...withoutKey } = flux();
  const refused: Readonly<Record<string, readonly [Record<string, TestTensor>, RegExp]>> = {
    "no known family": [{ "pos_embed.proj.weight": key! }, /the family must be one of Dream, LLaDA, FLUX/],
    "one of three parts missing": [
      withoutKey,
      /"transformer_blocks\.0\.attn\.to_q\.weight".*in 3 tensors, got 2/,
    ],
    "a tensor that no table has": [
      { ...flux(), "ip_adapter.0.weight": key! },
      /"ip_adapter\.0\.weight".*one of the tensors of FLUX/,
    ],
    "two of one name": [{
      ...flux(),
      "time_text_embed.timestep_embedder.linear_1.weight": key!,
      "time_guidance_embed.timestep_embedder.linear_1.weight": key!,
    }, /the only "time_in\.in_layer\.weight"/],
  };
  for (const [what, [tensors, message]] of Object.entries(refused)) {
    test(`refused: ${what}`, async () => {
      expect((await rejection(exported(store(tensors)))).message).toMatch(message);
    });
  }

  test("a program is refused models that it does not run, before work begins", async () => {
    const run = (target: string, input: string) => {
      const { config } = resolveConfig({ overrides: { target, bit_width: 4, solver: "round" } });
      return rejection(quantizeFor({ input, output: `${place.fresh("out")}.gguf`, kernels, config }));
    };
    expect((await run("llama.cpp", store(flux()))).message).toContain(
      "one of Dream, LLaDA, got a model for other programs",
    );
    const names = IMAGE_FAMILIES.map(({ name }) => name).join(", ");
    expect((await run("diffusers", "tests/models/dream-mini")).message).toContain(
      `one of ${names}, got a model`,
    );
  });
});

/** Types that the layers of a family are quantized to, the families in turn. */
const TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1"];

test("diffusers and gguf read every family's file as it was quantized, bit for bit", async () => {
  const python = readersPython(), script = "image_models.py", folder = place.fresh("families");
  if (python === undefined) return;
  const families = await runReader(python, script, ["make", folder]) as string[];
  const tasks = [];
  for (const [i, family] of families.entries()) {
    const [packed, plain] = [place.fresh("packed"), place.fresh("plain")], gguf = `${packed}.gguf`;
    const overrides = { target: "diffusers", target_type: TYPES[i % TYPES.length], solver: "round" };
    const { config } = resolveConfig({ overrides });
    await quantizeCheckpoint({ input: join(folder, family), output: packed, kernels, config });
    await dequantizeCheckpoint({ input: packed, output: plain, kernels, dtype: "F32" });
    await exportCheckpoint({ input: packed, output: gguf, kernels, format });
    tasks.push({ family, gguf, plain: join(plain, "diffusion_pytorch_model.safetensors") });
  }
  const list = place.fresh("list.json");
  writeFileSync(list, JSON.stringify(tasks));
  const found = await runReader(python, script, ["check", folder, list]) as Record<
    string,
    { architecture: string; tensors: number; wrong: string[]; types: string[] }
  >;
  for (const [i, family] of families.entries()) {
    const { architecture, tensors, wrong, types } = found[family]!;
    expect([family, wrong]).toEqual([family, []]);
    expect(tensors).toBeGreaterThan(20);
    expect([family, types.includes(TYPES[i % TYPES.length]!)]).toEqual([family, true]);
    const own = { flux2: "flux", chroma: "flux", z_image: "lumina2" }[family] ?? family;
    expect(architecture).toBe(own);
  }
}, 300_000);
