/**
 * Folders of safetensors whose packed layers become another program's entries: what a format of that kind
 * must say, and what all of them share. A layer that the format has no place for is stored plain.
 */
import { withConfigKey } from "../output/config_file.ts";
import { rowsPerChunk } from "../pipeline/quantize_tensor.ts";
import { convertFloats, dequantize, type PackedLayer, type PackedTensor } from "../quant/mod.ts";
import { readPackedTensor, rowsAtOnce } from "../quant/packed/checkpoint.ts";
import { specBytes } from "../quant/packed/entries.ts";
import {
  BYTES_PER_ELEMENT,
  type Dtype,
  elementCount,
  type FloatDtype,
  isFloatDtype,
  type TensorSpec,
} from "../tensor/mod.ts";
import {
  cannotHold,
  type ExportFormat,
  type ExportRow,
  type ExportSource,
  type ExportTensor,
  type FolderContent,
  type Piece,
} from "./format.ts";

type Bytes = ArrayBufferView<ArrayBuffer>;

/** How a format stores a packed layer. */
export interface StoredLayer {
  /** In the format's words. */
  readonly type: string;
  /** Its entries, in the order of storage. */
  readonly specs: readonly TensorSpec[];
  /** Bytes of the first entries, of some whole rows or of the whole layer. */
  readonly encode: (part: PackedTensor, source: ExportSource) => readonly Bytes[];
  /** Bytes of the others, which are the same whatever the weights. */
  readonly constants?: readonly Bytes[];
  /** Entries that do not go by rows: the layer is encoded as one piece. */
  readonly isWhole?: boolean;
  /** Why its values change. */
  readonly rounding?: string | undefined;
}

/** How a format stores a plain matrix that it quantizes itself. */
export interface QuantizedMatrix extends Pick<StoredLayer, "type" | "specs" | "constants"> {
  /** Bytes of the first entries, of some whole rows of `cols` weights. */
  readonly quantize: (weights: Float32Array<ArrayBuffer>, cols: number) => readonly Bytes[];
}

/** Why a layer is stored plain: the format has no place for such a layer, or none for its grid. */
export type NotStored = { readonly noPlace: string } | { readonly otherGrid: string };

/** A packed layer that is stored as the format's own. */
export interface PackedRow extends ExportRow {
  readonly layer: PackedLayer;
}

/** What a format says. */
export interface PackedFolder {
  readonly name: string;
  readonly openedBy: string;
  /** Models that its programs run, if not both. */
  readonly runs?: "language" | "image";
  readonly store: (layer: PackedLayer) => StoredLayer | NotStored;
  /** Storage of a plain matrix for which a type is asked, or the reason why it cannot have that. */
  readonly quantize?: (tensor: ExportTensor, type: string) => QuantizedMatrix | string;
  /** New keys of config.json. @param packed the format's own layers @param kept all other tensors */
  readonly config: (
    packed: readonly PackedRow[],
    kept: readonly ExportRow[],
  ) => Readonly<Record<string, unknown>>;
  /** Sentences for the user. */
  readonly notes?: (packed: readonly PackedRow[]) => readonly string[];
}

/** Module of a tensor: its name without `.weight`. */
export const moduleOf = (name: string): string => name.replace(/\.weight$/, "");

/** A grid in words. */
export function gridText({ bits, groupSize, scaleBits, zeroPointKind, codes }: PackedLayer): string {
  const scales = scaleBits === undefined
    ? `${zeroPointKind} zero points`
    : codes === "trellis"
    ? "trellis codes"
    : scaleBits === 16
    ? "offsets"
    : `two-level scales of ${scaleBits} bits`;
  return `${bits} bits, groups of ${groupSize === 0 ? "a whole row" : groupSize}, ${scales}`;
}

