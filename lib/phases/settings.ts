/** Settings of the phases, as `runPhases` takes them, and the refinement's defaults by family. */
import type { Config } from "../config/mod.ts";
import type { SmoothingOptions } from "../thermo/mod.ts";
import type { ActivationBits, RangeMethod } from "../time/mod.ts";

/** Quantized activations. */
export interface ActivationSettings {
  /** Time groups, each with its static range. */
  readonly groups: number;
  /** Bits of an activation. */
  readonly bits: ActivationBits;
  /** How a group's range is found; default minimum and maximum at 8 bits, least squared error at 4. */
  readonly range?: RangeMethod | undefined;
  /** `adaptive`: boundaries where inputs change, if the held-out step KL falls. Default `equal`. */
  readonly grouping?: "equal" | "adaptive" | undefined;
  /**
   * Per-token dynamic quantization for the layers that lose most with static ranges, until the held-out step
   * KL is at most this many times that of per-token quantization everywhere, or of activations in full
   * precision where that is larger. At least 1; default `Infinity`: for no layer.
   */
  readonly perTokenLimit?: number | undefined;
  /** Per-token dynamic quantization for every layer (baseline for static ranges). */
  readonly isPerToken?: boolean | undefined;
}

/** Output corrections. */
export interface OutputSettings {
  /** Time groups; default as many as the activations'. */
  readonly groups?: number | undefined;
  /** λ of the Gauss-Markov prior, relative to the data term: 0, the default (none), to 100. */
  readonly markovWeight?: number | undefined;
}

/** Phase 3's gradient refinement. */
export interface RefinementSettings {
  /** Step size; default by family, {@linkcode REFINEMENT_DEFAULTS}. */
  readonly learningRate?: number | undefined;
  /** Default by family. */
  readonly maxIterations?: number | undefined;
  /** Time that it may take, loading of samples and held-out measures among it. Default none. */
  readonly maxMinutes?: number | undefined;
  /** Relative change of the mean loss below which it has converged; 0 never. Default 1e-4. */
  readonly convergenceThreshold?: number | undefined;
  /** Temperature at which the entropy term begins, in squared steps of the scale. Default 0: no such term. */
  readonly entropyWeight?: number | undefined;
  /** λ of the Markov term on biases by time group; undefined refines no such biases. */
  readonly timeBiases?: number | undefined;
}

/** Which phases run, and how. */
export interface PhaseSettings {
  /** Time groups of the static activations; undefined leaves activations in full precision. */
  readonly activations?: ActivationSettings | undefined;
  /** Whether closed-form parameters need the held-out step KL to fall; false to measure. Default true. */
  readonly isGuarded?: boolean | undefined;
  /** Output corrections by time group, kept if the held-out step KL falls. */
  readonly output?: OutputSettings | undefined;
  /** Weight scales of each of so many time groups over shared codes, kept if the held-out step KL falls. */
  readonly timeScales?: { readonly groups: number } | undefined;
  /** The sampler's correction of an image model, kept if the held-out step KL falls. */
  readonly sampler?: { readonly groups: number } | undefined;
  /** Phase 1. `samples`: held-out samples behind the step KL, about; default 32, or two a time group. */
  readonly validation?:
    | { readonly smoothnessThreshold: number; readonly samples?: number | undefined }
    | undefined;
  /** Phase 2. */
  readonly smoothing?: SmoothingOptions | undefined;
  /** Phase 3's gradient refinement. */
  readonly refinement?: RefinementSettings | undefined;
}

/** A model's family, as calibration data tell it: masked language models read sequences, DiT images. */
export type Family = "sequences" | "images";

/**
 * Step size and iterations of the refinement by family: a step of an image model costs as much as twenty of a
 * small language model's, and its loss is carried by few timesteps, so that large steps undo each other.
 * docs/phases.md has the measurements.
 */
export const REFINEMENT_DEFAULTS: Readonly<
  Record<Family, { readonly learningRate: number; readonly maxIterations: number }>
> = {
  sequences: { learningRate: 0.01, maxIterations: 300 },
  images: { learningRate: 0.002, maxIterations: 150 },
};

/** The settings that a configuration asks for. */
export function phaseSettings(config: Config, isImageModel: boolean): PhaseSettings {
  const { thermodynamic, enableTimeAware, numTimeGroups: groups } = config;
  const { validation, boundarySmoothing, transitionOptimization } = thermodynamic;
  const { learningRate, maxIterations, maxMinutes, convergenceThreshold, markovWeight, entropyWeight } =
    transitionOptimization;
  const ofTime: PhaseSettings = enableTimeAware
    ? {
      activations: {
        groups,
        bits: config.activationBits,
        grouping: config.timeGroups,
        perTokenLimit: config.perTokenLimit ?? undefined,
      },
      output: config.outputCorrection ? { groups, markovWeight } : undefined,
      timeScales: config.timeScales === "per_group" ? { groups } : undefined,
      sampler: config.samplerCorrection && isImageModel ? { groups } : undefined,
    }
    : {};
  return {
    ...ofTime,
    validation: validation.enabled ? { smoothnessThreshold: validation.smoothnessThreshold } : undefined,
    smoothing: boundarySmoothing.enabled
      ? { windowSize: boundarySmoothing.windowSize, interpolation: boundarySmoothing.interpolation }
      : undefined,
    refinement: transitionOptimization.enabled
      ? {
        learningRate: learningRate ?? undefined,
        maxIterations: maxIterations ?? undefined,
        maxMinutes,
        convergenceThreshold,
        entropyWeight,
        timeBiases: ofTime.output && markovWeight,
      }
      : undefined,
  };
}
