/** Seeded synthetic weights, the same in every runtime. */
import { RandomStream } from "../models/random.ts";

/** `count` Gaussian values of mean 0. */
export function gaussianWeights(count: number, seed: number, deviation = 0.02): Float32Array<ArrayBuffer> {
  const random = new RandomStream(seed);
  return Float32Array.from({ length: count }, () => deviation * random.normal());
}
