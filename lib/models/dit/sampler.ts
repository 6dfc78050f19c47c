/**
 * Drawing images with a DiT: the loop over timesteps, guidance, and noise that does not depend on the batch.
 * The errors of predictions that a model's time parameters foresee are taken out before each step.
 */
import { correctPredictions, type SamplerCorrection } from "../../thermo/sampler_correction.ts";
import type { DitModel } from "./model.ts";
import { imageNoise, RandomStream, type SeedOptions } from "../random.ts";
import type { SamplerName, Scheduler, TimestepSpacing } from "../schedulers.ts";

export interface ImageOptions extends SeedOptions {
  /** Default: the schedule's. */
  readonly sampler?: SamplerName | undefined;
  /** Default 50. */
  readonly steps?: number | undefined;
  /** Instead of `steps`: the timesteps, from the noisiest on. */
  readonly timesteps?: ArrayLike<number> | undefined;
  /** Default: the schedule's. */
  readonly spacing?: TimestepSpacing | undefined;
  /** Guidance: prediction = none + scale · (class − none). 1, the default, is without and costs half. */
  readonly guidance?: number | undefined;
  /** DDIM's share of fresh noise. Default 0. */
  readonly eta?: number | undefined;
  /** Noise to start from, `f32[batch, channels, size, size]`, instead of the seed's. */
  readonly noise?: Float32Array | undefined;
}

export interface ImageStep {
  /** Steps done. */
  readonly step: number;
  readonly steps: number;
  /** Timestep of `samples`, undefined at the end. */
  readonly timestep: number | undefined;
  /** `f32[batch, channels, size, size]`; overwritten by the next step. */
  readonly samples: Float32Array;
}

/** Streams of a step's noise follow those of the start; no run has so many images. */
const STEP_STREAMS = 2 ** 24;

/**
 * Draws one image a label, a step a turn: first the noise, then the result of each step; the last turn has
 * the finished images.
 *
 * **Shapes** `labels: [batch]` → `f32[batch, channels, size, size]`, nominally in [−1, 1]
 *
 * @throws {RangeError | TypeError} when an option is not allowed, before any work
 * @throws {WeightsError} as {@linkcode DitModel.forward}
 */
export function* imageSteps(
  model: DitModel,
  scheduler: Scheduler,
  labels: ArrayLike<number>,
  options: ImageOptions = {},
): Generator<ImageStep, Float32Array<ArrayBuffer>> {
  const { sampler = scheduler.config.sampler, guidance = 1, eta = 0, seed = 0, firstStream = 0 } = options;
  const { config, imageElements: elements } = model;
  const batch = labels.length;
  checkOptions(model, scheduler, labels, sampler, guidance, eta, options);
  const timesteps = options.timesteps ?? scheduler.timesteps(options.steps ?? 50, options.spacing);
  const samples = options.noise === undefined
    ? imageNoise(seed, firstStream, batch, elements)
    : Float32Array.from(options.noise);
  const isGuided = guidance !== 1;
  const rows = isGuided ? 2 * batch : batch;
  const rowLabels = Int32Array.from({ length: rows }, (_, i) => i < batch ? labels[i]! : config.classes);
  const inputs = isGuided ? new Float32Array(rows * elements) : samples;
  const predictions = new Float32Array(batch * elements);
  const variances = config.learnsVariance ? new Float32Array(batch * elements) : undefined;
  const needsNoise = sampler === "ddpm" || eta > 0;
  const noise = new Float32Array(needsNoise ? batch * elements : 0);
  const randoms = needsNoise
    ? Array.from({ length: batch }, (_, b) => new RandomStream(seed, STEP_STREAMS + firstStream + b))
    : [];

  for (let step = 0; step < timesteps.length; step++) {
    const timestep = timesteps[step]!, next = timesteps[step + 1];
    yield { step, steps: timesteps.length, timestep, samples };
    if (isGuided) {
      inputs.set(samples);
      inputs.set(samples, samples.length);
    }
    const output = model.forward(inputs, new Array<number>(rows).fill(timestep), rowLabels);
    splitOutput(output, batch, elements, config.learnsVariance, guidance, predictions, variances);
    for (const [b, random] of randoms.entries()) {
      random.fillNormal(noise.subarray(b * elements, (b + 1) * elements));
    }
    const correction = correctionAt(model, timestep);
    if (correction !== undefined) correctPredictions(predictions, correction, predictions);
    if (sampler === "ddim") scheduler.stepDdim(samples, predictions, timestep, next, { eta }, noise);
    else scheduler.stepDdpm(samples, predictions, timestep, next, noise, variances, correction);
  }
  yield { step: timesteps.length, steps: timesteps.length, timestep: undefined, samples };
  return samples;
}

