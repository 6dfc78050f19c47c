/**
 * The kernels' functions as types and as lists of parameters, both read from the signatures that
 * `scripts/build.ts --signatures` writes into signatures.ts from the headers. A signature is a function's
 * parameters, separated by spaces; every result is an int32:
 *
 *     in:f32          pointer to float32 that is read, or null      (const float *)
 *     out:u16         pointer to uint16 that is written, or null    (uint16_t *)
 *     inout:f32       pointer that is read and written              (AQ_INOUT float *)
 *     usize           a count
 *     handle          a buffer or a stream of the CUDA library, 0n for none
 *     i32, f32, f64   a number
 */
import type { CUDA_SIGNATURES, SIGNATURES } from "./signatures.ts";

/** A parameter as an FFI takes it: without the element type of a pointer. */
export type ParameterKind = "in" | "out" | "inout" | "usize" | "handle" | "i32" | "f32" | "f64";

/** A library's functions by their C names, with their signatures. */
export type SymbolTable = Readonly<Record<string, string>>;

/** The kinds of a function's parameters. */
export function kindsOf(signature: string): ParameterKind[] {
  return signature.split(" ").filter(Boolean).map((parameter) => parameter.split(":")[0] as ParameterKind);
}

/**
 * The FFI types of every function's parameters.
 *
 * @param pointer what the runtime calls a pointer
 * @param count what it calls a count or a handle
 */
export function ffiTypes(symbols: SymbolTable, pointer: string, count: string): [string, string[]][] {
  const names = { in: pointer, out: pointer, inout: pointer, usize: count, handle: count };
  return Object.entries(symbols).map(([name, signature]) => [
    name,
    kindsOf(signature).map((kind) => (names as Record<string, string>)[kind] ?? kind),
  ]);
}

/** A buffer handed to a kernel: always the view itself, never a pointer kept from an earlier call. */
export type NativeBuffer = ArrayBufferView<ArrayBufferLike> | null;

/** What `size()` of an opened library made of a count. */
export type NativeSize = number | bigint;

interface Elements {
  any: ArrayBufferView<ArrayBufferLike>;
  u8: Uint8Array<ArrayBufferLike>;
  u16: Uint16Array<ArrayBufferLike>;
  u32: Uint32Array<ArrayBufferLike>;
  u64: BigUint64Array<ArrayBufferLike>;
  i32: Int32Array<ArrayBufferLike>;
  f32: Float32Array<ArrayBufferLike>;
  f64: Float64Array<ArrayBufferLike>;
}

type ArgumentOf<Parameter extends string> = Parameter extends
  `${"in" | "out" | "inout"}:${infer Element extends keyof Elements}` ? Elements[Element] | null
  : Parameter extends "handle" ? bigint
  : Parameter extends "usize" ? NativeSize
  : Parameter extends "i32" | "f32" | "f64" ? number
  : never;

type ArgumentsOf<Signature extends string> = Signature extends "" ? []
  : Signature extends `${infer First} ${infer Rest}` ? [ArgumentOf<First>, ...ArgumentsOf<Rest>]
  : [ArgumentOf<Signature>];

/** The functions of an opened library, with the parameters of its table. */
export type CallsOf<Table extends SymbolTable> = {
  readonly [Name in keyof Table]: (...args: ArgumentsOf<Table[Name]>) => number;
};

/** The functions of the CPU's library. */
export type NativeCalls = CallsOf<typeof SIGNATURES>;

/** The functions of the CUDA library. */
export type CudaCalls = CallsOf<typeof CUDA_SIGNATURES>;

/** A library as one runtime opened it. */
export interface OpenedSymbols<Table extends SymbolTable> {
  readonly calls: CallsOf<Table>;
  /** A count as the runtime's FFI takes it fastest: a number in Bun and WebAssembly, a bigint in Deno. */
  size(count: number): NativeSize;
  close(): void;
}

/** The CPU's library as one runtime opened it. */
export type OpenedLibrary = OpenedSymbols<typeof SIGNATURES>;
