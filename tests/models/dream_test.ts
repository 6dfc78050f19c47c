import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { CheckpointError, FormatError, WeightsError } from "../../lib/errors.ts";
import {
  diffusionGenerate,
  dreamSteps,
  lladaGenerate,
  loadDream,
  loadLlada,
  loadModel,
  RandomStream,
} from "../../lib/models/mod.ts";
import { maskTimes } from "../../lib/models/masked/dream.ts";
import { selectMostConfident, TokenSampler } from "../../lib/models/masked/token_sampling.ts";
import { openKernels, withThreads } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { SafetensorsFile } from "../../lib/tensor/mod.ts";
import { MODELS, workplace } from "../_checkpoints.ts";
import { allKernels } from "../_kernels.ts";
import {
  dreamCheckpoint,
  type LanguageSizes,
  lladaCheckpoint,
  randomTensor,
  SMALL_LANGUAGE,
  store,
  type StoredDtype,
} from "../_models.ts";
import { languageLogits, type LanguageModel, readWeights, relativeError } from "../_reference.ts";
import { randomIntegers, thrown } from "../tensor/_files.ts";

const DREAM = join(MODELS, "dream-mini");
const place = workplace();
const kernels = await openKernels({ threads: 1 });
const everyKernels = await allKernels();
afterAll(() => {
  for (const { kernels: each } of everyKernels) each.close();
  kernels.close();
  place.remove();
});

function goldenIntegers(file: SafetensorsFile, name: string): Int32Array<ArrayBuffer> {
  return Int32Array.from(new BigInt64Array(file.read(name).buffer), Number);
}

/** The reference's view of a small Dream. */
function dreamReference(sizes: LanguageSizes = SMALL_LANGUAGE, tied = false): LanguageModel {
  return {
    ...sizes,
    embedding: "model.embed_tokens",
    head: tied ? "model.embed_tokens" : "lm_head",
    finalNorm: "model.norm",
    block: (i) =>
      [
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
      ].map((name) => `model.layers.${i}.${name}`),
    epsilon: 1e-6,
    theta: 1_000_000,
    bias: true,
  };
}

function lladaReference(bias: boolean, sizes: LanguageSizes = SMALL_LANGUAGE): LanguageModel {
  return {
    ...sizes,
    embedding: "model.transformer.wte",
    head: "model.transformer.ff_out",
    finalNorm: "model.transformer.ln_f",
    block: (i) =>
      ["attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out"]
        .map((name) => `model.transformer.blocks.${i}.${name}`),
    epsilon: 1e-5,
    theta: 500_000,
    bias,
  };
}

function randomTokens(count: number, seed: number, vocabulary: number): Int32Array<ArrayBuffer> {
  const random = randomIntegers(seed);
  return Int32Array.from({ length: count }, () => random(vocabulary));
}

describe("golden outputs of dream-mini", () => {
  using golden = SafetensorsFile.open(join(DREAM, "golden.safetensors"));
  const ids = goldenIntegers(golden, "input_ids");
  const logits = new Float32Array(golden.read("logits").buffer);
  const traces = [...golden.tensors.keys()].filter((name) => name.startsWith("trace."))
    .map((name) => ({ name, sequences: goldenIntegers(golden, name) }));

  for (const { name, kernels: each } of everyKernels) {
    test(`${name}: logits to 2e-4, traces token for token`, () => {
      const model = loadDream(DREAM, each);
      const got = model.forward(ids, 12).slice();
      for (let row = 0; row < 12 * 36; row++) {
        const part = [row * 35, (row + 1) * 35] as const;
        expect(relativeError(got.subarray(...part), logits.subarray(...part))).toBeLessThan(2e-4);
      }
      expect(traces.length).toBe(6);
      for (const { name, sequences } of traces) {
        const { trace } = diffusionGenerate(model, sequences.slice(0, 36), 1, {
          algorithm: "maskgit_plus",
          excludedTokens: [0, 1],
          trace: true,
        });
        expect([name, trace!.flatMap((step) => [...step])]).toEqual([name, [...sequences]]);
      }
    });
  }

  test("threads change no byte", () => {
    const one = loadDream(DREAM, kernels).forward(ids, 12).slice();
    expect(loadDream(DREAM, withThreads(kernels, 2)).forward(ids, 12)).toEqual(one);
  });
});

