/**
 * Forecast of calibrated work, before it begins: time by stage, from some of it done on the spot, with what
 * cheaper settings would take, and memory and disk, which are refused where they do not suffice, with a
 * setting for which they do.
 */
import type { OwnSampleWork } from "../../calibration/own_samples.ts";
import type { Solvable } from "../../calibration/statistics/alone.ts";
import { type ConfigInForce, hasBudget, isCalibrated, wantsPhases } from "../../config/mod.ts";
import { MemoryError, OutputError } from "../../errors.ts";
import { quote } from "../../files/positional.ts";
import { folderBytes, freeBytes } from "../../files/whole.ts";
import type { Kernels } from "../../native/mod.ts";
import type { PlanRow } from "../../plan/plan.ts";
import { formatBytes, type RunOptions, secondsText } from "../../progress.ts";
import { hasSolvedLayer } from "../../solve/solved_layers.ts";
import type { Checkpoint } from "../../tensor/mod.ts";
import { CountedFiles } from "./counted_files.ts";
import { CountedModel } from "./counted_model.ts";
import type { CountedRun, CountedWork, RunStage } from "./counted_work.ts";
import type { MemoryShares } from "./memory_shares.ts";
import { TimedWork } from "./timed_work.ts";

/** A run to forecast. */
export interface ForecastRun {
  readonly checkpoint: Checkpoint;
  readonly config: ConfigInForce;
  readonly kernels: Kernels;
  readonly memory: MemoryShares;
  /** Folder that solved layers and states between stages may go to until the run is finished. */
  readonly folder?: string | undefined;
  readonly options: RunOptions;
  /** Layers whose sensitivities an earlier run has measured, as a part of all; default 0. */
  readonly measuredShare?: number | undefined;
  /** Whether tasks solve the model together; default no. */
  readonly isTogether?: boolean | undefined;
}

/** Shorter work is not announced. */
const ANNOUNCED_SECONDS = 2;
/** Work from here on is announced with what cheaper settings would take. */
const COMPARED_SECONDS = 20;

/** Bytes by which the runtime grows meanwhile: compiled code, and arrays that wait to be collected. */
const RUNTIME_BYTES = 64e6;

const sum = <T>(values: readonly T[], of: (value: T) => number) =>
  values.reduce((all, own) => all + of(own), 0);

/**
 * Checks memory and disk, divides the memory among weights and states, and says how long the work will take.
 * What is short is not announced.
 *
 * @param rows of the plan
 * @param ownSamples what it takes that the model makes its own samples, which `calibrated` is a draft of
 * @throws {MemoryError} when a stage does not fit, with a setting that does
 * @throws {OutputError} when the disk has no room for what the run keeps until it is finished
 */
export function announce(
  run: ForecastRun,
  calibrated: Solvable,
  rows: readonly PlanRow[],
  ownSamples?: OwnSampleWork,
): void {
  const { checkpoint, config, kernels, memory, folder, options: { onEvent } } = run;
  const memoryBytes = memory.limitBytes;
  const isSolved = folder === undefined
    ? undefined
    : (candidate: number, name: string) => hasSolvedLayer(folder, candidate, name);
  const counted = countRun({ ...run, calibrated, rows, memoryBytes, isSolved });
  const before = ownSamples === undefined || !(counted instanceof CountedModel)
    ? []
    : [counted.ownSamples(ownSamples, () => memory.held.limitBytes)];
  const stages = [...before, ...counted.stages(config)], resident = memory.residentBytes;
  const needs = (own: CountedWork, list: readonly RunStage[]) =>
    list.map(({ name, bytes, statesBytes }) => ({
      name,
      bytes: RUNTIME_BYTES + bytes + own.weights.leastBytes + (folder === undefined ? statesBytes : 0),
    })).reduce((a, b) => b.bytes > a.bytes ? b : a);
  const peak = needs(counted, stages);
  if (resident + peak.bytes > memory.limitBytes) {
    const fits = (other: ConfigInForce, own = counted) =>
      resident + needs(own, own.stages(other)).bytes <= memory.limitBytes;
    const { path } = checkpoint;
    throw new MemoryError(
      `Cannot calibrate ${quote(path)}: it must fit into ${
        formatBytes(memory.limitBytes)
      } (--max-memory), got ${formatBytes(resident + peak.bytes)} (${formatBytes(resident)} the process, ${
        formatBytes(counted.weights.leastBytes)
      } weights of a block, ${formatBytes(peak.bytes - counted.weights.leastBytes)} ${peak.name}); ` +
        wayOut(config, counted, fits),
      resident + peak.bytes,
      memory.limitBytes,
      { path },
    );
  }
  const bytes = resident + divide(memory, counted, stages);
  checkDisk(run, counted, stages);
  using timed = new TimedWork(kernels, calibrated, checkpoint);
  const parts = stages.map((stage) => ({
    name: stage.name,
    seconds: stage.seconds(timed),
    bytes: resident + RUNTIME_BYTES + stage.bytes,
    note: stage.note?.(timed),
  }));
  const seconds = sum(parts, (part) => part.seconds);
  if (seconds < ANNOUNCED_SECONDS) return;
  const cheaper = seconds < COMPARED_SECONDS ? [] : alternatives(config).flatMap(([name, other]) => {
    const own = sum(counted.stages(other), (stage) => stage.seconds(timed)) +
      (isCalibrated(other) ? sum(before, (stage) => stage.seconds(timed)) : 0);
    return own < 0.8 * seconds ? [{ name, seconds: own }] : [];
  });
  onEvent?.({
    kind: "calibrate",
    message: `forecast: about ${secondsText(seconds)} (${
      parts.map(({ name, seconds, note }) =>
        `${name} ${secondsText(seconds)}${note === undefined ? "" : ` with ${note}`}`
      ).join(", ")
    }; timed now) and ${formatBytes(bytes)} of memory${
      cheaper.map((other) => `; ${other.name}: ${secondsText(other.seconds)}`).join("")
    }`,
    data: { seconds, bytes, stages: parts, cheaper },
  });
}

