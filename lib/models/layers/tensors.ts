/**
 * A model's tensors out of a checkpoint, full precision or packed: the checkpoint is compared with the
 * model's list before a weight is read; then each tensor is read once and kept as it is stored.
 */
import { CheckpointError } from "../../errors.ts";
import type { Kernels } from "../../native/mod.ts";
import { isRotated, packedByteLength, packedRows, readArrays } from "../../quant/packed/layout.ts";
import { giveBack } from "../../quant/array_memory.ts";
import { convertFloats, dequantize, type PackedTensor } from "../../quant/mod.ts";
import { type PackedLayer, packedLayers, readPackedTensor } from "../../quant/packed/checkpoint.ts";
import { BYTES_PER_ELEMENT, type Checkpoint, type FloatDtype, isFloatDtype } from "../../tensor/mod.ts";
import type { TimeParameters } from "../../time/mod.ts";
import type { ActivationPrecision } from "./int8.ts";
import type { DenseMatrix, Linear, Matrix, WeightDtype } from "./linear.ts";
import { shown } from "../model_config.ts";
import type { HeldWeights } from "./held_weights.ts";
import type { Workspace } from "./workspace.ts";

/** Names of a kind that a message lists before it only counts. */
const MAX_LISTED = 40;
/** Sentences about single tensors that a message has: one wrong size in config.json makes one a layer. */
const MAX_DETAILED = 8;

/** Values of matrices in memory that is held: one view of each, which a device has one copy of. */
const heldValues = new WeakMap<Uint8Array, DenseMatrix["data"]>();

/** Elements that are converted at once. */
const CONVERTED_ELEMENTS = 2 ** 20;

/** How a model is loaded. */
export interface LoadOptions {
  /** Parameters that the runtime selects by time; default none. Not read from the sidecar by itself. */
  readonly timeParameters?: TimeParameters | undefined;
  /** Packed weights in place of plain ones, by name: a model before it is written. Not copied. */
  readonly weights?: ReadonlyMap<string, PackedTensor> | undefined;
  /** Biases in place of others, by name, as in `model.layers.0.self_attn.q_proj.bias`. */
  readonly biases?: ReadonlyMap<string, Float32Array> | undefined;
  /** Scratch shared with models that take turns: each run overwrites the last result. Default: own. */
  readonly workspace?: Workspace | undefined;
  /** Inputs of packed layers whose time parameters do not quantize them. Default `f32`. */
  readonly activations?: ActivationPrecision | undefined;
  /**
   * Plain matrices are read when a run first needs them, and may be let go for others: the checkpoint must
   * stay open. By default all are read at once, and kept.
   */
  readonly held?: HeldWeights | undefined;
}

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

/** A linear layer with the name of its weight in the checkpoint. */
export interface LinearLayer extends EmbeddingTable, Linear {
  readonly bias: Float32Array<ArrayBuffer> | undefined;
  /** Experts whose rows follow one another in the weights; undefined for a matrix. */
  readonly experts?: number | undefined;
}

/** The tensors that a checkpoint holds, by its model's configuration. */
export interface TensorList {
  /** A tensor may be in it once. */
  readonly wanted: readonly WantedTensor[];
  /** Patterns of entries that may be there without effect, as buffers of old checkpoints. */
  readonly ignored: readonly RegExp[];
}

/** The tensors of a linear layer; `name` is without `.weight` and `.bias`. */
export function wantedLinear(name: string, rows: number, cols: number, bias: boolean): WantedTensor[] {
  const weight: WantedTensor = { name: `${name}.weight`, shape: [rows, cols] };
  return bias ? [weight, { name: `${name}.bias`, shape: [rows] }] : [weight];
}

/**
 * Checks that the checkpoint has every wanted tensor with the wanted shape and nothing else; reads no weight.
 *
 * @returns the quantized tensors by name
 * @throws {CheckpointError} listing the tensors that are missing, in excess, or of another shape
 * @throws {FormatError} when quantized entries do not fit each other
 */
