/**
 * A run as it is kept: `run.json` - what was run, where, with what, and which tables there are - and the tables beside it
 * as Parquet. A report is made from nothing else. A folder of a stranger is checked like any other untrusted file.
 */
import { mkdirSync, statSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import type { Goal, Section, Skipped } from "../bench/suite.ts";
import { FormatError } from "../errors.ts";
import { inputError, outputError, quote, writeWhole } from "../files/whole.ts";
import { TOOL_VERSION } from "../output/record.ts";
import { isJsonObject, readJsonFile } from "../files/json.ts";
import type { Json } from "./_chart.ts";
import type { Tables } from "./rows.ts";
import { TABLE_NAMES, type TableName } from "./schema.ts";
import { isTableName, readTable, writeTable } from "./table_files.ts";
import type { ColumnTable } from "./tables.ts";

/** File that makes a folder a run. */
export const RUN_FILE = "run.json";
/** Folder of the tables in it. */
export const TABLES_FOLDER = "tables";
export const RUN_FORMAT = "arrowquant-run";
export const RUN_FORMAT_VERSION = 1;

/** A line of the summary. */
export interface SummaryItem {
  readonly label: string;
  readonly value: string;
}

/** What a run left behind. */
export interface Run {
  /** Short, for the columns of a comparison. */
  readonly name: string;
  /** What it did, as in `bench: accuracy`. */
  readonly title: string;
  /** The command that does it again. */
  readonly command: string;
  /** ISO 8601. */
  readonly date: string;
  readonly seconds: number;
  readonly toolVersion: string;
  /** Where it ran. */
  readonly environment: Readonly<Record<string, Json>>;
  /** With what. */
  readonly configuration: Readonly<Record<string, Json>>;
  readonly summary: readonly SummaryItem[];
  /** Tables as the command printed them. */
  readonly sections: readonly Section[];
  readonly goals: readonly Goal[];
  readonly skipped: readonly Skipped[];
  readonly tables: Tables;
}

/** The name that a folder gives its run. */
export function runNameOf(folder: string): string {
  return basename(resolve(folder));
}

/**
 * Writes a run into a folder, made where it is not there; `run.json` last.
 *
 * @throws {OutputError} when the system refuses
 */
export async function writeRun(folder: string, run: Run): Promise<void> {
  try {
    mkdirSync(join(folder, TABLES_FOLDER), { recursive: true });
  } catch (cause) {
    throw outputError("create", folder, cause);
  }
  const { tables, name: _, ...rest } = run;
  const names = TABLE_NAMES.filter((name) => tables[name] !== undefined);
  for (const name of names) {
    await writeTable(join(folder, TABLES_FOLDER, `${name}.parquet`), name, tables[name]!);
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
  writeWhole(join(folder, RUN_FILE), `${JSON.stringify(content, null, 1)}\n`);
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
  const value = readJsonFile(path);
  const at = new Reader(path);
  const run = at.object(value, "the file");
  if (run["format"] !== RUN_FORMAT) throw at.fault("format", `must be "${RUN_FORMAT}"`, run["format"]);
  if (run["formatVersion"] !== RUN_FORMAT_VERSION) {
    throw at.fault(
      "formatVersion",
      `must be ${RUN_FORMAT_VERSION} for this version (${TOOL_VERSION})`,
      run["formatVersion"],
    );
  }
  const tables: { [Name in TableName]?: ColumnTable } = {};
  for (const [name, entry] of Object.entries(at.object(run["tables"], "tables"))) {
    if (!isTableName(name)) throw at.fault("tables", `must be some of ${TABLE_NAMES.join(", ")}`, name);
    const { rows, file } = at.object(entry, `tables.${name}`);
    const wanted = `${TABLES_FOLDER}/${name}.parquet`;
    if (file !== wanted) throw at.fault(`tables.${name}.file`, `must be "${wanted}"`, file);
    const table = await readTable(join(folder, TABLES_FOLDER, `${name}.parquet`), name);
    if (table.numRows() !== rows) {
      throw at.fault(`tables.${name}.rows`, `must be the ${table.numRows()} rows that the file has`, rows);
    }
    tables[name] = table;
  }
  return {
    name: runNameOf(folder),
    title: at.text(run["title"], "title"),
    command: at.text(run["command"], "command"),
    date: at.text(run["date"], "date"),
    seconds: at.number(run["seconds"], "seconds"),
    toolVersion: at.text(run["toolVersion"], "toolVersion"),
    environment: at.object(run["environment"], "environment") as Readonly<Record<string, Json>>,
    configuration: at.object(run["configuration"], "configuration") as Readonly<Record<string, Json>>,
    summary: at.list(run["summary"], "summary", (item, place) => {
      const { label, value } = at.object(item, place);
      return { label: at.text(label, `${place}.label`), value: at.text(value, `${place}.value`) };
    }),
    sections: at.list(run["sections"], "sections", (item, place) => at.section(item, place)),
    goals: at.list(run["goals"], "goals", (item, place) => {
      const { goal, wanted, measured, met, reason } = at.object(item, place);
      if (met !== null && typeof met !== "boolean") {
        throw at.fault(`${place}.met`, "must be true, false or null", met);
      }
      return {
        goal: at.text(goal, `${place}.goal`),
        wanted: at.text(wanted, `${place}.wanted`),
        measured: measured === null ? null : at.text(measured, `${place}.measured`),
        met,
        ...(reason === undefined ? {} : { reason: at.text(reason, `${place}.reason`) }),
      };
    }),
    skipped: at.list(run["skipped"], "skipped", (item, place) => {
      const { what, reason } = at.object(item, place);
      return { what: at.text(what, `${place}.what`), reason: at.text(reason, `${place}.reason`) };
    }),
    tables,
  };
}

function checkIsFolder(folder: string): void {
  let isFolder: boolean;
  try {
    isFolder = statSync(folder).isDirectory();
  } catch (cause) {
    throw inputError(folder, cause);
  }
  if (!isFolder) {
    throw new FormatError(
      `Cannot read ${quote(folder)}: a run must be a folder with ${RUN_FILE}, got a file`,
      {
        path: folder,
      },
    );
  }
}

/** Checks values of one file and names their place. */
class Reader {
  constructor(readonly path: string) {}

  fault(place: string, wanted: string, got: unknown): FormatError {
    const text = JSON.stringify(got) ?? "nothing";
    return new FormatError(
      `Cannot read ${quote(this.path)}: ${place} ${wanted}, got ${
        text.length > 80 ? `${text.slice(0, 80)}…` : text
      }`,
      { path: this.path },
    );
  }

  object(value: unknown, place: string): Record<string, unknown> {
    if (isJsonObject(value)) return value;
    throw this.fault(place, "must be an object", value);
  }

  text(value: unknown, place: string): string {
    if (typeof value === "string") return value;
    throw this.fault(place, "must be a text", value);
  }

  number(value: unknown, place: string): number {
    if (typeof value === "number") return value;
    throw this.fault(place, "must be a number", value);
  }

  list<Item>(value: unknown, place: string, item: (value: unknown, place: string) => Item): Item[] {
    if (!Array.isArray(value)) throw this.fault(place, "must be a list", value);
    return value.map((each, i) => item(each, `${place}[${i}]`));
  }

  section(value: unknown, place: string): Section {
    const { title, notes, columns, rows } = this.object(value, place);
    return {
      title: this.text(title, `${place}.title`),
      notes: this.list(notes, `${place}.notes`, (note, at) => this.text(note, at)),
      columns: this.list(columns, `${place}.columns`, (column, at) => {
        const { key, title, align, digits } = this.object(column, at);
        if (align !== undefined && align !== "left" && align !== "right") {
          throw this.fault(`${at}.align`, 'must be "left" or "right"', align);
        }
        if (
          digits !== undefined && !(Number.isInteger(digits) && Number(digits) >= 0 && Number(digits) <= 20)
        ) {
          throw this.fault(`${at}.digits`, "must be a whole number from 0 to 20", digits);
        }
        return {
          key: this.text(key, `${at}.key`),
          title: this.text(title, `${at}.title`),
          ...(align === undefined ? {} : { align }),
          ...(digits === undefined ? {} : { digits: Number(digits) }),
        };
      }),
      rows: this.list(rows, `${place}.rows`, (row, at) => {
        const cells = this.object(row, at);
        for (const [key, cell] of Object.entries(cells)) {
          if (typeof cell === "object" && cell !== null) {
            throw this.fault(`${at}.${key}`, "must be no list or object", cell);
          }
        }
        return cells as Section["rows"][number];
      }),
    };
  }
}
