/**
 * Adam over the parameters of all layers at once (Kingma & Ba, https://arxiv.org/abs/1412.6980), with clipped
 * gradients, a history of the loss by term, the best parameters so far, smaller steps after a divergence, and
 * a stop at convergence. The caller supplies the gradients.
 */
import type { Kernels } from "../../native/mod.ts";
import { AdamState } from "./adam.ts";
import { CONVERGENCE_STREAK, CONVERGENCE_WINDOW, hasSettled, History } from "./history.ts";
import {
  type OptimizationProblem,
  type OptimizationReport,
  type OptimizerOptions,
  type OptimizerState,
  type Settings,
  settingsOf,
} from "./problem.ts";
import { Schedule } from "./schedule.ts";

export { type AdamArrays, adamStep } from "./adam.ts";
export type {
  OptimizationPlan,
  OptimizationProblem,
  OptimizationReport,
  OptimizerOptions,
  OptimizerState,
  Parameters,
} from "./problem.ts";

/** A loss this many times the first one, or the loss validated at the start if larger, is divergence. */
const DIVERGENCE_FACTOR = 10;
/** Factor of the step size after a divergence, and how many divergences end the optimization. */
const BACK_OFF = 0.5, MAX_DIVERGENCES = 6;

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
 * import { openKernels } from "../../native/mod.ts";
 * import { optimize } from "./mod.ts";
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
    this.#state = new AdamState(kernels, problem.parameters, problem.memory);
  }

  /** Looks at the start, or goes on from where an earlier one was. */
  begin(): void {
    const { start, validate } = this.#problem;
    if (start !== undefined) {
      const { loop, history, schedule, steps } = progressOf(start.progress);
      this.#loop = { ...loop };
      this.#history.restart(history);
      this.#schedule.restart(schedule);
      this.#state.goOn(start.pieces, steps);
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
    const loss = history.add(problem.loss(iteration)), norm = state.scaleGradients();
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
    this.#problem.onState?.({ progress: progressText(progress), pieces: this.#state.pieces });
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

function notFinite(what: string, value: number): RangeError {
  return new RangeError(`Cannot optimize: ${what} must be finite at the start, got ${value}`);
}
