/**
 * The transition computer: mean and deviation of a denoising step, KL divergence between two models' steps, and the weights that make a
 * squared error of a prediction the KL of its step. DESIGN.md §3 has the formulas; masked diffusion is in masked_transition.ts.
 */
import { type CacheStatistics, LayerTimeCache } from "./lru_cache.ts";

/** Most training timesteps. */
const MAX_TIMESTEPS = 1_000_000;
/** Percentile of the weights above which they are cut: those of the last steps grow without bound as σ falls. */
export const WEIGHT_CAP_PERCENTILE = 95;
/** Pairs of layer and timestep whose step KL is kept. */
const CACHE_CAPACITY = 65_536;

/** β and ᾱ of every training timestep; a model's own `Scheduler` is one, too. */
export interface NoiseSchedule {
  readonly betas: ArrayLike<number>;
  readonly alphasCumulative: ArrayLike<number>;
}

/** `beta_schedule` of the configuration. */
export type BetaScheduleName = "linear" | "cosine";
/** What the model predicts: ε, `v = √ᾱ ε − √(1 − ᾱ) x0`, or x0. */
export type Prediction = "epsilon" | "v_prediction" | "sample";
/** σ² of a step: the posterior's `β̃`, or β. */
export type StepVariance = "fixed_small" | "fixed_large";

/**
 * A noise schedule by name: β from 1e-4 to 0.02, or `β_t = 1 − ᾱ(t + 1)/ᾱ(t)`, at most 0.9999, of `ᾱ(t) = cos²(((t/T + 0.008)/1.008) · π/2)`.
 * (The schedules of diffusers, whose cosine is cut at 0.999, are those of a model's own scheduler_config.json.)
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
  if (!Number.isInteger(timesteps) || timesteps < 1 || timesteps > MAX_TIMESTEPS) {
    throw new RangeError(
      `Cannot make a noise schedule: timesteps must be a whole number from 1 to ${MAX_TIMESTEPS}, got ${timesteps}`,
    );
  }
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

/** A step `p(x_s | x_t)` as numbers: mean = `ofSample · x_t + ofEpsilon · ε`. */
export interface GaussianTransition {
  readonly ofSample: number;
  readonly ofEpsilon: number;
  /** σ of the step; 0 behind the last. */
  readonly deviation: number;
}

/** Which step is meant. */
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
  if (!Number.isInteger(timestep) || timestep < 0 || timestep >= count) {
    throw new RangeError(fail(`the timestep must be a whole number from 0 to ${count - 1}, got ${timestep}`));
  }
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

/**
 * Mean and deviation of DDPM's step (Ho et al., https://arxiv.org/abs/2006.11239, eq. 7 and 11):
 * `μ = (x_t − β/√(1 − ᾱ_t) ε)/√α`, σ² = `(1 − ᾱ_s)/(1 − ᾱ_t) β` or β.
 *
 * @throws {RangeError} when the timesteps are not in the schedule or ᾱ does not fall
 */
export function gaussianTransition(
  schedule: NoiseSchedule,
  timestep: number,
  options: StepOptions = {},
): GaussianTransition {
  const { from, alpha, variance } = coefficientsOf(schedule, timestep, options);
  return {
    ofSample: 1 / Math.sqrt(alpha),
    ofEpsilon: -(1 - alpha) / Math.sqrt((1 - from) * alpha),
    deviation: Math.sqrt(variance),
  };
}

/** Squared error of ε that a squared error of the prediction is. */
function epsilonFactor(prediction: Prediction, alphaBar: number): number {
  if (prediction === "v_prediction") return alphaBar;
  return prediction === "sample" ? alphaBar / (1 - alphaBar) : 1;
}

/**
 * The weight `w` for which `w · ‖Δ prediction‖²` is the KL divergence of DDPM's step, both models with the same σ:
 * `β²/(2 σ² α (1 − ᾱ_t))` for ε, times `ᾱ_t` for v, times `ᾱ_t/(1 − ᾱ_t)` for x0. Infinite where σ is 0 (the last step).
 *
 * @throws as {@linkcode gaussianTransition}
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
 * The weight for which `w · ‖Δ prediction‖²` is the squared displacement of a deterministic DDIM step, whose KL would be infinite:
 * `c² = (√(1 − ᾱ_s) − √(ᾱ_s (1 − ᾱ_t)/ᾱ_t))²` for ε.
 *
 * @throws as {@linkcode gaussianTransition}
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
 * `KL(N(μ_F, σ_F²) ‖ N(μ_Q, σ_Q²))` summed over elements, for models that learn the variance:
 * `½ [ln(σ_Q²/σ_F²) + (σ_F² + Δμ²)/σ_Q² − 1]`.
 *
 * **Shapes** all `[n]`
 *
 * @throws {TypeError} when lengths differ
 * @throws {RangeError} when a variance is not above 0
 */
export function gaussianKl(
  meanDifference: ArrayLike<number>,
  varianceFull: ArrayLike<number>,
  varianceQuantized: ArrayLike<number>,
): number {
  const n = meanDifference.length;
  if (varianceFull.length !== n || varianceQuantized.length !== n) {
    throw new TypeError(
      `Cannot compute a KL divergence: variances must be ${n} numbers, got ${varianceFull.length} and ${varianceQuantized.length}`,
    );
  }
  let sum = 0;
  for (let i = 0; i < n; i++) {
    const full = varianceFull[i]!, quantized = varianceQuantized[i]!;
    if (!(full > 0 && quantized > 0)) {
      throw new RangeError(
        `Cannot compute a KL divergence: variances must be above 0, got ${full} and ${quantized}`,
      );
    }
    sum += 0.5 * (Math.log(quantized / full) + (full + meanDifference[i]! ** 2) / quantized - 1);
  }
  return sum;
}

