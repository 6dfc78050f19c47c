/**
 * The suite of the calibrated solver's speed: its kernels at the widths of Dream 7B as shares of the same run's own
 * product of matrices (SGEMM), whole runs of `best`, and a forecast for published models from the rates of this run.
 * Weights and inputs are random: no accuracy.
 */
import { join } from "node:path";
import { chooseMoment } from "../../calibration/moment_structure.ts";
import { resolveConfig } from "../../config/mod.ts";
import type { Effort } from "../../config/names.ts";
import { nameOfPath } from "../../files/whole.ts";
import { limitsOf } from "../../files/limits.ts";
import { forwardCost, requirementsAt } from "../../models/mod.ts";
import { type Kernels, withThreads } from "../../native/mod.ts";
import { quantizeCheckpoint } from "../../pipeline/mod.ts";
import { correctedTarget, factorMoments, solveLayer } from "../../quant/mod.ts";
import { settingsFor } from "../../quant/solvers/effort.ts";
import { addProduct } from "../../quant/product.ts";
import { accumulateMoment, emptyMoments } from "../../quant/solvers/moments.ts";
import { DEFAULT_SOLVER_SETTINGS, type SolverSettings } from "../../quant/solvers/settings.ts";
import { commandsOf, runChild } from "../child_process.ts";
import { gaussianWeights } from "../random.ts";
import {
  type BenchContext,
  type Goal,
  type Section,
  type Skipped,
  type Suite,
  type SuiteReport,
  tableOf,
} from "../suite.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";
import { secondsOf } from "../timing.ts";
import { type LayerShape, SOLVER_SPEED_PARTS, type SolverSpeedPart } from "../options.ts";
import { type Blas, openBlas } from "./blas.ts";
import { type CountedKernels, countedKernels, type KernelTotals } from "./counted.ts";
import { type EffortForm, type EffortRow, effortSection, type EffortShape, measureEffort } from "./effort.ts";
import {
  measureFromStatistics,
  statisticsGoals,
  type StatisticsRow,
  statisticsSection,
} from "./from_statistics.ts";

/** A layer whose kernels are measured: rows and columns, inputs, and how much of `best` is run. */
interface MeasuredShape extends LayerShape {
  readonly tokens: number;
  readonly samples: number;
  readonly settings: Partial<SolverSettings>;
}

/** Sizes of the suite. */
export interface SolverSpeedScale {
  readonly shapes: readonly MeasuredShape[];
  /** Rows of each width that are solved for the forecast, and inputs of its moments. */
  readonly solvedRows: number;
  readonly gatheredTokens: number;
  /** Share of the published widths, for tests. */
  readonly width: number;
  /** Width of the two-layer model that is quantized; undefined leaves it out. */
  readonly hidden: number | undefined;
  /** Most models that are quantized beside it. */
  readonly models: number;
  /** Layer that is solved with more and more steps. */
  readonly effort: EffortShape;
  /** Width of the block that is solved from statistics. */
  readonly statistics: number;
}

/** Columns from which a layer is measured once, with fewer inputs. */
const WIDE = 8192;

/** One start and one round: the kernels' rates are those of all. */
const ONE_ROUND = { ratios: [], rounds: 1 };
const FULL_SCALE: SolverSpeedScale = {
  shapes: [
    { rows: 3584, cols: 3584, tokens: 4096, samples: 3, settings: { ratios: [], rounds: 2 } },
    { rows: 3584, cols: 18_944, tokens: 1024, samples: 1, settings: ONE_ROUND },
  ],
  solvedRows: 512,
  gatheredTokens: 1024,
  width: 1,
  hidden: 1792,
  models: Infinity,
  effort: { rows: 1024, cols: 2048, tokens: 4096 },
  statistics: 3072,
};
const QUICK_SCALE: SolverSpeedScale = {
  shapes: [
    { rows: 1024, cols: 1024, tokens: 1024, samples: 3, settings: ONE_ROUND },
    { rows: 512, cols: 4736, tokens: 512, samples: 1, settings: ONE_ROUND },
  ],
  solvedRows: 128,
  gatheredTokens: 512,
  width: 0.25,
  hidden: undefined,
  models: 1,
  effort: { rows: 512, cols: 512, tokens: 1024 },
  statistics: 512,
};

