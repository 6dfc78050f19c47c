/** Tables, sizes and durations as text. */

export { formatBytes, secondsText } from "../progress.ts";

/** Cells of a row by column. */
export type TableRow = Readonly<Record<string, string | number | boolean | null | undefined>>;

/** A column of a table. */
export interface Column {
  readonly key: string;
  /** With the unit. */
  readonly title: string;
  /** Default: text to the left, numbers to the right. */
  readonly align?: "left" | "right";
  /** Digits after the point of a number; default 0. */
  readonly digits?: number;
}

/** Stands for a value that a row does not have. */
const ABSENT = "-";

function cell(column: Column, row: TableRow): string {
  const value = Object.hasOwn(row, column.key) ? row[column.key] : undefined;
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
  const titles = columns.map(({ title }) => title);
  const rules = columns.map(({ title }, i) =>
    "-".repeat(Math.max(title.length, ...cells.map((line) => line[i]!.length)))
  );
  const toRight = columns.flatMap((column, i) => {
    const align = column.align ??
      (rows.some((row) => typeof row[column.key] === "number") ? "right" : "left");
    return align === "right" ? [i] : [];
  });
  return alignedLines([titles, rules, ...cells], toRight);
}

/** Rows of cells as lines, two spaces between columns; those in `right` are aligned to the right. */
function alignedLines(rows: readonly (readonly string[])[], right: readonly number[]): string[] {
  const widths: number[] = [];
  for (const row of rows) row.forEach((cell, i) => widths[i] = Math.max(widths[i] ?? 0, cell.length));
  return rows.map((row) =>
    row.map((cell, i) => right.includes(i) ? cell.padStart(widths[i]!) : cell.padEnd(widths[i]!)).join("  ")
      .trimEnd()
  );
}

/** Rows of cells as text; columns in `right` are aligned to the right. */
export function formatCells(rows: readonly (readonly string[])[], right: readonly number[] = []): string {
  return alignedLines(rows, right).join("\n");
}
