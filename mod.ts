/**
 * ArrowQuant quantizes diffusion models - language (Dream, LLaDA) and image (DiT) - to 2, 3, 4 or 8 bits and
 * measures the cost. Importing this module opens, reads and writes nothing.
 *
 * More doors: `./time` (time groups and parameters), `./thermo` (transitions, losses, optimizer), `./phases`
 * (the three phases), `./eval` (metrics), `./analysis` (tables, charts, reports) and `./bench` (the suites of
 * the benchmark).
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
export { type BackendChoice, type Kernels, openKernels, type OpenOptions } from "./lib/native/mod.ts";
export {
  type Checkpoint,
  openCheckpoint,
  SafetensorsFile,
  SafetensorsWriter,
  type TensorInfo,
} from "./lib/tensor/mod.ts";
export {
  accumulateMoment,
  type BitWidth,
  correctedTarget,
  cosine,
  dequantize,
  emptyMoments,
  type ErrorStatistics,
  factorMoments,
  type GroupSize,
  type InputMoments,
  packedErrorStatistics,
  type PackedLayer,
  packedLayers,
  type PackedTensor,
  quantize,
  type QuantizeOptions,
  readPackedTensor,
  relativeRmsError,
  solveLayer,
  type Weights,
} from "./lib/quant/mod.ts";
export {
  type Config,
  type ConfigOverrides,
  DEFAULT_CONFIG,
  formatConfig,
  loadConfig,
  parseConfig,
  resolveConfig,
} from "./lib/config/mod.ts";
export {
  dequantizeCheckpoint,
  type DequantizeCheckpointOptions,
  type DividedPlan,
  dividePlan,
  mergeCheckpoint,
  type MergeCheckpointOptions,
  type Plan,
  planQuantization,
  quantizeCheckpoint,
  type QuantizeCheckpointOptions,
  readManifest,
  type RunEvent,
  type RunReport,
  type Shard,
  verifyFiles,
} from "./lib/pipeline/mod.ts";
export {
  diffusionGenerate,
  encodePng,
  generateImages,
  lladaGenerate,
  type LoadedModel,
  loadModel,
  loadScheduler,
  loadStoredModel,
  loadTokenizer,
  modelRequirements,
} from "./lib/models/mod.ts";

/**
 * Tables, charts and reports: the door `./analysis`, not loaded unless called. It loads Arquero and Vega when
 * they are first needed.
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

/** Computed, so that Deno does not fetch it with this module. The bundle's entry imports it by name. */
const ANALYSIS: string = "./lib/analysis/mod.ts";
