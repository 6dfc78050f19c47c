/**
 * Packed tensors inside a checkpoint: which safetensors entries make up a quantized tensor, finding and checking them,
 * reading rows of them. The bytes are specified in docs/format.md; writing them is the pipeline's.
 *
 * ```text
 * X.weight -> X.weight_packed      I32 [rows, words]   codes, a bit stream per row, least significant bits first
 *             X.weight_scale       F16 [rows, groups]
 *             X.weight_zero_point  real: F16 [rows, groups]; integer: I32 [ceil(rows * bits / 32), groups], a bit
 *                                  stream per column; symmetric: absent
 *             X.weight_shape       I64 [2]             rows, columns
 *
 * with two-level scales, in place of scale and zero point:
 *             X.weight_sub_scale   U8 [rows, sub-bytes]     a bit stream per row
 *             X.weight_sub_min     U8 [rows, sub-bytes]
 *             X.weight_super_scale F16 [rows, superblocks]
 *             X.weight_super_min   F16 [rows, superblocks]
 *
 * with a low-rank correction, beside either:
 *             X.weight_low_rank_a  F16 [rows, rank]
 *             X.weight_low_rank_b  F16 [rank, columns]
 * ```
 */
import { join } from "node:path";
import { FormatError } from "../../errors.ts";
import {
  BYTES_PER_ELEMENT,
  type Checkpoint,
  type Dtype,
  elementCount,
  type FloatDtype,
  isDtype,
  isFloatDtype,
  type TensorSpec,
} from "../../tensor/mod.ts";
import { MAX_ROTATION_SEED, type Rotation } from "./rotation.ts";
import {
  BIT_WIDTHS,
  type BitWidth,
  GROUP_SIZES,
  groupCount,
  type GroupSize,
  MAX_RANK,
  type PackedTensor,
  packedWords,
  SCALE_BITS,
  type ScaleBits,
  subCodeBytes,
  superblockCount,
  TWO_LEVEL_GROUP_SIZES,
  ZERO_POINT_KINDS,
  type ZeroPointKind,
} from "./layout.ts";

/** Version of the layout and of the `arrowquant` section of config.json; a reader refuses a larger one. */
export const FORMAT_VERSION = 1;
/** Version of a section that has layers with a low-rank correction or a rotation: programs that know neither must refuse it. */
export const EXTENDED_FORMAT_VERSION = 2;

/** Key of config.json that describes the quantization, for us and for others. */
export const CONFIG_KEY = "quantization_config";

/** Our own section inside {@linkcode CONFIG_KEY}. */
export const SECTION_KEY = "arrowquant";

const PACKED_SUFFIX = "_packed";

/** What config.json has to say about one layer for its bytes to be readable. */
export interface PackedLayerEntry {
  readonly bits: BitWidth;
  readonly group_size: GroupSize;
  /** Bits of the sub-codes of two-level scales; absent with plain ones. */
  readonly scale_bits?: ScaleBits;
  /** Where it is not the section's. */
  readonly zero_point?: ZeroPointKind;
  /** Rank of the correction; absent without. */
  readonly low_rank?: number;
  /** Of the inputs; absent without. */
  readonly rotation?: Rotation;
  /** Element type before quantization. */
  readonly dtype: FloatDtype;
}

/** The `arrowquant` section of config.json. */
export interface PackedSection {
  readonly format_version: number;
  readonly solver: "round" | "clip" | "feedback" | "best";
  readonly zero_point: ZeroPointKind;
  /** By the tensor's original name. */
  readonly layers: Readonly<Record<string, PackedLayerEntry>>;
}

/** Names of the checkpoint's entries that make up one quantized tensor. */
export interface PackedNames {
  readonly packed: string;
  /** Undefined with two-level scales. */
  readonly scale: string | undefined;
  /** Undefined when zero points are not stored (symmetric), and with two-level scales. */
  readonly zeroPoint: string | undefined;
  /** These four are undefined with plain scales. */
  readonly subScale: string | undefined;
  readonly subMin: string | undefined;
  readonly superScale: string | undefined;
  readonly superMin: string | undefined;
  /** These two are undefined without a low-rank correction. */
  readonly lowRankA: string | undefined;
  readonly lowRankB: string | undefined;
  readonly shape: string;
}

