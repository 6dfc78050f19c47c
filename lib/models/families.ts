/** The families of models that can be run: which one a checkpoint is of, and what it then must hold. */
import { CheckpointError } from "../errors.ts";
import type { Checkpoint } from "../tensor/mod.ts";
import { type DitConfig, ditConfig, ditTensors } from "./dit/model.ts";
import { dreamConfig, dreamTensors } from "./masked/dream.ts";
import { lladaConfig, lladaTensors } from "./masked/llada.ts";
import type { MaskedTransformerConfig } from "./masked/transformer.ts";
import { ConfigFields, shown } from "./layers/model_config.ts";
import type { TensorList } from "./layers/tensors.ts";

/** Sizes of a model before it is loaded. */
export type ModelConfig =
  | { readonly kind: "dream" | "llada"; readonly config: MaskedTransformerConfig }
  | { readonly kind: "dit"; readonly config: DitConfig };

/**
 * What config.json of a checkpoint says of its model; reads no tensor.
 *
 * @throws {CheckpointError} when the family is unknown (naming those that are not), or a key is missing, wrong or not supported
 */
export function modelConfig(checkpoint: Checkpoint): ModelConfig {
  const { kind, config, path } = checkpoint;
  const fields = () => ConfigFields.of(checkpoint);
  if (kind === "dream") return { kind, config: dreamConfig(fields()) };
  if (kind === "llada") return { kind, config: lladaConfig(fields()) };
  if (kind === "dit") return { kind, config: ditConfig(fields()) };
  const named = config === undefined
    ? "no config.json"
    : shown(config["model_type"] ?? config["_class_name"] ?? config["architectures"]);
  throw new CheckpointError(
    `Cannot load ${
      shown(path)
    }: the architecture must be "Dream", "llada" (model_type) or "DiTTransformer2DModel" ` +
      `(_class_name), got ${named}`,
    { path },
  );
}

/** Every tensor that a checkpoint of this configuration has. */
export function tensorList(checkpoint: Checkpoint, { kind, config }: ModelConfig): TensorList {
  if (kind === "dit") return ditTensors(config);
  return kind === "dream" ? dreamTensors(config) : lladaTensors(ConfigFields.of(checkpoint), config);
}
