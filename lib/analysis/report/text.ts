/** The report as text for a terminal. */
import { goalsSection } from "../../bench/report.ts";
import type { Section } from "../../bench/suite.ts";
import { formatTable } from "../../eval/table.ts";
import type { ChartRow } from "../_chart.ts";
import type { Run } from "../run.ts";
import {
  type Comparison,
  comparisonsOf,
  distinct,
  errorsSection,
  type Fact,
  factsOf,
  flat,
  summaryOf,
} from "./_parts.ts";
import { visible } from "./escape.ts";

/** A name for a terminal or a page of text: one line, nothing hidden. */
export const plain = (text: string) => visible(text).replace(/[\n\t]/g, " ");

export function plainSection({ title, notes, columns, rows }: Section): Section {
  return {
    title: plain(title),
    notes: notes.map(plain),
    columns: columns.map((column) => ({ ...column, title: plain(column.title) })),
    rows: rows.map((row) =>
      Object.fromEntries(columns.map(({ key }) => {
        const value = row[key];
        return [key, typeof value === "string" ? plain(value) : value];
      }))
    ),
  };
}

/** Most rows of a comparison in text. */
const TEXT_ROWS = 40;

/** Columns that rank rows of a comparison; the error of weights ranks no solvers, and comes last. */
const RANKING = [/accuracy/, /stepKl|kl|relativeError|outputError/, /relativeRmsError/];

/** A comparison as a section: the key and what differs in numbers, the largest differences first. */
export function comparisonSection({ title, compared }: Comparison): Section {
  if ("reason" in compared) return { title, notes: [compared.reason], columns: [], rows: [] };
  const rows = compared.objects() as ChartRow[], names = compared.columnNames();
  const differences = names.filter((name) =>
    name.endsWith("Difference") && rows.some((row) => typeof row[name] === "number" && row[name] !== 0)
  );
  const first = RANKING.flatMap((pattern) => differences.find((name) => pattern.test(name)) ?? [])[0] ??
    differences[0];
  const keys = names.slice(0, names.indexOf("in"));
  const size = (row: ChartRow) => first === undefined ? 0 : Math.abs(Number(row[first] ?? 0));
  const sorted = rows.toSorted((a, b) => size(b) - size(a)).slice(0, TEXT_ROWS);
  const shown = first === undefined
    ? []
    : [first.replace(/Difference$/, "A"), first.replace(/Difference$/, "B"), first];
  return {
    title,
    notes: [
      ...(first === undefined ? ["No number differs."] : []),
      ...(rows.length > TEXT_ROWS ? [`The ${TEXT_ROWS} largest differences of ${rows.length} rows.`] : []),
    ],
    columns: [
      ...keys.map((key) => ({ key, title: key })),
      { key: "in", title: "in" },
      ...shown.map((key) => ({ key, title: key, digits: 5 })),
    ],
    rows: sorted as Section["rows"],
  };
}

/** The report as text for a terminal. @throws {TypeError} when there is no run */
export async function reportText(allRuns: readonly Run[]): Promise<string> {
  const runs = distinct(allRuns);
  const sectionLines = (section: Section) => {
    const { title, notes, columns, rows } = plainSection(section);
    return ["", title, ...notes, ...(columns.length === 0 ? [] : formatTable(columns, rows))];
  };
  const facts = (entries: readonly Fact[]) => {
    const width = Math.max(0, ...entries.map(([key]) => key.length));
    return entries.map(([key, value]) => `${plain(key).padEnd(width)}  ${plain(value)}`);
  };
  const lines = [
    ...[...errorsSection(runs), ...(await comparisonsOf(runs)).map(comparisonSection)].flatMap(sectionLines),
    ...runs.flatMap((run) => [
      "",
      `== ${plain(run.name)}: ${plain(run.title)}`,
      ...facts([["command", run.command], ...factsOf(run), ...summaryOf(run)]),
      ...[...run.sections, ...goalsSection(run.goals)].flatMap(sectionLines),
      ...run.skipped.map(({ what, reason }) => `skipped: ${plain(what)}: ${plain(reason)}`),
      "",
      "Configuration",
      ...facts(flat(run.configuration)),
      "",
      "Environment",
      ...facts(flat(run.environment)),
    ]),
  ];
  return `${lines.join("\n").trim()}\n`;
}
