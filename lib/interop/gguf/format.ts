/** GGUF, the files of llama.cpp and of what is built on ggml. */
import { MADE_BY } from "../../files/results.ts";
import { cannotHold, type ExportFormat, type ExportSource, type FileContent, type Piece } from "../format.ts";
import { ALIGNMENT, ggufHeader, type GgufMetadata, type GgufValue, padding, text, u32 } from "./container.ts";
import { IMAGE_FAMILIES } from "../../names/image_families.ts";
import { imageGguf, isImageModel } from "./image_model.ts";
import { type GgufModel, languageModel } from "./language_model.ts";
import { ggufPieces, type GgufRow, ggufRow } from "./tensors.ts";
import type { GgmlType } from "./types.ts";

/** `general.file_type` by the type of most weights (llama.h, LLAMA_FTYPE). */
const FILE_TYPES: Readonly<Record<GgmlType, number>> = {
  ...{
    F32: 0,
    F16: 1,
    Q4_0: 2,
    Q4_1: 3,
    Q8_0: 7,
    Q2_K: 10,
    Q3_K: 12,
    Q4_K: 15,
    Q6_K: 18,
    BF16: 32,
    Q2_0: 41,
  },
};

/** Descriptions of models, the first that knows one; a family is a function here. */
const MODELS: readonly {
  readonly models: "language" | "image";
  /** What there is, for a message. */
  readonly families: string;
  readonly isFor: (source: ExportSource) => boolean;
  readonly describe: (source: ExportSource) => GgufModel;
}[] = [
  {
    models: "language",
    families: "Dream, LLaDA",
    isFor: ({ checkpoint: { kind } }) => kind === "dream" || kind === "llada",
    describe: languageModel,
  },
  {
    models: "image",
    families: IMAGE_FAMILIES.map(({ name }) => name).join(", "),
    isFor: isImageModel,
    describe: imageGguf,
  },
];

export const GGUF: ExportFormat = {
  name: "gguf",
  openedBy: "llama.cpp and what is built on it; image models: ComfyUI-GGUF, stable-diffusion.cpp, diffusers",
  prepare(source, choices): FileContent {
    const held = MODELS.filter(({ models }) => choices.models === undefined || models === choices.models);
    const model = held.find(({ isFor }) => isFor(source));
    if (model === undefined) {
      const families = held.map(({ families }) => families).join(", ");
      const other = MODELS.some(({ isFor }) => isFor(source)) ? "a model for other programs" : "another one";
      throw cannotHold(source, "gguf", `the family must be one of ${families}, got ${other}`);
    }
    const { metadata, entries, notes, maxName } = model.describe(source);
    const rows = entries.map((entry) => ggufRow(source, entry, choices, maxName));
    const header = ggufHeader(withGeneral(metadata, rows), rows);
    const bytes = rows.reduce((sum, row) => sum + row.bytes + padding(row.bytes), header.length);
    function* pieces(): Generator<Piece> {
      yield { bytes: header };
      for (const row of rows) {
        yield* ggufPieces(source, row);
        if (padding(row.bytes) > 0) yield { bytes: new Uint8Array(padding(row.bytes)) };
      }
    }
    return { kind: "file", rows, notes, bytes, pieces };
  },
};

/** The metadata with what every file says of itself, in front of long lists. */
function withGeneral(own: GgufModel["metadata"], rows: readonly GgufRow[]): GgufMetadata {
  const bytes = (type: GgmlType) => rows.reduce((sum, row) => sum + (row.type === type ? row.bytes : 0), 0);
  const most = rows.map(({ type }) => type).toSorted((a, b) => bytes(b) - bytes(a))[0] ?? "F32";
  const general: [string, GgufValue][] = [
    ["general.quantized_by", text(MADE_BY)],
    ["general.quantization_version", u32(2)],
    ["general.file_type", u32(FILE_TYPES[most])],
    ["general.alignment", u32(ALIGNMENT)],
  ];
  return new Map([...own.slice(0, 1), ...general, ...own.slice(1)]);
}
