/**
 * Packed tensors inside a checkpoint: finding and checking them, and reading rows of them. Their entries are
 * those of entries.ts; config.json says how each was quantized. lib/pipeline writes them.
 */
import { join } from "node:path";
import type { Solver } from "../../config/names.ts";
import { FormatError } from "../../errors.ts";
import { isJsonObject } from "../../files/json.ts";
import { show } from "../../files/positional.ts";
import {
  type Checkpoint,
  CONFIG_KEY,
  type Dtype,
  elementCount,
  type FloatDtype,
  isDtype,
  isFloatDtype,
  SECTION_KEY,
} from "../../tensor/mod.ts";
import {
  allPackedNames,
  PACKED_SUFFIX,
  type PackedNames,
  packedNames,
  packedTensorSpecs,
  specBytes,
  unpackZeroPoints,
  zeroPointWords,
} from "./entries.ts";
import {
  BIT_WIDTHS,
  type BitWidth,
  CODED_SCALE_BITS,
  CODES,
  type Codes,
  emptyLevels,
  GROUP_SIZES,
  groupCount,
  type GroupSize,
  halves,
  linesOf,
  matrixSizes,
  MAX_ROW_WEIGHTS,
  OFFSET_BITS,
  packedRows,
  type PackedTensor,
  packedWords,
  ROTATED_SCALE_BITS,
  SCALE_BITS,
  type ScaleBits,
  subCodeBytes,
  superblockCount,
  TRELLIS_BITS,
  TWO_LEVEL_GROUP_SIZES,
  type TwoLevelScales,
  type TwoLevelTensor,
  ZERO_POINT_KINDS,
  type ZeroPointKind,
  zeroPointsOf,
} from "./layout.ts";

import { gridScales, isScaleGrid, unpackScaleCodes } from "./scale_codes.ts";

/** Version of the layout and of the `arrowquant` section of config.json; a reader refuses a larger one. */
export const FORMAT_VERSION = 1;
/** Version of a checkpoint with trellis codes. */
export const TRELLIS_FORMAT_VERSION = 3;
/** Number of the levels of trellis codes (kernels/arithmetic/trellis.h): others have another. */
export const TRELLIS_TABLE = 2;
/** Version that marked low-rank corrections and rotations, which are gone (docs/decisions.md). */
const WITHDRAWN_FORMAT_VERSION = 2;
/** What a message says of such a checkpoint. */
const WITHDRAWN = "low-rank corrections and rotations are no longer read: quantize the original again, or " +
  "dequantize this checkpoint with the program that wrote it";

export { CONFIG_KEY, SECTION_KEY };

/** One layer in config.json: enough to read its bytes. */
export interface PackedLayerEntry {
  readonly bits: BitWidth;
  readonly group_size: GroupSize;
  /** Bits of two-level scales, 16 of offsets, 3 of coded scales, 0 of one scale; absent with plain ones. */
  readonly scale_bits?: ScaleBits | undefined;
  /**
   * `trellis`, with a half-precision scale and offset a group, or coded scales alone where `scale_bits` is 3,
   * or one scale of rotated weights where it is 0; absent: uniform. From version 3 on.
   */
  readonly codes?: Codes | undefined;
  /** Absent where it is the section's. */
  readonly zero_point?: ZeroPointKind | undefined;
  /** Element type before quantization. */
  readonly dtype: FloatDtype;
}

/** The `arrowquant` section of config.json. */
export interface PackedSection {
  readonly format_version: number;
  readonly solver: Solver;
  readonly zero_point: ZeroPointKind;
  /** {@linkcode TRELLIS_TABLE}; absent where no layer has trellis codes. */
  readonly trellis_table?: number | undefined;
  /** By the tensor's original name. */
  readonly layers: Readonly<Record<string, PackedLayerEntry>>;
}

/** The shape of a quantized tensor before it was quantized. */
export const shapeOf = (
  { rows, cols, experts }: Pick<PackedLayer, "rows" | "cols" | "experts">,
): readonly number[] => experts === undefined ? [rows, cols] : [experts, rows / experts, cols];

