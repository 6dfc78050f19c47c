/** Runs that are the shards of one, as that one run. */
import { isDeepStrictEqual } from "node:util";
import { CheckpointError } from "../../errors.ts";
import type { BenchOptions } from "../../bench/options.ts";
import { inputsOf } from "../../bench/shards.ts";
import type { Section } from "../../bench/suite.ts";
import { TOOL_VERSION } from "../../output/record.ts";
import type { Shard } from "../../output/shard_folders.ts";
import { shardText } from "../../plan/shards.ts";
import type { Json } from "../_chart.ts";
import { benchConfiguration, benchSummary } from "../make_run.ts";
import type { Run } from "../run.ts";
import { type RowOf, TABLE_NAMES, TABLE_SCHEMAS, type TableName } from "../schema.ts";
import { type ColumnTable, rowsOf, tableFromRows } from "../tables.ts";

/** A run with the place that it was read from. */
export interface RunShard {
  readonly path: string;
  readonly run: Run;
}

const fail = (reason: string, path?: string) =>
  new CheckpointError(`Cannot merge: ${reason}`, path === undefined ? {} : { path });

/** The shard that a run says it is. @throws {CheckpointError} where it is none */
function shardOf({ path, run }: RunShard): { readonly index: number; readonly count: number } {
  const [, index, count] = /^(\d{1,4})\/(\d{1,4})$/.exec(String(run.configuration["shard"])) ?? [];
  if (index === undefined) {
    throw fail(`${JSON.stringify(path)} must hold a shard of a run, got a whole one`, path);
  }
  return { index: Number(index), count: Number(count) };
}

/** Settings of a shard's run: those of its bench, which part it is, and of which models. */
export const shardConfiguration = (options: BenchOptions, shard: Shard): Run["configuration"] => ({
  ...benchConfiguration(options),
  shard: shardText(shard),
  inputs: inputsOf(options),
});

/** Whether a run is this version's, of a suite with these settings. */
export const isRunOf = (
  { title, toolVersion, configuration }: Run,
  suite: string,
  wanted: Run["configuration"],
): boolean =>
  toolVersion === TOOL_VERSION && title.startsWith(`bench, suite ${suite}`) &&
  isDeepStrictEqual(configuration, wanted);

/** What all shards of a run have in common. */
const settingsOf = (
  { title, configuration: { shard: _, ...settings } }: Run,
): Readonly<Record<string, Json>> => ({ title, ...settings });

/**
 * One run of all shards, whatever their order. Full precision, which every shard measures for itself, stands
 * there once: of the first shard that has it.
 *
 * @throws {CheckpointError} naming shards that are missing, there twice, or of another run or version
 */
export async function mergeRuns(name: string, given: readonly RunShard[]): Promise<Run> {
  const shards = checkedShards(given), runs = shards.map(({ run }) => run), [first] = runs as [Run];
  const tables: { [Name in TableName]?: ColumnTable } = {};
  for (const table of TABLE_NAMES) {
    const all = runs.flatMap((run) => run.tables[table] === undefined ? [] : [run.tables[table]]);
    if (all.length > 0) tables[table] = await mergedTable(table, all);
  }
  const goals = distinct(runs.flatMap((run) => run.goals), (goal) => JSON.stringify(goal));
  const machines = new Set(runs.map(({ environment: { processor } }) => String(processor)));
  return {
    ...first,
    name,
    command: `${first.command.replace(/ --shard[= ]\S+/, "")}   # in ${runs.length} shards`,
    date: runs.map(({ date }) => date).sort()[0]!,
    seconds: runs.reduce((sum, { seconds }) => sum + seconds, 0),
    configuration: settingsWithout(first),
    summary: [
      {
        label: "shards",
        value: `${runs.length}, on ${[...machines].join(", ")}; times are those of their machines`,
      },
      ...benchSummary(goals, tables),
    ],
    sections: mergedSections(runs.flatMap(({ sections }) => sections)),
    goals,
    skipped: distinct(runs.flatMap(({ skipped }) => skipped), (each) => JSON.stringify(each)),
    tables,
  };
}

