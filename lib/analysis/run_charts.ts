/** Which charts a run's tables are worth, in the order in which a reader wants them. */
import { type ChartOptions, groupRows, type Spec } from "./_chart.ts";
import {
  accuracyByBits,
  codeHistogram,
  errorByLayer,
  errorOverTime,
  kernelRoofline,
  kernelThroughput,
  lossHistory,
  PHASE_METRICS,
  phasesAgainstBaseline,
  QUALITY_METRICS,
  sampleSheet,
  TIME_METRICS,
  timeParameters,
  trajectoryDrift,
  transitionKl,
} from "./charts.ts";
import type { TableName } from "./schema.ts";
import type { MeasuredRow, TableLike } from "./tables.ts";

/** A chart with a name for files and links. */
export interface NamedChart {
  readonly id: string;
  readonly title: string;
  readonly spec: Spec;
}

type TablesLike = { readonly [Name in TableName]?: TableLike };

/** Some rows of a table. */
function subset(table: TableLike, rows: object[]): TableLike {
  return { columnNames: () => table.columnNames(), numRows: () => rows.length, objects: () => rows };
}

/** The table's parts by model, with the model's name for titles where there are several. */
function byModel(table: TableLike | undefined): { readonly model: string; readonly part: TableLike }[] {
  if (table === undefined) return [];
  return groupRows(table.objects() as MeasuredRow[], (row) => String(row["model"])).map(([model, rows]) => ({
    model,
    part: subset(table, rows),
  }));
}

const has = (table: TableLike, column: string) =>
  (table.objects() as MeasuredRow[]).some((row) => typeof row[column] === "number");

/**
 * The charts of a run.
 *
 * @throws {TypeError} when a table lacks columns of its schema
 */
export function chartsOf(tables: TablesLike, options: Pick<ChartOptions, "width"> = {}): NamedChart[] {
  const charts: NamedChart[] = [];
  /** Charts of the same kind, of different models. */
  const counts = new Map<string, number>();
  const add = (id: string, title: string, draw: (options: ChartOptions) => Spec) => {
    const count = (counts.get(id) ?? 0) + 1;
    counts.set(id, count);
    charts.push({
      id: count === 1 ? id : `${id}-${count}`,
      title,
      spec: draw({ ...options, title }),
    });
  };
  for (const { model, part } of byModel(tables.phases)) {
    for (const metric of Object.keys(PHASE_METRICS) as (keyof typeof PHASE_METRICS)[]) {
      if (!has(part, metric)) continue;
      add(
        `phases-${metric}`,
        `${model}: ${PHASE_METRICS[metric].title}`,
        (rest) => phasesAgainstBaseline(part, { ...rest, metric }),
      );
    }
  }
  for (const { model, part } of byModel(tables.peers)) {
    for (const metric of Object.keys(QUALITY_METRICS) as (keyof typeof QUALITY_METRICS)[]) {
      if (!has(part, metric)) continue;
      const name = metric === "accuracy"
        ? "accuracy"
        : metric === "relativeRmsError"
        ? "weight error"
        : QUALITY_METRICS[metric].axis.replace(/ \(.*$/, "");
      add(
        `bits-${metric}`,
        `${model}: ${name} against bits per weight`,
        (rest) => accuracyByBits(part, { ...rest, metric }),
      );
    }
  }
  for (const { model, part } of byModel(tables.time)) {
    const rows = part.objects() as MeasuredRow[];
    const output = subset(part, rows.filter((row) => row["layer"] === null));
    const layers = subset(part, rows.filter((row) => row["layer"] !== null));
    for (const metric of Object.keys(TIME_METRICS) as (keyof typeof TIME_METRICS)[]) {
      const { title } = TIME_METRICS[metric];
      if (has(output, metric)) {
        add(
          `along-t-${metric}`,
          `${model}: ${title} along t`,
          (rest) => transitionKl(output, { ...rest, metric }),
        );
        add(
          `heat-${metric}`,
          `${model}: ${title} by setting and time`,
          (rest) => errorOverTime(output, { ...rest, metric }),
        );
      }
      if (has(layers, metric)) {
        add(
          `layers-heat-${metric}`,
          `${model}: ${title} by layer and time`,
          (rest) => errorOverTime(layers, { ...rest, metric }),
        );
      }
    }
    if (has(part, "scale") || has(part, "activationHigh")) {
      add(
        "time-parameters",
        `${model}: time parameters over the time groups`,
        (rest) => timeParameters(part, rest),
      );
      if ((part.objects() as MeasuredRow[]).some((row) => row["stage"] === "after")) {
        add(
          "time-parameters-close",
          `${model}: time parameters at the boundary with the largest jump`,
          (rest) => timeParameters(part, { ...rest, isClose: true }),
        );
      }
    }
  }
  for (const { model, part } of byModel(tables.drift)) {
    add("drift", `${model}: drift of free-running trajectories`, (rest) => trajectoryDrift(part, rest));
  }
  for (const { model, part } of byModel(tables.samples)) {
    add("samples", `${model}: the same samples at each setting`, (rest) => sampleSheet(part, rest));
  }
  for (const { model, part } of byModel(tables.layers)) {
    add("layers", `${model}: weight error by layer`, (rest) => errorByLayer(part, rest));
  }
  for (const { model, part } of byModel(tables.codes)) {
    add("codes", `${model}: how often each code occurs`, (rest) => codeHistogram(part, rest));
  }
  for (const { model, part } of byModel(tables.losses)) {
    add("losses", `${model}: loss over the iterations`, (rest) => lossHistory(part, rest));
  }
  if (tables.kernels !== undefined && has(tables.kernels, "bytesPerSecond")) {
    const { kernels } = tables;
    add("roofline", "Kernel throughput under the roof of memcpy", (rest) => kernelRoofline(kernels, rest));
    add("throughput", "Kernel throughput against memcpy", (rest) => kernelThroughput(kernels, rest));
  }
  return charts;
}

/** Tables of several runs as one: whose row it is stands in front of its setting or method. */
export function combineTables(
  runs: readonly { readonly name: string; readonly tables: TablesLike }[],
  names: readonly TableName[],
): TablesLike {
  return Object.fromEntries(names.flatMap((name) => {
    const parts = runs.flatMap((run) => {
      const table = run.tables[name];
      return table === undefined ? [] : [{ run, table }];
    });
    const [first] = parts;
    if (first === undefined || parts.length < 2) return [];
    const rows = parts.flatMap(({ run, table }) =>
      (table.objects() as MeasuredRow[]).map((row) => ({
        ...row,
        ...("setting" in row ? { setting: `${run.name}: ${row["setting"]}` } : {}),
        ...("method" in row && row["method"] !== "full" ? { method: `${run.name}: ${row["method"]}` } : {}),
        ...("library" in row && row["library"] === "arrowquant" && row["method"] !== "full"
          ? { library: run.name }
          : {}),
      }))
    );
    return [[name, subset(first.table, rows)]];
  }));
}
