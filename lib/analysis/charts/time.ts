/** Charts of the table of the time axis. */
import {
  chart,
  chartData,
  type ChartOptions,
  type ChartRow,
  DEFAULT_HEIGHT,
  DEFAULT_WIDTH,
  eachBelow,
  emptyChart,
  extent,
  groupRows,
  layerOf,
  type Layout,
  layoutOf,
  namesAxis,
  notFiniteNote,
  numberIn,
  shortNames,
  type Spec,
  withSeries,
} from "../_chart.ts";
import type { TableLike } from "../tables.ts";
import { byColumn, DIGITS, interval, intervalLayer, number, NUMBERS, quantity, text } from "./_encodings.ts";

/** Errors that a table of the time axis may hold. */
export const TIME_METRICS = {
  relativeError: { title: "relative error of the output", axis: "‖ŷ − y‖² / ‖y‖² (ratio)" },
  kl: { title: "KL at masked positions", axis: "KL(full ‖ quantized) (nats a position)" },
  stepKl: { title: "transition KL", axis: "KL of the transition (nats, mean)" },
} as const;

type TimeMetric = keyof typeof TIME_METRICS;

/** The error to draw. */
export interface TimeChartOptions extends ChartOptions {
  /** Default: the first of `stepKl`, `kl`, `relativeError` that the table has values of. */
  readonly metric?: TimeMetric | undefined;
}

/** The error that is drawn, with its title's beginning. */
function metricOf(table: TableLike, asked: TimeMetric | undefined, order: readonly TimeMetric[]) {
  const rows = table.objects() as Record<string, unknown>[];
  const metric = asked ?? order.find((each) => rows.some((row) => typeof row[each] === "number")) ??
    order[0]!;
  const { title, axis } = TIME_METRICS[metric];
  return { metric, axis, capital: `${title[0]!.toUpperCase()}${title.slice(1)}` };
}

const timeAxis = (rows: readonly ChartRow[]) =>
  rows[0]?.["tUnit"] === "mask ratio" ? "mask ratio t (share of positions masked)" : "timestep t (steps)";

const COLUMNS = ["model", "setting", "layer", "tUnit", "tBegin", "tEnd"];
const begin = (row: ChartRow) => numberIn(row, "tBegin")!;
const end = (row: ChartRow) => numberIn(row, "tEnd")!;

/** Most rows of a heat map: neighbours beyond it share one. */
const HEAT_ROWS = 300;

/** Error over layer (or, of a model's output, setting) and time. */
export function errorOverTime(table: TableLike, options: TimeChartOptions = {}): Spec {
  const { metric, axis, capital } = metricOf(table, options.metric, ["relativeError", "stepKl", "kl"]);
  const { rows: all, notFinite } = chartData("error over layer and time", table, [...COLUMNS, metric]);
  const rows = withSeries(all.filter((row) => row[metric] !== null));
  const hasLayers = rows.some((row) => row["layer"] !== null);
  const title = options.title ?? `${capital} by ${hasLayers ? "layer" : "setting"} and time`;
  const own = hasLayers ? rows.filter((row) => row["layer"] !== null) : rows;
  if (own.length === 0) return emptyChart(title, "no errors over time in the table", options);
  const short = shortNames(own.map((row) => String(row["layer"] ?? "")));
  const label = (row: ChartRow) => hasLayers ? short.get(String(row["layer"]))! : String(row["setting"]);
  // One scale of colours: the parts are there to be compared.
  const layout = layoutOf(own.map((row) => numberIn(row, metric)));
  const domain = extent(own.map((row) => numberIn(row, metric)!));
  const color: Spec = {
    field: "value",
    type: "quantitative",
    scale: { type: layout.isLog ? "log" : "linear", scheme: "viridis", domain },
    legend: { title: axis, ...layout.legend, titleLimit: 400 },
  };
  const rowTitle = hasLayers ? "layer" : "setting";
  const parts = groupRows(own, (row) => hasLayers ? `${row.series}, ${row["tUnit"]}` : String(row["model"]))
    .map(([name, part]) => ({ name, spec: heatMap(part, label, rowTitle, metric, color, options) }));
  return eachBelow(title, notFiniteNote(notFinite), parts, options.width);
}

