/** What models refuse, and that they refuse it before a weight is read or a kernel runs. */
import { afterAll, describe, expect, test } from "bun:test";
import { cpSync, existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { CheckpointError, FormatError, WeightsError } from "../../lib/errors.ts";
import {
  diffusionGenerate,
  generateImages,
  lladaGenerate,
  loadDit,
  loadDream,
  loadLlada,
  loadModel,
  loadScheduler,
  requirementsAt,
} from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { unchecked, type UncheckedKernels } from "../../lib/native/kernels.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { Checkpoint, SafetensorsFile } from "../../lib/tensor/mod.ts";
import { MODELS, run, type TestTensor, workplace, writeTensors } from "../_checkpoints.ts";
import { ditCheckpoint, dreamCheckpoint, lladaCheckpoint, randomTensor, store } from "../_models.ts";
import { thrown } from "../tensor/_files.ts";

const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});

/** Kernels that count their calls. */
let calls = 0;
const counted: UncheckedKernels = {
  ...unchecked(kernels),
  calls: Object.fromEntries(
    Object.entries(unchecked(kernels).calls).map(([name, call]) => [name, (...args: never[]) => {
      calls++;
      return (call as (...args: never[]) => number)(...args);
    }]),
  ) as unknown as UncheckedKernels["calls"],
};

/** What `work` throws, once it is certain that it read no weight and called no kernel. */
function refusal(work: () => unknown): Error & { tensor?: string; path?: string } {
  const read: string[] = [];
  const { readInto, read: readNew } = Checkpoint.prototype;
  Checkpoint.prototype.readInto = function (name, ...rest) {
    read.push(name);
    return readInto.call(this, name, ...rest);
  };
  Checkpoint.prototype.read = function (name, ...rest) {
    read.push(name);
    return readNew.call(this, name, ...rest);
  };
  const before = calls;
  try {
    const error = thrown(work);
    // the two numbers of a packed tensor's shape are no weights
    expect([read.filter((name) => !name.endsWith("_shape")), calls - before]).toEqual([[], 0]);
    return error;
  } finally {
    Object.assign(Checkpoint.prototype, { readInto, read: readNew });
  }
}

const families = { Dream: dreamCheckpoint(), LLaDA: lladaCheckpoint(), DiT: ditCheckpoint() };
type Family = keyof typeof families;
const names = Object.keys(families) as Family[];

test("a refusal is seen to have been made before any work, and work is seen", () => {
  const path = store(place.fresh(), families.Dream);
  expect(() =>
    refusal(() => {
      loadModel(path, counted);
      throw new RangeError("too late");
    })
  ).toThrow();
  expect(() =>
    refusal(() => {
      loadDream(path, kernels).forward(Int32Array.of(1), 1);
      throw new RangeError("too late");
    })
  ).toThrow();
});

