/**
 * The forward pass's kernels as functions: arguments checked on this side, a kernel's status turned into an error.
 * Tensors are flat float32 arrays, row-major. Every function writes into `out` where one is given, and returns it.
 * Results never depend on `threads`; between instruction sets they differ by rounding.
 */
import { KernelError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import { checkPackedTensor, type PackedTensor } from "../quant/layout.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Element types that a linear layer reads without converting the whole matrix. */
export type WeightDtype = "F32" | "F16" | "BF16";

/** A matrix of weights as stored: float32 values, or the bits of half or bfloat16 values. */
export interface DenseMatrix {
  readonly rows: number;
  readonly cols: number;
  readonly dtype: WeightDtype;
  readonly data: Float32Array | Uint16Array;
}

/** Weights of a linear layer, full or packed. */
export type Matrix = DenseMatrix | PackedTensor;

export interface RunOptions {
  /** Where the result goes; default a new array. */
  readonly out?: Floats | undefined;
  /** Default 1. Never changes a byte of the result. */
  readonly threads?: number | undefined;
}

const DTYPE_NUMBERS: Record<WeightDtype, number> = { F32: 0, F16: 1, BF16: 2 };
const MAX_THREADS = 64;
/** The header's `AQ_MAX_POSITION`: beyond it a rotary angle loses accuracy. */
export const MAX_POSITION = 2 ** 20;

const STATUS_TEXT: Record<number, string> = {
  [-1]: "a null pointer or an unknown enumerator",
  [-2]: "a size that is not allowed or too large",
  [-3]: "a value out of range",
  [-6]: "an instruction set that this processor or build lacks",
};

function check(status: number, doing: string): void {
  if (status === 0) return;
  throw new KernelError(`Cannot ${doing}: the kernel reports ${STATUS_TEXT[status] ?? `status ${status}`}`, {
    status,
  });
}

function checkCount(doing: string, name: string, value: number): void {
  if (!Number.isSafeInteger(value) || value < 0) {
    throw new RangeError(`Cannot ${doing}: ${name} must be a whole number ≥ 0, got ${value}`);
  }
}

function checkFloats(doing: string, name: string, array: unknown, length: number): void {
  if (!(array instanceof Float32Array) || array.length !== length) {
    const got = array instanceof Float32Array ? `${array.length}` : typeof array;
    throw new TypeError(`Cannot ${doing}: ${name} must be ${length} float32 values, got ${got}`);
  }
}

function threadsOf(doing: string, options: RunOptions): number {
  const { threads = 1 } = options;
  if (!Number.isInteger(threads) || threads < 1 || threads > MAX_THREADS) {
    throw new RangeError(
      `Cannot ${doing}: threads must be a whole number from 1 to ${MAX_THREADS}, got ${threads}`,
    );
  }
  return threads;
}

function outOf(doing: string, options: RunOptions, length: number): Floats {
  if (options.out === undefined) return new Float32Array(length);
  checkFloats(doing, "out", options.out, length);
  return options.out;
}

function checkMatrix(doing: string, weights: Matrix): void {
  if ("packed" in weights) return checkPackedTensor(doing, weights);
  checkCount(doing, "rows", weights.rows);
  checkCount(doing, "cols", weights.cols);
  const { dtype, data } = weights;
  if (!(dtype in DTYPE_NUMBERS)) {
    throw new TypeError(`Cannot ${doing}: weights must be F32, F16 or BF16, got ${JSON.stringify(dtype)}`);
  }
  const elements = weights.rows * weights.cols;
  const fits = dtype === "F32" ? data instanceof Float32Array : data instanceof Uint16Array;
  if (!fits || data.length !== elements) {
    const wanted = dtype === "F32" ? "float32 values" : "16-bit words";
    throw new TypeError(`Cannot ${doing}: weights must be ${elements} ${wanted}, got ${data?.length}`);
  }
}

/**
 * `out[t, n] = Σ_k x[t, k] · weights[n, k] + bias[n]`. Packed weights are dequantized in blocks that stay in the
 * processor's caches, never as a whole.
 *
 * **Shapes** `x: f32[tokens, cols]`, `weights: [rows, cols]`, `bias: f32[rows]` → `f32[tokens, rows]`. `out` must
 * not be `x`.
 *
 * @throws {TypeError} when an array does not fit the sizes
 *
 * @example
 * ```ts
 * import { openKernels } from "../native/mod.ts";
 *
 * const kernels = await openKernels();
 * const weights = { rows: 2, cols: 2, dtype: "F32", data: Float32Array.of(1, 2, 3, 4) } as const;
 * console.log(linear(kernels, Float32Array.of(1, 1), 1, weights)); // 3, 7
 * ```
 */
export function linear(
  kernels: Kernels,
  x: Float32Array,
  tokens: number,
  weights: Matrix,
  bias?: Float32Array,
  options: RunOptions = {},
): Floats {
  const doing = "apply a linear layer";
  checkCount(doing, "tokens", tokens);
  checkMatrix(doing, weights);
  const { rows, cols } = weights;
  checkFloats(doing, "x", x, tokens * cols);
  if (bias !== undefined) checkFloats(doing, "bias", bias, rows);
  const threads = threadsOf(doing, options);
  const out = outOf(doing, options, tokens * rows);
  const { calls, isaNumber } = kernels;
  const [t, n, k] = [kernels.size(tokens), kernels.size(rows), kernels.size(cols)];
  const b = bias ?? null;
  if (!("packed" in weights)) {
    const dtype = DTYPE_NUMBERS[weights.dtype];
    check(calls.aq_linear(x, t, weights.data, dtype, b, n, k, out, isaNumber, threads), doing);
    return out;
  }
  const { packed, bits } = weights;
  const g = kernels.size(weights.groupSize);
  if (weights.scaleBits === undefined) {
    const { scale, zeroPoint } = weights;
    const z = zeroPoint ?? null;
    check(calls.aq_linear_packed(x, t, packed, scale, z, b, n, k, bits, g, out, isaNumber, threads), doing);
    return out;
  }
  const { scaleBits, subScale, subMin, superScale, superMin } = weights;
  check(
    calls.aq_linear_two_level(
      x,
      t,
      packed,
      subScale,
      subMin,
      superScale,
      superMin,
      b,
      n,
      k,
      bits,
      g,
      scaleBits,
      out,
      isaNumber,
      threads,
    ),
    doing,
  );
  return out;
}

/**
 * `x / √(mean(x²) + epsilon) · weight`, by rows. `out` may be `x`.
 *
 * **Shapes** `x: f32[rows, cols]`, `weight: f32[cols]` or undefined for ones
 */
export function rmsNorm(
  kernels: Kernels,
  x: Float32Array,
  rows: number,
  cols: number,
  weight: Float32Array | undefined,
  epsilon: number,
  options: RunOptions = {},
): Floats {
  const doing = "normalize by the root mean square";
  checkCount(doing, "rows", rows);
  checkCount(doing, "cols", cols);
  checkFloats(doing, "x", x, rows * cols);
  if (weight !== undefined) checkFloats(doing, "weight", weight, cols);
  const threads = threadsOf(doing, options);
  const out = outOf(doing, options, rows * cols);
  check(
    kernels.calls.aq_rms_norm(
      x,
      kernels.size(rows),
      kernels.size(cols),
      weight ?? null,
      epsilon,
      out,
      kernels.isaNumber,
      threads,
    ),
    doing,
  );
  return out;
}

/**
 * `(x − mean) / √(variance + epsilon) · weight + bias`, by rows. `out` may be `x`.
 *
 * **Shapes** `x: f32[rows, cols]`, `weight` and `bias: f32[cols]` or undefined for ones and zeros
 */
export function layerNorm(
  kernels: Kernels,
  x: Float32Array,
  rows: number,
  cols: number,
  weight: Float32Array | undefined,
  bias: Float32Array | undefined,
  epsilon: number,
  options: RunOptions = {},
): Floats {
  const doing = "normalize rows";
  checkCount(doing, "rows", rows);
  checkCount(doing, "cols", cols);
  checkFloats(doing, "x", x, rows * cols);
  if (weight !== undefined) checkFloats(doing, "weight", weight, cols);
  if (bias !== undefined) checkFloats(doing, "bias", bias, cols);
  const threads = threadsOf(doing, options);
  const out = outOf(doing, options, rows * cols);
  check(
    kernels.calls.aq_layer_norm(
      x,
      kernels.size(rows),
      kernels.size(cols),
      weight ?? null,
      bias ?? null,
      epsilon,
      out,
      kernels.isaNumber,
      threads,
    ),
    doing,
  );
  return out;
}

/** Softmax by rows of `x: f32[rows, cols]`; a row with NaN or +∞, or of −∞ alone, becomes NaN. `out` may be `x`. */
export function softmax(
  kernels: Kernels,
  x: Float32Array,
  rows: number,
  cols: number,
  options: RunOptions = {},
): Floats {
  const doing = "take the softmax of rows";
  checkCount(doing, "rows", rows);
  checkCount(doing, "cols", cols);
  checkFloats(doing, "x", x, rows * cols);
  const threads = threadsOf(doing, options);
  const out = outOf(doing, options, rows * cols);
  check(
    kernels.calls.aq_softmax(x, kernels.size(rows), kernels.size(cols), out, kernels.isaNumber, threads),
    doing,
  );
  return out;
}

/** Sizes of an attention call. */
export interface AttentionShape {
  readonly batch: number;
  readonly tokens: number;
  readonly heads: number;
  /** Key and value heads, a divisor of `heads`; default `heads`. */
  readonly kvHeads?: number | undefined;
  readonly headSize: number;
}

export interface AttentionOptions extends RunOptions {
  /** `u8[batch, tokens]`, 0 where a key is not attended to. */
  readonly keyMask?: Uint8Array | undefined;
  /** Default `1 / √headSize`. */
  readonly scale?: number | undefined;
}

/**
 * Bidirectional attention, `softmax(scale · q kᵀ) v` for every head. Needs no memory that grows with tokens².
 *
 * **Shapes** `q: f32[batch, tokens, heads, headSize]`, `k` and `v: f32[batch, tokens, kvHeads, headSize]` → like `q`;
 * zeros where a batch item has no key. `out` must be none of the inputs.
 */
export function attention(
  kernels: Kernels,
  q: Float32Array,
  k: Float32Array,
  v: Float32Array,
  shape: AttentionShape,
  options: AttentionOptions = {},
): Floats {
  const doing = "attend";
  const { batch, tokens, heads, kvHeads = heads, headSize } = shape;
  const { keyMask, scale = 1 / Math.sqrt(headSize) } = options;
  for (const [name, value] of Object.entries({ batch, tokens, heads, kvHeads, headSize })) {
    checkCount(doing, name, value);
  }
  if (heads > 0 && (kvHeads === 0 || heads % kvHeads !== 0)) {
    throw new RangeError(`Cannot ${doing}: kvHeads must divide ${heads} heads, got ${kvHeads}`);
  }
  checkFloats(doing, "q", q, batch * tokens * heads * headSize);
  checkFloats(doing, "k", k, batch * tokens * kvHeads * headSize);
  checkFloats(doing, "v", v, batch * tokens * kvHeads * headSize);
  if (keyMask !== undefined && (!(keyMask instanceof Uint8Array) || keyMask.length !== batch * tokens)) {
    throw new TypeError(`Cannot ${doing}: keyMask must be ${batch * tokens} bytes, got ${keyMask?.length}`);
  }
  const threads = threadsOf(doing, options);
  const out = outOf(doing, options, q.length);
  check(
    kernels.calls.aq_attention(
      q,
      k,
      v,
      keyMask ?? null,
      kernels.size(batch),
      kernels.size(tokens),
      kernels.size(heads),
      kernels.size(kvHeads),
      kernels.size(headSize),
      scale,
      out,
      kernels.isaNumber,
      threads,
    ),
    doing,
  );
  return out;
}

/**
 * Rotary embedding in place, halves rotated as Llama does: `x[i]` and `x[i + headSize/2]` turn by
 * `positions[row] · theta^(−2i/headSize)`.
 *
 * **Shapes** `x: f32[rows, heads, headSize]`, `positions: i32[rows]` within ±`MAX_POSITION`
 * @returns `x`
 */
export function rotary(
  kernels: Kernels,
  x: Floats,
  positions: Int32Array,
  heads: number,
  headSize: number,
  theta: number,
  threads = 1,
): Floats {
  const doing = "embed positions";
  checkCount(doing, "heads", heads);
  checkCount(doing, "headSize", headSize);
  if (headSize % 2 !== 0) throw new RangeError(`Cannot ${doing}: headSize must be even, got ${headSize}`);
  if (!(theta >= 1 && theta < 1e300)) {
    throw new RangeError(`Cannot ${doing}: theta must be ≥ 1, got ${theta}`);
  }
  if (!(positions instanceof Int32Array)) {
    throw new TypeError(`Cannot ${doing}: positions must be int32 values, got ${typeof positions}`);
  }
  checkFloats(doing, "x", x, positions.length * heads * headSize);
  const bad = positions.find((position) => Math.abs(position) > MAX_POSITION);
  if (bad !== undefined) {
    throw new RangeError(`Cannot ${doing}: positions must be within ±${MAX_POSITION}, got ${bad}`);
  }
  check(
    kernels.calls.aq_rotary(
      x,
      positions,
      kernels.size(positions.length),
      kernels.size(heads),
      kernels.size(headSize),
      theta,
      kernels.isaNumber,
      threadsOf(doing, { threads }),
    ),
    doing,
  );
  return x;
}

/** `silu(gate) · up`, element by element; `out` may be either. */
export function siluMultiply(
  kernels: Kernels,
  gate: Float32Array,
  up: Float32Array,
  options: RunOptions = {},
): Floats {
  const doing = "gate by SiLU";
  checkFloats(doing, "gate", gate, gate?.length);
  checkFloats(doing, "up", up, gate.length);
  const threads = threadsOf(doing, options);
  const out = outOf(doing, options, gate.length);
  const n = kernels.size(gate.length);
  check(kernels.calls.aq_silu_multiply(gate, up, n, out, kernels.isaNumber, threads), doing);
  return out;
}

/** `x / (1 + exp(−x))`, element by element; `out` may be `x`. */
export function silu(kernels: Kernels, x: Float32Array, options: RunOptions = {}): Floats {
  const doing = "apply SiLU";
  checkFloats(doing, "x", x, x?.length);
  const threads = threadsOf(doing, options);
  const out = outOf(doing, options, x.length);
  check(kernels.calls.aq_silu(x, kernels.size(x.length), out, kernels.isaNumber, threads), doing);
  return out;
}

/** `x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`, element by element; `out` may be `x`. */
export function geluTanh(kernels: Kernels, x: Float32Array, options: RunOptions = {}): Floats {
  const doing = "apply GELU";
  checkFloats(doing, "x", x, x?.length);
  const threads = threadsOf(doing, options);
  const out = outOf(doing, options, x.length);
  check(kernels.calls.aq_gelu_tanh(x, kernels.size(x.length), out, kernels.isaNumber, threads), doing);
  return out;
}

/** Sizes of a tensor `f32[batch, tokens, cols]` that is modulated by one row for each batch item. */
export interface ModulationShape {
  readonly batch: number;
  readonly tokens: number;
  readonly cols: number;
  /** Floats from one batch item's row to the next; default `cols`. Six chunks of one tensor have 6 · cols. */
  readonly stride?: number | undefined;
}

function checkModulation(doing: string, shape: ModulationShape, rows: Record<string, Float32Array>): number {
  const { batch, tokens, cols, stride = cols } = shape;
  for (const [name, value] of Object.entries({ batch, tokens, cols, stride })) checkCount(doing, name, value);
  const least = batch === 0 ? 0 : (batch - 1) * stride + cols;
  for (const [name, row] of Object.entries(rows)) {
    if (!(row instanceof Float32Array) || row.length < least) {
      throw new TypeError(
        `Cannot ${doing}: ${name} must be at least ${least} float32 values, got ${row?.length}`,
      );
    }
  }
  return stride;
}

/**
 * `x (1 + scale) + shift`. `out` may be `x`.
 *
 * **Shapes** `x: f32[batch, tokens, cols]`; `scale` and `shift` begin at their first row and have `stride` floats from
 * one row to the next, so that chunks of one tensor are passed as `subarray`s of it.
 */
export function modulate(
  kernels: Kernels,
  x: Float32Array,
  scale: Float32Array,
  shift: Float32Array,
  shape: ModulationShape,
  options: RunOptions = {},
): Floats {
  const doing = "modulate";
  const stride = checkModulation(doing, shape, { scale, shift });
  const { batch, tokens, cols } = shape;
  checkFloats(doing, "x", x, batch * tokens * cols);
  const threads = threadsOf(doing, options);
  const out = outOf(doing, options, x.length);
  const { size } = kernels;
  check(
    kernels.calls.aq_modulate(
      x,
      scale,
      shift,
      size(stride),
      size(batch),
      size(tokens),
      size(cols),
      out,
      kernels.isaNumber,
      threads,
    ),
    doing,
  );
  return out;
}

/**
 * `residual + gate · x`. `out` may be `residual` or `x`.
 *
 * **Shapes** `residual` and `x: f32[batch, tokens, cols]`; `gate` as `scale` of `modulate`
 */
export function gateAdd(
  kernels: Kernels,
  residual: Float32Array,
  gate: Float32Array,
  x: Float32Array,
  shape: ModulationShape,
  options: RunOptions = {},
): Floats {
  const doing = "add a gated branch";
  const stride = checkModulation(doing, shape, { gate });
  const { batch, tokens, cols } = shape;
  checkFloats(doing, "residual", residual, batch * tokens * cols);
  checkFloats(doing, "x", x, batch * tokens * cols);
  const threads = threadsOf(doing, options);
  const out = outOf(doing, options, x.length);
  const { size } = kernels;
  check(
    kernels.calls.aq_gate_add(
      residual,
      gate,
      x,
      size(stride),
      size(batch),
      size(tokens),
      size(cols),
      out,
      kernels.isaNumber,
      threads,
    ),
    doing,
  );
  return out;
}

/** `a + b`, element by element; `out` may be either. */
export function add(kernels: Kernels, a: Float32Array, b: Float32Array, options: RunOptions = {}): Floats {
  const doing = "add";
  checkFloats(doing, "a", a, a?.length);
  checkFloats(doing, "b", b, a.length);
  const threads = threadsOf(doing, options);
  const out = outOf(doing, options, a.length);
  check(kernels.calls.aq_add(a, b, kernels.size(a.length), out, kernels.isaNumber, threads), doing);
  return out;
}
