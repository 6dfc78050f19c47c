/** Measuring: the suites of the bench, the peers they measure against, and how samples become numbers. */
export { accuracySuite } from "../bench/accuracy/suite.ts";
export { benchOptions } from "../bench/options.ts";
export { checkpointSuite, measureStored, type StoredCheckpoint } from "../bench/checkpoint/suite.ts";
export {
  type Environment,
  environmentOf,
  OtherLoad,
  peakResidentBytes,
  resetPeakResident,
} from "./environment.ts";
export { type Ggml, openGgml } from "../bench/ggml.ts";
export { kernelSuite } from "../bench/kernels/suite.ts";
export { type LayerError, layerErrors } from "./layer_errors.ts";
export { peersSuite } from "../bench/peers/suite.ts";
export { phasesSuite } from "../bench/phases/suite.ts";
export { processSuite } from "../bench/process/suite.ts";
export { formatHeader, formatReport } from "../bench/report.ts";
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
} from "../bench/suite.ts";
export { SUITES } from "../bench/suites.ts";
export { type Column, formatTable, type TableRow } from "./table.ts";
export {
  type Clock,
  type Contender,
  rate,
  speedRatio,
  timeInterleaved,
  type Timing,
  type TimingOptions,
} from "../bench/timing.ts";
