/** Charts of what the models make: trajectories and samples. */
import {
  chart,
  chartData,
  type ChartOptions,
  type ChartRow,
  DEFAULT_HEIGHT,
  eachBelow,
  emptyChart,
  groupRows,
  layerOf,
  legendFor,
  notFiniteNote,
  NUMBER_FORMAT,
  numberIn,
  type Spec,
  withInterval,
  withSeries,
} from "../_chart.ts";
import type { TableLike } from "../tables.ts";

/**
 * How far free-running trajectories drift from full precision's, by step, with intervals.
 *
 * @throws {TypeError} when the table is not one of drift
 */
export function trajectoryDrift(table: TableLike, options: ChartOptions = {}): Spec {
  const { rows: all, notFinite } = chartData("trajectory drift", table, [
    "model",
    "setting",
    "step",
    "relativeDistance",
    "relativeDistanceLow",
    "relativeDistanceHigh",
  ]);
  const title = options.title ?? "Drift of free-running trajectories";
  const values = withSeries(
    all.filter((row) => row["relativeDistance"] !== null && row["setting"] !== "full"),
  );
  if (values.length === 0) return emptyChart(title, "no trajectories in the table", options);
  const x: Spec = {
    field: "step",
    type: "quantitative",
    scale: { nice: false },
    axis: { title: "sampler steps done (steps)", format: "d", tickMinStep: 1 },
  };
  const axis = { title: "‖x̂ − x‖² / ‖x‖² to full precision (ratio)", format: NUMBER_FORMAT };
  const color: Spec = {
    field: "series",
    type: "nominal",
    sort: null,
    ...legendFor(values.map(({ series }) => series), null),
  };
  return chart({ title, width: options.width }, notFiniteNote(notFinite), {
    height: options.height ?? DEFAULT_HEIGHT,
    data: { values },
    encoding: { x, color },
    layer: [
      ...layerOf(withInterval(values, "relativeDistance"), {
        mark: "area",
        encoding: {
          y: { field: "relativeDistanceLow", type: "quantitative", axis },
          y2: { field: "relativeDistanceHigh" },
        },
      }),
      {
        mark: "line",
        encoding: {
          y: { field: "relativeDistance", type: "quantitative", axis },
          strokeDash: color,
          tooltip: [
            { field: "series", type: "nominal", title: "setting" },
            { field: "step", type: "quantitative" },
            { field: "relativeDistance", type: "quantitative", format: ".4~g" },
          ],
        },
      },
    ],
  });
}

/** Samples of a sheet. */
const SHEET_IMAGES = 12;
const SHEET_TEXTS = 16;
const SHEET_SIDE = 44;

/**
 * The same samples at each setting: images in rows, texts in columns, right and wrong ones marked.
 *
 * @throws {TypeError} when the table is not one of samples
 */
export function sampleSheet(table: TableLike, options: ChartOptions = {}): Spec {
  const { rows: all } = chartData("sample sheet", table, [
    "model",
    "setting",
    "sample",
    "label",
    "prompt",
    "expected",
    "answer",
    "isCorrect",
    "image",
  ]);
  const title = options.title ?? "The same samples at each setting";
  const parts = groupRows(all, (row) => String(row["model"])).flatMap(([name, rows]) => {
    const images = rows.filter((row) => row["image"] !== null);
    const texts = rows.filter((row) => row["answer"] !== null);
    return [
      ...(images.length > 0 ? [{ name, spec: imageSheet(images) }] : []),
      ...(texts.length > 0 ? [{ name, spec: textSheet(texts) }] : []),
    ];
  });
  if (parts.length === 0) return emptyChart(title, "no samples in the table", options);
  return eachBelow(title, ["✓ right or recognized, ✗ not"], parts, options.width);
}

const mark = (row: ChartRow) => row["isCorrect"] === null ? "" : row["isCorrect"] === true ? "✓" : "✗";

function imageSheet(rows: readonly ChartRow[]): Spec {
  const samples = [...new Set(rows.map((row) => numberIn(row, "sample")!))].slice(0, SHEET_IMAGES);
  const values = rows.filter((row) => samples.includes(numberIn(row, "sample")!)).map((row) => ({
    setting: row["setting"]!,
    sample: row["sample"]!,
    label: row["label"]!,
    image: row["image"]!,
    mark: mark(row),
  }));
  const settings = new Set(values.map(({ setting }) => setting)).size;
  return {
    width: samples.length * (SHEET_SIDE + 6),
    height: settings * (SHEET_SIDE + 18),
    data: { values },
    encoding: {
      x: {
        field: "sample",
        type: "ordinal",
        axis: { title: "sample (index)", labelAngle: 0, orient: "top" },
      },
      y: { field: "setting", type: "ordinal", sort: null, axis: { title: "setting" } },
    },
    layer: [
      {
        mark: { type: "image", width: SHEET_SIDE, height: SHEET_SIDE },
        encoding: { url: { field: "image", type: "nominal" } },
      },
      {
        mark: { type: "text", dy: SHEET_SIDE / 2 + 8, fontSize: 10 },
        encoding: { text: { field: "mark", type: "nominal" } },
      },
    ],
  };
}

function textSheet(rows: readonly ChartRow[]): Spec {
  const samples = [...new Set(rows.map((row) => numberIn(row, "sample")!))].slice(0, SHEET_TEXTS);
  const chosen = rows.filter((row) => samples.includes(numberIn(row, "sample")!));
  const asked = groupRows(chosen, (row) => String(row["sample"])).map(([, [row]]) => ({
    column: "expected",
    line: row!["prompt"] ?? String(row!["sample"]),
    text: row!["expected"] ?? "",
    state: "expected",
  }));
  const values = [
    ...asked,
    ...chosen.map((row) => ({
      column: row["setting"]!,
      line: row["prompt"] ?? String(row["sample"]),
      text: `${mark(row)} ${row["answer"]}`,
      state: row["isCorrect"] === false ? "wrong" : "right",
    })),
  ];
  const columns = new Set(values.map(({ column }) => column)).size;
  return {
    width: columns * 150,
    height: samples.length * 20,
    data: { values },
    mark: { type: "text", limit: 145 },
    encoding: {
      x: {
        field: "column",
        type: "ordinal",
        sort: null,
        axis: { title: "setting", labelAngle: 0, orient: "top" },
      },
      y: { field: "line", type: "ordinal", sort: null, axis: { title: "prompt", labelLimit: 200 } },
      text: { field: "text", type: "nominal" },
      color: {
        field: "state",
        type: "nominal",
        sort: null,
        scale: { domain: ["right", "wrong", "expected"] },
        legend: null,
      },
    },
  };
}
