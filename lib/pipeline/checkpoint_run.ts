/** Options, identity and memory of a run, for quantizing and dequantizing a checkpoint. */
import { closeSync, statSync } from "node:fs";
import { basename, join } from "node:path";
import { CheckpointError, OutputError } from "../errors.ts";
import { inputError, openForReading, quote, readFully, reading } from "../files/positional.ts";
import { sha256 } from "../files/whole.ts";
import { checkNotInput, type OutputRequest, type SourceState } from "../output/output_folder.ts";
import { type Identity, type SourceFingerprint, TOOL_VERSION } from "../output/record.ts";
import type { RewriteFile } from "../output/rewrite.ts";
import { CHUNK_BYTES } from "../output/tensor_sink.ts";
import type { RunOptions } from "../progress.ts";
import { FORMAT_VERSION, TRELLIS_TABLE } from "../quant/packed/checkpoint.ts";
import {
  type Checkpoint,
  MAX_TENSORS,
  SafetensorsWriter,
  type TensorFile,
  type TensorSpec,
} from "../tensor/mod.ts";
import { type Beside, configText, outputName } from "./beside.ts";
import { sum } from "./run_report.ts";

/** Where a run writes. */
export interface OutputPlace {
  /** Folder that gets the result. */
  readonly output: string;
  /** Go on with a run that was stopped. */
  readonly resume?: boolean | undefined;
  /** Replace an output of this tool. Files that it did not write are never touched. */
  readonly force?: boolean | undefined;
}

/** Options of both directions. */
export interface CheckpointRun extends RunOptions, OutputPlace {
  /** A checkpoint: a folder or a `.safetensors` file. */
  readonly input: string;
}

/** Refuses empty paths: joined with a file's name they would mean the current folder. */
export function checkPaths({ input, output }: CheckpointRun): void {
  if (input === "") {
    throw new CheckpointError('Cannot open "": input must be a path, got an empty text', { path: input });
  }
  if (output === "") {
    throw new OutputError('Cannot write "": output must be a path, got an empty text', { path: output });
  }
}

/** Names of the files that a whole checkpoint has beside those that are copied. */
export const checkpointFiles = ({ files, indexFile }: Checkpoint): string[] => [
  ...files.map(({ name }) => name),
  ...(indexFile === undefined ? [] : [indexFile]),
  "config.json",
];

/**
 * The request for an output folder: what identifies the run, and every file that it will write.
 *
 * @param files that the run makes
 * @throws {RangeError} when both resume and force are given
 * @throws {OutputError} when the output is the input
 */
export function outputRequest(
  checkpoint: Checkpoint,
  { output, resume = false, force = false }: OutputPlace,
  { operation, settings }: { operation: Identity["operation"]; settings: Readonly<Record<string, unknown>> },
  { copied }: Beside,
  files: readonly string[] = checkpointFiles(checkpoint),
): OutputRequest {
  if (resume && force) {
    throw new RangeError(
      `Cannot write ${quote(output)}: give resume (go on) or force (start over), got both`,
    );
  }
  const config = configText(checkpoint);
  const source: SourceFingerprint = {
    files: checkpoint.files.map(({ name, file }) => ({
      name: basename(name),
      bytes: file.fileBytes,
      headerSha256: sha256(headerBytes(file)),
    })),
    configSha256: config === undefined ? null : sha256(config),
  };
  // Layers that were solved for other levels are not taken up.
  const table = settings["codes"] === "trellis" ? { trellis_table: TRELLIS_TABLE } : {};
  const text = JSON.stringify({ ...settings, format_version: FORMAT_VERSION, ...table });
  const request: OutputRequest = {
    path: output,
    identity: { operation, toolVersion: TOOL_VERSION, settings: text, source },
    sourceTimes: checkpoint.files.map(({ file: { path } }) =>
      Math.floor(reading(path, () => statSync(path)).mtimeMs)
    ),
    sourceState: () => sourceState(checkpoint),
    files: [
      ...files.map((name) => outputName(checkpoint, name)),
      ...copied.map(({ name }) => name),
    ],
    resume,
    force,
  };
  checkNotInput(checkpoint, output);
  return request;
}

function sourceState(checkpoint: Checkpoint): SourceState {
  const stats = checkpoint.files.map(({ file: { path } }) => reading(path, () => statSync(path)));
  const written = stats.map(({ size, mtimeMs, dev, ino }) => [size, mtimeMs, dev, ino]);
  return {
    written: JSON.stringify([written, configText(checkpoint)]),
    changed: stats.map(({ ctimeMs }) => ctimeMs),
    paths: checkpoint.files.map(({ file: { path } }) => path),
  };
}

/** The length and the header of a file, as they are. */
function headerBytes({ path, dataOffset }: TensorFile): Uint8Array {
  const bytes = new Uint8Array(dataOffset);
  const fd = openForReading(path);
  try {
    if (readFully(fd, bytes, 0, path) === bytes.length) return bytes;
  } finally {
    closeSync(fd);
  }
  throw inputError(path, new Error("the file became shorter"));
}

/**
 * The file of an output that stands where a checkpoint's file stands, with its metadata.
 *
 * @param specs what will be stored in it, at most
 * @param tensors whose content that is, in the order of the steps
 * @throws {CheckpointError} when no reader would take the file
 */
export function outputFile(
  checkpoint: Checkpoint,
  name: string,
  specs: Iterable<TensorSpec>,
  tensors: readonly string[],
): RewriteFile {
  const { metadata } = checkpoint.files.find((file) => file.name === name)!.file;
  return {
    name: outputName(checkpoint, name),
    metadata,
    reservedHeaderBytes: reservedHeaderBytes(checkpoint, name, specs, metadata),
    tensors,
  };
}

/** Bytes that the headers of an output's files take. */
export const headersBytes = (files: readonly RewriteFile[]): number =>
  sum(files.map(({ reservedHeaderBytes }) => reservedHeaderBytes + 8));

/** Room for a file's header. @throws {CheckpointError} when no reader would take the file */
function reservedHeaderBytes(
  { folder }: Checkpoint,
  name: string,
  specs: Iterable<TensorSpec>,
  metadata: Readonly<Record<string, string>>,
): number {
  try {
    return SafetensorsWriter.headerBytes(atMost(MAX_TENSORS, specs), metadata);
  } catch (cause) {
    if (!(cause instanceof RangeError)) throw cause;
    const path = join(folder, name);
    throw new CheckpointError(
      `Cannot write the tensors of ${quote(path)}: ${cause.message}; split the file into shards`,
      { path, cause },
    );
  }
}

function* atMost(most: number, specs: Iterable<TensorSpec>): Generator<TensorSpec> {
  let count = 0;
  for (const spec of specs) {
    if (++count > most) throw new RangeError(`a file must have at most ${most} tensors, got more`);
    yield spec;
  }
}

/** Memory that is used again for each chunk, grown when a row is longer. */
export function growingBuffer(): (bytes: number) => Uint8Array<ArrayBuffer> {
  let buffer = new Uint8Array(CHUNK_BYTES);
  return (bytes) => {
    if (buffer.length < bytes) buffer = new Uint8Array(bytes);
    return buffer;
  };
}
