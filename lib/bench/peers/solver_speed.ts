/**
 * Time of solving at the shapes of a large model: rows of one width are solved on synthetic inputs, and the
 * time of the whole model is extrapolated from that. No accuracy: the weights are random.
 */
import { gaussianWeights } from "../random.ts";
import { accumulateMoment, emptyMoments, factorMoments, solveLayer } from "../../quant/mod.ts";
import type { BenchContext, Section } from "../suite.ts";

/** Dream 7B (https://huggingface.co/Dream-org/Dream-v0-Base-7B). */
export const DREAM_7B = { width: 3584, blocks: 28, vocabulary: 152_064 } as const;
/** Matrices of its blocks: rows, columns, how many. */
const SHAPES = [
  { name: "query, output", rows: 3584, cols: 3584, count: 2 },
  { name: "key, value", rows: 512, cols: 3584, count: 2 },
  { name: "gate, up", rows: 18_944, cols: 3584, count: 2 },
  { name: "down", rows: 3584, cols: 18_944, count: 1 },
] as const;
/**
 * Columns of the inputs of a block's matrices: of attention and its output, of the feed-forward part and
 * inside it.
 */
const INPUTS = [3584, 3584, 3584, 18_944] as const;
/** Width that is measured; others are extrapolated: a second moment of 18 944 columns takes 1.4 GB. */
const WIDTH = DREAM_7B.width;
/** Rows that are solved: a whole number of what the kernels take at once. */
const ROWS = 128, QUICK_ROWS = 64, TOKENS = 512;

const solvedRows = ({ options: { quick } }: Pick<BenchContext, "options">) => quick ? QUICK_ROWS : ROWS;

function secondsOf(run: () => void): number {
  const begin = performance.now();
  run();
  return (performance.now() - begin) / 1000;
}

/** Seconds of solving at Dream 7B's shapes. */
export interface SolverTime {
  /** Everything that was measured. */
  readonly measured: number;
  /** Gathering one token's moment of the measured width. */
  readonly token: number;
  /** Of one block's matrices, one candidate. */
  readonly block: number;
  /** Gathering one token's moments for a block's four kinds of inputs. */
  readonly blockToken: number;
  of(shape: { readonly rows: number; readonly cols: number }): number;
}

/**
 * Measures `best` on rows of one width; products with the moment grow with columns², its factor with
 * columns³.
 */
export function solverTime(context: BenchContext, width: number = WIDTH): SolverTime {
  const { kernels, options: { seed } } = context, rows = solvedRows(context);
  const x = gaussianWeights(TOKENS * width, seed), weights = gaussianWeights(rows * width, seed + 1);
  const moments = { ...emptyMoments(width), tokens: TOKENS, weight: TOKENS };
  const gathering = secondsOf(() =>
    accumulateMoment(kernels, x, undefined, undefined, TOKENS, moments.second)
  );
  let moment: ReturnType<typeof factorMoments>;
  const factor = secondsOf(() => moment = factorMoments(kernels, moments));
  const grid = { bits: 2, groupSize: 64, zeroPoint: "real" } as const;
  const solving = secondsOf(() =>
    solveLayer(kernels, "best", { weights, rows, cols: width, moment, ...grid })
  );
  const of: SolverTime["of"] = ({ rows: height, cols }) => {
    const ratio = cols / width;
    return factor * ratio ** 3 + solving / rows * ratio ** 2 * height;
  };
  const token = gathering / TOKENS;
  return {
    measured: gathering + factor + solving,
    token,
    block: SHAPES.reduce((sum, shape) => sum + shape.count * of(shape), 0),
    blockToken: INPUTS.reduce((sum, cols) => sum + token * (cols / width) ** 2, 0),
    of,
  };
}

/** Table of the time of `best` at Dream 7B's shapes, extrapolated from rows of one width. */
export function solverSpeed(context: BenchContext, width: number = WIDTH): Section {
  const time = solverTime(context, width);
  const rows = SHAPES.map((shape) => {
    const seconds = time.of(shape);
    return {
      matrix: shape.name,
      shape: `${shape.rows} × ${shape.cols}`,
      source: shape.cols === width ? `from ${solvedRows(context)} of its rows` : "extrapolated by width",
      seconds,
      nanoseconds: seconds * 1e9 / (shape.rows * shape.cols),
    };
  });
  const hours = (time.block * DREAM_7B.blocks / 3600).toFixed(1),
    milliseconds = (time.token * 1e3).toFixed(2);
  return {
    title: "Time of best at Dream 7B's layer shapes, synthetic weights, no accuracy",
    notes: [
      `One candidate, 2 bits, groups of 64, ${context.kernels.threads} threads. A token's moment of ${width} columns takes ${milliseconds} ms.`,
      `All ${DREAM_7B.blocks} blocks: about ${hours} hours of solving (extrapolated), beside the model's own runs.`,
    ],
    columns: [
      { key: "matrix", title: "matrix" },
      { key: "shape", title: "shape" },
      { key: "source", title: "measured" },
      { key: "seconds", title: "s", digits: 1 },
      { key: "nanoseconds", title: "ns/weight", digits: 1 },
    ],
    rows,
  };
}
