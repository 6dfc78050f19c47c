/** `report.ts RUN…`: a report of runs that `--report` of the other commands left behind. */
import { dirname } from "node:path";
import { checkLibraries } from "../lib/analysis/_libraries.ts";
import {
  REPORT_FORMATS,
  type ReportFormat,
  reportHtml,
  reportMarkdown,
  reportText,
} from "../lib/analysis/report/mod.ts";
import { readRun, type Run } from "../lib/analysis/run.ts";
import { makeFolder, writeWhole } from "../lib/files/whole.ts";
import { commandLine, parseOptions, usageError } from "./_command/options.ts";
import { EXIT_CODE_HELP, runCommand } from "./_command/run.ts";
import { print } from "./_command/text.ts";

const HELP = `Usage: report.ts RUN... [options]

Makes a report of run folders, as bench.ts and quantize.ts write them with --report: one HTML file that needs nothing
else, or text, or Markdown. With several runs it compares each with the first.

  -o, --output FILE    where to write it; default report.html for HTML, standard output for text and Markdown
  --format NAME        ${REPORT_FORMATS.join(", ")}; default: by the end of FILE's name, otherwise html
  --help

${EXIT_CODE_HELP}`;

const ENDINGS: Readonly<Record<string, ReportFormat>> = {
  html: "html",
  htm: "html",
  txt: "text",
  md: "markdown",
};

async function main(args: readonly string[]): Promise<void> {
  const long = args.map((arg) => arg === "-o" ? "--output" : arg);
  const { positionals, flags, values } = parseOptions(long, {
    help: HELP,
    boolean: ["help"],
    string: ["output", "format"],
  });
  if (flags.help) {
    print(HELP);
    return;
  }
  if (positionals.length === 0) throw usageError("at least one RUN is needed, got none", HELP);
  const format = formatOf(values.format, values.output);
  checkLibraries();
  const runs: Run[] = [];
  for (const folder of positionals) runs.push(await readRun(folder));
  const text = format === "html"
    ? await reportHtml(runs, { command: commandLine("report.ts", args) })
    : format === "text"
    ? await reportText(runs)
    : await reportMarkdown(runs);
  const output = values.output ?? (format === "html" ? "report.html" : undefined);
  if (output === undefined) {
    print(text.trimEnd());
    return;
  }
  makeFolder(dirname(output));
  writeWhole(output, text);
  print(output);
}

function formatOf(asked: string | undefined, output: string | undefined): ReportFormat {
  if (asked === undefined) return ENDINGS[/\.(\w+)$/.exec(output ?? "")?.[1] ?? ""] ?? "html";
  const format = REPORT_FORMATS.find((name) => name === asked);
  if (format !== undefined) return format;
  throw usageError(`option "--format" must be one of ${REPORT_FORMATS.join(", ")}, got "${asked}"`, HELP);
}

if (import.meta.main) await runCommand(main);