describe("forward pass", () => {
  const tokens = randomTokens(2 * 11, 5, SMALL_LANGUAGE.vocabulary);
  const wanted = (path: string, model: LanguageModel, keys?: readonly boolean[]) => {
    const weights = readWeights(path, kernels);
    return [0, 1].flatMap((b) =>
      languageLogits(
        weights,
        model,
        [...tokens.subarray(b * 11, (b + 1) * 11)],
        keys?.slice(b * 11, (b + 1) * 11),
      ).flat()
    );
  };

  for (const dtype of ["F32", "F16", "BF16", "F64"] satisfies StoredDtype[]) {
    test(`agrees with the reference on ${dtype}, weights as wide as they are stored`, () => {
      const path = store(place.fresh(), dreamCheckpoint(SMALL_LANGUAGE, dtype));
      const model = loadDream(path, kernels);
      expect(relativeError(model.forward(tokens, 2), wanted(path, dreamReference()))).toBeLessThan(1e-5);
      const matrices = 2 * (48 * 48 * 2 + 24 * 48 * 2 + 3 * 100 * 48) + 2 * 50 * 48;
      const vectors = 2 * (2 * 48 + 48 + 2 * 24) + 48;
      expect(model.weightBytes).toBe(matrices * (dtype === "F16" || dtype === "BF16" ? 2 : 4) + vectors * 4);
    });
  }

  test("agrees with the reference when the head is the embedding", () => {
    const path = store(place.fresh(), dreamCheckpoint(SMALL_LANGUAGE, "F32", true));
    const model = loadDream(path, kernels);
    expect(relativeError(model.forward(tokens, 2), wanted(path, dreamReference(SMALL_LANGUAGE, true))))
      .toBeLessThan(1e-5);
  });

  for (
    const [bits, group, kind] of [[2, 0, "real"], [3, 16, "integer"], [4, 32, "symmetric"], [8, 64, "real"]]
  ) {
    test(`agrees with the reference on ${bits} bits, groups of ${group}, ${kind} zero points`, async () => {
      const input = store(place.fresh(), dreamCheckpoint(SMALL_LANGUAGE, "BF16"));
      const output = place.fresh();
      const { config } = resolveConfig({
        overrides: {
          solver: "clip",
          bit_width: bits,
          group_size: group,
          zero_point: kind,
          layer_bit_widths: { "model.embed_tokens": 4, lm_head: 8 },
        },
      });
      await quantizeCheckpoint({ input, output, config, kernels });
      const model = loadDream(output, kernels);
      expect(relativeError(model.forward(tokens, 2), wanted(output, dreamReference()))).toBeLessThan(1e-5);
      expect(model.weightBytes).toBeLessThan(loadDream(input, kernels).weightBytes * 0.9);
    });
  }

  test("agrees with the reference behind padding", () => {
    const path = store(place.fresh(), dreamCheckpoint());
    const keys = Array.from({ length: 22 }, (_, i) => i !== 0 && i !== 1 && i !== 21);
    const attentionMask = Uint8Array.from(keys, Number);
    const got = loadDream(path, kernels).forward(tokens, 2, { attentionMask });
    const all = wanted(path, dreamReference(), keys);
    for (const [i, isReal] of keys.entries()) {
      if (!isReal) continue;
      expect(relativeError(got.subarray(i * 50, (i + 1) * 50), all.slice(i * 50, (i + 1) * 50))).toBeLessThan(
        1e-5,
      );
    }
  });

  test("gives single rows as it gives all, also after another batch", () => {
    const model = loadDream(store(place.fresh(), dreamCheckpoint()), kernels);
    const all = model.forward(tokens, 2).slice();
    model.forward(tokens.subarray(0, 3), 1);
    const rows = Int32Array.of(21, 0, 13);
    const some = model.forward(tokens, 2, { rows });
    for (const [i, row] of rows.entries()) {
      const got = some.subarray(i * 50, (i + 1) * 50);
      expect(relativeError(got, all.subarray(row * 50, (row + 1) * 50))).toBeLessThan(1e-6);
    }
  });

  test("shows the input of every linear layer", () => {
    const model = loadDream(store(place.fresh(), dreamCheckpoint()), kernels);
    const seen = new Map<string, number>();
    model.forward(tokens, 2, {
      observe: ({ name, weights }, x, count) => {
        expect(x.length).toBe(count * weights.cols);
        seen.set(name, count);
      },
    });
    expect(seen.size).toBe(2 * 7 + 1);
    expect(seen.get("model.layers.1.mlp.down_proj.weight")).toBe(22);
  });

  test("of LLaDA agrees with the reference, with and without biases", () => {
    for (const bias of [false, true]) {
      const path = store(place.fresh(), lladaCheckpoint(SMALL_LANGUAGE, "BF16", bias));
      const got = loadLlada(path, kernels).forward(tokens, 2);
      expect(relativeError(got, wanted(path, lladaReference(bias)))).toBeLessThan(1e-5);
    }
  });

  test("of a packed LLaDA agrees with the reference", async () => {
    const output = place.fresh();
    const { config } = resolveConfig({ overrides: { solver: "clip", bit_width: 3, group_size: 32 } });
    await quantizeCheckpoint({ input: store(place.fresh(), lladaCheckpoint()), output, config, kernels });
    const got = loadLlada(output, kernels).forward(tokens, 2);
    expect(relativeError(got, wanted(output, lladaReference(false)))).toBeLessThan(1e-5);
  });

  test("of LLaDA applies its factors on embedding and logits", () => {
    const made = lladaCheckpoint();
    const plain = loadLlada(store(place.fresh(), made), kernels).forward(tokens, 2).slice();
    const scaled = loadLlada(store(place.fresh(), made, { config: { scale_logits: true } }), kernels).forward(
      tokens,
      2,
    );
    expect(relativeError(scaled, plain.map((v) => v / Math.sqrt(48)))).toBeLessThan(1e-6);
  });
});

