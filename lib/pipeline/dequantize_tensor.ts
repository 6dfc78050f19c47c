/** Turns one tensor of a quantized checkpoint back into plain weights, in chunks of rows. */
import type { Kernels } from "../native/mod.ts";
import { WeightsError } from "../errors.ts";
import { quote } from "../files/positional.ts";
import { dequantize, findNonfinite, type PackedTensor } from "../quant/mod.ts";
import { type PackedLayer, readPackedTensor } from "../quant/packed/checkpoint.ts";
import { BYTES_PER_ELEMENT, type Checkpoint, type TensorSpec } from "../tensor/mod.ts";
import type { LayerRecord } from "../output/record.ts";
import { CHUNK_BYTES, copyTensor, type TensorSink } from "../output/tensor_sink.ts";
import { rowsPerChunk } from "./quantize_tensor.ts";

/** Checkpoint and memory that all tensors of a run share. */
interface DequantizeContext {
  readonly checkpoint: Checkpoint;
  readonly kernels: Kernels;
  readonly buffer: (bytes: number) => Uint8Array<ArrayBuffer>;
}

/** Rows in the type they get. @throws {WeightsError} when some are too large for it, with their number */
function narrowed(
  { name, dtype }: TensorSpec,
  packed: PackedTensor,
  { kernels, checkpoint: { path } }: DequantizeContext,
): ReturnType<typeof dequantize> {
  const wanted = dtype as "F32" | "F16" | "BF16", count = packed.rows * packed.cols;
  const data = dequantize(kernels, packed, wanted);
  if (findNonfinite(kernels, { data, dtype: wanted }, count) < 0) return data;
  const values = dequantize(kernels, packed, "F32"), limit = wanted === "F16" ? 65504 : 3.4e38;
  const beyond = values.filter((value) => !(Math.abs(value) < limit * (1 + 2 ** -12))).length;
  throw new WeightsError(
    `Cannot dequantize ${quote(name)} of ${
      quote(path)
    }: weights must fit ${wanted}, got at least ${beyond} ` +
      `beyond ±${limit}; --dtype ${wanted === "F16" ? "BF16 or F32 holds" : "F32 holds"} them`,
    { path, tensor: name },
  );
}

/** Stores a tensor: `layer` dequantized, or where it is undefined the tensor as it is. */
export async function rewriteDequantized(
  spec: TensorSpec,
  layer: PackedLayer | undefined,
  file: string,
  sink: TensorSink,
  context: DequantizeContext,
): Promise<Omit<LayerRecord, "sourceSha256">> {
  const { checkpoint, buffer } = context;
  const { name, dtype, shape } = spec;
  if (layer === undefined) {
    const readInto = (start: number, target: Uint8Array) => checkpoint.readInto(name, start, target);
    await copyTensor(sink, spec, readInto, buffer(CHUNK_BYTES));
    const bytes = checkpoint.tensors.get(name)!.info.byteLength;
    const reason = "not quantized";
    return { name, file, action: "keep", reason, dtype, shape, bytesBefore: bytes, bytesAfter: bytes };
  }
  const { rows, cols, bits, groupSize, scaleBits } = layer;
  sink.begin([spec]);
  const width = BYTES_PER_ELEMENT[dtype];
  const step = rowsPerChunk(cols, width);
  for (let begin = 0; begin < rows; begin += step) {
    const count = Math.min(step, rows - begin);
    const packed = readPackedTensor(checkpoint, layer, begin, begin + count);
    sink.write(name, narrowed(spec, packed, context));
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
    bytesBefore: layer.bytes,
    bytesAfter: rows * cols * width,
  };
}