const settingsWithout = ({ configuration: { shard: _, inputs: __, ...settings } }: Run) => settings;

/** Shards by index. */
function checkedShards(given: readonly RunShard[]): RunShard[] {
  const { count } = shardOf(given[0]!), wanted = JSON.stringify(settingsOf(given[0]!.run));
  for (const shard of given) {
    const { path, run } = shard, own = shardOf(shard);
    if (own.count !== count) {
      throw fail(`shards must be of one division, got ${own.index}/${own.count} and some of ${count}`, path);
    }
    if (run.toolVersion !== TOOL_VERSION) {
      throw fail(
        `shard ${own.index}/${count} must be of version ${TOOL_VERSION}, got ${run.toolVersion}`,
        path,
      );
    }
    if (JSON.stringify(settingsOf(run)) !== wanted) {
      const keys = Object.keys({ ...settingsOf(run), ...settingsOf(given[0]!.run) })
        .filter((key) =>
          JSON.stringify(settingsOf(run)[key]) !== JSON.stringify(settingsOf(given[0]!.run)[key])
        );
      throw fail(
        `shards must be of one run, got ${own.index}/${count} with other ${keys.join(", ")}: ${
          JSON.stringify(path)
        }`,
        path,
      );
    }
  }
  const byIndex = Map.groupBy(given, (shard) => shardOf(shard).index);
  const twice = [...byIndex].find(([, own]) => own.length > 1);
  if (twice !== undefined) {
    throw fail(
      `every shard must be there once, got twice: ${twice[0]}/${count} (${
        twice[1].map(({ path }) => path).join(", ")
      })`,
    );
  }
  const missing = Array.from({ length: count }, (_, i) => i + 1).filter((index) => !byIndex.has(index));
  if (missing.length > 0) {
    throw fail(
      `all ${count} shards must be there, missing: ${missing.map((i) => `${i}/${count}`).join(", ")}`,
    );
  }
  return given.toSorted((a, b) => shardOf(a).index - shardOf(b).index);
}

/** The first of those that are alike. */
function distinct<T>(values: readonly T[], keyOf: (value: T, place: number) => string): T[] {
  const seen = new Set<string>();
  return values.filter((value, place) => {
    const key = keyOf(value, place), isNew = !seen.has(key);
    seen.add(key);
    return isNew;
  });
}

/** Rows of tables, each key once. */
async function mergedTable<Name extends TableName>(
  name: Name,
  tables: readonly ColumnTable[],
): Promise<ColumnTable> {
  const { key } = TABLE_SCHEMAS[name], rows = tables.flatMap((table) => rowsOf(name, table) as RowOf<Name>[]);
  const cells = (row: RowOf<Name>) =>
    JSON.stringify(key.map((column) => (row as Record<string, unknown>)[column] ?? null));
  return await tableFromRows(name, distinct(rows, cells));
}

/** A row of full precision by its texts, any other by its place: shards have only the former in common. */
const rowKey = (row: Section["rows"][number], place: number): string => {
  const texts = Object.entries(row).filter(([, value]) => typeof value === "string");
  return texts.some(([, value]) => /^full( precision)?$/.test(String(value)))
    ? JSON.stringify(texts)
    : String(place);
};

/** Sections of one title and columns as one. */
function mergedSections(sections: readonly Section[]): Section[] {
  const alike = Map.groupBy(
    sections,
    ({ title, columns }) => JSON.stringify([title, columns.map(({ key }) => key)]),
  );
  return [...alike.values()].map((own) => ({
    ...own[0]!,
    notes: [...new Set(own.flatMap(({ notes }) => notes))],
    rows: distinct(own.flatMap(({ rows }) => rows), rowKey),
  }));
}
