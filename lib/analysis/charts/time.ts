/** Charts of the table of the time axis. */
import {
  chart,
  chartData,
  type ChartOptions,
  type ChartRow,
  DEFAULT_HEIGHT,
  eachBelow,
  emptyChart,
  extent,
  groupRows,
  layerOf,
  layoutOf,
  legendFor,
  namesAxis,
  notFiniteNote,
  NUMBER_FORMAT,
  numberIn,
  shortNames,
  type Spec,
  withInterval,
  withSeries,
} from "../_chart.ts";
import type { TableLike } from "../tables.ts";

/** Errors that a table of the time axis may hold. */
export const TIME_METRICS = {
  relativeError: { title: "relative error of the output", axis: "‖ŷ − y‖² / ‖y‖² (ratio)" },
  kl: { title: "KL at masked positions", axis: "KL(full ‖ quantized) (nats a position)" },
  stepKl: { title: "transition KL", axis: "KL of the transition (nats, mean)" },
} as const;

type TimeMetric = keyof typeof TIME_METRICS;

/** Which error, and of what. */
export interface TimeChartOptions extends ChartOptions {
  /** Default: the first of `stepKl`, `kl`, `relativeError` that the table has values of. */
  readonly metric?: TimeMetric | undefined;
}

function timeMetricOf(
  table: TableLike,
  asked: TimeMetric | undefined,
  order: readonly TimeMetric[],
): TimeMetric {
  if (asked !== undefined) return asked;
  const rows = table.objects() as Record<string, unknown>[];
  return order.find((metric) => rows.some((row) => typeof row[metric] === "number")) ?? order[0]!;
}

const timeAxis = (rows: readonly ChartRow[]) =>
  rows[0]?.["tUnit"] === "mask ratio" ? "mask ratio t (share of positions masked)" : "timestep t (steps)";

/** Most rows of a heat map: neighbours beyond it share one. */
const HEAT_ROWS = 300;

/**
 * Error over layer (or, of a model's output, setting) and time.
 *
 * @throws {TypeError} when the table is not one of the time axis
 */
export function errorOverTime(table: TableLike, options: TimeChartOptions = {}): Spec {
  const metric = timeMetricOf(table, options.metric, ["relativeError", "stepKl", "kl"]);
  const { rows: all, notFinite } = chartData("error over layer and time", table, [
    "model",
    "setting",
    "layer",
    "tUnit",
    "tBegin",
    "tEnd",
    metric,
  ]);
  const rows = withSeries(all.filter((row) => row[metric] !== null));
  const hasLayers = rows.some((row) => row["layer"] !== null);
  const what = TIME_METRICS[metric];
  const title = options.title ??
    `${what.title[0]!.toUpperCase()}${what.title.slice(1)} by ${hasLayers ? "layer" : "setting"} and time`;
  const own = hasLayers ? rows.filter((row) => row["layer"] !== null) : rows;
  if (own.length === 0) return emptyChart(title, "no errors over time in the table", options);
  const short = shortNames(own.map((row) => String(row["layer"] ?? "")));
  // One scale of colours: the parts are there to be compared.
  const layout = layoutOf(own.map((row) => numberIn(row, metric)));
  const domain = extent(own.map((row) => numberIn(row, metric)!));
  const parts = groupRows(own, (row) => hasLayers ? `${row.series}, ${row["tUnit"]}` : String(row["model"]))
    .map(
      ([name, part]) => {
        const label = (row: (typeof part)[number]) =>
          hasLayers ? short.get(String(row["layer"]))! : String(row["setting"]);
        const labels = [...new Set(part.map(label))];
        const merged = Math.ceil(labels.length / HEAT_ROWS);
        const place = new Map(labels.map((text, i) => [text, labels[Math.floor(i / merged) * merged]!]));
        const cells = groupRows(part, (row) => `${row["tBegin"]} ${row["tEnd"]} ${place.get(label(row))}`)
          .map(
            ([, group]) => {
              const [first] = group;
              const begin = numberIn(first!, "tBegin")!, end = numberIn(first!, "tEnd")!;
              return {
                y: place.get(label(first!))!,
                t: first!["tUnit"] === "timestep" && end - begin <= 1 ? `${begin}` : `${begin}–${end}`,
                tBegin: begin,
                value: group.reduce((sum, row) => sum + numberIn(row, metric)!, 0) / group.length,
              };
            },
          );
        const spec: Spec = {
          height: options.height ??
            Math.min(900, Math.max(60, cells.length === 0 ? 0 : Math.ceil(labels.length / merged) * 20)),
          data: { values: cells },
          mark: "rect",
          encoding: {
            x: {
              field: "t",
              type: "ordinal",
              sort: { field: "tBegin" },
              axis: { title: timeAxis(part), labelAngle: 0 },
            },
            y: {
              field: "y",
              type: "ordinal",
              sort: null,
              axis: namesAxis(hasLayers ? merged > 1 ? `layer (mean of ${merged})` : "layer" : "setting"),
            },
            color: {
              field: "value",
              type: "quantitative",
              scale: { type: layout.isLog ? "log" : "linear", scheme: "viridis", domain },
              legend: { title: what.axis, ...layout.legend, titleLimit: 400 },
            },
            tooltip: [
              { field: "y", type: "nominal", title: hasLayers ? "layer" : "setting" },
              { field: "t", type: "nominal", title: "t" },
              { field: "value", type: "quantitative", title: metric, format: ".4~g" },
            ],
          },
        };
        return { name, spec };
      },
    );
  return eachBelow(title, notFiniteNote(notFinite), parts, options.width);
}

