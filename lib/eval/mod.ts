/** Measuring: the suites of the bench, the peers they measure against, and how samples become numbers. */
export { accuracySuite } from "./accuracy_suite.ts";
export { benchOptions } from "./bench_options.ts";
export { checkpointSuite, measureStored, type StoredCheckpoint } from "./checkpoint_suite.ts";
export {
  type Environment,
  environmentOf,
  OtherLoad,
  peakResidentBytes,
  resetPeakResident,
} from "./environment.ts";
export { type Ggml, openGgml } from "./ggml.ts";
export { kernelSuite } from "./kernel_suite.ts";
export { type LayerError, layerErrors } from "./layer_errors.ts";
export { peersSuite } from "./peers_suite.ts";
export { phasesSuite } from "./phase_suite.ts";
export { processSuite } from "./process_suite.ts";
export { formatHeader, formatReport } from "./report.ts";
export { median, pairedRatio, summarize, type Summary } from "./statistics.ts";
export type {
  BenchContext,
  BenchOptions,
  Goal,
  Section,
  Skipped,
  Suite,
  SuiteReport,
  TimedSetting,
} from "./suite.ts";
export { SUITES } from "./suites.ts";
export { type Column, formatTable, type TableRow } from "./table.ts";
export {
  type Clock,
  type Contender,
  rate,
  speedRatio,
  timeInterleaved,
  type Timing,
  type TimingOptions,
} from "./timing.ts";
