/** A suite's report as lines of text. */
import type { Environment } from "../eval/environment.ts";
import type { Goal, Section, SuiteReport } from "./suite.ts";
import { formatTable } from "../eval/table.ts";

/** The lines that every report begins with: where it was measured, and the command that does it again. */
export function formatHeader(command: string, environment: Environment): string[] {
  const { runtime, processor, cores, memoryBytes, platform, load, kernels, backend, isa, date } = environment;
  return [
    `command      ${command}`,
    `date         ${date}`,
    `runtime      ${runtime}, ${platform}`,
    `processor    ${processor}, ${cores} core${cores === 1 ? "" : "s"}, ${
      (memoryBytes / 2 ** 30).toFixed(1)
    } GiB, load ${load.toFixed(2)} before the run`,
    `backend      ${backend}, instruction set ${isa}`,
    `kernels      ${kernels}`,
  ];
}

function formatSection({ title, notes, columns, rows }: Section): string[] {
  return [title, ...notes, ...formatTable(columns, rows)];
}

const verdict = ({ met }: Goal) => met === null ? "skipped" : met ? "met" : "MISSED";

/** The goals as a table; none where there are no goals. */
export function goalsSection(goals: readonly Goal[]): Section[] {
  if (goals.length === 0) return [];
  return [{
    title: "Goals, from this run",
    notes: [],
    columns: [
      { key: "verdict", title: "" },
      ...["goal", "wanted", "measured"].map((key) => ({ key, title: key })),
    ],
    rows: goals.map((each) => {
      const { goal, wanted, measured, reason = null } = each;
      return { verdict: verdict(each), goal, wanted, measured: measured ?? reason };
    }),
  }];
}

/** Sections, goals and what was left out, a blank line before each. */
export function formatReport({ sections, goals, skipped }: SuiteReport): string[] {
  return [
    ...[...sections, ...goalsSection(goals)].flatMap((section) => ["", ...formatSection(section)]),
    ...(skipped.length === 0
      ? []
      : ["", ...skipped.map(({ what, reason }) => `skipped: ${what}: ${reason}`)]),
  ];
}
