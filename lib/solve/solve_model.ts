/**
 * Solving a whole model on calibration data, block by block: each layer is solved on the inputs that the
 * quantized layers before it produce, and targets the full-precision layer's outputs. Runs in full precision
 * and quantized go on side by side, from stage to stage. Memory beyond the model: the moments of one stage at
 * a time, and what the next stage reads.
 */
import {
  correctedTarget,
  type FactoredMoment,
  factorMoments,
  typicalPower,
} from "../quant/solvers/factored_moment.ts";
import { readArrays, type WeightFormat } from "../quant/packed/layout.ts";
import type { Solver } from "../config/names.ts";
import type { SolverSettings } from "../quant/solvers/settings.ts";
import { CalibrationError, WeightsError } from "../errors.ts";
import type { Blockwise, LinearLayer, Matrix, ModelLayers, Stage } from "../models/mod.ts";
import type { Kernels } from "../native/mod.ts";
import type { DenseMatrix } from "../models/layers/linear.ts";
import { giveBack, narrowed, setAside } from "../quant/array_memory.ts";
import { convertFloats, findNonfinite, LAYER_SOLVERS, quantizeByWeights } from "../quant/mod.ts";
import type { InputMoments } from "../quant/solvers/moments.ts";
import { MomentSums, type PartPlace } from "../quant/solvers/moment_sums.ts";
import { settingsFor } from "../quant/solvers/effort.ts";
import { solveLayer } from "../quant/solvers/solve_layer.ts";
import type { CalibrationStatistics } from "../time/mod.ts";
import type { CalibrationSet } from "../calibration/mod.ts";
import type { Solvable } from "../calibration/statistics/alone.ts";
import { rowWeights } from "../calibration/collect.ts";
import { expertLayer, partsWith } from "../calibration/statistics/expert_stacks.ts";
import {
  chooseMoment,
  chooseSaved,
  type MomentChoice,
  momentLine,
  momentText,
  savedMoments,
} from "../calibration/moment_structure.ts";
import { pause } from "../progress.ts";
import { Workspace } from "../models/layers/workspace.ts";
import { KeptArrays, type KeptArraysOptions } from "./kept_arrays.ts";
import { joinedExperts, type SolvedExpert } from "./expert_stack.ts";
import { type LayerInputs, targetOfInputs } from "./target_of_inputs.ts";
import { StagedRuns } from "./staged_runs.ts";
import type { SolvedLayer } from "./solved_layers.ts";
import type { Team } from "./team.ts";

/** With fewer inputs a column solvers overfit the sample. */
const INPUTS_PER_COLUMN = 4;

