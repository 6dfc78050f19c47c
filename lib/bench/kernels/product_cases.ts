/** Our matrix products as cases of the bench: full weights, packed weights, and packed weights by 8-bit activations. */
import { type BitWidth, groupCount, type GroupSize, packedWords } from "../../quant/mod.ts";
import {
  expectEqual,
  expectOk,
  type KernelCase,
  type KernelHandle,
  ours,
  packedArrayBytes,
  type PackedArrays,
  quantizeInto,
  relativeDifference,
  scalarOf,
} from "./cases.ts";

/** Rows and tokens of which a check computes the scalar kernel's result: all others are computed as they are. */
const CHECKED_ROWS = 16, CHECKED_TOKENS = 3;
/** Difference from the scalar kernel, relative to the whole result: float32 sums of some thousand terms. */
const F32_LIMIT = 1e-5;
const GROUP_SIZE: GroupSize = 64;

/** Input of products: `x: f32[tokens, cols]` and `weights: f32[rows, cols]`, and the packed weights made of it. */
export class ProductOperands {
  readonly #packed = new Map<BitWidth, PackedArrays>();

  constructor(
    readonly handle: KernelHandle,
    readonly tokens: number,
    readonly rows: number,
    readonly cols: number,
    readonly x: Float32Array<ArrayBuffer>,
    readonly weights: Float32Array<ArrayBuffer>,
  ) {}

  packed(bits: BitWidth): PackedArrays {
    const made = this.#packed.get(bits);
    if (made !== undefined) return made;
    const { rows, cols } = this, groups = rows * groupCount(cols, GROUP_SIZE);
    const out: PackedArrays = {
      packed: new Uint32Array(rows * packedWords(cols, bits)),
      scale: new Uint16Array(groups),
      zeroPoint: new Uint16Array(groups),
    };
    quantizeInto(this.handle, this.weights, rows, cols, {
      solver: "round",
      bits,
      groupSize: GROUP_SIZE,
      zeroPoint: "real",
    }, out);
    this.#packed.set(bits, out);
    return out;
  }
}

/** Operands of one token, and the product that others are held against. */
export class VectorOperands extends ProductOperands {
  #expected: Float32Array<ArrayBuffer> | undefined;

  constructor(
    handle: KernelHandle,
    rows: number,
    cols: number,
    x: Float32Array<ArrayBuffer>,
    weights: Float32Array<ArrayBuffer>,
  ) {
    super(handle, 1, rows, cols, x, weights);
  }

  /** The product in float32. */
  expected(): Float32Array<ArrayBuffer> {
    this.#expected ??= callLinear(this.handle, this, this.tokens, this.rows);
    return this.#expected;
  }
}

function callLinear(
  { kernels, isaNumber }: KernelHandle,
  { x, weights, cols }: ProductOperands,
  tokens: number,
  rows: number,
  out = new Float32Array(tokens * rows),
): Float32Array<ArrayBuffer> {
  const { calls, size } = kernels;
  expectOk(calls.aq_linear(x, size(tokens), weights, 0, null, size(rows), size(cols), out, isaNumber, 1));
  return out;
}

/** The first rows of the first tokens of a result. */
function corner(out: Float32Array, tokens: number, rows: number, checkedTokens: number, checkedRows: number) {
  const part = new Float32Array(checkedTokens * checkedRows);
  for (let t = 0; t < checkedTokens; t++) {
    part.set(out.subarray(t * rows, t * rows + checkedRows), t * checkedRows);
  }
  return tokens === 0 ? new Float32Array(0) : part;
}

/** A case whose call writes the product of its first rows and tokens with any instruction set. */
function productCase(
  operands: ProductOperands,
  name: string,
  dtype: string,
  bytes: number,
  limit: number,
  call: (handle: KernelHandle, tokens: number, rows: number, out: Float32Array<ArrayBuffer>) => void,
): KernelCase {
  const { handle, tokens, rows, cols } = operands;
  const out = new Float32Array(tokens * rows);
  return {
    ...ours(handle, name, dtype, rows, cols),
    weights: tokens * rows * cols,
    bytes: bytes + 4 * (tokens * cols + out.length),
    contender: { run: () => call(handle, tokens, rows, out) },
    check() {
      call(handle, tokens, rows, out);
      const t = Math.min(tokens, CHECKED_TOKENS), n = Math.min(rows, CHECKED_ROWS);
      const wanted = new Float32Array(t * n), found = corner(out, tokens, rows, t, n);
      call(scalarOf(handle.kernels), t, n, wanted);
      if (limit === 0) return expectEqual(name, found, wanted);
      const difference = relativeDifference(found, wanted);
      if (!(difference < limit)) {
        throw new Error(
          `Cannot time ${name}: it must be within ${limit} of the scalar kernel's result, got ${difference}`,
        );
      }
    },
  };
}

