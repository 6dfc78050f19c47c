/** Rivals of our solvers, and ours, measured by the same code: methods for single matrices, and what makes models of them. */
export { choleskyFactor, choleskyInverse } from "./cholesky.ts";
export { type Contender, methodContender, pipelineContender, type Target } from "./contender.ts";
export { ggmlContenders, gridContenders } from "./contenders.ts";
export { GGML_FORMATS, type GgmlFormat, ggmlMethod } from "./ggml_method.ts";
export { feedbackErrors, feedbackFactor, gptq, minMaxGrid } from "./gptq.ts";
export { fitHqq, hqq } from "./hqq.ts";
export { type Calibration, calibrationOf, collectInputs } from "./inputs.ts";
export type { LayerInputs, Method, MethodKind, MethodResult, Unsupported } from "./method.ts";
export { ours } from "./ours.ts";
export { type Layer, quantizedLayers, type QuantizedModel, quantizeModel } from "./quantized_model.ts";
export { ReplacedCheckpoint } from "./replaced_checkpoint.ts";
export { type Measurement, type Yardstick, yardstickOf } from "./yardstick.ts";
