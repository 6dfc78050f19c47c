/** The time of an optimization: steps are counted and sized, and looks planned, as it allows. */
import type { OptimizationPlan, OptimizationProblem, Settings } from "./problem.ts";

/** Iterations behind which the time of a step is known: the first also warms up. */
const TIMED_STEPS = 2;
/** Share of the time that looks at the validated loss may take where not every step fits. */
const VALIDATION_SHARE = 1 / 4;

/** Step sizes, looks at the validated loss and the end of the iterations, as the time allows. */
export class Schedule {
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
