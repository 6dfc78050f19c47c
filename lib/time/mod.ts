/** Time: the denoising axis, its groups, calibration statistics by group, and time parameters. */
export {
  type ActivationBits,
  type ActivationGrid,
  activationGrid,
  ActivationHistogram,
  fakeQuantize,
  fakeQuantizePerToken,
  type HistogramState,
  RANGE_METHODS,
  type RangeMethod,
} from "./activation_range.ts";
export { maskRatioAxis, MAX_TIME_BINS, type TimeAxis, timestepAxis } from "./axis.ts";
export {
  type CalibrationRun,
  CalibrationStatistics,
  type InputStatistics,
  type LayerInput,
  type LayerPlace,
  type LoadMoments,
  MAX_CALIBRATION_RUNS,
  MAX_STATISTICS_BYTES,
  MODEL_SAMPLES,
  type ObservedSamples,
  type SecondMoments,
  statisticsBytes,
  type StatisticsModel,
  type StatisticsOptions,
} from "./calibration.ts";
export {
  isCalibrationStatistics,
  readCalibrationStatistics,
  type StatisticsExpectation,
  writeCalibrationStatistics,
} from "./calibration_file.ts";
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