describe("what is not a model", () => {
  const made = dreamCheckpoint();
  const failure = (changes: Parameters<typeof store>[2]) => {
    const path = store(place.fresh(), made, changes);
    return thrown(() => loadModel(path, kernels));
  };

  test("missing and extra tensors are all listed", () => {
    const error = failure({
      tensors: {
        "model.layers.0.mlp.up_proj.weight": undefined,
        "model.layers.1.self_attn.k_proj.bias": undefined,
        "model.layers.2.mlp.up_proj.weight": randomTensor([2, 2], 1, "F32", 1),
        "score.weight": randomTensor([2], 1, "F32", 1),
      },
    });
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.message).toContain(
      'missing "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.bias"',
    );
    expect(error.message).toContain('unknown "model.layers.2.mlp.up_proj.weight", "score.weight"');
    expect(error.tensor).toBe("model.layers.0.mlp.up_proj.weight");
  });

  test("shapes that contradict config.json are named with what they must be", () => {
    const error = failure({ config: { num_key_value_heads: 6 } });
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.message).toContain(
      '"model.layers.0.self_attn.k_proj.weight" must be [48, 48], got [24, 48]',
    );
  });

  test("tensors of integers are refused", () => {
    const tensor = { dtype: "I64", shape: [48], data: new BigInt64Array(48) };
    expect(failure({ tensors: { "model.norm.weight": tensor } }).message).toContain(
      "must be floating-point, got I64",
    );
  });

  test("a packed tensor of another size than config.json's is refused", async () => {
    const output = place.fresh();
    const { config } = resolveConfig({ overrides: { solver: "clip", bit_width: 4, group_size: 16 } });
    await quantizeCheckpoint({ input: store(place.fresh(), made), output, config, kernels });
    const path = join(output, "config.json");
    const stored = JSON.parse(readFileSync(path, "utf8"));
    writeFileSync(path, JSON.stringify({ ...stored, intermediate_size: 96 }));
    const error = thrown(() => loadModel(output, kernels));
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.message).toContain('"model.layers.0.mlp.gate_proj.weight" must be [96, 48], got [100, 48]');
    const layers = stored.quantization_config.arrowquant.layers;
    layers["model.layers.0.mlp.gate_proj.weight"].bits = 3;
    writeFileSync(path, JSON.stringify(stored));
    expect(thrown(() => loadModel(output, kernels))).toBeInstanceOf(FormatError);
  });

  test("an unknown architecture is told which are known", () => {
    const error = failure({ config: { model_type: "gpt2", architectures: ["GPT2LMHeadModel"] } });
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.message).toContain(
      'one of "Dream" (model_type), "llada" (model_type), "llada_moe" (model_type), "sdar" (model_type), ' +
        '"DiTTransformer2DModel" (_class_name), got "gpt2"',
    );
  });

  test("faults of config.json name the key", () => {
    for (
      const [key, value] of [
        ["hidden_size", 50],
        ["hidden_size", "48"],
        ["num_attention_heads", 0],
        ["num_key_value_heads", 4],
        ["num_hidden_layers", 1e9],
        ["rope_scaling", { type: "yarn" }],
        ["hidden_act", "gelu"],
        ["mask_token_id", 50],
        ["mask_token_id", null],
        ["rms_norm_eps", -1],
        ["use_sliding_window", true],
      ] as const
    ) {
      const error = failure({ config: { [key]: value } });
      expect([error.name, key, error.message.includes(`"${key}"`)]).toEqual(["CheckpointError", key, true]);
    }
  });

  test("weights that give NaN are found out, with the first block that made it", () => {
    const bad = randomTensor([100, 48], 3, "F32", 0.1);
    (bad.data as Float32Array)[77] = NaN;
    const path = store(place.fresh(), made, { tensors: { "model.layers.1.mlp.up_proj.weight": bad } });
    const error = thrown(() => loadDream(path, kernels).forward(Int32Array.of(1, 2, 3), 1));
    expect(error).toBeInstanceOf(WeightsError);
    expect(error.tensor).toBe("model.layers.1");
    expect(error.message).toContain('got NaN from "model.layers.1"');
  });

  test("tokens outside the vocabulary and sequences that are too long are refused", () => {
    const model = loadDream(store(place.fresh(), made), kernels);
    expect(thrown(() => model.forward(Int32Array.of(1, 50), 1)).message).toContain(
      "from 0 to 49, got 50 at position 1",
    );
    expect(thrown(() => model.forward(Int32Array.of(-1), 1))).toBeInstanceOf(RangeError);
    expect(thrown(() => model.forward(new Int32Array(65), 1)).message).toContain(
      "may have 64 tokens, got 65",
    );
    expect(thrown(() => model.forward(new Int32Array(7), 2))).toBeInstanceOf(TypeError);
  });
});