/** Bits, groups and calibration positions of everything that is solved here. */
const FORM = { bits: 2, groupSize: 64, zeroPoint: "real" } as const;
const POSITIONS = 4096;
/** Forms of the layer that is solved with more and more steps. */
const EFFORT_FORMS: readonly EffortForm[] = [
  { bits: 2, groupSize: 0 },
  { bits: 2, groupSize: 64 },
  { bits: 4, groupSize: 64 },
];

/** Shares of the product's rate that are wanted. */
const KERNEL_SHARE = 0.6, SOLVE_SHARE = 0.5;
const HALF_WIDTH_SECONDS = 60;
/** Seconds of the reference models before the solver was made of products. */
const REFERENCE_SECONDS: Readonly<Record<string, number>> = { "dream-mini": 8, "glyph-dit": 20 };

/** Kernels by what they do for the solver. */
const STEPS = {
  moments: ["accumulate_moment"],
  factorization: ["factor_moment"],
  "corrected targets": ["multiply", "solve_moment"],
  feedback: ["quantize_feedback"],
  refinement: ["refine_codes"],
} as const;
type SolverStep = keyof typeof STEPS | "whole solve";
/** Products that the steps are held against, and another library's. */
const PRODUCT = "product (SGEMM)", PEER_PRODUCT = "product, OpenBLAS";
type Step = SolverStep | typeof PRODUCT | typeof PEER_PRODUCT;

interface MeasuredStep {
  readonly rows: number;
  readonly cols: number;
  readonly step: Step;
  readonly flops: number;
  readonly seconds: number;
  /** Rate as a share of the product's, timed before and after it. */
  readonly share: number;
}

const median = (values: readonly number[]): number => [...values].sort((a, b) => a - b)[values.length >> 1]!;

/** `count` Gaussian numbers of which few are made. */
function numbersLike(count: number, seed: number): Float32Array<ArrayBuffer> {
  const made = gaussianWeights(Math.min(count, 2 ** 20), seed, 1), out = new Float32Array(count);
  for (let at = 0; at < count; at += made.length) {
    out.set(made.subarray(0, Math.min(made.length, count - at)), at);
  }
  return out;
}

/** Most columns of the product that the others are held against. */
const PRODUCT_COLUMNS = 2048;

/** Operations and seconds of a product `[rows, cols] × [cols, n]` of ours and, where it is there, of OpenBLAS. */
function productsOf(
  kernels: Kernels,
  blas: Blas | undefined,
  a: Float32Array,
  b: Float32Array,
  { rows, cols, samples }: MeasuredShape,
): MeasuredStep[] {
  const n = b.length / cols, flops = 2 * rows * cols * n, common = { rows, cols, flops };
  const own: number[] = [], peer: number[] = [];
  for (let sample = 0; sample < samples; sample++) {
    const out = new Float32Array(rows * n), other = new Float32Array(blas === undefined ? 0 : rows * n);
    own.push(
      secondsOf(() => addProduct(kernels, "time a product", a, b, { rows, k: cols, cols: n }, out)),
    );
    if (blas === undefined) continue;
    peer.push(secondsOf(() => blas.sgemm(a, b, rows, cols, n, other)));
    checkAlike(out, other);
  }
  const ours: MeasuredStep = { ...common, step: PRODUCT, seconds: median(own), share: 1 };
  if (blas === undefined) return [ours];
  const share = median(peer.map((seconds, i) => own[i]! / seconds));
  return [ours, { ...common, step: PEER_PRODUCT, seconds: median(peer), share }];
}

/** @throws when two products differ by more than sums in another order do */
function checkAlike(one: Float32Array, other: Float32Array): void {
  let error = 0, size = 0;
  for (let i = 0; i < one.length; i += 97) {
    error += (one[i]! - other[i]!) ** 2;
    size += other[i]! ** 2;
  }
  if (!(error <= 1e-8 * size)) {
    throw new Error(`Cannot time OpenBLAS: products must agree, got ${error} of ${size}`);
  }
}

