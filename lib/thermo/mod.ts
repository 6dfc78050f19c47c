/** The three phases' parts: transitions and their step KL, validation, smoothing, losses, solvers and the optimizer. */
export { solveBlockTridiagonal, solveGaussMarkov, type TimeQuadratics } from "./gauss_markov.ts";
export {
  type AnnealedGroup,
  type AnnealedLoss,
  annealedLoss,
  type LossTerm,
  markovLoss,
  quantizationLoss,
  type TotalLoss,
  totalLoss,
} from "./losses.ts";
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
  type OptimizationProblem,
  type OptimizationReport,
  optimize,
  type OptimizerOptions,
  type Parameters,
  projectedGradientStep,
} from "./optimizer.ts";
export {
  blendTable,
  blendWeight,
  type GuardReport,
  type HeldOutErrors,
  type Interpolation,
  INTERPOLATIONS,
  keepWhereErrorDoesNotRise,
  smoothActivation,
  smoothAt,
  type SmoothingOptions,
  type SmoothSeries,
  validateSmooth,
} from "./smoother.ts";
export {
  type BetaScheduleName,
  type CappedWeights,
  capWeights,
  ddimDisplacementWeight,
  gaussianKl,
  type GaussianTransition,
  gaussianTransition,
  learnedVariance,
  learnedVarianceWeight,
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
  validateLayers,
  validateMarkov,
  type ValidationReport,
  type Violation,
} from "./validator.ts";
export {
  correctOutputs,
  smoothActivationParameters,
  smoothTimeParameters,
  type WeightedMoments,
} from "./time_parameters.ts";
export {
  correctedDeviation,
  correctPredictions,
  PredictionRegression,
  type SamplerCorrection,
} from "./sampler_correction.ts";
