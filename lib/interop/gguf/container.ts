/**
 * The container GGUF, version 3, little-endian: metadata, the list of tensors, then their data, each aligned.
 *
 * ```text
 * "GGUF" | u32 version | u64 tensors | u64 keys
 * a key:    text | u32 type | value                        text: u64 bytes | UTF-8
 * a tensor: text | u32 dimensions | u64 sizes, columns first | u32 type | u64 offset into the data
 * ```
 */
import { CODEBOOK_TYPES, GGML_TYPES, type GgmlType } from "./types.ts";

/** Multiple of bytes at which every tensor begins. */
export const ALIGNMENT = 32;
/** Longest name of a tensor that ggml reads, without the 0 behind it. */
export const MAX_GGUF_NAME = 63;

/** Numbers of the types of values, with their ranges. */
const SCALARS = {
  u32: [4, 0, 2 ** 32 - 1],
  i32: [5, -(2 ** 31), 2 ** 31 - 1],
  f32: [6, -Infinity, Infinity],
  bool: [7, 0, 1],
} as const;
const TEXT = 8, ARRAY = 9;

/** A value of the metadata. Readers are strict: a `u32` is not an `i32`. */
export type GgufValue =
  | { readonly type: keyof typeof SCALARS; readonly value: number }
  | { readonly type: "text"; readonly value: string }
  | { readonly type: "texts"; readonly value: readonly string[] }
  | { readonly type: "i32s"; readonly value: readonly number[] }
  | { readonly type: "f32s"; readonly value: readonly number[] };

export type GgufMetadata = ReadonlyMap<string, GgufValue>;

export const u32 = (value: number): GgufValue => ({ type: "u32", value });
export const f32 = (value: number): GgufValue => ({ type: "f32", value });
export const bool = (value: boolean): GgufValue => ({ type: "bool", value: Number(value) });
export const text = (value: string): GgufValue => ({ type: "text", value });

/** A tensor of the list. */
export interface GgufTensorInfo {
  readonly name: string;
  /** Rows first, as everywhere here. */
  readonly shape: readonly number[];
  readonly type: GgmlType | keyof typeof CODEBOOK_TYPES;
  readonly bytes: number;
}

/** Bytes that follow so many, up to the alignment. */
export const padding = (bytes: number): number => (ALIGNMENT - bytes % ALIGNMENT) % ALIGNMENT;

/** Grows as it is written to. */
class Bytes {
  #bytes = new Uint8Array(2 ** 16);
  #view = new DataView(this.#bytes.buffer);
  #length = 0;

  #room(bytes: number): number {
    const at = this.#length;
    this.#length += bytes;
    if (this.#length > this.#bytes.length) {
      const grown = new Uint8Array(2 * this.#length);
      grown.set(this.#bytes);
      [this.#bytes, this.#view] = [grown, new DataView(grown.buffer)];
    }
    return at;
  }

  u32(value: number): void {
    const at = this.#room(4);
    this.#view.setUint32(at, value, true);
  }

  u64(value: number): void {
    const at = this.#room(8);
    this.#view.setBigUint64(at, BigInt(value), true);
  }

  scalar(type: keyof typeof SCALARS, value: number): void {
    const [, least, most] = SCALARS[type];
    const isWhole = type === "f32" ? Number.isFinite(value) : Number.isInteger(value);
    if (!isWhole || value < least || value > most) {
      throw new RangeError(
        `Cannot write GGUF metadata: a ${type} must be from ${least} to ${most}, got ${value}`,
      );
    }
    if (type === "bool") {
      const at = this.#room(1);
      this.#view.setUint8(at, value);
    } else if (type === "f32") {
      const at = this.#room(4);
      this.#view.setFloat32(at, value, true);
    } else this.u32(value >>> 0);
  }

  text(value: string): void {
    const bytes = new TextEncoder().encode(value);
    this.u64(bytes.length);
    this.#bytes.set(bytes, this.#room(bytes.length));
  }

  align(): void {
    this.#room(padding(this.#length));
  }

  finish(): Uint8Array<ArrayBuffer> {
    return this.#bytes.slice(0, this.#length);
  }
}

function putValue(out: Bytes, given: GgufValue): void {
  const array = (number: number, { length }: readonly unknown[]) => {
    out.u32(ARRAY);
    out.u32(number);
    out.u64(length);
  };
  if (given.type === "text") {
    out.u32(TEXT);
    out.text(given.value);
  } else if (given.type === "texts") {
    array(TEXT, given.value);
    for (const each of given.value) out.text(each);
  } else if (given.type === "i32s" || given.type === "f32s") {
    const scalar = given.type === "i32s" ? "i32" : "f32";
    array(SCALARS[scalar][0], given.value);
    for (const each of given.value) out.scalar(scalar, each);
  } else {
    out.u32(SCALARS[given.type][0]);
    out.scalar(given.type, given.value);
  }
}

/** Everything in front of the data, padded to the alignment. Tensors lie in this order, each padded. */
export function ggufHeader(
  metadata: GgufMetadata,
  tensors: readonly GgufTensorInfo[],
): Uint8Array<ArrayBuffer> {
  const out = new Bytes();
  out.u32(0x46554747); // "GGUF"
  out.u32(3);
  out.u64(tensors.length);
  out.u64(metadata.size);
  for (const [key, value] of metadata) {
    out.text(key);
    putValue(out, value);
  }
  let offset = 0;
  for (const { name, shape, type, bytes } of tensors) {
    out.text(name);
    out.u32(shape.length);
    for (const size of shape.toReversed()) out.u64(size);
    out.u32({ ...GGML_TYPES, ...CODEBOOK_TYPES }[type].id);
    out.u64(offset);
    offset += bytes + padding(bytes);
  }
  out.align();
  return out.finish();
}