/** A quantized tensor of a checkpoint. */
export interface PackedLayer {
  /** Original name, as in `model.layers.0.mlp.up_proj.weight`. */
  readonly name: string;
  readonly rows: number;
  readonly cols: number;
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
  /** `real` with two-level scales. */
  readonly zeroPointKind: ZeroPointKind;
  /** Bits of the sub-codes of two-level scales; undefined with plain ones. */
  readonly scaleBits: ScaleBits | undefined;
  /** Rank of the low-rank correction, 0 without. */
  readonly rank: number;
  readonly rotation: Rotation | undefined;
  /** Element type before quantization. */
  readonly dtype: FloatDtype;
  readonly tensors: PackedNames;
  /** Bytes of all its entries together. */
  readonly bytes: number;
  /** All stored bytes · 8 / weights. */
  readonly bitsPerWeight: number;
}

/** The checkpoint entries of a quantized tensor, in the order in which they are stored. */
export function packedNames(
  name: string,
  zeroPointKind: ZeroPointKind,
  scaleBits?: ScaleBits,
  rank = 0,
): PackedNames {
  const two = scaleBits !== undefined;
  return {
    packed: name + PACKED_SUFFIX,
    scale: two ? undefined : `${name}_scale`,
    zeroPoint: two || zeroPointKind === "symmetric" ? undefined : `${name}_zero_point`,
    subScale: two ? `${name}_sub_scale` : undefined,
    subMin: two ? `${name}_sub_min` : undefined,
    superScale: two ? `${name}_super_scale` : undefined,
    superMin: two ? `${name}_super_min` : undefined,
    lowRankA: rank > 0 ? `${name}_low_rank_a` : undefined,
    lowRankB: rank > 0 ? `${name}_low_rank_b` : undefined,
    shape: `${name}_shape`,
  };
}

/** Every name that an entry of a quantized tensor may have, whatever its scales. */
export function allPackedNames(name: string): string[] {
  const names = [packedNames(name, "real"), packedNames(name, "real", 4, 1)].flatMap((n) => Object.values(n));
  return [...new Set(names as (string | undefined)[])].filter((part) => part !== undefined);
}

const SHAPE_OF_SHAPE: readonly number[] = Object.freeze([2]);

/** The checkpoint entries of a quantized tensor with their element types and shapes, in the order of storage. */
export function packedTensorSpecs(
  name: string,
  rows: number,
  cols: number,
  bits: BitWidth,
  groupSize: GroupSize,
  zeroPointKind: ZeroPointKind,
  scaleBits?: ScaleBits,
  rank = 0,
): TensorSpec[] {
  const names = packedNames(name, zeroPointKind, scaleBits, rank);
  const lowRank: TensorSpec[] = rank === 0 ? [] : [
    { name: names.lowRankA!, dtype: "F16", shape: [rows, rank] },
    { name: names.lowRankB!, dtype: "F16", shape: [rank, cols] },
  ];
  if (scaleBits !== undefined) {
    const sub = [rows, subCodeBytes(cols, groupSize, scaleBits)], supers = [rows, superblockCount(cols)];
    return [
      { name: names.packed, dtype: "I32", shape: [rows, packedWords(cols, bits)] },
      { name: names.subScale!, dtype: "U8", shape: sub },
      { name: names.subMin!, dtype: "U8", shape: sub },
      { name: names.superScale!, dtype: "F16", shape: supers },
      { name: names.superMin!, dtype: "F16", shape: supers },
      ...lowRank,
      { name: names.shape, dtype: "I64", shape: SHAPE_OF_SHAPE },
    ];
  }
  const groups = groupCount(cols, groupSize);
  const grid = [rows, groups];
  const specs: TensorSpec[] = [
    { name: names.packed, dtype: "I32", shape: [rows, packedWords(cols, bits)] },
    { name: names.scale!, dtype: "F16", shape: grid },
  ];
  if (names.zeroPoint !== undefined) {
    specs.push(
      zeroPointKind === "integer"
        ? { name: names.zeroPoint, dtype: "I32", shape: [zeroPointWords(rows, bits), groups] }
        : { name: names.zeroPoint, dtype: "F16", shape: grid },
    );
  }
  specs.push(...lowRank, { name: names.shape, dtype: "I64", shape: SHAPE_OF_SHAPE });
  return specs;
}

