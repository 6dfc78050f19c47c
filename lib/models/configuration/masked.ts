/** Sizes, constants and special tokens of masked diffusion language models, out of their two files. */
import type { MaskedTransformerConfig } from "../masked/config.ts";
import { type ConfigFields, MAX_BLOCKS } from "../model_config.ts";
import { rotaryTheta } from "./rope.ts";

/** Most positions, the header's `AQ_MAX_POSITION`: a kernel turns no token that is further on. */
const MAX_POSITIONS = 2 ** 20;

/**
 * The special tokens. As in transformers, generation_config.json wins over config.json where it has them; of
 * a list the first is the one that is written, and every end token ends a text.
 */
function specialTokens(fields: ConfigFields, vocabularySize: number, usualMask?: number) {
  const generation = fields.beside("generation_config.json");
  const tokens = (key: string) =>
    (generation?.has(key) === true ? generation : fields).tokens(key, vocabularySize);
  const usual = usualMask !== undefined && usualMask < vocabularySize ? usualMask : undefined;
  const [maskToken = usual] = tokens("mask_token_id");
  if (maskToken === undefined) throw fields.fault("mask_token_id", `a token from 0 to ${vocabularySize - 1}`);
  const eosTokens = tokens("eos_token_id");
  return {
    maskToken,
    padToken: tokens("pad_token_id")[0],
    bosToken: tokens("bos_token_id")[0],
    eosToken: eosTokens[0],
    eosTokens,
  };
}

/** Blocks without what LLaDA-MoE and SDAR add. */
const PLAIN_BLOCKS = { queryKeyNorm: false, attentionBlock: 0, mixture: undefined } as const;

/** Dream's configuration, with the defaults of its class. */
export function dreamConfig(fields: ConfigFields): MaskedTransformerConfig {
  return {
    ...qwenConfig(fields),
    intermediateSize: fields.count("intermediate_size"),
    logitShift: 1,
    ...PLAIN_BLOCKS,
  };
}

/** SDAR's configuration: Qwen3's, with blocks. */
export function sdarConfig(fields: ConfigFields): MaskedTransformerConfig {
  const attentionBlock = fields.count("block_size", 4), config = qwenConfig(fields, 128, 151_669);
  return {
    ...config,
    intermediateSize: fields.count("intermediate_size"),
    logitShift: 0,
    queryKeyNorm: true,
    attentionBlock: Math.min(attentionBlock, config.maxTokens),
    mixture: undefined,
  };
}

/** Most experts of all blocks: published models have up to 16 thousand, each with tensors' names. */
const MAX_EXPERTS = 2 ** 16;

/** LLaDA-MoE's configuration. */
export function lladaMoeConfig(fields: ConfigFields): MaskedTransformerConfig {
  const hiddenSize = fields.count("hidden_size"), heads = fields.count("num_attention_heads");
  const config = { ...qwenConfig(fields, undefined, 156_895, 1e-5), maxTokens: maxTokens(fields, 4096) };
  if (config.headSize !== hiddenSize / heads) {
    throw fields.fault("head_dim", `${hiddenSize / heads} or absent`);
  }
  const experts = fields.count("num_experts", undefined, 1, Math.floor(MAX_EXPERTS / config.blocks));
  const dense = denseBlocks(fields, config.blocks), hasDense = dense.length > 0;
  return {
    ...config,
    // a key that is there is read; blocks with experts alone may lack it
    intermediateSize: fields.count("dense_intermediate_size", hasDense ? undefined : 1, hasDense ? 1 : -1),
    logitShift: 0,
    queryKeyNorm: fields.flag("qk_layernorm", false),
    attentionBlock: 0,
    mixture: {
      experts,
      perToken: fields.count("num_experts_per_tok", undefined, 1, experts),
      expertSize: fields.count("expert_intermediate_size"),
      sharedSize: fields.optionalCount("shared_expert_intermediate_size", 0) ?? 0,
      hasBias: fields.flag("moe_router_enable_expert_bias", false),
      dense,
    },
  };
}

/** Blocks that have no experts: those with a 0 in moe_layer_freq. */
function denseBlocks(fields: ConfigFields, blocks: number): readonly number[] {
  const given = fields.has("moe_layer_freq") ? fields.fields["moe_layer_freq"] : Array(blocks).fill(1);
  const isList = Array.isArray(given) && given.length === blocks &&
    given.every((each) => each === 0 || each === 1);
  if (!isList) throw fields.fault("moe_layer_freq", `a list of ${blocks} numbers that are 0 or 1`);
  return given.flatMap((each, i) => each === 0 ? [i] : []);
}