/** Operations a second of `[rows, cols] × [cols, n]`. */
function productRate(kernels: Kernels, a: Float32Array, b: Float32Array, rows: number, cols: number): number {
  const n = b.length / cols, out = new Float32Array(rows * n);
  const seconds = secondsOf(() =>
    addProduct(kernels, "time a product", a, b, { rows, k: cols, cols: n }, out)
  );
  return 2 * rows * cols * n / seconds;
}

/** Bytes that a shape's arrays take at once: the moment and its factor, a layer in its forms, inputs and a product. */
const bytesOf = ({ rows, cols, tokens }: MeasuredShape): number =>
  4 * (2 * cols * cols + 6 * rows * cols + tokens * cols + Math.min(cols, PRODUCT_COLUMNS) * cols);

/** Every step of solving a layer with a whole moment, beside the product. */
function measureShape(
  { kernels, take }: CountedKernels,
  blas: Blas | undefined,
  shape: MeasuredShape,
  { seed, progress }: { readonly seed: number; readonly progress: (step: string) => void },
): MeasuredStep[] {
  const { rows, cols, tokens, samples, settings } = shape;
  progress("product");
  const x = numbersLike(tokens * cols, seed), weights = numbersLike(rows * cols, seed + 1);
  const b = numbersLike(cols * Math.min(cols, PRODUCT_COLUMNS), seed + 2);
  const rate = () => productRate(kernels, weights, b, rows, cols);
  const products = productsOf(kernels, blas, weights, b, shape), measured: MeasuredStep[][] = [];
  for (let sample = 0; sample < samples; sample++) {
    const moments = { ...emptyMoments(cols), tokens, weight: tokens }, steps: MeasuredStep[] = [];
    let before = rate();
    const time = <T>(
      wanted: readonly (keyof typeof STEPS)[],
      run: () => T,
    ): { readonly result: T; readonly seconds: number } => {
      progress(`${wanted.join(" and ")}${samples > 1 ? `, ${sample + 1} of ${samples}` : ""}`);
      take();
      const begin = performance.now(), result = run(), seconds = (performance.now() - begin) / 1000;
      const totals = take(), after = rate(), product = (before + after) / 2;
      before = after;
      for (const step of wanted) {
        const own = sumOf(totals, STEPS[step]);
        steps.push({ rows, cols, step, ...own, share: own.flops / own.seconds / product });
      }
      if (wanted.includes("feedback")) {
        const all = sumOf(totals, [...totals.keys()]).flops;
        steps.push({ rows, cols, step: "whole solve", flops: all, seconds, share: all / seconds / product });
      }
      return { result, seconds };
    };
    time(["moments"], () => accumulateMoment(kernels, x, undefined, undefined, tokens, moments.second));
    const { result: moment } = time(
      ["factorization"],
      () => factorMoments(kernels, moments, { takesSums: true }),
    );
    // What inputs lost: any matrix takes the same time, and another one of 18,944 columns 1.4 GB.
    const problem = { weights, rows, moment, cross: moment.moment };
    const { result: target } = time(
      ["corrected targets"],
      () => correctedTarget(kernels, problem, DEFAULT_SOLVER_SETTINGS),
    );
    time(
      ["feedback", "refinement"],
      () =>
        solveLayer(kernels, "best", { weights: target, rows, cols, moment, ...FORM }, {
          ...DEFAULT_SOLVER_SETTINGS,
          ...settings,
        }),
    );
    measured.push(steps);
  }
  return [
    ...products,
    ...measured[0]!.map((first, i): MeasuredStep => ({
      ...first,
      seconds: median(measured.map((steps) => steps[i]!.seconds)),
      share: median(measured.map((steps) => steps[i]!.share)),
    })),
  ];
}

function sumOf(totals: ReadonlyMap<string, KernelTotals>, names: readonly string[]): KernelTotals {
  const own = names.map((name) => totals.get(name) ?? { flops: 0, seconds: 0 });
  return {
    flops: own.reduce((sum, { flops }) => sum + flops, 0),
    seconds: own.reduce((sum, { seconds }) => sum + seconds, 0),
  };
}

// Whole models ----------------------------------------------------------------------------------------------

/** A published model's block: its inputs with the rows of each layer that reads them. */
interface PublishedModel {
  readonly name: string;
  readonly blocks: number;
  readonly inputs: readonly {
    readonly cols: number;
    readonly rows: readonly number[];
    /** Whether the outputs are added to the stream, whose loss is corrected too. */
    readonly isStream: boolean;
  }[];
  /** Minutes that are wanted, by effort. */
  readonly goals: Readonly<Partial<Record<Effort, number>>>;
}

