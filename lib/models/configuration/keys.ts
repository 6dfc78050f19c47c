/**
 * The tables of every key that a model's JSON files may have, and what becomes of each; docs/models.md shows
 * them. A line is `keys | treatment | meaning or reason`, where the treatment is
 *
 * - `honoured`: read;
 * - `ignored`: without effect on what is computed, for the reason given;
 * - `only VALUE …`, `each VALUE …` (of a list), `like KEY`, `refused`: another value than these is refused,
 *   or, in generation_config.json, named as not honoured. Absent and `null` always are allowed.
 */
import type { ConfigFields } from "../model_config.ts";

/** A line of a table. */
export interface KeyRow {
  readonly keys: readonly string[];
  readonly treatment: string;
  readonly note: string;
}

const rows = (table: string): KeyRow[] =>
  table.trim().split("\n").map((line) => {
    const [keys, treatment, note] = line.split(" | ") as [string, string, string];
    return { keys: keys.trim().split(" "), treatment, note };
  });

/** The tables, by the file and the families that have it. */
export const KEY_TABLES = {
  "Dream: config.json": rows(`
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads | honoured | sizes
    num_key_value_heads head_dim | honoured | default: as many as heads; width / heads
    max_position_embeddings rms_norm_eps | honoured | most tokens of a sequence, default 32768; default 1e-6
    tie_word_embeddings | honoured | the head is the embedding; default false
    attention_bias | honoured | biases of query, key and value; default true
    hidden_act | only "silu" "swish" | the activation that is run
    layer_norm_eps layer_norm_epsilon norm_eps | like rms_norm_eps | other names
    qk_norm use_qk_norm qk_layernorm use_qk_layernorm mlp_bias | only false | no such part`),
  "LLaDA: config.json": rows(`
    d_model n_heads n_layers max_sequence_length | honoured | sizes
    vocab_size embedding_size | honoured | rows of the embedding: the second where it is given
    mlp_hidden_size mlp_ratio | honoured | width inside the feed-forward, or its multiple of d_model; default 4
    n_kv_heads multi_query_attention | honoured | heads of keys and values: a number; or one, where that is true
    head_dim | honoured | must be d_model / n_heads
    rms_norm_eps | honoured | default 1e-5
    include_bias include_qkv_bias | honoured | biases of all linear layers; of query, key and value
    weight_tying | honoured | the head is the embedding
    tie_word_embeddings | ignored | LLaDA's class goes by weight_tying
    scale_logits input_emb_norm | honoured | logits / √d_model; embeddings · √d_model
    block_type | only "llama" | the block that is run
    layer_norm_type | only "rms" | the norm that is run
    activation_type | only "silu" "swiglu" | the activation that is run
    hidden_act | only "silu" "swish" | the activation that is run
    rope layer_norm_with_affine | only true | always so
    alibi attention_layer_norm bias_for_layer_norm attention_bias norm_after | only false | no such part
    block_group_size | only 1 | blocks stand alone
    layer_norm_eps | like rms_norm_eps | another name
    hidden_size | like d_model | another name
    num_attention_heads | like n_heads | another name
    num_hidden_layers | like n_layers | another name
    alibi_bias_max attention_layer_norm_with_affine | ignored | of parts that are refused
    qk_norm use_qk_norm qk_layernorm use_qk_layernorm mlp_bias | only false | no such part`),
  "LLaDA-MoE: config.json": rows(`
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads | honoured | sizes
    expert_intermediate_size shared_expert_intermediate_size dense_intermediate_size | honoured | widths inside experts, the one of every token (none: no such), and feed-forwards
    num_experts num_experts_per_tok | honoured | experts, and those that a token goes through
    moe_layer_freq | honoured | a 1 for each block with experts, a 0 for others; default all 1
    moe_router_enable_expert_bias | honoured | the experts' weights get mlp.expert_bias added; default false
    moe_router_score_function | only "softmax" | the router that is run
    qk_layernorm | honoured | norms of each head's queries and keys; default false
    head_dim | honoured | must be hidden_size / num_attention_heads
    max_position_embeddings rms_norm_eps | honoured | most tokens of a sequence, default 4096; default 1e-5
    tie_word_embeddings attention_bias | honoured | the head is the embedding; biases of attention; default false
    norm_topk_prob | ignored | LLaDA-MoE's class never divides the weights of a token's experts by their sum
    routed_scaling_factor | only 1 | no such factor
    router_num_group router_topk_group | ignored | its class has no groups of experts
    output_router_logits | ignored | the logits are the same
    hidden_act | only "silu" "swish" | the activation that is run
    qk_norm use_qk_norm use_qk_layernorm mlp_bias | only false | no such part`),
  "SDAR: config.json": rows(`
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads | honoured | sizes
    num_key_value_heads head_dim | honoured | default: as many as heads; 128
    max_position_embeddings rms_norm_eps | honoured | most tokens of a sequence, default 32768; default 1e-6
    block_size | honoured | tokens of a block, default 4
    tie_word_embeddings attention_bias | honoured | the head is the embedding; biases of attention; default false
    hidden_act | only "silu" "swish" | the activation that is run
    debug fuse_cross_entropy ep_size micro_forward skip_checkpoint | ignored | of training
    layer_norm_eps layer_norm_epsilon norm_eps | like rms_norm_eps | other names
    mlp_bias | only false | no such part
    qk_norm use_qk_norm qk_layernorm use_qk_layernorm | only true | always so`),
  "Language models: config.json": rows(`
    mask_token_id pad_token_id bos_token_id eos_token_id | honoured | a number or a list, -1 is none; generation_config.json wins
    rope_theta rope_scaling rope_parameters | honoured | base of the rotary positions; scaled ones and contradictions are refused
    partial_rotary_factor rotary_pct rotary_percentage | only 1 | positions rotate whole heads
    rotary_emb_base rope_base rotary_base | like rope_theta | other names
    use_mrope rope_interleaved | only false | a token has one position, halves of a head rotate
    position_embedding_type position_encoding | only "rope" "rotary" | the positions that are run
    use_sliding_window | only false | attention sees every token
    sliding_window max_window_layers | ignored | without effect unless use_sliding_window, which is refused
    layer_types | each "full_attention" | attention sees every token
    logit_scale logits_scaling attention_multiplier residual_multiplier embedding_multiplier scale_emb | only 1 | no such factor
    final_logit_softcapping attn_logit_softcapping query_pre_attn_scalar clip_qkv | refused | logits and scores stay as they are`),
  "DiT: config.json": rows(`
    num_attention_heads attention_head_dim num_layers | honoured | default 16, 72, 28
    in_channels out_channels | honoured | default 4, and as many; twice as many learn the variance
    sample_size patch_size num_embeds_ada_norm | honoured | default 32, 2; classes, default 1000
    norm_eps | honoured | of the norm before the feed-forward; default 1e-5
    attention_bias norm_elementwise_affine | honoured | default true, false
    norm_type | only "ada_norm_zero" | the norm that is run
    activation_fn | only "gelu-approximate" | the activation that is run
    attention_type | only "default" | the attention that is run
    interpolation_scale | only 1 | positions are not stretched
    use_linear_projection only_cross_attention double_self_attention use_additional_conditions | only false | of the older class
    positional_embeddings pos_embed_type | refused | positions are added once, as sines and cosines
    cross_attention_dim num_vector_embeds caption_channels encoder_hid_dim | refused | of the older class, which has other inputs
    norm_num_groups | ignored | of inputs without patches`),
  "All models: config.json": rows(`
    model_type architectures _class_name | honoured | name the family
    attention_dropout hidden_dropout dropout embedding_dropout residual_dropout classifier_dropout | ignored | act in training only
    initializer_range init_std init_fn init_device init_cutoff_factor router_aux_loss_coef gradient_checkpointing | ignored | of training
    torch_dtype dtype precision quantization_config | ignored | the tensors' own types count
    use_cache pretraining_tp chunk_size_feed_forward | ignored | another way to the same
    flash_attention attn_implementation _attn_implementation rope_full_precision upcast_attention | ignored | all is computed in float32
    auto_map _name_or_path transformers_version _diffusers_version tokenizer_class task_specific_params | ignored | about the file
    text_config llm_config language_config | refused | sizes stand at the top: a model of more than text is not run
    output_attentions output_hidden_states return_dict torchscript is_encoder_decoder is_decoder id2label label2id | ignored | of other uses`),
  "Dream: generation_config.json": rows(`
    alg alg_temp eps | honoured | order in which masks are filled, its temperature, time of the last step
    top_p top_k | honoured | which tokens may be drawn; 0 is no limit for the second`),
  "LLaDA: generation_config.json": rows(`
    remasking block_length cfg_scale gen_length | honoured | as in LLaDA's generate
    top_p | only 1 | proposals are not limited`),
  "SDAR: generation_config.json": rows(`
    top_p top_k | honoured | which tokens may be drawn; 0 is no limit for the second
    remasking_strategy | only "low_confidence_static" "low_confidence_dynamic" | the most probable proposals are kept: as many at each step; or all that are surer than a threshold
    confidence_threshold | honoured | of low_confidence_dynamic; default 0.85
    block_length | ignored | config.json's block_size is what attention goes by`),
  "Language models: generation_config.json": rows(`
    mask_token_id pad_token_id bos_token_id eos_token_id | honoured | win over config.json's
    steps temperature do_sample | honoured | the temperature says whether tokens are drawn: the third must agree
    max_new_tokens max_length | honoured | tokens to write, or of prompt and text; 20, transformers' default, is no wish for the second
    num_beams num_return_sequences repetition_penalty length_penalty typical_p | only 1 | not honoured
    transformers_version _from_model_config use_cache cache_implementation trust_remote_code | ignored | no setting
    return_dict_in_generate output_history output_scores output_attentions output_hidden_states | ignored | the text is the same`),
  "DiT: scheduler_config.json": rows(`
    _class_name | honoured | DDIMScheduler or DDPMScheduler; solvers of the same noise where --sampler is given
    num_train_timesteps beta_schedule beta_start beta_end trained_betas | honoured | the noise of each timestep
    timestep_spacing steps_offset set_alpha_to_one _diffusers_version | honoured | the timesteps of a drawing
    prediction_type variance_type clip_sample clip_sample_range | honoured | the step
    thresholding rescale_betas_zero_snr use_flow_sigmas | only false | not run
    dynamic_thresholding_ratio sample_max_value | ignored | of thresholding`),
} as const;

