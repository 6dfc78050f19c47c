/** `merge.ts PARTS… OUT`: what the tasks of an array have made, as one. */
import { peakResidentBytes } from "../lib/eval/environment.ts";
import { mergeFor } from "../lib/interop/mod.ts";
import { basename, join, resolve } from "node:path";
import { readRun, RUN_FILE } from "../lib/analysis/run.ts";
import { kindOf, listFolder } from "../lib/files/whole.ts";
import { shardOfFolder } from "../lib/output/shard_folders.ts";
import {
  isCalibrationStatistics,
  mergeCheckpoint,
  mergeStatisticsFiles,
  openShards,
} from "../lib/pipeline/mod.ts";
import { type Arguments, type Usage, UsageError } from "./_command/options.ts";
import { ProgressDisplay } from "./_command/progress.ts";
import {
  chosenKernels,
  type Context,
  defineCommand,
  KERNEL_OPTIONS,
  MODEL_OPTIONS,
  OUTPUT_OPTIONS,
  outputMode,
  prepareReport,
} from "./_command/run.ts";
import { openCommandKernels } from "./_command/signals.ts";
import { print, printJson } from "./_command/text.ts";
import { printExport, summaryOf } from "./export.ts";
import { printSummary } from "./quantize.ts";

const USAGE = {
  name: "merge.ts",
  operands: "PARTS … OUT",
  about:
    `Brings together what the tasks of an array have made with --shard: the same bytes as one task would write.

PARTS are                                                OUT becomes
  folders of shards of quantize.ts, or what holds some   the checkpoint, or the file of the program of --for
  files of quantize.ts --save-calibration                statistics of all samples
  folders of shards of bench.ts, or what holds some      one run with one report`,
  options: {
    "Quantized layers": "",
    "--model MODEL": "the checkpoint that was quantized: its headers and small files are read",
    ...MODEL_OPTIONS,
    "--allow-rounding": "as in quantize.ts, with shards that were made --for a program",
    "Machine and output": "",
    ...KERNEL_OPTIONS,
    ...OUTPUT_OPTIONS,
    "--quiet": "print nothing but errors",
    "--json": "print the report as JSON",
  },
  examples: {
    "PARTS OUT --model MODEL": "shards of a checkpoint, all in one folder",
    "stats.shard-*-of-4.safetensors stats.safetensors": "statistics of four parts of the samples",
    "MEASURED out/report": "one report of a bench that was measured in shards",
    "NODE1/PARTS NODE2/PARTS OUT --model MODEL": "the same from two folders",
  },
  notes:
    "Shards that are missing, there twice, or of another input, configuration or version are named and refused.",
} as const satisfies Usage;

type Options = Arguments<typeof USAGE>;

async function run(parsed: Options, context: Context): Promise<void> {
  const parts = parsed.positionals.slice(0, -1), output = parsed.positionals.at(-1);
  if (output === undefined || parts.length === 0) {
    throw new UsageError(`PARTS and OUT are needed, got ${parsed.positionals.length} paths`);
  }
  const isFile = (path: string) => kindOf(path) === "file";
  if (parts.every(isFile) && parts.every(isCalibrationStatistics)) {
    const display = new ProgressDisplay(parsed.flags.quiet);
    const { runs } = mergeStatisticsFiles(parts, output, {
      force: parsed.flags.force,
      onEvent: display.event,
    });
    if (parsed.flags.json) printJson({ output, runs });
    return;
  }
  const runs = runFoldersOf(parts);
  if (runs.length > 0) return await mergeBench(parsed, runs, output);
  await mergeShards(parsed, { parts, output }, context);
}

/** Folders of a bench's shards that paths stand for. */
function runFoldersOf(parts: readonly string[]): string[] {
  const inside = (path: string) =>
    kindOf(path) !== "folder"
      ? []
      : listFolder(path).filter((name) => shardOfFolder(name) !== undefined).map((name) => join(path, name));
  const folders = parts.flatMap((path) =>
    shardOfFolder(basename(resolve(path))) === undefined ? inside(path) : [path]
  );
  return folders.filter((path) => kindOf(join(path, RUN_FILE)) === "file");
}

/** Makes one run with one report of a bench's shards. */
async function mergeBench({ flags }: Options, folders: readonly string[], output: string): Promise<void> {
  prepareReport(output, flags.force);
  const { mergeRuns } = await import("../lib/analysis/report/merge_runs.ts");
  const { writeReport } = await import("../lib/analysis/report/folder.ts");
  const shards = await Promise.all(folders.map(async (path) => ({ path, run: await readRun(path) })));
  const run = await mergeRuns(basename(resolve(output)).replace(/\.html$/, ""), shards);
  const page = await writeReport(output, run, { force: flags.force });
  if (flags.json) printJson({ output, page, shards: shards.length, seconds: run.seconds });
  else if (!flags.quiet) print(`report: ${page}`);
}

/** Merges shards of a checkpoint. */
async function mergeShards(
  parsed: Options,
  { parts, output }: { readonly parts: readonly string[]; readonly output: string },
  { signal }: Context,
): Promise<void> {
  const { flags, values } = parsed, input = values.model;
  if (input === undefined) {
    throw new UsageError("shards of a checkpoint need --model MODEL, the one that was quantized");
  }
  const display = new ProgressDisplay(flags.quiet), started = performance.now();
  const { update: onProgress, event: onEvent } = display, { resume, force } = outputMode(flags);
  const options = {
    input,
    output,
    shards: parts,
    resume,
    force,
    variant: values.variant,
    subfolder: values.subfolder,
    signal,
    onProgress,
    onEvent,
  };
  const merge = async () => {
    if (openShards(parts).config.target === null) {
      return { quantized: await mergeCheckpoint(options), exported: undefined };
    }
    using kernels = await openCommandKernels(await chosenKernels(values, display.log));
    return await mergeFor({ ...options, kernels, allowRounding: flags["allow-rounding"] });
  };
  const { quantized, exported } = await merge().finally(() => display.clear());
  const seconds = (performance.now() - started) / 1000;
  if (flags.json) {
    const file = exported === undefined ? {} : { exported: summaryOf(exported) };
    printJson({ ...quantized, ...file, seconds, peakMemoryBytes: peakResidentBytes() });
  } else if (!flags.quiet) {
    printSummary(quantized, seconds);
    if (exported !== undefined) printExport(exported, seconds);
  }
}

export const main = defineCommand(USAGE, run);
if (import.meta.main) await main();
