/** ComfyUI's own quantized layers: `comfy_quant` says how each is stored. */
import { groupAffine, type PackedLayer, type PackedTensor } from "../quant/mod.ts";
import { unpackCodes } from "../quant/codes.ts";
import type { ExportFormat, ExportSource } from "./format.ts";
import { gridText, moduleOf, type NotStored, packedFolder, type StoredLayer } from "./packed_folder.ts";

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
    specs: [
      { name, dtype: "I8", shape: [rows, cols] },
      { name: `${name}_scale`, dtype: "F32", shape: [rows, 1] },
      { name: `${module}.comfy_quant`, dtype: "U8", shape: [text.length] },
    ],
    encode: (part: PackedTensor, { kernels }: ExportSource) => [
      Int8Array.from(unpackCodes(kernels, part.packed, part.rows, cols, 8), (code) => code - 128),
      groupAffine(part).scale,
    ],
    constants: [text],
  };
}

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
    encode(part) {
      const { scale, offset } = groupAffine(part), own = scale.length / rows;
      const scales = new Float32Array(groups * rows), centers = new Float32Array(groups * rows);
      for (let group = 0; group < groups; group++) {
        for (let row = 0; row < rows; row++) {
          const from = row * own + Math.floor(group * own / groups), to = group * rows + row;
          scales[to] = scale[from]!;
          centers[to] = 8 * scale[from]! + offset[from]!;
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
  store,
  config: () => ({}),
});
