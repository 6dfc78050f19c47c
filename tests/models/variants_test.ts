/** Checkpoints that are unlike the reference models in what their files may choose: sizes, types, ties, files, schedules. */
import { afterAll, describe, expect, test } from "bun:test";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { CheckpointError } from "../../lib/errors.ts";
import {
  generateImages,
  loadDit,
  loadDream,
  loadScheduler,
  requirementsAt,
  Scheduler,
} from "../../lib/models/mod.ts";
import { schedulerConfig } from "../../lib/models/schedulers.ts";
import { ConfigFields } from "../../lib/models/model_config.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { convertFloats } from "../../lib/quant/mod.ts";
import { type TestTensor, workplace, writeTensors } from "../_checkpoints.ts";
import { gaussians } from "../_kernels.ts";
import {
  ditCheckpoint,
  dreamCheckpoint,
  type ImageSizes,
  type LanguageSizes,
  randomTensor,
  SMALL_IMAGE,
  store,
  type StoredDtype,
} from "../_models.ts";
import {
  type ImageModel,
  imagePrediction,
  languageLogits,
  readWeights,
  relativeError,
} from "../_reference.ts";
import { randomIntegers, thrown } from "../tensor/_files.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

describe("Dream", () => {
  const sizes: LanguageSizes = { width: 40, inner: 56, blocks: 2, heads: 5, kvHeads: 1, vocabulary: 77 };

  /** Heads of 12 where width / heads is 8. */
  function withHeadSize(headSize: number, dtype: StoredDtype) {
    const { tensors, config } = dreamCheckpoint(sizes, dtype);
    for (let i = 0; i < sizes.blocks; i++) {
      const at = `model.layers.${i}.self_attn`;
      const rows = { q_proj: sizes.heads * headSize, k_proj: headSize, v_proj: headSize };
      for (const [part, count] of Object.entries(rows)) {
        tensors[`${at}.${part}.weight`] = randomTensor([count, sizes.width], 50 + i, dtype, 0.2);
        tensors[`${at}.${part}.bias`] = randomTensor([count], 60 + i, dtype, 0.3);
      }
      tensors[`${at}.o_proj.weight`] = randomTensor([sizes.width, rows.q_proj], 70 + i, dtype, 0.2);
    }
    return { tensors, config: { ...config, head_dim: headSize } };
  }

  const tokens = (() => {
    const random = randomIntegers(3);
    return Int32Array.from({ length: 9 }, () => random(sizes.vocabulary));
  })();

  function check(path: string, theta: number, head = "lm_head") {
    const got = loadDream(path, kernels).forward(tokens, 1);
    const parts = [
      "input_layernorm",
      "self_attn.q_proj",
      "self_attn.k_proj",
      "self_attn.v_proj",
      "self_attn.o_proj",
      "post_attention_layernorm",
      "mlp.gate_proj",
      "mlp.up_proj",
      "mlp.down_proj",
    ];
    const wanted = languageLogits(readWeights(path, kernels), {
      ...sizes,
      embedding: "model.embed_tokens",
      head,
      finalNorm: "model.norm",
      block: (i) => parts.map((name) => `model.layers.${i}.${name}`),
      epsilon: 1e-6,
      theta,
      bias: true,
    }, [...tokens]);
    expect(relativeError(got, wanted.flat())).toBeLessThan(1e-5);
  }

  for (const dtype of ["F16", "BF16", "F32"] as const) {
    test(`with head_dim, one head of keys, ${dtype}, in one file`, () => {
      check(store(place.fresh(), withHeadSize(12, dtype)), 1_000_000);
    });
  }

  test("without the keys that have defaults", () => {
    const made = dreamCheckpoint(sizes, "BF16");
    const absent = [
      "rope_theta",
      "rms_norm_eps",
      "hidden_act",
      "tie_word_embeddings",
      "max_position_embeddings",
    ];
    const config = Object.fromEntries(absent.map((key) => [key, undefined]));
    const path = store(place.fresh(), made, { config });
    check(path, 10_000);
    expect(loadDream(path, kernels).config.maxTokens).toBe(32_768);
  });

  test("with a tied head, stored again or not", () => {
    const made = dreamCheckpoint(sizes, "BF16", true);
    check(store(place.fresh(), made), 1_000_000, "model.embed_tokens");
    const again = store(place.fresh(), made, {
      tensors: { "lm_head.weight": randomTensor([sizes.vocabulary, sizes.width], 1, "BF16", 1) },
    });
    check(again, 1_000_000, "model.embed_tokens");
  });

  test("in 8-bit floats", () => {
    const { tensors, config } = dreamCheckpoint(sizes, "F32");
    const narrow = Object.fromEntries(
      Object.entries(tensors).map(([name, { shape, data }]): [string, TestTensor] => {
        const elements = shape.reduce((product, size) => product * size, 1);
        const values = { data: data as Float32Array<ArrayBuffer>, dtype: "F32" } as const;
        return [name, { shape, dtype: "F8_E4M3", data: convertFloats(kernels, values, elements, "F8_E4M3") }];
      }),
    );
    const path = store(place.fresh(), { tensors: narrow, config });
    check(path, 1_000_000);
    expect(loadDream(path, kernels).weightBytes).toBe(requirementsAt(path).weightBytes);
  });

  test("in float64, tables of more numbers than are converted at once", () => {
    const wide = { ...sizes, vocabulary: 30_000 }; // 1.2 million numbers in embedding and head
    const [narrow, double] = (["F32", "F64"] as const).map((dtype) => {
      const model = loadDream(store(place.fresh(), dreamCheckpoint(wide, dtype)), kernels);
      return { logits: model.forward(Int32Array.of(29_999, 5, 28_000), 1).slice(), bytes: model.weightBytes };
    });
    expect(double!.logits.length).toBe(3 * 30_000);
    expect(double).toEqual(narrow);
  });

  test("with types that differ from tensor to tensor, in shards with an index", () => {
    const { tensors, config } = dreamCheckpoint(sizes, "F32");
    const dtypes = ["F32", "BF16", "F16", "F64"] as const;
    const mixed = Object.entries(tensors).map(([name, { shape }], i): [string, TestTensor] => [
      name,
      randomTensor(shape, i, dtypes[i % 4]!, shape.length === 1 ? 0.2 : 0.15, name.includes("norm") ? 1 : 0),
    ]);
    const folder = place.fresh();
    mkdirSync(folder);
    const half = Math.ceil(mixed.length / 2), weight_map: Record<string, string> = {};
    for (const [i, part] of [mixed.slice(0, half), mixed.slice(half)].entries()) {
      const name = `model-0000${i + 1}-of-00002.safetensors`;
      writeTensors(join(folder, name), Object.fromEntries(part));
      for (const [tensor] of part) weight_map[tensor] = name;
    }
    writeFileSync(join(folder, "model.safetensors.index.json"), JSON.stringify({ metadata: {}, weight_map }));
    writeFileSync(join(folder, "config.json"), JSON.stringify(config));
    check(folder, 1_000_000);
  });

  test("whose head has an odd size is refused by the key that says so", () => {
    const config = { head_dim: 7 };
    const error = thrown(() => loadDream(store(place.fresh(), dreamCheckpoint(sizes), { config }), kernels));
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.message).toContain('"head_dim" must be such that a head\'s size is even');
  });
});