/**
 * An error of the model's output along t, with its interval.
 *
 * @throws {TypeError} when the table is not one of the time axis
 */
export function transitionKl(table: TableLike, options: TimeChartOptions = {}): Spec {
  const metric = timeMetricOf(table, options.metric, ["stepKl", "kl", "relativeError"]);
  const what = TIME_METRICS[metric];
  const title = options.title ?? `${what.title[0]!.toUpperCase()}${what.title.slice(1)} along t`;
  const { rows: all, notFinite } = chartData("error along t", table, [
    "model",
    "setting",
    "layer",
    "tUnit",
    "tBegin",
    "tEnd",
    metric,
    `${metric}Low`,
    `${metric}High`,
  ]);
  const rows = all.filter((row) => row["layer"] === null && row[metric] !== null).map((row): ChartRow => ({
    ...row,
    t: (numberIn(row, "tBegin")! + numberIn(row, "tEnd")! - (row["tUnit"] === "timestep" ? 1 : 0)) / 2,
  }));
  if (rows.length === 0) return emptyChart(title, "no errors of a whole model in the table", options);
  const parts = groupRows(rows, (row) => String(row["model"])).map(([name, part]) => {
    const low = part.flatMap((row) => [numberIn(row, metric), numberIn(row, `${metric}Low`)]);
    const { isLog, scale, axis } = layoutOf(
      low.some((value) => value !== null && value <= 0) ? part.map((row) => numberIn(row, metric)) : low,
    );
    // A lower end of 0 has no place on a logarithm.
    const drawn = part.filter((row) => !isLog || numberIn(row, metric)! > 0);
    const banded = withInterval(drawn, metric).filter((row) => !isLog || numberIn(row, `${metric}Low`)! > 0);
    const color: Spec = {
      field: "setting",
      type: "nominal",
      sort: null,
      ...legendFor(part.map((row) => row["setting"]), null),
    };
    const y = { type: "quantitative", scale, axis: { title: what.axis, ...axis } };
    const spec: Spec = {
      height: options.height ?? DEFAULT_HEIGHT,
      encoding: {
        x: {
          field: "t",
          type: "quantitative",
          scale: { zero: false, nice: false },
          axis: { title: timeAxis(part) },
        },
        color,
      },
      layer: [
        ...layerOf(banded, {
          mark: "area",
          encoding: { y: { ...y, field: `${metric}Low` }, y2: { field: `${metric}High` } },
        }),
        {
          data: { values: drawn },
          mark: { type: "line", point: false },
          encoding: { y: { ...y, field: metric } },
        },
        {
          data: { values: drawn },
          mark: { type: "point", size: 45 },
          encoding: {
            y: { ...y, field: metric },
            shape: color,
            tooltip: [
              { field: "setting", type: "nominal" },
              { field: "t", type: "quantitative", format: ".4~g" },
              { field: metric, type: "quantitative", format: ".4~g" },
            ],
          },
        },
      ],
    };
    return { name, spec };
  });
  return eachBelow(title, notFiniteNote(notFinite), parts, options.width);
}

