/**
 * Rotations on both sides of a matrix: signs from a seed and Hadamard transforms of blocks, after which its
 * weights are about Gaussian and one scale serves them all. docs/format.md has the transform itself.
 */
import * as call from "../native/functions.ts";
import type { Kernels } from "../native/mod.ts";
import { callBlocks } from "./weights.ts";

type Floats = Float32Array<ArrayBuffer>;

const DOING = "rotate a matrix";

/** Columns of a block: the largest power of two that divides a side. */
export const rotationBlock = (side: number): number => side & -side;

/** The seed for the rows of a tensor; the tensor's seed itself is for its columns. */
const ofRows = (seed: number): number => ~seed;

/** Rotates what a layer reads. **Shapes** `x, out: f32[tokens, cols]`; `out` may be `x` */
export function rotateInputs(
  kernels: Kernels,
  x: Float32Array,
  tokens: number,
  cols: number,
  seed: number,
  out: Floats,
): void {
  call.rotate(kernels, DOING, x, tokens, cols, 1, seed, 0, out);
}

/** The outputs of a layer from those of its rotated weights, in place. **Shapes** `y: f32[tokens, rows]` */
export function restoreOutputs(
  kernels: Kernels,
  y: Floats,
  tokens: number,
  rows: number,
  seed: number,
): void {
  call.rotate(kernels, DOING, y, tokens, rows, 1, ofRows(seed), 1, y);
}

/** Rotates both sides of a matrix, in place, or takes that back. **Shapes** `matrix: f32[rows, cols]` */
export function rotateMatrix(
  kernels: Kernels,
  matrix: Floats,
  rows: number,
  cols: number,
  seed: number,
  direction: "forth" | "back",
): void {
  const inverse = direction === "back" ? 1 : 0;
  rotateColumns(kernels, matrix, rows, cols, seed, inverse);
  rotateRows(kernels, matrix, rows, cols, ofRows(seed), inverse);
}

/** Rotates each row by itself, in place, in blocks of rows. */
function rotateColumns(
  kernels: Kernels,
  matrix: Floats,
  rows: number,
  cols: number,
  seed: number,
  inverse: 0 | 1,
): void {
  for (const [begin, end] of callBlocks(kernels, rows, cols)) {
    const part = matrix.subarray(begin * cols, end * cols);
    call.rotate(kernels, DOING, part, end - begin, cols, 1, seed, inverse, part);
  }
}

/** Rotates each column by itself, in place, in panels of columns: copies where there are several. */
function rotateRows(
  kernels: Kernels,
  matrix: Floats,
  rows: number,
  cols: number,
  seed: number,
  inverse: 0 | 1,
): void {
  let memory: Floats | undefined;
  for (const [begin, end] of callBlocks(kernels, cols, rows)) {
    const width = end - begin;
    if (width === cols) return call.rotate(kernels, DOING, matrix, 1, rows, cols, seed, inverse, matrix);
    memory ??= new Float32Array(rows * width); // the last panel may be narrower
    const panel = memory.subarray(0, rows * width);
    for (let row = 0; row < rows; row++) {
      panel.set(matrix.subarray(row * cols + begin, row * cols + end), row * width);
    }
    call.rotate(kernels, DOING, panel, 1, rows, width, seed, inverse, panel);
    for (let row = 0; row < rows; row++) {
      matrix.set(panel.subarray(row * width, (row + 1) * width), row * cols + begin);
    }
  }
}

/** Makes the second moment of inputs that of rotated ones, in place. **Shapes** `moment: f32[cols, cols]` */
export function rotateMoment(kernels: Kernels, moment: Floats, cols: number, seed: number): void {
  rotateColumns(kernels, moment, cols, cols, seed, 0);
  rotateRows(kernels, moment, cols, cols, seed, 0);
  // the two sides round differently
  for (let i = 0; i < cols; i++) {
    for (let j = 0; j < i; j++) moment[i * cols + j] = moment[j * cols + i]!;
  }
}
