/**
 * FP8 weights that have scales beside them, read as what their own readers make of them: weight · scale. The
 * scales are those of compressed-tensors, FBGEMM and ModelOpt (`weight_scale`), DeepSeek and transformers
 * (`weight_scale_inv`, which multiplies as well) and ComfyUI (`scale_weight`): one number, one a row, or one
 * a block.
 */
import type { TensorFile, TensorInfo } from "./safetensors.ts";
import { quote } from "../files/positional.ts";
import { fromBfloat16, toBfloat16 } from "./bfloat16.ts";
import { BYTES_PER_ELEMENT, type Dtype } from "./dtype.ts";

/** A tensor with its file. */
export interface PlacedTensor {
  readonly info: TensorInfo;
  readonly file: TensorFile;
}

/** An FP8 tensor with its scale. */
interface ScaledTensor {
  readonly codes: PlacedTensor;
  readonly scale: PlacedTensor;
  /** Elements that share a scale, by dimension. */
  readonly block: readonly number[];
  /** Type that it is read as. */
  readonly dtype: "F32" | "BF16";
}

/** The scaled FP8 tensors of a checkpoint, and the entries that vanish with them. */
export interface ScaledFp8 {
  readonly tensors: ReadonlyMap<string, ScaledTensor>;
  readonly hidden: ReadonlySet<string>;
  /** Why some cannot be read, undefined where all can. */
  readonly fault: string | undefined;
}

/** Types of scales. F8_E8M0 is an exponent alone. */
const SCALE_DTYPES: readonly Dtype[] = ["F32", "BF16", "F16", "F64", "F8_E8M0"];
/** Types of weights that need no scale. */
const PLAIN: readonly Dtype[] = ["F32", "F16", "BF16", "F64"];
/** Largest scale tensor: it is read whole, and has one element for 128 weights or more where it has many. */
const MAX_SCALES = 2 ** 24;
/** Entries beside a weight that say nothing about its values: scales of activations, and ComfyUI's label. */
const WITHOUT_EFFECT = "input_scale scale_input output_scale scale_output input_scale_ub comfy_quant".split(
  " ",
);
/** Names that tell of a scale, and those of scales that the weights themselves do not have. */
const SCALE_LIKE = /scal|max(?:$|_)|quant/i;
const OF_ACTIVATIONS = /(?:^|_)(?:in|out|input|output|act|activation|[kvq]|kv|prob)(?:_|$)|^comfy_quant$/;
/** Sizes of blocks where config.json gives none. */
const BLOCK_SIZES = [1, 128, 16, 32, 64, 256, 512, 1024];
/** Scales of keys and values in a cache of attention. */
const OF_CACHE = /\.(?:[kvq]|kv|prob)_scale$/;
const MARKER = /(?:^|\.)scaled_fp8$/;

const isFp8 = ({ info: { dtype } }: PlacedTensor) => dtype === "F8_E4M3" || dtype === "F8_E5M2";
const stemOf = (name: string) => name.replace(/\.?weight$/, "");
const beside = (name: string, part: string) => [stemOf(name), part].filter((text) => text !== "").join(".");
const scaleNames = (name: string) => [
  `${name}_scale`,
  `${name}_scale_inv`,
  ...(/(?:^|\.)weight$/.test(name) ? [beside(name, "scale_weight"), beside(name, "scale")] : []),
];

/**
 * Pairs FP8 tensors with their scales; reads none of them, except what ComfyUI's labels say.
 *
 * @param config the checkpoint's, which may give the size of blocks and the type of the weights
 * @param saysScaled whether something beside the tensors says that FP8 weights have scales
 */
