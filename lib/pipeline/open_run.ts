/** An open checkpoint with its configuration: what every stage of a run works on. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { hasStatistics, type SaveCalibration } from "../calibration/source.ts";
import { checkConfig, type Config, type ConfigInForce, isCalibrated } from "../config/mod.ts";
import { CheckpointError } from "../errors.ts";
import { isJsonObject } from "../files/json.ts";
import { limitsOf } from "../files/limits.ts";
import { quote } from "../files/positional.ts";
import {
  loraEvents,
  type LoraReport,
  type LoraSource,
  type MergedCheckpoint,
  mergeLoras,
} from "../lora/mod.ts";
import { checkGradients, runLimits } from "../models/mod.ts";
import { type Kernels, withThreads } from "../native/mod.ts";
import type { RunOptions } from "../progress.ts";
import { type Checkpoint, CONFIG_KEY, openCheckpoint, refuseForeign, SECTION_KEY } from "../tensor/mod.ts";
import { type RunCalibration, runCalibration } from "./calibration_run.ts";
import { choiceText, chooseSolver } from "./choose_solver.ts";
import type { Shard } from "../output/shard_folders.ts";

/** Input and settings of a run. */
export interface OpenRunOptions<K extends Kernels | undefined = Kernels> extends RunOptions {
  /** A checkpoint: a folder or a `.safetensors` file. */
  readonly input: string;
  /** Its `numThreads` goes before the kernels' own number of threads; 0 leaves theirs. */
  readonly config: Config;
  readonly kernels: K;
  /** Save statistics of the full-precision model's inputs; also where the solver needs no calibration. */
  readonly saveCalibration?: SaveCalibration | undefined;
  /** Replace such a file of other statistics. */
  readonly force?: boolean | undefined;
  /** Weights of this name where a folder has several, as `fp16`. */
  readonly variant?: string | undefined;
  /** Folder of a diffusers pipeline that is quantized, where it has several denoisers. */
  readonly subfolder?: string | undefined;
  /** LoRAs that are merged into the weights, in float32, before anything else. */
  readonly loras?: readonly LoraSource[] | undefined;
  /**
   * Quantize a part of the tensors only, into the folder `shard-i-of-n` of the output;
   * {@linkcode mergeCheckpoint} brings all shards together.
   */
  readonly shard?: Shard | undefined;
  /**
   * Shards of `calibration_mode: blocks` run at the same time and solve the model together, through a folder
   * in the output that all of them see: each runs its part of the samples. So long one waits for another.
   */
  readonly togetherMilliseconds?: number | undefined;
  /**
   * Bytes that the process may take for calibrated work, which is refused where it would take more; default
   * what it has and three quarters of what is available.
   */
  readonly maxMemoryBytes?: number | undefined;
}

/** A checkpoint that is being quantized; {@linkcode openRun} opens one. */
export interface QuantizeRun<K extends Kernels | undefined = Kernels> extends Disposable {
  readonly checkpoint: Checkpoint;
  readonly config: ConfigInForce;
  readonly kernels: K;
  readonly calibration: RunCalibration;
  /** Bytes that the process may take for calibrated work. */
  readonly memoryBytes: number;
  /** What became of LoRAs. */
  readonly loras: readonly LoraReport[];
  readonly options: RunOptions & Pick<OpenRunOptions, "shard" | "togetherMilliseconds">;
}

