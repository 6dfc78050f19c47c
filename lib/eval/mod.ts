/**
 * Measuring models: intervals, statistics, tasks of the reference models, distances to full precision,
 * forecasts of time and memory, and the machine that measures.
 */
export {
  type Classification,
  type GlyphClassifier,
  loadClassifier,
  loadFeatureStatistics,
} from "./classifier.ts";
export {
  type Environment,
  environmentOf,
  OtherLoad,
  peakResidentBytes,
  resetPeakResident,
} from "./environment.ts";
export {
  checkMemory,
  forecastMemory,
  forecastTime,
  type MemoryForecast,
  memoryText,
  type RunSizes,
  type TimeForecast,
  timeText,
} from "./forecast.ts";
export { type FeatureStatistics, featureStatistics, FrechetReference } from "./frechet.ts";
export {
  drawImages,
  type DrawnImages,
  type DrawOptions,
  type ImageScores,
  type LabelledImages,
  noisedImages,
  type NoisedImagesOptions,
  type NoisyImages,
  predictionErrors,
  predictionsAt,
  readImages,
  scoreImages,
  type StepDrift,
  type TimestepError,
  type TimestepErrorOptions,
  timestepErrors,
  trajectoryDrift,
} from "./images.ts";
export {
  bootstrapMean,
  type BootstrapOptions,
  bootstrapRatio,
  type Difference,
  type Interval,
  pairedDifference,
  stratifiedMean,
  wilsonInterval,
} from "./intervals.ts";
export { type LayerError, layerErrors } from "./layer_errors.ts";
export {
  byMaskRatio,
  compareMasked,
  type MaskedComparison,
  maskedDistances,
  maskedLogits,
  type MaskedSequence,
  type SequenceDistance,
  syntheticSequences,
} from "./masked.ts";
export {
  type MaskedPuzzle,
  maskedSequences,
  type Puzzle,
  puzzleCanvas,
  readPuzzles,
  scoreTasks,
  type SolvedPuzzle,
  type SolveOptions,
  solvePuzzles,
  type TaskScore,
} from "./puzzles.ts";
export { median, pairedRatio, squaredDistances, summarize, type Summary } from "./statistics.ts";
export { type Column, formatTable, type TableRow } from "./table.ts";
export {
  ImageYardstick,
  MaskedYardstick,
  type Measurement,
  type Missing,
  trajectoryStates,
  type Yardstick,
  yardstickOf,
  type YardstickOptions,
} from "./yardstick.ts";
