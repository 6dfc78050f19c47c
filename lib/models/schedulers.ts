/**
 * Noise schedules and the steps of DDPM and DDIM from diffusers' scheduler_config.json. A step goes from one
 * timestep of a list to the next one, and from the last to no noise.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { checkWhole } from "../native/call.ts";
import { CheckpointError } from "../errors.ts";
import { readJsonFile } from "../files/json.ts";
import { correctedDeviation, type SamplerCorrection } from "../thermo/sampler_correction.ts";
import { checkKeys, SCHEDULER_KEYS } from "./configuration/keys.ts";
import { ConfigFields } from "./model_config.ts";

/** The quantity that the model predicts: the noise ε, `v = √ᾱ ε − √(1 − ᾱ) x0`, or the image x0. */
export type PredictionType = "epsilon" | "v_prediction" | "sample";
export type BetaSchedule = "linear" | "scaled_linear" | "squaredcos_cap_v2";
/** How timesteps are picked from the training's. */
export type TimestepSpacing = "linspace" | "leading" | "trailing";
export type VarianceType =
  | "fixed_small"
  | "fixed_small_log"
  | "fixed_large"
  | "fixed_large_log"
  | "learned"
  | "learned_range";
export type SamplerName = "ddim" | "ddpm";

export interface SchedulerConfig {
  /** The sampler that the file names. */
  readonly sampler: SamplerName;
  readonly trainTimesteps: number;
  readonly betaSchedule: BetaSchedule;
  readonly betaStart: number;
  readonly betaEnd: number;
  /** Instead of a schedule. */
  readonly trainedBetas: readonly number[] | undefined;
  readonly predictionType: PredictionType;
  /** Range to which x0 is clipped, undefined for none; ε is then recomputed from the clipped x0. */
  readonly clipRange: number | undefined;
  /** ᾱ behind the last step is 1, not that of timestep 0. */
  readonly endsAtOne: boolean;
  readonly spacing: TimestepSpacing;
  readonly stepsOffset: number;
  readonly varianceType: VarianceType;
}

/** The sampler for each of diffusers' classes: the noise of training is the same for all of them. */
const SAMPLERS: Readonly<Record<string, SamplerName>> = { DDIMScheduler: "ddim", DDPMScheduler: "ddpm" };
/** Classes whose steps are not run, but whose files give the same noise of training. */
const SAME_NOISE = /^(?:DPMSolver|UniPC|DEIS|PNDM|Euler|Heun|KDPM2|LMS|LCM|TCD|DDIM|DDPM)\w*Scheduler$/;

/**
 * A schedule out of the fields of scheduler_config.json. Where `timestep_spacing` is missing, it is `leading`
 * in a file written by diffusers, which has its version in it and leaves out defaults, and else `linspace`.
 *
 * @param asked the sampler instead of the file's, which then may name one that is not run here
 * @throws {CheckpointError} naming the key that is wrong or not supported
 */
export function schedulerConfig(fields: ConfigFields, asked?: SamplerName): SchedulerConfig {
  const className = String(fields.fields["_class_name"] ?? "DDIMScheduler");
  const sampler = asked !== undefined && SAME_NOISE.test(className) ? asked : SAMPLERS[className];
  if (sampler === undefined) {
    const wanted = Object.keys(SAMPLERS).map((name) => `"${name}"`).join(" or ");
    const wayOut = SAME_NOISE.test(className) ? " unless a sampler is given (--sampler ddim)" : "";
    throw fields.fault("_class_name", wanted + wayOut);
  }
  checkKeys(fields, SCHEDULER_KEYS);
  const trained = fields.fields["trained_betas"] ?? undefined;
  const isBeta = (value: unknown) => typeof value === "number" && value > 0 && value < 1;
  if (trained !== undefined && !(Array.isArray(trained) && trained.length > 0 && trained.every(isBeta))) {
    throw fields.fault("trained_betas", "numbers between 0 and 1");
  }
  const betaStart = fields.positive("beta_start", 1e-4), betaEnd = fields.positive("beta_end", 0.02);
  if (betaStart >= 1) throw fields.fault("beta_start", "below 1", betaStart);
  if (betaEnd >= 1) throw fields.fault("beta_end", "below 1", betaEnd);
  const trainTimesteps = fields.count("num_train_timesteps", 1000, 1, 1_000_000);
  if (trained !== undefined && trained.length !== trainTimesteps) {
    throw fields.fault("trained_betas", `${trainTimesteps} numbers`, trained.length);
  }
  return {
    sampler,
    trainTimesteps,
    betaSchedule: fields.choice("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"], "linear"),
    betaStart,
    betaEnd,
    trainedBetas: trained as readonly number[] | undefined,
    predictionType: fields.choice("prediction_type", ["epsilon", "v_prediction", "sample"], "epsilon"),
    clipRange: fields.flag("clip_sample", true) ? fields.positive("clip_sample_range", 1) : undefined,
    endsAtOne: fields.flag("set_alpha_to_one", true),
    spacing: fields.choice(
      "timestep_spacing",
      ["linspace", "leading", "trailing"],
      fields.has("_diffusers_version") ? "leading" : "linspace",
    ),
    stepsOffset: fields.count("steps_offset", 0, 0),
    varianceType: fields.choice(
      "variance_type",
      ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"],
      "fixed_small",
    ),
  };
}

