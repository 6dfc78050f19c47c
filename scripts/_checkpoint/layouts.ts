/**
 * Layouts of published checkpoints at any size, for make_checkpoint.ts: tensor names, shapes and
 * configuration files as Dream 7B, LLaDA 8B, DiT-XL/2 and FLUX.1 have them. The weights themselves are made
 * up elsewhere.
 */
import { elementCount, type TensorSpec } from "../../lib/tensor/mod.ts";

export const LAYOUTS = ["dream", "llada", "dit", "flux"] as const;
export type LayoutName = (typeof LAYOUTS)[number];

/** A checkpoint's tensors and the JSON files beside them. */
export interface Layout {
  /** File names begin with it. */
  readonly stem: "model" | "diffusion_pytorch_model";
  /** Tensors before and after the layers. */
  readonly around: readonly [readonly TensorSpec[], readonly TensorSpec[]];
  layer(index: number): readonly TensorSpec[];
  /** Contents of JSON files by name. */
  files(layers: number): Readonly<Record<string, unknown>>;
}

export interface LayoutSizes {
  readonly hidden: number;
  /** Tokens, of a language model; by default Dream's small stand-in, scaled with the width. */
  readonly vocabulary?: number | undefined;
}

/** Widths of the published models. */
export const PUBLISHED_HIDDEN: Readonly<Record<LayoutName, number>> = {
  dream: 3584,
  llada: 4096,
  dit: 1152,
  flux: 3072,
};
/** Tokens of a language model of full width: published vocabularies would outweigh small layers. */
const VOCABULARY = 8192;

const bf16 = (name: string, ...shape: number[]): TensorSpec => ({ name, dtype: "BF16", shape });

const linear = (name: string, rows: number, cols: number): TensorSpec[] => [
  bf16(`${name}.weight`, rows, cols),
  bf16(`${name}.bias`, rows),
];

export const bytesOf = (specs: readonly TensorSpec[]): number =>
  specs.reduce((sum, { shape }) => sum + elementCount(shape)! * 2, 0);

/** Sizes of heads: the published one, and smaller ones for widths that do not hold whole heads of it. */
const HEAD_SIZES: Readonly<Record<LayoutName, readonly number[]>> = {
  dream: [128, 64, 32, 16, 2],
  llada: [128, 64, 32, 16, 2],
  dit: [72, 64, 32, 16, 4],
  flux: [128, 64, 32],
};

/** The smallest size of a head, of which a width must be a multiple. */
export const smallestHead = (name: LayoutName): number => Math.min(...HEAD_SIZES[name]);

/** Layers of one block that read the same, behind the block's name. */
const READ_TOGETHER = [
  /\.(?:to_[qkv]|[qkv]_proj|proj_mlp)\.weight$/,
  /\.attn\.add_[qkv]_proj\.weight$/,
  /\.mlp\.(?:gate|up)_proj\.weight$|\.(?:ff|up)_proj\.weight$/,
];

/** Tables that rows are taken from: no layer reads anything to multiply them with. */
const TABLES = /(?:embed_tokens|wte|embedding_table)\.weight$/;

/** Matrices of a layout by what they read: those of one block that read the same together. */
export function readTogether(specs: readonly TensorSpec[]): TensorSpec[][] {
  const groups = new Map<string, TensorSpec[]>();
  for (const spec of specs.filter(({ name, shape }) => shape.length === 2 && !TABLES.test(name))) {
    const kind = READ_TOGETHER.findIndex((pattern) => pattern.test(spec.name));
    const block = /^.*?\.\d+\./.exec(spec.name)?.[0];
    const key = kind < 0 || block === undefined ? spec.name : `${block} ${kind}`;
    groups.set(key, [...groups.get(key) ?? [], spec]);
  }
  return [...groups.values()];
}

/** A layout; undefined when the width cannot be split into heads of an even size. */
export function layoutOf(name: LayoutName, { hidden, vocabulary }: LayoutSizes): Layout | undefined {
  const headSize = HEAD_SIZES[name].find((size) => hidden % size === 0);
  if (headSize === undefined) return undefined;
  const scaled = (width: number) =>
    Math.max(16, Math.round(width * hidden / PUBLISHED_HIDDEN[name] / 16) * 16);
  const tokens = vocabulary ?? scaled(VOCABULARY);
  const heads = hidden / headSize;
  if (name === "dit") return ditLayout(hidden, heads, headSize);
  if (name === "flux") return fluxLayout(hidden, headSize, scaled(4096), scaled(768));
  return name === "dream"
    ? dreamLayout(hidden, heads, headSize, scaled(18_944), tokens)
    : lladaLayout(hidden, heads, scaled(12_288), tokens);
}

