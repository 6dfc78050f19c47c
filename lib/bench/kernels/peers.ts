/** What our kernels are timed against, on the same data: memcpy and ggml. */
import type { Kernels } from "../../native/mod.ts";
import {
  CONVERSIONS,
  type Ggml,
  GGML_MAX_BYTES_PER_WEIGHT,
  type GgmlConversion,
  type GgmlSimdType,
  type GgmlType,
} from "../ggml.ts";
import {
  DTYPES,
  elements,
  expectEqual,
  expectOk,
  type KernelCase,
  type Operands,
  relativeDifference,
  SCALAR,
} from "./cases.ts";

/** `bytes` bytes copied by the runtime's `TypedArray.set`, which is memcpy. */
export function memcpyCase(bytes: number, shape: readonly [number, number]): KernelCase {
  const from = new Uint8Array(bytes).fill(1), to = new Uint8Array(bytes);
  return {
    name: "memcpy",
    library: "memcpy",
    backend: "runtime",
    isa: "-",
    dtype: "U8",
    shape,
    threads: 1,
    weights: 0,
    bytes: 2 * bytes,
    contender: { run: () => to.set(from) },
    check() {
      to.set(from);
      expectEqual("memcpy", to, from);
    },
  };
}

/** Largest relative RMS error that a ggml round trip may have to count as working, by the bits in the type's name. */
const GGML_ERROR_LIMITS: Record<string, number> = { "8": 0.01, "4": 0.12, "3": 0.25, "2": 0.9 };

function ggmlCase(
  ggml: Ggml,
  name: string,
  operands: Operands,
  dtype: string,
): Pick<KernelCase, "name" | "library" | "backend" | "isa" | "dtype" | "shape" | "threads" | "weights"> {
  return {
    name,
    library: "ggml",
    backend: "native",
    isa: name.includes("simd") ? ggml.processorLibrary.replace(/^libggml-cpu-(.*)\.so$/, "$1") : "base",
    dtype,
    shape: [operands.rows, operands.cols],
    threads: 1,
    weights: operands.count,
  };
}

function checkGgml(ggml: Ggml, type: GgmlType, weights: Float32Array, packed: Uint8Array): void {
  const count = Math.min(weights.length, 65536);
  const restored = new Float32Array(count);
  ggml.dequantizeRow(type, packed, restored, count);
  const error = relativeDifference(restored, weights.subarray(0, count));
  const limit = GGML_ERROR_LIMITS[/\d/.exec(type)![0]]!;
  if (!(error < limit)) {
    throw new Error(`Cannot time ggml ${type}: its relative error must be below ${limit}, got ${error}`);
  }
}

export const GGML_QUANTIZE = (type: GgmlType) => `ggml quantize_${type}`;
export const GGML_QUANTIZE_SIMD = (type: GgmlSimdType) => `ggml quantize_row_${type} simd`;
export const GGML_DEQUANTIZE = (type: GgmlType) => `ggml dequantize_row_${type}`;

/** ggml's public quantizer, with an importance matrix or without. */
export function ggmlQuantizeCase(
  ggml: Ggml,
  operands: Operands,
  type: GgmlType,
  importance?: Float32Array<ArrayBuffer>,
): KernelCase {
  const { buffer, refill } = operands.input("F32");
  const weights = buffer as Float32Array<ArrayBuffer>;
  const packed = new Uint8Array(Math.ceil(operands.count * GGML_MAX_BYTES_PER_WEIGHT));
  const run = () => ggml.quantize(type, weights, packed, operands.rows, operands.cols, importance);
  const name = GGML_QUANTIZE(type) + (importance ? ", weighted" : "");
  return {
    ...ggmlCase(ggml, name, operands, `F32 to ${type}`),
    bytes: weights.byteLength + run(),
    contender: { prepare: refill, run },
    check: () => {
      run();
      checkGgml(ggml, type, weights, packed);
    },
  };
}

/** ggml's vectorized row quantizer, the one that its matrix products use on activations. */
export function ggmlQuantizeSimdCase(ggml: Ggml, operands: Operands, type: GgmlSimdType): KernelCase {
  const { buffer, refill } = operands.input("F32");
  const weights = buffer as Float32Array<ArrayBuffer>;
  const packed = new Uint8Array(Math.ceil(operands.count * GGML_MAX_BYTES_PER_WEIGHT));
  const run = () => ggml.quantizeRowSimd(type, weights, packed, operands.count);
  return {
    ...ggmlCase(ggml, GGML_QUANTIZE_SIMD(type), operands, `F32 to ${type}`),
    bytes: weights.byteLength + ggml.quantize(type, weights, packed, operands.rows, operands.cols),
    contender: { prepare: refill, run },
    check: () => {
      packed.fill(0);
      run();
      checkGgml(ggml, type, weights, packed);
    },
  };
}

export function ggmlDequantizeCase(ggml: Ggml, operands: Operands, type: GgmlType): KernelCase {
  const weights = operands.input("F32").buffer as Float32Array<ArrayBuffer>;
  const packed = new Uint8Array(Math.ceil(operands.count * GGML_MAX_BYTES_PER_WEIGHT));
  const bytes = ggml.quantize(type, weights, packed, operands.rows, operands.cols);
  const out = new Float32Array(operands.count);
  return {
    ...ggmlCase(ggml, GGML_DEQUANTIZE(type), operands, `${type} to F32`),
    bytes: bytes + out.byteLength,
    contender: { run: () => ggml.dequantizeRow(type, packed, out, operands.count) },
    check: () => checkGgml(ggml, type, weights, packed),
  };
}

export function ggmlConvertCase(
  ggml: Ggml,
  reference: Kernels,
  operands: Operands,
  conversion: GgmlConversion,
): KernelCase {
  const [, , from, to] = CONVERSIONS[conversion];
  const name = `ggml ${conversion}`;
  const source = operands.input("F32").buffer, count = operands.count;
  const input = elements(from, count), out = elements(to, count), wanted = elements(to, count);
  const { calls, size } = reference;
  expectOk(calls.aq_convert(source, 0, input, DTYPES[from].number, size(count), SCALAR, 1));
  const run = () => ggml.convert(conversion, input, out, count);
  return {
    ...ggmlCase(ggml, name, operands, `${from} to ${to}`),
    bytes: input.byteLength + out.byteLength,
    contender: { run },
    check() {
      run();
      expectOk(
        calls.aq_convert(input, DTYPES[from].number, wanted, DTYPES[to].number, size(count), SCALAR, 1),
      );
      expectEqual(name, out, wanted);
    },
  };
}