describe("a checkpoint is refused before a weight is read", () => {
  const failure = (family: Family, changes: Parameters<typeof store>[2]) => {
    const path = store(place.fresh(), families[family], changes);
    const error = refusal(() => loadModel(path, counted));
    // what is said before a model is loaded refuses the same
    expect(thrown(() => requirementsAt(path)).message).toBe(error.message);
    return error;
  };
  const some: Record<Family, [string, string, string, string]> = {
    Dream: [
      "model.layers.0.mlp.up_proj.weight",
      "lm_head.weight",
      "model.layers.2.mlp.up_proj.weight",
      "hidden_size",
    ],
    LLaDA: [
      "model.transformer.blocks.1.ff_out.weight",
      "model.transformer.wte.weight",
      "model.transformer.blocks.0.q_proj.bias",
      "d_model",
    ],
    DiT: [
      "transformer_blocks.0.ff.net.2.bias",
      "proj_out_1.weight",
      "transformer_blocks.0.norm3.weight",
      "num_attention_heads",
    ],
  };
  for (const family of names) {
    const [first, second, extra] = some[family];
    test(`${family}: missing and extra tensors, all listed`, () => {
      const error = failure(family, {
        tensors: {
          [first]: undefined,
          [second]: undefined,
          [extra]: randomTensor([3], 1, "F32", 1),
          stray: randomTensor([1], 1, "F32", 1),
        },
      });
      expect(error).toBeInstanceOf(CheckpointError);
      for (const part of [/missing [^;]*/, /unknown [^;]*/]) expect(error.message).toMatch(part);
      const [missing, unknown] = [/missing ([^;]*)/, /unknown ([^;]*)/].map((part) =>
        part.exec(error.message)![1]!
      );
      for (const name of [first, second]) expect(missing).toContain(`"${name}"`);
      for (const name of [extra, "stray"]) expect(unknown).toContain(`"${name}"`);
    });

    test(`${family}: shapes that contradict config.json, with both`, () => {
      const { shape } = families[family].tensors[second]!;
      const wrong = [shape[0]! + 1, ...shape.slice(1)];
      const error = failure(family, { tensors: { [second]: randomTensor(wrong, 1, "F32", 1) } });
      expect(error).toBeInstanceOf(CheckpointError);
      expect(error.tensor).toBe(second);
      expect(error.message).toContain(`"${second}" must be [${shape.join(", ")}], got [${wrong.join(", ")}]`);
    });

    test(`${family}: sizes of config.json that its tensors do not have`, () => {
      const key = some[family][3],
        value = (families[family].config as unknown as Record<string, number>)[key]!;
      const error = failure(family, { config: { [key]: 2 * value } });
      expect(error).toBeInstanceOf(CheckpointError);
      expect(error.message).toMatch(/contradicting config\.json: "/);
    });
  }

  test("an architecture that is not known, with those that are", () => {
    for (
      const config of [
        { model_type: "llama", architectures: ["LlamaForCausalLM"] },
        { model_type: null, architectures: null },
      ]
    ) {
      const error = failure("Dream", { config });
      expect(error).toBeInstanceOf(CheckpointError);
      for (const known of ["Dream", "llada", "DiTTransformer2DModel"]) expect(error.message).toContain(known);
      expect(error.message).toContain(`got ${config.model_type === null ? "null" : '"llama"'}`);
    }
    const bare = store(place.fresh(), families.Dream);
    rmSync(join(bare, "config.json"));
    expect(refusal(() => loadModel(bare, counted)).message).toContain("got no config.json");
  });

  for (const family of ["Dream", "DiT"] as const) {
    test(`${family}: packed tensors whose sizes do not fit`, async () => {
      const packed = place.fresh();
      const { config } = resolveConfig({ overrides: { solver: "clip", bit_width: 4, group_size: 16 } });
      await quantizeCheckpoint({
        input: store(place.fresh(), families[family]),
        output: packed,
        config,
        kernels,
      });
      const name =
        { Dream: "model.layers.1.mlp.down_proj.weight", DiT: "transformer_blocks.1.ff.net.2.weight" }[family];
      const file = join(packed, "model.safetensors");
      const tensors: Record<string, TestTensor> = {};
      {
        using stored = SafetensorsFile.open(file);
        for (const { name, dtype, shape } of stored.tensors.values()) {
          tensors[name] = { dtype, shape, data: stored.read(name) };
        }
      }
      const changed = (
        part: string,
        change: (tensor: TestTensor) => TestTensor | undefined,
        edit?: (config: string) => string,
      ) => {
        const folder = place.fresh();
        cpSync(packed, folder, { recursive: true });
        const own = { ...tensors, [part]: change(tensors[part]!) };
        const kept = Object.entries(own).filter((entry): entry is [string, TestTensor] =>
          entry[1] !== undefined
        );
        writeTensors(join(folder, "model.safetensors"), Object.fromEntries(kept));
        const path = join(folder, "config.json");
        if (edit !== undefined) writeFileSync(path, edit(readFileSync(path, "utf8")));
        return refusal(() => loadModel(folder, counted));
      };
      const shorter = ({ dtype, shape: [rows, cols], data }: TestTensor): TestTensor => ({
        dtype,
        shape: [rows! - 1, cols!],
        data: new Uint8Array(data.buffer, data.byteOffset, data.byteLength / rows! * (rows! - 1)),
      });
      for (const suffix of ["_packed", "_scale", "_zero_point"]) {
        const error = changed(name + suffix, shorter);
        expect(error).toBeInstanceOf(FormatError);
        expect([error.tensor, error.message.includes(`"${name}${suffix}" must be`)]).toEqual([name, true]);
        expect(changed(name + suffix, () => undefined)).toBeInstanceOf(FormatError);
      }
      const [rows, cols] = families[family].tensors[name]!.shape as [number, number];
      const shapeOf = (...sizes: number[]) => () => ({
        dtype: "I64",
        shape: [2],
        data: BigInt64Array.from(sizes, BigInt),
      });
      expect(changed(`${name}_shape`, shapeOf(rows, cols + 64))).toBeInstanceOf(FormatError);
      expect(changed(`${name}_shape`, shapeOf(-1, cols))).toBeInstanceOf(FormatError);
      const same = (tensor: TestTensor) => tensor;
      const bits = (text: string) => {
        const stored = JSON.parse(text);
        stored.quantization_config.arrowquant.layers[name].bits = 2;
        return JSON.stringify(stored);
      };
      expect(changed(`${name}_shape`, same, bits)).toBeInstanceOf(FormatError);
      // sizes that fit each other and not config.json
      const wider = (text: string) =>
        text.replace(
          /"(intermediate_size|num_embeds_ada_norm)": (\d+)/,
          (_, key, value) => `"${key}": ${Number(value) + 32}`,
        );
      const error = changed(`${name}_shape`, same, wider);
      expect(error).toBeInstanceOf(CheckpointError);
      expect(error.message).toContain("contradicting config.json");
    });
  }

  test("a norm or bias that was packed", async () => {
    const packed = place.fresh();
    const square = { ...families.Dream.config };
    const { config } = resolveConfig({ overrides: { solver: "clip", bit_width: 4, group_size: 16 } });
    const input = store(place.fresh(), { ...families.Dream, config: square }, {
      tensors: { "model.layers.0.self_attn.q_proj.bias": randomTensor([1, 48], 1, "F32", 1) },
    });
    await quantizeCheckpoint({ input, output: packed, config, kernels });
    expect(refusal(() => loadModel(packed, counted))).toBeInstanceOf(CheckpointError);
  });
});

describe("an input is refused before a kernel runs", () => {
  const dream = loadDream(store(place.fresh(), families.Dream), counted);
  const llada = loadLlada(store(place.fresh(), families.LLaDA), counted);
  const dit = loadDit(store(place.fresh(), families.DiT), counted);
  const scheduler = loadScheduler(join(MODELS, "glyph-dit"));
  const masks = (count: number) => new Int32Array(count).fill(49);
  const generations: [string, (tokens: Int32Array, steps?: number) => unknown][] = [
    ["forward", (tokens) => dream.forward(tokens, 1)],
    ["diffusionGenerate", (tokens, steps) => diffusionGenerate(dream, tokens, 1, { steps })],
    ["lladaGenerate", (tokens, steps) => lladaGenerate(llada, tokens, 1, { generationLength: 4, steps })],
  ];
  for (const [name, generate] of generations) {
    test(`${name}: tokens outside the vocabulary and prompts that are too long`, () => {
      for (const bad of [50, -1, 2 ** 31 - 1]) {
        const error = refusal(() => generate(Int32Array.of(3, 49, bad)));
        expect(error).toBeInstanceOf(RangeError);
        expect(error.message).toContain(`tokens must be from 0 to 49, got ${bad} at position 2`);
      }
      const error = refusal(() => generate(masks(65)));
      expect(error).toBeInstanceOf(RangeError);
      expect(error.message).toMatch(/64 tokens, got 65/);
      if (name === "lladaGenerate") expect(refusal(() => generate(masks(61)))).toBeInstanceOf(RangeError);
    });
  }

  test("fewer than one step", () => {
    for (const steps of [0, -3, 0.5, NaN, Infinity]) {
      for (const [name, generate] of generations.slice(1)) {
        const error = refusal(() => generate(masks(4), steps));
        expect([name, steps, error.constructor]).toEqual([name, steps, RangeError]);
        expect(error.message).toContain(`steps must be a whole number from 1 to 1000000, got ${steps}`);
      }
      const error = refusal(() => generateImages(dit, scheduler, [1], { steps }));
      expect(error).toBeInstanceOf(RangeError);
      expect(error.message).toContain(`steps must be a whole number from 1 to 1000, got ${steps}`);
    }
  });

  test("canvases and masks of another shape", () => {
    expect(refusal(() => diffusionGenerate(dream, masks(5), 2))).toBeInstanceOf(TypeError);
    expect(refusal(() => diffusionGenerate(dream, masks(4), 0))).toBeInstanceOf(TypeError);
    expect(refusal(() => diffusionGenerate(dream, [49] as unknown as Int32Array, 1))).toBeInstanceOf(
      TypeError,
    );
    expect(refusal(() => lladaGenerate(llada, masks(5), 2))).toBeInstanceOf(TypeError);
    const attentionMask = new Uint8Array(3);
    expect(refusal(() => diffusionGenerate(dream, masks(4), 1, { attentionMask }))).toBeInstanceOf(TypeError);
    expect(refusal(() => dream.forward(Int32Array.of(1), 1, { rows: Int32Array.of(1) }))).toBeInstanceOf(
      RangeError,
    );
  });
});

describe("NaN among the logits names the layer that made it", () => {
  const broken = (shape: readonly number[], at: number, value = NaN) => {
    const tensor = randomTensor(shape, 3, "F32", 0.1);
    (tensor.data as Float32Array)[at] = value;
    return tensor;
  };
  const cases: [Family, string, number, string][] = [
    ["Dream", "model.embed_tokens.weight", 3 * 48, "model.embed_tokens.weight"],
    ["Dream", "model.layers.0.self_attn.k_proj.weight", 5, "model.layers.0"],
    ["Dream", "model.layers.1.post_attention_layernorm.weight", 5, "model.layers.1"],
    ["Dream", "lm_head.weight", 9, "lm_head.weight"],
    ["LLaDA", "model.transformer.blocks.1.attn_out.weight", 9, "model.transformer.blocks.1"],
    ["LLaDA", "model.transformer.ff_out.weight", 9, "model.transformer.ff_out.weight"],
    ["DiT", "pos_embed.proj.weight", 1, "pos_embed.proj.weight"],
    ["DiT", "transformer_blocks.1.norm1.linear.weight", 1, "transformer_blocks.1"],
    ["DiT", "proj_out_2.weight", 1, "proj_out_2.weight"],
  ];
  for (const [family, name, at, layer] of cases) {
    test(`${family}: ${name}`, () => {
      const { shape } = families[family].tensors[name]!;
      const path = store(place.fresh(), families[family], { tensors: { [name]: broken(shape, at) } });
      const loaded = loadModel(path, kernels);
      const error = thrown(() => {
        if (loaded.kind === "dit") {
          return generateImages(loaded.model, loadScheduler(join(MODELS, "glyph-dit")), [1], { steps: 1 });
        }
        const generate = loaded.kind === "dream" ? diffusionGenerate : lladaGenerate;
        return generate(loaded.model, Int32Array.of(3, 49), 1, { steps: 1, generationLength: 1 });
      });
      expect(error).toBeInstanceOf(WeightsError);
      expect([error.tensor, error.message.includes(`got NaN from "${layer}"`)]).toEqual([layer, true]);
    });
  }

  test("also where a packed tensor's scale is NaN", async () => {
    const packed = place.fresh();
    const { config } = resolveConfig({ overrides: { solver: "clip", bit_width: 4, group_size: 16 } });
    await quantizeCheckpoint({
      input: store(place.fresh(), families.Dream),
      output: packed,
      config,
      kernels,
    });
    const file = join(packed, "model.safetensors");
    let at: number;
    {
      using stored = SafetensorsFile.open(file);
      at = stored.tensors.get("model.layers.1.self_attn.v_proj.weight_scale")!.byteOffset;
    }
    const bytes = readFileSync(file);
    bytes.set([0x00, 0x7e], at);
    writeFileSync(file, bytes);
    const error = thrown(() => loadDream(packed, kernels).forward(Int32Array.of(1, 2), 1));
    expect(error).toBeInstanceOf(WeightsError);
    expect(error.tensor).toBe("model.layers.1");
  });
});

describe("generate.ts refuses with the code of bad input, one message and nothing written", () => {
  const out = place.fresh("never.png");
  const GLYPHS = join(MODELS, "glyph-dit"), DREAM = join(MODELS, "dream-mini");
  const broken = (model: string, change: (config: Record<string, unknown>) => void) => {
    const folder = place.fresh("broken");
    cpSync(model, folder, { recursive: true });
    const path = join(folder, "config.json"), config = JSON.parse(readFileSync(path, "utf8"));
    change(config);
    writeFileSync(path, JSON.stringify(config));
    return folder;
  };
  const cases: [string, () => string[], number, string][] = [
    [
      "shapes",
      () => [broken(DREAM, (c) => c["intermediate_size"] = 96), "--prompt", "47+38="],
      3,
      "must be [96, 64], got [160, 64]",
    ],
    [
      "missing tensors",
      () => [broken(GLYPHS, (c) => c["num_layers"] = 7), "--out", out],
      3,
      'missing "transformer_blocks.6.',
    ],
    [
      "extra tensors",
      () => [broken(GLYPHS, (c) => c["num_layers"] = 5), "--out", out],
      3,
      'unknown "transformer_blocks.5.',
    ],
    [
      "architecture",
      () => [broken(DREAM, (c) => [c["model_type"], c["architectures"]] = ["bert", []]), "--prompt", "x"],
      3,
      'got "bert"',
    ],
    ["a prompt that is too long", () => [DREAM, "--prompt", "1".repeat(300)], 2, "may have 256 tokens"],
    ["a character outside the vocabulary", () => [DREAM, "--prompt", "47*38="], 2, 'got "*"'],
    ["no steps", () => [GLYPHS, "--steps", "0", "--out", out], 2, "--steps must be a whole number from 1 to 1000000"],
  ];
  for (const [what, args, code, message] of cases) {
    test(what, () => {
      const result = run("generate.ts", args());
      expect([result.code, result.stdout]).toEqual([code, ""]);
      expect(result.stderr).toContain(message);
      expect(result.stderr).not.toMatch(/^ +at /m);
      expect(existsSync(out)).toBe(false);
    });
  }
});
