/**
 * Packed weights of MLX (affine) and of compressed-tensors (`pack-quantized`), read as the float32 values
 * that their own readers make of them. Both store codes as a stream of bits along each row, least significant
 * bits first.
 */
import { isJsonObject } from "../files/json.ts";
import { quote } from "../files/positional.ts";
import { valuesOf } from "./scaled_fp8.ts";
import type { PlacedTensor } from "./scaled_fp8.ts";
import { elementCount, type TensorFile, type TensorInfo } from "./safetensors.ts";

/** A packed matrix, or several of them behind one another. */
interface PackedCodes {
  readonly codes: PlacedTensor;
  readonly scale: PlacedTensor;
  /** Added to every product: MLX. */
  readonly offset: PlacedTensor | undefined;
  /** Subtracted from every code, a stream of bits down each column of groups; undefined: symmetric. */
  readonly zeroPoint: PlacedTensor | undefined;
  readonly bits: number;
  readonly rows: number;
  readonly cols: number;
  /** Weights of a row that share a scale. */
  readonly width: number;
  readonly info: TensorInfo;
}

/** The packed tensors of a checkpoint by their weights' names, and the entries that vanish with them. */
export interface PackedTensors {
  readonly tensors: ReadonlyMap<string, PackedCodes>;
  readonly hidden: ReadonlySet<string>;
  /** Why some cannot be read, undefined where all can. */
  readonly fault: string | undefined;
}

type All = ReadonlyMap<string, PlacedTensor>;

const SCALE_DTYPES = ["F32", "F16", "BF16"];
const MLX_BITS = [2, 3, 4, 5, 6, 8];
const isScale = (tensor: PlacedTensor | undefined) => SCALE_DTYPES.includes(tensor?.info.dtype ?? "");
const product = (shape: readonly number[]) => elementCount(shape) ?? 0;

/** Finds packed tensors and checks that their shapes fit config.json; reads none but stored shapes. */
export function packedCodes(
  all: All,
  config: Readonly<Record<string, unknown>> | undefined,
): PackedTensors {
  const { quantization, quantization_config: packing } = config ?? {};
  const tensors = new Map<string, PackedCodes>(), hidden = new Set<string>(), faults: string[] = [];
  const add = (name: string, found: PackedCodes | string, parts: readonly string[]) => {
    if (typeof found === "string") return faults.push(`${quote(name)} ${found}`);
    tensors.set(name, found);
    for (const part of parts) hidden.add(part);
  };
  if (isJsonObject(quantization)) {
    for (const [name, codes] of all) {
      const [, module] = /^(.*)\.weight$/.exec(name) ?? [];
      if (module === undefined || !all.has(`${module}.scales`)) continue;
      add(name, affine(codes, module, all, quantization), [`${module}.scales`, `${module}.biases`]);
    }
  }
  if (isJsonObject(packing) && packing["format"] === "pack-quantized") {
    for (const [name, codes] of all) {
      const [, weight] = /^(.*weight)_packed$/.exec(name) ?? [];
      if (weight === undefined) continue;
      const parts = ["packed", "scale", "zero_point", "shape", "g_idx"].map((part) => `${weight}_${part}`);
      add(weight, packQuantized(codes, weight, all, packing), parts);
    }
  }
  const more = faults.length > 1 ? ` (and ${faults.length - 1} more)` : "";
  return { tensors, hidden, fault: faults.length === 0 ? undefined : faults[0] + more };
}

/** What a tensor of such codes reads as. */
function viewOf(
  name: string,
  type: string,
  parts: Omit<PackedCodes, "info">,
  shape: readonly number[],
  size?: PlacedTensor,
): PackedCodes {
  const all = [parts.codes, parts.scale, parts.offset, parts.zeroPoint, size];
  const bytes = all.reduce((sum, part) => sum + (part?.info.byteLength ?? 0), 0), elements = product(shape);
  const { byteOffset } = parts.codes.info;
  const stored = { type: `${type}, ${parts.bits} bits in groups of ${parts.width}`, bytes };
  return {
    ...parts,
    info: { name, dtype: "F32", shape, byteOffset, byteLength: elements * 4, elements, stored },
  };
}

