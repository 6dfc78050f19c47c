/** Charts of the table of layers. */
import {
  chart,
  chartData,
  type ChartOptions,
  type ChartRow,
  DEFAULT_HEIGHT,
  emptyChart,
  groupRows,
  namesAxis,
  notFiniteNote,
  numberIn,
  shortNames,
  type Spec,
  withSeries,
} from "../_chart.ts";
import type { TableLike } from "../tables.ts";
import {
  byColumn,
  DIGITS,
  distinguished,
  nominal,
  number,
  NUMBERS,
  quantity,
  text,
  WHOLE,
} from "./_encodings.ts";

/** More layers than this get an axis of their places instead of their names. */
const NAMED_LAYERS = 60;
/** More points than this become ranges. */
const DRAWN_LAYERS = 1500;
/** Ranges along the axis. */
const LAYER_BINS = 300;

/** Measures of a layer's weights against the original ones. */
export const LAYER_METRICS = {
  relativeRmsError: "relative RMS error (ratio)",
  cosine: "cosine (1 is equal)",
  bitsPerWeight: "stored bits per weight (bits)",
  milliseconds: "time to quantize and write (ms)",
} as const;
type LayerMetric = keyof typeof LAYER_METRICS;

const TITLES: Record<LayerMetric, string> = {
  relativeRmsError: "Weight error by layer",
  cosine: "Cosine by layer",
  bitsPerWeight: "Bits per weight by layer",
  milliseconds: "Time by layer",
};

/** The measure to draw. */
export interface LayerChartOptions extends ChartOptions {
  /** Default `relativeRmsError`. */
  readonly metric?: LayerMetric | undefined;
}

const COLUMNS = ["model", "setting", "name", "kind", "action", "bits"];

/**
 * A measure by layer, in the order of the file: names up to 60 layers, their places beyond, ranges beyond
 * 1500.
 *
 * @throws {TypeError} when the table is not one of layers
 *
 * @example
 * ```ts
 * import { errorByLayer } from "./mod.ts";
 * import { tableFromRows } from "../tables.ts";
 * console.log(errorByLayer(await tableFromRows("layers", [])).title);
 * ```
 */
export function errorByLayer(table: TableLike, options: LayerChartOptions = {}): Spec {
  const { metric = "relativeRmsError" } = options;
  const title = options.title ?? TITLES[metric];
  const { rows, notFinite } = chartData("error by layer", table, [...COLUMNS, metric]);
  const present = withSeries(rows.filter((row) => row[metric] !== null));
  if (present.length === 0) return emptyChart(title, "no layer with this measure in the table", options);
  const drawnNames = new Set(present.map(({ name }) => name));
  const kept = new Set(rows.map(({ name }) => name)).size - drawnNames.size;
  const notes = [
    ...(kept > 0 ? [`${kept} tensor${kept === 1 ? "" : "s"} without this measure not drawn`] : []),
    ...notFiniteNote(notFinite),
  ];
  const short = shortNames(present.map(({ name }) => String(name)));
  const bySeries = groupRows(present, ({ series }) => series);
  const values = bySeries.flatMap(([, own]) =>
    own.map((row, index): ChartRow => ({ ...row, index, label: short.get(String(row["name"]))! }))
  );
  const measure = quantity(metric, LAYER_METRICS[metric], NUMBERS, { zero: metric !== "cosine" });
  if (short.size > NAMED_LAYERS && values.length > DRAWN_LAYERS) {
    return layerRanges(title, notes, metric, bySeries, measure, options);
  }
  const byKind = bySeries.length === 1;
  const color = byColumn(byKind ? "kind" : "series", values);
  const tooltip = [text("name", "layer"), text("kind"), number("bits"), number(metric, DIGITS, metric)];
  if (short.size > NAMED_LAYERS) {
    return chart({ title, width: options.width }, notes, {
      height: options.height ?? DEFAULT_HEIGHT,
      data: { values },
      mark: { type: "point", size: 30 },
      encoding: { x: PLACE, y: measure, color, shape: color, tooltip },
    });
  }
  return chart({ title, width: options.width }, notes, {
    height: options.height ?? Math.max(80, short.size * 16),
    data: { values },
    encoding: {
      y: nominal("label", { axis: { ...namesAxis("layer, in file order"), labelOverlap: false } }),
      x: measure,
    },
    layer: [
      ...(byKind && metric !== "cosine"
        ? [{ mark: { type: "rule", style: "connector" }, encoding: { x2: { datum: 0 } } }]
        : []),
      { mark: "point", encoding: { color, shape: color, tooltip } },
    ],
  });
}

const PLACE = quantity("index", "layer, place in file order (index)", WHOLE, { nice: false, padding: 4 });

/** Too many layers for a point each: the range and median of neighbours. */
function layerRanges(
  title: string,
  notes: readonly string[],
  metric: string,
  bySeries: readonly (readonly [string, readonly ChartRow[]])[],
  measure: Spec,
  options: ChartOptions,
): Spec {
  const ranges = bySeries.flatMap(([series, rows]) => {
    const size = Math.max(1, Math.ceil(rows.length / LAYER_BINS));
    return Array.from({ length: Math.ceil(rows.length / size) }, (_, bin) => {
      const own = rows.slice(bin * size, (bin + 1) * size).map((row) => numberIn(row, metric)!)
        .sort((a, b) => a - b);
      const index = bin * size + (own.length - 1) / 2;
      return { series, index, low: own[0]!, median: own[own.length >> 1]!, high: own.at(-1)! };
    });
  });
  const most = Math.max(...bySeries.map(([, rows]) => rows.length));
  const neighbours = Math.ceil(most / LAYER_BINS);
  return chart({ title, width: options.width }, [
    `${most} layers: line and band are median and range of ${neighbours} neighbours`,
    ...notes,
  ], {
    height: options.height ?? DEFAULT_HEIGHT,
    data: { values: ranges },
    encoding: { x: PLACE, color: distinguished("series", bySeries) },
    layer: [
      { mark: { type: "area" }, encoding: { y: { ...measure, field: "low" }, y2: { field: "high" } } },
      { mark: { type: "line", strokeWidth: 1.5 }, encoding: { y: { ...measure, field: "median" } } },
    ],
  });
}
