/** `dequantize.ts PACKED OUT`: a quantized checkpoint of ours back to plain safetensors. */
import { dequantizeCheckpoint, type RunReport } from "../lib/pipeline/mod.ts";
import type { Arguments, Usage } from "./_command/options.ts";
import { ProgressDisplay } from "./_command/progress.ts";
import {
  chosenKernels,
  type Context,
  defineCommand,
  KERNEL_OPTIONS,
  OUTPUT_OPTIONS,
  outputMode,
} from "./_command/run.ts";
import { openCommandKernels } from "./_command/signals.ts";
import { formatBytes, formatCells } from "../lib/eval/table.ts";
import { peakResidentBytes } from "../lib/eval/environment.ts";
import { formatCount, print, printable, printJson } from "./_command/text.ts";

const USAGE = {
  name: "dequantize.ts",
  operands: "PACKED OUT",
  about: "Turns a checkpoint written by quantize.ts back into plain safetensors files in the folder OUT.",
  options: {
    "What is written": "",
    "--to FORMAT": "safetensors (default), which any other program reads",
    "--dtype NAME": "F32, F16 or BF16; default: each tensor's type before it was quantized",
    ...OUTPUT_OPTIONS,
    "Machine and output": "",
    ...KERNEL_OPTIONS,
    "--quiet": "print nothing but errors",
    "--json": "print the report as JSON",
  },
  examples: {
    "OUT PLAIN": "every tensor in the type that it had",
    "OUT PLAIN --dtype BF16": "in half the size of F32",
  },
} as const satisfies Usage;

async function run(parsed: Arguments<typeof USAGE>, { signal }: Context): Promise<void> {
  const { flags, values } = parsed, [input, output] = parsed.operands("PACKED", "OUT");
  parsed.oneOf("to", ["safetensors"]);
  const { resume, force } = outputMode(flags), dtype = parsed.oneOf("dtype", ["F32", "F16", "BF16"]);
  const display = new ProgressDisplay(flags.quiet), chosen = await chosenKernels(values, display.log);

  const started = performance.now();
  using kernels = await openCommandKernels(chosen);
  display.log(kernels.describe());
  let report: RunReport;
  try {
    report = await dequantizeCheckpoint({
      input,
      output,
      kernels,
      dtype,
      resume,
      force,
      signal,
      onProgress: display.update,
      onEvent: display.event,
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
      ["opens in", report.opensIn],
      ["backend", `${report.backend}, ${report.threads} threads`],
      ["time", `${seconds.toFixed(2)} s, peak memory ${formatBytes(memory)}`],
    ]));
  }
}

export const main = defineCommand(USAGE, run);
if (import.meta.main) await main();
