/**
 * LLaDA-MoE: LLaDA with mixtures of experts in place of feed-forwards, and heads that are normalized. Tensor names and
 * arithmetic are those of `LLaDAMoEModelLM` (inclusionAI/LLaDA-MoE-7B-A1B); it is written from as LLaDA is.
 */
import type { Kernels } from "../../native/mod.ts";
import { loadAs, type ModelFamily } from "../family.ts";
import { LLADA_MOE_KEYS } from "../configuration/keys.ts";
import { lladaMoeConfig } from "../configuration/masked.ts";
import type { ConfigFields } from "../model_config.ts";
import type { LoadOptions } from "../layers/tensors.ts";
import { maskedForwardCost, maskedGradientCost, type MaskedTransformerConfig } from "./config.ts";
import { QWEN_NAMES } from "./dream.ts";
import { MaskedTransformer } from "./transformer.ts";
import { type TransformerNames, wantedTensors } from "./weights.ts";

const namesOf = (fields: ConfigFields): TransformerNames => ({
  ...QWEN_NAMES,
  queryKeyValueBias: fields.flag("attention_bias", false),
  attentionOutputBias: fields.flag("attention_bias", false),
  mixture: {
    router: "mlp.gate",
    bias: "mlp.expert_bias",
    experts: "mlp.experts",
    shared: "shared_expert",
    parts: { gate: "gate_proj", up: "up_proj", down: "down_proj" },
  },
});

export const LLADA_MOE: ModelFamily<"llada_moe", MaskedTransformerConfig, MaskedTransformer> = {
  kind: "llada_moe",
  named: { key: "model_type", value: "llada_moe" },
  keys: LLADA_MOE_KEYS,
  config: lladaMoeConfig,
  tensors: (config, fields) => ({
    wanted: wantedTensors(config, namesOf(fields)),
    ignored: [/\.rotary_emb\.inv_freq$/, ...(config.tiesHead ? [/^lm_head\.weight$/] : [])],
  }),
  model: (source, options) => new MaskedTransformer(source, namesOf(source.fields), options),
  forwardCost: maskedForwardCost,
  gradientCost: maskedGradientCost,
};

/** Loads a LLaDA-MoE model. @throws as {@linkcode loadAs} */
export function loadLladaMoe(path: string, kernels: Kernels, options: LoadOptions = {}): MaskedTransformer {
  return loadAs(LLADA_MOE, path, kernels, options);
}