describe("generation of Dream", () => {
  const model = loadDream(DREAM, withThreads(kernels, 2));
  const puzzle = (tokens: readonly number[], masks: number) => {
    const canvas = new Int32Array(36);
    canvas.set([2, ...tokens]);
    canvas.fill(1, 1 + tokens.length, 1 + tokens.length + masks);
    return canvas;
  };
  const add = puzzle([8, 11, 14, 7, 12, 15], 4); // 47+38=
  const sort = puzzle([23, 33, 20, 24, 22, 24, 33, 30, 16], 9); // eobfdfol>
  const excludedTokens = [0, 1];

  test("times fall from 1 to eps in equal steps, in float32", () => {
    for (const [steps, eps] of [[4, 1e-3], [17, 1e-3], [512, 1e-3], [1, 0.5]] as const) {
      const times = maskTimes(steps, eps);
      expect([times.length, times[0], times[steps]]).toEqual([steps + 1, 1, Math.fround(eps)]);
      for (let i = 0; i <= steps; i++) {
        // two roundings of a number below 1, a product and a sum
        expect(Math.abs(times[i]! - (1 + (eps - 1) * i / steps))).toBeLessThan(2 ** -23);
      }
    }
  });

  for (const algorithm of ["maskgit_plus", "topk_margin", "entropy", "origin"] as const) {
    test(`${algorithm} solves a puzzle and leaves what was given`, () => {
      for (const steps of [undefined, 1, 3, 40]) {
        // origin writes several places at once, each without knowing of the others: right only with many
        // steps
        if (algorithm === "origin" && steps !== 40) continue;
        const { sequences } = diffusionGenerate(model, add, 1, { algorithm, steps, excludedTokens, seed: 3 });
        expect([...sequences.subarray(0, 12)]).toEqual([2, 8, 11, 14, 7, 12, 15, 4, 12, 9, 3, 0]);
      }
    });
  }

  test("a sequence's result does not depend on its batch, also at a temperature", () => {
    for (const algorithm of ["origin", "entropy"] as const) {
      const options = {
        algorithm,
        temperature: 1.5,
        algorithmTemperature: 0.5,
        topP: 0.95,
        excludedTokens,
        seed: 11,
        steps: 6,
      };
      const batch = new Int32Array(72);
      batch.set(sort);
      batch.set(add, 36);
      const together = diffusionGenerate(model, batch, 2, options).sequences;
      const alone = diffusionGenerate(model, add, 1, { ...options, firstStream: 1 }).sequences;
      expect([...together.subarray(36)]).toEqual([...alone]);
      expect([...diffusionGenerate(model, batch, 2, options).sequences]).toEqual([...together]);
    }
  });

  test("another seed gives another text", () => {
    const options = { algorithm: "maskgit_plus", temperature: 50, excludedTokens, steps: 9 } as const;
    const first = diffusionGenerate(model, sort, 1, { ...options, seed: 1 }).sequences;
    expect([...diffusionGenerate(model, sort, 1, { ...options, seed: 2 }).sequences]).not.toEqual([...first]);
  });

  test("steps write as many tokens as Dream's formula says", () => {
    const masks = (minimumPerStep: number) =>
      [...dreamSteps(model, sort, 1, { algorithm: "entropy", steps: 4, minimumPerStep, excludedTokens })].map(
        (s) => s.masks,
      );
    // 9 → 9 − ⌊9·(1 − .75025)⌋ = 7 → 7 − ⌊7·(1 − .6671)⌋ = 5 → 5 − ⌊5·(1 − .501)⌋ = 3 → 0
    expect(masks(1)).toEqual([9, 7, 5, 3, 0]);
    const slow = [
      ...dreamSteps(model, add, 1, { algorithm: "entropy", steps: 9, minimumPerStep: 0, excludedTokens }),
    ];
    expect(slow[1]!.masks).toBe(4); // ⌊4 · 0.111⌋ = 0, as in Dream's own code
  });

  test("the callback and the trace see every step", () => {
    const seen: number[] = [];
    const { trace } = diffusionGenerate(model, add, 1, {
      algorithm: "maskgit_plus",
      excludedTokens,
      trace: true,
      onStep: ({ step, masks }) => seen.push(10 * step + masks),
    });
    expect(seen).toEqual([4, 13, 22, 31, 40]);
    expect(trace!.length).toBe(5);
    expect([...trace![0]!]).toEqual([...add]);
  });

  test("a canvas without masks stays as it is", () => {
    const canvas = Int32Array.of(2, 8, 3);
    expect([...diffusionGenerate(model, canvas, 1).sequences]).toEqual([...canvas]);
  });

  test("options out of range are refused before any work", () => {
    const refused = (options: Parameters<typeof diffusionGenerate>[3]) =>
      thrown(() => diffusionGenerate(model, add, 1, options));
    expect(refused({ steps: 0 }).message).toContain("steps must be a whole number from 1 to 1000000, got 0");
    for (
      const options of [
        { steps: 1.5 },
        { temperature: -1 },
        { temperature: NaN },
        { topP: 0 },
        { topK: 0 },
        { eps: 0 },
        { eps: 1 },
        { seed: -1 },
        { algorithm: "greedy" as "origin" },
        { algorithmTemperature: -1 },
        { excludedTokens: [35] },
        { excludedTokens: Array.from({ length: 35 }, (_, i) => i) },
      ]
    ) expect(refused(options)).toBeInstanceOf(RangeError);
    expect(thrown(() => diffusionGenerate(model, new Int32Array(7), 2))).toBeInstanceOf(TypeError);
  });
});