describe("DiT", () => {
  const variants: [string, ImageSizes, "F32" | "BF16" | "F16"][] = [
    ["32 × 32 latents of 4 channels in patches of 4, learned sigma, BF16", {
      ...SMALL_IMAGE,
      size: 32,
      patch: 4,
      channels: 4,
      outputChannels: 8,
      classes: 20,
    }, "BF16"],
    [
      "one patch, many channels, F16",
      { ...SMALL_IMAGE, size: 4, patch: 4, channels: 7, outputChannels: 7 },
      "F16",
    ],
    ["patches of one pixel, three heads", {
      ...SMALL_IMAGE,
      heads: 3,
      headSize: 8,
      size: 5,
      patch: 1,
      channels: 1,
      outputChannels: 2,
    }, "F32"],
  ];
  for (const [name, sizes, dtype] of variants) {
    test(name, () => {
      const path = store(place.fresh(), ditCheckpoint(sizes, dtype));
      const image = gaussians(4, sizes.channels * sizes.size ** 2);
      const got = loadDit(path, kernels).forward(image, [371], [2]);
      expect(got.length).toBe(sizes.outputChannels * sizes.size ** 2);
      const model: ImageModel = { ...sizes, width: sizes.heads * sizes.headSize, epsilon: 1e-5 };
      expect(relativeError(got, imagePrediction(readWeights(path, kernels), model, image, 371, 2)))
        .toBeLessThan(1e-5);
    });
  }

  test("of the older class, with the keys that it had", () => {
    const made = ditCheckpoint();
    const older = {
      _class_name: "Transformer2DModel",
      cross_attention_dim: null,
      num_vector_embeds: null,
      only_cross_attention: false,
      use_linear_projection: false,
      upcast_attention: false,
      dropout: 0,
      norm_num_groups: 32,
    };
    const input = gaussians(1, 192);
    const [now, then] = [{}, older].map((config) =>
      loadDit(store(place.fresh(), made, { config }), kernels).forward(input, [10], [1])
    );
    expect([...then!]).toEqual([...now!]);
  });
});