/** Bytes of these entries. */
export function specBytes(specs: readonly TensorSpec[]): number {
  return specs.reduce(
    (sum, { dtype, shape }) => sum + (elementCount(shape) ?? 0) * BYTES_PER_ELEMENT[dtype],
    0,
  );
}

/**
 * The quantized tensors of a checkpoint by their original names, every size checked; empty for a checkpoint without.
 *
 * @throws {FormatError} when config.json's section is missing, malformed or newer, or an entry does not fit it
 *
 * @example
 * ```ts
 * import { openCheckpoint } from "../../tensor/mod.ts";
 * import { packedLayers } from "./checkpoint.ts";
 * using checkpoint = openCheckpoint("tests/models/dream-mini");
 * for (const layer of packedLayers(checkpoint).values()) console.log(layer.name, layer.bits, layer.bitsPerWeight);
 * ```
 */
export function packedLayers(checkpoint: Checkpoint): ReadonlyMap<string, PackedLayer> {
  const section = readSection(checkpoint);
  const packed = [...checkpoint.tensors.keys()].filter((name) => name.endsWith(PACKED_SUFFIX));
  if (section === undefined) {
    if (packed.length === 0) return new Map();
    throw configFault(
      checkpoint,
      `${CONFIG_KEY}.${SECTION_KEY} must say how ${text(packed[0]!)} was quantized, got no such section`,
    );
  }
  const layers = new Map<string, PackedLayer>();
  for (const [name, entry] of Object.entries(section.layers)) {
    layers.set(name, checkLayer(checkpoint, name, entry, entry?.zero_point ?? section.zero_point));
  }
  const stray = packed.find((name) => !layers.has(name.slice(0, -PACKED_SUFFIX.length)));
  if (stray === undefined) return layers;
  throw configFault(
    checkpoint,
    `${CONFIG_KEY}.${SECTION_KEY}.layers must name every quantized tensor, got none for ${text(stray)}`,
    stray,
  );
}

/**
 * Reads rows `[rowBegin, rowEnd)` of a quantized tensor, all of them by default. Integer zero points come back as half
 * floats, as real ones do. B of a low-rank correction is read whole.
 *
 * @throws {RangeError} when the rows are not the tensor's
 * @throws as {@linkcode Checkpoint.readInto}
 */
export function readPackedTensor(
  checkpoint: Checkpoint,
  layer: PackedLayer,
  rowBegin = 0,
  rowEnd: number = layer.rows,
): PackedTensor {
  const { name, cols, bits, groupSize, zeroPointKind, scaleBits, rank, rotation, tensors } = layer;
  const whole = Number.isSafeInteger(rowBegin) && Number.isSafeInteger(rowEnd);
  if (!whole || rowBegin < 0 || rowBegin > rowEnd || rowEnd > layer.rows) {
    throw new RangeError(
      `Cannot read ${text(name)}: rows must lie in [0, ${layer.rows}), got [${rowBegin}, ${rowEnd})`,
    );
  }
  const words = packedWords(cols, bits);
  const groups = groupCount(cols, groupSize);
  const read = (entry: string, rowBytes: number, begin = rowBegin, end = rowEnd): ArrayBuffer =>
    checkpoint.read(entry, begin * rowBytes, end * rowBytes).buffer;
  const common = {
    rows: rowEnd - rowBegin,
    cols,
    bits,
    groupSize,
    packed: new Uint32Array(read(tensors.packed, words * 4)),
    ...(rotation === undefined ? {} : { rotation }),
    ...(rank === 0 ? {} : {
      lowRank: {
        rank,
        a: new Uint16Array(read(tensors.lowRankA!, rank * 2)),
        b: new Uint16Array(read(tensors.lowRankB!, cols * 2, 0, rank)),
      },
    }),
  };
  if (scaleBits !== undefined) {
    const subBytes = subCodeBytes(cols, groupSize, scaleBits), superBytes = superblockCount(cols) * 2;
    return {
      ...common,
      scaleBits,
      subScale: new Uint8Array(read(tensors.subScale!, subBytes)),
      subMin: new Uint8Array(read(tensors.subMin!, subBytes)),
      superScale: new Uint16Array(read(tensors.superScale!, superBytes)),
      superMin: new Uint16Array(read(tensors.superMin!, superBytes)),
    };
  }
  let zeroPoint: Uint16Array<ArrayBuffer> | undefined;
  if (tensors.zeroPoint !== undefined && zeroPointKind === "integer") {
    const firstWord = Math.floor(rowBegin * bits / 32);
    const stored = read(tensors.zeroPoint, groups * 4, firstWord, zeroPointWords(rowEnd, bits));
    zeroPoint = unpackZeroPoints(new Uint32Array(stored), firstWord, rowBegin, rowEnd, groups, bits);
  } else if (tensors.zeroPoint !== undefined) {
    zeroPoint = new Uint16Array(read(tensors.zeroPoint, groups * 2));
  }
  const scale = new Uint16Array(read(tensors.scale!, groups * 2));
  return { ...common, zeroPointKind, scale, zeroPoint };
}

