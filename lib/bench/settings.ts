/** Settings that a model is measured at, full precision first, and the circumstances of a measurement. */
import { join } from "node:path";
import { CALIBRATED_SOLVERS, type Solver } from "../config/names.ts";
import { resolveConfig } from "../config/mod.ts";
import { CheckpointError } from "../errors.ts";
import { nameOfPath, quote } from "../files/whole.ts";
import { quantizeCheckpoint } from "../pipeline/mod.ts";
import { calibrationBeside } from "../calibration/source.ts";
import { type BitWidth, packedLayers } from "../quant/mod.ts";
import { openCheckpoint } from "../tensor/mod.ts";
import { measureStored, tensorSums } from "./stored.ts";
import { collectGarbage } from "../eval/environment.ts";
import type { Interval } from "../eval/intervals.ts";
import type { BenchContext, QuantizedSetting } from "./suite.ts";
import { withTemporaryFolder } from "./temporary_folder.ts";

/** A model as it is or quantized in one way. */
export interface Setting {
  readonly name: string;
  readonly bits: BitWidth | undefined;
  readonly solver: Solver | undefined;
  /** A folder that was quantized before; undefined where this run quantizes. */
  readonly folder?: string | undefined;
}

/** Measurements of a setting that all families have. */
export interface Measured {
  readonly setting: Setting;
  readonly bitsPerWeight: number | undefined;
  /** Of all tensors, kept ones included; with the files' size also of full precision. */
  readonly bitsPerWeightOfAll: number;
  readonly fileBytes: number;
  readonly relativeRmsError: number | undefined;
  readonly quantizeSeconds: number | undefined;
  readonly seconds: number;
  /** The pipeline's report; undefined for full precision. */
  readonly quantized: QuantizedSetting | undefined;
}

/** A value with its interval, for a table. */
export const span = ({ value, low, high }: Interval, digits = 2) =>
  `${value.toFixed(digits)} ${low.toFixed(digits)}–${high.toFixed(digits)}`;

/**
 * Full precision, then every width with every solver. A calibrated solver among others is measured where it
 * matters and can run: at the fewest bits, on a model with calibration data beside it.
 */
export function settingsOf(
  { options: { bits, solvers, packed = [] } }: BenchContext,
  path: string,
): Setting[] {
  const full = { name: "full", bits: undefined, solver: undefined };
  if (packed.length > 0) {
    return [
      full,
      ...packed.map((folder) => ({ ...full, name: nameOfPath(folder), bits: leastBits(folder), folder })),
    ];
  }
  const isWorth = (solver: Solver, width: BitWidth) =>
    solvers.length === 1 || !CALIBRATED_SOLVERS.includes(solver) ||
    (width === Math.min(...bits) && calibrationBeside(path) !== undefined);
  return [
    full,
    ...bits.flatMap((width) =>
      solvers.filter((solver) => isWorth(solver, width))
        .map((solver) => ({ name: `${width} ${solver}`, bits: width, solver }))
    ),
  ];
}

/** Fewest bits of a quantized folder's layers. @throws {CheckpointError} when nothing in it is quantized */
function leastBits(folder: string): BitWidth {
  using checkpoint = openCheckpoint(folder);
  const bits = [...packedLayers(checkpoint).values()].map((layer) => layer.bits);
  if (bits.length > 0) return Math.min(...bits) as BitWidth;
  throw new CheckpointError(
    `Cannot measure ${quote(folder)}: --packed names a quantized folder, got one without quantized tensors`,
    { path: folder },
  );
}

/** Bits per weight and size of a checkpoint as it is. */
function originalSizes(path: string): { readonly bitsPerWeight: number; readonly fileBytes: number } {
  using checkpoint = openCheckpoint(path);
  const { bytes, elements } = tensorSums(checkpoint);
  return {
    bitsPerWeight: bytes * 8 / elements,
    fileBytes: checkpoint.files.reduce((sum, { file }) => sum + file.fileBytes, 0),
  };
}

/** Runs `measure` on the model at `path` at every setting, each quantized into a temporary folder first. */
export async function atEverySetting<Result>(
  context: BenchContext,
  path: string,
  measure: (folder: string, setting: Setting) => Result | Promise<Result>,
): Promise<(Measured & { readonly result: Result })[]> {
  const { kernels, options } = context, model = nameOfPath(path);
  const isSynthetic = calibrationBeside(path) === undefined;
  const measured: (Measured & { readonly result: Result })[] = [], original = originalSizes(path);
  await withTemporaryFolder(async (temporary) => {
    for (const setting of settingsOf(context, path)) {
      const name = `${model}, ${setting.name}`;
      context.progress(name);
      if (CALIBRATED_SOLVERS.includes(setting.solver!) && isSynthetic) {
        context.progress(`${name}: no calibration data beside it, synthetic ones are used`);
      }
      let folder = path, stored, quantizeSeconds, quantized;
      if (setting.folder !== undefined) {
        folder = setting.folder;
        stored = measureStored(kernels, path, folder);
      } else if (setting.bits !== undefined) {
        folder = join(temporary, "quantized");
        const { config } = resolveConfig({
          overrides: {
            bit_width: setting.bits,
            group_size: options.groupSize,
            solver: setting.solver,
            num_threads: options.threads ?? 0,
            calibration_data: isSynthetic ? "synthetic" : undefined,
          },
        });
        await collectGarbage(); // the model before this one
        const begin = performance.now();
        const run = { input: path, output: folder, config, kernels, force: true };
        const { layers, layerMilliseconds } = await quantizeCheckpoint(run);
        quantizeSeconds = (performance.now() - begin) / 1000;
        quantized = { model, setting: setting.name, layers, layerMilliseconds };
        stored = measureStored(kernels, path, folder);
      }
      await collectGarbage(); // what was read back
      const begin = performance.now();
      const result = await measure(folder, setting);
      measured.push({
        setting,
        bitsPerWeight: stored?.bitsPerWeight,
        bitsPerWeightOfAll: stored?.bitsPerWeightOfAll ?? original.bitsPerWeight,
        fileBytes: stored?.fileBytesAfter ?? original.fileBytes,
        relativeRmsError: stored?.relativeRmsError,
        quantizeSeconds,
        seconds: (performance.now() - begin) / 1000,
        quantized,
        result,
      });
    }
  });
  return measured;
}

/** Columns that every row of the accuracy suite has. */
export function circumstances(context: BenchContext, path: string, measured: Measured) {
  const { environment: { backend, isa, runtime, processor }, options } = context;
  return {
    suite: "accuracy" as const,
    model: nameOfPath(path),
    setting: measured.setting.name,
    bits: measured.setting.bits ?? null,
    solver: measured.setting.solver ?? null,
    groupSize: options.groupSize,
    bitsPerWeight: measured.bitsPerWeight ?? null,
    bitsPerWeightOfAll: measured.bitsPerWeightOfAll,
    fileBytes: measured.fileBytes,
    relativeRmsError: measured.relativeRmsError ?? null,
    quantizeSeconds: measured.quantizeSeconds ?? null,
    seconds: measured.seconds,
    threads: context.kernels.threads,
    ...{ backend, isa, runtime, processor },
  };
}
