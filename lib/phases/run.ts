/** The phases one by one: each takes the model as the last left it, and adds to the report. */
import { CalibrationError } from "../errors.ts";
import { timeBiasesOf } from "../models/backward/mod.ts";
import { pause } from "../progress.ts";
import type { PackedTensor } from "../quant/mod.ts";
import {
  blendTable,
  type GuardReport,
  type MarkovReport,
  smoothActivationParameters,
  type SmoothingOptions,
  type TransitionComputer,
  validateMarkov,
  validateSmooth,
} from "../thermo/mod.ts";
import {
  type ActivationParameters,
  equalTimeGroups,
  type LayerParameters,
  type TimeAxis,
  type TimeGroups,
  TimeParameters,
} from "../time/mod.ts";
import { fewestWithin, groupsByInputs, orderByStaticCost, staticGrids } from "./activation_grids.ts";
import { fewHeldOut, heldOutWhere, layerGuard, mapShared, observeActivations } from "./activations.ts";
import { loadPhaseModel, type PhaseContext, type PhaseModel, transitionsOf } from "./context.ts";
import { closedFormParameters } from "./outputs.ts";
import { refinePhase } from "./refinement.ts";
import type { GuardedReport, PhaseResult, PhasesReport } from "./report.ts";
import { fitSampler } from "./sampler.ts";
import type { ActivationSettings, PhaseSettings, RefinementSettings } from "./settings.ts";
import { meanStepKl, type StepKl, stepKlByGroup, StepKlMeter } from "../calibration/step_kl.ts";

/** Few, so that measuring them costs a hundredth of solving: they are a diagnosis, which decides nothing. */
const VALIDATION_SAMPLES = 32;

type Layers = ReadonlyMap<string, LayerParameters>;
type Grids = ReadonlyMap<string, ActivationParameters>;

/** The reports of phases that were not asked for. */
const NOTHING: Omit<
  PhasesReport,
  "groups" | "boundaries" | "perToken" | "transitionCache" | "statisticsBytes" | "warnings"
> = {
  heldOutStepKl: undefined,
  validation: undefined,
  smoothing: undefined,
  refinement: undefined,
  output: undefined,
  timeScales: undefined,
  sampler: undefined,
  activations: undefined,
  activationMilliseconds: undefined,
};

/** The time groups of all time parameters. @throws {RangeError} when they differ or exclude each other */
function timeGroupsOf(
  axis: TimeAxis,
  { activations, output, timeScales, sampler }: PhaseSettings,
): TimeGroups | undefined {
  const counts = [activations, output, timeScales, sampler].flatMap((own) => own?.groups ?? []);
  const fail = (reason: string) => new RangeError(`Cannot run the phases: ${reason}`);
  if (new Set(counts).size > 1) {
    throw fail(`all time parameters must have the same groups, got ${[...new Set(counts)].join(" and ")}`);
  }
  if (output !== undefined && counts.length === 0) {
    throw fail("an output correction must have a number of time groups, got none");
  }
  if (output !== undefined && timeScales !== undefined) {
    throw fail("there must be output corrections or weight scales by time, got both");
  }
  const { perTokenLimit = Infinity } = activations ?? {};
  if (!(perTokenLimit >= 1)) throw fail(`perTokenLimit must be at least 1, got ${perTokenLimit}`);
  return counts.length === 0 ? undefined : equalTimeGroups(axis, counts[0]!);
}

/** A model on its way through the phases. */
export class PhaseSequence {
  readonly #context: PhaseContext;
  readonly #settings: PhaseSettings;
  readonly #transitions: TransitionComputer;
  /** Of all held-out samples. */
  readonly #meter: StepKlMeter;
  /** Names of models in the cache of step KLs. */
  readonly #labels = new WeakMap<PhaseModel, string>();
  #models = 0;
  readonly #names: ReadonlySet<string>;
  #groups: TimeGroups | undefined;
  #model: PhaseModel;
  /** Time parameters other than the activations'. */
  #others: Layers = new Map();
  #grids: Grids = new Map();
  #perToken: ReadonlySet<string> = new Set();
  #statisticsBytes = 0;
  readonly #warnings: string[] = [];
  #report = NOTHING;

