/**
 * Rows of measurements as Arquero tables: checked against their schema, compared across runs. Arquero is
 * loaded on the first call: most runs never need it. Files are in table_files.ts.
 */
import type { ColumnTable } from "arquero";
import type { CheckpointRow, PeersRow } from "../bench/rows.ts";
import { summarize } from "../eval/statistics.ts";
import { loadArquero } from "./_libraries.ts";
import { type ColumnSchema, columnsOf, type RowOf, TABLE_SCHEMAS, type TableName } from "./schema.ts";

export type { ColumnTable } from "arquero";

/** A measurement; nested values stay as they are. */
export type MeasuredRow = Readonly<Record<string, unknown>>;

/** The part of an Arquero table that charts and reports need. */
export interface TableLike {
  columnNames(): string[];
  numRows(): number;
  objects(): object[];
}

/** Most rows of a table: what a report of a browser's size can come from, many times over. */
export const MAX_TABLE_ROWS = 1_000_000;

/** A value of a table. */
export type Cell = string | number | boolean | null;

const article = (text: string) => (/^[aeiou]/.test(text) ? `an ${text}` : `a ${text}`);
const shown = (value: unknown) => {
  const text = typeof value === "string" ? JSON.stringify(value) : String(value);
  return text.length > 80 ? `${text.slice(0, 80)}…` : text;
};

/** The value as the column holds it, or what it must be. */
function checkCell({ type, required }: ColumnSchema, value: unknown): { cell: Cell } | { expected: string } {
  if (value === null || value === undefined) {
    return required === true ? { expected: article(type) } : { cell: null };
  }
  if (type === "integer") {
    return Number.isSafeInteger(value) ? { cell: Number(value) + 0 } : { expected: "a safe integer" };
  }
  if (typeof value === "string" && type === "text") return { cell: value.toWellFormed() };
  const found: string = typeof value;
  return found === type ? { cell: value as Cell } : { expected: `a ${type}` };
}

/** Rows as arrays by column, in the schema's order. @throws {TypeError} when a row does not fit it */
export function checkRows(name: TableName, rows: readonly object[]): Map<string, Cell[]> {
  const schema = columnsOf(name);
  if (rows.length > MAX_TABLE_ROWS) {
    throw new RangeError(
      `Cannot make table "${name}": it must have at most ${MAX_TABLE_ROWS} rows, got ${rows.length}`,
    );
  }
  const columns = new Map(Object.keys(schema).map((column): [string, Cell[]] => [column, []]));
  rows.forEach((row, i) => {
    for (const column of Object.keys(row)) {
      if (!columns.has(column)) {
        throw new TypeError(
          `Cannot make table "${name}": its columns must be ${[...columns.keys()].join(", ")}; row ${i} has ${
            shown(column)
          }`,
        );
      }
    }
    for (const [column, cells] of columns) {
      const value = (row as MeasuredRow)[column];
      const checked = checkCell(schema[column]!, value);
      if ("expected" in checked) {
        throw new TypeError(
          `Cannot make table "${name}": ${column} of row ${i} must be ${checked.expected}, got ${
            shown(value)
          }`,
        );
      }
      cells.push(checked.cell);
    }
  });
  return columns;
}

/**
 * A table of rows that a run measured: every column of its schema in order, `null` where a row has no value.
 *
 * @throws {TypeError} when a row does not fit the schema
 * @throws {RangeError} when there are more than {@linkcode MAX_TABLE_ROWS}
 *
 * @example
 * ```ts
 * import { tableFromRows } from "./tables.ts";
 * const table = await tableFromRows("drift", [{ model: "m", setting: "2 clip", step: 1, relativeDistance: 0.1 }]);
 * console.log(table.numRows(), table.columnNames());
 * ```
 */
export async function tableFromRows<Name extends TableName>(
  name: Name,
  rows: readonly RowOf<Name>[],
): Promise<ColumnTable> {
  const { table } = await loadArquero();
  return table([...checkRows(name, rows)] as [string, Cell[]][]);
}

/** The rows of a table as plain objects, as {@linkcode tableFromRows} takes them. */
export function rowsOf<Name extends TableName>(_name: Name, table: TableLike): RowOf<Name>[] {
  return table.objects() as RowOf<Name>[];
}