describe("sampling of tokens", () => {
  const logits = Float32Array.of(1, 3, 2, -1);
  const softmax = [1, 3, 2, -1].map((v) => Math.exp(v));
  const total = softmax.reduce((sum, v) => sum + v, 0);
  const p = softmax.map((v) => v / total);
  const random = new RandomStream(1);

  test("takes the most probable, with the confidence asked for", () => {
    expect(new TokenSampler(4, {}, "probability").propose(logits, random)).toEqual({
      token: 1,
      confidence: expect.closeTo(p[1]!, 12),
    });
    expect(new TokenSampler(4, {}, "margin").propose(logits, random).confidence).toBeCloseTo(
      p[1]! - p[2]!,
      12,
    );
    const entropy = p.reduce((sum, v) => sum + v * Math.log(v + 1e-10), 0);
    expect(new TokenSampler(4, {}, "negative_entropy").propose(logits, random).confidence).toBeCloseTo(
      entropy,
      12,
    );
    const without = new TokenSampler(4, { excludedTokens: [1] }, "probability").propose(logits, random);
    expect(without).toEqual({ token: 2, confidence: expect.closeTo(p[2]! / (1 - p[1]!), 12) });
  });

  const shares = (options: ConstructorParameters<typeof TokenSampler>[1]) => {
    const sampler = new TokenSampler(4, { temperature: 1, ...options }, "probability");
    const stream = new RandomStream(9);
    const counts = [0, 0, 0, 0];
    for (let i = 0; i < 20_000; i++) counts[sampler.propose(logits, stream).token]!++;
    return counts.map((count) => count / 20_000);
  };
  test("draws by probability, temperature, top-k and top-p", () => {
    const close = (got: readonly number[], wanted: readonly number[]) => {
      for (const [i, share] of got.entries()) {
        // four standard errors
        expect(Math.abs(share - wanted[i]!)).toBeLessThan(4 * Math.sqrt(0.25 / 20_000));
      }
    };
    close(shares({}), p);
    const flat = [1, 3, 2, -1].map((v) => Math.exp(v / 2));
    close(shares({ temperature: 2 }), flat.map((v) => v / flat.reduce((sum, x) => sum + x, 0)));
    close(shares({ topK: 2 }), [0, p[1]! / (p[1]! + p[2]!), p[2]! / (p[1]! + p[2]!), 0]);
    expect(shares({ topK: 1 })).toEqual([0, 1, 0, 0]);
    // the first token passes any threshold; the second comes in when the first alone does not exceed it
    expect(shares({ topP: p[1]! * 0.99 })).toEqual([0, 1, 0, 0]);
    close(shares({ topP: p[1]! * 1.01 }), [0, p[1]! / (p[1]! + p[2]!), p[2]! / (p[1]! + p[2]!), 0]);
  });

  test("chooses the most confident, the first of equals", () => {
    expect(selectMostConfident([0.2, 0.9, 0.2, 0.5], 3, 0, random)).toEqual([1, 3, 0]);
    expect(selectMostConfident([0.2], 5, 0, random)).toEqual([0]);
  });

  test("chooses without replacement at a temperature", () => {
    const stream = new RandomStream(4);
    let first = 0;
    for (let i = 0; i < 10_000; i++) {
      const chosen = selectMostConfident([0, Math.log(3)], 1, 1, stream);
      if (chosen[0] === 1) first++;
    }
    expect(Math.abs(first / 10_000 - 0.75)).toBeLessThan(0.02);
  });
});