/** Opens a checkpoint. @throws {CheckpointError | FormatError} when it is broken or quantized already */
export function openRun<K extends Kernels | undefined>(options: OpenRunOptions<K>): QuantizeRun<K> {
  const { input } = options;
  checkConfig(options.config);
  const { numThreads } = options.config;
  const kernels = numThreads > 0 && options.kernels
    ? withThreads(options.kernels, numThreads) as K
    : options.kernels;
  const { variant, subfolder, onEvent, loras = [] } = options;
  const stored = openCheckpoint(input, { variant, subfolder });
  let config: ConfigInForce, checkpoint = stored, merged: MergedCheckpoint | undefined;
  const close = () => {
    merged?.[Symbol.dispose]();
    stored.close();
  };
  try {
    checkPlain(stored);
    merged = loras.length === 0 ? undefined : mergeLoras(stored, loras);
    if (merged !== undefined) ({ checkpoint } = merged);
    for (const event of loraEvents(merged?.reports ?? [])) onEvent?.(event);
    config = chooseSolver(checkpoint, options.config);
    const isRun = isCalibrated(config) || config.calibrationData !== null ||
      options.saveCalibration !== undefined;
    const limits = runLimits(checkpoint), isSolved = hasStatistics(config);
    if (config.thermodynamic.transitionOptimization.enabled) checkGradients(checkpoint);
    if (isRun && limits !== undefined && !isSolved) throw withoutCalibration(limits, config);
    const messages = [
      ...checkpoint.notes,
      ...(limits === undefined ? [] : [isSolved ? statisticsAlone(limits) : weightsAlone(limits)]),
    ];
    for (const message of messages) onEvent?.({ kind: "input", message });
    const choice = choiceText(options.config, config);
    if (choice !== undefined) onEvent?.({ kind: "solver", message: choice });
  } catch (error) {
    close();
    throw error;
  }
  const memoryBytes = options.maxMemoryBytes ?? process.memoryUsage().rss + 0.75 * limitsOf().availableBytes;
  const calibration = runCalibration(checkpoint, { ...options, kernels, config, memoryBytes });
  return {
    checkpoint,
    config,
    kernels,
    calibration,
    memoryBytes,
    loras: merged?.reports ?? [],
    options,
    [Symbol.dispose]: close,
  };
}

/** @throws {CheckpointError} when the weights are quantized already, by this tool or another one */
export function checkPlain(checkpoint: Checkpoint): void {
  refuseForeign(checkpoint, "quantize");
  if (!isJsonObject(checkpoint.config?.[CONFIG_KEY])) return;
  if (!(SECTION_KEY in checkpoint.config[CONFIG_KEY])) return; // scaled FP8, which reads as plain weights
  const { path, folder } = checkpoint;
  throw new CheckpointError(
    `Cannot quantize ${
      quote(path)
    }: weights must be plain, got config.json with a ${CONFIG_KEY} of this tool: ` +
      "dequantize it first",
    { path: join(folder, "config.json") },
  );
}

function withoutCalibration(
  { message, path, cause }: CheckpointError,
  { calibrationData }: Config,
): CheckpointError {
  const isMade = calibrationData === null || ["self", "synthetic"].includes(calibrationData);
  const given = isMade
    ? ""
    : `; statistics of what its layers read would do, and ${
      existsSync(calibrationData)
        ? `${quote(calibrationData)} is no file of them`
        : `there is no file ${quote(calibrationData)}`
    }`;
  const others = "the solvers clip and round need no run of the model and quantize it all the same";
  return new CheckpointError(`${message}${given}; ${others}`, { path, cause });
}

const shortened = ({ message }: CheckpointError): string =>
  message.length > 300 ? `${message.slice(0, 300)}…` : message;

const weightsAlone = (limits: CheckpointError): string =>
  `weights alone are quantized, by names and shapes; the model cannot run or calibrate here: ${
    shortened(limits)
  }`;

const statisticsAlone = (limits: CheckpointError): string =>
  `layers are solved on saved statistics, by names and shapes; the model cannot run here: ${
    shortened(limits)
  }`;

/** The same open checkpoint with another configuration; the same calibration data are not opened again. */
export function withConfig(run: QuantizeRun, given: Config): QuantizeRun {
  const { checkpoint, kernels, options } = run, config = chooseSolver(checkpoint, given);
  const keys = ["calibrationData", "calibrationSamples", "calibrationSeed"] as const;
  const own = (each: Config) => JSON.stringify(each.selfCalibration);
  const calibration = keys.every((key) => config[key] === run.config[key]) && own(config) === own(run.config)
    ? run.calibration
    : runCalibration(checkpoint, { ...options, kernels, config, memoryBytes: run.memoryBytes });
  return { ...run, config, calibration };
}
