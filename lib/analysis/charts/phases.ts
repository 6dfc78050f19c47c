/** Charts of the phases and of the optimizer behind them. */
import {
  chart,
  chartData,
  type ChartOptions,
  DEFAULT_HEIGHT,
  eachBelow,
  emptyChart,
  groupRows,
  layerOf,
  layoutOf,
  legendFor,
  notFiniteNote,
  NUMBER_FORMAT,
  numberIn,
  shortNames,
  type Spec,
  withInterval,
  withSeries,
} from "../_chart.ts";
import type { TableLike } from "../tables.ts";

/** What the phases are compared in. */
export const PHASE_METRICS = {
  accuracy: { title: "accuracy by phase", axis: "accuracy (% of samples)", format: ".0%" },
  stepKl: { title: "step KL by phase", axis: "step KL (nats, mean)", format: NUMBER_FORMAT },
  markovScore: { title: "Markov score by phase", axis: "Markov score (0 to 1)", format: NUMBER_FORMAT },
  overhead: { title: "overhead by phase", axis: "time over the baseline's (%)", format: ",.0%" },
} as const;

/** Which measure. */
export interface PhaseOptions extends ChartOptions {
  /** Default `accuracy`. */
  readonly metric?: keyof typeof PHASE_METRICS | undefined;
}

/**
 * Phases against the baseline, by task, with intervals; the baseline's own is the band behind them.
 *
 * @throws {TypeError} when the table is not one of phases
 */
export function phasesAgainstBaseline(table: TableLike, options: PhaseOptions = {}): Spec {
  const { metric = "accuracy" } = options;
  const { axis, format } = PHASE_METRICS[metric];
  const { title: named } = PHASE_METRICS[metric];
  const title = options.title ?? `${named[0]!.toUpperCase()}${named.slice(1)}`;
  const hasInterval = metric === "accuracy" || metric === "stepKl";
  const { rows: all, notFinite } = chartData("phases against baseline", table, [
    "model",
    "setting",
    "phase",
    "task",
    metric,
    ...(hasInterval ? [`${metric}Low`, `${metric}High`] : []),
  ]);
  const rows = withSeries(
    all.filter((row) =>
      row[metric] !== null &&
      (metric === "accuracy" || row["task"] === "all" || !all.some(({ task }) => task === "all"))
    ),
  );
  if (rows.length === 0) return emptyChart(title, "no phases in the table", options);
  const parts = groupRows(rows, ({ series }) => series).map(([name, own]) => {
    const tasks = [...new Set(own.map((row) => String(row["task"])))];
    const baseline = own.find((row) =>
      row["phase"] === "baseline" && (row["task"] === "all" || tasks.length === 1)
    );
    const low = hasInterval ? own.map((row) => numberIn(row, `${metric}Low`)) : [];
    const values = [...own.map((row) => numberIn(row, metric)), ...low];
    const { scale, axis: ticks } = metric === "stepKl"
      ? layoutOf(values)
      : { scale: { zero: metric !== "accuracy" }, axis: { format } };
    const x: Spec = { field: metric, type: "quantitative", scale, axis: { title: axis, ...ticks } };
    const y: Spec = { field: "phase", type: "nominal", sort: null, axis: { title: "phase" } };
    const offset: Spec = tasks.length > 1 ? { yOffset: { field: "task", type: "nominal", sort: null } } : {};
    const color: Spec = { field: "task", type: "nominal", sort: null, ...legendFor(tasks, "task") };
    const phases = new Set(own.map((row) => row["phase"])).size;
    const spec: Spec = {
      height: options.height ?? Math.max(70, phases * (16 + 12 * tasks.length)),
      layer: [
        ...(baseline === undefined ? [] : [
          ...layerOf(withInterval([baseline], metric), {
            mark: { type: "rect", style: "referenceBand" },
            encoding: { x: { ...x, field: `${metric}Low` }, x2: { field: `${metric}High` } },
          }),
          { data: { values: [baseline] }, mark: { type: "rule", style: "reference" }, encoding: { x } },
        ]),
        ...layerOf(withInterval(own, metric), {
          mark: { type: "rule", strokeWidth: 2 },
          encoding: {
            x: { ...x, field: `${metric}Low` },
            x2: { field: `${metric}High` },
            y,
            ...offset,
            color,
          },
        }),
        {
          data: { values: own },
          mark: { type: "point", size: 70 },
          encoding: {
            x,
            y,
            ...offset,
            color,
            shape: color,
            tooltip: [
              { field: "phase", type: "nominal" },
              { field: "task", type: "nominal" },
              { field: metric, type: "quantitative", format: ".4~g" },
            ],
          },
        },
      ],
    };
    return { name, spec, hasBaseline: baseline !== undefined };
  });
  const notes = [
    ...(parts.some(({ hasBaseline }) => hasBaseline) ? ["Dashed: the baseline, all tasks together."] : []),
    ...notFiniteNote(notFinite),
  ];
  return eachBelow(title, notes, parts, options.width);
}

/** Most layers whose losses get a line each. */
const LOSS_LINES = 12;

/**
 * Losses over the iterations: all terms of one layer or the model, the total of several layers.
 *
 * @throws {TypeError} when the table is not one of losses
 */
export function lossHistory(
  table: TableLike,
  options: ChartOptions & { readonly layer?: string | undefined } = {},
): Spec {
  const terms = ["total", "quantization", "markov", "entropy"];
  const { rows: all, notFinite } = chartData("loss history", table, [
    "model",
    "setting",
    "layer",
    "iteration",
    ...terms,
  ]);
  const title = options.title ?? "Loss over the iterations";
  const rows = withSeries(all.filter((row) => options.layer === undefined || row["layer"] === options.layer));
  const short = shortNames(rows.map((row) => String(row["layer"] ?? "all layers")));
  const line = (row: (typeof rows)[number]) =>
    short.size === 1 ? row.series : `${short.get(String(row["layer"] ?? "all layers"))}, ${row.series}`;
  const lines = groupRows(rows, line);
  const drawn = new Set(lines.slice(0, LOSS_LINES).map(([name]) => name));
  const isOne = lines.length === 1;
  const values = rows.filter((row) => drawn.has(line(row))).flatMap((row) =>
    (isOne ? terms : ["total"]).flatMap((term) =>
      row[term] === null
        ? []
        : [{ iteration: row["iteration"]!, loss: numberIn(row, term)!, line: isOne ? term : line(row) }]
    )
  );
  if (values.length === 0) return emptyChart(title, "no losses in the table", options);
  const { scale, axis } = layoutOf(values.map(({ loss }) => loss));
  const notes = [
    ...(isOne ? lines.map(([name]) => name) : []),
    ...(lines.length > LOSS_LINES ? [`the first ${LOSS_LINES} of ${lines.length} layers`] : []),
    ...notFiniteNote(notFinite),
  ];
  const color: Spec = {
    field: "line",
    type: "nominal",
    sort: null,
    ...legendFor(values.map(({ line }) => line), null),
  };
  return chart({ title, width: options.width }, notes, {
    height: options.height ?? DEFAULT_HEIGHT,
    data: { values },
    mark: { type: "line", point: { size: 25 } },
    encoding: {
      x: {
        field: "iteration",
        type: "quantitative",
        axis: { title: "iteration (count)", tickMinStep: 1, format: "d" },
      },
      y: {
        field: "loss",
        type: "quantitative",
        scale,
        axis: { title: "loss (units of the objective)", ...axis },
      },
      color,
      strokeDash: color,
    },
  });
}