/** A cell a label and stretch of time; the mean where neighbouring labels share a row. */
function heatMap(
  part: readonly ChartRow[],
  label: (row: ChartRow) => string,
  rowTitle: string,
  metric: string,
  color: Spec,
  options: ChartOptions,
): Spec {
  const labels = [...new Set(part.map(label))];
  const merged = Math.ceil(labels.length / HEAT_ROWS);
  const places = new Map(labels.map((text, i) => [text, labels[Math.floor(i / merged) * merged]!]));
  const placeOf = (row: ChartRow) => places.get(label(row))!;
  const cells = groupRows(part, (row) => `${row["tBegin"]} ${row["tEnd"]} ${placeOf(row)}`).map(
    ([, group]) => {
      const first = group[0]!, from = begin(first), to = end(first);
      return {
        y: placeOf(first),
        t: first["tUnit"] === "timestep" && to - from <= 1 ? `${from}` : `${from}–${to}`,
        tBegin: from,
        value: group.reduce((sum, row) => sum + numberIn(row, metric)!, 0) / group.length,
      };
    },
  );
  const axis = rowTitle === "layer" && merged > 1 ? `layer (mean of ${merged})` : rowTitle;
  return {
    height: options.height ?? Math.min(900, Math.max(60, Math.ceil(labels.length / merged) * 20)),
    data: { values: cells },
    mark: "rect",
    encoding: {
      x: {
        field: "t",
        type: "ordinal",
        sort: { field: "tBegin" },
        axis: { title: timeAxis(part), labelAngle: 0 },
      },
      y: { field: "y", type: "ordinal", sort: null, axis: namesAxis(axis) },
      color,
      tooltip: [text("y", rowTitle), text("t", "t"), number("value", DIGITS, metric)],
    },
  };
}

/** An error of the model's output along t, with its interval. */
export function transitionKl(table: TableLike, options: TimeChartOptions = {}): Spec {
  const { metric, axis, capital } = metricOf(table, options.metric, ["stepKl", "kl", "relativeError"]);
  const title = options.title ?? `${capital} along t`;
  const columns = [...COLUMNS, metric, `${metric}Low`, `${metric}High`];
  const { rows: all, notFinite } = chartData("error along t", table, columns);
  const rows = all.filter((row) => row["layer"] === null && row[metric] !== null).map((row): ChartRow => ({
    ...row,
    t: (begin(row) + end(row) - (row["tUnit"] === "timestep" ? 1 : 0)) / 2,
  }));
  if (rows.length === 0) return emptyChart(title, "no errors of a whole model in the table", options);
  const parts = groupRows(rows, (row) => String(row["model"])).map(([name, part]) => {
    const measured = part.map((row) => numberIn(row, metric));
    const low = part.flatMap((row) => [numberIn(row, metric), numberIn(row, `${metric}Low`)]);
    const layout = layoutOf(low.some((value) => value !== null && value <= 0) ? measured : low);
    return { name, spec: linesAlongT(part, metric, axis, layout, options) };
  });
  return eachBelow(title, notFiniteNote(notFinite), parts, options.width);
}