/** How two runs are joined. */
export interface CompareOptions {
  /** Default `layers`. */
  readonly table?: TableName | undefined;
  /** Columns that tell its rows apart. Default: its key without columns that are constant in each run. */
  readonly on?: readonly string[] | undefined;
}

/** The part of a run that a comparison needs. */
interface ComparableRun {
  readonly tables: { readonly [Name in TableName]?: TableLike };
}

/**
 * Two runs side by side: an outer join of one of their tables.
 *
 * Columns: those joined on; `in` (`both`, `a` or `b`); for every other column `<column>A` and `<column>B`,
 * and for numbers `<column>Difference`, B − A.
 *
 * @throws {TypeError} when a run lacks the table, or the table a column
 * @throws {RangeError} when the columns do not tell the rows of a run apart
 *
 * @example
 * ```ts
 * import { compareRuns, tableFromRows } from "./tables.ts";
 * const run = async (distance: number) => ({
 *   tables: { drift: await tableFromRows("drift", [{ model: "m", setting: "s", step: 1, relativeDistance: distance }]) },
 * });
 * const both = await compareRuns(await run(0.25), await run(0.5), { table: "drift" });
 * console.log(both.get("relativeDistanceDifference", 0)); // 0.25
 * ```
 */
export async function compareRuns(
  a: ComparableRun,
  b: ComparableRun,
  { table = "layers", on }: CompareOptions = {},
): Promise<ColumnTable> {
  const tableOf = ({ tables }: ComparableRun, which: string): TableLike => {
    const found = tables[table], names = Object.keys(tables).join(", ") || "none";
    if (found !== undefined) return found;
    throw new TypeError(`Cannot compare runs: both must have table "${table}", the ${which} has ${names}`);
  };
  const tableA = tableOf(a, "first"), tableB = tableOf(b, "second");
  return await compareTables(tableA, tableB, on ?? tellingKey(table, tableA, tableB));
}

/** The key of the table without columns that are constant in both runs, as the setting often is. */
function tellingKey(name: TableName, a: TableLike, b: TableLike): readonly string[] {
  const { key }: { readonly key: readonly string[] } = TABLE_SCHEMAS[name];
  const isConstant = (table: TableLike, column: string) =>
    new Set(table.objects().map((row) => (row as MeasuredRow)[column])).size <= 1;
  const telling = key.filter((column) => !(isConstant(a, column) && isConstant(b, column)));
  return telling.length > 0 ? telling : key;
}

/**
 * Two tables side by side, as {@linkcode compareRuns}.
 *
 * @throws {TypeError} when a table lacks a column of `on`
 * @throws {RangeError} when `on` does not tell the rows of a table apart
 */
export async function compareTables(a: TableLike, b: TableLike, on: readonly string[]): Promise<ColumnTable> {
  for (const table of [a, b]) {
    const missing = on.filter((column) => !table.columnNames().includes(column));
    if (on.length === 0 || missing.length > 0) {
      throw new TypeError(
        `Cannot compare tables: both must have the columns joined on, got ${
          missing.join(", ") || "none to join on"
        }`,
      );
    }
  }
  const keyed = (table: TableLike, which: string) => {
    const rows = new Map<string, MeasuredRow>();
    for (const row of table.objects() as MeasuredRow[]) {
      const key = JSON.stringify(on.map((column) => row[column] ?? null));
      if (rows.has(key)) {
        throw new RangeError(
          `Cannot compare tables: ${on.join(", ")} must tell rows apart, got ${
            shown(key)
          } twice in the ${which}`,
        );
      }
      rows.set(key, row);
    }
    return rows;
  };
  const rowsA = keyed(a, "first"), rowsB = keyed(b, "second");
  const keys = [...new Set([...rowsA.keys(), ...rowsB.keys()])];
  const others = [...new Set([...a.columnNames(), ...b.columnNames()])].filter((name) => !on.includes(name));
  const pairs = keys.map((key) => [rowsA.get(key), rowsB.get(key)] as const);
  const columns: [string, unknown[]][] = [
    ...on.map((column): [string, unknown[]] => [column, pairs.map(([a, b]) => (a ?? b)![column] ?? null)]),
    ["in", pairs.map(([a, b]) => a === undefined ? "b" : b === undefined ? "a" : "both")],
  ];
  for (const column of others) {
    const valuesA = pairs.map(([row]) => row?.[column] ?? null);
    const valuesB = pairs.map(([, row]) => row?.[column] ?? null);
    if ([...valuesA, ...valuesB].every((value) => value === null)) continue;
    columns.push([`${column}A`, valuesA], [`${column}B`, valuesB]);
    if ([...valuesA, ...valuesB].every((value) => value === null || typeof value === "number")) {
      columns.push([
        `${column}Difference`,
        valuesA.map((value, i) => {
          const other = valuesB[i];
          return value === null || other === null ? null : Number(other) - Number(value);
        }),
      ]);
    }
  }
  const { table } = await loadArquero();
  return table(columns);
}

