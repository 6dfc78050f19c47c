/** How far a model with other weights is from full precision on what calibration held out: what candidates are chosen by. */
import type { Blockwise, MaskedTransformer, Matrix, SequenceBatch } from "../models/mod.ts";
import type { Calibrated, CalibrationPart } from "./calibration_data.ts";
import { blockCount } from "./collect.ts";

/**
 * How far a model with other weights is from full precision on the held-out part: mean KL at masked positions in nats for
 * sequences, mean ‖ε̂ − ε‖² / ‖ε‖² for images; NaN where nothing was held out.
 */
export function heldOutDistance(
  calibrated: Calibrated,
  weights: ReadonlyMap<string, Matrix>,
  /** Batches to look at; all by default. */
  batches = Infinity,
): number {
  return calibrated.kind === "sequences"
    ? meanDistance(
      calibrated.model,
      calibrated.data.heldOut.slice(0, batches),
      weights,
      (batch, full, other) => maskedKl(calibrated.model, calibrated.shift, batch, full, other),
    )
    : meanDistance(calibrated.model, calibrated.data.heldOut.slice(0, batches), weights, relativeErrors);
}

function meanDistance<Batch>(
  model: Blockwise<Batch>,
  parts: readonly CalibrationPart<Batch>[],
  weights: ReadonlyMap<string, Matrix>,
  distances: (batch: CalibrationPart<Batch>, full: Float32Array, other: Float32Array) => number[],
): number {
  const all = parts.flatMap((part) => {
    const run = (options: Parameters<typeof model.finish>[2]) => {
      const hidden = model.start(part.batch);
      for (let block = 0; block < blockCount(model); block++) {
        model.runBlock(block, part.batch, hidden, options);
      }
      return model.finish(part.batch, hidden, options).slice();
    };
    return distances(part, run({}), run({ weights }));
  });
  return all.reduce((sum, value) => sum + value, 0) / all.length;
}

/** KL(full ‖ other) of each masked position; mask and padding have probability 0, as in generation. */
function maskedKl(
  { config: { vocabularySize, maskToken, padToken } }: MaskedTransformer,
  shift: number,
  { batch: { inputIds }, samples }: CalibrationPart<SequenceBatch>,
  full: Float32Array,
  other: Float32Array,
): number[] {
  const tokens = inputIds.length / samples, out: number[] = [];
  const excluded = [maskToken, ...(padToken === undefined ? [] : [padToken])];
  const logProbabilities = (logits: Float32Array, row: number) => {
    const values = Float64Array.from(logits.subarray(row * vocabularySize, (row + 1) * vocabularySize));
    for (const token of excluded) values[token] = -Infinity;
    const largest = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const offset = largest + Math.log(values.reduce((sum, value) => sum + Math.exp(value - largest), 0));
    return values.map((value) => value - offset);
  };
  for (let i = 0; i < inputIds.length; i++) {
    if (inputIds[i] !== maskToken) continue;
    const row = i % tokens < shift ? i : i - shift;
    const p = logProbabilities(full, row), q = logProbabilities(other, row);
    let kl = 0;
    for (let v = 0; v < p.length; v++) if (p[v]! > -Infinity) kl += Math.exp(p[v]!) * (p[v]! - q[v]!);
    out.push(kl);
  }
  return out;
}

/** ‖ε̂ − ε‖² / ‖ε‖² of each image. */
function relativeErrors(
  { samples }: CalibrationPart<unknown>,
  full: Float32Array,
  other: Float32Array,
): number[] {
  const size = full.length / samples;
  return Array.from({ length: samples }, (_, i) => {
    let error = 0, norm = 0;
    for (let k = i * size; k < (i + 1) * size; k++) {
      error += (other[k]! - full[k]!) ** 2;
      norm += full[k]! ** 2;
    }
    return error / norm;
  });
}
