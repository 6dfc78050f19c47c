/**
 * Calibration statistics in files: collected into one, resumably, and read from one or several instead of
 * data.
 */
import { existsSync } from "node:fs";
import { CalibrationError, FormatError, OutputError } from "../errors.ts";
import type { Kernels } from "../native/mod.ts";
import {
  type CalibrationRun,
  type CalibrationStatistics,
  equalTimeGroups,
  isCalibrationStatistics,
  readCalibrationStatistics,
  type SecondMoments,
  type TimeAxis,
  type TimeGroups,
  writeCalibrationStatistics,
} from "../time/mod.ts";
import type { Calibrated } from "./mod.ts";
import { collectStatistics } from "./collect.ts";
import { exists, quote, remove, sha256 } from "../files/whole.ts";
import type { RunOptions } from "../progress.ts";

/** Suffix of the file of an unfinished pass. */
export const PROGRESS_SUFFIX = ".progress";
/** Parts of the data between saves, of some thousand positions each: minutes for a model of 1 B weights. */
const PARTS_BETWEEN_SAVES = 8;

/** Time groups of saved statistics: as many as asked for, or as there are bins. */
export function calibrationGroups(axis: TimeAxis, count: number): TimeGroups {
  return equalTimeGroups(axis, Math.min(count, axis.bins));
}

/**
 * Files of statistics that a name of calibration data stands for: one, or several with commas between them;
 * undefined where it names data.
 *
 * @throws {CalibrationError} when only some of several are files of statistics
 */
export function statisticsFiles(source: string): readonly string[] | undefined {
  const isStatistics = (path: string) => path.endsWith(".safetensors") && isCalibrationStatistics(path);
  if (source === "synthetic") return undefined;
  if (existsSync(source)) return isStatistics(source) ? [source] : undefined;
  const paths = source.split(",").map((path) => path.trim());
  if (paths.length === 1) return undefined;
  const other = paths.find((path) => !existsSync(path) || !isStatistics(path));
  if (other === undefined) return paths;
  throw new CalibrationError(
    `Cannot calibrate with several files: each must hold saved calibration statistics, got ${quote(other)}${
      existsSync(other) ? "" : ", which is not there"
    }`,
    { path: other },
  );
}

/**
 * Statistics of one or several files, merged.
 *
 * @throws {CalibrationError | FormatError} when one cannot be used for the model, or they do not belong
 * together
 */
export function loadStatistics(paths: readonly string[], fingerprint: string): CalibrationStatistics {
  const [first, ...others] = paths.map((path) => readCalibrationStatistics(path, { fingerprint }).statistics);
  return others.reduce((merged, other) => merged.merge(other), first!);
}

/** Where statistics are to be saved, and for which pass. */
export interface SaveStatistics extends RunOptions {
  readonly path: string;
  /** Replace a file of other statistics. */
  readonly force: boolean;
  readonly second: SecondMoments;
  readonly groups: number;
  readonly fingerprint: string;
  /** Stands for data, samples and seed. */
  readonly dataIdentity: string;
  readonly kernels: Kernels;
}

/**
 * Collects the statistics of calibration data into a file; with statistics instead of data, writes those. A
 * stopped pass is resumed from `<path>.progress`, and its file is the same to the byte. A file of the same
 * pass is used as it is.
 *
 * @throws {OutputError} when there is another file at the path
 */