export function checkTensorList(
  checkpoint: Checkpoint,
  { wanted, ignored }: TensorList,
): ReadonlyMap<string, PackedLayer> {
  const packed = packedLayers(checkpoint);
  const parts = new Set([...packed.values()].flatMap(({ tensors }) => Object.values(tensors) as string[]));
  const names = new Set(wanted.map(({ name }) => name));
  const missing = wanted.filter(({ name }) => shapeOf(checkpoint, packed, name) === undefined)
    .map(({ name }) => name);
  const extra = [
    ...[...checkpoint.tensors.keys()].filter((name) => !parts.has(name)),
    ...packed.keys(),
  ].filter((name) => !names.has(name) && !ignored.some((pattern) => pattern.test(name)));
  const misshapen = wanted.flatMap(({ name, shape }) => {
    const found = shapeOf(checkpoint, packed, name);
    const isFlat = packed.has(name) && shape.length > 2;
    const needed = isFlat ? [shape[0]!, shape.slice(1).reduce((product, size) => product * size, 1)] : shape;
    if (found === undefined || found.join() === needed.join()) return [];
    return [{ name, text: `${shown(name)} must be [${needed.join(", ")}], got [${found.join(", ")}]` }];
  });
  const wrongTypes = wanted.flatMap(({ name, shape }) => {
    const layer = packed.get(name);
    if (layer !== undefined) {
      // Norms and biases are added and multiplied as they are.
      return shape.length > 1
        ? []
        : [{ name, text: `${shown(name)} must be in full precision, got ${layer.bits} bits` }];
    }
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
  if (faults.length === 0) return packed;
  const tensor = missing[0] ?? extra[0] ?? misshapen[0]?.name ?? wrongTypes[0]?.name;
  throw new CheckpointError(
    `Cannot load ${
      shown(checkpoint.path)
    }: its tensors must be the ${wanted.length} that config.json asks for, got ${faults.join("; ")}`,
    tensor === undefined ? { path: checkpoint.path } : { path: checkpoint.path, tensor },
  );
}

function shapeOf(
  checkpoint: Checkpoint,
  packed: ReadonlyMap<string, PackedLayer>,
  name: string,
): readonly number[] | undefined {
  const layer = packed.get(name);
  return layer === undefined ? checkpoint.tensors.get(name)?.info.shape : [layer.rows, layer.cols];
}

/** The type in which a matrix stored as `dtype` is held. */
export function heldDtype(dtype: FloatDtype): WeightDtype {
  // Every value of the 8-bit floats is one of bfloat16 too; of float64 no kernel would use more.
  if (dtype === "F64") return "F32";
  return dtype === "F8_E4M3" || dtype === "F8_E5M2" ? "BF16" : dtype;
}

/** The tensors of one checkpoint, checked against a model's list. */
export class ModelTensors {
  readonly #checkpoint: Checkpoint;
  readonly #kernels: Kernels;
  readonly #packed: ReadonlyMap<string, PackedLayer>;
  readonly #replaced: Pick<LoadOptions, "weights" | "biases">;
  readonly #held: HeldWeights | undefined;
  #bytes = 0;

  /**
   * Reads no weight.
   *
   * @param options weights and biases in place of the checkpoint's, and where what is read is held
   * @throws as {@linkcode checkTensorList}
   * @throws {TypeError} when a replacement has another shape, or no tensor of the model to replace
   */
  constructor(
    checkpoint: Checkpoint,
    kernels: Kernels,
    list: TensorList,
    { held, ...replaced }: Pick<LoadOptions, "weights" | "biases" | "held"> = {},
  ) {
    this.#checkpoint = checkpoint;
    this.#kernels = kernels;
    this.#packed = checkTensorList(checkpoint, list);
    this.#replaced = replaced;
    this.#held = held;
    const given: (readonly [name: string, kind: string, shape: readonly number[]])[] = [
      ...[...replaced.biases ?? []].map(([name, { length }]) => [name, "values", [length]] as const),
      ...[...replaced.weights ?? []].map(([name, { rows, cols }]) =>
        [name, "weights", [rows, cols]] as const
      ),
    ];
    for (const [name, kind, shape] of given) {
      const wanted = shapeOf(checkpoint, this.#packed, name)?.join(", ");
      if (wanted === shape.join(", ")) continue;
      throw new TypeError(
        `Cannot load ${shown(checkpoint.path)}: the ${kind} in place of ${shown(name)} must be [${
          wanted ?? "none: there is no such tensor"
        }], got [${shape.join(", ")}]`,
      );
    }
  }

  /** Bytes of the tensors asked for so far, as they are kept. */
  get bytes(): number {
    return this.#bytes;
  }

  /**
   * A matrix with its bias; `name` is without `.weight` and `.bias`. A convolution whose stride is its kernel
   * counts as one: `[rows, …]` is flattened.
   */
  linear(name: string, hasBias: boolean): LinearLayer {
    return { ...this.matrix(`${name}.weight`), bias: hasBias ? this.vector(`${name}.bias`) : undefined };
  }

  /** A matrix whose rows are looked up. @throws {CheckpointError} when they are rotated with each other */
  table(name: string): EmbeddingTable {
    const table = this.matrix(name), { path } = this.#checkpoint, { weights } = table;
    if (!("packed" in weights && isRotated(weights))) return table;
    throw new CheckpointError(
      `Cannot load ${shown(path)}: rows of ${shown(name)} are looked up and must not be rotated: ` +
        "quantize with scale_bits 16",
      { path, tensor: name },
    );
  }

  /** A matrix as it is stored, under its name. */
  matrix(name: string): EmbeddingTable {
    const other = this.#replaced.weights?.get(name);
    if (other !== undefined) {
      this.#bytes += packedByteLength(other);
      return { name, weights: other };
    }
    const layer = this.#packed.get(name);
    if (layer !== undefined) {
      const packed = readPackedTensor(this.#checkpoint, layer);
      for (const array of readArrays(packed)) this.#kernels.arrays.constant(array);
      this.#bytes += packedByteLength(packed);
      return { name, weights: packed };
    }
    return { name, weights: this.#dense(name) };
  }

  /** A small tensor as float32: norms, biases. */
  vector(name: string): Float32Array<ArrayBuffer> {
    const other = this.#replaced.biases?.get(name);
    if (other !== undefined) {
      this.#bytes += other.byteLength;
      return other.slice();
    }
    const values = this.#convert(name, "F32");
    this.#bytes += values.byteLength;
    return new Float32Array(values.buffer);
  }

  #dense(name: string): DenseMatrix {
    const { shape: [rows = 1, ...rest], elements, dtype: stored } = this.#checkpoint.tensors.get(name)!.info;
    const cols = rest.reduce((product, size) => product * size, 1);
    const dtype = heldDtype(stored as FloatDtype), byteLength = elements * BYTES_PER_ELEMENT[dtype];
    this.#bytes += byteLength;
    const valuesOf = ({ buffer }: Uint8Array<ArrayBuffer>) =>
      dtype === "F32" ? new Float32Array(buffer) : new Uint16Array(buffer);
    const held = this.#held, { arrays } = this.#kernels;
    const convert = (target: Uint8Array<ArrayBuffer>) => void this.#convert(name, dtype, target);
    if (held === undefined) {
      return { rows, cols, dtype, data: this.#kernels.arrays.constant(valuesOf(this.#convert(name, dtype))) };
    }
    const viewOf = (bytes: Uint8Array<ArrayBuffer>) => {
      const data = heldValues.get(bytes) ?? arrays.constant(valuesOf(bytes));
      heldValues.set(bytes, data);
      return data;
    };
    return {
      rows,
      cols,
      dtype,
      get data() {
        return viewOf(held.take(name, byteLength, convert));
      },
      ahead: (needed) => {
        const { bytesRead } = held, bytes = held.takeAhead(name, byteLength, convert, needed);
        return { array: bytes && viewOf(bytes), bytesRead: held.bytesRead - bytesRead };
      },
      floats: (start, out) =>
        void this.#convert(name, "F32", new Uint8Array(out.buffer, out.byteOffset, out.byteLength), start),
    };
  }

  /**
   * Reads a tensor once, into the memory that keeps it, from an element on; another type goes through a small
   * buffer.
   */
  #convert(
    name: string,
    wanted: WeightDtype,
    out = new Uint8Array(
      this.#checkpoint.tensors.get(name)!.info.elements * BYTES_PER_ELEMENT[wanted],
    ),
    start = 0,
  ): Uint8Array<ArrayBuffer> {
    const { info } = this.#checkpoint.tensors.get(name)!;
    if (info.dtype === wanted) {
      this.#checkpoint.readInto(name, start * BYTES_PER_ELEMENT[wanted], out);
      return out;
    }
    const dtype = info.dtype as FloatDtype;
    const from = BYTES_PER_ELEMENT[dtype], to = BYTES_PER_ELEMENT[wanted];
    const elements = out.length / to;
    const buffer = new Uint8Array(Math.min(CONVERTED_ELEMENTS, elements) * from);
    for (let begin = 0; begin < elements; begin += CONVERTED_ELEMENTS) {
      const count = Math.min(CONVERTED_ELEMENTS, elements - begin);
      const data = buffer.subarray(0, count * from), part = out.subarray(begin * to, (begin + count) * to);
      this.#checkpoint.readInto(name, (start + begin) * from, data);
      convertFloats(this.#kernels, { data, dtype }, count, wanted, part);
    }
    giveBack(buffer);
    return out;
  }
}

/** Copies rows of a table as float32: `indices: i32[n]` → `out: f32[n, cols]`. */
export function lookUpRows(
  kernels: Kernels,
  table: EmbeddingTable,
  indices: ArrayLike<number>,
  out: Float32Array,
): void {
  const { weights } = table;
  const { cols } = weights;
  // Taken once: what is held may be read only now.
  const dense = "packed" in weights ? undefined : { ...weights };
  for (let i = 0; i < indices.length; i++) {
    const row = indices[i]!;
    const target = out.subarray(i * cols, (i + 1) * cols);
    if (dense !== undefined) widen(dense, row * cols, target);
    else target.set(dequantize(kernels, packedRows(weights as PackedTensor, row, row + 1)));
  }
}

/** Copies values of a matrix from element `start` on into `target`, as float32. */
export function widen({ dtype, data }: DenseMatrix, start: number, target: Float32Array): void {
  const count = target.length;
  if (dtype === "F32") target.set(data.subarray(start, start + count));
  else if (dtype === "BF16") {
    const words = new Uint32Array(target.buffer, target.byteOffset, count);
    for (let i = 0; i < count; i++) words[i] = data[start + i]! << 16;
  } else target.set(new Float16Array(data.buffer as ArrayBuffer, data.byteOffset + start * 2, count));
}

function listing(names: readonly string[], quoted = true): string {
  const most = quoted ? MAX_LISTED : MAX_DETAILED;
  const rest = names.length > most ? ` and ${names.length - most} more` : "";
  return names.slice(0, most).map((name) => quoted ? shown(name) : name).join(", ") + rest;
}
