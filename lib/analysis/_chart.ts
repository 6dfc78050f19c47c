/** Common to all charts: data out of tables, short names, layouts of quantities, charts of nothing. */
import { textWidth } from "./_text_widths.ts";
import type { MeasuredRow, TableLike } from "./tables.ts";

/** A JSON value. */
export type Json = string | number | boolean | null | readonly Json[] | { readonly [key: string]: Json };

/** A Vega-Lite specification, whole or a part. */
export type Spec = { readonly [key: string]: Json };

/** Options of every chart. */
export interface ChartOptions {
  /** Default says what the chart shows. */
  readonly title?: string | undefined;
  /** Of the plot without axes, in pixels; `container` fits a page. Default 560. */
  readonly width?: number | "container" | undefined;
  /** Of the plot, in pixels; charts with a row a layer choose their own. */
  readonly height?: number | undefined;
}

const SCHEMA_URL = "https://vega.github.io/schema/vega-lite/v6.json";
export const DEFAULT_WIDTH = 560;
export const DEFAULT_HEIGHT = 260;

/** Rows of a chart's data: finite numbers, texts, booleans or null. */
export type ChartRow = Readonly<Record<string, string | number | boolean | null>>;

interface ChartData {
  readonly rows: ChartRow[];
  /** Values that are NaN or infinite: drawn as absent. */
  readonly notFinite: number;
}

/**
 * The columns a chart needs. NaN and infinities become null and are counted.
 *
 * @throws {TypeError} when the table lacks one of them
 */
export function chartData(chart: string, table: TableLike, columns: readonly string[]): ChartData {
  const missing = columns.filter((column) => !table.columnNames().includes(column));
  if (missing.length > 0) {
    throw new TypeError(
      `Cannot draw ${chart}: the table must have columns ${columns.join(", ")}, lacks ${missing.join(", ")}`,
    );
  }
  let notFinite = 0;
  const rows = (table.objects() as MeasuredRow[]).map((row) =>
    Object.fromEntries(columns.map((column) => {
      const value = row[column];
      if (typeof value === "number" && !Number.isFinite(value)) {
        notFinite++;
        return [column, null];
      }
      return [column, (value ?? null) as ChartRow[string]];
    }))
  );
  return { rows, notFinite };
}

/** A line of the subtitle about values that cannot be drawn. */
export function notFiniteNote(count: number): string[] {
  return count === 0 ? [] : [`${count} value${count === 1 ? " is" : "s are"} NaN or infinite and not drawn`];
}

export function chart(
  { title, width }: { readonly title: string; readonly width?: ChartOptions["width"] },
  notes: readonly string[],
  body: Spec,
): Spec {
  const sized = "vconcat" in body || "hconcat" in body || "facet" in body ? {} : {
    width: width ?? DEFAULT_WIDTH,
    autosize: { type: width === "container" ? "fit-x" : "pad", contains: "padding" },
  };
  return {
    $schema: SCHEMA_URL,
    title: { text: title, ...(notes.length > 0 ? { subtitle: [...notes] } : {}) },
    ...sized,
    ...body,
  };
}

/** A chart of nothing: the title, and in the middle why there is nothing. */
export function emptyChart(title: string, reason: string, options: ChartOptions = {}): Spec {
  return chart({ title, width: options.width }, [], {
    height: 60,
    data: { values: [{ reason }] },
    mark: { type: "text", style: "note" },
    encoding: { text: { field: "reason", type: "nominal" } },
  });
}

/** Charts one below the other, one for each value of a column; a single value needs no heading. */
export function eachBelow(
  title: string,
  notes: readonly string[],
  parts: readonly { readonly name: string; readonly spec: Spec }[],
  width: ChartOptions["width"],
): Spec {
  const [only] = parts;
  if (only !== undefined && parts.length === 1) return chart({ title, width }, notes, only.spec);
  const inner = width === undefined || width === "container" ? DEFAULT_WIDTH : width;
  return chart({ title }, notes, {
    vconcat: parts.map(({ name, spec }) => ({
      title: { text: name, fontSize: 12, offset: 6 },
      width: inner,
      ...spec,
    })),
    resolve: { scale: { color: "independent", shape: "independent" } },
  });
}

/** Groups in the order in which their keys come. */
export function groupRows<Row>(rows: readonly Row[], key: (row: Row) => string): [string, Row[]][] {
  return [...Map.groupBy(rows, key)];
}

/** The setting, and the model too where there are several. */
export function withSeries<Row extends ChartRow>(
  rows: readonly Row[],
): (Row & { readonly series: string })[] {
  const isOne = new Set(rows.map(({ model }) => model)).size <= 1;
  return rows.map((row) => ({
    ...row,
    series: isOne ? String(row["setting"]) : `${row["model"]}, ${row["setting"]}`,
  }));
}