const PUBLISHED: readonly PublishedModel[] = [
  {
    name: "Dream 7B",
    blocks: 28,
    inputs: [
      { cols: 3584, rows: [3584, 512, 512], isStream: false },
      { cols: 3584, rows: [3584], isStream: true },
      { cols: 3584, rows: [18_944, 18_944], isStream: false },
      { cols: 18_944, rows: [3584], isStream: true },
    ],
    goals: { medium: 120, low: 40 },
  },
  {
    name: "LLaDA 8B",
    blocks: 32,
    inputs: [
      { cols: 4096, rows: [4096, 4096, 4096], isStream: false },
      { cols: 4096, rows: [4096], isStream: true },
      { cols: 4096, rows: [12_288, 12_288], isStream: false },
      { cols: 12_288, rows: [4096], isStream: true },
    ],
    goals: { medium: 120 },
  },
  {
    name: "DiT-XL/2",
    blocks: 28,
    inputs: [
      { cols: 1152, rows: [6912], isStream: false },
      { cols: 1152, rows: [1152, 1152, 1152], isStream: false },
      { cols: 1152, rows: [1152], isStream: true },
      { cols: 1152, rows: [4608], isStream: false },
      { cols: 4608, rows: [1152], isStream: true },
    ],
    goals: { medium: 12 },
  },
];

/** Seconds of solving at a width: for an input of all layers, and for a row. */
interface WidthTimes {
  readonly cols: number;
  /** Columns of a block of the moment. */
  readonly block: number;
  /** Of a position: the moment and what inputs lost; what a row of a layer lost of the stream. */
  readonly position: number;
  readonly streamRow: number;
  readonly forwardRow: number;
  readonly factor: number;
  /** Of a row's corrected target, and of its solution by effort. */
  readonly target: number;
  readonly row: Readonly<Partial<Record<Effort, number>>>;
}

/** Solves rows of a width as a run by default does, with each effort that some layer gets. */
function measureWidth(
  kernels: Kernels,
  cols: number,
  efforts: Iterable<Effort>,
  { solvedRows: rows, gatheredTokens: tokens }: SolverSpeedScale,
  seed: number,
): WidthTimes {
  const { block } = momentOf(cols);
  const x = numbersLike(tokens * cols, seed), weights = numbersLike(rows * cols, seed + 1);
  const moments = { ...emptyMoments(cols, block), tokens, weight: tokens };
  const cross = new Float32Array(moments.second.length), residual = new Float32Array(rows * cols);
  const lost = numbersLike(tokens * rows, seed + 3);
  const gather = secondsOf(() => {
    accumulateMoment(kernels, x, undefined, undefined, tokens, moments.second, block);
    accumulateMoment(kernels, x, x, undefined, tokens, cross, block);
  });
  const stream = secondsOf(() => accumulateMoment(kernels, x, lost, undefined, tokens, residual));
  const size = { rows: tokens, k: cols, cols: rows };
  const forward = secondsOf(() => addProduct(kernels, "time a layer", x, weights, size, lost));
  for (let i = 0; i < cross.length; i++) cross[i]! /= 100 * tokens;
  let moment = undefined as unknown as ReturnType<typeof factorMoments>, corrected = weights;
  const factor = secondsOf(() => moment = factorMoments(kernels, moments, { takesSums: true }));
  const target = secondsOf(() =>
    corrected = correctedTarget(kernels, { weights, rows, moment, cross }, DEFAULT_SOLVER_SETTINGS)
  );
  const problem = { weights: corrected, rows, cols, moment, ...FORM };
  const solving = Array.from(efforts, (effort) => {
    const settings = { ...DEFAULT_SOLVER_SETTINGS, effort };
    return [effort, secondsOf(() => solveLayer(kernels, "best", problem, settings)) / rows] as const;
  });
  return {
    cols,
    block,
    position: gather / tokens,
    streamRow: stream / tokens / rows,
    forwardRow: forward / tokens / rows,
    factor,
    target: target / rows,
    row: Object.fromEntries(solving),
  };
}

