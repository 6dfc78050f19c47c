/** Cholesky factors of small symmetric matrices in float64, for the reference solvers: plain loops. */

/**
 * The lower factor L of a symmetric matrix, `A = L Lᵀ`; undefined where A is not positive definite. Only A's lower triangle is read.
 *
 * **Shapes** `matrix: f64[size, size]` → `f64[size, size]`, 0 above the diagonal
 *
 * @example
 * ```ts
 * import { choleskyFactor } from "./cholesky.ts";
 * console.log(choleskyFactor(Float64Array.of(4, 2, 2, 5), 2)); // 2 0 1 2
 * ```
 */
export function choleskyFactor(matrix: Float64Array, size: number): Float64Array<ArrayBuffer> | undefined {
  const factor = new Float64Array(size * size);
  for (let i = 0; i < size; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = matrix[i * size + j]!;
      for (let k = 0; k < j; k++) sum -= factor[i * size + k]! * factor[j * size + k]!;
      if (i !== j) factor[i * size + j] = sum / factor[j * size + j]!;
      else if (sum > 0 && sum < Infinity) factor[i * size + i] = Math.sqrt(sum);
      else return undefined;
    }
  }
  return factor;
}

/**
 * The inverse of a symmetric matrix from its lower factor: `A⁻¹ = L⁻ᵀ L⁻¹`.
 *
 * **Shapes** `factor: f64[size, size]` → `f64[size, size]`
 */
export function choleskyInverse(factor: Float64Array, size: number): Float64Array<ArrayBuffer> {
  const inverse = new Float64Array(size * size); // of L, transposed: row j has L⁻¹'s column j
  for (let j = 0; j < size; j++) {
    for (let i = j; i < size; i++) {
      let sum = i === j ? 1 : 0;
      for (let k = j; k < i; k++) sum -= factor[i * size + k]! * inverse[j * size + k]!;
      inverse[j * size + i] = sum / factor[i * size + i]!;
    }
  }
  const result = new Float64Array(size * size);
  for (let i = 0; i < size; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = 0;
      for (let k = i; k < size; k++) sum += inverse[i * size + k]! * inverse[j * size + k]!;
      result[i * size + j] = sum;
      result[j * size + i] = sum;
    }
  }
  return result;
}
