/**
 * The three phases on a model whose codes are chosen: static grids of activations by time group, gradient refinement (phase 3), smoothing
 * (phase 2) and validation (phase 1), each guarded by the held-out step KL. What the parts do is lib/time's, lib/thermo's and lib/models'.
 */
import { setImmediate } from "node:timers/promises";
import { CalibrationError } from "../errors.ts";
import { type RefinementReport, timeBiasesOf } from "../models/backward/mod.ts";
import type { PackedTensor } from "../quant/mod.ts";
import {
  blendTable,
  type GuardReport,
  type MarkovReport,
  smoothActivationParameters,
  type SmoothingOptions,
  validateMarkov,
  validateSmooth,
  type Violation,
} from "../thermo/mod.ts";
import {
  type ActivationBits,
  type ActivationParameters,
  equalTimeGroups,
  type LayerParameters,
  type RangeMethod,
  type TimeGroups,
  TimeParameters,
} from "../time/mod.ts";
import { fewHeldOut, heldOutWhere, layerGuard, mapShared, observeActivations } from "./phase_activations.ts";
import { loadPhaseModel, type PhaseContext, type PhaseModel, schedulerOf } from "./phase_context.ts";
import { type RefinementSettings, refinePhase } from "./phase_refinement.ts";
import { meanStepKl, stepKlByGroup, StepKlMeter, timeAxisOf } from "./step_kl.ts";

/** So few that looking costs a hundredth of solving: a diagnosis, which nothing is chosen by. */
const VALIDATION_SAMPLES = 32;

export interface PhaseSettings {
  /** Time groups of the static activations; undefined leaves activations in full precision. */
  readonly activations?:
    | { readonly groups: number; readonly bits: ActivationBits; readonly range?: RangeMethod | undefined }
    | undefined;
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
  const { calibrated, onProgress } = context;
  const { activations, validation, smoothing } = settings;
  const scheduler = schedulerOf(context);
  const groups = activations && equalTimeGroups(timeAxisOf(scheduler), activations.groups);
  if (calibrated.data.heldOut.length === 0) {
    throw new CalibrationError(
      "Cannot run the phases: some calibration records must be held out, got too few",
    );
  }
  const warnings: string[] = [];
  let model: PhaseModel = { weights, biases: new Map(), timeParameters: undefined };
  let statisticsBytes = 0;
  const output = new Map<string, LayerParameters>();

  let refinement: PhasesReport["refinement"];
  if (refined?.report.refinement !== undefined) {
    ({ model, report: { refinement } } = refined);
  } else if (settings.refinement !== undefined) {
    onProgress?.("gradient refinement");
    const begin = performance.now();
    const timeGroups = settings.refinement.timeBiases === undefined ? undefined : groups;
    const refined = await refinePhase(context, scheduler, weights, settings.refinement, timeGroups);
    const { layers, ...report } = refined.report;
    let kept = report.kept;
    const heldOutBefore = refined.before;
    let heldOutAfter = heldOutBefore;
    if (kept) {
      const theta = timeBiasesOf(layers);
      const candidate: PhaseModel = {
        weights: new Map([...weights, ...layers.map((layer) => [layer.name, layer.weights] as const)]),
        biases: refined.biases,
        timeParameters: theta.size === 0 ? undefined : new TimeParameters(timeGroups!, theta, ""),
      };
      // As it will be stored: biases rounded as well.
      const after = meanStepKl(refined.meter.measure(loadPhaseModel(context, candidate)));
      kept = after < heldOutBefore;
      if (kept) {
        model = candidate;
        heldOutAfter = after;
        for (const [name, own] of theta) output.set(name, own);
      }
    }
    if (!kept) {
      warnings.push(`the refinement was rejected: held-out step KL did not fall below ${heldOutBefore}`);
    }
    refinement = { ...report, heldOutBefore, heldOutAfter, kept, milliseconds: performance.now() - begin };
    statisticsBytes = report.scratchBytes;
    await setImmediate();
    context.signal?.throwIfAborted();
  }

  let activationMilliseconds: number | undefined, grids: Map<string, ActivationParameters> | undefined;
  if (activations !== undefined && groups !== undefined) {
    onProgress?.("activations");
    const begin = performance.now();
    const plain = loadPhaseModel(context, { ...model, timeParameters: undefined });
    const ranges = observeActivations(context, plain, new Set(weights.keys()), groups, warnings);
    statisticsBytes = Math.max(statisticsBytes, ranges.bytes);
    grids = mapShared(ranges.histograms, (own) => {
      const all = own.map((histogram) => histogram.grid(activations.range ?? "minmax", activations.bits));
      return {
        bits: activations.bits,
        scale: Float32Array.from(all, ({ scale }) => scale),
        zeroPoint: Int32Array.from(all, ({ zeroPoint }) => zeroPoint),
      };
    });
    model = { ...model, timeParameters: thetaOf(groups, grids, output) };
    activationMilliseconds = performance.now() - begin;
    context.signal?.throwIfAborted();
  }

