/**
 * LLaDA-MoE: LLaDA with mixtures of experts in place of feed-forwards, and heads that are normalized. Tensor
 * names and arithmetic are those of `LLaDAMoEModelLM` (inclusionAI/LLaDA-MoE-7B-A1B); it is written from as
 * LLaDA is.
 */
import type { Kernels } from "../../native/mod.ts";
import { loadAs } from "../family.ts";
import { LLADA_MOE_KEYS } from "../configuration/keys.ts";
import { lladaMoeConfig } from "../configuration/masked.ts";
import type { LoadOptions } from "../layers/tensors.ts";
import { type MaskedFamily, maskedFamily, QWEN_NAMES } from "./family.ts";
import { LLADA_WRITING } from "./llada.ts";
import type { MaskedTransformer } from "./transformer.ts";

export const LLADA_MOE: MaskedFamily<"llada_moe"> = maskedFamily({
  kind: "llada_moe",
  title: "a LLaDA-MoE model",
  modelType: "llada_moe",
  keys: LLADA_MOE_KEYS,
  hasGradients: false,
  config: lladaMoeConfig,
  names: (fields) => ({
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
  }),
  ...LLADA_WRITING,
});

/** Loads a LLaDA-MoE model. @throws as {@linkcode loadAs} */
export function loadLladaMoe(path: string, kernels: Kernels, options: LoadOptions = {}): MaskedTransformer {
  return loadAs(LLADA_MOE, path, kernels, options);
}
