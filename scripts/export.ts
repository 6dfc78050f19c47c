/** `export.ts PACKED OUT --to FORMAT`: a checkpoint, packed or plain, in the format of another program. */
import process from "node:process";
import { compilePattern } from "../lib/config/mod.ts";
import { formatBytes, formatCells } from "../lib/eval/table.ts";
import { peakResidentBytes } from "../lib/eval/environment.ts";
import { EXPORT_FORMATS, exportCheckpoint, type ExportReport } from "../lib/interop/mod.ts";
import { type Arguments, type Usage, UsageError } from "./_command/options.ts";
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
import { formatCount, print, printable, printJson } from "./_command/text.ts";
import { main as dequantize } from "./dequantize.ts";

const USAGE = {
  name: "export.ts",
  operands: "PACKED OUT",
  about:
    `Writes a checkpoint of quantize.ts, or a plain one, in the format of another program, weights unchanged.

Formats:
${EXPORT_FORMATS.map(({ name, openedBy }) => `  ${name.padEnd(19)}${openedBy}`).join("\n")}
  safetensors        plain weights again, as dequantize.ts writes them (default; takes its options)`,
  options: {
    "What is written": "",
    "--to FORMAT": `${EXPORT_FORMATS.map(({ name }) => name).join(", ")} or safetensors`,
    "--type NAME=TYPE …": "type of the tensors that a pattern of names fits, as in lm_head.weight=Q6_K",
    "--allow-rounding":
      "store what the format cannot hold exactly as near as it can; otherwise that is an error",
    ...OUTPUT_OPTIONS,
    "Machine and output": "",
    ...KERNEL_OPTIONS,
    "--quiet": "print nothing but errors",
    "--json": "print the report as JSON",
  },
  examples: {
    "OUT model.gguf --to gguf": "for llama.cpp",
    "OUT PLAIN --to safetensors": "for whatever reads plain weights",
  },
  notes: "docs/interop.md says, for each program, the command here, the command there, and what is lost.",
} as const satisfies Usage;

async function run(parsed: Arguments<typeof USAGE>, { signal }: Context): Promise<void> {
  const { flags, values, lists } = parsed, [input, output] = parsed.operands("PACKED", "OUT");
  const to = parsed.oneOf("to", [...EXPORT_FORMATS.map(({ name }) => name), "safetensors"]);
  const format = EXPORT_FORMATS.find(({ name }) => name === to);
  if (format === undefined) throw new UsageError("--to must name a format");
  const { resume, force } = outputMode(flags), allowRounding = flags["allow-rounding"];
  const types = lists.type.map((text) => {
    const [, name, type] = /^(.+)=(\w+)$/.exec(text) ?? [];
    if (type === undefined) throw new UsageError(`--type must be NAME=TYPE, got "${text}"`);
    return { pattern: compilePattern(name!), type };
  });
  const display = new ProgressDisplay(flags.quiet), chosen = await chosenKernels(values, display.log);
  const started = performance.now();
  using kernels = await openCommandKernels(chosen);
  display.log(kernels.describe());
  let report: ExportReport;
  try {
    const { update: onProgress, event: onEvent } = display;
    report = await exportCheckpoint({
      ...{ input, output, format, kernels, allowRounding, types, resume, force, signal, onProgress, onEvent },
    });
  } finally {
    display.clear();
  }
  const seconds = (performance.now() - started) / 1000;
  if (flags.json) printJson({ ...summaryOf(report), seconds, peakMemoryBytes: peakResidentBytes() });
  else if (!flags.quiet) printExport(report, seconds);
}

/** The report without what is only for the program. */
export const summaryOf = ({ rows, ...report }: ExportReport) => ({
  ...report,
  tensors: rows.map(({ tensor, name, type, bytes, fallback, rounding }) => ({
    ...{ from: tensor.name, name, shape: tensor.shape, type, bytes, fallback, rounding },
  })),
});

/** Prints tensors by type, then what a user needs to know of the file. */
export function printExport(report: ExportReport, seconds: number): void {
  const byType = [...Map.groupBy(report.rows, ({ type }) => type)].map(([type, rows]) => {
    const bytes = rows.reduce((sum, row) => sum + row.bytes, 0);
    return [type, formatCount(rows.length), formatBytes(bytes)];
  });
  print(`${formatCells([["type", "tensors", "bytes"], ...byType], [1, 2])}\n`);
  const count = (key: "fallback" | "rounding") => report.rows.filter((row) => row[key] !== undefined).length;
  const facts: [label: string, value: string, isShown?: boolean][] = [
    ["model", `${printable(report.input)} -> ${printable(report.output)}`],
    ["bytes", `${formatBytes(report.bytesBefore)} -> ${formatBytes(report.bytesAfter)}`],
    ["all weights", `${report.bitsPerWeightOfAll.toFixed(3)} bits per weight`],
    ["other types", `${count("fallback")} tensors, values unchanged`, count("fallback") > 0],
    ["rounded", `${count("rounding")} tensors`, count("rounding") > 0],
    ["opens in", report.openedBy],
    ["time", `${seconds.toFixed(2)} s, peak memory ${formatBytes(peakResidentBytes())}`],
  ];
  print(formatCells(facts.flatMap(([label, value, isShown = true]) => isShown ? [[label, value]] : [])));
}

const command = defineCommand(USAGE, run);

/** Plain safetensors are the other command's. */
export function main(args?: readonly string[], name?: string): Promise<void> {
  const given = args ?? process.argv.slice(2), at = given.findIndex((arg) => /^--to(?:=|$)/.test(arg));
  const to = at < 0 ? "safetensors" : given[at]!.split("=")[1] ?? given[at + 1];
  const isOwn = to !== "safetensors" || given.includes("--help");
  return (isOwn ? command : dequantize)(given, name);
}
if (import.meta.main) await main();
