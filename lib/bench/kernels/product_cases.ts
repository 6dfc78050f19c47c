/** Our matrix products as cases: full weights, packed weights, and packed weights by 8-bit activations. */
import * as native from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";
import type { BitWidth } from "../../quant/mod.ts";
import {
  bytesOfArrays,
  circumstancesOf,
  DOING,
  expectEqual,
  type KernelCase,
  ownCase,
  type PackedArrays,
  packedArrays,
  quantizeInto,
  relativeDifference,
  withIsa,
} from "./cases.ts";

/** Rows and tokens that a check recomputes with the scalar kernel. */
const CHECKED_ROWS = 16, CHECKED_TOKENS = 3;
/** Difference from the scalar kernel, relative to the whole result: float32 sums of some thousand terms. */
const F32_LIMIT = 1e-5;
const GROUP_SIZE = 64;

/** Input of products: `x: f32[tokens, cols]`, `weights: f32[rows, cols]`, and packed weights of these. */
export class ProductOperands {
  readonly #packed = new Map<BitWidth, PackedArrays>();
  #expected: Float32Array<ArrayBuffer> | undefined;

  constructor(
    readonly kernels: Kernels,
    readonly tokens: number,
    readonly rows: number,
    readonly cols: number,
    readonly x: Float32Array<ArrayBuffer>,
    readonly weights: Float32Array<ArrayBuffer>,
  ) {}

  packed(bits: BitWidth): PackedArrays {
    const made = this.#packed.get(bits);
    if (made !== undefined) return made;
    const { kernels, weights, rows, cols } = this;
    const spec = { solver: "round", bits, groupSize: GROUP_SIZE, zeroPoint: "real" } as const;
    const out = packedArrays(rows, cols, spec);
    quantizeInto(kernels, weights, rows, cols, spec, out);
    this.#packed.set(bits, out);
    return out;
  }

