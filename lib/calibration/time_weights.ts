/**
 * Weights ω_t of a model's steps, and calibration data whose samples count by them: with such weights a
 * second moment is `H̄ = Σ_t ω_t H_t` (docs/time_axis.md). lib/thermo defines the weights.
 */
import { CalibrationError } from "../errors.ts";
import type { Scheduler } from "../models/mod.ts";
import { unmaskProbability } from "../thermo/masked_transition.ts";
import {
  type BetaScheduleName,
  capWeights,
  noiseSchedule,
  TransitionComputer,
} from "../thermo/transition.ts";
import type { TimeAxis } from "../time/mod.ts";
import type { Calibrated, CalibrationPart, CalibrationSet } from "./mod.ts";
import type { Solvable } from "./statistics/alone.ts";

/** Which steps the weights are of. */
export interface TimeWeightSettings {
  /** Gaussian diffusion: the KL of DDPM's steps, or the displacement of DDIM's. */
  readonly sampler: "ddpm" | "ddim";
  /** Gaussian diffusion: the model's own schedule, or another. */
  readonly schedule: "auto" | BetaScheduleName;
}

/** Step weights of Gaussian diffusion by timestep, cut at their 95th percentile. */
export function transitionsOf(
  { config, alphasCumulative, betas }: Scheduler,
  { sampler, schedule }: TimeWeightSettings,
): TransitionComputer {
  const own = schedule === "auto"
    ? { betas, alphasCumulative }
    : noiseSchedule(schedule, config.trainTimesteps);
  return new TransitionComputer(own, {
    prediction: config.predictionType,
    sampler,
    variance: config.varianceType.startsWith("fixed_large") ? "fixed_large" : "fixed_small",
  });
}

/**
 * Weight of each bin of a denoising axis, cut at their 95th percentile: of timesteps the step KL's or
 * displacement's, of mask ratios the probability ρ with which the step out of the bin writes a masked
 * position.
 *
 * A schedule changes nothing for masked diffusion: what passes through a mask ratio's bin writes a share of
 * the masks that is the bin's alone.
 *
 * @param scheduler of an image model
 */
export function timeWeights(
  axis: TimeAxis,
  scheduler: Scheduler | undefined,
  settings: TimeWeightSettings,
): Float64Array<ArrayBuffer> {
  if (scheduler !== undefined) {
    const transitions = transitionsOf(scheduler, settings);
    return Float64Array.from({ length: axis.bins }, (_, timestep) => transitions.weightOf(timestep));
  }
  const { bins } = axis;
  return capWeights(
    Float64Array.from({ length: bins }, (_, bin) => unmaskProbability((bin + 1) / bins, bin / bins)),
  ).weights;
}

/**
 * Calibration data that count by the weights of a model's own axis: {@linkcode timeWeights} and
 * {@linkcode weightByTime} in one; of statistics alone each time group counts by the mean weight of its bins.
 *
 * @throws {CalibrationError} when a noise schedule is needed and not known, or there are neither data nor
 * statistics
 */
export function withTimeWeights<C extends Solvable>(calibrated: C, settings: TimeWeightSettings): C {
  const { data: { axis, scheduler, fit }, statistics } = calibrated;
  if (
    axis.kind === "timesteps" && (scheduler === undefined || scheduler.config.trainTimesteps !== axis.bins)
  ) {
    throw new CalibrationError(
      "Cannot weigh calibration data by time: there must be a noise schedule (scheduler_config.json) of DDPM's kind " +
        `with ${axis.bins} timesteps, got none; set thermodynamic.transition_optimization.time_weights to none`,
    );
  }
  const weights = timeWeights(axis, scheduler, settings);
  if (fit.length > 0 && calibrated.kind !== "layers") return weightByTime(calibrated, weights) as C;
  if (statistics === undefined) {
    throw new CalibrationError(
      "Cannot weigh calibration data by time: there must be samples or statistics of them, got none",
    );
  }
  const { count, boundaries } = statistics.groups;
  const ofGroups = Array.from({ length: count }, (_, g) => {
    const own = weights.subarray(boundaries[g], boundaries[g + 1]);
    return own.reduce((sum, weight) => sum + weight, 0) / own.length;
  });
  return { ...calibrated, statistics: statistics.weightedByTime(ofGroups) };
}

/**
 * Calibration data whose samples that are solved on count by the weight of their time's bin, relative to the
 * mean of all; what is held out stays as it is. Equal weights change no number. Statistics that were gathered
 * before are left out.
 *
 * @param weights `[bins]` of the data's axis, as {@linkcode timeWeights} makes them
 * @throws {TypeError} when there is not a weight for each bin
 * @throws {RangeError} when a weight is NaN, negative or infinite, or all that occur are 0
 */
export function weightByTime(calibrated: Calibrated, weights: ArrayLike<number>): Calibrated {
  // Two branches of the same text: a union's members are not functions of each other.
  return calibrated.kind === "sequences"
    ? { ...calibrated, data: weighted(calibrated.data, weights), statistics: undefined }
    : { ...calibrated, data: weighted(calibrated.data, weights), statistics: undefined };
}

function weighted<Batch>(data: CalibrationSet<Batch>, weights: ArrayLike<number>): CalibrationSet<Batch> {
  const { axis, fit } = data;
  if (weights.length !== axis.bins) {
    throw new TypeError(
      `Cannot weigh calibration data by time: there must be a weight for each of ${axis.bins} bins, got ${weights.length}`,
    );
  }
  const bad = Array.from(weights).find((weight) => !(weight >= 0 && weight < Infinity));
  if (bad !== undefined) {
    throw new RangeError(`Cannot weigh calibration data by time: weights must be numbers ≥ 0, got ${bad}`);
  }
  let sum = 0, samples = 0;
  for (const { times } of fit) {
    for (const time of times) sum += weights[axis.binOf(time)]!;
    samples += times.length;
  }
  const mean = sum / samples;
  if (samples > 0 && !(mean > 0)) {
    throw new RangeError("Cannot weigh calibration data by time: some weight must be above 0, got none");
  }
  return {
    ...data,
    fit: fit.map((part): CalibrationPart<Batch> => {
      const sampleWeights = Float32Array.from(part.times, (time) => weights[axis.binOf(time)]! / mean);
      const each = part.weights.length / part.samples;
      return {
        ...part,
        sampleWeights,
        weights: part.weights.map((weight, i) => weight * sampleWeights[Math.floor(i / each)]!),
      };
    }),
  };
}
