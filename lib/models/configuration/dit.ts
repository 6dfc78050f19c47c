/** Sizes of a DiT out of config.json. */
import type { DitConfig } from "../dit/config.ts";
import { type ConfigFields, MAX_BLOCKS } from "../model_config.ts";

/** Most numbers of the table of positions, 1 GiB: no tensor's size limits the images. */
const MAX_POSITION_ELEMENTS = 2 ** 28;

/**
 * DiT's sizes out of config.json.
 *
 * @throws {CheckpointError} naming the key that is missing, wrong or not supported
 */
export function ditConfig(fields: ConfigFields): DitConfig {
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
