/** Linear layers by integer products: activations as codes of up to 8 bits, packed weights. */
import { checkArray, checkCounts, checkFloats, checkWhole } from "../../native/call.ts";
import * as native from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";
import {
  checkPackedTensor,
  isRotated,
  linesOf,
  type OneLevelTensor,
  type TwoLevelTensor,
} from "../../quant/packed/layout.ts";
import type { ActivationGrid } from "../../time/mod.ts";
import type { Matrix } from "./linear.ts";

type Floats = Float32Array<ArrayBuffer>;

/** The header's `AQ_ACTIVATIONS_STATIC` and `AQ_ACTIVATIONS_PER_TOKEN`. */
const STATIC = 0, PER_TOKEN = 1;
const DOING = "quantize activations", DOING_LINEAR = "apply a linear layer to 8-bit activations";
/** Smallest normal float32: the header's least scale of activations. */
const MIN_SCALE = 2 ** -126;
const MIN_BITS = 2, MAX_BITS = 8;

/**
 * Inputs of packed layers without time parameters of their own: float32, or 8 bits quantized as they come,
 * each token by its own range, which integer products multiply.
 */
export type ActivationPrecision = (typeof ACTIVATION_PRECISIONS)[number];
export const ACTIVATION_PRECISIONS = ["f32", "int8"] as const;

/** Activations `x ≈ scale[t] · (codes[t, k] − zeroPoint[t])`, codes in `[0, 2^bits − 1]`, a byte each. */
export interface QuantizedActivations {
  readonly tokens: number;
  readonly cols: number;
  /** 2 to 8. */
  readonly bits: number;
  /** `u8[tokens, cols]` */
  readonly codes: Uint8Array<ArrayBuffer>;
  /** `f32[tokens]` */
  readonly scale: Float32Array<ArrayBuffer>;
  /** `i32[tokens]` */
  readonly zeroPoint: Int32Array<ArrayBuffer>;
}

export interface QuantizeActivationsOptions {
  /** 2 to 8, default 8. */
  readonly bits?: number | undefined;
  /**
   * Static quantization parameters, scale at least 2^-126: one pair for the whole tensor, or one a token.
   * Default: per token dynamic, from the range of the token's values and zero.
   */
  readonly grid?: ActivationGrid | readonly ActivationGrid[] | undefined;
  /** Arrays to write into, of the same sizes and bits. */
  readonly out?: QuantizedActivations | undefined;
}

function checkActivations(doing: string, activations: QuantizedActivations): void {
  const { tokens, cols, bits, codes, scale, zeroPoint } = activations;
  checkCounts(doing, { tokens, cols });
  if (!(Number.isInteger(bits) && bits >= MIN_BITS && bits <= MAX_BITS)) {
    throw new RangeError(`Cannot ${doing}: activation bits must be 2 to 8, got ${bits}`);
  }
  checkArray(doing, "codes", codes, tokens * cols, "bytes");
  checkArray(doing, "activation scale", scale, tokens);
  checkArray(doing, "activation zeroPoint", zeroPoint, tokens, "int32 values");
}

/** The scale as the kernels read it. */
function checkGrid({ scale, zeroPoint }: ActivationGrid, bits: number): number {
  const rounded = Math.fround(scale);
  if (!(rounded >= MIN_SCALE && rounded < Infinity)) {
    throw new RangeError(`Cannot ${DOING}: a scale must be a float32 of at least 2^-126, got ${scale}`);
  }
  checkWhole(DOING, "a zero point", zeroPoint, 0, 2 ** bits - 1);
  return rounded;
}

/**
 * Writes static parameters, one pair for all tokens or one each, into the arrays that the kernel reads.
 *
 * @throws as {@linkcode quantizeActivations}
 */
export function giveGrid(
  given: ActivationGrid | readonly ActivationGrid[],
  { tokens, bits, scale, zeroPoint }: QuantizedActivations,
): void {
  const isOne = "scale" in given;
  if (!isOne && given.length !== tokens) {
    throw new TypeError(`Cannot ${DOING}: ${tokens} tokens must have parameters each, got ${given.length}`);
  }
  for (let t = 0; t < tokens; t++) {
    const own = isOne ? given : given[t]!;
    scale[t] = checkGrid(own, bits);
    zeroPoint[t] = own.zeroPoint;
  }
}

/**
 * Rounds activations to codes of 2 to 8 bits: with static parameters, values beyond their range clipped, or
 * per token dynamic, `|x − scale · (code − zeroPoint)| ≤ scale / 2` up to rounding.
 *
 * **Shapes** `x: f32[tokens, cols]` → `codes: u8[tokens, cols]`, `scale: f32[tokens]`, `zeroPoint:
 * i32[tokens]`
 *
 * @throws {TypeError} when an array does not fit the sizes
 * @throws {RangeError} when bits, scale or zero point are not allowed
 * @throws {KernelError} when `x` has NaN or infinity
 */