function dreamLayout(hidden: number, heads: number, headSize: number, inner: number, tokens: number): Layout {
  // Dream 7B has 28 heads and 4 of keys and values
  const keyValueHeads = [...Array(heads).keys()].map((n) => n + 1).filter((n) => heads % n === 0)
    .findLast((n) => n <= Math.max(1, heads / 7))!;
  const keyValue = keyValueHeads * headSize;
  return {
    stem: "model",
    around: [
      [bf16("model.embed_tokens.weight", tokens, hidden)],
      [bf16("model.norm.weight", hidden), bf16("lm_head.weight", tokens, hidden)],
    ],
    layer: (index) => {
      const at = `model.layers.${index}`;
      return [
        ...linear(`${at}.self_attn.q_proj`, hidden, hidden),
        ...linear(`${at}.self_attn.k_proj`, keyValue, hidden),
        ...linear(`${at}.self_attn.v_proj`, keyValue, hidden),
        bf16(`${at}.self_attn.o_proj.weight`, hidden, hidden),
        bf16(`${at}.mlp.gate_proj.weight`, inner, hidden),
        bf16(`${at}.mlp.up_proj.weight`, inner, hidden),
        bf16(`${at}.mlp.down_proj.weight`, hidden, inner),
        bf16(`${at}.input_layernorm.weight`, hidden),
        bf16(`${at}.post_attention_layernorm.weight`, hidden),
      ];
    },
    files: (layers) => ({
      "config.json": {
        architectures: ["DreamModel"],
        model_type: "Dream",
        hidden_size: hidden,
        intermediate_size: inner,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: keyValueHeads,
        max_position_embeddings: 2048,
        vocab_size: tokens,
        ...SPECIAL_TOKENS,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        tie_word_embeddings: false,
        torch_dtype: "bfloat16",
      },
    }),
  };
}

function lladaLayout(hidden: number, heads: number, inner: number, tokens: number): Layout {
  const top = "model.transformer";
  return {
    stem: "model",
    around: [
      [bf16(`${top}.wte.weight`, tokens, hidden)],
      [bf16(`${top}.ln_f.weight`, hidden), bf16(`${top}.ff_out.weight`, tokens, hidden)],
    ],
    layer: (index) => {
      const at = `${top}.blocks.${index}`;
      return [
        bf16(`${at}.attn_norm.weight`, hidden),
        ...["q_proj", "k_proj", "v_proj", "attn_out"].map((part) =>
          bf16(`${at}.${part}.weight`, hidden, hidden)
        ),
        bf16(`${at}.ff_norm.weight`, hidden),
        bf16(`${at}.ff_proj.weight`, inner, hidden),
        bf16(`${at}.up_proj.weight`, inner, hidden),
        bf16(`${at}.ff_out.weight`, hidden, inner),
      ];
    },
    files: (layers) => ({
      "config.json": {
        architectures: ["LLaDAModelLM"],
        model_type: "llada",
        activation_type: "silu",
        block_type: "llama",
        d_model: hidden,
        embedding_size: tokens,
        include_bias: false,
        include_qkv_bias: false,
        layer_norm_type: "rms",
        max_sequence_length: 4096,
        mlp_hidden_size: inner,
        mlp_ratio: 4,
        n_heads: heads,
        n_kv_heads: heads,
        n_layers: layers,
        rms_norm_eps: 1e-5,
        rope: true,
        rope_theta: 500_000,
        vocab_size: tokens,
        ...SPECIAL_TOKENS,
        weight_tying: false,
        torch_dtype: "bfloat16",
      },
    }),
  };
}

function ditLayout(hidden: number, heads: number, headSize: number): Layout {
  const channels = 4, patch = 2, classes = 1000;
  return {
    stem: "diffusion_pytorch_model",
    around: [
      [bf16("pos_embed.proj.weight", hidden, channels, patch, patch), bf16("pos_embed.proj.bias", hidden)],
      [
        ...linear("proj_out_1", 2 * hidden, hidden),
        ...linear("proj_out_2", patch ** 2 * 2 * channels, hidden),
      ],
    ],
    layer: (index) => {
      const at = `transformer_blocks.${index}`;
      return [
        ...linear(`${at}.norm1.emb.timestep_embedder.linear_1`, hidden, 256),
        ...linear(`${at}.norm1.emb.timestep_embedder.linear_2`, hidden, hidden),
        bf16(`${at}.norm1.emb.class_embedder.embedding_table.weight`, classes + 1, hidden),
        ...linear(`${at}.norm1.linear`, 6 * hidden, hidden),
        ...["to_q", "to_k", "to_v", "to_out.0"].flatMap((part) =>
          linear(`${at}.attn1.${part}`, hidden, hidden)
        ),
        ...linear(`${at}.ff.net.0.proj`, 4 * hidden, hidden),
        ...linear(`${at}.ff.net.2`, hidden, 4 * hidden),
      ];
    },
    files: (layers) => ({
      "config.json": {
        _class_name: "DiTTransformer2DModel",
        activation_fn: "gelu-approximate",
        attention_bias: true,
        attention_head_dim: headSize,
        dropout: 0,
        in_channels: channels,
        norm_elementwise_affine: false,
        norm_eps: 1e-5,
        norm_num_groups: 32,
        norm_type: "ada_norm_zero",
        num_attention_heads: heads,
        num_embeds_ada_norm: classes,
        num_layers: layers,
        out_channels: 2 * channels,
        patch_size: patch,
        sample_size: 32,
        upcast_attention: false,
      },
      "scheduler_config.json": {
        _class_name: "DDIMScheduler",
        beta_end: 0.02,
        beta_schedule: "linear",
        beta_start: 1e-4,
        clip_sample: false,
        num_train_timesteps: 1000,
        prediction_type: "epsilon",
        set_alpha_to_one: true,
        steps_offset: 0,
        timestep_spacing: "leading",
        trained_betas: null,
      },
    }),
  };
}

