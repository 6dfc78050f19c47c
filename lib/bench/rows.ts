/** Rows of the JSON report as the suites write them, told apart by `suite`. */
import type { AccuracyRow } from "./accuracy/report.ts";
import type { CheckpointRow } from "./checkpoint/suite.ts";
import type { CodesRow } from "./peers/codes.ts";
import type { KernelRow } from "./kernels/bench.ts";
import type { PeersRow } from "./peers/suite.ts";
import type { PhaseRow, PhasesRow } from "./phases/suite.ts";
import type { ProcessRow } from "./process/suite.ts";
import type { SolverSpeedRow } from "./solver_speed/suite.ts";
import type { StepsRow } from "./steps/suite.ts";

/** A row of any suite. */
export type SuiteRow =
  | AccuracyRow
  | CheckpointRow
  | CodesRow
  | KernelRow
  | PeersRow
  | PhasesRow
  | ProcessRow
  | SolverSpeedRow
  | StepsRow;
export type {
  AccuracyRow,
  CheckpointRow,
  CodesRow,
  KernelRow,
  PeersRow,
  PhaseRow,
  ProcessRow,
  SolverSpeedRow,
  StepsRow,
};
