/**
 * What solving takes at the shapes of a large model: rows of one matrix of each width are solved on made-up inputs, and the time of the
 * whole model is reckoned from that. No accuracy: the weights are random.
 */
import { gaussianWeights } from "./random.ts";
import { accumulateMoment, emptyMoments, factorMoments, solveLayer } from "../quant/mod.ts";
import { threadsOf } from "./settings.ts";
import type { BenchContext, Section } from "./suite.ts";

/** Matrices of a block of Dream 7B (https://huggingface.co/Dream-org/Dream-v0-Base-7B): rows, columns, how many. */
const SHAPES = [
  { name: "query, output", rows: 3584, cols: 3584, count: 2 },
  { name: "key, value", rows: 512, cols: 3584, count: 2 },
  { name: "gate, up", rows: 18_944, cols: 3584, count: 2 },
  { name: "down", rows: 3584, cols: 18_944, count: 1 },
] as const;
const BLOCKS = 28;
/** Width that is measured, and that which is reckoned from it: a second moment of 18 944 columns takes 1.4 GB. */
const WIDTH = 3584;
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

function measure({ kernels, options }: BenchContext, threads: number, width: number): Measured {
  const rows = options.quick ? QUICK_ROWS : ROWS;
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

/** Time of `best` a weight at Dream 7B's shapes, and of all its blocks, reckoned from rows of one width. */
export function solverSpeed(context: BenchContext, width = WIDTH): Section {
  const threads = threadsOf(context);
  const measured = measure(context, threads, width);
  // Products with the moment grow with its columns squared, its factor with their cube.
  const timeOf = ({ rows, cols }: { readonly rows: number; readonly cols: number }) => {
    const ratio = cols / width;
    return measured.factor * ratio ** 3 + measured.row * ratio ** 2 * rows;
  };
  const rowsOf = SHAPES.map((shape) => {
    const seconds = timeOf(shape);
    return {
      matrix: shape.name,
      shape: `${shape.rows} × ${shape.cols}`,
      source: shape.cols === width
        ? `from ${context.options.quick ? QUICK_ROWS : ROWS} of its rows`
        : "reckoned by width",
      seconds,
      nanoseconds: seconds * 1e9 / (shape.rows * shape.cols),
    };
  });
  const block = SHAPES.reduce((sum, shape) => sum + shape.count * timeOf(shape), 0);
  const hours = block * BLOCKS / 3600;
  return {
    title: "Time of best at Dream 7B's layer shapes, synthetic weights, no accuracy",
    notes: [
      `One candidate, 2 bits, groups of 64, ${threads} threads. A token's moment of ${width} columns takes ${
        (measured.token * 1e3).toFixed(2)
      } ms.`,
      `All ${BLOCKS} blocks: about ${
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
    rows: rowsOf,
  };
}
