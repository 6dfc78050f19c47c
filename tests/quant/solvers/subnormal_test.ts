/** Second moments whose numbers fall below the smallest normal float32. */
import { afterAll, describe, expect, test } from "bun:test";
import { openKernels } from "../../../lib/native/mod.ts";
import { factorMoments } from "../../../lib/quant/solvers/factored_moment.ts";
import { solveLayer } from "../../../lib/quant/solvers/solve_layer.ts";
import { gaussian } from "../../_checkpoints.ts";

const kernels = await openKernels({ threads: 1 });
afterAll(() => kernels.close());

const COLS = 512, ROWS = 16;
const isSubnormal = (value: number) => value !== 0 && Math.abs(value) < 2 ** -126;

/** The moment of inputs whose correlation halves from column to column, in one scale. */
function factored(scale: number) {
  const second = new Float32Array(COLS * COLS);
  for (let i = 0; i < COLS; i++) {
    for (let k = 0; k < COLS; k++) second[i * COLS + k] = scale * 0.7 ** Math.abs(i - k);
  }
  const moment = factorMoments(kernels, { cols: COLS, block: COLS, second, tokens: 4 * COLS, weight: 1 });
  return { second, moment };
}

const codes = (scale: number) => {
  const weights = gaussian(ROWS * COLS, 3), { moment } = factored(scale);
  const form = { bits: 3, groupSize: 32, zeroPoint: "real" } as const;
  return solveLayer(kernels, "best", { weights, rows: ROWS, cols: COLS, moment, ...form }).tensor.packed;
};

describe("subnormal numbers of a moment", () => {
  test("kernels are given none where its inputs have an ordinary size", () => {
    const { second, moment } = factored(1);
    expect(second.some(isSubnormal)).toBe(true);
    for (const key of ["moment", "factor", "pivots"] as const) {
      expect(moment[key].some(isSubnormal)).toBe(false);
    }
  });

  test("are kept where all its numbers are tiny: the codes are those of the moment in another scale", () => {
    expect(factored(2 ** -125).second.some(isSubnormal)).toBe(true);
    expect(codes(2 ** -125)).toEqual(codes(1));
  });
});
