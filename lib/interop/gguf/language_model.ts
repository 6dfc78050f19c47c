/** Dream and LLaDA as llama.cpp loads them: names of tensors, metadata, and LLaDA's order of rows. */
import { basename, resolve } from "node:path";
import { type MaskedTransformerConfig, modelConfig, modelRequirements } from "../../models/mod.ts";
import { cannotHold, type ExportSource } from "../format.ts";
import { bool, f32, type GgufValue, text, u32 } from "./container.ts";
import type { GgufEntry, RowOrder } from "./tensors.ts";
import { tokenizerMetadata } from "./tokenizer.ts";

/** A model as a GGUF file describes it. */
export interface GgufModel {
  readonly metadata: readonly (readonly [key: string, value: GgufValue])[];
  readonly entries: readonly GgufEntry[];
  readonly notes?: readonly string[] | undefined;
  /** Longest name that its readers take; default ggml's. */
  readonly maxName?: number;
}

/** Most blocks that llama.cpp loads (LLAMA_MAX_LAYERS). */
const MAX_BLOCKS = 512;

/** Names in the file by those of a checkpoint, without `.weight` and `.bias`; a block's behind its number. */
interface Names {
  readonly blocks: RegExp;
  readonly block: Readonly<Record<string, string>>;
  readonly outside: Readonly<Record<string, string>>;
}

/** Every linear layer whose bias llama.cpp's graph of the family adds. */
const BIASED = ["attn_q", "attn_k", "attn_v"];

const FAMILIES: Readonly<Record<"dream" | "llada", Names>> = {
  dream: {
    blocks: /^model\.layers\.(\d+)\.(.+)$/,
    block: {
      input_layernorm: "attn_norm",
      "self_attn.q_proj": "attn_q",
      "self_attn.k_proj": "attn_k",
      "self_attn.v_proj": "attn_v",
      "self_attn.o_proj": "attn_output",
      post_attention_layernorm: "ffn_norm",
      "mlp.gate_proj": "ffn_gate",
      "mlp.up_proj": "ffn_up",
      "mlp.down_proj": "ffn_down",
    },
    outside: { "model.embed_tokens": "token_embd", "model.norm": "output_norm", lm_head: "output" },
  },
  llada: {
    blocks: /^model\.transformer\.blocks\.(\d+)\.(.+)$/,
    block: {
      attn_norm: "attn_norm",
      q_proj: "attn_q",
      k_proj: "attn_k",
      v_proj: "attn_v",
      attn_out: "attn_output",
      ff_norm: "ffn_norm",
      ff_proj: "ffn_gate",
      up_proj: "ffn_up",
      ff_out: "ffn_down",
    },
    outside: {
      "model.transformer.wte": "token_embd",
      "model.transformer.ln_f": "output_norm",
      "model.transformer.ff_out": "output",
    },
  },
};

/** Name in the file; undefined for what the model does not read, as a tied head that is stored. */
function nameOf(name: string, { blocks, block, outside }: Names, tiesHead: boolean): string | undefined {
  const [, module, part] = /^(.+)\.(weight|bias)$/.exec(name) ?? [];
  if (module === undefined) return undefined;
  const [, index, inner] = blocks.exec(module) ?? [];
  const own = index === undefined ? outside[module] : block[inner!];
  if (own === undefined || (own === "output" && tiesHead)) return undefined;
  return index === undefined ? `${own}.${part}` : `blk.${index}.${own}.${part}`;
}

/** Rotary pairs are neighbours there, halves of a head here: row 2k + j of a head is our row j·d/2 + k. */
const neighbours = (headSize: number): RowOrder => ({
  block: headSize,
  order: (row) => row % 2 * headSize / 2 + Math.floor(row / 2),
});

/** @throws {CheckpointError} when llama.cpp's graph of the family lacks a part of the model */
function checkConfig(
  source: ExportSource,
  kind: string,
  config: MaskedTransformerConfig,
  names: readonly string[],
): void {
  const fail = (reason: string) => cannotHold(source, "gguf", `llama.cpp's ${kind} ${reason}`);
  const { blocks, heads, headSize, hiddenSize, logitScale, embeddingScale } = config;
  if (blocks > MAX_BLOCKS) throw fail(`must have at most ${MAX_BLOCKS} blocks, got ${blocks}`);
  if (heads * headSize !== hiddenSize) {
    throw fail(`must have heads that fill its width, got ${heads} of ${headSize} in ${hiddenSize}`);
  }
  if (logitScale !== 1) throw fail(`must not scale its logits, got a factor of ${logitScale}`);
  if (embeddingScale !== 1) throw fail(`must not scale its embeddings, got a factor of ${embeddingScale}`);
  const biased = names.find((name) =>
    name.endsWith(".bias") && !BIASED.some((part) => name.includes(`.${part}.`))
  );
  if (biased !== undefined) throw fail(`must have biases of query, key and value only, got ${biased}`);
}

/**
 * A language model for llama.cpp.
 *
 * @throws {CheckpointError} when tensors or keys are missing, or llama.cpp cannot run the model
 */
export function languageModel(source: ExportSource): GgufModel {
  const { checkpoint, tensors } = source, { kind, config } = modelConfig(checkpoint);
  if (kind === "dit") throw cannotHold(source, "gguf", "it must be a language model, got an image model");
  if (kind !== "dream" && kind !== "llada") {
    throw cannotHold(
      source,
      "gguf",
      "it must be Dream or LLaDA: GGUF files of no other family are written here",
    );
  }
  modelRequirements(checkpoint); // every tensor is there, with its shape
  const names = FAMILIES[kind], order = kind === "llada" ? neighbours(config.headSize) : undefined;
  const notes: string[] = [];
  const entries = tensors.flatMap((tensor): GgufEntry[] => {
    const name = nameOf(tensor.name, names, config.tiesHead);
    if (name === undefined) {
      notes.push(`${tensor.name} is left out: llama.cpp does not read it`);
      return [];
    }
    const isTurned = /\.attn_[qk]\./.test(name);
    return [{ name, sources: [tensor], rowOrder: isTurned ? order : undefined }];
  });
  checkConfig(source, kind, config, entries.map(({ name }) => name));
  const key = (name: string, value: GgufValue): [string, GgufValue] => [`${kind}.${name}`, value];
  const metadata: [string, GgufValue][] = [
    ["general.architecture", text(kind)],
    // the work folder of `quantize.ts --for` is named after the file
    ["general.name", text(basename(resolve(checkpoint.root)).replace(/(?:\.gguf)?\.arrowquant$/, ""))],
    key("context_length", u32(config.maxTokens)),
    key("embedding_length", u32(config.hiddenSize)),
    key("block_count", u32(config.blocks)),
    key("feed_forward_length", u32(config.intermediateSize)),
    key("attention.head_count", u32(config.heads)),
    key("attention.head_count_kv", u32(config.keyValueHeads)),
    key("attention.layer_norm_rms_epsilon", f32(config.normEpsilon)),
    key("attention.causal", bool(false)),
    key("rope.freq_base", f32(config.rotaryTheta)),
    key("rope.dimension_count", u32(config.headSize)),
    key("vocab_size", u32(config.vocabularySize)),
    ["diffusion.shift_logits", bool(config.logitShift === 1)],
    ...tokenizerMetadata(source, config, kind === "llada"),
  ];
  return { metadata, entries, notes };
}
