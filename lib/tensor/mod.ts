/**
 * Tensors and checkpoints: element types, safetensors files in and out, sharded checkpoints. What a tensor
 * means to a model, and any arithmetic on its elements, is elsewhere.
 */
export { BYTES_PER_ELEMENT, type Dtype, DTYPES, type FloatDtype, isDtype, isFloatDtype } from "./dtype.ts";
export {
  elementCount,
  MAX_HEADER_BYTES,
  MAX_NAME_LENGTH,
  MAX_TENSORS,
  SafetensorsFile,
  type TensorFile,
  type TensorInfo,
  type TensorSpec,
} from "./safetensors.ts";
export {
  PARTIAL_SUFFIX,
  type ResumeOptions,
  SafetensorsWriter,
  type WriterOptions,
} from "./safetensors_writer.ts";
export {
  Checkpoint,
  type CheckpointFile,
  type CheckpointTensor,
  type ModelKind,
  modelKind,
  openCheckpoint,
  refuseForeign,
} from "./checkpoint.ts";
export { type GgufFacts, GgufFile } from "./gguf/file.ts";
export { namesOfGguf } from "./gguf/language.ts";
export { listing, type PlaceOptions, SIDECAR_FILE } from "./place.ts";
export { CONFIG_KEY, SECTION_KEY } from "./recognition.ts";
export { valuesOf } from "./scaled_fp8.ts";