/**
 * What is stored of some rows of a packed tensor, entry by entry in the order of storage; without the shape, integer
 * zero points and B of a low-rank correction, which do not go by rows.
 */
export function packedEntries(
  names: PackedNames,
  tensor: PackedTensor,
): [string, ArrayBufferView<ArrayBuffer>][] {
  const { lowRank } = tensor;
  const ofRank: [string, Uint16Array<ArrayBuffer>][] = lowRank === undefined
    ? []
    : [[names.lowRankA!, lowRank.a]];
  if (tensor.scaleBits !== undefined) {
    return [
      [names.packed, tensor.packed],
      [names.subScale!, tensor.subScale],
      [names.subMin!, tensor.subMin],
      [names.superScale!, tensor.superScale],
      [names.superMin!, tensor.superMin],
      ...ofRank,
    ];
  }
  const { packed, scale, zeroPoint, zeroPointKind } = tensor;
  return [
    [names.packed, packed],
    [names.scale!, scale],
    ...(zeroPointKind === "real" ? [[names.zeroPoint!, zeroPoint!] as [string, typeof scale]] : []),
    ...ofRank,
  ];
}

/** Words of one column of integer zero points. */
export function zeroPointWords(rows: number, bits: BitWidth): number {
  return Math.ceil(rows * bits / 32);
}

/** Half floats of the integers a zero point can be. */
const HALVES: Uint16Array = new Uint16Array(Float16Array.from({ length: 256 }, (_, i) => i).buffer);

/**
 * Packs integer zero points as they are stored: a bit stream down each column, least significant bits first.
 *
 * Shapes: `codes: u8[rows, groups]` → `u32[ceil(rows * bits / 32), groups]`.
 */
export function packZeroPoints(
  codes: Uint8Array,
  rows: number,
  groups: number,
  bits: BitWidth,
): Uint32Array<ArrayBuffer> {
  const words = new Uint32Array(zeroPointWords(rows, bits) * groups);
  for (let row = 0; row < rows; row++) {
    const shift = row * bits % 32;
    const base = (row * bits - shift) / 32 * groups;
    for (let group = 0; group < groups; group++) {
      const code = codes[row * groups + group]!;
      words[base + group]! |= code << shift;
      if (shift + bits > 32) words[base + groups + group]! |= code >>> (32 - shift);
    }
  }
  return words;
}

/** The inverse of {@linkcode packZeroPoints} for some rows, as half floats; `words` begins at word row `firstWord`. */
function unpackZeroPoints(
  words: Uint32Array,
  firstWord: number,
  rowBegin: number,
  rowEnd: number,
  groups: number,
  bits: BitWidth,
): Uint16Array<ArrayBuffer> {
  const halves = new Uint16Array((rowEnd - rowBegin) * groups);
  const mask = 2 ** bits - 1;
  for (let row = rowBegin, i = 0; row < rowEnd; row++) {
    const shift = row * bits % 32;
    const base = ((row * bits - shift) / 32 - firstWord) * groups;
    for (let group = 0; group < groups; group++, i++) {
      let code = words[base + group]! >>> shift;
      if (shift + bits > 32) code |= words[base + groups + group]! << (32 - shift);
      halves[i] = HALVES[code & mask]!;
    }
  }
  return halves;
}

