/**
 * The classifier that reads generated glyphs: two convolutions, two linear layers. Its 64 features are what
 * the Fréchet distance is taken of. Layers are those of tests/models/README.md.
 */
import { CheckpointError } from "../errors.ts";
import { quote } from "../files/whole.ts";
import { linear } from "../models/layers/linear.ts";
import type { LinearLayer } from "../models/layers/tensors.ts";
import type { Kernels } from "../native/mod.ts";
import { SafetensorsFile } from "../tensor/mod.ts";
import type { FeatureStatistics } from "./frechet.ts";

const SIDE = 16;
const CLASSES = 10;
const FEATURES = 64;
/** Images whose intermediate values are held at once. */
const BATCH = 50;

const SHAPES = {
  c1: [16, 1, 3, 3],
  c2: [32, 16, 3, 3],
  f1: [FEATURES, 32 * 4 * 4],
  f2: [CLASSES, FEATURES],
} as const;

/** Features and classes of images. */
export interface Classification {
  /** `f32[count, 64]` */
  readonly features: Float32Array<ArrayBuffer>;
  /** `f32[count, 10]` */
  readonly logits: Float32Array<ArrayBuffer>;
  /** `i32[count]`, the most probable class of each. */
  readonly classes: Int32Array<ArrayBuffer>;
}

/** A float32 tensor of a file. @throws {CheckpointError} when it has another type or shape */
function readFloats(
  file: SafetensorsFile,
  name: string,
  shape: readonly number[],
): Float32Array<ArrayBuffer> {
  const info = file.tensors.get(name);
  if (info?.dtype === "F32" && info.shape.join() === shape.join()) {
    return new Float32Array(file.read(name).buffer);
  }
  const got = info === undefined ? "no such tensor" : `${info.dtype} [${info.shape.join(", ")}]`;
  throw new CheckpointError(
    `Cannot read ${quote(file.path)}: tensor "${name}" must be F32 [${shape.join(", ")}], got ${got}`,
    { path: file.path, tensor: name },
  );
}

type Layers = Readonly<Record<keyof typeof SHAPES, LinearLayer>>;

/** The shipped classifier. */
export class GlyphClassifier {
  readonly #kernels: Kernels;
  readonly #layers: Layers;

  constructor(layers: Layers, kernels: Kernels) {
    this.#kernels = kernels;
    this.#layers = layers;
  }

  /** Classifies `images: f32[count, 16, 16]` in [−1, 1]. @throws {TypeError} when that is not their size */
  classify(images: Float32Array): Classification {
    const count = images.length / (SIDE * SIDE);
    if (!Number.isInteger(count)) {
      throw new TypeError(
        `Cannot classify: images must be f32[count, ${SIDE}, ${SIDE}], got ${images.length} numbers`,
      );
    }
    const features = new Float32Array(count * FEATURES), logits = new Float32Array(count * CLASSES);
    for (let begin = 0; begin < count; begin += BATCH) {
      const end = Math.min(count, begin + BATCH), part = end - begin;
      const first = this.#convolve("c1", images.subarray(begin * SIDE * SIDE, end * SIDE * SIDE), part, SIDE);
      const second = this.#convolve("c2", pool(first, part * 16, SIDE), part, SIDE / 2);
      const inner = features.subarray(begin * FEATURES, end * FEATURES);
      linear(this.#kernels, this.#layers.f1, pool(second, part * 32, SIDE / 2), part, inner);
      for (let i = 0; i < inner.length; i++) inner[i] = Math.max(0, inner[i]!);
      linear(this.#kernels, this.#layers.f2, inner, part, logits.subarray(begin * CLASSES, end * CLASSES));
    }
    const classes = Int32Array.from({ length: count }, (_, i) => {
      let best = 0;
      for (let c = 1; c < CLASSES; c++) if (logits[i * CLASSES + c]! > logits[i * CLASSES + best]!) best = c;
      return best;
    });
    return { features, logits, classes };
  }

  /** 3×3 convolution, padding 1, then ReLU: `f32[count, in, side, side]` → `f32[count, out, side, side]`. */
  #convolve(name: "c1" | "c2", x: Float32Array, count: number, side: number): Float32Array<ArrayBuffer> {
    const layer = this.#layers[name];
    const channels = layer.weights.cols / 9, area = side * side;
    const patches = new Float32Array(count * area * layer.weights.cols);
    for (let b = 0, at = 0; b < count; b++) {
      for (let y = 0; y < side; y++) {
        for (let x0 = 0; x0 < side; x0++) {
          for (let c = 0; c < channels; c++) {
            for (let dy = -1; dy <= 1; dy++) {
              const yy = y + dy, row = ((b * channels + c) * side + yy) * side;
              for (let dx = -1; dx <= 1; dx++, at++) {
                const xx = x0 + dx;
                if (yy >= 0 && yy < side && xx >= 0 && xx < side) patches[at] = x[row + xx]!;
              }
            }
          }
        }
      }
    }
    const planes = layer.weights.rows, pixels = new Float32Array(count * area * planes);
    linear(this.#kernels, layer, patches, count * area, pixels);
    const out = new Float32Array(pixels.length);
    for (let b = 0; b < count; b++) {
      for (let i = 0; i < area; i++) {
        for (let c = 0; c < planes; c++) {
          out[(b * planes + c) * area + i] = Math.max(0, pixels[(b * area + i) * planes + c]!);
        }
      }
    }
    return out;
  }
}

/** Largest of each 2×2 square: `f32[planes, side, side]` → `f32[planes, side / 2, side / 2]`. */
function pool(x: Float32Array, planes: number, side: number): Float32Array<ArrayBuffer> {
  const half = side / 2;
  const out = new Float32Array(planes * half * half);
  for (let p = 0, at = 0; p < planes; p++) {
    for (let y = 0; y < half; y++) {
      for (let x0 = 0; x0 < half; x0++, at++) {
        const i = (p * side + 2 * y) * side + 2 * x0;
        out[at] = Math.max(x[i]!, x[i + 1]!, x[i + side]!, x[i + side + 1]!);
      }
    }
  }
  return out;
}

/**
 * Loads the classifier.
 *
 * @throws {CheckpointError} when the file is not it
 * @throws {FormatError} when the file is no safetensors file
 */
export function loadClassifier(path: string, kernels: Kernels): GlyphClassifier {
  using file = SafetensorsFile.open(path);
  const layers = Object.entries(SHAPES).map(([key, shape]): [string, LinearLayer] => {
    const name = `${key}.weight`, data = readFloats(file, name, shape), rows = shape[0];
    const weights = { rows, cols: data.length / rows, dtype: "F32", data } as const;
    return [key, { name, weights, bias: readFloats(file, `${key}.bias`, [rows]) }];
  });
  return new GlyphClassifier(Object.fromEntries(layers) as Layers, kernels);
}

/** Mean and covariance of real images' features. @throws as {@linkcode loadClassifier} */
export function loadFeatureStatistics(path: string): FeatureStatistics {
  using file = SafetensorsFile.open(path);
  return {
    mean: Float64Array.from(readFloats(file, "mean", [FEATURES])),
    covariance: Float64Array.from(readFloats(file, "covariance", [FEATURES, FEATURES])),
  };
}
