/** Charts of the codes that were chosen. */
import {
  chartData,
  type ChartOptions,
  eachBelow,
  emptyChart,
  groupRows,
  numberIn,
  type Spec,
  withSeries,
} from "../_chart.ts";
import type { TableLike } from "../tables.ts";
import { number, quantity } from "./_encodings.ts";

const COLUMNS = ["model", "setting", "layer", "bits", "code", "count"];

/** How often each code occurs: of one layer, or of all layers of a bit width together. */
export function codeHistogram(
  table: TableLike,
  options: ChartOptions & { readonly layer?: string | undefined } = {},
): Spec {
  const { rows: all } = chartData("code histogram", table, COLUMNS);
  const title = options.title ?? "How often each code occurs";
  const rows = withSeries(all.filter((row) => options.layer === undefined || row["layer"] === options.layer));
  if (rows.length === 0) return emptyChart(title, "no codes in the table", options);
  const layers = new Set(rows.map((row) => row["layer"])).size;
  const sum = (own: readonly (typeof rows)[number][]) =>
    own.reduce((sum, row) => sum + numberIn(row, "count")!, 0);
  const parts = groupRows(rows, (row) => `${row.series}, ${row["bits"]} bits`).map(([name, own]) => {
    const total = Math.max(1, sum(own));
    const counts = groupRows(own, (row) => String(row["code"])).map(([, same]) => ({
      code: same[0]!["code"]!,
      share: sum(same) / total,
    }));
    const isFew = counts.length <= 16;
    const spec: Spec = {
      height: options.height ?? 160,
      data: { values: counts },
      mark: isFew ? { type: "bar", width: { band: 0.8 } } : { type: "area", interpolate: "step", opacity: 1 },
      encoding: {
        x: isFew
          ? { field: "code", type: "ordinal", axis: { title: "code", labelAngle: 0 } }
          : quantity("code", "code", {}, { nice: false }),
        y: quantity("share", "share of the weights (%)", { format: "~%" }),
        tooltip: [number("code"), number("share", ".3%")],
      },
    };
    return { name, spec };
  });
  const notes = [options.layer ?? layers === 1 ? String(rows[0]!["layer"]) : `${layers} layers together`];
  return eachBelow(title, notes, parts, options.width);
}
