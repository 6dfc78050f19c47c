import { afterAll, expect, test } from "bun:test";
import { openKernels } from "../../../lib/native/mod.ts";
import { factorMoments } from "../../../lib/quant/solvers/factored_moment.ts";
import { accumulateMoment, emptyMoments } from "../../../lib/quant/solvers/moments.ts";
import { DEFAULT_SOLVER_SETTINGS } from "../../../lib/quant/solvers/settings.ts";
import { solveLayer } from "../../../lib/quant/solvers/solve_layer.ts";
import { gaussian } from "../../_checkpoints.ts";

const kernels = await openKernels({ threads: 1 });
afterAll(() => kernels.close());

test("a solver says how much of a layer is done, up to all of it", () => {
  const rows = 3, cols = 8, moments = emptyMoments(cols);
  accumulateMoment(kernels, gaussian(16 * cols, 1), undefined, undefined, 16, moments.second);
  moments.tokens = moments.weight = 16;
  const moment = factorMoments(kernels, moments), weights = gaussian(rows * cols, 2);
  for (const annealing of [0, 0.5]) {
    const shares: number[] = [], onShare = (share: number) => shares.push(share);
    const problem = {
      weights,
      rows,
      cols,
      moment,
      bits: 2,
      groupSize: 0,
      zeroPoint: "real",
      onShare,
    } as const;
    solveLayer(kernels, "best", problem, { ...DEFAULT_SOLVER_SETTINGS, annealing });
    expect(shares.length).toBeGreaterThan(5);
    expect(shares[0]).toBeLessThan(0.2);
    expect(shares.at(-1)).toBe(1);
    expect(shares).toEqual([...shares].sort((a, b) => a - b));
  }
});
