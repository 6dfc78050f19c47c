/** The phases' report. */
import type { RefinementReport } from "../models/backward/mod.ts";
import type { CacheStatistics, Violation } from "../thermo/mod.ts";
import type { PhaseModel } from "./context.ts";

/** A layer's violation of the smoothness threshold. */
export interface LayerViolation extends Violation {
  readonly layer: string;
}

/** Mean held-out step KL without and with a change, and whether it was kept; if not, both are the same. */
export interface GuardedReport {
  readonly kept: boolean;
  readonly heldOutBefore: number;
  readonly heldOutAfter: number;
  readonly milliseconds: number;
}

/** Phase 1. */
export interface ValidationPhaseReport {
  /** Mean of the layers' scores. */
  readonly markovScore: number;
  /** `[groups − 1]`, means over the layers. */
  readonly boundaryScores: readonly number[];
  readonly violations: readonly LayerViolation[];
  /** Held-out step KL by time group, of so many samples. */
  readonly stepKlByGroup: readonly number[];
  readonly samples: number;
  /** Time of the scores, and of the step KL beside them. */
  readonly milliseconds: number;
  readonly stepKlMilliseconds: number;
}

/** Phase 2. */
export interface SmoothingPhaseReport {
  /** Layers. */
  readonly kept: readonly string[];
  readonly rejected: readonly string[];
  /** Step KL of the held-out samples inside a window, NaN where there are none. */
  readonly heldOutBefore: number;
  readonly heldOutAfter: number;
  readonly samples: number;
  readonly milliseconds: number;
}

/** Phase 3's refinement: the optimizer's report, with `losses` by term and iteration, and the guard's. */
export interface RefinementPhaseReport extends Omit<RefinementReport, "layers">, GuardedReport {}

/** Report of the phases; a part that was not asked for is undefined. */
export interface PhasesReport {
  readonly groups: number | undefined;
  /** Mean over phase 1's samples. */
  readonly heldOutStepKl: number | undefined;
  readonly validation: ValidationPhaseReport | undefined;
  readonly smoothing: SmoothingPhaseReport | undefined;
  readonly refinement: RefinementPhaseReport | undefined;
  readonly output: GuardedReport | undefined;
  readonly timeScales: GuardedReport | undefined;
  readonly sampler: GuardedReport | undefined;
  /** Mean held-out step KL with plain and with quantized activations, where `perTokenLimit` asks for it. */
  readonly activations: Omit<GuardedReport, "kept" | "milliseconds"> | undefined;
  /** Layers with per-token dynamic quantization, which lose too much with static ranges. */
  readonly perToken: readonly string[];
  /** First bin of every time group, and the axis's end. */
  readonly boundaries: readonly number[] | undefined;
  /** Time of calibrating activations. */
  readonly activationMilliseconds: number | undefined;
  /** Step KLs by model and timestep that were measured once (misses) and used again (hits). */
  readonly transitionCache: CacheStatistics;
  /** Bytes held for caches and statistics at most. */
  readonly statisticsBytes: number;
  readonly warnings: readonly string[];
}

/** A model as the phases left it, and their report. */
export interface PhaseResult {
  readonly model: PhaseModel;
  readonly report: PhasesReport;
}
