/**
 * What a DiT is worth: error of its prediction by timestep, class accuracy and Fréchet distance of what it draws, and how far its trajectory
 * drifts from the full-precision one with the same noise. The protocol is that of tests/models/README.md.
 */
import { CheckpointError } from "../errors.ts";
import {
  type DitModel,
  generateImages,
  imageNoise,
  type ImageOptions,
  type Scheduler,
} from "../models/mod.ts";
import { SafetensorsFile } from "../tensor/mod.ts";
import type { GlyphClassifier } from "./classifier.ts";
import type { FrechetReference } from "./frechet.ts";
import { type BootstrapOptions, bootstrapRatio, type Interval, wilsonInterval } from "./intervals.ts";

/** Images with their classes. */
export interface LabelledImages {
  /** `f32[count, elements]`, in [−1, 1] */
  readonly images: Float32Array<ArrayBuffer>;
  /** `i32[count]` */
  readonly labels: Int32Array<ArrayBuffer>;
}

/**
 * Reads `images: U8 [count, …]` and `labels: U8 [count]`; a byte v becomes v / 127.5 − 1.
 *
 * @throws {CheckpointError} when the file does not hold them
 */
export function readImages(path: string): LabelledImages {
  using file = SafetensorsFile.open(path);
  const read = (name: string) => {
    const info = file.tensors.get(name);
    if (info?.dtype === "U8" && info.shape.length > 0) {
      return { count: info.shape[0]!, bytes: file.read(name) };
    }
    throw new CheckpointError(
      `Cannot read ${JSON.stringify(path)}: tensor "${name}" must be U8, got ${
        info?.dtype ?? "no such tensor"
      }`,
      { path, tensor: name },
    );
  };
  const images = read("images"), labels = read("labels");
  if (images.count !== labels.count) {
    throw new CheckpointError(
      `Cannot read ${
        JSON.stringify(path)
      }: there must be a label for each of ${images.count} images, got ${labels.count}`,
      { path, tensor: "labels" },
    );
  }
  return {
    images: Float32Array.from(images.bytes, (v) => v / 127.5 - 1),
    labels: Int32Array.from(labels.bytes),
  };
}

/** Error of predictions at one timestep: ‖ε̂ − ε‖² / ‖ε‖² over all images. */
export interface TimestepError {
  readonly timestep: number;
  readonly images: number;
  readonly relativeError: Interval;
  /** ‖ε̂ − ε‖² / ‖ε‖² of each image, in the same order for every model. */
  readonly perImage: Float64Array;
}

export interface TimestepErrorOptions extends BootstrapOptions {
  /** Default: ten, spread over the training's. */
  readonly timesteps?: ArrayLike<number> | undefined;
  /** Images a timestep, taken in turn. Default 64. */
  readonly imagesPerTimestep?: number | undefined;
  /** Images of one forward pass. Default 32. */
  readonly batch?: number | undefined;
}

/**
 * Relative error of a model's prediction against full precision on noised images, by timestep.
 *
 * Both models see the same images and the same noise; the interval is of a bootstrap over images.
 */
export function timestepErrors(
  full: DitModel,
  other: DitModel,
  scheduler: Scheduler,
  { images, labels }: LabelledImages,
  options: TimestepErrorOptions = {},
): TimestepError[] {
  const { imagesPerTimestep = 64, batch = 32, seed = 0 } = options;
  const { timesteps = scheduler.timesteps(Math.min(10, scheduler.config.trainTimesteps), "linspace") } =
    options;
  const elements = full.imageElements, count = labels.length;
  checkSameShape(full, other, images.length / count);
  return Array.from(timesteps, (timestep, t): TimestepError => {
    const errors = new Float64Array(imagesPerTimestep), norms = new Float64Array(imagesPerTimestep);
    for (let begin = 0; begin < imagesPerTimestep; begin += batch) {
      const part = Math.min(batch, imagesPerTimestep - begin);
      const first = t * imagesPerTimestep + begin;
      const picked = Array.from({ length: part }, (_, i) => (first + i) % count);
      const noisy = new Float32Array(part * elements);
      for (const [i, image] of picked.entries()) {
        noisy.set(images.subarray(image * elements, (image + 1) * elements), i * elements);
      }
      scheduler.addNoise(noisy, imageNoise(seed, first, part, elements), timestep, noisy);
      const partLabels = picked.map((image) => labels[image]!),
        times = new Array<number>(part).fill(timestep);
      const wanted = full.forward(noisy, times, partLabels).slice();
      const got = other.forward(noisy, times, partLabels);
      const width = wanted.length / part; // a learned variance follows the prediction
      for (let i = 0; i < part; i++) {
        for (let k = 0; k < elements; k++) {
          const value = wanted[i * width + k]!;
          errors[begin + i]! += (got[i * width + k]! - value) ** 2;
          norms[begin + i]! += value * value;
        }
      }
    }
    return {
      timestep,
      images: imagesPerTimestep,
      relativeError: bootstrapRatio(errors, norms, options),
      perImage: errors.map((error, i) => error / norms[i]!),
    };
  });
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

/** Images that a model drew, and the way there where it was asked for. */
export interface DrawnImages extends LabelledImages {
  /** Noisy images in front of each step and the finished ones: `f32[count, elements]` each. */
  readonly trajectory: readonly Float32Array<ArrayBuffer>[] | undefined;
  /** Numbers of one image. */
  readonly elements: number;
}

export interface DrawOptions
  extends Pick<ImageOptions, "sampler" | "steps" | "spacing" | "guidance" | "eta" | "seed"> {
  /** Images of one forward pass. Default 64. */
  readonly batch?: number | undefined;
  /** Keeps what {@linkcode trajectoryDrift} needs: `(steps + 1)` times the memory. Default false. */
  readonly trajectory?: boolean | undefined;
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
  const { elements } = full, count = full.labels.length;
  return a.map((wanted, step): StepDrift => {
    const got = b[step]!;
    const distances = new Float64Array(count), norms = new Float64Array(count);
    for (let i = 0; i < count; i++) {
      for (let k = i * elements; k < (i + 1) * elements; k++) {
        distances[i]! += (got[k]! - wanted[k]!) ** 2;
        norms[i]! += wanted[k]! ** 2;
      }
    }
    return { step, relativeDistance: bootstrapRatio(distances, norms, options) };
  });
}

/** What the classifier thinks of drawn images. */
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
