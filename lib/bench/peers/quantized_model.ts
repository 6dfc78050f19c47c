/** A whole model through a method: the layers that the pipeline quantizes by default, one after the other, and the model that comes of it. */
import { resolveConfig } from "../../config/mod.ts";
import { type LoadedModel, modelFrom } from "../../models/mod.ts";
import type { Kernels } from "../../native/mod.ts";
import { planQuantization } from "../../plan/plan.ts";
import { convertFloats } from "../../quant/mod.ts";
import type { Checkpoint, FloatDtype } from "../../tensor/mod.ts";
import type { LayerInputs, Method, Unsupported } from "./method.ts";
import { ReplacedCheckpoint } from "./replaced_checkpoint.ts";

/** A matrix that is to be quantized. */
export interface Layer {
  readonly name: string;
  readonly rows: number;
  readonly cols: number;
  readonly weights: Float32Array;
}

/** The matrices that the pipeline quantizes unless it is told otherwise, in the order of the files. */
export function quantizedLayers(checkpoint: Checkpoint, kernels: Kernels): Layer[] {
  const { rows } = planQuantization(checkpoint, resolveConfig({}).config);
  return rows.flatMap(({ name, shape, dtype, action }): Layer[] => {
    if (action === "keep") return [];
    const [rows, cols] = shape as [number, number];
    const data = checkpoint.read(name);
    const bytes = dtype === "F32"
      ? data
      : convertFloats(kernels, { data, dtype: dtype as FloatDtype }, rows * cols, "F32");
    return [{ name, rows, cols, weights: new Float32Array(bytes.buffer) }];
  });
}

/** A model as a method left it. */
export interface QuantizedModel {
  readonly model: LoadedModel;
  readonly weights: number;
  readonly storedBytes: number;
  readonly bitsPerWeight: number;
  /** √(Σ (w − ŵ)² / Σ w²) over all quantized layers. */
  readonly relativeRmsError: number;
  /** Of quantizing alone; collecting inputs is not in it. */
  readonly seconds: number;
  /** By layer, what the method had to say. */
  readonly notes: readonly string[];
}

/** Where a method's inputs come from. */
export interface InputSource {
  /** Of these layers, as `model` sees the calibration data; undefined is the full-precision model. */
  collect(layers: readonly Layer[], model?: LoadedModel): ReadonlyMap<string, LayerInputs>;
}

export interface QuantizeModelOptions {
  /**
   * The blocks of the model one after the other, each with the inputs that the blocks before it, quantized already, leave to it; else all
   * layers with the inputs of the full-precision model. Default false.
   */
  readonly blockwise?: boolean;
  /** Default 1. */
  readonly threads?: number;
}

/** Layers of the same block, blocks in their order; those of no block, as a head, last. */
function blocksOf(layers: readonly Layer[]): Layer[][] {
  const indexOf = ({ name }: Layer) => Number(/\.(\d+)\./.exec(name)?.[1] ?? Infinity);
  return [...Map.groupBy(layers, indexOf)].toSorted(([a], [b]) => a < b ? -1 : 1).map(([, block]) => block);
}

/**
 * Quantizes every layer by itself and loads the model with what came of them.
 *
 * @throws as the method does
 */
export function quantizeModel(
  checkpoint: Checkpoint,
  kernels: Kernels,
  layers: readonly Layer[],
  method: Method,
  source: InputSource,
  { blockwise = false, threads = 1 }: QuantizeModelOptions = {},
): QuantizedModel | Unsupported {
  method.prepare?.();
  const replaced = new Map<string, Float32Array>();
  const load = () => modelFrom(new ReplacedCheckpoint(checkpoint, replaced), kernels, { threads });
  const notes: string[] = [];
  let weights = 0, storedBytes = 0, error = 0, squares = 0, seconds = 0;
  for (const part of blockwise ? blocksOf(layers) : [layers]) {
    const model = replaced.size > 0 ? load() : undefined;
    const inputs = method.needsInputs ? source.collect(part, model) : undefined;
    for (const layer of part) {
      const begin = performance.now();
      const result = method.quantize(layer.weights, layer.rows, layer.cols, inputs?.get(layer.name));
      seconds += (performance.now() - begin) / 1000;
      if ("unsupported" in result) return result;
      replaced.set(layer.name, result.weights);
      weights += layer.weights.length;
      storedBytes += result.storedBytes;
      if (result.note !== undefined) notes.push(`${layer.name}: ${result.note}`);
      for (let i = 0; i < layer.weights.length; i++) {
        error += (layer.weights[i]! - result.weights[i]!) ** 2;
        squares += layer.weights[i]! ** 2;
      }
    }
  }
  return {
    model: load(),
    weights,
    storedBytes,
    bitsPerWeight: storedBytes * 8 / weights,
    relativeRmsError: Math.sqrt(error / squares),
    seconds,
    notes,
  };
}