/** The moment of a width as a run keeps it by default. */
const momentOf = (cols: number) =>
  chooseMoment(DEFAULT_SOLVER_SETTINGS, { cols, positions: POSITIONS, formats: [FORM] });

/** The effort that a layer gets: small ones get more. */
const effortOf = (effort: Effort, rows: number, cols: number): Effort =>
  settingsFor({ ...DEFAULT_SOLVER_SETTINGS, effort }, { rows, cols, block: momentOf(cols).block }).effort;

/** Efforts with which layers of so many columns are solved, in any of the published models. */
const effortsAt = (wanted: number): Set<Effort> =>
  new Set(
    PUBLISHED.flatMap(({ inputs, goals }) =>
      inputs.filter(({ cols }) => cols === wanted).flatMap(({ rows }) =>
        (Object.keys(goals) as Effort[]).flatMap((effort) =>
          rows.map((count) => effortOf(effort, count, wanted))
        )
      )
    ),
  );

interface Forecast {
  readonly model: string;
  readonly effort: Effort;
  readonly minutes: number;
  readonly goalMinutes: number;
}

/** Minutes of `best` for a model: gathering and forward passes by position, factors by input, solving by row. */
function forecastsOf(
  { name, blocks, inputs, goals }: PublishedModel,
  times: ReadonlyMap<number, WidthTimes>,
): Forecast[] {
  return (Object.entries(goals) as [Effort, number][]).map(([effort, goalMinutes]) => {
    let seconds = 0;
    for (const { cols, rows, isStream } of inputs) {
      const own = times.get(cols)!;
      seconds += POSITIONS * own.position + own.factor;
      for (const count of rows) {
        const passes = POSITIONS * (2 * own.forwardRow + (isStream ? own.streamRow : 0));
        seconds += count * (passes + own.target + own.row[effortOf(effort, count, cols)]!);
      }
    }
    return { model: name, effort, minutes: blocks * seconds / 60, goalMinutes };
  });
}

/** A run of `best` as `quantize.ts` does it. */
interface WholeRun {
  readonly model: string;
  readonly what: string;
  readonly seconds: number;
  readonly goalSeconds: number | undefined;
}

async function quantizeSeconds(
  kernels: Kernels,
  input: string,
  output: string,
  overrides: Readonly<Record<string, unknown>>,
): Promise<number> {
  const { config } = resolveConfig({
    overrides: { bit_width: FORM.bits, solver: "best", num_threads: kernels.threads, ...overrides },
  });
  const begin = performance.now();
  await quantizeCheckpoint({ input, output, config, kernels, force: true });
  return (performance.now() - begin) / 1000;
}

async function measureRuns(
  context: BenchContext,
  kernels: Kernels,
  { hidden, models }: SolverSpeedScale,
): Promise<WholeRun[]> {
  const runs: WholeRun[] = [], { options, progress } = context;
  await withTemporaryFolder(async (folder) => {
    for (const path of options.models.slice(0, models)) {
      const model = nameOfPath(path);
      progress(`${model}: best`);
      const seconds = await quantizeSeconds(kernels, path, join(folder, "out"), { group_size: 0 });
      runs.push({
        model,
        what: "2 bits, whole rows, its own data",
        seconds,
        goalSeconds: REFERENCE_SECONDS[model],
      });
    }
    if (hidden === undefined) return;
    const input = join(folder, "dream"), sizes = { layout: "dream", layers: 2, hidden };
    progress(`two layers of width ${hidden}: best`);
    const args = Object.entries(sizes).flatMap(([name, value]) => [`--${name}`, `${value}`]);
    await runChild(commandsOf(context)("make_checkpoint.ts", [input, ...args]));
    const seconds = await quantizeSeconds(kernels, input, join(folder, "out"), {
      group_size: FORM.groupSize,
    });
    const { multiplyAdds } = forwardCost(requirementsAt(input).model, { batch: 1, tokens: 1, rows: 0 });
    const model = `Dream, 2 layers of width ${hidden}`;
    const what = `2 bits, groups of ${FORM.groupSize}, sequences that it writes, ${
      (multiplyAdds / 1e6).toFixed(0)
    } M weights`;
    runs.push({
      model,
      what,
      seconds,
      goalSeconds: hidden === FULL_SCALE.hidden ? HALF_WIDTH_SECONDS : undefined,
    });
  });
  return runs;
}