// Checks -------------------------------------------------------------------------------------------------------

function readSection(checkpoint: Checkpoint): PackedSection | undefined {
  const quantization = checkpoint.config?.[CONFIG_KEY];
  if (!isObject(quantization) || quantization[SECTION_KEY] === undefined) return undefined;
  const section = quantization[SECTION_KEY];
  const where = `${CONFIG_KEY}.${SECTION_KEY}`;
  const fail = (key: string, wanted: string, found: unknown) =>
    configFault(checkpoint, `${where}${key} must be ${wanted}, got ${text(found)}`);
  if (!isObject(section)) throw fail("", "an object", section);
  const { format_version: version, zero_point: zeroPoint, layers } = section;
  if (version !== FORMAT_VERSION && version !== EXTENDED_FORMAT_VERSION) {
    throw fail(
      ".format_version",
      `${FORMAT_VERSION} or ${EXTENDED_FORMAT_VERSION}, those this version reads`,
      version,
    );
  }
  if (!isMember(zeroPoint, ZERO_POINT_KINDS)) {
    throw fail(".zero_point", `one of ${ZERO_POINT_KINDS.join(", ")}`, zeroPoint);
  }
  if (!isObject(layers)) throw fail(".layers", "an object", layers);
  for (const [name, entry] of Object.entries(layers)) {
    const key = `.layers[${text(name)}]`;
    if (!isObject(entry)) throw fail(key, "an object of bits, group_size and dtype", entry);
    if (!isMember(entry["bits"], BIT_WIDTHS)) {
      throw fail(`${key}.bits`, `one of ${BIT_WIDTHS.join(", ")}`, entry["bits"]);
    }
    const scaleBits = entry["scale_bits"];
    if (scaleBits !== undefined && !isMember(scaleBits, SCALE_BITS)) {
      throw fail(`${key}.scale_bits`, `one of ${SCALE_BITS.join(", ")}, or absent`, scaleBits);
    }
    const groupSizes = scaleBits === undefined ? GROUP_SIZES : TWO_LEVEL_GROUP_SIZES;
    if (!isMember(entry["group_size"], groupSizes)) {
      throw fail(`${key}.group_size`, `one of ${groupSizes.join(", ")}`, entry["group_size"]);
    }
    const ownKind = entry["zero_point"];
    if (ownKind !== undefined && !isMember(ownKind, ZERO_POINT_KINDS)) {
      throw fail(`${key}.zero_point`, `one of ${ZERO_POINT_KINDS.join(", ")}, or absent`, ownKind);
    }
    checkExtensions(entry, version, (part, wanted, found) => fail(`${key}.${part}`, wanted, found));
    if (!isDtype(entry["dtype"]) || !isFloatDtype(entry["dtype"])) {
      throw fail(`${key}.dtype`, "a floating-point element type", entry["dtype"]);
    }
  }
  return section as unknown as PackedSection;
}

/** Low rank and rotation of an entry, as far as they can be checked without the layer's sizes. */
function checkExtensions(
  { low_rank: rank, rotation }: Record<string, unknown>,
  version: number,
  fail: (part: string, wanted: string, found: unknown) => FormatError,
): void {
  for (const [part, value] of [["low_rank", rank], ["rotation", rotation]] as const) {
    if (value === undefined || version >= EXTENDED_FORMAT_VERSION) continue;
    throw fail(part, `absent in format_version ${version}`, value);
  }
  if (rank !== undefined && !(Number.isInteger(rank) && rank as number >= 1 && rank as number <= MAX_RANK)) {
    throw fail("low_rank", `a whole number from 1 to ${MAX_RANK}, or absent`, rank);
  }
  if (rotation === undefined) return;
  if (!isObject(rotation)) throw fail("rotation", "an object of kind, block and seed, or absent", rotation);
  const { kind, block, seed } = rotation;
  if (kind !== "hadamard") throw fail("rotation.kind", "hadamard", kind);
  if (!Number.isSafeInteger(block) || !Number.isInteger(Math.log2(block as number))) {
    throw fail("rotation.block", "a power of two", block);
  }
  if (!Number.isInteger(seed) || seed as number < 0 || seed as number > MAX_ROTATION_SEED) {
    throw fail("rotation.seed", `a whole number from 0 to ${MAX_ROTATION_SEED}`, seed);
  }
}