/** A quantized tensor of a checkpoint. */
export interface PackedLayer {
  /** Original name, as in `model.layers.0.mlp.up_proj.weight`. */
  readonly name: string;
  readonly rows: number;
  readonly cols: number;
  /** Experts whose rows follow one another in a tensor of three dimensions; undefined for a matrix. */
  readonly experts?: number | undefined;
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
  /** With two-level scales `real`, or `symmetric` where they have 8 bits. */
  readonly zeroPointKind: ZeroPointKind;
  /** Of two-level scales, 16 of offsets, 3 of coded scales, 0 of one scale; undefined with plain ones. */
  readonly scaleBits: ScaleBits | undefined;
  /** `trellis`: `scaleBits` is 16, or 3 or 0 without offsets; absent: uniform. */
  readonly codes?: Codes | undefined;
  /** Element type before quantization. */
  readonly dtype: FloatDtype;
  readonly tensors: PackedNames;
  /** Bytes of all its entries together. */
  readonly bytes: number;
  /** All stored bytes · 8 / weights. */
  readonly bitsPerWeight: number;
}

/**
 * The quantized tensors of a checkpoint by their original names, every size checked.
 *
 * @throws {FormatError} when config.json's section is missing, malformed or newer, or does not fit an entry
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
      `${CONFIG_KEY}.${SECTION_KEY} must say how ${show(packed[0]!)} was quantized, got no such section`,
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
    `${CONFIG_KEY}.${SECTION_KEY}.layers must name every quantized tensor, got none for ${show(stray)}`,
    stray,
  );
}

/** Rows of a quantized tensor that are read at once where a reader wants `rows`: all of a rotated one. */
export const rowsAtOnce = (layer: Pick<PackedLayer, "scaleBits" | "rows">, rows: number): number =>
  layer.scaleBits === ROTATED_SCALE_BITS ? layer.rows : rows;

/**
 * Reads rows `[rowBegin, rowEnd)` of a quantized tensor, all of them by default. Integer zero points come
 * back as half floats, as real ones do.
 *
 * @throws {RangeError} when the rows are not the tensor's, or not all of a rotated one's
 * @throws as {@linkcode Checkpoint.readInto}
 */
