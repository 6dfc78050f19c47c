/**
 * Adam over several arrays of parameters at once (Kingma & Ba, https://arxiv.org/abs/1412.6980), with clipped gradients, a history of the loss, the
 * best parameters so far, and a stop at convergence or divergence. Whose gradients these are is the caller's.
 */
import { KernelError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";

const BETA1 = 0.9;
const BETA2 = 0.999;
const EPSILON = 1e-8;
/** A loss that many times the first one, or what was validated at the start if that is more, is divergence. */
const DIVERGENCE_FACTOR = 10;
/** Iterations whose mean loss is compared with that of as many before: a batch's loss alone jumps about. */
const CONVERGENCE_WINDOW = 10;

/** Parameters, their gradients, and what a step of 1 stands for. */
export interface Parameters {
  readonly name: string;
  readonly values: Float32Array<ArrayBuffer>;
  /** Filled by the loss. */
  readonly gradients: Float32Array<ArrayBuffer>;
  /** Units in which each value moves, above 0. Default 1. */
  readonly units?: Float32Array | undefined;
}

export interface OptimizerOptions {
  /** Size of the first steps, in units. Default 0.01. */
  readonly learningRate?: number | undefined;
  /** Default 50. */
  readonly maxIterations?: number | undefined;
  /** Relative change of the mean loss over ten iterations below which it has converged; 0 never. Default 1e-4. */
  readonly convergenceThreshold?: number | undefined;
  /** Largest length of the gradient of all parameters together, in units; longer ones are shortened. Default none. */
  readonly clipNorm?: number | undefined;
  /** `cosine` lowers the step size to 0 over the iterations. Default `cosine`. */
  readonly schedule?: "constant" | "cosine" | undefined;
}

export interface OptimizationProblem {
  readonly parameters: readonly Parameters[];
  /** Loss at the current values, whose gradients it fills in. Batches may differ from one iteration to the next. */
  loss(iteration: number): number;
  /** What decides which parameters are best; default the loss. Called before the first step, after every `validateEvery` and after the last. */
  validate?(): number;
  /** Default 10. */
  readonly validateEvery?: number | undefined;
  /** Called after each iteration. */
  readonly onIteration?: ((iteration: number, loss: number) => void) | undefined;
}

/** What an optimization did. */
export interface OptimizationReport {
  /** Steps taken. */
  readonly iterations: number;
  readonly converged: boolean;
  readonly diverged: boolean;
  /** Why it stopped, as a sentence. */
  readonly reason: string;
  readonly lossHistory: readonly number[];
  /** Length of the gradient before clipping, of each iteration. */
  readonly gradientNorms: readonly number[];
  /** How many gradients were shortened. */
  readonly clipped: number;
  /** What was validated, or the loss, at the start and at the best parameters, which are those kept. */
  readonly initial: number;
  readonly best: number;
  /** Steps after which the best was reached; 0 is the start. */
  readonly bestIteration: number;
}

function checkOptions(options: Required<Omit<OptimizerOptions, "clipNorm">> & OptimizerOptions): void {
  const fail = (name: string, wanted: string, got: unknown) =>
    new RangeError(`Cannot optimize: ${name} must be ${wanted}, got ${got}`);
  const { learningRate, maxIterations, convergenceThreshold, clipNorm, schedule } = options;
  if (!(learningRate! > 0 && learningRate! < Infinity)) {
    throw fail("learningRate", "a number above 0", learningRate);
  }
  if (!Number.isSafeInteger(maxIterations) || maxIterations! < 1 || maxIterations! > 100_000) {
    throw fail("maxIterations", "a whole number from 1 to 100000", maxIterations);
  }
  if (!(convergenceThreshold! >= 0 && convergenceThreshold! <= 1)) {
    throw fail("convergenceThreshold", "in [0, 1]", convergenceThreshold);
  }
  if (clipNorm !== undefined && !(clipNorm > 0)) throw fail("clipNorm", "above 0", clipNorm);
  if (schedule !== "constant" && schedule !== "cosine") {
    throw fail("schedule", '"constant" or "cosine"', JSON.stringify(schedule));
  }
}

/**
 * Lowers a loss by Adam and leaves the best parameters that were met in place. A loss that is not finite, or grows tenfold, stops it: the best
 * parameters stay, and the report says so.
 *
 * @throws {TypeError} when a parameter's arrays differ in length
 * @throws {RangeError} when an option is not allowed, or the loss is not finite before the first step
 *
 * @example
 * ```ts
 * import { openKernels } from "../native/mod.ts";
 * import { optimize } from "./optimizer.ts";
 * const values = Float32Array.of(3), gradients = new Float32Array(1);
 * const report = optimize(await openKernels(), {
 *   parameters: [{ name: "x", values, gradients }],
 *   loss: () => (gradients[0] = 2 * (values[0]! - 1), (values[0]! - 1) ** 2),
 * }, { learningRate: 0.3, maxIterations: 100 });
 * console.log(values[0]!.toFixed(1), report.converged); // 1.0
 * ```
 */
export function optimize(
  kernels: Kernels,
  problem: OptimizationProblem,
  options: OptimizerOptions = {},
): OptimizationReport {
  const settings = {
    learningRate: 0.01,
    maxIterations: 50,
    convergenceThreshold: 1e-4,
    schedule: "cosine" as const,
    ...Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined)),
  } as Required<Omit<OptimizerOptions, "clipNorm">> & OptimizerOptions;
  checkOptions(settings);
  const { learningRate, maxIterations, convergenceThreshold, clipNorm, schedule } = settings;
  const { validateEvery = 10 } = problem;
  const state = new AdamState(kernels, problem.parameters);
  const lossHistory: number[] = [], gradientNorms: number[] = [];
  let clipped = 0, best = Infinity, bestIteration = 0, initial = NaN;
  let converged = false, diverged = false, reason = "the last iteration was reached", iteration = 0;
  const consider = (value: number) => {
    if (!(value < best)) return;
    best = value;
    bestIteration = iteration;
    state.remember();
  };
  if (problem.validate !== undefined) {
    initial = problem.validate();
    if (!Number.isFinite(initial)) throw notFinite("the validated loss", initial);
    consider(initial);
  }
  for (; iteration < maxIterations!; iteration++) {
    state.clearGradients();
    const loss = problem.loss(iteration);
    const norm = state.gatherGradients();
    if (iteration === 0) {
      if (!Number.isFinite(loss)) throw notFinite("the loss", loss);
      if (!Number.isFinite(norm)) throw notFinite("the gradient", norm);
      if (problem.validate === undefined) initial = loss;
    }
    lossHistory.push(loss);
    gradientNorms.push(norm);
    problem.onIteration?.(iteration, loss);
    const reference = Math.max(lossHistory[0]!, Number.isNaN(initial) ? 0 : initial);
    if (!Number.isFinite(loss) || !Number.isFinite(norm) || loss > DIVERGENCE_FACTOR * reference) {
      diverged = true;
      reason = `it diverged in iteration ${
        iteration + 1
      }: the loss went from ${reference} to ${loss}; the best parameters were kept`;
      break;
    }
    if (problem.validate === undefined) consider(loss);
    if (hasConverged(lossHistory, convergenceThreshold!)) {
      converged = true;
      reason =
        `the loss changed by less than ${convergenceThreshold} of itself over ${CONVERGENCE_WINDOW} iterations`;
      break;
    }
    const shorten = clipNorm !== undefined && norm > clipNorm ? clipNorm / norm : 1;
    if (shorten < 1) clipped++;
    const decay = schedule === "cosine" ? (1 + Math.cos(Math.PI * iteration / maxIterations!)) / 2 : 1;
    state.step(learningRate! * decay, shorten);
    if (problem.validate !== undefined && (iteration + 1) % validateEvery === 0) {
      iteration++; // counted for `bestIteration`
      consider(problem.validate());
      iteration--;
    }
  }
  if (problem.validate !== undefined && !diverged && iteration % validateEvery !== 0) {
    consider(problem.validate());
  }
  state.restore();
  return {
    iterations: iteration,
    converged,
    diverged,
    reason,
    lossHistory,
    gradientNorms,
    clipped,
    initial,
    best,
    bestIteration,
  };
}

