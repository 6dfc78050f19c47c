/**
 * One pass of the full-precision model over calibration data, with what every layer reads added to
 * calibration statistics: of all layers, or a run of blocks at a time where all would take too much memory.
 */
import { CalibrationError } from "../errors.ts";
import type { Blockwise, LayerObserver } from "../models/mod.ts";
import type { Kernels } from "../native/mod.ts";
import {
  type CalibrationRun,
  CalibrationStatistics,
  type LayerInput,
  type SecondMoments,
  statisticsBytes,
  type StatisticsModel,
  type TimeGroups,
} from "../time/mod.ts";
import { pause } from "../progress.ts";
import type { Calibrated, CalibrationPart, CalibrationSet } from "./mod.ts";

/** Options of a pass. */
export interface CollectOptions {
  readonly kernels: Kernels;
  readonly fingerprint: string;
  /** What a file is to say of the model. */
  readonly model?: StatisticsModel | undefined;
  readonly groups: TimeGroups;
  readonly second: SecondMoments;
  /** Columns of a block of the second moment of inputs of so many columns; by default it is whole. */
  readonly blockOf?: ((cols: number) => number) | undefined;
  readonly run: CalibrationRun;
  /** Names of the weights of the layers to look at; all by default. */
  readonly names?: ReadonlySet<string> | undefined;
  /** Called after each part of the data. */
  readonly onPart?: ((statistics: CalibrationStatistics, place: PassPlace) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** How far a pass is: parts of the data that are done in a run of blocks. */
export interface PassPlace {
  /** Index of the run of blocks. */
  readonly run: number;
  readonly runs: number;
  readonly done: number;
  readonly parts: number;
}

/** Statistics of most layers at once; results do not depend on it. */
const BYTES_AT_ONCE = 2 * 2 ** 30;

/** Options of a pass over runs of blocks. */
export interface RunsOptions extends CollectOptions {
  /** Bytes of the statistics of a run of blocks, unless one block takes more; default 2 GiB. */
  readonly bytesAtOnce?: number | undefined;
  /** Runs of blocks that a stopped pass has finished, and the statistics and parts of the next one. */
  readonly start?: {
    readonly runs: number;
    readonly statistics?: CalibrationStatistics | undefined;
    readonly parts: number;
  } | undefined;
}

/**
 * Statistics of what the layers of a model read in full precision.
 *
 * @throws {CalibrationError} when an input is NaN or infinite, or statistics would take too much memory
 */
export async function collectStatistics(
  calibrated: Calibrated,
  options: CollectOptions,
): Promise<CalibrationStatistics> {
  const { value } = await statisticsByRun(calibrated, { ...options, bytesAtOnce: Infinity }).next();
  const { fingerprint, groups, second, run } = options;
  return value ?? new CalibrationStatistics({ fingerprint, groups, inputs: new Map(), second, runs: [run] });
}

/**
 * {@linkcode collectStatistics}, a run of blocks after the other: what one holds is free before the next one
 * begins. Hidden states of all data are kept meanwhile.
 *
 * @throws as {@linkcode collectStatistics}
 */
export function statisticsByRun(
  calibrated: Calibrated,
  options: RunsOptions,
): AsyncGenerator<CalibrationStatistics, undefined> {
  return calibrated.kind === "sequences"
    ? collect(calibrated.model, calibrated.data, options)
    : collect(calibrated.model, calibrated.data, options);
}

/** A model's inputs by the first layer that reads them. */
export function layerInputs<Batch>(
  { stages }: Blockwise<Batch>,
  names?: ReadonlySet<string>,
  blockOf: (cols: number) => number = (cols) => cols,
): Map<string, LayerInput> {
  const inputs = new Map<string, LayerInput>(), seen = new Set<string>();
  for (const { layers } of stages) {
    const own = layers.filter(({ name }) => names?.has(name) !== false && !seen.has(name));
    if (own.length === 0) continue;
    for (const { name } of own) seen.add(name);
    const { name, weights: { cols } } = own[0]!;
    inputs.set(name, { cols, block: blockOf(cols), layers: own.map(({ name }) => name) });
  }
  return inputs;
}

/** Blocks whose inputs' statistics are gathered at once: `[begin, end)`. */
interface BlockRun {
  readonly begin: number;
  end: number;
  readonly inputs: Map<string, LayerInput>;
}

/** Runs of blocks with wanted inputs, each as long as fits. */
export function blockRuns<Batch>(
  model: Blockwise<Batch>,
  { names, groups, second, blockOf: momentBlockOf, bytesAtOnce = BYTES_AT_ONCE }: Pick<
    RunsOptions,
    "names" | "groups" | "second" | "blockOf" | "bytesAtOnce"
  >,
): BlockRun[] {
  const blockOf = new Map<string, number>();
  for (const { block, layers } of model.stages) {
    for (const { name } of layers) if (!blockOf.has(name)) blockOf.set(name, block);
  }
  const runs: BlockRun[] = [];
  for (
    const [block, own] of Map.groupBy(
      layerInputs(model, names, momentBlockOf),
      ([name]) => blockOf.get(name)!,
    )
  ) {
    const run = runs.at(-1), inputs = [...run?.inputs ?? [], ...own].map(([, input]) => input);
    if (run === undefined || statisticsBytes(inputs, groups.count, second, 8) > bytesAtOnce) {
      runs.push({ begin: run?.end ?? 0, end: block + 1, inputs: new Map(own) });
      continue;
    }
    run.end = block + 1;
    for (const [name, input] of own) run.inputs.set(name, input);
  }
  return runs;
}

async function* collect<Batch>(
  model: Blockwise<Batch>,
  { fit, chunk }: CalibrationSet<Batch>,
  { start, onPart, signal, ...options }: RunsOptions,
): AsyncGenerator<CalibrationStatistics, undefined> {
  const { kernels, fingerprint, model: own, groups, second, run } = options, runs = blockRuns(model, options);
  const states: Float32Array<ArrayBuffer>[] = [];
  for (const [index, { begin, end, inputs }] of runs.entries()) {
    const isLast = index === runs.length - 1, isDone = index < (start?.runs ?? 0);
    const known = index === start?.runs ? start : undefined;
    const statistics = known?.statistics ??
      (isDone
        ? undefined
        : new CalibrationStatistics({ fingerprint, model: own, groups, inputs, second, runs: [run] }));
    for (const [i, part] of fit.entries()) {
      const isSeen = isDone || i < (known?.parts ?? 0);
      if (isSeen && isLast) continue;
      const observe = isSeen ? undefined : observerOf(kernels, statistics!, part, chunk);
      const hidden = states[i] ?? model.start(part.batch);
      for (let block = begin; block < Math.min(end, blockCount(model)); block++) {
        model.runBlock(block, part.batch, hidden, { observe });
      }
      if (end > blockCount(model)) model.finish(part.batch, hidden, { observe });
      if (!isLast) states[i] = hidden;
      if (!isSeen) onPart?.(statistics!, { run: index, runs: runs.length, done: i + 1, parts: fit.length });
      if (!isLast || i + 1 < fit.length) await pause(signal); // what is complete is not given up
    }
    if (statistics === undefined) continue;
    // Those of a part are rounded with the others.
    if (run.shard === undefined) statistics.settle();
    yield statistics;
  }
}

/** Adds what layers read to statistics: each input once. */
function observerOf(
  kernels: Kernels,
  statistics: CalibrationStatistics,
  part: CalibrationPart<unknown>,
  chunk: number | undefined,
): LayerObserver {
  const seen = new Set<string>();
  return ({ name }, x, rows) => {
    const input = statistics.inputs.get(name);
    if (input === undefined || seen.has(name)) return;
    seen.add(name);
    const samples = { times: part.times, weights: rowWeights(part, rows, name), chunk };
    statistics.add(kernels, name, x.subarray(0, rows * input.cols), rows, samples);
  };
}

/** The index behind a model's last block. */
export const blockCount = <Batch>(model: Blockwise<Batch>): number => model.stages.at(-1)!.block;

/**
 * Weights of the rows that a layer reads: those of positions, or of samples for a layer that reads a row a
 * sample.
 */
export function rowWeights(
  { weights, samples, sampleWeights }: CalibrationPart<unknown>,
  rows: number,
  name: string,
): Float32Array | undefined {
  if (rows === weights.length) return weights;
  if (rows === samples) return sampleWeights;
  throw new CalibrationError(
    `Cannot calibrate ${JSON.stringify(name)}: it must read a row a position or a sample, got ${rows} rows`,
    { tensor: name },
  );
}
