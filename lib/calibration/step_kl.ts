/**
 * What a model's steps cost beside full precision on calibration data: the step KL of every sample, and of every time group. Where a
 * model's own time parameters are part of it, they run as they will.
 */
import type { DitModel, LayerObserver, LoadedModel, Scheduler } from "../models/mod.ts";
import { tokenKl } from "../thermo/masked_transition.ts";
import { learnedVarianceWeight, type TransitionComputer } from "../thermo/transition.ts";
import { maskRatioAxis, type TimeAxis, type TimeGroups, timestepAxis } from "../time/mod.ts";
import type { Calibrated } from "./mod.ts";
import { transitionsOf } from "./time_weights.ts";

/** Bins of the mask ratio: as many as image models mostly have timesteps, so that a window is the same share of the axis. */
export const MASK_RATIO_BINS = 1000;

/** The denoising axis of a model. @param scheduler of an image model */
export function timeAxisOf(scheduler: Scheduler | undefined): TimeAxis {
  return scheduler === undefined
    ? maskRatioAxis(MASK_RATIO_BINS)
    : timestepAxis(scheduler.config.trainTimesteps);
}

/** Step-KL weights of a model's own schedule by timestep: DDPM's, cut at their 95th percentile. */
export function stepWeights(scheduler: Scheduler): TransitionComputer {
  return transitionsOf(scheduler, { sampler: "ddpm", schedule: "auto" });
}

/** Bytes of full-precision outputs that a meter keeps for the models to come: a large vocabulary's logits are computed again. */
const TEACHER_CACHE_BYTES = 2 ** 28;

/** Step KL of samples as sums: the mean is Σ sums / Σ counts. */
export interface StepKl {
  /** `[samples]` */
  readonly sums: Float64Array<ArrayBuffer>;
  /** `[samples]`: masked positions, or 1 an image. */
  readonly counts: Float64Array<ArrayBuffer>;
  /** `[samples]` */
  readonly times: Float64Array<ArrayBuffer>;
}

/** Sees what linear layers read; the times are of the batch's items, whose rows are in equal parts. */
export type TimedObserver = (times: Float64Array, ...input: Parameters<LayerObserver>) => void;

/** Σ sums / Σ counts. */
export function meanStepKl({ sums, counts }: StepKl): number {
  return sums.reduce((a, b) => a + b, 0) / counts.reduce((a, b) => a + b, 0);
}

/** The mean of each time group, 0 for one that no sample is in. */
export function stepKlByGroup(
  { sums, counts, times }: StepKl,
  groups: TimeGroups,
): Float64Array<ArrayBuffer> {
  const above = new Float64Array(groups.count), below = new Float64Array(groups.count);
  for (let i = 0; i < sums.length; i++) {
    const group = groups.groupOf(times[i]!);
    above[group]! += sums[i]!;
    below[group]! += counts[i]!;
  }
  return above.map((sum, g) => below[g] === 0 ? 0 : sum / below[g]!);
}

/**
 * Measures models beside the full-precision one of `calibrated`, whose outputs are computed once, as far as they are small.
 *
 * For sequences a sample's sum is KL(full ‖ other) over its masked positions, in nats: what a step adds is ρ times that. For images it is
 * `ω_t ‖Δ prediction‖²`, with the variance's term where that is learned.
 */
export class StepKlMeter {
  readonly #full = new Map<number, Float32Array<ArrayBuffer>>();
  #bytes = 0;
  readonly #calibrated: Calibrated;
  readonly #transitions: TransitionComputer | undefined;

  constructor(calibrated: Calibrated, scheduler: Scheduler | undefined) {
    this.#calibrated = calibrated;
    this.#transitions = scheduler === undefined ? undefined : stepWeights(scheduler);
  }

  /** Bytes of outputs that are kept. */
  get bytes(): number {
    return this.#bytes;
  }

