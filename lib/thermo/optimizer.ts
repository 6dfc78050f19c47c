/**
 * Adam over the parameters of all layers at once (Kingma & Ba, https://arxiv.org/abs/1412.6980), with clipped
 * gradients, a history of the loss by term, the best parameters so far, smaller steps after a divergence, and
 * a stop at convergence. The caller supplies the gradients.
 *
 * Layers are updated in parallel: the parameters of all of them lie in one array, which one kernel call per
 * step updates, split over threads.
 */
import { checkFloats } from "../native/call.ts";
import * as call from "../native/functions.ts";
import type { Kernels } from "../native/mod.ts";
import type { LossHistory, LossTerms } from "./losses.ts";

const BETA1 = 0.9;
const BETA2 = 0.999;
const EPSILON = 1e-8;
/** A loss this many times the first one, or the loss validated at the start if larger, is divergence. */
const DIVERGENCE_FACTOR = 10;
/** Factor of the step size after a divergence, and how many divergences end the optimization. */
const BACK_OFF = 0.5, MAX_DIVERGENCES = 6;
/**
 * Iterations whose mean loss is compared with that of as many before, and how often in a row the two must
 * agree: batches differ, so that two means agree by chance.
 */
const CONVERGENCE_WINDOW = 10, CONVERGENCE_STREAK = 10;

/** Parameters, their gradients, and what a step of 1 stands for. */
export interface Parameters {
  readonly name: string;
  readonly values: Float32Array<ArrayBuffer>;
  /** Filled by the loss. */
  readonly gradients: Float32Array<ArrayBuffer>;
  /** Units in which each value moves, above 0. Default 1. */
  readonly units?: Float32Array | undefined;
}

/** Settings of {@linkcode optimize}. */
export interface OptimizerOptions {
  /** Size of the first steps, in units. Default 0.01. */
  readonly learningRate?: number | undefined;
  /** Default 50. */
  readonly maxIterations?: number | undefined;
  /** Relative change of the mean loss of ten iterations that counts as converged; 0 never. Default 1e-4. */
  readonly convergenceThreshold?: number | undefined;
  /** Largest norm of the gradient of all parameters, in units; longer ones are shortened. Default none. */
  readonly clipNorm?: number | undefined;
  /** Time of the whole optimization; what fits is planned behind the first steps. Default none. */
  readonly maxMilliseconds?: number | undefined;
  /** `cosine` lowers the step size to 0 over the iterations. Default `cosine`. */
  readonly schedule?: "constant" | "cosine" | undefined;
}

/** A loss to be minimized, and its gradients. */
export interface OptimizationProblem {
  readonly parameters: readonly Parameters[];
  /**
   * Loss at the current values, whose gradients it fills in; a number is its quantization term alone. Batches
   * may differ from one iteration to the next.
   */
  loss(iteration: number): LossTerms | number;
  /** Decides which parameters are best; default the loss. Called first, last and every `validateEvery`. */
  validate?(): number;
  /** Default 10. */
  readonly validateEvery?: number | undefined;
  /** Called with each iteration's total loss. */
  readonly onIteration?: ((iteration: number, loss: number) => void) | undefined;
  /** Milliseconds since any fixed moment; default `performance.now`. */
  readonly clock?: (() => number) | undefined;
  /** Called behind the first iterations with what will be done. */
  readonly onPlan?: ((plan: OptimizationPlan) => void) | undefined;
  /** Where an earlier optimization of the same problem was: this one goes on to the same result. */
  readonly start?: OptimizerState | undefined;
  /** Called behind each look at the validated loss and at the end; what it gets is valid during the call. */
  readonly onState?: ((state: OptimizerState) => void) | undefined;
}

/** Where an optimization is. */
export interface OptimizerState {
  /** Numbers of the iterations so far, as JSON. */
  readonly progress: string;
  /** Of all parameters, in units: present and best values, and Adam's two moments. */
  readonly arrays: readonly Float32Array<ArrayBuffer>[];
}

/** What an optimization will do in its time, from a timed step. */
export interface OptimizationPlan {
  /** Steps, fewer than `maxIterations` where the time does not allow as many. */
  readonly iterations: number;
  /** Looks at the validated loss, the first and the last among them; 0 where there is none. */
  readonly validations: number;
  readonly stepMilliseconds: number;
  readonly validationMilliseconds: number;
  /** Of all steps and validations. */
  readonly milliseconds: number;
}