/** Which layer's time parameters. */
export interface TimeParameterOptions extends ChartOptions {
  /** Default: among the layers that smoothing changed, or all where it changed none, the one with the largest jump. */
  readonly layer?: string | undefined;
  /** Only the surroundings of the boundary with the largest jump: windows are narrow beside the axis. Default false. */
  readonly isClose?: boolean | undefined;
}

/** Stretches on both sides of a close look, in widths of what smoothing moved there. */
const CLOSE_MARGIN = 1.5;

/** The times around the boundary with the largest jump of scale, as far as smoothing moved something there; undefined where it did not. */
function closeRange(rows: readonly ChartRow[]): readonly [number, number] | undefined {
  const ordered = (stage: string) =>
    rows.filter((row) => row["stage"] === stage).sort((a, b) =>
      numberIn(a, "tBegin")! - numberIn(b, "tBegin")!
    );
  const before = ordered("before"), after = ordered("after");
  const jumps = before.slice(1).map((row, i) => ({
    t: numberIn(row, "tBegin")!,
    jump: Math.abs((numberIn(row, "scale") ?? 0) / (numberIn(before[i]!, "scale") ?? 1) - 1),
  })).sort((a, b) => b.jump - a.jump);
  const narrow = before.length === 0
    ? 0
    : Math.min(...before.map((row) => numberIn(row, "tEnd")! - numberIn(row, "tBegin")!)) / 4;
  for (const { t } of jumps) {
    const moved = after.filter((row) => {
      const begin = numberIn(row, "tBegin")!, end = numberIn(row, "tEnd")!;
      return end - begin < narrow && Math.abs((begin + end) / 2 - t) < 2 * narrow;
    });
    if (moved.length === 0) continue;
    const reach = Math.max(
      ...moved.flatMap((row) => [t - numberIn(row, "tBegin")!, numberIn(row, "tEnd")! - t]),
    );
    return [t - (1 + CLOSE_MARGIN) * reach, t + (1 + CLOSE_MARGIN) * reach];
  }
  return undefined;
}

/** Largest relative jump of a layer's scale from one stretch to the next. */
function largestJump(rows: readonly ChartRow[]): number {
  const before = rows.filter((row) => row["stage"] !== "after");
  const scales = (before.length > 0 ? before : rows).flatMap((row) => numberIn(row, "scale") ?? []);
  return Math.max(0, ...scales.slice(1).map((scale, i) => Math.abs(scale / scales[i]! - 1)));
}

/** The layer of which there is most to see. */
function tellingLayer(rows: readonly ChartRow[]): ChartRow[string] | undefined {
  const layers = groupRows(rows, (row) => `${row["model"]} ${row["setting"]} ${row["layer"]}`);
  const count = (own: readonly ChartRow[], stage: string) =>
    own.filter((row) => row["stage"] === stage).length;
  const smoothed = layers.filter(([, own]) => count(own, "after") > count(own, "before"));
  const shown = (smoothed.length > 0 ? smoothed : layers).toSorted(([, a], [, b]) =>
    largestJump(b) - largestJump(a)
  );
  return shown[0]?.[1][0]?.["layer"];
}

/**
 * A layer's scale, zero point and activation range over the time groups, before and after boundary smoothing.
 *
 * @throws {TypeError} when the table is not one of the time axis
 */
