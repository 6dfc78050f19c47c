/** LoRAs merged into a checkpoint before it is quantized. */
export type { LoraSource } from "./adapter.ts";
export { loraEvents, type LoraReport, type MergedCheckpoint, mergeLoras } from "./merge.ts";
