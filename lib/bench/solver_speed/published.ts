/**
 * Seconds of solving at the widths of published models, and a forecast of `best` for these models from the
 * rates of this run. The forecast of a run of one's own is lib/pipeline/forecast.
 */
import { chooseMoment } from "../../calibration/moment_structure.ts";
import type { Effort } from "../../config/names.ts";
import type { Kernels } from "../../native/mod.ts";
import { correctedTarget, factorMoments, solveLayer } from "../../quant/mod.ts";
import { addProduct } from "../../quant/product.ts";
import { settingsFor } from "../../quant/solvers/effort.ts";
import { accumulateMoment, emptyMoments } from "../../quant/solvers/moments.ts";
import { DEFAULT_SOLVER_SETTINGS } from "../../quant/solvers/settings.ts";
import { type Goal, type SuiteReport, tableOf } from "../suite.ts";
import { secondsOf } from "../timing.ts";
import { numbersLike } from "./kernel_steps.ts";
import { FORM, type PartRun, POSITIONS, type SolverSpeedScale } from "./scale.ts";

/** A published model's block: its inputs with the rows of each layer that reads them. */
interface PublishedModel {
  readonly name: string;
  readonly blocks: number;
  readonly inputs: readonly {
    readonly cols: number;
    readonly rows: readonly number[];
    /** Whether the outputs are added to the stream, whose loss is corrected too. */
    readonly isStream: boolean;
  }[];
  /** Minutes that are wanted, by effort. */
  readonly goals: Readonly<Partial<Record<Effort, number>>>;
}

const PUBLISHED: readonly PublishedModel[] = [
  {
    name: "Dream 7B",
    blocks: 28,
    inputs: [
      { cols: 3584, rows: [3584, 512, 512], isStream: false },
      { cols: 3584, rows: [3584], isStream: true },
      { cols: 3584, rows: [18_944, 18_944], isStream: false },
      { cols: 18_944, rows: [3584], isStream: true },
    ],
    goals: { medium: 120, low: 40 },
  },
  {
    name: "LLaDA 8B",
    blocks: 32,
    inputs: [
      { cols: 4096, rows: [4096, 4096, 4096], isStream: false },
      { cols: 4096, rows: [4096], isStream: true },
      { cols: 4096, rows: [12_288, 12_288], isStream: false },
      { cols: 12_288, rows: [4096], isStream: true },
    ],
    goals: { medium: 120 },
  },
  {
    name: "DiT-XL/2",
    blocks: 28,
    inputs: [
      { cols: 1152, rows: [6912], isStream: false },
      { cols: 1152, rows: [1152, 1152, 1152], isStream: false },
      { cols: 1152, rows: [1152], isStream: true },
      { cols: 1152, rows: [4608], isStream: false },
      { cols: 4608, rows: [1152], isStream: true },
    ],
    goals: { medium: 12 },
  },
];

/** Seconds of solving at a width: for an input of all layers, and for a row. */
interface WidthTimes {
  readonly cols: number;
  /** Columns of a block of the moment. */
  readonly block: number;
  /** Of a position: the moment and what inputs lost; what a row of a layer lost of the stream. */
  readonly position: number;
  readonly streamRow: number;
  readonly forwardRow: number;
  readonly factor: number;
  /** Of a row's corrected target, and of its solution by effort. */
  readonly target: number;
  readonly row: Readonly<Partial<Record<Effort, number>>>;
}

/** Solves rows of a width as a run by default does, with each effort that some layer gets. */
function measureWidth(
  kernels: Kernels,
  cols: number,
  efforts: Iterable<Effort>,
  { solvedRows: rows, gatheredTokens: tokens }: SolverSpeedScale,
  seed: number,
): WidthTimes {
  const { block } = momentOf(cols);
  const x = numbersLike(tokens * cols, seed), weights = numbersLike(rows * cols, seed + 1);
  const moments = { ...emptyMoments(cols, block), tokens, weight: tokens };
  const cross = new Float32Array(moments.second.length), residual = new Float32Array(rows * cols);
  const lost = numbersLike(tokens * rows, seed + 3);
  const gather = secondsOf(() => {
    accumulateMoment(kernels, x, undefined, undefined, tokens, moments.second, block);
    accumulateMoment(kernels, x, x, undefined, tokens, cross, block);
  });
  const stream = secondsOf(() => accumulateMoment(kernels, x, lost, undefined, tokens, residual));
  const size = { rows: tokens, k: cols, cols: rows };
  const forward = secondsOf(() => addProduct(kernels, "time a layer", x, weights, size, lost));
  for (let i = 0; i < cross.length; i++) cross[i]! /= 100 * tokens;
  let moment = undefined as unknown as ReturnType<typeof factorMoments>, corrected = weights;
  const factor = secondsOf(() => moment = factorMoments(kernels, moments, { takesSums: true }));
  const target = secondsOf(() =>
    corrected = correctedTarget(kernels, { weights, rows, moment, cross }, DEFAULT_SOLVER_SETTINGS)
  );
  const problem = { weights: corrected, rows, cols, moment, ...FORM };
  const solving = Array.from(efforts, (effort) => {
    const settings = { ...DEFAULT_SOLVER_SETTINGS, effort };
    return [effort, secondsOf(() => solveLayer(kernels, "best", problem, settings)) / rows] as const;
  });
  return {
    cols,
    block,
    position: gather / tokens,
    streamRow: stream / tokens / rows,
    forwardRow: forward / tokens / rows,
    factor,
    target: target / rows,
    row: Object.fromEntries(solving),
  };
}

