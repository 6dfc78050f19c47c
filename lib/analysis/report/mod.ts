/**
 * A report of one or several runs: a single HTML page without further files or network, or text, or Markdown.
 * Names from checkpoints and run folders are treated as hostile: they never become markup.
 */
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { formatTable } from "../../eval/table.ts";
import { goalsSection } from "../../bench/report.ts";
import type { Section } from "../../bench/suite.ts";
import { type ChartRow, DEFAULT_WIDTH, type Json, type Spec } from "../_chart.ts";
import { fitted, type PageTable, pageTable, plainTable, sectionTable } from "./_data.ts";
import { REPORT_SCRIPT } from "./_script.ts";
import { REPORT_STYLE } from "./_style.ts";
import { packageFile } from "../_libraries.ts";
import { themeConfig } from "../_theme.ts";
import type { Run } from "../run.ts";
import { chartsOf, combineTables, type NamedChart } from "../run_charts.ts";
import { TABLE_NAMES, TABLE_SCHEMAS, type TableName } from "../schema.ts";
import { compareRuns, type TableLike } from "../tables.ts";

/** Forms of a report. */
export const REPORT_FORMATS = ["html", "text", "markdown"] as const;
/** A format of reports. */
export type ReportFormat = (typeof REPORT_FORMATS)[number];

/** The footer of a report. */
export interface ReportOptions {
  /** The command that makes this page again; default none. */
  readonly command?: string | undefined;
  /** Replace files of somebody else where it is written. */
  readonly force?: boolean | undefined;
}

/** A table of what differs between two runs, or why there is none. */
interface Comparison {
  readonly title: string;
  readonly compared: TableLike | { readonly reason: string };
}

/** Tables that are drawn for several runs together. */
const DRAWN: readonly TableName[] = ["phases", "peers", "layers", "time", "drift"];
/** Tables whose rows two runs of the same kind share. */
const COMPARED: readonly TableName[] = [...DRAWN, "kernels"];

/** Each further run against the first. */
async function comparisonsOf(runs: readonly Run[]): Promise<Comparison[]> {
  const [first, ...others] = runs;
  const comparisons: Comparison[] = [];
  for (const other of others) {
    for (const name of COMPARED) {
      if (first!.tables[name] === undefined || other.tables[name] === undefined) continue;
      const title = `${name}: ${first!.name} (A) and ${other.name} (B)`;
      try {
        comparisons.push({ title, compared: await compareRuns(first!, other, { table: name }) });
      } catch (error) {
        if (!(error instanceof RangeError)) throw error;
        comparisons.push({ title, compared: { reason: error.message } });
      }
    }
  }
  return comparisons;
}

/** Runs with names that tell them apart. @throws {TypeError} when there is none */
function distinct(runs: readonly Run[]): Run[] {
  if (runs.length === 0) {
    throw new TypeError("Cannot make a report: there must be at least one run, got none");
  }
  const seen = new Map<string, number>();
  return runs.map((run) => {
    const count = (seen.get(run.name) ?? 0) + 1;
    seen.set(run.name, count);
    return count === 1 ? run : { ...run, name: `${run.name} (${count})` };
  });
}

/** Quantizations among the runs, the smallest held-out error first, then by the error of outputs. */
function errorsSection(runs: readonly Run[]): Section[] {
  const measured = runs.flatMap(({ name, title, errors }) =>
    errors === undefined ? [] : [{ name, title, ...errors }]
  );
  if (measured.length < 2) return [];
  const order = ["heldOut", "output", "weights"] as const;
  const rows = measured.toSorted((a, b) =>
    (a.metric < b.metric ? -1 : a.metric > b.metric ? 1 : 0) ||
    order.reduce((found, key) => found || (a[key] ?? Infinity) - (b[key] ?? Infinity) || 0, 0)
  );
  return [{
    title: "Runs by error",
    notes: ["Held-out errors of one metric and model compare. The error of weights does not rank solvers."],
    columns: [
      { key: "name", title: "run" },
      { key: "title", title: "what" },
      { key: "metric", title: "held-out metric" },
      { key: "heldOut", title: "held out", digits: 5 },
      { key: "output", title: "output error", digits: 5 },
      { key: "weights", title: "weight error", digits: 5 },
      { key: "bits", title: "bits/weight of all", digits: 3 },
    ],
    rows,
  }];
}

type Fact = readonly [name: string, value: string];

