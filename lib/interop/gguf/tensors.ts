/** Tensors of a GGUF file: which type holds each exactly, and its bytes in chunks of rows. */
import { rowsPerChunk } from "../../pipeline/quantize_tensor.ts";
import { convertFloats, dequantize, type PackedLayer, type PackedTensor } from "../../quant/mod.ts";
import { readPackedTensor, rowsAtOnce } from "../../quant/packed/checkpoint.ts";
import { mapLevels } from "../../quant/packed/layout.ts";
import { BYTES_PER_ELEMENT, elementCount, type FloatDtype, isFloatDtype } from "../../tensor/mod.ts";
import {
  cannotHold,
  type ExportChoices,
  type ExportRow,
  type ExportSource,
  type ExportTensor,
  type Piece,
} from "../format.ts";
import { gridText } from "../packed_folder.ts";
import { encodeBlocks, isBlockType } from "./blocks.ts";
import { MAX_GGUF_NAME } from "./container.ts";
import { GGML_TYPES, type GgmlType, isGgmlType, rowBytes } from "./types.ts";

/** Another order of rows inside blocks: row `i` of a block in the file is the source's row `order(i)`. */
export interface RowOrder {
  readonly block: number;
  readonly order: (row: number) => number;
}

/** A tensor of the file: one of the model's, or several whose rows follow one another. */
export interface GgufEntry {
  /** Name in the file. */
  readonly name: string;
  readonly sources: readonly ExportTensor[];
  /** Shape in the file, rows first; default the sources' own. */
  readonly shape?: readonly number[] | undefined;
  readonly rowOrder?: RowOrder | undefined;
  /** Type of plain values, where readers expect one; those of one dimension are F32. */
  readonly plain?: "F32" | "F16" | "BF16" | undefined;
}

/** A row of an export with its entry. */
export interface GgufRow extends ExportRow {
  readonly entry: GgufEntry;
  readonly type: GgmlType;
  readonly shape: readonly number[];
}

/** A type that can hold something, and what becomes of the values. */
type Held = { readonly type: GgmlType } & Pick<ExportRow, "fallback" | "rounding">;

type PlainType = "F32" | "F16" | "BF16";
const isPlainType = (type: GgmlType): type is PlainType => ["F32", "F16", "BF16"].includes(type);

/** Types that hold plain values of each type exactly, its own first. */
const PLAIN: Readonly<Record<FloatDtype, readonly PlainType[]>> = {
  F64: [],
  F32: ["F32"],
  F16: ["F16", "F32"],
  BF16: ["BF16", "F32"],
  F8_E4M3: ["F16", "BF16", "F32"],
  F8_E5M2: ["F16", "BF16", "F32"],
};

/** Types with block scales that hold a layer's grid exactly, the smallest first; or why there is none. */
function gridTypes(layer: PackedLayer): { readonly types: readonly GgmlType[]; readonly reason: string } {
  const { bits, groupSize, scaleBits, zeroPointKind, cols, codes } = layer, types: GgmlType[] = [];
  const add = (type: GgmlType, fits: boolean) => {
    const { block } = GGML_TYPES[type], shared = scaleBits === undefined || scaleBits === 16 ? block : 16;
    if (fits && cols % block === 0 && groupSize % shared === 0) types.push(type);
  };
  if (codes !== undefined) {
    // no type has them
  } else if (scaleBits === 16) add("Q4_1", bits <= 4);
  else if (scaleBits !== undefined) {
    add("Q2_K", bits === 2 && scaleBits === 4);
    add("Q3_K", bits === 3 && scaleBits === 8);
    add("Q6_K", bits === 8 && scaleBits === 8);
    add("Q4_K", bits <= 4 && scaleBits < 8 && groupSize % 32 === 0);
  } else if (zeroPointKind === "symmetric") {
    add("Q2_0", bits === 2);
    add("Q4_0", bits <= 4);
    add("Q8_0", bits === 8);
  }
  return { types, reason: `no type of ggml has a grid of ${gridText(layer)} over rows of ${cols}` };
}

/** The smallest size of a type for such a layer, for the note that a larger one was taken. */
const IDEAL: Readonly<Record<number, readonly GgmlType[]>> = {
  2: ["Q2_K", "Q2_0"],
  3: ["Q3_K"],
  4: ["Q4_K", "Q4_0", "Q4_1"],
  8: ["Q8_0", "Q6_K"],
};

function holdLayer(layer: PackedLayer, asked: GgmlType | undefined): Held | string {
  const { types, reason } = gridTypes(layer), [first] = types;
  if (asked !== undefined) {
    if (types.includes(asked) || asked === "F32") return { type: asked };
    if (isPlainType(asked)) return { type: asked, rounding: `${asked} is asked for` };
    return `it must be one of ${[...types, "F32"].join(", ")}, which hold it exactly, got ${asked}`;
  }
  if (first !== undefined) {
    if (IDEAL[layer.bits]!.includes(first)) return { type: first };
    return {
      type: first,
      fallback: `the smallest type that holds a grid of ${layer.bits} bits with these groups`,
    };
  }
  const { scaleBits, bits, groupSize, cols } = layer;
  const isAffine = scaleBits === undefined && bits <= 4 && cols % 32 === 0 && groupSize % 32 === 0;
  if (isAffine) {
    return { type: "Q4_1", rounding: `${reason}: Q4_1 rounds −scale · zero point to half precision` };
  }
  return { type: "F16", rounding: `${reason}: F16 rounds the weights` };
}

