/** Diffusion models on the CPU, full precision or packed: Dream, LLaDA, DiT, how they generate, tokens and pictures. */
export type { DitConfig } from "./dit/config.ts";
export { type DitModel, type ImageBatch, loadDit } from "./dit/model.ts";
export {
  diffusionGenerate,
  DREAM_ALGORITHMS,
  type DreamAlgorithm,
  type DreamGenerationOptions,
  dreamSteps,
  loadDream,
  maskTimes,
} from "./masked/dream.ts";
export {
  forwardCost,
  type LoadedModel,
  loadModel,
  loadStoredModel,
  type ModelConfig,
  modelConfig,
  modelFrom,
} from "./families.ts";
export type { ForwardCost, ForwardShape } from "./family.ts";
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
export type { MaskedTransformerConfig } from "./masked/config.ts";
export type { ForwardOptions, MaskedTransformer, SequenceBatch } from "./masked/transformer.ts";
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
  type HeldMatrix,
  type ModelRequirements,
  modelRequirements,
  requirementsAt,
} from "./requirements.ts";
export type { DenseMatrix, Matrix } from "./layers/linear.ts";
export { type StoredTimeOptions, storedTimeParameters } from "./stored_time_parameters.ts";
export type { EmbeddingTable, LinearLayer, LoadOptions } from "./layers/tensors.ts";
export { loadTokenizer, type Tokenizer } from "./masked/tokenizer.ts";
