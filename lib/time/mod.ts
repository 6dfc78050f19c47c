/** Time: the denoising axis, groups of it, and the parameters that the runtime selects by them. */
export {
  type ActivationBits,
  type ActivationGrid,
  activationGrid,
  ActivationHistogram,
  fakeQuantize,
  RANGE_METHODS,
  type RangeMethod,
} from "./activation_range.ts";
export { maskRatioAxis, MAX_TIME_BINS, type TimeAxis, timestepAxis } from "./axis.ts";
export {
  adaptiveTimeGroups,
  type BinStatistics,
  equalTimeGroups,
  MAX_OBSERVED_BINS,
  MAX_TIME_GROUPS,
  type TimeGroup,
  TimeGroups,
} from "./groups.ts";
export { type InputMoments, type OutputCorrection, outputCorrection } from "./output_correction.ts";
export {
  type ActivationParameters,
  type LayerParameters,
  type OutputParameters,
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
