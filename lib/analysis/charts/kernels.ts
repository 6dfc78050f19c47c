/** Charts of the table of kernels. */
import {
  chart,
  chartData,
  type ChartOptions,
  type ChartRow,
  emptyChart,
  extent,
  layerOf,
  layoutOf,
  legendFor,
  namesAxis,
  notFiniteNote,
  NUMBER_FORMAT,
  numberIn,
  type Spec,
} from "../_chart.ts";
import type { TableLike } from "../tables.ts";

/** Which rows of the kernels. */
export interface KernelChartOptions extends ChartOptions {
  /** Default `from memory`, where the machine's memory is the roof; or the only one. */
  readonly place?: string | undefined;
}

/**
 * Roofline: weights a second over the bytes that each weight moves. The line is memcpy in the same run: nothing that
 * reads and writes its bytes once can lie far above it.
 *
 * @throws {TypeError} when the table is not one of kernels
 */
export function kernelRoofline(table: TableLike, options: KernelChartOptions = {}): Spec {
  const { rows: all, notFinite } = chartData("kernel roofline", table, [
    "group",
    "kernel",
    "library",
    "isa",
    "place",
    "threads",
    "weightsPerSecond",
    "bytesPerSecond",
    "timesMemcpy",
  ]);
  const title = options.title ?? "Kernel throughput under the roof of memcpy";
  const timed = all.filter((row) => row["bytesPerSecond"] !== null);
  const place = options.place ??
    (timed.some((row) => row["place"] === "from memory") ? "from memory" : timed[0]?.["place"]);
  const own = timed.filter((row) => row["place"] === place && row["threads"] === 1);
  const values = own.flatMap((row): ChartRow[] => {
    const weights = numberIn(row, "weightsPerSecond"), bytes = numberIn(row, "bytesPerSecond");
    if (weights === null || bytes === null || weights <= 0 || row["library"] === "memcpy") return [];
    return [{ ...row, bytesPerWeight: bytes / weights, rate: weights / 1e6 }];
  });
  if (values.length === 0) return emptyChart(title, "no timed kernels in the table", options);
  const copies = own.filter((row) => row["library"] === "memcpy").map((row) =>
    numberIn(row, "bytesPerSecond")!
  )
    .sort((a, b) => a - b);
  const copy = copies[copies.length >> 1];
  const [least, most] = extent(values.map((row) => numberIn(row, "bytesPerWeight")!));
  const ends = [least / 1.15, most * 1.15];
  const roof = copy === undefined
    ? []
    : ends.map((bytesPerWeight) => ({ bytesPerWeight, rate: copy / bytesPerWeight / 1e6 }));
  const x: Spec = {
    field: "bytesPerWeight",
    type: "quantitative",
    scale: { type: "log", nice: false, domain: ends },
    axis: { title: "bytes read and written per weight (bytes)", format: NUMBER_FORMAT, tickCount: 6 },
  };
  const y: Spec = {
    field: "rate",
    type: "quantitative",
    scale: { type: "log", nice: false, padding: 10 },
    axis: { title: "million weights a second", ...layoutOf(values.map((row) => numberIn(row, "rate"))).axis },
  };
  const color: Spec = {
    field: "library",
    type: "nominal",
    sort: null,
    ...legendFor(values.map((row) => row["library"]), null),
  };
  return chart({ title, width: options.width }, [
    `${place}, one thread; line: memcpy${
      copy === undefined ? " was not timed" : `, ${(copy / 1e9).toFixed(1)} GB/s`
    }`,
    ...notFiniteNote(notFinite),
  ], {
    height: options.height ?? 320,
    layer: [
      ...layerOf(roof, { mark: { type: "line", style: "reference" }, encoding: { x, y } }),
      {
        data: { values },
        mark: { type: "point", size: 55, opacity: 0.85 },
        encoding: {
          x,
          y,
          color,
          shape: color,
          tooltip: [
            { field: "kernel", type: "nominal" },
            { field: "group", type: "nominal" },
            { field: "isa", type: "nominal" },
            { field: "rate", type: "quantitative", title: "Mw/s", format: ".4~g" },
            { field: "timesMemcpy", type: "quantitative", title: "× memcpy", format: ".3~g" },
          ],
        },
      },
    ],
  });
}

/** Most bars of the throughput chart. */
const KERNEL_BARS = 60;

/**
 * Bytes a second of each kernel in units of memcpy's, from the same run.
 *
 * @throws {TypeError} when the table is not one of kernels
 */
export function kernelThroughput(table: TableLike, options: KernelChartOptions = {}): Spec {
  const { rows: all, notFinite } = chartData("kernel throughput", table, [
    "group",
    "kernel",
    "library",
    "place",
    "threads",
    "weightsPerSecond",
    "timesMemcpy",
  ]);
  const title = options.title ?? "Kernel throughput against memcpy";
  const timed = all.filter((row) => row["timesMemcpy"] !== null && row["threads"] === 1);
  const place = options.place ??
    (timed.some((row) => row["place"] === "from memory") ? "from memory" : timed[0]?.["place"]);
  const seen = new Set<string>();
  const values = timed.filter((row) =>
    row["place"] === place && !seen.has(String(row["kernel"])) && seen.add(String(row["kernel"]))
  )
    .slice(0, KERNEL_BARS);
  if (values.length === 0) return emptyChart(title, "no kernel timed beside memcpy in the table", options);
  return chart({ title, width: options.width }, [
    `${place}, one thread; dashed: memcpy`,
    ...(timed.length > values.length && values.length === KERNEL_BARS
      ? [`the first ${KERNEL_BARS} kernels`]
      : []),
    ...notFiniteNote(notFinite),
  ], {
    height: options.height ?? values.length * 15,
    layer: [
      {
        data: { values },
        mark: { type: "bar", height: { band: 0.75 } },
        encoding: {
          y: {
            field: "kernel",
            type: "nominal",
            sort: null,
            axis: { ...namesAxis("kernel"), labelOverlap: false },
          },
          x: { field: "timesMemcpy", type: "quantitative", axis: { title: "bytes a second (× memcpy)" } },
          color: {
            field: "library",
            type: "nominal",
            sort: null,
            ...legendFor(values.map((row) => row["library"]), null),
          },
        },
      },
      { mark: { type: "rule", style: "reference" }, encoding: { x: { datum: 1 } } },
    ],
  });
}