export function scaledFp8(
  all: ReadonlyMap<string, PlacedTensor>,
  config: Readonly<Record<string, unknown>> | undefined,
  saysScaled: boolean,
): ScaledFp8 {
  const fp8 = [...all].filter(([name, tensor]) => isFp8(tensor) && !MARKER.test(name));
  const names = fp8.map(([name]) => name);
  const scales = new Set(names.flatMap(scaleNames).filter((name) => all.has(name)));
  const markers = [...all.keys()].filter((name) => MARKER.test(name));
  const tensors = new Map<string, ScaledTensor>(), faults: string[] = [], hidden = new Set(markers);
  const parts = markers.length > 0
    ? markers.map((name) => name.replace(MARKER, ""))
    : scales.size > 0
    ? [""]
    : [];
  const told = toldBy(config), unread = unreadScales(names, all);
  for (const [name, codes] of fp8) {
    const isScaled = saysScaled || parts.some((part) => name.startsWith(part)) || unread.has(name) ||
      scaleNames(name).some((scale) => all.has(scale));
    if (!isScaled || scales.has(name)) continue;
    const found = scaledTensor(name, codes, all, told, unread.get(name));
    if (typeof found === "string") {
      faults.push(found);
      continue;
    }
    tensors.set(name, found);
    hidden.add(found.scale.info.name);
    for (const part of WITHOUT_EFFECT) hidden.add(beside(name, part));
  }
  for (const [name, weight] of parts.length > 0 ? strayScales(all) : []) {
    const owner = all.get(weight), shown = quote(name);
    if (owner === undefined) faults.push(`${shown} without ${quote(weight)}`);
    else if (!PLAIN.includes(owner.info.dtype)) continue;
    else if (isOne(all.get(name)!)) hidden.add(name);
    else {faults.push(
        `${quote(weight)} in ${owner.info.dtype} with ${shown}, which may be in it already or not`,
      );}
  }
  if (tensors.size > 0 && saysScaled) {
    for (const [name, { info }] of all) if (info.elements === 1 && OF_CACHE.test(name)) hidden.add(name);
  }
  const more = faults.length > 1 ? ` (and ${faults.length - 1} more)` : "";
  return { tensors, hidden, fault: faults.length === 0 ? undefined : faults[0] + more };
}

/** Scales by their names alone, with the weights that they would be of. */
function strayScales(all: ReadonlyMap<string, PlacedTensor>): [scale: string, weight: string][] {
  return [...all.keys()].flatMap((name): [string, string][] => {
    const module = /^(.*\.)(?:scale_weight|weight_scale(?:_inv)?)$/.exec(name)?.[1];
    return module === undefined ? [] : [[name, `${module}weight`]];
  });
}

/** Whether a scale changes nothing. */
const isOne = (scale: PlacedTensor) =>
  SCALE_DTYPES.includes(scale.info.dtype) && scale.info.elements === 1 && valuesOf(scale)[0] === 1;

/** By FP8 tensor, an entry that its values depend on in a way that is not known here. */
function unreadScales(
  names: readonly string[],
  all: ReadonlyMap<string, PlacedTensor>,
): ReadonlyMap<string, string> {
  const found = new Map<string, string>(), owners = new Map(names.map((name) => [stemOf(name), name]));
  for (const name of names) owners.set(name, name);
  for (const other of names.length === 0 ? [] : all.keys()) {
    for (const { index } of other.matchAll(/[._]/g)) {
      const before = other.slice(0, index), rest = other.slice(index + 1), owner = owners.get(before);
      if (owner === undefined || owner === other || rest.includes(".")) continue;
      const isOfWeight = before === owner && /(?:^|\.)weight$/.test(owner);
      if (!isOfWeight && !SCALE_LIKE.test(rest)) continue;
      if (!OF_ACTIVATIONS.test(rest) && !scaleNames(owner).includes(other)) found.set(owner, other);
    }
    // A scale with its place in front of the weight's name, or of its module's.
    for (const { index } of other.matchAll(/\./g)) {
      const before = other.slice(0, index), owner = owners.get(stemOf(other.slice(index + 1)));
      if (owner !== undefined && owner !== other && SCALE_LIKE.test(before)) found.set(owner, other);
    }
  }
  return found;
}

