/**
 * A run on disk: `run.json` - command, environment, configuration, and which tables there are - and the
 * tables beside it as Parquet. A report is made from nothing else. A folder from elsewhere is checked like
 * any other untrusted file.
 */
import { existsSync, statSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import type { Goal, Section, Skipped } from "../bench/suite.ts";
import { CheckpointError, FormatError } from "../errors.ts";
import { reading } from "../files/positional.ts";
import { checkReplaceable, writeResult } from "../files/results.ts";
import { makeFolder, quote } from "../files/whole.ts";
import { checkOwnFolder } from "../output/own_folder.ts";
import { TOOL_VERSION } from "../output/record.ts";
import { isJsonObject, readJsonFile } from "../files/json.ts";
import type { Json } from "./_chart.ts";
import type { Tables } from "./rows.ts";
import { TABLE_NAMES, type TableName } from "./schema.ts";
import { isTableName, readTable, writeTable } from "./table_files.ts";
import type { ColumnTable } from "./tables.ts";

/** File that makes a folder a run. */
export const RUN_FILE = "run.json";
const TABLES_FOLDER = "tables";
const RUN_FORMAT = "arrowquant-run";
/** Version of the format of saved runs. */
export const RUN_FORMAT_VERSION = 1;

/** A line of the summary. */
export interface SummaryItem {
  readonly label: string;
  readonly value: string;
}

/** Errors of a quantization; null where they were not measured. */
export interface RunErrors {
  /** Name of the metric of `heldOut`. */
  readonly metric: string;
  readonly heldOut: number | null;
  /** Median relative output error of the solved layers. */
  readonly output: number | null;
  /** Relative RMS of the weights, which does not rank solvers. */
  readonly weights: number | null;
  /** Bits per weight of all tensors. */
  readonly bits: number;
}

/** A finished run. */
export interface Run {
  /** Short, for the columns of a comparison. */
  readonly name: string;
  /** As in `bench: accuracy`. */
  readonly title: string;
  /** The command that does it again. */
  readonly command: string;
  /** ISO 8601. */
  readonly date: string;
  readonly seconds: number;
  readonly toolVersion: string;
  readonly environment: Readonly<Record<string, Json>>;
  readonly configuration: Readonly<Record<string, Json>>;
  readonly summary: readonly SummaryItem[];
  /** Of a quantization. */
  readonly errors?: RunErrors | undefined;
  /** Tables as the command printed them. */
  readonly sections: readonly Section[];
  readonly goals: readonly Goal[];
  readonly skipped: readonly Skipped[];
  readonly tables: Tables;
}

/**
 * Writes a run into a folder, made where it is not there; `run.json` last.
 *
 * @param force whether files of somebody else are replaced
 * @throws {OutputError} when the system refuses, or a file there is somebody else's
 */
export async function writeRun(folder: string, run: Run, force = false): Promise<void> {
  checkOwnFolder(join(folder, TABLES_FOLDER));
  makeFolder(join(folder, TABLES_FOLDER));
  const { tables, name: _, ...rest } = run;
  const names = TABLE_NAMES.filter((name) => tables[name] !== undefined);
  for (const name of names) {
    const path = join(folder, TABLES_FOLDER, `${name}.parquet`);
    checkReplaceable(path, force);
    await writeTable(path, name, tables[name]!);
  }
  const content = {
    format: RUN_FORMAT,
    formatVersion: RUN_FORMAT_VERSION,
    ...rest,
    tables: Object.fromEntries(
      names.map((
        name,
      ) => [name, { file: `${TABLES_FOLDER}/${name}.parquet`, rows: tables[name]!.numRows() }]),
    ),
  };
  writeResult(join(folder, RUN_FILE), `${JSON.stringify(content, null, 1)}\n`, force);
}

/**
 * Reads a run from its folder.
 *
 * @throws {CheckpointError} when a file cannot be read
 * @throws {FormatError} when it is not a run, one of another version, or a table is not what it says
 */
export async function readRun(folder: string): Promise<Run> {
  const path = join(folder, RUN_FILE);
  checkIsFolder(folder);
  const { fault, object, run: checkRun } = checksOf(path);
  const value = object(readJsonFile(path), "the file");
  const { format, formatVersion } = value;
  if (format !== RUN_FORMAT) throw fault("format", `must be "${RUN_FORMAT}"`, format);
  if (formatVersion !== RUN_FORMAT_VERSION) {
    const wanted = `must be ${RUN_FORMAT_VERSION} for this version (${TOOL_VERSION})`;
    throw fault("formatVersion", wanted, formatVersion);
  }
  const tables: { [Name in TableName]?: ColumnTable } = {};
  for (const [name, entry] of Object.entries(object(value["tables"], "tables"))) {
    if (!isTableName(name)) throw fault("tables", `must be some of ${TABLE_NAMES.join(", ")}`, name);
    const { rows, file } = object(entry, `tables.${name}`);
    const wanted = `${TABLES_FOLDER}/${name}.parquet`;
    if (file !== wanted) throw fault(`tables.${name}.file`, `must be "${wanted}"`, file);
    const table = await readTable(join(folder, TABLES_FOLDER, `${name}.parquet`), name);
    if (table.numRows() !== rows) {
      throw fault(`tables.${name}.rows`, `must be the ${table.numRows()} rows that the file has`, rows);
    }
    tables[name] = table;
  }
  return { name: basename(resolve(folder)), ...checkRun(value, ""), tables };
}

function checkIsFolder(folder: string): void {
  if (reading(folder, () => statSync(folder).isDirectory())) {
    if (existsSync(join(folder, RUN_FILE))) return;
    throw new CheckpointError(
      `Cannot read ${quote(folder)}: it must have ${RUN_FILE}, as a folder of quantize --report or bench ` +
        "--report has, got none",
      { path: folder },
    );
  }
  const message = `Cannot read ${quote(folder)}: a run must be a folder with ${RUN_FILE}, got a file`;
  throw new FormatError(message, { path: folder });
}

/** Returns a value of this type, or throws an error that names its place. */
type Check<T> = (value: unknown, place: string) => T;

/** Checks of the values of one file. */
function checksOf(path: string) {
  const fault = (place: string, wanted: string, got: unknown) => {
    const text = JSON.stringify(got) ?? "nothing";
    const shown = text.length > 80 ? `${text.slice(0, 80)}…` : text;
    return new FormatError(`Cannot read ${quote(path)}: ${place} ${wanted}, got ${shown}`, { path });
  };
  const is = <T>(wanted: string, test: (value: unknown) => boolean): Check<T> => (value, place) => {
    if (test(value)) return value as T;
    throw fault(place, wanted, value);
  };
  const text = is<string>("must be a text", (value) => typeof value === "string");
  const number = is<number>("must be a number", (value) => typeof value === "number");
  const object = is<Record<string, unknown>>("must be an object", isJsonObject);
  const list = <T>(item: Check<T>): Check<T[]> => (value, place) =>
    is<unknown[]>("must be a list", Array.isArray)(value, place).map((each, i) =>
      item(each, `${place}[${i}]`)
    );
  /** Fails on `null` as on other types; what is absent stays so. */
  const optional = <T>(check: Check<T>): Check<T> => (value, place) =>
    value === undefined ? value as T : check(value, place);
  const fields = <T>(shape: { readonly [Key in keyof T]-?: Check<T[Key]> }): Check<T> => (value, place) => {
    const given = object(value, place), prefix = place === "" ? "" : `${place}.`;
    const checked = (Object.entries(shape) as [string, Check<unknown>][])
      .map(([key, check]) => [key, check(given[key], prefix + key)] as const);
    return Object.fromEntries(checked.filter(([, each]) => each !== undefined)) as T;
  };
  const values = object as Check<Readonly<Record<string, Json>>>;
  const isDigits = (value: unknown) => Number.isInteger(value) && Number(value) >= 0 && Number(value) <= 20;
  const cell = is("must be no list or object", (value) => typeof value !== "object" || value === null);
  const section = fields<Section>({
    title: text,
    notes: list(text),
    columns: list(fields<Section["columns"][number]>({
      key: text,
      title: text,
      align: optional(is('must be "left" or "right"', (value) => value === "left" || value === "right")),
      digits: optional(is("must be a whole number from 0 to 20", isDigits)),
    })),
    rows: list((row, place) => {
      const cells = object(row, place);
      for (const [key, value] of Object.entries(cells)) cell(value, `${place}.${key}`);
      // Without a prototype: what a row does not have must not be found there, as `constructor`.
      return Object.assign(Object.create(null), cells) as Section["rows"][number];
    }),
  });
  const numberOrNull = (value: unknown, place: string) => value === null ? null : number(value, place);
  const run = fields<Omit<Run, "name" | "tables">>({
    title: text,
    command: text,
    date: text,
    seconds: number,
    toolVersion: text,
    environment: values,
    configuration: values,
    summary: list(fields<SummaryItem>({ label: text, value: text })),
    errors: optional(fields<RunErrors>({
      metric: text,
      heldOut: numberOrNull,
      output: numberOrNull,
      weights: numberOrNull,
      bits: number,
    })),
    sections: list(section),
    goals: list(fields<Goal>({
      goal: text,
      wanted: text,
      measured: (value, place) => value === null ? null : text(value, place),
      met: is("must be true, false or null", (value) => value === null || typeof value === "boolean"),
      reason: optional(text),
    })),
    skipped: list(fields<Skipped>({ what: text, reason: text })),
  });
  return { fault, object, run };
}
