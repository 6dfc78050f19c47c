/** Tables as text: columns aligned, units in the titles. */

export type TableRow = Readonly<Record<string, string | number | boolean | null | undefined>>;

export interface Column {
  readonly key: string;
  /** With the unit. */
  readonly title: string;
  /** Default: text to the left, numbers to the right. */
  readonly align?: "left" | "right";
  /** Digits after the point of a number; default 0. */
  readonly digits?: number;
}

/** What stands for a value that a row does not have. */
const ABSENT = "-";

function cell(column: Column, row: TableRow): string {
  const value = row[column.key];
  if (value === null || value === undefined) return ABSENT;
  if (typeof value === "boolean") return value ? "yes" : "no";
  return typeof value === "number" ? value.toFixed(column.digits ?? 0) : value;
}

/**
 * Lines of a table: titles, a rule, the rows.
 *
 * @example
 * ```ts
 * formatTable([{ key: "name", title: "name" }, { key: "rate", title: "Mw/s", digits: 1 }], [{ name: "memcpy", rate: 2 }]);
 * // ["name    Mw/s", "------  ----", "memcpy   2.0"]
 * ```
 */
export function formatTable(columns: readonly Column[], rows: readonly TableRow[]): string[] {
  const cells = rows.map((row) => columns.map((column) => cell(column, row)));
  const widths = columns.map((column, i) =>
    Math.max(column.title.length, ...cells.map((line) => line[i]!.length))
  );
  const toRight = columns.map((column) =>
    column.align === undefined
      ? rows.some((row) => typeof row[column.key] === "number")
      : column.align === "right"
  );
  const line = (texts: readonly string[]) =>
    texts.map((text, i) => toRight[i] ? text.padStart(widths[i]!) : text.padEnd(widths[i]!)).join("  ")
      .trimEnd();
  return [
    line(columns.map((column) => column.title)),
    widths.map((width) => "-".repeat(width)).join("  "),
    ...cells.map(line),
  ];
}
