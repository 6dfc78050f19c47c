/** Quantizing for another program: a packed checkpoint in a work folder, then the program's own file. */
import { rmSync } from "node:fs";
import { type Config, TARGETS } from "../config/mod.ts";
import { checkOutput } from "../output/output_folder.ts";
import { checkStreamedFile } from "../files/streamed_file.ts";
import { writing } from "../files/positional.ts";
import type { CheckpointRun } from "../pipeline/checkpoint_run.ts";
import type { Kernels } from "../native/mod.ts";
import {
  mergeCheckpoint,
  type MergeCheckpointOptions,
  openShards,
  planQuantization,
  quantizeCheckpoint,
  type QuantizeCheckpointOptions,
  type RunReport,
} from "../pipeline/mod.ts";
import { packedBytes, type PackedLayer } from "../quant/mod.ts";
import { packedNames } from "../quant/packed/entries.ts";
import { mergeLoras } from "../lora/mod.ts";
import { type Checkpoint, type FloatDtype, openCheckpoint, refuseForeign } from "../tensor/mod.ts";
import { exportCheckpoint, type ExportReport } from "./export_checkpoint.ts";
import { type ExportChoices, type ExportFormat, type ExportTensor, roundingRefused } from "./format.ts";
import { EXPORT_FORMATS } from "./formats.ts";
import { keptByTools } from "./gguf/image_model.ts";

/** How to quantize a checkpoint for the target that its configuration names. */
export type QuantizeForOptions = QuantizeCheckpointOptions & Partial<Pick<ExportChoices, "allowRounding">>;

/** Result of such a run. */
export interface QuantizeForReport {
  readonly quantized: RunReport;
  /** Undefined on a dry run. */
  readonly exported: ExportReport | undefined;
}

/** Folder of the packed checkpoint until the output is written; `--resume` goes on from it. */
const workFolder = (output: string): string => `${output.replace(/\/+$/, "")}.arrowquant`;

/**
 * Quantizes a checkpoint for a program. What the program cannot hold is refused before a weight is read; a
 * stopped run goes on where `resume` says so.
 *
 * @throws as {@linkcode quantizeCheckpoint} and {@linkcode exportCheckpoint}
 */
export async function quantizeFor(options: QuantizeForOptions): Promise<QuantizeForReport> {
  const { output, shard } = options, { config, format, isFolder } = await checkedTarget(options);
  if (shard !== undefined) {
    return { quantized: await quantizeCheckpoint({ ...options, config }), exported: undefined }; // the merge exports
  }
  const work = workFolder(output), own = { output, opensIn: format.openedBy };
  const quantized = { ...await quantizeCheckpoint({ ...options, config, output: work }), ...own };
  if (options.dryRun) return { quantized, exported: undefined };
  return { quantized, exported: await exportWork(format, isFolder, options) };
}

/** How to merge shards that were quantized for a program. */
export type MergeForOptions = MergeCheckpointOptions & Partial<Pick<ExportChoices, "allowRounding">> & {
  readonly kernels: Kernels;
};

/**
 * Brings shards together that were quantized for a program, into its own file or folder.
 *
 * @throws as {@linkcode mergeCheckpoint} and {@linkcode exportCheckpoint}
 */
export async function mergeFor(options: MergeForOptions): Promise<QuantizeForReport> {
  const { output } = options, { config } = openShards(options.shards);
  const { format, isFolder } = await checkedTarget({ ...options, config });
  const quantized = await mergeCheckpoint({ ...options, output: workFolder(output) });
  const exported = await exportWork(format, isFolder, options);
  return { quantized: { ...quantized, output, opensIn: format.openedBy }, exported };
}

/** Options that concern the program's file. */
type TargetOptions =
  & Pick<
    QuantizeForOptions,
    "input" | "output" | "variant" | "subfolder" | "loras" | "resume" | "force" | "allowRounding" | "shard"
  >
  & { readonly config: Config; readonly kernels?: Kernels | undefined };

