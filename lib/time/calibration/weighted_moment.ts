/** Second moments whose time groups count by weights. */
import { momentBlocks } from "../../quant/solvers/moments.ts";
import type { InputStatistics } from "./contents.ts";

/** The second moment of an input whose time groups count by weights, for the same sum of weights. */
export function weightedMoment(
  { cols, block = cols, weight, squares, groupSecond }: InputStatistics,
  second: Float32Array<ArrayBuffer>,
  weights: ArrayLike<number>,
): Float32Array<ArrayBuffer> {
  const total = weight.reduce((sum, own) => sum + own, 0);
  const counted = weight.reduce((sum, own, g) => sum + weights[g]! * own, 0);
  if (!(counted > 0)) return second; // read at times that do not count: all alike
  const scaled = Float64Array.from(weights, (own) => own * total / counted);
  const weighted = new Float32Array(second.length);
  if (groupSecond !== undefined) {
    for (const { first, cols: own, at } of momentBlocks(cols, block)) {
      for (let i = 0; i < own; i++) {
        for (let k = 0; k < own; k++) {
          let sum = 0;
          for (let g = 0; g < scaled.length; g++) {
            sum += scaled[g]! * groupSecond[(g * cols + first + i) * cols + first + k]!;
          }
          weighted[at + i * own + k] = sum;
        }
      }
    }
    return weighted;
  }
  const factors = Float64Array.from({ length: cols }, (_, k) => {
    let before = 0, after = 0;
    for (let g = 0; g < scaled.length; g++) {
      before += squares[g * cols + k]!;
      after += scaled[g]! * squares[g * cols + k]!;
    }
    return before > 0 ? Math.sqrt(after / before) : 0;
  });
  for (const { first, cols: own, at } of momentBlocks(cols, block)) {
    for (let i = 0; i < own; i++) {
      for (let k = 0; k < own; k++) {
        const place = at + i * own + k;
        weighted[place] = second[place]! * factors[first + i]! * factors[first + k]!;
      }
    }
  }
  return weighted;
}
