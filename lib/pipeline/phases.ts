/**
 * The three phases on a model whose codes are chosen: static grids of activations by time group, gradient refinement (phase 3), smoothing
 * (phase 2) and validation (phase 1), each guarded by the held-out step KL. What the parts do is lib/time's, lib/thermo's and lib/models'.
 */
import { setImmediate } from "node:timers/promises";
import { CalibrationError } from "../errors.ts";
import {
  type DitBatch,
  type MaskedBatch,
  refineDit,
  refineMaskedTransformer,
  type RefinementReport,
  timeBiasesOf,
} from "../models/backward/mod.ts";
import { linear } from "../models/kernels.ts";
import {
  type LayerObserver,
  type LoadedModel,
  loadScheduler,
  modelFrom,
  type Scheduler,
} from "../models/mod.ts";
import type { Kernels } from "../native/mod.ts";
import type { PackedTensor } from "../quant/mod.ts";
import type { Checkpoint } from "../tensor/mod.ts";
import {
  blendTable,
  type GuardReport,
  keepWhereErrorDoesNotRise,
  learnedVarianceWeight,
  type MarkovReport,
  smoothActivationParameters,
  type SmoothingOptions,
  validateMarkov,
  validateSmooth,
  type Violation,
} from "../thermo/mod.ts";
import {
  type ActivationBits,
  ActivationHistogram,
  type ActivationParameters,
  equalTimeGroups,
  fakeQuantize,
  type LayerParameters,
  type RangeMethod,
  type TimeGroups,
  TimeParameters,
} from "../time/mod.ts";
import { type Calibrated, type CalibrationPart, loadCalibration } from "./calibration_data.ts";
import { maskedRows, meanStepKl, stepKlByGroup, StepKlMeter, stepWeights, timeAxisOf } from "./step_kl.ts";

/** Positions of one refinement step, roughly. */
const STEP_POSITIONS = 1152;
/** Longest gradient, in held-out step KLs of the start: a batch with one of the rare large errors would else undo many steps. */
const CLIP = 20;
/** Samples held out from the refinement: of language models more, because rare large errors decide their mean. */
const REFINEMENT_HELD_OUT = { sequences: 1024, images: 256 };
/** How much a visible token counts in the refinement's loss beside a masked one: attention reads it, nobody predicts it. */
const VISIBLE_WEIGHT = 0.03;
/** Iterations from one look at the held-out samples to the next. */
const VALIDATE_EVERY = 50;

/** A model in the making: its checkpoint, codes and what else takes the place of the checkpoint's own. */
export interface PhaseModel {
  readonly weights: ReadonlyMap<string, PackedTensor>;
  /** Refined biases by name. */
  readonly biases: ReadonlyMap<string, Float32Array<ArrayBuffer>>;
  readonly timeParameters: TimeParameters | undefined;
}

export interface RefinementSettings {
  readonly learningRate: number;
  readonly maxIterations: number;
  readonly convergenceThreshold: number;
  /** λ of the Gauss-Markov prior on biases by time group; undefined refines no such biases. */
  readonly timeBiases?: number | undefined;
}

