/** GGUF files for tests, written by the format's description alone. */

/** Numbers of the types of values. */
const VALUE_TYPES = "u8 i8 u16 i16 u32 i32 f32 bool string array u64 i64 f64".split(" ");
/** Numbers and widths of some types of tensors. */
export const TYPE_IDS: Readonly<Record<string, number>> = {
  F32: 0,
  F16: 1,
  Q4_0: 2,
  Q8_0: 8,
  Q2_K: 10,
  Q4_K: 12,
  Q6_K: 14,
  IQ2_XS: 17,
  BF16: 30,
};

/** A value: its type and itself; an array has the type of its items in front. */
export type Value = readonly [type: string, value: unknown];

/** A tensor: dimensions as the file has them, innermost first. */
export interface FileTensor {
  readonly name: string;
  readonly type: string | number;
  readonly dimensions: readonly (number | bigint)[];
  readonly data: Uint8Array;
  /** Offset instead of the next free one. */
  readonly offset?: number | bigint;
}

class Bytes {
  readonly parts: number[] = [];
  number(value: number | bigint, type: string): this {
    const width = type === "bool" ? 1 : Number(type.slice(1)) / 8, view = new DataView(new ArrayBuffer(8));
    if (width === 8 && type !== "f64") view.setBigUint64(0, BigInt(value) & (2n ** 64n - 1n), true);
    else if (type === "f64") view.setFloat64(0, Number(value), true);
    else if (type === "f32") view.setFloat32(0, Number(value), true);
    else view.setUint32(0, Number(value), true);
    for (let i = 0; i < width; i++) this.parts.push(view.getUint8(i));
    return this;
  }
  text(value: string | Uint8Array): this {
    const bytes = typeof value === "string" ? new TextEncoder().encode(value) : value;
    this.number(bytes.length, "u64");
    for (const byte of bytes) this.parts.push(byte);
    return this;
  }
  value(type: string, value: unknown): this {
    if (type === "string") return this.text(value as string | Uint8Array);
    if (type !== "array") return this.number(value as number, type);
    const [of, items] = value as readonly [string, readonly unknown[]];
    this.number(VALUE_TYPES.indexOf(of), "u32").number(items.length, "u64");
    for (const item of items) this.value(of, item);
    return this;
  }
}

/** The bytes of a file. */
export function ggufBytes(
  keys: readonly (readonly [key: string | Uint8Array, ...value: Value])[],
  tensors: readonly FileTensor[],
  { version = 3, alignment = 32, keyCount = keys.length, tensorCount = tensors.length }: {
    version?: number;
    alignment?: number;
    keyCount?: number | bigint;
    tensorCount?: number | bigint;
  } = {},
): Uint8Array<ArrayBuffer> {
  const head = new Bytes();
  head.parts.push(...new TextEncoder().encode("GGUF"));
  head.number(version, "u32").number(tensorCount, "u64").number(keyCount, "u64");
  for (const [key, type, value] of keys) {
    const number = VALUE_TYPES.indexOf(type);
    head.text(key).number(number < 0 ? Number(type) : number, "u32");
    if (number >= 0) head.value(type, value);
  }
  const padded = (size: number) => Math.ceil(size / alignment) * alignment;
  let next = 0;
  const places = tensors.map(({ name, type, dimensions, data, offset = next }) => {
    head.text(name).number(dimensions.length, "u32");
    for (const size of dimensions) head.number(size, "u64");
    head.number(typeof type === "number" ? type : TYPE_IDS[type]!, "u32").number(offset, "u64");
    next = padded(Number(offset) + data.length);
    return Number(offset);
  });
  const start = padded(head.parts.length);
  const end = Math.max(
    start,
    ...tensors.map(({ data }, i) => start + (places[i]! < 1e9 ? places[i]! : 0) + data.length),
  );
  const bytes = new Uint8Array(end);
  bytes.set(head.parts);
  tensors.forEach(({ data }, i) => places[i]! < 1e9 && bytes.set(data, start + places[i]!));
  return bytes;
}

/** A tensor of float32 values. */
export const floats = (name: string, dimensions: readonly number[], values?: Float32Array): FileTensor => {
  const count = dimensions.reduce((product, size) => product * size, 1);
  const data = values ?? Float32Array.from({ length: count }, (_, i) => i / 8 - 1);
  return {
    name,
    type: "F32",
    dimensions,
    data: new Uint8Array(data.buffer as ArrayBuffer, data.byteOffset, data.byteLength),
  };
};