/** Where the schedule of a checkpoint lies, undefined where there is none. */
export function schedulerFile(folder: string): string | undefined {
  const places = [folder, join(folder, "..", "scheduler"), join(folder, "scheduler")];
  return places.map((place) => join(place, "scheduler_config.json")).find((file) => existsSync(file));
}

/**
 * The schedule of a checkpoint: scheduler_config.json in its folder, or a pipeline's `scheduler` folder
 * beside it.
 *
 * @param sampler as in {@linkcode schedulerConfig}
 * @throws {CheckpointError} when there is none, or it has an entry that is not supported
 */
export function loadScheduler(folder: string, sampler?: SamplerName): Scheduler {
  const path = schedulerFile(folder);
  if (path === undefined) {
    throw new CheckpointError(
      `Cannot load ${
        JSON.stringify(folder)
      }: must have scheduler_config.json or a folder "scheduler" beside it, got none: copy the pipeline's ` +
        "scheduler/scheduler_config.json beside the weights",
      { path: folder },
    );
  }
  return new Scheduler(schedulerConfig(new ConfigFields(path, readJsonFile(path)), sampler));
}

/** β of every training timestep. */
function betasOf(config: SchedulerConfig): Float64Array {
  const { trainTimesteps: count, betaSchedule, betaStart, betaEnd, trainedBetas } = config;
  if (trainedBetas !== undefined) return Float64Array.from(trainedBetas);
  const between = (a: number, b: number, i: number) => count === 1 ? a : a + (b - a) * i / (count - 1);
  return Float64Array.from({ length: count }, (_, i) => {
    if (betaSchedule === "linear") return between(betaStart, betaEnd, i);
    if (betaSchedule === "scaled_linear") return between(Math.sqrt(betaStart), Math.sqrt(betaEnd), i) ** 2;
    const alphaBar = (t: number) => Math.cos((t + 0.008) / 1.008 * Math.PI / 2) ** 2;
    return Math.min(1 - alphaBar((i + 1) / count) / alphaBar(i / count), 0.999);
  });
}

/** A noise schedule and its steps; sums in float64. */
export class Scheduler {
  readonly betas: Float64Array;
  /** ᾱ of every training timestep. */
  readonly alphasCumulative: Float64Array;

  constructor(readonly config: SchedulerConfig) {
    this.betas = betasOf(config);
    let product = 1;
    this.alphasCumulative = this.betas.map((beta) => product *= 1 - beta);
  }

  /** ᾱ at a timestep; undefined is behind the last step. */
  alphaBar(timestep: number | undefined): number {
    if (timestep === undefined) return this.config.endsAtOne ? 1 : this.alphasCumulative[0]!;
    return this.alphasCumulative[timestep]!;
  }

  /** Timesteps of a run, the noisiest first. @throws {RangeError} unless 1 to as many as the training's */
  timesteps(steps: number, spacing: TimestepSpacing = this.config.spacing): Int32Array<ArrayBuffer> {
    const { trainTimesteps: count, stepsOffset } = this.config;
    checkWhole("sample", "steps", steps, 1, count);
    return Int32Array.from({ length: steps }, (_, i) => {
      if (spacing === "linspace") {
        return steps === 1 ? count - 1 : roundHalfEven((count - 1) * (1 - i / (steps - 1)));
      }
      if (spacing === "leading") {
        return Math.min(count - 1, Math.floor(count / steps) * (steps - 1 - i) + stepsOffset);
      }
      return roundHalfEven(count - i * count / steps) - 1;
    });
  }

  /** Noisy images `√ᾱ x0 + √(1 − ᾱ) ε`; `out` may be either input. */
  addNoise(images: Float32Array, noise: Float32Array, timestep: number, out: Float32Array): void {
    const alphaBar = this.alphaBar(timestep);
    const signal = Math.sqrt(alphaBar), sigma = Math.sqrt(1 - alphaBar);
    for (let i = 0; i < out.length; i++) out[i] = signal * images[i]! + sigma * noise[i]!;
  }

