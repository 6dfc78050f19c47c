/**
 * Reading safetensors files by ranges: the header is read and checked once, tensor bytes only when asked for.
 *
 * ```text
 * | 8 bytes: N, u64 little-endian | N bytes: JSON object, space-padded | tensor bytes, no gap, to the end |
 * ```
 *
 * Format: https://huggingface.co/docs/safetensors. Writing is in safetensors_writer.ts.
 */
import { closeSync, fstatSync } from "node:fs";
import { CheckpointError, FormatError } from "../errors.ts";
import { checkByteRange, openForReading, quote, readFully, show } from "../files/positional.ts";
import { throwIfStopped } from "../progress.ts";
import { BYTES_PER_ELEMENT, type Dtype, DTYPES, isDtype } from "./dtype.ts";
import { foreignContent, SNIFFED_BYTES } from "../files/foreign.ts";
import { isJsonObject, JsonFault, type JsonRules, parseJson } from "../files/json.ts";

/** Bytes of the header's length in front of it. */
export const LENGTH_BYTES = 8;
/** Largest header: the reference implementation refuses more; a lying length must not exhaust memory. */
export const MAX_HEADER_BYTES = 100_000_000;
/** Most dimensions of a tensor: weights have up to 5 (3-D convolutions); more is a broken or hostile file. */
export const MAX_DIMENSIONS = 8;
/** Most tensors of a file: at about 100 bytes an entry a real header reaches its byte limit first. */
export const MAX_TENSORS = 1_000_000;
/** Longest tensor name in UTF-16 units; published names stay under 200. */
export const MAX_NAME_LENGTH = 1024;
/** Most elements, and most bytes, of a tensor: beyond it JavaScript numbers are not exact. */
export const MAX_TENSOR_BYTES = Number.MAX_SAFE_INTEGER;

/** Bytes between two looks for a signal. */
const READ_BYTES = 2 ** 26;
/** The header's key that holds text about the file instead of a tensor. */
export const METADATA_KEY = "__metadata__";

/** A tensor before it has a place in a file. */
export interface TensorSpec {
  readonly name: string;
  readonly dtype: Dtype;
  /** Dimensions, outermost first; `[]` for a single number. */
  readonly shape: readonly number[];
}

/** A tensor and its place in a file. */
export interface TensorInfo extends TensorSpec {
  /** First byte, counted from the start of the file. */
  readonly byteOffset: number;
  readonly byteLength: number;
  readonly elements: number;
  /** Type and bytes in the file, of a tensor that reads as another type. */
  readonly stored?: { readonly type: string; readonly bytes: number } | undefined;
}

const HEADER_RULES: JsonRules = {
  maxDepth: 3, // header, entry, shape
  maxKeys: 5 * MAX_TENSORS, // a name and three fields a tensor; the rest is for metadata
  maxItems: MAX_DIMENSIONS,
  integersOnly: true,
  nullable: METADATA_KEY, // as MLX writes it
};

/** A safetensors file, or one with tensors in another form: {@linkcode SafetensorsFile} says of which. */
export interface TensorFile extends
  Pick<
    SafetensorsFile,
    "path" | "fileBytes" | "dataOffset" | "metadata" | "tensors" | "readInto" | "read" | "close"
  > {}

/**
 * An open safetensors file.
 *
 * @example
 * ```ts
 * using file = SafetensorsFile.open("tests/models/glyph-dit/classifier.safetensors");
 * for (const { name, dtype, shape } of file.tensors.values()) console.log(name, dtype, shape);
 * const firstRow = file.read("f2.weight", 0, 64 * 4);
 * ```
 */
export class SafetensorsFile {
  /** Text about the file; usually `{ format: "pt" }`. */
  readonly metadata: Readonly<Record<string, string>>;
  /** Tensors by name, in the order of their bytes. */
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /** Bytes of the length and the header: where the tensors begin. */
  readonly dataOffset: number;
  #fd: number | undefined;

  private constructor(
    /** Path as it was given. */
    readonly path: string,
    /** Size of the whole file. */
    readonly fileBytes: number,
    header: Header,
    fd: number,
  ) {
    this.metadata = header.metadata;
    this.tensors = header.tensors;
    this.dataOffset = header.dataOffset;
    this.#fd = fd;
  }

  /**
   * Opens a file and checks its whole header; reads nothing behind it.
   *
   * @throws {FormatError} when the file is not what the format promises
   * @throws {CheckpointError} when it cannot be opened or read
   */
  static open(path: string): SafetensorsFile {
    const fd = openForReading(path);
    try {
      const fileBytes = fstatSync(fd).size;
      return new SafetensorsFile(path, fileBytes, readHeader(fd, path, fileBytes), fd);
    } catch (error) {
      const start = new Uint8Array(SNIFFED_BYTES);
      try {
        const other = foreignContent(start.subarray(0, readFully(fd, start, 0, path)));
        if (other === undefined) throw error;
        throw new FormatError(`Cannot read ${quote(path)}: must be safetensors, got ${other}`, {
          path,
          cause: error,
        });
      } finally {
        closeSync(fd);
      }
    }
  }

