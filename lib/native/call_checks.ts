/**
 * The last checks before a kernel, for functions.ts: whatever their callers looked at, no kernel gets an
 * array of another type or a shorter one than it reads or writes. Types and lengths are those that the engine
 * knows, not the properties that an object shows.
 */
import {
  type ANY,
  type Doing,
  DTYPE_BYTES,
  type F32,
  type F64,
  type I32,
  textOf,
  typeName,
  type U16,
  type U32,
  type U64,
  type U8,
} from "./call.ts";
import type { UncheckedKernels } from "./kernels.ts";

const TypedArray = Object.getPrototypeOf(Uint8Array.prototype) as object;
/** The getter of a typed array itself, which no property of an object can stand in for. */
const getter = <T>(name: PropertyKey) =>
  Object.getOwnPropertyDescriptor(TypedArray, name)!.get! as (this: unknown) => T;
const ownType = getter<string | undefined>(Symbol.toStringTag);
const ownLength = getter<number>("length"), ownBytes = getter<number>("byteLength");
const ownOffset = getter<number>("byteOffset");

function refuse(doing: Doing, name: string, wanted: string, got: unknown): never {
  throw new TypeError(`Cannot ${textOf(doing)}: ${name} must ${wanted}, got ${got}`);
}

/** A check of an array's type and length; it gives the array as a kernel takes it, null without one. */
const typed =
  <T extends object>(type: string) =>
  (doing: Doing, name: string, array: T | null | undefined, size: number): T | null => {
    if (array === null || array === undefined) return null;
    if (ownType.call(array) !== type) refuse(doing, name, `be of ${type}`, typeName(array));
    const length = ownLength.call(array);
    if (!(length >= size)) refuse(doing, name, `have at least ${size} elements`, length);
    return array;
  };
export const f32 = typed<NonNullable<F32>>("Float32Array");
export const f64 = typed<NonNullable<F64>>("Float64Array");
export const i32 = typed<NonNullable<I32>>("Int32Array");
export const u8 = typed<NonNullable<U8>>("Uint8Array");
export const u16 = typed<NonNullable<U16>>("Uint16Array");
export const u32 = typed<NonNullable<U32>>("Uint32Array");
export const u64 = typed<NonNullable<U64>>("BigUint64Array");

/** An array of any type that holds so many elements of the header's type `dtype`, aligned for them. */
export function any(doing: Doing, name: string, array: ANY, size: number, dtype: number) {
  if (array === null || array === undefined) return null;
  if (ownType.call(array) === undefined) refuse(doing, name, "be a typed array", typeName(array));
  const width = DTYPE_BYTES[dtype]!, bytes = ownBytes.call(array);
  if (!(bytes >= size * width)) refuse(doing, name, `have at least ${size * width} bytes`, bytes);
  if (ownOffset.call(array) % width !== 0) {
    refuse(doing, name, `begin at a multiple of ${width} bytes`, "another");
  }
  return array;
}

/** The columns in any order: kernels take them as positions. */
export function permutation(doing: Doing, name: string, array: I32, size: number) {
  const order = i32(doing, name, array, size), seen = new Uint8Array(size);
  for (let i = 0; order !== null && i < size; i++) seen[order[i]!] = 1; // what lies outside is dropped
  if (order !== null && seen.includes(0)) refuse(doing, name, "hold every column once", "others");
  return order;
}

export function usize(doing: Doing, name: string, count: number): void {
  if (Number.isSafeInteger(count) && count >= 0) return;
  throw new RangeError(`Cannot ${textOf(doing)}: ${name} must be a whole number ≥ 0, got ${String(count)}`);
}
export function int32(doing: Doing, name: string, value: number): void {
  if (typeof value !== "number" || (value | 0) !== value) {
    refuse(doing, name, "be a whole number", String(value));
  }
}
export function float(doing: Doing, name: string, value: number): void {
  if (typeof value !== "number") refuse(doing, name, "be a number", typeof value);
}

// Sizes as the kernels count them

export const packedWordsOf = (cols: number, bits: number): number => Math.ceil(cols * bits / 32);
export const groupsOf = (cols: number, groupSize: number): number =>
  groupSize === 0 ? Math.min(cols, 1) : Math.ceil(cols / groupSize);
export const superblocksOf = (cols: number): number => Math.ceil(cols / SUPERBLOCK);
export const subBytesOf = (cols: number, groupSize: number, bits: number): number =>
  Math.ceil(groupsOf(cols, groupSize) * bits / 8);
/** Weights and bytes of a block of ggml by its type's number. */
const GGML_BLOCKS: Readonly<Record<number, readonly [weights: number, bytes: number]>> = {
  ...{ 2: [32, 18], 3: [32, 20], 8: [32, 34], 10: [256, 84], 11: [256, 110], 12: [256, 144], 14: [256, 210] },
  42: [64, 18],
};
/** Bytes of a row as a type of ggml; NaN, which no array has, for a type that kernels do not know. */
export const ggmlBytesOf = (cols: number, type: number): number => {
  const [weights, bytes] = GGML_BLOCKS[type] ?? [1, NaN];
  return Math.ceil(cols / weights) * bytes;
};
/** Rows of `cols` values whose beginnings are `stride` apart. */
export const stridedOf = (rows: number, stride: number, cols: number): number =>
  rows === 0 ? 0 : (rows - 1) * stride + cols;

/** Numbers of a moment in blocks of so many columns on the diagonal; all of it where that is `cols`. */
export const momentElements = (rows: number, cols: number, block: number): number =>
  block >= cols ? rows * cols : Math.floor(cols / block) * block ** 2 + (cols % block) ** 2;

/** Columns of a superblock. */
const SUPERBLOCK = 256;

const floats = new BigUint64Array(1);
/** Floats of `work`; NaN, which no array has, for sizes that the solvers do not know. */
export function workOf({ calls, size, threads }: UncheckedKernels, cols: number, groupSize: number): number {
  const status = calls.aq_solver_work(size(cols), size(groupSize), threads, floats);
  return status === 0 ? Number(floats[0]) : NaN;
}
