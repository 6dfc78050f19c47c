/** Our solvers as methods, to stand in the same table as their rivals. */
import type { Kernels } from "../../native/mod.ts";
import { dequantize, packedBytes, quantize, type WeightSolver } from "../../quant/mod.ts";
import { checkLayer, gridName, type GridSetting, type Method } from "./method.ts";

/**
 * A solver that looks at the weights alone, as a method.
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 * import { ours } from "./ours.ts";
 * const method = ours(await openKernels(), "clip", { bits: 2, groupSize: 32 });
 * console.log(method.name, method.quantize(new Float32Array(64).fill(0.5), 2, 32, undefined)); // 2 clip, g 32 …
 * ```
 */
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
        storedBytes: packedBytes(rows, cols, setting.bits, setting.groupSize, "real"),
      };
    },
  };
}
