/** MLX: affine codes, `w = scale · code + bias` with both numbers in half precision. */
import { groupAffine, type PackedLayer, type PackedTensor } from "../quant/mod.ts";
import { halfBits, halves } from "../quant/packed/layout.ts";
import { cannotHold, type ExportFormat, type ExportSource } from "./format.ts";
import { gridText, moduleOf, packedFolder, type PackedRow, type StoredLayer } from "./packed_folder.ts";

const GROUP_SIZES: readonly number[] = [32, 64, 128];

function store(layer: PackedLayer): StoredLayer | { readonly otherGrid: string } {
  const { name, rows, cols, bits, groupSize, scaleBits, zeroPointKind, codes } = layer,
    module = moduleOf(name);
  if (!GROUP_SIZES.includes(groupSize) || cols % groupSize !== 0) {
    return {
      otherGrid: `MLX has groups of 32, 64 or 128 that divide a row, got ${groupSize} in rows of ${cols}`,
    };
  }
  if (codes !== undefined) return { otherGrid: `${gridText(layer)}: MLX has none` };
  // A symmetric grid's offset is a power of two times its scale.
  const isExact = scaleBits === 16 || (scaleBits === undefined && zeroPointKind === "symmetric");
  const groups = [rows, cols / groupSize];
  return {
    type: `affine, ${bits} bits`,
    specs: [
      { name, dtype: "U32", shape: [rows, cols * bits / 32] },
      { name: `${module}.scales`, dtype: "F16", shape: groups },
      { name: `${module}.biases`, dtype: "F16", shape: groups },
    ],
    rounding: isExact ? undefined : `${gridText(layer)}: MLX rounds scales and offsets to half precision`,
    encode: (part, source) => encodeAffine(part, isExact ? source : undefined, name),
  };
}

/** Codes, scales and offsets of some rows. @param exact refuses offsets that half precision rounds */
function encodeAffine(part: PackedTensor, exact: ExportSource | undefined, name: string) {
  const { scale, offset } = groupAffine(part), biases = halfBits(offset);
  const rounded = halves(biases).findIndex((bias, i) => bias !== offset[i]);
  if (exact !== undefined && rounded >= 0) {
    throw cannotHold(exact, "mlx", `an offset must be a half float, got ${offset[rounded]}`, name);
  }
  return [part.packed, halfBits(scale), biases];
}

/** Bits and groups of a layer, as config.json names them. */
const settings = ({ layer: { bits, groupSize } }: PackedRow) => ({ group_size: groupSize, bits });

function config(packed: readonly PackedRow[]): Record<string, unknown> {
  if (packed.length === 0) return {};
  const schemes = [...Map.groupBy(packed, (row) => JSON.stringify(settings(row))).values()];
  const most = schemes.toSorted((a, b) => b.length - a.length)[0]!;
  const others = packed.filter((row) => !most.includes(row));
  const quantization = {
    ...settings(most[0]!),
    mode: "affine",
    ...Object.fromEntries(others.map((row) => [moduleOf(row.tensor.name), settings(row)])),
  };
  return { quantization, quantization_config: quantization };
}

export const MLX: ExportFormat = packedFolder({
  name: "mlx",
  openedBy: "MLX, mlx-lm and mlx-vlm",
  store,
  config,
});