const maxTokens = (fields: ConfigFields, usual: number): number =>
  Math.min(MAX_POSITIONS, fields.count("max_position_embeddings", usual));

/** What Dream, SDAR and LLaDA-MoE have of Qwen's configuration. */
function qwenConfig(
  fields: ConfigFields,
  usualHeadSize?: number,
  usualMask?: number,
  usualEpsilon = 1e-6,
): Omit<MaskedTransformerConfig, keyof typeof PLAIN_BLOCKS | "intermediateSize" | "logitShift"> {
  const vocabularySize = fields.count("vocab_size");
  const hiddenSize = fields.count("hidden_size");
  const heads = fields.count("num_attention_heads");
  const keyValueHeads = fields.count("num_key_value_heads", heads);
  if (heads % keyValueHeads !== 0) {
    throw fields.fault("num_key_value_heads", `a divisor of ${heads} heads`, keyValueHeads);
  }
  if (!fields.has("head_dim") && usualHeadSize === undefined && hiddenSize % heads !== 0) {
    throw fields.fault("hidden_size", `a multiple of ${heads} heads`, hiddenSize);
  }
  const headSize = fields.count("head_dim", usualHeadSize ?? hiddenSize / heads);
  if (headSize % 2 !== 0) {
    const key = fields.has("head_dim") ? "head_dim" : "hidden_size";
    throw fields.fault(key, `such that a head's size is even, for rotary positions`);
  }
  return {
    vocabularySize,
    hiddenSize,
    blocks: fields.count("num_hidden_layers", undefined, 1, MAX_BLOCKS),
    heads,
    keyValueHeads,
    headSize,
    maxTokens: maxTokens(fields, 32_768),
    normEpsilon: fields.positive("rms_norm_eps", usualEpsilon),
    rotaryTheta: rotaryTheta(fields),
    tiesHead: fields.flag("tie_word_embeddings", false),
    logitScale: 1,
    embeddingScale: 1,
    ...specialTokens(fields, vocabularySize, usualMask),
  };
}

/** LLaDA's configuration. */
export function lladaConfig(fields: ConfigFields): MaskedTransformerConfig {
  const named = fields.count("vocab_size"), vocabularySize = fields.count("embedding_size", named, named);
  const hiddenSize = fields.count("d_model"), heads = fields.count("n_heads");
  const sharesKeys = fields.flag("multi_query_attention", false);
  const keyValueHeads = fields.count("n_kv_heads", sharesKeys ? 1 : heads);
  if (heads % keyValueHeads !== 0) {
    throw fields.fault("n_kv_heads", `a divisor of ${heads} heads`, keyValueHeads);
  }
  if (fields.has("multi_query_attention") && keyValueHeads !== (sharesKeys ? 1 : heads)) {
    throw fields.fault("multi_query_attention", `null beside n_kv_heads ${keyValueHeads}`);
  }
  if (hiddenSize % (2 * heads) !== 0) {
    throw fields.fault("d_model", `a multiple of 2 · ${heads} heads, for rotary positions`, hiddenSize);
  }
  const headSize = fields.count("head_dim", hiddenSize / heads);
  if (headSize !== hiddenSize / heads) throw fields.fault("head_dim", `${hiddenSize / heads} or absent`);
  const intermediateSize = fields.optionalCount("mlp_hidden_size", 1) ??
    fields.positive("mlp_ratio", 4) * hiddenSize;
  if (!Number.isInteger(intermediateSize)) {
    throw fields.fault("mlp_ratio", `a number whose product with ${hiddenSize} is whole`);
  }
  return {
    vocabularySize,
    hiddenSize,
    intermediateSize,
    blocks: fields.count("n_layers", undefined, 1, MAX_BLOCKS),
    heads,
    keyValueHeads,
    headSize,
    maxTokens: Math.min(MAX_POSITIONS, fields.count("max_sequence_length")),
    normEpsilon: fields.positive("rms_norm_eps", 1e-5),
    rotaryTheta: rotaryTheta(fields),
    logitShift: 0,
    tiesHead: fields.flag("weight_tying", false),
    logitScale: fields.flag("scale_logits", false) ? 1 / Math.sqrt(hiddenSize) : 1,
    embeddingScale: fields.flag("input_emb_norm", false) ? Math.sqrt(hiddenSize) : 1,
    ...PLAIN_BLOCKS,
    ...specialTokens(fields, vocabularySize),
  };
}