/** A layer of MLX, or why it cannot be read. */
function affine(
  codes: PlacedTensor,
  module: string,
  all: All,
  quantization: Readonly<Record<string, unknown>>,
): PackedCodes | string {
  const own = quantization[module], how = { ...quantization, ...isJsonObject(own) ? own : {} };
  const { mode = "affine", group_size: width, bits } = how;
  const scale = all.get(`${module}.scales`)!,
    offset = all.get(`${module}.biases`),
    { shape, dtype } = codes.info;
  if (mode !== "affine") return `in MLX's mode ${String(mode)}`;
  if (!isScale(scale) || !isScale(offset) || dtype !== "U32" || shape.length < 2) {
    return "without MLX's affine scales";
  }
  const groups = scale.info.shape.at(-1)!, cols = groups * Number(width), rows = product(shape.slice(0, -1));
  const isWhole = MLX_BITS.includes(Number(bits)) && Number.isSafeInteger(cols) && cols > 0 && cols < 2 ** 31;
  const sizes = [scale, offset!].every(({ info }) => product(info.shape) === rows * groups);
  if (!isWhole || !sizes || shape.at(-1)! * 32 !== cols * Number(bits)) {
    return `of ${dtype} [${shape}], which is not what ${String(bits)} bits in groups of ${
      String(width)
    } take`;
  }
  const parts = {
    codes,
    scale,
    offset,
    zeroPoint: undefined,
    bits: Number(bits),
    rows,
    cols,
    width: Number(width),
  };
  return viewOf(`${module}.weight`, "MLX", parts, [...shape.slice(0, -1), cols]);
}

/** A layer of compressed-tensors, or why it cannot be read. */
function packQuantized(
  codes: PlacedTensor,
  weight: string,
  all: All,
  packing: Readonly<Record<string, unknown>>,
): PackedCodes | string {
  const { shape, dtype } = codes.info, scale = all.get(`${weight}_scale`), size = all.get(`${weight}_shape`);
  const zeroPoint = all.get(`${weight}_zero_point`);
  if (all.has(`${weight}_g_idx`)) return "whose columns are in the order of activations";
  if (!isScale(scale) || dtype !== "I32" || shape.length !== 2) return "without scales of a floating type";
  if (size?.info.dtype !== "I64" || product(size.info.shape) !== 2) return "without its shape";
  const [rows, cols] = [...new BigInt64Array(size.file.read(size.info.name).buffer)].map(Number) as [
    number,
    number,
  ];
  const groups = scale!.info.shape.at(-1)!;
  const fits = [rows, cols].every((n) => Number.isSafeInteger(n) && n > 0 && n < 2 ** 31) &&
    scale!.info.shape.length === 2 && scale!.info.shape[0] === rows && shape[0] === rows;
  const schemes = isJsonObject(packing["config_groups"]) ? Object.values(packing["config_groups"]) : [];
  const found = schemes.flatMap((scheme) => {
    const weights = isJsonObject(scheme) ? scheme["weights"] : undefined;
    if (!isJsonObject(weights) || weights["type"] !== "int") return [];
    const bits = Number(weights["num_bits"]), width = Number(weights["group_size"] ?? cols);
    const takes = [2, 3, 4, 5, 6, 7, 8].includes(bits) && Math.ceil(cols * bits / 32) === shape[1];
    const own = width > 0 ? width : cols;
    const zeros = [Math.ceil(rows * bits / 32), groups], stored = zeroPoint?.info;
    const isZero = stored === undefined || stored.dtype === "I32" && String(stored.shape) === String(zeros);
    return takes && isZero && Math.ceil(cols / own) === groups ? [{ bits, width: Math.min(own, cols) }] : [];
  });
  if (!fits || found.length === 0) {
    return `of ${dtype} [${shape}], which is what no group of config.json takes`;
  }
  const parts = { codes, scale: scale!, offset: undefined, zeroPoint, ...found[0]!, rows, cols };
  return viewOf(weight, "compressed-tensors", parts, [rows, cols], size);
}