/** Result of an optimization. */
export interface OptimizationReport {
  /** Steps taken. */
  readonly iterations: number;
  readonly converged: boolean;
  /** It was ended because it kept diverging. */
  readonly diverged: boolean;
  /** It made fewer steps than were asked for because its time did not allow more. */
  readonly outOfTime: boolean;
  readonly plan: OptimizationPlan;
  /** Divergences, after each of which it went on from the best parameters with half the step size. */
  readonly backOffs: number;
  /** Why it stopped, as a sentence. */
  readonly reason: string;
  /** Loss of each iteration by term. */
  readonly losses: LossHistory;
  /** Length of the gradient before clipping, of each iteration. */
  readonly gradientNorms: readonly number[];
  /** Number of shortened gradients. */
  readonly clipped: number;
  /** Validated loss, or the loss, at the start and at the best parameters, which are those kept. */
  readonly initial: number;
  readonly best: number;
  /** Steps after which the best was reached; 0 is the start. */
  readonly bestIteration: number;
}

type Floats = Float32Array<ArrayBuffer>;
type Settings = ReturnType<typeof settingsOf>;

function settingsOf(options: OptimizerOptions) {
  const settings = {
    learningRate: options.learningRate ?? 0.01,
    maxIterations: options.maxIterations ?? 50,
    convergenceThreshold: options.convergenceThreshold ?? 1e-4,
    clipNorm: options.clipNorm,
    maxMilliseconds: options.maxMilliseconds ?? Infinity,
    schedule: options.schedule ?? "cosine",
  } as const;
  const { learningRate, maxIterations, convergenceThreshold, clipNorm, maxMilliseconds, schedule } = settings;
  const fail = (name: string, wanted: string, got: unknown) =>
    new RangeError(`Cannot optimize: ${name} must be ${wanted}, got ${got}`);
  if (!(learningRate > 0 && learningRate < Infinity)) {
    throw fail("learningRate", "a number above 0", learningRate);
  }
  if (!Number.isSafeInteger(maxIterations) || maxIterations < 1 || maxIterations > 100_000) {
    throw fail("maxIterations", "a whole number from 1 to 100000", maxIterations);
  }
  if (!(convergenceThreshold >= 0 && convergenceThreshold <= 1)) {
    throw fail("convergenceThreshold", "in [0, 1]", convergenceThreshold);
  }
  if (clipNorm !== undefined && !(clipNorm > 0)) throw fail("clipNorm", "above 0", clipNorm);
  if (!(maxMilliseconds > 0)) throw fail("maxMilliseconds", "above 0", maxMilliseconds);
  if (schedule !== "constant" && schedule !== "cosine") {
    throw fail("schedule", '"constant" or "cosine"', JSON.stringify(schedule));
  }
  return settings;
}

