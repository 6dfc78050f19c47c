/** Calibration data of image models: labelled images, noised to timesteps. */
import { quote } from "../files/whole.ts";
import {
  type DitModel,
  forwardCost,
  type ImageBatch,
  imageNoise,
  loadScheduler,
  RandomStream,
  type Scheduler,
} from "../models/mod.ts";
import { elementCount, SafetensorsFile } from "../tensor/mod.ts";
import { timestepAxis } from "../time/mod.ts";
import {
  calibrationFault as fail,
  type CalibrationOptions,
  type CalibrationPart,
  type CalibrationSet,
  distinctRecords,
  type Draw,
  draw,
  recordCount,
  recordWarnings,
  type SampleBounds,
  usualSamples,
} from "./draw.ts";
import type { OwnTrajectories } from "./own_samples.ts";

/**
 * A pass over the samples of a large model takes a few minutes. There are more of them than of sequences:
 * layers that read the timestep and the class have one input a sample.
 */
const BOUNDS: SampleBounds = { multiplyAdds: 1e13, least: 64 };
/** Part of the images that are shown without their class, as classifier-free guidance shows them. */
const UNCONDITIONAL = 0.1;

/** Images with their classes. */
export interface LabelledImages {
  /** `f32[count, elements]`, in [−1, 1] */
  readonly images: Float32Array<ArrayBuffer>;
  /** `i32[count]` */
  readonly labels: Int32Array<ArrayBuffer>;
}

/** Images as a file has them; those that are drawn are made into numbers. */
interface StoredImages extends Pick<LabelledImages, "labels"> {
  readonly shape: readonly number[];
  readonly stored: Uint8Array<ArrayBuffer> | Float32Array<ArrayBuffer> | Float16Array<ArrayBuffer>;
}

/** Numbers of the images `[begin, end)`; a byte v becomes v / 127.5 − 1. */
function numbersOf({ stored, labels }: StoredImages, begin: number, end: number): Float32Array<ArrayBuffer> {
  const elements = stored.length / labels.length, part = stored.subarray(begin * elements, end * elements);
  return part instanceof Uint8Array
    ? Float32Array.from(part, (value) => value / 127.5 - 1)
    : Float32Array.from(part);
}

function readImages(path: string, fault: (reason: string, tensor: string) => Error): StoredImages {
  using file = SafetensorsFile.open(path);
  const images = file.tensors.get("images"), labels = file.tensors.get("labels");
  if (images === undefined || !["U8", "F32", "F16"].includes(images.dtype)) {
    throw fault('it must hold "images" as U8, F32 or F16', "images");
  }
  const count = images.shape[0] ?? 0;
  if (labels === undefined || elementCount(labels.shape) !== count) {
    throw fault(
      `it must hold "labels" for ${count} images, got ${labels?.shape.join(", ") ?? "none"}`,
      "labels",
    );
  }
  const bytes = file.read("images"), labelBytes = file.read("labels");
  const stored = images.dtype === "U8"
    ? bytes
    : images.dtype === "F32"
    ? new Float32Array(bytes.buffer)
    : new Float16Array(bytes.buffer);
  const bad = stored instanceof Uint8Array ? -1 : stored.findIndex((value) => !Number.isFinite(value));
  if (bad >= 0) throw fault(`images must be finite, got ${stored[bad]} at ${bad}`, "images");
  const classes = labels.dtype === "U8"
    ? Int32Array.from(labelBytes)
    : labels.dtype === "I32"
    ? new Int32Array(labelBytes.buffer)
    : labels.dtype === "I64"
    ? Int32Array.from(new BigInt64Array(labelBytes.buffer), Number)
    : undefined;
  if (classes === undefined) throw fault(`labels must be U8, I32 or I64, got ${labels.dtype}`, "labels");
  return { stored, labels: classes, shape: images.shape };
}

/**
 * Reads a safetensors file of `images: U8, F32 or F16 [count, …]` and `labels: U8, I32 or I64 [count]`; a
 * byte v becomes v / 127.5 − 1.
 *
 * @param fault makes the error from its reason
 * @throws the fault, when the file does not hold them
 */
export function readLabelledImages(
  path: string,
  fault: (reason: string, tensor: string) => Error,
): LabelledImages & { readonly shape: readonly number[] } {
  const read = readImages(path, fault);
  return { images: numbersOf(read, 0, read.labels.length), labels: read.labels, shape: read.shape };
}

/** Images to draw from, each with its class, and the numbers of those that differ. */
interface ImageRecords extends Pick<LabelledImages, "labels"> {
  readonly distinct: readonly number[];
  image(record: number): Float32Array<ArrayBuffer>;
}

/** @throws {CalibrationError} unless a file's images have the model's size and classes */
function imageRecords({ imageElements, config: { classes } }: DitModel, path: string): ImageRecords {
  const read = readImages(path, (reason) => fail(path, reason)), { labels, shape, stored } = read;
  if (labels.length === 0 || stored.length !== labels.length * imageElements) {
    throw fail(
      path,
      `images must have ${imageElements} numbers each, as the model's, got [${shape.join(", ")}]`,
    );
  }
  const bad = labels.findIndex((label) => label < 0 || label > classes);
  if (bad >= 0) throw fail(path, `labels must be from 0 to ${classes}, got ${labels[bad]} at ${bad}`);
  const bytes = new Uint8Array(stored.buffer), size = bytes.length / labels.length;
  const distinct = distinctRecords(
    labels.length,
    (i) => [labels.subarray(i, i + 1), bytes.subarray(i * size, (i + 1) * size)],
  );
  return { labels, distinct, image: (i) => numbersOf(read, i, i + 1) };
}

