/**
 * Rotations on both sides of a matrix: signs from a seed and Hadamard transforms of blocks, after which its
 * weights are about Gaussian and one scale serves them all. docs/format.md has the transform itself.
 */
import * as call from "../native/functions.ts";
import type { Kernels } from "../native/mod.ts";

type Floats = Float32Array<ArrayBuffer>;

const DOING = "rotate a matrix";

/** Columns of a block: the largest power of two that divides a side. */
export const rotationBlock = (side: number): number => side & -side;

/** Seed of a tensor's rows, whose own is that of its columns. */
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
  call.rotate(kernels, DOING, matrix, rows, cols, 1, seed, inverse, matrix);
  call.rotate(kernels, DOING, matrix, 1, rows, cols, ofRows(seed), inverse, matrix);
}

/** Makes the second moment of inputs that of rotated ones, in place. **Shapes** `moment: f32[cols, cols]` */
export function rotateMoment(kernels: Kernels, moment: Floats, cols: number, seed: number): void {
  call.rotate(kernels, DOING, moment, cols, cols, 1, seed, 0, moment);
  call.rotate(kernels, DOING, moment, 1, cols, cols, seed, 0, moment);
  // the two sides round differently
  for (let i = 0; i < cols; i++) {
    for (let j = 0; j < i; j++) moment[i * cols + j] = moment[j * cols + i]!;
  }
}
