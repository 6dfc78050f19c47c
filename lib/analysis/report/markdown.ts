/** The report as Markdown. */
import { goalsSection } from "../../bench/report.ts";
import type { Section } from "../../bench/suite.ts";
import type { Run } from "../run.ts";
import { chartsOf } from "../run_charts.ts";
import { comparisonsOf, distinct, errorsSection, type Fact, factsOf, flat, summaryOf } from "./_parts.ts";
import { ENTITIES, visible } from "./escape.ts";
import { comparisonSection, plain, plainSection } from "./text.ts";

/** Text in Markdown: what could be markup is escaped. */
function markdown(text: string): string {
  return plain(text).replace(
    /[\\`*_{}[\]<>#|~&!]/g,
    (character) => character === "&" || character === "<" ? ENTITIES[character]! : `\\${character}`,
  );
}

/** A code block that its content cannot end. */
function fenced(text: string): string[] {
  const longest = Math.max(2, ...[...text.matchAll(/`+/g)].map(([ticks]) => ticks.length));
  const fence = "`".repeat(longest + 1);
  return [`${fence}sh`, visible(text), fence];
}

/**
 * The report as Markdown.
 *
 * @param pictures paths of pictures by the chart's id, where there are any beside the text
 * @throws {TypeError} when there is no run
 */
export async function reportMarkdown(
  allRuns: readonly Run[],
  pictures: ReadonlyMap<string, string> = new Map(),
): Promise<string> {
  const runs = distinct(allRuns);
  const row = (cells: readonly string[]) => `| ${cells.join(" | ")} |`;
  const sectionLines = (section: Section) => {
    const { title, notes, columns, rows } = plainSection(section);
    const cell = (value: Section["rows"][number][string], digits = 0) =>
      value === null || value === undefined
        ? "-"
        : typeof value === "boolean"
        ? value ? "yes" : "no"
        : typeof value === "number"
        ? value.toFixed(digits)
        : markdown(value);
    return [
      `### ${markdown(title)}`,
      "",
      ...(notes.length === 0 ? [] : [notes.map(markdown).join(" "), ""]),
      ...(columns.length === 0 ? [] : [
        row(columns.map((column) => markdown(column.title))),
        row(columns.map(({ key }) => rows.some((each) => typeof each[key] === "number") ? "---:" : "---")),
        ...rows.map((each) => row(columns.map(({ key, digits }) => cell(each[key], digits)))),
        "",
      ]),
    ];
  };
  const facts = (entries: readonly Fact[]) => [
    row(["", ""]),
    row(["---", "---"]),
    ...entries.map(([key, value]) => row([markdown(key), markdown(value)])),
    "",
  ];
  const compared = [...errorsSection(runs), ...(await comparisonsOf(runs)).map(comparisonSection)];
  const lines = [
    `# ArrowQuant report: ${runs.map(({ name }) => markdown(name)).join(", ")}`,
    "",
    ...(compared.length === 0 ? [] : ["## Comparison", "", ...compared.flatMap(sectionLines)]),
    ...runs.flatMap((run) => [
      `## ${markdown(run.name)}`,
      "",
      `${markdown(run.title)}`,
      "",
      ...fenced(run.command),
      "",
      ...facts([...factsOf(run), ...summaryOf(run)]),
      ...[...run.sections, ...goalsSection(run.goals)].flatMap(sectionLines),
      ...run.skipped.map(({ what, reason }) => `Skipped: ${markdown(what)}: ${markdown(reason)}\n`),
      ...(pictures.size === 0 ? [] : ["### Charts", ""]),
      ...chartsOf(pictures.size === 0 ? {} : run.tables).flatMap(({ id, title }) => {
        const picture = pictures.get(id);
        return picture === undefined ? [] : [`![${markdown(title)}](${encodeURI(picture)})`, ""];
      }),
      "### Configuration",
      "",
      ...facts(flat(run.configuration)),
      "### Environment",
      "",
      ...facts(flat(run.environment)),
    ]),
  ];
  return `${lines.join("\n").trimEnd()}\n`;
}
