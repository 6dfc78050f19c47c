/** Quantizing and dequantizing matrices, the packed layout, and what quantizing cost. */
export {
  BIT_WIDTHS,
  type BitWidth,
  defaultTwoLevelGroupSize,
  GROUP_SIZES,
  groupCount,
  type GroupSize,
  type LowRank,
  type OneLevelTensor,
  packedBytes,
  packedRows,
  type PackedTensor,
  packedWords,
  SCALE_BITS,
  type ScaleBits,
  TWO_LEVEL_GROUP_SIZES,
  type TwoLevelScales,
  type TwoLevelTensor,
  ZERO_POINT_KINDS,
  type ZeroPointKind,
} from "./packed/layout.ts";
export {
  addStatistics,
  convertFloats,
  cosine,
  dequantize,
  type ErrorStatistics,
  errorStatistics,
  findNonfinite,
  packCodes,
  packedErrorStatistics,
  quantize,
  type QuantizeOptions,
  relativeRmsError,
  unpackCodes,
  WEIGHT_SOLVERS,
  type Weights,
  type WeightSolver,
} from "./kernels.ts";
export { rotateRows, type Rotation, rotationBlock } from "./packed/rotation.ts";
export { fitLowRank, solveLowRankLayer } from "./solvers/low_rank_fit.ts";
export { type PackedLayer, packedLayers, readPackedTensor } from "./packed/checkpoint.ts";
export { fitTwoLevel, type GroupAffine, groupAffine, type TwoLevelShape } from "./packed/two_level.ts";
export { accumulateMoment, emptyMoments, type InputMoments, MAX_MOMENT_COLS } from "./solvers/moments.ts";
export {
  CALIBRATED_SOLVERS,
  correctedTarget,
  DEFAULT_SOLVER_SETTINGS,
  type FactoredMoment,
  factorMoments,
  type GridOptions,
  type Solution,
  solveLayer,
  type Solver,
  SOLVERS,
  type SolverSettings,
} from "./solvers/solve_layer.ts";
