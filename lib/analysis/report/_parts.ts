/** Parts of every form of a report: runs told apart, what differs between them, and facts. */
import type { Section } from "../../bench/suite.ts";
import type { Json } from "../_chart.ts";
import type { Run } from "../run.ts";
import type { TableName } from "../schema.ts";
import { compareRuns, type TableLike } from "../tables.ts";

/** A table of what differs between two runs, or why there is none. */
export interface Comparison {
  readonly title: string;
  readonly compared: TableLike | { readonly reason: string };
}

/** Tables that are drawn for several runs together. */
export const DRAWN: readonly TableName[] = ["phases", "peers", "layers", "time", "drift"];
/** Tables whose rows two runs of the same kind share. */
const COMPARED: readonly TableName[] = [...DRAWN, "kernels"];

/** Each further run against the first. */
export async function comparisonsOf(runs: readonly Run[]): Promise<Comparison[]> {
  const [first, ...others] = runs;
  const comparisons: Comparison[] = [];
  for (const other of others) {
    for (const name of COMPARED) {
      if (first!.tables[name] === undefined || other.tables[name] === undefined) continue;
      const title = `${name}: ${first!.name} (A) and ${other.name} (B)`;
      try {
        comparisons.push({ title, compared: await compareRuns(first!, other, { table: name }) });
      } catch (error) {
        if (!(error instanceof RangeError)) throw error;
        comparisons.push({ title, compared: { reason: error.message } });
      }
    }
  }
  return comparisons;
}

/** Runs with names that tell them apart. @throws {TypeError} when there is none */
export function distinct(runs: readonly Run[]): Run[] {
  if (runs.length === 0) {
    throw new TypeError("Cannot make a report: there must be at least one run, got none");
  }
  const seen = new Map<string, number>();
  return runs.map((run) => {
    const count = (seen.get(run.name) ?? 0) + 1;
    seen.set(run.name, count);
    return count === 1 ? run : { ...run, name: `${run.name} (${count})` };
  });
}

/** Quantizations among the runs, the smallest held-out error first, then by the error of outputs. */
export function errorsSection(runs: readonly Run[]): Section[] {
  const measured = runs.flatMap(({ name, title, errors }) =>
    errors === undefined ? [] : [{ name, title, ...errors }]
  );
  if (measured.length < 2) return [];
  const order = ["heldOut", "output", "weights"] as const;
  const rows = measured.toSorted((a, b) =>
    (a.metric < b.metric ? -1 : a.metric > b.metric ? 1 : 0) ||
    order.reduce((found, key) => found || (a[key] ?? Infinity) - (b[key] ?? Infinity) || 0, 0)
  );
  return [{
    title: "Runs by error",
    notes: ["Held-out errors of one metric and model compare. The error of weights does not rank solvers."],
    columns: [
      { key: "name", title: "run" },
      { key: "title", title: "what" },
      { key: "metric", title: "held-out metric" },
      { key: "heldOut", title: "held out", digits: 5 },
      { key: "output", title: "output error", digits: 5 },
      { key: "weights", title: "weight error", digits: 5 },
      { key: "bits", title: "bits/weight of all", digits: 3 },
    ],
    rows,
  }];
}

export type Fact = readonly [name: string, value: string];

/** Nested values as paths, `thermodynamic.validation.enabled`. */
export function flat(values: Readonly<Record<string, Json>>, prefix = ""): Fact[] {
  return Object.entries(values).flatMap(([key, value]) =>
    typeof value === "object" && value !== null && !Array.isArray(value)
      ? flat(value as Readonly<Record<string, Json>>, `${prefix}${key}.`)
      : [[prefix + key, typeof value === "string" ? value : JSON.stringify(value ?? null)] as const]
  );
}

export const summaryOf = ({ summary }: Run) => summary.map(({ label, value }): Fact => [label, value]);

export function factsOf({ date, seconds, toolVersion }: Run): Fact[] {
  const took = seconds < 120 ? `${seconds.toFixed(1)} s` : `${(seconds / 60).toFixed(1)} min`;
  return [["date", date], ["took", took], ["arrowquant", toolVersion]];
}
