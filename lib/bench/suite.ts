/** What a suite of the bench is and what it hands back; suites.ts lists them, scripts/bench.ts prints them. */
import type { BackendChoice, Kernels } from "../native/mod.ts";
import type { RunReport } from "../pipeline/mod.ts";
import type { BitWidth, GroupSize, Solver } from "../quant/mod.ts";
import type { ModelSize } from "./phases/scale.ts";
import type { TimeGroups, TimeParameters } from "../time/mod.ts";
import type { Environment } from "../eval/environment.ts";
import type { LayerError } from "../eval/layer_errors.ts";
import type { Column, TableRow } from "../eval/table.ts";

/** What `--phase` takes. */
export const PHASES = ["all", "baseline", "phase1", "phase2", "phase3_full"] as const;
export type PhaseName = (typeof PHASES)[number];

export interface BenchOptions {
  /** Folders of checkpoints. */
  readonly models: readonly string[];
  /** Quantized folders of the one model, measured in place of what the run would quantize. */
  readonly packed?: readonly string[] | undefined;
  readonly bits: readonly BitWidth[];
  readonly groupSize: GroupSize;
  /** More than one for a suite that takes a list; the first is {@linkcode groupSize}. */
  readonly groupSizes: readonly GroupSize[];
  readonly solvers: readonly Solver[];
  /** Threads of the kernels; `undefined` leaves the choice to the suite. */
  readonly threads: number | undefined;
  readonly backend: BackendChoice;
  readonly isa: string | undefined;
  readonly seed: number;
  /** Tasks of the accuracy suite; undefined is all. */
  readonly tasks: readonly string[] | undefined;
  /** Prompts a task, or images, of the accuracy suite; undefined leaves it to the suite. */
  readonly limit: number | undefined;
  /** Phase of the phases suite; undefined is all. */
  readonly phase?: PhaseName | undefined;
  /** In place of models, the shapes of one with synthetic weights: the phases suite. */
  readonly modelSize?: ModelSize | undefined;
  /** Time groups of the phases suite. */
  readonly timeGroups?: number | undefined;
  /** Weights of the synthetic checkpoint, in bytes of BF16. */
  readonly syntheticBytes: number;
  /** Models are run although memory looks too small for them. Default false. */
  readonly ignoresMemory?: boolean;
  /** Fewer samples of smaller data: for a look, not for a report. */
  readonly quick: boolean;
}

export interface BenchContext {
  readonly kernels: Kernels;
  readonly environment: Environment;
  readonly options: BenchOptions;
  /** Progress, one line; never a result. */
  progress(line: string): void;
}

/** A table of the report. */
export interface Section {
  readonly title: string;
  /** Lines under the title: what was run and how to read it. */
  readonly notes: readonly string[];
  readonly columns: readonly Column[];
  readonly rows: readonly TableRow[];
}

/** Something to reach, held against this run. */
export interface Goal {
  readonly goal: string;
  readonly wanted: string;
  /** What this run measured, as text; null when it could not. */
  readonly measured: string | null;
  /** Null when nothing was measured. */
  readonly met: boolean | null;
  /** Why nothing was measured. */
  readonly reason?: string;
}

/** What a model made at one setting, to be looked at: the same `sample` has the same prompt or noise at each. */
export interface Sample {
  readonly model: string;
  readonly setting: string;
  readonly sample: number;
  /** Task, or class asked for. */
  readonly label: string;
  readonly prompt?: string;
  readonly expected?: string;
  readonly answer?: string;
  readonly isCorrect: boolean;
  /** A PNG file's bytes. */
  readonly png?: Uint8Array;
}

/** What the pipeline did to a model at one setting. */
export interface QuantizedSetting extends Pick<RunReport, "layers" | "layerMilliseconds"> {
  readonly model: string;
  readonly setting: string;
}

/** What was measured of a model along its time axis at one setting, and its θ. */
export interface TimedSetting {
  readonly model: string;
  readonly setting: string;
  readonly groups: TimeGroups;
  /** Where θ is shown: before or after boundary smoothing. */
  readonly theta?: { readonly stage: "before" | "after"; readonly parameters: TimeParameters } | undefined;
  /** `[groups]`, held out; NaN where there are no samples. */
  readonly stepKl?: readonly number[] | undefined;
  readonly layerErrors?: readonly LayerError[] | undefined;
}

/** Something that this run left out. */
export interface Skipped {
  readonly what: string;
  readonly reason: string;
}

export interface SuiteReport {
  readonly sections: readonly Section[];
  /** Every measurement with all its circumstances, for machines. */
  readonly rows: readonly Readonly<Record<string, unknown>>[];
  readonly goals: readonly Goal[];
  readonly skipped: readonly Skipped[];
  readonly quantized?: readonly QuantizedSetting[];
  readonly samples?: readonly Sample[];
  readonly timed?: readonly TimedSetting[];
  /** Rows of the tables of lib/analysis/schema.ts by the table's name, for what is nowhere above. */
  readonly tables?: Readonly<Record<string, readonly Readonly<Record<string, unknown>>[]>>;
}

/** One entry of the bench. */
export interface Suite {
  readonly name: string;
  /** One line for `--help`. */
  readonly summary: string;
  /** What it measures unless the command line says otherwise, where that is not every suite's; with it come lists of group sizes. */
  readonly defaults?: {
    readonly bits: readonly BitWidth[];
    readonly groupSizes: readonly GroupSize[];
    readonly solvers?: readonly Solver[];
  };
  run(context: BenchContext): SuiteReport | Promise<SuiteReport>;
}
