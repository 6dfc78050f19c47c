/** Tables as data of a page: columns as arrays, repeated texts once, numbers to six digits, bounded bytes. */
import type { Section } from "../../bench/suite.ts";
import type { Json } from "../_chart.ts";
import { columnsOf, type ColumnType, type TableName } from "../schema.ts";
import type { MeasuredRow, TableLike } from "../tables.ts";

interface PageColumn {
  readonly name: string;
  readonly title: string;
  readonly type: ColumnType;
  readonly unit?: string;
  readonly doc?: string;
  readonly digits?: number;
  readonly values: readonly Json[];
  /** Where it is there, `values` are indices into it. */
  readonly words?: readonly string[];
}

export interface PageTable {
  readonly title: string;
  readonly doc: string;
  /** Rows that are there. */
  readonly rows: number;
  /** Rows that the table has, where not all are there. */
  readonly total?: number;
  readonly columns: readonly PageColumn[];
}

/** Bytes of all tables of a page together: with the libraries it stays below five million. */
const PAGE_TABLE_BYTES = 2_800_000;

const DIGITS = 6;

function cellOf(value: unknown): Json {
  if (typeof value === "number") {
    if (!Number.isFinite(value)) return String(value);
    return Number.isInteger(value) ? value : Number(value.toPrecision(DIGITS));
  }
  return typeof value === "string" || typeof value === "boolean" ? value : null;
}

/** Texts that repeat as indices. */
function packed(column: Omit<PageColumn, "values" | "words">, values: readonly Json[]): PageColumn {
  if (column.type !== "text") return { ...column, values };
  const words = [...new Set(values.filter((value) => value !== null).map(String))];
  if (words.length * 2 > values.length) return { ...column, values };
  const index = new Map(words.map((word, i) => [word, i]));
  return {
    ...column,
    words,
    values: values.map((value) => value === null ? null : index.get(String(value))!),
  };
}

/** A table of a schema; columns without any value are left out. */
export function pageTable(name: TableName, doc: string, table: TableLike): PageTable {
  const schema = columnsOf(name);
  const rows = table.objects() as MeasuredRow[];
  const columns = Object.entries(schema).flatMap(([column, { type, unit, doc }]): PageColumn[] => {
    const values = rows.map((row) => cellOf(row[column]));
    if (values.every((value) => value === null) && rows.length > 0) return [];
    const isRatio = unit === undefined || unit === "1";
    return [packed({ name: column, title: column, type, doc, ...(isRatio ? {} : { unit }) }, values)];
  });
  return { title: name, doc, rows: rows.length, columns };
}

/** A table that is none of the schemas, as a comparison is. */
export function plainTable(title: string, doc: string, table: TableLike): PageTable {
  const rows = table.objects() as MeasuredRow[];
  const columns = table.columnNames().map((column) => {
    const values = rows.map((row) => cellOf(row[column]));
    const type = rows.some((row) => typeof row[column] === "number")
      ? "number"
      : rows.some((row) => typeof row[column] === "boolean")
      ? "boolean"
      : "text";
    return packed({ name: column, title: column, type }, values);
  });
  return { title, doc, rows: rows.length, columns };
}

/** A table as a command printed it. */
export function sectionTable({ title, notes, columns, rows }: Section): PageTable {
  return {
    title,
    doc: notes.join(" "),
    rows: rows.length,
    columns: columns.map(({ key, title, digits }) => {
      const values = rows.map((row) => cellOf(row[key]));
      const present = values.filter((value) => value !== null);
      const isNumber = present.length > 0 && present.every((value) => typeof value === "number");
      const isBoolean = present.length > 0 && present.every((value) => typeof value === "boolean");
      const type = isNumber ? "number" : isBoolean ? "boolean" : "text";
      return packed(
        { name: key, title, type, ...(isNumber ? { digits: digits ?? 0 } : {}) },
        type !== "text" ? values : values.map((value) => value === null ? null : String(value)),
      );
    }),
  };
}

function firstRows(table: PageTable, rows: number): PageTable {
  return {
    ...table,
    rows,
    total: table.total ?? table.rows,
    columns: table.columns.map((column) => ({ ...column, values: column.values.slice(0, rows) })),
  };
}

/** Tables that together fit: large ones lose their last rows, all to the same size. */
export function fitted(tables: readonly PageTable[], bytes: number = PAGE_TABLE_BYTES): PageTable[] {
  const sizes = tables.map((table) => JSON.stringify(table).length);
  let left = bytes;
  const limits = new Map<number, number>();
  [...sizes.keys()].sort((a, b) => sizes[a]! - sizes[b]!).forEach((i, done) => {
    const fair = Math.floor(left / (tables.length - done));
    limits.set(i, fair);
    left -= Math.min(fair, sizes[i]!);
  });
  return tables.map((table, i) => {
    const limit = limits.get(i)!;
    let fit = table;
    while (JSON.stringify(fit).length > limit && fit.rows > 0) {
      const share = limit / JSON.stringify(fit).length;
      fit = firstRows(fit, Math.min(fit.rows - 1, Math.floor(fit.rows * share * 0.95)));
    }
    return fit;
  });
}
