/**
 * A GGUF file as a {@linkcode TensorFile}: plain tensors read as they are, blocks of codes as the float32
 * values that ggml gives them, and language models under the names, and in the order of rows, of their own
 * checkpoints.
 */
import { closeSync, fstatSync } from "node:fs";
import { CheckpointError, FormatError } from "../../errors.ts";
import { checkByteRange, openForReading, quote } from "../../files/positional.ts";
import { BYTES_PER_ELEMENT } from "../dtype.ts";
import { elementCount, noTensor, readTensorBytes, type TensorFile, type TensorInfo } from "../safetensors.ts";
import { DECODED_TYPES, DECODERS } from "./blocks.ts";
import { languageModel, type RowOrder } from "./language.ts";
import { type GgufStructure, type GgufTensor, type GgufValue, readStructure } from "./structure.ts";

/** Most weights that are decoded at once. */
const DECODED_WEIGHTS = 2 ** 20;

/** Facts of a GGUF file beside its tensors. */
export interface GgufFacts {
  readonly version: number;
  readonly keys: ReadonlyMap<string, GgufValue>;
  /** What config.json would say, of a family that is known. */
  readonly config: Readonly<Record<string, unknown>> | undefined;
}

/** A tensor with what it reads as. */
interface View {
  readonly tensor: GgufTensor;
  readonly info: TensorInfo;
  readonly order: RowOrder | undefined;
}

/** An open GGUF file. */
export class GgufFile implements TensorFile {
  /** Of a safetensors file with the same tensors. */
  readonly metadata = { format: "pt" };
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly dataOffset: number;
  readonly facts: GgufFacts;
  readonly #views: ReadonlyMap<string, View>;
  #fd: number | undefined;

  private constructor(
    readonly path: string,
    readonly fileBytes: number,
    structure: GgufStructure,
    fd: number,
  ) {
    const { version, keys, tensors, dataOffset } = structure;
    const model = languageModel(keys, tensors);
    const views = tensors.map((tensor): View => {
      const { name, elements, byteOffset, byteLength: bytes, type } = tensor;
      const dtype = type.plain ?? "F32", byteLength = elements * BYTES_PER_ELEMENT[dtype];
      const stored = type.plain === undefined ? { type: type.name, bytes } : undefined;
      const { name: own = name, order } = model?.tensor(tensor) ?? {};
      const info = {
        name: own,
        dtype,
        shape: shapeOf(tensor, keys),
        byteOffset,
        byteLength,
        elements,
        stored,
      };
      return { tensor, info, order };
    });
    this.#views = new Map(views.map((view) => [view.info.name, view]));
    this.tensors = new Map(views.map(({ info }) => [info.name, info]));
    if (this.tensors.size < views.length) {
      const twice = views.find((view) => this.#views.get(view.info.name) !== view)!;
      const got = `${quote(twice.tensor.name)} and ${quote(this.#views.get(twice.info.name)!.tensor.name)}`;
      throw new FormatError(
        `Cannot read ${quote(path)}: must have one ${quote(twice.info.name)}, got ${got}`,
        { path },
      );
    }
    this.dataOffset = dataOffset;
    this.facts = { version, keys, config: model?.config };
    this.#fd = fd;
  }

  /**
   * Opens a file and checks its structure; reads nothing behind it.
   *
   * @throws {FormatError} when the file is not what the format promises
   * @throws {CheckpointError} when it cannot be opened or read, or is one part of several
   */
  static open(path: string): GgufFile {
    const fd = openForReading(path);
    try {
      const fileBytes = fstatSync(fd).size;
      return new GgufFile(path, fileBytes, readStructure(fd, path, fileBytes), fd);
    } catch (error) {
      closeSync(fd);
      throw error;
    }
  }

  /** Types of codes in the file, each with a tensor of it. */
  codes(): ReadonlyMap<string, string> {
    const coded = [...this.tensors.values()].filter(({ stored }) => stored !== undefined);
    return new Map(coded.reverse().map(({ name, stored }) => [stored!.type, name]));
  }

  read(
    name: string,
    byteStart = 0,
    byteEnd: number = this.#view(name).info.byteLength,
  ): Uint8Array<ArrayBuffer> {
    checkByteRange(name, byteStart, byteEnd - byteStart, this.#view(name).info.byteLength);
    const target = new Uint8Array(byteEnd - byteStart);
    this.readInto(name, byteStart, target);
    return target;
  }

  readInto(name: string, byteStart: number, target: Uint8Array): void {
    const { info, order, tensor } = this.#view(name);
    checkByteRange(name, byteStart, target.length, info.byteLength);
    if (order === undefined) return this.#readStored(tensor, byteStart, target);
    const rows = info.shape[0]!, width = info.byteLength / rows;
    for (let at = 0; at < target.length;) {
      const row = Math.floor((byteStart + at) / width), from = byteStart + at - row * width;
      const part = target.subarray(at, at + width - from);
      this.#readStored(tensor, order(row) * width + from, part);
      at += part.length;
    }
  }

  close(): void {
    const fd = this.#fd;
    this.#fd = undefined;
    if (fd !== undefined) closeSync(fd);
  }

  /** Values of a tensor in the order of its rows in the file, from a byte of them on. */
  #readStored(tensor: GgufTensor, byteStart: number, target: Uint8Array): void {
    const { name, type } = tensor, decode = DECODERS[type.name];
    if (type.plain !== undefined) return readTensorBytes(this, this.#fd, tensor, byteStart, target);
    if (decode === undefined) {
      const wanted = `its type must be one of ${
        DECODED_TYPES.join(" ")
      }, got ${type.name}, which needs tables of codes`;
      throw new CheckpointError(
        `Cannot read tensor ${quote(name)} of ${
          quote(this.path)
        }: ${wanted}: llama-quantize --allow-requantize, or gguf ` +
          "of Python, makes it F16",
        { path: this.path, tensor: name },
      );
    }
    const step = DECODED_WEIGHTS * 4;
    for (let at = 0; at < target.length; at += step) {
      const part = target.subarray(at, at + step), first = byteStart + at;
      const begin = Math.floor(first / 4 / type.weights),
        end = Math.ceil((first + part.length) / 4 / type.weights);
      const codes = new Uint8Array((end - begin) * type.bytes),
        values = new Float32Array((end - begin) * type.weights);
      readTensorBytes(this, this.#fd, tensor, begin * type.bytes, codes);
      for (let i = 0; i < end - begin; i++) decode(codes, i * type.bytes, values, i * type.weights);
      part.set(new Uint8Array(values.buffer, first - begin * type.weights * 4, part.length));
    }
  }

  #view(name: string): View {
    const view = this.#views.get(name);
    if (view === undefined) throw noTensor(this.path, name);
    return view;
  }
}

/** A tensor's shape: that of before ComfyUI-GGUF's tools made it a matrix, where they did. */
function shapeOf(
  { name, shape, elements }: GgufTensor,
  keys: ReadonlyMap<string, GgufValue>,
): readonly number[] {
  const value = keys.get(`comfy.gguf.orig_shape.${name}`)?.value;
  const isShape = Array.isArray(value) && value.every((size) => Number.isSafeInteger(size) && size > 0);
  return isShape && elementCount(value) === elements ? value : shape;
}
