/**
 * Rules by name: which tensors are kept, which are token tables with separate bits, and which have a
 * floor of bits. They are data: `--dry-run` and docs/format.md print them.
 */
import type { BitWidth, Config, LayerBits } from "../config/mod.ts";
import { type Family, familyOf } from "../names/families.ts";
import type { TensorInfo } from "../tensor/mod.ts";

/** A reason to keep a tensor as it is, or to store it with other bits; the first rule that holds wins. */
export interface KeepRule {
  readonly rule: string;
  /** Names it concerns; undefined when it looks at something else. */
  readonly pattern: string | undefined;
  readonly why: string;
}

/** In front of modules outside every numbered block, whatever a checkpoint puts before its names. */
const OUTSIDE = String.raw`^(?:(?!\d+\.)[^.]+\.)*?`;

/** Every rule, in the order in which they are tried. */
export const KEEP_RULES: readonly KeepRule[] = [
  {
    rule: "not floating",
    pattern: undefined,
    why: "integers and booleans are indices or masks, not weights",
  },
  {
    rule: "not a matrix",
    pattern: undefined,
    why:
      "biases, norms and other vectors are small and act on whole channels; convolutions have no rows to group",
  },
  {
    rule: "experts",
    pattern: String.raw`(?:^|\.)experts\.(?!\d+\.)\w*(?:proj|w\d|fc\d|linear_?\w*|dense\w*)(?:\.weight)?$`,
    why:
      "matrices of experts in one tensor of three dimensions, which are quantized row by row, each expert for itself",
  },
  { rule: "empty", pattern: undefined, why: "a dimension is 0: there is nothing to quantize" },
  { rule: "not named .weight", pattern: undefined, why: "tables and buffers are not a layer's weights" },
  { rule: "keep_patterns", pattern: undefined, why: "the configuration keeps it" },
  { rule: "layer_bit_widths 16", pattern: undefined, why: "the configuration asks for 16 bits" },
  {
    rule: "target",
    pattern: undefined,
    why: "no type of the target holds it: blocks do not divide its rows, or it is no linear layer",
  },
  {
    rule: "other model",
    pattern: String
      .raw`^(?:conditioner|cond_stage_model|first_stage_model|text_encoders?(?:_\d+)?|text_model|vae|model_ema|image_encoder|clip_\w+|t5xxl)\.`,
    why:
      "a text encoder, an autoencoder or an average of weights in one file with the denoiser, whose names begin " +
      "with model.diffusion_model. or the like",
  },
  {
    rule: "embedding_bits",
    pattern: String
      .raw`(?:^|\.)(?:embed_tokens|tok_embeddings|wte|word_embeddings?|token_embd|embed_in|shared|(?:token_)?embeddings?|embedding_table)\.weight$`,
    why: "a table of tokens or classes of 65,536 weights or more, or one for which embedding_bits is set: " +
      "quantized by itself. One of tokens that is the head as well gets head_bits",
  },
  {
    rule: "embedding",
    pattern: String
      .raw`(?:^|\.)(?:embed_tokens|tok_embeddings|wte|wpe|embedding_table|relative_attention_bias|(?:word|token_type|position|pos)_embeddings?|pos_embed)(?:\.|$)|(?:^|\.)(?:(?:token_|patch_)?embeddings?|shared|embed_in|token_embd|embed_positions)\.weight$`,
    why: "rows are looked up, not multiplied: an error is not averaged over a sum",
  },
  {
    rule: "norm",
    pattern: String.raw`(?:norm\d*|(?:^|\.)ln_\w+)\.weight$`,
    why: "scales whole channels; norm1.linear.weight of a DiT is a matrix and is not meant",
  },
  {
    rule: "head_bits",
    pattern: String.raw`(?:^|\.)(?:lm_head|embed_out)\.weight$|${OUTSIDE}(?:ff_out|output)\.weight$`,
    why: "the layer that scores tokens, of 65,536 weights or more, or one for which head_bits is set: " +
      "quantized by itself",
  },
  {
    rule: "head",
    pattern: String
      .raw`(?:^|\.)(?:lm_head|embed_out|score|classifier)\.weight$|${OUTSIDE}(?:(?:ff_out|output|out|head|(?:\w+_)?proj_out|proj_out_2|project_out|output_proj|final_proj|to_logits|decoder_pred|llm2vae)\.weight$|(?:(?:all_)?final_layers?|last_layers?|norm_out|(?:\w+_)?heads?|final(?:_linear)?|proj_out|conv_out|out_layers?|output_layer|unpatchify\w*|unembed\w*|to_(?:rgb|pixels?)|out\.\d+)\.)`,
    why: "its error goes into every output without another layer to absorb it",
  },
  {
    rule: "router",
    pattern: String
      .raw`(?:^|\.)(?:gate(?:\.wg)?|router(?:\.\w+)?|gating|ffn_gate_inp(?:_shexp)?|shared_expert_gate)\.weight$`,
    why: "chooses the experts of a mixture: an error runs others. A gate with more rows than columns is a " +
      "layer",
  },
  {
    rule: "router by shape",
    pattern: String
      .raw`^(?!.*(?:^|\.)experts\.)(?:.*\.)?(?:\w*(?:router|routing|gating)\w*|gate(?:s|_(?:inp|fn|func|net(?:work)?|layer|linear|weights?|logits?))?|(?:\w+_)?(?:moe|experts?)_gate|switch|w_?g(?:ate)?)(?:\.\w+)*\.weight$`,
    why: "named like a router, with a quarter as many rows as columns or fewer, and no part of an expert",
  },
  {
    rule: "embedder",
    pattern: String
      .raw`${OUTSIDE}(?:\w+_emb(?:s|ed(?:s|der|dings?)?)?|\w+_in|patchify_proj|caption_projection|(?:\w+_)?adaln_single|\w+_(?:patchify_proj|caption_projection)|pooled_projection|(?:t5_y|y_|t_|cond_|llm_cond_|lyric_|crossattn_)proj|text_proj(?:_t5)?|(?:time_?step|global|cross_attention)_proj|time_proj(?:ection)?|(?:time|timestep|noise|label)_mlp|time_token|temb|map_(?:noise|label|augment|layer\d)|\w+_mapper|vae2llm|connector|vision_aligner|mm_projector|multi_modal_projector|sigma_map|t_block|init_x_linear|cond_seq_linear|self_conditioning)\.`,
    why: "turns image, text, time or guidance into what every block of an image model reads",
  },
  {
    rule: "unknown family",
    pattern: undefined,
    why:
      "outside the numbered blocks of a model whose family is not known: it may be an embedder or the last layer, " +
      "and both cost most",
  },
  {
    rule: "block embedder",
    pattern: String.raw`(?:^|\.)\d+\.(?:[^.]+\.)*?\w*_embedder\.`,
    why:
      "an embedder that every block has, as in the DiT of diffusers: 8 bits, unless layer_bit_widths asks for fewer",
  },
  {
    rule: "sensitive",
    pattern: String
      .raw`(?:^|\.)(?:timestep_embedder|time_embed(?:ding|der)?|t_embedder)\.|(?:^|\.)norm1\.linear\.weight$|(?:^|\.)norm_out\.linear\.weight$|adaLN_modulation|${OUTSIDE}proj_out_1\.weight$`,
    why:
      "only with skip_sensitive_layers: the configuration's sensitive layers, and those that turn the timestep " +
      "into every block's scales and shifts (timestep embedding, adaLN, final modulation)",
  },
  {
    rule: "modulation",
    pattern: String
      .raw`(?:^|\.)(?:\w*[mM]odulat\w*|(?:\w+_)?mod(?:[A-Z]*|_[a-z]|_proj)|[aA]da_?[lL][nN]\w*|ada(?:_?(?:norm|in)\w*)?|(?:\w+_)?norm\d*(?:_context)?\.(?:linear|proj|fc)(?:_\d)?|emb_layers|(?:time_)?emb_proj|(?:cond|t|time)_(?:proj|mlp)|scale_shift\w*|(?:film|FiLM|style)\w*|affine|conditioning|distilled_guidance_layer)\.|${OUTSIDE}proj_out_1\.weight$`,
    why:
      "turns the timestep into a block's scales and shifts: 4 bits or more, unless layer_bit_widths asks for fewer",
  },
];

