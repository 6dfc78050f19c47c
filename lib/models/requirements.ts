/**
 * Sizes of a checkpoint's model, from config.json and the files' headers: its tensors are checked, no weight
 * is read. The speed and memory of this machine are in lib/eval/forecast.ts.
 */
import { CheckpointError } from "../errors.ts";
import { heldBytes } from "../quant/packed/layout.ts";
import { BYTES_PER_ELEMENT, type Checkpoint, type FloatDtype, openCheckpoint } from "../tensor/mod.ts";
import { hasGradients, type ModelConfig, modelConfig, tensorList } from "./families.ts";
import type { WeightDtype } from "./layers/linear.ts";
import { checkTensorList, heldDtype } from "./layers/tensors.ts";

/** A matrix of a model and how it is held. */
export interface HeldMatrix {
  readonly name: string;
  readonly rows: number;
  readonly cols: number;
  /** Element type, or bits of packed weights. */
  readonly held: WeightDtype | 2 | 3 | 4 | 8;
  readonly bytes: number;
}

/** Sizes of a model before a weight of it is read. */
export interface ModelRequirements {
  readonly model: ModelConfig;
  /** Numbers in all its tensors. */
  readonly weights: number;
  /** Those of matrices among them. */
  readonly matrixWeights: number;
  /** Bytes of the weights as they are held: as stored, but norms and biases as float32. */
  readonly weightBytes: number;
  readonly matrices: readonly HeldMatrix[];
}

/**
 * Checks a checkpoint as loading it would, and returns the sizes of its model; reads no weight.
 *
 * @throws {CheckpointError | FormatError} as loading the model does
 *
 * @example
 * ```ts
 * import { openCheckpoint } from "../tensor/mod.ts";
 * import { modelRequirements } from "./requirements.ts";
 * using checkpoint = openCheckpoint("tests/models/dream-mini");
 * console.log(modelRequirements(checkpoint).weightBytes);
 * ```
 */
export function modelRequirements(checkpoint: Checkpoint): ModelRequirements {
  const model = modelConfig(checkpoint);
  const list = tensorList(checkpoint, model);
  const packed = checkTensorList(checkpoint, list);
  let weights = 0, weightBytes = 0;
  const matrices: HeldMatrix[] = [];
  for (const { name, shape } of list.wanted) {
    const [rows, ...rest] = shape as [number, ...number[]];
    const cols = rest.reduce((product, size) => product * size, 1);
    weights += rows * cols;
    const layer = packed.get(name);
    if (rest.length === 0) {
      weightBytes += 4 * rows;
      continue;
    }
    let held: HeldMatrix["held"], bytes: number;
    if (layer === undefined) {
      held = heldDtype(checkpoint.tensors.get(name)!.info.dtype as FloatDtype);
      bytes = rows * cols * BYTES_PER_ELEMENT[held];
    } else {
      held = layer.bits;
      bytes = heldBytes({ ...layer, zeroPoint: layer.zeroPointKind });
    }
    matrices.push({ name, rows, cols, held, bytes });
    weightBytes += bytes;
  }
  const matrixWeights = matrices.reduce((sum, { rows, cols }) => sum + rows * cols, 0);
  return { model, weights, matrixWeights, weightBytes, matrices };
}

/** {@linkcode modelRequirements} of the checkpoint at a path. @throws as that and `openCheckpoint` */
export function requirementsAt(path: string): ModelRequirements {
  using checkpoint = openCheckpoint(path);
  return modelRequirements(checkpoint);
}

/**
 * Checks that a checkpoint's model has gradients, which phase 3 needs; nothing where the family is not known.
 *
 * @throws {CheckpointError} when it is of a family that has none here
 */
export function checkGradients({ kind, path }: Checkpoint): void {
  if (kind === "unknown" || hasGradients(kind)) return;
  throw new CheckpointError(
    `Cannot refine ${
      JSON.stringify(path)
    }: phase 3 has gradients of Dream, LLaDA and DiT, got ${kind}; leave phase 3 out`,
    { path },
  );
}

/** Why a checkpoint's model cannot run here, undefined where it can; reads no weight. */
export function runLimits(checkpoint: Checkpoint): CheckpointError | undefined {
  try {
    modelRequirements(checkpoint);
    return undefined;
  } catch (error) {
    if (error instanceof CheckpointError) return error;
    throw error;
  }
}