function holdPlain(
  { dtype, shape }: ExportTensor,
  plain: PlainType | undefined,
  asked: GgmlType | undefined,
): Held | string {
  if (!isFloatDtype(dtype)) return `it must be a floating-point tensor, got ${dtype}`;
  const exact = PLAIN[dtype], type = asked ?? plain ?? (shape.length < 2 ? "F32" : exact[0] ?? "F32");
  if (!isPlainType(type)) return `plain weights must be F32, F16 or BF16, got ${type}: quantize them first`;
  return exact.includes(type) ? { type } : { type, rounding: `${dtype} is rounded to ${type}` };
}

/**
 * The type of each entry: what is asked for, or the smallest that holds it exactly.
 *
 * @throws {CheckpointError} when a name is too long or an asked type cannot hold a tensor at all
 */
export function ggufRow(
  source: ExportSource,
  entry: GgufEntry,
  { types }: ExportChoices,
  maxName = MAX_GGUF_NAME,
): GgufRow {
  const { name, sources: [first, ...more] } = entry, tensor = first!;
  const fail = (reason: string) => cannotHold(source, "gguf", reason, tensor.name);
  if (name.length > maxName) {
    throw fail(`names must have at most ${maxName} characters, got "${name}"`);
  }
  const asked = types.find(({ pattern }) => pattern.test(tensor.name))?.type;
  if (asked !== undefined && !isGgmlType(asked)) {
    throw fail(`a type must be one of ${Object.keys(GGML_TYPES).join(", ")}, got "${asked}"`);
  }
  const isVector = tensor.shape.length < 2;
  const held = entry.sources.map((each) =>
    each.layer === undefined
      ? holdPlain(each, entry.plain, isVector ? undefined : asked)
      : holdLayer(each.layer, asked)
  );
  const [own] = held;
  if (typeof own === "string") throw fail(own);
  const other = held.find((each) => typeof each === "string" || each.type !== own!.type);
  if (other !== undefined) throw fail(`its parts must have one type, got ${own!.type} beside others`);
  const rows = entry.sources.reduce((sum, { shape }) => sum + (shape[0] ?? 1), 0);
  const shape = entry.shape ??
    [...(more.length === 0 ? tensor.shape.slice(0, 1) : [rows]), ...tensor.shape.slice(1)];
  const cols = shape.at(-1) ?? 1, { type } = own!;
  const bytes = (elementCount(shape) ?? 0) / cols * rowBytes(type, cols);
  return { ...own!, tensor, entry, name, shape, bytes };
}

/** Bytes of a row's tensor, in chunks of rows. */
export function* ggufPieces(
  { checkpoint, kernels }: ExportSource,
  { entry, name, type }: GgufRow,
): Generator<Piece> {
  for (const { name: from, dtype, shape, layer } of entry.sources) {
    const rows = layer === undefined ? shape[0] ?? 1 : layer.rows;
    const elements = elementCount(shape) ?? 0, cols = Math.max(1, elements / Math.max(1, rows));
    const { block, order } = entry.rowOrder ?? { block: 1, order: undefined };
    const chunk = Math.max(1, Math.floor(rowsPerChunk(cols, 4) / block)) * block;
    const step = layer === undefined ? chunk : rowsAtOnce(layer, chunk);
    for (let begin = 0; begin < rows; begin += step) {
      const end = Math.min(rows, begin + step), weights = (end - begin) * cols;
      let bytes: ArrayBufferView<ArrayBuffer>;
      if (layer !== undefined) {
        const part = readPackedTensor(checkpoint, layer, begin, end);
        if (isBlockType(type)) {
          const ordered = order === undefined ? part : reordered(part, block, order);
          bytes = encodeBlocks(kernels, ordered, type);
        } else {
          const values = dequantize(kernels, part, type as PlainType);
          bytes = order === undefined ? values : reorderRows(values, end - begin, block, order);
        }
      } else {
        const width = cols * BYTES_PER_ELEMENT[dtype];
        const stored = checkpoint.read(from, begin * width, end * width);
        const data = order === undefined ? stored : reorderRows(stored, end - begin, block, order);
        bytes = dtype === type
          ? data
          : convertFloats(kernels, { data, dtype: dtype as FloatDtype }, weights, type as PlainType);
      }
      yield { entry: name, bytes, weights };
    }
  }
}

type Words =
  | Float32Array<ArrayBuffer>
  | Uint32Array<ArrayBuffer>
  | Uint16Array<ArrayBuffer>
  | Uint8Array<ArrayBuffer>;

/** Rows of an array in another order. */
function reorderRows<Array extends Words>(
  array: Array,
  rows: number,
  block: number,
  order: RowOrder["order"],
): Array {
  const width = array.length / rows, result = array.slice() as Array;
  for (let row = 0; row < rows; row++) {
    const from = row - row % block + order(row % block);
    result.set(array.subarray(from * width, (from + 1) * width), row * width);
  }
  return result;
}

/** Rows of a packed matrix in another order: codes and scales move with them. */
function reordered(tensor: PackedTensor, block: number, order: RowOrder["order"]): PackedTensor {
  const move = <Array extends Words>(array: Array) => reorderRows(array, tensor.rows, block, order);
  const packed = move(tensor.packed);
  if (tensor.scaleBits !== undefined) return { ...mapLevels(tensor, move), packed };
  const { scale, zeroPoint } = tensor;
  return {
    ...tensor,
    packed,
    scale: move(scale),
    zeroPoint: zeroPoint === undefined ? undefined : move(zeroPoint),
  };
}