export function timeParameters(table: TableLike, options: TimeParameterOptions = {}): Spec {
  const fields = [
    ["scale", "scale (units a code)"],
    ["zeroPoint", "zero point (codes)"],
  ] as const;
  const { rows: all, notFinite } = chartData("time parameters", table, [
    "model",
    "setting",
    "layer",
    "tUnit",
    "tBegin",
    "tEnd",
    "stage",
    "scale",
    "zeroPoint",
    "activationLow",
    "activationHigh",
  ]);
  const withTheta = all.filter((row) =>
    ["scale", "zeroPoint", "activationLow", "activationHigh"].some((field) => row[field] !== null)
  );
  const layer = options.layer ?? tellingLayer(withTheta);
  const title = options.title ?? "Time parameters over the time groups";
  const first = withTheta.find((row) => row["layer"] === layer);
  const whole = withTheta.filter((row) =>
    row["layer"] === layer && row["model"] === first!["model"] && row["setting"] === first!["setting"]
  ).map((row): ChartRow => ({ ...row, stage: row["stage"] ?? "before" }));
  const close = options.isClose === true ? closeRange(whole) : undefined;
  if (options.isClose === true && close === undefined) {
    return emptyChart(title, "no smoothed boundary in the table", options);
  }
  const [from, to] = close ?? [-Infinity, Infinity];
  const rows = whole.filter((row) => numberIn(row, "tEnd")! > from && numberIn(row, "tBegin")! < to)
    .map((row): ChartRow => ({
      ...row,
      tBegin: Math.max(from, numberIn(row, "tBegin")!),
      tEnd: Math.min(to, numberIn(row, "tEnd")!),
    }));
  if (rows.length === 0) return emptyChart(title, "no time parameters in the table", options);
  const boundaries = [
    ...new Set(rows.filter((row) => row["stage"] === "before").map((row) => numberIn(row, "tBegin")!)),
  ]
    .filter((t) => t > Math.min(...rows.map((row) => numberIn(row, "tBegin")!)) && t > from);
  const x = (field: string): Spec => ({
    field,
    type: "quantitative",
    scale: { zero: false, nice: false },
    axis: { title: timeAxis(rows) },
  });
  const stage: Spec = {
    field: "stage",
    type: "nominal",
    sort: ["before", "after"],
    legend: { title: "smoothing", symbolType: "stroke", symbolSize: 500, symbolStrokeWidth: 2.5 },
  };
  const dash: Spec = {
    field: "stage",
    type: "nominal",
    sort: ["before", "after"],
    scale: { domain: ["before", "after"], range: [[4, 3], [1, 0]] },
    legend: { title: "smoothing", symbolType: "stroke", symbolSize: 500, symbolStrokeWidth: 2.5 },
  };
  const edges: Spec[] = boundaries.length === 0 ? [] : [{
    data: { values: boundaries.map((t) => ({ t })) },
    mark: { type: "rule", style: "reference", strokeWidth: 1 },
    encoding: { x: x("t") },
  }];
  const present = (field: string) => rows.filter((row) => row[field] !== null);
  const segments = (field: string, y: Spec): Spec[] =>
    layerOf(present(field), {
      mark: { type: "rule", strokeWidth: 2.5 },
      encoding: { x: x("tBegin"), x2: { field: "tEnd" }, y: { field, ...y }, color: stage, strokeDash: dash },
    });
  const panels: Spec[] = fields.filter(([field]) => present(field).length > 0).map(([field, name]) => ({
    height: 110,
    layer: [
      ...edges,
      ...segments(field, {
        type: "quantitative",
        scale: { zero: false },
        axis: { title: name, format: NUMBER_FORMAT },
      }),
    ],
  }));
  const range: Spec = {
    type: "quantitative",
    axis: { title: "activation range (units)", format: NUMBER_FORMAT },
  };
  const ends = ["activationLow", "activationHigh"].flatMap((field) => segments(field, range));
  if (ends.length > 0) {
    const banded = rows.filter((row) =>
      row["stage"] === "before" && row["activationLow"] !== null && row["activationHigh"] !== null
    );
    panels.push({
      height: 130,
      layer: [
        ...edges,
        ...layerOf(banded, {
          mark: { type: "rect", style: "referenceBand" },
          encoding: {
            x: x("tBegin"),
            x2: { field: "tEnd" },
            y: { field: "activationLow", ...range },
            y2: { field: "activationHigh" },
            color: stage,
          },
        }),
        ...ends,
      ],
    });
  }
  const width = options.width === undefined || options.width === "container" ? 560 : options.width;
  return chart({ title }, [String(layer ?? "the model's output"), ...notFiniteNote(notFinite)], {
    vconcat: panels.map((panel) => ({ width, ...panel })),
    resolve: { scale: { x: "shared", color: "shared" } },
  });
}