export interface SolveOptions {
  readonly kernels: Kernels;
  readonly solver: Solver;
  readonly settings: SolverSettings;
  /** Bits and groups of a layer by the name of its weight; undefined leaves the layer as it is. */
  readonly gridOf: (name: string) => WeightFormat | undefined;
  /**
   * Names of the layers to solve among those that have bits and groups; all by default. The others still
   * count where the structure of a moment is chosen, so that a layer's solution does not depend on which ones
   * are left out.
   */
  readonly only?: ReadonlySet<string> | undefined;
  /**
   * `blocks`: on the inputs that the quantized layers before produce; `once`: all on those of the
   * full-precision model.
   */
  readonly mode?: "blocks" | "once" | undefined;
  /** Packed weights of tables and layers that are not solved. */
  readonly fixed?: ReadonlyMap<string, Matrix> | undefined;
  /** Tasks that solve the model together: the data are this one's samples. Only for `blocks`. */
  readonly team?: Team | undefined;
  /** Layers that an earlier run has solved. */
  readonly solved?: ReadonlyMap<string, SolvedLayer> | undefined;
  /** Layers with NaN or infinity among their weights are left out; otherwise they are an error. */
  readonly keepsNonfinite?: boolean | undefined;
  /** What is kept between stages, and where; default in memory. */
  readonly kept?: KeptArraysOptions | undefined;
  /** `isNew`: it is neither of an earlier run nor of another task. */
  readonly onLayer?: ((layer: SolvedLayer, done: number, of: number, isNew: boolean) => void) | undefined;
  /** Called within a layer, with what is done and the done part of it. */
  readonly onStep?: ((name: string, doing: string, share: number) => void) | undefined;
  readonly onWarning?: ((message: string) => void) | undefined;
  /** Called once, with a line on the structure of the layers' moments. */
  readonly onMoments?: ((message: string) => void) | undefined;
  /** Bytes that the process may take: wide moments that do not fit are kept in blocks. Any by default. */
  readonly memoryBytes?: number | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** A copy of a layer's weights as float32, row-major. @param given where it goes; default a new array */
export function denseWeights(
  kernels: Kernels,
  { weights, name }: LinearLayer,
  given?: Float32Array<ArrayBuffer>,
): Float32Array<ArrayBuffer> {
  if ("packed" in weights) {
    throw new CalibrationError(
      `Cannot solve ${JSON.stringify(name)}: its weights must be plain, got packed ones`,
      {
        tensor: name,
      },
    );
  }
  const { rows, cols } = weights, out = given ?? new Float32Array(rows * cols);
  if (given !== undefined && weights.floats !== undefined) {
    weights.floats(0, out); // once: nothing else holds them
    return out;
  }
  const { data, dtype } = weights;
  convertFloats(
    kernels,
    { data, dtype },
    rows * cols,
    "F32",
    new Uint8Array(out.buffer, out.byteOffset, out.byteLength),
  );
  return out;
}

/** The layers to solve, in the order in which they run, a stage at a time. */
function stagesToSolve(
  model: Pick<Blockwise<never>, "stages">,
  { gridOf, only }: Pick<SolveOptions, "gridOf" | "only">,
): LayerStage[] {
  const seen = new Set<string>();
  return model.stages.map(({ block, layers }): LayerStage => {
    const all = layers.filter(({ name }) => gridOf(name) !== undefined && !seen.has(name) && seen.add(name));
    return {
      block,
      layers: all.filter(({ name }) => only?.has(name) ?? true),
      formats: all.map(({ name }) => gridOf(name)!),
    };
  }).filter(({ layers }) => layers.length > 0);
}

/**
 * Solves every layer for which `gridOf` has bits and groups.
 *
 * @throws {WeightsError} when weights or moments are NaN or infinite
 * @throws {CalibrationError} when there is nothing to calibrate with, or saved statistics lack a layer
 */
export function solveModel(calibrated: Solvable, options: SolveOptions): Promise<Map<string, SolvedLayer>> {
  const { data: { fit }, statistics } = calibrated;
  if (statistics === undefined && fit.length === 0) {
    throw new CalibrationError("Cannot calibrate: there must be samples, got none");
  }
  const gathered = options.mode === "once" || fit.length === 0 ? statistics : undefined;
  if (calibrated.kind === "layers") {
    return new ModelSolver(calibrated.model, calibrated.data, calibrated.statistics, options).solve();
  }
  return calibrated.kind === "sequences"
    ? new ModelSolver(calibrated.model, calibrated.data, gathered, options).solve()
    : new ModelSolver(calibrated.model, calibrated.data, gathered, options).solve();
}

/** Layers that are solved when they are asked for. */
export interface SolvedOnDemand {
  /**
   * A layer, whose arrays are there until the next is asked for; undefined for a tensor that is not among the
   * layers to solve, and where the rule keeps its weights.
   */
  get(name: string): Promise<SolvedLayer | undefined>;
}

/**
 * The same layers one by one from statistics alone: in any order, since none waits for another. Nothing but
 * the inputs of a few stages stays in memory.
 *
 * @throws {CalibrationError} when saved statistics lack a layer
 */
export function solveOnDemand({ model, data, statistics }: Solvable, options: SolveOptions): SolvedOnDemand {
  if (statistics === undefined || data.fit.length > 0) {
    throw new TypeError("Cannot solve layers on demand: their inputs must be known from statistics alone");
  }
  return new ModelSolver<never>(model, data as CalibrationSet<never>, statistics, options).onDemand();
}

/** Layers that read the same input. */
interface LayerStage {
  readonly block: number;
  readonly layers: readonly LinearLayer[];
  /** Of these layers, and of those that are left out. */
  readonly formats: readonly WeightFormat[];
}

/** The inputs of a stage, ready to solve on. */
interface StageInputs extends Gathered {
  readonly moment: FactoredMoment;
  /** Its structure in words. */
  readonly structure: string;
  /** Σ of the inputs' weights. */
  readonly weight: number;
}

/** Solves one model. */
class ModelSolver<Batch> {
  readonly #solved = new Map<string, SolvedLayer>();
  readonly #weights: Map<string, Matrix>;
  readonly #kept: KeptArrays;
  readonly #lost = new Workspace();
  /** For a layer alone in memory: new pages for each take a tenth of the time of 4-bit feedback. */
  readonly #scratch: Workspace | undefined;
  /** The runs whose inputs layers are solved on; undefined where the moments are known. */
  readonly #runs: StagedRuns<Batch> | undefined;
  /** Those in full precision, where the others' loss is corrected. */
  readonly #full: StagedRuns<Batch> | undefined;