/** A line a setting, with points and the band of its intervals. */
function linesAlongT(
  part: readonly ChartRow[],
  metric: string,
  title: string,
  { isLog, scale, axis }: Layout,
  options: ChartOptions,
): Spec {
  // A lower end of 0 has no place on a logarithm.
  const drawn = part.filter((row) => !isLog || numberIn(row, metric)! > 0);
  const banded = drawn.filter((row) => !isLog || (numberIn(row, `${metric}Low`) ?? 0) > 0);
  const color = byColumn("setting", part), y = quantity(metric, title, axis, scale);
  const tooltip = [text("setting"), number("t", DIGITS), number(metric, DIGITS)];
  return {
    height: options.height ?? DEFAULT_HEIGHT,
    encoding: { x: quantity("t", timeAxis(part), {}, { zero: false, nice: false }), color },
    layer: [
      ...intervalLayer(banded, "area", metric, interval("y", y, metric)),
      { data: { values: drawn }, mark: { type: "line", point: false }, encoding: { y } },
      { data: { values: drawn }, mark: { type: "point", size: 45 }, encoding: { y, shape: color, tooltip } },
    ],
  };
}

/** The layer whose time parameters are drawn. */
export interface TimeParameterOptions extends ChartOptions {
  /** Default: the one with the largest jump, of the layers that smoothing changed if there are any. */
  readonly layer?: string | undefined;
  /** Only the surroundings of the boundary with the largest jump. Default false. */
  readonly isClose?: boolean | undefined;
}

/** Stretches on both sides of a close look, in widths of what smoothing moved there. */
const CLOSE_MARGIN = 1.5;

/** The times around the boundary with the largest jump of scale that smoothing moved, if there is one. */
function closeRange(rows: readonly ChartRow[]): readonly [number, number] | undefined {
  const ordered = (stage: string) =>
    rows.filter((row) => row["stage"] === stage).sort((a, b) => begin(a) - begin(b));
  const before = ordered("before"), after = ordered("after");
  const jumps = before.slice(1).map((row, i) => ({
    t: begin(row),
    jump: Math.abs((numberIn(row, "scale") ?? 0) / (numberIn(before[i]!, "scale") ?? 1) - 1),
  })).sort((a, b) => b.jump - a.jump);
  const narrow = before.length === 0 ? 0 : Math.min(...before.map((row) => end(row) - begin(row))) / 4;
  for (const { t } of jumps) {
    const moved = after.filter((row) =>
      end(row) - begin(row) < narrow && Math.abs((begin(row) + end(row)) / 2 - t) < 2 * narrow
    );
    if (moved.length === 0) continue;
    const reach = (1 + CLOSE_MARGIN) * Math.max(...moved.flatMap((row) => [t - begin(row), end(row) - t]));
    return [t - reach, t + reach];
  }
  return undefined;
}

/** Largest relative jump of a layer's scale from one stretch to the next. */
function largestJump(rows: readonly ChartRow[]): number {
  const before = rows.filter((row) => row["stage"] !== "after");
  const scales = (before.length > 0 ? before : rows).flatMap((row) => numberIn(row, "scale") ?? []);
  return Math.max(0, ...scales.slice(1).map((scale, i) => Math.abs(scale / scales[i]! - 1)));
}

/** The layer with most to see. */
function tellingLayer(rows: readonly ChartRow[]): ChartRow[string] | undefined {
  const layers = groupRows(rows, (row) => `${row["model"]} ${row["setting"]} ${row["layer"]}`);
  const count = (own: readonly ChartRow[], stage: string) =>
    own.filter((row) => row["stage"] === stage).length;
  const smoothed = layers.filter(([, own]) => count(own, "after") > count(own, "before"));
  const shown = (smoothed.length > 0 ? smoothed : layers)
    .toSorted(([, a], [, b]) => largestJump(b) - largestJump(a));
  return shown[0]?.[1][0]?.["layer"];
}

const THETA = ["scale", "zeroPoint", "activationLow", "activationHigh"];

/** Colour and dashes of before and after smoothing. */
const STAGE: Spec = {
  field: "stage",
  type: "nominal",
  sort: ["before", "after"],
  legend: { title: "smoothing", symbolType: "stroke", symbolSize: 500, symbolStrokeWidth: 2.5 },
};
const DASH: Spec = { ...STAGE, scale: { domain: ["before", "after"], range: [[4, 3], [1, 0]] } };