/**
 * The variance that a model with `learned_range` means by its output v in [−1, 1]: between β̃ and β on a logarithmic scale
 * (Nichol & Dhariwal, https://arxiv.org/abs/2102.09672, eq. 15). β̃ is at least 1e-20, as in diffusers.
 */
export function learnedVariance(
  schedule: NoiseSchedule,
  timestep: number,
  output: number,
  options: Pick<StepOptions, "next"> = {},
): number {
  const { alpha, variance } = coefficientsOf(schedule, timestep, { ...options, variance: "fixed_small" });
  const share = (output + 1) / 2;
  return Math.exp(share * Math.log(1 - alpha) + (1 - share) * Math.log(Math.max(variance, 1e-20)));
}

/**
 * The weight for which `w · Δv²` is, to second order, what an error of a `learned_range` output v adds to the step KL: `(ln(β/β̃))²/16`.
 *
 * @throws as {@linkcode gaussianTransition}
 */
export function learnedVarianceWeight(
  schedule: NoiseSchedule,
  timestep: number,
  options: Pick<StepOptions, "next"> = {},
): number {
  const { alpha, variance } = coefficientsOf(schedule, timestep, { ...options, variance: "fixed_small" });
  return Math.log((1 - alpha) / Math.max(variance, 1e-20)) ** 2 / 16;
}

/** Weights cut at a percentile of themselves, and what was cut. */
export interface CappedWeights {
  readonly weights: Float64Array<ArrayBuffer>;
  /** Largest weight left; `Infinity` never. */
  readonly cap: number;
  readonly percentile: number;
  /** How many were above. */
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

export interface TransitionOptions {
  readonly prediction: Prediction;
  /** `ddpm` weighs by the KL of its steps, `ddim` by the displacement of its deterministic ones. */
  readonly sampler: "ddpm" | "ddim";
  readonly variance?: StepVariance | undefined;
  /** Timesteps that the sampler visits, from the noisiest on. Default all. */
  readonly timesteps?: ArrayLike<number> | undefined;
  /** Pairs of layer and timestep kept. Default 65 536. */
  readonly cacheCapacity?: number | undefined;
}

/**
 * Step KLs of a sampler's run: weights by timestep, cut at their 95th percentile, and a cache of layers' step KLs.
 *
 * @example
 * ```ts
 * import { noiseSchedule, TransitionComputer } from "./transition.ts";
 * const transitions = new TransitionComputer(noiseSchedule("linear", 1000), { prediction: "epsilon", sampler: "ddpm" });
 * const kl = transitions.stepKl("blocks.0.attn", 500, () => 0.01); // the squared error, asked for once
 * console.log(kl === 0.01 * transitions.weightOf(500), transitions.cap.capped);
 * ```
 */
export class TransitionComputer {
  /** Timesteps visited, from the noisiest on. */
  readonly timesteps: Int32Array<ArrayBuffer>;
  /** Weights of the visited timesteps, in their order, and what the cut did. */
  readonly cap: CappedWeights;
  readonly #index: ReadonlyMap<number, number>;
  readonly #cache: LayerTimeCache<number>;

  /** @throws {RangeError} when timesteps do not fall or are not in the schedule */
  constructor(readonly schedule: NoiseSchedule, readonly options: TransitionOptions) {
    const count = schedule.alphasCumulative.length;
    const { prediction, sampler, variance, timesteps, cacheCapacity = CACHE_CAPACITY } = options;
    this.timesteps = timesteps === undefined
      ? Int32Array.from({ length: count }, (_, i) => count - 1 - i)
      : Int32Array.from(timesteps);
    if (this.timesteps.length === 0) {
      throw new RangeError("Cannot compute transitions: a run must have a timestep, got none");
    }
    const weightOf = sampler === "ddim" ? ddimDisplacementWeight : stepKlWeight;
    const weights = Float64Array.from(
      this.timesteps,
      (timestep, i) => weightOf(schedule, timestep, prediction, { next: this.timesteps[i + 1], variance }),
    );
    this.cap = capWeights(weights);
    this.#index = new Map([...this.timesteps].map((timestep, i) => [timestep, i]));
    this.#cache = new LayerTimeCache(cacheCapacity);
  }

  /** Weight of a visited timestep. @throws {RangeError} when it is not visited */
  weightOf(timestep: number): number {
    return this.cap.weights[this.#indexOf(timestep)]!;
  }

  /** The step that leads away from a visited timestep. @throws {RangeError} when it is not visited */
  transition(timestep: number): GaussianTransition {
    const next = this.timesteps[this.#indexOf(timestep) + 1];
    return gaussianTransition(this.schedule, timestep, { next, variance: this.options.variance });
  }

  /**
   * Weight times the squared error that a layer causes at a timestep; `squaredError` is asked only when it is not in the cache.
   *
   * @throws {RangeError} when the timestep is not visited or the error is not a number ≥ 0
   */
  stepKl(layer: string, timestep: number, squaredError: () => number): number {
    const weight = this.weightOf(timestep);
    return this.#cache.get(layer, timestep, () => {
      const error = squaredError();
      if (!(error >= 0 && error < Infinity)) {
        throw new RangeError(
          `Cannot compute the step KL of ${
            JSON.stringify(layer)
          }: its squared error must be a number ≥ 0, got ${error}`,
        );
      }
      return weight * error;
    });
  }

  /** Forgets a layer's step KLs, when its parameters changed. */
  forget(layer: string): void {
    this.#cache.forget(layer);
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
