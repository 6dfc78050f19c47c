/** `inspect.ts PATH`: what a checkpoint contains, ours or any; against its original, what quantizing cost. */
import { isJsonObject } from "../lib/files/json.ts";
import { join } from "node:path";
import { exists, kindOf } from "../lib/files/whole.ts";
import { CheckpointError } from "../lib/errors.ts";
import { runLimits } from "../lib/models/mod.ts";
import type { Kernels } from "../lib/native/mod.ts";
import { MANIFEST_FILE, type Mismatch, opensIn, readManifest, verifyFiles } from "../lib/pipeline/mod.ts";
import {
  addStatistics,
  cosine,
  type ErrorStatistics,
  errorStatistics,
  packedErrorStatistics,
  relativeRmsError,
} from "../lib/quant/mod.ts";
import {
  type PackedLayer,
  packedLayers,
  readPackedTensor,
  rowsAtOnce,
  shapeOf,
} from "../lib/quant/packed/checkpoint.ts";
import {
  BYTES_PER_ELEMENT,
  type Checkpoint,
  CONFIG_KEY,
  elementCount,
  type GgufFacts,
  isFloatDtype,
  openCheckpoint,
} from "../lib/tensor/mod.ts";
import type { Arguments, Usage } from "./_command/options.ts";
import { ProgressDisplay } from "./_command/progress.ts";
import {
  chosenKernels,
  type Context,
  defineCommand,
  EXIT_CODES,
  KERNEL_OPTIONS,
  MODEL_OPTIONS,
  stopIfAsked,
} from "./_command/run.ts";
import { openCommandKernels } from "./_command/signals.ts";
import { formatBytes, formatCells } from "../lib/eval/table.ts";
import { formatCount, print, printable, printJson } from "./_command/text.ts";

const USAGE = {
  name: "inspect.ts",
  operands: "PATH",
  about: "Prints what a checkpoint (a folder, a .safetensors or a .gguf file) contains.",
  options: {
    "What is looked at": "",
    "--against ORIGINAL": "also the error of each tensor against this checkpoint",
    "--verify": "hold every file against the manifest: size and SHA-256",
    ...MODEL_OPTIONS,
    "Machine and output": "",
    ...KERNEL_OPTIONS,
    "--json": "print JSON",
  },
  examples: {
    "MODEL": "tensors, types and sizes, and what stands in the way of quantizing",
    "OUT --against MODEL": "what quantizing cost, layer by layer",
    "OUT --verify": "whether every byte is as it was written",
  },
} as const satisfies Usage;

/** Bytes of the original read at once, in whole rows. */
const CHUNK_BYTES = 8 * 2 ** 20;

/** A tensor of the checkpoint, or a quantized one that several entries make up. */
interface Row {
  readonly name: string;
  readonly file: string;
  /** Element type, of a quantized tensor the one before. */
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly bytes: number;
  readonly weights: number;
  readonly bitsPerWeight: number;
  readonly bits?: number;
  readonly groupSize?: number;
  /** Of plain scales. */
  readonly zeroPoint?: string;
  /** Of two-level scales. */
  readonly scaleBits?: number;
  readonly codes?: string;
  error?: { readonly relativeRms: number; readonly cosine: number; readonly max: number };
  /** Why there is no error although one was asked for. */
  note?: string;
}