// Report ----------------------------------------------------------------------------------------------------

/** Rows of the JSON report: a step, a forecast or a run. */
export type SolverSpeedRow = ReturnType<typeof rowOf>;

function rowOf(
  { environment }: BenchContext,
  threads: number,
  measured: MeasuredStep | Forecast | WholeRun | EffortRow | StatisticsRow,
) {
  const { backend, isa, runtime, processor } = environment;
  return { suite: "solver-speed" as const, threads, backend, isa, runtime, processor, ...measured };
}

/** Goals of the calibrated solver that other suites measure. */
const MEASURED_ELSEWHERE: readonly Goal[] = [
  { goal: "a step of 256 positions / llama.cpp's", wanted: "≥ 1 × its speed", suite: "steps" },
  { goal: "held-out error of best, own / real data", wanted: "≤ 1.5", suite: "defaults" },
  { goal: "held-out error of best, more bits / fewer", wanted: "≤ 1", suite: "defaults" },
].map(({ suite, ...goal }) => ({
  ...goal,
  measured: null,
  met: null,
  reason: `--suite ${suite} measures it`,
}));

const milliseconds = (seconds: number | undefined) => seconds === undefined ? null : seconds * 1e3;
const percent = (share: number) => `${(share * 100).toFixed(0)} %`;

/** Goals of the parts that were asked for, and those of other suites. */
function goalsOf(
  scale: SolverSpeedScale,
  { steps, forecasts, runs, reasons }: {
    readonly steps: readonly MeasuredStep[];
    readonly forecasts: readonly Forecast[];
    readonly runs: readonly WholeRun[];
    readonly reasons: ReadonlyMap<MeasuredShape, string>;
  },
  isWanted: (part: SolverSpeedPart) => boolean,
): Goal[] {
  const names = [...Object.keys(STEPS), "whole solve"] as SolverStep[];
  const kernels = scale.shapes.flatMap((shape) =>
    names.map((step): Goal => {
      const least = step === "whole solve" ? SOLVE_SHARE : KERNEL_SHARE;
      const own = steps.find((each) =>
        each.step === step && each.cols === shape.cols && each.rows === shape.rows
      );
      const goal = `${step}, ${shape.rows} × ${shape.cols}`, wanted = `≥ ${percent(least)} of SGEMM`;
      return own === undefined
        ? { goal, wanted, measured: null, met: null, reason: reasons.get(shape)! }
        : { goal, wanted, measured: percent(own.share), met: own.share >= least };
    })
  );
  const timed = runs.flatMap(({ model, seconds, goalSeconds }): Goal[] =>
    goalSeconds === undefined ? [] : [{
      goal: `best, ${model}`,
      wanted: `≤ ${goalSeconds} s`,
      measured: `${seconds.toFixed(1)} s`,
      met: seconds <= goalSeconds,
    }]
  );
  const forecast = PUBLISHED.flatMap(({ name, goals }) =>
    (Object.entries(goals) as [Effort, number][]).map(([effort, goalMinutes]): Goal => {
      const own = forecasts.find((each) => each.model === name && each.effort === effort);
      const goal = `best, ${name}, effort ${effort} (forecast)`, wanted = `≤ ${goalMinutes} min`;
      return own === undefined
        ? { goal, wanted, measured: null, met: null, reason: "its widths are measured without --quick" }
        : { goal, wanted, measured: `${own.minutes.toFixed(0)} min`, met: own.minutes <= goalMinutes };
    })
  );
  return [
    ...(isWanted("kernels") ? kernels : []),
    ...timed,
    ...(isWanted("widths") ? forecast : []),
    ...MEASURED_ELSEWHERE,
  ];
}

