/**
 * One pass of the full-precision model over calibration data, with what every layer reads added to
 * calibration statistics.
 */
import { CalibrationError } from "../errors.ts";
import type { Blockwise, LayerObserver } from "../models/mod.ts";
import type { Kernels } from "../native/mod.ts";
import {
  type CalibrationRun,
  CalibrationStatistics,
  type LayerInput,
  type SecondMoments,
  type TimeGroups,
} from "../time/mod.ts";
import { pause } from "../progress.ts";
import type { Calibrated, CalibrationPart, CalibrationSet } from "./mod.ts";

/** Options of a pass. */
export interface CollectOptions {
  readonly kernels: Kernels;
  readonly fingerprint: string;
  readonly groups: TimeGroups;
  readonly second: SecondMoments;
  readonly run: CalibrationRun;
  /** Names of the weights of the layers to look at; all by default. */
  readonly names?: ReadonlySet<string> | undefined;
  /** Statistics of a stopped pass, and the number of parts of the data in them. */
  readonly start?: { readonly statistics: CalibrationStatistics; readonly parts: number } | undefined;
  /** Called after each part of the data. */
  readonly onPart?: ((statistics: CalibrationStatistics, done: number, of: number) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
}

/**
 * Statistics of what the layers of a model read in full precision.
 *
 * @throws {CalibrationError} when an input is NaN or infinite, or statistics would take too much memory
 */
export function collectStatistics(
  calibrated: Calibrated,
  options: CollectOptions,
): Promise<CalibrationStatistics> {
  return calibrated.kind === "sequences"
    ? collect(calibrated.model, calibrated.data, options)
    : collect(calibrated.model, calibrated.data, options);
}

/** A model's inputs by the first layer that reads them. */
export function layerInputs<Batch>(
  { stages }: Blockwise<Batch>,
  names?: ReadonlySet<string>,
): Map<string, LayerInput> {
  const inputs = new Map<string, LayerInput>(), seen = new Set<string>();
  for (const { layers } of stages) {
    const own = layers.filter(({ name }) => names?.has(name) !== false && !seen.has(name));
    if (own.length === 0) continue;
    for (const { name } of own) seen.add(name);
    const { name, weights: { cols } } = own[0]!;
    inputs.set(name, { cols, layers: own.map(({ name }) => name) });
  }
  return inputs;
}

async function collect<Batch>(
  model: Blockwise<Batch>,
  { fit }: CalibrationSet<Batch>,
  { kernels, fingerprint, groups, second, run, names, start, onPart, signal }: CollectOptions,
): Promise<CalibrationStatistics> {
  const statistics = start?.statistics ?? new CalibrationStatistics({
    fingerprint,
    groups,
    inputs: layerInputs(model, names),
    second,
    runs: [run],
  });
  for (const [i, part] of fit.entries()) {
    if (i < (start?.parts ?? 0)) continue;
    const seen = new Set<string>();
    const observe: LayerObserver = ({ name }, x, rows) => {
      const input = statistics.inputs.get(name);
      if (input === undefined || seen.has(name)) return;
      seen.add(name);
      const weights = rowWeights(part, rows, name);
      statistics.add(
        kernels,
        name,
        x.subarray(0, rows * input.cols),
        rows,
        { times: part.times, weights },
      );
    };
    const hidden = model.start(part.batch);
    for (let block = 0; block < blockCount(model); block++) {
      model.runBlock(block, part.batch, hidden, { observe });
    }
    model.finish(part.batch, hidden, { observe });
    onPart?.(statistics, i + 1, fit.length);
    if (i + 1 < fit.length) await pause(signal); // what is complete is not given up
  }
  return statistics;
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
