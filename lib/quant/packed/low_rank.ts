/** Adding a low-rank correction to a matrix. */
import { halves, type LowRank } from "./layout.ts";

/**
 * Adds A B to a matrix of float32: sums in float64 in the order of the rank, so that the bytes are the same
 * on every machine.
 *
 * **Shapes** `a: f16[rows, rank]`, `b: f16[rank, cols]`, `matrix: f32[rows, cols]`, changed in place
 */
export function addLowRank(
  matrix: Float32Array,
  { rank, a, b }: LowRank,
  rows: number,
  cols: number,
  sign: 1 | -1 = 1,
): void {
  const left = halves(a), right = Float32Array.from(halves(b));
  const sums = new Float64Array(cols);
  for (let row = 0; row < rows; row++) {
    sums.fill(0);
    for (let i = 0; i < rank; i++) {
      const factor = left[row * rank + i]!;
      for (let k = 0, from = i * cols; k < cols; k++, from++) sums[k]! += factor * right[from]!;
    }
    for (let k = 0, to = row * cols; k < cols; k++, to++) matrix[to]! += sign * sums[k]!;
  }
}
