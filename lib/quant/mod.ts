/** Quantizing and dequantizing matrices, the packed layout, and the error of a packed matrix. */
export {
  BIT_WIDTHS,
  type BitWidth,
  CODED_SCALE_BITS,
  defaultTwoLevelGroupSize,
  GROUP_SIZES,
  groupCount,
  type GroupSize,
  matrixSizes,
  MAX_ROW_WEIGHTS,
  OFFSET_BITS,
  type OneLevelTensor,
  type PackedForm,
  packedRows,
  type PackedTensor,
  packedWords,
  SCALE_BITS,
  type ScaleBits,
  TWO_LEVEL_GROUP_SIZES,
  type TwoLevelScales,
  type TwoLevelTensor,
  type WeightFormat,
  ZERO_POINT_KINDS,
  type ZeroPointKind,
} from "./packed/layout.ts";
export { packCodes, unpackCodes } from "./codes.ts";
export { convertFloats, findNonfinite } from "./convert.ts";
export { dequantize } from "./dequantize.ts";
export {
  addStatistics,
  cosine,
  type ErrorStatistics,
  errorStatistics,
  NO_STATISTICS,
  packedErrorStatistics,
  relativeRmsError,
} from "./error_statistics.ts";
export { packedBytes } from "./packed/entries.ts";
export { type PackedLayer, packedLayers, readPackedTensor } from "./packed/checkpoint.ts";
export { fitTwoLevel, type GroupAffine, groupAffine, type TwoLevelShape } from "./packed/two_level.ts";
export { quantize, type QuantizeOptions, WEIGHT_SOLVERS, type WeightSolver } from "./quantize.ts";
export { correctedTarget, type FactoredMoment, factorMoments } from "./solvers/factored_moment.ts";
export { accumulateMoment, emptyMoments, type InputMoments, MAX_MOMENT_COLS } from "./solvers/moments.ts";
export type { LayerProblem } from "./solvers/problem.ts";
export { DEFAULT_SOLVER_SETTINGS, type Solution, type SolverSettings } from "./solvers/settings.ts";
export { LAYER_SOLVERS, solveLayer } from "./solvers/solve_layer.ts";
export { quantizeByWeights } from "./solvers/trellis.ts";
export type { Weights } from "./weights.ts";
