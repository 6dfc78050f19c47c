/** ComfyUI's own quantized layers: `comfy_quant` says how each is stored. */
import { WeightsError } from "../errors.ts";
import { quote } from "../files/positional.ts";
import { groupAffine, type PackedLayer, type PackedTensor } from "../quant/mod.ts";
import { unpackCodes } from "../quant/codes.ts";
import { isFloatDtype, type TensorSpec } from "../tensor/mod.ts";
import { cannotHold, type ExportFormat, type ExportSource, type ExportTensor } from "./format.ts";
import {
  gridText,
  moduleOf,
  type NotStored,
  packedFolder,
  type QuantizedMatrix,
  type StoredLayer,
} from "./packed_folder.ts";

/** Inputs that share a scale and an offset in `awq_w4a16`. */
const AWQ_GROUP = 64;

function store(layer: PackedLayer): StoredLayer | NotStored {
  const { bits, groupSize, scaleBits, zeroPointKind, cols } = layer;
  if (bits === 8 && groupSize === 0 && scaleBits === undefined && zeroPointKind === "symmetric") {
    return int8(layer);
  }
  const isPlain = scaleBits === undefined || scaleBits === 16;
  if (
    bits === 4 && isPlain && (groupSize === 0 ? cols : groupSize) % AWQ_GROUP === 0 && cols % AWQ_GROUP === 0
  ) {
    return awq(layer);
  }
  return {
    otherGrid:
      `${gridText(layer)}, rows of ${cols}: ComfyUI has 8 bits with a symmetric scale a row, and 4 bits in ` +
      `groups of ${AWQ_GROUP}`,
  };
}

const marker = (value: unknown) => new TextEncoder().encode(JSON.stringify(value)) as Uint8Array<ArrayBuffer>;

/** Codes of 8 bits less 128, and a float32 scale a row. */
function int8({ name, rows, cols }: PackedLayer): StoredLayer {
  const module = moduleOf(name), text = marker({ format: "int8_tensorwise" });
  return {
    type: "int8_tensorwise",
    specs: int8Specs(name, rows, cols, module, text),
    encode: (part: PackedTensor, { kernels }: ExportSource) => [
      Int8Array.from(unpackCodes(kernels, part.packed, part.rows, cols, 8), (code) => code - 128),
      groupAffine(part).scale,
    ],
    constants: [text],
  };
}

/** Inputs that are rotated together in `convrot`. */
const ROTATED = 256;

/** Multiplies runs of {@linkcode ROTATED} weights by the power of ComfyUI's 4 x 4 Hadamard matrix. */
function rotate(weights: Float32Array): void {
  for (let stride = 1; stride < ROTATED; stride *= 4) {
    for (let start = 0; start < weights.length; start += 4 * stride) {
      for (let i = start; i < start + stride; i++) {
        const j = i + stride, k = j + stride, l = k + stride;
        const a = weights[i]!, b = weights[j]!, c = weights[k]!, d = weights[l]!;
        weights[i] = (a + b + c - d) / 2;
        weights[j] = (a + b - c + d) / 2;
        weights[k] = (a - b + c + d) / 2;
        weights[l] = (b + c + d - a) / 2;
      }
    }
  }
}

/** `INT8_CONVROT` of plain weights: rotated, then rounded to 8 bits with a scale a row. */
function convrot({ name, shape, dtype, layer }: ExportTensor, type: string): QuantizedMatrix | string {
  const [rows, cols] = shape as [number, number], module = moduleOf(name);
  if (type !== "INT8_CONVROT") {
    return "its types are INT8_CONVROT, F32, F16 and BF16; others are quantized for";
  }
  if (layer !== undefined || !isFloatDtype(dtype) || shape.length !== 2) return "it must be a plain matrix";
  if (cols % ROTATED !== 0) return `rows must be a multiple of ${ROTATED}, got ${cols}`;
  const text = marker({ format: "int8_tensorwise", convrot: true, convrot_groupsize: ROTATED });
  return {
    type: "int8_tensorwise, convrot",
    specs: int8Specs(name, rows, cols, module, text),
    quantize(weights) {
      if (!weights.every(Number.isFinite)) {
        throw new WeightsError(
          `Cannot quantize ${quote(name)}: weights must be finite, got NaN or infinity`,
          {
            tensor: name,
          },
        );
      }
      rotate(weights);
      const codes = new Int8Array(weights.length), scales = new Float32Array(weights.length / cols);
      for (let row = 0; row < scales.length; row++) {
        const own = weights.subarray(row * cols, (row + 1) * cols);
        const scale = scales[row] = Math.max(
          own.reduce((most, w) => Math.max(most, Math.abs(w)), 0) / 127,
          1e-30,
        );
        own.forEach((w, i) => codes[row * cols + i] = roundEven(w / scale));
      }
      return [codes, scales];
    },
    constants: [text],
  };
}

/** Nearest whole number, ties to even. */
function roundEven(x: number): number {
  const near = Math.round(x);
  return near - x === 0.5 && near % 2 !== 0 ? near - 1 : near;
}

const int8Specs = (
  name: string,
  rows: number,
  cols: number,
  module: string,
  text: Uint8Array,
): readonly TensorSpec[] => [
  { name, dtype: "I8", shape: [rows, cols] },
  { name: `${name}_scale`, dtype: "F32", shape: [rows, 1] },
  { name: `${module}.comfy_quant`, dtype: "U8", shape: [text.length] },
];

/** Two codes a byte, with float32 scales and values of code 8, an input group a row. */
function awq(layer: PackedLayer): StoredLayer {
  const { name, rows, cols } = layer, module = moduleOf(name), groups = cols / AWQ_GROUP;
  const text = marker({ format: "awq_w4a16", group_size: AWQ_GROUP });
  const isExact = layer.scaleBits === 16 || layer.zeroPointKind !== "real";
  return {
    type: "awq_w4a16",
    specs: [
      { name, dtype: "I8", shape: [rows, cols / 2] },
      { name: `${name}_scale`, dtype: "F32", shape: [groups, rows] },
      { name: `${name}_zero`, dtype: "F32", shape: [groups, rows] },
      { name: `${module}.comfy_quant`, dtype: "U8", shape: [text.length] },
    ],
    rounding: isExact ? undefined : `${gridText(layer)}: the value of code 8 is rounded to float32`,
    encode(part, source) {
      const { scale, offset } = groupAffine(part), own = scale.length / rows;
      const scales = new Float32Array(groups * rows), centers = new Float32Array(groups * rows);
      for (let group = 0; group < groups; group++) {
        for (let row = 0; row < rows; row++) {
          const from = row * own + Math.floor(group * own / groups), to = group * rows + row;
          scales[to] = scale[from]!;
          const center = 8 * scale[from]! + offset[from]!;
          centers[to] = center;
          if (isExact && centers[to] !== center) {
            throw cannotHold(source, "comfy", `the value of code 8 must be a float32, got ${center}`, name);
          }
        }
      }
      return [part.packed, scales, centers];
    },
    constants: [text],
    isWhole: true,
  };
}

export const COMFY: ExportFormat = packedFolder({
  name: "comfy",
  openedBy: "ComfyUI",
  runs: "image",
  store,
  quantize: convrot,
  config: () => ({}),
});
