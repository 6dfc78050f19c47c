/** The rows of the phase suite: full precision, baseline, phases, ablations and rivals, and how each is made. */
import type { PhaseSettings } from "../pipeline/phases.ts";
import type { PhaseName } from "./suite.ts";

/** Time groups unless `--groups` says otherwise. */
export const DEFAULT_TIME_GROUPS = 5;
/** Phase 2's window and phase 1's threshold: the configuration's defaults. */
const SMOOTHING = { windowSize: 5, interpolation: "linear" } as const;
const VALIDATION = { smoothnessThreshold: 0.3 } as const;
/** Steps of the gradient refinement, by family: an image model's step costs as much as twenty of a small language model's. */
const REFINEMENT = {
  sequences: { learningRate: 0.005, maxIterations: 300, convergenceThreshold: 1e-4 },
  images: { learningRate: 0.004, maxIterations: 60, convergenceThreshold: 1e-4 },
} as const;
const QUICK_ITERATIONS = 6;

/** How a row is made. */
export interface RowSetting {
  readonly name: string;
  readonly phase: PhaseName;
  readonly solver: "round" | "best";
  readonly phases: PhaseSettings;
  /** Activations on a grid of their own for each token, in place of static ones. */
  readonly dynamicBits?: 4 | 8;
}

/** The rows of a run; ablations and rivals come with `all`. */
export function rowSettings(
  groups: number,
  kind: "sequences" | "images",
  phase: PhaseName,
  quick: boolean,
): RowSetting[] {
  const static8 = { groups, bits: 8 } as const;
  const refinement = quick ? { ...REFINEMENT[kind], maxIterations: QUICK_ITERATIONS } : REFINEMENT[kind];
  const main: RowSetting[] = [
    { name: "baseline", phase: "baseline", solver: "round", phases: { activations: static8 } },
    {
      name: "phase1",
      phase: "phase1",
      solver: "round",
      phases: { activations: static8, validation: VALIDATION },
    },
    {
      name: "phase2",
      phase: "phase2",
      solver: "round",
      phases: { activations: static8, validation: VALIDATION, smoothing: SMOOTHING },
    },
    {
      name: "phase3_full",
      phase: "phase3_full",
      solver: "best",
      phases: { activations: static8, validation: VALIDATION, smoothing: SMOOTHING, refinement },
    },
  ];
  if (phase !== "all") return main.filter((row) => row.phase === phase || row.phase === "baseline");
  const row = (
    name: string,
    solver: RowSetting["solver"],
    phases: PhaseSettings,
    dynamicBits?: 4 | 8,
  ): RowSetting => ({
    name,
    phase: "all",
    solver,
    phases,
    ...(dynamicBits === undefined ? {} : { dynamicBits }),
  });
  return [
    ...main,
    row("without refinement", "best", { activations: static8, validation: VALIDATION, smoothing: SMOOTHING }),
    row("round alone", "round", {}),
    row("round + refinement", "round", { refinement }),
    row("best alone", "best", {}),
    row("best + refinement", "best", { refinement }),
    row("best, static 8 bits, G 1", "best", { activations: { groups: 1, bits: 8 } }),
    row(`best, static 8 bits, G ${groups}`, "best", { activations: static8 }),
    row("best, dynamic 8 bits", "best", {}, 8),
    row("best, static 4 bits, G 1", "best", { activations: { groups: 1, bits: 4, range: "mse" } }),
    row("best, static 4 bits, G 10", "best", { activations: { groups: 10, bits: 4, range: "mse" } }),
    row("best, dynamic 4 bits", "best", {}, 4),
  ];
}
