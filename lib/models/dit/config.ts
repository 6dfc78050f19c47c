/** Sizes of a DiT out of config.json, and the cost of one of its forward passes. */
import type { ForwardCost, ForwardShape } from "../family.ts";
import { type ConfigFields, MAX_BLOCKS } from "../model_config.ts";

/** Inputs of the timestep's embedding: diffusers fixes it. */
export const TIMESTEP_CHANNELS = 256;
/** Epsilon of the norms before attention and output; that before the feed-forward is configured. */
export const NORM_EPSILON = 1e-6;

/** Most numbers of the table of positions, 1 GiB: no tensor's size limits the images. */
const MAX_POSITION_ELEMENTS = 2 ** 28;

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

/** DiT's sizes out of config.json. @throws {CheckpointError} naming the key that is missing or wrong */
export function ditConfig(fields: ConfigFields): DitConfig {
  fields.choice("norm_type", ["ada_norm_zero"], "ada_norm_zero");
  fields.choice("activation_fn", ["gelu-approximate"], "gelu-approximate");
  // Of the older class Transformer2DModel, which has other inputs too.
  fields.refuse("cross_attention_dim");
  fields.refuse("num_vector_embeds");
  fields.refuse("use_linear_projection", false);
  fields.refuse("only_cross_attention", false);
  fields.refuse("double_self_attention", false);
  fields.refuse("caption_channels");
  const heads = fields.count("num_attention_heads", 16), headSize = fields.count("attention_head_dim", 72);
  const patchSize = fields.count("patch_size", 2), sampleSize = fields.count("sample_size", 32);
  const channels = fields.count("in_channels", 4), outputChannels = fields.count("out_channels", channels);
  if (sampleSize % patchSize !== 0) {
    throw fields.fault("sample_size", `a multiple of the patch size ${patchSize}`, sampleSize);
  }
  if (outputChannels !== channels && outputChannels !== 2 * channels) {
    throw fields.fault(
      "out_channels",
      `${channels} or, with a learned variance, ${2 * channels}`,
      outputChannels,
    );
  }
  const hiddenSize = heads * headSize;
  if (hiddenSize % 4 !== 0) {
    throw fields.fault(
      "attention_head_dim",
      `such that ${heads} heads make a width divisible by 4`,
      headSize,
    );
  }
  const most = Math.floor(Math.sqrt(MAX_POSITION_ELEMENTS / hiddenSize)) * patchSize;
  if (sampleSize > most) {
    throw fields.fault(
      "sample_size",
      `at most ${most} with patches of ${patchSize} and this width`,
      sampleSize,
    );
  }
  return {
    sampleSize,
    patchSize,
    channels,
    outputChannels,
    learnsVariance: outputChannels === 2 * channels,
    blocks: fields.count("num_layers", 28, 1, MAX_BLOCKS),
    heads,
    headSize,
    hiddenSize,
    classes: fields.count("num_embeds_ada_norm", 1000),
    normEpsilon: fields.positive("norm_eps", 1e-5),
    attentionBias: fields.flag("attention_bias", true),
    normHasWeights: fields.flag("norm_elementwise_affine", false),
  };
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
