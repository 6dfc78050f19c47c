/** Settings and results of the solvers. */
import { type Effort, EFFORTS, type MomentBlockSize, type MomentStructure } from "../../config/names.ts";
import { checkMember, checkRange, checkWhole } from "../../native/call.ts";
import type { PackedTensor } from "../packed/layout.ts";
import { checkTemperature } from "./annealing.ts";

/** Parts of the error made before a layer that its weights should undo. */
export interface Correction {
  /** Part of the error of the layer's inputs, 0 to 1. */
  readonly correction: number;
  /** Part of the error of the stream that the layer's output is added to, 0 to 1. */
  readonly residualCorrection: number;
}

/** What is kept of the second moment of a layer's inputs. */
export interface MomentSettings {
  /** `auto` decides by width, memory and the number of inputs. */
  readonly moment: MomentStructure | "auto";
  /** Columns of a block. */
  readonly momentBlock: MomentBlockSize;
}

/** Settings of `feedback` and `best`. */
export interface SolverSettings extends Correction, MomentSettings {
  /** Part of the moment's mean diagonal that is added to its diagonal. Default 0.01. */
  readonly damping: number;
  /** Ranges that `best` tries, as parts of the group's own, beside the range that `clip` finds. */
  readonly ratios: readonly number[];
  /** Which starts are tried and refined, and how often. */
  readonly effort: Effort;
  /** Times that `best` refits scales and zero points and descends over codes; null: by the effort. */
  readonly rounds: number | null;
  /** True if scales and zero points are refitted, too. */
  readonly refit: boolean;
  /** Temperature at which `best` begins to anneal codes, in squared steps between codes; 0 does not. */
  readonly annealing: number;
}

/** Part of a moment's mean diagonal that is added to it unless settings say otherwise. */
export const DEFAULT_DAMPING = 0.01;

export const DEFAULT_SOLVER_SETTINGS: SolverSettings = {
  damping: DEFAULT_DAMPING,
  ratios: [1, 0.85, 0.7, 0.55],
  effort: "medium",
  rounds: null,
  refit: true,
  correction: 1,
  residualCorrection: 1,
  annealing: 0,
  moment: "auto",
  momentBlock: 1024,
};

/** Result of a solver for a layer. */
export interface Solution {
  readonly tensor: PackedTensor;
  /** Σ over rows of Δ M Δᵀ, Δ the error against the target and M the damped moment; NaN without one. */
  readonly objective: number;
  /** The same from the first start, to see what other starts and refining gained. */
  readonly firstObjective: number;
}

/** Throws unless the settings that {@linkcode solveLayer} uses are in their ranges. */
export function checkSettings(doing: string, settings: SolverSettings): void {
  const { damping, ratios, effort, rounds, correction, residualCorrection, annealing } = settings;
  checkRange(doing, "damping", damping, 0, 10);
  for (const ratio of ratios) checkRange(doing, "ratios", ratio, 0.01, 1);
  if (ratios.length > 32) {
    throw new RangeError(`Cannot ${doing}: ratios must be at most 32 numbers, got ${ratios.length}`);
  }
  checkMember(doing, "effort", effort, EFFORTS);
  if (rounds !== null) checkWhole(doing, "rounds", rounds, 0, 100);
  checkRange(doing, "correction", correction, 0, 1);
  checkRange(doing, "residualCorrection", residualCorrection, 0, 1);
  checkTemperature(annealing);
}