/** A run that is counted before it begins. */
export const countRun = (run: CountedRun): CountedWork =>
  run.calibrated.kind === "layers" ? new CountedFiles(run, run.calibrated) : new CountedModel(run);

/** The same with a part of the samples. */
function countPart({ run }: CountedWork, share: number): CountedWork {
  const { calibrated } = run, { data } = calibrated;
  const fit = data.fit.slice(0, Math.ceil(data.fit.length * share));
  return countRun({ ...run, calibrated: { ...calibrated, data: { ...data, fit } } as Solvable });
}

/** Weights held where layers are solved from statistics alone: each is read once. */
const READ_ONCE_BYTES = 2 ** 28;

/**
 * Divides what is left beside the stages: first to states between stages, which are written and read at each
 * of them, then to weights, which are read once a block.
 *
 * @returns bytes that all of it takes
 */
function divide(memory: MemoryShares, { weights, run }: CountedWork, stages: readonly RunStage[]): number {
  const fixed = RUNTIME_BYTES + Math.max(...stages.map(({ bytes }) => bytes));
  const states = Math.max(...stages.map(({ statesBytes }) => statesBytes));
  const room = memory.roomBytes - fixed, forStates = Math.min(states, Math.max(0, room - weights.leastBytes));
  // Where there is room for all of both, what is left is for states: nothing is written for a miscount.
  memory.statesBytes = Math.max(forStates, room - weights.bytes);
  const most = run.calibrated.kind === "layers" ? READ_ONCE_BYTES : Infinity;
  memory.held.limitBytes = Math.max(weights.leastBytes, Math.min(most, room - forStates));
  return fixed + forStates + Math.min(weights.bytes, memory.held.limitBytes);
}

/**
 * Solved layers stay until the output is complete, so the disk holds them with the states between stages
 * first, then with the output. What an earlier run has left in the folder is there already.
 *
 * @throws {OutputError} when the disk has no room for that
 */
function checkDisk(
  { config, folder, memory }: ForecastRun,
  counted: CountedWork,
  stages: readonly RunStage[],
): void {
  const free = folder === undefined ? undefined : freeBytes(folder);
  if (free === undefined) return;
  const solved = counted.keptBytes(config) + counted.refinementBytes(config);
  const states = Math.max(0, Math.max(...stages.map(({ statesBytes }) => statesBytes)) - memory.statesBytes);
  const written = counted.outputBytes, needed = solved + Math.max(states, written);
  const kept = folderBytes(folder!);
  if (needed <= free + kept) return;
  throw new OutputError(
    `Cannot calibrate into ${quote(folder!)}: the file system must have ${
      formatBytes(needed)
    } free until the run is finished (${formatBytes(solved)} solved layers; with them first ${
      formatBytes(states)
    } states between stages, then ${formatBytes(written)} of the output), got ${formatBytes(free)}${
      kept > 0 ? ` beside ${formatBytes(kept)} of the stopped run` : ""
    }: free some space or choose another folder` +
      (states > 0 ? ", or give more --max-memory" : ""),
    { path: folder! },
  );
}

/** Settings that take less time, by what a user writes for them. */
function alternatives(config: ConfigInForce): [name: string, config: ConfigInForce][] {
  const { solver, solverOptions } = config, isPlain = !hasBudget(config) && !wantsPhases(config);
  const low = { ...config, solverOptions: { ...solverOptions, effort: "low" } } as const;
  return [
    ...(solver === "best" && solverOptions.effort !== "low" ? [["--effort low", low] as const] : []),
    ...(solver === "best" ? [["--solver feedback", { ...config, solver: "feedback" }] as const] : []),
    ...(isPlain ? [["--solver clip", { ...config, solver: "clip", chosen: undefined }] as const] : []),
  ].map(([name, other]): [string, ConfigInForce] => [name, other as ConfigInForce]);
}

/** A setting with which a run fits, the one that costs least first. */
function wayOut(
  config: ConfigInForce,
  counted: CountedWork,
  fits: (config: ConfigInForce, counted?: CountedWork) => boolean,
): string {
  const { solverOptions } = config, { samples: given } = counted.run.calibrated.data;
  const once = { ...config, calibrationMode: "once" } as const;
  if (config.calibrationMode !== "once" && fits(once)) return "it fits with calibration_mode: once";
  const blocks = { ...config, solverOptions: { ...solverOptions, moment: "block" } } as const;
  if (solverOptions.moment !== "block" && fits(blocks)) return "it fits with solver_options.moment: block";
  for (let samples = 2 ** Math.ceil(Math.log2(given) - 1); samples >= 32; samples /= 2) {
    if (fits(config, countPart(counted, samples / given))) {
      return `it fits with --samples ${samples}`;
    }
  }
  const feedback = { ...once, solver: "feedback" } as const;
  if (config.solver === "best" && fits(feedback)) {
    return "it fits with --solver feedback and calibration_mode: once";
  }
  return `with --solver clip ${
    hasBudget(config) ? "and without a budget " : ""
  }a tensor at a time is in memory`;
}