async function run(parsed: Arguments<typeof USAGE>, { signal }: Context): Promise<number> {
  const { flags, values } = parsed, [path] = parsed.operands("PATH");
  const chosen = await chosenKernels(values, new ProgressDisplay(false).log);

  using checkpoint = openCheckpoint(path, { variant: values.variant, subfolder: values.subfolder });
  const { foreign } = checkpoint;
  const layers = foreign === undefined ? packedLayers(checkpoint) : new Map<string, PackedLayer>();
  const notes = [...checkpoint.notes, ...recognised(checkpoint)];
  const rows = describe(checkpoint, layers);
  using kernels = await openCommandKernels(chosen);
  if (values.against !== undefined) {
    using original = openCheckpoint(values.against);
    for (const row of rows) {
      Object.assign(row, await compare(row, checkpoint, layers.get(row.name), original, kernels));
      await stopIfAsked(signal);
    }
  }

  const folder = kindOf(path) === "folder" ? checkpoint.root : undefined;
  const manifest = folder === undefined ? undefined : readManifest(folder);
  let mismatches: Mismatch[] | undefined;
  if (flags.verify) {
    if (manifest === undefined || folder === undefined) {
      const got = folder !== undefined && exists(join(folder, MANIFEST_FILE))
        ? "one that was changed since"
        : "none";
      const reason = `must have a manifest as this tool wrote it, got ${got}`;
      throw new CheckpointError(`Cannot verify "${path}": ${reason}`, { path });
    }
    mismatches = await verifyFiles(folder, manifest);
  }

  const quantized = rows.filter((row) => row.bits !== undefined);
  const { gguf } = checkpoint, readers = readersOf(checkpoint, quantized.length > 0);
  const sum = (of: readonly Row[], key: "bytes" | "weights") =>
    of.reduce((total, row) => total + row[key], 0);
  const totals = {
    files: checkpoint.files.length,
    fileBytes: checkpoint.files.reduce((total, { file }) => total + file.fileBytes, 0),
    tensors: rows.length,
    weights: sum(rows, "weights"),
    quantizedTensors: quantized.length,
    quantizedWeights: sum(quantized, "weights"),
    bitsPerWeight: quantized.length === 0 ? null : sum(quantized, "bytes") * 8 / sum(quantized, "weights"),
    bitsPerWeightOfAll: sum(rows, "weights") === 0 ? null : sum(rows, "bytes") * 8 / sum(rows, "weights"),
  };
  if (flags.json) {
    printJson({
      path,
      modelKind: checkpoint.kind,
      opensIn: readers,
      notes,
      files: checkpoint.files.map(({ name, file: { fileBytes: bytes, metadata } }) => ({
        name,
        bytes,
        metadata,
      })),
      gguf: gguf && { version: gguf.version, keys: Object.fromEntries(keysOf(gguf)) },
      totals,
      backend: kernels.describe(),
      hasManifest: manifest !== undefined,
      mismatches,
      tensors: rows,
    });
  } else {printReport(
      path,
      { ...checkpoint, notes, opensIn: readers, gguf },
      rows,
      totals,
      kernels,
      mismatches,
    );}

  return mismatches === undefined || mismatches.length === 0 ? 0 : EXIT_CODES.AQ_INTEGRITY;
}

/** Keys of a GGUF file; numbers beyond 2^53 as texts. */
function keysOf({ keys }: GgufFacts): [string, unknown][] {
  const plain = (value: unknown) => typeof value === "bigint" ? String(value) : value;
  return [...keys].map(([key, { type, value, length }]) => {
    const shown = Array.isArray(value) ? value.map(plain) : plain(value);
    return [key, shown === undefined ? { type, length } : shown];
  });
}

/** Reasons against quantizing the weights, or running the model. */
function recognised(checkpoint: Checkpoint): string[] {
  if (checkpoint.foreign !== undefined) return [`the weights are not plain: ${checkpoint.foreign}`];
  const limits = runLimits(checkpoint);
  return limits === undefined ? [] : [`the model does not run here: ${limits.message}`];
}