describe("schedules, against diffusers' steps written down again", () => {
  const made = ditCheckpoint();
  const path = store(place.fresh(), made), model = loadDit(path, kernels);
  const weights = readWeights(path, kernels);
  const reference: ImageModel = {
    ...SMALL_IMAGE,
    width: SMALL_IMAGE.heads * SMALL_IMAGE.headSize,
    epsilon: 1e-5,
  };
  const elements = model.imageElements, label = 3;

  interface Fields {
    readonly beta_schedule?: string;
    readonly prediction_type?: string;
    readonly timestep_spacing?: string;
    readonly set_alpha_to_one?: boolean;
    readonly clip_sample?: boolean;
    readonly clip_sample_range?: number;
    readonly steps_offset?: number;
    readonly num_train_timesteps?: number;
    readonly [key: string]: unknown;
  }

  /** ᾱ of each timestep, from diffusers' formulas. */
  function alphaBars(
    { beta_schedule: kind = "linear", num_train_timesteps: count = 1000 }: Fields,
  ): number[] {
    const f = (t: number) => Math.cos((t + 0.008) / 1.008 * Math.PI / 2) ** 2;
    let product = 1;
    return Array.from({ length: count }, (_, i) => {
      const share = i / (count - 1);
      const beta = kind === "squaredcos_cap_v2"
        ? Math.min(1 - f((i + 1) / count) / f(i / count), 0.999)
        : kind === "scaled_linear"
        ? (Math.sqrt(1e-4) + share * (Math.sqrt(0.02) - Math.sqrt(1e-4))) ** 2
        : 1e-4 + share * (0.02 - 1e-4);
      return product *= 1 - beta;
    });
  }

  function draw(
    noise: ArrayLike<number>,
    timesteps: readonly number[],
    fields: Fields,
    guidance: number,
  ): number[] {
    const bars = alphaBars(fields);
    let x = Array.from(noise);
    for (const [i, t] of timesteps.entries()) {
      const next = timesteps[i + 1];
      const from = bars[t]!,
        to = next === undefined ? (fields.set_alpha_to_one === false ? bars[0]! : 1) : bars[next]!;
      const predict = (which: number) => imagePrediction(weights, reference, x, t, which).slice(0, elements);
      let output = predict(label);
      if (guidance !== 1) {
        const none = predict(SMALL_IMAGE.classes);
        output = output.map((v, k) => none[k]! + guidance * (v - none[k]!));
      }
      const [s, n] = [Math.sqrt(from), Math.sqrt(1 - from)];
      const range = fields.clip_sample === false ? Infinity : fields.clip_sample_range ?? 1;
      x = x.map((value, k) => {
        const raw = {
          epsilon: (value - n * output[k]!) / s,
          v_prediction: s * value - n * output[k]!,
          sample: output[k]!,
        }[fields.prediction_type ?? "epsilon"]!;
        const x0 = Math.max(-range, Math.min(range, raw));
        return Math.sqrt(to) * x0 + Math.sqrt(1 - to) * (value - s * x0) / n;
      });
    }
    return x;
  }

  const cases: [string, Fields, readonly number[], number?][] = [
    ["cosine, leading, offset 1, ending at ᾱ₀, not clipped", {
      beta_schedule: "squaredcos_cap_v2",
      timestep_spacing: "leading",
      steps_offset: 1,
      set_alpha_to_one: false,
      clip_sample: false,
    }, [751, 501, 251, 1]],
    ["v, trailing, clipped at 2", {
      prediction_type: "v_prediction",
      timestep_spacing: "trailing",
      clip_sample_range: 2,
    }, [999, 749, 499, 249]],
    ["x0, scaled linear, 100 steps of training", {
      prediction_type: "sample",
      beta_schedule: "scaled_linear",
      num_train_timesteps: 100,
    }, [99, 66, 33, 0]],
    [
      "learned sigma with guidance, as DiT-XL's file has it",
      {
        _diffusers_version: "0.12.0.dev0",
        clip_sample: false,
        set_alpha_to_one: true,
        steps_offset: 0,
        trained_betas: null,
      },
      [750, 500, 250, 0],
      4,
    ],
  ];
  for (const [name, fields, timesteps, guidance = 1] of cases) {
    test(name, () => {
      const folder = place.fresh();
      mkdirSync(folder);
      writeFileSync(
        join(folder, "scheduler_config.json"),
        JSON.stringify({ _class_name: "DDIMScheduler", ...fields }),
      );
      const scheduler = loadScheduler(folder);
      expect([...scheduler.timesteps(4)]).toEqual([...timesteps]);
      const noise = gaussians(12, elements);
      const got = generateImages(model, scheduler, [label], { noise, steps: 4, guidance });
      expect(relativeError(got, draw(noise, timesteps, fields, guidance))).toBeLessThan(1e-4);
    });
  }

  test("DDPM draws with learned and fixed variances, and refuses what a model has not learned", () => {
    const scheduler = (variance_type: string) =>
      new Scheduler(
        schedulerConfig(new ConfigFields("test", { _class_name: "DDPMScheduler", variance_type })),
      );
    for (const kind of ["fixed_small", "fixed_large", "learned", "learned_range"]) {
      const image = generateImages(model, scheduler(kind), [1], { steps: 3, seed: 1 });
      expect([kind, image.every(Number.isFinite)]).toEqual([kind, true]);
    }
    const plain = loadDit(
      store(place.fresh(), ditCheckpoint({ ...SMALL_IMAGE, outputChannels: 3 })),
      kernels,
    );
    expect(thrown(() => generateImages(plain, scheduler("learned"), [1], { steps: 3 }))).toBeInstanceOf(
      RangeError,
    );
  });
});
