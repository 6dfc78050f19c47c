/** Quality of methods at their bits per weight: charts of the table of peers. */
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
  notFiniteNote,
  numberIn,
  type Spec,
} from "../_chart.ts";
import { textWidth } from "../_text_widths.ts";
import type { TableLike } from "../tables.ts";
import { byColumn, DIGITS, interval, intervalLayer, number, quantity, text } from "./_encodings.ts";

/** Measures of a method's quality: their axes, and whether more is better. */
export const QUALITY_METRICS = {
  accuracy: { axis: "accuracy (% of samples)", higherIsBetter: true },
  kl: { axis: "KL at masked positions (nats a position)", higherIsBetter: false },
  relativeError: { axis: "noise error ‖ε̂ − ε‖² / ‖ε‖² (ratio)", higherIsBetter: false },
  frechetDistance: { axis: "Fréchet distance (feature units²)", higherIsBetter: false },
  relativeRmsError: { axis: "relative RMS error (ratio)", higherIsBetter: false },
} as const;
type QualityMetric = keyof typeof QUALITY_METRICS;

/** The measure, task and model to draw. */
export interface QualityOptions extends ChartOptions {
  /** Default: the first that the table has values of. */
  readonly metric?: QualityMetric | undefined;
  /** Default `all`, or the only one. */
  readonly task?: string | undefined;
  /** Model by name; default the only one. */
  readonly model?: string | undefined;
}

/**
 * The rows that no other row beats: fewer bits per weight, or better at as many; in the order of bits per
 * weight.
 *
 * @example
 * ```ts
 * import { frontOf } from "./mod.ts";
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

const COLUMNS = ["model", "method", "library", "bitsPerWeight", "task"];

/** Accuracy (or an error) against bits per weight, with intervals, Pareto front and full precision. */
export function accuracyByBits(table: TableLike, options: QualityOptions = {}): Spec {
  const names = Object.keys(QUALITY_METRICS) as QualityMetric[];
  const objects = table.objects() as Record<string, unknown>[];
  const metric = options.metric ??
    names.find((name) => objects.some((row) => typeof row[name] === "number")) ??
    "accuracy";
  const name = metric === "accuracy" ? "Accuracy" : QUALITY_METRICS[metric].axis.replace(/ \(.*$/, "");
  const title = options.title ?? `${name} against bits per weight`;
  const ends = [`${metric}Low`, `${metric}High`].filter((column) => table.columnNames().includes(column));
  const { rows: all, notFinite } = chartData("accuracy against bits per weight", table, [
    ...COLUMNS,
    metric,
    ...ends,
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
    return [{ name, spec: qualityPlot(points, full, metric, ends, options) }];
  });
  if (parts.length === 0) return emptyChart(title, "no method with bits per weight in the table", options);
  const hasFull = measured.some((row) => row["bitsPerWeight"] === null);
  const notes = [
    `${hasFull ? "Dashed: full precision. " : ""}Line: nothing else is better at as few bits.`,
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
  const place = (of: (row: ChartRow) => number, pixels: number) => {
    const [low, high] = extent(all.map(of));
    return (row: ChartRow) => high > low ? (of(row) - low) / (high - low) * pixels : 0;
  };
  const x = place((row) => numberIn(row, "bitsPerWeight")!, PLOT_PIXELS.width);
  const value = (row: ChartRow) => isLog ? Math.log(numberIn(row, metric)!) : numberIn(row, metric)!;
  const y = place(value, PLOT_PIXELS.height);
  const width = (row: ChartRow) => textWidth(String(row["method"]), LABEL_PIXELS.font);
  const kept: ChartRow[] = [];
  for (const row of rows) {
    const isFree = kept.every((other) =>
      Math.abs(y(row) - y(other)) >= LABEL_PIXELS.height || x(row) >= x(other) + width(other) ||
      x(other) >= x(row) + width(row)
    );
    if (isFree) kept.push(row);
  }
  return kept;
}

/** The methods of one model; `ends` are the columns of the measure's interval, if it has one. */
function qualityPlot(
  points: readonly ChartRow[],
  full: readonly ChartRow[],
  metric: QualityMetric,
  ends: readonly string[],
  options: ChartOptions,
): Spec {
  const { axis, higherIsBetter } = QUALITY_METRICS[metric];
  const bits = (row: ChartRow) => numberIn(row, "bitsPerWeight")!;
  const front = frontOf(points, bits, (row) => numberIn(row, metric)!, higherIsBetter);
  const layout = metric === "accuracy"
    ? { isLog: false, scale: { zero: false, nice: true }, axis: { format: ".0%" } }
    : layoutOf(points.map((row) => numberIn(row, metric)));
  const y = quantity(metric, axis, layout.axis, layout.scale);
  const x = quantity("bitsPerWeight", "stored bits per weight (bits)", {}, {
    zero: false,
    nice: true,
    padding: 14,
  });
  const color = byColumn("library", points);
  const isDrawable = (row: ChartRow, column: string = metric) =>
    !layout.isLog || (numberIn(row, column) ?? 0) > 0;
  const drawn = points.filter((row) => isDrawable(row));
  const labelled = apart(front.filter((row) => isDrawable(row)), drawn, metric, layout.isLog);
  const tooltip = [
    text("method"),
    number("bitsPerWeight", ".3f"),
    ...[metric, ...ends].map((field) => number(field, DIGITS)),
  ];
  return {
    height: options.height ?? 300,
    layer: [
      ...layerOf(full.filter((row) => isDrawable(row)).slice(0, 1), {
        mark: { type: "rule", style: "reference" },
        encoding: { y },
      }),
      {
        data: { values: front },
        mark: { type: "line", interpolate: "step-after", style: "connector", strokeWidth: 1.5 },
        encoding: { x, y },
      },
      ...intervalLayer(
        points.filter((row) => isDrawable(row, `${metric}Low`)),
        { type: "rule", strokeWidth: 1.5, opacity: 0.65 },
        metric,
        { x, ...interval("y", y, metric), color },
      ),
      {
        data: { values: drawn },
        mark: { type: "point", size: 70 },
        encoding: { x, y, color, shape: color, tooltip },
      },
      ...[{ style: "halo" }, {}].map((look): Spec => ({
        data: { values: labelled },
        mark: { type: "text", align: "left", dx: 8, dy: higherIsBetter ? 10 : -8, ...look },
        encoding: { x, y, text: text("method") },
      })),
    ],
  };
}
