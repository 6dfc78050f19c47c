/**
 * Calibration statistics of the inputs of a model's layers: for every time group their number, mean, range,
 * quantiles and second moment, gathered in one pass in memory that is known beforehand, and merged across
 * runs. file.ts stores them; lib/calibration runs the model.
 */
import { checkWhole } from "../../native/call.ts";
import { findNonfinite } from "../../quant/convert.ts";
import { CalibrationError } from "../../errors.ts";
import type { Kernels } from "../../native/mod.ts";
import { throwIfStopped } from "../../progress.ts";
import { giveBack } from "../../quant/array_memory.ts";
import { type InputMoments, MAX_MOMENT_COLS } from "../../quant/solvers/moments.ts";
import { chunkPieces, pieceOf, type SpareChunks } from "../../quant/solvers/moment_sums.ts";
import { ActivationHistogram } from "../activation_range.ts";
import { listing } from "../../tensor/mod.ts";
import type { TimeGroups } from "../groups.ts";
import type { TimeGroupMoments } from "../output_correction.ts";
import {
  type CalibrationRun,
  hasHistograms,
  type InputStatistics,
  type LayerInput,
  type LoadMoments,
  MAX_CALIBRATION_RUNS,
  type Moments,
  type SecondMoments,
  statisticsBytes,
  type WhichMoments,
} from "./contents.ts";
import { KeptMoments } from "./kept_moments.ts";
import { added, addExactly, addTo, asFloats, checkMerge } from "./merging.ts";
import { type LayerPlace, mergedModel, type StatisticsModel } from "./model.ts";
import { weightedMoment } from "./weighted_moment.ts";

/** Most bytes of a model's statistics: second moments of a model of 1 B weights. */
export const MAX_STATISTICS_BYTES = 16 * 2 ** 30;

/** Times and weights of the rows of an input. */
export interface ObservedSamples {
  /** Time of each sample; a sample's rows lie together, as many for each. */
  readonly times: ArrayLike<number>;
  /** `f32[rows]`: how much each row counts; 1 by default. */
  readonly weights?: Float32Array | undefined;
  /**
   * Samples of a chunk (`MomentSums`): parts of a pass that begin between chunks add up to the same bytes. By
   * default all are one, and second moments are summed up in float32.
   */
  readonly chunk?: number | undefined;
}

/** Options of new statistics. */
export interface StatisticsOptions {
  /** Of the model's files, by `modelFingerprint`; empty where a program that saw no files gathered them. */
  readonly fingerprint: string;
  /** What else is known of the model. */
  readonly model?: StatisticsModel | undefined;
  /** Time groups that the statistics are kept for. */
  readonly groups: TimeGroups;
  /** The model's inputs by name. */
  readonly inputs: ReadonlyMap<string, LayerInput>;
  /** Which second moments are kept; default the total. */
  readonly second?: SecondMoments | undefined;
  /** Runs that the statistics come from. */
  readonly runs: readonly CalibrationRun[];
  /** Reads an input's second moments whenever they are asked for: they are not kept, nor added to. */
  readonly load?: LoadMoments | undefined;
  /** Whether it gives arrays that nothing else has; default no. */
  readonly isFresh?: boolean | undefined;
}

const SUMS = ["weight", "tokens", "samples", "sum", "squares", "sumLow", "squaresLow"] as const;

/**
 * Statistics of a model's inputs, added to batch by batch.
 *
 * @example
 * ```ts
 * import { openKernels } from "../../native/mod.ts";
 * import { maskRatioAxis } from "../axis.ts";
 * import { CalibrationStatistics } from "./statistics.ts";
 * import { equalTimeGroups } from "../groups.ts";
 *
 * const statistics = new CalibrationStatistics({
 *   fingerprint: "a model's",
 *   groups: equalTimeGroups(maskRatioAxis(10), 2),
 *   inputs: new Map([["a.weight", { cols: 2, layers: ["a.weight", "b.weight"] }]]),
 *   runs: [{ identity: "first", source: "two sequences", isSynthetic: true, samples: 2 }],
 * });
 * statistics.add(await openKernels(), "a.weight", Float32Array.of(1, 2, 3, 4), 2, { times: [0.2, 0.9] });
 * console.log(statistics.moments("b.weight").second); // 10, 14, 14, 20
 * console.log(statistics.mean("a.weight", 1)); // 3, 4
 * console.log(statistics.histogram("a.weight", 0).quantile(1)); // 2
 * ```
 */