export function quantizeActivations(
  kernels: Kernels,
  x: Float32Array,
  tokens: number,
  cols: number,
  { bits = 8, grid, out: given }: QuantizeActivationsOptions = {},
): QuantizedActivations {
  const doing = DOING;
  checkCounts(doing, { tokens, cols });
  const out: QuantizedActivations = given ?? {
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
  if (grid !== undefined) giveGrid(grid, out);
  encodeActivations(kernels, x, out, grid !== undefined);
  return out;
}

/**
 * {@linkcode quantizeActivations} into `out`, whose scales and zero points are those that were given, or
 * computed.
 *
 * @throws {KernelError} when `x` has NaN or infinity
 */
export function encodeActivations(
  kernels: Kernels,
  x: Float32Array,
  { tokens, cols, bits, codes, scale, zeroPoint }: QuantizedActivations,
  isGiven: boolean,
): void {
  checkArray(DOING, "x", x, tokens * cols);
  const mode = isGiven ? STATIC : PER_TOKEN;
  native.quantizeActivations(kernels, DOING, x, tokens, cols, bits, mode, codes, scale, zeroPoint);
}

/**
 * Weights that integer products read: those with one level of scales, and trellis codes that are not rotated,
 * whose inputs would be rounded before their rotation.
 */
export type IntegerWeights = OneLevelTensor | (TwoLevelTensor & { readonly codes: "trellis" });

/** Whether the integer kernels read these weights. */
export function takesIntegers(weights: Matrix): weights is IntegerWeights {
  return "packed" in weights &&
    (weights.scaleBits === undefined || (weights.codes === "trellis" && !isRotated(weights)));
}

/** How activations are rounded that stay float32. */
export interface RoundActivationsOptions {
  /** 2 to 8. */
  readonly bits: number;
  /** Static parameters; default those of the narrowest range that covers a token's values and zero. */
  readonly grid?: ActivationGrid | undefined;
}

/**
 * Activations rounded to codes and back: `scale · (code − zeroPoint)`, with static parameters the numbers
 * that {@linkcode quantizeActivations} makes codes of.
 *
 * **Shapes** `x: f32[tokens, cols]` → `out: f32[tokens, cols]`, which may be `x`
 *
 * @throws {RangeError} when bits, scale or zero point are not allowed
 * @throws {KernelError} when `x` has NaN or infinity
 */
export function roundActivations(
  kernels: Kernels,
  x: Float32Array,
  tokens: number,
  { bits, grid }: RoundActivationsOptions,
  out: Floats,
): Floats {
  checkCounts(DOING, { tokens });
  checkFloats(DOING, { out: [out, x.length] });
  if (grid !== undefined) checkGrid(grid, bits);
  const { scale, zeroPoint } = grid ?? { scale: 1, zeroPoint: 0 },
    mode = grid === undefined ? PER_TOKEN : STATIC;
  const cols = tokens === 0 ? 0 : x.length / tokens;
  native.roundActivations(kernels, DOING, x, tokens, cols, bits, mode, scale, zeroPoint, out);
  return out;
}

/** A linear layer that the integer kernels take. */
export interface IntegerLayer {
  readonly weights: IntegerWeights;
  readonly bias?: Float32Array | undefined;
}

/**
 * A linear layer of 8-bit activations and packed weights by integer products: the same bytes for every
 * instruction set and number of threads. Products are added up as whole numbers within a group (or 256
 * columns of a group that is the whole row), groups in float32, in the order of the columns.
 *
 * **Shapes** `activations: [tokens, cols]`, `weights: [rows, cols]`, `bias: f32[rows]` → `f32[tokens, rows]`
 *
 * @throws {TypeError} when an array does not fit the sizes, or uniform codes have two-level scales
 * @throws {RangeError} when a zero point of the activations is not from 0 to 255
 */
export function linearPackedInt8(
  kernels: Kernels,
  layer: IntegerLayer,
  activations: QuantizedActivations,
  out: Floats = new Float32Array(activations.tokens * layer.weights.rows),
): Floats {
  checkActivations(DOING_LINEAR, activations);
  const bad = activations.zeroPoint.find((value) => value < 0 || value > 255);
  if (bad !== undefined) {
    throw new RangeError(
      `Cannot ${DOING_LINEAR}: activation zeroPoint must be from 0 to 255, got ${bad}`,
    );
  }
  multiplyCodes(kernels, layer, activations, out);
  return out;
}

/** {@linkcode linearPackedInt8} of activations that a kernel has rounded: their numbers are not checked. */
export function multiplyCodes(
  kernels: Kernels,
  { weights, bias }: IntegerLayer,
  activations: QuantizedActivations,
  out: Floats,
): void {
  const doing = DOING_LINEAR;
  checkIntegerWeights(doing, weights);
  const { tokens, codes, scale: xScale, zeroPoint: xZero } = activations;
  const { rows, cols, packed, bits, groupSize } = weights;
  if (activations.cols !== cols) {
    throw new TypeError(`Cannot ${doing}: activations must have ${cols} columns, got ${activations.cols}`);
  }
  checkFloats(doing, { bias: [bias, rows], out: [out, tokens * rows] });
  const inputs = [codes, xScale, xZero, tokens, packed] as const,
    sizes = [rows, cols, bits, groupSize] as const;
  if (weights.scaleBits === undefined) {
    native.linearPackedInt8(kernels, doing, ...inputs, weights.scale, weights.zeroPoint, bias, ...sizes, out);
  } else {
    native.linearTrellisInt8(kernels, doing, ...inputs, ...linesOf(weights), bias, ...sizes, out);
  }
}

/** @throws {TypeError} unless the integer kernels read these weights */
function checkIntegerWeights(doing: string, weights: IntegerWeights): void {
  const fail = (reason: string) => new TypeError(`Cannot ${doing}: weights must ${reason}`);
  if (!("packed" in weights)) throw fail("be packed, got a full matrix");
  checkPackedTensor(doing, weights);
  if (!takesIntegers(weights)) throw fail("have one level of scales and no rotation, got others");
}