/** In front of a denoiser's names in a file that has other models, too. */
const OF_DENOISER = /^(?:(?:model\.)?diffusion_model|transformer|unet|net)\./;

/** A matrix inside a numbered block: its module and weight stand behind the number. */
const IN_BLOCK = /(?:^|\.)\d+\.[^.]+\.[^.]+/;

/** A rule's name in {@linkcode KEEP_RULES}. */
export type RuleName = (typeof KEEP_RULES)[number]["rule"];

/** Least bits of what is too large to be kept, by its rule. */
const LEAST_BITS = { "block embedder": 8, modulation: 4 } as const satisfies Record<string, BitWidth>;
/** Most rows of a router by shape, as a share of its columns. */
const ROUTER_SHARE = 1 / 4;
/** Tables that are never the head. */
const CLASS_TABLE = /(?:^|\.)embedding_table\.weight$/;
/** Smaller token tables are kept unless their bits are set: they take less than 128 KiB. */
const TABLE_WEIGHTS = 2 ** 16;

const PATTERNS: ReadonlyMap<RuleName, RegExp> = new Map(
  KEEP_RULES.flatMap(({ rule, pattern }) => pattern === undefined ? [] : [[rule, new RegExp(pattern, "u")]]),
);

/** Whether a name is one that a rule concerns. */
export const concerns = (rule: RuleName, name: string): boolean => PATTERNS.get(rule)!.test(name);

