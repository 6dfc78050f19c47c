/** Sizes and constants of Dream and LLaDA out of config.json, with the special tokens of both its files. */
import type { MaskedTransformerConfig } from "../masked/config.ts";
import { type ConfigFields, MAX_BLOCKS } from "../model_config.ts";
import { rotaryTheta } from "./rope.ts";

/** Most positions, the header's `AQ_MAX_POSITION`: a kernel turns no token that is further on. */
const MAX_POSITIONS = 2 ** 20;

/**
 * The special tokens. As in transformers, generation_config.json wins over config.json where it has them; of
 * a list the first is the one that is written, and every end token ends a text.
 */
function specialTokens(fields: ConfigFields, vocabularySize: number) {
  const generation = fields.beside("generation_config.json");
  const tokens = (key: string) =>
    (generation?.has(key) === true ? generation : fields).tokens(key, vocabularySize);
  const [maskToken] = tokens("mask_token_id");
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

/** Dream's configuration, with the defaults of its class. */
export function dreamConfig(fields: ConfigFields): MaskedTransformerConfig {
  const vocabularySize = fields.count("vocab_size");
  const hiddenSize = fields.count("hidden_size");
  const heads = fields.count("num_attention_heads");
  const keyValueHeads = fields.count("num_key_value_heads", heads);
  if (heads % keyValueHeads !== 0) {
    throw fields.fault("num_key_value_heads", `a divisor of ${heads} heads`, keyValueHeads);
  }
  if (!fields.has("head_dim") && hiddenSize % heads !== 0) {
    throw fields.fault("hidden_size", `a multiple of ${heads} heads`, hiddenSize);
  }
  const headSize = fields.count("head_dim", hiddenSize / heads);
  if (headSize % 2 !== 0) {
    const key = fields.has("head_dim") ? "head_dim" : "hidden_size";
    throw fields.fault(key, `such that a head's size is even, for rotary positions`);
  }
  return {
    vocabularySize,
    hiddenSize,
    intermediateSize: fields.count("intermediate_size"),
    blocks: fields.count("num_hidden_layers", undefined, 1, MAX_BLOCKS),
    heads,
    keyValueHeads,
    headSize,
    maxTokens: Math.min(MAX_POSITIONS, fields.count("max_position_embeddings", 32_768)),
    normEpsilon: fields.positive("rms_norm_eps", 1e-6),
    rotaryTheta: rotaryTheta(fields),
    logitShift: 1,
    tiesHead: fields.flag("tie_word_embeddings", false),
    logitScale: 1,
    embeddingScale: 1,
    ...specialTokens(fields, vocabularySize),
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
    ...specialTokens(fields, vocabularySize),
  };
}
