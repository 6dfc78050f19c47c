/**
 * Tables as bytes and back: Arrow IPC, Parquet, CSV and JSON. Each of them holds everything, NaN and
 * infinities and the difference between an empty text and none; what is read is checked against the table's
 * schema.
 */
import type { ColumnTable } from "arquero";
import { existsSync } from "node:fs";
import process from "node:process";
import { Worker } from "node:worker_threads";
import { FormatError } from "../errors.ts";
import { quote, readWhole, writeWhole } from "../files/whole.ts";
import { isJsonObject, JsonFault, parseJson } from "../files/json.ts";
import { loadArquero, loadFlechette, loadParquetReader, loadParquetWriter } from "./_libraries.ts";
import { columnsOf, type ColumnType, TABLE_NAMES, TABLE_VERSION, type TableName } from "./schema.ts";
import { type Cell, checkRows, MAX_TABLE_ROWS, type TableLike } from "./tables.ts";

/** Formats by the ends of file names. */
export const TABLE_FORMATS = ["arrow", "parquet", "csv", "json"] as const;
/** A file format of tables. */
export type TableFormat = (typeof TABLE_FORMATS)[number];

/** Largest file that is read as a table. */
export const MAX_TABLE_BYTES = 256 * 2 ** 20;

/** Where a file says which table it is; the version of its schema is beside it. */
const NAME_KEY = "arrowquant.table";
const VERSION_KEY = "arrowquant.table_version";

/**
 * A table as the bytes of a file.
 *
 * @throws {TypeError} when the table does not fit its schema
 *
 * @example
 * ```ts
 * import { decodeTable, encodeTable } from "./table_files.ts";
 * import { tableFromRows } from "./tables.ts";
 * const table = await tableFromRows("drift", [{ model: "m", setting: "2 clip", step: 1, relativeDistance: NaN }]);
 * for (const format of ["arrow", "parquet", "csv", "json"] as const) {
 *   const back = await decodeTable("drift", await encodeTable("drift", table, format), format);
 *   console.log(format, back.get("relativeDistance", 0)); // NaN
 * }
 * ```
 */
export async function encodeTable(
  name: TableName,
  table: TableLike,
  format: TableFormat,
): Promise<Uint8Array<ArrayBuffer>> {
  const content = await CODECS[format].encode(name, checkRows(name, table.objects()));
  return typeof content === "string" ? new TextEncoder().encode(content) : content;
}

/**
 * The table that a file's bytes hold. Arrow and Parquet are taken apart on another thread, which is ended
 * where it takes longer, or more memory, than a table of that size can.
 *
 * @throws {FormatError} when they do not hold this table in this version
 */
export async function decodeTable(
  name: TableName,
  bytes: Uint8Array<ArrayBuffer>,
  format: TableFormat,
  path = `a table in ${format}`,
): Promise<ColumnTable> {
  const request = { name, bytes, format, path };
  const isBinary = format === "arrow" || format === "parquet";
  const columns = isBinary ? await columnsOnThread(request) : await columnsOfBytes(request);
  const { table } = await loadArquero();
  return table(columns as [string, Cell[]][]);
}

/** Bytes to decode as a table. */
export interface TableBytes {
  readonly name: TableName;
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly format: TableFormat;
  /** For messages. */
  readonly path: string;
}

/** Columns by name, in the schema's order. */
export type NamedColumns = readonly (readonly [string, readonly Cell[]])[];

function tableFault({ name, path }: TableBytes, reason: string, cause?: unknown): FormatError {
  return new FormatError(`Cannot read ${quote(path)} as table "${name}": ${reason}`, { path, cause });
}

