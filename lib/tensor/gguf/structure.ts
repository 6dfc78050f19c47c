/**
 * The structure of a GGUF file: keys and tensors, read front to back within named limits; no tensor byte is
 * read.
 *
 * ```text
 * | "GGUF" | u32 version | u64 tensors | u64 keys | key, type, value … | name, dimensions, type, offset … | data |
 * ```
 *
 * Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
 */
import { CheckpointError, FormatError } from "../../errors.ts";
import { quote, readFully } from "../../files/positional.ts";
import {
  elementCount,
  MAX_DIMENSIONS,
  MAX_HEADER_BYTES,
  MAX_NAME_LENGTH,
  MAX_TENSORS,
  nameFault,
} from "../safetensors.ts";
import { GGML_TYPES, type GgmlType } from "./types.ts";

/** Most keys: language models have about 50, image models one for each reshaped tensor. */
const MAX_KEYS = 100_000;
/** Longest key in bytes, as the format's description sets it. */
const MAX_KEY_BYTES = 65_535;
/** Longest text: chat templates have up to 100 KB. */
const MAX_TEXT_BYTES = 16 * 2 ** 20;
/** Most items of an array: the largest vocabularies have 300,000 tokens, and twice as many merges. */
const MAX_ITEMS = 2 ** 24;
/** Longest array whose values are kept; of longer ones, as of a vocabulary, only the length is. */
const MAX_KEPT_ITEMS = 1024;
const MAX_ALIGNMENT = 65_536;
const DEFAULT_ALIGNMENT = 32;
const WINDOW_BYTES = 2 ** 20;

/** Types of values by their numbers. */
const VALUE_TYPES = "u8 i8 u16 i16 u32 i32 f32 bool string array u64 i64 f64".split(" ");

/** A value of a key. */
export interface GgufValue {
  /** As in `u32`, `string` or `array of string`. */
  readonly type: string;
  /** Undefined for an array of more than 1024 items. */
  readonly value: GgufScalar | readonly GgufScalar[] | undefined;
  /** Items of an array. */
  readonly length?: number;
}

type GgufScalar = number | bigint | boolean | string;

/** A tensor as it is stored. */
export interface GgufTensor {
  readonly name: string;
  readonly type: GgmlType;
  /** Outermost dimension first, the other way round than in the file. */
  readonly shape: readonly number[];
  /** First byte, counted from the start of the file. */
  readonly byteOffset: number;
  readonly byteLength: number;
  readonly elements: number;
}

/** What a file has, before its data. */
export interface GgufStructure {
  readonly version: number;
  readonly keys: ReadonlyMap<string, GgufValue>;
  /** In the order of their bytes. */
  readonly tensors: readonly GgufTensor[];
  readonly dataOffset: number;
}

/** Reads numbers and texts one after the other. */
class Cursor {
  #window = new Uint8Array(0);
  #start = 0;
  #at = 0;

  constructor(readonly fd: number, readonly path: string, readonly fileBytes: number) {}

  get position(): number {
    return this.#start + this.#at;
  }

  fail(reason: string, tensor?: string): FormatError {
    const where = tensor === undefined ? "" : `tensor ${quote(tensor)}: `;
    return new FormatError(`Cannot read ${quote(this.path)}: ${where}${reason}`, { path: this.path, tensor });
  }

