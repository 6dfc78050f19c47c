/** Keys of config.json and generation_config.json: each is honoured, refused, or ignored for a reason. */
import { afterAll, describe, expect, test } from "bun:test";
import { cpSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { CheckpointError, FormatError } from "../../lib/errors.ts";
import { readPuzzles, solvePuzzles } from "../../lib/eval/puzzles.ts";
import { ditConfig } from "../../lib/models/configuration/dit.ts";
import {
  DIT_KEYS,
  DREAM_KEYS,
  GENERATION_KEYS,
  KEY_TABLES,
  type KeyRow,
  LLADA_KEYS,
  LLADA_MOE_KEYS,
  SCHEDULER_KEYS,
  SDAR_KEYS,
} from "../../lib/models/configuration/keys.ts";
import { dreamConfig, lladaConfig, lladaMoeConfig, sdarConfig } from "../../lib/models/configuration/masked.ts";
import { DREAM } from "../../lib/models/masked/dream.ts";
import { LLADA } from "../../lib/models/masked/llada.ts";
import { LLADA_MOE } from "../../lib/models/masked/llada_moe.ts";
import { SDAR } from "../../lib/models/masked/sdar.ts";
import {
  diffusionGenerate,
  lladaGenerate,
  loadDream,
  loadLlada,
  loadModel,
  loadTokenizer,
  modelConfig,
  storedGeneration,
  tokensWithoutText,
} from "../../lib/models/mod.ts";
import { ConfigFields } from "../../lib/models/model_config.ts";
import { schedulerConfig } from "../../lib/models/schedulers.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { openCheckpoint, SafetensorsFile } from "../../lib/tensor/mod.ts";
import { unwrittenTokens } from "../../lib/thermo/masked_transition.ts";
import { MODELS, ROOT, run, type TestTensor, workplace, writeTensors } from "../_checkpoints.ts";
import { ditCheckpoint, dreamCheckpoint, lladaCheckpoint, SMALL_LANGUAGE, store } from "../_models.ts";
import { languageLogits, readWeights, relativeError } from "../_reference.ts";
import { thrown } from "../tensor/_files.ts";

const DREAM_MINI = join(MODELS, "dream-mini");
const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

const made = { dream: dreamCheckpoint(), llada: lladaCheckpoint(), dit: ditCheckpoint() };
/** Dream's configuration with what a mixture adds. */
const MOE_CONFIG = {
  ...made.dream.config,
  dense_intermediate_size: 44,
  expert_intermediate_size: 20,
  num_experts: 4,
  num_experts_per_tok: 2,
  moe_layer_freq: Array.from({ length: made.dream.config.num_hidden_layers }, (_, i) => i % 2),
  qk_layernorm: true,
};
type Family = keyof typeof made;
const FAMILIES = Object.keys(made) as Family[];

/** What a configuration with these changes is read as. */
function configWith(family: Family, changes: Record<string, unknown>, generation?: unknown) {
  const path = store(place.fresh(), made[family], { config: changes });
  if (generation !== undefined) {
    const text = typeof generation === "string" ? generation : JSON.stringify(generation);
    writeFileSync(join(path, "generation_config.json"), text);
  }
  using checkpoint = openCheckpoint(path);
  return modelConfig(checkpoint).config as ReturnType<typeof dreamConfig>;
}

function refused(family: Family, changes: Record<string, unknown>, name = Object.keys(changes)[0]!) {
  const error = thrown(() => configWith(family, changes));
  expect([changes, error.constructor, error.message.includes(`"${name}`)]).toEqual([
    changes,
    CheckpointError,
    true,
  ]);
  return error;
}

describe("the tables", () => {
  const tables = [
    ["dream", DREAM_KEYS, made.dream.config, DREAM.tensors, dreamConfig],
    ["llada", LLADA_KEYS, made.llada.config, LLADA.tensors, lladaConfig],
    ["llada_moe", LLADA_MOE_KEYS, MOE_CONFIG, LLADA_MOE.tensors, lladaMoeConfig],
    ["sdar", SDAR_KEYS, made.dream.config, SDAR.tensors, sdarConfig],
    ["dit", DIT_KEYS, made.dit.config, () => {}, ditConfig],
    ["scheduler", SCHEDULER_KEYS, {}, () => {}, schedulerConfig],
  ] as const;
  for (const [name, rows, config, tensors, read] of tables) {
    test(`of ${name}: every honoured key is read, and no other`, () => {
      const seen = new Set<string>();
      for (const given of [config, { ...config, mlp_hidden_size: undefined }]) {
        const fields = new Proxy<Record<string, unknown>>({ ...given }, {
          get: (object, key) => {
            seen.add(String(key));
            return object[String(key)];
          },
        });
        const all = new ConfigFields(join(place.path, "config.json"), fields);
        (tensors as (config: unknown, fields: ConfigFields) => unknown)(read(all), all);
      }
      const named = ["model_type", "architectures", "_class_name"]; // by modelKind
      const honoured = (rows as readonly KeyRow[]).filter(({ treatment }) => treatment === "honoured")
        .flatMap(({ keys }) => keys);
      const known = (rows as readonly KeyRow[]).filter(({ treatment }) =>
        name === "scheduler" || treatment !== "ignored"
      )
        .flatMap(({ keys }) => keys);
      expect([...seen].filter((key) => !known.includes(key))).toEqual([]);
      expect(honoured.filter((key) => !seen.has(key) && !named.includes(key))).toEqual([]);
    });
  }

  test("have a key once, and stand in docs/models.md", () => {
    const page = readFileSync(join(ROOT, "docs", "models.md"), "utf8");
    const cell = (text: string) => `\`${text}\``;
    for (const [title, rows] of Object.entries(KEY_TABLES)) {
      const lines = rows.map(({ keys, treatment, note }) =>
        `| ${keys.map(cell).join(", ")} | ${treatment} | ${note} |`
      );
      const head = [`## ${title}`, "", "| keys | here | meaning or reason |", "| --- | --- | --- |"];
      expect(page).toContain([...head, ...lines, ""].join("\n"));
    }
    const all = [DREAM_KEYS, LLADA_KEYS, LLADA_MOE_KEYS, SDAR_KEYS, DIT_KEYS, SCHEDULER_KEYS, ...Object.values(GENERATION_KEYS)];
    for (const rows of all) {
      const keys = rows.flatMap(({ keys }) => keys);
      expect(keys.filter((key, i) => keys.indexOf(key) !== i)).toEqual([]);
    }
  });
});

describe("mixtures and blocks", () => {
  const moe = (changes: Record<string, unknown>) => {
    const fields = new ConfigFields(join(place.path, "config.json"), { ...MOE_CONFIG, ...changes }, false);
    return lladaMoeConfig(fields);
  };
  test("have defaults, and name the key that is wrong", () => {
    expect(moe({}).mixture).toMatchObject({ experts: 4, perToken: 2, expertSize: 20, sharedSize: 0, hasBias: false, dense: [0] });
    expect(moe({ moe_layer_freq: null, dense_intermediate_size: null }).mixture!.dense).toEqual([]);
    const wrong: Record<string, unknown>[] = [
      { num_experts: 0 },
      { num_experts: 2 ** 16 }, // of more than one block: too many names
      { num_experts_per_tok: 5 },
      { expert_intermediate_size: null },
      { moe_layer_freq: [1] },
      { moe_layer_freq: [1, 2] },
      { moe_layer_freq: "1" },
      { dense_intermediate_size: null }, // a block is dense
      { head_dim: 7 },
    ];
    for (const changes of wrong) {
      const error = thrown(() => moe(changes));
      expect([changes, error.constructor]).toEqual([changes, CheckpointError]);
      expect(error.message).toContain(Object.keys(changes)[0]!);
    }
  });

  test("SDAR's blocks have at least one token, and its heads 128 numbers where nothing says so", () => {
    const { head_dim: _, ...config } = made.dream.config as Record<string, unknown>;
    const of = (changes: Record<string, unknown>) =>
      sdarConfig(new ConfigFields(join(place.path, "config.json"), { ...config, ...changes }, false));
    expect(of({})).toMatchObject({ attentionBlock: 4, headSize: 128, queryKeyNorm: true, logitShift: 0 });
    expect(of({ block_size: 1e9 }).attentionBlock).toBe(of({}).maxTokens);
    for (const block_size of [0, -4, 2.5, "4"]) expect(() => of({ block_size })).toThrow("block_size");
  });
});

test("sizes one level down, as models of text and images have them, are named", () => {
  for (const key of ["text_config", "llm_config"]) refused("dream", { [key]: made.dream.config });
});

describe("rotary positions", () => {
  const same: Record<string, unknown>[] = [
    { rope_theta: 5e5 },
    { rope_theta: null, rope_parameters: { rope_type: "default", rope_theta: 5e5 } },
    { rope_theta: undefined, rope_parameters: { rope_theta: 5e5 } },
    { rope_theta: 5e5, rope_parameters: { rope_theta: 5e5, rope_type: null } },
    { rope_theta: 5e5, rope_scaling: {}, rope_parameters: null },
    { rope_theta: undefined, rope_scaling: { type: "default", rope_theta: 5e5, partial_rotary_factor: 1 } },
    { rope_theta: 5e5, rope_scaling: { rope_type: "linear", factor: 1.0 } },
    { rope_theta: 5e5, rope_scaling: { type: "yarn", factor: 1, beta_fast: 32, attention_factor: null } },
    {
      rope_theta: 5e5,
      rope_scaling: { rope_type: "llama3", factor: 1, low_freq_factor: 1, high_freq_factor: 4 },
    },
    { rope_theta: undefined, rope_parameters: { full_attention: { rope_type: "default", rope_theta: 5e5 } } },
    {
      rope_theta: undefined,
      rope_parameters: { full_attention: { rope_theta: 5e5 }, sliding_attention: { rope_theta: 5e5 } },
    },
    {
      rope_theta: undefined,
      layer_types: ["full_attention", "full_attention"],
      rope_parameters: { full_attention: { rope_theta: 5e5 }, sliding_attention: { rope_theta: 1e4 } },
    },
  ];
  const scaled: [string, unknown][] = [
    ...["linear", "dynamic", "yarn", "longrope", "su", "llama3", "mrope", "proportional", "", 4].flatMap((
      type,
    ) => [
      ["rope_scaling", { type, factor: 4 }] as [string, unknown],
      ["rope_scaling", { rope_type: type, factor: 4 }] as [string, unknown],
      ["rope_parameters", { rope_type: type, factor: 4, rope_theta: 5e5 }] as [string, unknown],
      ["rope_parameters", { full_attention: { rope_type: type, factor: 4 } }] as [string, unknown],
    ]),
    ["rope_scaling", { factor: 2 }],
    ["rope_scaling", { rope_type: "default", factor: 2 }],
    ["rope_scaling", { rope_type: "default", type: "yarn", factor: 2 }],
    ["rope_scaling", { rope_type: "yarn", factor: 1, attention_factor: 1.2 }],
    ["rope_scaling", { rope_type: "longrope", factor: 1, short_factor: [2], long_factor: [2] }],
    ["rope_scaling", { type: "default", mrope_section: [16, 24, 24] }],
    ["rope_parameters", { rope_theta: 5e5, partial_rotary_factor: 0.5 }],
    ["rope_scaling", "linear"],
    ["rope_scaling", [4]],
    ["rope_parameters", true],
    ["partial_rotary_factor", 0.5],
    ["rotary_pct", 0.25],
    ["rope_interleaved", true],
    ["rope_local_base_freq", 10000],
  ];
  const odd = [0, -1, "1e6", NaN, Infinity, true, [1e6], {}];

  for (const family of ["dream", "llada"] as const) {
    test(`${family}: the base counts wherever it stands`, () => {
      for (const changes of same) {
        expect([changes, configWith(family, changes).rotaryTheta]).toEqual([changes, 5e5]);
      }
      expect(configWith(family, { rope_theta: undefined }).rotaryTheta).toBe(10_000);
    });

    test(`${family}: scaled positions and contradictions are refused wherever they stand`, () => {
      for (const [key, value] of scaled) refused(family, { [key]: value });
      expect(refused(family, { rope_parameters: { rope_theta: 7 }, rope_theta: 1e4 }).message).toContain(
        '"rope_parameters.rope_theta" must be 10000, as "rope_theta" says, got 7',
      );
      const two = { full_attention: { rope_theta: 1e6 }, sliding_attention: { rope_theta: 1e4 } };
      refused(family, { rope_parameters: two, rope_theta: undefined });
      refused(family, { rotary_emb_base: 77 });
    });

    test(`${family}: an odd base is an error that names it`, () => {
      const fields = { ...made[family].config };
      const read = { dream: dreamConfig, llada: lladaConfig }[family];
      for (const value of odd) {
        for (
          const change of [{ rope_theta: value }, {
            rope_theta: null,
            rope_parameters: { rope_theta: value },
          }]
        ) {
          const error = thrown(() => read(new ConfigFields("c.json", { ...fields, ...change })));
          expect([value, error.constructor]).toEqual([value, CheckpointError]);
          expect(error.message).toMatch(
            /rope_theta"? must be a number above 0, got|"rope_parameters.rope_theta"/,
          );
        }
      }
      expect(thrown(() => read(new ConfigFields("c.json", { ...fields, rope_theta: NaN }))).message)
        .toContain("got NaN");
    });
  }

  test("the model turns by the base that rope_parameters has, against the reference", () => {
    const tokens = [5, 9, 33, 2, 41];
    const path = store(place.fresh(), made.dream, {
      config: { rope_theta: undefined, rope_parameters: { rope_type: "default", rope_theta: 77.5 } },
    });
    const wanted = languageLogits(readWeights(path, kernels), {
      ...SMALL_LANGUAGE,
      embedding: "model.embed_tokens",
      head: "lm_head",
      finalNorm: "model.norm",
      block: (i) =>
        ["input_layernorm", ..."qkvo"].map((part) =>
          `model.layers.${i}.${part.length === 1 ? `self_attn.${part}_proj` : part}`
        ).concat(
          ["post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"].map((part) =>
            `model.layers.${i}.${part}`
          ),
        ),
      epsilon: 1e-6,
      theta: 77.5,
      bias: true,
    }, tokens);
    expect(relativeError(loadDream(path, kernels).forward(Int32Array.from(tokens), 1), wanted.flat()))
      .toBeLessThan(1e-5);
  });

  test("a DiT has none", () => {
    refused("dit", { rope_parameters: { rope_type: "default", rope_theta: 1e4 } });
  });
});

describe("keys that would change the result", () => {
  const wrong: Record<Family, Record<string, unknown>> = {
    dream: {
      hidden_act: "gelu",
      use_sliding_window: true,
      layer_types: ["full_attention", "sliding_attention"],
      logit_scale: 0.0625,
      logits_scaling: 8,
      final_logit_softcapping: 30,
      attn_logit_softcapping: 1,
      query_pre_attn_scalar: 256,
      attention_multiplier: 0.5,
      qk_norm: true,
      use_qk_norm: true,
      mlp_bias: true,
      clip_qkv: 8,
      layer_norm_eps: 1e-3,
      use_mrope: true,
      ntk_alpha: 2,
      use_dynamic_ntk: true,
      use_logn_attn: true,
      yarn_factor: 4,
      position_embedding_type: "absolute",
      num_experts: 8,
      alibi: true,
      is_causal: true,
      use_parallel_residual: true,
      scale_embeddings_by: 3,
      qkv_bias: true,
    },
    llada: {
      block_type: "sequential",
      layer_norm_type: "default",
      activation_type: "gelu",
      hidden_act: "relu",
      alibi: true,
      rope: false,
      attention_layer_norm: true,
      bias_for_layer_norm: true,
      layer_norm_with_affine: false,
      clip_qkv: 6,
      block_group_size: 2,
      attention_bias: true,
      use_sliding_window: true,
      layer_types: ["chunked_attention"],
      head_dim: 16,
      hidden_size: 64,
      multi_query_attention: true,
      n_kv_heads: 4,
      embedding_size: 40,
      final_logit_softcapping: 30,
      mlp_hidden_size: "100",
      norm_after: true,
      n_experts: 4,
    },
    dit: {
      norm_type: "ada_norm_single",
      activation_fn: "geglu",
      attention_type: "gated",
      interpolation_scale: 2,
      cross_attention_dim: 768,
      caption_channels: 4096,
      num_vector_embeds: 5,
      use_linear_projection: true,
      double_self_attention: true,
      use_additional_conditions: true,
      qk_norm: "rms_norm",
      use_rope: true,
      positional_embeddings: "sinusoidal",
    },
  };
  for (const family of FAMILIES) {
    test(`${family}: are refused by name`, () => {
      for (const [key, value] of Object.entries(wrong[family])) refused(family, { [key]: value });
    });

    test(`${family}: harmless and neutral ones are not`, () => {
      const neutral = Object.fromEntries(
        Object.keys(wrong[family]).filter((key) => !(key in made[family].config)).map((key) => [key, null]),
      );
      configWith(family, {
        ...neutral,
        attention_dropout: 0.1,
        initializer_range: 0.02,
        torch_dtype: "float8",
        auto_map: { AutoModel: "x" },
        transformers_version: "5.1.0",
        property: 3,
        constructor: 1,
        toString: "x",
        time_step_limit: [0, 1],
        context_window: 4096,
        loss_scale: 128,
      });
    });
  }

  test("those that are run are honoured", () => {
    configWith("dream", {
      layer_types: ["full_attention", "full_attention"],
      sliding_window: 4096,
      hidden_act: "swish",
    });
    configWith("llada", { mlp_ratio: 2.5, hidden_size: 48, head_dim: 8 });
    const sized = configWith("llada", { mlp_hidden_size: undefined, mlp_ratio: 2.5 });
    expect(sized.intermediateSize).toBe(120);
    expect(configWith("llada", { n_kv_heads: undefined, multi_query_attention: true }).keyValueHeads).toBe(1);
    expect(configWith("llada", { n_kv_heads: null }).keyValueHeads).toBe(6);
    refused("llada", { n_kv_heads: 3, multi_query_attention: false }, "multi_query_attention");
    // biases that attention_bias switches off must not be there
    const path = store(place.fresh(), made.dream, { config: { attention_bias: false } });
    expect(thrown(() => loadModel(path, kernels)).message).toContain(
      'unknown "model.layers.0.self_attn.q_proj.bias"',
    );
    const bare = store(place.fresh(), made.dream, {
      config: { attention_bias: false },
      tensors: Object.fromEntries(
        Object.keys(made.dream.tensors).filter((name) => name.endsWith(".bias")).map((
          name,
        ) => [name, undefined]),
      ),
    });
    expect(loadDream(bare, kernels).forward(Int32Array.of(1, 2), 1).every(Number.isFinite)).toBe(true);
  });
});

describe("special tokens", () => {
  const rows: [string, Record<string, unknown>, unknown, readonly number[]][] = [
    ["a number", { eos_token_id: 7 }, undefined, [7]],
    ["a list", { eos_token_id: [7, 9] }, undefined, [7, 9]],
    ["none", { eos_token_id: null }, undefined, []],
    ["an empty list", { eos_token_id: [] }, undefined, []],
    ["-1", { eos_token_id: -1 }, undefined, []],
    ["generation_config.json wins", { eos_token_id: 7 }, { eos_token_id: [9, 11] }, [9, 11]],
    ["or adds", { eos_token_id: undefined }, { eos_token_id: 9 }, [9]],
    ["or says nothing", { eos_token_id: [7, 9] }, { eos_token_id: null, steps: 3 }, [7, 9]],
  ];
  for (const family of ["dream", "llada"] as const) {
    test(`${family}: end tokens`, () => {
      for (const [name, changes, generation, wanted] of rows) {
        const { eosTokens, eosToken } = configWith(family, changes, generation);
        expect([name, eosTokens, eosToken]).toEqual([name, wanted, wanted[0]]);
      }
    });

    test(`${family}: mask, pad and begin likewise`, () => {
      const all = { mask_token_id: [3], pad_token_id: 4, bos_token_id: [5, 6] };
      const { maskToken, padToken, bosToken } = configWith(family, { mask_token_id: null }, all);
      expect([maskToken, padToken, bosToken]).toEqual([3, 4, 5]);
      for (const key of ["eos_token_id", "pad_token_id", "bos_token_id", "mask_token_id"]) {
        for (const value of [50, -2, 1.5, "</s>", true, {}, [3, "x"], [[3]]]) {
          const error = thrown(() => configWith(family, { [key]: value }));
          expect([key, value, error.constructor, error.message.includes(`"${key}"`)]).toEqual(
            [key, value, CheckpointError, true],
          );
        }
      }
    });
  }

  test("padding is written where it is one of the end tokens", () => {
    const vocabulary = { vocabularySize: 50, maskToken: 49, padToken: 4 };
    expect(unwrittenTokens({ ...vocabulary, eosTokens: [9, 4] })).toEqual([49]);
    expect(unwrittenTokens({ ...vocabulary, eosTokens: [9] })).toEqual([49, 4]);
    expect(unwrittenTokens({ ...vocabulary, eosToken: 4 })).toEqual([49]);
  });

  test("a broken generation_config.json is told", () => {
    expect(thrown(() => configWith("dream", {}, "[1]"))).toBeInstanceOf(FormatError);
    expect(thrown(() => configWith("dream", {}, "{"))).toBeInstanceOf(FormatError);
  });
});

describe("generation_config.json", () => {
  const stored = (family: "dream" | "llada", content: unknown) => {
    const folder = store(place.fresh(), made[family]);
    writeFileSync(join(folder, "generation_config.json"), JSON.stringify(content));
    return storedGeneration(folder, family);
  };
  const defined = (value: object) =>
    Object.fromEntries(Object.entries(value).filter(([, each]) => each !== undefined));

  test("Dream's settings are read", () => {
    const all = {
      alg: "entropy",
      alg_temp: 0.1,
      steps: 8,
      eps: 1e-3,
      temperature: 0.2,
      top_p: 0.95,
      top_k: 40,
      max_new_tokens: 12,
      max_length: 99,
      do_sample: true,
      use_cache: true,
      transformers_version: "5.0",
      num_return_sequences: 1,
      cfg_scale: null,
    };
    expect(defined(stored("dream", all))).toEqual({
      algorithm: "entropy",
      algorithmTemperature: 0.1,
      steps: 8,
      eps: 1e-3,
      temperature: 0.2,
      topP: 0.95,
      topK: 40,
      newTokens: 12,
      notHonoured: [],
    });
    expect(defined(stored("dream", { top_k: 0, alg: null, max_length: 50 }))).toEqual({
      allTokens: 50,
      notHonoured: [],
    });
    expect(storedGeneration(store(place.fresh(), made.dream), "dream")).toEqual({ notHonoured: [] });
  });

  test("LLaDA's settings are read", () => {
    const all = {
      gen_length: 64,
      steps: 64,
      block_length: 32,
      temperature: 0,
      cfg_scale: 0.5,
      remasking: "random",
    };
    expect(defined(stored("llada", all))).toEqual({
      newTokens: 64,
      steps: 64,
      blockLength: 32,
      temperature: 0,
      guidance: 0.5,
      algorithm: "random",
      notHonoured: [],
    });
  });

  test("what is not honoured is named", () => {
    const foreign = {
      repetition_penalty: 1.1,
      num_beams: 4,
      stop_strings: ["x"],
      max_length: 20,
      min_p: 0.1,
      do_sample: true,
    };
    for (const family of ["dream", "llada"] as const) {
      expect(stored(family, foreign).notHonoured.toSorted()).toEqual(Object.keys(foreign).toSorted());
    }
    expect(stored("dream", { cfg_scale: 2, remasking: "random" }).notHonoured).toEqual([
      "cfg_scale",
      "remasking",
    ]);
    expect(
      stored("llada", { alg: "entropy", alg_temp: 1, top_p: 0.5, top_k: 5, logits_eos_inf: true })
        .notHonoured,
    )
      .toEqual(["top_p", "alg", "alg_temp", "top_k", "logits_eos_inf"]);
  });

  test("a wrong setting is an error that names it", () => {
    const wrong: ["dream" | "llada", string, unknown][] = [
      ["dream", "alg", "magic"],
      ["dream", "alg", 3],
      ["dream", "alg_temp", -1],
      ["dream", "alg_temp", "50"],
      ["dream", "steps", 0],
      ["dream", "steps", 1e9],
      ["dream", "eps", 1],
      ["dream", "top_p", 1.5],
      ["dream", "top_k", -3],
      ["dream", "max_new_tokens", "many"],
      ["llada", "temperature", []],
      ["llada", "cfg_scale", -1],
      ["llada", "remasking", "high"],
      ["llada", "block_length", 0],
    ];
    for (const [family, key, value] of wrong) {
      const error = thrown(() => stored(family, { [key]: value }));
      expect([key, value, error.constructor]).toEqual([key, value, CheckpointError]);
      expect(error.message).toMatch(new RegExp(`generation_config\\.json": "${key}" must be`));
    }
  });
});

describe("masks in a prompt", () => {
  const MASK = 49, path = store(place.fresh(), made.llada);
  const model = loadLlada(path, kernels), weights = readWeights(path, kernels);
  const names = [
    "attn_norm",
    "q_proj",
    "k_proj",
    "v_proj",
    "attn_out",
    "ff_norm",
    "ff_proj",
    "up_proj",
    "ff_out",
  ];
  const reference = {
    ...SMALL_LANGUAGE,
    embedding: "model.transformer.wte",
    head: "model.transformer.ff_out",
    finalNorm: "model.transformer.ln_f",
    block: (i: number) => names.map((name) => `model.transformer.blocks.${i}.${name}`),
    epsilon: 1e-5,
    theta: 5e5,
    bias: false,
  };
  const prompt = [5, MASK, 7, MASK, 8];

  /** One token a step, the most confident first; the prompt's masks belong to the first block. */
  function expected(length: number, blockLength: number): number[] {
    const x = [...prompt, ...new Array<number>(length).fill(MASK)];
    for (let end = prompt.length + blockLength;; end += blockLength) {
      while (x.slice(0, end).includes(MASK)) {
        let best = { place: -1, token: -1, confidence: -1 };
        for (const [i, logits] of languageLogits(weights, reference, x).slice(0, end).entries()) {
          if (x[i] !== MASK) continue;
          const row = logits.with(MASK, -Infinity), largest = Math.max(...row);
          const confidence = 1 / row.reduce((sum, value) => sum + Math.exp(value - largest), 0);
          if (confidence > best.confidence) best = { place: i, token: row.indexOf(largest), confidence };
        }
        x[best.place] = best.token;
      }
      if (end >= x.length) return x;
    }
  }

  test("are filled by LLaDA, without a length and with one", () => {
    for (const [length, blockLength] of [[0, undefined], [6, undefined], [6, 3]] as const) {
      const { sequences } = lladaGenerate(model, Int32Array.from(prompt), 1, {
        generationLength: length,
        blockLength,
      });
      expect([length, blockLength, ...sequences]).toEqual([
        length,
        blockLength,
        ...expected(length, blockLength ?? length),
      ]);
    }
    // sequences of a batch may have different numbers of them
    const two = Int32Array.of(...prompt, 5, 6, MASK, 9, 8);
    const { sequences } = lladaGenerate(model, two, 2, { generationLength: 0 });
    expect([...sequences.subarray(0, 5)]).toEqual(expected(0, 0));
    expect(sequences.includes(MASK)).toBe(false);
    expect(thrown(() => lladaGenerate(model, Int32Array.of(5, 6), 1, { generationLength: 0 })).message)
      .toContain(
        "generationLength must be a whole number from 1 to 1000000, got 0",
      );
  });

  test("are filled by Dream likewise", () => {
    const dream = loadDream(store(place.fresh(), made.dream), kernels);
    for (const length of [0, 3]) {
      const canvas = Int32Array.from([...prompt, ...new Array<number>(length).fill(MASK)]);
      const { sequences } = diffusionGenerate(dream, canvas, 1, { algorithm: "entropy" });
      expect([sequences.includes(MASK), sequences[0], sequences[2], sequences[4]]).toEqual([false, 5, 7, 8]);
    }
  });
});

describe("rows without a token", () => {
  /** dream-mini with 13 more rows, ten of which say what the digits say, but louder. */
  function padded(): string {
    const folder = place.fresh("padded"), rows = 48;
    cpSync(DREAM_MINI, folder, { recursive: true });
    const tensors: Record<string, TestTensor> = {};
    for (const name of ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]) {
      using file = SafetensorsFile.open(join(DREAM_MINI, name));
      for (const { name, dtype, shape } of file.tensors.values()) {
        const data = file.read(name);
        if (name !== "lm_head.weight" && name !== "model.embed_tokens.weight") {
          tensors[name] = { dtype, shape, data };
          continue;
        }
        const old = new Uint16Array(data.buffer, data.byteOffset, data.byteLength / 2), cols = shape[1]!;
        const more = new Uint16Array(rows * cols);
        more.set(old);
        // BF16 with its exponent raised by one is twice the value
        if (name === "lm_head.weight") {
          more.set(old.subarray(4 * cols, 14 * cols).map((bits) => bits + 0x80), 36 * cols);
        }
        tensors[name] = { dtype, shape: [rows, cols], data: more };
      }
    }
    writeTensors(join(folder, "model.safetensors"), tensors);
    const index = {
      weight_map: Object.fromEntries(Object.keys(tensors).map((name) => [name, "model.safetensors"])),
    };
    writeFileSync(join(folder, "model.safetensors.index.json"), JSON.stringify(index));
    const config = join(folder, "config.json"), text = readFileSync(config, "utf8");
    writeFileSync(config, text.replace('"vocab_size": 35', `"vocab_size": ${rows}`));
    return folder;
  }
  const folder = padded();

  test("are never proposed", async () => {
    const tokenizer = await loadTokenizer(folder);
    expect(tokensWithoutText(tokenizer, 48)).toEqual([35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47]);
    const puzzles = readPuzzles(join(DREAM_MINI, "eval.jsonl")).slice(0, 6);
    const solve = (path: string) =>
      solvePuzzles(loadDream(path, kernels), tokenizer, puzzles).map(({ answer }) => answer);
    expect(solve(folder)).toEqual(solve(DREAM_MINI));
  });

  test("nor by the command, which names what generation_config.json asks for in vain", () => {
    const settings = { alg: "entropy", alg_temp: 50, num_beams: 4, eos_token_id: [33, 3], max_new_tokens: 9 };
    writeFileSync(join(folder, "generation_config.json"), JSON.stringify(settings));
    const made = ["1", "2"].map((seed) => {
      const { code, stdout, stderr } = run("generate.ts", [
        folder,
        "--prompt",
        "12+3",
        "--seed",
        seed,
        "--json",
      ]);
      expect([code, stderr]).toEqual([0, "warning: generation_config.json: not honoured here: num_beams\n"]);
      const { tokens, text, notHonoured } = JSON.parse(stdout) as {
        tokens: number[];
        text: string;
        notHonoured: string[];
      };
      expect(notHonoured).toEqual(["num_beams"]);
      expect([tokens.length, tokens.filter((token) => token >= 35 || token === 1)]).toEqual([9, []]);
      const end = tokens.findIndex((token) => token === 3 || token === 33);
      expect(text.length).toBe(end < 0 ? 9 : end);
      return tokens.join();
    });
    expect(made[0]).not.toBe(made[1]!); // alg_temp draws positions
  });
});