/**
 * Draws one image a label; {@linkcode imageSteps} with a callback instead of turns.
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 * import { loadDit } from "./model.ts";
 * import { generateImages } from "./sampler.ts";
 * import { loadScheduler } from "../schedulers.ts";
 * const model = loadDit("tests/models/glyph-dit", await openKernels());
 * const images = generateImages(model, loadScheduler("tests/models/glyph-dit"), [3], { steps: 4, seed: 1 });
 * console.log(images.length); // 256
 * ```
 */
export function generateImages(
  model: DitModel,
  scheduler: Scheduler,
  labels: ArrayLike<number>,
  options: ImageOptions & { readonly onStep?: ((step: ImageStep) => void) | undefined } = {},
): Float32Array<ArrayBuffer> {
  const steps = imageSteps(model, scheduler, labels, options);
  while (true) {
    const { done, value } = steps.next();
    if (done) return value;
    options.onStep?.(value);
  }
}

/** The effect of quantization on a model's predictions at a timestep, where its time parameters have it. */
function correctionAt({ timeParameters }: DitModel, timestep: number): SamplerCorrection | undefined {
  if (timeParameters?.sampler === undefined) return undefined;
  const { gain, bias, noiseVariance } = timeParameters.sampler,
    group = timeParameters.groups.groupOf(timestep);
  return { gain: gain[group]!, bias: bias[group]!, noiseVariance: noiseVariance[group]! };
}

/** Prediction, guided where a second half of the batch has no class, and variance where it is learned. */
function splitOutput(
  output: Float32Array,
  batch: number,
  elements: number,
  learnsVariance: boolean,
  guidance: number,
  predictions: Float32Array,
  variances: Float32Array | undefined,
): void {
  const width = learnsVariance ? 2 * elements : elements;
  for (let b = 0; b < batch; b++) {
    for (let i = 0; i < elements; i++) {
      const own = output[b * width + i]!;
      const none = guidance === 1 ? own : output[(batch + b) * width + i]!;
      predictions[b * elements + i] = guidance === 1 ? own : none + guidance * (own - none);
      if (variances !== undefined) variances[b * elements + i] = output[b * width + elements + i]!;
    }
  }
}

function checkOptions(
  model: DitModel,
  scheduler: Scheduler,
  labels: ArrayLike<number>,
  sampler: SamplerName,
  guidance: number,
  eta: number,
  { timesteps, noise }: ImageOptions,
): void {
  const { config, imageElements } = model;
  if (labels.length === 0) throw new RangeError("Cannot draw images: at least one label is needed, got none");
  for (let i = 0; i < labels.length; i++) {
    const label = labels[i]!;
    if (Number.isInteger(label) && label >= 0 && label <= config.classes) continue;
    throw new RangeError(
      `Cannot draw images: labels must be from 0 to ${config.classes}, the last for no class, got ${label}`,
    );
  }
  if (sampler !== "ddim" && sampler !== "ddpm") {
    throw new RangeError(`Cannot draw images: sampler must be ddim or ddpm, got ${JSON.stringify(sampler)}`);
  }
  if (!Number.isFinite(guidance)) {
    throw new RangeError(`Cannot draw images: guidance must be a number, got ${guidance}`);
  }
  if (!(eta >= 0 && eta <= 1)) throw new RangeError(`Cannot draw images: eta must lie in [0, 1], got ${eta}`);
  if (noise !== undefined && noise.length !== labels.length * imageElements) {
    throw new TypeError(
      `Cannot draw images: noise must be ${labels.length * imageElements} numbers, got ${noise.length}`,
    );
  }
  if (sampler === "ddpm" && !config.learnsVariance && scheduler.config.varianceType.startsWith("learned")) {
    throw new RangeError(
      `Cannot draw images: variance type "${scheduler.config.varianceType}" needs a model that learned it, got one without`,
    );
  }
  if (timesteps === undefined) return;
  const count = scheduler.config.trainTimesteps;
  for (let i = 0; i < timesteps.length; i++) {
    const value = timesteps[i]!;
    const falls = i === 0 || value < timesteps[i - 1]!;
    if (Number.isInteger(value) && value >= 0 && value < count && falls) continue;
    throw new RangeError(
      `Cannot draw images: timesteps must fall from below ${count} to 0, got ${value} at ${i}`,
    );
  }
  if (timesteps.length === 0) {
    throw new RangeError("Cannot draw images: at least one timestep is needed, got none");
  }
}
