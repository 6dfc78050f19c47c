/** The calibrated solver's kernels, step by step, as shares of this run's own product of matrices (SGEMM). */
import { limitsOf } from "../../files/limits.ts";
import type { Kernels } from "../../native/mod.ts";
import { correctedTarget, factorMoments, solveLayer } from "../../quant/mod.ts";
import { addProduct } from "../../quant/product.ts";
import { accumulateMoment, emptyMoments } from "../../quant/solvers/moments.ts";
import { DEFAULT_SOLVER_SETTINGS } from "../../quant/solvers/settings.ts";
import type { LayerShape } from "../options.ts";
import { gaussianWeights } from "../random.ts";
import { type Goal, type Skipped, type SuiteReport, tableOf } from "../suite.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";
import { secondsOf } from "../timing.ts";
import { type Blas, openBlas } from "./blas.ts";
import { type CountedKernels, countedKernels, type KernelTotals } from "./counted.ts";
import { FORM, type MeasuredShape, type PartRun, percent } from "./scale.ts";

/** Shares of the product's rate that are wanted. */
const KERNEL_SHARE = 0.6, SOLVE_SHARE = 0.5;
/** Kernels by what they do for the solver. */
const STEPS = {
  moments: ["accumulate_moment"],
  factorization: ["factor_moment"],
  "corrected targets": ["multiply", "solve_moment"],
  feedback: ["quantize_feedback"],
  refinement: ["refine_codes"],
} as const;
type SolverStep = keyof typeof STEPS | "whole solve";
/** Products that the steps are compared with, and another library's. */
const PRODUCT = "product (SGEMM)", PEER_PRODUCT = "product, OpenBLAS";
type Step = SolverStep | typeof PRODUCT | typeof PEER_PRODUCT;

export interface MeasuredStep {
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

/** Most columns of the product that the others are compared with. */
const PRODUCT_COLUMNS = 2048;

/** Operations and seconds of a product `[rows, cols] × [cols, n]` of ours and of OpenBLAS. */
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

/** Bytes of a shape's arrays: the moment and its factor, a layer in its forms, inputs and a product. */
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
    // In memory before, as sums of a run are from its second chunk on: new pages take longer than the sums.
    moments.second.fill(0);
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

/** Kernels at the shapes that fit, with why others were left out. */
export async function measureKernels(
  { context, kernels, scale: { shapes } }: PartRun,
): Promise<SuiteReport<MeasuredStep>> {
  const { options: { seed, ignoresMemory }, progress } = context;
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
  const skipped: Skipped[] = Array.from(reasons, ([shape, reason]) => ({
    what: `kernels at ${nameOf(shape)}`,
    reason,
  }));
  if (peerReason !== undefined) skipped.push({ what: "OpenBLAS beside our product", reason: peerReason });
  return {
    sections: [sectionOf(kernels.threads, steps)],
    rows: steps,
    goals: shapes.flatMap((shape) => goalsOf(shape, steps, reasons.get(shape))),
    skipped,
  };
}

const nameOf = ({ rows, cols }: LayerShape) => `${rows} × ${cols}`;

/** Whether each step of a shape has its share of the product's rate; a reason where it was not measured. */
function goalsOf(shape: MeasuredShape, steps: readonly MeasuredStep[], reason?: string): Goal[] {
  const names = [...Object.keys(STEPS), "whole solve"] as SolverStep[];
  return names.map((step): Goal => {
    const least = step === "whole solve" ? SOLVE_SHARE : KERNEL_SHARE;
    const own = steps.find((each) =>
      each.step === step && each.cols === shape.cols && each.rows === shape.rows
    );
    const goal = `${step}, ${nameOf(shape)}`, wanted = `≥ ${percent(least)} of SGEMM`;
    return own === undefined
      ? { goal, wanted, measured: null, met: null, reason: reason! }
      : { goal, wanted, measured: percent(own.share), met: own.share >= least };
  });
}

const sectionOf = (threads: number, steps: readonly MeasuredStep[]) =>
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
  );
