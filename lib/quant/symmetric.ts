/** Eigenvectors and Cholesky factors of symmetric matrices, in float64. */

/** Sweeps after which Jacobi's method has converged for any matrix met in practice; it takes about eight. */
const MAX_SWEEPS = 60;

/**
 * Eigenvalues and eigenvectors of a symmetric matrix: cyclic Jacobi (Golub and Van Loan, 8.5).
 *
 * **Shapes** `matrix: f64[n, n]`, not changed → `values: f64[n]`, `vectors: f64[n, n]`, a row an eigenvector
 *
 * @throws {TypeError} when the matrix is not square
 */
export function symmetricEigen(
  matrix: Float64Array,
): { readonly values: Float64Array; readonly vectors: Float64Array } {
  const n = Math.sqrt(matrix.length);
  if (!Number.isInteger(n)) {
    throw new TypeError(`Cannot find eigenvalues: the matrix must be square, got ${matrix.length} numbers`);
  }
  const a = matrix.slice(), vectors = new Float64Array(n * n);
  for (let i = 0; i < n; i++) vectors[i * n + i] = 1;
  for (let sweep = 0; sweep < MAX_SWEEPS; sweep++) {
    let off = 0, on = 0;
    for (let i = 0; i < n; i++) {
      on += a[i * n + i]! ** 2;
      for (let j = 0; j < i; j++) off += a[i * n + j]! ** 2;
    }
    if (off <= 1e-28 * on) break;
    for (let p = 0; p < n; p++) for (let q = p + 1; q < n; q++) rotate(a, vectors, n, p, q);
  }
  return { values: Float64Array.from({ length: n }, (_, i) => a[i * n + i]!), vectors };
}

/** One rotation that makes `a[p, q]` 0. */
function rotate(a: Float64Array, vectors: Float64Array, n: number, p: number, q: number): void {
  const apq = a[p * n + q]!;
  if (apq === 0) return;
  const theta = (a[q * n + q]! - a[p * n + p]!) / (2 * apq);
  const t = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.sqrt(theta * theta + 1));
  const c = 1 / Math.sqrt(t * t + 1), s = t * c;
  const turn = (m: Float64Array, i: number, j: number) => {
    const x = m[i]!, y = m[j]!;
    m[i] = c * x - s * y;
    m[j] = s * x + c * y;
  };
  for (let k = 0; k < n; k++) turn(a, k * n + p, k * n + q);
  for (let k = 0; k < n; k++) turn(a, p * n + k, q * n + k);
  for (let k = 0; k < n; k++) turn(vectors, p * n + k, q * n + k);
}

/**
 * Cholesky factor L of a symmetric matrix in place: `f64[n, n]`, in the lower triangle.
 *
 * @param replace root for a pivot that is not above 0 and finite; it may throw
 */
export function factorize(matrix: Float64Array, n: number, replace: (pivot: number) => number): void {
  for (let i = 0; i < n; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = matrix[i * n + j]!;
      for (let k = 0; k < j; k++) sum -= matrix[i * n + k]! * matrix[j * n + k]!;
      if (i > j) matrix[i * n + j] = sum / matrix[j * n + j]!;
      else matrix[i * n + i] = sum > 0 && sum < Infinity ? Math.sqrt(sum) : replace(sum);
    }
  }
}

/** `x: f64[n, columns]` becomes `(L Lᵀ)⁻¹ x`, L as {@linkcode factorize} leaves it. */
export function substitute(factor: Float64Array, n: number, x: Float64Array, columns: number): void {
  for (let c = 0; c < columns; c++) {
    for (let i = 0; i < n; i++) {
      let sum = x[i * columns + c]!;
      for (let k = 0; k < i; k++) sum -= factor[i * n + k]! * x[k * columns + c]!;
      x[i * columns + c] = sum / factor[i * n + i]!;
    }
    for (let i = n - 1; i >= 0; i--) {
      let sum = x[i * columns + c]!;
      for (let k = i + 1; k < n; k++) sum -= factor[k * n + i]! * x[k * columns + c]!;
      x[i * columns + c] = sum / factor[i * n + i]!;
    }
  }
}
