/**
 * A family of masked language models: the transformer under the family's names, and its own way to write. One
 * entry of the table in ../families.ts.
 */
import type { KeyRow } from "../configuration/keys.ts";
import type { Checkpoint } from "../../tensor/mod.ts";
import type { ModelFamily } from "../family.ts";
import type { ConfigFields } from "../model_config.ts";
import type { SeedOptions } from "../random.ts";
import { maskedForwardCost, maskedGradientCost, type MaskedTransformerConfig } from "./config.ts";
import type { GenerationStep } from "./generation.ts";
import type { TokenSamplingOptions } from "./token_sampling.ts";
import { MaskedTransformer } from "./transformer.ts";
import { type TransformerNames, wantedTensors } from "./weights.ts";

/** Names of Qwen's transformers, which Dream, LLaDA-MoE and SDAR have. */
export const QWEN_NAMES: Omit<TransformerNames, "queryKeyValueBias"> = {
  embedding: "model.embed_tokens",
  finalNorm: "model.norm",
  head: "lm_head",
  blocks: "model.layers",
  block: {
    attentionNorm: "input_layernorm",
    query: "self_attn.q_proj",
    key: "self_attn.k_proj",
    value: "self_attn.v_proj",
    attentionOutput: "self_attn.o_proj",
    feedForwardNorm: "post_attention_layernorm",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    down: "mlp.down_proj",
  },
  headNorms: { queryNorm: "self_attn.q_norm", keyNorm: "self_attn.k_norm" },
  otherBias: false,
};

/** Buffers that old versions of transformers stored; they follow from the configuration. */
const STORED_BUFFERS = /\.rotary_emb\.inv_freq$/;

/** Settings of writing that some family has; each heeds its own. */
export interface WritingSettings extends TokenSamplingOptions, SeedOptions {
  readonly steps?: number | undefined;
  /** Order in which masks are filled, one of the family's `algorithms`. */
  readonly algorithm?: string | undefined;
  readonly algorithmTemperature?: number | undefined;
  readonly eps?: number | undefined;
  readonly threshold?: number | undefined;
  readonly guidance?: number | undefined;
  readonly blockLength?: number | undefined;
  /** Tokens at the end of each sequence that are written in blocks. */
  readonly generationLength?: number | undefined;
}

/** Fills the masks of `canvas: i32[batch, tokens]` as the family's own code does, one step a turn. */
type Write = (
  model: MaskedTransformer,
  canvas: Int32Array,
  batch: number,
  settings: WritingSettings,
) => Generator<GenerationStep, Int32Array>;

/** What one family of masked language models has of its own. */
interface MaskedFamilyParts<Kind> {
  readonly kind: Kind;
  /** Its models in a message. */
  readonly title: string;
  /** `model_type` of config.json. */
  readonly modelType: string;
  readonly keys: readonly KeyRow[];
  readonly hasGradients: boolean;
  config(fields: ConfigFields): MaskedTransformerConfig;
  names(fields: ConfigFields): TransformerNames;
  /** Settings that it heeds beside those of all: temperature, steps, seed and excluded tokens. */
  readonly settings: readonly (keyof WritingSettings)[];
  /** Orders in which it can fill masks. */
  readonly algorithms: readonly string[];
  readonly write: Write;
}

/** A family with its way to write. */
export type MaskedFamily<Kind extends Checkpoint["kind"]> =
  & ModelFamily<Kind, MaskedTransformerConfig, MaskedTransformer>
  & Pick<MaskedFamilyParts<Kind>, "title" | "settings" | "algorithms" | "write">;

/** Makes a family of what it has of its own. */
export function maskedFamily<const Kind extends Checkpoint["kind"]>(
  { modelType, config, names, ...own }: MaskedFamilyParts<Kind>,
): MaskedFamily<Kind> {
  return {
    ...own,
    named: { key: "model_type", value: modelType },
    config,
    tensors(config, fields) {
      const own = names(fields), tied = new RegExp(`^${own.head.replaceAll(".", "\\.")}\\.weight$`);
      return {
        wanted: wantedTensors(config, own),
        ignored: [STORED_BUFFERS, ...(config.tiesHead ? [tied] : [])],
      };
    },
    model: (source, options) => new MaskedTransformer(source, names(source.fields), options),
    forwardCost: maskedForwardCost,
    gradientCost: maskedGradientCost,
  };
}