  let smoothed: PhasesReport["smoothing"];
  if (smoothing !== undefined && grids !== undefined && groups !== undefined) {
    onProgress?.("boundary smoothing");
    const begin = performance.now();
    const smooth = mapShared(grids, (own) => smoothActivationParameters(groups, own, smoothing));
    const { left, right } = blendTable(groups, smoothing);
    const near = heldOutWhere(calibrated, (time) => {
      const bin = groups.axis.binOf(time);
      return left[bin]! > 0 || right[bin]! > 0;
    });
    const samples = near.data.heldOut.reduce((sum, part) => sum + part.samples, 0);
    if (samples === 0) warnings.push("smoothing was rejected: no held-out sample lies in a window");
    let heldOutBefore = NaN, after = NaN, candidate = model, chosen = grids;
    let guard: Pick<GuardReport, "kept" | "rejected"> = { kept: [], rejected: [...grids.keys()] };
    if (samples > 0) {
      // One run of the model as it came is both measured and looked into.
      const nearMeter = new StepKlMeter(near, scheduler), layers = layerGuard(context, groups, grids, smooth);
      heldOutBefore = meanStepKl(nearMeter.measure(loadPhaseModel(context, model), layers.observe));
      guard = layers.report();
      const kept = new Set(guard.kept);
      chosen = new Map([...grids].map(([name, own]) => [name, kept.has(name) ? smooth.get(name)! : own]));
      candidate = { ...model, timeParameters: thetaOf(groups, chosen, output) };
      after = meanStepKl(nearMeter.measure(loadPhaseModel(context, candidate)));
    }
    const isKept = after <= heldOutBefore;
    if (isKept) [model, grids] = [candidate, chosen];
    else if (samples > 0) {
      warnings.push(`smoothing was rejected: held-out step KL ${heldOutBefore} before, ${after} after`);
    }
    smoothed = {
      kept: isKept ? guard.kept : [],
      rejected: isKept ? guard.rejected : [...grids.keys()],
      heldOutBefore,
      heldOutAfter: isKept ? after : heldOutBefore,
      samples,
      milliseconds: performance.now() - begin,
    };
    context.signal?.throwIfAborted();
  }

  let validated: PhasesReport["validation"], heldOutStepKl: number | undefined;
  if (validation !== undefined && grids !== undefined && groups !== undefined) {
    onProgress?.("validation");
    const begin = performance.now();
    const reports = new Map<string, MarkovReport>([...grids].map(([name, own]) => [
      name,
      own.scale.length === groups.count
        ? validateMarkov(own, validation.smoothnessThreshold)
        : validateSmooth(groups, float64(own), validation.smoothnessThreshold),
    ]));
    const all = [...reports.values()];
    const mean = (value: (report: MarkovReport) => number) =>
      all.reduce((sum, report) => sum + value(report), 0) / Math.max(1, all.length);
    const scored = performance.now();
    const { samples = Math.max(VALIDATION_SAMPLES, 2 * groups.count) } = validation;
    const meter = new StepKlMeter(fewHeldOut(calibrated, samples), scheduler);
    const measured = meter.measure(loadPhaseModel(context, model));
    heldOutStepKl = meanStepKl(measured);
    validated = {
      markovScore: all.length === 0 ? 1 : mean(({ markovScore }) => markovScore),
      boundaryScores: Array.from(
        { length: groups.count - 1 },
        (_, i) => mean((report) => report.boundaryScores[i]!),
      ),
      violations: [...reports].flatMap(([layer, { violations }]) =>
        violations.map((violation) => ({ ...violation, layer }))
      ),
      stepKlByGroup: [...stepKlByGroup(measured, groups)],
      samples: measured.sums.length,
      milliseconds: scored - begin,
      stepKlMilliseconds: performance.now() - scored,
    };
  }
  return {
    model,
    report: {
      groups: groups?.count,
      heldOutStepKl,
      validation: validated,
      smoothing: smoothed,
      refinement,
      activationMilliseconds,
      statisticsBytes,
      warnings,
    },
  };
}

const float64 = ({ scale, zeroPoint, bits }: ActivationParameters) => ({
  scale: Float64Array.from(scale),
  zeroPoint: Float64Array.from(zeroPoint),
  bits,
});

function thetaOf(
  groups: TimeGroups,
  grids: ReadonlyMap<string, ActivationParameters>,
  output: ReadonlyMap<string, LayerParameters>,
): TimeParameters {
  const names = new Set([...grids.keys(), ...output.keys()]);
  return new TimeParameters(
    groups,
    new Map([...names].map((name) => [name, { ...output.get(name), activation: grids.get(name) }])),
    "",
  );
}