export interface PhaseSettings {
  /** Time groups of the static activations; undefined leaves activations in full precision. */
  readonly activations?:
    | { readonly groups: number; readonly bits: ActivationBits; readonly range?: RangeMethod | undefined }
    | undefined;
  /** Phase 1. */
  readonly validation?: { readonly smoothnessThreshold: number } | undefined;
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
  readonly heldOutStepKl: number | undefined;
  readonly validation:
    | {
      /** Mean of the layers' scores. */
      readonly markovScore: number;
      /** `[groups − 1]`, means over the layers. */
      readonly boundaryScores: readonly number[];
      readonly violations: readonly LayerViolation[];
      /** Held-out step KL by time group. */
      readonly stepKlByGroup: readonly number[];
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

/** What the phases work with. */
export interface PhaseContext {
  readonly checkpoint: Checkpoint;
  readonly calibrated: Calibrated;
  readonly kernels: Kernels;
  readonly threads: number;
  /** Where the calibration data come from and with which seed, for more of them. */
  readonly source: string;
  readonly seed: number;
  readonly signal?: AbortSignal | undefined;
  readonly onProgress?: ((message: string) => void) | undefined;
}

/** Loads a model as it is in the making. */
export function loadPhaseModel(
  { checkpoint, kernels, threads }: PhaseContext,
  model: Partial<PhaseModel>,
): LoadedModel {
  return modelFrom(checkpoint, kernels, { threads, ...model });
}

/** The scheduler of an image model, undefined for others. */
export function schedulerOf(
  { calibrated, checkpoint }: Pick<PhaseContext, "calibrated" | "checkpoint">,
): Scheduler | undefined {
  return calibrated.kind === "images" ? loadScheduler(checkpoint.folder) : undefined;
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
  const meter = new StepKlMeter(calibrated, scheduler);
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
    const refined = await refine(context, scheduler, weights, settings.refinement, timeGroups);
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
    grids = new Map([...ranges.histograms].map(([name, own]) => {
      const all = own.map((histogram) => histogram.grid(activations.range ?? "minmax", activations.bits));
      return [name, {
        bits: activations.bits,
        scale: Float32Array.from(all, ({ scale }) => scale),
        zeroPoint: Int32Array.from(all, ({ zeroPoint }) => zeroPoint),
      }];
    }));
    model = { ...model, timeParameters: thetaOf(groups, grids, output) };
    activationMilliseconds = performance.now() - begin;
    context.signal?.throwIfAborted();
  }

  let smoothed: PhasesReport["smoothing"];
  if (smoothing !== undefined && grids !== undefined && groups !== undefined) {
    onProgress?.("boundary smoothing");
    const begin = performance.now();
    const smooth = new Map(
      [...grids].map(([name, own]) => [name, smoothActivationParameters(groups, own, smoothing)]),
    );
    const { left, right } = blendTable(groups, smoothing);
    const near = heldOutAt(calibrated, (time) => {
      const bin = groups.axis.binOf(time);
      return left[bin]! > 0 || right[bin]! > 0;
    });
    const samples = near.data.heldOut.reduce((sum, part) => sum + part.samples, 0);
    const guard = samples === 0
      ? { kept: [] as readonly string[], rejected: [...grids.keys()] as readonly string[] }
      : guardLayers(
        { ...context, calibrated: near },
        loadPhaseModel(context, { ...model, timeParameters: undefined }),
        groups,
        grids,
        smooth,
      );
    if (samples === 0) warnings.push("smoothing was rejected: no held-out sample lies in a window");
    const chosen = new Map(
      [...grids].map(([name, own]) => [name, guard.kept.includes(name) ? smooth.get(name)! : own]),
    );
    const candidate = { ...model, timeParameters: thetaOf(groups, chosen, output) };
    const nearMeter = new StepKlMeter(near, scheduler);
    const [heldOutBefore, after] = samples === 0
      ? [NaN, NaN]
      : [model, candidate].map((each) => meanStepKl(nearMeter.measure(loadPhaseModel(context, each)))) as [
        number,
        number,
      ];
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

// Activations --------------------------------------------------------------------------------------------------

/** Runs a model over calibration data; the observer also gets the time of each item of the batch. */
function observeParts(
  { calibrated }: PhaseContext,
  loaded: LoadedModel,
  part: "fit" | "heldOut",
  observer: (times: Float64Array, ...input: Parameters<LayerObserver>) => void,
): void {
  if (calibrated.kind === "sequences") {
    if (loaded.kind === "dit") {
      throw new TypeError("Cannot calibrate an image model with sequences of tokens");
    }
    for (const { batch: { inputIds, batch }, times } of calibrated.data[part]) {
      loaded.model.forward(inputIds, batch, { observe: (...input) => observer(times, ...input) });
    }
  } else {
    if (loaded.kind !== "dit") throw new TypeError("Cannot calibrate a language model with images");
    for (const { batch: { samples, timesteps, labels }, times } of calibrated.data[part]) {
      loaded.model.forward(samples, timesteps, labels, { observe: (...input) => observer(times, ...input) });
    }
  }
}

/** What the inputs of the wanted layers are in every time group; layers that read the same share them. */
function observeActivations(
  context: PhaseContext,
  loaded: LoadedModel,
  wanted: ReadonlySet<string>,
  groups: TimeGroups,
  warnings: string[],
): { readonly histograms: Map<string, readonly ActivationHistogram[]>; readonly bytes: number } {
  const histograms = new Map<string, ActivationHistogram[]>();
  const leaders = new Set<string>();
  for (const { layers } of loaded.model.stages) {
    const own = layers.filter(({ name }) => wanted.has(name) && !histograms.has(name));
    if (own.length === 0) continue;
    leaders.add(own[0]!.name);
    const shared = Array.from({ length: groups.count }, () => new ActivationHistogram());
    for (const { name } of own) histograms.set(name, shared);
  }
  observeParts(context, loaded, "fit", (times, { name, weights: { cols } }, x, rows) => {
    if (!leaders.has(name)) return;
    const own = histograms.get(name)!, each = rows / times.length * cols;
    for (const [item, time] of times.entries()) {
      own[groups.groupOf(time)]!.add(x.subarray(item * each, (item + 1) * each));
    }
  });
  const empty = new Set<number>();
  const filled = new Map([...histograms].map(([name, own]) => [
    name,
    own.map((histogram, g) => {
      if (histogram.count > 0) return histogram;
      empty.add(g);
      const nearest = own.map((other, i) => ({ other, distance: Math.abs(i - g) }))
        .filter(({ other }) => other.count > 0)
        .sort((a, b) => a.distance - b.distance)[0];
      if (nearest === undefined) {
        throw new CalibrationError(
          `Cannot calibrate ${JSON.stringify(name)}: it must read something, got nothing`,
          {
            tensor: name,
          },
        );
      }
      return nearest.other;
    }),
  ]));
  if (empty.size > 0) {
    warnings.push(
      `no calibration sample is in ${empty.size} of ${groups.count} time groups: they take their neighbours' ranges`,
    );
  }
  const bytes = [...leaders].reduce(
    (sum, name) => sum + histograms.get(name)!.reduce((all, histogram) => all + histogram.bytes, 0),
    0,
  );
  return { histograms: filled, bytes };
}

/** The held-out samples at some times alone. */
function heldOutAt(calibrated: Calibrated, isWanted: (time: number) => boolean): Calibrated {
  const wanted = ({ times }: { readonly times: Float64Array }) =>
    [...times.keys()].filter((i) => isWanted(times[i]!));
  const pick = <Values extends Float32Array | Int32Array>(
    values: Values,
    samples: number,
    items: number[],
  ) => {
    const each = values.length / samples;
    const out = values.slice(0, items.length * each);
    for (const [to, from] of items.entries()) {
      out.set(values.subarray(from * each, (from + 1) * each), to * each);
    }
    return out as Values;
  };
  if (calibrated.kind === "sequences") {
    const heldOut = calibrated.data.heldOut.flatMap((part) => {
      const items = wanted(part);
      if (items.length === 0) return [];
      return [{
        batch: { inputIds: pick(part.batch.inputIds, part.samples, items), batch: items.length },
        samples: items.length,
        weights: pick(part.weights, part.samples, items),
        times: Float64Array.from(items, (i) => part.times[i]!),
      }];
    });
    return { ...calibrated, data: { ...calibrated.data, heldOut } };
  }
  const heldOut = calibrated.data.heldOut.flatMap((part) => {
    const items = wanted(part);
    if (items.length === 0) return [];
    return [{
      batch: {
        samples: pick(part.batch.samples, part.samples, items),
        timesteps: items.map((i) => part.batch.timesteps[i]!),
        labels: items.map((i) => part.batch.labels[i]!),
      },
      samples: items.length,
      weights: pick(part.weights, part.samples, items),
      times: Float64Array.from(items, (i) => part.times[i]!),
    }];
  });
  return { ...calibrated, data: { ...calibrated.data, heldOut } };
}

/** Decides layer by layer by ‖Ŵ (Q(x) − x)‖² over held-out inputs at the times where the grids differ. */
function guardLayers(
  context: PhaseContext,
  loaded: LoadedModel,
  groups: TimeGroups,
  before: ReadonlyMap<string, ActivationParameters>,
  after: ReadonlyMap<string, ActivationParameters>,
): GuardReport {
  const { kernels, threads } = context;
  const errors = new Map([...before.keys()].map((name) => [name, { before: 0, after: 0 }]));
  observeParts(context, loaded, "heldOut", (times, { name, weights }, x, rows) => {
    const sums = errors.get(name);
    if (sums === undefined) return;
    const old = before.get(name)!, smooth = after.get(name)!;
    const each = rows / times.length, { cols } = weights;
    for (const [item, time] of times.entries()) {
      const bin = groups.axis.binOf(time), group = groups.groupOfBin(bin);
      if (old.scale[group] === smooth.scale[bin] && old.zeroPoint[group] === smooth.zeroPoint[bin]) continue;
      const input = x.subarray(item * each * cols, (item + 1) * each * cols);
      const errorOf = ({ scale, zeroPoint, bits }: ActivationParameters, index: number) => {
        const lost = fakeQuantize(
          input,
          { scale: scale[index]!, zeroPoint: zeroPoint[index]! },
          bits,
          new Float32Array(input.length),
        );
        for (let i = 0; i < lost.length; i++) lost[i]! -= input[i]!;
        return linear(kernels, lost, each, weights, undefined, { threads }).reduce(
          (sum, v) => sum + v * v,
          0,
        );
      };
      sums.before += errorOf(old, group);
      sums.after += errorOf(smooth, bin);
    }
  });
  return keepWhereErrorDoesNotRise(before.keys(), (name) => errors.get(name)!);
}

// Refinement ---------------------------------------------------------------------------------------------------

async function refine(
  context: PhaseContext,
  scheduler: Scheduler | undefined,
  weights: ReadonlyMap<string, PackedTensor>,
  { timeBiases, ...settings }: RefinementSettings,
  timeGroups: TimeGroups | undefined,
): Promise<
  {
    readonly report: RefinementReport;
    readonly biases: ReadonlyMap<string, Float32Array<ArrayBuffer>>;
    /** Of data that decide whether it is kept, and what they say of the model as it came. */
    readonly meter: StepKlMeter;
    readonly before: number;
  }
> {
  const { checkpoint, calibrated, source, seed } = context;
  const quantized = loadPhaseModel(context, { weights });
  const full: LoadedModel = loadPhaseModel(context, {});
  const first: CalibrationPart<unknown> = calibrated.data.fit[0]!;
  const positions = first.weights.length / first.samples;
  const size = Math.max(1, Math.floor(STEP_POSITIONS / positions));
  // New masks and noise every step; records come again.
  const more = await loadCalibration(full, { source, samples: size * settings.maxIterations, seed });
  const heldOut = {
    ...more,
    data: { ...more.data, heldOut: more.data.heldOut.slice(0, enoughParts(more)) },
  } as Calibrated;
  const meter = new StepKlMeter(heldOut, scheduler);
  const before = meanStepKl(meter.measure(quantized));
  const options = {
    ...settings,
    timeGroups,
    markovWeight: timeBiases,
    validateEvery: VALIDATE_EVERY,
    threads: context.threads,
    clipNorm: Math.max(CLIP * before, Number.MIN_VALUE),
  };
  const report = more.kind === "sequences"
    ? refineMaskedTransformer(
      (quantized as Extract<LoadedModel, { kind: "dream" | "llada" }>).model,
      more.model,
      {
        train: more.data.fit.flatMap((part) => maskedBatches(more, part, size, VISIBLE_WEIGHT)),
        heldOut: firstSamples(
          more.data.heldOut.flatMap((part) => maskedBatches(more, part, size, 0)),
          REFINEMENT_HELD_OUT.sequences,
          size,
        ),
      },
      { ...options, excludedTokens: excludedOf(more) },
    )
    : refineDit(
      (quantized as Extract<LoadedModel, { kind: "dit" }>).model,
      more.model,
      {
        train: more.data.fit.flatMap((part) => imageBatches(more, scheduler!, part, size)),
        heldOut: firstSamples(
          more.data.heldOut.flatMap((part) => imageBatches(more, scheduler!, part, size)),
          REFINEMENT_HELD_OUT.images,
          size,
        ),
      },
      options,
    );
  const biases = new Map(report.layers.flatMap(({ name, bias }) => {
    const biasName = name.replace(/weight$/, "bias"), dtype = checkpoint.tensors.get(biasName)?.info.dtype;
    const isStored = dtype === "F32" || dtype === "F16" || dtype === "BF16";
    return bias === undefined || !isStored ? [] : [[biasName, asStored(bias, dtype)] as const];
  }));
  return { report, biases, meter, before };
}

const firstSamples = <Batch>(batches: readonly Batch[], samples: number, size: number): readonly Batch[] =>
  batches.slice(0, Math.max(1, Math.ceil(samples / size)));

/** Parts that hold the held-out samples of the refinement. */
const enoughParts = ({ kind, data: { heldOut } }: Calibrated) =>
  Math.max(1, Math.ceil(REFINEMENT_HELD_OUT[kind] / (heldOut[0]?.samples ?? 1)));

/** Values as a type of the checkpoint gives them back. */
function asStored(values: Float32Array<ArrayBuffer>, dtype: string): Float32Array<ArrayBuffer> {
  if (dtype === "F16") return values.map(Math.f16round);
  if (dtype !== "BF16") return values.slice();
  const words = new Uint32Array(values.slice().buffer);
  for (let i = 0; i < words.length; i++) {
    words[i] = (words[i]! + 0x7fff + ((words[i]! >>> 16) & 1)) & 0xffff0000; // half to even
  }
  return new Float32Array(words.buffer);
}

type Sequences = Extract<Calibrated, { kind: "sequences" }>;
type Images = Extract<Calibrated, { kind: "images" }>;

const excludedOf = ({ model: { config: { maskToken, padToken } } }: Sequences) =>
  padToken === undefined ? [maskToken] : [maskToken, padToken];

function maskedBatches(
  { model: { config }, shift }: Sequences,
  { batch: { inputIds }, samples, times }: Sequences["data"]["fit"][number],
  size: number,
  visibleWeight: number,
): MaskedBatch[] {
  const { maskToken, padToken } = config, tokens = inputIds.length / samples;
  return Array.from({ length: Math.ceil(samples / size) }, (_, i): MaskedBatch => {
    const begin = i * size, end = Math.min(samples, begin + size);
    const ids = inputIds.slice(begin * tokens, end * tokens);
    const common = { inputIds: ids, batch: end - begin, times: times.slice(begin, end) };
    if (visibleWeight === 0) return { ...common, rows: maskedRows(ids, tokens, maskToken, shift) };
    const rows: number[] = [], weights: number[] = [];
    for (let at = 0; at < ids.length; at++) {
      if (ids[at] === padToken || at % tokens < shift) continue;
      rows.push(at - shift);
      weights.push(ids[at] === maskToken ? 1 : visibleWeight);
    }
    return { ...common, rows: Int32Array.from(rows), weights };
  });
}

function imageBatches(
  { model: { imageElements, config } }: Images,
  scheduler: Scheduler,
  { batch: { samples, timesteps, labels } }: Images["data"]["fit"][number],
  size: number,
): DitBatch[] {
  const transitions = stepWeights(scheduler);
  return Array.from({ length: Math.ceil(labels.length / size) }, (_, i): DitBatch => {
    const begin = i * size, end = Math.min(labels.length, begin + size);
    const times = Array.from(timesteps).slice(begin, end);
    return {
      samples: samples.slice(begin * imageElements, end * imageElements),
      timesteps: times,
      labels: Array.from(labels).slice(begin, end),
      weights: times.map((t) => transitions.weightOf(t)),
      varianceWeights: config.learnsVariance
        ? times.map((t) => learnedVarianceWeight(transitions.schedule, t))
        : undefined,
    };
  });
}
