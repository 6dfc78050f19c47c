/**
 * Formats of ggml as methods: its own library quantizes and dequantizes. Super-blocks have 256 weights, so a
 * row must be a multiple of that; {@linkcode ggmlMethod} can also lay them across rows, which no GGUF file
 * does.
 */
import type { Ggml, GgmlCodebookType, GgmlType } from "../ggml.ts";
import { WeightsError } from "../../errors.ts";
import { checkLayer, checkRestored, type LayerInputs, type Method, neededInputs } from "./method.ts";

export const SUPERBLOCK = 256;
/** Weights of a block of Q8_0, the only format here without super-blocks. */
const SMALL_BLOCK = 32;

/** Formats with the importance weights that they can take. */
export const GGML_FORMATS = {
  q2_K: "optional",
  q3_K: "optional",
  q4_K: "optional",
  q8_0: "ignored",
  tq2_0: "ignored",
  iq2_xxs: "required",
  iq2_xs: "required",
  iq2_s: "optional",
} as const satisfies Partial<
  Record<GgmlType | GgmlCodebookType, "optional" | "ignored" | "required">
>;
export type GgmlFormat = keyof typeof GGML_FORMATS;

interface GgmlMethodOptions {
  /** The diagonal of E[x xᵀ] as importance weights (an "imatrix"). Default false. */
  readonly importance?: boolean;
  /** Super-blocks are cut from the values of the matrix across the ends of rows. Default false. */
  readonly acrossRows?: boolean;
}

/** Least importance of a column, in units of the mean: the search divides by sums of them. */
const MIN_IMPORTANCE = 1e-6;

/** Weights of a format's block: a row must be a multiple of it. */
export const blockOf = (format: GgmlFormat): number => format === "q8_0" ? SMALL_BLOCK : SUPERBLOCK;

/** Largest weight: that of a half-precision scale. */
const MAX_MAGNITUDE = 65504;

const isCodebook = (format: GgmlFormat): format is GgmlFormat & GgmlCodebookType => format.startsWith("iq2");

/**
 * A format of ggml as a method. Bits are counted as the library writes them, the padding of a last
 * super-block included.
 *
 * @throws {RangeError} when the format ignores importance weights or cannot do without, and is asked for the
 * opposite
 */
export function ggmlMethod(
  ggml: Ggml,
  format: GgmlFormat,
  { importance = false, acrossRows = false }: GgmlMethodOptions = {},
): Method {
  const taken = GGML_FORMATS[format];
  if (importance ? taken === "ignored" : taken === "required") {
    const wanted = importance ? "with" : "without";
    throw new RangeError(`Cannot use ggml's "${format}" ${wanted} importance weights: they are ${taken}`);
  }
  const name = `${format.toUpperCase()}${importance ? " + imatrix" : ""}${acrossRows ? ", flat" : ""}`;
  return {
    name,
    kind: "peer library",
    bits: undefined,
    groupSize: undefined,
    needsInputs: importance,
    prepare() {
      if (isCodebook(format)) ggml.prepare(format);
    },
    quantize(weights, rows, cols, given) {
      const inputs = importance ? neededInputs(name, given) : undefined;
      checkLayer(name, weights, rows, cols, inputs);
      const block = blockOf(format);
      if (!acrossRows && cols % block !== 0) {
        return { unsupported: `columns must be a multiple of ${block}, got ${cols}` };
      }
      checkMagnitude(name, weights);
      if (isCodebook(format)) ggml.prepare(format);
      const [blockRows, blockCols] = acrossRows
        ? [1, Math.ceil(weights.length / block) * block]
        : [rows, cols];
      const values = new Float32Array(blockRows * blockCols);
      values.set(weights);
      const columns = inputs && importanceOf(inputs);
      const tiled = columns && Float32Array.from({ length: blockCols }, (_, i) => columns[i % cols]!);
      const packed = new Uint8Array(values.length * 2);
      const storedBytes = ggml.quantize(format, values, packed, blockRows, blockCols, tiled);
      const restored = new Float32Array(values.length);
      ggml.dequantizeRow(format, packed, restored, restored.length);
      checkRestored(name, restored, cols);
      return { weights: restored.slice(0, weights.length), storedBytes };
    },
  };
}

export function importanceOf({ cols, secondMoment }: LayerInputs): Float32Array {
  const diagonal = Float64Array.from({ length: cols }, (_, i) => Math.max(0, secondMoment[i * cols + i]!));
  const mean = diagonal.reduce((sum, value) => sum + value, 0) / cols;
  return mean === 0
    ? new Float32Array(cols).fill(1)
    : Float32Array.from(diagonal, (value) => Math.max(value, MIN_IMPORTANCE * mean));
}

/** ggml may end the process on weights that it cannot scale, so those are refused here. */
function checkMagnitude(name: string, weights: Float32Array): void {
  const bad = weights.find((value) => Math.abs(value) > MAX_MAGNITUDE);
  if (bad === undefined) return;
  const doing = `Cannot quantize a matrix by ${JSON.stringify(name)}`;
  throw new WeightsError(`${doing}: weights must be at most ${MAX_MAGNITUDE}, got ${bad}`);
}