/** Clip search beside round to nearest at one bit width, over all models of a run. */
interface SolverComparison {
  readonly bits: number;
  readonly models: number;
  /** Median over the models of error(clip) / error(round). */
  readonly errorRatio: number;
  /** Median over the models of seconds(clip) / seconds(round), of paired runs. */
  readonly timeRatio: number;
}

/**
 * Clip search beside round to nearest, by bits, from the checkpoint suite's rows; empty where only one solver
 * ran.
 *
 * @example
 * ```ts
 * const rows = [
 *   { model: "a", bits: 2, solver: "round", relativeRmsError: 0.4, ratio: null },
 *   { model: "a", bits: 2, solver: "clip", relativeRmsError: 0.3, ratio: { median: 1.1 } },
 * ];
 * console.log(compareSolvers(rows)); // [{ bits: 2, models: 1, errorRatio: 0.75, timeRatio: 1.1 }], about
 * ```
 */
export function compareSolvers(
  rows: readonly (Pick<CheckpointRow, "model" | "bits" | "relativeRmsError"> & {
    readonly solver: string;
    readonly ratio: { readonly median: number } | null;
  })[],
): SolverComparison[] {
  const pairs = rows.filter(({ solver }) => solver === "clip").flatMap((clip) => {
    const { model, bits, ratio } = clip;
    const round = rows.find((row) => row.solver === "round" && row.model === model && row.bits === bits);
    if (round === undefined || ratio === null) return [];
    return [{ bits, error: clip.relativeRmsError / round.relativeRmsError, time: ratio.median }];
  });
  return [...Map.groupBy(pairs, ({ bits }) => bits)].sort(([a], [b]) => a - b).map(([bits, own]) => ({
    bits,
    models: own.length,
    errorRatio: summarize(own.map(({ error }) => error)).median,
    timeRatio: summarize(own.map(({ time }) => time)).median,
  }));
}

/** A method that no other of the same model beats in both bits and distance. */
interface FrontPoint {
  readonly model: string;
  readonly method: string;
  readonly kind: string;
  readonly bitsPerWeight: number;
  /** KL in nats or noise error, as the model's rows have it. */
  readonly distance: number;
}

/**
 * The Pareto front of each model, from the peers suite's rows, fewest bits first: every method for which no
 * other needs as few bits and comes as close to full precision. Intervals are not looked at.
 *
 * @example
 * ```ts
 * const row = (method: string, bitsPerWeight: number, value: number) =>
 *   ({ model: "a", method, kind: "ours", bitsPerWeight, distance: { value } });
 * const front = paretoFront([row("round", 2, 0.5), row("clip", 2, 0.3), row("Q2_K", 2.6, 0.4)]);
 * console.log(front); // clip alone
 * ```
 */
export function paretoFront(
  rows: readonly (Pick<PeersRow, "model" | "method" | "bitsPerWeight"> & {
    readonly kind: string | null;
    readonly distance: { readonly value: number };
  })[],
): FrontPoint[] {
  const points = rows.flatMap(({ model, method, kind, bitsPerWeight, distance }): FrontPoint[] =>
    bitsPerWeight === null
      ? []
      : [{ model, method, kind: String(kind), bitsPerWeight, distance: distance.value }]
  );
  const beats = (a: FrontPoint, b: FrontPoint) =>
    a.model === b.model && a.bitsPerWeight <= b.bitsPerWeight && a.distance <= b.distance &&
    (a.bitsPerWeight < b.bitsPerWeight || a.distance < b.distance);
  const byName = (a: string, b: string) => Number(a > b) - Number(a < b);
  const order = (a: FrontPoint, b: FrontPoint) =>
    byName(a.model, b.model) || a.bitsPerWeight - b.bitsPerWeight || a.distance - b.distance;
  return points.filter((row) => !points.some((other) => beats(other, row))).sort(order);
}
