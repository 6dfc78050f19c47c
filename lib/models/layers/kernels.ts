/**
 * The forward pass's kernels as functions: arguments checked on this side, a kernel's status turned into an error.
 * Tensors are flat float32 arrays, row-major. Every function writes into `out` where one is given, and returns it.
 * Results never depend on `threads`; between instruction sets they differ by rounding, but not those of 8-bit activations.
 */
import { KernelError } from "../../errors.ts";
import type { Kernels } from "../../native/mod.ts";
import { rotateRows } from "../../quant/packed/rotation.ts";
import { checkPackedTensor, type OneLevelTensor, type PackedTensor } from "../../quant/packed/layout.ts";

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
}

const DTYPE_NUMBERS: Record<WeightDtype, number> = { F32: 0, F16: 1, BF16: 2 };
/** The header's `AQ_ACTIVATIONS_STATIC` and `AQ_ACTIVATIONS_PER_TOKEN`. */
const STATIC = 0, PER_TOKEN = 1;
/** The header's `AQ_MAX_POSITION`: beyond it the angle of a position or a timestep loses accuracy. */
export const MAX_POSITION = 2 ** 20;

const STATUS_TEXT: Record<number, string> = {
  [-1]: "a null pointer or an unknown enumerator",
  [-2]: "a size that is not allowed or too large",
  [-3]: "a value out of range",
  [-4]: "NaN or infinity",
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
 * import { openKernels } from "../../native/mod.ts";
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
  const out = outOf(doing, options, tokens * rows);
  const { calls, isaNumber } = kernels;
  const [t, n, k] = [kernels.size(tokens), kernels.size(rows), kernels.size(cols)];
  const b = bias ?? null;
  if (!("packed" in weights)) {
    const dtype = DTYPE_NUMBERS[weights.dtype];
    check(calls.aq_linear(x, t, weights.data, dtype, b, n, k, out, isaNumber, kernels.threads), doing);
    return out;
  }
  const { packed, bits, lowRank, rotation } = weights;
  if (lowRank !== undefined || rotation !== undefined) {
    return linearExtended(kernels, x, tokens, weights, bias, { out });
  }
  const g = kernels.size(weights.groupSize);
  if (weights.scaleBits === undefined) {
    const { scale, zeroPoint } = weights;
    const z = zeroPoint ?? null;
    check(
      calls.aq_linear_packed(x, t, packed, scale, z, b, n, k, bits, g, out, isaNumber, kernels.threads),
      doing,
    );
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
      kernels.threads,
    ),
    doing,
  );
  return out;
}

/** The same with a rotation, `x ← H x`, and a low-rank correction, `+ A (B x)`: products of the kernels for plain matrices. */
function linearExtended(
  kernels: Kernels,
  x: Float32Array,
  tokens: number,
  { lowRank, rotation, ...codes }: PackedTensor,
  bias: Float32Array | undefined,
  options: RunOptions & { readonly out: Floats },
): Floats {
  const { rows, cols } = codes, { out } = options;
  const input = rotation === undefined ? x : rotateRows(x.slice(), cols, rotation);
  linear(kernels, input, tokens, codes, bias, options);
  if (lowRank === undefined) return out;
  const { rank, a, b } = lowRank;
  const narrow = linear(kernels, input, tokens, { rows: rank, cols, dtype: "F16", data: b });
  const correction = linear(kernels, narrow, tokens, { rows, cols: rank, dtype: "F16", data: a });
  return add(kernels, out, correction, options);
}

/** Smallest normal float32: the header's least scale of activations. */
const MIN_SCALE = 2 ** -126;
/** Bit widths that activations may have. */
export const ACTIVATION_BITS = [2, 3, 4, 5, 6, 7, 8] as const;
export type ActivationBits = typeof ACTIVATION_BITS[number];

