/** A report of one or several runs: one HTML page without files or network, or text, or Markdown. */
export { reportHtml, type ReportOptions } from "./html.ts";
export { reportMarkdown } from "./markdown.ts";
export { reportText } from "./text.ts";

/** Forms of a report. */
export const REPORT_FORMATS = ["html", "text", "markdown"] as const;
/** A format of reports. */
export type ReportFormat = (typeof REPORT_FORMATS)[number];