/** Every tensor by its original name, in the order of the files. */
function describe(checkpoint: Checkpoint, layers: ReadonlyMap<string, PackedLayer>): Row[] {
  const byPart = new Map(
    [...layers.values()].flatMap((layer) =>
      Object.values(layer.tensors).map((name: string | undefined) => [name, layer] as const)
    ),
  );
  return checkpoint.files.flatMap(({ name: file, file: { tensors } }) =>
    [...tensors.values()].flatMap((info): Row[] => {
      const layer = byPart.get(info.name);
      if (layer === undefined) {
        const { name, shape, elements: weights, stored } = info;
        const { type: dtype, bytes } = stored ?? { type: info.dtype, bytes: info.byteLength };
        const bitsPerWeight = stored && weights > 0 ? bytes * 8 / weights : BYTES_PER_ELEMENT[info.dtype] * 8;
        return [{ name, file, dtype, shape, bytes, weights, bitsPerWeight }];
      }
      if (info.name !== layer.tensors.packed) return [];
      const { name, dtype, rows, cols, bytes, bitsPerWeight, bits, groupSize, scaleBits, codes } = layer;
      return [{
        ...{ name, file, dtype, shape: shapeOf(layer), bytes, weights: rows * cols, bitsPerWeight },
        ...{
          bits,
          groupSize,
          ...(scaleBits === undefined ? { zeroPoint: layer.zeroPointKind } : { scaleBits }),
          ...(codes === undefined ? {} : { codes }),
        },
      }];
    })
  );
}

/** Programs that read a checkpoint as it is. */
function readersOf({ kind, config, foreign, gguf }: Checkpoint, isPacked: boolean): string {
  const section = config?.[CONFIG_KEY], method = isJsonObject(section) ? section["quant_method"] : "";
  if (gguf !== undefined) return opensIn(kind, "gguf");
  const isPlain = foreign === undefined && !isPacked;
  return opensIn(kind, isPlain ? undefined : typeof method === "string" && method || "its form");
}

/** Most keys of a GGUF file that are printed; --json has all. */
const SHOWN_KEYS = 60;

function shownValue(value: unknown): string {
  const text = JSON.stringify(value) ?? "";
  return text.length > 80 ? `${text.slice(0, 80)}…` : text;
}

/** A row's error against the original tensor of the same name, or why there is none. */
async function compare(
  row: Row,
  checkpoint: Checkpoint,
  layer: PackedLayer | undefined,
  original: Checkpoint,
  kernels: Kernels,
): Promise<Pick<Row, "error" | "note">> {
  const source = original.tensors.get(row.name)?.info;
  if (source === undefined) return { note: "not in the original" };
  if (source.shape.join() !== row.shape.join()) {
    return { note: `shape [${source.shape.join(", ")}] in the original` };
  }
  const own = layer === undefined ? checkpoint.tensors.get(row.name)!.info.dtype : layer.dtype;
  if (!isFloatDtype(source.dtype) || !isFloatDtype(own)) return { note: "not floating" };
  const rows = row.shape[0] ?? 1;
  const cols = elementCount(row.shape.slice(1)) ?? 0;
  const [width, ownWidth] = [BYTES_PER_ELEMENT[source.dtype] * cols, BYTES_PER_ELEMENT[own] * cols];
  const chunk = Math.max(1, Math.floor(CHUNK_BYTES / Math.max(1, width)));
  const step = layer === undefined ? chunk : rowsAtOnce(layer, chunk);
  let statistics: ErrorStatistics | undefined;
  for (let begin = 0; begin < rows && cols > 0; begin += step) {
    const end = Math.min(rows, begin + step);
    const weights = { data: original.read(row.name, begin * width, end * width), dtype: source.dtype };
    const ofChunk = layer === undefined
      ? errorStatistics(
        kernels,
        weights,
        { data: checkpoint.read(row.name, begin * ownWidth, end * ownWidth), dtype: own },
        (end - begin) * cols,
      )
      : packedErrorStatistics(kernels, weights, readPackedTensor(checkpoint, layer, begin, end));
    statistics = statistics === undefined ? ofChunk : addStatistics(statistics, ofChunk);
    await new Promise((resolve) => setTimeout(resolve)); // lets a signal in
  }
  if (statistics === undefined) return {};
  const relativeRms = relativeRmsError(statistics);
  return { error: { relativeRms, cosine: cosine(statistics), max: statistics.maxError } };
}

