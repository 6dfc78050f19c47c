/**
 * Display in notebooks: charts and tables as objects with a bundle of media types, from which each front end
 * takes the best it knows. Deno's kernel asks for it through `Symbol.for("Jupyter.display")`; other runtimes
 * print the text.
 */
import { Buffer } from "node:buffer";
import { formatTable } from "../eval/table.ts";
import type { Spec } from "./_chart.ts";
import { type Theme, withTheme } from "./_theme.ts";
import { renderSvg } from "./render.ts";
import { escapeHtml } from "./report/escape.ts";
import type { MeasuredRow, TableLike } from "./tables.ts";

/** Contents by media type. */
export type MediaBundle = Readonly<Record<string, string | object>>;

/** A value that a notebook cell shows. */
export class Display {
  constructor(readonly bundle: MediaBundle) {}

  /** The bundle for Jupyter front ends. */
  [Symbol.for("Jupyter.display")](): MediaBundle {
    return this.bundle;
  }

  toString(): string {
    return String(this.bundle["text/plain"]);
  }

  /** For consoles of Node's kind. */
  [Symbol.for("nodejs.util.inspect.custom")](): string {
    return this.toString();
  }
}

/** The version that front ends of notebooks know by name. */
const NOTEBOOK_SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json";

/**
 * A chart: interactive where the front end knows Vega-Lite, an SVG picture elsewhere, its title as text.
 *
 * @throws {TypeError} when the specification is not valid Vega-Lite
 *
 * @example
 * ```ts
 * import { trajectoryDrift } from "./charts/mod.ts";
 * import { showChart } from "./display.ts";
 * import { tableFromRows } from "./tables.ts";
 * const table = await tableFromRows("drift", [{ model: "m", setting: "2 clip", step: 1, relativeDistance: 0.1 }]);
 * console.log(Object.keys((await showChart(trajectoryDrift(table))).bundle));
 * ```
 */
export async function showChart(
  spec: Spec,
  { theme = "light" }: { readonly theme?: Theme | undefined } = {},
): Promise<Display> {
  const svg = await renderSvg(spec, { theme });
  const title = spec["title"] as
    | { readonly text?: string; readonly subtitle?: readonly string[] }
    | undefined;
  const text = [title?.text ?? "chart", ...(title?.subtitle ?? [])].join("\n");
  return new Display({
    "application/vnd.vegalite.v5+json": { ...withTheme(spec, theme), $schema: NOTEBOOK_SCHEMA },
    "image/svg+xml": svg,
    // As a picture: front ends take <svg> out of what they do not trust, and the ids of several in one page
    // collide.
    "text/html": `<img alt="${escapeHtml(text)}" src="data:image/svg+xml;base64,${
      Buffer.from(svg).toString("base64")
    }">`,
    "text/plain": text,
  });
}

/** The part of a table to show. */
export interface ShowTableOptions {
  /** Columns in this order; default all that have a value. */
  readonly columns?: readonly string[] | undefined;
  /** Most rows. Default 20. */
  readonly rows?: number | undefined;
}

const DEFAULT_ROWS = 20;

/** A number short enough to read. */
function shown(value: unknown): string {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(5)));
}

/** The first rows of a table, as HTML and text. @throws {TypeError} when a column is not the table's */
export function showTable(table: TableLike, options: ShowTableOptions = {}): Display {
  const { rows: most = DEFAULT_ROWS } = options;
  const all = table.objects() as MeasuredRow[];
  const known = table.columnNames();
  const unknown = options.columns?.find((name) => !known.includes(name));
  if (unknown !== undefined) {
    throw new TypeError(
      `Cannot show table: columns must be some of ${known.join(", ")}, got ${JSON.stringify(unknown)}`,
    );
  }
  const columns = options.columns ?? known.filter((name) => all.some((row) => (row[name] ?? null) !== null));
  const rows = all.slice(0, most).map((row) =>
    Object.fromEntries(columns.map((name) => [name, shown(row[name])]))
  );
  const isNumber = new Set(columns.filter((name) => all.some((row) => typeof row[name] === "number")));
  const align = (name: string) => ` style="text-align:${isNumber.has(name) ? "right" : "left"}"`;
  const html = [
    "<table><thead><tr>",
    ...columns.map((name) => `<th${align(name)}>${escapeHtml(name)}</th>`),
    "</tr></thead><tbody>",
    ...rows.map((row) =>
      `<tr>${columns.map((name) => `<td${align(name)}>${escapeHtml(row[name]!)}</td>`).join("")}</tr>`
    ),
    "</tbody></table>",
  ].join("");
  const note = all.length > rows.length ? `${rows.length} of ${all.length} rows` : "";
  const text = formatTable(
    columns.map((name) => ({ key: name, title: name, align: isNumber.has(name) ? "right" : "left" })),
    rows,
  );
  return new Display({
    "text/html": note === "" ? html : `${html}<p>${note}</p>`,
    "text/plain": [...text, ...(note === "" ? [] : [note])].join("\n"),
  });
}