/**
 * Lowers a loss by Adam and leaves the best parameters that were met in place. After a loss that is not
 * finite or grows tenfold it goes on from the best parameters with half the step size; the sixth time it
 * ends, and the report says so.
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
  const optimization = new Optimization(kernels, problem, settingsOf(options));
  optimization.begin();
  while (optimization.goesOn) optimization.step();
  return optimization.end();
}

/** One optimization on its way. */
class Optimization {
  readonly #problem: OptimizationProblem;
  readonly #settings: Settings;
  readonly #schedule: Schedule;
  readonly #state: AdamState;
  readonly #history = new History();
  #loop: Loop = {
    best: Infinity,
    bestIteration: 0,
    initial: NaN,
    iteration: 0,
    backOffs: 0,
    steady: 0,
    converged: false,
    diverged: false,
    isOver: false,
    reason: "the last iteration was reached",
  };

  constructor(kernels: Kernels, problem: OptimizationProblem, settings: Settings) {
    [this.#problem, this.#settings] = [problem, settings];
    this.#schedule = new Schedule(problem, settings);
    this.#state = new AdamState(kernels, problem.parameters);
  }

  /** Looks at the start, or goes on from where an earlier one was. */
  begin(): void {
    const { start, validate } = this.#problem;
    if (start !== undefined) {
      const { loop, history, schedule, steps } = progressOf(start.progress);
      this.#loop = { ...loop };
      this.#history.restart(history);
      this.#schedule.restart(schedule);
      this.#state.goOn(start.arrays, steps);
    } else if (validate !== undefined) {
      const initial = this.#loop.initial = this.#schedule.validate();
      if (!Number.isFinite(initial)) throw notFinite("the validated loss", initial);
      this.#consider(initial, 0);
    }
  }

  get goesOn(): boolean {
    const { isOver, converged, diverged, iteration } = this.#loop, schedule = this.#schedule;
    return !isOver && !converged && !diverged && iteration < schedule.iterations &&
      !schedule.isOver(iteration);
  }

  /** One iteration: a step, or back to the best parameters after a divergence. */
  step(): void {
    const loop = this.#loop, { iteration } = loop, problem = this.#problem, schedule = this.#schedule;
    const state = this.#state, history = this.#history, { clipNorm, convergenceThreshold } = this.#settings;
    schedule.begin();
    state.clearGradients();
    const loss = history.add(problem.loss(iteration)), norm = state.gatherGradients();
    history.gradientNorms.push(norm);
    if (iteration === 0) {
      if (!Number.isFinite(loss)) throw notFinite("the loss", loss);
      if (!Number.isFinite(norm)) throw notFinite("the gradient", norm);
      if (problem.validate === undefined) loop.initial = loss;
    }
    problem.onIteration?.(iteration, loss);
    const reference = Math.max(history.total[0]!, loop.initial);
    if (!Number.isFinite(loss) || !Number.isFinite(norm) || loss > DIVERGENCE_FACTOR * reference) {
      this.#backOff(reference, loss);
      return;
    }
    if (problem.validate === undefined) this.#consider(loss, iteration);
    loop.steady = hasSettled(history.total, convergenceThreshold) ? loop.steady + 1 : 0;
    if (loop.steady === CONVERGENCE_STREAK) {
      loop.converged = true;
      loop.reason =
        `the loss changed by less than ${convergenceThreshold} of itself over ${CONVERGENCE_WINDOW} iterations`;
      return;
    }
    history.clipped += state.step(schedule.stepSize(iteration) * BACK_OFF ** loop.backOffs, clipNorm);
    schedule.end(iteration);
    loop.iteration++;
    if (!schedule.isValidated(loop.iteration)) return;
    this.#consider(schedule.validate(), loop.iteration);
    this.#keep();
  }

  #backOff(reference: number, loss: number): void {
    const loop = this.#loop;
    if (++loop.backOffs < MAX_DIVERGENCES) {
      this.#state.restart();
      loop.iteration++;
      return;
    }
    loop.diverged = true;
    loop.reason = `it diverged in iteration ${
      loop.iteration + 1
    }, the ${MAX_DIVERGENCES}th time: the loss went from ${reference} to ${loss}; the best parameters were kept`;
  }

  /** The last look, and the best parameters in place. */
  end(): OptimizationReport {
    const loop = this.#loop, { iteration, diverged, converged, backOffs } = loop, schedule = this.#schedule;
    if (!loop.isOver) {
      if (this.#problem.validate !== undefined && !diverged && !schedule.isValidated(iteration)) {
        this.#consider(schedule.validate(), iteration);
      }
      loop.isOver = true;
      this.#keep();
    }
    this.#state.restore();
    const outOfTime = !diverged && !converged && iteration < this.#settings.maxIterations;
    let reason = outOfTime
      ? `the time allowed ${iteration} of ${this.#settings.maxIterations} iterations`
      : loop.reason;
    if (backOffs > 0 && !diverged) reason += `; it diverged ${backOffs} times before`;
    const { gradientNorms, clipped, losses } = this.#history, { initial, best, bestIteration } = loop;
    return {
      ...{ iterations: iteration, converged, diverged, outOfTime, plan: schedule.plan, backOffs, reason },
      ...{ losses, gradientNorms, clipped, initial, best, bestIteration },
    };
  }

  #consider(value: number, steps: number): void {
    if (!(value < this.#loop.best)) return;
    [this.#loop.best, this.#loop.bestIteration] = [value, steps];
    this.#state.remember();
  }

  #keep(): void {
    const progress: OptimizerProgress = {
      loop: this.#loop,
      history: this.#history.state(),
      schedule: this.#schedule.state(),
      steps: this.#state.steps,
    };
    this.#problem.onState?.({ progress: progressText(progress), arrays: this.#state.arrays });
  }
}

/** Where the loop is. */
interface Loop {
  best: number;
  bestIteration: number;
  initial: number;
  /** The next one. */
  iteration: number;
  backOffs: number;
  steady: number;
  converged: boolean;
  diverged: boolean;
  isOver: boolean;
  reason: string;
}

/** {@linkcode OptimizerState.progress}, read. */
interface OptimizerProgress {
  readonly loop: Loop;
  readonly history: ReturnType<History["state"]>;
  readonly schedule: ReturnType<Schedule["state"]>;
  readonly steps: number;
}

