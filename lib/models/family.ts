/** A family of models: reading its config.json, loading it, and the cost of a forward pass. */
import { CheckpointError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import { type Checkpoint, openCheckpoint } from "../tensor/mod.ts";
import { checkKeys, type KeyRow } from "./configuration/keys.ts";
import { ConfigFields, shown } from "./model_config.ts";
import { type LoadOptions, ModelTensors, type TensorList } from "./layers/tensors.ts";

/** Sizes of one forward pass. */
export interface ForwardShape {
  readonly batch: number;
  /** Tokens of a sequence. */
  readonly tokens: number;
  /** Positions of all sequences whose logits are wanted; all by default. */
  readonly rows?: number | undefined;
}

/** Memory and multiplications of one forward pass, from sizes alone. */
export interface ForwardCost {
  /** Bytes of scratch, which a model keeps for the next pass. */
  readonly activationBytes: number;
  /** Multiplications with an addition, in linear layers and attention. */
  readonly multiplyAdds: number;
}

/** Memory of a step of gradients beside the model: a forward pass and the way back. */
export interface GradientCost {
  /** Bytes of scratch, about, where a block's values are kept until the way back. */
  readonly scratchBytes: number;
  /** Where blocks are run again on the way back: one block's values are kept, and the others' inputs. */
  readonly recomputedBytes: number;
}

/** One family, an entry of the table in families.ts. */
export interface ModelFamily<Kind extends Checkpoint["kind"], Config, Model> {
  readonly kind: Kind;
  /** The entry of config.json that names the family. */
  readonly named: { readonly key: "model_type" | "_class_name"; readonly value: string };
  /** Every key of config.json that is known, and what becomes of it. */
  readonly keys: readonly KeyRow[];
  /** Sizes and constants. @throws {CheckpointError} naming the key of config.json that is missing or wrong */
  config(fields: ConfigFields): Config;
  /** Every tensor that a checkpoint of this configuration has. */
  tensors(config: Config, fields: ConfigFields): TensorList;
  model(source: ModelSource<Config>, options: LoadOptions): Model;
  forwardCost(config: Config, shape: ForwardShape): ForwardCost;
  /** Whether gradients of its models are computed here. */
  readonly hasGradients: boolean;
  gradientCost(config: Config, shape: ForwardShape): GradientCost;
}

/** The parts that a model is made from. */
export interface ModelSource<Config> {
  /** Path of the checkpoint, for messages. */
  readonly path: string;
  readonly fields: ConfigFields;
  readonly config: Config;
  readonly kernels: Kernels;
  /** Checked against the family's list. */
  readonly tensors: ModelTensors;
}

/**
 * The configuration that a family reads from config.json, once nothing in it asks for what is not run.
 *
 * @throws {CheckpointError} naming the key that is missing, wrong or not supported
 */
export function configOf<Config>(
  { keys, config }: Pick<ModelFamily<Checkpoint["kind"], Config, unknown>, "keys" | "config">,
  fields: ConfigFields,
): Config {
  checkKeys(fields, keys);
  return config(fields);
}

/** A model of a family out of an open checkpoint, full precision or packed. @throws as {@linkcode loadAs} */
export function modelOf<Kind extends Checkpoint["kind"], Config, Model>(
  family: ModelFamily<Kind, Config, Model>,
  checkpoint: Checkpoint,
  kernels: Kernels,
  options: LoadOptions,
): Model {
  const { path } = checkpoint, { key, value } = family.named;
  if (checkpoint.kind !== family.kind) {
    throw new CheckpointError(
      `Cannot load ${shown(path)}: ${key} must be ${shown(value)}, got ${shown(checkpoint.config?.[key])}`,
      { path },
    );
  }
  const fields = ConfigFields.of(checkpoint);
  const config = configOf(family, fields);
  const tensors = new ModelTensors(checkpoint, kernels, family.tensors(config, fields), options);
  return family.model({ path, fields, config, kernels, tensors }, options);
}

/**
 * Loads a model of one family, full precision or packed. Weights stay as they are stored.
 *
 * @throws {CheckpointError} when config.json or the tensors are not the family's: everything missing or in
 * excess is listed
 * @throws {FormatError} when a file is not what its format promises
 */
export function loadAs<Kind extends Checkpoint["kind"], Config, Model>(
  family: ModelFamily<Kind, Config, Model>,
  path: string,
  kernels: Kernels,
  options: LoadOptions = {},
): Model {
  using checkpoint = openCheckpoint(path);
  return modelOf(family, checkpoint, kernels, options);
}
