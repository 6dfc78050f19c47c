/**
 * Forecast of running a model, before a weight is read: memory from sizes, time from one of its products,
 * timed on synthetic weights. The memory is checked against what the machine has left; the time is an
 * estimate and says so.
 */
import process from "node:process";
import { MemoryError } from "../errors.ts";
import { limitsOf } from "../files/limits.ts";
import { quote } from "../files/whole.ts";
import { IntegerProducts } from "../models/layers/integer_products.ts";
import type { Matrix } from "../models/layers/linear.ts";
import type { ActivationPrecision, HeldMatrix, ModelRequirements } from "../models/mod.ts";
import { RandomStream } from "../models/random.ts";
import type { Kernels } from "../native/mod.ts";
import { groupCount, type GroupSize, packedWords } from "../quant/mod.ts";
import { median } from "./statistics.ts";
import { formatBytes, secondsText } from "./table.ts";

/** Memory that inference may take beside weights, activations and what the process holds already. */
export const SPARE_BYTES = 64e6;
/** Memory that a WebAssembly module can address. */
const WASM_BYTES = 2 ** 32;

/** Memory of a run, in bytes. */
export interface MemoryForecast {
  /** Resident in this process now: the engine, the kernels, the tool. */
  readonly process: number;
  /** Weights as they will be held. */
  readonly weights: number;
  readonly activations: number;
  /** Copies that WebAssembly makes for its largest call, 0 for a native library. */
  readonly copies: number;
  readonly spare: number;
  readonly total: number;
}

/** Sizes that a run keeps at once. */
export interface RunSizes {
  /** Bytes of weights; of the model alone by default. */
  readonly weightBytes?: number;
  /** Bytes of activations, and of what else the run keeps. */
  readonly activationBytes: number;
  /** Rows of its largest product, for WebAssembly's copies. */
  readonly rows: number;
}

/**
 * Memory that running a model takes at its peak.
 *
 * @throws {MemoryError} when WebAssembly cannot address one of its products
 *
 * @example
 * ```ts
 * import { openKernels } from "../native/mod.ts";
 * import { forwardCost, requirementsAt } from "../models/mod.ts";
 * import { checkMemory, forecastMemory, forecastTime, memoryText, timeText } from "./forecast.ts";
 * const kernels = await openKernels();
 * const needs = requirementsAt("tests/models/dream-mini");
 * const { activationBytes, multiplyAdds } = forwardCost(needs.model, { batch: 1, tokens: 36 });
 * const memory = forecastMemory(kernels, needs, { activationBytes, rows: 36 });
 * checkMemory("tests/models/dream-mini", memory, "buy more");
 * console.log(memoryText(memory), timeText(forecastTime(kernels, needs, multiplyAdds, 36, 1)));
 * ```
 */
export function forecastMemory(
  kernels: Kernels,
  { weightBytes, matrices }: ModelRequirements,
  sizes: RunSizes,
): MemoryForecast {
  const copyOf = ({ rows, cols, bytes }: HeldMatrix) => bytes + 4 * sizes.rows * (rows + cols);
  const largest = Math.max(0, ...matrices.map(copyOf));
  if (kernels.backend === "wasm" && largest > WASM_BYTES) {
    throw new MemoryError(
      `Cannot run the model in WebAssembly: a product must fit into ${formatBytes(WASM_BYTES)}, got ${
        formatBytes(largest)
      }; use the native backend, or quantize the model`,
      largest,
      WASM_BYTES,
    );
  }
  const resident = process.memoryUsage().rss, weights = sizes.weightBytes ?? weightBytes;
  const copies = kernels.backend === "wasm" ? largest : 0;
  return {
    process: resident,
    weights,
    activations: sizes.activationBytes,
    copies,
    spare: SPARE_BYTES,
    total: resident + weights + sizes.activationBytes + copies + SPARE_BYTES,
  };
}

/**
 * Refuses a run that does not fit.
 *
 * @param path the model, for the message
 * @param wayOut what its user can do, as a clause
 * @param available default: what {@linkcode limitsOf} finds
 * @throws {MemoryError} saying how much is missing and what can be done
 */
export function checkMemory(
  path: string,
  forecast: MemoryForecast,
  wayOut: string,
  available: number = limitsOf().availableBytes,
): void {
  // What the process holds already is not available any more.
  const needed = forecast.total - forecast.process;
  if (needed <= available) return;
  throw new MemoryError(
    `Cannot run ${quote(path)}: the model and its run must fit into the memory available, ` +
      `${formatBytes(available)}, got ${memoryText(forecast)}; ${wayOut}`,
    needed,
    available,
    { path },
  );
}