/** The quantization term of the first iteration; undefined before it. */
export const firstLossOf = ({ progress }: OptimizerState): number | undefined =>
  progressOf(progress).history.losses.quantization[0];

/** Numbers that JSON has no form for. */
const NUMBERS = ["NaN", "Infinity", "-Infinity"];

const progressText = (progress: OptimizerProgress): string =>
  JSON.stringify(
    progress,
    (_, value) => typeof value === "number" && !Number.isFinite(value) ? String(value) : value,
  );

const progressOf = (text: string): OptimizerProgress =>
  JSON.parse(text, (_, value) => NUMBERS.includes(value) ? Number(value) : value);

/** Iterations behind which the time of a step is known: the first also warms up. */
const TIMED_STEPS = 2;
/** Share of the time that looks at the validated loss may take where not every step fits. */
const VALIDATION_SHARE = 1 / 4;

/** Step sizes, looks at the validated loss and the end of the iterations, as the time allows. */
class Schedule {
  /** Iterations that will be made. */
  iterations: number;
  #validateEvery: number;
  #begin: number;
  #stepBegin = 0;
  /** The fastest step, behind which the plan was made, and the last. */
  #step = Infinity;
  #lastStep = 0;
  #validation = 0;
  #plan: OptimizationPlan | undefined;

  constructor(readonly problem: OptimizationProblem, readonly settings: Settings) {
    this.iterations = settings.maxIterations;
    this.#validateEvery = problem.validateEvery ?? 10;
    this.#begin = this.#now();
  }

