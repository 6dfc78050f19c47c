/** `dequantize.ts PACKED OUT`: a quantized checkpoint of ours back to plain safetensors. */
import { loadConfig } from "../lib/config/mod.ts";
import { openKernels } from "../lib/native/mod.ts";
import { dequantizeCheckpoint, type RunReport } from "../lib/pipeline/mod.ts";
import { environmentVariables, parseOptions, usageError } from "./_command/options.ts";
import { ProgressDisplay } from "./_command/progress.ts";
import { EXIT_CODE_HELP, runCommand } from "./_command/run.ts";
import { formatBytes, formatCells } from "../lib/eval/table.ts";
import { peakResidentBytes } from "../lib/eval/environment.ts";
import { formatCount, print, printable, printJson } from "./_command/text.ts";

const HELP = `Usage: dequantize.ts PACKED OUT [options]

Turns a checkpoint written by quantize.ts back into plain safetensors files in the folder OUT.

  --dtype NAME     F32, F16 or BF16; default: each tensor's type before it was quantized
  --threads N      0 (default) is one per core
  --backend NAME   auto (default), cuda, cpu, native or wasm
  --resume         go on with a run that was stopped
  --force          replace a finished output, or start over; touches only files that this tool wrote
  --quiet          print nothing but errors
  --json           print the report as JSON
  --help

${EXIT_CODE_HELP}`;

const DTYPES = ["F32", "F16", "BF16"] as const;

async function main(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { positionals, flags, values } = parseOptions(args, {
    help: HELP,
    boolean: ["resume", "force", "quiet", "json", "help"],
    string: ["dtype", "threads", "backend"],
  });
  if (flags.help) {
    print(HELP);
    return;
  }
  const [input, output] = positionals;
  if (input === undefined || output === undefined || positionals.length > 2) {
    throw usageError(`PACKED and OUT are needed, got ${positionals.length} paths`, HELP);
  }
  if (flags.resume && flags.force) throw usageError("--resume and --force exclude each other", HELP);
  const dtype = DTYPES.find((name) => name === values.dtype);
  if (values.dtype !== undefined && dtype === undefined) {
    throw usageError(`--dtype must be one of ${DTYPES.join(", ")}, got "${values.dtype}"`, HELP);
  }
  const display = new ProgressDisplay(flags.quiet);
  const { config } = await loadConfig({
    environment: environmentVariables(display.log),
    overrides: { num_threads: values.threads, backend: values.backend },
    overrideSources: { num_threads: "--threads", backend: "--backend" },
  });

  const started = performance.now();
  using kernels = await openKernels({
    backend: config.backend,
    threads: config.numThreads,
    onMessage: (line) => display.log(line),
  });
  display.log(kernels.describe());
  let report: RunReport;
  try {
    report = await dequantizeCheckpoint({
      input,
      output,
      kernels,
      dtype,
      resume: flags.resume,
      force: flags.force,
      signal,
      onProgress: display.update,
      onEvent: ({ kind, message }) => display.log(`${kind}: ${printable(message)}`),
    });
  } finally {
    display.clear();
  }
  const seconds = (performance.now() - started) / 1000;
  const memory = peakResidentBytes();
  if (flags.json) {
    printJson({ ...report, seconds, peakMemoryBytes: memory });
  } else if (!flags.quiet) {
    const { totals } = report;
    print(formatCells([
      ["model", `${report.modelKind}, ${printable(input)} -> ${printable(output)}`],
      ["files", `${formatBytes(totals.fileBytesBefore)} -> ${formatBytes(totals.fileBytesAfter)}`],
      [
        "dequantized",
        `${formatCount(totals.tensors)} tensors, ${formatCount(totals.weights)} weights; ` +
        `${formatCount(totals.tensorsKept)} kept as they were`,
      ],
      ["backend", `${report.backend}, ${report.threads} threads`],
      [
        "time",
        `${seconds.toFixed(2)} s, peak memory ${formatBytes(memory)}`,
      ],
    ]));
  }
}

if (import.meta.main) await runCommand(main);