/** Decodes and checks bytes here. @throws {FormatError} when they are not this table */
export async function columnsOfBytes(request: TableBytes): Promise<NamedColumns> {
  const { name, bytes, format } = request;
  const fail = (reason: string, cause?: unknown) => tableFault(request, reason, cause);
  if (bytes.length > MAX_TABLE_BYTES) {
    throw fail(`it must have at most ${MAX_TABLE_BYTES} bytes, got ${bytes.length}`);
  }
  let rows: Rows;
  try {
    rows = await CODECS[format].decode(name, bytes);
  } catch (error) {
    if (error instanceof TableFault) throw fail(error.message, error.cause);
    // Whatever a parser stumbles over, the file is not what its name says.
    throw fail(`it must be ${format}, got ${error instanceof Error ? error.message : error}`, error);
  }
  let columns: Map<string, Cell[]>;
  try {
    columns = checkRows(name, rows);
  } catch (error) {
    if (!(error instanceof TypeError || error instanceof RangeError)) throw error;
    throw fail(error.message.replace(/^Cannot make table "\w+": /, ""), error);
  }
  // One text may stand in a million rows without a byte more in the file: a page or a print has them all.
  let characters = 0;
  for (const cells of columns.values()) {
    for (const cell of cells) if (typeof cell === "string") characters += cell.length;
  }
  if (characters <= MAX_TABLE_BYTES) return [...columns];
  throw fail(`its texts must have at most ${MAX_TABLE_BYTES} characters together, got ${characters}`);
}

/** Time on a processor and memory that a table may take: so much, and more for each of its bytes. */
const DECODE_LIMITS = { milliseconds: 5000, millisecondsPerByte: 2e-3, bytes: 2 ** 30, bytesPerByte: 32 };
/** On a busy machine a table may take this many times as long as on one with a processor to spare. */
const BUSY_FACTOR = 20;
/** Between two looks at time and memory. */
const WATCH_MILLISECONDS = 20;

/** Answer of the thread: columns, or the reason why there are none. */
export type TableAnswer = { readonly columns: NamedColumns } | { readonly reason: string };

/** {@linkcode columnsOfBytes} on another thread; here where there are none, as in a bundle. */
export async function columnsOnThread(request: TableBytes, limits = DECODE_LIMITS): Promise<NamedColumns> {
  const place = new URL(`./table_thread.${import.meta.url.endsWith(".ts") ? "ts" : "js"}`, import.meta.url);
  if (place.protocol === "file:" && !existsSync(place)) return await columnsOfBytes(request);
  const milliseconds = limits.milliseconds + limits.millisecondsPerByte * request.bytes.length;
  const most = limits.bytes + limits.bytesPerByte * request.bytes.length;
  const begin = performance.now(), usage = process.cpuUsage(), before = process.memoryUsage().rss;
  const isLate = () => {
    const elapsed = performance.now() - begin, { user, system } = process.cpuUsage(usage);
    return elapsed > milliseconds &&
      ((user + system) / 1000 > milliseconds || elapsed > BUSY_FACTOR * milliseconds);
  };
  const thread = new Worker(place);
  let watch: ReturnType<typeof setInterval> | undefined;
  try {
    const answer = await new Promise<TableAnswer>((resolve, reject) => {
      const look = () => {
        const grown = process.memoryUsage().rss - before;
        if (isLate()) {
          reject(
            tableFault(request, `it must be read within ${Math.ceil(milliseconds / 1000)} seconds, got more`),
          );
        } else if (grown > most) {
          reject(tableFault(request, `it must take at most ${most} bytes of memory, got ${grown}`));
        }
      };
      thread.on("message", (answer: TableAnswer) => {
        look(); // what is over a limit is refused, also where it is there before the next look
        resolve(answer);
      });
      thread.on("error", (cause) => reject(tableFault(request, `it must be ${request.format}`, cause)));
      thread.postMessage(request);
      watch = setInterval(look, WATCH_MILLISECONDS);
    });
    if ("columns" in answer) return answer.columns;
    throw new FormatError(answer.reason, { path: request.path });
  } finally {
    clearInterval(watch);
    await thread.terminate();
  }
}

function formatOf(path: string): TableFormat {
  const format = TABLE_FORMATS.find((ending) => path.endsWith(`.${ending}`));
  if (format !== undefined) return format;
  throw new TypeError(
    `Cannot tell the format of ${quote(path)}: its name must end with .${TABLE_FORMATS.join(", .")}`,
  );
}