/** Looks whether the target can hold what the plan says, and whether its output may be written. */
async function checkedTarget(options: TargetOptions) {
  const { input, output, allowRounding = false, force = false, resume = false } = options;
  const target = TARGETS[options.config.target!]!, { models } = target;
  const format = EXPORT_FORMATS.find(({ name }) => name === target.format)!;
  let { config } = options, isFolder: boolean;
  {
    using stored = openCheckpoint(input, { variant: options.variant, subfolder: options.subfolder });
    refuseForeign(stored, "quantize");
    using merged = options.loras?.length ? mergeLoras(stored, options.loras) : undefined;
    const checkpoint = merged?.checkpoint ?? stored;
    if (models === "image") config = withKept(config, [...checkpoint.tensors.keys()]);
    const source = { checkpoint, tensors: plannedTensors(checkpoint, config), kernels: options.kernels! };
    const content = await format.prepare(source, { allowRounding, types: [], models });
    const rounded = content.rows.filter(({ rounding }) => rounding !== undefined);
    if (rounded.length > 0 && !allowRounding) throw roundingRefused(source, format.name, rounded);
    isFolder = content.kind === "folder";
    if (options.shard !== undefined) return { config, format, isFolder };
    if (content.kind === "file") checkStreamedFile(output, content.bytes, force);
    else checkOutput({ path: output, files: [], resume, force });
  }
  return { config, format, isFolder };
}

/** Exports the packed checkpoint of the work folder, which is deleted then. */
async function exportWork(
  format: ExportFormat,
  isFolder: boolean,
  options: CheckpointRun & {
    readonly kernels?: Kernels | undefined;
    readonly allowRounding?: boolean | undefined;
  },
): Promise<ExportReport> {
  const { output, allowRounding = false, force = false, resume = false, signal, onProgress, onEvent } =
    options;
  const work = workFolder(output), kernels = options.kernels!;
  const events = { signal, onProgress, onEvent };
  const exported = await exportCheckpoint({
    input: work,
    output,
    format,
    kernels,
    allowRounding,
    force,
    resume: isFolder && resume, // a single file is written anew
    ...events,
  });
  writing("delete", work, () => rmSync(work, { recursive: true }));
  return exported;
}

/** The configuration, keeping what tools of image models never quantize unless it names its bits. */
function withKept(config: Config, names: readonly string[]): Config {
  const asked = { ...config.layerBitWidths, ...config.layerTypes };
  const isAsked = (name: string) =>
    Object.hasOwn(asked, name) || Object.hasOwn(asked, name.replace(/\.weight$/, ""));
  const kept = [...keptByTools(names)].filter((name) => name.endsWith(".weight") && !isAsked(name));
  const exact = kept.map((name) => `^${name.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&")}$`);
  return { ...config, keepPatterns: [...config.keepPatterns, ...exact] };
}

/** The tensors as the plan will leave them. */
function plannedTensors(checkpoint: Checkpoint, config: Config): ExportTensor[] {
  return planQuantization(checkpoint, config).rows.map((row): ExportTensor => {
    const { name, shape, file, bits, groupSize, zeroPoint, scaleBits } = row, bytes = row.bytesAfter;
    const plain = { name, shape, dtype: row.dtype, file, layer: undefined, bytes };
    if (bits === undefined) return plain;
    const [rows, cols] = shape as [number, number], dtype = row.dtype as FloatDtype;
    const form = { rows, cols, bits, groupSize: groupSize!, zeroPoint: zeroPoint!, scaleBits };
    const layer: PackedLayer = {
      ...{ ...form, name, dtype, zeroPointKind: form.zeroPoint, tensors: packedNames(name, form), bytes },
      bitsPerWeight: packedBytes(form) * 8 / (rows * cols),
    };
    return { ...plain, layer };
  });
}