  /**
   * Fills `target` with a tensor's bytes from `byteStart` on.
   *
   * @throws {RangeError} when the range leaves the tensor
   * @throws {FormatError} when the file became shorter since it was opened
   * @throws {CheckpointError} when the file has no such tensor or cannot be read
   */
  readInto(name: string, byteStart: number, target: Uint8Array): void {
    const info = this.#info(name);
    checkByteRange(name, byteStart, target.length, info.byteLength);
    readTensorBytes(this, this.#fd, info, byteStart, target);
  }

  /**
   * Reads a tensor's bytes `[byteStart, byteEnd)`, all of them by default, into new memory.
   *
   * @throws as {@linkcode SafetensorsFile.readInto}
   */
  read(name: string, byteStart = 0, byteEnd: number = this.#info(name).byteLength): Uint8Array<ArrayBuffer> {
    checkByteRange(name, byteStart, byteEnd - byteStart, this.#info(name).byteLength);
    const target = new Uint8Array(byteEnd - byteStart);
    this.readInto(name, byteStart, target);
    return target;
  }

  /** Closes the file; closing twice does nothing. */
  close(): void {
    const fd = this.#fd;
    this.#fd = undefined;
    if (fd !== undefined) closeSync(fd);
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #info(name: string): TensorInfo {
    const info = this.tensors.get(name);
    if (info === undefined) throw noTensor(this.path, name);
    return info;
  }
}

/**
 * Fills `target` from `byteStart` of a tensor's stored bytes on; may be stopped.
 *
 * @throws {FormatError} when the file became shorter since it was opened
 */
export function readTensorBytes(
  { path, fileBytes }: Pick<TensorFile, "path" | "fileBytes">,
  fd: number | undefined,
  { name, byteOffset }: Pick<TensorInfo, "name" | "byteOffset">,
  byteStart: number,
  target: Uint8Array,
): void {
  if (fd === undefined) {
    throw new TypeError(`Cannot read ${quote(path)}: it must be open, got a closed file`);
  }
  let got = 0;
  for (let part = 1; got < target.length && part > 0; got += part) {
    throwIfStopped();
    part = readFully(fd, target.subarray(got, got + READ_BYTES), byteOffset + byteStart + got, path);
  }
  if (got === target.length) return;
  const reason = `file must have ${fileBytes} bytes as when it was opened, got ${fstatSync(fd).size}`;
  throw new FormatError(`Cannot read tensor ${quote(name)} of ${quote(path)}: ${reason}`, {
    path,
    tensor: name,
  });
}

/** Error for a tensor that a file or checkpoint lacks. */
export function noTensor(path: string, tensor: string): CheckpointError {
  const reason = `${quote(path)} must have it, got no such name`;
  return new CheckpointError(`Cannot read tensor ${quote(tensor)}: ${reason}`, { path, tensor });
}

interface Header {
  readonly dataOffset: number;
  readonly metadata: Readonly<Record<string, string>>;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
}

/** Elements of a shape, undefined when they are too many to count exactly. */
export function elementCount(shape: readonly number[]): number | undefined {
  let elements = 1;
  for (const dimension of shape) {
    elements *= dimension;
    if (elements > MAX_TENSOR_BYTES) return undefined;
  }
  return elements;
}

function readHeader(fd: number, path: string, fileBytes: number): Header {
  const fail = (reason: string) => new FormatError(`Cannot read ${quote(path)}: ${reason}`, { path });
  const prefix = new Uint8Array(LENGTH_BYTES);
  if (fileBytes < LENGTH_BYTES || readFully(fd, prefix, 0, path) < LENGTH_BYTES) {
    throw fail(`a safetensors file must have at least ${LENGTH_BYTES} bytes, got ${fileBytes}`);
  }
  const headerBytes = new DataView(prefix.buffer).getBigUint64(0, true);
  if (headerBytes > MAX_HEADER_BYTES) {
    throw fail(`header must have at most ${MAX_HEADER_BYTES} bytes, got a length of ${headerBytes}`);
  }
  const header = new Uint8Array(Math.min(Number(headerBytes), fileBytes - LENGTH_BYTES));
  if (header.length < headerBytes || readFully(fd, header, LENGTH_BYTES, path) < header.length) {
    throw fail(`header must end inside the file of ${fileBytes} bytes, got a length of ${headerBytes}`);
  }
  if (header[0] !== 0x7b) {
    throw fail(`header must start with "{", got ${header.length === 0 ? "no bytes" : `byte ${header[0]}`}`);
  }
  return parseHeader(header, path, fileBytes);
}

function parseHeader(header: Uint8Array, path: string, fileBytes: number): Header {
  const fail = (reason: string, tensor?: string, cause?: unknown) => {
    const where = tensor === undefined ? "" : `tensor ${quote(tensor)}: `;
    return new FormatError(`Cannot read ${quote(path)}: ${where}${reason}`, { path, tensor, cause });
  };

  let entries: [string, unknown][];
  try {
    entries = Object.entries(parseJson(header, HEADER_RULES) as Record<string, unknown>);
  } catch (error) {
    if (!(error instanceof JsonFault)) throw error;
    const [tensor] = error.keys;
    throw fail(`header: ${error.message}`, tensor === METADATA_KEY ? undefined : tensor, error);
  }

  const dataStart = LENGTH_BYTES + header.length;
  const dataBytes = fileBytes - dataStart;
  const infos: TensorInfo[] = [];
  let metadata: Readonly<Record<string, string>> = {};
  for (const [name, entry] of entries) {
    if (name === METADATA_KEY) {
      if (entry === null) continue;
      if (!isJsonObject(entry)) {
        throw fail(`${METADATA_KEY} must be an object of strings, got ${show(entry)}`);
      }
      for (const [key, value] of Object.entries(entry)) {
        if (typeof value !== "string") {
          throw fail(`${METADATA_KEY} ${quote(key)} must be a string, got ${show(value)}`);
        }
        if (!key.isWellFormed() || !value.isWellFormed()) {
          throw fail(`${METADATA_KEY} ${quote(key)} must be valid Unicode, got half of a surrogate pair`);
        }
      }
      metadata = entry as Record<string, string>;
    } else {
      if (infos.length === MAX_TENSORS) throw fail(`file must have at most ${MAX_TENSORS} tensors, got more`);
      const fault = nameFault(name);
      if (fault !== undefined) throw fail(fault, name);
      infos.push(parseEntry(name, entry, dataStart, dataBytes, (reason) => fail(reason, name)));
    }
  }

  infos.sort((a, b) => a.byteOffset - b.byteOffset || a.byteLength - b.byteLength);
  let end = dataStart;
  for (const { name, byteOffset, byteLength } of infos) {
    if (byteOffset !== end) {
      const what = byteOffset < end ? "overlap" : "leave a gap to";
      throw fail(
        `bytes must start at data offset ${end - dataStart} where the previous tensor ends, got ` +
          `${byteOffset - dataStart}: they ${what} it`,
        name,
      );
    }
    end = byteOffset + byteLength;
  }
  if (end !== fileBytes) {
    throw fail(`tensors must fill the data of ${dataBytes} bytes exactly, got ${end - dataStart} bytes`);
  }
  return { dataOffset: dataStart, metadata, tensors: new Map(infos.map((info) => [info.name, info])) };
}

function parseEntry(
  name: string,
  entry: unknown,
  dataStart: number,
  dataBytes: number,
  fail: (reason: string) => FormatError,
): TensorInfo {
  const wanted = "an object of dtype, shape and data_offsets";
  if (!isJsonObject(entry)) throw fail(`entry must be ${wanted}, got ${show(entry)}`);
  const keys = Object.keys(entry);
  if (keys.length !== 3) throw fail(`entry must be ${wanted}, got keys ${quote(keys.join(", "))}`);
  const { dtype, shape, data_offsets: offsets } = entry;
  if (!isDtype(dtype)) {
    throw fail(`dtype must be one of ${DTYPES.join(" ")}, got ${show(dtype)}`);
  }
  if (!isIntegers(shape)) {
    throw fail(`shape must be an array of integers ≥ 0 and ≤ 2^53 − 1, got ${show(shape)}`);
  }
  if (!isIntegers(offsets) || offsets.length !== 2) {
    throw fail(`data_offsets must be two integers ≥ 0, got ${show(offsets)}`);
  }
  const [start, end] = offsets as [number, number];
  if (start > end || end > dataBytes) {
    const isCut = start <= end ? ": the file is truncated, fetch or copy it again" : "";
    throw fail(
      `data_offsets must be ordered and inside the data of ${dataBytes} bytes, got [${start}, ${end}]${isCut}`,
    );
  }
  const elements = elementCount(shape);
  const bytes = elements === undefined ? Infinity : elements * BYTES_PER_ELEMENT[dtype];
  if (elements === undefined || bytes > MAX_TENSOR_BYTES) {
    throw fail(`tensor must have at most 2^53 − 1 bytes, got shape [${shape}] of ${dtype}`);
  }
  if (bytes !== end - start) {
    const got = `data_offsets [${start}, ${end}] of ${end - start}`;
    throw fail(`shape [${shape}] of ${dtype} must take ${bytes} bytes, got ${got}`);
  }
  return { name, dtype, shape, byteOffset: dataStart + start, byteLength: bytes, elements };
}

function isIntegers(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((item) => Number.isSafeInteger(item) && item >= 0);
}

/** Why a text cannot be a tensor's name, undefined when it can. */
export function nameFault(name: string): string | undefined {
  if (name.length > MAX_NAME_LENGTH) {
    return `name must have at most ${MAX_NAME_LENGTH} characters, got ${name.length}`;
  }
  if (!name.isWellFormed()) return "name must be valid Unicode, got half of a surrogate pair";
  return undefined;
}