export class CalibrationStatistics {
  readonly fingerprint: string;
  readonly model: StatisticsModel | undefined;
  readonly groups: TimeGroups;
  readonly second: SecondMoments;
  readonly runs: readonly CalibrationRun[];
  readonly inputs: ReadonlyMap<string, InputStatistics>;
  /** Whether second moments are read whenever they are asked for. */
  readonly isLoaded: boolean;
  /** Whether the arrays of {@linkcode CalibrationStatistics.moments} are the caller's. */
  readonly isFresh: boolean;
  readonly #inputOf = new Map<string, InputStatistics>();
  readonly #kept = new Map<string, Readonly<Partial<Record<WhichMoments, KeptMoments>>>>();
  readonly #load: LoadMoments | undefined;
  #isExact = false;

  /**
   * Statistics of nothing yet.
   *
   * @throws {RangeError} when an input has no or too many columns, a layer reads two inputs, or there are
   * more than {@linkcode MAX_CALIBRATION_RUNS} runs
   * @throws {CalibrationError} when they would take more than {@linkcode MAX_STATISTICS_BYTES}
   */
  constructor(
    { fingerprint, model, groups, inputs, second = "total", runs, load, isFresh }: StatisticsOptions,
  ) {
    for (const [name, { cols, block = cols }] of inputs) {
      const doing = `calibrate ${JSON.stringify(name)}`;
      checkWhole(doing, "columns", cols, 1, MAX_MOMENT_COLS);
      checkWhole(doing, "columns of a block", block, 1, cols);
    }
    if (runs.length > MAX_CALIBRATION_RUNS) {
      throw new RangeError(
        `Cannot calibrate: there must be at most ${MAX_CALIBRATION_RUNS} runs, got ${runs.length}`,
      );
    }
    const bytes = statisticsBytes(inputs.values(), groups.count, load === undefined ? second : "none");
    if (bytes > MAX_STATISTICS_BYTES) {
      throw new CalibrationError(
        `Cannot calibrate all layers at once: their statistics must fit ${MAX_STATISTICS_BYTES} bytes, got ${bytes}: ` +
          "calibrate block by block (calibration_mode: blocks), or keep no second moments for each time group",
      );
    }
    this.fingerprint = fingerprint;
    this.model = model;
    this.groups = groups;
    this.second = second;
    this.runs = runs;
    this.isLoaded = load !== undefined;
    this.isFresh = isFresh === true;
    const { count } = groups;
    const spare: SpareChunks = new Map();
    this.#load = load;
    const moments = (name: string, which: WhichMoments, cols: number, block: number) => {
      if (load !== undefined) return { get: () => asFloats(load(name, which)) };
      const kept = new KeptMoments({ cols, block, count: which === "second" ? 1 : count }, spare);
      this.#kept.set(name, { ...this.#kept.get(name), [which]: kept });
      return { get: () => kept.floats };
    };
    this.inputs = new Map([...inputs].map(([name, { cols, block = cols, layers }]) => [
      name,
      Object.defineProperties({
        cols,
        block,
        layers,
        weight: new Float64Array(count),
        tokens: new Float64Array(count),
        samples: new Float64Array(count),
        sum: new Float64Array(count * cols),
        squares: new Float64Array(count * cols),
        sumLow: new Float64Array(count * cols),
        squaresLow: new Float64Array(count * cols),
        second: undefined,
        groupSecond: undefined,
        histograms: Array.from({ length: count }, () => new ActivationHistogram()),
      }, {
        ...(second === "none" ? {} : { second: moments(name, "second", cols, block) }),
        ...(second === "groups" ? { groupSecond: moments(name, "groupSecond", cols, cols) } : {}),
      }),
    ]));
    for (const input of this.inputs.values()) {
      for (const layer of input.layers) {
        if (this.#inputOf.has(layer)) {
          throw new RangeError(`Cannot calibrate ${JSON.stringify(layer)}: it must read one input, got two`);
        }
        this.#inputOf.set(layer, input);
      }
    }
  }

