/** The phases' context: a model in the making, its checkpoint and its calibration data. */
import { type HeldWeights, type LoadedModel, modelFrom } from "../models/mod.ts";
import type { Workspace } from "../models/layers/workspace.ts";
import type { Kernels } from "../native/mod.ts";
import type { PackedTensor } from "../quant/mod.ts";
import type { Checkpoint } from "../tensor/mod.ts";
import type { TransitionComputer } from "../thermo/mod.ts";
import type { TimeParameters } from "../time/mod.ts";
import type { Calibrated } from "../calibration/mod.ts";
import type { RefinementPlace } from "./kept_refinement.ts";
import { stepWeights } from "../calibration/step_kl.ts";

/** A model in the making: what replaces the checkpoint's weights, biases and time parameters. */
export interface PhaseModel {
  readonly weights: ReadonlyMap<string, PackedTensor>;
  /** Refined biases by name. */
  readonly biases: ReadonlyMap<string, Float32Array<ArrayBuffer>>;
  readonly timeParameters: TimeParameters | undefined;
}

/** Inputs of the phases. */
export interface PhaseContext {
  readonly checkpoint: Checkpoint;
  readonly calibrated: Calibrated;
  readonly kernels: Kernels;
  /** Packed token tables, which belong to every model with packed layers. */
  readonly tables?: ReadonlyMap<string, PackedTensor> | undefined;
  /** Where the calibration data come from and with which seed, for more of them. */
  readonly source: string;
  readonly seed: number;
  /** Scratch shared by all models that {@linkcode loadPhaseModel} loads, which then have to take turns. */
  readonly workspace?: Workspace | undefined;
  /** Step weights and the cache of step KLs; default a new one with an empty cache. */
  readonly transitions?: TransitionComputer | undefined;
  /** Where plain weights are held, by the models in turn, as far as memory allows; default each in full. */
  readonly held?: HeldWeights | undefined;
  /** Bytes that gradients may take; any by default. */
  readonly gradientBytes?: number | undefined;
  /** Where the refinement is kept over a stop; default nowhere. */
  readonly place?: RefinementPlace | undefined;
  readonly signal?: AbortSignal | undefined;
  readonly onProgress?: ((message: string) => void) | undefined;
  /** What a phase is about to do, as a sentence. */
  readonly onPlan?: ((message: string) => void) | undefined;
  /** Steps of a phase that takes many. */
  readonly onStep?: ((phase: string, done: number, of: number) => void) | undefined;
}

/** Loads a model in the making. */
export function loadPhaseModel(
  { checkpoint, kernels, workspace, held, tables = new Map() }: PhaseContext,
  { weights, ...model }: Partial<PhaseModel>,
): LoadedModel {
  const packed = weights && new Map([...tables, ...weights]);
  return modelFrom(checkpoint, kernels, { workspace, held, weights: packed, ...model });
}

/** The step weights of the context's model. */
export function transitionsOf({ transitions, calibrated }: PhaseContext): TransitionComputer {
  return transitions ?? stepWeights(calibrated.data.scheduler);
}