export function readPackedTensor(
  checkpoint: Checkpoint,
  layer: PackedLayer,
  rowBegin = 0,
  rowEnd: number = layer.rows,
): PackedTensor {
  const { name, cols, bits, groupSize, zeroPointKind, scaleBits, codes, tensors } = layer;
  const whole = Number.isSafeInteger(rowBegin) && Number.isSafeInteger(rowEnd);
  if (!whole || rowBegin < 0 || rowBegin > rowEnd || rowEnd > layer.rows) {
    throw new RangeError(
      `Cannot read ${show(name)}: rows must lie in [0, ${layer.rows}), got [${rowBegin}, ${rowEnd})`,
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
  };
  if (scaleBits === CODED_SCALE_BITS) {
    return { ...common, ...codedScales(checkpoint, layer, rowBegin, rowEnd) };
  }
  if (scaleBits === ROTATED_SCALE_BITS) {
    return packedRows({ ...common, rows: layer.rows, ...oneScale(checkpoint, layer) }, rowBegin, rowEnd);
  }
  if (scaleBits !== undefined) {
    const subBytes = subCodeBytes(cols, groupSize, scaleBits), superBytes = superblockCount(cols) * 2;
    const subScale = new Uint8Array(read(tensors.subScale!, subBytes));
    const subMin = new Uint8Array(read(tensors.subMin!, subBytes));
    if (tensors.superScale === undefined) {
      const levels = { ...emptyLevels({ ...common, scaleBits, codes }), subScale, subMin };
      return { ...common, ...levels, ...(codes === undefined ? {} : { codes }) };
    }
    return {
      ...common,
      scaleBits,
      subScale,
      subMin,
      superScale: new Uint16Array(read(tensors.superScale, superBytes)),
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

/** Scales and offsets of rows `[begin, end)` of a tensor whose scales are coded. */
function codedScales(
  checkpoint: Checkpoint,
  { cols, groupSize, tensors }: PackedLayer,
  begin: number,
  end: number,
): TwoLevelScales & Pick<TwoLevelTensor, "codes" | "scaleGrid"> {
  const groups = groupCount(cols, groupSize), [from, to] = [begin * groups, end * groups];
  const stored = checkpoint.read(tensors.superScale!);
  const scaleGrid = [...halves(new Uint16Array(stored.buffer))] as [number, number];
  const scales = gridScales(scaleGrid), bits = CODED_SCALE_BITS;
  const bytes = checkpoint.read(tensors.subScale!, Math.floor(from * bits / 8), Math.ceil(to * bits / 8));
  const codes = unpackScaleCodes(bytes, from, to);
  const levels = emptyLevels({
    rows: end - begin,
    cols,
    groupSize,
    scaleBits: OFFSET_BITS,
    codes: "trellis",
  });
  halves(linesOf(levels)[0]).set(Float64Array.from(codes, (code) => scales[code]!));
  return { ...levels, codes: "trellis", scaleGrid };
}

/** The scale of a rotated tensor, for all of its rows, and its seed. */
function oneScale(
  checkpoint: Checkpoint,
  { rows, cols, groupSize, tensors }: PackedLayer,
): TwoLevelScales & Pick<TwoLevelTensor, "codes" | "rotationSeed"> {
  const levels = emptyLevels({ rows, cols, groupSize, scaleBits: OFFSET_BITS, codes: "trellis" });
  const [scale] = new Uint16Array(checkpoint.read(tensors.subScale!).buffer);
  const [rotationSeed] = new Int32Array(checkpoint.read(tensors.seed!).buffer);
  linesOf(levels)[0].fill(scale!);
  return { ...levels, codes: "trellis", rotationSeed };
}

function readSection(checkpoint: Checkpoint): PackedSection | undefined {
  const quantization = checkpoint.config?.[CONFIG_KEY];
  if (!isJsonObject(quantization) || quantization[SECTION_KEY] === undefined) return undefined;
  const section = quantization[SECTION_KEY];
  const fail: Fail = (key, wanted, found) =>
    configFault(checkpoint, `${CONFIG_KEY}.${SECTION_KEY}${key} must be ${wanted}, got ${show(found)}`);
  if (!isJsonObject(section)) throw fail("", "an object", section);
  const { format_version: version, zero_point: zeroPoint, layers } = section;
  if (version === WITHDRAWN_FORMAT_VERSION) {
    throw fail(".format_version", `${FORMAT_VERSION} (${WITHDRAWN})`, version);
  }
  if (version !== FORMAT_VERSION && version !== TRELLIS_FORMAT_VERSION) {
    const known = `${FORMAT_VERSION} or ${TRELLIS_FORMAT_VERSION}, which this version reads`;
    throw fail(".format_version", known, version);
  }
  checkMember(fail, ".zero_point", zeroPoint, ZERO_POINT_KINDS);
  if (!isJsonObject(layers)) throw fail(".layers", "an object", layers);
  for (const [name, entry] of Object.entries(layers)) {
    const key = `.layers[${show(name)}]`;
    if (!isJsonObject(entry)) throw fail(key, "an object of bits, group_size and dtype", entry);
    const { bits, scale_bits: scaleBits, group_size: groupSize, zero_point: own, dtype, codes } = entry;
    if (codes !== undefined) {
      if (version === FORMAT_VERSION) throw fail(`${key}.codes`, "absent in version 1", codes);
      checkMember(fail, `${key}.codes`, codes, CODES, ", or absent");
      const isTrellis = codes === "trellis";
      if (isTrellis && scaleBits !== undefined) {
        const own = [CODED_SCALE_BITS, ROTATED_SCALE_BITS];
        checkMember(fail, `${key}.scale_bits`, scaleBits, own, ", or absent, with trellis codes");
      }
      if (isTrellis) checkMember(fail, `${key}.bits`, bits, TRELLIS_BITS, " with trellis codes");
    }
    checkMember(fail, `${key}.bits`, bits, BIT_WIDTHS);
    const isCoded = codes === "trellis" && scaleBits !== undefined;
    if (scaleBits !== undefined && !isCoded) {
      checkMember(fail, `${key}.scale_bits`, scaleBits, SCALE_BITS, ", or absent");
    }
    const anySizes = scaleBits === ROTATED_SCALE_BITS ? [0] as const : GROUP_SIZES;
    const groupSizes = scaleBits === undefined || isCoded ? anySizes : TWO_LEVEL_GROUP_SIZES;
    checkMember(fail, `${key}.group_size`, groupSize, groupSizes);
    if (own !== undefined) checkMember(fail, `${key}.zero_point`, own, ZERO_POINT_KINDS, ", or absent");
    for (const part of ["low_rank", "rotation"]) {
      if (entry[part] !== undefined) throw fail(`${key}.${part}`, `absent (${WITHDRAWN})`, entry[part]);
    }
    if (!isDtype(dtype) || !isFloatDtype(dtype)) {
      throw fail(`${key}.dtype`, "a floating-point element type", dtype);
    }
  }
  const hasTrellis = Object.values(layers).some((entry) =>
    isJsonObject(entry) && entry["codes"] === "trellis"
  );
  const table = section["trellis_table"];
  if (hasTrellis && table !== TRELLIS_TABLE) {
    const wanted =
      `${TRELLIS_TABLE} with trellis codes (those of other levels are no longer read: quantize the ` +
      "original again)";
    throw fail(".trellis_table", wanted, table);
  }
  return section as unknown as PackedSection;
}

type Fail = (key: string, wanted: string, found: unknown) => FormatError;

function checkMember(fail: Fail, key: string, value: unknown, allowed: readonly unknown[], more = ""): void {
  if (!allowed.includes(value)) throw fail(key, `one of ${allowed.join(", ")}${more}`, value);
}

function checkLayer(
  checkpoint: Checkpoint,
  name: string,
  entry: PackedLayerEntry,
  sectionKind: ZeroPointKind,
): PackedLayer {
  const { bits, group_size: groupSize, dtype } = entry, isTrellis = entry.codes === "trellis";
  const scaleBits = isTrellis ? entry.scale_bits ?? OFFSET_BITS : entry.scale_bits;
  const zeroPoint = scaleBits === undefined ? sectionKind : zeroPointsOf({ scaleBits });
  const names = packedNames(name, { zeroPoint, scaleBits });
  const fail = (part: string, reason: string) =>
    new FormatError(
      `Cannot read quantized tensor ${show(name)} of ${show(checkpoint.path)}: ${show(part)} ${reason}`,
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
  const isStack = checkpoint.tensors.get(names.shape)?.info.shape[0] === 3;
  check(names.shape, "I64", [isStack ? 3 : 2]);
  const sizes = [...new BigInt64Array(checkpoint.read(names.shape).buffer)].map(Number);
  if (!sizes.every((size) => Number.isSafeInteger(size) && size > 0) || elementCount(sizes) === undefined) {
    throw fail(
      names.shape,
      `must hold ${isStack ? "three" : "two"} sizes above 0, got [${sizes.join(", ")}]`,
    );
  }
  const { rows, cols, experts } = matrixSizes(sizes);
  if (cols > MAX_ROW_WEIGHTS) {
    throw fail(names.shape, `a row must have at most ${MAX_ROW_WEIGHTS} weights, got ${cols}`);
  }
  if (scaleBits === ROTATED_SCALE_BITS && experts !== undefined) {
    throw fail(names.shape, `must be of a matrix with rotated weights, got a stack of ${experts}`);
  }
  const specs = packedTensorSpecs(name, { rows, cols, experts, bits, groupSize, zeroPoint, scaleBits });
  for (const spec of specs) check(spec.name, spec.dtype, spec.shape);
  if (scaleBits === CODED_SCALE_BITS) {
    const grid = [...halves(new Uint16Array(checkpoint.read(names.superScale!).buffer))] as [number, number];
    if (!isScaleGrid(grid)) {
      throw fail(
        names.superScale!,
        `must hold a scale above 0 and a ratio of at least 1, got [${grid.join(", ")}]`,
      );
    }
  }
  if (scaleBits === ROTATED_SCALE_BITS) {
    const [scale] = halves(new Uint16Array(checkpoint.read(names.subScale!).buffer));
    if (!(scale! >= 0 && scale! < Infinity)) {
      throw fail(names.subScale!, `must hold a finite scale of at least 0, got ${scale}`);
    }
  }
  const used = new Set<string | undefined>(Object.values(names));
  const unused = [name, ...allPackedNames(name)].filter((part) => !used.has(part));
  for (const extra of unused) {
    if (checkpoint.tensors.has(extra)) throw fail(extra, `must not be there beside ${show(names.packed)}`);
  }
  const bytes = specBytes(specs);
  const form = {
    rows,
    cols,
    ...(experts === undefined ? {} : { experts }),
    bits,
    groupSize,
    zeroPointKind: zeroPoint,
    scaleBits,
    ...(isTrellis ? { codes: entry.codes } : {}),
    dtype,
  };
  return { name, ...form, tensors: names, bytes, bitsPerWeight: bytes * 8 / (rows * cols) };
}

function configFault(checkpoint: Checkpoint, reason: string, tensor?: string): FormatError {
  const path = join(checkpoint.folder, "config.json");
  return new FormatError(`Cannot read ${show(path)}: ${reason}`, { path, ...(tensor && { tensor }) });
}
