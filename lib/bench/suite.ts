/** The interface of a suite, and its report. */
import type { Solver } from "../config/names.ts";
import type { Kernels } from "../native/mod.ts";
import type { RunReport } from "../pipeline/mod.ts";
import type { BitWidth, GroupSize } from "../quant/mod.ts";
import type { TimeGroups, TimeParameters } from "../time/mod.ts";
import type { Environment } from "../eval/environment.ts";
import type { LayerError } from "../eval/layer_errors.ts";
import type { Column, TableRow } from "../eval/table.ts";
import type { Missing } from "../eval/yardstick.ts";
import type { BenchOptions } from "./options.ts";

/** Program and arguments that run a command of this project, by its file's name, in a process. */
export type CommandOf = (script: string, args: readonly string[]) => readonly string[];

/** A run of the bench, as a suite gets it. */
export interface BenchContext {
  readonly kernels: Kernels;
  readonly environment: Environment;
  readonly options: BenchOptions;
  /** Undefined where the caller runs no commands; what needs a process is then left out, or refused. */
  readonly commandOf?: CommandOf | undefined;
  /** Progress, one line; never a result. */
  progress(line: string): void;
}

/** A table of the report. */
export interface Section {
  readonly title: string;
  /** Lines under the title: what was run and how to read it. */
  readonly notes: readonly string[];
  readonly columns: readonly Column[];
  readonly rows: readonly TableRow[];
}

/** A column of a table: its key and title, a row's cell, and the digits of numbers. */
export type CellColumn<Row> = readonly [
  key: string,
  title: string,
  cell: (row: Row, index: number) => TableRow[string],
  digits?: number,
];

/** A table of what a suite measured, a row each. */
export function tableOf<Row>(
  title: string,
  notes: readonly string[],
  rows: readonly Row[],
  columns: readonly CellColumn<Row>[],
): Section {
  return {
    title,
    notes,
    columns: columns.map(([key, title, , digits]) => ({
      key,
      title,
      ...(digits === undefined ? {} : { digits }),
    })),
    rows: rows.map((row, i) => Object.fromEntries(columns.map(([key, , cell]) => [key, cell(row, i)]))),
  };
}

/** A goal and what this run measured. */
export interface Goal {
  readonly goal: string;
  readonly wanted: string;
  /** As text; null when nothing was measured. */
  readonly measured: string | null;
  /** Null when nothing was measured. */
  readonly met: boolean | null;
  /** Why nothing was measured. */
  readonly reason?: string;
}

/** An answer or image of a model at one setting; the same `sample` has the same prompt or noise at each. */
export interface Sample {
  readonly model: string;
  readonly setting: string;
  readonly sample: number;
  /** Task, or class asked for. */
  readonly label: string;
  readonly prompt?: string;
  readonly expected?: string;
  readonly answer?: string;
  readonly isCorrect: boolean;
  /** A PNG file's bytes. */
  readonly png?: Uint8Array;
}

/** The pipeline's report on a model at one setting. */
export interface QuantizedSetting extends Pick<RunReport, "layers" | "layerMilliseconds"> {
  readonly model: string;
  readonly setting: string;
}

/** Measurements of a model along its time axis at one setting, and its θ. */
export interface TimedSetting {
  readonly model: string;
  readonly setting: string;
  readonly groups: TimeGroups;
  /** θ before or after boundary smoothing. */
  readonly theta?: { readonly stage: "before" | "after"; readonly parameters: TimeParameters } | undefined;
  /** `[groups]`, held out; NaN where there are no samples. */
  readonly stepKl?: readonly number[] | undefined;
  readonly layerErrors?: readonly LayerError[] | undefined;
}

/** Something that this run left out, and why. */
export type Skipped = Missing;

/** Everything that a suite measured; rows.ts has the rows of each suite. */
export interface SuiteReport<Row = Readonly<Record<string, unknown>>> {
  readonly sections: readonly Section[];
  /** Every measurement with all its circumstances, for machines. */
  readonly rows: readonly Row[];
  readonly goals: readonly Goal[];
  readonly skipped: readonly Skipped[];
  readonly quantized?: readonly QuantizedSetting[];
  readonly samples?: readonly Sample[];
  readonly timed?: readonly TimedSetting[];
  /** Rows of further tables of lib/analysis/schema.ts by the table's name. */
  readonly tables?: Readonly<Record<string, readonly Readonly<Record<string, unknown>>[]>>;
}

/** Reports of several models as one, in their order. */
export function mergeReports<Row>(reports: readonly SuiteReport<Row>[]): SuiteReport<Row> {
  const tables = new Set(reports.flatMap(({ tables = {} }) => Object.keys(tables)));
  return {
    sections: reports.flatMap(({ sections }) => sections),
    rows: reports.flatMap(({ rows }) => rows),
    goals: reports.flatMap(({ goals }) => goals),
    skipped: reports.flatMap(({ skipped }) => skipped),
    quantized: reports.flatMap(({ quantized = [] }) => quantized),
    samples: reports.flatMap(({ samples = [] }) => samples),
    timed: reports.flatMap(({ timed = [] }) => timed),
    tables: Object.fromEntries(
      Array.from(tables, (name) => [name, reports.flatMap(({ tables = {} }) => tables[name] ?? [])]),
    ),
  };
}

/** One entry of the bench. */
export interface Suite<Row = Readonly<Record<string, unknown>>> {
  readonly name: string;
  /** One line for `--help`. */
  readonly summary: string;
  /** Settings by default, where they differ from most suites'; two group sizes stand for lists of them. */
  readonly defaults?: {
    readonly bits: readonly BitWidth[];
    readonly groupSizes: readonly GroupSize[];
    readonly solvers?: readonly Solver[];
  };
  run(context: BenchContext): SuiteReport<Row> | Promise<SuiteReport<Row>>;
}
