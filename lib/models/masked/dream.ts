/**
 * Dream: a masked diffusion language model (https://github.com/DreamLM/Dream) with the tensor names of Dream
 * 7B, and its way to generate. Its logits are shifted: those at position i − 1 predict the token at position
 * i, position 0 keeps its own.
 */
import type { Kernels } from "../../native/mod.ts";
import { loadAs } from "../family.ts";
import { DREAM_KEYS } from "../configuration/keys.ts";
import { dreamConfig } from "../configuration/masked.ts";
import type { LoadOptions } from "../layers/tensors.ts";
import type { SeedOptions } from "../random.ts";
import { type MaskedFamily, maskedFamily, QWEN_NAMES } from "./family.ts";
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
  type Confidence,
  selectMostConfident,
  TokenSampler,
  type TokenSamplingOptions,
} from "./token_sampling.ts";
import type { MaskedTransformer } from "./transformer.ts";

/** Choice of positions: at random, or by confidence - probability, lead over the second, entropy. */
export type DreamAlgorithm = "origin" | "maskgit_plus" | "topk_margin" | "entropy";
export const DREAM_ALGORITHMS: readonly DreamAlgorithm[] = [
  "origin",
  "maskgit_plus",
  "topk_margin",
  "entropy",
];

const CONFIDENCE: Record<DreamAlgorithm, Confidence> = {
  origin: "probability",
  maskgit_plus: "probability",
  topk_margin: "margin",
  entropy: "negative_entropy",
};

export const DREAM: MaskedFamily<"dream"> = maskedFamily({
  kind: "dream",
  title: "a Dream model",
  modelType: "Dream",
  keys: DREAM_KEYS,
  hasGradients: true,
  config: dreamConfig,
  names: (fields) => ({ ...QWEN_NAMES, queryKeyValueBias: fields.flag("attention_bias", true) }),
  settings: ["algorithm", "algorithmTemperature", "eps", "topP", "topK"],
  algorithms: DREAM_ALGORITHMS,
  write: (model, canvas, batch, settings) =>
    dreamSteps(model, canvas, batch, settings as DreamGenerationOptions),
});

/** Loads a Dream model. @throws as {@linkcode loadAs} */
export function loadDream(path: string, kernels: Kernels, options: LoadOptions = {}): MaskedTransformer {
  return loadAs(DREAM, path, kernels, options);
}

export interface DreamGenerationOptions extends TokenSamplingOptions, SeedOptions {
  /** Default `origin`, as Dream's. */
  readonly algorithm?: DreamAlgorithm | undefined;
  /** Steps from all masks to none. Default: the most masks of any sequence. */
  readonly steps?: number | undefined;
  /** Time of the last step. Default 0.001. */
  readonly eps?: number | undefined;
  /** Temperature of the choice among positions by confidence; 0 takes the most confident. Default 0. */
  readonly algorithmTemperature?: number | undefined;
  /** Fewest tokens that a step writes, for the algorithms by confidence. Dream's code has 0. Default 1. */
  readonly minimumPerStep?: number | undefined;
  /** Tokens never proposed. Default: the mask, so that nothing stays masked. */
  readonly excludedTokens?: readonly number[] | undefined;
  /** `u8[batch, tokens]`, 0 where a token is padding; by default every token is read. */
  readonly attentionMask?: Uint8Array | undefined;
}

/** Times of the steps, from 1 to `eps`, in float32 as `torch.linspace` gives them. */
export function maskTimes(steps: number, eps: number): Float32Array<ArrayBuffer> {
  const times = new Float32Array(steps + 1);
  const width = Math.fround(Math.fround(Math.fround(eps) - 1) / steps);
  for (let i = 0; i <= steps; i++) {
    times[i] = i < Math.floor((steps + 1) / 2)
      ? 1 + Math.fround(width * i)
      : Math.fround(eps) - Math.fround(width * (steps - i));
  }
  return times;
}

