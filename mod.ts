/**
 * ArrowQuant: quantizes diffusion models - language (Dream, LLaDA) and image (DiT) - to 2, 3, 4 or 8 bits and
 * measures what that costs. Nothing is opened, read or written by importing this module.
 *
 * @example
 * ```ts
 * import { dequantize, openKernels, quantize } from "./mod.ts";
 *
 * const kernels = await openKernels();
 * const data = Float32Array.from({ length: 4096 }, (_, i) => Math.sin(i));
 * const packed = quantize(kernels, { data, dtype: "F32" }, 32, 128, { bits: 4, groupSize: 64 });
 * const restored = dequantize(kernels, packed);
 * console.log(kernels.describe(), packed.packed.byteLength, restored.length);
 * ```
 *
 * @module
 */
export * from "./lib/errors.ts";
export {
  ABI_VERSION,
  type Attempt,
  type BackendChoice,
  type InstructionSet,
  type Kernels,
  openKernels,
  type OpenOptions,
} from "./lib/native/mod.ts";
export * from "./lib/tensor/mod.ts";
export * from "./lib/quant/mod.ts";
export {
  canonicalConfig,
  type Config,
  type ConfigOverrides,
  type ConfigRow,
  configSchema,
  DEFAULT_CONFIG,
  type DeploymentProfile,
  formatConfig,
  loadConfig,
  parseConfig,
  resolveConfig,
  type ResolvedConfig,
} from "./lib/config/mod.ts";
export {
  dequantizeCheckpoint,
  type DequantizeCheckpointOptions,
  KEEP_RULES,
  type LayerViolation,
  type PhasesReport,
  type Plan,
  planQuantization,
  type PlanRow,
  quantizeCheckpoint,
  type QuantizeCheckpointOptions,
  readManifest,
  type RunEvent,
  type RunReport,
  verifyFiles,
} from "./lib/pipeline/mod.ts";
export * from "./lib/models/mod.ts";

/**
 * Tables, charts and reports (`lib/analysis/mod.ts`), loaded by the first call: who only quantizes never
 * waits for them. What draws and reads tables (Arquero, Vega) they load themselves, when first needed.
 *
 * @example
 * ```ts
 * import { loadAnalysis } from "./mod.ts";
 * const { errorByLayer, renderSvg, tableFromRows } = await loadAnalysis();
 * const table = await tableFromRows("layers", []);
 * console.log(table.columnNames(), (await renderSvg(errorByLayer(table))).slice(0, 4)); // <svg
 * ```
 */
export function loadAnalysis(): Promise<typeof import("./lib/analysis/mod.ts")> {
  return import(ANALYSIS);
}

/** Computed: what Deno sees it fetches at once. A bundle's own entry names it, scripts/_release/bundle_entry.ts. */
const ANALYSIS: string = "./lib/analysis/mod.ts";
