/** Time: the denoising axis, its groups, calibration statistics by group, and time parameters. */
export {
  type ActivationBits,
  type ActivationGrid,
  activationGrid,
  ActivationHistogram,
  type HistogramState,
  RANGE_METHODS,
  type RangeMethod,
} from "./activation_range.ts";
export { maskRatioAxis, MAX_TIME_BINS, type TimeAxis, timestepAxis } from "./axis.ts";
export {
  type CalibrationRun,
  type InputStatistics,
  type LayerInput,
  type LoadMoments,
  MAX_CALIBRATION_RUNS,
  type SecondMoments,
  statisticsBytes,
} from "./calibration/contents.ts";
export {
  isCalibrationStatistics,
  readCalibrationStatistics,
  type StatisticsExpectation,
  writeCalibrationStatistics,
} from "./calibration/file.ts";
export { type LayerPlace, MODEL_SAMPLES, type StatisticsModel } from "./calibration/model.ts";
export {
  CalibrationStatistics,
  MAX_STATISTICS_BYTES,
  type ObservedSamples,
  type StatisticsOptions,
} from "./calibration/statistics.ts";
export {
  adaptiveTimeGroups,
  type BinStatistics,
  equalTimeGroups,
  MAX_OBSERVED_BINS,
  MAX_TIME_GROUPS,
  type TimeGroup,
  TimeGroups,
} from "./groups.ts";
export {
  type OutputCorrection,
  outputCorrection,
  type QuantizedMatrix,
  type TimeGroupMoments,
} from "./output_correction.ts";
export {
  type ActivationParameters,
  type LayerParameters,
  type OutputParameters,
  type SamplerParameters,
  type SelectedParameters,
  TimeParameters,
  type WeightScaleParameters,
} from "./parameters.ts";
export {
  modelFingerprint,
  readTimeParameters,
  type SidecarExpectation,
  writeTimeParameters,
} from "./sidecar.ts";
export { timeWeightScales } from "./weight_scales.ts";
