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
  namesAxis,
  notFiniteNote,
  numberIn,
  type Spec,
} from "../_chart.ts";
import type { TableLike } from "../tables.ts";
import { byColumn, DIGITS, nominal, number, NUMBERS, quantity, text } from "./_encodings.ts";

/** The rows of the kernels to draw. */
export interface KernelChartOptions extends ChartOptions {
  /** Default `from memory`, where the machine's memory is the roof; or the only one. */
  readonly place?: string | undefined;
}

const COLUMNS = [
  ...["group", "kernel", "library", "isa", "place", "threads"],
  ...["weightsPerSecond", "bytesPerSecond", "timesMemcpy"],
];

const placeOf = (timed: readonly ChartRow[], { place }: KernelChartOptions) =>
  place ?? (timed.some((row) => row["place"] === "from memory") ? "from memory" : timed[0]?.["place"]);

/**
 * Roofline: weights a second over the bytes that each weight moves. The line is memcpy in the same run:
 * nothing that reads and writes its bytes once can lie far above it.
 *
 * @throws {TypeError} when the table is not one of kernels
 */
export function kernelRoofline(table: TableLike, options: KernelChartOptions = {}): Spec {
  const { rows: all, notFinite } = chartData("kernel roofline", table, COLUMNS);
  const title = options.title ?? "Kernel throughput under the roof of memcpy";
  const timed = all.filter((row) => row["bytesPerSecond"] !== null), place = placeOf(timed, options);
  const own = timed.filter((row) => row["place"] === place && row["threads"] === 1);
  const values = own.flatMap((row): ChartRow[] => {
    const weights = numberIn(row, "weightsPerSecond"), bytes = numberIn(row, "bytesPerSecond");
    if (weights === null || bytes === null || weights <= 0 || row["library"] === "memcpy") return [];
    return [{ ...row, bytesPerWeight: bytes / weights, rate: weights / 1e6 }];
  });
  if (values.length === 0) return emptyChart(title, "no timed kernels in the table", options);
  const copies = own.filter((row) => row["library"] === "memcpy")
    .map((row) => numberIn(row, "bytesPerSecond")!).sort((a, b) => a - b);
  const copy = copies[copies.length >> 1];
  const [least, most] = extent(values.map((row) => numberIn(row, "bytesPerWeight")!));
  const ends = [least / 1.15, most * 1.15];
  const roof = copy === undefined
    ? []
    : ends.map((bytesPerWeight) => ({ bytesPerWeight, rate: copy / bytesPerWeight / 1e6 }));
  const x = quantity(
    "bytesPerWeight",
    "bytes read and written per weight (bytes)",
    { ...NUMBERS, tickCount: 6 },
    { type: "log", nice: false, domain: ends },
  );
  const { axis } = layoutOf(values.map((row) => numberIn(row, "rate")));
  const y = quantity("rate", "million weights a second", axis, { type: "log", nice: false, padding: 10 });
  const color = byColumn("library", values);
  const tooltip = [
    ...["kernel", "group", "isa"].map((field) => text(field)),
    number("rate", DIGITS, "Mw/s"),
    number("timesMemcpy", ".3~g", "× memcpy"),
  ];
  const line = copy === undefined ? "memcpy was not timed" : `memcpy, ${(copy / 1e9).toFixed(1)} GB/s`;
  return chart({ title, width: options.width }, [
    `${place}, one thread; line: ${line}`,
    ...notFiniteNote(notFinite),
  ], {
    height: options.height ?? 320,
    layer: [
      ...layerOf(roof, { mark: { type: "line", style: "reference" }, encoding: { x, y } }),
      {
        data: { values },
        mark: { type: "point", size: 55, opacity: 0.85 },
        encoding: { x, y, color, shape: color, tooltip },
      },
    ],
  });
}

/** Most bars of the throughput chart. */
const KERNEL_BARS = 60;

/** Bytes a second of each kernel in units of memcpy's, from the same run. */
export function kernelThroughput(table: TableLike, options: KernelChartOptions = {}): Spec {
  const { rows: all, notFinite } = chartData("kernel throughput", table, COLUMNS);
  const title = options.title ?? "Kernel throughput against memcpy";
  const timed = all.filter((row) => row["timesMemcpy"] !== null && row["threads"] === 1);
  const place = placeOf(timed, options);
  const seen = new Set<string>();
  const values = timed.filter((row) =>
    row["place"] === place && !seen.has(String(row["kernel"])) && seen.add(String(row["kernel"]))
  ).slice(0, KERNEL_BARS);
  if (values.length === 0) return emptyChart(title, "no kernel timed beside memcpy in the table", options);
  const isCut = timed.length > values.length && values.length === KERNEL_BARS;
  return chart({ title, width: options.width }, [
    `${place}, one thread; dashed: memcpy`,
    ...(isCut ? [`the first ${KERNEL_BARS} kernels`] : []),
    ...notFiniteNote(notFinite),
  ], {
    height: options.height ?? values.length * 15,
    layer: [
      {
        data: { values },
        mark: { type: "bar", height: { band: 0.75 } },
        encoding: {
          y: nominal("kernel", { axis: { ...namesAxis("kernel"), labelOverlap: false } }),
          x: quantity("timesMemcpy", "bytes a second (× memcpy)"),
          color: byColumn("library", values),
        },
      },
      { mark: { type: "rule", style: "reference" }, encoding: { x: { datum: 1 } } },
    ],
  });
}
