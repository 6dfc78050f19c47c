/** Quantizing and dequantizing matrices, the packed layout, and what quantizing cost. */
export {
  BIT_WIDTHS,
  type BitWidth,
  GROUP_SIZES,
  groupCount,
  type GroupSize,
  packedBytes,
  type PackedTensor,
  packedWords,
  ZERO_POINT_KINDS,
  type ZeroPointKind,
} from "./layout.ts";
export {
  addStatistics,
  convertFloats,
  cosine,
  dequantize,
  type ErrorStatistics,
  errorStatistics,
  findNonfinite,
  MAX_THREADS,
  packCodes,
  packedErrorStatistics,
  quantize,
  type QuantizeOptions,
  relativeRmsError,
  type Solver,
  SOLVERS,
  unpackCodes,
  type Weights,
} from "./kernels.ts";
export { type PackedLayer, packedLayers, readPackedTensor } from "./packed_checkpoint.ts";