  /** @throws as `runPhases` */
  constructor(context: PhaseContext, weights: ReadonlyMap<string, PackedTensor>, settings: PhaseSettings) {
    this.#transitions = transitionsOf(context);
    this.#context = { ...context, transitions: this.#transitions };
    this.#settings = settings;
    this.#groups = timeGroupsOf(context.calibrated.data.axis, settings);
    if (context.calibrated.data.heldOut.length === 0) {
      throw new CalibrationError(
        `Cannot run the phases: ${
          context.calibrated.statistics === undefined
            ? "calibration data must have at least 8 records, of which every eighth is held out, got fewer"
            : "calibration data themselves are needed, got saved statistics, which hold no samples"
        }`,
      );
    }
    this.#meter = new StepKlMeter(context.calibrated, this.#transitions);
    this.#names = new Set(weights.keys());
    this.#model = { weights, biases: new Map(), timeParameters: undefined };
  }

  result(): PhaseResult {
    const groups = this.#groups;
    return {
      model: this.#model,
      report: {
        ...this.#report,
        groups: groups?.count,
        boundaries: groups && [...groups.boundaries],
        perToken: [...this.#perToken],
        transitionCache: this.#transitions.cacheStatistics,
        statisticsBytes: this.#statisticsBytes + this.#meter.bytes,
        warnings: this.#warnings,
      },
    };
  }

  /** Takes the refinement of an earlier run with the same weights. */
  takeRefinement({ model, report: { refinement } }: PhaseResult): void {
    this.#model = model;
    this.#others = model.timeParameters?.layers ?? new Map();
    this.#report = { ...this.#report, refinement };
  }

  /** Phase 3's gradients. */
  async refine(settings: RefinementSettings): Promise<void> {
    const begin = this.#begin("gradient refinement"), context = this.#context;
    const timeGroups = settings.timeBiases === undefined ? undefined : this.#groups;
    const { weights } = this.#model;
    const refined = await refinePhase(context, weights, settings, timeGroups);
    if (refined === undefined) {
      this.#warn("the gradient refinement was left out: its time (max_minutes) does not suffice for a step");
      return;
    }
    const { layers, ...report } = refined.report;
    const heldOutBefore = refined.before;
    let { kept } = report, heldOutAfter = heldOutBefore;
    if (kept) {
      const theta = timeBiasesOf(layers);
      const candidate: PhaseModel = {
        weights: new Map([...weights, ...layers.map((layer) => [layer.name, layer.weights] as const)]),
        biases: refined.biases,
        timeParameters: theta.size === 0 ? undefined : new TimeParameters(timeGroups!, theta, ""),
      };
      // As it will be stored: biases rounded as well.
      const after = refined.stepKlOf("refined", candidate);
      kept = after < heldOutBefore;
      if (kept) [this.#model, this.#others, heldOutAfter] = [candidate, theta, after];
    }
    if (!kept) {
      this.#warn(`the refinement was rejected: held-out step KL did not fall below ${figure(heldOutBefore)}`);
    }
    this.#holds(report.scratchBytes + report.parameterBytes);
    const milliseconds = performance.now() - begin;
    this.#report = {
      ...this.#report,
      refinement: { ...report, heldOutBefore, heldOutAfter, kept, milliseconds },
    };
    await this.#pause();
  }

  /** Output corrections, or weight scales by time. */
  async addClosedForm(part: "output" | "timeScales"): Promise<void> {
    const what = part === "output" ? "output correction" : "weight scales by time";
    const begin = this.#begin(what), groups = this.#groups!;
    const closed = await closedFormParameters(this.#context, this.#model.weights, groups, {
      output: part === "output" ? this.#settings.output : undefined,
      hasWeightScales: part === "timeScales",
    });
    this.#holds(closed.bytes);
    // The refinement's parameters of a layer lower the true step KL, and stay.
    const merged = new Map([...closed.layers, ...this.#others]);
    const candidate = { ...this.#model, timeParameters: new TimeParameters(groups, merged, "") };
    const before = this.#stepKl(this.#model), after = this.#stepKl(candidate);
    const own = this.#guard(
      part === "output" ? "the output correction was" : "weight scales by time were",
      before,
      after,
      begin,
    );
    if (own.kept) [this.#model, this.#others] = [candidate, merged];
    this.#report = { ...this.#report, [part]: own };
    await this.#pause();
  }

  /** Static ranges by time group, and per-token quantization for the layers that lose most with them. */
  async roundActivations(settings: ActivationSettings): Promise<void> {
    const begin = this.#begin("activations"), context = this.#context;
    const { bits, range, isPerToken = false, grouping, perTokenLimit = Infinity } = settings;
    const unquantized: PhaseModel = this.#model.timeParameters === undefined
      ? this.#model
      : { ...this.#model, timeParameters: undefined };
    const plain = loadPhaseModel(context, unquantized);
    const gridsOf = (groups: TimeGroups) => {
      const ranges = observeActivations(context, plain, this.#names, groups, this.#warnings);
      this.#holds(ranges.bytes);
      return staticGrids(ranges.histograms, bits, range);
    };
    let chosen: PhaseModel | undefined;
    if (isPerToken) this.#perToken = this.#names;
    else {
      this.#grids = gridsOf(this.#groups!);
      if (grouping === "adaptive") {
        const adaptive = groupsByInputs(context, plain, this.#names, this.#groups!.axis, settings.groups);
        if (adaptive !== undefined) this.#takeAdaptive(adaptive, gridsOf(adaptive));
        else this.#warn("adaptive time groups were rejected: there are fewer times in the data than groups");
      }
      if (perTokenLimit < Infinity) {
        const costly = orderByStaticCost(context, plain, this.#grids, this.#groups!);
        chosen = this.#chooseDynamic(costly, perTokenLimit, this.#stepKl(unquantized));
      }
    }
    this.#model = this.#withTheta({});
    if (chosen !== undefined) this.#labels.set(this.#model, this.#labelOf(chosen));
    this.#report = { ...this.#report, activationMilliseconds: performance.now() - begin };
    await this.#pause();
  }

  /** Quantizes the fewest of the costliest layers per token that keep to the limit. @returns that model */
  #chooseDynamic(costly: readonly (readonly string[])[], limit: number, unquantized: number): PhaseModel {
    const firstOf = (count: number) => new Set(costly.slice(0, count).flat());
    const candidates = new Map<number, PhaseModel>();
    const klOf = (count: number) => {
      const candidate = candidates.get(count) ?? this.#withTheta({ perToken: firstOf(count) });
      candidates.set(count, candidate);
      return this.#stepKl(candidate);
    };
    // Quantizing may lower the step KL by chance: not a limit to reach.
    const most = limit * Math.max(klOf(costly.length), unquantized);
    const count = fewestWithin(costly.length, most, klOf);
    this.#perToken = firstOf(count);
    this.#grids = new Map([...this.#grids].filter(([name]) => !this.#perToken.has(name)));
    const activations = { heldOutBefore: unquantized, heldOutAfter: klOf(count) };
    this.#report = { ...this.#report, activations };
    return candidates.get(count)!;
  }

  #takeAdaptive(groups: TimeGroups, grids: Grids): void {
    const reject = (reason: string) => this.#warn(`adaptive time groups were rejected: ${reason}`);
    // Other time parameters were made for the groups as they are.
    if (this.#others.size > 0) return reject("other time parameters have equal ones");
    const before = this.#stepKl(this.#withTheta({}));
    const after = this.#stepKl(this.#withTheta({ groups, grids }));
    if (!(after < before)) return reject(`held-out step KL ${figure(before)} before, ${figure(after)} after`);
    [this.#groups, this.#grids] = [groups, grids];
  }

  /** Phase 2. */
  async smooth(settings: SmoothingOptions): Promise<void> {
    const begin = this.#begin("boundary smoothing"), context = this.#context;
    const groups = this.#groups!, grids = this.#grids;
    const smooth = mapShared(grids, (own) => smoothActivationParameters(groups, own, settings));
    const { left, right } = blendTable(groups, settings);
    const near = heldOutWhere(context.calibrated, (time) => {
      const bin = groups.axis.binOf(time);
      return left[bin]! > 0 || right[bin]! > 0;
    });
    const samples = near.data.heldOut.reduce((sum, part) => sum + part.samples, 0);
    let before = NaN, after = NaN;
    let guard: Pick<GuardReport, "kept" | "rejected"> = { kept: [], rejected: [...grids.keys()] };
    if (samples === 0) this.#warn("smoothing was rejected: no held-out sample lies in a window");
    else {
      // One run of the model before serves the step KL and the layers' guard.
      const meter = new StepKlMeter(near, this.#transitions);
      const layers = layerGuard(context, groups, grids, smooth);
      before = meanStepKl(meter.measure(loadPhaseModel(context, this.#model), layers.observe));
      const all = layers.report(), kept = new Set(all.kept);
      const chosen = new Map(
        [...grids].map(([name, own]) => [name, kept.has(name) ? smooth.get(name)! : own]),
      );
      const candidate = this.#withTheta({ grids: chosen });
      after = meanStepKl(this.#measureOnce(meter, candidate));
      if (after <= before) [this.#model, this.#grids, guard] = [candidate, chosen, all];
      else this.#reject("smoothing was", before, after);
    }
    this.#report = {
      ...this.#report,
      smoothing: {
        kept: guard.kept,
        rejected: guard.rejected,
        heldOutBefore: before,
        heldOutAfter: after <= before ? after : before,
        samples,
        milliseconds: performance.now() - begin,
      },
    };
    await this.#pause();
  }

  /** Gain, bias and noise of an image model's predictions, which its sampler corrects. */
  async correctSampler(): Promise<void> {
    const begin = this.#begin("sampler correction"), groups = this.#groups!;
    const fitted = fitSampler(this.#context, loadPhaseModel(this.#context, this.#model), groups);
    const own = this.#guard("the sampler's correction was", fitted.before, fitted.after, begin);
    if (own.kept) {
      const layers = this.#model.timeParameters?.layers ?? new Map<string, LayerParameters>();
      this.#model = {
        ...this.#model,
        timeParameters: new TimeParameters(groups, layers, "", fitted.sampler),
      };
    }
    this.#report = { ...this.#report, sampler: own };
    await this.#pause();
  }

  /** Phase 1: a report; the model stays as it is. */
  async validate({ smoothnessThreshold, samples }: NonNullable<PhaseSettings["validation"]>): Promise<void> {
    const begin = this.#begin("validation"), groups = this.#groups!;
    if (this.#grids.size === 0) {
      this.#warn("the Markov score says nothing: no layer has static ranges of activations");
    }
    const reports = new Map<string, MarkovReport>([...this.#grids].map(([name, own]) => [
      name,
      own.scale.length === groups.count
        ? validateMarkov(own, smoothnessThreshold)
        : validateSmooth(groups, float64(own), smoothnessThreshold),
    ]));
    const all = [...reports.values()];
    const mean = (value: (report: MarkovReport) => number) =>
      all.reduce((sum, report) => sum + value(report), 0) / Math.max(1, all.length);
    const scored = performance.now();
    const few = fewHeldOut(
      this.#context.calibrated,
      samples ?? Math.max(VALIDATION_SAMPLES, 2 * groups.count),
    );
    const measured = this.#measureOnce(new StepKlMeter(few, this.#transitions), this.#model);
    this.#report = {
      ...this.#report,
      heldOutStepKl: meanStepKl(measured),
      validation: {
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
      },
    };
    await this.#pause();
  }

  #begin(phase: string): number {
    this.#context.onProgress?.(phase);
    return performance.now();
  }

  /** Yields to the event loop, and ends a run that was stopped. */
  async #pause(): Promise<void> {
    await pause(this.#context.signal);
  }

  #warn(message: string): void {
    this.#warnings.push(message);
  }

  #holds(bytes: number): void {
    this.#statisticsBytes = Math.max(this.#statisticsBytes, bytes);
  }

  /** Mean over the held-out samples. */
  #stepKl(model: PhaseModel): number {
    return meanStepKl(this.#measureOnce(this.#meter, model));
  }

  #measureOnce(meter: StepKlMeter, model: PhaseModel): StepKl {
    return meter.measureOnce(this.#labelOf(model), () => loadPhaseModel(this.#context, model));
  }

  #labelOf(model: PhaseModel): string {
    const label = this.#labels.get(model) ?? `model ${this.#models++}`;
    this.#labels.set(model, label);
    return label;
  }

  #reject(what: string, before: number, after: number): void {
    this.#warn(`${what} rejected: held-out step KL ${figure(before)} before, ${figure(after)} after`);
  }

  /** Keeps a kind of time parameters, as a whole, if the held-out step KL falls. */
  #guard(what: string, before: number, after: number, begin: number): GuardedReport {
    const kept = after < before || this.#settings.isGuarded === false;
    if (!kept) this.#reject(what, before, after);
    return {
      kept,
      heldOutBefore: before,
      heldOutAfter: kept ? after : before,
      milliseconds: performance.now() - begin,
    };
  }

  /** The model with all time parameters, some as given; layers quantized per token have no static ranges. */
  #withTheta({ groups = this.#groups!, grids = this.#grids, perToken = this.#perToken }: {
    readonly groups?: TimeGroups;
    readonly grids?: Grids;
    readonly perToken?: ReadonlySet<string>;
  }): PhaseModel {
    const { bits } = this.#settings.activations!;
    const names = new Set([...grids.keys(), ...this.#others.keys(), ...perToken]);
    const layers = new Map([...names].map((name): [string, LayerParameters] => [name, {
      ...this.#others.get(name),
      activation: perToken.has(name) ? undefined : grids.get(name),
      perToken: perToken.has(name) ? bits : undefined,
    }]));
    return { ...this.#model, timeParameters: new TimeParameters(groups, layers, "") };
  }
}

const figure = (value: number) => value.toPrecision(4);

const float64 = ({ scale, zeroPoint, bits }: ActivationParameters) => ({
  scale: Float64Array.from(scale),
  zeroPoint: Float64Array.from(zeroPoint),
  bits,
});
