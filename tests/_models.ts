/** Small checkpoints of every family with random weights, named, typed and configured as the published ones. */
import { gaussian, type TestTensor, writeCheckpoint } from "./_checkpoints.ts";

export type StoredDtype = "F32" | "F16" | "BF16" | "F64";

/** A random tensor around `mean`. */
export function randomTensor(
  shape: readonly number[],
  seed: number,
  dtype: StoredDtype,
  deviation: number,
  mean = 0,
): TestTensor {
  const values = gaussian(shape.reduce((product, size) => product * size, 1), seed, deviation).map((v) =>
    v + mean
  );
  const data = {
    F64: () => Float64Array.from(values),
    F32: () => values,
    F16: () => Float16Array.from(values),
    BF16: () => Uint16Array.from(new Uint32Array(values.buffer), (bits) => bits >>> 16),
  }[dtype]();
  return { dtype, shape, data };
}

type Tensors = Record<string, TestTensor>;

/** Fills tensors with seeds that follow one another. */
function builder(dtype: StoredDtype) {
  const tensors: Tensors = {};
  let seed = 1;
  const deviationOf = (cols: number) => 1 / Math.sqrt(cols);
  return {
    tensors,
    linear(name: string, rows: number, cols: number, bias = false) {
      tensors[`${name}.weight`] = randomTensor([rows, cols], seed++, dtype, deviationOf(cols));
      if (bias) tensors[`${name}.bias`] = randomTensor([rows], seed++, dtype, 0.3);
    },
    norm(name: string, cols: number, bias = false) {
      tensors[`${name}.weight`] = randomTensor([cols], seed++, dtype, 0.2, 1);
      if (bias) tensors[`${name}.bias`] = randomTensor([cols], seed++, dtype, 0.2);
    },
    table(name: string, shape: readonly number[]) {
      tensors[`${name}.weight`] = randomTensor(shape, seed++, dtype, 0.8);
    },
  };
}

export interface LanguageSizes {
  readonly width: number;
  readonly inner: number;
  readonly blocks: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly vocabulary: number;
}

export const SMALL_LANGUAGE: LanguageSizes = {
  width: 48,
  inner: 100,
  blocks: 2,
  heads: 6,
  kvHeads: 3,
  vocabulary: 50,
};

/** Dream's tensors and config.json. */
export function dreamCheckpoint(
  sizes: LanguageSizes = SMALL_LANGUAGE,
  dtype: StoredDtype = "F32",
  tied = false,
) {
  const { width, inner, blocks, heads, kvHeads, vocabulary } = sizes;
  const kvWidth = kvHeads * width / heads;
  const { tensors, linear, norm, table } = builder(dtype);
  table("model.embed_tokens", [vocabulary, width]);
  for (let i = 0; i < blocks; i++) {
    const prefix = `model.layers.${i}`;
    norm(`${prefix}.input_layernorm`, width);
    linear(`${prefix}.self_attn.q_proj`, width, width, true);
    linear(`${prefix}.self_attn.k_proj`, kvWidth, width, true);
    linear(`${prefix}.self_attn.v_proj`, kvWidth, width, true);
    linear(`${prefix}.self_attn.o_proj`, width, width);
    norm(`${prefix}.post_attention_layernorm`, width);
    linear(`${prefix}.mlp.gate_proj`, inner, width);
    linear(`${prefix}.mlp.up_proj`, inner, width);
    linear(`${prefix}.mlp.down_proj`, width, inner);
  }
  norm("model.norm", width);
  if (!tied) linear("lm_head", vocabulary, width);
  const config = {
    architectures: ["DreamModel"],
    model_type: "Dream",
    hidden_act: "silu",
    hidden_size: width,
    intermediate_size: inner,
    num_hidden_layers: blocks,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    max_position_embeddings: 64,
    rms_norm_eps: 1e-6,
    rope_theta: 1_000_000.0,
    rope_scaling: null,
    tie_word_embeddings: tied,
    use_sliding_window: false,
    vocab_size: vocabulary,
    mask_token_id: vocabulary - 1,
    pad_token_id: 0,
    bos_token_id: 0,
    eos_token_id: 0,
  };
  return { tensors, config };
}

/** A Dream as wide as tests/models/dream-mini, of 14 matrices of 64 columns, with short sequences. */
export function shortDream() {
  const sizes = { width: 64, inner: 64, blocks: 2, heads: 4, kvHeads: 2, vocabulary: 35 };
  const { tensors, config } = dreamCheckpoint(sizes, "BF16");
  return { tensors, config: { ...config, max_position_embeddings: 16 } };
}

