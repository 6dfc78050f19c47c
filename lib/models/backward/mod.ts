/** Gradients of packed models with respect to scales, zero points and biases, and the refinement that follows them. */
export { DitGradients } from "./dit.ts";
export type { GradientOptions, ParameterArray, RefinableLinear, RefinedParts } from "./linear.ts";
export { MaskedTransformerGradients } from "./masked_transformer.ts";
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
