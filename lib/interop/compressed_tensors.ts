/** compressed-tensors' `pack-quantized`, whose codes and zero points are ours byte for byte. */
import { packQuantizedConfig } from "../output/config_file.ts";
import { concerns } from "../plan/rules.ts";
import { groupCount, type PackedLayer, type PackedTensor } from "../quant/mod.ts";
import { halves } from "../quant/packed/layout.ts";
import { packedTensorSpecs, packZeroPoints } from "../quant/packed/entries.ts";
import type { ExportFormat, ExportRow } from "./format.ts";
import {
  gridText,
  moduleOf,
  type NotStored,
  packedFolder,
  type PackedRow,
  type StoredLayer,
} from "./packed_folder.ts";

function store(layer: PackedLayer): StoredLayer | NotStored {
  const { name, rows, cols, bits, groupSize, zeroPointKind: zeroPoint, scaleBits } = layer;
  if (concerns("embedding_bits", name)) return { noPlace: "its readers have linear layers alone" };
  if (scaleBits !== undefined || zeroPoint === "real") {
    return { otherGrid: `${gridText(layer)}: zero points must be symmetric or integer` };
  }
  if (groupSize !== 0 && cols % groupSize !== 0) {
    return { noPlace: `groups must divide a row, got ${groupSize} in rows of ${cols}` };
  }
  const [packed, scale, ...others] = packedTensorSpecs(name, { rows, cols, bits, groupSize, zeroPoint });
  const shape = new BigInt64Array([BigInt(rows), BigInt(cols)]);
  return {
    type: `pack-quantized, ${bits} bits`,
    // Its reader of zero points computes in the scales' type.
    specs: [packed!, zeroPoint === "integer" ? { ...scale!, dtype: "F32" } : scale!, ...others],
    encode: (part) => encodePacked(part),
    constants: [shape],
    isWhole: zeroPoint === "integer",
  };
}

function encodePacked(part: PackedTensor) {
  if (part.scaleBits !== undefined) throw new TypeError("two-level scales have no such entries");
  const { packed, scale, zeroPoint, zeroPointKind, rows, cols, bits, groupSize } = part;
  if (zeroPointKind !== "integer") return [packed, scale];
  const codes = Uint8Array.from(halves(zeroPoint!));
  return [
    packed,
    Float32Array.from(halves(scale)),
    packZeroPoints(codes, rows, groupCount(cols, groupSize), bits),
  ];
}

function config(packed: readonly PackedRow[], kept: readonly ExportRow[]): Record<string, unknown> {
  if (packed.length === 0) return {};
  const isSymmetric = ({ layer: { zeroPointKind } }: PackedRow) => zeroPointKind === "symmetric";
  const ignore = kept.filter(({ name, tensor: { shape } }) => shape.length === 2 && name.endsWith(".weight"));
  const layers = packed.map(({ layer }) => layer);
  const names = ignore.map(({ name }) => moduleOf(name));
  return { quantization_config: packQuantizedConfig(layers, isSymmetric(packed[0]!), names) };
}

export const COMPRESSED_TENSORS: ExportFormat = packedFolder({
  name: "compressed-tensors",
  openedBy: "transformers, and vLLM where it has the model",
  runs: "language",
  store,
  config,
  notes: (packed) =>
    packed.some(({ layer: { zeroPointKind } }) => zeroPointKind === "integer")
      ? [
        "transformers reads integer zero points with CompressedTensorsConfig(dequantize=True) alone, and then one " +
        "number of bits and group size in the whole model; symmetric ones have no such limits",
      ]
      : [],
});
