/** Options of a bench run, their defaults, and the names that they may have. */
import { DEFAULT_CONFIG } from "../config/mod.ts";
import type { Solver } from "../config/names.ts";
import type { BackendChoice, InstructionSet } from "../native/mod.ts";
import type { BitWidth, GroupSize } from "../quant/mod.ts";

/** Values of `--phase`. */
export const PHASES = ["all", "baseline", "phase1", "phase2", "phase3_full"] as const;
export type PhaseName = (typeof PHASES)[number];

/** Values of `--model-size`. */
export const MODEL_SIZES = ["7B"] as const;
type ModelSize = (typeof MODEL_SIZES)[number];

/** Values of `--parts`; `effort` has no goal and runs where it is asked for. */
export const SOLVER_SPEED_PARTS = ["kernels", "published", "models", "statistics", "effort"] as const;
export type SolverSpeedPart = (typeof SOLVER_SPEED_PARTS)[number];

/** Rows and columns of a layer. */
export interface LayerShape {
  readonly rows: number;
  readonly cols: number;
}

/** Time groups of the phases suite by default. */
export const DEFAULT_TIME_GROUPS = DEFAULT_CONFIG.numTimeGroups;

/** Options of a bench run. */
export interface BenchOptions {
  /** Folders of checkpoints. */
  readonly models: readonly string[];
  /** Quantized folders of the one model, measured in place of what the run would quantize. */
  readonly packed?: readonly string[] | undefined;
  /** Bits per weight to quantize to. */
  readonly bits: readonly BitWidth[];
  /** Weights that share a scale; 0 is a whole row. */
  readonly groupSize: GroupSize;
  /** More than one for a suite that takes a list; the first is {@linkcode groupSize}. */
  readonly groupSizes: readonly GroupSize[];
  /** Solvers to quantize with. */
  readonly solvers: readonly Solver[];
  /** Threads of the kernels; `undefined` leaves the choice to the suite. */
  readonly threads: number | undefined;
  /** Backend of the kernels. */
  readonly backend: BackendChoice;
  /** Instruction set of the kernels; undefined is the fastest. */
  readonly isa: InstructionSet | undefined;
  /** Seed of noise, masks and synthetic weights. */
  readonly seed: number;
  /** Tasks of the accuracy suite; undefined is all. */
  readonly tasks: readonly string[] | undefined;
  /** Prompts a task, or images; undefined leaves it to the suite. */
  readonly limit: number | undefined;
  /** Phase of the phases suite; undefined is all. */
  readonly phase?: PhaseName | undefined;
  /** Phases suite: a synthetic model of this size instead of `models`. */
  readonly modelSize?: ModelSize | undefined;
  /** Time groups of the phases suite. */
  readonly timeGroups?: number | undefined;
  /** Parts of the suite solver-speed; undefined is all. */
  readonly parts?: readonly SolverSpeedPart[] | undefined;
  /** Layers whose kernels the suite solver-speed measures; undefined leaves it to the suite. */
  readonly shapes?: readonly LayerShape[] | undefined;
  /** Weights of the synthetic checkpoint, in bytes of BF16. */
  readonly syntheticBytes: number;
  /** Runs models although memory looks too small for them. Default false. */
  readonly ignoresMemory?: boolean;
  /** Fewer samples of smaller data: for a look, not for a report. */
  readonly quick: boolean;
}

/**
 * Options of a suite for these models; what `changes` leaves out has the command's default.
 *
 * @example
 * ```ts
 * import { benchOptions } from "./options.ts";
 * console.log(benchOptions(["tests/models/dream-mini"], { bits: [2], quick: true }).bits); // [2]
 * ```
 */
export function benchOptions(models: readonly string[], changes: Partial<BenchOptions> = {}): BenchOptions {
  return {
    models,
    bits: [8, 4, 3, 2],
    groupSize: changes.groupSizes?.[0] ?? 64,
    groupSizes: [changes.groupSize ?? 64],
    solvers: ["round", "clip"],
    threads: undefined,
    backend: "auto",
    isa: undefined,
    seed: 1,
    tasks: undefined,
    limit: undefined,
    syntheticBytes: 2e9,
    quick: false,
    ...changes,
  };
}