/** Activations as whole numbers, `x ≈ scale[t] · (codes[t, k] − zeroPoint[t])`, codes in `[0, 2^bits − 1]`, a byte each. */
export interface QuantizedActivations {
  readonly tokens: number;
  readonly cols: number;
  readonly bits: ActivationBits;
  /** `u8[tokens, cols]` */
  readonly codes: Uint8Array<ArrayBuffer>;
  /** `f32[tokens]` */
  readonly scale: Float32Array<ArrayBuffer>;
  /** `i32[tokens]` */
  readonly zeroPoint: Int32Array<ArrayBuffer>;
}

/** A static grid of activations, as calibration finds it. */
export interface ActivationGrid {
  /** At least 2^-126. */
  readonly scale: number;
  /** A whole number in `[0, 2^bits − 1]`. */
  readonly zeroPoint: number;
}

export interface QuantizeActivationsOptions {
  /** Default 8. */
  readonly bits?: ActivationBits | undefined;
  /** Given: static, one for the whole tensor, or one a token. Else every token has its own range's, zero among it. */
  readonly grid?: ActivationGrid | readonly ActivationGrid[] | undefined;
  /** Arrays to write into, of the same sizes and bits. */
  readonly out?: QuantizedActivations | undefined;
}

function checkArray(
  doing: string,
  name: string,
  array: unknown,
  kind: Uint8ArrayConstructor | Float32ArrayConstructor | Int32ArrayConstructor,
  length: number,
): void {
  if (array instanceof kind && array.length === length) return;
  const got = array instanceof kind ? `${array.length}` : typeof array;
  throw new TypeError(`Cannot ${doing}: ${name} must be a ${kind.name} of ${length}, got ${got}`);
}

function checkActivations(doing: string, activations: QuantizedActivations): void {
  const { tokens, cols, bits, codes, scale, zeroPoint } = activations;
  checkCount(doing, "tokens", tokens);
  checkCount(doing, "cols", cols);
  if (!ACTIVATION_BITS.includes(bits)) {
    throw new RangeError(`Cannot ${doing}: activation bits must be 2 to 8, got ${bits}`);
  }
  checkArray(doing, "codes", codes, Uint8Array, tokens * cols);
  checkArray(doing, "activation scale", scale, Float32Array, tokens);
  checkArray(doing, "activation zeroPoint", zeroPoint, Int32Array, tokens);
}

/** Writes a static grid into the arrays that the kernel reads. */
function fillGrid(
  doing: string,
  grid: ActivationGrid | readonly ActivationGrid[],
  out: QuantizedActivations,
) {
  const { tokens, bits, scale, zeroPoint } = out;
  const grids: readonly ActivationGrid[] | undefined = Array.isArray(grid) ? grid : undefined;
  if (grids !== undefined && grids.length !== tokens) {
    throw new TypeError(`Cannot ${doing}: ${tokens} tokens must have a grid each, got ${grids.length}`);
  }
  const most = 2 ** bits - 1;
  for (let t = 0; t < tokens; t++) {
    const one = grids === undefined ? grid as ActivationGrid : grids[t]!;
    const rounded = Math.fround(one.scale);
    if (!(rounded >= MIN_SCALE && rounded < Infinity)) {
      throw new RangeError(`Cannot ${doing}: a scale must be a float32 of at least 2^-126, got ${one.scale}`);
    }
    if (!Number.isInteger(one.zeroPoint) || one.zeroPoint < 0 || one.zeroPoint > most) {
      throw new RangeError(
        `Cannot ${doing}: a zero point must be a whole number from 0 to ${most}, got ${one.zeroPoint}`,
      );
    }
    scale[t] = rounded;
    zeroPoint[t] = one.zeroPoint;
  }
}