/** The format that a description makes. */
export function packedFolder(
  { name: format, openedBy, runs, store, quantize, config, notes }: PackedFolder,
): ExportFormat {
  return {
    name: format,
    openedBy,
    prepare(source, { allowRounding, types }): FolderContent {
      const kind = modelsOf(source);
      if (runs !== undefined && kind !== undefined && kind !== runs) {
        throw cannotHold(
          source,
          format,
          `${openedBy} must get ${article(runs)} model, got ${article(kind)} model`,
        );
      }
      const stored = new Map<string, StoredLayer | QuantizedMatrix>();
      const rows = source.tensors.map((tensor): ExportRow => {
        const { name, shape, dtype, bytes, layer } = tensor;
        const asked = types.find(({ pattern }) => pattern.test(name))?.type;
        if (isPlain(asked) && isFloatDtype(dtype)) {
          const isExact = asked === "F32" ? dtype !== "F64" : asked === dtype && layer === undefined;
          const size = (elementCount(shape) ?? 0) * BYTES_PER_ELEMENT[asked];
          return {
            tensor,
            name,
            type: asked,
            bytes: size,
            rounding: isExact ? undefined : `${asked} is asked for`,
          };
        }
        if (asked !== undefined) {
          const found = quantize?.(tensor, asked) ?? "its layers have the types that they were quantized for";
          if (typeof found === "string") throw cannotHold(source, format, `as ${asked}: ${found}`, name);
          stored.set(name, found);
          return { tensor, name, type: found.type, bytes: specBytes(found.specs) };
        }
        if (layer === undefined) return { tensor, name, type: dtype, bytes };
        const found = store(layer);
        if ("specs" in found) {
          stored.set(name, found);
          const { type, specs, rounding } = found;
          return { tensor, name, type, bytes: specBytes(specs), rounding };
        }
        const elements = elementCount(shape) ?? 0;
        if ("noPlace" in found) {
          return {
            tensor,
            name,
            type: "F32",
            bytes: elements * 4,
            fallback: `${found.noPlace}: stored as float32`,
          };
        }
        const type = allowRounding ? plainType(dtype) : "F32",
          rounding = `${found.otherGrid}: stored as ${type}`;
        return { tensor, name, type, bytes: elements * BYTES_PER_ELEMENT[type], rounding };
      });
      const isOwn = (row: ExportRow) => stored.has(row.name);
      const packed = rows.flatMap((row): PackedRow[] => {
        const { layer } = row.tensor;
        return isOwn(row) && layer !== undefined ? [{ ...row, layer }] : [];
      });
      const keys = Object.entries(config(packed, rows.filter((row) => !isOwn(row))));
      return {
        kind: "folder",
        rows,
        notes: notes?.(packed),
        specs: (row) => stored.get(row.name)?.specs ?? [plainSpec(row)],
        pieces: (row) => pieces(source, row, stored.get(row.name)),
        config: (text) => keys.reduce((all, [key, value]) => withConfigKey(all, key, value), text ?? "{}\n"),
      };
    },
  };
}

const article = (kind: string) => kind === "image" ? "an image" : `a ${kind}`;

/** Whether a model writes or draws, where its config.json tells. */
function modelsOf({ checkpoint: { kind, config } }: ExportSource): "language" | "image" | undefined {
  if (kind === "dit" || config?.["_class_name"] !== undefined) return "image";
  return kind !== "unknown" || config?.["vocab_size"] !== undefined ? "language" : undefined;
}

const plainType = (dtype: string): "F32" | "F16" | "BF16" =>
  dtype === "F16" || dtype === "BF16" ? dtype : "F32";

const isPlain = (type: string | undefined): type is "F32" | "F16" | "BF16" =>
  ["F32", "F16", "BF16"].includes(type ?? "");

const plainSpec = ({ name, type, tensor: { shape } }: ExportRow): TensorSpec => ({
  ...{ name, shape },
  dtype: type as Dtype,
});

/** Bytes of a row's entries, in chunks of rows where they go by rows. */
function* pieces(
  source: ExportSource,
  row: ExportRow,
  stored: StoredLayer | QuantizedMatrix | undefined,
): Generator<Piece> {
  const { checkpoint, kernels } = source, { name, shape, dtype, layer } = row.tensor;
  const elements = elementCount(shape) ?? 0, rows = shape[0] ?? 1, cols = elements / Math.max(1, rows);
  const width = cols * BYTES_PER_ELEMENT[dtype],
    isWhole = stored !== undefined && "isWhole" in stored && stored.isWhole;
  const encoded = (begin: number, end: number): readonly Bytes[] => {
    if (layer !== undefined) {
      const part = readPackedTensor(checkpoint, layer, begin, end);
      return stored !== undefined && "encode" in stored
        ? stored.encode(part, source)
        : [dequantize(kernels, part, row.type as "F32")];
    }
    const data = checkpoint.read(name, begin * width, end * width);
    const weights = { data, dtype: dtype as FloatDtype }, count = (end - begin) * cols;
    if (stored === undefined || !("quantize" in stored)) {
      return [row.type === dtype ? data : convertFloats(kernels, weights, count, row.type as FloatDtype)];
    }
    return stored.quantize(new Float32Array(convertFloats(kernels, weights, count, "F32").buffer), cols);
  };
  const chunk = isWhole ? rows : rowsPerChunk(Math.max(1, cols), 4);
  const step = layer === undefined ? chunk : rowsAtOnce(layer, chunk);
  for (let begin = 0; begin < rows && elements > 0; begin += step) {
    const end = Math.min(rows, begin + step);
    let weights = (end - begin) * cols;
    for (const [i, bytes] of encoded(begin, end).entries()) {
      yield { entry: stored?.specs[i]?.name ?? name, bytes, weights };
      weights = 0;
    }
  }
  const { specs = [], constants = [] } = stored ?? {};
  for (const [i, bytes] of constants.entries()) yield { entry: specs.at(i - constants.length)!.name, bytes };
}
