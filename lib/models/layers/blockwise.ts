/**
 * A model run a block at a time, with other weights where that is wanted and an eye on what its linear layers read: what
 * calibration and solving need of a model, whatever its family.
 */
import type { TimeParameters } from "../../time/mod.ts";
import type { Matrix } from "./kernels.ts";
import { shown } from "./model_config.ts";
import type { LinearLayer } from "./tensors.ts";

/**
 * Sees the input of every linear layer: `x: f32[rows, cols]`, valid only during the call. `residual` is what the layer's output is
 * then added to as it is, where that is what happens: `f32[rows, layer rows]`.
 */
export type LayerObserver = (
  layer: LinearLayer,
  x: Float32Array,
  rows: number,
  residual?: Float32Array,
) => void;

/** What can be done to the linear layers of a run. */
export interface LayerOptions {
  /** For calibration. */
  readonly observe?: LayerObserver | undefined;
  /** Weights that take the place of a layer's own, by the name of its weight. */
  readonly weights?: ReadonlyMap<string, Matrix> | undefined;
}

/** Linear layers that read the same input, and the block they belong to; those behind the last block have its index + 1. */
export interface Stage {
  readonly block: number;
  readonly layers: readonly LinearLayer[];
}

/** A model that can be run a block at a time. */
export interface Blockwise<Batch> {
  /** Every linear layer of a forward pass, in the order in which they run. */
  readonly stages: readonly Stage[];
  /** What the first block reads: memory of its own. */
  start(batch: Batch): Float32Array<ArrayBuffer>;
  /** Runs a block on hidden states, in place. */
  runBlock(block: number, batch: Batch, hidden: Float32Array<ArrayBuffer>, options: LayerOptions): void;
  /** What the model makes of the last block's hidden states: logits or a prediction. Scratch: the next call overwrites it. */
  finish(batch: Batch, hidden: Float32Array, options: LayerOptions): Float32Array;
}

/** The layer with the weights that take the place of its own, if any do. */
export function withWeights(
  layer: LinearLayer,
  weights: ReadonlyMap<string, Matrix> | undefined,
): LinearLayer {
  const other = weights?.get(layer.name);
  return other === undefined ? layer : { ...layer, weights: other };
}

/**
 * Time parameters belong to the weights that a model was loaded with: others cannot take their place.
 *
 * @throws {TypeError} on a model with time parameters
 */
export function checkPlain(
  { path, timeParameters }: {
    readonly path: string;
    readonly timeParameters: TimeParameters | undefined;
  },
): void {
  if (timeParameters === undefined) return;
  throw new TypeError(
    `Cannot run ${
      shown(path)
    }: with other weights or block by block it must have no time parameters, got some`,
  );
}
