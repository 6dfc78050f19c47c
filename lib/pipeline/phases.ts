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
import { fewestWithin, groupsByInputs, orderByStaticCost, staticGrids } from "./activation_grids.ts";
import { closedFormParameters, type OutputSettings } from "./phase_outputs.ts";
import { fitSampler } from "./phase_sampler.ts";
import { fewHeldOut, heldOutWhere, layerGuard, mapShared, observeActivations } from "./phase_activations.ts";
import { loadPhaseModel, type PhaseContext, type PhaseModel, schedulerOf } from "./phase_context.ts";
import { type RefinementSettings, refinePhase } from "./phase_refinement.ts";
import { meanStepKl, stepKlByGroup, StepKlMeter, timeAxisOf } from "./step_kl.ts";

/** So few that looking costs a hundredth of solving: a diagnosis, which nothing is chosen by. */
const VALIDATION_SAMPLES = 32;

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
  const { calibrated, onProgress } = context;
  const { activations, validation, smoothing } = settings;
  const scheduler = schedulerOf(context);
  const axis = timeAxisOf(scheduler);
  const counts = [activations, settings.output, settings.timeScales, settings.sampler]
    .flatMap((own) => own?.groups ?? []);
  if (new Set(counts).size > 1) {
    throw new RangeError(
      `Cannot run the phases: all time parameters must have the same groups, got ${
        [...new Set(counts)].join(" and ")
      }`,
    );
  }
  if (settings.output !== undefined && counts.length === 0) {
    throw new RangeError(
      "Cannot run the phases: an output correction must have a number of time groups, got none",
    );
  }
  if (settings.output !== undefined && settings.timeScales !== undefined) {
    throw new RangeError(
      "Cannot run the phases: there must be output corrections or own weight scales, got both",
    );
  }
  let groups = counts.length === 0 ? undefined : equalTimeGroups(axis, counts[0]!);
  const perTokenLimit = activations?.perTokenLimit ?? Infinity;
  if (!(perTokenLimit >= 1)) {
    throw new RangeError(`Cannot run the phases: perTokenLimit must be at least 1, got ${perTokenLimit}`);
  }
  if (calibrated.data.heldOut.length === 0) {
    throw new CalibrationError(
      "Cannot run the phases: some calibration records must be held out, got too few",
    );
  }
  const meter = new StepKlMeter(calibrated, scheduler), warnings: string[] = [];
  let model: PhaseModel = { weights, biases: new Map(), timeParameters: undefined };
  let statisticsBytes = 0;
  const output = new Map<string, LayerParameters>(), perToken = new Set<string>();

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

  const guarded = { output: undefined, timeScales: undefined } as Record<
    "output" | "timeScales",
    GuardedReport | undefined
  >;
  for (const part of ["output", "timeScales"] as const) {
    if (settings[part] === undefined || groups === undefined) continue;
    onProgress?.(part === "output" ? "output correction" : "weight scales by time");
    const begin = performance.now();
    const closed = await closedFormParameters(context, model.weights, groups, {
      output: settings.output,
      hasWeightScales: part === "timeScales",
    });
    statisticsBytes = Math.max(statisticsBytes, closed.bytes);
    const heldOutBefore = meanStepKl(meter.measure(loadPhaseModel(context, model)));
    // What the refinement gave a layer is on the true step KL, and stays.
    const merged = new Map([...closed.layers, ...output]);
    const candidate = { ...model, timeParameters: new TimeParameters(groups, merged, "") };
    const after = meanStepKl(meter.measure(loadPhaseModel(context, candidate)));
    const kept = after < heldOutBefore || settings.isGuarded === false;
    if (kept) {
      model = candidate;
      for (const [name, own] of merged) output.set(name, own);
    } else {
      warnings.push(
        `${
          part === "output" ? "the output correction was" : "weight scales by time were"
        } rejected: held-out step KL ${heldOutBefore} before, ${after} after`,
      );
    }
    guarded[part] = {
      kept,
      heldOutBefore,
      heldOutAfter: kept ? after : heldOutBefore,
      milliseconds: performance.now() - begin,
    };
    await setImmediate();
    context.signal?.throwIfAborted();
  }

  let activationMilliseconds: number | undefined, grids: Map<string, ActivationParameters> | undefined;
  if (activations !== undefined && groups !== undefined) {
    onProgress?.("activations");
    const begin = performance.now();
    const plain = loadPhaseModel(context, { ...model, timeParameters: undefined });
    const names = new Set(weights.keys()), { bits } = activations;
    const klOf = (theta: TimeParameters) =>
      meanStepKl(meter.measure(loadPhaseModel(context, { ...model, timeParameters: theta })));
    const gridsOf = (own: TimeGroups) => {
      const ranges = observeActivations(context, plain, names, own, warnings);
      statisticsBytes = Math.max(statisticsBytes, ranges.bytes);
      return staticGrids(ranges.histograms, bits, activations.range);
    };
    if (activations.isPerToken === true) {
      for (const name of names) perToken.add(name);
      grids = new Map();
    } else grids = gridsOf(groups);
    if (activations.grouping === "adaptive" && activations.isPerToken !== true) {
      // θ by time group that is there already has the groups it was made for.
      const adaptive = groupsByInputs(context, plain, names, axis, activations.groups);
      const candidate = gridsOf(adaptive);
      const [before, after] = [
        klOf(thetaOf(groups, grids, output, perToken, bits)),
        klOf(thetaOf(adaptive, candidate, new Map(), perToken, bits)),
      ];
      if (output.size === 0 && after < before) [groups, grids] = [adaptive, candidate];
      else {
        warnings.push(
          `adaptive time groups were rejected: ${
            output.size > 0
              ? "other time parameters have equal ones"
              : `held-out step KL ${before} before, ${after} after`
          }`,
        );
      }
    }
    if (perTokenLimit < Infinity && grids.size > 0) {
      const own = groups, all = grids, rest = output;
      const costly = orderByStaticCost(context, plain, all, own);
      const firstOf = (count: number) => new Set(costly.slice(0, count).flat());
      const staticBut = (dynamic: ReadonlySet<string>) =>
        thetaOf(own, new Map([...all].filter(([name]) => !dynamic.has(name))), rest, dynamic, bits);
      // Rounding may lower the step KL by chance: not a limit to reach.
      const limit = perTokenLimit * Math.max(klOf(staticBut(names)), meanStepKl(meter.measure(plain)));
      const count = fewestWithin(costly.length, limit, (changed) => klOf(staticBut(firstOf(changed))));
      for (const name of firstOf(count)) {
        perToken.add(name);
        grids.delete(name);
      }
    }
    model = { ...model, timeParameters: thetaOf(groups, grids, output, perToken, bits) };
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
      candidate = { ...model, timeParameters: thetaOf(groups, chosen, output, perToken, activations!.bits) };
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

  let sampler: PhasesReport["sampler"];
  if (settings.sampler !== undefined && groups !== undefined) {
    onProgress?.("sampler correction");
    const begin = performance.now();
    const fitted = fitSampler(context, loadPhaseModel(context, model), groups);
    const kept = fitted.after < fitted.before || settings.isGuarded === false;
    if (kept) {
      const layers = model.timeParameters?.layers ?? new Map<string, LayerParameters>();
      model = { ...model, timeParameters: new TimeParameters(groups, layers, "", fitted.sampler) };
    } else {
      warnings.push(
        `the sampler's correction was rejected: held-out step KL ${fitted.before} before, ${fitted.after} after`,
      );
    }
    sampler = {
      kept,
      heldOutBefore: fitted.before,
      heldOutAfter: kept ? fitted.after : fitted.before,
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
    const few = new StepKlMeter(fewHeldOut(calibrated, samples), scheduler);
    const measured = few.measure(loadPhaseModel(context, model));
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
      boundaries: groups && [...groups.boundaries],
      perToken: [...perToken],
      ...guarded,
      sampler,
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
  perToken: ReadonlySet<string>,
  bits: ActivationBits,
): TimeParameters {
  const names = new Set([...grids.keys(), ...output.keys(), ...perToken]);
  return new TimeParameters(
    groups,
    new Map([...names].map((name) => [name, {
      ...output.get(name),
      activation: grids.get(name),
      perToken: perToken.has(name) ? bits : undefined,
    }])),
    "",
  );
}
