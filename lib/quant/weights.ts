/** Weights as they are handed to kernels: their type and length checked, in blocks of whole rows. */
import { checkArray } from "../native/call.ts";
import type { Kernels } from "../native/mod.ts";
import { BYTES_PER_ELEMENT, type FloatDtype, isFloatDtype } from "../tensor/mod.ts";

/** Weights in any floating type: the elements, or their bytes. */
export interface Weights {
  readonly data: Float32Array | Float64Array | Uint16Array | Uint8Array;
  readonly dtype: FloatDtype;
}

/**
 * Elements of a block of whole rows. WebAssembly gets a matrix block by block, because it copies a call's
 * buffers into a memory that never shrinks again; sums are taken block by block everywhere, so that they do
 * not depend on the backend.
 */
const BLOCK_ELEMENTS = 4 * 2 ** 20;

/** The weights' bytes, aligned for their type (a copy where the view is not). */
export function weightBytes(doing: string, weights: Weights, elements: number): Uint8Array {
  const { data, dtype } = weights ?? {};
  if (!ArrayBuffer.isView(data)) {
    throw new TypeError(`Cannot ${doing}: weights.data must be a typed array, got ${typeof data}`);
  }
  if (!isFloatDtype(dtype)) {
    throw new TypeError(
      `Cannot ${doing}: weights.dtype must be a floating type, got ${JSON.stringify(dtype)}`,
    );
  }
  const width = BYTES_PER_ELEMENT[dtype], own = data.BYTES_PER_ELEMENT, bytes = elements * width;
  if (own !== width && own !== 1) {
    throw new TypeError(`Cannot ${doing}: ${dtype} has ${width} bytes an element, weights.data ${own}`);
  }
  if (data.byteLength !== bytes) {
    throw new TypeError(
      `Cannot ${doing}: ${elements} elements of ${dtype} are ${bytes} bytes, got ${data.byteLength}`,
    );
  }
  const view = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  return view.byteOffset % width === 0 ? view : view.slice();
}

/** Blocks of whole rows as [begin, end). */
export function* rowBlocks(rows: number, cols: number): Generator<[number, number]> {
  const step = Math.max(1, Math.floor(BLOCK_ELEMENTS / Math.max(1, cols)));
  for (let begin = 0; begin < rows; begin += step) yield [begin, Math.min(begin + step, rows)];
}

/** Blocks for a kernel whose results do not depend on them: all rows at once for a native library. */
export function* callBlocks(kernels: Kernels, rows: number, cols: number): Generator<[number, number]> {
  if (kernels.backend === "wasm") yield* rowBlocks(rows, cols);
  else if (rows > 0) yield [0, rows];
}

/** Throws unless `weights` are `length` finite float32 values ≥ 0. */
export function checkImportance(doing: string, name: string, weights: Float32Array, length: number): void {
  checkArray(doing, name, weights, length);
  const bad = weights.findIndex((weight) => !(weight >= 0 && weight < Infinity));
  if (bad < 0) return;
  throw new RangeError(`Cannot ${doing}: ${name} must be finite and ≥ 0, got ${weights[bad]} at ${bad}`);
}