  constructor(
    readonly model: Blockwise<Batch> | ModelLayers,
    readonly data: CalibrationSet<Batch>,
    /** Moments of every layer's inputs in full precision, where they are known: the model is not run then. */
    readonly statistics: CalibrationStatistics | undefined,
    readonly options: SolveOptions,
  ) {
    const { mode = "blocks", solver, settings } = options, isBlockwise = mode === "blocks";
    this.#weights = new Map(options.fixed);
    this.#kept = new KeptArrays(options.kept);
    const corrects = isBlockwise && solver === "best" &&
      (settings.correction > 0 || settings.residualCorrection > 0);
    const runs = (name: string, weights?: ReadonlyMap<string, Matrix>) =>
      new StagedRuns(model as Blockwise<Batch>, data.fit, this.#kept, name, weights);
    // Once: all on full precision's inputs, also inside a block.
    if (statistics !== undefined) this.#scratch = new Workspace();
    if (statistics === undefined) this.#runs = runs("run", isBlockwise ? this.#weights : undefined);
    if (statistics === undefined && corrects) this.#full = runs("full");
  }

  async solve(): Promise<Map<string, SolvedLayer>> {
    try {
      return await this.#solve();
    } finally {
      this.#kept.drop();
    }
  }

  /** The stages to solve, once it is known that all of them can be. */
  #stages(): LayerStage[] {
    const { model, data, statistics, options } = this, stages = stagesToSolve(model, options);
    if (stages.length === 0) return stages;
    const inputs = stages.flatMap((stage) => this.#inputStages(stage));
    statistics?.checkLayers(inputs.flatMap(({ layers }) => layers.map(({ name }) => name)));
    warnOfFewInputs(inputs, data, statistics, options.onWarning);
    options.onMoments?.(momentLine(inputs.map((stage) => ({
      ...this.#structure(stage),
      cols: stage.layers[0]!.weights.cols,
    }))));
    return stages;
  }

  /** As {@linkcode solveOnDemand}. */
  onDemand(): SolvedOnDemand {
    const stages = this.#stages(), { onLayer } = this.options;
    const found = new Map(
      stages.flatMap((stage) => stage.layers.map((layer) => [layer.name, { layer, stage }] as const)),
    );
    const ready = new ReadyInputs<LayerStage>();
    let done = 0, last: SolvedLayer | undefined;
    return {
      get: async (name) => {
        if (last !== undefined) giveBack(...readArrays(last.tensor) as Uint8Array<ArrayBuffer>[]);
        const own = found.get(name);
        if (own === undefined) return undefined;
        const { layer, stage } = own, begun = performance.now();
        let result: SolvedLayer | undefined;
        if (layer.experts !== undefined) result = await this.#solveExperts(layer, stage);
        else {
          const inputs = ready.get(stage) ?? ready.put(stage, await this.#inputsOf(stage));
          const gathering = performance.now() - begun;
          result = await this.#solveLayer(layer, inputs, { block: stage.block, gathering });
        }
        if (result !== undefined) onLayer?.(result, ++done, found.size, true);
        return last = result;
      },
    };
  }

  async #solve(): Promise<Map<string, SolvedLayer>> {
    const { options } = this, stages = this.#stages();
    const count = stages.reduce((sum, { layers }) => sum + layers.length, 0);
    const done = (layer: SolvedLayer, isNew = false) => {
      this.#solved.set(layer.name, layer);
      this.#weights.set(layer.name, layer.tensor);
      options.onLayer?.(layer, this.#solved.size, count, isNew);
    };
    let before = 0;
    for (const stage of stages) {
      await this.#enter(stage.block);
      const started = performance.now();
      const first = before, { team } = options;
      before += stage.layers.length;
      const already = stage.layers.map(({ name }) => options.solved?.get(name) ?? team?.solved(name));
      if (already.every((layer) => layer !== undefined)) {
        for (const layer of already) done(layer);
        for (const { name } of stage.layers) team?.forget(name);
        continue;
      }
      if (team !== undefined) {
        await this.#solveTogether(team, stage, first, done);
        continue;
      }
      const [layer] = stage.layers;
      if (layer?.experts !== undefined) {
        const result = await this.#solveExperts(layer, stage);
        if (result !== undefined) done(result, true);
        continue;
      }
      const inputs = await this.#inputsOf(stage);
      const gathering = (performance.now() - started) / stage.layers.length;
      for (const [i, layer] of stage.layers.entries()) {
        const result = already[i] ?? await this.#solveLayer(layer, inputs, { block: stage.block, gathering });
        if (result === undefined) continue;
        done(result, already[i] === undefined);
        await pause(options.signal);
      }
      letGo(inputs);
    }
    return this.#solved;
  }

  /** The stages of what is read: of experts in one tensor, those that have read anything. */
  #inputStages(stage: LayerStage): LayerStage[] {
    const [layer] = stage.layers;
    if (layer?.experts === undefined) return [stage];
    return partsWith(this.statistics, layer).map((part) => ({ ...stage, layers: [part] }));
  }

  /** Experts of one tensor, each solved on what it reads, or by its weights where that is nothing. */
  async #solveExperts(layer: LinearLayer, stage: LayerStage): Promise<SolvedLayer | undefined> {
    const { kernels, onStep, solver, signal } = this.options,
      [format] = stage.formats,
      found: SolvedExpert[] = [];
    const read = new Map(this.#inputStages(stage).map((own) => [own.layers[0]!.name, own]));
    const unread = layer.experts! - read.size;
    if (unread > 0) {
      const rest = `${unread} of ${layer.experts} experts have no statistics: by their weights alone`;
      this.options.onWarning?.(`${layer.name}: ${rest}`);
    }
    for (let i = 0; i < layer.experts!; i++) {
      const part = expertLayer(layer, i), own = read.get(part.name);
      const inputs = own && await this.#inputsOf(own);
      const result = inputs && await this.#solveLayer(part, inputs, { ...stage, gathering: 0, format });
      if (inputs !== undefined) letGo(inputs);
      if (own !== undefined && result === undefined) return undefined; // not finite: the writing says so
      const weights = part.weights as DenseMatrix, { rows, cols } = weights;
      const byWeights = LAYER_SOLVERS[solver].withoutMoment;
      found.push(
        result ??
          { tensor: quantizeByWeights(kernels, weights, rows, cols, { ...format!, solver: byWeights }) },
      );
      onStep?.(layer.name, "solving", (i + 1) / layer.experts!);
      await pause(signal);
    }
    return joinedExperts(layer.name, found);
  }

  /**
   * A stage's layers, some solved by this task, the others awaited.
   *
   * @param first number of its first layer among all
   * @param done called with each, and whether it is of this task
   */
  async #solveTogether(
    team: Team,
    stage: LayerStage,
    first: number,
    done: (layer: SolvedLayer, isNew: boolean) => void,
  ): Promise<void> {
    const started = performance.now(), { layers } = stage;
    const isLeftOut = layers.map((layer) => this.#isLeftOut(layer));
    // What nobody solves is not waited for: others may have removed their sums.
    const awaited = layers.filter((_, i) => !isLeftOut[i]).map(({ name }) => name);
    const isOpen = (i: number) => !isLeftOut[i] && team.solved(layers[i]!.name) === undefined;
    const isOwn = layers.map((_, i) => team.solves(first + i) && isOpen(i)),
      known = new Map<string, SolvedLayer>();
    // All tasks have a part of the sums; targets that are made of the inputs themselves are made by all as
    // well.
    const gathered = awaited.length === 0
      ? undefined
      : await team.unlessSolved(awaited, () => this.#gather(stage, isOwn.includes(true)));
    if (gathered !== undefined) {
      const inputs = this.#prepared(stage, gathered), gathering = performance.now() - started;
      const isShared = this.#full !== undefined && gathered.cross === undefined;
      for (const [i, layer] of layers.entries()) {
        if (!isOwn[i] && !(isShared && isOpen(i))) continue;
        const result = await team.unlessSolved(
          [layer.name],
          () => this.#solveLayer(layer, inputs, { block: stage.block, gathering, isWanted: isOwn[i] }),
        );
        if (result === undefined) continue;
        known.set(layer.name, result);
        done(result, true);
        await pause(this.options.signal);
      }
      letGo(inputs);
    }
    for (const [i, layer] of layers.entries()) {
      if (known.has(layer.name) || isLeftOut[i]) continue;
      done(await team.layer(layer.name, first + i), false);
    }
    for (const { name } of layers) team.forget(name);
  }

  /** Takes all runs to the beginning of a block. */
  async #enter(block: number): Promise<void> {
    for (const i of this.data.fit.keys()) {
      this.#full?.enter(i, block);
      this.#runs?.enter(i, block);
      await pause(this.options.signal);
    }
  }

  /** Different inputs of a stage's layers, as far as that is known before they run. */
  #positions({ layers: [first] }: LayerStage): number {
    const { data, statistics } = this;
    return statistics === undefined ? data.distinctPositions : statistics.tokensOf(first!.name);
  }