/**
 * Writes a table; the end of the name says how: `.arrow`, `.parquet`, `.csv` or `.json`.
 *
 * @throws {TypeError} when the name ends otherwise or the table does not fit its schema
 * @throws {OutputError} when the system refuses
 */
export async function writeTable(path: string, name: TableName, table: TableLike): Promise<void> {
  writeWhole(path, await encodeTable(name, table, formatOf(path)));
}

/**
 * Reads a table; the end of the name says how.
 *
 * @throws {CheckpointError | FormatError} when it cannot be read or is not this table
 */
export async function readTable(path: string, name: TableName): Promise<ColumnTable> {
  const format = formatOf(path);
  const refuse = (reason: string) =>
    new FormatError(`Cannot read ${quote(path)} as table "${name}": ${reason}`, { path });
  return await decodeTable(name, readWhole(path, MAX_TABLE_BYTES, refuse), format, path);
}

/** A file that parses but is not the table. */
class TableFault extends Error {}

/** Refuses another table or version, and columns that this table has not, or lacks. */
function checkHeader(
  name: TableName,
  columns: readonly string[],
  stored?: { readonly name: string | undefined; readonly version: string | undefined },
): void {
  if (stored !== undefined && stored.name !== name) {
    throw new TableFault(`it must be that table, got ${stored.name ?? "a file that names none"}`);
  }
  if (stored !== undefined && stored.version !== String(TABLE_VERSION)) {
    throw new TableFault(`its version must be ${TABLE_VERSION}, got ${stored.version}`);
  }
  const schema = columnsOf(name), wanted = Object.keys(schema);
  const missing = wanted.filter((column) => !columns.includes(column) && schema[column]!.isLater !== true);
  if (missing.length > 0) throw new TableFault(`it must have all columns, lacks ${missing.join(", ")}`);
  const [unknown] = columns.filter((column) => !wanted.includes(column));
  if (unknown !== undefined) {
    throw new TableFault(`its columns must be ${wanted.join(", ")}; it has ${quote(unknown)}`);
  }
}

type Bytes = Uint8Array<ArrayBuffer>;
type Columns = ReadonlyMap<string, Cell[]>;
type Rows = Record<string, unknown>[];

/** A format: how columns become a file's text or bytes, and how those become rows. */
interface Codec {
  encode(name: TableName, columns: Columns): Bytes | string | Promise<Bytes>;
  decode(name: TableName, bytes: Bytes): Rows | Promise<Rows>;
}

const CODECS: Readonly<Record<TableFormat, Codec>> = {
  arrow: { encode: encodeArrow, decode: decodeArrow },
  parquet: { encode: encodeParquet, decode: decodeParquet },
  csv: {
    encode: csvText,
    decode: (name, bytes) => parseCsv(name, new TextDecoder("utf-8", { fatal: true }).decode(bytes)),
  },
  json: { encode: jsonText, decode: decodeJson },
};

const columnsOfType = (name: TableName, wanted: ColumnType): string[] =>
  Object.entries(columnsOf(name)).flatMap(([column, { type }]) => type === wanted ? [column] : []);

/** Cells as 64-bit integers in a column of integers, as they are in others. */
const withBigInts = (type: ColumnType, cells: readonly Cell[]) =>
  type === "integer" ? cells.map((cell) => cell === null ? null : BigInt(cell)) : [...cells];

/** Something of each row, whose cells are given by column. */
const eachRow = <T>(columns: Columns, visit: (cellOf: (column: string) => Cell) => T): T[] =>
  columns.values().next().value!.map((_, i) => visit((column) => columns.get(column)![i]!));

function countRows(rows: number): number {
  if (rows <= MAX_TABLE_ROWS) return rows;
  throw new TableFault(`it must have at most ${MAX_TABLE_ROWS} rows, got ${rows}`);
}

// Arrow IPC
// ----------------------------------------------------------------------------------------------------

