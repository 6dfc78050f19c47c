/** Seeded random numbers for sampling: the same stream in every runtime, one stream a sequence or image. */
import { checkWhole } from "../native/call.ts";

/** Where a generation's random numbers come from. */
export interface SeedOptions {
  /** Default 0. */
  readonly seed?: number | undefined;
  /** Number of the first sequence's or image's stream: draws do not depend on the batch. Default 0. */
  readonly firstStream?: number | undefined;
}

/**
 * A stream of random numbers: sfc32, seeded from a seed and the number of a stream, so that the draws of one
 * sequence of a batch do not depend on the others.
 */
export class RandomStream {
  #a: number;
  #b: number;
  #c: number;
  #counter = 1;
  #spare: number | undefined;

  constructor(seed: number, stream = 0) {
    checkWhole("make random numbers", "seed", seed, 0);
    this.#a = seed | 0;
    this.#b = Math.floor(seed / 2 ** 32) | 0;
    this.#c = stream | 0;
    for (let i = 0; i < 15; i++) this.#next();
  }

  /** A number in (0, 1) with 53 random bits. */
  uniform(): number {
    const high = this.#next() >>> 6, low = this.#next() >>> 5;
    return (high * 2 ** 27 + low + 0.5) / 2 ** 53;
  }

  /** A number of mean 0 and variance 1, by Box and Muller. */
  normal(): number {
    const spare = this.#spare;
    if (spare !== undefined) {
      this.#spare = undefined;
      return spare;
    }
    const radius = Math.sqrt(-2 * Math.log(this.uniform())), angle = 2 * Math.PI * this.uniform();
    this.#spare = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  }

  /** Fills `target` with normal numbers. */
  fillNormal(target: Float32Array): void {
    for (let i = 0; i < target.length; i++) target[i] = this.normal();
  }

  /** A whole number in [0, bound). */
  below(bound: number): number {
    return Math.min(bound - 1, Math.floor(this.uniform() * bound));
  }

  #next(): number {
    const sum = (this.#a + this.#b + this.#counter) | 0;
    this.#counter = (this.#counter + 1) | 0;
    this.#a = this.#b ^ (this.#b >>> 9);
    this.#b = (this.#c + (this.#c << 3)) | 0;
    this.#c = ((this.#c << 21) | (this.#c >>> 11)) + sum | 0;
    return sum >>> 0;
  }
}

/**
 * Standard normal noise for images `[first, first + images)` of `elements` each: an image's noise depends on
 * the seed and its number alone, so that batches of any size draw the same images.
 */
export function imageNoise(
  seed: number,
  first: number,
  images: number,
  elements: number,
): Float32Array<ArrayBuffer> {
  const noise = new Float32Array(images * elements);
  for (let i = 0; i < images; i++) {
    new RandomStream(seed, first + i).fillNormal(noise.subarray(i * elements, (i + 1) * elements));
  }
  return noise;
}
