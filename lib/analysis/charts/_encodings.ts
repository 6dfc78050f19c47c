/** Parts of the charts: encodings of names and quantities, intervals, tooltips. */
import { type ChartRow, layerOf, legendFor, NUMBER_FORMAT, type Spec, withInterval } from "../_chart.ts";

/** Names, in the order of the data. */
export const nominal = (field: string, rest: Spec = {}): Spec => ({
  field,
  type: "nominal",
  sort: null,
  ...rest,
});

/** A quantity along an axis with this title. */
export const quantity = (field: string, title: string, axis: Spec = {}, scale?: Spec): Spec => ({
  field,
  type: "quantitative",
  ...(scale === undefined ? {} : { scale }),
  axis: { title, ...axis },
});

/** A colour or shape for each value of a column, with a legend where there are several. */
export const distinguished = (field: string, values: readonly unknown[], title: string | null = null): Spec =>
  nominal(field, legendFor(values, title));

/** The same for the values that rows have in the column. */
export const byColumn = (field: string, rows: readonly ChartRow[]): Spec =>
  distinguished(field, rows.map((row) => row[field]));

/** Both ends of a column's interval, along a channel. */
export const interval = (channel: "x" | "y", encoding: Spec, field: string): Spec => ({
  [channel]: { ...encoding, field: `${field}Low` },
  [`${channel}2`]: { field: `${field}High` },
});

/** A mark over the intervals of the rows that have one. */
export const intervalLayer = (
  rows: readonly ChartRow[],
  mark: Spec | string,
  field: string,
  encoding: Spec,
): Spec[] => layerOf(withInterval(rows, field), { mark, encoding });

/** Entries of a tooltip. */
export const text = (field: string, title?: string): Spec => ({
  field,
  type: "nominal",
  ...(title === undefined ? {} : { title }),
});
export const number = (field: string, format?: string, title?: string): Spec => ({
  field,
  type: "quantitative",
  ...(title === undefined ? {} : { title }),
  ...(format === undefined ? {} : { format }),
});

/** Digits of a measure in a tooltip. */
export const DIGITS = ".4~g";

/** Axis of numbers of any size. */
export const NUMBERS: Spec = { format: NUMBER_FORMAT };
export const WHOLE: Spec = { format: "d", tickMinStep: 1 };
