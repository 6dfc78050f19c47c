/** The charts that the tables of a run are worth, in the order in which a reader wants them. */
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
} from "./charts/mod.ts";
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
  return groupRows(table.objects() as MeasuredRow[], (row) => String(row["model"]))
    .map(([model, rows]) => ({ model, part: subset(table, rows) }));
}

const has = (table: TableLike, column: string) =>
  (table.objects() as MeasuredRow[]).some((row) => typeof row[column] === "number");

/** A chart that a table is worth: its id, its title and its function. */
type Offer = readonly [id: string, title: string, draw: (options: ChartOptions) => Spec];

/** An offer for each measure that the table has values of. */
function ofMeasures<Metric extends string>(
  table: TableLike,
  metrics: Readonly<Record<Metric, unknown>>,
  offer: (metric: Metric) => Offer,
): Offer[] {
  return (Object.keys(metrics) as Metric[]).filter((metric) => has(table, metric)).map(offer);
}

function qualityName(metric: keyof typeof QUALITY_METRICS): string {
  if (metric === "accuracy") return "accuracy";
  return metric === "relativeRmsError" ? "weight error" : QUALITY_METRICS[metric].axis.replace(/ \(.*$/, "");
}

function timeOffers(table: TableLike): Offer[] {
  const rows = table.objects() as MeasuredRow[];
  const output = subset(table, rows.filter((row) => row["layer"] === null));
  const layers = subset(table, rows.filter((row) => row["layer"] !== null));
  const names = Object.keys(TIME_METRICS) as (keyof typeof TIME_METRICS)[];
  const errors = names.flatMap((metric): Offer[] => {
    const { title } = TIME_METRICS[metric];
    const heat = (id: string, by: string, part: TableLike): Offer => [
      `${id}-${metric}`,
      `${title} by ${by} and time`,
      (rest) => errorOverTime(part, { ...rest, metric }),
    ];
    const along: Offer = [
      `along-t-${metric}`,
      `${title} along t`,
      (rest) => transitionKl(output, { ...rest, metric }),
    ];
    return [
      ...(has(output, metric) ? [along, heat("heat", "setting", output)] : []),
      ...(has(layers, metric) ? [heat("layers-heat", "layer", layers)] : []),
    ];
  });
  if (!has(table, "scale") && !has(table, "activationHigh")) return errors;
  const close: Offer = [
    "time-parameters-close",
    "time parameters at the boundary with the largest jump",
    (rest) => timeParameters(table, { ...rest, isClose: true }),
  ];
  return [
    ...errors,
    ["time-parameters", "time parameters over the time groups", (rest) => timeParameters(table, rest)],
    ...(rows.some((row) => row["stage"] === "after") ? [close] : []),
  ];
}

/** Losses together; where there are several settings and terms of the loss, these for each. */
function lossOffers(table: TableLike): Offer[] {
  const settings = groupRows(table.objects() as MeasuredRow[], (row) => String(row["setting"]));
  const hasTerms = settings.length > 1 &&
    ["quantization", "markov", "entropy"].some((term) => has(table, term));
  return [
    ["losses", "loss over the iterations", (rest) => lossHistory(table, rest)],
    ...(hasTerms ? settings : []).map(([setting, rows]): Offer => [
      "loss-terms",
      `terms of the loss, ${setting}`,
      (rest) => lossHistory(subset(table, rows), rest),
    ]),
  ];
}

/** Charts of each table of models, in the order in which they are shown. */
const OFFERS: { readonly [Name in TableName]?: (table: TableLike) => Offer[] } = {
  phases: (table) =>
    ofMeasures(table, PHASE_METRICS, (metric) => [
      `phases-${metric}`,
      PHASE_METRICS[metric].title,
      (rest) => phasesAgainstBaseline(table, { ...rest, metric }),
    ]),
  peers: (table) =>
    ofMeasures(table, QUALITY_METRICS, (metric) => [
      `bits-${metric}`,
      `${qualityName(metric)} against bits per weight`,
      (rest) => accuracyByBits(table, { ...rest, metric }),
    ]),
  time: timeOffers,
  drift: (table) => [["drift", "drift of free-running trajectories", (rest) => trajectoryDrift(table, rest)]],
  samples: (table) => [["samples", "the same samples at each setting", (rest) => sampleSheet(table, rest)]],
  layers: (table) => [["layers", "weight error by layer", (rest) => errorByLayer(table, rest)]],
  codes: (table) => [["codes", "how often each code occurs", (rest) => codeHistogram(table, rest)]],
  losses: lossOffers,
};

/** The charts of a run. @throws {TypeError} when a table lacks columns of its schema */
export function chartsOf(tables: TablesLike, options: Pick<ChartOptions, "width"> = {}): NamedChart[] {
  const charts: NamedChart[] = [];
  /** Charts of the same kind, of different models. */
  const counts = new Map<string, number>();
  const add = ([id, title, draw]: Offer) => {
    const count = (counts.get(id) ?? 0) + 1;
    counts.set(id, count);
    charts.push({ id: count === 1 ? id : `${id}-${count}`, title, spec: draw({ ...options, title }) });
  };
  for (const [name, offersOf] of Object.entries(OFFERS)) {
    for (const { model, part } of byModel(tables[name as TableName])) {
      for (const [id, title, draw] of offersOf(part)) add([id, `${model}: ${title}`, draw]);
    }
  }
  const { kernels } = tables;
  if (kernels !== undefined && has(kernels, "bytesPerSecond")) {
    add(["roofline", "Kernel throughput under the roof of memcpy", (rest) => kernelRoofline(kernels, rest)]);
    add(["throughput", "Kernel throughput against memcpy", (rest) => kernelThroughput(kernels, rest)]);
  }
  return charts;
}

/** Tables of several runs as one: the run's name stands in front of each row's setting or method. */
export function combineTables(
  runs: readonly { readonly name: string; readonly tables: TablesLike }[],
  names: readonly TableName[],
): TablesLike {
  return Object.fromEntries(names.flatMap((name) => {
    const having = runs.filter(({ tables }) => tables[name] !== undefined);
    if (having.length < 2) return [];
    const rows = having.flatMap(({ name: run, tables }) =>
      (tables[name]!.objects() as MeasuredRow[]).map((row) => {
        const { setting, method, library } = row, isQuantized = method !== "full";
        return {
          ...row,
          ...("setting" in row ? { setting: `${run}: ${setting}` } : {}),
          ...("method" in row && isQuantized ? { method: `${run}: ${method}` } : {}),
          ...(library === "arrowquant" && isQuantized ? { library: run } : {}),
        };
      })
    );
    return [[name, subset(having[0]!.tables[name]!, rows)]];
  }));
}
