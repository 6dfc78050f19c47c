/**
 * A model's tensors out of a checkpoint, full precision or packed: which must be there is checked against what the
 * checkpoint has before a weight is read; then each is read once and kept as it is stored.
 */
import { CheckpointError, FormatError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import { packedByteLength, packedRows } from "../quant/layout.ts";
import { convertFloats, dequantize } from "../quant/mod.ts";
import { type PackedLayer, packedLayers, readPackedTensor } from "../quant/packed_checkpoint.ts";
import { type Checkpoint, type FloatDtype, isFloatDtype } from "../tensor/mod.ts";
import type { DenseMatrix, Matrix } from "./kernels.ts";
import { shown } from "./model_config.ts";

/** Names of a kind that a message lists before it only counts. */
const MAX_LISTED = 40;
/** Sentences about single tensors that a message has: one wrong size in config.json makes one a layer. */
const MAX_DETAILED = 8;

/** A tensor that a model needs. */
export interface WantedTensor {
  readonly name: string;
  /** Sizes that config.json asks for. */
  readonly shape: readonly number[];
}

/** A matrix whose rows are looked up. */
export interface EmbeddingTable {
  /** Its name in the checkpoint, as in `model.embed_tokens.weight`. */
  readonly name: string;
  /** As stored: halves and bfloat16 values stay 16 bits wide, packed weights packed. */
  readonly weights: Matrix;
}

/** A linear layer: `y = W x + bias`. */
export interface LinearLayer extends EmbeddingTable {
  readonly bias: Float32Array<ArrayBuffer> | undefined;
}

/** The tensors of one checkpoint, checked against a model's list. */
export class ModelTensors {
  readonly #checkpoint: Checkpoint;
  readonly #kernels: Kernels;
  readonly #packed: ReadonlyMap<string, PackedLayer>;
  #bytes = 0;

  /**
   * Checks that the checkpoint has every wanted tensor with the wanted shape and nothing else; reads no weight.
   *
   * @param wanted a tensor may be in it once
   * @param ignored patterns of entries that may be there and mean nothing, as buffers of old checkpoints
   * @throws {CheckpointError} listing what is missing, what is there in excess and what has another shape
   * @throws {FormatError} when quantized entries do not fit each other
   */
  constructor(
    checkpoint: Checkpoint,
    kernels: Kernels,
    wanted: readonly WantedTensor[],
    ignored: readonly RegExp[] = [],
  ) {
    this.#checkpoint = checkpoint;
    this.#kernels = kernels;
    this.#packed = packedLayers(checkpoint);
    const parts = new Set(
      [...this.#packed.values()].flatMap(({ tensors }) => Object.values(tensors) as string[]),
    );
    const names = new Set(wanted.map(({ name }) => name));
    const missing = wanted.filter(({ name }) => this.#shapeOf(name) === undefined).map(({ name }) => name);
    const extra = [
      ...[...checkpoint.tensors.keys()].filter((name) => !parts.has(name)),
      ...this.#packed.keys(),
    ].filter((name) => !names.has(name) && !ignored.some((pattern) => pattern.test(name)));
    const misshapen = wanted.flatMap(({ name, shape }) => {
      const found = this.#shapeOf(name);
      if (found === undefined || found.join() === shape.join()) return [];
      return [{ name, text: `${shown(name)} must be [${shape.join(", ")}], got [${found.join(", ")}]` }];
    });
    const wrongTypes = wanted.flatMap(({ name }) => {
      const dtype = checkpoint.tensors.get(name)?.info.dtype;
      if (dtype === undefined || isFloatDtype(dtype)) return [];
      return [{ name, text: `${shown(name)} must be floating-point, got ${dtype}` }];
    });
    const faults = [
      ...(missing.length > 0 ? [`missing ${listing(missing)}`] : []),
      ...(extra.length > 0 ? [`unknown ${listing(extra)}`] : []),
      ...(misshapen.length > 0
        ? [`contradicting config.json: ${listing(misshapen.map(({ text }) => text), false)}`]
        : []),
      ...(wrongTypes.length > 0 ? [listing(wrongTypes.map(({ text }) => text), false)] : []),
    ];
    if (faults.length === 0) return;
    const tensor = missing[0] ?? extra[0] ?? misshapen[0]?.name ?? wrongTypes[0]?.name;
    throw new CheckpointError(
      `Cannot load ${
        shown(checkpoint.path)
      }: its tensors must be the ${wanted.length} that config.json asks for, got ${faults.join("; ")}`,
      tensor === undefined ? { path: checkpoint.path } : { path: checkpoint.path, tensor },
    );
  }

  /** Bytes of weights read so far, as they are kept. */
  get bytes(): number {
    return this.#bytes;
  }

  /** A matrix with its bias. A convolution whose stride is its kernel counts as one: `[rows, …]` is flattened. */
  linear(name: string, biasName?: string): LinearLayer {
    const table = this.table(name);
    return { ...table, bias: biasName === undefined ? undefined : this.vector(biasName) };
  }

  /** A matrix whose rows are looked up. */
  table(name: string): EmbeddingTable {
    const layer = this.#packed.get(name);
    if (layer !== undefined) {
      const packed = readPackedTensor(this.#checkpoint, layer);
      this.#bytes += packedByteLength(packed);
      return { name, weights: packed };
    }
    const weights = this.#dense(name);
    this.#bytes += weights.data.byteLength;
    return { name, weights };
  }

  /** A small tensor as float32: norms, biases. */
  vector(name: string): Float32Array<ArrayBuffer> {
    const layer = this.#packed.get(name);
    if (layer !== undefined) {
      throw new FormatError(
        `Cannot load ${shown(this.#checkpoint.path)}: ${
          shown(name)
        } must be in full precision, got ${layer.bits} bits`,
        { path: this.#checkpoint.path, tensor: name },
      );
    }
    const values = this.#convert(name, "F32");
    this.#bytes += values.byteLength;
    return new Float32Array(values.buffer);
  }

  #dense(name: string): DenseMatrix {
    const [rows = 1, ...rest] = this.#shapeOf(name)!;
    const cols = rest.reduce((product, size) => product * size, 1);
    const { dtype } = this.#checkpoint.tensors.get(name)!.info;
    // Every value of the 8-bit floats is one of bfloat16 too; of float64 no kernel would use more.
    const kept = dtype === "F64" ? "F32" : dtype === "F8_E4M3" || dtype === "F8_E5M2" ? "BF16" : dtype;
    const { buffer } = this.#convert(name, kept as "F32" | "F16" | "BF16");
    return kept === "F32"
      ? { rows, cols, dtype: "F32", data: new Float32Array(buffer) }
      : { rows, cols, dtype: kept as "F16" | "BF16", data: new Uint16Array(buffer) };
  }

  #convert(name: string, wanted: "F32" | "F16" | "BF16"): Uint8Array<ArrayBuffer> {
    const { info } = this.#checkpoint.tensors.get(name)!;
    const bytes = this.#checkpoint.read(name);
    if (info.dtype === wanted) return bytes;
    return convertFloats(
      this.#kernels,
      { data: bytes, dtype: info.dtype as FloatDtype },
      info.elements,
      wanted,
    );
  }

  #shapeOf(name: string): readonly number[] | undefined {
    const layer = this.#packed.get(name);
    return layer === undefined ? this.#checkpoint.tensors.get(name)?.info.shape : [layer.rows, layer.cols];
  }
}

/**
 * Copies rows of a table into `out`, one after the other, as float32.
 *
 * **Shapes** `indices: i32[n]` → `out: f32[n, cols]`
 */
export function lookUpRows(
  kernels: Kernels,
  table: EmbeddingTable,
  indices: ArrayLike<number>,
  out: Float32Array,
): void {
  const { weights } = table;
  const { cols } = weights;
  for (let i = 0; i < indices.length; i++) {
    const row = indices[i]!;
    const target = out.subarray(i * cols, (i + 1) * cols);
    if ("packed" in weights) target.set(dequantize(kernels, packedRows(weights, row, row + 1)));
    else widen(weights, row * cols, target);
  }
}

const WORD = new Uint32Array(1);
const WORD_AS_FLOAT = new Float32Array(WORD.buffer);

function widen({ dtype, data }: DenseMatrix, start: number, target: Float32Array): void {
  if (dtype === "F32") target.set(data.subarray(start, start + target.length));
  else if (dtype === "BF16") {
    for (let i = 0; i < target.length; i++) {
      WORD[0] = data[start + i]! << 16;
      target[i] = WORD_AS_FLOAT[0]!;
    }
  } else target.set(new Float16Array(data.buffer as ArrayBuffer, data.byteOffset + start * 2, target.length));
}

function listing(names: readonly string[], quoted = true): string {
  const most = quoted ? MAX_LISTED : MAX_DETAILED;
  const rest = names.length > most ? ` and ${names.length - most} more` : "";
  return names.slice(0, most).map((name) => quoted ? shown(name) : name).join(", ") + rest;
}
