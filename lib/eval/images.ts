/**
 * Measures of an image model: error of its predictions by timestep, class accuracy and Fréchet distance of
 * its images, and drift of its trajectories from the full-precision ones with the same noise. The protocol is
 * that of tests/models/README.md.
 */
import { type LabelledImages, readLabelledImages } from "../calibration/images.ts";
import { CheckpointError } from "../errors.ts";
import { quote } from "../files/whole.ts";
import {
  type DitModel,
  generateImages,
  imageNoise,
  type ImageOptions,
  type Scheduler,
} from "../models/mod.ts";
import type { GlyphClassifier } from "./classifier.ts";
import type { FrechetReference } from "./frechet.ts";
import { type BootstrapOptions, bootstrapRatio, type Interval, wilsonInterval } from "./intervals.ts";
import { squaredDistances } from "./statistics.ts";

/** `readLabelledImages` of a safetensors file. @throws {CheckpointError} when it does not hold images */
export function readImages(path: string): LabelledImages {
  return readLabelledImages(
    path,
    (reason, tensor) => new CheckpointError(`Cannot read ${quote(path)}: ${reason}`, { path, tensor }),
  );
}

export type { LabelledImages };

/** Noisy images of one timestep. */
export interface NoisyImages {
  readonly timestep: number;
  /** `f32[count, elements]` */
  readonly samples: Float32Array<ArrayBuffer>;
  /** `[count]` */
  readonly labels: ArrayLike<number>;
}

/** Choice of noised images. */
export interface NoisedImagesOptions {
  /** Default: ten, spread over the training's. */
  readonly timesteps?: ArrayLike<number> | undefined;
  /** Images a timestep, taken in turn. Default 64. */
  readonly imagesPerTimestep?: number | undefined;
  /** Of the noise. Default 0. */
  readonly seed?: number | undefined;
}

/** Images with the noise of some timesteps. */
export function noisedImages(
  scheduler: Scheduler,
  { images, labels }: LabelledImages,
  {
    timesteps = scheduler.timesteps(Math.min(10, scheduler.config.trainTimesteps), "linspace"),
    imagesPerTimestep: each = 64,
    seed = 0,
  }: NoisedImagesOptions = {},
): NoisyImages[] {
  const elements = images.length / labels.length;
  return Array.from(timesteps, (timestep, t): NoisyImages => {
    const picked = Array.from({ length: each }, (_, i) => (t * each + i) % labels.length);
    const samples = new Float32Array(each * elements);
    for (const [i, image] of picked.entries()) {
      samples.set(images.subarray(image * elements, (image + 1) * elements), i * elements);
    }
    scheduler.addNoise(samples, imageNoise(seed, t * each, each, elements), timestep, samples);
    return { timestep, samples, labels: picked.map((image) => labels[image]!) };
  });
}

/** Predictions for noisy images, with the learned variance where there is one, `batch` a forward pass. */
export function predictionsAt(
  model: DitModel,
  states: readonly NoisyImages[],
  batch = 32,
): Float32Array<ArrayBuffer>[] {
  const elements = model.imageElements;
  return states.map(({ timestep, samples, labels }) => {
    const count = labels.length;
    let out: Float32Array<ArrayBuffer> | undefined;
    for (let begin = 0; begin < count; begin += batch) {
      const end = Math.min(count, begin + batch), times = new Array<number>(end - begin).fill(timestep);
      const own = Array.from({ length: end - begin }, (_, i) => labels[begin + i]!);
      const output = model.forward(samples.subarray(begin * elements, end * elements), times, own);
      const width = output.length / (end - begin);
      (out ??= new Float32Array(count * width)).set(output, begin * width);
    }
    return out!;
  });
}

/** Error of predictions at one timestep: ‖ε̂ − ε‖² / ‖ε‖² over all images. */
export interface TimestepError {
  readonly timestep: number;
  readonly images: number;
  readonly relativeError: Interval;
  /** ‖ε̂ − ε‖² / ‖ε‖² of each image, in the same order for every model. */
  readonly perImage: Float64Array;
}

/**
 * Relative error of predictions beside the full-precision model's, by timestep; intervals by a bootstrap over
 * images.
 *
 * @param full as {@linkcode predictionsAt} returns them
 * @param elements numbers of one image
 */
export function predictionErrors(
  states: readonly NoisyImages[],
  full: readonly Float32Array[],
  other: readonly Float32Array[],
  elements: number,
  bootstrap: BootstrapOptions = {},
): TimestepError[] {
  return states.map(({ timestep, labels: { length: images } }, t): TimestepError => {
    const { errors, norms } = squaredDistances(other[t]!, full[t]!, images, elements);
    return {
      timestep,
      images,
      relativeError: bootstrapRatio(errors, norms, bootstrap),
      perImage: errors.map((error, i) => error / norms[i]!),
    };
  });
}

/** Choice of noised images, and of intervals. */
export interface TimestepErrorOptions extends BootstrapOptions, NoisedImagesOptions {
  /** Of the noise and of resampling. Default 0. */
  readonly seed?: number | undefined;
}