/**
 * Fills the masks of `canvas` as Dream's `diffusion_generate` does, one step a turn: first the canvas, then
 * the result of each step.
 *
 * **Shapes** `canvas: i32[batch, tokens]`, with `<mask>` where a token is wanted; not changed. The number of
 * tokens that a step writes into a sequence, and its draws, do not depend on the batch (a product's last bits
 * may).
 *
 * @throws {RangeError | TypeError} when an option or the canvas is not allowed, before any work
 * @throws {WeightsError} as {@linkcode MaskedTransformer.forward}
 */
export function* dreamSteps(
  model: MaskedTransformer,
  canvas: Int32Array,
  batch: number,
  options: DreamGenerationOptions = {},
): Generator<GenerationStep, Int32Array> {
  const { maskToken, vocabularySize } = model.config;
  const { algorithm = "origin", eps = 1e-3, algorithmTemperature = 0, minimumPerStep = 1, attentionMask } =
    options;
  const sampling = { ...options, excludedTokens: options.excludedTokens ?? [maskToken] };
  checkChoice("algorithm", algorithm, DREAM_ALGORITHMS);
  const tokens = checkTokens(model, "canvas", canvas, batch);
  const masks = Array.from(
    { length: batch },
    (_, b) => maskedPlaces(canvas, maskToken, b * tokens, (b + 1) * tokens).length,
  );
  const { steps = Math.max(1, ...masks) } = options;
  checkAtLeast("steps", steps, 1);
  checkAtLeast("minimumPerStep", minimumPerStep, 0);
  checkSamplingOptions("generate", sampling, vocabularySize);
  if (!(eps > 0 && eps < 1)) throw new RangeError(`Cannot generate: eps must lie in (0, 1), got ${eps}`);
  checkNotNegative("algorithmTemperature", algorithmTemperature);
  if (attentionMask !== undefined && attentionMask.length !== canvas.length) {
    throw new TypeError(
      `Cannot generate: attentionMask must have ${canvas.length} entries, got ${attentionMask.length}`,
    );
  }
  const x = canvas.slice(), times = maskTimes(steps, eps), isRandom = algorithm === "origin";
  const sampler = new TokenSampler(vocabularySize, sampling, CONFIDENCE[algorithm]);
  const shareOf = (step: number) => Math.fround(1 - Math.fround(times[step + 1]! / times[step]!));
  const isLast = (step: number) => step === steps - 1;
  return yield* fillMasks(model, x, batch, {
    steps,
    timeOf: (step) => times[step]!,
    // `origin` needs logits only for the places that it writes.
    look: (step, places, random) =>
      isRandom ? places.filter(() => random.uniform() < shareOf(step) || isLast(step)) : places,
    logits: (step, rows) => model.forward(x, batch, { rows, attentionMask, t: times[step]! }),
    propose: (logits, random) => sampler.propose(logits, random),
    choose(step, confidences, random) {
      if (isRandom || isLast(step)) return [...confidences.keys()];
      const wanted = Math.max(minimumPerStep, Math.floor(Math.fround(confidences.length * shareOf(step))));
      return selectMostConfident(confidences, wanted, algorithmTemperature, random);
    },
  }, options);
}

/**
 * Fills the masks of `canvas`; {@linkcode dreamSteps} with a callback instead of turns.
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 * import { diffusionGenerate, loadDream } from "./dream.ts";
 * const model = loadDream("tests/models/dream-mini", await openKernels());
 * const canvas = new Int32Array(36); // <pad>
 * canvas.set([2, 8, 11, 14, 7, 12, 15, 1, 1, 1, 1]); // <bos> 4 7 + 3 8 = and four masks
 * const { sequences } = diffusionGenerate(model, canvas, 1, { algorithm: "maskgit_plus", excludedTokens: [0, 1] });
 * console.log(sequences.subarray(7, 10)); // 0 8 5: tokens 4, 12, 9
 * ```
 */
export function diffusionGenerate(
  model: MaskedTransformer,
  canvas: Int32Array,
  batch: number,
  options: DreamGenerationOptions & TraceOptions = {},
): Generation {
  return runGeneration(dreamSteps(model, canvas, batch, options), options);
}
