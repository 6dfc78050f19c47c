/** Small quantization problems for the tests of the peers. */
import type { Kernels } from "../../../lib/native/mod.ts";
import { checkLayer, gridName, type GridSetting, type Method } from "../../../lib/bench/peers/method.ts";
import { dequantize, packedBytes, quantize, type WeightSolver } from "../../../lib/quant/mod.ts";
import { randomStream } from "../../_kernels.ts";

/** Weights and second moments `E[x xᵀ]` of inputs that depend on one another. */
export function problem(seed: number, rows: number, cols: number, samples = 4 * cols) {
  const random = randomStream(seed);
  const normal = () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  const weights = Float32Array.from({ length: rows * cols }, () => 0.3 * normal());
  const mix = Float64Array.from({ length: cols * cols }, normal);
  const secondMoment = new Float64Array(cols * cols);
  for (let s = 0; s < samples; s++) {
    const source = Float64Array.from({ length: cols }, (_, i) => normal() / (1 + i));
    const x = Float64Array.from({ length: cols }, (_, i) => {
      let sum = 0;
      for (let k = 0; k < cols; k++) sum += mix[i * cols + k]! * source[k]!;
      return sum;
    });
    for (let i = 0; i < cols; i++) {
      for (let j = 0; j < cols; j++) secondMoment[i * cols + j]! += x[i]! * x[j]! / samples;
    }
  }
  return { weights, inputs: { cols, secondMoment } };
}

/** `tr(Δ H Δᵀ)` */
export function outputError(
  weights: Float32Array,
  restored: Float32Array,
  cols: number,
  secondMoment: Float64Array,
): number {
  let total = 0;
  for (let begin = 0; begin < weights.length; begin += cols) {
    for (let i = 0; i < cols; i++) {
      const d = weights[begin + i]! - restored[begin + i]!;
      for (let j = 0; j < cols; j++) {
        total += d * secondMoment[i * cols + j]! * (weights[begin + j]! - restored[begin + j]!);
      }
    }
  }
  return total;
}

export function identity(size: number): Float64Array<ArrayBuffer> {
  return Float64Array.from({ length: size * size }, (_, i) => i % (size + 1) === 0 ? 1 : 0);
}

/** A solver of ours that looks at the weights alone, matrix by matrix as the peers. */
export function ours(kernels: Kernels, solver: WeightSolver, setting: GridSetting): Method {
  const name = gridName(solver, setting);
  return {
    name,
    kind: "ours",
    ...setting,
    needsInputs: false,
    quantize(weights, rows, cols) {
      checkLayer(name, weights, rows, cols, undefined);
      const packed = quantize(kernels, { data: weights, dtype: "F32" }, rows, cols, { ...setting, solver });
      return {
        weights: dequantize(kernels, packed),
        storedBytes: packedBytes({
          rows,
          cols,
          bits: setting.bits,
          groupSize: setting.groupSize,
          zeroPoint: "real",
        }),
      };
    },
  };
}
