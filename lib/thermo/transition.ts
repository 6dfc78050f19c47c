/**
 * The transition computer: the weights that make a squared error of a prediction the KL divergence of its
 * denoising step, and a cache of step KLs by layer and timestep. The token KL of masked diffusion is in
 * masked_transition.ts.
 */
import { checkWhole } from "../native/call.ts";
import { type CacheStatistics, LayerTimeCache } from "./lru_cache.ts";

/** Most training timesteps. */
const MAX_TIMESTEPS = 1_000_000;
/** Percentile above which weights are cut: those of the last steps grow without bound as σ falls. */
const WEIGHT_CAP_PERCENTILE = 95;
/** Pairs of layer and timestep whose step KLs are kept. */
const CACHE_CAPACITY = 65_536;

/** β and ᾱ of every training timestep; a model's `Scheduler` is one, too. */
export interface NoiseSchedule {
  readonly betas: ArrayLike<number>;
  readonly alphasCumulative: ArrayLike<number>;
}

/** `beta_schedule` of the configuration. */
export type BetaScheduleName = "linear" | "cosine";
/** The prediction of a model: ε, `v = √ᾱ ε − √(1 − ᾱ) x0`, or x0. */
export type Prediction = "epsilon" | "v_prediction" | "sample";
/** σ² of a step: the posterior's `β̃`, or β. */
export type StepVariance = "fixed_small" | "fixed_large";

/**
 * A noise schedule by name: β from 1e-4 to 0.02, or `β_t = 1 − ᾱ(t + 1)/ᾱ(t)`, at most 0.9999, of
 * `ᾱ(t) = cos²(((t/T + 0.008)/1.008) · π/2)`. (The schedules of diffusers, whose cosine is cut at 0.999, are
 * read from a model's scheduler_config.json.)
 *
 * @throws {RangeError} when the name is neither or `timesteps` is not a whole number from 1 to 1 000 000
 *
 * @example
 * ```ts
 * import { noiseSchedule } from "./transition.ts";
 * console.log(noiseSchedule("linear", 1000).betas[999]); // 0.02
 * ```
 */
export function noiseSchedule(name: BetaScheduleName, timesteps: number): NoiseSchedule {
  checkWhole("make a noise schedule", "timesteps", timesteps, 1, MAX_TIMESTEPS);
  if (name !== "linear" && name !== "cosine") {
    throw new RangeError(
      `Cannot make a noise schedule: it must be "linear" or "cosine", got ${JSON.stringify(name)}`,
    );
  }
  const cosine = (t: number) => Math.cos((t / timesteps + 0.008) / 1.008 * Math.PI / 2) ** 2;
  const betas = Float64Array.from({ length: timesteps }, (_, t) => {
    if (name === "cosine") return Math.min(1 - cosine(t + 1) / cosine(t), 0.9999);
    return timesteps === 1 ? 1e-4 : 1e-4 + (0.02 - 1e-4) * t / (timesteps - 1);
  });
  let product = 1;
  return { betas, alphasCumulative: betas.map((beta) => product *= 1 - beta) };
}

/** Where a step leads, and its variance. */
export interface StepOptions {
  /** Where the step leads; `undefined` is no noise. Default `timestep − 1`, behind timestep 0 no noise. */
  readonly next?: number | undefined;
  /** Default `fixed_small`. */
  readonly variance?: StepVariance | undefined;
}

interface StepCoefficients {
  readonly from: number;
  readonly to: number;
  /** `ᾱ_t / ᾱ_s` */
  readonly alpha: number;
  readonly variance: number;
}

function coefficientsOf(schedule: NoiseSchedule, timestep: number, options: StepOptions): StepCoefficients {
  const count = schedule.alphasCumulative.length;
  const next = "next" in options ? options.next : timestep > 0 ? timestep - 1 : undefined;
  const fail = (reason: string) => `Cannot compute a transition: ${reason}`;
  checkWhole("compute a transition", "the timestep", timestep, 0, count - 1);
  if (next !== undefined && !(Number.isInteger(next) && next >= 0 && next < timestep)) {
    throw new RangeError(
      fail(`a step from timestep ${timestep} must lead to a lower one or undefined, got ${next}`),
    );
  }
  const from = schedule.alphasCumulative[timestep]!;
  const to = next === undefined ? 1 : schedule.alphasCumulative[next]!;
  if (!(from > 0 && from < 1 && to > from && to <= 1)) {
    throw new RangeError(
      fail(`ᾱ must fall inside (0, 1) along the timesteps, got ${from} behind ${to} at ${timestep}`),
    );
  }
  const alpha = from / to, beta = 1 - alpha;
  const variance = options.variance === "fixed_large" ? beta : (1 - to) / (1 - from) * beta;
  return { from, to, alpha, variance };
}

