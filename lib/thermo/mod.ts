/** Parts of the three phases: transitions and step KL, validation, smoothing, losses, solvers, optimizer. */
export { solveBlockTridiagonal, solveGaussMarkov, type TimeQuadratics } from "./gauss_markov.ts";
export { entropyLoss, type GroupParameters, type LossHistory, type LossTerms, markovLoss } from "./losses.ts";
export { type CacheStatistics, LayerTimeCache } from "./lru_cache.ts";
export {
  likeliestTokens,
  tokenKl,
  type TokenKlOptions,
  unmaskProbability,
  unwrittenTokens,
  type Vocabulary,
} from "./masked_transition.ts";
export {
  type AdamArrays,
  adamStep,
  type OptimizationPlan,
  type OptimizationProblem,
  type OptimizationReport,
  optimize,
  type OptimizerOptions,
  type OptimizerState,
  type Parameters,
} from "./optimizer/mod.ts";
export {
  blendTable,
  blendWeight,
  type GuardReport,
  type HeldOutErrors,
  type Interpolation,
  INTERPOLATIONS,
  keepWhereErrorDoesNotRise,
  smoothActivation,
  type SmoothingOptions,
  type SmoothSeries,
  validateSmooth,
} from "./smoother.ts";
export {
  type BetaScheduleName,
  type CappedWeights,
  capWeights,
  ddimDisplacementWeight,
  type NoiseSchedule,
  noiseSchedule,
  type Prediction,
  stepKlWeight,
  type StepVariance,
  TransitionComputer,
  type TransitionOptions,
} from "./transition.ts";
export {
  type MarkovReport,
  markovReport,
  type ParameterSeries,
  type Severity,
  severityOf,
  validateMarkov,
  type Violation,
} from "./validator.ts";
export { correctOutputs, smoothActivationParameters, type WeightedMoments } from "./time_parameters.ts";
export {
  correctedDeviation,
  correctPredictions,
  PredictionRegression,
  type SamplerCorrection,
} from "./sampler_correction.ts";
