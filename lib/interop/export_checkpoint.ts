/** A checkpoint in, packed or plain, a file or folder of another program's format out. */
import { CheckpointError, OutputError } from "../errors.ts";
import { errorCode, quote } from "../files/positional.ts";
import type { Kernels } from "../native/mod.ts";
import { withoutQuantizationConfig } from "../output/config_file.ts";
import type { LayerRecord } from "../output/record.ts";
import { type RewriteContent, type RewriteJob, type RewriteStep, withRewrite } from "../output/rewrite.ts";
import { digestTensors } from "../output/source_digest.ts";
import { checkStreamedFile, StreamedFile } from "../files/streamed_file.ts";
import type { TensorSink } from "../output/tensor_sink.ts";
import { configText, copies, filesBeside, indexFiles, outputName } from "../pipeline/beside.ts";
import {
  checkPaths,
  checkpointFiles,
  type CheckpointRun,
  headersBytes,
  outputFile,
  outputRequest,
} from "../pipeline/checkpoint_run.ts";
import { sum } from "../pipeline/run_report.ts";
import { pause, stoppable } from "../progress.ts";
import { packedLayers, shapeOf } from "../quant/packed/checkpoint.ts";
import { specBytes } from "../quant/packed/entries.ts";
import { type Checkpoint, elementCount, openCheckpoint, refuseForeign } from "../tensor/mod.ts";
import {
  cannotHold,
  type ExportChoices,
  type ExportFormat,
  type ExportRow,
  type ExportSource,
  type ExportTensor,
  type FileContent,
  type FolderContent,
  roundingRefused,
} from "./format.ts";

/** How to export a checkpoint. */
export interface ExportCheckpointOptions extends CheckpointRun, Partial<ExportChoices> {
  readonly kernels: Kernels;
  readonly format: ExportFormat;
}

/** Result of an export. */
export interface ExportReport {
  readonly input: string;
  readonly output: string;
  readonly format: string;
  readonly openedBy: string;
  readonly rows: readonly ExportRow[];
  readonly notes: readonly string[];
  readonly weights: number;
  /** Bytes of the tensors before, and of all files that hold tensors after. */
  readonly bytesBefore: number;
  readonly bytesAfter: number;
  readonly bitsPerWeightOfAll: number;
}

/**
 * Exports a checkpoint, weights unchanged: what the format cannot hold is refused before anything is written.
 *
 * @throws {CheckpointError} when the format cannot hold the model, or a tensor only rounded and rounding is
 * not allowed
 * @throws {OutputError} when the output exists, is the input, or cannot be written; no half file is left
 * @throws {InterruptedError} when `signal` stopped it
 */
export async function exportCheckpoint(options: ExportCheckpointOptions): Promise<ExportReport> {
  const { input, output, format, kernels, allowRounding = false, types = [], onEvent } = options;
  checkPaths(options);
  using checkpoint = openCheckpoint(input);
  refuseForeign(checkpoint, "export");
  for (const message of checkpoint.notes) onEvent?.({ kind: "input", message });
  const source: ExportSource = { checkpoint, tensors: exportTensors(checkpoint), kernels };
  const stack = source.tensors.find(({ layer }) => layer?.experts !== undefined);
  if (stack !== undefined) {
    const reason =
      "a quantized tensor must be a matrix, got experts in one tensor: dequantize the checkpoint first";
    throw cannotHold(source, format.name, reason, stack.name);
  }
  const content = await format.prepare(source, { allowRounding, types });
  const rounded = content.rows.filter(({ rounding }) => rounding !== undefined);
  if (rounded.length > 0 && !allowRounding) throw roundingRefused(source, format.name, rounded);
  for (const { tensor: { name }, type, fallback, rounding } of content.rows) {
    const why = rounding ?? fallback;
    if (why !== undefined) onEvent?.({ kind: "fallback", message: `${name}: ${type}; ${why}` });
  }
  for (const message of content.notes ?? []) onEvent?.({ kind: "input", message });
  const bytesAfter = content.kind === "file"
    ? await writeFile(content, options)
    : await writeFolder(source, content, options);
  const weights = sum(content.rows.map(({ tensor: { shape } }) => elementCount(shape) ?? 0));
  return {
    input,
    output,
    format: format.name,
    openedBy: format.openedBy,
    rows: content.rows,
    notes: content.notes ?? [],
    weights,
    bytesBefore: sum(source.tensors.map(({ bytes }) => bytes)),
    bytesAfter,
    bitsPerWeightOfAll: weights === 0 ? 0 : sum(content.rows.map(({ bytes }) => bytes)) * 8 / weights,
  };
}

/** The tensors of a checkpoint by their original names: a packed one stands where its codes stand. */
function exportTensors(checkpoint: Checkpoint): ExportTensor[] {
  const layers = [...packedLayers(checkpoint).values()];
  const byCodes = new Map(layers.map((layer) => [layer.tensors.packed, layer]));
  const parts = new Set(layers.flatMap(({ tensors }) => Object.values(tensors) as (string | undefined)[]));
  return checkpoint.files.flatMap(({ name: file, file: { tensors } }) =>
    [...tensors.values()].flatMap((info): ExportTensor[] => {
      const layer = byCodes.get(info.name), { name, shape, dtype, byteLength: bytes } = info;
      if (layer === undefined) return parts.has(name) ? [] : [{ name, shape, dtype, file, layer, bytes }];
      return [{
        name: layer.name,
        shape: shapeOf(layer),
        dtype: layer.dtype,
        file,
        layer,
        bytes: layer.bytes,
      }];
    })
  );
}