  /** Structure of the moment of a stage's inputs. */
  #choose({ layers, formats }: LayerStage, positions: number): MomentChoice {
    const { settings, memoryBytes } = this.options, { cols } = layers[0]!.weights;
    return chooseMoment(settings, { cols, positions, memoryBytes, formats });
  }

  /** The structure that is solved with: as it is chosen, or as far as it was saved. */
  #structure(stage: LayerStage): MomentChoice {
    const choice = this.#choose(stage, this.#positions(stage)), { formats, layers: [first] } = stage;
    const { name, weights: { cols } } = first!, saved = this.statistics?.inputOf(name).block ?? cols;
    return chooseSaved(this.options.settings, choice, { cols, saved, formats });
  }

  /** Saved moments of a stage's inputs in the structure that is wanted. */
  #known(statistics: CalibrationStatistics, stage: LayerStage): Gathered & { readonly isOwn: boolean } {
    const { settings } = this.options, [first] = stage.layers, { isFresh } = statistics;
    const gathered = known(statistics, first!), isAsked = settings.moment !== "auto";
    const choice = this.#choose(stage, this.#positions(stage));
    const saved = gathered.moments.block ?? gathered.moments.cols;
    const own = isAsked ? choice : this.#structure(stage);
    const moments = savedMoments(first!.name, gathered.moments, {
      wanted: own.block < saved ? own.block : choice.block,
      isAsked,
      formats: stage.formats,
    });
    const isNarrow = moments.second !== gathered.moments.second;
    if (isNarrow && isFresh) setAside(gathered.moments.second);
    return { ...gathered, moments, isOwn: isNarrow || isFresh };
  }

  async #inputsOf(stage: LayerStage): Promise<StageInputs> {
    return this.#prepared(
      stage,
      this.statistics === undefined ? (await this.#gather(stage))! : this.#known(this.statistics, stage),
    );
  }

  /** Sums of a stage's inputs, ready to solve on. */
  #prepared(stage: LayerStage, gathered: Gathered & { readonly isOwn?: boolean }): StageInputs {
    const { kernels, settings, onWarning } = this.options, first = stage.layers[0]!;
    const { moments } = gathered, structure = momentText(moments.block ?? moments.cols, moments.cols);
    const takesSums = gathered.isOwn ?? true;
    const moment = named(
      first.name,
      () => factorMoments(kernels, moments, { damping: settings.damping, takesSums }),
    );
    if (moment.deadColumns > 0) {
      onWarning?.(`${first.name}: ${moment.deadColumns} of its ${moment.cols} inputs are always 0`);
    }
    if (moment.damping > settings.damping) {
      onWarning?.(`${first.name}: damping raised to ${moment.damping}, its inputs' moment is singular`);
    }
    return { ...gathered, moment, structure, weight: moments.weight };
  }

  /**
   * Whether weights are not finite, and left to the rule for such tensors, which keeps them or stops the run.
   *
   * @throws {WeightsError} where the rule is not known to keep them
   */
  #nonfinite({ name, weights: { cols } }: LinearLayer, dense: Float32Array): boolean {
    const { kernels, keepsNonfinite } = this.options;
    const nonfinite = findNonfinite(kernels, { data: dense, dtype: "F32" }, dense.length);
    if (nonfinite < 0) return false;
    if (keepsNonfinite === true) return true;
    throw new WeightsError(
      `Cannot solve ${JSON.stringify(name)}: weights must be finite, got ${dense[nonfinite]} at row ${
        Math.floor(nonfinite / cols)
      }, column ${nonfinite % cols}; set non_finite: keep to store such a tensor unquantized`,
      { tensor: name },
    );
  }

  /** {@linkcode #nonfinite} of a layer that others may solve. */
  #isLeftOut(layer: LinearLayer): boolean {
    const dense = denseWeights(this.options.kernels, layer), isLeftOut = this.#nonfinite(layer, dense);
    giveBack(dense);
    return isLeftOut;
  }

  /**
   * @param place where the layer is, what gathering its inputs took, the form that is wanted where that is
   *   not told by its name, and whether more than the target is wanted, which a team's tasks make together
   * @returns undefined for a layer with weights that are not finite, which is left out
   */
  async #solveLayer(
    layer: LinearLayer,
    { moment, structure, weight, cross, residuals }: StageInputs,
    { block, gathering, isWanted = true, format = this.options.gridOf(layer.name) }: {
      readonly block: number;
      readonly gathering: number;
      readonly isWanted?: boolean | undefined;
      readonly format?: WeightFormat | undefined;
    },
  ): Promise<SolvedLayer | undefined> {
    const { kernels, settings, solver } = this.options;
    const begun = performance.now(), { name, weights: { rows, cols } } = layer;
    const dense = denseWeights(kernels, layer, this.#scratch?.take("weights", rows * cols));
    if (this.#nonfinite(layer, dense)) return undefined;
    const corrected = { weights: dense, rows, moment };
    const target = cross !== undefined
      ? correctedTarget(kernels, { ...corrected, cross, residual: residuals.get(name) }, {
        ...settings,
        // Each block makes up for all of the stream by itself: together they would do so as many times.
        residualCorrection: settings.residualCorrection / Math.ceil(cols / moment.block),
      })
      : this.#full !== undefined
      ? await targetOfInputs(kernels, corrected, this.#inputsAgain(name, block, weight), settings)
      : dense;
    if (!isWanted) return undefined;
    const onShare = (share: number) => this.options.onStep?.(name, "solving", share);
    const problem = { weights: target, rows, cols, moment, ...format!, onShare };
    const { tensor, objective, firstObjective } = named(
      name,
      () => solveLayer(kernels, solver, problem, settingsFor(settings, { rows, cols, block: moment.block })),
    );
    const power = typicalPower(kernels, target, rows, moment);
    if (target !== dense) giveBack(target);
    if (this.#scratch === undefined) giveBack(dense);
    return {
      name,
      tensor,
      relativeError: objective / power,
      gain: firstObjective / objective,
      moment: structure,
      damping: moment.damping,
      deadColumns: moment.deadColumns,
      inputs: moment.tokens,
      milliseconds: gathering + performance.now() - begun,
    };
  }

  /** What a layer of the present stage reads and lost, again. */
  #inputsAgain(name: string, block: number, weight: number): LayerInputs {
    const { data: { fit }, options: { onStep, signal, team } } = this, runs = this.#runs!;
    const inputs = (i: number) => {
      const { x, rows } = runs.stop(i, block, name);
      return { x, tokens: rows, weights: rowWeights(fit[i]!, rows, name) };
    };
    return {
      parts: fit.length,
      weight,
      place: (i) => this.#placeOf(i),
      ...(team === undefined ? {} : {
        async total(sums, pass) {
          const own = { counts: [], sums: [sums.exact()] }, what = `target ${pass}`;
          return narrowed((await team.all(name, what, own)).sums[0]!);
        },
      }),
      inputs,
      lost: (i) => {
        const { lost, stream } = this.#lostBefore(i, block, name), { residual } = runs.stop(i, block, name);
        const part = inputs(i);
        return {
          ...part,
          lost: subtract(lost, part.x),
          lostStream: residual === undefined ? undefined : subtract(stream!, residual),
        };
      },
      pause: async (share) => {
        onStep?.(name, "correcting the target", share);
        await pause(signal);
      },
    };
  }

  /** Copies of what a layer reads in full precision, and of the stream that its output is added to. */
  #lostBefore(i: number, block: number, name: string) {
    const { x, residual } = this.#full!.stop(i, block, name);
    // Scratch of the model, which the other run takes as well.
    const copy = (key: string, values: Float32Array) => {
      const own = this.#lost.take(key, values.length);
      own.set(values);
      return own;
    };
    return { lost: copy("x", x), stream: residual && copy("residual", residual) };
  }

  /** Where a part of the data lies in the pass. */
  #placeOf(part: number): PartPlace {
    const { fit, chunk } = this.data,
      before = fit.slice(0, part).reduce((sum, { samples }) => sum + samples, 0);
    return { before, samples: fit[part]!.samples, chunk };
  }

  /**
   * Moments of a stage's inputs over all calibration data.
   *
   * @param isWanted whether a team's task needs them: it tells the others its part either way
   */
  async #gather(stage: LayerStage, isWanted = true): Promise<Gathered | undefined> {
    const { options: { kernels, onStep, signal, team }, data: { fit } } = this, { block, layers } = stage;
    const { name, weights: { cols } } = layers[0]!;
    const full = this.#full, width = this.#choose(stage, this.#inputCount(stage)).block;
    const sums = (rows: number, block: number, isSymmetric = false) =>
      new MomentSums({ rows, cols, block, isSymmetric });
    const second = sums(cols, width, true);
    // With a diagonal alone targets are corrected with the inputs themselves.
    const cross = full === undefined || width === 1 ? undefined : sums(cols, width);
    const residuals = new Map<string, MomentSums>();
    let tokens = 0, weight = 0;
    for (const [i, part] of fit.entries()) {
      onStep?.(name, "reading inputs", i / fit.length);
      const { lost, stream } = cross === undefined ? {} : this.#lostBefore(i, block, name);
      const { x, rows, residual } = this.#runs!.stop(i, block, name), own = rowWeights(part, rows, name);
      const place = this.#placeOf(i), inputs = { x, weights: own, tokens: rows };
      second.addPart(kernels, inputs, place);
      tokens += rows;
      // One after the other: the sum does not depend on how samples are divided into parts.
      if (own === undefined) weight += rows;
      else for (const value of own) weight += value;
      cross?.addPart(kernels, { ...inputs, y: subtract(lost!, x) }, place);
      if (residual !== undefined && cross !== undefined) {
        const lostStream = subtract(stream!, residual);
        for (const layer of layers) {
          const own = residuals.get(layer.name) ?? sums(residual.length / rows, cols);
          residuals.set(layer.name, own);
          own.addPart(kernels, { ...inputs, y: lostStream }, place);
        }
      }
      await pause(signal);
    }
    const parts = [second, ...(cross === undefined ? [] : [cross]), ...residuals.values()];
    const own = { counts: [tokens, weight], sums: parts.map((sums) => sums.exact()) };
    const isShared = full !== undefined && cross === undefined;
    if (team !== undefined && !isWanted && !isShared) {
      team.publish(name, "inputs", own);
      return giveBack(...own.sums) as undefined;
    }
    const { counts: [inputs, total], sums: all } = await team?.all(name, "inputs", own) ?? own;
    if (all !== own.sums) giveBack(...own.sums);
    const mean = (values: Float64Array<ArrayBuffer>) => {
      const means = narrowed(values);
      for (let i = 0; i < means.length; i++) means[i]! /= total!;
      return means;
    };
    const behind = cross === undefined ? 1 : 2;
    return {
      moments: { cols, block: width, tokens: inputs!, weight: total!, second: narrowed(all[0]!) },
      cross: cross && mean(all[1]!),
      residuals: new Map([...residuals.keys()].map((name, i) => [name, mean(all[behind + i]!)])),
    };
  }

  /** Different inputs of a stage's layers: where those read a row a sample there are fewer than positions. */
  #inputCount(stage: LayerStage): number {
    const { data: { fit, distinctPositions, samples } } = this,
      { block, layers: [first] } = stage,
      [part] = fit;
    const { rows } = this.#runs!.stop(0, block, first!.name);
    if (rows === part!.weights.length) return distinctPositions;
    return Math.min(distinctPositions, samples);
  }
}

