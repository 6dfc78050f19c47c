/** Models run block by block, with other weights and an observer of the layers' inputs where wanted. */
import { WeightsError } from "../../errors.ts";
import type { ComingArray, Kernels } from "../../native/mod.ts";
import type { TimeParameters } from "../../time/mod.ts";
import { readArrays } from "../../quant/packed/layout.ts";
import type { Matrix } from "./linear.ts";
import { shown } from "../model_config.ts";
import type { EmbeddingTable, LinearLayer } from "./tensors.ts";

/**
 * Sees the input of every linear layer: `x: f32[rows, cols]`, valid only during the call. `residual:
 * f32[rows, layer rows]` is given where the layer's output is then added to it as it is.
 */
export type LayerObserver = (
  layer: LinearLayer,
  x: Float32Array,
  rows: number,
  residual?: Float32Array,
) => void;

/** Changes to the layers and tables of a run. */
export interface PassOptions {
  /** For calibration. */
  readonly observe?: LayerObserver | undefined;
  /** Weights in place of a layer's or table's, by the name of its weight. */
  readonly weights?: ReadonlyMap<string, Matrix> | undefined;
}

/** Linear layers with the same input, and their block; those behind the last block have its index + 1. */
export interface Stage {
  readonly block: number;
  readonly layers: readonly LinearLayer[];
}

/** A run of a block that stops before every stage: what its layers read, valid until the run goes on. */
export interface StageStop {
  readonly layers: readonly LinearLayer[];
  /** `f32[rows, cols]` */
  readonly x: Float32Array<ArrayBuffer>;
  readonly rows: number;
  /** As a {@linkcode LayerObserver} gets it. */
  readonly residual?: Float32Array | undefined;
  /**
   * Scratch, beside `x` and the hidden states, that the rest of the block reads: whoever lets other runs of
   * the model come between puts all these back before this one goes on.
   */
  readonly kept?: readonly Float32Array<ArrayBuffer>[] | undefined;
}

/** A run that stops at every stage, and its result. */
export type StagedRun<Result> = Generator<StageStop, Result, void>;

/** The result of a run without its stops. */
export function withoutStops<Result>(run: StagedRun<Result>): Result {
  for (;;) {
    const { done, value } = run.next();
    if (done === true) return value;
  }
}

/**
 * A pass over hidden states whose arrays kernels hold; behind it they are the host's again, as is the result.
 *
 * **Shapes** `hidden: f32[rows, cols]`, changed in place or not
 */
export function heldPass<Values extends Float32Array>(
  { arrays }: Kernels,
  hidden: Float32Array,
  run: () => Values,
): Values {
  arrays.open();
  arrays.hold(hidden);
  try {
    const result = arrays.release(run());
    arrays.release(hidden);
    return result;
  } finally {
    arrays.drop();
  }
}

/**
 * {@linkcode heldPass} with stops, at which all that a stop names is the host's.
 *
 * @param begin called in front of the first stop and behind each
 */
export function* heldStages<Values extends Float32Array>(
  { arrays }: Kernels,
  hidden: Float32Array,
  run: StagedRun<Values>,
  begin: () => void,
): StagedRun<Values> {
  let own: readonly Float32Array[] = [hidden];
  for (;;) {
    arrays.open();
    try {
      begin();
      for (const array of own) arrays.hold(array);
      const { done, value } = run.next();
      if (done === true) {
        arrays.release(value);
        arrays.release(hidden);
        return value;
      }
      own = [hidden, value.x, ...value.residual === undefined ? [] : [value.residual], ...value.kept ?? []];
      for (const array of own) arrays.release(array);
      arrays.drop();
      yield value;
    } finally {
      arrays.drop();
    }
  }
}

/** A model that can be run a block at a time. */
export interface Blockwise<Batch> {
  /** Every linear layer of a forward pass, in the order in which they run. */
  readonly stages: readonly Stage[];
  /** Every table whose rows are looked up by token. */
  readonly tables: readonly EmbeddingTable[];
  /** The first block's input, in new memory. */
  start(batch: Batch, options?: PassOptions): Float32Array<ArrayBuffer>;
  /** Runs a block on hidden states, in place. */
  runBlock(block: number, batch: Batch, hidden: Float32Array<ArrayBuffer>, options: PassOptions): void;
  /** {@linkcode runBlock} with stops; behind the last block {@linkcode finish}. */
  stagesOf(
    block: number,
    batch: Batch,
    hidden: Float32Array<ArrayBuffer>,
    options: PassOptions,
  ): StagedRun<Float32Array>;
  /** Logits or prediction from the last block's hidden states. Scratch: the next call overwrites it. */
  finish(batch: Batch, hidden: Float32Array, options: PassOptions): Float32Array;
}

/**
 * What layers read of their weights: arrays of packed ones, and plain ones, which are read where there is
 * memory beside those that are needed.
 *
 * @param needed names of matrices that stay
 * @param isCopied whether kernels read a layer's weights as they are stored
 */
export function* comingArrays(
  layers: readonly LinearLayer[],
  needed: ReadonlySet<string>,
  isCopied: (weights: Matrix) => boolean,
): Generator<ComingArray, void> {
  for (const { weights } of layers) {
    const copies = isCopied(weights);
    if (!("packed" in weights)) {
      const { array, bytesRead } = weights.ahead?.(needed) ?? { array: weights.data, bytesRead: 0 };
      yield { array: copies ? array : undefined, bytesRead };
    } else if (copies) { for (const array of readArrays(weights)) yield { array, bytesRead: 0 }; }
  }
}

/** The layer or table with other weights, where there are some for it. */
export function withWeights<L extends EmbeddingTable>(
  layer: L,
  weights: ReadonlyMap<string, Matrix> | undefined,
): L {
  const other = weights?.get(layer.name);
  return other === undefined ? layer : { ...layer, weights: other };
}

/** Time parameters belong to the weights a model was loaded with. @throws {TypeError} on a model with some */
export function checkPlain({ path, timeParameters }: {
  readonly path: string;
  readonly timeParameters: TimeParameters | undefined;
}): void {
  if (timeParameters === undefined) return;
  throw new TypeError(
    `Cannot run ${
      shown(path)
    }: with other weights or block by block it must have no time parameters, got some`,
  );
}

/** An inspector of a pass. @throws {WeightsError} when it sees the first value that is not finite */
export function firstFault(path: string): (place: string, values: Float32Array) => void {
  return (place, values) => {
    const bad = values.findIndex((value) => !Number.isFinite(value));
    if (bad < 0) return;
    throw new WeightsError(
      `Cannot run ${shown(path)}: every value must be finite, got ${values[bad]} from ${shown(place)}`,
      { path, tensor: place },
    );
  };
}
