/** Charts of what the models generate: trajectories and samples. */
import {
  chart,
  chartData,
  type ChartOptions,
  type ChartRow,
  DEFAULT_HEIGHT,
  eachBelow,
  emptyChart,
  groupRows,
  notFiniteNote,
  type Spec,
  withSeries,
} from "../_chart.ts";
import type { TableLike } from "../tables.ts";
import {
  byColumn,
  DIGITS,
  interval,
  intervalLayer,
  number,
  NUMBERS,
  quantity,
  text,
  WHOLE,
} from "./_encodings.ts";

const DISTANCE = "relativeDistance";

/** How far free-running trajectories drift from full precision's, by step, with intervals. */
export function trajectoryDrift(table: TableLike, options: ChartOptions = {}): Spec {
  const columns = ["model", "setting", "step", DISTANCE, `${DISTANCE}Low`, `${DISTANCE}High`];
  const { rows: all, notFinite } = chartData("trajectory drift", table, columns);
  const title = options.title ?? "Drift of free-running trajectories";
  const values = withSeries(all.filter((row) => row[DISTANCE] !== null && row["setting"] !== "full"));
  if (values.length === 0) return emptyChart(title, "no trajectories in the table", options);
  const y = quantity(DISTANCE, "‖x̂ − x‖² / ‖x‖² to full precision (ratio)", NUMBERS);
  const color = byColumn("series", values);
  const tooltip = [text("series", "setting"), number("step"), number(DISTANCE, DIGITS)];
  return chart({ title, width: options.width }, notFiniteNote(notFinite), {
    height: options.height ?? DEFAULT_HEIGHT,
    data: { values },
    encoding: { x: quantity("step", "sampler steps done (steps)", WHOLE, { nice: false }), color },
    layer: [
      ...intervalLayer(values, "area", DISTANCE, interval("y", y, DISTANCE)),
      { mark: "line", encoding: { y, strokeDash: color, tooltip } },
    ],
  });
}

/** Samples of a sheet. */
const SHEET_IMAGES = 12;
const SHEET_TEXTS = 16;
const SHEET_SIDE = 44;
const SHEET_COLUMNS = [
  ...["model", "setting", "sample", "label"],
  ...["prompt", "expected", "answer", "isCorrect", "image"],
];

/** The same samples at each setting: images in rows, texts in columns, right and wrong ones marked. */
export function sampleSheet(table: TableLike, options: ChartOptions = {}): Spec {
  const { rows: all } = chartData("sample sheet", table, SHEET_COLUMNS);
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

/** The first samples in the rows, as many as a sheet has. */
function firstSamples(rows: readonly ChartRow[], most: number): ChartRow[] {
  const samples = [...new Set(rows.map((row) => row["sample"]))].slice(0, most);
  return rows.filter((row) => samples.includes(row["sample"]));
}

const count = (rows: readonly ChartRow[], column: string) => new Set(rows.map((row) => row[column])).size;

function imageSheet(rows: readonly ChartRow[]): Spec {
  const values = firstSamples(rows, SHEET_IMAGES).map((row): ChartRow => {
    const { setting, sample, label, image } = row;
    return { setting: setting!, sample: sample!, label: label!, image: image!, mark: mark(row) };
  });
  return {
    width: count(values, "sample") * (SHEET_SIDE + 6),
    height: count(values, "setting") * (SHEET_SIDE + 18),
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
      { mark: { type: "image", width: SHEET_SIDE, height: SHEET_SIDE }, encoding: { url: text("image") } },
      { mark: { type: "text", dy: SHEET_SIDE / 2 + 8, fontSize: 10 }, encoding: { text: text("mark") } },
    ],
  };
}

function textSheet(rows: readonly ChartRow[]): Spec {
  const chosen = firstSamples(rows, SHEET_TEXTS);
  const line = ({ prompt, sample }: ChartRow) => prompt ?? String(sample);
  const asked = groupRows(chosen, (row) => String(row["sample"])).map(([, own]): ChartRow => ({
    column: "expected",
    line: line(own[0]!),
    text: own[0]!["expected"] ?? "",
    state: "expected",
  }));
  const given = chosen.map((row): ChartRow => ({
    column: row["setting"]!,
    line: line(row),
    text: `${mark(row)} ${row["answer"]}`,
    state: row["isCorrect"] === false ? "wrong" : "right",
  }));
  const values = [...asked, ...given];
  return {
    width: count(values, "column") * 150,
    height: count(chosen, "sample") * 20,
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
      text: text("text"),
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
