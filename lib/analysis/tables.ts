/** Rows of measurements as Arquero tables. Arquero is loaded on the first call: most runs never need it. */
import type { ColumnTable } from "arquero";

/** A measurement; nested values stay as they are. */
export type MeasuredRow = Readonly<Record<string, unknown>>;

/** A table with a column for every key that any row has. */
export async function tableOf(rows: readonly MeasuredRow[]): Promise<ColumnTable> {
  const { from } = await import("arquero");
  const keys = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  return from(rows.map((row) => Object.fromEntries(keys.map((key) => [key, row[key] ?? null]))));
}

/** What clip search gains over round to nearest at one bit width, over all models of a run. */
export interface SolverComparison {
  readonly bits: number;
  readonly models: number;
  /** Median over the models of error(clip) / error(round). */
  readonly errorRatio: number;
  /** Median over the models of seconds(clip) / seconds(round), of paired runs. */
  readonly timeRatio: number;
}

/**
 * Clip search against round to nearest, by bits, from the checkpoint suite's rows; empty where only one solver ran.
 *
 * @example
 * ```ts
 * const rows = [
 *   { model: "a", bits: 2, solver: "round", relativeRmsError: 0.4, ratio: null },
 *   { model: "a", bits: 2, solver: "clip", relativeRmsError: 0.3, ratio: { median: 1.1 } },
 * ];
 * console.log(await compareSolvers(rows)); // [{ bits: 2, models: 1, errorRatio: 0.75, timeRatio: 1.1 }], about
 * ```
 */
export async function compareSolvers(rows: readonly MeasuredRow[]): Promise<SolverComparison[]> {
  const { escape, op } = await import("arquero");
  const timeOf = ({ ratio }: MeasuredRow) => (ratio as { readonly median: number } | null)?.median ?? null;
  const table = await tableOf(rows.map((row) => ({ ...row, timeRatio: timeOf(row) })));
  if (!["model", "bits", "solver", "relativeRmsError"].every((name) => table.columnNames().includes(name))) {
    return [];
  }
  // Escaped: Arquero reads the text of a plain function, which a runtime's compiler may have rewritten.
  const of = (solver: string) => table.filter(escape((row: MeasuredRow) => row["solver"] === solver)).reify();
  const clip = of("clip").select("model", "bits", "relativeRmsError", "timeRatio");
  const round = of("round").select("model", "bits", "relativeRmsError").rename({
    relativeRmsError: "roundError",
  });
  return clip.join(round, [["model", "bits"], ["model", "bits"]])
    .derive({
      ratio: escape((row: MeasuredRow) => Number(row["relativeRmsError"]) / Number(row["roundError"])),
    })
    .groupby("bits")
    .rollup({ models: op.count(), errorRatio: op.median("ratio"), timeRatio: op.median("timeRatio") })
    .orderby("bits")
    .objects() as SolverComparison[];
}

/** A method that no other of the same model beats in both bits and distance. */
export interface FrontPoint {
  readonly model: string;
  readonly method: string;
  readonly kind: string;
  readonly bitsPerWeight: number;
  /** KL in nats or noise error, as the model's rows have it. */
  readonly distance: number;
}

/**
 * The Pareto front of each model, from the peers suite's rows, fewest bits first: every method for which no other needs as few bits and comes as close to
 * full precision. Intervals are not looked at.
 *
 * @example
 * ```ts
 * const row = (method: string, bitsPerWeight: number, value: number) =>
 *   ({ model: "a", method, kind: "ours", bitsPerWeight, distance: { value } });
 * const front = await paretoFront([row("round", 2, 0.5), row("clip", 2, 0.3), row("Q2_K", 2.6, 0.4)]);
 * console.log(front); // clip alone
 * ```
 */
export async function paretoFront(rows: readonly MeasuredRow[]): Promise<FrontPoint[]> {
  const { escape } = await import("arquero");
  const points = rows.flatMap((row): FrontPoint[] => {
    const { model, method, kind, bitsPerWeight, distance } = row as Partial<Record<string, unknown>>;
    const value = (distance as { readonly value?: unknown } | null | undefined)?.value;
    if (typeof bitsPerWeight !== "number" || typeof value !== "number") return [];
    return [{
      model: String(model),
      method: String(method),
      kind: String(kind),
      bitsPerWeight,
      distance: value,
    }];
  });
  if (points.length === 0) return [];
  const beats = (a: FrontPoint, b: FrontPoint) =>
    a.model === b.model && a.bitsPerWeight <= b.bitsPerWeight && a.distance <= b.distance &&
    (a.bitsPerWeight < b.bitsPerWeight || a.distance < b.distance);
  return (await tableOf(points.map((point) => ({ ...point }))))
    .filter(escape((row: FrontPoint) => !points.some((other) => beats(other, row))))
    .orderby("model", "bitsPerWeight", "distance")
    .objects() as FrontPoint[];
}
