/**
 * Solving a whole model on calibration data, block by block: each layer is solved on the inputs that the quantized layers before it
 * make, and aims at the outputs that full precision makes of its own. Beyond the model there is one stage's moments at a time, and the hidden states of the
 * calibration data in full precision and quantized.
 */
import { correctedTarget, factorMoments } from "../quant/solvers/factored_moment.ts";
import type { GridOptions } from "../quant/packed/layout.ts";
import type { Solver } from "../config/names.ts";
import type { SolverSettings } from "../quant/solvers/settings.ts";
import { CalibrationError, WeightsError } from "../errors.ts";
import type { Blockwise, LinearLayer, Stage } from "../models/mod.ts";
import type { Matrix } from "../models/mod.ts";
import type { Kernels } from "../native/mod.ts";
import { rotateMoment, rotateRows, type Rotation, rotationBlock } from "../quant/packed/rotation.ts";
import { outputPower } from "../quant/product.ts";
import { solveLowRankLayer } from "../quant/solvers/low_rank_fit.ts";
import { convertFloats, findNonfinite, type PackedTensor } from "../quant/mod.ts";
import { accumulateMoment, emptyMoments, type InputMoments } from "../quant/solvers/moments.ts";
import { solveLayer } from "../quant/solvers/solve_layer.ts";
import type { CalibrationStatistics } from "../time/mod.ts";
import type { Calibrated, CalibrationPart, CalibrationSet } from "../calibration/mod.ts";
import { blockCount, rowWeights } from "../calibration/collect.ts";
import { pause } from "../progress.ts";

/** Fewer inputs than so many a column leave a moment to chance: solvers then fit the sample, not the layer. */
const INPUTS_PER_COLUMN = 4;

