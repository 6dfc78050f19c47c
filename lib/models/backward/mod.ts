/** Gradients of packed models with respect to scales, zero points and biases, and the refinement that follows them. */
export { DitGradients } from "./dit.ts";
export { BackwardOperations } from "./kernels.ts";
export { type ParameterArray, RefinableLinear, type RefinedParts } from "./linear.ts";
export { type GradientOptions, MaskedTransformerGradients } from "./masked_transformer.ts";
export {
  applyRefinement,
  type DitBatch,
  type MaskedBatch,
  refineDit,
  type RefinedLayer,
  refineMaskedTransformer,
  type RefinementOptions,
  type RefinementReport,
  timeBiasesOf,
} from "./refine.ts";
