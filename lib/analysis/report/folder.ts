/** The folder of a run: its tables, and its reports as page, text, and Markdown with pictures. */
import { dirname, join } from "node:path";
import { writeResult } from "../../files/results.ts";
import { makeFolder } from "../../files/whole.ts";
import { checkOwnFolder } from "../../output/own_folder.ts";
import { renderSvg } from "../render.ts";
import { reportHtml, reportMarkdown, type ReportOptions, reportText } from "./mod.ts";
import { type Run, writeRun } from "../run.ts";
import { chartsOf } from "../run_charts.ts";

const REPORT_PAGE = "report.html";

/**
 * Writes `report.html`, `report.txt`, `report.md` with `charts/*.svg`, `run.json` and `tables/*.parquet` into
 * a folder.
 *
 * @throws {OutputError} when the system refuses, or a file there is somebody else's
 */
export async function writeReportFolder(
  folder: string,
  run: Run,
  options: ReportOptions = {},
): Promise<void> {
  const { force } = options;
  await writeRun(folder, run, force);
  checkOwnFolder(join(folder, "charts"));
  makeFolder(join(folder, "charts"));
  const pictures = new Map<string, string>();
  for (const { id, spec } of chartsOf(run.tables)) {
    writeResult(join(folder, "charts", `${id}.svg`), await renderSvg(spec), force);
    pictures.set(id, `charts/${id}.svg`);
  }
  writeResult(join(folder, "report.txt"), await reportText([run]), force);
  writeResult(join(folder, "report.md"), await reportMarkdown([run], pictures), force);
  writeResult(join(folder, REPORT_PAGE), await reportHtml([run], options), force);
}

/**
 * Writes a report where `--report` says: a name that ends with `.html` is the page alone, any other a folder.
 *
 * @returns path of the page
 * @throws {OutputError} when the system refuses
 */
export async function writeReport(target: string, run: Run, options: ReportOptions = {}): Promise<string> {
  if (target.endsWith(".html")) {
    makeFolder(dirname(target));
    writeResult(target, await reportHtml([run], options), options.force);
    return target;
  }
  await writeReportFolder(target, run, options);
  return join(target, REPORT_PAGE);
}