  /** Where the data come from, for reports. */
  get source(): string {
    return this.runs.map(({ source }) => source).join("; ");
  }

  /** Samples of all runs. */
  get samples(): number {
    return this.runs.reduce((sum, { samples }) => sum + samples, 0);
  }

  /** True where any of the data are synthetic. */
  get isSynthetic(): boolean {
    return this.runs.some(({ isSynthetic }) => isSynthetic);
  }

  /** Whether sums are kept with what rounding took, as of a pass on its way, or of a part. */
  get isExact(): boolean {
    return this.#isExact;
  }

  /** Whether all second moments end with a whole chunk. */
  get isBetweenChunks(): boolean {
    return [...this.#kept.values()].every(({ second, groupSecond }) =>
      second?.isOpen !== true && groupSecond?.isOpen !== true
    );
  }

  /** Second moments of an input as exactly as they are known, if kept. An open chunk ends here. */
  momentsOf(input: string, which: WhichMoments): Moments | undefined {
    if (this.#load !== undefined) {
      const hasIt = this.inputs.has(input) &&
        (which === "second" ? this.second !== "none" : this.second === "groups");
      return hasIt ? this.#load(input, which) : undefined;
    }
    const kept = this.#kept.get(input)?.[which];
    return kept?.exact ?? kept?.floats;
  }

  /** Takes second moments of an input, in double those of a part. */
  takeMoments(input: string, which: WhichMoments, moments: Moments): void {
    const kept = this.#kept.get(input)![which]!;
    if (moments instanceof Float64Array) kept.exact = moments;
    else kept.floats.set(moments);
  }

  /** These statistics are of a part: `sumLow` and `squaresLow` are filled. */
  markExact(): void {
    this.#isExact = true;
  }

  /** Rounds all sums: the pass is complete. */
  settle(): void {
    for (const { second, groupSecond } of this.#kept.values()) {
      second?.settle();
      groupSecond?.settle();
    }
    for (const { sum, sumLow, squares, squaresLow } of this.inputs.values()) {
      for (const [sums, low] of [[sum, sumLow], [squares, squaresLow]] as const) {
        addTo(sums, low);
        low.fill(0);
      }
    }
    this.#isExact = false;
  }