  #now(): number {
    return (this.problem.clock ?? (() => performance.now()))();
  }

  /** What {@linkcode restart} goes on from. */
  state() {
    return {
      iterations: this.iterations,
      validateEvery: this.#validateEvery,
      spent: this.#now() - this.#begin,
      step: this.#step,
      lastStep: this.#lastStep,
      validation: this.#validation,
      plan: this.#plan,
    };
  }

  restart(state: ReturnType<Schedule["state"]>): void {
    this.iterations = state.iterations;
    this.#validateEvery = state.validateEvery;
    this.#begin = this.#now() - state.spent;
    [this.#step, this.#lastStep, this.#validation] = [state.step, state.lastStep, state.validation];
    this.#plan = state.plan;
  }

  get plan(): OptimizationPlan {
    return this.#plan ?? this.#planned(0);
  }

  validate(): number {
    const begin = this.#now(), value = this.problem.validate!();
    this.#validation = this.#now() - begin;
    return value;
  }

  isValidated(iteration: number): boolean {
    return this.problem.validate !== undefined && iteration % this.#validateEvery === 0;
  }

  /** Step size of an iteration, in units, before any back-off. */
  stepSize(iteration: number): number {
    const { schedule, learningRate } = this.settings;
    return schedule === "cosine"
      ? learningRate * ((1 + Math.cos(Math.PI * iteration / this.iterations)) / 2)
      : learningRate;
  }

  begin(): void {
    this.#stepBegin = this.#now();
  }

  /** Times a step, and plans once that is known. */
  end(iteration: number): void {
    this.#lastStep = this.#now() - this.#stepBegin;
    if (this.#plan !== undefined) return;
    this.#step = Math.min(this.#step, this.#lastStep);
    const done = iteration + 1;
    if (done < Math.min(TIMED_STEPS, this.iterations) && !this.isOver(done)) return;
    const { maxMilliseconds } = this.settings, left = maxMilliseconds - (this.#now() - this.#begin);
    const all = this.#planned(done);
    if (all.milliseconds > maxMilliseconds) {
      const looks = this.problem.validate === undefined
        ? 0
        : Math.max(1, Math.min(all.validations - 1, Math.floor(left * VALIDATION_SHARE / this.#validation)));
      const more = Math.max(0, Math.floor((left - looks * this.#validation) / this.#step));
      this.iterations = Math.min(this.iterations, done + more);
      if (looks > 0) this.#validateEvery = Math.max(1, Math.ceil(this.iterations / looks));
    }
    this.#plan = this.#planned(done);
    this.problem.onPlan?.(this.#plan);
  }

  /** True where another step and the last validation would pass the time. */
  isOver(done: number): boolean {
    const spent = this.#now() - this.#begin;
    return done > 0 && spent + this.#lastStep + this.#validation > this.settings.maxMilliseconds;
  }

  /** What all iterations take, of which so many are done. */
  #planned(done: number): OptimizationPlan {
    const looks = this.problem.validate === undefined ? 0 : Math.ceil(this.iterations / this.#validateEvery);
    const stepMilliseconds = Number.isFinite(this.#step) ? this.#step : 0, spent = this.#now() - this.#begin;
    return {
      iterations: this.iterations,
      validations: looks === 0 ? 0 : looks + 1,
      stepMilliseconds,
      validationMilliseconds: this.#validation,
      milliseconds: spent + (this.iterations - done) * stepMilliseconds + looks * this.#validation,
    };
  }
}

/** The record of the iterations. */
class History {
  readonly quantization: number[] = [];
  readonly markov: number[] = [];
  readonly entropy: number[] = [];
  readonly total: number[] = [];
  readonly gradientNorms: number[] = [];
  clipped = 0;

  /** @returns the total */
  add(loss: LossTerms | number): number {
    const { quantization, markov, entropy } = typeof loss === "number"
      ? { quantization: loss, markov: 0, entropy: 0 }
      : loss;
    const total = quantization + markov + entropy;
    this.quantization.push(quantization);
    this.markov.push(markov);
    this.entropy.push(entropy);
    this.total.push(total);
    return total;
  }

  /** What {@linkcode restart} goes on from. */
  state() {
    const { gradientNorms, clipped } = this;
    return { losses: this.losses, gradientNorms, clipped };
  }

  restart({ losses, gradientNorms, clipped }: ReturnType<History["state"]>): void {
    for (const term of ["quantization", "markov", "entropy", "total"] as const) {
      this[term].push(...losses[term]);
    }
    this.gradientNorms.push(...gradientNorms);
    this.clipped = clipped;
  }

  get losses(): LossHistory {
    const { quantization, markov, entropy, total } = this;
    return { quantization, markov, entropy, total };
  }
}

function notFinite(what: string, value: number): RangeError {
  return new RangeError(`Cannot optimize: ${what} must be finite at the start, got ${value}`);
}

/** True where the mean of the last losses equals that of those before, relative to itself. */
function hasSettled(losses: readonly number[], threshold: number): boolean {
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
  #norm = 0;

  constructor(readonly kernels: Kernels, readonly parameters: readonly Parameters[]) {
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

  /** Steps of the moments. */
  get steps(): number {
    return this.#steps;
  }

  /** Present and best values, and the moments. */
  get arrays(): readonly Floats[] {
    return [this.#values, this.#best, this.#first, this.#second];
  }

  /** Goes on from what {@linkcode arrays} was. @throws {TypeError} when it was of other parameters */
  goOn(arrays: readonly Float32Array[], steps: number): void {
    for (const [i, own] of this.arrays.entries()) {
      if (arrays[i]?.length !== own.length) {
        throw new TypeError(
          `Cannot go on optimizing: there must be ${own.length} parameters, got ${arrays[i]?.length}`,
        );
      }
      own.set(arrays[i]);
    }
    this.#steps = steps;
    this.#publish(this.#values);
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
    return this.#norm = Math.sqrt(squares);
  }

  /** One step of Adam. @returns 1 where the gradient was longer than `clipNorm` and shortened, else 0 */
  step(rate: number, clipNorm: number | undefined): number {
    const isClipped = clipNorm !== undefined && this.#norm > clipNorm;
    if (isClipped) {
      const share = clipNorm / this.#norm;
      for (let i = 0; i < this.#gradients.length; i++) this.#gradients[i]! *= share;
    }
    const [values, gradients, first, second] = [this.#values, this.#gradients, this.#first, this.#second];
    adamStep(this.kernels, { values, gradients, first, second }, ++this.#steps, rate);
    this.#publish(this.#values);
    return Number(isClipped);
  }

  remember(): void {
    this.#best.set(this.#values);
  }

  restore(): void {
    this.#publish(this.#best);
  }

  /** Goes back to the best values and forgets the moments. */
  restart(): void {
    this.#values.set(this.#best);
    this.#first.fill(0);
    this.#second.fill(0);
    this.#steps = 0;
    this.restore();
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
 * @throws {TypeError} when an array has another type or length
 * @throws {KernelError} when `step` is below 1
 */
export function adamStep(
  kernels: Kernels,
  { values, gradients, first, second }: AdamArrays,
  step: number,
  rate: number,
): void {
  const doing = "take a step", n = values.length;
  checkFloats(doing, {
    values: [values, n],
    gradients: [gradients, n],
    first: [first, n],
    second: [second, n],
  });
  call.adamStep(kernels, doing, values, gradients, first, second, n, rate, BETA1, BETA2, EPSILON, step);
}
