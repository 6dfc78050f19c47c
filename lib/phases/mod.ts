/**
 * The three phases on a model whose codes are chosen: gradient refinement (phase 3), θ in closed form, static grids of activations by time group,
 * smoothing (phase 2) and validation (phase 1), each guarded by the held-out step KL. What a phase does is phase_run.ts's.
 */
import type { RefinementReport } from "../models/backward/mod.ts";
import type { PackedTensor } from "../quant/mod.ts";
import type { SmoothingOptions, Violation } from "../thermo/mod.ts";
import type { ActivationBits, RangeMethod } from "../time/mod.ts";
import type { PhaseContext, PhaseModel } from "./context.ts";
import type { OutputSettings } from "./outputs.ts";
import type { RefinementSettings } from "./refinement.ts";
import { PhaseRun } from "./run.ts";

/** Rounded activations. */
export interface ActivationSettings {
  readonly groups: number;
  readonly bits: ActivationBits;
  /** How a group's range is found; default minimum and maximum at 8 bits, least squared error at 4. */
  readonly range?: RangeMethod | undefined;
  /** `adaptive`: boundaries where the inputs change, kept only if the held-out step KL falls. Default `equal`. */
  readonly grouping?: "equal" | "adaptive" | undefined;
  /**
   * Layers get a grid of each token's own in place of static ones, those that gain most first, until the held-out step KL is at most so many times
   * that of such grids everywhere, or of activations that are not rounded where that is larger. From 1 on; `Infinity`, the default: none.
   */
  readonly perTokenLimit?: number | undefined;
  /** A grid of each token's own for every layer: the rival of static grids. */
  readonly isPerToken?: boolean | undefined;
}

export interface PhaseSettings {
  /** Time groups of the static activations; undefined leaves activations in full precision. */
  readonly activations?: ActivationSettings | undefined;
  /** Whether output corrections, weight scales and the sampler's correction need the held-out step KL to fall; false is for measuring them. Default true. */
  readonly isGuarded?: boolean | undefined;
  /** Output corrections by time group; of as many groups as the activations, or as said here. Kept if the held-out step KL falls. */
  readonly output?: (OutputSettings & { readonly groups?: number | undefined }) | undefined;
  /** Own weight scales for so many time groups over shared codes, kept if the held-out step KL falls. */
  readonly timeScales?: { readonly groups: number } | undefined;
  /** The sampler's correction of an image model, kept if the held-out step KL falls. */
  readonly sampler?: { readonly groups: number } | undefined;
  /** Phase 1. `samples`: held-out samples of the step KL beside the scores, at most; by default 32, or two a time group. */
  readonly validation?:
    | { readonly smoothnessThreshold: number; readonly samples?: number | undefined }
    | undefined;
  /** Phase 2. */
  readonly smoothing?: SmoothingOptions | undefined;
  /** Phase 3's gradient refinement. */
  readonly refinement?: RefinementSettings | undefined;
}

/** A layer's violation. */
export interface LayerViolation extends Violation {
  readonly layer: string;
}

/** A part of θ as a whole: what the held-out step KL said of it. */
export interface GuardedReport {
  readonly kept: boolean;
  readonly heldOutBefore: number;
  readonly heldOutAfter: number;
  readonly milliseconds: number;
}

/** What the phases did, for reports. */
export interface PhasesReport {
  readonly groups: number | undefined;
  /** Of phase 1's samples. */
  readonly heldOutStepKl: number | undefined;
  readonly validation:
    | {
      /** Mean of the layers' scores. */
      readonly markovScore: number;
      /** `[groups − 1]`, means over the layers. */
      readonly boundaryScores: readonly number[];
      readonly violations: readonly LayerViolation[];
      /** Held-out step KL by time group, of so many samples. */
      readonly stepKlByGroup: readonly number[];
      readonly samples: number;
      /** Of the scores; and of the step KL beside them. */
      readonly milliseconds: number;
      readonly stepKlMilliseconds: number;
    }
    | undefined;
  readonly smoothing:
    | {
      readonly kept: readonly string[];
      readonly rejected: readonly string[];
      /** Step KL of the held-out samples inside a window, NaN where there are none. */
      readonly heldOutBefore: number;
      readonly heldOutAfter: number;
      readonly samples: number;
      readonly milliseconds: number;
    }
    | undefined;
  readonly refinement:
    | (Omit<RefinementReport, "layers"> & { readonly milliseconds: number })
    | undefined;
  readonly output: GuardedReport | undefined;
  readonly timeScales: GuardedReport | undefined;
  readonly sampler: GuardedReport | undefined;
  /** Layers whose tokens have grids of their own, as static ones do not suit them. */
  readonly perToken: readonly string[];
  /** First bin of every time group, and the axis's end. */
  readonly boundaries: readonly number[] | undefined;
  /** Of calibrating activations. */
  readonly activationMilliseconds: number | undefined;
  /** Bytes held for caches and statistics at most. */
  readonly statisticsBytes: number;
  readonly warnings: readonly string[];
}

/** A model as the phases left it, and what they did. */
export interface PhaseResult {
  readonly model: PhaseModel;
  readonly report: PhasesReport;
}

/**
 * Runs the wanted phases on a model whose codes are chosen. `weights` are not changed.
 *
 * @param refined an earlier run of the refinement alone with the same weights and settings, taken in place of another
 * @throws {RangeError} when there are more time groups than the axis has bins, or a setting is out of range
 * @throws {CalibrationError} when nothing was held out
 */
export async function runPhases(
  context: PhaseContext,
  weights: ReadonlyMap<string, PackedTensor>,
  settings: PhaseSettings,
  refined?: PhaseResult,
): Promise<PhaseResult> {
  const { refinement, output, timeScales, activations, smoothing, sampler, validation } = settings;
  const run = new PhaseRun(context, weights, settings);
  if (refined?.report.refinement !== undefined) run.takeRefinement(refined);
  else if (refinement !== undefined) await run.refine(refinement);
  if (output !== undefined) await run.addClosedForm("output");
  if (timeScales !== undefined) await run.addClosedForm("timeScales");
  if (activations !== undefined) await run.roundActivations(activations);
  if (activations !== undefined && smoothing !== undefined) await run.smooth(smoothing);
  if (sampler !== undefined) await run.correctSampler();
  if (activations !== undefined && validation !== undefined) await run.validate(validation);
  return run.result();
}
