/**
 * Time of solving at the shapes of a large model: rows of one width are solved on synthetic inputs, and the
 * time of the whole model is extrapolated from that. No accuracy: the weights are random.
 */
import { gaussianWeights } from "../random.ts";
import { accumulateMoment, emptyMoments, factorMoments, solveLayer } from "../../quant/mod.ts";
import { type BenchContext, type Section, tableOf } from "../suite.ts";
import { secondsOf } from "../timing.ts";

/** Dream 7B (https://huggingface.co/Dream-org/Dream-v0-Base-7B). */
export const DREAM_7B = { width: 3584, blocks: 28 } as const;
/** Matrices of its blocks: rows, columns, how many. */
const SHAPES = [
  { name: "query, output", rows: 3584, cols: 3584, count: 2 },
  { name: "key, value", rows: 512, cols: 3584, count: 2 },
  { name: "gate, up", rows: 18_944, cols: 3584, count: 2 },
  { name: "down", rows: 3584, cols: 18_944, count: 1 },
] as const;
/** Width that is measured; others are extrapolated: a second moment of 18 944 columns takes 1.4 GB. */
const WIDTH = DREAM_7B.width;
/** Rows that are solved: a whole number of what the kernels take at once. */
const ROWS = 128, QUICK_ROWS = 64, TOKENS = 512;

/** Seconds of solving `best` on rows of one width: of gathering a token, of factoring, of a row. */
function measure({ kernels, options: { seed } }: BenchContext, rows: number, width: number) {
  const x = gaussianWeights(TOKENS * width, seed), weights = gaussianWeights(rows * width, seed + 1);
  const moments = { ...emptyMoments(width), tokens: TOKENS, weight: TOKENS };
  const gathering = secondsOf(() =>
    accumulateMoment(kernels, x, undefined, undefined, TOKENS, moments.second)
  );
  let moment: ReturnType<typeof factorMoments>;
  const factor = secondsOf(() => moment = factorMoments(kernels, moments));
  const options = { bits: 2, groupSize: 64, zeroPoint: "real" } as const;
  const solving = secondsOf(() =>
    solveLayer(kernels, "best", { weights, rows, cols: width, moment, ...options })
  );
  return { token: gathering / TOKENS, factor, row: solving / rows };
}

/** Table of the time of `best` at Dream 7B's shapes, extrapolated from rows of one width. */
export function solverSpeed(context: BenchContext, width: number = WIDTH): Section {
  const solvedRows = context.options.quick ? QUICK_ROWS : ROWS;
  const { token, factor, row } = measure(context, solvedRows, width);
  // Products with the moment grow with its columns squared, its factor with their cube.
  const secondsAt = (rows: number, ratio: number) => factor * ratio ** 3 + row * ratio ** 2 * rows;
  const matrices = SHAPES.map((shape) => ({ ...shape, seconds: secondsAt(shape.rows, shape.cols / width) }));
  const block = matrices.reduce((sum, { seconds, count }) => sum + count * seconds, 0);
  const hours = (block * DREAM_7B.blocks / 3600).toFixed(1), milliseconds = (token * 1e3).toFixed(2);
  const source = (cols: number) =>
    cols === width ? `from ${solvedRows} of its rows` : "extrapolated by width";
  return tableOf(
    "Time of best at Dream 7B's layer shapes, synthetic weights, no accuracy",
    [
      `One candidate, 2 bits, groups of 64, ${context.kernels.threads} threads. A token's moment of ${width} columns takes ` +
      `${milliseconds} ms.`,
      `All ${DREAM_7B.blocks} blocks: about ${hours} hours of solving (extrapolated), beside the model's own runs.`,
    ],
    matrices,
    [
      ["matrix", "matrix", ({ name }) => name],
      ["shape", "shape", ({ rows, cols }) => `${rows} × ${cols}`],
      ["source", "measured", ({ cols }) => source(cols)],
      ["seconds", "s", ({ seconds }) => seconds, 1],
      ["nanoseconds", "ns/weight", ({ rows, cols, seconds }) => seconds * 1e9 / (rows * cols), 1],
    ],
  );
}
