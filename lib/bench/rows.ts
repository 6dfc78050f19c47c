/** Rows of the JSON report as the suites write them, told apart by `suite`. */
import type { Interval } from "../eval/intervals.ts";
import type { TaskScore } from "../eval/puzzles.ts";
import type { PhasesReport } from "../phases/mod.ts";
import type { AccuracyRow } from "./accuracy/report.ts";
import type { CheckpointRow } from "./checkpoint/suite.ts";
import type { KernelRow } from "./kernels/bench.ts";
import type { PeersRow } from "./peers/suite.ts";
import type { ProcessRow } from "./process/suite.ts";

/** A row of the phases, as tables need it; rows of times at a large model's sizes have no step KL. */
export type PhasesRow = {
  readonly suite: "phases";
  readonly model: string;
  readonly phase: string;
  readonly bits: number | null;
  readonly bitsPerWeight: number | null;
  readonly stepKl?: Interval;
  readonly accuracy: readonly TaskScore[];
  readonly differenceToBaseline: Interval | null;
  readonly seconds: number | null;
  readonly overhead: number | null;
  readonly metrics: PhasesReport | null;
};

export type SuiteRow = AccuracyRow | CheckpointRow | KernelRow | PeersRow | PhasesRow | ProcessRow;
export type { AccuracyRow, CheckpointRow, KernelRow, PeersRow, ProcessRow };
