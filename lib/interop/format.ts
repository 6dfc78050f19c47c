/**
 * What a writer of other programs' files must say: which models and which packed tensors it can hold, and the
 * bytes. A format is one file that exports an {@linkcode ExportFormat}, and a line in formats.ts.
 */
import type { NamePattern } from "../config/mod.ts";
import { CheckpointError } from "../errors.ts";
import { quote } from "../files/positional.ts";
import type { Kernels } from "../native/mod.ts";
import type { PackedLayer } from "../quant/mod.ts";
import type { Checkpoint, Dtype, TensorSpec } from "../tensor/mod.ts";

/** A tensor of the model, packed or plain. */
export interface ExportTensor {
  /** Original name, as in `model.layers.0.mlp.up_proj.weight`. */
  readonly name: string;
  readonly shape: readonly number[];
  /** Element type, before quantization. */
  readonly dtype: Dtype;
  /** File of the input that holds it. */
  readonly file: string;
  /** Undefined where it is plain. */
  readonly layer: PackedLayer | undefined;
  /** Bytes that it takes in the input. */
  readonly bytes: number;
}

/** The model that is exported. */
export interface ExportSource {
  readonly checkpoint: Checkpoint;
  /** By file and place in the file. */
  readonly tensors: readonly ExportTensor[];
  readonly kernels: Kernels;
}

/** What a user asked for. */
export interface ExportChoices {
  /** Store what the format cannot hold exactly as near as it can. */
  readonly allowRounding: boolean;
  /** Kind of models that the program runs for which it is; undefined for any. */
  readonly models?: "language" | "image" | undefined;
  /** Types of tensors by patterns of their original names; the first that fits counts. */
  readonly types: readonly { readonly pattern: NamePattern; readonly type: string }[];
}

/** What becomes of one tensor. */
export interface ExportRow {
  readonly tensor: ExportTensor;
  /** Name in the output. */
  readonly name: string;
  /** How it is stored, in the format's words: `Q2_K`, `F16`, `pack-quantized`. */
  readonly type: string;
  /** Bytes in the output. */
  readonly bytes: number;
  /** Why it is stored otherwise than the rest of its kind, with values unchanged; it is listed. */
  readonly fallback?: string | undefined;
  /** Why its values change; without {@linkcode ExportChoices.allowRounding} that is an error. */
  readonly rounding?: string | undefined;
}

/** Bytes on their way into the output, in order. */
export interface Piece {
  /** Entry of the output that they belong to; undefined for a file's own parts. */
  readonly entry?: string | undefined;
  readonly bytes: ArrayBufferView<ArrayBuffer>;
  /** Weights that are stored with them, for progress. */
  readonly weights?: number | undefined;
}

interface Content {
  /** A row for each tensor that is stored. */
  readonly rows: readonly ExportRow[];
  /** Sentences for the user: what is left out, what another program must be told. */
  readonly notes?: readonly string[] | undefined;
}

/** One file, written from its start to its end. */
export interface FileContent extends Content {
  readonly kind: "file";
  /** Size of the file. */
  readonly bytes: number;
  /** The file, piece by piece in bounded memory; may be asked for again. */
  pieces(): Iterable<Piece>;
}

/** A folder of safetensors files, as the input's, with a config.json. */
export interface FolderContent extends Content {
  readonly kind: "folder";
  /** Entries that a row becomes, in the order of storage. */
  specs(row: ExportRow): readonly TensorSpec[];
  /** Bytes of a row's entries, each entry's in order; chunks of rows keep memory bounded. */
  pieces(row: ExportRow): Iterable<Piece>;
  /** The text of config.json, if there is one. @param text the input's, without quantization_config */
  config(text: string | undefined): string | undefined;
  /** More small files of the format's own, by name. */
  readonly files?: ReadonlyMap<string, string> | undefined;
}

/** A format that other programs read. */
export interface ExportFormat {
  /** Its name behind `--to`. */
  readonly name: string;
  /** Programs that open it, as a sentence's end: `llama.cpp, LM Studio`. */
  readonly openedBy: string;
  /**
   * Looks at the whole model before any work.
   *
   * @throws {CheckpointError} when the format cannot hold its family, tokenizer or widths; the message says
   * what it can
   */
  prepare(
    source: ExportSource,
    choices: ExportChoices,
  ): FileContent | FolderContent | Promise<FileContent | FolderContent>;
}

/** The error of a model that a format cannot hold. */
export function cannotHold(
  { checkpoint: { path } }: ExportSource,
  format: string,
  reason: string,
  tensor?: string,
): CheckpointError {
  const what = tensor === undefined ? quote(path) : `${quote(tensor)} of ${quote(path)}`;
  return new CheckpointError(`Cannot export ${what} to ${format}: ${reason}`, { path, tensor });
}

/** The error of tensors whose values would change, with the first ones and their reasons. */
export function roundingRefused(
  source: ExportSource,
  format: string,
  rows: readonly ExportRow[],
): CheckpointError {
  const shown = rows.slice(0, 8).map(({ tensor, rounding }) => `\n  ${quote(tensor.name)}: ${rounding}`);
  const more = rows.length > shown.length ? `\n  and ${rows.length - shown.length} more` : "";
  const remedy = "quantize for this target (quantize.ts --for), or give --allow-rounding";
  return cannotHold(
    source,
    format,
    `${rows.length} of ${source.tensors.length} tensors must be stored exactly, got values that it cannot hold: ` +
      `${remedy}${shown.join("")}${more}`,
    rows.length === 1 ? rows[0]!.tensor.name : undefined,
  );
}
