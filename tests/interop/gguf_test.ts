import { afterAll, describe, expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { EXPORT_FORMATS, exportCheckpoint, type ExportReport, quantizeFor } from "../../lib/interop/mod.ts";
import { loadModel, loadTokenizer, type Tokenizer } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { SafetensorsFile } from "../../lib/tensor/mod.ts";
import { MODELS, rejection, workplace, writeCheckpoint } from "../_checkpoints.ts";
import { dreamCheckpoint, lladaCheckpoint } from "../_models.ts";
import { languageLogits, type LanguageModel, readWeights } from "../_reference.ts";
import { compareLogits, inputsRoundedAsLlama, openLlama } from "./_llama.ts";

const DREAM = join(MODELS, "dream-mini");
const place = workplace(), kernels = await openKernels({ threads: 1 }), llama = openLlama();
if ("reason" in llama) console.log(`skipped: tests with llama.cpp: ${llama.reason}`);
afterAll(() => {
  if (!("reason" in llama)) llama.close();
  kernels.close();
  place.remove();
});

const gguf = EXPORT_FORMATS.find(({ name }) => name === "gguf")!;
const exported = (input: string, output: string, types: Record<string, string> = {}, allowRounding = false) =>
  exportCheckpoint({
    ...{ input, output, format: gguf, kernels, allowRounding },
    types: Object.entries(types).map(([pattern, type]) => ({ pattern: new RegExp(pattern), type })),
  });

/** dream-256 as the float64 pass wants it (its config.json). */
const DREAM_256: LanguageModel = {
  ...{ embedding: "model.embed_tokens", head: "lm_head", finalNorm: "model.norm", blocks: 3, width: 256 },
  ...{ heads: 4, kvHeads: 2, epsilon: 1e-6, theta: 10_000, bias: true },
  block: (i) =>
    [
      ...["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
      ...["post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    ].map((name) => `model.layers.${i}.${name}`),
};

/** Rows of 256 weights, as the blocks of K-types want them. */
const WIDE = { width: 256, inner: 512, blocks: 1, heads: 4, kvHeads: 2, vocabulary: 50 };
const FAMILIES = {
  dream: () => dreamCheckpoint(WIDE, "F32"),
  llada: () => lladaCheckpoint(WIDE, "F32", true),
};
const inputs = new Map(
  Object.entries(FAMILIES).map(([family, make]) => {
    const { tensors, config } = make();
    return [family, writeCheckpoint(place.fresh(family), tensors, config)];
  }),
);

async function packed(input: string, config: Record<string, unknown>): Promise<string> {
  const output = place.fresh("packed");
  const overrides = { num_threads: 1, ...config };
  await quantizeCheckpoint({
    input,
    output,
    kernels,
    config: resolveConfig({ overrides: { solver: "clip", ...overrides } }).config,
  });
  return output;
}

/** The bits of values; where a type has scales of either sign, both zeros are one: its own zeros have that sign. */
const bitsOf = (values: ArrayLike<number>, type: string) =>
  Buffer.from(
    Float32Array.from(values, (value) => type === "Q2_0" || type === "Q3_K" ? value + 0 : value).buffer,
  );

/** Compares every tensor that ggml reads with ours; LLaDA's rows of query and key are put back first. */
function expectSameWeights(packedFolder: string, file: string, report: ExportReport, headSize: number): void {
  if ("reason" in llama) return;
  const ours = readWeights(packedFolder, kernels), theirs = llama.dequantize(file);
  expect(theirs.size).toBe(report.rows.length);
  for (const { tensor, name, type } of report.rows) {
    const { values, type: found } = theirs.get(name)!;
    expect([name, found.toUpperCase()]).toEqual([name, type]);
    const wanted = ours(tensor.name), cols = tensor.shape.length > 1 ? tensor.shape[1]! : 1;
    const isTurned = tensor.name.startsWith("model.transformer") && /\.[qk]_proj\./.test(tensor.name);
    const turned = Float64Array.from(wanted, (_, i) => {
      const row = Math.floor(i / cols), inHead = row % headSize, half = headSize / 2;
      const from = isTurned ? row - inHead + (inHead % 2) * half + Math.floor(inHead / 2) : row;
      return wanted[from * cols + i % cols]!;
    });
    expect(Buffer.compare(bitsOf(values, type), bitsOf(turned, type))).toBe(0);
  }
}

/** Three tokens behind a prompt, as the reference models are sampled (tests/models/README.md), by llama.cpp's logits. */
function answerInLlama(file: string, tokenizer: Tokenizer, prompt: string): string {
  if ("reason" in llama) throw new Error(llama.reason);
  const [mask, pad] = [tokenizer.encode("<mask>")[0]!, tokenizer.encode("<pad>")[0]!];
  const begin = [...tokenizer.encode(`<bos>${prompt}`)], masks = 4, vocabulary = 35;
  const ids = Int32Array.from([...begin, ...Array(masks).fill(mask), ...Array(36).fill(pad)].slice(0, 36));
  for (let left = masks; left > 0; left--) {
    const logits = llama.logits(file, ids, 1);
    const proposals = Array.from({ length: masks }, (_, i) => begin.length + i).filter((i) => ids[i] === mask)
      .map((i) => {
        // Dream's logits at a position are for the next one.
        const powers = Array.from(
          logits.subarray((i - 1) * vocabulary, i * vocabulary),
          (logit, token) => token === mask || token === pad ? 0 : Math.exp(logit),
        );
        const most = Math.max(...powers);
        return { i, token: powers.indexOf(most), confidence: most / powers.reduce((a, b) => a + b) };
      });
    const { i, token } = proposals.sort((a, b) => b.confidence - a.confidence)[0]!;
    ids[i] = token;
  }
  return tokenizer.decode([...ids.subarray(begin.length, begin.length + 3)]);
}

describe("a GGUF file of a language model", () => {
  for (const model of ["dream-mini", "dream-256"]) {
    test(`of ${model} in F32 has the golden logits in llama.cpp, and its tokenizer reads as ours`, async () => {
      if ("reason" in llama) return;
      const file = place.fresh("f32.gguf"), input = join(MODELS, model);
      await exported(input, file, { "": "F32" });
      using golden = SafetensorsFile.open(join(input, "golden.safetensors"));
      const ids = Int32Array.from(new BigInt64Array(golden.read("input_ids").buffer), Number);
      const wanted = new Float32Array(golden.read("logits").buffer);
      const { positions, same, kl } = compareLogits(wanted, llama.logits(file, ids, 12), 35);
      expect(same).toBe(positions);
      expect(kl).toBeLessThan(1e-9);
      const text = "47+38=<mask><mask>a>S:", ours = (await loadTokenizer(input)).encode(text);
      expect(llama.tokenize(file, text)).toEqual([...ours]);
    });
  }

  test("of dream-256 at 2 bits answers in llama.cpp", async () => {
    if ("reason" in llama) return;
    const input = join(MODELS, "dream-256"), output = place.fresh("two.gguf");
    const { config } = resolveConfig({
      overrides: {
        ...{ bit_width: 2, target: "llama.cpp", num_threads: 1, calibration_samples: 64 },
        ...{
          solver: "best",
          calibration_data: join(input, "calibration.jsonl"),
          "solver_options.effort": "low",
        },
      },
    });
    await quantizeFor({ input, output, kernels, config });
    expect(answerInLlama(output, await loadTokenizer(input), "47+38=")).toBe("085");
  });

  const CASES: [type: string, family: "dream" | "llada", config: Record<string, unknown>][] = [
    ["Q2_K", "dream", { bit_width: 2, scale_bits: 4, group_size: 16 }],
    ["Q2_K", "llada", { bit_width: 2, scale_bits: 4, group_size: 64 }],
    ["Q4_K", "llada", { bit_width: 4, scale_bits: 6, group_size: 32 }],
    ["Q4_K", "dream", { bit_width: 3, scale_bits: 4, group_size: 128 }],
    ["Q3_K", "dream", { bit_width: 3, target: "llama.cpp" }],
    ["Q3_K", "llada", { bit_width: 3, target: "llama.cpp", group_size: 64 }],
    ["Q6_K", "llada", { target: "llama.cpp", target_type: "Q6_K" }],
    ["Q2_0", "dream", { bit_width: 2, zero_point: "symmetric", group_size: 64 }],
    ["Q2_0", "llada", { bit_width: 2, zero_point: "symmetric", group_size: 0 }],
    ["Q4_0", "dream", { bit_width: 4, zero_point: "symmetric", group_size: 32 }],
    ["Q4_0", "llada", { bit_width: 3, zero_point: "symmetric", group_size: 256 }],
    ["Q4_1", "dream", { bit_width: 4, zero_point: "offset", group_size: 64 }],
    ["Q4_1", "llada", { target: "llama.cpp", target_type: "Q4_1" }],
    ["Q8_0", "llada", { bit_width: 8, zero_point: "symmetric", group_size: 128 }],
  ];
  for (const [type, family, config] of CASES) {
    test(`in ${type} from ${family} at ${JSON.stringify(config)} has our weights and our logits`, async () => {
      if ("reason" in llama) return;
      const folder = await packed(inputs.get(family)!, config), file = place.fresh("packed.gguf");
      const report = await exported(folder, file);
      expect(report.rows.filter((row) => row.type === type)).toHaveLength(7);
      expectSameWeights(folder, file, report, WIDE.width / WIDE.heads);
      const tokens = Int32Array.from({ length: 24 }, (_, i) => (i * 7) % WIDE.vocabulary);
      const { model } = loadModel(folder, kernels) as {
        model: { forward(ids: Int32Array, batch: number): Float32Array };
      };
      const { kl } = compareLogits(model.forward(tokens, 2), llama.logits(file, tokens, 2), WIDE.vocabulary);
      expect(kl).toBeLessThan(1e-3);
    });
  }

  for (const type of ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q2_0", "Q4_0", "Q8_0"]) {
    test(`of dream-256 in ${type} has the logits of a float64 pass with llama.cpp's rounding of inputs`, async () => {
      if ("reason" in llama) return;
      const input = join(MODELS, "dream-256"), file = place.fresh(`${type}.gguf`);
      const folder = await packed(input, { target: "llama.cpp", target_type: type });
      const { rows } = await exported(folder, file);
      using golden = SafetensorsFile.open(join(input, "golden.safetensors"));
      const tokens = Int32Array.from(
        new BigInt64Array(golden.read("input_ids").buffer).subarray(0, 12),
        Number,
      );
      const types = new Map(rows.map((row) => [row.tensor.name.replace(/\.weight$/, ""), row.type]));
      const wanted = languageLogits(
        readWeights(folder, kernels),
        DREAM_256,
        [...tokens],
        undefined,
        (layer, x) => inputsRoundedAsLlama(types.get(layer)!, x),
      );
      const found = llama.logits(file, tokens, 1);
      const { positions, same, kl } = compareLogits(Float32Array.from(wanted.flat()), found, 35);
      expect(same).toBe(positions);
      expect(kl).toBeLessThan(1e-5);
    });
  }

  test("of the same weights in F32 has our logits: what differs is how llama.cpp rounds activations", async () => {
    if ("reason" in llama) return;
    const folder = await packed(inputs.get("llada")!, { bit_width: 2, scale_bits: 4 });
    const file = place.fresh("dequantized.gguf");
    await exported(folder, file, { "": "F32" });
    const tokens = Int32Array.from({ length: 24 }, (_, i) => (i * 7) % WIDE.vocabulary);
    const { model } = loadModel(folder, kernels) as {
      model: { forward(ids: Int32Array, batch: number): Float32Array };
    };
    const wanted = model.forward(tokens, 2), found = llama.logits(file, tokens, 2);
    const { positions, same, kl } = compareLogits(wanted, found, WIDE.vocabulary);
    expect(same).toBe(positions);
    expect(kl).toBeLessThan(1e-7);
  });

  test("refuses what it could only round, naming layer and reason; with leave it rounds", async () => {
    const folder = await packed(DREAM, { bit_width: 4, group_size: 32 }), file = place.fresh("rounded.gguf");
    const error = await rejection(exported(folder, file));
    expect(error.code).toBe("AQ_CHECKPOINT");
    expect(error.message).toContain(
      '"model.layers.0.self_attn.q_proj.weight": no type of ggml has a grid of 4 bits',
    );
    expect(existsSync(file) || existsSync(`${file}.partial`)).toBe(false);
    const { rows } = await exported(folder, file, {}, true);
    expect(rows.filter(({ rounding }) => rounding !== undefined)).toHaveLength(28);
  });

  test("refuses models that llama.cpp does not run as they are, before it writes", async () => {
    const tensors = { "a.weight": { dtype: "F32", shape: [2, 2], data: new Float32Array(4) } };
    const other = writeCheckpoint(place.fresh("other"), tensors, { model_type: "bert" });
    const { tensors: own, config } = lladaCheckpoint(WIDE);
    const scaled = writeCheckpoint(place.fresh("scaled"), own, { ...config, scale_logits: true });
    const file = place.fresh("refused.gguf");
    expect((await rejection(exported(other, file))).message).toContain(
      "the family must be one of Dream, LLaDA, FLUX.1",
    );
    expect((await rejection(exported(scaled, file))).message).toContain("must not scale its logits");
    const words = writeCheckpoint(place.fresh("words"), own, config);
    writeFileSync(
      join(words, "tokenizer.json"),
      JSON.stringify({
        model: { type: "WordLevel", vocab: { hello: 0 }, unk_token: "hello" },
        pre_tokenizer: { type: "WhitespaceSplit" },
      }),
    );
    expect((await rejection(exported(words, file))).message).toContain(
      "the tokenizer must be byte-level BPE",
    );
    expect(readdirSync(place.path).filter((name) => name.startsWith("refused"))).toEqual([]);
  });

  test("is written whole or not at all, and a stopped run goes on to the same bytes", async () => {
    const { config } = resolveConfig({
      overrides: { solver: "clip", num_threads: 1, bit_width: 4, target: "llama.cpp" },
    });
    const whole = place.fresh("whole.gguf"), stopped = place.fresh("stopped.gguf");
    await quantizeFor({ input: DREAM, output: whole, kernels, config });
    for (const stage of ["packed", "file"]) {
      const controller = new AbortController();
      const error = await rejection(quantizeFor({
        ...{
          input: DREAM,
          output: stopped,
          kernels,
          config,
          signal: controller.signal,
          resume: stage === "file",
        },
        onProgress: ({ bytesDone, bytes }) => {
          const isFile = existsSync(`${stopped}.partial`);
          if (isFile === (stage === "file") && bytesDone > bytes / 2) controller.abort("SIGINT");
        },
      }));
      expect(error.code).toBe("AQ_INTERRUPTED");
      expect(existsSync(stopped) || existsSync(`${stopped}.partial`)).toBe(false);
    }
    await quantizeFor({ input: DREAM, output: stopped, kernels, config, resume: true });
    expect(existsSync(`${stopped}.arrowquant`)).toBe(false);
    const bytes = [whole, stopped].map((path) => readFileSync(path).subarray(-90_000));
    expect(Buffer.compare(bytes[0]!, bytes[1]!)).toBe(0);
  });

  test("replaces no file of somebody else, and its own only with force", async () => {
    const file = place.fresh("other.gguf");
    writeFileSync(file, "precious");
    const options = { input: DREAM, output: file, format: gguf, kernels };
    expect((await rejection(exportCheckpoint(options))).message).toContain("must not exist, got a file");
    expect((await rejection(exportCheckpoint({ ...options, force: true }))).message).toContain(
      "somebody else",
    );
    expect(readFileSync(file, "utf8")).toBe("precious");
    const own = { ...options, output: place.fresh("own.gguf") };
    const first = await exportCheckpoint(own);
    expect((await exportCheckpoint({ ...own, force: true })).bytesAfter).toBe(first.bytesAfter);
  });
});
