/**
 * Time parameters in closed form: output corrections of every time group, under the Gauss-Markov prior where
 * wanted, or weight scales by time group, from the moments of the full-precision layers' inputs.
 */
import { CalibrationError } from "../errors.ts";
import { dequantize, type PackedTensor } from "../quant/mod.ts";
import { correctOutputs, type WeightedMoments } from "../thermo/mod.ts";
import {
  type CalibrationStatistics,
  type LayerParameters,
  type TimeGroups,
  timeWeightScales,
} from "../time/mod.ts";
import { collectStatistics } from "../calibration/collect.ts";
import { type PhaseContext, transitionsOf } from "./context.ts";
import type { OutputSettings } from "./settings.ts";
import { denseWeights } from "../solve/dense_weights.ts";

/** Fewest samples of which a time group's moments are taken. */
const MIN_SAMPLES = 2;

/** Moments of a layer by time group; below {@linkcode MIN_SAMPLES} samples, the nearest neighbour's. */
function momentsOf(
  statistics: CalibrationStatistics,
  layer: string,
  weights: ArrayLike<number>,
): WeightedMoments[] {
  const { samples } = statistics.inputOf(layer);
  const filled = [...samples.keys()].filter((g) => samples[g]! >= MIN_SAMPLES);
  if (filled.length === 0) {
    throw new CalibrationError(
      `Cannot correct ${JSON.stringify(layer)}: some time group must have ${MIN_SAMPLES} samples, got fewer`,
      { tensor: layer },
    );
  }
  return Array.from(samples, (_, g) => {
    const nearest = filled.reduce((best, other) => Math.abs(other - g) < Math.abs(best - g) ? other : best);
    return { ...statistics.groupMoments(layer, nearest), weight: weights[g]! };
  });
}

/**
 * Output corrections or weight scales of packed layers in every time group.
 *
 * @throws {CalibrationError} when the moments of all time groups would take too much memory
 * @throws {RangeError} when `markovWeight` is out of range
 */
export async function closedFormParameters(
  context: PhaseContext,
  weights: ReadonlyMap<string, PackedTensor>,
  groups: TimeGroups,
  { output, hasWeightScales }: {
    readonly output: OutputSettings | undefined;
    readonly hasWeightScales: boolean;
  },
): Promise<{ readonly layers: Map<string, LayerParameters>; readonly bytes: number }> {
  const { calibrated, kernels, signal } = context;
  const transitions = transitionsOf(context);
  const { source, isSynthetic, samples } = calibrated.data;
  const statistics = await collectStatistics(calibrated, {
    kernels,
    fingerprint: "",
    groups,
    second: "groups",
    run: { identity: "", source, isSynthetic, samples },
    names: new Set(weights.keys()),
    signal,
  });
  const weightOf = new Float64Array(groups.count);
  for (const { times } of calibrated.data.fit) {
    for (const time of times) weightOf[groups.groupOf(time)]! += transitions.weightOf(time);
  }
  const layers = new Map<string, LayerParameters>();
  for (const layer of calibrated.model.stages.flatMap(({ layers }) => layers)) {
    const packed = weights.get(layer.name);
    if (packed === undefined || layers.has(layer.name)) continue;
    const { rows, cols } = packed, dense = denseWeights(kernels, layer);
    const moments = momentsOf(statistics, layer.name, weightOf);
    const weightScales = hasWeightScales && packed.scaleBits === undefined
      ? timeWeightScales(kernels, dense, packed, moments)
      : undefined;
    const quantized = output && dequantize(kernels, packed);
    const corrected = quantized &&
      correctOutputs(kernels, { weights: dense, quantized, rows, cols }, moments, output.markovWeight);
    if (weightScales !== undefined || corrected !== undefined) {
      layers.set(layer.name, { weightScales, output: corrected });
    }
  }
  const bytes = [...statistics.inputs.values()].reduce(
    (sum, { groupSecond }) => sum + groupSecond!.byteLength,
    0,
  );
  return { layers, bytes };
}