/** FLUX.1 as diffusers names it. A layer is a block of two streams and two of one; it has 19. */
function fluxLayout(hidden: number, headSize: number, text: number, pooled: number): Layout {
  const channels = 64, inner = 4 * hidden;
  const norms = (at: string, names: readonly string[]) =>
    names.map((name) => bf16(`${at}.attn.norm_${name}.weight`, headSize));
  const single = (index: number) => {
    const at = `single_transformer_blocks.${index}`;
    return [
      ...["q", "k", "v"].flatMap((part) => linear(`${at}.attn.to_${part}`, hidden, hidden)),
      ...norms(at, ["q", "k"]),
      ...linear(`${at}.norm.linear`, 3 * hidden, hidden),
      ...linear(`${at}.proj_mlp`, inner, hidden),
      ...linear(`${at}.proj_out`, hidden, hidden + inner),
    ];
  };
  const double = (index: number) => {
    const at = `transformer_blocks.${index}`;
    return [
      ...["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
        .flatMap((part) => linear(`${at}.attn.${part}`, hidden, hidden)),
      ...norms(at, ["q", "k", "added_q", "added_k"]),
      ...["ff", "ff_context"].flatMap((part) => [
        ...linear(`${at}.${part}.net.0.proj`, inner, hidden),
        ...linear(`${at}.${part}.net.2`, hidden, inner),
      ]),
      ...["norm1", "norm1_context"].flatMap((part) => linear(`${at}.${part}.linear`, 6 * hidden, hidden)),
    ];
  };
  const embedder = (name: string, cols: number) => [
    ...linear(`time_text_embed.${name}.linear_1`, hidden, cols),
    ...linear(`time_text_embed.${name}.linear_2`, hidden, hidden),
  ];
  return {
    stem: "diffusion_pytorch_model",
    around: [
      [
        ...linear("x_embedder", hidden, channels),
        ...linear("context_embedder", hidden, text),
        ...embedder("timestep_embedder", 256),
        ...embedder("guidance_embedder", 256),
        ...embedder("text_embedder", pooled),
      ],
      [...linear("norm_out.linear", 2 * hidden, hidden), ...linear("proj_out", channels, hidden)],
    ],
    layer: (index) => [...double(index), ...single(2 * index), ...single(2 * index + 1)],
    files: (layers) => ({
      "config.json": {
        _class_name: "FluxTransformer2DModel",
        attention_head_dim: headSize,
        axes_dims_rope: [headSize / 8, headSize * 7 / 16, headSize * 7 / 16],
        guidance_embeds: true,
        in_channels: channels,
        joint_attention_dim: text,
        num_attention_heads: hidden / headSize,
        num_layers: layers,
        num_single_layers: 2 * layers,
        patch_size: 1,
        pooled_projection_dim: pooled,
      },
    }),
  };
}

// Tokens -------------------------------------------------------------------------------------------------

const SPECIAL_TOKENS = { pad_token_id: 0, mask_token_id: 1, bos_token_id: 2, eos_token_id: 3 };
const SPECIAL_WORDS = ["<pad>", "<mask>", "<bos>", "<eos>"];

/** Files of a tokenizer with a synthetic vocabulary: special tokens, then words `w4`, `w5`, … at spaces. */
export function tokenizerFiles(vocabulary: number): Readonly<Record<string, unknown>> {
  const words = Array.from({ length: vocabulary }, (_, i) => SPECIAL_WORDS[i] ?? `w${i}`);
  const flags = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
  return {
    "tokenizer.json": {
      version: "1.0",
      truncation: null,
      padding: null,
      added_tokens: SPECIAL_WORDS.map((content, id) => ({ id, content, ...flags })),
      normalizer: null,
      pre_tokenizer: { type: "WhitespaceSplit" },
      post_processor: null,
      decoder: null,
      model: {
        type: "WordLevel",
        vocab: Object.fromEntries(words.map((word, i) => [word, i])),
        unk_token: "<pad>",
      },
    },
    "tokenizer_config.json": {
      tokenizer_class: "PreTrainedTokenizerFast",
      pad_token: "<pad>",
      mask_token: "<mask>",
      bos_token: "<bos>",
      eos_token: "<eos>",
    },
  };
}