const joined = (...names: (keyof typeof KEY_TABLES)[]): KeyRow[] => names.flatMap((name) => KEY_TABLES[name]);
const MASKED = ["Language models: config.json", "All models: config.json"] as const;
const GENERATION = "Language models: generation_config.json";

/** Every key of a file, by family. */
export const DREAM_KEYS = joined("Dream: config.json", ...MASKED);
export const LLADA_KEYS = joined("LLaDA: config.json", ...MASKED);
export const LLADA_MOE_KEYS = joined("LLaDA-MoE: config.json", ...MASKED);
export const SDAR_KEYS = joined("SDAR: config.json", ...MASKED);
export const DIT_KEYS = joined("DiT: config.json", "All models: config.json");
export const GENERATION_KEYS = {
  dream: joined("Dream: generation_config.json", GENERATION),
  llada: joined("LLaDA: generation_config.json", GENERATION),
  llada_moe: joined("LLaDA: generation_config.json", GENERATION),
  sdar: joined("SDAR: generation_config.json", GENERATION),
};
export const SCHEDULER_KEYS = joined("DiT: scheduler_config.json");

/**
 * Names of keys that stand in no table and may change what a model computes: they are refused unless they are
 * off.
 */
const SUSPECT =
  /(?:^|_)rope|rotary|alibi|ntk|yarn|logn_|xpos|sliding|(?:attn|attention|local)_window|window_size|softcap|multiplier|scal(?:e|ing|ar)$|_scale_|^scale_|qk?_(?:layer)?_?norm|expert|moe_|router|causal|interleav|att\w*_sink|^mup|bias$|norm_(?:type|after|first)|parallel_|residual_connection/;
