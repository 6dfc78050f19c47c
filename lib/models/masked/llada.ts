/**
 * LLaDA: a masked diffusion language model (https://github.com/ML-GSAI/LLaDA) over the same transformer as
 * Dream, with names and other configuration, no shift of the logits, and generation block after block.
 */
import type { Kernels } from "../../native/mod.ts";
import { loadAs } from "../family.ts";
import { LLADA_KEYS } from "../configuration/keys.ts";
import { lladaConfig } from "../configuration/masked.ts";
import type { ConfigFields } from "../model_config.ts";
import type { LoadOptions } from "../layers/tensors.ts";
import type { RandomStream, SeedOptions } from "../random.ts";
import { type MaskedFamily, maskedFamily, type WritingSettings } from "./family.ts";
import {
  checkAtLeast,
  checkChoice,
  checkNotNegative,
  checkTokens,
  fillMasks,
  type Generation,
  type GenerationStep,
  maskedPlaces,
  runGeneration,
  type TraceOptions,
} from "./generation.ts";
import {
  checkSamplingOptions,
  indexOfLargest,
  selectMostConfident,
  softmaxInPlace,
} from "./token_sampling.ts";
import type { MaskedTransformer } from "./transformer.ts";
import type { TransformerNames } from "./weights.ts";

function namesOf(fields: ConfigFields): TransformerNames {
  const otherBias = fields.flag("include_bias", false);
  return {
    embedding: "model.transformer.wte",
    finalNorm: "model.transformer.ln_f",
    head: "model.transformer.ff_out",
    blocks: "model.transformer.blocks",
    block: {
      attentionNorm: "attn_norm",
      query: "q_proj",
      key: "k_proj",
      value: "v_proj",
      attentionOutput: "attn_out",
      feedForwardNorm: "ff_norm",
      gate: "ff_proj",
      up: "up_proj",
      down: "ff_out",
    },
    queryKeyValueBias: otherBias || fields.flag("include_qkv_bias", false),
    otherBias,
  };
}

/** Which proposals are kept: the most probable, or any. */
export type Remasking = "low_confidence" | "random";
export const REMASKINGS: readonly Remasking[] = ["low_confidence", "random"];

/** How LLaDA and LLaDA-MoE write. */
export const LLADA_WRITING = {
  settings: ["algorithm", "guidance", "blockLength"],
  algorithms: REMASKINGS,
  write(
    model: MaskedTransformer,
    canvas: Int32Array,
    batch: number,
    { algorithm, generationLength = 0, ...settings }: WritingSettings,
  ): Generator<GenerationStep, Int32Array> {
    const tokens = canvas.length / batch;
    const prompts = canvas.filter((_, i) => i % tokens < tokens - generationLength);
    const remasking = algorithm as Remasking | undefined;
    return lladaSteps(model, prompts, batch, { ...settings, generationLength, remasking });
  },
} as const;

export const LLADA: MaskedFamily<"llada"> = maskedFamily({
  kind: "llada",
  title: "a LLaDA model",
  modelType: "llada",
  keys: LLADA_KEYS,
  hasGradients: true,
  config: lladaConfig,
  names: namesOf,
  ...LLADA_WRITING,
});

/** Loads a LLaDA model. @throws as {@linkcode loadAs} */
export function loadLlada(path: string, kernels: Kernels, options: LoadOptions = {}): MaskedTransformer {
  return loadAs(LLADA, path, kernels, options);
}

export interface LladaGenerationOptions extends SeedOptions {
  /** Tokens to generate behind the prompts; 0 only fills the prompts' masks. Default 128. */
  readonly generationLength?: number | undefined;
  /**
   * Tokens of a block; a block is finished before the next begins, and masks in the prompt with the first.
   * Default: all at once.
   */
  readonly blockLength?: number | undefined;
  /** Steps of the whole generation, a multiple of the number of blocks. Default: one a mask. */
  readonly steps?: number | undefined;
  /** Of Gumbel noise on the proposals; 0 takes the most probable. Default 0. */
  readonly temperature?: number | undefined;
  /** Guidance: logits = none + (scale + 1) · (prompt − none), with none for a masked prompt. Default 0. */
  readonly guidance?: number | undefined;
  /** Default `low_confidence`. */
  readonly remasking?: Remasking | undefined;
  /** Tokens never proposed. Default: the mask, so that nothing stays masked. */
  readonly excludedTokens?: readonly number[] | undefined;
}

/**
 * Continues prompts as LLaDA's `generate` does and fills the masks in them, one step a turn: first the
 * prompts with their masks, then the result of each step.
 *
 * **Shapes** `prompts: i32[batch, tokens]` → `i32[batch, tokens + generationLength]`
 *
 * @throws {RangeError | TypeError} when an option or the prompts are not allowed, before any work
 * @throws {WeightsError} as {@linkcode MaskedTransformer.forward}
 */
