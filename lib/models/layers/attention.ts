/** Attention, and the positions and timesteps that transformers are told. */
import { checkArray, checkCounts } from "../../native/call.ts";
import * as native from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";

type Floats = Float32Array<ArrayBuffer>;

/** The header's `AQ_MAX_POSITION`: beyond it the angle of a position or a timestep loses accuracy. */
export const MAX_POSITION = 2 ** 20;

/** Sizes of an attention call. */
export interface AttentionShape {
  readonly batch: number;
  readonly tokens: number;
  readonly heads: number;
  /** Key and value heads, a divisor of `heads`; default `heads`. */
  readonly kvHeads?: number | undefined;
  readonly headSize: number;
  /** Tokens of a block: a query sees keys up to the end of its own block. Default 0: all keys. */
  readonly block?: number | undefined;
}

/** Inputs of an attention call. */
export interface AttentionInputs {
  /** `f32[batch, tokens, heads, headSize]` */
  readonly q: Float32Array;
  /** `f32[batch, tokens, kvHeads, headSize]` */
  readonly k: Float32Array;
  /** `f32[batch, tokens, kvHeads, headSize]` */
  readonly v: Float32Array;
  /** `u8[batch, tokens]`, 0 where a key is not attended to. */
  readonly keyMask?: Uint8Array | undefined;
}

/** @throws {RangeError | TypeError} unless `queries` are like `q`, and `keys` like `k` and `v` */
export function checkAttention(
  doing: string,
  shape: AttentionShape,
  keyMask: Uint8Array | undefined,
  queries: Readonly<Record<string, Float32Array>>,
  keys: Readonly<Record<string, Float32Array>>,
): void {
  const { batch, tokens, heads, kvHeads = heads, headSize } = shape;
  checkCounts(doing, { batch, tokens, heads, kvHeads, headSize });
  if (heads > 0 && (kvHeads === 0 || heads % kvHeads !== 0)) {
    throw new RangeError(`Cannot ${doing}: kvHeads must divide ${heads} heads, got ${kvHeads}`);
  }
  for (const name in queries) checkArray(doing, name, queries[name], batch * tokens * heads * headSize);
  for (const name in keys) checkArray(doing, name, keys[name], batch * tokens * kvHeads * headSize);
  if (keyMask !== undefined) checkArray(doing, "keyMask", keyMask, batch * tokens, "bytes");
}

/**
 * Bidirectional attention, `softmax(q kᵀ / √headSize) v` for every head. Needs no memory that grows with
 * tokens².
 *
 * **Shapes** → like `q`; zeros where a query has no key. `out` must be none of the inputs.
 */
export function attention(
  kernels: Kernels,
  { q, k, v, keyMask }: AttentionInputs,
  shape: AttentionShape,
  out: Floats = new Float32Array(q.length),
): Floats {
  const doing = "attend";
  checkAttention(doing, shape, keyMask, { q, out }, { k, v });
  const { batch, tokens, heads, kvHeads = heads, headSize, block = 0 } = shape;
  const scale = 1 / Math.sqrt(headSize), sizes = [batch, tokens, heads, kvHeads, headSize, block] as const;
  native.attention(kernels, doing, q, k, v, keyMask, ...sizes, scale, out);
  return out;
}

/**
 * Rotary embedding in place, halves rotated as Llama does: `x[i]` and `x[i + headSize/2]` turn by
 * `positions[row] · theta^(−2i/headSize)`.
 *
 * **Shapes** `x: f32[rows, heads, headSize]`, `positions: i32[rows]` within ±{@linkcode MAX_POSITION} → `x`
 */
export function rotary(
  kernels: Kernels,
  x: Floats,
  positions: Int32Array,
  shape: { readonly heads: number; readonly headSize: number; readonly theta: number },
): Floats {
  const doing = "embed positions", { heads, headSize, theta } = shape;
  checkCounts(doing, { heads, headSize });
  if (headSize % 2 !== 0) throw new RangeError(`Cannot ${doing}: headSize must be even, got ${headSize}`);
  if (!(theta >= 1 && theta < 1e300)) {
    throw new RangeError(`Cannot ${doing}: theta must be ≥ 1, got ${theta}`);
  }
  checkArray(doing, "x", x, positions.length * heads * headSize);
  const bad = positions.find((position) => Math.abs(position) > MAX_POSITION);
  if (bad !== undefined) {
    throw new RangeError(`Cannot ${doing}: positions must be within ±${MAX_POSITION}, got ${bad}`);
  }
  native.rotary(kernels, doing, x, positions, positions.length, heads, headSize, theta);
  return x;
}

/** Names and defaults as of diffusers' `get_timestep_embedding`. */
export interface TimestepEmbeddingOptions {
  /** Default false: sines first. */
  readonly flipSinToCos?: boolean | undefined;
  /** Default 1. Less than half the channels. */
  readonly downscaleFreqShift?: number | undefined;
  /** Default 10 000. At least 1. */
  readonly maxPeriod?: number | undefined;
}

/**
 * Sinusoidal embedding of timesteps: sine and cosine of `t · maxPeriod^(−i / (half − downscaleFreqShift))`
 * for i below half the channels, the angle rounded to float32 as PyTorch does, its sine and cosine taken in
 * double; a zero last if the channels are odd. diffusers' `get_timestep_embedding`.
 *
 * **Shapes** `timesteps: [n]` within ±{@linkcode MAX_POSITION} → `f32[n, channels]`
 *
 * @throws {RangeError} when a timestep or an option is not allowed
 */
export function timestepEmbedding(
  kernels: Kernels,
  timesteps: ArrayLike<number>,
  channels: number,
  { flipSinToCos = false, downscaleFreqShift = 1, maxPeriod = 10_000 }: TimestepEmbeddingOptions = {},
  out: Floats = new Float32Array(timesteps.length * channels),
): Floats {
  const doing = "embed timesteps";
  checkCounts(doing, { channels });
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
  checkArray(doing, "out", out, t.length * channels);
  const flip = flipSinToCos ? 1 : 0;
  native.timestepEmbedding(kernels, doing, t, t.length, channels, flip, downscaleFreqShift, maxPeriod, out);
  return out;
}
