/**
 * The metric that selects between candidates: distance of a model with other weights from full precision on
 * held-out data.
 */
import type { Blockwise, MaskedTransformer, Matrix, SequenceBatch } from "../models/mod.ts";
import { tokenKl } from "../thermo/masked_transition.ts";
import type { Calibrated, CalibrationPart } from "./mod.ts";
import { blockCount } from "./collect.ts";
import { maskedRows, rowsOf } from "./step_kl.ts";

/** What {@linkcode heldOutDistance} measures, by what the model generates. */
export const HELD_OUT_METRICS: Readonly<Record<Calibrated["kind"], string>> = {
  sequences: "KL at masked positions, nats",
  images: "relative noise error",
};

/**
 * Distance of a model with other weights from full precision on the held-out part: mean KL at masked positions
 * in nats for sequences, mean ‖ε̂ − ε‖² / ‖ε‖² for images; NaN where nothing was held out.
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
      const hidden = model.start(part.batch, options);
      for (let block = 0; block < blockCount(model); block++) {
        model.runBlock(block, part.batch, hidden, options);
      }
      return model.finish(part.batch, hidden, options).slice();
    };
    return distances(part, run({}), run({ weights }));
  });
  return all.reduce((sum, value) => sum + value, 0) / all.length;
}

/** KL(full ‖ other) of each masked position. */
function maskedKl(
  { config }: MaskedTransformer,
  shift: number,
  { batch: { inputIds }, samples }: CalibrationPart<SequenceBatch>,
  full: Float32Array,
  other: Float32Array,
): number[] {
  const { vocabularySize, maskToken } = config;
  const rows = maskedRows(inputIds, inputIds.length / samples, maskToken, shift);
  const [p, q] = [full, other].map((logits) => rowsOf(logits, rows, vocabularySize)) as [
    Float32Array,
    Float32Array,
  ];
  // A candidate that overflows loses; it ends no run.
  if (!q.every(Number.isFinite)) return [NaN];
  return [...tokenKl(p, q, config)];
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
