/**
 * The step KL of a model against full precision on held-out calibration data: of every sample, of every time
 * group, and the mean. A model's time parameters run as they do in use.
 */
import type { DitModel, LayerObserver, LoadedModel, Scheduler } from "../models/mod.ts";
import { tokenKl } from "../thermo/masked_transition.ts";
import { TransitionComputer } from "../thermo/transition.ts";
import type { TimeGroups } from "../time/mod.ts";
import type { Calibrated } from "./mod.ts";
import { transitionsOf } from "./time_weights.ts";

/**
 * Step-KL weights by timestep of a model's own noise schedule: DDPM's, cut at their 95th percentile; without
 * a scheduler masked diffusion's.
 */
export function stepWeights(scheduler: Scheduler | undefined): TransitionComputer {
  return scheduler === undefined
    ? new TransitionComputer()
    : transitionsOf(scheduler, { sampler: "ddpm", schedule: "auto" });
}

/**
 * Bytes of full-precision outputs that a meter keeps for further models: those of a large vocabulary are
 * computed again.
 */
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

/**
 * Sees the inputs of linear layers; `times` are those of the batch's items, whose rows are in equal parts.
 */
export type TimedObserver = (times: Float64Array, ...input: Parameters<LayerObserver>) => void;

/** Σ sums / Σ counts. */
export function meanStepKl({ sums, counts }: Pick<StepKl, "sums" | "counts">): number {
  return sums.reduce((a, b) => a + b, 0) / counts.reduce((a, b) => a + b, 0);
}

/** The mean of each time group, 0 for one without samples. */
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
 * Measures models against the full-precision one of `calibrated`, whose outputs are computed once, as far as
 * they are small.
 *
 * For sequences a sample's sum is KL(full ‖ other) over its masked positions, in nats: a step adds ρ times
 * that. For images it is `ω_t ‖Δ prediction‖²`, with the variance's term where that is learned.
 */
export class StepKlMeter {
  readonly #full = new Map<number, Float32Array<ArrayBuffer>>();
  readonly #counts: Float64Array<ArrayBuffer>;
  readonly #times: Float64Array<ArrayBuffer>;
  /** Numbers of the samples at each time. */
  readonly #samplesAt = new Map<number, number[]>();
  #bytes = 0;

  /** @param transitions weights of the steps, and where the step KLs of named models are kept */
  constructor(
    readonly calibrated: Calibrated,
    readonly transitions: TransitionComputer = stepWeights(calibrated.data.scheduler),
  ) {
    const parts: readonly { readonly times: Float64Array }[] = calibrated.data.heldOut;
    this.#times = Float64Array.from(parts.flatMap(({ times }) => [...times]));
    this.#counts = new Float64Array(this.#times.length).fill(1);
    if (calibrated.kind === "sequences") {
      const { maskToken } = calibrated.model.config;
      let sample = 0;
      for (const { batch: { inputIds }, samples } of calibrated.data.heldOut) {
        const tokens = inputIds.length / samples;
        for (let i = 0; i < samples; i++) {
          const own = inputIds.subarray(i * tokens, (i + 1) * tokens);
          this.#counts[sample++] = own.reduce((count, id) => count + Number(id === maskToken), 0);
        }
      }
    }
    for (const [i, time] of this.#times.entries()) {
      this.#samplesAt.set(time, [...this.#samplesAt.get(time) ?? [], i]);
    }
  }

  /** Bytes of outputs that are kept. */
  get bytes(): number {
    return this.#bytes;
  }

  /**
   * The step KL of a model by its name: what the transition computer's cache does not have is measured and
   * put there. Meters of the same computer may share names where their data have the same samples at each
   * time.
   *
   * @param load the model, called only when it has to be measured
   */
  measureOnce(name: string, load: () => LoadedModel): StepKl {
    const sums = new Float64Array(this.#times.length);
    let measured: StepKl | undefined;
    for (const [time, samples] of this.#samplesAt) {
      const own = this.transitions.stepKl(name, time, () => {
        measured ??= this.measure(load());
        return samples.map((sample) => measured!.sums[sample]!);
      });
      for (const [i, sample] of samples.entries()) sums[sample] = own[i]!;
    }
    return { sums, counts: this.#counts, times: this.#times };
  }

  /**
   * @param observe also sees the inputs of every linear layer, with the times of the batch's items; all rows
   * of all items
   * @throws {TypeError} when the model is of another family
   */
  measure(other: LoadedModel, observe?: TimedObserver): StepKl {
    const { calibrated } = this, sums: number[] = [];
    if (calibrated.kind === "sequences") {
      if (other.kind === "dit") {
        throw new TypeError("Cannot compare a language model with an image model");
      }
      const { model, shift, data: { heldOut } } = calibrated;
      const { vocabularySize, maskToken } = model.config;
      for (const [p, { batch: { inputIds, batch }, times }] of heldOut.entries()) {
        const rows = maskedRows(inputIds, inputIds.length / batch, maskToken, shift);
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
        let row = 0;
        for (let i = 0; i < times.length; i++) {
          let sum = 0;
          for (const end = row + this.#counts[sums.length]!; row < end; row++) sum += kl[row]!;
          sums.push(sum);
        }
      }
    } else {
      if (other.kind !== "dit") {
        throw new TypeError("Cannot compare an image model with a language model");
      }
      const { model, data: { heldOut } } = calibrated;
      for (const [p, { batch: { samples, timesteps, labels }, times }] of heldOut.entries()) {
        const target = this.#fullOutput(p, () => model.forward(samples, timesteps, labels));
        const output = other.model.forward(samples, timesteps, labels, {
          observe: observe && ((...input) => observe(times, ...input)),
        });
        sums.push(...imageStepKl(model, this.transitions, target, output, timesteps));
      }
    }
    return { sums: Float64Array.from(sums), counts: this.#counts, times: this.#times };
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

/** `ω_t ‖Δ prediction‖²` of each image, and of its variance channels where they are learned. */
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
    return kl + transitions.varianceWeightOf(timestep) * errorOf(imageElements, size);
  });
}
