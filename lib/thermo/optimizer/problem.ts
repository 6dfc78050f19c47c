/** What is optimized, how, and what came of it. */
import type { PagedFloats } from "../../output/paged_floats.ts";
import type { LossHistory, LossTerms } from "../losses.ts";

/**
 * Parameters, their gradients, and what a step of 1 stands for. The arrays are asked for again whenever they
 * are needed: they may lie in a file meanwhile.
 */
export interface Parameters {
  readonly name: string;
  readonly values: Float32Array<ArrayBuffer>;
  /** Filled by the loss. */
  readonly gradients: Float32Array<ArrayBuffer>;
  /** Units in which each value moves, above 0. Default 1. */
  readonly units?: Float32Array | undefined;
  /** Sets the gradients to 0 without reading them; default they are filled. */
  clearGradients?(): void;
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
  /** Where what is kept of each parameter lies; default in memory. */
  readonly memory?: PagedFloats | undefined;
  /** Called behind each look at the validated loss and at the end; what it gets is valid during the call. */
  readonly onState?: ((state: OptimizerState) => void) | undefined;
}

/** Where an optimization is. */
export interface OptimizerState {
  /** Numbers of the iterations so far, as JSON. */
  readonly progress: string;
  /**
   * Of one parameter after the other, in units: present and best values, and Adam's two moments. Pieces of
   * any lengths, each valid until the next is asked for.
   */
  readonly pieces: Iterable<Float32Array>;
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

export type Settings = ReturnType<typeof settingsOf>;

export function settingsOf(options: OptimizerOptions) {
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