/**
 * Rounds activations to codes of 2 to 8 bits: per tensor static on a grid that is given, what lies beyond it clipped, or
 * per token dynamic, `|x − scale · (code − zeroPoint)| ≤ scale / 2` up to rounding.
 *
 * **Shapes** `x: f32[tokens, cols]` → `codes: u8[tokens, cols]`, `scale: f32[tokens]`, `zeroPoint: i32[tokens]`
 *
 * @throws {TypeError} when an array does not fit the sizes
 * @throws {RangeError} when bits, scale or zero point are not allowed
 * @throws {KernelError} when `x` has NaN or infinity
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 *
 * const kernels = await openKernels();
 * const { codes, scale, zeroPoint } = quantizeActivations(kernels, Float32Array.of(-1, 0, 2), 1, 3, { bits: 2 });
 * console.log([...codes], scale[0], zeroPoint[0]); // [ 0, 1, 3 ] 1 1
 * ```
 */
export function quantizeActivations(
  kernels: Kernels,
  x: Float32Array,
  tokens: number,
  cols: number,
  options: QuantizeActivationsOptions = {},
): QuantizedActivations {
  const doing = "quantize activations";
  const { bits = 8, grid } = options;
  checkCount(doing, "tokens", tokens);
  checkCount(doing, "cols", cols);
  checkFloats(doing, "x", x, tokens * cols);
  const out: QuantizedActivations = options.out ?? {
    tokens,
    cols,
    bits,
    codes: new Uint8Array(tokens * cols),
    scale: new Float32Array(tokens).fill(1),
    zeroPoint: new Int32Array(tokens),
  };
  checkActivations(doing, out);
  if (out.tokens !== tokens || out.cols !== cols || out.bits !== bits) {
    throw new TypeError(
      `Cannot ${doing}: out must be of ${tokens} × ${cols} elements of ${bits} bits, ` +
        `got ${out.tokens} × ${out.cols} of ${out.bits}`,
    );
  }
  if (grid !== undefined) fillGrid(doing, grid, out);
  const { calls, isaNumber, size } = kernels;
  check(
    calls.aq_quantize_activations(
      x,
      size(tokens),
      size(cols),
      bits,
      grid === undefined ? PER_TOKEN : STATIC,
      out.codes,
      out.scale,
      out.zeroPoint,
      isaNumber,
      kernels.threads,
    ),
    doing,
  );
  return out;
}

/**
 * {@linkcode linear} of 8-bit activations and packed weights by integer products: the same bytes for every instruction
 * set and number of threads. Products are added up as whole numbers within a group (or 256 columns of a group that is the
 * whole row), groups in float32, in the order of the columns.
 *
 * **Shapes** `activations: [tokens, cols]`, `weights: [rows, cols]`, `bias: f32[rows]` → `f32[tokens, rows]`
 *
 * @throws {TypeError} when an array does not fit the sizes, or the weights have two-level scales
 * @throws {RangeError} when a zero point of the activations is not from 0 to 255
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 * import { quantize } from "../../quant/mod.ts";
 *
 * const kernels = await openKernels();
 * const weights = quantize(kernels, { data: Float32Array.of(1, 2, 3, 4), dtype: "F32" }, 2, 2, { bits: 8 });
 * const activations = quantizeActivations(kernels, Float32Array.of(1, 1), 1, 2);
 * console.log(linearPackedInt8(kernels, activations, weights)); // about 3 and 7
 * ```
 */