/** Rows of one layer, cut to the times from `from` to `to`. */
const cut = (rows: readonly ChartRow[], [from, to]: readonly [number, number]): ChartRow[] =>
  rows.filter((row) => end(row) > from && begin(row) < to)
    .map((row) => ({ ...row, tBegin: Math.max(from, begin(row)), tEnd: Math.min(to, end(row)) }));

/** A layer's scale, zero point and activation range over time, before and after boundary smoothing. */
export function timeParameters(table: TableLike, options: TimeParameterOptions = {}): Spec {
  const { rows: all, notFinite } = chartData("time parameters", table, [...COLUMNS, "stage", ...THETA]);
  const withTheta = all.filter((row) => THETA.some((field) => row[field] !== null));
  const layer = options.layer ?? tellingLayer(withTheta);
  const title = options.title ?? "Time parameters over the time groups";
  const own = withTheta.filter((row) => row["layer"] === layer), first = own[0];
  const whole = own.filter(({ model, setting }) => model === first!["model"] && setting === first!["setting"])
    .map((row): ChartRow => ({ ...row, stage: row["stage"] ?? "before" }));
  const close = options.isClose === true ? closeRange(whole) : undefined;
  if (options.isClose === true && close === undefined) {
    return emptyChart(title, "no smoothed boundary in the table", options);
  }
  const range = close ?? [-Infinity, Infinity] as const;
  const rows = cut(whole, range);
  if (rows.length === 0) return emptyChart(title, "no time parameters in the table", options);
  const width = options.width === undefined || options.width === "container" ? DEFAULT_WIDTH : options.width;
  return chart({ title }, [String(layer ?? "the model's output"), ...notFiniteNote(notFinite)], {
    vconcat: thetaPanels(rows, Math.max(range[0], Math.min(...rows.map(begin)))).map((panel) => ({
      width,
      ...panel,
    })),
    resolve: { scale: { x: "shared", color: "shared" } },
  });
}

/** A panel for each parameter that there is; dashed lines are the boundaries after `start`. */
function thetaPanels(rows: readonly ChartRow[], start: number): Spec[] {
  const x = (field: string) => quantity(field, timeAxis(rows), {}, { zero: false, nice: false });
  const along = { x: x("tBegin"), x2: { field: "tEnd" } };
  const before = rows.filter((row) => row["stage"] === "before");
  const boundaries = [...new Set(before.map(begin))].filter((t) => t > start);
  const edges = layerOf(boundaries.map((t) => ({ t })), {
    mark: { type: "rule", style: "reference", strokeWidth: 1 },
    encoding: { x: x("t") },
  });
  const segments = (field: string, y: Spec): Spec[] =>
    layerOf(rows.filter((row) => row[field] !== null), {
      mark: { type: "rule", strokeWidth: 2.5 },
      encoding: { ...along, y: { ...y, field }, color: STAGE, strokeDash: DASH },
    });
  const parts: Record<string, string> = { scale: "scale (units a code)", zeroPoint: "zero point (codes)" };
  const panels = Object.entries(parts).flatMap(([field, name]): Spec[] => {
    const drawn = segments(field, quantity(field, name, NUMBERS, { zero: false }));
    return drawn.length === 0 ? [] : [{ height: 110, layer: [...edges, ...drawn] }];
  });
  const y = quantity("activationLow", "activation range (units)", NUMBERS);
  const ends = ["activationLow", "activationHigh"].flatMap((field) => segments(field, y));
  if (ends.length === 0) return panels;
  const band = intervalLayer(before, { type: "rect", style: "referenceBand" }, "activation", {
    ...along,
    ...interval("y", y, "activation"),
    color: STAGE,
  });
  return [...panels, { height: 130, layer: [...edges, ...band, ...ends] }];
}
