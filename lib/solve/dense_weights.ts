/** A layer's weights as float32. */
import { CalibrationError } from "../errors.ts";
import type { LinearLayer } from "../models/mod.ts";
import type { Kernels } from "../native/mod.ts";
import { convertFloats } from "../quant/mod.ts";

/** A copy of a layer's weights as float32, row-major. @param given where it goes; default a new array */
export function denseWeights(
  kernels: Kernels,
  { weights, name }: LinearLayer,
  given?: Float32Array<ArrayBuffer>,
): Float32Array<ArrayBuffer> {
  if ("packed" in weights) {
    throw new CalibrationError(
      `Cannot solve ${JSON.stringify(name)}: its weights must be plain, got packed ones`,
      {
        tensor: name,
      },
    );
  }
  const { rows, cols } = weights, out = given ?? new Float32Array(rows * cols);
  if (given !== undefined && weights.floats !== undefined) {
    weights.floats(0, out); // once: nothing else holds them
    return out;
  }
  const { data, dtype } = weights;
  convertFloats(
    kernels,
    { data, dtype },
    rows * cols,
    "F32",
    new Uint8Array(out.buffer, out.byteOffset, out.byteLength),
  );
  return out;
}
