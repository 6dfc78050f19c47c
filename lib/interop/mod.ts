/** Exporting checkpoints into the formats of other programs (docs/interop.md: which opens what). */
export { exportCheckpoint, type ExportCheckpointOptions, type ExportReport } from "./export_checkpoint.ts";
export type { ExportFormat, ExportRow } from "./format.ts";
export { mergeFor, type MergeForOptions, quantizeFor, type QuantizeForReport } from "./quantize_for.ts";
export { EXPORT_FORMATS } from "./formats.ts";
