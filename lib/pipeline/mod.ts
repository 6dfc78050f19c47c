/**
 * Checkpoint in, quantized checkpoint out, and back. Tensors are read, quantized, written and verified one
 * after the other in bounded memory; a stopped run can be resumed. docs/format.md specifies the files.
 */
export { dequantizeCheckpoint, type DequantizeCheckpointOptions } from "./dequantize_checkpoint.ts";
export { type OpenRunOptions } from "./open_run.ts";
export {
  quantizeCheckpoint,
  type QuantizeCheckpointOptions,
  saveCalibrationOf,
} from "./quantize_checkpoint.ts";
export { mergeStatisticsFiles } from "../calibration/saved_statistics.ts";
export { isCalibrationStatistics } from "../time/mod.ts";
export { outputErrors, type RunReport, type Totals } from "./run_report.ts";
export { type DividedPlan, dividePlan } from "./sharded_run.ts";
export {
  mergeCheckpoint,
  type MergeCheckpointOptions,
  openShards,
  type ReadShards,
} from "./merge_checkpoint.ts";
export { type Shard } from "../output/shard_folders.ts";
export { parseShard, shardFromEnvironment, shardText } from "../plan/shards.ts";
export { opensIn } from "../output/readers.ts";
export { type Plan, planQuantization, type PlanRow } from "../plan/plan.ts";
export { KEEP_RULES, type KeepRule } from "../plan/rules.ts";
export { type Mismatch, readManifest, verifyFiles, WORK_FOLDER } from "../output/output_folder.ts";
export {
  type Identity,
  type LayerRecord,
  type Manifest,
  MANIFEST_FILE,
  TOOL_VERSION,
} from "../output/record.ts";
export type { SaveCalibration } from "../calibration/source.ts";
export type { Progress, RunEvent, RunOptions } from "../progress.ts";
export type { LayerViolation, PhasesReport } from "../phases/mod.ts";