  /** The next bytes. @throws {FormatError} when the file ends before them */
  take(bytes: number, what: string): DataView {
    if (this.#at + bytes > this.#window.length) {
      const start = this.position, wanted = Math.min(Math.max(bytes, WINDOW_BYTES), this.fileBytes - start);
      if (start + bytes > MAX_HEADER_BYTES && start + bytes <= this.fileBytes) {
        throw this.fail(`keys and tensor entries must take at most ${MAX_HEADER_BYTES} bytes, got more`);
      }
      const window = new Uint8Array(bytes > this.fileBytes - start ? 0 : wanted);
      const got = readFully(this.fd, window, start, this.path);
      if (got < bytes) {
        throw this.fail(`${what} must end inside the file of ${this.fileBytes} bytes, got its end`);
      }
      [this.#window, this.#start, this.#at] = [window.subarray(0, got), start, 0];
    }
    const view = new DataView(this.#window.buffer, this.#at, bytes);
    this.#at += bytes;
    return view;
  }

  u32(what: string): number {
    return this.take(4, what).getUint32(0, true);
  }

  /** A count of at most `most`. */
  count(what: string, most: number): number {
    const value = this.take(8, what).getBigUint64(0, true);
    if (value > most) throw this.fail(`${what} must be at most ${most}, got ${value}`);
    return Number(value);
  }

  text(what: string, maxBytes: number, fatal: boolean): string {
    const { buffer, byteOffset, byteLength } = this.take(this.count(`length of ${what}`, maxBytes), what);
    try {
      return new TextDecoder("utf-8", { fatal, ignoreBOM: true }).decode(
        new Uint8Array(buffer as ArrayBuffer, byteOffset, byteLength),
      );
    } catch (cause) {
      if (!(cause instanceof TypeError)) throw cause;
      throw this.fail(`${what} must be UTF-8, got other bytes`);
    }
  }

  /** A value of a type; texts of arrays that are not kept are passed over. */
  scalar(type: string, what: string): GgufScalar {
    const whole = (value: bigint) => Number.isSafeInteger(Number(value)) ? Number(value) : value;
    if (type === "string") return this.text(what, MAX_TEXT_BYTES, false);
    if (type === "bool") {
      const value = this.take(1, what).getUint8(0);
      if (value > 1) throw this.fail(`${what} must be true (1) or false (0), got ${value}`);
      return value === 1;
    }
    const view = this.take(Number(type.slice(1)) / 8, what);
    if (type === "u64") return whole(view.getBigUint64(0, true));
    if (type === "i64") return whole(view.getBigInt64(0, true));
    const kind = { u: "Uint", i: "Int", f: "Float" }[type[0]!], get = `get${kind}${type.slice(1)}`;
    return (view as unknown as Record<string, (at: number, little: boolean) => number>)[get]!(0, true);
  }

  value(what: string): GgufValue {
    const type = this.#type(what);
    if (type !== "array") return { type, value: this.scalar(type, what) };
    const of = this.#type(`items of ${what}`), length = this.count(`items of ${what}`, MAX_ITEMS);
    if (of === "array") throw this.fail(`${what} must have items without items, got an array of arrays`);
    const isKept = length <= MAX_KEPT_ITEMS, values: GgufScalar[] = [];
    for (let i = 0; i < length; i++) {
      if (isKept) values.push(this.scalar(of, what));
      else if (of === "string") this.take(this.count(`length of ${what}`, MAX_TEXT_BYTES), what);
      else this.take(of === "bool" ? 1 : Number(of.slice(1)) / 8, what);
    }
    return { type: `array of ${of}`, value: isKept ? values : undefined, length };
  }

  #type(what: string): string {
    const number = this.u32(`type of ${what}`), type = VALUE_TYPES[number];
    if (type === undefined) throw this.fail(`type of ${what} must be from 0 to 12, got ${number}`);
    return type;
  }
}

/**
 * Reads keys and tensors, each within its limit, and checks the place of every tensor.
 *
 * @throws {FormatError} when the file is not what the format promises
 * @throws {CheckpointError} when it is one part of several
 */
export function readStructure(fd: number, path: string, fileBytes: number): GgufStructure {
  const cursor = new Cursor(fd, path, fileBytes);
  const magic = cursor.u32("the beginning"), version = cursor.u32("the version");
  if (magic !== 0x46554747) throw cursor.fail('a GGUF file must begin with "GGUF", got other bytes');
  if (version !== 2 && version !== 3) {
    const got = (version & 0xffff) === 0 ? "a big-endian file" : `version ${version}`;
    throw cursor.fail(`it must be little-endian and of version 2 or 3, got ${got}: convert the model again`);
  }
  const tensorCount = cursor.count("number of tensors", MAX_TENSORS),
    keyCount = cursor.count("number of keys", MAX_KEYS);
  const keys = new Map<string, GgufValue>();
  for (let i = 0; i < keyCount; i++) {
    const key = cursor.text(`key ${i + 1}`, MAX_KEY_BYTES, true), value = cursor.value(`key ${quote(key)}`);
    if (key === "") throw cursor.fail(`key ${i + 1} must have a name, got an empty one`);
    if (keys.has(key)) throw cursor.fail(`key ${quote(key)} must be there once, got it twice`);
    keys.set(key, value);
  }
  const alignment = alignmentOf(keys, cursor);
  checkWhole(keys, path);
  const entries = Array.from({ length: tensorCount }, (_, i) => readEntry(cursor, i));
  const dataOffset = Math.ceil(cursor.position / alignment) * alignment;
  const tensors = entries.map((entry) => ({ ...entry, byteOffset: dataOffset + entry.byteOffset }));
  checkPlaces(tensors, alignment, dataOffset, cursor);
  return { version, keys, tensors, dataOffset };
}

function alignmentOf(keys: ReadonlyMap<string, GgufValue>, cursor: Cursor): number {
  const { type, value } = keys.get("general.alignment") ?? { type: "u32", value: DEFAULT_ALIGNMENT };
  if (
    type === "u32" && typeof value === "number" && value <= MAX_ALIGNMENT &&
    Number.isInteger(Math.log2(value))
  ) {
    return value;
  }
  throw cursor.fail(
    `general.alignment must be a u32, a power of 2 up to ${MAX_ALIGNMENT}, got ${type} ${value}`,
  );
}

/** @throws {CheckpointError} when a file is one part of a model */
function checkWhole(keys: ReadonlyMap<string, GgufValue>, path: string): void {
  const parts = keys.get("split.count")?.value;
  if (parts === undefined || Number(parts) < 2) return;
  throw new CheckpointError(
    `Cannot open ${
      quote(path)
    }: must be a whole model, got one of ${parts} parts: llama-gguf-split --merge joins them`,
    { path },
  );
}

/** A tensor's entry, with its offset in the data. */
function readEntry(cursor: Cursor, index: number): GgufTensor {
  const name = cursor.text(`name of tensor ${index + 1}`, 4 * MAX_NAME_LENGTH, true);
  const fail = (reason: string) => cursor.fail(reason, name);
  const fault = name === "" ? "name must not be empty" : nameFault(name);
  if (fault !== undefined) throw fail(fault);
  const dimensions = cursor.u32("dimensions");
  if (dimensions > MAX_DIMENSIONS) {
    throw fail(`must have at most ${MAX_DIMENSIONS} dimensions, got ${dimensions}`);
  }
  const shape = Array.from(
    { length: dimensions },
    () => cursor.count(`a dimension of ${quote(name)}`, 2 ** 53 - 1),
  );
  shape.reverse();
  const id = cursor.u32("type"), type = GGML_TYPES.get(id), elements = elementCount(shape);
  if (type === undefined) {
    const known = [...GGML_TYPES.values()].map((each) => each.name).join(" ");
    throw fail(`type must be one of ${known}, got the number ${id}`);
  }
  const row = shape.at(-1) ?? 1;
  if (row % type.weights !== 0) {
    throw fail(`rows of ${type.name} must be multiples of ${type.weights}, got ${row}`);
  }
  const byteLength = (elements ?? Infinity) / type.weights * type.bytes;
  if (elements === undefined || !Number.isSafeInteger(elements * 8)) {
    throw fail(`must have at most 2^50 weights, got shape [${shape.join(", ")}]`);
  }
  const byteOffset = cursor.count(`offset of ${quote(name)}`, 2 ** 53 - 1);
  return { name, type, shape, byteOffset, byteLength, elements };
}

/** Sorts tensors by their bytes. @throws {FormatError} when two overlap, or one leaves the file */
function checkPlaces(tensors: GgufTensor[], alignment: number, dataOffset: number, cursor: Cursor): void {
  const names = new Set<string>();
  tensors.sort((a, b) => a.byteOffset - b.byteOffset || a.byteLength - b.byteLength);
  let end = dataOffset;
  for (const { name, byteOffset, byteLength } of tensors) {
    if (names.has(name)) throw cursor.fail("must be there once, got it twice", name);
    names.add(name);
    const offset = byteOffset - dataOffset;
    if (offset % alignment !== 0) {
      throw cursor.fail(`offset must be a multiple of ${alignment}, got ${offset}`, name);
    }
    if (byteOffset < end) {
      throw cursor.fail(`bytes must begin behind those of the tensor before, got ${offset}`, name);
    }
    end = byteOffset + byteLength;
    if (end > cursor.fileBytes) {
      throw cursor.fail(
        `bytes must end inside the file of ${cursor.fileBytes} bytes, got an end at ${end}: it is truncated`,
        name,
      );
    }
  }
}