  /** @throws {CalibrationError} that names the layers of which there are no statistics */
  checkLayers(names: readonly string[]): void {
    const missing = names.filter((name) => !this.#inputOf.has(name));
    if (missing.length === 0) return;
    throw new CalibrationError(
      `Cannot use the calibration statistics: they must have every layer that is solved, got none of ${
        listing(missing)
      }: calibrate anew, or give the data themselves`,
      { tensor: missing[0]! },
    );
  }

  /** Whether there are statistics of a layer's input. */
  has(layer: string): boolean {
    return this.#inputOf.has(layer);
  }

  /** Statistics of the input of a layer. @throws {CalibrationError} when there are none */
  inputOf(layer: string): InputStatistics {
    const input = this.#inputOf.get(layer);
    if (input !== undefined) return input;
    throw new CalibrationError(
      `Cannot use the calibration statistics for ${
        JSON.stringify(layer)
      }: they must have its input, got none of it`,
      { tensor: layer },
    );
  }

  /**
   * Adds rows of an input, each to the group of its sample's time. The same bytes for any number of threads.
   *
   * **Shapes** `x: f32[rows, cols]`, `times: [samples]` with rows a multiple of samples, `weights: f32[rows]`
   *
   * @throws {TypeError} when the shapes do not fit, or there is no such input
   * @throws {RangeError} when a time is outside the axis
   * @throws {CalibrationError} when a value is NaN or infinite; nothing is added then
   */
  add(
    kernels: Kernels,
    input: string,
    x: Float32Array,
    rows: number,
    { times, weights, chunk }: ObservedSamples,
  ): void {
    const own = this.inputs.get(input), doing = `Cannot calibrate ${JSON.stringify(input)}`;
    if (own === undefined) throw new TypeError(`${doing}: it must be one of the inputs, got another`);
    const { cols } = own, rowsPerSample = rows / times.length;
    if (
      x.length !== rows * cols || !Number.isInteger(rowsPerSample) ||
      weights !== undefined && weights.length !== rows
    ) {
      throw new TypeError(
        `${doing}: ${rows} rows of ${cols} columns must belong to whole samples, got ${x.length} numbers, ` +
          `${times.length} samples and ${weights?.length ?? rows} weights`,
      );
    }
    const groupOfSample = Array.from(times, (time) => this.groups.groupOf(time));
    const bad = findNonfinite(kernels, { data: x, dtype: "F32" }, x.length);
    if (bad >= 0) {
      throw new CalibrationError(
        `${doing}: its inputs must be finite, got ${x[bad]} in column ${bad % cols}`,
        {
          tensor: input,
        },
      );
    }
    const before = own.samples.reduce((sum, count) => sum + count, 0);
    const sums = new Float64Array(cols), squares = new Float64Array(cols);
    for (const [sample, group] of groupOfSample.entries()) {
      throwIfStopped();
      const first = sample * rowsPerSample, end = first + rowsPerSample;
      sums.fill(0);
      squares.fill(0);
      for (let row = first; row < end; row++) {
        const weight = weights?.[row] ?? 1;
        own.weight[group]! += weight;
        for (let k = 0, at = row * cols; k < cols; k++, at++) {
          const value = x[at]!, weighted = weight * value;
          sums[k]! += weighted;
          squares[k]! += weighted * value;
        }
      }
      const of = (values: Float64Array) => values.subarray(group * cols, (group + 1) * cols);
      addExactly(of(own.sum), of(own.sumLow), sums);
      addExactly(of(own.squares), of(own.squaresLow), squares);
      own.tokens[group]! += rowsPerSample;
      own.samples[group]!++;
      own.histograms[group]!.add(x.subarray(first * cols, end * cols));
    }
    this.#isExact ||= chunk !== undefined;
    this.#addMoments(kernels, input, { x, weights, rowsPerSample, groupOfSample, before, chunk });
  }

  /** Adds rows to the second moments, up to the end of a chunk at a time. */
  #addMoments(
    kernels: Kernels,
    input: string,
    { x, weights, rowsPerSample, groupOfSample, before, chunk }: {
      readonly x: Float32Array;
      readonly weights: Float32Array | undefined;
      readonly rowsPerSample: number;
      readonly groupOfSample: readonly number[];
      readonly before: number;
      readonly chunk: number | undefined;
    },
  ): void {
    const { second, groupSecond } = this.#kept.get(input) ?? {}, { cols } = this.inputs.get(input)!;
    if (second === undefined) return;
    const isChunked = chunk !== undefined;
    const samples = groupOfSample.length, inputs = { x, weights, tokens: samples * rowsPerSample };
    for (const piece of chunkPieces(before, samples, chunk)) {
      const { begin, end, isEnd } = piece;
      second.add(kernels, 0, pieceOf(inputs, samples, piece), isChunked);
      for (const group of new Set(groupSecond && groupOfSample.slice(begin, end))) {
        const own = groupOfSample.flatMap((each, i) => each === group && i >= begin && i < end ? [i] : []);
        const tokens = own.length * rowsPerSample, part = new Float32Array(tokens * cols);
        const partWeights = weights && new Float32Array(tokens);
        for (const [i, sample] of own.entries()) {
          const rows = pieceOf(inputs, samples, { begin: sample, end: sample + 1 });
          part.set(rows.x, i * rowsPerSample * cols);
          partWeights?.set(rows.weights!, i * rowsPerSample);
        }
        groupSecond!.add(kernels, group, { x: part, weights: partWeights, tokens }, isChunked);
      }
      if (!isEnd) continue;
      second.endChunk();
      groupSecond?.endChunk();
    }
  }

