/**
 * Second moments of a layer's inputs: what calibration gathers and solvers solve against. lib/time gathers
 * them from a model's runs.
 */
import { checkCount, checkWhole } from "../../native/call.ts";
import * as call from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";

/** Largest number of columns of a moment: `AQ_MAX_SOLVER_COLS` of the kernels' header. */
export const MAX_MOMENT_COLS = 65_536;

/**
 * Weighted sums over the inputs x of a layer.
 *
 * **Shapes** `second: f32[cols, cols]`, Σ w x xᵀ
 */
export interface InputMoments {
  readonly cols: number;
  /** Inputs that were added up, and the sum of their weights. */
  tokens: number;
  weight: number;
  readonly second: Float32Array<ArrayBuffer>;
}

/** Moments of nothing yet. @throws {RangeError} when `cols` is not from 1 to {@linkcode MAX_MOMENT_COLS} */
export function emptyMoments(cols: number): InputMoments {
  checkWhole("gather moments", "columns", cols, 1, MAX_MOMENT_COLS);
  return { cols, tokens: 0, weight: 0, second: new Float32Array(cols * cols) };
}

/**
 * Adds Σ w y xᵀ to `out`; with no `y`, Σ w x xᵀ.
 *
 * **Shapes** `x: f32[tokens, cols]`, `y: f32[tokens, rows]`, `weights: f32[tokens]` → `out: f32[rows, cols]`,
 * added to. The same bytes whatever the threads and the instruction set.
 *
 * @throws {TypeError} when an array has another type or length than the shapes ask for
 */
export function accumulateMoment(
  kernels: Kernels,
  x: Float32Array,
  y: Float32Array | undefined,
  weights: Float32Array | undefined,
  tokens: number,
  out: Float32Array,
): void {
  const doing = "add to a moment";
  checkCount(doing, "tokens", tokens);
  const cols = tokens === 0 ? 0 : x.length / tokens;
  const rows = y === undefined ? cols : tokens === 0 ? 0 : y.length / tokens;
  if (
    !Number.isInteger(cols) || !Number.isInteger(rows) || out.length !== rows * cols && tokens > 0 ||
    weights !== undefined && weights.length !== tokens
  ) {
    throw new TypeError(
      `Cannot ${doing}: ${tokens} inputs of ${cols} columns must give ${rows} × ${cols} sums, ` +
        `got ${out.length}, and ${weights?.length ?? tokens} weights`,
    );
  }
  call.accumulateMoment(kernels, doing, x, y, weights, tokens, rows, cols, out);
}
