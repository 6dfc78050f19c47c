/** The report as one HTML page. Names from checkpoints and run folders never become markup. */
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { goalsSection } from "../../bench/report.ts";
import { DEFAULT_WIDTH, type Spec } from "../_chart.ts";
import { packageFile } from "../_libraries.ts";
import { themeConfig } from "../_theme.ts";
import type { Run } from "../run.ts";
import { chartsOf, combineTables, type NamedChart } from "../run_charts.ts";
import { TABLE_NAMES, TABLE_SCHEMAS } from "../schema.ts";
import { fitted, type PageTable, pageTable, plainTable, sectionTable } from "./_data.ts";
import { comparisonsOf, distinct, DRAWN, errorsSection, type Fact, factsOf, flat } from "./_parts.ts";
import { escapeHtml } from "./escape.ts";
import { REPORT_SCRIPT } from "./_script.ts";
import { REPORT_STYLE } from "./_style.ts";

/** The footer of a report. */
export interface ReportOptions {
  /** The command that makes this page again; default none. */
  readonly command?: string | undefined;
  /** Replace files of somebody else where it is written. */
  readonly force?: boolean | undefined;
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
