/** Diffusion models on the CPU, full precision or packed: Dream, LLaDA, DiT, how they generate, tokens and pictures. */
import { CheckpointError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import { openCheckpoint } from "../tensor/mod.ts";
import { ditFrom, type DitModel } from "./dit.ts";
import { dreamFrom, type LoadOptions } from "./dream.ts";
import { lladaFrom } from "./llada.ts";
import type { MaskedTransformer } from "./masked_transformer.ts";
import { shown } from "./model_config.ts";

export { type DitConfig, type DitForwardOptions, type DitModel, loadDit } from "./dit.ts";
export {
  diffusionGenerate,
  DREAM_ALGORITHMS,
  type DreamAlgorithm,
  type DreamGenerationOptions,
  dreamSteps,
  type Generation,
  type GenerationStep,
  loadDream,
  type LoadOptions,
  maskTimes,
  runGeneration,
  type TraceOptions,
} from "./dream.ts";
export { generateImages, type ImageOptions, type ImageStep } from "./image_sampler.ts";
export {
  lladaGenerate,
  type LladaGenerationOptions,
  lladaSteps,
  loadLlada,
  type Remasking,
  REMASKINGS,
} from "./llada.ts";
export type {
  ForwardOptions,
  LayerObserver,
  MaskedTransformer,
  MaskedTransformerConfig,
} from "./masked_transformer.ts";
export { encodePng, tileImages } from "./png.ts";
export { imageNoise, RandomStream } from "./random.ts";
export {
  loadScheduler,
  type PredictionType,
  type SamplerName,
  Scheduler,
  type SchedulerConfig,
  schedulerConfig,
  type TimestepSpacing,
} from "./schedulers.ts";
export type { DenseMatrix, Matrix } from "./kernels.ts";
export type { EmbeddingTable, LinearLayer } from "./tensors.ts";
export { loadTokenizer, type Tokenizer } from "./tokenizer.ts";

/** A loaded model, by its family. */
export type LoadedModel =
  | { readonly kind: "dream"; readonly folder: string; readonly model: MaskedTransformer }
  | { readonly kind: "llada"; readonly folder: string; readonly model: MaskedTransformer }
  | { readonly kind: "dit"; readonly folder: string; readonly model: DitModel };

/**
 * Loads whatever model a checkpoint is, full precision or packed. `folder` is where its other files lie.
 *
 * @throws {CheckpointError} when the family is unknown (naming those that are not), or config.json and tensors do not fit
 * @throws {FormatError} when a file is not what its format promises
 *
 * @example
 * ```ts
 * import { openKernels } from "../native/mod.ts";
 * import { loadModel } from "./mod.ts";
 * console.log(loadModel("tests/models/glyph-dit", await openKernels()).kind); // dit
 * ```
 */
export function loadModel(path: string, kernels: Kernels, options: LoadOptions = {}): LoadedModel {
  using checkpoint = openCheckpoint(path);
  const { folder, kind, config } = checkpoint;
  if (kind === "dream") return { kind, folder, model: dreamFrom(checkpoint, kernels, options) };
  if (kind === "llada") return { kind, folder, model: lladaFrom(checkpoint, kernels, options) };
  if (kind === "dit") return { kind, folder, model: ditFrom(checkpoint, kernels, options) };
  const named = config === undefined
    ? "no config.json"
    : shown(config["model_type"] ?? config["_class_name"] ?? config["architectures"]);
  throw new CheckpointError(
    `Cannot load ${
      shown(path)
    }: the architecture must be "Dream", "llada" (model_type) or "DiTTransformer2DModel" ` +
      `(_class_name), got ${named}`,
    { path },
  );
}