function notFinite(what: string, value: number): RangeError {
  return new RangeError(`Cannot optimize: ${what} must be finite at the start, got ${value}`);
}

/** Whether the mean of the last losses is that of those before, to a share of itself. */
function hasConverged(losses: readonly number[], threshold: number): boolean {
  if (threshold === 0 || losses.length < 2 * CONVERGENCE_WINDOW) return false;
  const mean = (part: readonly number[]) => part.reduce((sum, loss) => sum + loss, 0) / part.length;
  const now = mean(losses.slice(-CONVERGENCE_WINDOW));
  const before = mean(losses.slice(-2 * CONVERGENCE_WINDOW, -CONVERGENCE_WINDOW));
  return Math.abs(now - before) <= threshold * Math.abs(before);
}

/** All parameters in one array, in units, and Adam's two moments. */
class AdamState {
  readonly #values: Float32Array<ArrayBuffer>;
  readonly #gradients: Float32Array<ArrayBuffer>;
  readonly #first: Float32Array<ArrayBuffer>;
  readonly #second: Float32Array<ArrayBuffer>;
  readonly #best: Float32Array<ArrayBuffer>;
  #steps = 0;

  constructor(
    readonly kernels: Kernels,
    readonly parameters: readonly Parameters[],
  ) {
    for (const { name, values, gradients, units } of parameters) {
      if (gradients.length !== values.length || (units !== undefined && units.length !== values.length)) {
        throw new TypeError(
          `Cannot optimize ${
            JSON.stringify(name)
          }: it must have ${values.length} gradients and units, got ${gradients.length} and ${units?.length}`,
        );
      }
      const bad = units?.find((unit) => !(unit > 0 && unit < Infinity));
      if (bad !== undefined) {
        throw new RangeError(`Cannot optimize ${JSON.stringify(name)}: units must be above 0, got ${bad}`);
      }
    }
    const n = parameters.reduce((sum, { values }) => sum + values.length, 0);
    this.#values = new Float32Array(n);
    this.#gradients = new Float32Array(n);
    this.#first = new Float32Array(n);
    this.#second = new Float32Array(n);
    this.#best = new Float32Array(n);
    let at = 0;
    for (const { values, units } of parameters) {
      for (let i = 0; i < values.length; i++) this.#values[at++] = values[i]! / (units?.[i] ?? 1);
    }
    this.remember();
  }