export function linearPackedInt8(
  kernels: Kernels,
  activations: QuantizedActivations,
  weights: OneLevelTensor,
  bias?: Float32Array,
  options: RunOptions = {},
): Floats {
  const doing = "apply a linear layer to 8-bit activations";
  checkActivations(doing, activations);
  checkMatrix(doing, weights);
  if (!("packed" in weights)) {
    throw new TypeError(`Cannot ${doing}: weights must be packed, got a full matrix`);
  }
  if (weights.scaleBits !== undefined) {
    throw new TypeError(`Cannot ${doing}: weights must have one level of scales, got two-level scales`);
  }
  if (weights.lowRank !== undefined || weights.rotation !== undefined) {
    const got = weights.lowRank === undefined ? "a rotation" : "a low-rank correction";
    throw new TypeError(`Cannot ${doing}: weights must be codes and scales alone, got ${got}`);
  }
  const { tokens, codes, scale: xScale, zeroPoint: xZeroPoint } = activations;
  const { rows, cols, packed, scale, zeroPoint, bits, groupSize } = weights;
  if (activations.cols !== cols) {
    throw new TypeError(`Cannot ${doing}: activations must have ${cols} columns, got ${activations.cols}`);
  }
  if (bias !== undefined) checkFloats(doing, "bias", bias, rows);
  const bad = xZeroPoint.find((value) => value < 0 || value > 255);
  if (bad !== undefined) {
    throw new RangeError(`Cannot ${doing}: activation zeroPoint must be from 0 to 255, got ${bad}`);
  }
  const out = outOf(doing, options, tokens * rows);
  const { calls, isaNumber, size } = kernels;
  check(
    calls.aq_linear_packed_int8(
      codes,
      xScale,
      xZeroPoint,
      size(tokens),
      packed,
      scale,
      zeroPoint ?? null,
      bias ?? null,
      size(rows),
      size(cols),
      bits,
      size(groupSize),
      out,
      isaNumber,
      kernels.threads,
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
      kernels.threads,
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
      kernels.threads,
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
  const out = outOf(doing, options, rows * cols);
  check(
    kernels.calls.aq_softmax(
      x,
      kernels.size(rows),
      kernels.size(cols),
      out,
      kernels.isaNumber,
      kernels.threads,
    ),
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
      kernels.threads,
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
      kernels.threads,
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
  const out = outOf(doing, options, gate.length);
  const n = kernels.size(gate.length);
  check(kernels.calls.aq_silu_multiply(gate, up, n, out, kernels.isaNumber, kernels.threads), doing);
  return out;
}

/** `x / (1 + exp(−x))`, element by element; `out` may be `x`. */
export function silu(kernels: Kernels, x: Float32Array, options: RunOptions = {}): Floats {
  const doing = "apply SiLU";
  checkFloats(doing, "x", x, x?.length);
  const out = outOf(doing, options, x.length);
  check(kernels.calls.aq_silu(x, kernels.size(x.length), out, kernels.isaNumber, kernels.threads), doing);
  return out;
}

/** `x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`, element by element; `out` may be `x`. */
export function geluTanh(kernels: Kernels, x: Float32Array, options: RunOptions = {}): Floats {
  const doing = "apply GELU";
  checkFloats(doing, "x", x, x?.length);
  const out = outOf(doing, options, x.length);
  check(
    kernels.calls.aq_gelu_tanh(x, kernels.size(x.length), out, kernels.isaNumber, kernels.threads),
    doing,
  );
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
      kernels.threads,
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
      kernels.threads,
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
  const out = outOf(doing, options, a.length);
  check(kernels.calls.aq_add(a, b, kernels.size(a.length), out, kernels.isaNumber, kernels.threads), doing);
  return out;
}

/** Sizes of images and of the square patches that a transformer sees them as. */
export interface PatchShape {
  readonly batch: number;
  readonly channels: number;
  readonly height: number;
  readonly width: number;
  /** Divides height and width. */
  readonly patch: number;
}

function checkPatches(doing: string, name: string, values: Float32Array, shape: PatchShape): void {
  for (const each of ["batch", "channels", "height", "width", "patch"] as const) {
    checkCount(doing, each, shape[each]);
  }
  const { batch, channels, height, width, patch } = shape;
  if (patch === 0 || height % patch !== 0 || width % patch !== 0) {
    throw new RangeError(`Cannot ${doing}: patch must divide ${height} × ${width} pixels, got ${patch}`);
  }
  checkFloats(doing, name, values, batch * channels * height * width);
}

/**
 * Images to the rows that a patch embedding multiplies.
 *
 * **Shapes** `images: f32[batch, channels, height, width]` → `f32[batch, height/patch, width/patch, channels, patch, patch]`.
 * `out` must not be `images`.
 */
export function patchify(
  kernels: Kernels,
  images: Float32Array,
  shape: PatchShape,
  options: RunOptions = {},
): Floats {
  const doing = "take images apart";
  checkPatches(doing, "images", images, shape);
  const out = outOf(doing, options, images.length);
  const { calls, size } = kernels;
  const { batch, channels, height, width, patch } = shape;
  const [b, c, h, w, p] = [size(batch), size(channels), size(height), size(width), size(patch)];
  check(calls.aq_patchify(images, b, c, h, w, p, out, kernels.threads), doing);
  return out;
}

/**
 * What a diffusion transformer predicts of its patches to images: channels last in a token, unlike in {@linkcode patchify}.
 *
 * **Shapes** `tokens: f32[batch, height/patch, width/patch, patch, patch, channels]` → `f32[batch, channels, height, width]`.
 * `out` must not be `tokens`.
 */
export function unpatchify(
  kernels: Kernels,
  tokens: Float32Array,
  shape: PatchShape,
  options: RunOptions = {},
): Floats {
  const doing = "put images together";
  checkPatches(doing, "tokens", tokens, shape);
  const out = outOf(doing, options, tokens.length);
  const { calls, size } = kernels;
  const { batch, channels, height, width, patch } = shape;
  const [b, c, h, w, p] = [size(batch), size(channels), size(height), size(width), size(patch)];
  check(calls.aq_unpatchify(tokens, b, c, h, w, p, out, kernels.threads), doing);
  return out;
}

/** Names and defaults as of diffusers' `get_timestep_embedding`. */
export interface TimestepEmbeddingOptions {
  /** Default false: sines first. */
  readonly flipSinToCos?: boolean | undefined;
  /** Default 1. Less than half the channels. */
  readonly downscaleFreqShift?: number | undefined;
  /** Default 10 000. At least 1. */
  readonly maxPeriod?: number | undefined;
  readonly out?: Floats | undefined;
}

/**
 * Sinusoidal embedding of timesteps: sine and cosine of `t · maxPeriod^(−i / (half − downscaleFreqShift))` for i below
 * half the channels, the angle rounded to float32 as PyTorch does, its sine and cosine taken in double; a zero last if
 * the channels are odd. diffusers' `get_timestep_embedding`.
 *
 * **Shapes** `timesteps: [n]` within ±{@linkcode MAX_POSITION} → `f32[n, channels]`
 *
 * @throws {RangeError} when a timestep or an option is not allowed
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 *
 * console.log(timestepEmbedding(await openKernels(), [0], 4)); // 0, 0, 1, 1
 * ```
 */
export function timestepEmbedding(
  kernels: Kernels,
  timesteps: ArrayLike<number>,
  channels: number,
  options: TimestepEmbeddingOptions = {},
): Floats {
  const doing = "embed timesteps";
  const { flipSinToCos = false, downscaleFreqShift = 1, maxPeriod = 10_000 } = options;
  checkCount(doing, "channels", channels);
  const half = Math.floor(channels / 2);
  if (!(maxPeriod >= 1 && maxPeriod < 1e300)) {
    throw new RangeError(`Cannot ${doing}: maxPeriod must be ≥ 1, got ${maxPeriod}`);
  }
  if (half > 0 && !(Math.fround(half - downscaleFreqShift) > 0)) {
    throw new RangeError(
      `Cannot ${doing}: downscaleFreqShift must be less than ${half}, half the channels, got ${downscaleFreqShift}`,
    );
  }
  const t = Float32Array.from(timesteps);
  const bad = t.findIndex((value) => !(Math.abs(value) <= MAX_POSITION));
  if (bad >= 0) {
    throw new RangeError(`Cannot ${doing}: timesteps must be within ±${MAX_POSITION}, got ${timesteps[bad]}`);
  }
  const out = outOf(doing, options, t.length * channels);
  const { calls, size } = kernels;
  const flip = flipSinToCos ? 1 : 0, n = size(t.length), c = size(channels);
  check(calls.aq_timestep_embedding(t, n, c, flip, downscaleFreqShift, maxPeriod, out), doing);
  return out;
}