/**
 * Relative error of a model's prediction beside full precision on noised images, by timestep.
 *
 * @throws {TypeError} when the models' shapes differ, or are not the images'
 */
export function timestepErrors(
  full: DitModel,
  other: DitModel,
  scheduler: Scheduler,
  images: LabelledImages,
  options: TimestepErrorOptions = {},
): TimestepError[] {
  checkSameShape(full, other, images.images.length / images.labels.length);
  const states = noisedImages(scheduler, images, options);
  const wanted = predictionsAt(full, states), got = predictionsAt(other, states);
  return predictionErrors(states, wanted, got, full.imageElements, options);
}

function checkSameShape(full: DitModel, other: DitModel, elements: number): void {
  const shape = ({ config: { channels, sampleSize, outputChannels } }: DitModel) =>
    `${channels} × ${sampleSize} × ${sampleSize} to ${outputChannels}`;
  if (shape(full) !== shape(other)) {
    throw new TypeError(`Cannot compare models: both must map ${shape(full)} channels, got ${shape(other)}`);
  }
  if (elements !== full.imageElements) {
    throw new TypeError(
      `Cannot compare models: images must have ${full.imageElements} numbers, got ${elements}`,
    );
  }
}

/** Images that a model drew, with their trajectory on request. */
export interface DrawnImages extends LabelledImages {
  /** Noisy images in front of each step and the finished ones: `f32[count, elements]` each. */
  readonly trajectory: readonly Float32Array<ArrayBuffer>[] | undefined;
  /** Numbers of one image. */
  readonly elements: number;
}

/** How images are drawn. */
export interface DrawOptions
  extends Pick<ImageOptions, "sampler" | "steps" | "spacing" | "guidance" | "eta" | "seed"> {
  /** Images of one forward pass. Default 64. */
  readonly batch?: number | undefined;
  /** Keeps the trajectory, `(steps + 1)` times the memory. Default false. */
  readonly trajectory?: boolean | undefined;
  /** Called after each batch. */
  readonly onProgress?: ((done: number, of: number) => void) | undefined;
}

/** Draws images of classes `i mod classes`; image i is the same in any batch and for any count. */
export function drawImages(
  model: DitModel,
  scheduler: Scheduler,
  count: number,
  { batch = 64, trajectory = false, onProgress, ...options }: DrawOptions = {},
): DrawnImages {
  const elements = model.imageElements;
  const images = new Float32Array(count * elements);
  const labels = Int32Array.from({ length: count }, (_, i) => i % model.config.classes);
  const path: Float32Array<ArrayBuffer>[] = [];
  for (let begin = 0; begin < count; begin += batch) {
    const end = Math.min(count, begin + batch);
    const drawn = generateImages(model, scheduler, labels.subarray(begin, end), {
      ...options,
      firstStream: begin,
      onStep: ({ step, samples }) => {
        if (trajectory) (path[step] ??= new Float32Array(count * elements)).set(samples, begin * elements);
      },
    });
    images.set(drawn, begin * elements);
    onProgress?.(end, count);
  }
  return { images, labels, trajectory: trajectory ? path : undefined, elements };
}

/** Distance of two trajectories in front of a step: ‖x̂ − x‖² / ‖x‖². */
export interface StepDrift {
  /** Steps done. */
  readonly step: number;
  readonly relativeDistance: Interval;
}

/**
 * How far a trajectory drifts from the full-precision one that began with the same noise, after each step.
 *
 * @throws {TypeError} when either was drawn without its trajectory, or they differ in count or steps
 */
export function trajectoryDrift(
  full: DrawnImages,
  other: DrawnImages,
  options: BootstrapOptions = {},
): StepDrift[] {
  const a = full.trajectory, b = other.trajectory;
  if (a === undefined || b === undefined || a.length !== b.length || a[0]?.length !== b[0]?.length) {
    throw new TypeError(
      "Cannot compare trajectories: both must have been kept, with the same images and steps",
    );
  }
  return a.map((wanted, step): StepDrift => {
    const { errors, norms } = squaredDistances(b[step]!, wanted, full.labels.length);
    return { step, relativeDistance: bootstrapRatio(errors, norms, options) };
  });
}

/** Scores of drawn images. */
export interface ImageScores {
  readonly images: number;
  /** Share that the classifier reads as the class asked for, with Wilson's interval. */
  readonly classAccuracy: Interval;
  /** Of features against those of real images. */
  readonly frechetDistance: Interval;
  /** Whether each image was read as its class, for comparisons in pairs. */
  readonly isRecognized: readonly boolean[];
}

/** Class accuracy and Fréchet distance of images. */
export function scoreImages(
  { images, labels }: LabelledImages,
  classifier: GlyphClassifier,
  reference: FrechetReference,
  options: BootstrapOptions = {},
): ImageScores {
  const { features, classes } = classifier.classify(images);
  const isRecognized = Array.from(labels, (label, i) => classes[i] === label);
  return {
    images: labels.length,
    classAccuracy: wilsonInterval(isRecognized.filter(Boolean).length, labels.length, options.confidence),
    frechetDistance: reference.distanceOf(features, options),
    isRecognized,
  };
}
