/** Language models in GGUF under their own checkpoints' names, with the config.json they would have. */
import type { GgufTensor, GgufValue } from "./structure.ts";

/** The row of the file that holds a row of the tensor. */
export type RowOrder = (row: number) => number;

/** A family: its tensors' names, and the keys of config.json by those of GGUF. */
interface Family {
  /** In front of a block's index. */
  readonly block: string;
  /** Names by GGUF's, the part behind the index of those in a block; without `.weight` or `.bias`. */
  readonly names: Readonly<Record<string, string>>;
  readonly constants: Readonly<Record<string, unknown>>;
  /** Keys of config.json by those behind the architecture's name. */
  readonly keys: Readonly<Record<string, string>>;
  /** Key of config.json for a head that is the embedding. */
  readonly tied: string;
  /** Rows of query and key lie in pairs, for rotations of neighbours. */
  readonly hasPairs: boolean;
}

const pairs = (text: string): Readonly<Record<string, string>> =>
  Object.fromEntries(text.trim().split(/\s+/).map((pair) => pair.split("=")));

/** Families by `general.architecture`. */
const GGUF_FAMILIES: Readonly<Record<string, Family>> = {
  dream: {
    block: "model.layers.",
    names: pairs(`
      token_embd=model.embed_tokens output_norm=model.norm output=lm_head attn_norm=input_layernorm
      attn_q=self_attn.q_proj attn_k=self_attn.k_proj attn_v=self_attn.v_proj attn_output=self_attn.o_proj
      ffn_norm=post_attention_layernorm ffn_gate=mlp.gate_proj ffn_up=mlp.up_proj ffn_down=mlp.down_proj`),
    constants: { model_type: "Dream", architectures: ["DreamModel"], hidden_act: "silu" },
    keys: pairs(`
      context_length=max_position_embeddings embedding_length=hidden_size block_count=num_hidden_layers
      feed_forward_length=intermediate_size attention.head_count=num_attention_heads
      attention.head_count_kv=num_key_value_heads attention.layer_norm_rms_epsilon=rms_norm_eps
      rope.freq_base=rope_theta vocab_size=vocab_size attention.key_length=head_dim`),
    tied: "tie_word_embeddings",
    hasPairs: false,
  },
  llada: {
    block: "model.transformer.blocks.",
    names: pairs(`
      token_embd=model.transformer.wte output_norm=model.transformer.ln_f output=model.transformer.ff_out
      attn_norm=attn_norm attn_q=q_proj attn_k=k_proj attn_v=v_proj attn_output=attn_out
      ffn_norm=ff_norm ffn_gate=ff_proj ffn_up=up_proj ffn_down=ff_out`),
    constants: { model_type: "llada", architectures: ["LLaDAModelLM"], block_type: "llama" },
    keys: pairs(`
      context_length=max_sequence_length embedding_length=d_model block_count=n_layers
      feed_forward_length=mlp_hidden_size attention.head_count=n_heads attention.head_count_kv=n_kv_heads
      attention.layer_norm_rms_epsilon=rms_norm_eps rope.freq_base=rope_theta vocab_size=vocab_size`),
    tied: "weight_tying",
    hasPairs: true,
  },
};

/** Names in families' own checkpoints for a matrix of GGUF; of an expert too, `ffn_up_exps.7`. */
export function namesOfGguf(name: string): string[] {
  const [, block, part, expert] = /^blk\.(\d+)\.(\w+?)(?:_exps\.(\d+))?\.weight$/.exec(name) ?? [];
  const outside = /^(\w+)\.weight$/.exec(name)?.[1];
  return Object.values(GGUF_FAMILIES).flatMap(({ block: before, names }) => {
    const own = names[part ?? outside ?? ""];
    if (own === undefined) return [];
    if (block === undefined) return [`${own}.weight`];
    const inExpert = expert === undefined ? own : own.replace(/^mlp\./, `mlp.experts.${expert}.`);
    return [`${before}${block}.${inExpert}.weight`];
  });
}

/** Special tokens of config.json by those of GGUF. */
const TOKENS = pairs(`mask=mask_token_id bos=bos_token_id eos=eos_token_id padding=pad_token_id`);

/** A language model that is known. */
interface LanguageModel {
  readonly config: Readonly<Record<string, unknown>>;
  /** A tensor's own name and order of rows. */
  tensor(tensor: GgufTensor): { readonly name: string; readonly order: RowOrder | undefined };
}

/** What a file says of a language model, undefined where its architecture is not known. */
export function languageModel(
  keys: ReadonlyMap<string, GgufValue>,
  tensors: readonly GgufTensor[],
): LanguageModel | undefined {
  const architecture = keys.get("general.architecture")?.value;
  if (typeof architecture !== "string" || !Object.hasOwn(GGUF_FAMILIES, architecture)) return undefined;
  const family = GGUF_FAMILIES[architecture]!,
    has = (name: string) => tensors.some((tensor) => tensor.name === name);
  const value = (key: string) => {
    const { type, value } = keys.get(key) ?? {};
    return type === "f32" && typeof value === "number" ? shortest(value) : value;
  };
  const number = (key: string) => Number(value(`${architecture}.${key}`));
  const values = [
    ...Object.entries(family.keys).map(([from, to]) => [to, value(`${architecture}.${from}`)] as const),
    ...Object.entries(TOKENS).map(([from, to]) => [to, value(`tokenizer.ggml.${from}_token_id`)] as const),
  ];
  const rows = tensors.find(({ name }) => name === "token_embd.weight")?.shape[0];
  const config = {
    ...family.constants,
    vocab_size: rows,
    ...Object.fromEntries(values.filter(([, value]) => value !== undefined)),
    [family.tied]: !has("output.weight"),
    ...(family.hasPairs
      ? { include_bias: has("blk.0.ffn_down.bias"), include_qkv_bias: has("blk.0.attn_q.bias") }
      : { attention_bias: has("blk.0.attn_q.bias") }),
  };
  const heads = number("attention.head_count"), keyHeads = number("attention.head_count_kv") || heads;
  return {
    config,
    tensor: ({ name, shape }) => {
      const [, block, part, kind] = /^(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)$/.exec(name) ?? [];
      if (part === undefined || !Object.hasOwn(family.names, part)) return { name, order: undefined };
      const own = `${block === undefined ? "" : `${family.block}${block}.`}${family.names[part]}.${kind}`;
      const count = { attn_q: heads, attn_k: keyHeads }[part];
      const isPaired = family.hasPairs && count !== undefined && shape[0]! % (2 * count) === 0;
      return { name: own, order: isPaired ? halvesOf(shape[0]! / count) : undefined };
    },
  };
}

/** Order that puts the even rows of each head before its odd ones, as rotations of halves want them. */
const halvesOf = (size: number): RowOrder => (row) => {
  const inHead = row % size, half = size / 2;
  return row - inHead + 2 * (inHead % half) + Math.floor(inHead / half);
};

/** The number with the fewest digits that is the same in float32. */
function shortest(value: number): number {
  for (let digits = 1; digits < 9; digits++) {
    const short = Number(value.toPrecision(digits));
    if (Math.fround(short) === value) return short;
  }
  return value;
}