  /** Full precision's output for a part; a copy, because a model's next run may overwrite its own. */
  #fullOutput(part: number, run: () => Float32Array): Float32Array<ArrayBuffer> {
    const known = this.#full.get(part);
    if (known !== undefined) return known;
    const output = run().slice() as Float32Array<ArrayBuffer>;
    if (this.#bytes + output.byteLength <= TEACHER_CACHE_BYTES) {
      this.#full.set(part, output);
      this.#bytes += output.byteLength;
    }
    return output;
  }

  /**
   * @param observe also sees what every linear layer reads, with the times of the batch's items; all rows of all items
   * @throws {TypeError} when the model is of another family
   */
  measure(other: LoadedModel, observe?: TimedObserver): StepKl {
    const calibrated = this.#calibrated;
    const all: { sum: number; count: number; time: number }[] = [];
    if (calibrated.kind === "sequences") {
      if (other.kind === "dit") {
        throw new TypeError("Cannot compare a language model with one that draws images");
      }
      const { model, shift, data: { heldOut } } = calibrated;
      const { vocabularySize, maskToken } = model.config;
      for (const [p, { batch: { inputIds, batch }, times }] of heldOut.entries()) {
        const tokens = inputIds.length / batch;
        const rows = maskedRows(inputIds, tokens, maskToken, shift);
        const target = this.#fullOutput(p, () => model.forward(inputIds, batch, { rows }));
        const logits = observe === undefined
          ? other.model.forward(inputIds, batch, { rows, t: times })
          : rowsOf(
            other.model.forward(inputIds, batch, {
              t: times,
              observe: (...input) => observe(times, ...input),
            }),
            rows,
            vocabularySize,
          );
        const kl = tokenKl(target, logits, model.config);
        const samples = Array.from(times, (time) => ({ sum: 0, count: 0, time }));
        let row = 0;
        for (let i = 0; i < inputIds.length; i++) {
          if (inputIds[i] !== maskToken) continue;
          const sample = samples[Math.floor(i / tokens)]!;
          sample.sum += kl[row++]!;
          sample.count++;
        }
        all.push(...samples);
      }
    } else {
      if (other.kind !== "dit") {
        throw new TypeError("Cannot compare an image model with one that writes text");
      }
      const { model, data: { heldOut } } = calibrated;
      for (const [p, { batch: { samples, timesteps, labels }, times }] of heldOut.entries()) {
        const target = this.#fullOutput(p, () => model.forward(samples, timesteps, labels));
        const output = other.model.forward(samples, timesteps, labels, {
          observe: observe && ((...input) => observe(times, ...input)),
        });
        const sums = imageStepKl(model, this.#transitions!, target, output, timesteps);
        all.push(...Array.from(sums, (sum, i) => ({ sum, count: 1, time: timesteps[i]! })));
      }
    }
    return {
      sums: Float64Array.from(all, ({ sum }) => sum),
      counts: Float64Array.from(all, ({ count }) => count),
      times: Float64Array.from(all, ({ time }) => time),
    };
  }
}

/** Some rows of a matrix. */
export function rowsOf(matrix: Float32Array, rows: Int32Array, cols: number): Float32Array {
  const out = new Float32Array(rows.length * cols);
  for (const [i, row] of rows.entries()) out.set(matrix.subarray(row * cols, (row + 1) * cols), i * cols);
  return out;
}

/** Flat positions of the logits that predict the masked tokens, in their order. */
export function maskedRows(
  inputIds: Int32Array,
  tokens: number,
  maskToken: number,
  shift: number,
): Int32Array {
  const rows: number[] = [];
  for (let i = 0; i < inputIds.length; i++) {
    if (inputIds[i] === maskToken) rows.push(i % tokens < shift ? i : i - shift);
  }
  return Int32Array.from(rows);
}

/** `ω_t ‖Δ prediction‖²` of each image, and the same of its variance channels where they are learned. */
export function imageStepKl(
  { config, imageElements }: Pick<DitModel, "config" | "imageElements">,
  transitions: TransitionComputer,
  full: Float32Array,
  other: Float32Array,
  timesteps: ArrayLike<number>,
): Float64Array<ArrayBuffer> {
  const images = timesteps.length, size = full.length / images;
  return Float64Array.from({ length: images }, (_, i) => {
    const errorOf = (begin: number, end: number) => {
      let sum = 0;
      for (let k = i * size + begin; k < i * size + end; k++) sum += (other[k]! - full[k]!) ** 2;
      return sum;
    };
    const timestep = timesteps[i]!;
    const kl = transitions.weightOf(timestep) * errorOf(0, imageElements);
    if (!config.learnsVariance) return kl;
    return kl + learnedVarianceWeight(transitions.schedule, timestep) * errorOf(imageElements, size);
  });
}
