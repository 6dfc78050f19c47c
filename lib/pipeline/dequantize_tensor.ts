/** Turns one tensor of a quantized checkpoint back into plain weights, in chunks of rows. */
import type { Kernels } from "../native/mod.ts";
import { WeightsError } from "../errors.ts";
import { quote } from "../files/positional.ts";
import { convertFloats, dequantize, findNonfinite } from "../quant/mod.ts";
import { type PackedLayer, readPackedTensor, rowsAtOnce } from "../quant/packed/checkpoint.ts";
import { BYTES_PER_ELEMENT, type Checkpoint, type TensorSpec } from "../tensor/mod.ts";
import type { LayerRecord } from "../output/record.ts";
import { CHUNK_BYTES, copyTensor, type TensorSink } from "../output/tensor_sink.ts";
import { rowsPerChunk } from "./quantize_tensor.ts";

type PlainDtype = "F32" | "F16" | "BF16";

/** Checkpoint and memory that all tensors of a run share. */
interface DequantizeContext {
  readonly checkpoint: Checkpoint;
  readonly kernels: Kernels;
  readonly buffer: (bytes: number) => Uint8Array<ArrayBuffer>;
}

/**
 * Weights in the type they get.
 *
 * @param as the weights in a type
 * @throws {WeightsError} when some are too large for it, with their number
 */
function narrowed(
  { name, dtype }: TensorSpec,
  as: (dtype: PlainDtype) => Uint8Array<ArrayBuffer> | ReturnType<typeof dequantize>,
  count: number,
  { kernels, checkpoint: { path } }: DequantizeContext,
): Uint8Array<ArrayBuffer> {
  const wanted = dtype as PlainDtype, data = as(wanted);
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  if (findNonfinite(kernels, { data: bytes, dtype: wanted }, count) < 0) return bytes;
  const { buffer, byteOffset } = as("F32"), limit = wanted === "F16" ? 65504 : 3.4e38;
  const beyond =
    new Float32Array(buffer, byteOffset, count).filter((value) => !(Math.abs(value) < limit * (1 + 2 ** -12)))
      .length;
  throw new WeightsError(
    `Cannot dequantize ${quote(name)} of ${
      quote(path)
    }: weights must fit ${wanted}, got at least ${beyond} ` +
      `beyond ±${limit}; --dtype ${wanted === "F16" ? "BF16 or F32 holds" : "F32 holds"} them`,
    { path, tensor: name },
  );
}

/** Stores a tensor: `layer` dequantized, or without one the tensor as it reads, in any type. */
export async function rewriteDequantized(
  spec: TensorSpec,
  layer: PackedLayer | undefined,
  file: string,
  sink: TensorSink,
  context: DequantizeContext,
): Promise<Omit<LayerRecord, "sourceSha256">> {
  const { checkpoint, kernels, buffer } = context;
  const { name, dtype, shape } = spec;
  if (layer === undefined) {
    const { dtype: own, stored, byteLength, elements } = checkpoint.tensors.get(name)!.info;
    if (own === dtype) {
      const readInto = (start: number, target: Uint8Array) => checkpoint.readInto(name, start, target);
      await copyTensor(sink, spec, readInto, buffer(CHUNK_BYTES));
    } else await convertTensor(spec, own as "F32", elements, sink, context);
    const sizes = {
      bytesBefore: stored?.bytes ?? byteLength,
      bytesAfter: elements * BYTES_PER_ELEMENT[dtype],
    };
    const common = { name, file, dtype, shape, ...sizes };
    if (stored === undefined) return { ...common, action: "keep", reason: "not quantized" };
    return { ...common, action: "dequantize", reason: stored.type };
  }
  const { rows, cols, bits, groupSize, scaleBits, codes } = layer;
  sink.begin([spec]);
  const width = BYTES_PER_ELEMENT[dtype];
  const step = rowsAtOnce(layer, rowsPerChunk(cols, width));
  for (let begin = 0; begin < rows; begin += step) {
    const count = Math.min(step, rows - begin);
    const packed = readPackedTensor(checkpoint, layer, begin, begin + count);
    sink.write(name, narrowed(spec, (dtype) => dequantize(kernels, packed, dtype), count * cols, context));
    await sink.advance(count * cols, count * cols * width);
  }
  return {
    name,
    file,
    action: "dequantize",
    reason: "quantized",
    dtype,
    shape,
    bits,
    groupSize,
    scaleBits,
    codes,
    bytesBefore: layer.bytes,
    bytesAfter: rows * cols * width,
  };
}

/** Stores a tensor that reads as float32 in a shorter type. */
async function convertTensor(
  spec: TensorSpec,
  own: "F32",
  elements: number,
  sink: TensorSink,
  context: DequantizeContext,
): Promise<void> {
  const { kernels, checkpoint } = context, { name, dtype } = spec, step = CHUNK_BYTES / 4;
  sink.begin([spec]);
  for (let begin = 0; begin < elements; begin += step) {
    const count = Math.min(step, elements - begin);
    const weights = { data: checkpoint.read(name, begin * 4, (begin + count) * 4), dtype: own };
    const as = (dtype: PlainDtype) => convertFloats(kernels, weights, count, dtype);
    sink.write(name, narrowed(spec, as, count, context));
    await sink.advance(count, count * BYTES_PER_ELEMENT[dtype]);
  }
}