/** Facts that the rules look at beside a tensor itself. */
export interface RuleContext {
  readonly config: Config;
  /** The token embedding is the head as well. */
  readonly tiesHead: boolean;
  readonly family: Family | undefined;
  /** The names have numbered blocks, so that what is outside them is few and early or late. */
  readonly hasBlocks: boolean;
  /** The names say which tensors are the denoiser's. */
  readonly hasDenoiser: boolean;
}

/**
 * Facts for the rules from a checkpoint's names and config.json. A head that is not stored is the embedding,
 * unless config.json says otherwise; transformers leaves the key out where it is true.
 */
export function ruleContext(
  names: readonly string[],
  modelConfig: Readonly<Record<string, unknown>> | undefined,
  config: Config,
): RuleContext {
  const { tie_word_embeddings: ties, weight_tying: tying } = modelConfig ?? {};
  return {
    config,
    tiesHead: ties !== false && tying !== false && !names.some((name) => concerns("head_bits", name)),
    family: familyOf(names, modelConfig),
    hasBlocks: names.some((name) => IN_BLOCK.test(name)),
    hasDenoiser: names.some((name) => OF_DENOISER.test(name)),
  };
}

/** Bits of token tables by {@linkcode Config.bitWidth} where none are set; docs/solvers.md measures them. */
const TABLE_BITS = {
  embedding: { 2: 4, 3: 4, 4: 8, 8: 8 },
  head: { 2: 8, 3: 8, 4: 8, 8: 8 },
} as const satisfies Record<string, Record<BitWidth, BitWidth>>;

/** A token table's rule and bits; undefined for other tensors and for tables that are kept. */
export function tableBits(
  { name, elements }: Pick<TensorInfo, "name" | "elements">,
  { config, tiesHead, hasDenoiser }: RuleContext,
): { readonly rule: "embedding_bits" | "head_bits"; readonly bits: BitWidth } | undefined {
  if (hasDenoiser && concerns("other model", name)) return undefined;
  const isEmbedding = concerns("embedding_bits", name);
  if (!isEmbedding && !concerns("head_bits", name)) return undefined;
  const isHead = !isEmbedding || (tiesHead && !CLASS_TABLE.test(name));
  const set: LayerBits | null = isHead ? config.headBits : config.embeddingBits;
  // The forms that others read have no quantized tables.
  const own = elements < TABLE_WEIGHTS || !["real", "offset"].includes(config.zeroPoint)
    ? 16
    : TABLE_BITS[isHead ? "head" : "embedding"][config.bitWidth];
  const bits = set ?? own;
  return bits === 16 ? undefined : { rule: isHead ? "head_bits" : "embedding_bits", bits };
}

/** The rule by name that keeps a matrix; undefined where none does. */
export function keptByName(
  { name, shape }: Pick<TensorInfo, "name" | "shape">,
  { config, family, hasBlocks, hasDenoiser }: RuleContext,
  isSensitive: boolean,
): RuleName | undefined {
  if (hasDenoiser && concerns("other model", name)) return "other model";
  const [rows, cols] = shape as [number, number];
  const isGate = /(?:^|\.)gate\.weight$/.test(name);
  for (const rule of ["embedding", "norm", "head", "router", "router by shape", "embedder"] as const) {
    if (rule === "router" && isGate && rows > cols) continue;
    if (rule === "router by shape" && rows > cols * ROUTER_SHARE) continue;
    if (concerns(rule, name)) return rule;
  }
  if (family === undefined && hasBlocks && !IN_BLOCK.test(name)) return "unknown family";
  return config.skipSensitiveLayers && (isSensitive || concerns("sensitive", name)) ? "sensitive" : undefined;
}

/** A rule's least bits of a tensor for which `bit_width` would give fewer; undefined where there are none. */
export function leastBits(
  name: string,
  bits: BitWidth,
): { readonly rule: RuleName; readonly bits: BitWidth } | undefined {
  for (const rule of ["block embedder", "modulation"] as const) {
    if (concerns(rule, name)) {
      return bits < LEAST_BITS[rule] ? { rule, bits: LEAST_BITS[rule] } : undefined;
    }
  }
  return undefined;
}
