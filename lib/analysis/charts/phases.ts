/** Charts of the phases and of the optimizer behind them. */
import {
  chart,
  chartData,
  type ChartOptions,
  type ChartRow,
  DEFAULT_HEIGHT,
  eachBelow,
  emptyChart,
  groupRows,
  layoutOf,
  notFiniteNote,
  NUMBER_FORMAT,
  numberIn,
  shortNames,
  type Spec,
  withSeries,
} from "../_chart.ts";
import type { TableLike } from "../tables.ts";
import {
  DIGITS,
  distinguished,
  interval,
  intervalLayer,
  nominal,
  number,
  quantity,
  text,
  WHOLE,
} from "./_encodings.ts";

/** Measures that the phases are compared by. */
export const PHASE_METRICS = {
  accuracy: { title: "accuracy by phase", axis: "accuracy (% of samples)", format: ".0%" },
  stepKl: { title: "step KL by phase", axis: "step KL (nats, mean)", format: NUMBER_FORMAT },
  markovScore: { title: "Markov score by phase", axis: "Markov score (0 to 1)", format: NUMBER_FORMAT },
  overhead: { title: "overhead by phase", axis: "time over the baseline's (%)", format: ",.0%" },
} as const;
type PhaseMetric = keyof typeof PHASE_METRICS;

/** The measure to draw. */
export interface PhaseOptions extends ChartOptions {
  /** Default `accuracy`. */
  readonly metric?: PhaseMetric | undefined;
}

const COLUMNS = ["model", "setting", "phase", "task"];
const hasInterval = (metric: PhaseMetric) => metric === "accuracy" || metric === "stepKl";

/** Phases against the baseline, by task, with intervals; the band is the baseline's interval. */
export function phasesAgainstBaseline(table: TableLike, options: PhaseOptions = {}): Spec {
  const { metric = "accuracy" } = options, { title: named } = PHASE_METRICS[metric];
  const title = options.title ?? `${named[0]!.toUpperCase()}${named.slice(1)}`;
  const ends = hasInterval(metric) ? [`${metric}Low`, `${metric}High`] : [];
  const { rows: all, notFinite } = chartData("phases against baseline", table, [...COLUMNS, metric, ...ends]);
  const hasAll = all.some(({ task }) => task === "all");
  const rows = withSeries(
    all.filter((row) => row[metric] !== null && (metric === "accuracy" || row["task"] === "all" || !hasAll)),
  );
  if (rows.length === 0) return emptyChart(title, "no phases in the table", options);
  const parts = groupRows(rows, ({ series }) => series).map(([name, own]) => {
    const tasks = [...new Set(own.map((row) => String(row["task"])))];
    const baseline = own.find((row) =>
      row["phase"] === "baseline" && (row["task"] === "all" || tasks.length === 1)
    );
    return {
      name,
      spec: phasesPlot(own, tasks, baseline, metric, options),
      hasBaseline: baseline !== undefined,
    };
  });
  const notes = [
    ...(parts.some(({ hasBaseline }) => hasBaseline) ? ["Dashed: the baseline, all tasks together."] : []),
    ...notFiniteNote(notFinite),
  ];
  return eachBelow(title, notes, parts, options.width);
}

function phasesPlot(
  own: readonly ChartRow[],
  tasks: readonly string[],
  baseline: ChartRow | undefined,
  metric: PhaseMetric,
  options: PhaseOptions,
): Spec {
  const { axis, format } = PHASE_METRICS[metric];
  const low = hasInterval(metric) ? own.map((row) => numberIn(row, `${metric}Low`)) : [];
  const layout = metric === "stepKl"
    ? layoutOf([...own.map((row) => numberIn(row, metric)), ...low])
    : { scale: { zero: metric !== "accuracy" }, axis: { format } };
  const x = quantity(metric, axis, layout.axis, layout.scale);
  const y = nominal("phase", { axis: { title: "phase" } });
  const offset: Spec = tasks.length > 1 ? { yOffset: nominal("task") } : {};
  const color = distinguished("task", tasks, "task");
  const phases = new Set(own.map((row) => row["phase"])).size;
  const tooltip = [text("phase"), text("task"), number(metric, DIGITS)];
  const reference: Spec[] = baseline === undefined ? [] : [
    ...intervalLayer([baseline], { type: "rect", style: "referenceBand" }, metric, interval("x", x, metric)),
    { data: { values: [baseline] }, mark: { type: "rule", style: "reference" }, encoding: { x } },
  ];
  return {
    height: options.height ?? Math.max(70, phases * (16 + 12 * tasks.length)),
    layer: [
      ...reference,
      ...intervalLayer(own, { type: "rule", strokeWidth: 2 }, metric, {
        ...interval("x", x, metric),
        y,
        ...offset,
        color,
      }),
      {
        data: { values: own },
        mark: { type: "point", size: 70 },
        encoding: { x, y, ...offset, color, shape: color, tooltip },
      },
    ],
  };
}

/** Most layers whose losses get a line each. */
const LOSS_LINES = 12;
/** Columns of the losses: their sum, and its terms. */
const TERMS = ["total", "quantization", "markov", "entropy"];

/** Losses over the iterations: all terms of one layer or the model, the total of several layers. */
export function lossHistory(
  table: TableLike,
  options: ChartOptions & { readonly layer?: string | undefined } = {},
): Spec {
  const columns = ["model", "setting", "layer", "iteration", ...TERMS];
  const { rows: all, notFinite } = chartData("loss history", table, columns);
  const title = options.title ?? "Loss over the iterations";
  const rows = withSeries(all.filter((row) => options.layer === undefined || row["layer"] === options.layer));
  const layerOfRow = (row: ChartRow) => String(row["layer"] ?? "all layers");
  const short = shortNames(rows.map(layerOfRow));
  const line = (row: (typeof rows)[number]) =>
    short.size === 1 ? row.series : `${short.get(layerOfRow(row))}, ${row.series}`;
  const lines = groupRows(rows, line);
  const drawn = new Set(lines.slice(0, LOSS_LINES).map(([name]) => name));
  const isOne = lines.length === 1;
  const values = rows.filter((row) => drawn.has(line(row))).flatMap((row) =>
    (isOne ? TERMS : ["total"]).flatMap((term) =>
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
  const color = distinguished("line", values.map(({ line }) => line));
  return chart({ title, width: options.width }, notes, {
    height: options.height ?? DEFAULT_HEIGHT,
    data: { values },
    mark: { type: "line", point: { size: 25 } },
    encoding: {
      x: quantity("iteration", "iteration (count)", WHOLE),
      y: quantity("loss", "loss (units of the objective)", axis, scale),
      color,
      strokeDash: color,
    },
  });
}
