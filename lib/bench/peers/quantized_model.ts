/** A whole model through a method: the layers that the pipeline quantizes by default, one after the other. */
import type { Calibrated } from "../../calibration/mod.ts";
import { resolveConfig } from "../../config/mod.ts";
import { type LoadedModel, modelFrom } from "../../models/mod.ts";
import type { Kernels } from "../../native/mod.ts";
import { planQuantization } from "../../plan/plan.ts";
import { convertFloats } from "../../quant/mod.ts";
import type { Checkpoint, FloatDtype } from "../../tensor/mod.ts";
import { calibrationKeys, calibrationOf, collectInputs, type Positions } from "./calibration.ts";
import type { LayerInputs, Method, Unsupported } from "./method.ts";
import { ReplacedCheckpoint } from "./replaced_checkpoint.ts";

export interface Layer {
  readonly name: string;
  readonly rows: number;
  readonly cols: number;
  readonly weights: Float32Array;
}

/** A full-precision model that is quantized, and the data that all methods are calibrated on. */
export interface Target {
  readonly path: string;
  readonly checkpoint: Checkpoint;
  readonly full: LoadedModel;
  readonly kernels: Kernels;
  readonly layers: readonly Layer[];
  /** Keys of the configuration about calibration, and the data that they stand for. */
  readonly keys: Readonly<Record<string, unknown>>;
  readonly data: Readonly<Record<Positions, Calibrated>>;
  /** Second moments of the inputs of layers, as full precision or a quantized model makes them. */
  inputsOf(
    positions: Positions,
    layers: readonly Layer[],
    quantized?: LoadedModel,
  ): Promise<ReadonlyMap<string, LayerInputs>>;
}

/** Peers quantize linear layers: token tables stay as they are, for all alike. */
export const KEPT_TABLES = { embedding_bits: 16, head_bits: 16 } as const;

/** The linear layers that the pipeline quantizes unless it is told otherwise, in the order of the files. */
function quantizedLayers(checkpoint: Checkpoint, kernels: Kernels): Layer[] {
  const { rows } = planQuantization(checkpoint, resolveConfig({ overrides: KEPT_TABLES }).config);
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

/** Opens the calibration data of a model. Full precision runs once a kind of weights. */
export async function targetOf(
  opened: Pick<Target, "path" | "checkpoint" | "full" | "kernels">,
  quick = false,
): Promise<Target> {
  const { path, checkpoint, full, kernels } = opened;
  const keys = calibrationKeys(path, quick);
  const data = {
    by_role: await calibrationOf(full, checkpoint, keys),
    alike: await calibrationOf(full, checkpoint, keys, "alike"),
  };
  const layers = quantizedLayers(checkpoint, kernels);
  const collected = new Map<Positions, ReturnType<typeof collectInputs>>();
  const collect = (positions: Positions, layers: readonly Layer[], model: LoadedModel) =>
    collectInputs(model, data[positions], layers.map(({ name }) => name), kernels);
  return {
    ...opened,
    layers,
    keys,
    data,
    inputsOf(positions, part, quantized) {
      if (quantized !== undefined) return collect(positions, part, quantized);
      const found = collected.get(positions) ?? collect(positions, layers, full);
      collected.set(positions, found);
      return found;
    },
  };
}

/** A model as a method left it. */
export interface QuantizedModel {
  readonly model: LoadedModel;
  readonly weights: number;
  readonly storedBytes: number;
  readonly bitsPerWeight: number;
  /** √(Σ (w − ŵ)² / Σ w²) over all quantized layers. */
  readonly relativeRmsError: number;
  /** Of quantizing alone, without collecting inputs. */
  readonly seconds: number;
  /** Remarks of the method by layer. */
  readonly notes: readonly string[];
}

export interface QuantizeModelOptions {
  /**
   * The blocks of the model one after the other, each on the inputs that the quantized blocks before it make;
   * else all layers on the inputs of the full-precision model. Default false.
   */
  readonly blockwise?: boolean;
  /** Default `by_role`. */
  readonly positions?: Positions;
}

/** Layers of the same block, blocks in their order; those of no block, as a head, last. */
function blocksOf(layers: readonly Layer[]): Layer[][] {
  const indexOf = ({ name }: Layer) => Number(/\.(\d+)\./.exec(name)?.[1] ?? Infinity);
  return [...Map.groupBy(layers, indexOf)].toSorted(([a], [b]) => a < b ? -1 : 1).map(([, block]) => block);
}

/** Quantizes every layer by itself and loads the model with the results. @throws as the method does */
export async function quantizeModel(
  { checkpoint, kernels, layers, inputsOf }: Target,
  method: Method,
  { blockwise = false, positions = "by_role" }: QuantizeModelOptions = {},
): Promise<QuantizedModel | Unsupported> {
  method.prepare?.();
  const replaced = new Map<string, Float32Array>();
  const load = () => modelFrom(new ReplacedCheckpoint(checkpoint, replaced), kernels);
  const notes: string[] = [];
  let weights = 0, storedBytes = 0, error = 0, squares = 0, seconds = 0;
  for (const part of blockwise ? blocksOf(layers) : [layers]) {
    const before = replaced.size === 0 ? undefined : load();
    const inputs = method.needsInputs ? await inputsOf(positions, part, before) : undefined;
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
  const bitsPerWeight = storedBytes * 8 / weights, relativeRmsError = Math.sqrt(error / squares);
  return { model: load(), weights, storedBytes, bitsPerWeight, relativeRmsError, seconds, notes };
}
