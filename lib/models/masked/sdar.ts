/**
 * SDAR: block diffusion over Qwen3's blocks (https://github.com/JetAstra/SDAR). A token sees all tokens of
 * its block and of those before; blocks are written one after the other, and the tokens of a block by
 * denoising.
 */
import type { Kernels } from "../../native/mod.ts";
import { loadAs } from "../family.ts";
import { SDAR_KEYS } from "../configuration/keys.ts";
import { sdarConfig } from "../configuration/masked.ts";
import type { LoadOptions } from "../layers/tensors.ts";
import type { SeedOptions } from "../random.ts";
import { type MaskedFamily, maskedFamily, QWEN_NAMES } from "./family.ts";
import {
  checkAtLeast,
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
  selectMostConfident,
  TokenSampler,
  type TokenSamplingOptions,
} from "./token_sampling.ts";
import type { MaskedTransformer } from "./transformer.ts";

export const SDAR: MaskedFamily<"sdar"> = maskedFamily({
  kind: "sdar",
  title: "an SDAR model",
  modelType: "sdar",
  keys: SDAR_KEYS,
  hasGradients: false,
  config: sdarConfig,
  names: (fields) => ({
    ...QWEN_NAMES,
    queryKeyValueBias: fields.flag("attention_bias", false),
    attentionOutputBias: fields.flag("attention_bias", false),
  }),
  settings: ["threshold", "topP", "topK"],
  algorithms: [],
  write: (model, canvas, batch, settings) => sdarSteps(model, canvas, batch, settings),
});

/** Loads an SDAR model. @throws as {@linkcode loadAs} */
export function loadSdar(path: string, kernels: Kernels, options: LoadOptions = {}): MaskedTransformer {
  return loadAs(SDAR, path, kernels, options);
}

export interface SdarGenerationOptions extends TokenSamplingOptions, SeedOptions {
  /** Steps of all, in equal parts for the blocks that have masks. Default: one a mask of a block. */
  readonly steps?: number | undefined;
  /**
   * A step writes every proposal that is more probable than this, where these are as many as it writes anyway
   * or more: SDAR's `low_confidence_dynamic`. Default none, `low_confidence_static`.
   */
  readonly threshold?: number | undefined;
}

/**
 * Fills the masks of `canvas` block by block as SDAR's `block_diffusion_generate` does: each step of a block
 * writes as many of its most probable proposals as spread the block's masks over its steps, with a threshold
 * all that are surer. A last block that is shorter than others ends with the canvas.
 *
 * **Shapes** `canvas: i32[batch, tokens]`, with masks where a token is wanted; not changed
 *
 * @throws {RangeError | TypeError} when an option or the canvas is not allowed, before any work
 * @throws {WeightsError} as {@linkcode MaskedTransformer.forward}
 */
export function* sdarSteps(
  model: MaskedTransformer,
  canvas: Int32Array,
  batch: number,
  options: SdarGenerationOptions = {},
): Generator<GenerationStep, Int32Array> {
  const { maskToken, vocabularySize, attentionBlock } = model.config;
  const sampling = { ...options, excludedTokens: options.excludedTokens ?? [maskToken] };
  const tokens = checkTokens(model, "canvas", canvas, batch),
    size = attentionBlock === 0 ? tokens : attentionBlock;
  checkSamplingOptions("generate", sampling, vocabularySize);
  const { threshold = Infinity } = options;
  if (options.steps !== undefined) checkAtLeast("steps", options.steps, 1);
  if (!(threshold >= 0)) {
    throw new RangeError(`Cannot generate: threshold must be a number ≥ 0, got ${threshold}`);
  }
  const places = maskedPlaces(canvas, maskToken);
  const blocks = [...new Set(places.map((place) => Math.floor(place % tokens / size)))].sort((a, b) => a - b);
  const masksOf = (block: number) =>
    Math.max(
      ...Array.from({ length: batch }, (_, b) =>
        places.filter((place) =>
          Math.floor(place / tokens) === b && Math.floor(place % tokens / size) === block
        ).length),
    );
  const most = Math.max(1, ...blocks.map(masksOf));
  const perBlock = options.steps === undefined
    ? most
    : Math.min(most, Math.max(1, Math.ceil(options.steps / Math.max(1, blocks.length))));
  const steps = Math.max(1, perBlock * blocks.length);
  const endOf = (step: number) => Math.min(tokens, ((blocks[Math.floor(step / perBlock)] ?? 0) + 1) * size);
  const x = canvas.slice(), sampler = new TokenSampler(vocabularySize, sampling, "probability");
  const timeOf = (step: number) => 1 - step / steps;
  return yield* fillMasks(model, x, batch, {
    steps,
    timeOf,
    span: (step) => [endOf(step) - size < 0 ? 0 : Math.floor((endOf(step) - 1) / size) * size, endOf(step)],
    look: (_step, masks) => masks,
    // What follows a block is not seen from it, and not run.
    logits(step, rows) {
      const end = endOf(step), part = new Int32Array(batch * end);
      for (let b = 0; b < batch; b++) part.set(x.subarray(b * tokens, b * tokens + end), b * end);
      const own = rows.map((row) => Math.floor(row / tokens) * end + row % tokens);
      return model.forward(part, batch, { rows: own, t: timeOf(step) });
    },
    propose: (logits, random) => sampler.propose(logits, random),
    choose(step, confidences, random) {
      const wanted = Math.ceil(confidences.length / (perBlock - step % perBlock));
      const sure = [...confidences.keys()].filter((i) => confidences[i]! > threshold);
      return sure.length >= wanted ? sure : selectMostConfident(confidences, wanted, 0, random);
    },
  }, options);
}

/** Fills masks block by block; {@linkcode sdarSteps} with a callback instead of turns. */
export function sdarGenerate(
  model: MaskedTransformer,
  canvas: Int32Array,
  batch: number,
  options: SdarGenerationOptions & TraceOptions = {},
): Generation {
  return runGeneration(sdarSteps(model, canvas, batch, options), options);
}