/** LLaDA's tensors and config.json. */
export function lladaCheckpoint(
  sizes: LanguageSizes = SMALL_LANGUAGE,
  dtype: StoredDtype = "F32",
  qkvBias = false,
) {
  const { width, inner, blocks, heads, kvHeads, vocabulary } = sizes;
  const kvWidth = kvHeads * width / heads;
  const { tensors, linear, norm, table } = builder(dtype);
  table("model.transformer.wte", [vocabulary, width]);
  for (let i = 0; i < blocks; i++) {
    const prefix = `model.transformer.blocks.${i}`;
    norm(`${prefix}.attn_norm`, width);
    linear(`${prefix}.q_proj`, width, width, qkvBias);
    linear(`${prefix}.k_proj`, kvWidth, width, qkvBias);
    linear(`${prefix}.v_proj`, kvWidth, width, qkvBias);
    linear(`${prefix}.attn_out`, width, width);
    norm(`${prefix}.ff_norm`, width);
    linear(`${prefix}.ff_proj`, inner, width);
    linear(`${prefix}.up_proj`, inner, width);
    linear(`${prefix}.ff_out`, width, inner);
  }
  norm("model.transformer.ln_f", width);
  linear("model.transformer.ff_out", vocabulary, width);
  const config = {
    architectures: ["LLaDAModelLM"],
    model_type: "llada",
    activation_type: "silu",
    alibi: false,
    attention_layer_norm: false,
    bias_for_layer_norm: false,
    block_group_size: 1,
    block_type: "llama",
    d_model: width,
    embedding_size: vocabulary,
    eos_token_id: 1,
    include_bias: false,
    include_qkv_bias: qkvBias,
    input_emb_norm: false,
    layer_norm_type: "rms",
    layer_norm_with_affine: true,
    mask_token_id: vocabulary - 1,
    max_sequence_length: 64,
    mlp_hidden_size: inner,
    mlp_ratio: 4,
    multi_query_attention: null,
    n_heads: heads,
    n_kv_heads: kvHeads,
    n_layers: blocks,
    pad_token_id: 1,
    rms_norm_eps: 1e-5,
    rope: true,
    rope_theta: 500_000.0,
    scale_logits: false,
    vocab_size: vocabulary,
    weight_tying: false,
  };
  return { tensors, config };
}

export interface ImageSizes {
  readonly heads: number;
  readonly headSize: number;
  readonly blocks: number;
  readonly size: number;
  readonly patch: number;
  readonly channels: number;
  readonly outputChannels: number;
  readonly classes: number;
  readonly attentionBias: boolean;
  readonly normHasWeights: boolean;
}

export const SMALL_IMAGE: ImageSizes = {
  heads: 2,
  headSize: 12,
  blocks: 2,
  size: 8,
  patch: 2,
  channels: 3,
  outputChannels: 6,
  classes: 7,
  attentionBias: true,
  normHasWeights: false,
};

/** DiT's tensors and config.json. */
export function ditCheckpoint(sizes: ImageSizes = SMALL_IMAGE, dtype: StoredDtype = "F32") {
  const width = sizes.heads * sizes.headSize;
  const { tensors, linear, norm, table } = builder(dtype);
  table("pos_embed.proj", [width, sizes.channels, sizes.patch, sizes.patch]);
  tensors["pos_embed.proj.bias"] = randomTensor([width], 9001, dtype, 0.1);
  for (let i = 0; i < sizes.blocks; i++) {
    const prefix = `transformer_blocks.${i}`;
    linear(`${prefix}.norm1.emb.timestep_embedder.linear_1`, width, 256, true);
    linear(`${prefix}.norm1.emb.timestep_embedder.linear_2`, width, width, true);
    table(`${prefix}.norm1.emb.class_embedder.embedding_table`, [sizes.classes + 1, width]);
    linear(`${prefix}.norm1.linear`, 6 * width, width, true);
    for (const part of ["q", "k", "v"]) {
      linear(`${prefix}.attn1.to_${part}`, width, width, sizes.attentionBias);
    }
    linear(`${prefix}.attn1.to_out.0`, width, width, true);
    if (sizes.normHasWeights) norm(`${prefix}.norm3`, width, true);
    linear(`${prefix}.ff.net.0.proj`, 4 * width, width, true);
    linear(`${prefix}.ff.net.2`, width, 4 * width, true);
  }
  linear("proj_out_1", 2 * width, width, true);
  linear("proj_out_2", sizes.patch ** 2 * sizes.outputChannels, width, true);
  const config = {
    _class_name: "DiTTransformer2DModel",
    activation_fn: "gelu-approximate",
    attention_bias: sizes.attentionBias,
    attention_head_dim: sizes.headSize,
    num_attention_heads: sizes.heads,
    in_channels: sizes.channels,
    out_channels: sizes.outputChannels,
    num_layers: sizes.blocks,
    norm_type: "ada_norm_zero",
    norm_elementwise_affine: sizes.normHasWeights,
    norm_eps: 1e-5,
    num_embeds_ada_norm: sizes.classes,
    patch_size: sizes.patch,
    sample_size: sizes.size,
  };
  return { tensors, config };
}

/** Writes a checkpoint made above, some of it changed. */
export function store(
  folder: string,
  { tensors, config }: { readonly tensors: Tensors; readonly config: Readonly<Record<string, unknown>> },
  changes: {
    readonly tensors?: Readonly<Record<string, TestTensor | undefined>>;
    readonly config?: Readonly<Record<string, unknown>>;
  } = {},
): string {
  const all = Object.entries({ ...tensors, ...changes.tensors }).filter((
    entry,
  ): entry is [string, TestTensor] => entry[1] !== undefined);
  return writeCheckpoint(folder, Object.fromEntries(all), { ...config, ...changes.config });
}