/** Share of the names that must begin alike for the beginning to go. */
const COMMON_SHARE = 0.9;

/** Names without `.weight` and the dotted beginning that (nearly) all share, as long as they differ. */
export function shortNames(names: readonly string[]): Map<string, string> {
  const distinct = [...new Set(names)];
  let parts = distinct.map((name) => name.replace(/\.weight$/, "").split("."));
  while (distinct.length > 1) {
    const counts = new Map<string, number>();
    for (const part of parts) {
      if (part.length > 1) counts.set(part[0]!, (counts.get(part[0]!) ?? 0) + 1);
    }
    const common = [...counts].find(([, count]) => count >= COMMON_SHARE * distinct.length)?.[0];
    if (common === undefined) break;
    const shorter = parts.map((part) => part.length > 1 && part[0] === common ? part.slice(1) : part);
    if (new Set(shorter.map((part) => part.join("."))).size < distinct.length) break;
    parts = shorter;
  }
  const short = parts.map((part) => part.join("."));
  const isClear = new Set(short).size === short.length;
  return new Map(distinct.map((name, i) => [name, isClear ? short[i]! : name]));
}

/** How a quantity is laid out along an axis. */
export interface Layout {
  readonly isLog: boolean;
  readonly scale: Spec;
  /** Of the ticks' labels, and the ticks where the scale is logarithmic. */
  readonly axis: Spec;
  /** The same for a legend, which also shows ticks that lie outside. */
  readonly legend: Spec;
}

/** From zero; or logarithmic, where every value is positive and they span a decade or more. */
export function layoutOf(values: readonly (number | null)[]): Layout {
  const present = values.filter((value) => value !== null);
  const [low, high] = extent(present);
  if (!(present.length > 0 && low > 0 && high / low >= 10)) {
    const axis = { format: NUMBER_FORMAT };
    return { isLog: false, scale: { zero: true }, axis, legend: axis };
  }
  const format = low < 1e-4 ? ".0e" : NUMBER_FORMAT;
  const ticks = logTicks(low, high);
  return {
    isLog: true,
    scale: { type: "log", nice: false, padding: 10 },
    axis: { format, values: ticks },
    legend: { format, values: ticks.filter((tick) => tick >= low && tick <= high) },
  };
}

/** Powers of ten; also 2 and 5 times them where there would be few. */
function logTicks(low: number, high: number): number[] {
  const first = Math.floor(Math.log10(low)) - 1, last = Math.ceil(Math.log10(high)) + 1;
  const steps = high / low > 300 ? [1] : [1, 2, 5];
  const every = Math.ceil((last - first) / 12);
  return Array.from({ length: Math.floor((last - first) / every) + 1 }, (_, i) => first + i * every)
    .flatMap((power) => steps.map((step) => Number(`${step}e${power}`)));
}

/** Least and largest, without the limits of spreading an array. */
export function extent(values: readonly number[]): [number, number] {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return [low, high];
}

/** The number in a column, null where there is none. */
export const numberIn = (row: ChartRow, column: string): number | null => {
  const value = row[column];
  return typeof value === "number" ? value : null;
};

/** Rows that have both ends of a column's interval. */
export function withInterval<Row extends ChartRow>(rows: readonly Row[], column: string): Row[] {
  return rows.filter((row) =>
    numberIn(row, `${column}Low`) !== null && numberIn(row, `${column}High`) !== null
  );
}

/** A layer of a chart, or none where there is nothing to draw: an axis over no values has no extent. */
export function layerOf(rows: readonly ChartRow[], layer: Spec): Spec[] {
  return rows.length === 0 ? [] : [{ data: { values: rows }, ...layer }];
}

/** Ticks and tooltips of numbers of any size. */
export const NUMBER_FORMAT = ".6~g";

/** Room for a legend, and what an entry takes beside its text, in pixels. */
const LEGEND_WIDTH = 300;
const ENTRY_WIDTH = 28;
const LEGEND_FONT = 11;
const LEGEND_COLUMNS = 4;

/** A legend only where there is something to tell apart; as many entries in a row as have room. */
export function legendFor(values: readonly unknown[], title: string | null): Spec {
  const texts = [...new Set(values)].map(String);
  if (texts.length <= 1) return { legend: null };
  const widest = Math.max(...texts.map((text) => textWidth(text, LEGEND_FONT)));
  const columns = Math.max(1, Math.floor(LEGEND_WIDTH / (widest + ENTRY_WIDTH)));
  return { legend: { title, ...(columns < LEGEND_COLUMNS ? { columns } : {}) } };
}

/** The title of an axis of names: above it, where long names leave it room. */
export function namesAxis(title: string): Spec {
  return { title, titleAngle: 0, titleAlign: "right", titleAnchor: "start", titleY: -8, titleX: -6 };
}