  /**
   * One step of DDIM (https://arxiv.org/abs/2010.02502) from `timestep` to `next`, undefined behind the last:
   * `samples` is overwritten.
   *
   * **Shapes** `samples` and `predictions: f32[n]`; `noise: f32[n]`, needed when eta is above 0
   *
   * @param options `eta`, the share of fresh noise: 0, the default, for none to 1 for as much as DDPM
   */
  stepDdim(
    samples: Float32Array,
    predictions: Float32Array,
    timestep: number,
    next: number | undefined,
    { eta = 0 }: { readonly eta?: number | undefined } = {},
    noise?: Float32Array,
  ): void {
    const from = this.alphaBar(timestep), to = this.alphaBar(next);
    const variance = eta * eta * (1 - to) / (1 - from) * (1 - from / to);
    const signal = Math.sqrt(to),
      direction = Math.sqrt(Math.max(0, 1 - to - variance)),
      sigma = Math.sqrt(variance);
    if (sigma > 0 && noise === undefined) {
      throw new TypeError("Cannot sample: a step with eta above 0 needs noise, got none");
    }
    const { image, epsilon } = this.#predictions(from);
    for (let i = 0; i < samples.length; i++) {
      const x = samples[i]!, x0 = image(x, predictions[i]!);
      samples[i] = signal * x0 + direction * epsilon(x, x0) + (sigma > 0 ? sigma * noise![i]! : 0);
    }
  }

  /**
   * One step of DDPM (https://arxiv.org/abs/2006.11239) from `timestep` to `next`, undefined behind the last:
   * `samples` is overwritten.
   *
   * **Shapes** `samples`, `predictions` and `noise: f32[n]`; `variances: f32[n]`, the variance channels of a
   * model that learned them
   *
   * @param correction of predictions of ε whose gain and bias are out already: their noise's variance is
   * taken out of a fixed variance of the step
   */
  stepDdpm(
    samples: Float32Array,
    predictions: Float32Array,
    timestep: number,
    next: number | undefined,
    noise: Float32Array,
    variances?: Float32Array,
    correction?: SamplerCorrection,
  ): void {
    const { varianceType, predictionType } = this.config;
    const from = this.alphaBar(timestep);
    const to = next === undefined ? 1 : this.alphaBar(next);
    const alpha = from / to, beta = 1 - alpha;
    const ofImage = Math.sqrt(to) * beta / (1 - from), ofSample = Math.sqrt(alpha) * (1 - to) / (1 - from);
    const small = Math.max((1 - to) / (1 - from) * beta, 1e-20);
    const isLearned = varianceType === "learned" || varianceType === "learned_range";
    if (isLearned && variances === undefined) {
      throw new TypeError(
        `Cannot sample: the variance type "${varianceType}" needs a model that predicts it, got none`,
      );
    }
    const fixed = varianceType.startsWith("fixed_large") ? beta : small;
    const ofEpsilon = -ofImage * Math.sqrt((1 - from) / from);
    const fixedDeviation = correction === undefined || predictionType !== "epsilon"
      ? Math.sqrt(fixed)
      : correctedDeviation(
        { ofEpsilon, deviation: Math.sqrt(fixed) },
        correction,
      );
    const { image } = this.#predictions(from);
    for (let i = 0; i < samples.length; i++) {
      const x = samples[i]!;
      let value = ofImage * image(x, predictions[i]!) + ofSample * x;
      if (next !== undefined) {
        let deviation = fixedDeviation;
        if (varianceType === "learned") deviation = Math.sqrt(Math.max(0, variances![i]!));
        else if (varianceType === "learned_range") {
          const share = (variances![i]! + 1) / 2;
          deviation = Math.exp(0.5 * (share * Math.log(beta) + (1 - share) * Math.log(small)));
        }
        value += deviation * noise[i]!;
      }
      samples[i] = value;
    }
  }

  /** x0 from a prediction at ᾱ, clipped where the schedule says so, and ε from that x0. */
  #predictions(alphaBar: number) {
    const { predictionType, clipRange } = this.config;
    const signal = Math.sqrt(alphaBar), sigma = Math.sqrt(1 - alphaBar);
    const clip = (value: number) =>
      clipRange === undefined ? value : Math.min(clipRange, Math.max(-clipRange, value));
    const image = (x: number, prediction: number) => {
      if (predictionType === "epsilon") return clip((x - sigma * prediction) / signal);
      return clip(predictionType === "sample" ? prediction : signal * x - sigma * prediction);
    };
    return { image, epsilon: (x: number, x0: number) => (x - signal * x0) / sigma };
  }
}

/** As NumPy and PyTorch round. */
function roundHalfEven(value: number): number {
  const rounded = Math.round(value);
  return rounded - value === 0.5 && rounded % 2 !== 0 ? rounded - 1 : rounded;
}
