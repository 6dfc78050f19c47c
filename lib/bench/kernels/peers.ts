/** Peers that our kernels are timed beside, on the same data: memcpy and ggml. */
import {
  CONVERSIONS,
  type Ggml,
  GGML_MAX_BYTES_PER_WEIGHT,
  type GgmlConversion,
  type GgmlType,
} from "../ggml.ts";
import {
  convertInto,
  elements,
  expectEqual,
  type KernelCase,
  type Operands,
  relativeDifference,
  withIsa,
} from "./cases.ts";

/** As many bytes as a float32 matrix has, copied by the runtime's `TypedArray.set`, which is memcpy. */
export function memcpyCase({ rows, cols, count }: Operands): KernelCase {
  const bytes = 4 * count, from = new Uint8Array(bytes).fill(1), to = new Uint8Array(bytes);
  return {
    name: "memcpy",
    library: "memcpy",
    backend: "runtime",
    isa: "-",
    dtype: "U8",
    shape: [rows, cols],
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

/** Largest relative RMS error of a ggml round trip that works, by the bits in the type's name. */
const GGML_ERROR_LIMITS: Record<string, number> = { "8": 0.01, "4": 0.12, "3": 0.25, "2": 0.9 };

/** The instruction set of ggml's processor library. */
const ggmlIsa = ({ processorLibrary }: Ggml): string =>
  processorLibrary.replace(/^libggml-cpu-(.*)\.so$/, "$1");

/** Circumstances of a case of ggml; dot products are of its processor library as those named `simd`. */
export const ggmlCase = (
  ggml: Ggml,
  name: string,
  { rows, cols }: Pick<Operands, "rows" | "cols">,
  dtype: string,
) => ({
  name,
  library: "ggml" as const,
  backend: "native" as const,
  isa: /simd|vec_dot/.test(name) ? ggmlIsa(ggml) : "base",
  dtype,
  shape: [rows, cols] as const,
  threads: 1,
  weights: rows * cols,
});

function checkGgml(ggml: Ggml, type: GgmlType, weights: Float32Array, packed: Uint8Array): void {
  const count = Math.min(weights.length, 65536);
  const restored = new Float32Array(count);
  ggml.dequantizeRow(type, packed, restored, count);
  const error = relativeDifference(restored, weights.subarray(0, count));
  const limit = GGML_ERROR_LIMITS[/\d/.exec(type)![0]]!;
  if (error < limit) return;
  throw new Error(`Cannot time ggml ${type}: its relative error must be below ${limit}, got ${error}`);
}

export const GGML_QUANTIZE = (type: GgmlType) => `ggml quantize_${type}`;
export const GGML_QUANTIZE_SIMD = "ggml quantize_row_q8_0 simd";
export const GGML_DEQUANTIZE = (type: GgmlType) => `ggml dequantize_row_${type}`;

/** Weights, what refills them, and room for their packed form. */
function ggmlInput(operands: Operands) {
  const { buffer, refill } = operands.input("F32");
  const packed = new Uint8Array(Math.ceil(operands.count * GGML_MAX_BYTES_PER_WEIGHT));
  return { weights: buffer as Float32Array<ArrayBuffer>, refill, packed };
}

/** ggml's public quantizer, with an importance matrix or without. */
export function ggmlQuantizeCase(
  ggml: Ggml,
  operands: Operands,
  type: GgmlType,
  importance?: Float32Array<ArrayBuffer>,
): KernelCase {
  const { weights, refill, packed } = ggmlInput(operands);
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

/** ggml's vectorized row quantizer to q8_0, which its matrix products use on activations. */
export function ggmlQuantizeSimdCase(ggml: Ggml, operands: Operands): KernelCase {
  const { weights, refill, packed } = ggmlInput(operands);
  const run = () => ggml.quantizeRowSimd("q8_0", weights, packed, operands.count);
  return {
    ...ggmlCase(ggml, GGML_QUANTIZE_SIMD, operands, "F32 to q8_0"),
    bytes: weights.byteLength + ggml.quantize("q8_0", weights, packed, operands.rows, operands.cols),
    contender: { prepare: refill, run },
    check: () => {
      packed.fill(0);
      run();
      checkGgml(ggml, "q8_0", weights, packed);
    },
  };
}

export function ggmlDequantizeCase(ggml: Ggml, operands: Operands, type: GgmlType): KernelCase {
  const { weights, packed } = ggmlInput(operands);
  const bytes = ggml.quantize(type, weights, packed, operands.rows, operands.cols);
  const out = new Float32Array(operands.count);
  return {
    ...ggmlCase(ggml, GGML_DEQUANTIZE(type), operands, `${type} to F32`),
    bytes: bytes + out.byteLength,
    contender: { run: () => ggml.dequantizeRow(type, packed, out, operands.count) },
    check: () => checkGgml(ggml, type, weights, packed),
  };
}

export function ggmlConvertCase(ggml: Ggml, operands: Operands, conversion: GgmlConversion): KernelCase {
  const [, , from, to] = CONVERSIONS[conversion], { count } = operands;
  const input = elements(from, count), out = elements(to, count), wanted = elements(to, count);
  const scalar = withIsa(operands.reference, "scalar"), name = `ggml ${conversion}`;
  convertInto(scalar, operands.weights(), "F32", input, from);
  const run = () => ggml.convert(conversion, input, out, count);
  return {
    ...ggmlCase(ggml, name, operands, `${from} to ${to}`),
    bytes: input.byteLength + out.byteLength,
    contender: { run },
    check() {
      run();
      convertInto(scalar, input, from, wanted, to);
      expectEqual(name, out, wanted);
    },
  };
}