export async function saveStatistics(
  calibrated: Calibrated,
  options: SaveStatistics,
): Promise<CalibrationStatistics> {
  const { path, force, second, fingerprint, dataIdentity, kernels, onEvent } = options;
  const { data, statistics: given } = calibrated;
  const groups = calibrationGroups(data.axis, options.groups);
  const { source, isSynthetic, samples } = data;
  const { boundaries, axis } = groups;
  const run: CalibrationRun = {
    identity: sha256(
      JSON.stringify([fingerprint, dataIdentity, second, axis.kind, axis.bins, [...boundaries], kernels.isa]),
    ),
    source,
    isSynthetic,
    samples,
  };
  const isWanted = ({ runs }: CalibrationStatistics) =>
    JSON.stringify(runs.map(({ identity }) => identity)) ===
      JSON.stringify((given?.runs ?? [run]).map(({ identity }) => identity));
  if (exists(path)) {
    const old = readOwn(path, fingerprint);
    if (old !== undefined && old.partsDone === undefined && isWanted(old.statistics)) {
      onEvent?.({ kind: "resume", message: `${quote(path)} has these statistics` });
      return old.statistics;
    }
    refuseFile(path, force);
  }
  if (given !== undefined) {
    writeCalibrationStatistics(path, given);
    onEvent?.({
      kind: "calibrate",
      message: `statistics of ${given.runs.length} runs saved as ${quote(path)}`,
    });
    return given;
  }
  const statistics = await collectResumably(calibrated, options, { run, groups, isWanted });
  writeCalibrationStatistics(path, statistics);
  remove(path + PROGRESS_SUFFIX);
  onEvent?.({ kind: "calibrate", message: `statistics of ${samples} samples saved as ${quote(path)}` });
  return statistics;
}

/** @throws {OutputError} unless a file may be replaced */
function refuseFile(path: string, force: boolean): void {
  if (force && isOwn(path)) return;
  throw new OutputError(
    `Cannot write ${quote(path)}: it must not exist, got ${
      isOwn(path)
        ? "other calibration statistics: choose another name, or give --force to replace them"
        : "a file that this tool did not write: choose another name"
    }`,
    { path },
  );
}

/** Collects statistics, and keeps them on disk on the way: a stopped pass is resumed. */
function collectResumably(
  calibrated: Calibrated,
  { path, fingerprint, kernels, second, signal, onEvent, onProgress }: SaveStatistics,
  { run, groups, isWanted }: {
    readonly run: CalibrationRun;
    readonly groups: TimeGroups;
    readonly isWanted: (statistics: CalibrationStatistics) => boolean;
  },
): Promise<CalibrationStatistics> {
  const progress = path + PROGRESS_SUFFIX, parts = calibrated.data.fit.length;
  const stopped = exists(progress) ? readOwn(progress, fingerprint) : undefined, done = stopped?.partsDone;
  const start = stopped !== undefined && done !== undefined && done < parts && isWanted(stopped.statistics)
    ? { statistics: stopped.statistics, parts: done }
    : undefined;
  if (start !== undefined) {
    onEvent?.({
      kind: "resume",
      message: `${start.parts} of ${parts} parts of the data were collected before`,
    });
  } else if (exists(progress)) {
    onEvent?.({ kind: "warning", message: `${quote(progress)} is of another calibration and is replaced` });
  }
  return collectStatistics(calibrated, {
    kernels,
    fingerprint,
    groups,
    second,
    run,
    start,
    signal,
    onPart(statistics, done, of) {
      onProgress?.({
        tensor: `(calibrating, part ${done})`,
        tensorsDone: done,
        tensors: of,
        weightsDone: done,
        weights: of,
        bytesDone: done,
        bytes: of,
        bytesResumed: 0,
      });
      if (done < of && (done % PARTS_BETWEEN_SAVES === 0 || signal?.aborted === true)) {
        writeCalibrationStatistics(progress, statistics, done);
      }
    },
  });
}

/** Whether a file holds statistics; false for what is no safetensors file. */
function isOwn(path: string): boolean {
  try {
    return isCalibrationStatistics(path);
  } catch (error) {
    if (error instanceof FormatError) return false;
    throw error;
  }
}

/** A file's statistics; undefined where they are of another model or the file is none of statistics. */
function readOwn(
  path: string,
  fingerprint: string,
): ReturnType<typeof readCalibrationStatistics> | undefined {
  if (!isOwn(path)) return undefined;
  try {
    return readCalibrationStatistics(path, { fingerprint, allowUnfinished: true });
  } catch (error) {
    if (error instanceof CalibrationError) return undefined;
    throw error;
  }
}