/** An FP8 tensor with its scale, or why it cannot be read. */
function scaledTensor(
  name: string,
  codes: PlacedTensor,
  all: ReadonlyMap<string, PlacedTensor>,
  told: Told,
  unread: string | undefined,
): ScaledTensor | string {
  const found = scaleNames(name).filter((scale) => all.has(scale)), shown = quote(name);
  if (found.length !== 1) {
    return `${shown} in FP8 with ${
      found.length === 0
        ? unread === undefined ? "no scale" : `${quote(unread)}, which is not known here`
        : `scales ${found.map(quote).join(" and ")}`
    }`;
  }
  const scale = all.get(found[0]!)!, { dtype, shape, elements } = scale.info;
  const what = `${shown} in FP8 with ${quote(found[0]!)} of ${dtype} [${shape.join(", ")}]`;
  const label = all.get(beside(name, "comfy_quant"));
  const format = label === undefined || label.info.byteLength > 4096
    ? undefined
    : /"format"\s*:\s*"([^"]*)"/.exec(new TextDecoder().decode(label.file.read(label.info.name)))?.[1];
  if (label !== undefined && !format?.startsWith("float8_")) {
    return `${what} in the form ${quote(format ?? "comfy_quant")}`;
  }
  if (unread !== undefined) return `${what} and ${quote(unread)}`;
  const block = SCALE_DTYPES.includes(dtype) && elements > 0 && elements <= MAX_SCALES
    ? blockOf(codes.info.shape, shape, told.block)
    : undefined;
  const isMx = dtype === "F8_E8M0" && block?.at(-1) === 32; // the order of such scales differs by writer
  if (block === undefined || isMx) return `${what} for [${codes.info.shape.join(", ")}]`;
  if (told.isTransformed) return `${what} and a transform_config`;
  return { codes, scale, block, dtype: dtype === "BF16" || told.isHalf ? "BF16" : "F32" };
}

/** Facts about scaled weights from config.json. */
interface Told {
  readonly isHalf: boolean;
  readonly isTransformed: boolean;
  /** Rows and columns that share a scale. */
  readonly block: readonly number[] | undefined;
}