  /** The product in float32, which peers are compared with. */
  expected(): Float32Array<ArrayBuffer> {
    if (this.#expected !== undefined) return this.#expected;
    const out = new Float32Array(this.tokens * this.rows);
    callLinear(this.kernels, this, this.tokens, this.rows, out);
    return this.#expected = out;
  }
}

function callLinear(
  kernels: Kernels,
  { x, weights, cols }: ProductOperands,
  tokens: number,
  rows: number,
  out: Float32Array<ArrayBuffer>,
): void {
  native.linear(kernels, DOING, x, tokens, weights, 0, null, rows, cols, out);
}

/** Writes the product of the first rows and tokens with any instruction set. */
type ProductCall = (kernels: Kernels, tokens: number, rows: number, out: Float32Array<ArrayBuffer>) => void;

/** A product, within `limit` of the scalar kernel's result; 0 for the same bytes. */
function productCase(
  { kernels, tokens, rows, cols }: ProductOperands,
  name: string,
  dtype: string,
  bytes: number,
  limit: number,
  call: ProductCall,
): KernelCase {
  const out = new Float32Array(tokens * rows);
  return {
    ...circumstancesOf(kernels, name, dtype, [rows, cols]),
    weights: tokens * rows * cols,
    bytes: bytes + 4 * (tokens * cols + out.length),
    contender: { run: () => call(kernels, tokens, rows, out) },
    check() {
      call(kernels, tokens, rows, out);
      const t = Math.min(tokens, CHECKED_TOKENS), n = Math.min(rows, CHECKED_ROWS);
      const wanted = new Float32Array(t * n), found = new Float32Array(t * n);
      for (let i = 0; i < t; i++) found.set(out.subarray(i * rows, i * rows + n), i * n);
      call(withIsa(kernels, "scalar"), t, n, wanted);
      if (limit === 0) return expectEqual(name, found, wanted);
      const difference = relativeDifference(found, wanted);
      if (difference < limit) return;
      throw new Error(
        `Cannot time ${name}: it must be within ${limit} of the scalar kernel's result, got ${difference}`,
      );
    },
  };
}

export const LINEAR_F32 = "F32 weights";
export const LINEAR_PACKED = (bits: BitWidth) => `${bits} bits, F32 activations`;
export const LINEAR_INT8 = (bits: BitWidth) => `${bits} bits, 8-bit activations`;

export function linearCase(operands: ProductOperands, name: string = LINEAR_F32): KernelCase {
  const call: ProductCall = (kernels, ...shape) => callLinear(kernels, operands, ...shape);
  return productCase(operands, name, "F32 × F32", operands.weights.byteLength, F32_LIMIT, call);
}

export function packedLinearCase(operands: ProductOperands, bits: BitWidth): KernelCase {
  const { x, cols } = operands, arrays = operands.packed(bits), bytes = bytesOfArrays(arrays);
  const call: ProductCall = (kernels, tokens, rows, out) =>
    native.linearPacked(kernels, DOING, x, tokens, ...arrays, null, rows, cols, bits, GROUP_SIZE, out);
  return productCase(operands, LINEAR_PACKED(bits), `F32 × ${bits} bits`, bytes, F32_LIMIT, call);
}

/** 8-bit activations: codes, scales and zero points, one a token. */
type Activations = readonly [
  codes: Uint8Array<ArrayBuffer>,
  scale: Float32Array<ArrayBuffer>,
  zeroPoint: Int32Array<ArrayBuffer>,
];

/** A static range that normal values fill. */
const STATIC = { scale: 2 ** -5, zeroPoint: 128 };

const emptyActivations = (tokens: number, cols: number): Activations => [
  new Uint8Array(tokens * cols),
  new Float32Array(tokens).fill(STATIC.scale),
  new Int32Array(tokens).fill(STATIC.zeroPoint),
];

/** Quantizes activations to 8 bits: per token, or with the ranges that `out` has. */
function quantizeActivations(
  kernels: Kernels,
  { x, cols }: ProductOperands,
  tokens: number,
  isPerToken: boolean,
  out: Activations,
): void {
  native.quantizeActivations(kernels, DOING, x, tokens, cols, 8, isPerToken ? 1 : 0, ...out);
}

/** 8-bit activations, quantized before and each token by its own range, by packed weights. */
export function int8LinearCase(operands: ProductOperands, bits: BitWidth): KernelCase {
  const { tokens, cols } = operands;
  const arrays = operands.packed(bits), bytes = bytesOfArrays(arrays);
  const activations = emptyActivations(tokens, cols);
  quantizeActivations(operands.kernels, operands, tokens, true, activations);
  const call: ProductCall = (kernels, count, rows, out) => {
    const packed = [...arrays, null, rows, cols, bits, GROUP_SIZE] as const;
    native.linearPackedInt8(kernels, DOING, ...activations, count, ...packed, out);
  };
  return productCase(operands, LINEAR_INT8(bits), `U8 × ${bits} bits`, bytes, 0, call);
}

export const LINEAR_TRELLIS = (bits: BitWidth) => `${bits} bits, trellis, F32 activations`;
export const LINEAR_TRELLIS_INT8 = (bits: BitWidth) => `${bits} bits, trellis, 8-bit activations`;

/** Arrays of uniform codes, taken as trellis codes, scales and offsets: any codes take the same time. */
const trellisArrays = (operands: ProductOperands, bits: BitWidth) => {
  const [packed, scale, offset] = operands.packed(bits);
  return [packed, scale, offset!] as const;
};

export function trellisLinearCase(operands: ProductOperands, bits: BitWidth): KernelCase {
  const { x, cols } = operands, arrays = trellisArrays(operands, bits);
  const call: ProductCall = (kernels, tokens, rows, out) =>
    native.linearTrellis(kernels, DOING, x, tokens, ...arrays, null, rows, cols, bits, GROUP_SIZE, out);
  return productCase(
    operands,
    LINEAR_TRELLIS(bits),
    `F32 × trellis of ${bits} bits`,
    bytesOfArrays(arrays),
    F32_LIMIT,
    call,
  );
}

export function trellisInt8LinearCase(operands: ProductOperands, bits: BitWidth): KernelCase {
  const { kernels, tokens, cols } = operands, arrays = trellisArrays(operands, bits);
  const activations = emptyActivations(tokens, cols);
  quantizeActivations(kernels, operands, tokens, true, activations);
  const call: ProductCall = (used, count, rows, out) => {
    const packed = [...arrays, null, rows, cols, bits, GROUP_SIZE] as const;
    native.linearTrellisInt8(used, DOING, ...activations, count, ...packed, out);
  };
  return productCase(
    operands,
    LINEAR_TRELLIS_INT8(bits),
    `U8 × trellis of ${bits} bits`,
    bytesOfArrays(arrays),
    0,
    call,
  );
}

/** Quantizing activations to 8 bits: per token, or all with a static range. */
export function quantizeActivationsCase(
  operands: ProductOperands,
  kind: "per token" | "static" = "per token",
): KernelCase {
  const { kernels, tokens, cols, x } = operands;
  return ownCase({ kernels, rows: tokens, cols, reference: kernels }, {
    name: `quantize activations to 8 bits${kind === "static" ? ", static range" : ""}`,
    dtype: "F32 to U8",
    weights: 0,
    bytesRead: x.byteLength - 8 * tokens, // scales and zero points are too few to count
    make: (count) => emptyActivations(count, cols),
    call: (used, count, out) => quantizeActivations(used, operands, count, kind === "per token", out),
  });
}
