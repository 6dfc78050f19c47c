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
import { writeResult } from "../lib/files/results.ts";
import { makeFolder } from "../lib/files/whole.ts";
import { type Arguments, type Usage, UsageError } from "./_command/options.ts";
import { type Context, defineCommand, REPLACE_OPTION } from "./_command/run.ts";
import { print } from "./_command/text.ts";

const USAGE = {
  name: "report.ts",
  operands: "RUN...",
  about:
    `Makes a report of run folders, as bench.ts and quantize.ts write them with --report: one HTML file that needs nothing
else, or text, or Markdown. With several runs it compares each with the first.`,
  options: {
    "-o, --output FILE":
      "where to write it; default report.html for HTML, standard output for text and Markdown",
    "--format NAME": `${REPORT_FORMATS.join(", ")}; default: by the end of FILE's name, otherwise html`,
    ...REPLACE_OPTION,
  },
  examples: {
    "out/q2 out/q3 -o compared.html": "two runs in one page, the second compared with the first",
    "out/q2 --format text": "one run on the terminal",
  },
} as const satisfies Usage;

const ENDINGS: ReadonlyMap<string, ReportFormat> = new Map([
  ["html", "html"],
  ["htm", "html"],
  ["txt", "text"],
  ["md", "markdown"],
]);

async function run(parsed: Arguments<typeof USAGE>, { command }: Context): Promise<void> {
  const { positionals, values, flags } = parsed;
  if (positionals.length === 0) throw new UsageError("at least one RUN is needed, got none");
  const ending = /\.(\w+)$/.exec(values.output ?? "")?.[1] ?? "";
  const format = parsed.oneOf("format", REPORT_FORMATS) ?? ENDINGS.get(ending) ?? "html";
  checkLibraries();
  const runs: Run[] = [];
  for (const folder of positionals) runs.push(await readRun(folder));
  const text = format === "html"
    ? await reportHtml(runs, { command })
    : format === "text"
    ? await reportText(runs)
    : await reportMarkdown(runs);
  const output = values.output ?? (format === "html" ? "report.html" : undefined);
  if (output === undefined) {
    print(text.trimEnd());
    return;
  }
  makeFolder(dirname(output));
  writeResult(output, text, flags.force);
  print(output);
}

export const main = defineCommand(USAGE, run);
if (import.meta.main) await main();