/** Writes one file from its start to its end; stopped or failed, it leaves nothing. */
async function writeFile(content: FileContent, options: ExportCheckpointOptions): Promise<number> {
  const { output, input, resume = false, force = false, signal, onProgress } = options;
  if (resume) {
    throw new RangeError(`Cannot write ${quote(output)}: a single file is written anew, without resume`);
  }
  checkStreamedFile(output, content.bytes, force);
  const weights = sum(content.rows.map(({ tensor }) => elementCount(tensor.shape) ?? 0));
  const names = new Map(content.rows.map((row, i) => [row.name, i]));
  let weightsDone = 0;
  return await stoppable(signal, "nothing is left of it; repeat the command to start over", async () => {
    using file = new StreamedFile(output);
    try {
      for (const { bytes, entry, weights: stored = 0 } of content.pieces()) {
        file.write(bytes);
        weightsDone += stored;
        onProgress?.({
          tensor: entry ?? "",
          tensorsDone: names.get(entry ?? "") ?? 0,
          tensors: content.rows.length,
          weightsDone,
          weights,
          bytesDone: file.bytes,
          bytes: content.bytes,
          bytesResumed: 0,
        });
        await pause(signal);
      }
      if (file.bytes !== content.bytes) {
        throw new CheckpointError(
          `Cannot export ${quote(input)}: must make ${content.bytes} bytes, got ${file.bytes}`,
        );
      }
      return file.finish().bytes;
    } catch (error) {
      if (!(error instanceof OutputError) || !["ENOSPC", "EDQUOT"].includes(errorCode(error.cause) ?? "")) {
        throw error;
      }
      const left = content.bytes - file.bytes, { path, cause } = error;
      throw new OutputError(
        `Cannot write ${
          quote(output)
        }: no space left on the device (about ${left} more bytes are needed): free some ` +
          "or choose another folder",
        { path, cause },
      );
    }
  });
}

/** Writes a folder with the input's files, each tensor's entries in place of its own. */
async function writeFolder(
  source: ExportSource,
  content: FolderContent,
  options: ExportCheckpointOptions,
): Promise<number> {
  const { checkpoint } = source, { format, allowRounding = false, types = [] } = options;
  const beside = filesBeside(checkpoint, options);
  const settings = {
    to: format.name,
    allow_rounding: allowRounding,
    types: types.map(({ pattern, type }) => [String(pattern), type]),
  };
  const names = [...checkpointFiles(checkpoint), ...content.files?.keys() ?? []];
  const request = outputRequest(checkpoint, options, { operation: "export", settings }, beside, names);
  const byFile = Map.groupBy(content.rows, ({ tensor }) => tensor.file);
  const files = [...byFile].map(([name, rows]) => {
    const specs = rows.flatMap((row) => content.specs(row));
    return outputFile(checkpoint, name, specs, rows.map(({ tensor }) => tensor.name));
  });
  const outputBytes = sum(content.rows.map(({ bytes }) => bytes)) +
    sum(beside.copied.map(({ bytes }) => bytes)) + headersBytes(files);
  const job: RewriteJob = { request, files, outputBytes, failFast: true };
  const steps = new Map(content.rows.map((row) => [row.tensor.name, stepOf(row, source, content)]));
  const rewritten: RewriteContent = {
    steps,
    *smallFiles(records, tensorFiles) {
      yield* copies(beside, options);
      for (const [name, text] of content.files ?? []) {
        yield { name: outputName(checkpoint, name), content: text };
      }
      const text = configText(checkpoint);
      const config = content.config(text === undefined ? undefined : withoutQuantizationConfig(text));
      if (config !== undefined) yield { name: outputName(checkpoint, "config.json"), content: config };
      yield* indexFiles(checkpoint, records, tensorFiles);
    },
  };
  const { manifest } = await withRewrite(job, options, (output) => output.write(rewritten));
  return sum(files.map(({ name }) => manifest.files[name]?.bytes ?? 0));
}

/** The step that stores one row. */
function stepOf(row: ExportRow, { checkpoint }: ExportSource, content: FolderContent): RewriteStep {
  const { tensor: { name, shape, dtype, file, layer, bytes } } = row, weights = elementCount(shape) ?? 0;
  const parts = layer === undefined
    ? [name]
    : Object.values(layer.tensors).filter((part) => part !== undefined);
  const digest = (between?: () => Promise<void>) => digestTensors(checkpoint, parts, between);
  const run = async (sink: TensorSink): Promise<LayerRecord> => {
    const specs = content.specs(row);
    sink.begin(specs);
    for (const { entry, bytes: data, weights: stored = 0 } of content.pieces(row)) {
      sink.write(entry ?? specs[0]!.name, data);
      await sink.advance(stored, Math.round(bytes * stored / Math.max(1, weights)));
    }
    return {
      name,
      file: outputName(checkpoint, file),
      action: "export",
      reason: row.type,
      dtype,
      shape,
      bits: layer?.bits,
      groupSize: layer?.groupSize,
      scaleBits: layer?.scaleBits,
      bytesBefore: bytes,
      bytesAfter: specBytes(specs),
      sourceSha256: await digest(),
    };
  };
  return { name, weights, bytes, digest, run };
}