async function encodeArrow(name: TableName, columns: Columns): Promise<Bytes> {
  const arrow = await loadFlechette();
  const types = {
    text: arrow.utf8(),
    integer: arrow.int64(),
    number: arrow.float64(),
    boolean: arrow.bool(),
  } satisfies Record<ColumnType, unknown>;
  const schema = columnsOf(name);
  const table = arrow.tableFromColumns(
    [...columns].map(([column, cells]) => {
      const { type } = schema[column]!;
      return [column, arrow.columnFromArray(withBigInts(type, cells), types[type])];
    }),
  );
  table.schema.metadata = new Map([[NAME_KEY, name], [VERSION_KEY, String(TABLE_VERSION)]]);
  for (const field of table.schema.fields) {
    const { unit, doc } = schema[field.name]!;
    field.metadata = new Map([["doc", doc], ...(unit === undefined ? [] : [["unit", unit] as const])]);
  }
  const bytes = arrow.tableToIPC(table, { format: "file" });
  if (bytes === null) throw new TypeError(`Cannot encode table "${name}": it must have columns, got none`);
  return bytes as Uint8Array<ArrayBuffer>;
}

async function decodeArrow(name: TableName, bytes: Bytes) {
  const arrow = await loadFlechette();
  const table = arrow.tableFromIPC(bytes);
  const { metadata, fields } = table.schema;
  const columns = fields.map((field) => field.name);
  checkHeader(name, columns, { name: metadata?.get(NAME_KEY), version: metadata?.get(VERSION_KEY) });
  countRows(table.numRows);
  return table.toArray() as Rows;
}

// Parquet
// ------------------------------------------------------------------------------------------------------

const PARQUET_TYPES = { text: "STRING", integer: "INT64", number: "DOUBLE", boolean: "BOOLEAN" } as const;

async function encodeParquet(name: TableName, columns: Columns): Promise<Bytes> {
  const { parquetWriteBuffer } = await loadParquetWriter();
  const schema = columnsOf(name);
  return new Uint8Array(parquetWriteBuffer({
    columnData: [...columns].map(([column, cells]) => {
      const { type } = schema[column]!;
      return { name: column, data: withBigInts(type, cells), type: PARQUET_TYPES[type] };
    }),
    kvMetadata: [{ key: NAME_KEY, value: name }, { key: VERSION_KEY, value: String(TABLE_VERSION) }],
    createdBy: "arrowquant",
  }));
}

async function decodeParquet(name: TableName, bytes: Bytes) {
  const { parquetMetadata, parquetReadObjects, parquetSchema } = await loadParquetReader();
  const file = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
  const metadata = parquetMetadata(file);
  const stored = new Map(metadata.key_value_metadata?.map(({ key, value }) => [key, value]));
  const columns = parquetSchema(metadata).children.map(({ element }) => element.name);
  checkHeader(name, columns, { name: stored.get(NAME_KEY), version: stored.get(VERSION_KEY) });
  countRows(Number(metadata.num_rows));
  const rows = await parquetReadObjects({ file, metadata });
  const integers = columnsOfType(name, "integer");
  for (const row of rows) {
    for (const column of integers) if (typeof row[column] === "bigint") row[column] = Number(row[column]);
  }
  return rows;
}

// CSV
// ----------------------------------------------------------------------------------------------------------

/** RFC 4180; texts are quoted, so that an empty field is no value and `""` an empty text. */
function csvText(name: TableName, columns: Columns): string {
  const schema = columnsOf(name);
  const names = [...columns.keys()];
  const field = (column: string, cell: Cell) =>
    cell === null
      ? ""
      : schema[column]!.type === "text"
      ? `"${String(cell).replace(FORMULA, "'$&").replaceAll('"', '""')}"`
      : numberText(cell);
  const lines = eachRow(columns, (cellOf) => names.map((column) => field(column, cellOf(column))).join(","));
  return `${[names.join(","), ...lines].join("\r\n")}\r\n`;
}

/**
 * The beginning of a text that a spreadsheet would take for a formula. It is written behind an apostrophe,
 * and so is one that already has apostrophes there, so that reading takes away what writing put there.
 */