/** Squared error of ε per squared error of the prediction. */
function epsilonFactor(prediction: Prediction, alphaBar: number): number {
  if (prediction === "v_prediction") return alphaBar;
  return prediction === "sample" ? alphaBar / (1 - alphaBar) : 1;
}

/**
 * The weight `w` for which `w · ‖Δ prediction‖²` is the KL divergence of DDPM's step (Ho et al.,
 * https://arxiv.org/abs/2006.11239, eq. 7 and 11), both models with the same σ: `β²/(2 σ² α (1 − ᾱ_t))` for
 * ε, times `ᾱ_t` for v, times `ᾱ_t/(1 − ᾱ_t)` for x0. Infinite where σ is 0 (the last step).
 *
 * @throws {RangeError} when the timesteps are not in the schedule or ᾱ does not fall
 */
export function stepKlWeight(
  schedule: NoiseSchedule,
  timestep: number,
  prediction: Prediction,
  options: StepOptions = {},
): number {
  const { from, alpha, variance } = coefficientsOf(schedule, timestep, options);
  const beta = 1 - alpha;
  return epsilonFactor(prediction, from) * beta * beta / (2 * variance * alpha * (1 - from));
}

/**
 * The weight for which `w · ‖Δ prediction‖²` is the squared displacement of a deterministic DDIM step, whose
 * KL would be infinite: `c² = (√(1 − ᾱ_s) − √(ᾱ_s (1 − ᾱ_t)/ᾱ_t))²` for ε.
 *
 * @throws as {@linkcode stepKlWeight}
 */
export function ddimDisplacementWeight(
  schedule: NoiseSchedule,
  timestep: number,
  prediction: Prediction,
  options: StepOptions = {},
): number {
  const { from, to } = coefficientsOf(schedule, timestep, options);
  const displacement = Math.sqrt(1 - to) - Math.sqrt(to * (1 - from) / from);
  return epsilonFactor(prediction, from) * displacement * displacement;
}

/**
 * The weight for which `w · Δv²` is, to second order, what an error of a `learned_range` output v adds to the
 * step KL: `(ln(β/β̃))²/16`, because v moves ln σ² between ln β̃ and ln β (Nichol & Dhariwal,
 * https://arxiv.org/abs/2102.09672, eq. 15). β̃ is at least 1e-20, as in diffusers.
 */
function learnedVarianceWeight(schedule: NoiseSchedule, timestep: number, next: StepOptions): number {
  const { alpha, variance } = coefficientsOf(schedule, timestep, { ...next, variance: "fixed_small" });
  return Math.log((1 - alpha) / Math.max(variance, 1e-20)) ** 2 / 16;
}

/** Weights cut at one of their percentiles, and how many were cut. */
export interface CappedWeights {
  readonly weights: Float64Array<ArrayBuffer>;
  /** Largest weight left; `Infinity` never. */
  readonly cap: number;
  readonly percentile: number;
  /** Number of weights above the cap. */
  readonly capped: number;
}

/**
 * Weights at most as large as their 95th percentile (of the finite ones, nearest rank).
 *
 * @throws {RangeError} when a weight is NaN or negative, or none is finite
 *
 * @example
 * ```ts
 * import { capWeights } from "./transition.ts";
 * const { weights, cap, capped } = capWeights([...Array(19).fill(1), Infinity]);
 * console.log(weights[19], cap, capped); // 1 1 1
 * ```
 */
export function capWeights(weights: ArrayLike<number>, percentile = WEIGHT_CAP_PERCENTILE): CappedWeights {
  const all = Float64Array.from(weights);
  const bad = all.find((weight) => !(weight >= 0));
  const finite = all.filter((weight) => weight < Infinity).sort();
  if (bad !== undefined || finite.length === 0) {
    throw new RangeError(
      `Cannot cap weights: they must be ≥ 0 and some of them finite, got ${bad ?? `${all.length} weights`}`,
    );
  }
  if (!(percentile > 0 && percentile <= 100)) {
    throw new RangeError(`Cannot cap weights: the percentile must lie in (0, 100], got ${percentile}`);
  }
  const cap = finite[Math.max(0, Math.ceil(percentile / 100 * finite.length) - 1)]!;
  return {
    weights: all.map((weight) => Math.min(weight, cap)),
    cap,
    percentile,
    capped: all.filter((weight) => weight > cap).length,
  };
}

