/** Matrices of a checkpoint as linear layers, whatever its family: they can be solved for, not run. */
import type { Kernels } from "../native/mod.ts";
import type { Checkpoint } from "../tensor/mod.ts";
import type { Blockwise, Stage } from "./layers/blockwise.ts";
import type { DenseMatrix } from "./layers/linear.ts";
import { ModelTensors } from "./layers/tensors.ts";
import type { HeldWeights } from "./layers/held_weights.ts";

/** The linear layers of a model, by what reads the same input, and its tables of tokens. */
export type ModelLayers = Pick<Blockwise<never>, "stages" | "tables">;

/**
 * Layers of a checkpoint by names of their weights, a stage for each group of names; no table.
 *
 * @param held as {@linkcode LoadOptions} has it: the checkpoint must stay open
 * @throws {CheckpointError} when a tensor is missing or not floating-point
 */
export function checkpointLayers(
  checkpoint: Checkpoint,
  kernels: Kernels,
  groups: readonly (readonly string[])[],
  held: HeldWeights | undefined,
): ModelLayers {
  const wanted = groups.flat().map((name) => ({
    name,
    shape: checkpoint.tensors.get(name)?.info.shape ?? [],
  }));
  const tensors = new ModelTensors(checkpoint, kernels, { wanted, ignored: [/^/] }, { held });
  const stages = groups.map((names, block): Stage => ({
    block,
    layers: names.map((name) => {
      const { weights } = tensors.matrix(name),
        [experts = 1, ...shape] = checkpoint.tensors.get(name)!.info.shape;
      return shape.length === 2
        ? { name, weights: flattened(weights as DenseMatrix, experts, shape), bias: undefined, experts }
        : { name, weights, bias: undefined };
    }),
  }));
  return { stages, tables: [] };
}

/** A tensor of three dimensions as the rows of all its matrices. */
function flattened(whole: DenseMatrix, experts: number, [rows, cols]: readonly number[]): DenseMatrix {
  return {
    ...{ rows: experts * rows!, cols: cols!, dtype: whole.dtype },
    get data() {
      return whole.data;
    },
  } as DenseMatrix;
}
