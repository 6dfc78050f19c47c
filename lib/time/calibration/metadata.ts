/** What the metadata of a statistics file say: its inputs, its model and its runs. */
import { MAX_MOMENT_COLS } from "../../quant/solvers/moments.ts";
import { MAX_TENSORS, type SafetensorsFile } from "../../tensor/mod.ts";
import { type Malformed, readValues } from "../time_file.ts";
import { type CalibrationRun, type LayerInput, MAX_CALIBRATION_RUNS } from "./contents.ts";
import { MODEL_SAMPLES, type StatisticsModel } from "./model.ts";

/** Tensor of some weights of each layer of the model. */
export const MODEL_WEIGHTS = "model.weights";

function parseList(text: string | undefined, what: string, malformed: Malformed): unknown[] {
  let value: unknown;
  try {
    value = JSON.parse(text ?? "");
  } catch (cause) {
    throw malformed(`${what} must be a list in JSON`, undefined, cause);
  }
  if (!Array.isArray(value)) throw malformed(`${what} must be a list in JSON, got something else`);
  return value;
}

export function parseInputs(
  text: string | undefined,
  file: SafetensorsFile,
  malformed: Malformed,
): Map<string, LayerInput> {
  const inputs = new Map<string, LayerInput>();
  let count = 0;
  for (const entry of parseList(text, "inputs", malformed)) {
    const [name, layers, block] = Array.isArray(entry) ? entry as unknown[] : [];
    if (
      typeof name !== "string" || inputs.has(name) || !Array.isArray(layers) || layers.length === 0 ||
      !layers.every((layer) => typeof layer === "string") || (count += layers.length) > MAX_TENSORS
    ) {
      throw malformed("inputs must be new names, each with names of layers");
    }
    const cols = file.tensors.get(`${name}.sum`)?.shape[1];
    if (cols === undefined || cols < 1 || cols > MAX_MOMENT_COLS) {
      const got = cols === undefined ? "none of this layer" : cols;
      throw malformed(`it must hold sums of 1 to ${MAX_MOMENT_COLS} columns, got ${got}`, `${name}.sum`);
    }
    const isBlock = typeof block === "number" && Number.isSafeInteger(block) && block >= 1 && block < cols;
    if (block !== undefined && !isBlock) {
      throw malformed(
        `blocks of a moment must be of 1 to ${cols - 1} columns, got ${String(block)}`,
        `${name}.second`,
      );
    }
    inputs.set(name, isBlock ? { cols, block, layers } : { cols, layers });
  }
  if (inputs.size === 0) throw malformed("inputs must be at least one, got none");
  return inputs;
}

/** What a file says of its model. */
export function readModel(file: SafetensorsFile, malformed: Malformed): StatisticsModel | undefined {
  const text = file.metadata["model"];
  if (text === undefined) return undefined;
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw malformed("model must be an object in JSON", undefined, cause);
  }
  const { name, layers } = (value ?? {}) as Record<string, unknown>;
  if (typeof name !== "string" || !Array.isArray(layers) || layers.length > MAX_TENSORS) {
    throw malformed(`model must have a name and at most ${MAX_TENSORS} layers`);
  }
  const shapes = new Map<string, readonly [number, number]>();
  for (const entry of layers) {
    const [layer, ...shape] = Array.isArray(entry) ? entry as unknown[] : [];
    const isShape = shape.length === 2 &&
      shape.every((size) => Number.isSafeInteger(size) && Number(size) >= 1);
    if (typeof layer !== "string" || shapes.has(layer) || !isShape) {
      throw malformed("layers of a model must be new names, each with rows and columns");
    }
    shapes.set(layer, shape as [number, number]);
  }
  if (!file.tensors.has(MODEL_WEIGHTS)) return { name, layers: shapes };
  const weights = readValues(file, MODEL_WEIGHTS, "F32", [[shapes.size, MODEL_SAMPLES]], malformed);
  const samples = new Map<string, Float32Array>();
  for (const [i, layer] of [...shapes.keys()].entries()) {
    const own = weights.slice(i * MODEL_SAMPLES, (i + 1) * MODEL_SAMPLES) as Float32Array;
    if (own.every(Number.isNaN)) continue;
    if (!own.every(Number.isFinite)) {
      throw malformed(
        `weights of a layer must be finite, or all NaN if not known, got [${own}]`,
        MODEL_WEIGHTS,
      );
    }
    samples.set(layer, own);
  }
  return { name, layers: shapes, samples };
}

export function parseRuns(text: string | undefined, malformed: Malformed): CalibrationRun[] {
  const runs = parseList(text, "runs", malformed);
  if (runs.length === 0 || runs.length > MAX_CALIBRATION_RUNS) {
    throw malformed(`runs must be 1 to ${MAX_CALIBRATION_RUNS}, got ${runs.length}`);
  }
  return runs.map((run): CalibrationRun => {
    const { identity, source, isSynthetic, samples, shard } = (run ?? {}) as Record<string, unknown>;
    if (
      typeof identity !== "string" || typeof source !== "string" || typeof isSynthetic !== "boolean" ||
      typeof samples !== "number" || !Number.isSafeInteger(samples) || samples < 1
    ) {
      throw malformed("each run must have an identity, a source, isSynthetic and samples");
    }
    const own = { identity, source, isSynthetic, samples };
    return shard === undefined ? own : { ...own, shard: parseRunShard(shard, malformed) };
  });
}

function parseRunShard(value: unknown, malformed: Malformed): NonNullable<CalibrationRun["shard"]> {
  const { index, count, of } = (value ?? {}) as Record<string, unknown>;
  const isWhole = (number: unknown): number is number => Number.isSafeInteger(number) && Number(number) >= 1;
  if (
    isWhole(index) && isWhole(count) && index <= count && count <= MAX_CALIBRATION_RUNS &&
    typeof of === "string"
  ) {
    return { index, count, of };
  }
  throw malformed(
    `a run's shard must have an index, a count of at most ${MAX_CALIBRATION_RUNS} and the run that it is of`,
  );
}
