/** Tables, sizes and durations as text. */

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

/** Bytes in decimal units, three digits. */
export function formatBytes(bytes: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (bytes >= 999.5 && unit < units.length - 1) {
    bytes /= 1000;
    unit++;
  }
  return `${unit === 0 ? bytes.toFixed(0) : bytes.toPrecision(3)} ${units[unit]}`;
}

/** A duration in the unit that fits. */
export function secondsText(seconds: number): string {
  if (seconds < 1) return `${Math.max(0.01, seconds).toFixed(2)} s`;
  if (seconds < 120) return `${seconds.toPrecision(2)} s`;
  return seconds < 7200 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(0)} h`;
}