export const LINEAR_F32 = "F32 weights";
export const LINEAR_PACKED = (bits: BitWidth) => `${bits} bits, F32 activations`;
export const LINEAR_INT8 = (bits: BitWidth) => `${bits} bits, 8-bit activations`;

/** Float32 by float32. */
export function linearCase(operands: ProductOperands, name: string = LINEAR_F32): KernelCase {
  return productCase(
    operands,
    name,
    "F32 × F32",
    operands.weights.byteLength,
    F32_LIMIT,
    (handle, tokens, rows, out) => {
      callLinear(handle, operands, tokens, rows, out);
    },
  );
}

/** Float32 by packed weights. */
export function packedLinearCase(operands: ProductOperands, bits: BitWidth): KernelCase {
  const arrays = operands.packed(bits);
  return productCase(
    operands,
    LINEAR_PACKED(bits),
    `F32 × ${bits} bits`,
    packedArrayBytes(arrays),
    F32_LIMIT,
    ({ kernels, isaNumber }, tokens, rows, out) => {
      const { calls, size } = kernels, { packed, scale, zeroPoint } = arrays;
      const [t, n, k, g] = [size(tokens), size(rows), size(operands.cols), size(GROUP_SIZE)];
      expectOk(
        calls.aq_linear_packed(
          operands.x,
          t,
          packed,
          scale,
          zeroPoint,
          null,
          n,
          k,
          bits,
          g,
          out,
          isaNumber,
          1,
        ),
      );
    },
  );
}

/** 8-bit activations, quantized before and each token by its own range, by packed weights. */
export function int8LinearCase(operands: ProductOperands, bits: BitWidth): KernelCase {
  const { handle, tokens, cols, x } = operands;
  const arrays = operands.packed(bits);
  const codes = new Uint8Array(tokens * cols),
    xScale = new Float32Array(tokens),
    xZero = new Int32Array(tokens);
  const { calls, size } = handle.kernels;
  expectOk(
    calls.aq_quantize_activations(
      x,
      size(tokens),
      size(cols),
      8,
      1,
      codes,
      xScale,
      xZero,
      handle.isaNumber,
      1,
    ),
  );
  return productCase(
    operands,
    LINEAR_INT8(bits),
    `U8 × ${bits} bits`,
    packedArrayBytes(arrays),
    0,
    (used, count, rows, out) => {
      const { packed, scale, zeroPoint } = arrays;
      const [t, n, k, g] = [size(count), size(rows), size(cols), size(GROUP_SIZE)];
      const isa = used.isaNumber;
      expectOk(
        calls.aq_linear_packed_int8(
          codes,
          xScale,
          xZero,
          t,
          packed,
          scale,
          zeroPoint,
          null,
          n,
          k,
          bits,
          g,
          out,
          isa,
          1,
        ),
      );
    },
  );
}

/** A grid that normal values fill. */
const STATIC_GRID = { scale: 2 ** -5, zeroPoint: 128 };

/** Quantizing activations to 8 bits, each token by its own range, or all on a static grid. */
export function quantizeActivationsCase(
  { handle, tokens, cols, x }: ProductOperands,
  kind: "per token" | "static" = "per token",
): KernelCase {
  const make = (count: number) => ({
    codes: new Uint8Array(count * cols),
    scale: new Float32Array(count).fill(STATIC_GRID.scale),
    zeroPoint: new Int32Array(count).fill(STATIC_GRID.zeroPoint),
  });
  const call = ({ kernels, isaNumber }: KernelHandle, count: number, out: ReturnType<typeof make>) => {
    const { calls, size } = kernels;
    const { codes, scale, zeroPoint } = out;
    const t = size(count), k = size(cols);
    expectOk(
      calls.aq_quantize_activations(
        x,
        t,
        k,
        8,
        kind === "static" ? 0 : 1,
        codes,
        scale,
        zeroPoint,
        isaNumber,
        1,
      ),
    );
  };
  const out = make(tokens),
    name = `quantize activations to 8 bits${kind === "static" ? ", static grid" : ""}`;
  return {
    ...ours(handle, name, "F32 to U8", tokens, cols),
    weights: 0,
    bytes: x.byteLength + out.codes.byteLength,
    contender: { run: () => call(handle, tokens, out) },
    check() {
      call(handle, tokens, out);
      const checked = Math.min(tokens, CHECKED_TOKENS), wanted = make(checked);
      call(scalarOf(handle.kernels), checked, wanted);
      expectEqual(name, out.codes, wanted.codes);
      expectEqual(name, out.scale, wanted.scale);
      expectEqual(name, out.zeroPoint, wanted.zeroPoint);
    },
  };
}