function printReport(
  path: string,
  checkpoint: Pick<Checkpoint, "kind" | "notes" | "gguf" | "foreign"> & { readonly opensIn: string },
  rows: readonly Row[],
  totals: Readonly<Record<string, number | null>>,
  kernels: Kernels,
  mismatches: readonly Mismatch[] | undefined,
): void {
  const hasErrors = rows.some(({ error, note }) => error !== undefined || note !== undefined);
  const hasTrellis = rows.some(({ codes }) => codes !== undefined);
  const hasTwoLevel = rows.some(({ scaleBits }) => scaleBits !== undefined);
  const columns = ([
    ["tensor", ({ name }) => printable(name)],
    ["type", ({ dtype }) => dtype],
    ["shape", ({ shape }) => `[${shape.join(", ")}]`],
    ["bits", ({ bits = "" }) => `${bits}`],
    ["group", ({ groupSize = "" }) => groupSize === 0 ? "row" : `${groupSize}`],
    ["scale bits", ({ bits, scaleBits = 16 }) => bits === undefined ? "" : `${scaleBits}`, hasTwoLevel],
    ["codes", ({ bits, codes = "uniform" }) => bits === undefined ? "" : codes, hasTrellis],
    ["bytes", ({ bytes }) => formatCount(bytes)],
    ["bits/weight", ({ bitsPerWeight }) => bitsPerWeight.toFixed(3)],
    ["relative RMS", ({ error, note = "" }) => error?.relativeRms.toPrecision(4) ?? note, hasErrors],
    ["cosine", ({ error }) => error?.cosine.toFixed(6) ?? "", hasErrors],
    ["max error", ({ error }) => error?.max.toPrecision(4) ?? "", hasErrors],
  ] as readonly [title: string, cell: (row: Row) => string, isShown?: boolean][])
    .filter(([, , isShown = true]) => isShown);
  const table = [columns.map(([title]) => title), ...rows.map((row) => columns.map(([, cell]) => cell(row)))];
  print(formatCells(table, columns.flatMap((_, i) => i < 3 ? [] : [i])));
  print("");
  const share = totals["bitsPerWeight"];
  print(formatCells([
    ["model", `${checkpoint.kind}, ${printable(path)}`],
    ...checkpoint.notes.map((note) => ["note", printable(note)]),
    ["files", `${totals["files"]}, ${formatBytes(totals["fileBytes"] ?? 0)}`],
    ["tensors", `${formatCount(rows.length)}, ${formatCount(totals["weights"] ?? 0)} weights`],
    [
      "quantized",
      share === null || share === undefined
        ? checkpoint.foreign === undefined ? "none" : "by none of this tool's forms: see the note"
        : `${totals["quantizedTensors"]} tensors, ${
          formatCount(totals["quantizedWeights"] ?? 0)
        } weights at ` +
          `${share.toFixed(3)} bits per weight`,
    ],
    ...(checkpoint.gguf === undefined ? [] : keysOf(checkpoint.gguf).slice(0, SHOWN_KEYS)).map((
      [key, value],
    ) => ["key", `${printable(key)}: ${printable(shownValue(value))}`]),
    ["opens in", printable(checkpoint.opensIn)],
    ["all weights", `${totals["bitsPerWeightOfAll"]?.toFixed(3) ?? "-"} bits per weight`],
    ["backend", kernels.describe()],
    ...(mismatches === undefined ? [] : [[
      "manifest",
      mismatches.length === 0 ? "every file is as written" : `${mismatches.length} files differ`,
    ]]),
    ...(mismatches ?? []).map(({ name, reason }) => ["", `${printable(name)} ${reason}`]),
  ]));
}

export const main = defineCommand(USAGE, run);
if (import.meta.main) await main();