function toldBy(config: Readonly<Record<string, unknown>> | undefined): Told {
  const section = JSON.stringify(config?.["quantization_config"] ?? {});
  const block = /"(?:weight_block_size|block_structure)":\[(\d+),(\d+)\]/.exec(section)?.slice(1).map(Number);
  return {
    isHalf: (config?.["torch_dtype"] ?? config?.["dtype"]) === "bfloat16",
    isTransformed: /"transform_config":\{"/.test(section),
    block,
  };
}

/** Elements that share a scale, by dimension; undefined where the shapes do not fit. */
function blockOf(
  shape: readonly number[],
  given: readonly number[],
  told: readonly number[] | undefined,
): readonly number[] | undefined {
  if (given.every((size) => size === 1)) return shape.map((size) => Math.max(1, size));
  const isRows = given.length === 1 && given[0] === shape[0]; // one a row, without the axis of columns
  const scales = isRows ? shape.map((_, i) => given[i] ?? 1) : given;
  if (scales.length !== shape.length) return undefined;
  const block = shape.map((size, i) => {
    if (scales[i] === 1) return size;
    const own = told?.[i - shape.length + 2];
    const sizes = [...(own === undefined ? [] : [own]), ...BLOCK_SIZES];
    return sizes.find((candidate) => Math.ceil(size / candidate) === scales[i]) ?? 0;
  });
  return block.includes(0) ? undefined : block;
}

const table = (value: (code: number) => number) =>
  Float32Array.from({ length: 256 }, (_, code) => value(code));
const half = (bits: number) => new Float16Array(Uint16Array.of(bits).buffer)[0]!;
/** Values of the 256 codes. E5M2 is the upper byte of half precision; E4M3 has no infinity. */
const VALUES: Readonly<Record<string, Float32Array>> = {
  F8_E4M3: table((code) => code % 128 === 127 ? NaN : half((code & 128) << 8 | (code & 127) << 7) * 256),
  F8_E5M2: table((code) => half(code << 8)),
  F8_E8M0: table((code) => code === 255 ? NaN : 2 ** (code - 127)),
};

/** Values of a tensor of scales, or of its elements `[begin, end)`. */
export function valuesOf(
  { info: { name, dtype, elements }, file }: PlacedTensor,
  begin = 0,
  end: number = elements,
): ArrayLike<number> {
  const width = BYTES_PER_ELEMENT[dtype], { buffer } = file.read(name, begin * width, end * width);
  if (dtype === "F64") return Float32Array.from(new Float64Array(buffer));
  if (dtype === "F16") return new Float16Array(buffer);
  if (dtype === "F32") return new Float32Array(buffer);
  if (dtype !== "BF16") return Float32Array.from(new Uint8Array(buffer), (code) => VALUES[dtype]![code]!);
  return fromBfloat16(new Uint16Array(buffer));
}

/** A file whose scaled FP8 tensors read as their products, without the entries that vanish. */
export function scaledFile(file: TensorFile, { tensors: scaled, hidden }: ScaledFp8): TensorFile {
  const { path, fileBytes, dataOffset, metadata } = file;
  const shown = [...file.tensors.values()].filter(({ name }) => !hidden.has(name));
  const tensors = new Map(shown.map((info) => {
    const own = scaled.get(info.name);
    if (own === undefined) return [info.name, info];
    const { dtype, scale } = own, byteLength = info.elements * BYTES_PER_ELEMENT[dtype];
    const stored = {
      type: `${info.dtype} times ${scale.info.dtype}`,
      bytes: info.byteLength + scale.info.byteLength,
    };
    return [info.name, { ...info, dtype, byteLength, stored }];
  }));
  let known: { readonly name: string; readonly values: ArrayLike<number> } | undefined; // read last
  const readInto = (name: string, byteStart: number, target: Uint8Array) => {
    const own = scaled.get(name);
    if (own === undefined) return file.readInto(name, byteStart, target);
    const width = BYTES_PER_ELEMENT[own.dtype];
    const first = Math.floor(byteStart / width), end = Math.ceil((byteStart + target.length) / width);
    if (known?.name !== name) known = { name, values: valuesOf(own.scale) };
    const products = scaledValues(own, known.values, file.read(name, first, end), first);
    const bytes = new Uint8Array(own.dtype === "F32" ? products.buffer : toBfloat16(products).buffer);
    target.set(bytes.subarray(byteStart - first * width, byteStart - first * width + target.length));
  };
  const read = (name: string, byteStart = 0, byteEnd?: number) => {
    if (!scaled.has(name)) return file.read(name, byteStart, byteEnd);
    const target = new Uint8Array((byteEnd ?? tensors.get(name)!.byteLength) - byteStart);
    readInto(name, byteStart, target);
    return target;
  };
  return { path, fileBytes, dataOffset, metadata, tensors, readInto, read, close: () => file.close() };
}

/** Codes from element `first` on, times their scales, as float32. */
function scaledValues(
  { codes: { info: { dtype, shape } }, block }: ScaledTensor,
  scales: ArrayLike<number>,
  codes: Uint8Array,
  first: number,
): Float32Array<ArrayBuffer> {
  const out = new Float32Array(codes.length), values = VALUES[dtype]!;
  const cols = shape.at(-1) ?? 1, width = block.at(-1) ?? 1;
  const counts = shape.map((size, i) => Math.ceil(size / block[i]!));
  for (let at = 0; at < codes.length;) {
    let row = Math.floor((first + at) / cols), stride = counts.at(-1) ?? 1, start = 0;
    const col = first + at - row * cols;
    for (let i = shape.length - 2; i >= 0; i--) {
      start += Math.floor(row % shape[i]! / block[i]!) * stride;
      row = Math.floor(row / shape[i]!);
      stride *= counts[i]!;
    }
    // up to the end of the block or of the row
    const group = Math.floor(col / width),
      end = Math.min(codes.length, at + Math.min((group + 1) * width, cols) - col);
    const scale = scales[start + group]!;
    for (; at < end; at++) out[at] = values[codes[at]!]! * scale;
  }
  return out;
}
