/**
 * Second moments of a layer's inputs: what calibration gathers and solvers solve against. lib/time gathers
 * them from a model's runs.
 */
import { checkCount, checkWhole } from "../../native/call.ts";
import { momentElements } from "../../native/call_checks.ts";
import * as call from "../../native/functions.ts";
import type { Kernels } from "../../native/mod.ts";

/** Largest number of columns of a moment: `AQ_MAX_SOLVER_COLS` of the kernels' header. */
export const MAX_MOMENT_COLS = 65_536;

/**
 * Weighted sums over the inputs x of a layer.
 *
 * **Shapes** `second`: Σ w x xᵀ, `f32[cols, cols]`, or its blocks on the diagonal one after the other,
 * `f32[block, block]` each, the last may be smaller
 */
export interface InputMoments {
  readonly cols: number;
  /** Columns of a block; all by default: one block. */
  readonly block?: number | undefined;
  /** Inputs that were added up, and the sum of their weights. */
  tokens: number;
  weight: number;
  readonly second: Float32Array<ArrayBuffer>;
}

/**
 * Moments of nothing yet, of all columns or of blocks of them.
 *
 * @throws {RangeError} when `cols` is not from 1 to {@linkcode MAX_MOMENT_COLS}, or `block` not from 1 to
 * `cols`
 */
export function emptyMoments(cols: number, block: number = cols): InputMoments {
  const doing = "gather moments";
  checkWhole(doing, "columns", cols, 1, MAX_MOMENT_COLS);
  checkWhole(doing, "columns of a block", block, 1, cols);
  return { cols, block, tokens: 0, weight: 0, second: new Float32Array(momentElements(cols, cols, block)) };
}

/** A block on the diagonal of a moment: its columns, and where its numbers begin. */
export interface MomentBlock {
  readonly first: number;
  readonly cols: number;
  readonly at: number;
}

/** The blocks of a moment. */
export function* momentBlocks(cols: number, block: number = cols): Generator<MomentBlock> {
  for (let first = 0, at = 0; first < cols; first += block) {
    const own = Math.min(block, cols - first);
    yield { first, cols: own, at };
    at += own * own;
  }
}

/** Moments of smaller blocks, of which the present ones are made. @throws {RangeError} when they are not */
export function narrowMoments(moments: InputMoments, block: number): InputMoments {
  const { cols, second } = moments, from = moments.block ?? cols;
  if (block === from) return moments;
  checkWhole("take blocks of a moment", "columns of a block", block, 1, from);
  if (from < cols && from % block !== 0) {
    throw new RangeError(
      `Cannot take blocks of a moment: columns of a block must divide ${from}, got ${block}`,
    );
  }
  const narrow = new Float32Array(momentElements(cols, cols, block));
  const targets = momentBlocks(cols, block);
  for (const { cols: width, at } of momentBlocks(cols, from)) {
    for (let begin = 0; begin < width;) {
      const { cols: own, at: to } = targets.next().value as MomentBlock;
      for (let i = 0; i < own; i++) {
        const row = at + (begin + i) * width + begin;
        narrow.set(second.subarray(row, row + own), to + i * own);
      }
      begin += own;
    }
  }
  return { ...moments, block, second: narrow };
}

/** Whether a moment is a multiple of the unit matrix, which rotations leave as it is. */
export function isUnitMoment(
  { cols, block, moment }: { readonly cols: number; readonly block: number; readonly moment: Float32Array },
): boolean {
  for (const { cols: own, at } of momentBlocks(cols, block)) {
    for (let k = 0; k < own * own; k++) {
      if (moment[at + k] !== (k % (own + 1) === 0 ? moment[0] : 0)) return false;
    }
  }
  return true;
}

/** Weight of each column by itself: the moment's diagonal. */
export function diagonalOf(
  moment: Float32Array | Float64Array,
  cols: number,
  block: number = cols,
): Float32Array<ArrayBuffer> {
  const diagonal = new Float32Array(cols);
  for (const { first, cols: own, at } of momentBlocks(cols, block)) {
    for (let k = 0; k < own; k++) diagonal[first + k] = moment[at + k * (own + 1)]!;
  }
  return diagonal;
}

/**
 * Adds Σ w y xᵀ to `out`; with no `y`, Σ w x xᵀ.
 *
 * **Shapes** `x: f32[tokens, cols]`, `y: f32[tokens, rows]`, `weights: f32[tokens]` → `out: f32[rows, cols]`,
 * added to. The same bytes whatever the threads and the instruction set.
 *
 * @param block columns of a block, where only those on the diagonal are kept; rows = cols then
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
  block?: number,
): void {
  const doing = "add to a moment";
  checkCount(doing, "tokens", tokens);
  const cols = tokens === 0 ? 0 : x.length / tokens;
  const rows = y === undefined ? cols : tokens === 0 ? 0 : y.length / tokens;
  const own = block ?? Math.max(1, cols), length = momentElements(rows, cols, own);
  if (
    !Number.isInteger(cols) || !Number.isInteger(rows) || out.length !== length && tokens > 0 ||
    weights !== undefined && weights.length !== tokens
  ) {
    throw new TypeError(
      `Cannot ${doing}: ${tokens} inputs of ${cols} columns must give ${rows} × ${cols} sums, ` +
        `got ${out.length} instead of ${length}, and ${weights?.length ?? tokens} weights`,
    );
  }
  call.accumulateMoment(kernels, doing, x, y, weights, tokens, rows, cols, own, out);
}