const FORMULA = /^'*[=+\-@\t\r]/;
const numberText = (cell: Cell) => Object.is(cell, -0) ? "-0" : String(cell);

const NUMBER = /^(?:-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|NaN|-?Infinity)$/;

function parseCsv(name: TableName, text: string): Rows {
  const lines = csvFields(text);
  const header = lines.shift()?.map(({ text }) => text) ?? [];
  checkHeader(name, header);
  if (new Set(header).size < header.length) throw new TableFault("no column may come twice");
  countRows(lines.length);
  const schema = columnsOf(name);
  return lines.map((fields, i) => {
    if (fields.length !== header.length) {
      throw new TableFault(`row ${i} must have ${header.length} fields, got ${fields.length}`);
    }
    return Object.fromEntries(header.map((column, j) => {
      const { text, isQuoted } = fields[j]!;
      const { type } = schema[column]!;
      if (text === "" && !isQuoted) return [column, null];
      if (type === "text") return [column, text.startsWith("'") && FORMULA.test(text) ? text.slice(1) : text];
      if (type === "boolean") return [column, text === "true" ? true : text === "false" ? false : text];
      return [column, NUMBER.test(text) ? Number(text) : text];
    }));
  });
}

interface CsvField {
  readonly text: string;
  readonly isQuoted: boolean;
}

function csvFields(text: string): CsvField[][] {
  const lines: CsvField[][] = [];
  const pattern = /(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r?\n|$)/y;
  let line: CsvField[] = [];
  while (pattern.lastIndex < text.length || line.length > 0) {
    const at = pattern.lastIndex;
    const match = pattern.exec(text);
    if (match === null) {
      throw new TableFault(`a quote is not closed or stands inside a field, at character ${at}`);
    }
    const [, quoted, plain, end] = match;
    line.push({ text: quoted?.replaceAll('""', '"') ?? plain ?? "", isQuoted: quoted !== undefined });
    if (end === ",") continue;
    lines.push(line);
    line = [];
  }
  return lines;
}

// JSON
// ---------------------------------------------------------------------------------------------------------

const JSON_RULES = { maxDepth: 4, maxKeys: 50_000_000, maxItems: MAX_TABLE_ROWS, integersOnly: false };

/** One row a line; NaN and infinities, which JSON has not, are texts. */
function jsonText(name: TableName, columns: Columns): string {
  const names = [...columns.keys()];
  const value = (cell: Cell) => typeof cell === "number" && !Number.isFinite(cell) ? String(cell) : cell;
  const rows = eachRow(
    columns,
    (cellOf) => JSON.stringify(Object.fromEntries(names.map((column) => [column, value(cellOf(column))]))),
  );
  return `{"table":${JSON.stringify(name)},"version":${TABLE_VERSION},"columns":${
    JSON.stringify(names)
  },"rows":[\n${rows.join(",\n")}\n]}\n`;
}

function decodeJson(name: TableName, bytes: Bytes): Rows {
  let value: unknown;
  try {
    value = parseJson(bytes, JSON_RULES);
  } catch (error) {
    if (error instanceof JsonFault) throw new TableFault(error.message, { cause: error });
    throw error;
  }
  const { table, version, columns, rows } = isJsonObject(value) ? value : {};
  if (!Array.isArray(rows) || !Array.isArray(columns) || !rows.every(isJsonObject)) {
    throw new TableFault('it must be {"table", "version", "columns", "rows"}');
  }
  checkHeader(name, columns.map(String), { name: String(table), version: String(version) });
  const numbers = columnsOfType(name, "number");
  for (const row of rows as Rows) {
    for (const column of numbers) {
      const cell = row[column];
      if (cell === "NaN" || cell === "Infinity" || cell === "-Infinity") row[column] = Number(cell);
    }
  }
  return rows as Rows;
}

/** Whether a text is a table's name. */
export function isTableName(text: string): text is TableName {
  return (TABLE_NAMES as readonly string[]).includes(text);
}