describe("generation of LLaDA", () => {
  const path = store(place.fresh(), lladaCheckpoint());
  const model = loadLlada(path, kernels);
  const weights = readWeights(path, kernels);
  const reference = lladaReference(false);
  const MASK = 49;
  const prompt = Int32Array.of(5, 6, 7, 8);

  /** LLaDA's loop with one token a step, on the reference's logits. */
  function expected(length: number, blockLength: number, guidance: number): number[] {
    const x = [...prompt, ...new Array<number>(length).fill(MASK)];
    for (let step = 0; step < length; step++) {
      const begin = prompt.length + Math.floor(step / blockLength) * blockLength;
      let logits = languageLogits(weights, reference, x);
      if (guidance > 0) {
        const none = languageLogits(
          weights,
          reference,
          x.map((token, i) => i < prompt.length ? MASK : token),
        );
        logits = logits.map((row, i) =>
          row.map((v, j) => none[i]![j]! + (guidance + 1) * (v - none[i]![j]!))
        );
      }
      let best = { place: -1, token: -1, confidence: -1 };
      for (let i = begin; i < begin + blockLength; i++) {
        if (x[i] !== MASK) continue;
        const row = logits[i]!.map((v, token) => token === MASK ? -Infinity : v);
        const largest = Math.max(...row);
        const confidence = 1 / row.reduce((sum, v) => sum + Math.exp(v - largest), 0);
        if (confidence > best.confidence) best = { place: i, token: row.indexOf(largest), confidence };
      }
      x[best.place] = best.token;
    }
    return x;
  }

  test("by low confidence agrees with the loop on the reference, in one block and in several", () => {
    for (const blockLength of [12, 4]) {
      const { sequences } = lladaGenerate(model, prompt, 1, { generationLength: 12, blockLength });
      expect([...sequences]).toEqual(expected(12, blockLength, 0));
    }
  });

  test("with guidance agrees with the loop on the reference", () => {
    const { sequences } = lladaGenerate(model, prompt, 1, { generationLength: 6, guidance: 1.5 });
    expect([...sequences]).toEqual(expected(6, 6, 1.5));
  });

  test("finishes a block before the next and spreads masks evenly over steps", () => {
    const masks: number[] = [];
    lladaGenerate(model, prompt, 1, {
      generationLength: 10,
      blockLength: 5,
      steps: 6,
      onStep: (state) => {
        masks.push(state.masks);
        const written = [...state.sequences].slice(4).map((token) => token !== MASK);
        if (written.slice(5).includes(true)) {
          expect(written.slice(0, 5)).toEqual([true, true, true, true, true]);
        }
      },
    });
    expect(masks).toEqual([10, 8, 6, 5, 3, 1, 0]); // 2, 2, 1 of each block
  });

  test("random remasking and temperature follow the seed and not the batch", () => {
    const options = {
      generationLength: 8,
      steps: 4,
      remasking: "random",
      temperature: 0.7,
      seed: 5,
    } as const;
    const two = Int32Array.of(...prompt, ...prompt);
    const together = lladaGenerate(model, two, 2, options).sequences;
    expect([...together.subarray(0, 12)]).toEqual([...lladaGenerate(model, prompt, 1, options).sequences]);
    expect([...together.subarray(12)]).toEqual([
      ...lladaGenerate(model, prompt, 1, { ...options, firstStream: 1 }).sequences,
    ]);
    expect([...together.subarray(12)]).not.toEqual([...together.subarray(0, 12)]);
    expect(together.includes(MASK)).toBe(false);
  });

  test("options that do not fit are refused", () => {
    for (
      const options of [
        { generationLength: 10, blockLength: 3 },
        { generationLength: 10, blockLength: 5, steps: 5 },
        { generationLength: 61 },
        { generationLength: 4, steps: 0 },
        { generationLength: 4, guidance: -1 },
        { generationLength: 4, remasking: "none" as "random" },
      ]
    ) expect(thrown(() => lladaGenerate(model, prompt, 1, options))).toBeInstanceOf(RangeError);
    expect(thrown(() => loadLlada(DREAM, kernels)).message).toContain('model_type must be "llada"');
    expect(thrown(() => loadDream(path, kernels)).message).toContain('model_type must be "Dream"');
  });
});