/** Kernels at the shapes that fit, with why others were left out. */
async function measureShapes(
  { options: { seed, ignoresMemory }, progress }: BenchContext,
  kernels: Kernels,
  shapes: readonly MeasuredShape[],
) {
  const counted = countedKernels(kernels);
  const reasons = new Map<MeasuredShape, string>(), steps: MeasuredStep[] = [];
  let peerReason: string | undefined;
  for (const shape of shapes) {
    const name = nameOf(shape), free = limitsOf().availableBytes;
    if (bytesOf(shape) > 0.8 * free && ignoresMemory !== true) {
      const gigabytes = (bytes: number) => `${(bytes / 1e9).toFixed(1)} GB`;
      reasons.set(shape, `${name} needs ${gigabytes(bytesOf(shape))} of memory, got ${gigabytes(free)}`);
      continue;
    }
    steps.push(
      ...await withTemporaryFolder(async (folder) => {
        const blas = await openBlas(folder, kernels.threads), isThere = !("reason" in blas);
        if (!isThere) peerReason = blas.reason;
        const own = measureShape(counted, isThere ? blas : undefined, shape, {
          seed,
          progress: (step) => progress(`kernels at ${name}: ${step}`),
        });
        if (isThere) blas.close();
        return own;
      }),
    );
    const all = steps.findLast(({ step }) => step === "whole solve")!;
    progress(`kernels at ${name}: the whole solve at ${percent(all.share)} of SGEMM`);
  }
  return { steps, reasons, peerReason };
}

const nameOf = ({ rows, cols }: LayerShape) => `${rows} × ${cols}`;

/** Every width of the published models. */
function measureWidths(
  { options: { seed }, progress }: BenchContext,
  kernels: Kernels,
  scale: SolverSpeedScale,
): Map<number, WidthTimes> {
  const widthOf = (cols: number) =>
    Math.max(FORM.groupSize, Math.round(cols * scale.width / FORM.groupSize) * FORM.groupSize);
  const all = new Set(PUBLISHED.flatMap(({ inputs }) => inputs.map(({ cols }) => cols)));
  return new Map(Array.from(all, (cols, i) => {
    progress(`solving at width ${widthOf(cols)}, ${i + 1} of ${all.size}`);
    return [cols, measureWidth(kernels, widthOf(cols), effortsAt(cols), scale, seed)];
  }));
}

/** Layers that are measured in place of the suite's: fewer inputs and one sample where they are wide. */
const shapesAsked = (shapes: readonly LayerShape[]): MeasuredShape[] =>
  shapes.map(({ rows, cols }) => ({
    rows,
    cols,
    ...(cols > WIDE ? { tokens: 1024, samples: 1 } : { tokens: 4096, samples: 3 }),
    settings: ONE_ROUND,
  }));

async function measure(context: BenchContext, full: SolverSpeedScale): Promise<SuiteReport<SolverSpeedRow>> {
  const { options, progress } = context, threads = options.threads ?? 2, { parts } = options;
  const scale = options.shapes === undefined ? full : { ...full, shapes: shapesAsked(options.shapes) };
  const kernels = withThreads(context.kernels, threads);
  const isWanted = (part: SolverSpeedPart) => parts?.includes(part) ?? true;
  const { steps, reasons, peerReason } = await measureShapes(
    context,
    kernels,
    isWanted("kernels") ? scale.shapes : [],
  );
  const times = isWanted("widths") ? measureWidths(context, kernels, scale) : new Map<number, WidthTimes>();
  const forecasts = scale.width === 1 && isWanted("widths")
    ? PUBLISHED.flatMap((model) => forecastsOf(model, times))
    : [];
  const efforts = (isWanted("effort") ? EFFORT_FORMS : []).map((form) => {
    const { bits, groupSize } = form;
    progress(
      `what further passes gain, ${bits} bits, ${groupSize === 0 ? "whole rows" : `groups of ${groupSize}`}`,
    );
    return { form, rows: measureEffort(kernels, scale.effort, form, options.seed) };
  });
  const runs = isWanted("models") ? await measureRuns(context, kernels, scale) : [];
  const saved = isWanted("statistics") ? await measureFromStatistics(context, kernels, scale.statistics) : [];
  const skipped: Skipped[] = [...reasons].map(([shape, reason]) => ({
    what: `kernels at ${nameOf(shape)}`,
    reason,
  }));
  for (const part of SOLVER_SPEED_PARTS) {
    if (!isWanted(part)) {
      skipped.push({ what: `the part ${part}`, reason: "--parts or --shapes leave it out" });
    }
  }
  if (peerReason !== undefined) skipped.push({ what: "OpenBLAS beside our product", reason: peerReason });
  if (scale.hidden === undefined && isWanted("models")) {
    skipped.push({ what: "the two-layer model of half width", reason: "measured without --quick" });
  }
  return {
    sections: [
      ...sectionsOf(threads, steps, [...times.values()], forecasts, runs),
      ...efforts.map(({ rows, form }) => effortSection(rows, scale.effort, form)),
      statisticsSection(saved),
    ].filter(({ rows }) => rows.length > 0),
    rows: [
      ...[...steps, ...forecasts, ...runs, ...saved].map((each) => rowOf(context, threads, each)),
      ...efforts.flatMap(({ rows, form }) =>
        rows.map((row) => ({ ...rowOf(context, threads, row), ...form }))
      ),
    ],
    goals: [
      ...goalsOf(scale, { steps, forecasts, runs, reasons }, isWanted),
      ...statisticsGoals(saved, scale.statistics === FULL_SCALE.statistics),
    ],
    skipped,
  };
}

