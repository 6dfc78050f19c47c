/** A command that feeds errors back and refines codes, or searches for trellis codes, for minutes within one call of a kernel. */
import process from "node:process";
import { RandomStream } from "../../lib/models/random.ts";
import { factorMoments } from "../../lib/quant/solvers/factored_moment.ts";
import { accumulateMoment, emptyMoments } from "../../lib/quant/solvers/moments.ts";
import { DEFAULT_SOLVER_SETTINGS } from "../../lib/quant/solvers/settings.ts";
import { solveLayer } from "../../lib/quant/solvers/solve_layer.ts";
import type { Usage } from "../../scripts/_command/options.ts";
import { defineCommand } from "../../scripts/_command/run.ts";
import { openCommandKernels } from "../../scripts/_command/signals.ts";

const ROWS = 65536, COLS = 1024;

const usage = {
  name: "_long_solve.ts",
  operands: "CODES",
  about: "",
  options: {},
} as const satisfies Usage;

await defineCommand(usage, async (parsed) => {
  const [codes] = parsed.operands("CODES");
  using kernels = await openCommandKernels({ threads: 1 });
  const x = new Float32Array(64 * COLS),
    row = new Float32Array(COLS),
    weights = new Float32Array(ROWS * COLS);
  new RandomStream(1).fillNormal(x);
  new RandomStream(2).fillNormal(row);
  for (let i = 0; i < ROWS; i++) weights.set(row, i * COLS);
  const moments = emptyMoments(COLS);
  accumulateMoment(kernels, x, undefined, undefined, 64, moments.second);
  moments.tokens = moments.weight = 64;
  const moment = factorMoments(kernels, moments, { damping: 0.01 });
  const trellis = codes === "trellis" ? { codes, scaleBits: 16 } as const : {};
  const format = { bits: 2, groupSize: 128, zeroPoint: "real", ...trellis } as const;
  process.stderr.write("solving\n");
  solveLayer(kernels, "best", { weights, rows: ROWS, cols: COLS, moment, ...format }, {
    ...DEFAULT_SOLVER_SETTINGS,
    rounds: 64,
  });
  process.stderr.write("solved\n");
})();
