/** What the phases work with: a model in the making, its checkpoint and its calibration data. */
import { type LoadedModel, loadScheduler, modelFrom, type Scheduler } from "../models/mod.ts";
import type { Workspace } from "../models/layers/workspace.ts";
import type { Kernels } from "../native/mod.ts";
import type { PackedTensor } from "../quant/mod.ts";
import type { Checkpoint } from "../tensor/mod.ts";
import type { TimeParameters } from "../time/mod.ts";
import type { Calibrated } from "../calibration/mod.ts";

/** A model in the making: its checkpoint, codes and what else takes the place of the checkpoint's own. */
export interface PhaseModel {
  readonly weights: ReadonlyMap<string, PackedTensor>;
  /** Refined biases by name. */
  readonly biases: ReadonlyMap<string, Float32Array<ArrayBuffer>>;
  readonly timeParameters: TimeParameters | undefined;
}

/** What the phases work with. */
export interface PhaseContext {
  readonly checkpoint: Checkpoint;
  readonly calibrated: Calibrated;
  readonly kernels: Kernels;
  /** Where the calibration data come from and with which seed, for more of them. */
  readonly source: string;
  readonly seed: number;
  /** Scratch of all models that {@linkcode loadPhaseModel} loads, which then have to take turns; default: each its own. */
  readonly workspace?: Workspace | undefined;
  readonly signal?: AbortSignal | undefined;
  readonly onProgress?: ((message: string) => void) | undefined;
}

/** Loads a model as it is in the making. */
export function loadPhaseModel(
  { checkpoint, kernels, workspace }: PhaseContext,
  model: Partial<PhaseModel>,
): LoadedModel {
  return modelFrom(checkpoint, kernels, { workspace, ...model });
}

/** The scheduler of an image model, undefined for others. */
export function schedulerOf(
  { calibrated, checkpoint }: Pick<PhaseContext, "calibrated" | "checkpoint">,
): Scheduler | undefined {
  return calibrated.kind === "images" ? loadScheduler(checkpoint.folder) : undefined;
}