  /** Inputs of a layer over all times. @throws {CalibrationError} when there is no such layer */
  tokensOf(layer: string): number {
    return this.inputOf(layer).tokens.reduce((sum, count) => sum + count, 0);
  }

  /**
   * The same statistics by other names of the layers, one or several; a layer without a new name is left out,
   * and so is one that has read nothing. Of layers with a new name in common the first is taken. Numbers are
   * shared.
   */
  renamed(placeOf: (layer: string) => LayerPlace | undefined): CalibrationStatistics {
    const taken = new Set<string>();
    const inputs = new Map<string, LayerInput>(), from = new Map<string, InputStatistics>();
    for (const input of this.inputs.values()) {
      if (input.tokens.every((count) => count === 0)) continue;
      const layers = input.layers.flatMap((layer) => placeOf(layer)?.names ?? []).filter((name) =>
        !taken.has(name) && taken.add(name)
      );
      if (layers.length === 0) continue;
      inputs.set(layers[0]!, { cols: input.cols, block: input.block, layers });
      from.set(layers[0]!, input);
    }
    const ofLayers = <T>(values: ReadonlyMap<string, T>) =>
      new Map([...values].flatMap(([name, value]): [string, T][] => {
        const { names, isWhole } = placeOf(name) ?? { names: [], isWhole: false };
        return isWhole ? [[names[0]!, value]] : [];
      }));
    const { fingerprint, model, groups, second, runs } = this;
    const renamed = new CalibrationStatistics({
      ...{ fingerprint, groups, second, runs, inputs },
      model: model && {
        name: model.name,
        layers: ofLayers(model.layers),
        samples: model.samples && ofLayers(model.samples),
      },
      load: (name, which) => from.get(name)![which]!,
      isFresh: this.isFresh,
    });
    renamed.takeSums(from);
    return renamed;
  }

  /**
   * The same statistics with each time group counted by a weight: second moments over all times become Σ_g
   * ω_g M_g where moments of groups were kept. Otherwise the diagonal becomes that, exactly, and correlations
   * stay those over all times.
   *
   * @param weights `[groups]`, numbers ≥ 0
   * @throws {TypeError} when there is not a weight for each group
   */
  weightedByTime(weights: ArrayLike<number>): CalibrationStatistics {
    const { fingerprint, model, groups, inputs, second, runs } = this;
    if (weights.length !== groups.count) {
      throw new TypeError(
        `Cannot weigh statistics by time: there must be ${groups.count} weights, got ${weights.length}`,
      );
    }
    const load: LoadMoments = (name, which) => {
      const own = inputs.get(name)!, values = own[which]!;
      return which === "groupSecond" ? values : weightedMoment(own, values, weights);
    };
    const weighted = new CalibrationStatistics({ fingerprint, model, groups, inputs, second, runs, load });
    weighted.takeSums(inputs);
    return weighted;
  }

  /** Takes all but second moments from inputs of the same names; these must have nothing yet. */
  takeSums(inputs: ReadonlyMap<string, InputStatistics>): void {
    for (const [name, own] of this.inputs) {
      const from = inputs.get(name)!;
      for (const key of SUMS) own[key].set(from[key]);
      for (const [g, histogram] of own.histograms.entries()) histogram.merge(from.histograms[g]!);
    }
  }

  /** Sums over all times of a layer's inputs, for solvers. @throws {CalibrationError} when none were kept */
  moments(layer: string): InputMoments {
    const { cols, block, second, tokens, weight } = this.inputOf(layer);
    if (second === undefined) throw this.#without(layer, "second moments");
    const total = (values: Float64Array) => values.reduce((sum, value) => sum + value, 0);
    return { cols, block, second, tokens: total(tokens), weight: total(weight) };
  }

