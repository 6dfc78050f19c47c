/** What methods achieve at their bits per weight: charts of the table of peers. */
import {
  chartData,
  type ChartOptions,
  type ChartRow,
  eachBelow,
  emptyChart,
  extent,
  groupRows,
  layerOf,
  layoutOf,
  legendFor,
  notFiniteNote,
  NUMBER_FORMAT,
  numberIn,
  type Spec,
  withInterval,
} from "../_chart.ts";
import { textWidth } from "../_text_widths.ts";
import type { TableLike } from "../tables.ts";

/** What a method or phase is judged by. */
export const QUALITY_METRICS = {
  accuracy: { axis: "accuracy (% of samples)", format: ".0%", higherIsBetter: true },
  kl: { axis: "KL at masked positions (nats a position)", format: NUMBER_FORMAT, higherIsBetter: false },
  relativeError: {
    axis: "noise error ‖ε̂ − ε‖² / ‖ε‖² (ratio)",
    format: NUMBER_FORMAT,
    higherIsBetter: false,
  },
  frechetDistance: {
    axis: "Fréchet distance (feature units²)",
    format: NUMBER_FORMAT,
    higherIsBetter: false,
  },
  relativeRmsError: {
    axis: "relative RMS error (ratio)",
    format: NUMBER_FORMAT,
    higherIsBetter: false,
  },
} as const;

/** Which measure, task and model. */
export interface QualityOptions extends ChartOptions {
  /** Default: the first that the table has values of. */
  readonly metric?: keyof typeof QUALITY_METRICS | undefined;
  /** Default `all`, or the only one. */
  readonly task?: string | undefined;
  readonly model?: string | undefined;
}

/**
 * The rows that no other row beats: fewer bits per weight, or better at as many; in the order of bits per weight.
 *
 * @example
 * ```ts
 * import { frontOf } from "../charts.ts";
 * const rows = [{ bits: 2, value: 0.5 }, { bits: 3, value: 0.4 }, { bits: 4, value: 0.9 }];
 * console.log(frontOf(rows, (row) => row.bits, (row) => row.value, true)); // the first and the last
 * ```
 */
export function frontOf<Row>(
  rows: readonly Row[],
  cost: (row: Row) => number,
  value: (row: Row) => number,
  higherIsBetter: boolean,
): Row[] {
  const sign = higherIsBetter ? 1 : -1;
  const sorted = [...rows].sort((a, b) => cost(a) - cost(b) || sign * (value(b) - value(a)));
  let best = -Infinity;
  return sorted.filter((row) => {
    const isBetter = sign * value(row) > best;
    if (isBetter) best = sign * value(row);
    return isBetter;
  });
}

/**
 * Accuracy (or an error) against bits per weight: every method with its interval, the Pareto front, and full precision.
 *
 * @throws {TypeError} when the table is not one of peers
 */
export function accuracyByBits(table: TableLike, options: QualityOptions = {}): Spec {
  const names = Object.keys(QUALITY_METRICS) as (keyof typeof QUALITY_METRICS)[];
  const objects = table.objects() as Record<string, unknown>[];
  const metric = options.metric ??
    names.find((name) => objects.some((row) => typeof row[name] === "number")) ??
    "accuracy";
  const { axis, format, higherIsBetter } = QUALITY_METRICS[metric];
  const title = options.title ??
    `${metric === "accuracy" ? "Accuracy" : axis.replace(/ \(.*$/, "")} against bits per weight`;
  const hasInterval = table.columnNames().includes(`${metric}Low`);
  const { rows: all, notFinite } = chartData("accuracy against bits per weight", table, [
    "model",
    "method",
    "library",
    "bitsPerWeight",
    "task",
    metric,
    ...(hasInterval ? [`${metric}Low`, `${metric}High`] : []),
  ]);
  const measured = all.filter((row) =>
    row[metric] !== null && (options.model === undefined || row["model"] === options.model)
  );
  const task = options.task ?? (measured.some((row) => row["task"] === "all") ? "all" : undefined);
  const parts = groupRows(measured, (row) => String(row["model"])).flatMap(([name, own]) => {
    const ofTask = own.filter((row) => task === undefined || row["task"] === task);
    const rows = ofTask.length > 0 ? ofTask : own;
    const points = rows.filter((row) => row["bitsPerWeight"] !== null);
    if (points.length === 0) return [];
    const full = rows.filter((row) => row["bitsPerWeight"] === null);
    return [{
      name,
      spec: qualityPlot(points, full, metric, hasInterval, axis, format, higherIsBetter, options),
    }];
  });
  if (parts.length === 0) return emptyChart(title, "no method with bits per weight in the table", options);
  const notes = [
    `${
      measured.some((row) => row["bitsPerWeight"] === null) ? "Dashed: full precision. " : ""
    }Line: nothing else is better at as few bits.`,
    ...notFiniteNote(notFinite),
  ];
  return eachBelow(title, notes, parts, options.width);
}