/** Bytes of inputs that stay for layers that read the same: theirs are not far behind in a file. */
const READY_BYTES = 2 ** 27;

/** Inputs of the stages that were asked for last. */
class ReadyInputs<Key> {
  readonly #ready = new Map<Key, StageInputs>();

  get(stage: Key): StageInputs | undefined {
    return this.#ready.get(stage);
  }

  /** Keeps a stage's inputs, in place of the oldest where these are too many. */
  put(stage: Key, inputs: StageInputs): StageInputs {
    const bytesOf = ({ moment: { moment, factor } }: StageInputs) => moment.byteLength + factor.byteLength;
    let bytes = bytesOf(inputs);
    for (const own of this.#ready.values()) bytes += bytesOf(own);
    for (const [key, own] of this.#ready) {
      if (bytes <= READY_BYTES) break;
      bytes -= bytesOf(own);
      this.#ready.delete(key);
      letGo(own);
    }
    this.#ready.set(stage, inputs);
    return inputs;
  }
}

/** Gives back the memory of a stage's inputs, whose layers are solved. */
function letGo({ moment: { moment, factor }, cross, residuals }: StageInputs): void {
  giveBack(moment, factor, cross, ...residuals.values());
}

/** `values − others`, in place. */
function subtract(values: Float32Array, others: Float32Array): Float32Array {
  for (let k = 0; k < values.length; k++) values[k]! -= others[k]!;
  return values;
}

/** Errors of a layer, with its name. */
function named<T>(name: string, run: () => T): T {
  try {
    return run();
  } catch (cause) {
    if (!(cause instanceof WeightsError)) throw cause;
    throw new WeightsError(`Cannot solve ${JSON.stringify(name)}: ${cause.message}`, { tensor: name, cause });
  }
}

/** Warns once, for the layer with most columns, when its inputs are too few. */
function warnOfFewInputs<Batch>(
  stages: readonly Pick<Stage, "layers">[],
  data: CalibrationSet<Batch>,
  statistics: CalibrationStatistics | undefined,
  onWarning: SolveOptions["onWarning"],
): void {
  const widest = stages.map(({ layers }) => layers[0]!)
    .reduce((a, b) => b.weights.cols > a.weights.cols ? b : a, stages[0]!.layers[0]!);
  const wanted = INPUTS_PER_COLUMN * widest.weights.cols;
  const got = statistics === undefined ? data.distinctPositions : statistics.tokensOf(widest.name);
  if (got >= wanted) return;
  onWarning?.(
    `${widest.name} reads ${widest.weights.cols} columns: calibrate with at least ${wanted} different positions, got ${got}`,
  );
}

interface Gathered {
  readonly moments: InputMoments;
  /** Mean of w (x° − x) xᵀ; undefined when nothing is to be corrected. */
  readonly cross: Float32Array<ArrayBuffer> | undefined;
  /** Mean of w (r° − r) xᵀ, by layer. */
  readonly residuals: ReadonlyMap<string, Float32Array<ArrayBuffer>>;
}

/** Saved moments of a layer's inputs, without anything to correct. */
function known(statistics: CalibrationStatistics, { name, weights: { cols } }: LinearLayer): Gathered {
  const moments = statistics.moments(name);
  if (moments.cols === cols) return { moments, cross: undefined, residuals: new Map() };
  throw new CalibrationError(
    `Cannot solve ${JSON.stringify(name)}: its statistics must be of ${cols} columns, got ${moments.cols}`,
    { tensor: name },
  );
}