  /** `f32[cols]`: weighted mean of the inputs in a time group. @throws {CalibrationError} without any */
  mean(layer: string, group: number): Float32Array<ArrayBuffer> {
    this.groups.range(group);
    const { cols, sum, weight } = this.inputOf(layer), total = weight[group]!;
    if (!(total > 0)) throw this.#without(layer, `inputs in time group ${group}`);
    return Float32Array.from(sum.subarray(group * cols, (group + 1) * cols), (value) => value / total);
  }

  /** Means in a time group, for output corrections. @throws {CalibrationError} when none were kept */
  groupMoments(layer: string, group: number): TimeGroupMoments {
    const mean = this.mean(layer, group);
    const { cols, groupSecond, weight, samples } = this.inputOf(layer);
    if (groupSecond === undefined) throw this.#without(layer, "second moments for each time group");
    const sums = groupSecond.subarray(group * cols * cols, (group + 1) * cols * cols);
    return { second: sums.map((value) => value / weight[group]!), mean, samples: samples[group]! };
  }

  /** Range and quantiles of what a layer reads in a time group. */
  histogram(layer: string, group: number): ActivationHistogram {
    this.groups.range(group);
    return this.inputOf(layer).histograms[group]!;
  }

  /**
   * These statistics and those of another run on the same model, groups and inputs, added up; neither is
   * changed.
   *
   * @throws {CalibrationError} when they are of another model, other groups or inputs, or hold a run that is
   * in these already
   */
  merge(other: CalibrationStatistics): CalibrationStatistics {
    checkMerge(this, other);
    const isLoaded = this.isLoaded || other.isLoaded;
    const merged = new CalibrationStatistics({
      fingerprint: this.fingerprint,
      model: mergedModel(this.model, other.model),
      groups: this.groups,
      inputs: new Map([...other.inputs, ...this.inputs]),
      second: this.second,
      runs: [...this.runs, ...other.runs],
      load: isLoaded
        ? (name, which) => {
          const [first, second] = [this, other].flatMap((own) => own.momentsOf(name, which) ?? []);
          if (second === undefined) return first!;
          const sums = added(first!, second, this.isFresh);
          if (other.isFresh) giveBack(second);
          return sums;
        }
        : undefined,
      isFresh: this.isFresh && other.isFresh,
    });
    merged.#isExact = this.#isExact && other.#isExact;
    for (const [name, own] of merged.inputs) {
      const holders = [this, other].filter(({ inputs }) => inputs.has(name));
      const parts = holders.map(({ inputs }) => inputs.get(name)!);
      for (const part of parts) {
        for (const key of ["weight", "tokens", "samples"] as const) addTo(own[key], part[key]);
        addExactly(own.sum, own.sumLow, part.sum, part.sumLow);
        addExactly(own.squares, own.squaresLow, part.squares, part.squaresLow);
      }
      for (const which of ["second", "groupSecond"] as const) {
        const [first, second] = isLoaded ? [] : holders.flatMap((each) => each.momentsOf(name, which) ?? []);
        if (first === undefined) continue;
        merged.takeMoments(name, which, second === undefined ? first.slice() : added(first, second));
      }
      if (!parts.every(hasHistograms)) continue;
      for (const { histograms } of parts) {
        for (const [g, histogram] of own.histograms.entries()) histogram.merge(histograms[g]!);
      }
    }
    return merged;
  }

  /** The same statistics, rounded, as those of other runs. */
  withRuns(runs: readonly CalibrationRun[]): CalibrationStatistics {
    const { fingerprint, model, groups, inputs, second } = this;
    const load: LoadMoments = (name, which) => inputs.get(name)![which]!;
    const same = new CalibrationStatistics({ fingerprint, model, groups, inputs, second, runs, load });
    same.takeSums(inputs);
    same.settle();
    return same;
  }

  #without(layer: string, what: string): CalibrationError {
    return new CalibrationError(
      `Cannot use the calibration statistics for ${JSON.stringify(layer)}: they must have ${what}, got none`,
      { tensor: layer },
    );
  }
}
