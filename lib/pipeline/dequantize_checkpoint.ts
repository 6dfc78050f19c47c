/** Quantized checkpoint in, plain checkpoint out. */
import { CheckpointError } from "../errors.ts";
import { quote } from "../files/positional.ts";
import type { Kernels } from "../native/mod.ts";
import { withoutAnyQuantization } from "../output/config_file.ts";
import { opensIn } from "../output/readers.ts";
import { type RewriteContent, type RewriteJob, type RewriteStep, withRewrite } from "../output/rewrite.ts";
import { type PackedLayer, packedLayers, shapeOf } from "../quant/packed/checkpoint.ts";
import {
  BYTES_PER_ELEMENT,
  type Checkpoint,
  elementCount,
  openCheckpoint,
  refuseForeign,
  type TensorSpec,
} from "../tensor/mod.ts";
import { configText, copies, filesBeside, indexFiles, namesBeside, outputName } from "./beside.ts";
import {
  checkPaths,
  type CheckpointRun,
  growingBuffer,
  headersBytes,
  outputFile,
  outputRequest,
} from "./checkpoint_run.ts";
import { rewriteDequantized } from "./dequantize_tensor.ts";
import { type RunReport, sum, writtenReport } from "./run_report.ts";
import { digestTensors } from "../output/source_digest.ts";

/** How to dequantize a checkpoint. */
export interface DequantizeCheckpointOptions extends CheckpointRun {
  /** The opened kernels. */
  readonly kernels: Kernels;
  /** Element type of the result; by default each tensor's own before it was quantized. */
  readonly dtype?: "F32" | "F16" | "BF16" | undefined;
}

/** A tensor of the result: a layer dequantized, or a tensor as it is. */
interface Target {
  readonly spec: TensorSpec;
  readonly layer: PackedLayer | undefined;
}

/**
 * Turns a quantized checkpoint of ours, or a GGUF file, into a plain one, which any safetensors reader
 * understands.
 *
 * @throws as {@linkcode quantizeCheckpoint}; {@linkcode CheckpointError} when nothing in it is quantized
 */
export async function dequantizeCheckpoint(options: DequantizeCheckpointOptions): Promise<RunReport> {
  const { input, output, kernels } = options;
  checkPaths(options);
  using checkpoint = openCheckpoint(input);
  if (!checkpoint.isDecoded) refuseForeign(checkpoint, "dequantize");
  for (const message of checkpoint.notes) options.onEvent?.({ kind: "input", message });
  const targets = targetsOf(checkpoint, options);
  const beside = filesBeside(checkpoint, options);
  const settings = { dtype: options.dtype ?? "original" };
  const request = outputRequest(checkpoint, options, { operation: "dequantize", settings }, beside);
  const files = [...targets].map(([name, own]) => {
    const specs = own.map(({ spec }) => spec);
    return outputFile(checkpoint, name, specs, specs.map((spec) => spec.name));
  });
  const tensorBytes = [...targets.values()].flat().map(({ spec }) => bytesOf(spec));
  const outputBytes = headersBytes(files) + sum(tensorBytes) +
    sum(beside.copied.map(({ bytes }) => bytes));
  const job: RewriteJob = { request, files, outputBytes, failFast: true };
  const context = { checkpoint, kernels, buffer: growingBuffer() };
  const steps = [...targets].flatMap(([file, own]) =>
    own.map(({ spec, layer }): [string, RewriteStep] => {
      const sources = layer === undefined ? [spec.name] : Object.values(layer.tensors).filter((name) => name);
      const digest = (between?: () => Promise<void>) => digestTensors(checkpoint, sources, between);
      return [spec.name, {
        name: spec.name,
        weights: layer === undefined && spec.dtype === checkpoint.tensors.get(spec.name)!.info.dtype
          ? 0
          : elementCount(spec.shape) ?? 0,
        bytes: bytesOf(spec),
        digest,
        run: async (sink) => ({
          ...await rewriteDequantized(spec, layer, outputName(checkpoint, file), sink, context),
          sourceSha256: await digest(),
        }),
      }];
    })
  );
  const content: RewriteContent = {
    steps: new Map(steps),
    *smallFiles(records, tensorFiles) {
      yield* copies(beside, options);
      const config = configText(checkpoint);
      if (config !== undefined) {
        yield { name: outputName(checkpoint, "config.json"), content: withoutAnyQuantization(config) };
      }
      yield* indexFiles(checkpoint, records, tensorFiles);
    },
  };
  return {
    input,
    output,
    modelKind: checkpoint.kind,
    opensIn: opensIn(checkpoint.kind, undefined),
    plan: { rows: [], warnings: [] },
    ...namesBeside(beside),
    ...writtenReport(checkpoint, await withRewrite(job, options, (rewrite) => rewrite.write(content))),
    backend: kernels.describe(),
    threads: kernels.threads,
  };
}

/** The tensors of the result by file: a plain tensor takes the place of its codes, its other parts vanish. */
function targetsOf(
  checkpoint: Checkpoint,
  { dtype }: DequantizeCheckpointOptions,
): Map<string, readonly Target[]> {
  const layers = packedLayers(checkpoint);
  if (layers.size === 0 && !checkpoint.isDecoded) {
    throw new CheckpointError(
      `Cannot dequantize ${quote(checkpoint.path)}: must hold quantized tensors, got none`,
      {
        path: checkpoint.path,
      },
    );
  }
  const all = [...layers.values()];
  const byCodes = new Map(all.map((layer) => [layer.tensors.packed, layer]));
  const parts = new Set(all.flatMap(({ tensors }) => Object.values(tensors) as (string | undefined)[]));
  return new Map(checkpoint.files.map(({ name, file }) => [
    name,
    [...file.tensors.values()].flatMap((info): Target[] => {
      const layer = byCodes.get(info.name);
      if (layer === undefined) {
        const own = info.stored === undefined ? info.dtype : dtype ?? info.dtype;
        return parts.has(info.name) ? [] : [{ spec: { ...info, dtype: own }, layer }];
      }
      const shape = shapeOf(layer);
      return [{ spec: { name: layer.name, dtype: dtype ?? plainDtype(layer.dtype), shape }, layer }];
    }),
  ]));
}

/** Type that a dequantized tensor gets: its own, or the nearest one that the kernels write. */
function plainDtype(dtype: string): "F32" | "F16" | "BF16" {
  if (dtype === "F16" || dtype === "BF16") return dtype;
  return dtype.startsWith("F8") ? "F16" : "F32";
}

const bytesOf = ({ dtype, shape }: TensorSpec): number =>
  (elementCount(shape) ?? 0) * BYTES_PER_ELEMENT[dtype];
