/** Gradients of packed models by scales, zero points and biases, and the refinement that follows them. */
export { MaskedTransformerGradients } from "./masked_transformer.ts";
export {
  type DitBatch,
  type MaskedBatch,
  refineDit,
  refineMaskedTransformer,
  type RefinementOptions,
  type RefinementReport,
  timeBiasesOf,
} from "./refine.ts";