/** The moment of a width as a run keeps it by default. */
const momentOf = (cols: number) =>
  chooseMoment(DEFAULT_SOLVER_SETTINGS, { cols, positions: POSITIONS, formats: [FORM] });

/** The effort that a layer gets: small ones get more. */
const effortOf = (effort: Effort, rows: number, cols: number): Effort =>
  settingsFor({ ...DEFAULT_SOLVER_SETTINGS, effort }, { rows, cols, block: momentOf(cols).block }).effort;

/** Efforts with which layers of so many columns are solved, in any of the published models. */
const effortsAt = (wanted: number): Set<Effort> =>
  new Set(
    PUBLISHED.flatMap(({ inputs, goals }) =>
      inputs.filter(({ cols }) => cols === wanted).flatMap(({ rows }) =>
        (Object.keys(goals) as Effort[]).flatMap((effort) =>
          rows.map((count) => effortOf(effort, count, wanted))
        )
      )
    ),
  );

export interface Forecast {
  readonly model: string;
  readonly effort: Effort;
  readonly minutes: number;
  readonly goalMinutes: number;
}

/** Minutes of `best` for a model: gathering by position, factors by input, solving by row. */
function forecastsOf(
  { name, blocks, inputs, goals }: PublishedModel,
  times: ReadonlyMap<number, WidthTimes>,
): Forecast[] {
  return (Object.entries(goals) as [Effort, number][]).map(([effort, goalMinutes]) => {
    let seconds = 0;
    for (const { cols, rows, isStream } of inputs) {
      const own = times.get(cols)!;
      seconds += POSITIONS * own.position + own.factor;
      for (const count of rows) {
        const passes = POSITIONS * (2 * own.forwardRow + (isStream ? own.streamRow : 0));
        seconds += count * (passes + own.target + own.row[effortOf(effort, count, cols)]!);
      }
    }
    return { model: name, effort, minutes: blocks * seconds / 60, goalMinutes };
  });
}

/** Every width of the published models. */
function measureWidths(
  { context: { options: { seed }, progress }, kernels, scale }: PartRun,
): Map<number, WidthTimes> {
  const widthOf = (cols: number) =>
    Math.max(FORM.groupSize, Math.round(cols * scale.width / FORM.groupSize) * FORM.groupSize);
  const all = new Set(PUBLISHED.flatMap(({ inputs }) => inputs.map(({ cols }) => cols)));
  return new Map(Array.from(all, (cols, i) => {
    progress(`solving at width ${widthOf(cols)}, ${i + 1} of ${all.size}`);
    return [cols, measureWidth(kernels, widthOf(cols), effortsAt(cols), scale, seed)];
  }));
}

const milliseconds = (seconds: number | undefined) => seconds === undefined ? null : seconds * 1e3;

/** Solving at every width, and where the widths are the published ones, forecasts. */
export function forecastPublished(run: PartRun): SuiteReport<Forecast> {
  const times = measureWidths(run);
  const forecasts = run.scale.width === 1 ? PUBLISHED.flatMap((model) => forecastsOf(model, times)) : [];
  const goals = PUBLISHED.flatMap(({ name, goals }) =>
    (Object.entries(goals) as [Effort, number][]).map(([effort, goalMinutes]): Goal => {
      const own = forecasts.find((each) => each.model === name && each.effort === effort);
      const goal = `best, ${name}, effort ${effort} (forecast)`, wanted = `≤ ${goalMinutes} min`;
      return own === undefined
        ? { goal, wanted, measured: null, met: null, reason: "its widths are measured without --quick" }
        : { goal, wanted, measured: `${own.minutes.toFixed(0)} min`, met: own.minutes <= goalMinutes };
    })
  );
  return {
    sections: [widthSection([...times.values()]), forecastSection(forecasts)],
    rows: forecasts,
    goals,
    skipped: [],
  };
}

const widthSection = (times: readonly WidthTimes[]) =>
  tableOf(
    "Solving a width with best, by effort",
    ["Moments as a run of 4096 positions keeps them by default; products of random numbers."],
    times,
    [
      ["cols", "columns", ({ cols }) => cols],
      [
        "block",
        "moment",
        ({ cols, block }) => block === cols ? "full" : block === 1 ? "diagonal" : `blocks of ${block}`,
      ],
      ["position", "ms a position", ({ position }) => position * 1e3, 3],
      ["factor", "s a factor", ({ factor }) => factor, 2],
      ["low", "ms a row: low", ({ row }) => milliseconds(row.low), 2],
      ["medium", "medium", ({ row }) => milliseconds(row.medium), 2],
      ["high", "high", ({ row }) => milliseconds(row.high), 2],
    ],
  );

const forecastSection = (forecasts: readonly Forecast[]) =>
  tableOf(
    "Forecast of best at published models' shapes, from the rates above: not measured",
    [
      `2 bits, groups of ${FORM.groupSize}, ${POSITIONS} positions, one candidate; without reading, writing and held-out data.`,
    ],
    forecasts,
    [
      ["model", "model", ({ model }) => model],
      ["effort", "effort", ({ effort }) => effort],
      ["minutes", "minutes", ({ minutes }) => minutes, 1],
      ["goal", "goal", ({ goalMinutes }) => goalMinutes],
    ],
  );