  clearGradients(): void {
    for (const { gradients } of this.parameters) gradients.fill(0);
  }

  /** Gradients in units. @returns their length */
  gatherGradients(): number {
    let at = 0, squares = 0;
    for (const { gradients, units } of this.parameters) {
      for (let i = 0; i < gradients.length; i++) {
        const gradient = gradients[i]! * (units?.[i] ?? 1);
        this.#gradients[at++] = gradient;
        squares += gradient * gradient;
      }
    }
    return Math.sqrt(squares);
  }

  step(rate: number, shorten: number): void {
    if (shorten < 1) {
      for (let i = 0; i < this.#gradients.length; i++) this.#gradients[i]! *= shorten;
    }
    adamStep(
      this.kernels,
      {
        values: this.#values,
        gradients: this.#gradients,
        first: this.#first,
        second: this.#second,
      },
      ++this.#steps,
      rate,
    );
    this.#publish(this.#values);
  }

  remember(): void {
    this.#best.set(this.#values);
  }

  restore(): void {
    this.#publish(this.#best);
  }

  #publish(from: Float32Array): void {
    let at = 0;
    for (const { values, units } of this.parameters) {
      for (let i = 0; i < values.length; i++) values[i] = from[at++]! * (units?.[i] ?? 1);
    }
  }
}

/** Arrays of equal length that a step of Adam works on. */
export interface AdamArrays {
  readonly values: Float32Array<ArrayBuffer>;
  readonly gradients: Float32Array;
  /** Running means of the gradients and of their squares, 0 before the first step. */
  readonly first: Float32Array<ArrayBuffer>;
  readonly second: Float32Array<ArrayBuffer>;
}

/**
 * One step of Adam, in place: number `step`, from 1 on.
 *
 * @throws {TypeError} when lengths differ
 * @throws {KernelError} when `step` is below 1
 */
export function adamStep(
  kernels: Kernels,
  { values, gradients, first, second }: AdamArrays,
  step: number,
  rate: number,
): void {
  const n = values.length;
  if (gradients.length !== n || first.length !== n || second.length !== n) {
    throw new TypeError(
      `Cannot take a step: gradients and moments must be ${n} numbers, got ${gradients.length}, ${first.length} and ${second.length}`,
    );
  }
  const { calls, size, isaNumber } = kernels;
  const status = calls.aq_adam_step(
    values,
    gradients,
    first,
    second,
    size(n),
    rate,
    BETA1,
    BETA2,
    EPSILON,
    step,
    isaNumber,
    kernels.threads,
  );
  if (status !== 0) {
    throw new KernelError(`Cannot take a step: the kernel reports status ${status}`, { status });
  }
}

/**
 * One step down the gradient and back into bounds, in place: `min(max(values − rate · gradients, low), high)`.
 *
 * **Shapes** all `f32[n]`
 *
 * @throws {TypeError} when lengths differ
 */
export function projectedGradientStep(
  kernels: Kernels,
  values: Float32Array<ArrayBuffer>,
  gradients: Float32Array,
  bounds: { readonly low: Float32Array; readonly high: Float32Array },
  rate: number,
): void {
  const n = values.length, { low, high } = bounds;
  if (gradients.length !== n || low.length !== n || high.length !== n) {
    throw new TypeError(
      `Cannot take a step: gradients and bounds must be ${n} numbers, got ${gradients.length}, ${low.length} and ${high.length}`,
    );
  }
  const { calls, size, isaNumber } = kernels;
  const status = calls.aq_projected_gradient_step(
    values,
    gradients,
    low,
    high,
    size(n),
    rate,
    isaNumber,
    kernels.threads,
  );
  if (status !== 0) {
    throw new KernelError(`Cannot take a step: the kernel reports status ${status}`, { status });
  }
}