/** Settings of a {@linkcode TransitionComputer}. */
export interface TransitionOptions {
  /** Default `epsilon`. */
  readonly prediction?: Prediction | undefined;
  /** `ddpm` (default) weighs by the KL of its steps, `ddim` by the displacement of its deterministic ones. */
  readonly sampler?: "ddpm" | "ddim" | undefined;
  /** Variance of a step; default the smaller posterior one. */
  readonly variance?: StepVariance | undefined;
  /** Timesteps that the sampler visits, from the noisiest on. Default all. */
  readonly timesteps?: ArrayLike<number> | undefined;
  /** Pairs of layer and timestep kept. Default 65 536. */
  readonly cacheCapacity?: number | undefined;
}

/**
 * Weights of a sampler's steps, and the step KLs that were measured with them, in a cache by layer and
 * timestep. Phases measure the same model at the same timesteps several times: phase 3 to choose, phase 1 to
 * report.
 *
 * With a noise schedule it is Gaussian diffusion's: weights are cut at their 95th percentile. Without one it
 * is masked diffusion's, whose step KL is that of the tokens alone: all weights are 1, and timesteps are mask
 * ratios.
 *
 * @example
 * ```ts
 * import { noiseSchedule, TransitionComputer } from "./transition.ts";
 * const transitions = new TransitionComputer(noiseSchedule("linear", 1000), { prediction: "epsilon", sampler: "ddpm" });
 * const squaredErrors = [0.01, 0.04]; // of two samples at timestep 500
 * const measure = () => squaredErrors.map((error) => transitions.weightOf(500) * error);
 * transitions.stepKl("blocks.0.attn", 500, measure);
 * transitions.stepKl("blocks.0.attn", 500, measure); // from the cache
 * console.log(transitions.cacheStatistics.hits, transitions.cap!.capped); // 1 50
 * ```
 */
export class TransitionComputer {
  /** Timesteps visited, from the noisiest on; none for masked diffusion. */
  readonly timesteps: Int32Array<ArrayBuffer>;
  /** Weights of the visited timesteps, in order, and how they were cut; undefined for masked diffusion. */
  readonly cap: CappedWeights | undefined;
  readonly #index: ReadonlyMap<number, number>;
  readonly #cache: LayerTimeCache<Float64Array>;

  /** @throws {RangeError} when timesteps do not fall or are not in the schedule */
  constructor(readonly schedule?: NoiseSchedule, options: TransitionOptions = {}) {
    const { prediction = "epsilon", sampler, variance, timesteps, cacheCapacity = CACHE_CAPACITY } = options;
    const count = schedule?.alphasCumulative.length ?? 0;
    this.timesteps = Int32Array.from(timesteps ?? Array.from({ length: count }, (_, i) => count - 1 - i));
    this.#index = new Map([...this.timesteps].map((timestep, i) => [timestep, i]));
    this.#cache = new LayerTimeCache(cacheCapacity);
    if (schedule === undefined) return;
    if (this.timesteps.length === 0) {
      throw new RangeError("Cannot compute transitions: a run must have a timestep, got none");
    }
    const weightOf = sampler === "ddim" ? ddimDisplacementWeight : stepKlWeight;
    this.cap = capWeights(
      Float64Array.from(
        this.timesteps,
        (timestep, i) => weightOf(schedule, timestep, prediction, { next: this.timesteps[i + 1], variance }),
      ),
    );
  }

  /** Weight of a squared error of the prediction. @throws {RangeError} at a timestep not visited */
  weightOf(timestep: number): number {
    return this.cap === undefined ? 1 : this.cap.weights[this.#indexOf(timestep)]!;
  }

  /**
   * Weight of a squared error of the variance channels of a model with `learned_range`: to second order its
   * part of the step KL.
   *
   * @throws {RangeError} when the timestep is not in the schedule, or there is none
   */
  varianceWeightOf(timestep: number): number {
    if (this.schedule === undefined) {
      throw new RangeError(
        "Cannot compute a transition: a learned variance needs a noise schedule, got none",
      );
    }
    return learnedVarianceWeight(this.schedule, timestep, {});
  }

  /** Step KLs of the samples at a timestep by a layer or model; `measure` fills the cache where needed. */
  stepKl(layer: string, timestep: number, measure: () => ArrayLike<number>): Float64Array {
    return this.#cache.get(layer, timestep, () => Float64Array.from(measure()));
  }

  get cacheStatistics(): CacheStatistics {
    return this.#cache.statistics;
  }

  #indexOf(timestep: number): number {
    const index = this.#index.get(timestep);
    if (index === undefined) {
      throw new RangeError(`Cannot compute a transition: the run must visit the timestep, got ${timestep}`);
    }
    return index;
  }
}