/** The forecast as a sentence's part. */
export function memoryText({ process, weights, activations, copies, spare, total }: MemoryForecast): string {
  const parts = [
    `${formatBytes(weights)} weights`,
    `${formatBytes(activations)} activations and buffers`,
    ...(copies > 0 ? [`${formatBytes(copies)} WebAssembly's copies`] : []),
    `${formatBytes(process + spare)} process`,
  ];
  return `${formatBytes(total)} of memory (${parts.join(" + ")})`;
}

// Time ------------------------------------------------------------------------------------------------------

/** Largest synthetic matrix: it stays behind as garbage of a run that is to need little memory. */
const PROBE_BYTES = 8e6;
/** Most multiply-adds of one timed product. */
const PROBE_MULTIPLY_ADDS = 2 ** 28;
/** More rows make a product no faster. */
const PROBE_TOKENS = 256;
const PROBE_MILLISECONDS = 60;
const PROBE_SAMPLES = 3;

/** Time of a run, estimated. */
export interface TimeForecast {
  readonly seconds: number;
  readonly multiplyAdds: number;
  /** Of the product that was timed just now, median of a few calls. */
  readonly multiplyAddsPerSecond: number;
}

/**
 * Time of a run from its multiply-adds: a synthetic matrix like most of the model's weights, with as many
 * rows as take a moment, is multiplied and timed. Norms, sampling and the rest are not in it.
 *
 * @param rows rows of the activations in a typical product
 */
export function forecastTime(
  kernels: Kernels,
  { matrices }: ModelRequirements,
  multiplyAdds: number,
  rows: number,
  activations?: ActivationPrecision,
): TimeForecast {
  const byShape = Map.groupBy(matrices, ({ rows, cols, held }) => `${rows} ${cols} ${held}`);
  const weightsOf = (group: readonly HeldMatrix[]) => group.length * group[0]!.rows * group[0]!.cols;
  const [group] = [...byShape.values()].sort((a, b) => weightsOf(b) - weightsOf(a));
  if (group === undefined) {
    throw new TypeError("Cannot estimate time: the model must have a matrix, got none");
  }
  const tokens = Math.max(1, Math.min(rows, PROBE_TOKENS));
  const matrix = syntheticMatrix(group[0]!, tokens);
  const x = new Float32Array(tokens * matrix.cols), out = new Float32Array(tokens * matrix.rows);
  new RandomStream(0).fillNormal(x);
  const layer = { name: "", weights: matrix, bias: undefined };
  const products = new IntegerProducts(kernels, "", activations);
  const run = () => products.linear(layer, x, tokens, out);
  run(); // touches every page once
  const seconds: number[] = [];
  const begin = performance.now();
  while (seconds.length < PROBE_SAMPLES || performance.now() - begin < PROBE_MILLISECONDS) {
    const start = performance.now();
    run();
    seconds.push((performance.now() - start) / 1000);
  }
  const rate = tokens * matrix.rows * matrix.cols / median(seconds);
  return { seconds: multiplyAdds / rate, multiplyAdds, multiplyAddsPerSecond: rate };
}

/** A matrix like a model's, with fewer rows where it is large. */
function syntheticMatrix({ rows: all, cols, held, bytes }: HeldMatrix, tokens: number): Matrix {
  const share = Math.min(1, PROBE_BYTES / bytes, PROBE_MULTIPLY_ADDS / (tokens * all * cols));
  const rows = Math.max(1, Math.floor(all * share));
  const count = rows * cols;
  if (held === "F32") return { rows, cols, dtype: held, data: new Float32Array(count).fill(0.01) };
  // Halves and bfloat16 values near 1: no kernel takes longer or shorter for the bits.
  if (typeof held === "string") return { rows, cols, dtype: held, data: new Uint16Array(count).fill(0x3c00) };
  const groupSize: GroupSize = 64, groups = rows * groupCount(cols, groupSize);
  return {
    rows,
    cols,
    bits: held,
    groupSize,
    zeroPointKind: "real",
    packed: new Uint32Array(rows * packedWords(cols, held)).fill(0x5a5a5a5a),
    scale: new Uint16Array(groups).fill(0x2000),
    zeroPoint: new Uint16Array(groups).fill(0x3c00),
  };
}

/** The forecast as a sentence's part. */
export function timeText({ seconds, multiplyAdds, multiplyAddsPerSecond }: TimeForecast): string {
  return `about ${secondsText(seconds)} (estimate: ${
    (multiplyAdds / 1e9).toPrecision(3)
  } G multiply-adds at ${(multiplyAddsPerSecond / 1e9).toPrecision(3)} G/s, one product timed now)`;
}
