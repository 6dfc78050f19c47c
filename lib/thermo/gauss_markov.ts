/**
 * The Gauss-Markov prior of parameters along time: `Σ_g L_g(θ_g) + λ Σ_g ‖θ_{g+1} − θ_g‖²` with quadratic
 * L_g, solved in closed form as one block-tridiagonal system. Sums in float64.
 */
import { factorize, substitute } from "../quant/symmetric.ts";

/** Most rows of a block: eliminating it takes their cube. */
const MAX_BLOCK = 1024;

/**
 * Solves `L_{g−1} θ_{g−1} + D_g θ_g + U_g θ_{g+1} = r_g`, with `L_g = U_gᵀ`, by block elimination (Thomas)
 * without pivoting between blocks: the system has to be positive definite.
 *
 * **Shapes** `diagonal: f64[groups, n, n]`, symmetric blocks; `upper: f64[groups − 1, n, n]`;
 * `right: f64[groups, n]` → `f64[groups, n]`
 *
 * @throws {TypeError} when the shapes do not fit
 * @throws {RangeError} when the system is not positive definite
 *
 * @example
 * ```ts
 * import { solveBlockTridiagonal } from "./gauss_markov.ts";
 * console.log(solveBlockTridiagonal(Float64Array.of(2, 2), Float64Array.of(-1), Float64Array.of(1, 0), 1)); // 2/3, 1/3
 * ```
 */
export function solveBlockTridiagonal(
  diagonal: Float64Array,
  upper: Float64Array,
  right: Float64Array,
  n: number,
): Float64Array<ArrayBuffer> {
  const doing = "solve a block-tridiagonal system";
  const groups = right.length / n;
  if (!Number.isInteger(n) || n < 1 || n > MAX_BLOCK) {
    throw new TypeError(`Cannot ${doing}: blocks must have from 1 to ${MAX_BLOCK} rows, got ${n}`);
  }
  if (
    !Number.isInteger(groups) || groups < 1 || diagonal.length !== groups * n * n ||
    upper.length !== (groups - 1) * n * n
  ) {
    throw new TypeError(
      `Cannot ${doing}: there must be a diagonal block for each right side and one between them, got ${diagonal.length} and ${upper.length} numbers for ${right.length}`,
    );
  }
  const factors = diagonal.slice(), solution = right.slice();
  const between = new Float64Array(upper.length); // D_g⁻¹ U_g
  for (let g = 0; g < groups; g++) {
    const block = factors.subarray(g * n * n, (g + 1) * n * n), r = solution.subarray(g * n, (g + 1) * n);
    if (g > 0) {
      // D_g −= U_{g−1}ᵀ D_{g−1}⁻¹ U_{g−1}, r_g −= U_{g−1}ᵀ D_{g−1}⁻¹ r_{g−1}
      const u = upper.subarray((g - 1) * n * n, g * n * n), x = between.subarray((g - 1) * n * n, g * n * n);
      const before = solution.subarray((g - 1) * n, g * n);
      for (let i = 0; i < n; i++) {
        for (let k = 0; k < n; k++) {
          const factor = u[k * n + i]!;
          if (factor === 0) continue;
          for (let j = 0; j < n; j++) block[i * n + j]! -= factor * x[k * n + j]!;
          r[i]! -= factor * before[k]!;
        }
      }
    }
    factorize(block, n, (pivot) => {
      throw new RangeError(
        "Cannot solve a block-tridiagonal system: it must be positive definite, " +
          `got the pivot ${pivot} in group ${g}`,
      );
    });
    substitute(block, n, r, 1);
    if (g + 1 < groups) {
      const x = between.subarray(g * n * n, (g + 1) * n * n);
      x.set(upper.subarray(g * n * n, (g + 1) * n * n));
      substitute(block, n, x, n);
    }
  }
  for (let g = groups - 2; g >= 0; g--) {
    const x = between.subarray(g * n * n, (g + 1) * n * n);
    for (let i = 0; i < n; i++) {
      for (let k = 0; k < n; k++) solution[g * n + i]! -= x[i * n + k]! * solution[(g + 1) * n + k]!;
    }
  }
  return solution;
}

/** One quadratic a time group: `(θ − target)ᵀ curvature (θ − target)`. */
export interface TimeQuadratics {
  /** `f64[groups, n, n]`, symmetric and positive semidefinite. */
  readonly curvature: Float64Array;
  /** `f64[groups, n]`: where each group alone would be. */
  readonly target: Float64Array;
  /** Parameters of a group. */
  readonly n: number;
}

/**
 * The parameters that minimise `Σ_g (θ_g − m_g)ᵀ A_g (θ_g − m_g) + λ Σ_g ‖θ_{g+1} − θ_g‖²`. `markovWeight` is
 * λ relative to the data term: to the mean of the curvatures' diagonals, parameter by parameter, so that no
 * unit of a parameter matters. 0 gives the targets where they are determined; λ → ∞ one set of parameters for
 * all times.
 *
 * @throws {TypeError} when the shapes do not fit
 * @throws {RangeError} when `markovWeight` is outside [0, 100], a value is not finite or nothing determines a
 * parameter
 *
 * @example
 * ```ts
 * import { solveGaussMarkov } from "./gauss_markov.ts";
 * const quadratics = { curvature: Float64Array.of(1, 1), target: Float64Array.of(0, 1), n: 1 };
 * console.log(solveGaussMarkov(quadratics, 1)); // 1/3, 2/3
 * ```
 */
export function solveGaussMarkov(
  { curvature, target, n }: TimeQuadratics,
  markovWeight: number,
): Float64Array<ArrayBuffer> {
  const doing = "smooth parameters over time";
  const groups = target.length / n;
  if (!Number.isInteger(groups) || groups < 1 || curvature.length !== groups * n * n) {
    throw new TypeError(
      `Cannot ${doing}: curvature must be [groups, ${n}, ${n}] and target [groups, ${n}], got ${curvature.length} and ${target.length} numbers`,
    );
  }
  if (!(markovWeight >= 0 && markovWeight <= 100)) {
    throw new RangeError(`Cannot ${doing}: markovWeight must lie in [0, 100], got ${markovWeight}`);
  }
  for (const [name, values] of Object.entries({ curvature, target })) {
    const bad = values.find((value) => !Number.isFinite(value));
    if (bad !== undefined) throw new RangeError(`Cannot ${doing}: ${name} must be finite, got ${bad}`);
  }
  const diagonal = curvature.slice(), upper = new Float64Array((groups - 1) * n * n);
  const right = new Float64Array(groups * n);
  for (let i = 0; i < n; i++) {
    let mean = 0;
    for (let g = 0; g < groups; g++) mean += curvature[(g * n + i) * n + i]! / groups;
    const lambda = markovWeight * mean;
    for (let g = 0; g < groups; g++) {
      const neighbours = (g > 0 ? 1 : 0) + (g < groups - 1 ? 1 : 0);
      diagonal[(g * n + i) * n + i]! += lambda * neighbours;
      if (g < groups - 1) upper[(g * n + i) * n + i] = -lambda;
      for (let j = 0; j < n; j++) right[g * n + i]! += curvature[(g * n + i) * n + j]! * target[g * n + j]!;
    }
  }
  return solveBlockTridiagonal(diagonal, upper, right, n);
}
