/**
 * The metric that selects between candidates: distance of a model with other weights from full precision on
 * held-out data.
 */
import type { Blockwise, MaskedTransformer, Matrix, SequenceBatch } from "../models/mod.ts";
import { tokenKl } from "../thermo/masked_transition.ts";
import type { Calibrated, CalibrationPart } from "./mod.ts";
import { pause } from "../progress.ts";
import { blockCount } from "./collect.ts";
import { maskedRows, rowsOf } from "./step_kl.ts";

/** What {@linkcode HeldOutMeter} measures, by what the model generates. */
export const HELD_OUT_METRICS: Readonly<Record<Calibrated["kind"], string>> = {
  sequences: "KL at masked positions, nats",
  images: "relative noise error",
};

/** Logits that are computed at once, of each model: a large vocabulary takes a few positions at a time. */
const LOGITS_AT_ONCE = 2 ** 25;

/** How much is measured, and how that is followed. */
export interface HeldOutOptions {
  /** Batches to look at; all by default. */
  readonly batches?: number | undefined;
  readonly signal?: AbortSignal | undefined;
  /** Called with the done part of a measurement. */
  readonly onShare?: ((share: number) => void) | undefined;
}

/**
 * Measures models with other weights against full precision on the held-out part of calibration data. All of
 * it goes through a block before the next one, so that each block's weights are read once; what full
 * precision makes of the last block is kept for further models.
 */
export class HeldOutMeter {
  readonly #distance: (weights: Weights) => Promise<number>;

  constructor(calibrated: Calibrated, options: HeldOutOptions = {}) {
    if (calibrated.kind === "images") {
      const { model, data } = calibrated;
      const runs = new HeldOutRuns(model, data.heldOut, options);
      this.#distance = (weights) =>
        runs.distance(weights, ({ part, full, other, pass }) => {
          const own = model.finish(part.batch, full, {}).slice();
          return relativeErrors(part, own, model.finish(part.batch, other, pass));
        });
    } else {
      const { model, data, shift } = calibrated;
      const runs = new HeldOutRuns(model, data.heldOut, options);
      this.#distance = (weights) => runs.distance(weights, (ends) => maskedKl(model, shift, ends));
    }
  }

  /**
   * Mean KL at masked positions in nats for sequences, mean ‖ε̂ − ε‖² / ‖ε‖² for images; NaN where nothing
   * was held out.
   */
  distance(weights: Weights): Promise<number> {
    return this.#distance(weights);
  }
}

type Floats = Float32Array<ArrayBuffer>;
type Weights = ReadonlyMap<string, Matrix>;

/** What the last block makes of a part, in full precision and with other weights. */
interface Ends<Batch> {
  readonly part: CalibrationPart<Batch>;
  readonly full: Floats;
  readonly other: Floats;
  /** Of the other weights. */
  readonly pass: { readonly weights: Weights };
}

/** Runs of the held-out parts of a model's data. */
class HeldOutRuns<Batch> {
  readonly #parts: readonly CalibrationPart<Batch>[];
  #full: readonly Floats[] | undefined;

  constructor(
    readonly model: Blockwise<Batch>,
    parts: readonly CalibrationPart<Batch>[],
    readonly options: HeldOutOptions,
  ) {
    this.#parts = parts.slice(0, options.batches);
  }

  async distance(weights: Weights, distances: (ends: Ends<Batch>) => number[]): Promise<number> {
    const { onShare, signal } = this.options, pass = { weights };
    const runs = this.#full === undefined ? 2 : 1;
    const full = this.#full ??= await this.#ends({}, (share) => onShare?.(share / runs));
    const others = await this.#ends(pass, (share) => onShare?.((runs - 1 + share) / runs));
    let sum = 0, count = 0;
    for (const [i, part] of this.#parts.entries()) {
      for (const value of distances({ part, full: full[i]!, other: others[i]!, pass })) {
        sum += value;
        count++;
      }
      await pause(signal);
    }
    return sum / count;
  }

  /** Hidden states behind the last block. */
  async #ends(pass: Partial<Ends<Batch>["pass"]>, onShare: (share: number) => void): Promise<Floats[]> {
    const { model } = this, parts = this.#parts, blocks = blockCount(model);
    const all = parts.map(({ batch }) => model.start(batch, pass));
    for (let block = 0; block < blocks; block++) {
      for (const [i, { batch }] of parts.entries()) {
        model.runBlock(block, batch, all[i]!, pass);
        onShare((block + (i + 1) / parts.length) / blocks);
        await pause(this.options.signal);
      }
    }
    return all;
  }
}

/** KL(full ‖ other) of each masked position; one NaN for a candidate that overflows: it loses. */
function maskedKl(
  model: MaskedTransformer,
  shift: number,
  { part: { batch, samples }, full, other, pass }: Ends<SequenceBatch>,
): number[] {
  const { inputIds } = batch, { vocabularySize, maskToken, hiddenSize } = model.config;
  const rows = maskedRows(inputIds, inputIds.length / samples, maskToken, shift);
  const atOnce = Math.max(1, Math.floor(LOGITS_AT_ONCE / vocabularySize)), found: number[] = [];
  for (let begin = 0; begin < rows.length; begin += atOnce) {
    const some = rows.subarray(begin, begin + atOnce);
    const p = model.finish(batch, rowsOf(full, some, hiddenSize), {}).slice();
    const q = model.finish(batch, rowsOf(other, some, hiddenSize), pass);
    if (!q.every(Number.isFinite)) return [NaN];
    for (const value of tokenKl(p, q, model.config)) found.push(value);
  }
  return found;
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
