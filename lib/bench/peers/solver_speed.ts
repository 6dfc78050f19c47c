/**
 * What solving takes at the shapes of a large model: rows of one matrix of each width are solved on made-up inputs, and the time of the
 * whole model is reckoned from that. No accuracy: the weights are random.
 */
import { gaussianWeights } from "../random.ts";
import { accumulateMoment, emptyMoments, factorMoments, solveLayer } from "../../quant/mod.ts";
import { threadsOf } from "../settings.ts";
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
/** Columns of what a block's matrices read: attention's inputs, its output, the feed-forward part's inputs, and inside it. */
const INPUTS = [3584, 3584, 3584, 18_944] as const;
/** Width that is measured, and that which is reckoned from it: a second moment of 18 944 columns takes 1.4 GB. */
const WIDTH = DREAM_7B.width;
/** Rows that are solved: a whole number of what the kernels take at once. */
const ROWS = 128, QUICK_ROWS = 64, TOKENS = 512;

/** Seconds of the parts of solving, measured at {@linkcode WIDTH} columns. */
interface Measured {
  /** Gathering one token's moment. */
  readonly token: number;
  readonly factor: number;
  /** Solving one row. */
  readonly row: number;
}

const solvedRows = ({ options: { quick } }: Pick<BenchContext, "options">) => quick ? QUICK_ROWS : ROWS;

function measure({ kernels, options }: BenchContext, threads: number, width: number): Measured {
  const rows = solvedRows({ options });
  const seconds = (run: () => void) => {
    const begin = performance.now();
    run();
    return (performance.now() - begin) / 1000;
  };
  const x = gaussianWeights(TOKENS * width, options.seed),
    weights = gaussianWeights(rows * width, options.seed + 1);
  const moments = emptyMoments(width);
  const gathering = seconds(() =>
    accumulateMoment(kernels, x, undefined, undefined, TOKENS, moments.second, threads)
  );
  moments.tokens = moments.weight = TOKENS;
  let moment: ReturnType<typeof factorMoments>;
  const factor = seconds(() => moment = factorMoments(kernels, moments, { threads }));
  const solving = seconds(() =>
    solveLayer(kernels, "best", weights, rows, width, moment, {
      bits: 2,
      groupSize: 64,
      zeroPoint: "real",
      threads,
    })
  );
  return { token: gathering / TOKENS, factor, row: solving / rows };
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

/** Measures `best` on rows of one width, and reckons the other shapes from that. */
export function solverTime(context: BenchContext, width: number = WIDTH): SolverTime {
  const measured = measure(context, threadsOf(context), width);
  // Products with the moment grow with its columns squared, its factor with their cube.
  const of: SolverTime["of"] = ({ rows, cols }) => {
    const ratio = cols / width;
    return measured.factor * ratio ** 3 + measured.row * ratio ** 2 * rows;
  };
  return {
    measured: measured.token * TOKENS + measured.factor + measured.row * solvedRows(context),
    token: measured.token,
    block: SHAPES.reduce((sum, shape) => sum + shape.count * of(shape), 0),
    blockToken: INPUTS.reduce((sum, cols) => sum + measured.token * (cols / width) ** 2, 0),
    of,
  };
}

/** Time of `best` a weight at Dream 7B's shapes, and of all its blocks, reckoned from rows of one width. */
export function solverSpeed(context: BenchContext, width: number = WIDTH): Section {
  const threads = threadsOf(context);
  const time = solverTime(context, width);
  const rows = SHAPES.map((shape) => {
    const seconds = time.of(shape);
    return {
      matrix: shape.name,
      shape: `${shape.rows} × ${shape.cols}`,
      source: shape.cols === width ? `from ${solvedRows(context)} of its rows` : "reckoned by width",
      seconds,
      nanoseconds: seconds * 1e9 / (shape.rows * shape.cols),
    };
  });
  const hours = time.block * DREAM_7B.blocks / 3600;
  return {
    title: "Time of best at Dream 7B's layer shapes, synthetic weights, no accuracy",
    notes: [
      `One candidate, 2 bits, groups of 64, ${threads} threads. A token's moment of ${width} columns takes ${
        (time.token * 1e3).toFixed(2)
      } ms.`,
      `All ${DREAM_7B.blocks} blocks: about ${
        hours.toFixed(1)
      } hours of solving (extrapolated), beside the model's own runs.`,
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
