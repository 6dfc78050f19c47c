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

function formatGoals(goals: readonly Goal[]): string[] {
  return [
    "Goals, from this run",
    ...formatTable(
      [
        { key: "verdict", title: "" },
        { key: "goal", title: "goal" },
        { key: "wanted", title: "wanted" },
        { key: "measured", title: "measured" },
      ],
      goals.map((goal) => ({
        verdict: verdict(goal),
        goal: goal.goal,
        wanted: goal.wanted,
        measured: goal.measured ?? goal.reason ?? null,
      })),
    ),
  ];
}

/** Sections, goals and what was left out, a blank line before each. */
export function formatReport({ sections, goals, skipped }: SuiteReport): string[] {
  return [
    ...sections.flatMap((section) => ["", ...formatSection(section)]),
    ...(goals.length === 0 ? [] : ["", ...formatGoals(goals)]),
    ...(skipped.length === 0
      ? []
      : ["", ...skipped.map(({ what, reason }) => `skipped: ${what}: ${reason}`)]),
  ];
}
