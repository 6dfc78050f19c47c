/** The phases as a stage of the pipeline: run as configured, reported as events, stored in the sidecar. */
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import type { Config, ConfigInForce } from "../config/mod.ts";
import { Workspace } from "../models/layers/workspace.ts";
import type { HeldWeights } from "../models/mod.ts";
import type { Kernels } from "../native/mod.ts";
import type { PackedTensor } from "../quant/mod.ts";
import { type Checkpoint, openCheckpoint } from "../tensor/mod.ts";
import { modelFingerprint, TimeParameters, writeTimeParameters } from "../time/mod.ts";
import { calibrationSource } from "../calibration/source.ts";
import type { Calibrated } from "../calibration/mod.ts";
import type { RefinementPlace } from "./kept_refinement.ts";
import type { PhaseModel } from "./context.ts";
import type { PhaseResult, PhasesReport } from "./report.ts";
import { phaseSettings } from "./settings.ts";
import { isTokenTable, type Plan } from "../plan/plan.ts";
import { type RunEvent, type RunOptions, stepProgress } from "../progress.ts";
import { quantizedByWeights } from "../solve/by_weights.ts";
import type { SolvedLayer } from "../solve/solved_layers.ts";

/** Inputs of {@linkcode runConfiguredPhases}. */
export interface ConfiguredPhases {
  readonly checkpoint: Checkpoint;
  readonly calibrated: Calibrated;
  readonly plan: Plan;
  readonly config: ConfigInForce;
  readonly kernels: Kernels;
  /** Where plain weights are held; default each model holds its own. */
  readonly held?: HeldWeights | undefined;
  /** Bytes that gradients may take; any by default. */
  readonly gradientBytes?: number | undefined;
  /** Where the refinement is kept over a stop; default nowhere. */
  readonly place?: RefinementPlace | undefined;
  /** Undefined where the solver reads weights alone. */
  readonly solved: ReadonlyMap<string, SolvedLayer> | undefined;
}

/** Packed layers of a plan by name: the solver's; others rounded, with searched ranges but for `round`. */
export function packedLayers(
  { calibrated, plan, config, kernels, solved }: Omit<ConfiguredPhases, "checkpoint">,
): Map<string, PackedTensor> {
  const names = new Set(calibrated.model.stages.flatMap(({ layers }) => layers.map(({ name }) => name)));
  const rows = plan.rows.filter((row) => names.has(row.name) && !isTokenTable(row));
  const others = rows.filter(({ name }) => solved?.has(name) !== true);
  const byWeights = quantizedByWeights(calibrated.model, others, config, kernels);
  return new Map(rows.flatMap(({ name }): [string, PackedTensor][] => {
    const tensor = solved?.get(name)?.tensor ?? byWeights.get(name);
    return tensor === undefined ? [] : [[name, tensor]];
  }));
}

/** Runs the configured phases and reports each as an event. @throws as `runPhases` */
export async function runConfiguredPhases(
  run: ConfiguredPhases,
  { onEvent, onProgress, signal }: RunOptions,
): Promise<PhaseResult> {
  const { checkpoint, calibrated, config, kernels, held, gradientBytes, place } = run;
  // Gradients are loaded only where a phase is wanted.
  const { runPhases } = await import("./mod.ts");
  const event = (message: string) => onEvent?.({ kind: "phase", message });
  const result = await runPhases(
    {
      checkpoint,
      calibrated,
      kernels,
      source: calibrationSource(checkpoint, config),
      seed: config.calibrationSeed,
      tables: quantizedByWeights(calibrated.model, run.plan.rows.filter(isTokenTable), config, kernels),
      workspace: new Workspace(),
      held,
      gradientBytes,
      place,
      signal,
      onProgress(phase) {
        onEvent?.({ kind: "stage", message: phase });
        event(phase);
      },
      onPlan: event,
      onStep: (phase, done, of) => onProgress?.(stepProgress(phase, done, of)),
    },
    packedLayers(run),
    phaseSettings(config, calibrated.kind === "images"),
  );
  for (const message of result.report.warnings) onEvent?.({ kind: "warning", message });
  for (const { message, data } of phaseEvents(result.report, config)) {
    onEvent?.({ kind: "phase", message, data });
  }
  return result;
}

/** Events of a report: a line with its numbers for each phase, and for each violation to be logged. */
function phaseEvents(
  report: PhasesReport,
  { thermodynamic: { validation: { logViolations } } }: Config,
): Required<Pick<RunEvent, "message" | "data">>[] {
  const { validation, smoothing, refinement, groups, perToken, transitionCache: { hits, misses } } = report;
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
      message: `refinement: step KL of its held-out samples ${refinement.heldOutBefore.toPrecision(4)} -> ${
        refinement.heldOutAfter.toPrecision(4)
      } in ${refinement.iterations} iterations, ${
        refinement.kept ? "kept" : "rejected"
      }; ${refinement.reason}`,
      data: { phase: "refinement", ...refinement },
    }]),
    ...guarded,
    ...(perToken.length === 0 ? [] : [{
      message:
        `activations: per-token dynamic quantization for ${perToken.length} layers that lose most with static ranges`,
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
    {
      message: `step KLs by model and timestep: ${misses} measured, ${hits} used again`,
      data: { phase: "transitions", ...report.transitionCache },
    },
  ];
}

/** The sidecar of a model. @param folder with the model's other files */
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