function checkLayer(
  checkpoint: Checkpoint,
  name: string,
  entry: PackedLayerEntry,
  sectionKind: ZeroPointKind,
): PackedLayer {
  const { bits, group_size: groupSize, scale_bits: scaleBits, low_rank: rank = 0, rotation, dtype } = entry;
  const zeroPointKind = scaleBits === undefined ? sectionKind : "real";
  const names = packedNames(name, zeroPointKind, scaleBits, rank);
  const fail = (part: string, reason: string) =>
    new FormatError(
      `Cannot read quantized tensor ${text(name)} of ${text(checkpoint.path)}: ${text(part)} ${reason}`,
      { path: checkpoint.tensors.get(part)?.file.path ?? checkpoint.path, tensor: name },
    );
  const check = (part: string, wantedDtype: Dtype, wantedShape: readonly number[]) => {
    const wanted = `must be ${wantedDtype} [${wantedShape}]`;
    const info = checkpoint.tensors.get(part)?.info;
    if (info === undefined) throw fail(part, `${wanted}, got no such tensor`);
    const fits = info.dtype === wantedDtype && info.shape.length === wantedShape.length &&
      info.shape.every((size, i) => size === wantedShape[i]);
    if (!fits) throw fail(part, `${wanted}, got ${info.dtype} [${info.shape}]`);
  };
  check(names.shape, "I64", [2]);
  const [rows, cols] = [...new BigInt64Array(checkpoint.read(names.shape).buffer)].map(Number);
  const possible = (size: number | undefined): size is number => Number.isSafeInteger(size) && size! > 0;
  if (!possible(rows) || !possible(cols) || elementCount([rows, cols]) === undefined) {
    throw fail(names.shape, `must hold two sizes above 0, got [${rows}, ${cols}]`);
  }
  if (rotation !== undefined && cols % rotation.block !== 0) {
    throw fail(
      names.shape,
      `must have columns that the rotation's block ${rotation.block} divides, got ${cols}`,
    );
  }
  if (rank > Math.min(rows, cols)) {
    throw fail(names.shape, `must have sizes of at least the rank ${rank}, got [${rows}, ${cols}]`);
  }
  const specs = packedTensorSpecs(name, rows, cols, bits, groupSize, zeroPointKind, scaleBits, rank);
  for (const spec of specs) check(spec.name, spec.dtype, spec.shape);
  const used = new Set<string | undefined>(Object.values(names));
  const unused = [name, ...allPackedNames(name)].filter((part) => !used.has(part));
  for (const extra of unused) {
    if (checkpoint.tensors.has(extra)) throw fail(extra, `must not be there beside ${text(names.packed)}`);
  }
  const bytes = specBytes(specs);
  return {
    name,
    rows,
    cols,
    bits,
    groupSize,
    zeroPointKind,
    scaleBits,
    rank,
    rotation,
    dtype,
    tensors: names,
    bytes,
    bitsPerWeight: bytes * 8 / (rows * cols),
  };
}

function configFault(checkpoint: Checkpoint, reason: string, tensor?: string): FormatError {
  const path = join(checkpoint.folder, "config.json");
  return new FormatError(
    `Cannot read ${text(path)}: ${reason}`,
    tensor === undefined ? { path } : { path, tensor },
  );
}

function isMember<T>(value: unknown, allowed: readonly T[]): value is T {
  return (allowed as readonly unknown[]).includes(value);
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** A value from a file for a message. */
function text(value: unknown): string {
  const json = JSON.stringify(value) ?? "nothing";
  const short = json.length > 300 ? `${json.slice(0, 300)}…` : json;
  return short.replace(/\p{C}/gu, (c) => `\\u{${c.codePointAt(0)!.toString(16)}}`);
}