const OF_TRAINING = /loss|grad|init|train/;

const isNeutral = (key: string, value: unknown): boolean =>
  value === null || value === false || value === "" || value === 0 ||
  (value === 1 && /multiplier|scal/.test(key)) ||
  (typeof value === "object" && Object.keys(value).length === 0);

function isAllowed(treatment: string, value: unknown, { fields }: ConfigFields): boolean {
  const [verb, ...values] = treatment.split(" ");
  const isListed = (each: unknown) => values.includes(JSON.stringify(each));
  if (verb === "only") return isListed(value);
  if (verb === "each") return Array.isArray(value) && value.every(isListed);
  if (verb === "like") return value === fields[values[0]!];
  return verb !== "refused";
}

/** Keys that are there with a value that is not allowed, and their rows. */
const excluded = (fields: ConfigFields, table: readonly KeyRow[]) =>
  table.flatMap((row) =>
    row.keys.filter((key) => fields.has(key) && !isAllowed(row.treatment, fields.fields[key], fields))
      .map((key) => ({ key, row }))
  );

/**
 * Refuses what a configuration asks for and this project does not run.
 *
 * @throws {CheckpointError} naming the key, its value and the values that are allowed
 */
export function checkKeys(fields: ConfigFields, table: readonly KeyRow[]): void {
  const [first] = excluded(fields, table);
  if (first !== undefined) {
    const { treatment, note } = first.row;
    throw fields.fault(first.key, `absent${treatment === "refused" ? "" : ` or ${treatment}`} (${note})`);
  }
  for (const key of unknownKeys(fields, table)) {
    if (!SUSPECT.test(key) || OF_TRAINING.test(key) || isNeutral(key, fields.fields[key])) continue;
    throw fields.fault(
      key,
      "absent: it may change what the model computes and is not known here (null, if it does not)",
    );
  }
}

/** Keys with a value that asks for something and is not honoured. */
export function unheededKeys(fields: ConfigFields, table: readonly KeyRow[]): string[] {
  return [
    ...excluded(fields, table).map(({ key }) => key),
    ...unknownKeys(fields, table).filter((key) => !isNeutral(key, fields.fields[key])),
  ];
}

/** Keys that stand in no row, in the order of the file. */
export function unknownKeys({ fields }: ConfigFields, table: readonly KeyRow[]): string[] {
  const known = new Set(table.flatMap(({ keys }) => keys));
  return Object.keys(fields).filter((key) => !known.has(key));
}
