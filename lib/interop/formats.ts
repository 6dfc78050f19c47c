/** Every format that a checkpoint can be exported to: a file beside this one, and a line here. */
import { COMFY } from "./comfy.ts";
import { COMPRESSED_TENSORS } from "./compressed_tensors.ts";
import type { ExportFormat } from "./format.ts";
import { GGUF } from "./gguf/format.ts";
import { AUTO_ROUND, GPTQ } from "./gptq.ts";
import { MLX } from "./mlx.ts";

export const EXPORT_FORMATS: readonly ExportFormat[] = [
  GGUF,
  COMPRESSED_TENSORS,
  MLX,
  GPTQ,
  AUTO_ROUND,
  COMFY,
];
