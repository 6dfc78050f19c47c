/**
 * Solving a whole model on calibration data, block by block: each layer is solved on the inputs that the
 * quantized layers before it produce, and targets the full-precision layer's outputs. Runs in full precision
 * and quantized go on side by side, from stage to stage. Memory beyond the model: the moments of one stage at
 * a time, and what the next stage reads.
 */
import { correctedTarget, factorMoments, typicalPower } from "../quant/solvers/factored_moment.ts";
import { readArrays, type WeightFormat } from "../quant/packed/layout.ts";
import type { Solver } from "../config/names.ts";
import type { SolverSettings } from "../quant/solvers/settings.ts";
import { CalibrationError, WeightsError } from "../errors.ts";
import type { Blockwise, LinearLayer, Matrix, ModelLayers } from "../models/mod.ts";
import type { Kernels } from "../native/mod.ts";
import type { DenseMatrix } from "../models/layers/linear.ts";
import { giveBack, setAside } from "../quant/array_memory.ts";
import { findNonfinite, LAYER_SOLVERS, quantizeByWeights } from "../quant/mod.ts";
import { settingsFor } from "../quant/solvers/effort.ts";
import { solveLayer } from "../quant/solvers/solve_layer.ts";
import type { CalibrationStatistics } from "../time/mod.ts";
import type { CalibrationSet } from "../calibration/mod.ts";
import type { Solvable } from "../calibration/statistics/alone.ts";
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
import { denseWeights } from "./dense_weights.ts";
import { StageGathering } from "./gathering.ts";
import { KeptArrays, type KeptArraysOptions } from "./kept_arrays.ts";
import { joinedExperts, type SolvedExpert } from "./expert_stack.ts";
import { targetOfInputs } from "./target_of_inputs.ts";
import {
  type Gathered,
  known,
  type LayerStage,
  letGo,
  ReadyInputs,
  stageBytes,
  type StageInputs,
  warnOfFewInputs,
} from "./stage_inputs.ts";
import { StagedRuns } from "./staged_runs.ts";
import type { SolvedLayer } from "./solved_layers.ts";
import type { Team } from "./team.ts";

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
 * The same layers one by one from statistics alone: in any order, since none waits for another. What stays
 * in memory are the moments and factors of the stages that were asked for last, up to 128 MiB
 * (`READY_BYTES`) of them, or those of one stage that takes more; room is made before the next are read.
 *
 * @throws {CalibrationError} when saved statistics lack a layer
 */
export function solveOnDemand({ model, data, statistics }: Solvable, options: SolveOptions): SolvedOnDemand {
  if (statistics === undefined || data.fit.length > 0) {
    throw new TypeError("Cannot solve layers on demand: their inputs must be known from statistics alone");
  }
  return new ModelSolver<never>(model, data as CalibrationSet<never>, statistics, options).onDemand();
}

/** Solves one model. */
class ModelSolver<Batch> {
  readonly #solved = new Map<string, SolvedLayer>();
  readonly #weights: Map<string, Matrix>;
  readonly #kept: KeptArrays;
  /** For a layer alone in memory: new pages for each take a tenth of the time of 4-bit feedback. */
  readonly #scratch: Workspace | undefined;
  /** Undefined where the moments are known. */
  readonly #gathering: StageGathering<Batch> | undefined;

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
    if (statistics !== undefined) this.#scratch = new Workspace();
    else {
      // Once: all on full precision's inputs, also inside a block.
      const own = runs("run", isBlockwise ? this.#weights : undefined);
      this.#gathering = new StageGathering(own, corrects ? runs("full") : undefined, data, options);
    }
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
        const bytes = Math.max(0, ...this.#inputStages(stage).map((own) => this.#bytesOf(own)));
        if (layer.experts !== undefined) {
          ready.makeRoom(bytes);
          result = await this.#solveExperts(layer, stage);
        } else {
          const inputs = await ready.take(stage, bytes, () => this.#inputsOf(stage));
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
      await this.#gathering?.enter(stage.block);
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
      const isShared = this.#gathering?.full !== undefined && gathered.cross === undefined;
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

  /** Bytes of a stage's inputs once they are ready. */
  #bytesOf(stage: LayerStage): number {
    return stageBytes(stage.layers[0]!.weights.cols, this.#structure(stage).block);
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

  /** @param isWanted whether a team's task needs them */
  async #gather(stage: LayerStage, isWanted = true): Promise<Gathered | undefined> {
    const gathering = this.#gathering!, { block } = this.#choose(stage, gathering.inputCount(stage));
    return await gathering.gather(stage, block, isWanted);
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
      : this.#gathering?.full !== undefined
      ? await targetOfInputs(kernels, corrected, this.#gathering.inputsAgain(name, block, weight), settings)
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
