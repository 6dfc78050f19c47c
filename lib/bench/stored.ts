/** Size and weight error of a quantized checkpoint, from its files. */
import type { Kernels } from "../native/mod.ts";
import {
  addStatistics,
  cosine,
  type ErrorStatistics,
  packedErrorStatistics,
  relativeRmsError,
} from "../quant/mod.ts";
import { packedLayers, readPackedTensor } from "../quant/packed/checkpoint.ts";
import { type Checkpoint, openCheckpoint } from "../tensor/mod.ts";

/** Size and weight error of a quantized checkpoint. */
export interface StoredCheckpoint {
  readonly weights: number;
  readonly tensors: number;
  readonly bitsPerWeight: number;
  /** Stored bytes of all tensors, kept ones included, · 8 / the original's elements. */
  readonly bitsPerWeightOfAll: number;
  readonly fileBytesBefore: number;
  readonly fileBytesAfter: number;
  readonly relativeRmsError: number;
  readonly cosine: number;
}

/** Reads a quantized checkpoint back and compares its weights with those it was made from. */
export function measureStored(kernels: Kernels, original: string, quantized: string): StoredCheckpoint {
  using before = openCheckpoint(original);
  using after = openCheckpoint(quantized);
  let weights = 0, bytes = 0;
  let statistics: ErrorStatistics | undefined;
  const layers = [...packedLayers(after).values()];
  const sizeOf = ({ name }: { readonly name: string }) => before.tensors.get(name)?.info.byteLength ?? 0;
  // One buffer for all: a buffer a tensor would stay as garbage, as large as the model, until the engine
  // collects it.
  const buffer = new Uint8Array(Math.max(0, ...layers.map(sizeOf)));
  for (const layer of layers) {
    const data = buffer.subarray(0, sizeOf(layer));
    before.readInto(layer.name, 0, data);
    const packed = readPackedTensor(after, layer);
    const found = packedErrorStatistics(kernels, { data, dtype: layer.dtype }, packed);
    statistics = statistics === undefined ? found : addStatistics(statistics, found);
    weights += layer.rows * layer.cols;
    bytes += layer.bytes;
  }
  if (statistics === undefined) {
    throw new Error(`Cannot measure "${quantized}": it must hold quantized tensors, got none`);
  }
  const fileBytes = ({ files }: typeof before) => files.reduce((sum, { file }) => sum + file.fileBytes, 0);
  return {
    weights,
    tensors: layers.length,
    bitsPerWeight: bytes * 8 / weights,
    bitsPerWeightOfAll: tensorSums(after).bytes * 8 / tensorSums(before).elements,
    fileBytesBefore: fileBytes(before),
    fileBytesAfter: fileBytes(after),
    relativeRmsError: relativeRmsError(statistics),
    cosine: cosine(statistics),
  };
}

/** Bytes and elements of all tensors of a checkpoint. */
export function tensorSums({ tensors }: Checkpoint): { readonly bytes: number; readonly elements: number } {
  let bytes = 0, elements = 0;
  for (const { info } of tensors.values()) {
    bytes += info.byteLength;
    elements += info.elements;
  }
  return { bytes, elements };
}