export function* lladaSteps(
  model: MaskedTransformer,
  prompts: Int32Array,
  batch: number,
  options: LladaGenerationOptions = {},
): Generator<GenerationStep, Int32Array> {
  const { maskToken, vocabularySize } = model.config;
  const { generationLength = 128, temperature = 0, guidance = 0, remasking = "low_confidence" } = options;
  const { blockLength = Math.max(1, generationLength), excludedTokens = [maskToken] } = options;
  checkAtLeast("generationLength", generationLength, 0);
  checkAtLeast("blockLength", blockLength, 1);
  checkNotNegative("guidance", guidance);
  checkChoice("remasking", remasking, REMASKINGS);
  checkSamplingOptions("generate", { temperature, excludedTokens }, vocabularySize);
  const promptTokens = checkTokens(model, "prompts", prompts, batch, generationLength);
  const tokens = promptTokens + generationLength, blocks = Math.max(1, generationLength / blockLength);
  if (generationLength % blockLength !== 0) {
    throw new RangeError(
      `Cannot generate: blockLength must divide ${generationLength} tokens, got ${blockLength}`,
    );
  }
  const promptMasks = Math.max(
    ...Array.from(
      { length: batch },
      (_, b) => maskedPlaces(prompts, maskToken, b * promptTokens, (b + 1) * promptTokens).length,
    ),
  );
  if (generationLength + promptMasks === 0) checkAtLeast("generationLength", generationLength, 1);
  const { steps = generationLength + blocks * promptMasks } = options;
  checkAtLeast("steps", steps, 1);
  if (steps % blocks !== 0) {
    throw new RangeError(`Cannot generate: steps must be a multiple of ${blocks} blocks, got ${steps}`);
  }
  const x = new Int32Array(batch * tokens).fill(maskToken);
  for (let b = 0; b < batch; b++) {
    x.set(prompts.subarray(b * promptTokens, (b + 1) * promptTokens), b * tokens);
  }
  const values = new Float64Array(vocabularySize), stepsPerBlock = steps / blocks;
  const timeOf = (step: number) => 1 - step / steps;
  return yield* fillMasks(model, x, batch, {
    steps,
    timeOf,
    span(step) {
      const block = Math.floor(step / stepsPerBlock), begin = promptTokens + block * blockLength;
      return [block === 0 ? 0 : begin, generationLength === 0 ? promptTokens : begin + blockLength];
    },
    look: (_step, places) => places,
    logits: (step, rows) =>
      guidance > 0
        ? guidedLogits(model, x, batch, rows, { promptTokens, guidance, t: timeOf(step) })
        : model.forward(x, batch, { rows, t: timeOf(step) }),
    propose(logits, random) {
      values.set(logits);
      for (const token of excludedTokens) values[token] = -Infinity;
      const token = temperature > 0 ? gumbelChoice(values, temperature, random) : indexOfLargest(values);
      if (remasking === "random") return { token, confidence: random.uniform() };
      softmaxInPlace(values);
      return { token, confidence: values[token]! };
    },
    // The masks left are spread over the steps left as evenly as whole numbers allow, larger shares first.
    choose: (step, confidences, random) =>
      selectMostConfident(
        confidences,
        Math.ceil(confidences.length / (stepsPerBlock - step % stepsPerBlock)),
        0,
        random,
      ),
  }, options);
}

/** none + (guidance + 1) · (prompt − none), none being the logits with the prompt masked. */
function guidedLogits(
  model: MaskedTransformer,
  x: Int32Array,
  batch: number,
  rows: Int32Array,
  { promptTokens, guidance, t }: {
    readonly promptTokens: number;
    readonly guidance: number;
    readonly t: number;
  },
): Float32Array {
  const tokens = x.length / batch, { maskToken } = model.config;
  const both = new Int32Array(2 * x.length);
  both.set(x);
  both.set(x.map((token, i) => i % tokens < promptTokens ? maskToken : token), x.length);
  const bothRows = new Int32Array(2 * rows.length);
  bothRows.set(rows);
  bothRows.set(rows.map((row) => row + x.length), rows.length);
  const logits = model.forward(both, 2 * batch, { rows: bothRows, t });
  const half = logits.length / 2;
  for (let i = 0; i < half; i++) {
    const none = logits[half + i]!;
    logits[i] = none + (guidance + 1) * (logits[i]! - none);
  }
  return logits.subarray(0, half);
}

/** Argmax of `exp(logit) / (−log u)^temperature`, as LLaDA draws, in logarithms. */
function gumbelChoice(logits: Float64Array, temperature: number, random: RandomStream): number {
  let best = 0, largest = -Infinity;
  for (let i = 0; i < logits.length; i++) {
    const key = logits[i]! - temperature * Math.log(-Math.log(random.uniform()));
    if (key > largest) [best, largest] = [i, key];
  }
  return best;
}

/** Continues prompts; {@linkcode lladaSteps} with a callback instead of turns. */
export function lladaGenerate(
  model: MaskedTransformer,
  prompts: Int32Array,
  batch: number,
  options: LladaGenerationOptions & TraceOptions = {},
): Generation {
  return runGeneration(lladaSteps(model, prompts, batch, options), options);
}