/** Room that labels have, about: a plot's width and height in a report, and a label's own. */
const PLOT_PIXELS = { width: 340, height: 280 };
const LABEL_PIXELS = { font: 11, height: 13 };

/** The rows whose names do not cover one another; an earlier one keeps its place. */
function apart(
  rows: readonly ChartRow[],
  all: readonly ChartRow[],
  metric: string,
  isLog: boolean,
): ChartRow[] {
  const valueOf = (row: ChartRow) => isLog ? Math.log(numberIn(row, metric)!) : numberIn(row, metric)!;
  const place = (of: (row: ChartRow) => number, pixels: number) => {
    const [low, high] = extent(all.map(of));
    return (row: ChartRow) => high > low ? (of(row) - low) / (high - low) * pixels : 0;
  };
  const x = place((row) => numberIn(row, "bitsPerWeight")!, PLOT_PIXELS.width);
  const y = place(valueOf, PLOT_PIXELS.height);
  const kept: { readonly row: ChartRow; readonly x: number; readonly y: number; readonly width: number }[] =
    [];
  for (const row of rows) {
    const own = { row, x: x(row), y: y(row), width: textWidth(String(row["method"]), LABEL_PIXELS.font) };
    const isFree = kept.every((other) =>
      Math.abs(own.y - other.y) >= LABEL_PIXELS.height || own.x >= other.x + other.width ||
      other.x >= own.x + own.width
    );
    if (isFree) kept.push(own);
  }
  return kept.map(({ row }) => row);
}

function qualityPlot(
  points: readonly ChartRow[],
  full: readonly ChartRow[],
  metric: string,
  hasInterval: boolean,
  axis: string,
  format: string,
  higherIsBetter: boolean,
  options: ChartOptions,
): Spec {
  const front = frontOf(
    points,
    (row) => numberIn(row, "bitsPerWeight")!,
    (row) => numberIn(row, metric)!,
    higherIsBetter,
  );
  const { isLog, scale, axis: ticks } = metric === "accuracy"
    ? { isLog: false, scale: { zero: false, nice: true }, axis: { format } }
    : layoutOf(points.map((row) => numberIn(row, metric)));
  const y: Spec = { field: metric, type: "quantitative", scale, axis: { title: axis, ...ticks } };
  const x: Spec = {
    field: "bitsPerWeight",
    type: "quantitative",
    scale: { zero: false, nice: true, padding: 14 },
    axis: { title: "stored bits per weight (bits)" },
  };
  const color: Spec = {
    field: "library",
    type: "nominal",
    sort: null,
    ...legendFor(points.map((row) => row["library"]), null),
  };
  const intervals = withInterval(points, metric).filter((row) =>
    !isLog || numberIn(row, `${metric}Low`)! > 0
  );
  const isDrawable = (row: ChartRow) => !isLog || numberIn(row, metric)! > 0;
  const labelled = apart(front.filter(isDrawable), points.filter(isDrawable), metric, isLog);
  const reference = full.filter(isDrawable).slice(0, 1);
  return {
    height: options.height ?? 300,
    layer: [
      ...layerOf(reference, { mark: { type: "rule", style: "reference" }, encoding: { y } }),
      {
        data: { values: front },
        mark: { type: "line", interpolate: "step-after", style: "connector", strokeWidth: 1.5 },
        encoding: { x, y },
      },
      ...layerOf(intervals, {
        mark: { type: "rule", strokeWidth: 1.5, opacity: 0.65 },
        encoding: { x, y: { ...y, field: `${metric}Low` }, y2: { field: `${metric}High` }, color },
      }),
      {
        data: { values: points.filter(isDrawable) },
        mark: { type: "point", size: 70 },
        encoding: {
          x,
          y,
          color,
          shape: color,
          tooltip: [
            { field: "method", type: "nominal" },
            { field: "bitsPerWeight", type: "quantitative", format: ".3f" },
            { field: metric, type: "quantitative", format: ".4~g" },
            ...(hasInterval
              ? [
                { field: `${metric}Low`, type: "quantitative", format: ".4~g" },
                { field: `${metric}High`, type: "quantitative", format: ".4~g" },
              ]
              : []),
          ],
        },
      },
      ...[{ style: "halo" }, {}].map((look): Spec => ({
        data: { values: labelled },
        mark: { type: "text", align: "left", dx: 8, dy: higherIsBetter ? 10 : -8, ...look },
        encoding: { x, y, text: { field: "method", type: "nominal" } },
      })),
    ],
  };
}
