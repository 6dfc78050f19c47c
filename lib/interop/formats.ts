/** Every format that a checkpoint can be exported to: a file beside this one, and a line here. */
import type { ExportFormat } from "./format.ts";
import { GGUF } from "./gguf/format.ts";

export const EXPORT_FORMATS: readonly ExportFormat[] = [GGUF];
