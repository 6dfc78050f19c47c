/** Sums over inputs, a chunk at a time. */
import { afterAll, expect, test } from "bun:test";
import { openKernels } from "../../../lib/native/mod.ts";
import { MomentSums, type SumsShape } from "../../../lib/quant/solvers/moment_sums.ts";

const kernels = await openKernels({ threads: 1 });
afterAll(() => kernels.close());

/** Inputs of whole numbers, whose sums are exact. */
const inputsOf = (cols: number) => ({ x: Float32Array.from({ length: cols }, (_, i) => i + 1), tokens: 1 });

test("sums of other forms with as many numbers leave nothing in the scratch for each other", () => {
  const shapes: SumsShape[] = [
    { rows: 4, cols: 4, isSymmetric: true },
    { rows: 8, cols: 8, block: 2, isSymmetric: true },
    { rows: 4, cols: 4, isSymmetric: false },
    { rows: 2, cols: 8, isSymmetric: false },
  ];
  const alone = shapes.map((shape) => sumOf(shape, new MomentSums(shape)));
  for (const order of [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]]) {
    const spare = new Map();
    for (const i of order) {
      const shape = shapes[i]!, sums = new MomentSums(shape, undefined, spare);
      for (const own of [1, 2]) expect(sumOf(shape, sums)).toEqual(alone[i]!.map((value) => own * value));
    }
  }
});

/** Sums after one more chunk, symmetric ones on and above the diagonal, without giving the scratch back. */
function sumOf({ rows, cols, block = cols, isSymmetric }: SumsShape, sums: MomentSums): number[] {
  const y = isSymmetric ? undefined : inputsOf(rows).x;
  sums.add(kernels, { ...inputsOf(cols), y });
  sums.endChunk();
  const { totals } = sums;
  if (!isSymmetric) return [...totals];
  const upper: number[] = [];
  for (let at = 0; at < totals.length; at += block * block) {
    for (let i = 0; i < block; i++) {
      for (let k = i; k < block; k++) upper.push(totals[at + i * block + k]!);
    }
  }
  return upper;
}