function sectionsOf(
  threads: number,
  steps: readonly MeasuredStep[],
  times: readonly WidthTimes[],
  forecasts: readonly Forecast[],
  runs: readonly WholeRun[],
): Section[] {
  return [
    tableOf(
      `The solver's kernels beside a product of matrices, ${threads} threads`,
      [
        "Float32, moments whole. GFLOP: what a step cannot do without, a multiply-add is two (lib/bench/solver_speed/counted.ts).",
        "SGEMM: this project's own product at the same rows and columns, timed before and after each step.",
      ],
      steps,
      [
        ["step", "step", ({ step }) => step],
        ["shape", "rows × columns", ({ rows, cols }) => `${rows} × ${cols}`],
        ["gflop", "GFLOP", ({ flops }) => flops / 1e9, 1],
        ["seconds", "s", ({ seconds }) => seconds, 3],
        ["rate", "GFLOP/s", ({ flops, seconds }) => flops / seconds / 1e9, 0],
        ["share", "of SGEMM", ({ share }) => percent(share)],
      ],
    ),
    tableOf(
      "Solving a width with best, by effort",
      ["Moments as a run of 4096 positions keeps them by default; products of random numbers."],
      times,
      [
        ["cols", "columns", ({ cols }) => cols],
        [
          "block",
          "moment",
          ({ cols, block }) => block === cols ? "full" : block === 1 ? "diagonal" : `blocks of ${block}`,
        ],
        ["position", "ms a position", ({ position }) => position * 1e3, 3],
        ["factor", "s a factor", ({ factor }) => factor, 2],
        ["low", "ms a row: low", ({ row }) => milliseconds(row.low), 2],
        ["medium", "medium", ({ row }) => milliseconds(row.medium), 2],
        ["high", "high", ({ row }) => milliseconds(row.high), 2],
      ],
    ),
    tableOf(
      "Forecast of best at published models' shapes, from the rates above: not measured",
      [
        `2 bits, groups of ${FORM.groupSize}, ${POSITIONS} positions, one candidate; without reading, writing and held-out data.`,
      ],
      forecasts,
      [
        ["model", "model", ({ model }) => model],
        ["effort", "effort", ({ effort }) => effort],
        ["minutes", "minutes", ({ minutes }) => minutes, 1],
        ["goal", "goal", ({ goalMinutes }) => goalMinutes],
      ],
    ),
    tableOf(
      "Whole runs of best, from reading to writing",
      ["A denoising step of 256 positions from packed weights: --suite steps."],
      runs,
      [
        ["model", "model", ({ model }) => model],
        ["what", "what", ({ what }) => what],
        ["seconds", "s", ({ seconds }) => seconds, 1],
      ],
    ),
  ];
}

/** The suite at other sizes, for tests. */
export const solverSpeedSuiteOf = (scale: SolverSpeedScale | undefined): Suite<SolverSpeedRow> => ({
  name: "solver-speed",
  summary: "the calibrated solver's kernels beside SGEMM, whole runs, and a forecast for published models",
  run: (context) => measure(context, scale ?? (context.options.quick ? QUICK_SCALE : FULL_SCALE)),
});

/** Speed of the calibrated solver. */
export const solverSpeedSuite = solverSpeedSuiteOf(undefined);
