/** Sizes of a DiT, and the cost of one of its forward passes. */
import type { ForwardCost, ForwardShape, GradientCost } from "../family.ts";

/** Inputs of the timestep's embedding: diffusers fixes it. */
export const TIMESTEP_CHANNELS = 256;
/** Epsilon of the norms before attention and output; that before the feed-forward is configured. */
export const NORM_EPSILON = 1e-6;

/** Sizes and constants of a DiT. */
export interface DitConfig {
  /** Height and width of the input, in pixels (or latents). */
  readonly sampleSize: number;
  readonly patchSize: number;
  readonly channels: number;
  /** `channels`, or twice as many where the variance is learned. */
  readonly outputChannels: number;
  readonly learnsVariance: boolean;
  readonly blocks: number;
  readonly heads: number;
  readonly headSize: number;
  readonly hiddenSize: number;
  /** Label `classes` stands for no class, for guidance. */
  readonly classes: number;
  /** Epsilon of the norm in front of the feed-forward. */
  readonly normEpsilon: number;
  readonly attentionBias: boolean;
  readonly normHasWeights: boolean;
}

/** Memory of a step of gradients: what each block keeps, and its gradients on the way back. */
export function ditGradientCost(config: DitConfig, { batch }: ForwardShape): GradientCost {
  const { hiddenSize: width, sampleSize, patchSize, blocks } = config;
  const count = batch * (sampleSize / patchSize) ** 2;
  const kept = 19 * count * width + 10 * batch * width, inputs = (blocks + 1) * count * width;
  const others = inputs + 32 * count * width + 24 * batch * width + 14 * width ** 2;
  return { scratchBytes: 4 * (blocks * kept + others), recomputedBytes: 4 * (kept + others) };
}

/** Cost of a forward pass: the model's `scratchBytes` behind it, and its products. */
export function ditForwardCost(config: DitConfig, { batch }: ForwardShape): ForwardCost {
  const { hiddenSize: width, sampleSize, patchSize, channels, outputChannels, blocks } = config;
  const tokens = (sampleSize / patchSize) ** 2, count = batch * tokens;
  const patch = patchSize ** 2 * channels, pixels = patchSize ** 2 * outputChannels;
  const floats = count * patch + 10 * count * width + // patches; hidden, normed, delta, query, key, value, inner (4)
    batch * (TIMESTEP_CHANNELS + 8 * width) + // waves, condition, conditionInner, modulation
    count * pixels + batch * outputChannels * sampleSize ** 2 + tokens * width; // pixels, output, positions
  const condition = batch * width * (TIMESTEP_CHANNELS + width);
  const block = condition + 6 * batch * width ** 2 + 12 * count * width ** 2 + 2 * count * tokens * width;
  return {
    activationBytes: 4 * floats,
    multiplyAdds: count * patch * width + blocks * block + condition + 2 * batch * width ** 2 +
      count * width * pixels,
  };
}
