/** The model that statistics are of: told apart by shapes and some weights of its layers. */

/** The model that statistics are of, as far as another program can tell it. */
export interface StatisticsModel {
  /** A name for people. */
  readonly name: string;
  /** Rows and columns of every linear layer that was to be looked at, by the name of its weight. */
  readonly layers: ReadonlyMap<string, readonly [rows: number, cols: number]>;
  /** {@linkcode MODEL_SAMPLES} weights of those that are known, evenly spread from the first to the last. */
  readonly samples?: ReadonlyMap<string, Float32Array> | undefined;
}

/** Where a layer is in a checkpoint. */
export interface LayerPlace {
  /** Weights that read what the layer reads: one, or several where another layout has it in parts. */
  readonly names: readonly string[];
  /** Whether that is one weight with the layer's own rows. */
  readonly isWhole: boolean;
}

/** Weights of a layer by which a model is told from another one with the same names and shapes. */
export const MODEL_SAMPLES = 8;
/** Largest difference of weights of one model in other number formats, as part of their size. */
const SAME_WEIGHTS = 0.1;

/** Whether weights are those of one layer, maybe in other number formats. */
export function isSameWeights(got: Float32Array, wanted: Float32Array): boolean {
  let difference = 0, size = 0;
  for (const [i, value] of wanted.entries()) {
    difference += (got[i]! - value) ** 2;
    size += value ** 2;
  }
  return difference <= SAME_WEIGHTS ** 2 * size;
}

/** A layer that two models have with other shapes or weights; undefined where all are alike. */
export function otherLayer(
  one: StatisticsModel | undefined,
  other: StatisticsModel | undefined,
): string | undefined {
  return [...one?.layers ?? []].find(([layer, shape]) => {
    const wanted = other?.layers.get(layer), own = one?.samples?.get(layer), its = other?.samples?.get(layer);
    return (wanted !== undefined && wanted.join() !== shape.join()) ||
      (own !== undefined && its !== undefined && !isSameWeights(its, own));
  })?.[0];
}

/** Layers of two files' models, each as the first one has it. */
export function mergedModel(
  one: StatisticsModel | undefined,
  other: StatisticsModel | undefined,
): StatisticsModel | undefined {
  if (one === undefined || other === undefined) return one ?? other;
  const samples = new Map([...other.samples ?? [], ...one.samples ?? []]);
  const layers = new Map([...other.layers, ...one.layers]);
  return { name: one.name, layers, samples: samples.size > 0 ? samples : undefined };
}