export interface SolveOptions {
  readonly kernels: Kernels;
  readonly solver: Solver;
  readonly settings: SolverSettings;
  /** The grid of a layer by the name of its weight; undefined leaves the layer as it is. */
  readonly gridOf: (name: string) => GridOptions | undefined;
  /** `blocks`: on the inputs that the quantized layers before make; `once`: all on those of the full-precision model. */
  readonly mode?: "blocks" | "once" | undefined;
  /** Layers that an earlier run has solved. */
  readonly solved?: ReadonlyMap<string, SolvedLayer> | undefined;
  /** Layers with NaN or infinity among their weights are left out; otherwise they are an error. */
  readonly keepsNonfinite?: boolean | undefined;
  readonly onLayer?: ((layer: SolvedLayer, done: number, of: number) => void) | undefined;
  readonly onWarning?: ((message: string) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** What became of a layer. */
export interface SolvedLayer {
  /** Name of its weight. */
  readonly name: string;
  readonly tensor: PackedTensor;
  /** Mean over inputs of ‖(W − Ŵ) x‖² / ‖W x‖², x as the quantized model makes it, W what was aimed at. */
  readonly relativeError: number;
  /** The error of the first grid that was tried / that of the result. */
  readonly gain: number;
  readonly damping: number;
  readonly deadColumns: number;
  readonly inputs: number;
  readonly milliseconds: number;
}

/** A layer's weights as float32, row-major. */
export function denseWeights(kernels: Kernels, { weights, name }: LinearLayer): Float32Array {
  if ("packed" in weights) {
    throw new CalibrationError(
      `Cannot solve ${JSON.stringify(name)}: its weights must be plain, got packed ones`,
      {
        tensor: name,
      },
    );
  }
  const { data, dtype, rows, cols } = weights;
  if (dtype === "F32") return data as Float32Array;
  return new Float32Array(convertFloats(kernels, { data, dtype }, rows * cols, "F32").buffer);
}

/** The layers to solve, in the order in which they run, a stage at a time. */
function stagesToSolve(model: Blockwise<never>, gridOf: SolveOptions["gridOf"]) {
  const seen = new Set<string>();
  return model.stages.map(({ block, layers }) => ({
    block,
    layers: layers.filter(({ name }) => gridOf(name) !== undefined && !seen.has(name) && seen.add(name)),
  })).filter(({ layers }) => layers.length > 0);
}

/**
 * Solves every layer that `gridOf` has a grid for.
 *
 * @throws {WeightsError} when weights or moments are NaN or infinite
 * @throws {CalibrationError} when there is nothing to calibrate with, or saved statistics lack a layer
 */
export function solveModel(calibrated: Calibrated, options: SolveOptions): Promise<Map<string, SolvedLayer>> {
  const { data: { fit }, statistics } = calibrated;
  if (statistics === undefined && fit.length === 0) {
    throw new CalibrationError("Cannot calibrate: there must be samples, got none");
  }
  const gathered = options.mode === "once" || fit.length === 0 ? statistics : undefined;
  return calibrated.kind === "sequences"
    ? solveStages(calibrated.model, calibrated.data, gathered, options)
    : solveStages(calibrated.model, calibrated.data, gathered, options);
}

async function solveStages<Batch>(
  model: Blockwise<Batch>,
  data: CalibrationSet<Batch>,
  /** What full precision makes of every layer's inputs, where it is known: the model is not run then. */
  statistics: CalibrationStatistics | undefined,
  options: SolveOptions,
): Promise<Map<string, SolvedLayer>> {
  const { kernels, settings, solver, gridOf, mode = "blocks", onWarning } = options;
  const solved = new Map<string, SolvedLayer>();
  const weights = new Map<string, Matrix>();
  const stages = stagesToSolve(model as Blockwise<never>, gridOf);
  const count = stages.reduce((sum, { layers }) => sum + layers.length, 0);
  // Hidden states in front of `block`: as full precision has them, and as the layers solved so far make them.
  const states = (statistics === undefined ? data.fit : []).map(({ batch }) => {
    const full = model.start(batch);
    return { full, quantized: mode === "blocks" ? full.slice() : full };
  });
  let block = 0;
  warnOfFewInputs(stages, data, statistics, onWarning);
  for (const stage of stages) {
    for (; statistics === undefined && block < stage.block; block++) {
      for (const [i, { batch }] of data.fit.entries()) {
        const { full, quantized } = states[i]!;
        model.runBlock(block, batch, full, {});
        if (quantized !== full) model.runBlock(block, batch, quantized, { weights });
      }
      await pause(options.signal);
    }
    const started = performance.now();
    const already = stage.layers.map(({ name }) => options.solved?.get(name));
    if (already.every((layer) => layer !== undefined)) {
      for (const layer of already) {
        solved.set(layer.name, layer);
        weights.set(layer.name, layer.tensor);
        options.onLayer?.(layer, solved.size, count);
      }
      continue;
    }
    const first = stage.layers[0]!;
    const gathered = statistics === undefined
      ? gather(model, data.fit, states, stage, weights, options)
      : known(statistics, first);
    const rotation = rotationOf(first.weights.cols, settings);
    if (rotation !== undefined) rotateGathered(gathered, rotation);
    const moment = named(
      first.name,
      () => factorMoments(kernels, gathered.moments, { damping: settings.damping }),
    );
    if (moment.deadColumns > 0) {
      onWarning?.(`${first.name}: ${moment.deadColumns} of its ${moment.cols} inputs are always 0`);
    }
    if (moment.damping > settings.damping) {
      onWarning?.(`${first.name}: damping raised to ${moment.damping}, its inputs' moment is singular`);
    }
    const gathering = (performance.now() - started) / stage.layers.length;
    for (const layer of stage.layers) {
      const begun = performance.now();
      const { rows, cols } = layer.weights;
      const own = denseWeights(kernels, layer);
      const nonfinite = findNonfinite(kernels, { data: own, dtype: "F32" }, own.length);
      if (nonfinite >= 0) {
        // Left to the rule for such tensors, which keeps them or stops the run.
        if (options.keepsNonfinite === true) continue;
        throw new WeightsError(
          `Cannot solve ${JSON.stringify(layer.name)}: weights must be finite, got ${own[nonfinite]} at row ${
            Math.floor(nonfinite / cols)
          }, column ${nonfinite % cols}; set non_finite: keep to store such a tensor unquantized`,
          { tensor: layer.name },
        );
      }
      const dense = rotation === undefined ? own : rotateRows(own.slice(), cols, rotation);
      const target = gathered.cross === undefined ? dense : correctedTarget(kernels, {
        weights: dense,
        rows,
        moment,
        cross: gathered.cross,
        residual: gathered.residuals.get(layer.name),
      }, settings);
      const solve = settings.lowRank === 0 ? solveLayer : solveLowRankLayer;
      const problem = { weights: target, rows, cols, moment, ...gridOf(layer.name)! };
      const { tensor, objective, firstObjective } = named(
        layer.name,
        () => solve(kernels, solver, problem, settings),
      );
      const result: SolvedLayer = {
        name: layer.name,
        tensor: rotation === undefined ? tensor : { ...tensor, rotation },
        relativeError: objective / outputPower(kernels, target, rows, moment.moment),
        gain: firstObjective / objective,
        damping: moment.damping,
        deadColumns: moment.deadColumns,
        inputs: moment.tokens,
        milliseconds: gathering + performance.now() - begun,
      };
      solved.set(layer.name, result);
      weights.set(layer.name, result.tensor);
      options.onLayer?.(result, solved.size, count);
      await pause(options.signal);
    }
  }
  return solved;
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

/** Says once, for the layer that needs most, when its inputs are too few. */
function warnOfFewInputs<Batch>(
  stages: readonly Pick<Stage, "layers">[],
  data: CalibrationSet<Batch>,
  statistics: CalibrationStatistics | undefined,
  onWarning: SolveOptions["onWarning"],
): void {
  const widest = stages.map(({ layers }) => layers[0]!)
    .reduce((a, b) => b.weights.cols > a.weights.cols ? b : a, stages[0]!.layers[0]!);
  const wanted = INPUTS_PER_COLUMN * widest.weights.cols;
  const got = statistics === undefined ? data.distinctPositions : statistics.moments(widest.name).tokens;
  if (got >= wanted) return;
  onWarning?.(
    `${widest.name} reads ${widest.weights.cols} columns: calibrate with at least ${wanted} different positions, got ${got}`,
  );
}

/** The rotation of inputs of so many columns; undefined where none is asked for or a block would be one column. */
function rotationOf(cols: number, { rotation, rotationSeed }: SolverSettings): Rotation | undefined {
  const block = rotationBlock(cols);
  return rotation === "none" || block === 1 ? undefined : { kind: rotation, block, seed: rotationSeed };
}

/** Everything gathered, as rotated inputs would have made it. */
function rotateGathered({ moments, cross, residuals }: Gathered, rotation: Rotation): void {
  rotateMoment(moments.second, moments.cols, rotation);
  if (cross !== undefined) rotateMoment(cross, moments.cols, rotation);
  for (const sums of residuals.values()) rotateRows(sums, moments.cols, rotation);
}

/** Thrown by an observer to end a run whose rest nobody needs. */
const ENOUGH = new Error("every layer of the stage was seen");

interface Gathered {
  readonly moments: InputMoments;
  /** Mean of w (x° − x) xᵀ; undefined when nothing is to be corrected. */
  readonly cross: Float32Array | undefined;
  /** Mean of w (r° − r) xᵀ, by layer. */
  readonly residuals: ReadonlyMap<string, Float32Array>;
}

/** What is known of what a layer reads, without anything to correct. */
function known(statistics: CalibrationStatistics, { name, weights: { cols } }: LinearLayer): Gathered {
  const moments = statistics.moments(name);
  if (moments.cols === cols) return { moments, cross: undefined, residuals: new Map() };
  throw new CalibrationError(
    `Cannot solve ${JSON.stringify(name)}: its statistics must be of ${cols} columns, got ${moments.cols}`,
    { tensor: name },
  );
}

/** What the layers of a stage read, over all calibration data. */
function gather<Batch>(
  model: Blockwise<Batch>,
  parts: readonly CalibrationPart<Batch>[],
  states: readonly {
    readonly full: Float32Array<ArrayBuffer>;
    readonly quantized: Float32Array<ArrayBuffer>;
  }[],
  stage: { readonly block: number; readonly layers: readonly LinearLayer[] },
  weights: ReadonlyMap<string, Matrix>,
  { kernels, settings, solver, mode = "blocks" }: SolveOptions,
): Gathered {
  const names = new Set(stage.layers.map(({ name }) => name));
  const first = stage.layers[0]!, { cols } = first.weights;
  const corrects = mode === "blocks" && solver === "best" &&
    (settings.correction > 0 || settings.residualCorrection > 0);
  const moments = emptyMoments(cols);
  const cross = corrects ? new Float32Array(cols * cols) : undefined;
  const residuals = new Map<string, Float32Array>();
  const run = (
    part: CalibrationPart<Batch>,
    hidden: Float32Array,
    options: Parameters<typeof model.finish>[2],
  ) => {
    const scratch = hidden.slice() as Float32Array<ArrayBuffer>;
    try {
      if (stage.block < blockCount(model)) model.runBlock(stage.block, part.batch, scratch, options);
      else model.finish(part.batch, scratch, options);
    } catch (error) {
      if (error !== ENOUGH) throw error;
    }
  };
  for (const [i, part] of parts.entries()) {
    const { full, quantized } = states[i]!;
    const fullInputs = new Map<string, { x: Float32Array | undefined; residual: Float32Array | undefined }>();
    if (corrects) {
      run(part, full, {
        observe: ({ name }, x, rows, residual) => {
          if (fullInputs.size === names.size) throw ENOUGH;
          if (!names.has(name) || fullInputs.has(name)) return;
          const height = stage.layers.find((each) => each.name === name)!.weights.rows;
          fullInputs.set(name, {
            x: name === first.name ? x.slice(0, rows * cols) : undefined,
            residual: residual?.slice(0, rows * height),
          });
        },
      });
    }
    const seen = new Set<string>();
    run(part, quantized, {
      // Once: all on what full precision makes, also inside a block.
      weights: mode === "blocks" ? weights : undefined,
      observe: ({ name }, x, rows, residual) => {
        if (seen.size === names.size) throw ENOUGH;
        if (!names.has(name) || seen.has(name)) return;
        seen.add(name);
        const own = rowWeights(part, rows, name), inputs = x.subarray(0, rows * cols);
        if (name === first.name) {
          accumulateMoment(kernels, inputs, undefined, own, rows, moments.second);
          moments.tokens += rows;
          moments.weight += own === undefined ? rows : own.reduce((sum, value) => sum + value, 0);
          if (cross !== undefined) {
            const lost = fullInputs.get(name)!.x!;
            for (let k = 0; k < lost.length; k++) lost[k]! -= inputs[k]!;
            accumulateMoment(kernels, inputs, lost, own, rows, cross);
          }
        }
        if (residual === undefined || cross === undefined) return;
        const lost = fullInputs.get(name)!.residual!;
        const height = lost.length / rows;
        for (let k = 0; k < lost.length; k++) lost[k]! -= residual[k]!;
        let sums = residuals.get(name);
        if (sums === undefined) residuals.set(name, sums = new Float32Array(height * cols));
        accumulateMoment(kernels, inputs, lost, own, rows, sums);
      },
    });
  }
  const mean = (sums: Float32Array) => {
    for (let i = 0; i < sums.length; i++) sums[i]! /= moments.weight;
    return sums;
  };
  return {
    moments,
    cross: cross === undefined ? undefined : mean(cross),
    residuals: new Map([...residuals].map(([name, sums]) => [name, mean(sums)])),
  };
}
