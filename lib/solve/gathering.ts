/**
 * What the layers of a stage read, gathered over all calibration data: moments, and what inputs and stream
 * have lost against full precision, whose run goes on beside.
 */
import { rowWeights } from "../calibration/collect.ts";
import type { CalibrationSet } from "../calibration/mod.ts";
import { Workspace } from "../models/layers/workspace.ts";
import type { Kernels } from "../native/mod.ts";
import { pause } from "../progress.ts";
import { giveBack, narrowed } from "../quant/array_memory.ts";
import { MomentSums, type PartPlace } from "../quant/solvers/moment_sums.ts";
import type { Gathered, LayerStage } from "./stage_inputs.ts";
import type { StagedRuns } from "./staged_runs.ts";
import type { LayerInputs } from "./target_of_inputs.ts";
import type { Team } from "./team.ts";

/** Those of solving a model that gathering takes. */
export interface GatheringOptions {
  readonly kernels: Kernels;
  readonly team?: Team | undefined;
  readonly onStep?: ((name: string, doing: string, share: number) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** Gathers what one stage after the other reads. */
export class StageGathering<Batch> {
  readonly #lost = new Workspace();

  constructor(
    /** The runs whose inputs layers are solved on. */
    readonly runs: StagedRuns<Batch>,
    /** Those in full precision, where the others' loss is corrected. */
    readonly full: StagedRuns<Batch> | undefined,
    readonly data: CalibrationSet<Batch>,
    readonly options: GatheringOptions,
  ) {}

  /** Takes all runs to the beginning of a block. */
  async enter(block: number): Promise<void> {
    for (const i of this.data.fit.keys()) {
      this.full?.enter(i, block);
      this.runs.enter(i, block);
      await pause(this.options.signal);
    }
  }

  /** Different inputs of a stage's layers: where those read a row a sample there are fewer than positions. */
  inputCount(stage: LayerStage): number {
    const { data: { fit, distinctPositions, samples } } = this,
      { block, layers: [first] } = stage,
      [part] = fit;
    const { rows } = this.runs.stop(0, block, first!.name);
    if (rows === part!.weights.length) return distinctPositions;
    return Math.min(distinctPositions, samples);
  }

  /**
   * Moments of a stage's inputs over all calibration data.
   *
   * @param width columns of a block of their moment
   * @param isWanted whether a team's task needs them: it tells the others its part either way
   */
  async gather(stage: LayerStage, width: number, isWanted: boolean): Promise<Gathered | undefined> {
    const { options: { kernels, onStep, signal, team }, data: { fit } } = this, { block, layers } = stage;
    const { name, weights: { cols } } = layers[0]!;
    const { full } = this;
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
      const { x, rows, residual } = this.runs.stop(i, block, name), own = rowWeights(part, rows, name);
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

  /** What a layer of the present stage reads and lost, again. */
  inputsAgain(name: string, block: number, weight: number): LayerInputs {
    const { data: { fit }, options: { onStep, signal, team }, runs } = this;
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
    const { x, residual } = this.full!.stop(i, block, name);
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
}

/** `values − others`, in place. */
function subtract(values: Float32Array, others: Float32Array): Float32Array {
  for (let k = 0; k < values.length; k++) values[k]! -= others[k]!;
  return values;
}
