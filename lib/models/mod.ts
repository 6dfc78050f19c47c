/** Diffusion models on the CPU, full precision or packed: Dream, LLaDA, DiT, how they generate, tokens and pictures. */
import { storedTimeParameters } from "./stored_time_parameters.ts";
import type { Kernels } from "../native/mod.ts";
import { type Checkpoint, openCheckpoint } from "../tensor/mod.ts";
import { ditFrom, type DitModel } from "./dit/model.ts";
import { dreamFrom } from "./masked/dream.ts";
import { modelConfig } from "./families.ts";
import { lladaFrom } from "./masked/llada.ts";
import type { MaskedTransformer } from "./masked/transformer.ts";
import type { LoadOptions } from "./layers/tensors.ts";

export { type DitConfig, type DitModel, type ImageBatch, loadDit } from "./dit/model.ts";
export {
  diffusionGenerate,
  DREAM_ALGORITHMS,
  type DreamAlgorithm,
  type DreamGenerationOptions,
  dreamSteps,
  loadDream,
  maskTimes,
} from "./masked/dream.ts";
export { type ModelConfig, modelConfig } from "./families.ts";
export {
  type Generation,
  type GenerationStep,
  runGeneration,
  type TraceOptions,
} from "./masked/generation.ts";
export { generateImages, type ImageOptions, type ImageStep, imageSteps } from "./dit/sampler.ts";
export {
  lladaGenerate,
  type LladaGenerationOptions,
  lladaSteps,
  loadLlada,
  type Remasking,
  REMASKINGS,
} from "./masked/llada.ts";
export type { Blockwise, LayerObserver, LayerOptions, Stage } from "./layers/blockwise.ts";
export type {
  ForwardCost,
  ForwardOptions,
  ForwardShape,
  MaskedTransformer,
  MaskedTransformerConfig,
  SequenceBatch,
} from "./masked/transformer.ts";
export { encodePng, tileImages } from "./dit/png.ts";
export { imageNoise, RandomStream } from "./random.ts";
export {
  loadScheduler,
  type PredictionType,
  type SamplerName,
  Scheduler,
  type SchedulerConfig,
  schedulerConfig,
  type TimestepSpacing,
} from "./dit/schedulers.ts";
export {
  forwardCost,
  type HeldMatrix,
  type ModelRequirements,
  modelRequirements,
  requirementsAt,
} from "./requirements.ts";
export type { DenseMatrix, Matrix } from "./layers/kernels.ts";
export { type StoredTimeOptions, storedTimeParameters } from "./stored_time_parameters.ts";
export type { EmbeddingTable, LinearLayer, LoadOptions } from "./layers/tensors.ts";
export { loadTokenizer, type Tokenizer } from "./masked/tokenizer.ts";

/** A loaded model, by its family. `folder` is where the checkpoint's other files lie. */
export type LoadedModel =
  | { readonly kind: "dream" | "llada"; readonly folder: string; readonly model: MaskedTransformer }
  | { readonly kind: "dit"; readonly folder: string; readonly model: DitModel };

/**
 * Loads whatever model an open checkpoint is, full precision or packed. The checkpoint may be closed afterwards.
 *
 * @throws {CheckpointError} as {@linkcode modelConfig}, or listing tensors that are missing, in excess or of another shape
 * @throws {FormatError} when a file is not what its format promises
 */
export function modelFrom(checkpoint: Checkpoint, kernels: Kernels, options: LoadOptions = {}): LoadedModel {
  const { folder } = checkpoint;
  const { kind } = modelConfig(checkpoint);
  if (kind === "dream") return { kind, folder, model: dreamFrom(checkpoint, kernels, options) };
  if (kind === "llada") return { kind, folder, model: lladaFrom(checkpoint, kernels, options) };
  return { kind, folder, model: ditFrom(checkpoint, kernels, options) };
}

/**
 * Loads whatever model lies at a path: {@linkcode modelFrom} of it.
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
  return modelFrom(checkpoint, kernels, options);
}

/**
 * Loads whatever model lies at a path, with the time parameters that lie beside it, if any do.
 *
 * @throws as {@linkcode modelFrom} and {@linkcode storedTimeParameters}
 */
export function loadStoredModel(
  path: string,
  kernels: Kernels,
  options: Omit<LoadOptions, "timeParameters"> = {},
): LoadedModel {
  using checkpoint = openCheckpoint(path);
  return modelFrom(checkpoint, kernels, { ...options, timeParameters: storedTimeParameters(checkpoint) });
}