/** Nested values as paths, `thermodynamic.validation.enabled`. */
function flat(values: Readonly<Record<string, Json>>, prefix = ""): Fact[] {
  return Object.entries(values).flatMap(([key, value]) =>
    typeof value === "object" && value !== null && !Array.isArray(value)
      ? flat(value as Readonly<Record<string, Json>>, `${prefix}${key}.`)
      : [[prefix + key, typeof value === "string" ? value : JSON.stringify(value ?? null)] as const]
  );
}

const summaryOf = ({ summary }: Run) => summary.map(({ label, value }): Fact => [label, value]);

function factsOf({ date, seconds, toolVersion }: Run): Fact[] {
  const took = seconds < 120 ? `${seconds.toFixed(1)} s` : `${(seconds / 60).toFixed(1)} min`;
  return [["date", date], ["took", took], ["arrowquant", toolVersion]];
}

// HTML ------------------------------------------------------------------------------------------------------

const ENTITIES: Readonly<Record<string, string>> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  '"': "&quot;",
  "'": "&#39;",
};

/** Text for markup and attributes. Characters that turn the reading direction or hide are shown as codes. */
export function escapeHtml(text: string): string {
  return visible(text).replace(/[&<>"']/g, (character) => ENTITIES[character]!);
}

/** Control and direction characters as codes; line ends stay. */
function visible(text: string): string {
  return text.toWellFormed().replace(
    /(?![\n\t])[\p{Cc}\p{Cf}\u2028\u2029]/gu,
    (character) => `\\u{${character.codePointAt(0)!.toString(16)}}`,
  );
}

/** JSON for a script element: nothing in it can end the element or open a comment. */
function scriptJson(value: unknown): string {
  return JSON.stringify(value).replace(
    /[<>&\u2028\u2029]/g,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** Libraries of the page, in order of their dependencies: scripts that define globals. */
const LIBRARIES = ["vega", "vega-lite", "vega-embed"] as const;

/** A file of a library, beside the one that it is imported by. */
const libraryText = (name: string, file: string) =>
  readFileSync(join(dirname(packageFile(name)), file), "utf8");

const libraryScripts = (): string[] =>
  LIBRARIES.map((name) =>
    libraryText(name, `${name}.min.js`).replace(/\n?\/\/# sourceMappingURL=.*\s*$/, "")
  );

/** Licences of the libraries, which ask to be kept beside them. */
const licences = (): string =>
  LIBRARIES.map((name) => `${name}: ${libraryText(name, "../LICENSE").replaceAll("--", "- -").trim()}`)
    .join("\n\n");

/** A script that cannot end its element, and the digest by which the page's policy knows it. */
function inlineScript(source: string): { readonly html: string; readonly digest: string } {
  const text = source.replace(/<(\/script|!--)/gi, "<\\$1");
  const digest = createHash("sha256").update(text).digest("base64");
  return { html: `<script>${text}</script>`, digest: `'sha256-${digest}'` };
}

/** Charts of a fixed width beyond this get the whole width of the page. */
const WIDE_PIXELS = 400;

/** With more printed tables than this, only the first is open at first. */
const OPEN_SECTIONS = 4;

interface Page {
  readonly charts: Spec[];
  readonly tables: PageTable[];
}

function chartsHtml(page: Page, charts: readonly NamedChart[]): string {
  if (charts.length === 0) return "";
  const figures = charts.map((chart) => {
    // Title and subtitle go into the page's own text, where they wrap.
    const { title, ...spec } = chart.spec, index = page.charts.push(spec) - 1;
    const { subtitle = [] } = (title ?? {}) as { readonly subtitle?: readonly string[] };
    const small = subtitle.map((note) => `<small>${escapeHtml(note)}</small>`).join("");
    const isWide = "vconcat" in spec || typeof spec["width"] === "number" && spec["width"] > WIDE_PIXELS;
    return `<figure${isWide ? ' class="wide"' : ""}><figcaption>${
      escapeHtml(chart.title)
    }${small}</figcaption><div class="chart" data-chart="${index}" data-name="${
      escapeHtml(chart.id)
    }"></div></figure>`;
  });
  return `<div class="charts">${figures.join("")}</div>`;
}

function tableHtml(page: Page, table: PageTable, isOpen: boolean): string {
  const index = page.tables.push(table) - 1;
  const doc = table.doc === "" ? "" : `<p class="muted">${escapeHtml(table.doc)}</p>`;
  return `<details class="table"${isOpen ? " open" : ""}><summary>${
    escapeHtml(table.title)
  } <span class="muted">(${table.rows} row${
    table.rows === 1 ? "" : "s"
  })</span></summary>${doc}<div data-table="${index}"></div></details>`;
}

function factsHtml(title: string, facts: readonly Fact[]): string {
  const rows = facts.map(([key, value]) =>
    `<tr><td>${escapeHtml(key)}</td><td><code>${escapeHtml(value)}</code></td></tr>`
  );
  return `<details class="table"><summary>${
    escapeHtml(title)
  }</summary><div class="scroll" tabindex="0"><table><tbody>${rows.join("")}</tbody></table></div></details>`;
}

function runHtml(page: Page, run: Run, prefix: string): string {
  const cards = run.summary.map(({ label, value }) =>
    `<div class="card"><dt>${escapeHtml(label)}</dt><dd>${escapeHtml(value)}</dd></div>`
  );
  const charts = chartsOf(run.tables, { width: "container" });
  const goals = goalsSection(run.goals);
  const isOpen = (index: number) => index === 0 || run.sections.length <= OPEN_SECTIONS;
  const tables = TABLE_NAMES.flatMap((name) => {
    const table = run.tables[name];
    return table === undefined ? [] : [pageTable(name, TABLE_SCHEMAS[name].doc, table)];
  });
  return [
    `<section id="${prefix}"><h2>${escapeHtml(run.name)}</h2>`,
    `<p>${escapeHtml(run.title)} <span class="muted">${
      factsOf(run).map(([key, value]) => `${escapeHtml(key)} ${escapeHtml(value)}`).join(" · ")
    }</span></p>`,
    `<pre>${escapeHtml(run.command)}</pre>`,
    `<dl class="cards">${cards.join("")}</dl>`,
    ...run.skipped.map(({ what, reason }) =>
      `<p class="muted">skipped: ${escapeHtml(what)}: ${escapeHtml(reason)}</p>`
    ),
    run.sections.length + goals.length === 0 ? "" : `<h3>Results</h3>`,
    ...run.sections.map((section, i) => tableHtml(page, sectionTable(section), isOpen(i))),
    ...goals.map((section) => tableHtml(page, sectionTable(section), true)),
    charts.length === 0 ? "" : `<h3>Charts</h3>`,
    chartsHtml(page, charts),
    tables.length === 0 ? "" : `<h3>Tables</h3>`,
    ...tables.map((table) => tableHtml(page, table, table.rows <= 200 && tables.length === 1)),
    `<h3>How it was run</h3>`,
    factsHtml("Configuration", flat(run.configuration)),
    factsHtml("Environment", flat(run.environment)),
    "</section>",
  ].join("\n");
}

async function comparisonHtml(page: Page, runs: readonly Run[]): Promise<string> {
  const comparisons = await comparisonsOf(runs);
  const charts = chartsOf(combineTables(runs, DRAWN), { width: "container" });
  const doc = "Columns ending in A and B are the runs', Difference is B − A.";
  return [
    `<section id="comparison"><h2>Comparison</h2>`,
    comparisons.length === 0 ? `<p class="muted">These runs share no table.</p>` : "",
    chartsHtml(page, charts),
    ...errorsSection(runs).map((section) => tableHtml(page, sectionTable(section), true)),
    ...comparisons.map(({ title, compared }) =>
      "reason" in compared
        ? `<p class="muted">${escapeHtml(title)}: ${escapeHtml(compared.reason)}</p>`
        : tableHtml(page, plainTable(title, doc, compared), false)
    ),
    "</section>",
  ].join("\n");
}

/**
 * The report as one HTML page: no network, no file beside it, works from `file://`.
 *
 * @throws {TypeError} when there is no run
 */
export async function reportHtml(allRuns: readonly Run[], options: ReportOptions = {}): Promise<string> {
  const runs = distinct(allRuns);
  const page: Page = { charts: [], tables: [] };
  const body = [
    ...(runs.length > 1 ? [await comparisonHtml(page, runs)] : []),
    ...runs.map((run, i) => runHtml(page, run, `run-${i}`)),
  ].join("\n");
  const data = {
    charts: page.charts,
    tables: fitted(page.tables),
    themes: { light: themeConfig("light"), dark: themeConfig("dark") },
    fittedWidth: DEFAULT_WIDTH,
  };
  const scripts = [...libraryScripts(), REPORT_SCRIPT].map(inlineScript);
  const policy = `default-src 'none'; script-src ${
    scripts.map(({ digest }) => digest).join(" ")
  }; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'`;
  const title = `ArrowQuant report: ${runs.map(({ name }) => name).join(", ")}`;
  const links = [
    ...(runs.length > 1 ? [`<a href="#comparison">Comparison</a>`] : []),
    ...runs.map(({ name }, i) => `<a href="#run-${i}">${escapeHtml(name)}</a>`),
  ];
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="${policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escapeHtml(title)}</title>
<link rel="icon" href="data:,">
<style>${REPORT_STYLE}</style>
</head>
<body>
<header>
<h1>${escapeHtml(title)}</h1>
<nav>${links.join("")}<button id="theme" type="button">Light / dark</button></nav>
<noscript><p>Charts and tables of this page need JavaScript; everything is in the page itself.</p></noscript>
</header>
<main>
${body}
</main>
<footer>Every number here was measured by the commands above.${
    options.command === undefined ? "" : ` This page: <code>${escapeHtml(options.command)}</code>`
  }</footer>
<script type="application/json" id="data">${scriptJson(data)}</script>
<!--
${escapeHtml(licences())}
-->
${scripts.map(({ html }) => html).join("\n")}
</body>
</html>
`;
}

// Text and Markdown -----------------------------------------------------------------------------------------

/** A name for a terminal or a page of text: one line, nothing hidden. */
const plain = (text: string) => visible(text).replace(/[\n\t]/g, " ");

function plainSection({ title, notes, columns, rows }: Section): Section {
  return {
    title: plain(title),
    notes: notes.map(plain),
    columns: columns.map((column) => ({ ...column, title: plain(column.title) })),
    rows: rows.map((row) =>
      Object.fromEntries(columns.map(({ key }) => {
        const value = row[key];
        return [key, typeof value === "string" ? plain(value) : value];
      }))
    ),
  };
}

/** Most rows of a comparison in text. */
const TEXT_ROWS = 40;

/** Columns that rank rows of a comparison; the error of weights ranks no solvers, and comes last. */
const RANKING = [/accuracy/, /stepKl|kl|relativeError|outputError/, /relativeRmsError/];

/** A comparison as a section: the key and what differs in numbers, the largest differences first. */
function comparisonSection({ title, compared }: Comparison): Section {
  if ("reason" in compared) return { title, notes: [compared.reason], columns: [], rows: [] };
  const rows = compared.objects() as ChartRow[], names = compared.columnNames();
  const differences = names.filter((name) =>
    name.endsWith("Difference") && rows.some((row) => typeof row[name] === "number" && row[name] !== 0)
  );
  const first = RANKING.flatMap((pattern) => differences.find((name) => pattern.test(name)) ?? [])[0] ??
    differences[0];
  const keys = names.slice(0, names.indexOf("in"));
  const size = (row: ChartRow) => first === undefined ? 0 : Math.abs(Number(row[first] ?? 0));
  const sorted = rows.toSorted((a, b) => size(b) - size(a)).slice(0, TEXT_ROWS);
  const shown = first === undefined
    ? []
    : [first.replace(/Difference$/, "A"), first.replace(/Difference$/, "B"), first];
  return {
    title,
    notes: [
      ...(first === undefined ? ["No number differs."] : []),
      ...(rows.length > TEXT_ROWS ? [`The ${TEXT_ROWS} largest differences of ${rows.length} rows.`] : []),
    ],
    columns: [
      ...keys.map((key) => ({ key, title: key })),
      { key: "in", title: "in" },
      ...shown.map((key) => ({ key, title: key, digits: 5 })),
    ],
    rows: sorted as Section["rows"],
  };
}

/** The report as text for a terminal. @throws {TypeError} when there is no run */
export async function reportText(allRuns: readonly Run[]): Promise<string> {
  const runs = distinct(allRuns);
  const sectionLines = (section: Section) => {
    const { title, notes, columns, rows } = plainSection(section);
    return ["", title, ...notes, ...(columns.length === 0 ? [] : formatTable(columns, rows))];
  };
  const facts = (entries: readonly Fact[]) => {
    const width = Math.max(0, ...entries.map(([key]) => key.length));
    return entries.map(([key, value]) => `${plain(key).padEnd(width)}  ${plain(value)}`);
  };
  const lines = [
    ...[...errorsSection(runs), ...(await comparisonsOf(runs)).map(comparisonSection)].flatMap(sectionLines),
    ...runs.flatMap((run) => [
      "",
      `== ${plain(run.name)}: ${plain(run.title)}`,
      ...facts([["command", run.command], ...factsOf(run), ...summaryOf(run)]),
      ...[...run.sections, ...goalsSection(run.goals)].flatMap(sectionLines),
      ...run.skipped.map(({ what, reason }) => `skipped: ${plain(what)}: ${plain(reason)}`),
      "",
      "Configuration",
      ...facts(flat(run.configuration)),
      "",
      "Environment",
      ...facts(flat(run.environment)),
    ]),
  ];
  return `${lines.join("\n").trim()}\n`;
}

/** Text in Markdown: what could be markup is escaped. */
function markdown(text: string): string {
  return plain(text).replace(
    /[\\`*_{}[\]<>#|~&!]/g,
    (character) => character === "&" || character === "<" ? ENTITIES[character]! : `\\${character}`,
  );
}

/** A code block that its content cannot end. */
function fenced(text: string): string[] {
  const longest = Math.max(2, ...[...text.matchAll(/`+/g)].map(([ticks]) => ticks.length));
  const fence = "`".repeat(longest + 1);
  return [`${fence}sh`, visible(text), fence];
}

/**
 * The report as Markdown.
 *
 * @param pictures paths of pictures by the chart's id, where there are any beside the text
 * @throws {TypeError} when there is no run
 */
export async function reportMarkdown(
  allRuns: readonly Run[],
  pictures: ReadonlyMap<string, string> = new Map(),
): Promise<string> {
  const runs = distinct(allRuns);
  const row = (cells: readonly string[]) => `| ${cells.join(" | ")} |`;
  const sectionLines = (section: Section) => {
    const { title, notes, columns, rows } = plainSection(section);
    const cell = (value: Section["rows"][number][string], digits = 0) =>
      value === null || value === undefined
        ? "-"
        : typeof value === "boolean"
        ? value ? "yes" : "no"
        : typeof value === "number"
        ? value.toFixed(digits)
        : markdown(value);
    return [
      `### ${markdown(title)}`,
      "",
      ...(notes.length === 0 ? [] : [notes.map(markdown).join(" "), ""]),
      ...(columns.length === 0 ? [] : [
        row(columns.map((column) => markdown(column.title))),
        row(columns.map(({ key }) => rows.some((each) => typeof each[key] === "number") ? "---:" : "---")),
        ...rows.map((each) => row(columns.map(({ key, digits }) => cell(each[key], digits)))),
        "",
      ]),
    ];
  };
  const facts = (entries: readonly Fact[]) => [
    row(["", ""]),
    row(["---", "---"]),
    ...entries.map(([key, value]) => row([markdown(key), markdown(value)])),
    "",
  ];
  const compared = [...errorsSection(runs), ...(await comparisonsOf(runs)).map(comparisonSection)];
  const lines = [
    `# ArrowQuant report: ${runs.map(({ name }) => markdown(name)).join(", ")}`,
    "",
    ...(compared.length === 0 ? [] : ["## Comparison", "", ...compared.flatMap(sectionLines)]),
    ...runs.flatMap((run) => [
      `## ${markdown(run.name)}`,
      "",
      `${markdown(run.title)}`,
      "",
      ...fenced(run.command),
      "",
      ...facts([...factsOf(run), ...summaryOf(run)]),
      ...[...run.sections, ...goalsSection(run.goals)].flatMap(sectionLines),
      ...run.skipped.map(({ what, reason }) => `Skipped: ${markdown(what)}: ${markdown(reason)}\n`),
      ...(pictures.size === 0 ? [] : ["### Charts", ""]),
      ...chartsOf(pictures.size === 0 ? {} : run.tables).flatMap(({ id, title }) => {
        const picture = pictures.get(id);
        return picture === undefined ? [] : [`![${markdown(title)}](${encodeURI(picture)})`, ""];
      }),
      "### Configuration",
      "",
      ...facts(flat(run.configuration)),
      "### Environment",
      "",
      ...facts(flat(run.environment)),
    ]),
  ];
  return `${lines.join("\n").trimEnd()}\n`;
}
