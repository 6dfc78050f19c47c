/**
 * The families of models that can be run. A new one is an entry of the table and a name in `modelKind` of
 * lib/tensor, which tells the family of a checkpoint.
 */
import { CheckpointError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import { type Checkpoint, openCheckpoint, refuseForeign } from "../tensor/mod.ts";
import { DIT } from "./dit/model.ts";
import {
  configOf,
  type ForwardCost,
  type ForwardShape,
  type GradientCost,
  type ModelFamily,
  modelOf,
} from "./family.ts";
import { unknownKeys } from "./configuration/keys.ts";
import { ConfigFields, shown } from "./model_config.ts";
import type { LoadOptions, TensorList } from "./layers/tensors.ts";
import { DREAM } from "./masked/dream.ts";
import type { MaskedFamily } from "./masked/family.ts";
import { LLADA } from "./masked/llada.ts";
import { LLADA_MOE } from "./masked/llada_moe.ts";
import { SDAR } from "./masked/sdar.ts";
import { storedTimeParameters } from "./stored_time_parameters.ts";

const FAMILIES = { dream: DREAM, llada: LLADA, llada_moe: LLADA_MOE, sdar: SDAR, dit: DIT } as const;

type Families = typeof FAMILIES;
type Kind = keyof Families;
type AnyFamily = ModelFamily<Kind, unknown, unknown>;

/** Sizes of a model before it is loaded. */
export type ModelConfig = {
  [K in Kind]: { readonly kind: K; readonly config: ReturnType<Families[K]["config"]> };
}[Kind];

/** A loaded model, by its family. `folder` is where the checkpoint's other files lie. */
export type LoadedModel = {
  [K in Kind]: {
    readonly kind: K;
    readonly folder: string;
    readonly model: ReturnType<Families[K]["model"]>;
  };
}[Kind];

/** @throws {CheckpointError} when the family is unknown, naming those that are not */
function familyOf(checkpoint: Checkpoint): AnyFamily {
  refuseForeign(checkpoint, "load");
  const { kind, config, path } = checkpoint;
  if (kind !== "unknown") return FAMILIES[kind] as AnyFamily;
  const known = Object.values(FAMILIES).map(({ named: { key, value } }) => `${shown(value)} (${key})`);
  const found = config === undefined
    ? "no config.json"
    : shown(config["model_type"] ?? config["_class_name"] ?? config["architectures"]);
  throw new CheckpointError(
    `Cannot load ${shown(path)}: the architecture must be one of ${known.join(", ")}, got ${found}`,
    { path },
  );
}

/**
 * The sizes that a checkpoint's config.json gives its model; reads no tensor.
 *
 * @throws {CheckpointError} when the family is unknown, or a key is missing, wrong or not supported
 */
export function modelConfig(checkpoint: Checkpoint): ModelConfig {
  const family = familyOf(checkpoint);
  return { kind: family.kind, config: configOf(family, ConfigFields.of(checkpoint)) } as ModelConfig;
}

/** A family of masked language models. */
export type LanguageFamily = { [K in Kind]: Families[K] extends MaskedFamily<K> ? Families[K] : never }[Kind];

/** The family of a kind of masked language models: how it writes. */
export function languageFamily(kind: LanguageFamily["kind"]): LanguageFamily {
  return FAMILIES[kind];
}

/** Whether gradients of a family's models are computed here. */
export const hasGradients = (kind: Kind): boolean => FAMILIES[kind].hasGradients;

/** Keys of config.json that mean nothing here: they are ignored, and a user is told. */
export function keysWithoutMeaning(checkpoint: Checkpoint): string[] {
  return unknownKeys(ConfigFields.of(checkpoint), familyOf(checkpoint).keys);
}

/** Every tensor that a checkpoint of this configuration has. */
export function tensorList(checkpoint: Checkpoint, { kind, config }: ModelConfig): TensorList {
  return (FAMILIES[kind] as AnyFamily).tensors(config, ConfigFields.of(checkpoint));
}

/** Cost of a forward pass of `batch` images, or of `batch` sequences of so many tokens. */
export function forwardCost({ kind, config }: ModelConfig, shape: ForwardShape): ForwardCost {
  return (FAMILIES[kind] as AnyFamily).forwardCost(config, shape);
}

/** Memory of a step of gradients of `batch` images, or of `batch` sequences of so many tokens. */
export function gradientCost({ kind, config }: ModelConfig, shape: ForwardShape): GradientCost {
  return (FAMILIES[kind] as AnyFamily).gradientCost(config, shape);
}

/**
 * Loads whatever model an open checkpoint is, full precision or packed. The checkpoint may be closed
 * afterwards.
 *
 * @throws {CheckpointError} as {@linkcode modelConfig}, or listing tensors that are missing, in excess or of
 * another shape
 * @throws {FormatError} when a file is not what its format promises
 */
export function modelFrom(checkpoint: Checkpoint, kernels: Kernels, options: LoadOptions = {}): LoadedModel {
  const family = familyOf(checkpoint);
  const model = modelOf(family, checkpoint, kernels, options);
  return { kind: family.kind, folder: checkpoint.folder, model } as LoadedModel;
}

/**
 * Loads whatever model lies at a path: {@linkcode modelFrom} of it.
 *
 * @example
 * ```ts
 * import { openKernels } from "../native/mod.ts";
 * import { loadModel } from "./mod.ts";
 * console.log(loadModel("tests/models/glyph-dit", await openKernels()).kind); // dit
 * ```
 */
export function loadModel(path: string, kernels: Kernels, options: LoadOptions = {}): LoadedModel {
  using checkpoint = openCheckpoint(path);
  return modelFrom(checkpoint, kernels, options);
}

/**
 * Loads whatever model lies at a path, with the time parameters that lie beside it, if any do.
 *
 * @throws as {@linkcode modelFrom} and {@linkcode storedTimeParameters}
 */
export function loadStoredModel(
  path: string,
  kernels: Kernels,
  options: Omit<LoadOptions, "timeParameters"> = {},
): LoadedModel {
  using checkpoint = openCheckpoint(path);
  return modelFrom(checkpoint, kernels, { ...options, timeParameters: storedTimeParameters(checkpoint) });
}
