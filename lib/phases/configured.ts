/** The phases as a step of the pipeline: what the configuration asks for, run on the codes of a plan, and what of it is stored. */
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import type { Config } from "../config/mod.ts";
import { Workspace } from "../models/layers/workspace.ts";
import type { Kernels } from "../native/mod.ts";
import { LAYER_SOLVERS, type PackedTensor, quantize } from "../quant/mod.ts";
import { type Checkpoint, openCheckpoint } from "../tensor/mod.ts";
import { modelFingerprint, TimeParameters, writeTimeParameters } from "../time/mod.ts";
import { calibrationSource } from "../calibration/source.ts";
import type { Calibrated } from "../calibration/mod.ts";
import type { PhaseModel } from "./context.ts";
import type { PhaseResult, PhaseSettings, PhasesReport } from "./mod.ts";
import type { Plan } from "../plan/plan.ts";
import type { RunEvent, RunOptions } from "../progress.ts";
import { denseWeights, type SolvedLayer } from "../solve/solve_model.ts";

/** What the phases are asked to do. */
export function phaseSettings(config: Config, isImageModel: boolean): PhaseSettings {
  const { thermodynamic, enableTimeAware, numTimeGroups: groups } = config;
  const { validation, boundarySmoothing, transitionOptimization } = thermodynamic;
  const { learningRate, maxIterations, convergenceThreshold, markovWeight } = transitionOptimization;
  const ofTime: PhaseSettings = enableTimeAware
    ? {
      activations: {
        groups,
        bits: config.activationBits,
        grouping: config.timeGroups,
        perTokenLimit: config.perTokenLimit ?? undefined,
      },
      output: config.outputCorrection ? { groups, markovWeight } : undefined,
      timeScales: config.timeScales === "per_group" ? { groups } : undefined,
      sampler: config.samplerCorrection && isImageModel ? { groups } : undefined,
    }
    : {};
  return {
    ...ofTime,
    validation: validation.enabled ? { smoothnessThreshold: validation.smoothnessThreshold } : undefined,
    smoothing: boundarySmoothing.enabled
      ? { windowSize: boundarySmoothing.windowSize, interpolation: boundarySmoothing.interpolation }
      : undefined,
    refinement: transitionOptimization.enabled
      ? { learningRate, maxIterations, convergenceThreshold }
      : undefined,
  };
}

/** Everything of a run that the phases need. */
export interface PhaseRun {
  readonly checkpoint: Checkpoint;
  readonly calibrated: Calibrated;
  readonly plan: Plan;
  readonly config: Config;
  readonly kernels: Kernels;
  /** Undefined where the solver looks at weights alone. */
  readonly solved: ReadonlyMap<string, SolvedLayer> | undefined;
}

/**
 * Runs the configured phases and tells what they did, event by event.
 *
 * @throws as `runPhases`
 */
export async function runConfiguredPhases(
  { checkpoint, calibrated, plan, config, kernels, solved }: PhaseRun,
  { onEvent, signal }: RunOptions,
): Promise<PhaseResult> {
  // Gradients are loaded by those who want a phase alone.
  const { runPhases } = await import("./mod.ts");
  const layers = new Map(
    calibrated.model.stages.flatMap(({ layers }) => layers.map((layer) => [layer.name, layer])),
  );
  const rows = plan.rows.filter(({ action, name }) => action === "quantize" && layers.has(name));
  const weights = new Map<string, PackedTensor>(rows.map((row) => {
    const own = solved?.get(row.name)?.tensor;
    if (own !== undefined) return [row.name, own];
    const { bits, groupSize, zeroPoint, scaleBits } = row, [height, width] = row.shape as [number, number];
    const data = denseWeights(kernels, layers.get(row.name)!);
    return [
      row.name,
      quantize(kernels, { data, dtype: "F32" }, height, width, {
        bits: bits!,
        groupSize: groupSize!,
        zeroPoint: zeroPoint!,
        scaleBits,
        solver: LAYER_SOLVERS[config.solver].withoutMoment,
      }),
    ];
  }));
  const event = (message: string) => onEvent?.({ kind: "phase", message });
  const result = await runPhases(
    {
      checkpoint,
      calibrated,
      kernels,
      source: calibrationSource(checkpoint, config),
      seed: config.calibrationSeed,
      workspace: new Workspace(),
      signal,
      onProgress: event,
    },
    weights,
    phaseSettings(config, calibrated.kind === "images"),
  );
  for (const message of result.report.warnings) onEvent?.({ kind: "warning", message });
  for (const { message, data } of phaseEvents(result.report, config)) {
    onEvent?.({ kind: "phase", message, data });
  }
  return result;
}