/** A file whose packed tensors read as their values, without the entries that vanish. */
export function unpackedFile(file: TensorFile, { tensors: packed, hidden }: PackedTensors): TensorFile {
  const { path, fileBytes, dataOffset, metadata } = file;
  const byCodes = new Map([...packed.values()].map((own) => [own.codes.info.name, own.info]));
  const tensors = new Map(
    [...file.tensors.values()].flatMap((info): [string, TensorInfo][] => {
      const own = byCodes.get(info.name);
      if (own !== undefined) return [[own.name, own]];
      return hidden.has(info.name) ? [] : [[info.name, info]];
    }),
  );
  let zeros: { readonly of: PackedCodes; readonly codes: Uint8Array } | undefined; // read last
  const readInto = (name: string, byteStart: number, target: Uint8Array) => {
    const own = packed.get(name);
    if (own === undefined) return file.readInto(name, byteStart, target);
    if (own.zeroPoint !== undefined && zeros?.of !== own) zeros = { of: own, codes: zeroCodes(own) };
    const begin = Math.floor(byteStart / 4 / own.cols),
      end = Math.ceil((byteStart + target.length) / 4 / own.cols);
    const values = valuesOfRows(own, begin, end, own.zeroPoint && zeros!.codes);
    target.set(new Uint8Array(values.buffer, byteStart - begin * own.cols * 4, target.length));
  };
  const read = (name: string, byteStart = 0, byteEnd?: number) => {
    if (!packed.has(name)) return file.read(name, byteStart, byteEnd);
    const target = new Uint8Array((byteEnd ?? tensors.get(name)!.byteLength) - byteStart);
    readInto(name, byteStart, target);
    return target;
  };
  return { path, fileBytes, dataOffset, metadata, tensors, readInto, read, close: () => file.close() };
}

/** Code `index` of a stream of bits whose words lie `stride` apart, from word `start` on. */
function codeAt(words: Uint32Array, start: number, stride: number, index: number, bits: number): number {
  const bit = index * bits, shift = bit % 32, at = start + (bit - shift) / 32 * stride;
  let code = words[at]! >>> shift;
  if (shift + bits > 32) code |= words[at + stride]! << (32 - shift);
  return code & (2 ** bits - 1);
}

/** Zero points of every row's groups. */
function zeroCodes({ zeroPoint, rows, scale, bits }: PackedCodes): Uint8Array {
  const words = new Uint32Array(zeroPoint!.file.read(zeroPoint!.info.name).buffer),
    groups = scale.info.shape.at(-1)!;
  return Uint8Array.from({ length: rows * groups }, (_, i) => {
    return codeAt(words, i % groups, groups, Math.floor(i / groups), bits);
  });
}

/** Values of rows `[begin, end)`. */
function valuesOfRows(
  own: PackedCodes,
  begin: number,
  end: number,
  zeros: Uint8Array | undefined,
): Float32Array<ArrayBuffer> {
  const { codes, scale, offset, bits, cols, width } = own, groups = scale.info.shape.at(-1)!;
  const wordsOfRow = codes.info.shape.at(-1)!, count = end - begin, out = new Float32Array(count * cols);
  const { name } = codes.info;
  const words = new Uint32Array(codes.file.read(name, begin * wordsOfRow * 4, end * wordsOfRow * 4).buffer);
  const scales = valuesOf(scale, begin * groups, end * groups);
  const offsets = offset && valuesOf(offset, begin * groups, end * groups);
  for (let row = 0, i = 0; row < count; row++) {
    for (let col = 0; col < cols; col++, i++) {
      const code = codeAt(words, row * wordsOfRow, 1, col, bits),
        group = row * groups + Math.floor(col / width);
      // A product of a half float and a code is exact in float32; others are rounded, as their readers do.
      if (offsets !== undefined) out[i] = Math.fround(scales[group]! * code) + offsets[group]!;
      else out[i] = scales[group]! * (code - (zeros?.[begin * groups + group] ?? 2 ** (bits - 1)));
    }
  }
  return out;
}
