/** The bench: its suites, their options and reports. Intervals, metrics and tasks are those of `lib/eval`. */
import { accuracySuite } from "./accuracy/suite.ts";
import { checkpointSuite } from "./checkpoint/suite.ts";
import { kernelSuite } from "./kernels/suite.ts";
import { codesSuite } from "./peers/codes.ts";
import { defaultsSuite, peersSuite, solversSuite } from "./peers/suite.ts";
import { phasesSuite } from "./phases/suite.ts";
import { processSuite } from "./process/suite.ts";
import type { SuiteRow } from "./rows.ts";
import { solverSpeedSuite } from "./solver_speed/suite.ts";
import { stepsSuite } from "./steps/suite.ts";
import type { Suite } from "./suite.ts";

export { type BenchOptions, benchOptions } from "./options.ts";
export { formatHeader, formatReport } from "./report.ts";
export type { SuiteRow } from "./rows.ts";
export { measureStored, type StoredCheckpoint } from "./stored.ts";
export type {
  BenchContext,
  CommandOf,
  Goal,
  QuantizedSetting,
  Sample,
  Section,
  Skipped,
  Suite,
  SuiteReport,
  TimedSetting,
} from "./suite.ts";
export { accuracySuite, checkpointSuite, kernelSuite };
export { defaultsSuite, peersSuite, phasesSuite, processSuite, solverSpeedSuite, solversSuite, stepsSuite };
export { codesSuite };

/** The suites of `scripts/bench.ts` in the order of `--help`; the first is the default. */
export const SUITES: readonly Suite<SuiteRow>[] = [
  accuracySuite,
  checkpointSuite,
  kernelSuite,
  peersSuite,
  phasesSuite,
  processSuite,
  defaultsSuite,
  solversSuite,
  codesSuite,
  solverSpeedSuite,
  stepsSuite,
];
