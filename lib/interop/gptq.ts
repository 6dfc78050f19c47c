/**
 * GPTQ's entries, in two forms: GPTQ v2, and AutoRound's, which diffusers loads. Codes and zero points are
 * the packed layout's bit streams transposed: along inputs a column an output, and along outputs.
 */
import { packCodes } from "../quant/codes.ts";
import { groupCount, type PackedLayer, type PackedTensor } from "../quant/mod.ts";
import { halves } from "../quant/packed/layout.ts";
import { concerns } from "../plan/rules.ts";
import type { ExportFormat, ExportRow, ExportSource } from "./format.ts";
import {
  gridText,
  moduleOf,
  type NotStored,
  packedFolder,
  type PackedRow,
  type StoredLayer,
} from "./packed_folder.ts";

/** Rows and columns are packed in runs of so many codes. */
const RUN = 32;

/**
 * @param less what is taken from every zero point before it is stored
 * @param hasOrder whether the group of each column is stored
 */
const storeWith = (
  less: (layer: PackedLayer) => number,
  hasOrder: boolean,
) =>
(layer: PackedLayer): StoredLayer | NotStored => {
  const { name, rows, cols, bits, groupSize, zeroPointKind, scaleBits } = layer, module = moduleOf(name);
  if (concerns("embedding_bits", name)) return { noPlace: "its readers have linear layers alone" };
  if (scaleBits !== undefined || zeroPointKind === "real") {
    return { otherGrid: `${gridText(layer)}: zero points must be symmetric or integer` };
  }
  const width = groupSize === 0 ? cols : groupSize;
  if (rows % RUN !== 0 || cols % RUN !== 0 || cols % width !== 0) {
    return {
      noPlace: `rows and columns must be multiples of ${RUN} and of the group, got ${rows} x ${cols}`,
    };
  }
  const groups = cols / width;
  return {
    type: `${bits} bits`,
    specs: [
      { name: `${module}.qweight`, dtype: "I32", shape: [cols * bits / 32, rows] },
      { name: `${module}.qzeros`, dtype: "I32", shape: [groups, rows * bits / 32] },
      { name: `${module}.scales`, dtype: "F16", shape: [groups, rows] },
      ...(hasOrder ? [{ name: `${module}.g_idx`, dtype: "I32", shape: [cols] } as const] : []),
    ],
    encode: (part, source) => encode(part, source, less(layer)),
    constants: !hasOrder ? [] : [Int32Array.from({ length: cols }, (_, i) => Math.floor(i / width))],
    isWhole: true,
  };
};

type Words = Uint32Array<ArrayBuffer> | Uint16Array<ArrayBuffer>;

/** `[rows, width]` as `[width, rows]`. */
function transposed<Array extends Words>(array: Array, rows: number): Array {
  const width = array.length / rows, result = array.slice() as Array;
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < width; i++) result[i * rows + row] = array[row * width + i]!;
  }
  return result;
}

function encode(part: PackedTensor, { kernels }: ExportSource, less: number) {
  if (part.scaleBits !== undefined) throw new TypeError("two-level scales have no such entries");
  const { packed, scale, zeroPoint, rows, cols, bits, groupSize } = part,
    groups = groupCount(cols, groupSize);
  const middle = 2 ** (bits - 1), zeros = zeroPoint && transposed(zeroPoint, rows);
  const codes = zeros === undefined
    ? new Uint8Array(rows * groups).fill(middle - less)
    : Uint8Array.from(halves(zeros), (zero) => zero - less);
  return [transposed(packed, rows), packCodes(kernels, codes, groups, rows, bits), transposed(scale, rows)];
}

/** Bits and groups, as config.json names them. */
const settings = ({ layer: { bits, groupSize } }: PackedRow) => ({
  bits,
  group_size: groupSize === 0 ? -1 : groupSize,
});

/** The scheme of most layers, and the layers of others. */
function schemes(
  packed: readonly PackedRow[],
): { readonly most: PackedRow; readonly others: readonly PackedRow[] } {
  const groups = [...Map.groupBy(packed, (row) => JSON.stringify(settings(row))).values()];
  const most = groups.toSorted((a, b) => b.length - a.length)[0]!;
  return { most: most[0]!, others: packed.filter((row) => !most.includes(row)) };
}

const isSymmetric = (packed: readonly PackedRow[]) =>
  packed.every(({ layer: { zeroPointKind } }) => zeroPointKind === "symmetric");
const escaped = (text: string) => text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");
const linear = (kept: readonly ExportRow[]) =>
  kept.filter(({ name, tensor: { shape } }) => shape.length === 2 && name.endsWith(".weight"));

export const GPTQ: ExportFormat = packedFolder({
  name: "gptq",
  openedBy: "GPTQModel and what reads checkpoint_format gptq_v2",
  runs: "language",
  store: storeWith(() => 0, true),
  config(packed, kept) {
    if (packed.length === 0) return {};
    const { most, others } = schemes(packed);
    const own = others.map((row) => [`+:^${escaped(moduleOf(row.tensor.name))}$`, settings(row)]);
    const plain = linear(kept).map(({ name }) => [`-:^${escaped(moduleOf(name))}$`, {}]);
    return {
      quantization_config: {
        quant_method: "gptq",
        ...settings(most),
        sym: isSymmetric(packed),
        desc_act: false,
        checkpoint_format: "gptq_v2",
        pack_dtype: "int32",
        lm_head: packed.some(({ tensor: { name } }) => concerns("head_bits", name)),
        dynamic: Object.fromEntries([...own, ...plain]),
      },
    };
  },
});

export const AUTO_ROUND: ExportFormat = packedFolder({
  name: "auto-round",
  openedBy: "AutoRound, transformers and diffusers",
  // Its readers of symmetric zero points add 1, as those of the first GPTQ form did.
  store: storeWith(({ zeroPointKind }) => zeroPointKind === "symmetric" ? 1 : 0, false),
  config(packed, kept) {
    if (packed.length === 0) return {};
    const { most, others } = schemes(packed), sym = isSymmetric(packed);
    const blocks = new Set(packed.flatMap(({ tensor: { name } }) => /^(.+?)\.\d+\./.exec(name)?.[1] ?? []));
    const common = { data_type: "int", sym };
    const own = others.map((row) => [moduleOf(row.tensor.name), { ...common, ...settings(row) }]);
    const outside = packed.filter(({ tensor: { name } }) => !/\.\d+\./.test(name));
    const plain = linear(kept).map(({ name }) => [moduleOf(name), { bits: 16, data_type: "float" }]);
    return {
      quantization_config: {
        quant_method: "auto-round",
        packing_format: sym ? "auto_round:auto_gptq" : "auto_round",
        ...{ ...common, ...settings(most) },
        block_name_to_quantize: [...blocks].join(","),
        extra_config: Object.fromEntries([
          ...outside.map((row) => [moduleOf(row.tensor.name), { ...common, ...settings(row) }]),
          ...own,
          ...plain,
        ]),
      },
    };
  },
});
