/**
 * The three phases on a model whose codes are chosen: gradient refinement (phase 3), time parameters in
 * closed form, static ranges of activations by time group, smoothing (phase 2) and validation (phase 1), each
 * guarded by the held-out step KL.
 */
import type { PackedTensor } from "../quant/mod.ts";
import type { PhaseContext } from "./context.ts";
import type { PhaseResult } from "./report.ts";
import { PhaseSequence } from "./run.ts";
import type { PhaseSettings } from "./settings.ts";

export { type Calibrated, type CalibrationOptions, loadCalibration } from "../calibration/mod.ts";
export type { PhaseContext, PhaseModel } from "./context.ts";
export type {
  GuardedReport,
  LayerViolation,
  PhaseResult,
  PhasesReport,
  RefinementPhaseReport,
  SmoothingPhaseReport,
  ValidationPhaseReport,
} from "./report.ts";
export {
  type ActivationSettings,
  type Family,
  type OutputSettings,
  type PhaseSettings,
  phaseSettings,
  REFINEMENT_DEFAULTS,
  type RefinementSettings,
} from "./settings.ts";

/**
 * Runs the wanted phases on a model whose codes are chosen. `weights` are not changed.
 *
 * @param weights packed layers by tensor name; layers that are not named stay in full precision
 * @param refined an earlier run of the refinement alone with the same weights and settings, used instead of
 * running it again
 * @throws {RangeError} when there are more time groups than the axis has bins, or a setting is out of range
 * @throws {CalibrationError} when nothing was held out
 *
 * @example
 * ```ts
 * import { loadModel } from "../models/mod.ts";
 * import { openKernels } from "../native/mod.ts";
 * import { quantize } from "../quant/mod.ts";
 * import { openCheckpoint } from "../tensor/mod.ts";
 * import { loadCalibration, runPhases } from "./mod.ts";
 * const kernels = await openKernels(), folder = "tests/models/dream-mini", source = `${folder}/calibration.jsonl`;
 * const full = loadModel(folder, kernels);
 * const calibrated = await loadCalibration(full, { source, samples: 32, seed: 1 });
 * const { name, weights: matrix } = full.model.linearLayers[0]!;
 * if ("packed" in matrix) throw new TypeError("the model must be in full precision");
 * const packed = quantize(kernels, matrix, matrix.rows, matrix.cols, { bits: 4, groupSize: 32 });
 * const context = { checkpoint: openCheckpoint(folder), calibrated, kernels, source, seed: 1 };
 * const settings = { activations: { groups: 2, bits: 8 }, validation: { smoothnessThreshold: 0.3 } } as const;
 * const { report } = await runPhases(context, new Map([[name, packed]]), settings);
 * console.log(report.validation?.stepKlByGroup.length); // 2
 * ```
 */
export async function runPhases(
  context: PhaseContext,
  weights: ReadonlyMap<string, PackedTensor>,
  settings: PhaseSettings,
  refined?: PhaseResult,
): Promise<PhaseResult> {
  const { refinement, output, timeScales, activations, smoothing, sampler, validation } = settings;
  const run = new PhaseSequence(context, weights, settings);
  if (refined?.report.refinement !== undefined) run.takeRefinement(refined);
  else if (refinement !== undefined) await run.refine(refinement);
  if (output !== undefined) await run.addClosedForm("output");
  if (timeScales !== undefined) await run.addClosedForm("timeScales");
  if (activations !== undefined) await run.roundActivations(activations);
  if (activations !== undefined && smoothing !== undefined) await run.smooth(smoothing);
  if (sampler !== undefined) await run.correctSampler();
  if (activations !== undefined && validation !== undefined) await run.validate(validation);
  return run.result();
}