/** What the phases did: a line and its numbers for each phase, and for each violation where those are logged. */
export function phaseEvents(
  report: PhasesReport,
  { thermodynamic: { validation: { logViolations } } }: Config,
): Required<Pick<RunEvent, "message" | "data">>[] {
  const { validation, smoothing, refinement, groups, perToken } = report;
  const guarded = ([
    ["output correction", "output", report.output],
    ["weight scales by time", "timeScales", report.timeScales],
    ["sampler correction", "sampler", report.sampler],
  ] as const).flatMap(([name, phase, own]) =>
    own === undefined ? [] : [{
      message: `${name}: held-out step KL ${own.heldOutBefore.toPrecision(4)}${
        own.kept ? ` -> ${own.heldOutAfter.toPrecision(4)}, kept` : ", rejected"
      }`,
      data: { phase, ...own },
    }]
  );
  return [
    ...(refinement === undefined ? [] : [{
      message: `refinement: step KL of held-out samples of its own ${
        refinement.heldOutBefore.toPrecision(4)
      } -> ${refinement.heldOutAfter.toPrecision(4)} in ${refinement.iterations} iterations, ${
        refinement.kept ? "kept" : "rejected"
      }; ${refinement.reason}`,
      data: { phase: "refinement", ...refinement },
    }]),
    ...guarded,
    ...(perToken.length === 0 ? [] : [{
      message:
        `activations: a grid of each token's own for ${perToken.length} layers that static ones do not suit`,
      data: { phase: "activations", perToken },
    }]),
    ...(smoothing === undefined ? [] : [{
      message:
        `smoothing: kept for ${smoothing.kept.length} layers, rejected for ${smoothing.rejected.length}`,
      data: { phase: "smoothing", ...smoothing },
    }]),
    ...(validation === undefined ? [] : [
      {
        message:
          `validation: Markov score ${
            validation.markovScore.toFixed(4)
          } over ${groups} time groups, ${validation.violations.length} violations, ` +
          `held-out step KL by group ${validation.stepKlByGroup.map((kl) => kl.toPrecision(3)).join(", ")}`,
        data: { phase: "validation", groups, ...validation },
      },
      ...(logViolations
        ? validation.violations.map((violation) => ({
          message: `violation (${violation.severity}): ${violation.kind} of ${violation.layer} jumps by ${
            violation.jump.toFixed(3)
          } between time groups ${violation.boundary} and ${violation.boundary + 1}`,
          data: { phase: "violation", ...violation },
        }))
        : []),
    ]),
  ];
}

/** The sidecar of a model whose other files are written. @param folder that has them */
export function sidecarContent(folder: string, { timeParameters, weights }: PhaseModel): Uint8Array {
  using checkpoint = openCheckpoint(folder);
  const { groups, layers, sampler } = timeParameters!;
  const place = mkdtempSync(join(folder, "sidecar-"));
  try {
    const own = new TimeParameters(groups, layers, modelFingerprint(checkpoint), sampler);
    return readFileSync(writeTimeParameters(place, own, (layer) => weights.get(layer)!.rows));
  } finally {
    rmSync(place, { recursive: true, force: true });
  }
}
