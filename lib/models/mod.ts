/** Diffusion models on the CPU, full precision or packed: Dream, LLaDA, DiT, generation, tokens, pictures. */
export { checkpointLayers, type ModelLayers } from "./checkpoint_layers.ts";
export { type LanguageKind, type StoredGeneration, storedGeneration } from "./configuration/generation.ts";
export type { DitConfig } from "./dit/config.ts";
export { type DitModel, type ImageBatch, loadDit } from "./dit/model.ts";
export { encodePng, tileImages } from "./dit/png.ts";
export { generateImages, type ImageOptions, imageSteps } from "./dit/sampler.ts";
export { loadScheduler, type SamplerName, Scheduler } from "./schedulers.ts";
export {
  forwardCost,
  gradientCost,
  keysWithoutMeaning,
  languageFamily,
  type LoadedModel,
  loadModel,
  loadStoredModel,
  modelConfig,
  modelFrom,
} from "./families.ts";
export type { ForwardShape } from "./family.ts";
export { ACTIVATION_PRECISIONS, type ActivationPrecision } from "./layers/int8.ts";
export type { Blockwise, LayerObserver, Stage, StagedRun, StageStop } from "./layers/blockwise.ts";
export { HeldWeights } from "./layers/held_weights.ts";
export type { Matrix } from "./layers/linear.ts";
export type { LinearLayer } from "./layers/tensors.ts";
export type { MaskedTransformerConfig } from "./masked/config.ts";
export {
  diffusionGenerate,
  DREAM_ALGORITHMS,
  type DreamAlgorithm,
  type DreamGenerationOptions,
  dreamSteps,
  loadDream,
} from "./masked/dream.ts";
export { type GenerationStep, tokensWithoutText } from "./masked/generation.ts";
export { lladaGenerate, lladaSteps, loadLlada, type Remasking, REMASKINGS } from "./masked/llada.ts";
export { loadLladaMoe } from "./masked/llada_moe.ts";
export { loadSdar, sdarGenerate, sdarSteps } from "./masked/sdar.ts";
export { answerLength, drawPuzzle, isPuzzleVocabulary, PUZZLE_TOKENS } from "./masked/puzzle_form.ts";
export type { MaskedTransformer, SequenceBatch } from "./masked/transformer.ts";
export { imageNoise, RandomStream } from "./random.ts";
export {
  checkGradients,
  type HeldMatrix,
  type ModelRequirements,
  modelRequirements,
  requirementsAt,
  runLimits,
} from "./requirements.ts";
export { storedTimeParameters } from "./stored_time_parameters.ts";
export { readTokenizerFiles } from "./tokenizer/files.ts";
export {
  type ChatMessage,
  loadTokenizer,
  openTokenizer,
  specialTokens,
  type Tokenizer,
} from "./tokenizer/mod.ts";