/** Images of noise, of all classes in turn. */
function syntheticImages(
  { imageElements: elements, config: { classes } }: DitModel,
  samples: number,
  seed: number,
): ImageRecords {
  const images = imageNoise(seed + 1, 0, samples, elements);
  return {
    labels: Int32Array.from({ length: samples }, (_, i) => i % classes),
    distinct: Array.from({ length: samples }, (_, i) => i),
    image: (record) => images.subarray(record * elements, (record + 1) * elements),
  };
}

/** Samples of a model's own trajectories: the state whose timestep is nearest to that of the draw. */
function ownSet(
  model: DitModel,
  { labels, timesteps, states }: OwnTrajectories,
  options: CalibrationOptions & { readonly samples: number; readonly isCostly: boolean },
  scheduler: Scheduler,
): CalibrationSet<ImageBatch> {
  const { imageElements: elements, config: { sampleSize, patchSize } } = model, { samples, own } = options;
  const positions = (sampleSize / patchSize) ** 2, { trainTimesteps } = scheduler.config;
  const batchOf = (part: readonly Draw[]): CalibrationPart<ImageBatch> => {
    const noisy = new Float32Array(part.length * elements), times: number[] = [];
    for (const [i, { record, time }] of part.entries()) {
      const visited = timesteps[record]!, wanted = time * trainTimesteps;
      const distances = visited.map((timestep) => Math.abs(timestep - wanted));
      const nearest = distances.indexOf(Math.min(...distances));
      noisy.set(states[record]!.subarray(nearest * elements, (nearest + 1) * elements), i * elements);
      times.push(visited[nearest]!);
    }
    return {
      batch: { samples: noisy, timesteps: times, labels: part.map(({ record }) => labels[record]!) },
      samples: part.length,
      weights: new Float32Array(part.length * positions).fill(1),
      times: Float64Array.from(times),
    };
  };
  const steps = timesteps[0]!.length;
  return {
    source: `${samples} states on ${labels.length} trajectories of ${steps} steps that the model drew itself`,
    isSynthetic: false,
    own,
    samples,
    warnings: [],
    distinctPositions: labels.length * steps * positions,
    axis: timestepAxis(trainTimesteps),
    scheduler,
    ...draw(labels.length, options, positions, batchOf, options),
  };
}

/** Noised images for an image model. @throws {CalibrationError} when the file is not what the model reads */
export function imageSet(
  model: DitModel,
  folder: string,
  given: CalibrationOptions,
): CalibrationSet<ImageBatch> {
  const { source, seed, own } = given, { channels, sampleSize, patchSize } = model.config;
  const positions = (sampleSize / patchSize) ** 2;
  const { multiplyAdds } = forwardCost({ kind: "dit", config: model.config }, {
    batch: 1,
    tokens: positions,
  });
  const { count, isCostly } = usualSamples(positions, multiplyAdds, BOUNDS);
  const samples = given.samples ?? count, options = { ...given, samples, isCostly };
  if (own?.kind === "trajectories") return ownSet(model, own, options, loadScheduler(folder, "ddim"));
  const isSynthetic = source === "synthetic";
  const elements = model.imageElements, { classes } = model.config;
  const { labels, distinct, image } = isSynthetic
    ? syntheticImages(model, samples, seed)
    : imageRecords(model, source);
  const scheduler = loadScheduler(folder, "ddim"); // only for the noise of training
  const { trainTimesteps } = scheduler.config;
  const batchOf = (part: readonly Draw[]): CalibrationPart<ImageBatch> => {
    const noisy = new Float32Array(part.length * elements);
    const shown: number[] = [];
    const timesteps = part.map(({ time }) => Math.min(trainTimesteps - 1, Math.floor(time * trainTimesteps)));
    for (const [i, { record, stream }] of part.entries()) {
      const noise = imageNoise(seed, stream, 1, elements);
      scheduler.addNoise(image(distinct[record]!), noise, timesteps[i]!, noise);
      noisy.set(noise, i * elements);
      shown.push(
        new RandomStream(seed + 2, stream).uniform() < UNCONDITIONAL ? classes : labels[distinct[record]!]!,
      );
    }
    return {
      batch: { samples: noisy, timesteps, labels: shown },
      samples: part.length,
      weights: new Float32Array(part.length * positions).fill(1),
      times: Float64Array.from(timesteps),
    };
  };
  return {
    source: isSynthetic
      ? `${samples} synthetic images (noise), ${channels} channels`
      : `${samples} noised images of the ${recordCount(distinct.length, labels.length)} in ${quote(source)}`,
    isSynthetic,
    samples,
    warnings: recordWarnings(distinct.length, labels.length, isSynthetic),
    distinctPositions: distinct.length * positions,
    axis: timestepAxis(trainTimesteps),
    scheduler,
    ...draw(distinct.length, options, positions, batchOf, options),
  };
}
