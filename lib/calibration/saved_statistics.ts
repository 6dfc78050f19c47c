/**
 * Calibration statistics in files: collected into one, resumably, and read from one or several instead of
 * data.
 */
import { existsSync } from "node:fs";
import { CalibrationError, FormatError, OutputError } from "../errors.ts";
import type { Blockwise, ModelLayers } from "../models/mod.ts";
import type { Kernels } from "../native/mod.ts";
import { SafetensorsFile } from "../tensor/mod.ts";
import {
  type CalibrationRun,
  CalibrationStatistics,
  equalTimeGroups,
  isCalibrationStatistics,
  type LoadMoments,
  readCalibrationStatistics,
  type SecondMoments,
  type TimeAxis,
  type TimeGroups,
  writeCalibrationStatistics,
} from "../time/mod.ts";
import type { Calibrated } from "./mod.ts";
import { blockRuns, layerInputs, statisticsByRun } from "./collect.ts";
import { isImportanceMatrix, readImportanceMatrix } from "./statistics/importance_matrix.ts";
import { exists, ownKind, quote, remove, sha256 } from "../files/whole.ts";
import type { Shard } from "../output/shard_folders.ts";
import type { RunOptions } from "../progress.ts";
import { mergeStatistics, runOf } from "./statistics/parts.ts";

/** Suffix of the file of an unfinished pass. */
const PROGRESS_SUFFIX = ".progress";
/** Parts of the data between saves, of some thousand positions each: minutes for a model of 1 B weights. */
const PARTS_BETWEEN_SAVES = 8;
/** A part may take longer. */
const MILLISECONDS_BETWEEN_SAVES = 60_000;

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
  const isStatistics = (path: string) =>
    path.endsWith(".safetensors") ? isCalibrationStatistics(path) : isImportanceMatrix(path);
  if (source === "synthetic" || source === "self") return undefined;
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
  return mergeStatistics(
    paths.map((path) =>
      path.endsWith(".safetensors")
        ? readCalibrationStatistics(path, { fingerprint, checksAll: true }).statistics
        : readImportanceMatrix(path)
    ),
  );
}

/** Where statistics are to be saved, and for which pass. */
export interface SaveStatistics extends RunOptions {
  readonly path: string;
  /** Replace a file of other statistics. */
  readonly force: boolean;
  readonly second: SecondMoments;
  /** As {@linkcode statisticsByRun}'s. */
  readonly blockOf?: ((cols: number) => number) | undefined;
  readonly groups: number;
  readonly fingerprint: string;
  /** For people. */
  readonly modelName: string;
  /** Stands for data, samples and seed. */
  readonly dataIdentity: string;
  readonly kernels: Kernels;
  /** The part of the samples that the calibrated model has, where it has no more. */
  readonly shard?: Shard | undefined;
  /** Bytes of statistics in memory at once; default as {@linkcode statisticsByRun}'s. */
  readonly bytesAtOnce?: number | undefined;
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
  const { path, force, second, fingerprint, dataIdentity, kernels, shard, onEvent } = options;
  const { data, statistics: given } = calibrated;
  const groups = calibrationGroups(data.axis, options.groups);
  const { source, isSynthetic, samples, chunk } = data;
  const { boundaries, axis } = groups;
  const model = calibrated.model as Blockwise<unknown>;
  const blocks = [...layerInputs(model, undefined, options.blockOf)].flatMap(([name, { cols, block }]) =>
    block === cols ? [] : [[name, block]]
  );
  const identity = sha256(
    JSON.stringify([
      ...[fingerprint, dataIdentity, second, axis.kind, axis.bins, [...boundaries], kernels.isa],
      ...(blocks.length === 0 ? [] : [blocks]),
      ...(chunk === undefined ? [] : [{ chunk }]), // sums of other chunks are rounded elsewhere
    ]),
  );
  const run = runOf({ identity, source, isSynthetic, samples }, shard);
  const isWanted = ({ runs }: CalibrationStatistics) =>
    JSON.stringify(runs.map(({ identity }) => identity)) ===
      JSON.stringify((given?.runs ?? [run]).map(({ identity }) => identity));
  if (ownKind(path) === "link") checkOwn(path);
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
  const found = await collectResumably(calibrated, options, { run, groups, isWanted });
  writeCalibrationStatistics(path, found.statistics);
  for (const file of found.files) remove(file);
  onEvent?.({ kind: "calibrate", message: `statistics of ${samples} samples saved as ${quote(path)}` });
  return readCalibrationStatistics(path, { fingerprint }).statistics;
}

/** Saves statistics that several files were merged into. @throws {OutputError} when there is another file */
export function saveMerged(
  path: string,
  statistics: CalibrationStatistics,
  { force = false, onEvent }: RunOptions & { readonly force?: boolean | undefined },
): void {
  if (ownKind(path) === "link") checkOwn(path);
  if (exists(path)) refuseFile(path, force);
  writeCalibrationStatistics(path, statistics);
  onEvent?.({
    kind: "calibrate",
    message: `statistics of ${statistics.runs.length} runs saved as ${quote(path)}`,
  });
}

/**
 * Merges files of statistics into one: parts of one pass, or passes over different data. The order of the
 * files does not matter: parts are added up by number, passes by identity.
 *
 * @throws {CalibrationError | FormatError} when parts are missing or there twice, or the files do not belong
 * together
 * @throws {OutputError} when there is another file
 */
export function mergeStatisticsFiles(
  paths: readonly string[],
  output: string,
  options: RunOptions & { readonly force?: boolean | undefined },
): CalibrationStatistics {
  const fingerprints = paths.map((path) => {
    using file = SafetensorsFile.open(path);
    return file.metadata["fingerprint"] ?? "";
  });
  const all = paths.map((path, i) =>
    readCalibrationStatistics(path, { fingerprint: fingerprints[i]! }).statistics
  );
  const first = (own: CalibrationStatistics) => own.runs[0]!.shard?.of ?? own.runs[0]!.identity;
  const merged = mergeStatistics(
    all.toSorted((a, b) => first(a) < first(b) ? -1 : first(a) > first(b) ? 1 : 0),
  );
  const old = exists(output) ? readOwn(output, merged.fingerprint, 0) : undefined;
  const identities = ({ runs }: CalibrationStatistics) => runs.map(({ identity }) => identity).join();
  if (
    old?.partsDone === undefined && old !== undefined && identities(old.statistics) === identities(merged)
  ) {
    options.onEvent?.({ kind: "resume", message: `${quote(output)} has these statistics` });
    return old.statistics;
  }
  saveMerged(output, merged, options);
  return merged;
}

/** @throws {OutputError} where a name leads elsewhere, or is that of a file of somebody else */
function checkOwn(path: string): void {
  const kind = ownKind(path);
  if (kind === "nothing" || (kind === "file" && isOwn(path))) return;
  const got = kind === "file" ? "a file that this tool did not write" : `a ${kind}`;
  throw new OutputError(
    `Cannot write ${quote(path)}: it must not exist or be statistics, got ${got}: choose another name`,
    { path },
  );
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

/** Statistics of a pass that is complete, and the files with which it could have gone on. */
interface Collected {
  readonly statistics: CalibrationStatistics;
  readonly files: readonly string[];
}

/**
 * Collects statistics, and keeps them on disk on the way: a stopped pass is resumed. Runs of blocks that are
 * finished lie in separate files, and are read from there in the end.
 */
async function collectResumably(
  calibrated: Calibrated,
  { path, fingerprint, modelName, kernels, second, blockOf, signal, onEvent, onProgress, bytesAtOnce }:
    SaveStatistics,
  { run, groups, isWanted }: {
    readonly run: CalibrationRun;
    readonly groups: TimeGroups;
    readonly isWanted: (statistics: CalibrationStatistics) => boolean;
  },
): Promise<Collected> {
  const progress = path + PROGRESS_SUFFIX, parts = calibrated.data.fit.length;
  const model = { name: modelName, layers: shapesOf(calibrated.model) };
  const pass = { kernels, fingerprint, model, groups, second, blockOf, run, bytesAtOnce };
  const wanted = blockRuns(calibrated.model as Blockwise<unknown>, pass), count = wanted.length;
  const names = wanted.map((_, i) => `${progress}-${i}`);
  for (const name of [progress, ...names]) checkOwn(name);
  const ownAt = (name: string, index: number, keptBytes?: number) => {
    const own = exists(name) && index < count ? readOwn(name, fingerprint, keptBytes) : undefined;
    const inputs = [...wanted[index]?.inputs.keys() ?? []].join("\0");
    return own !== undefined && isWanted(own.statistics) &&
        [...own.statistics.inputs.keys()].join("\0") === inputs
      ? own
      : undefined;
  };
  const missing = names.findIndex((name, i) => ownAt(name, i, 0) === undefined),
    runs = missing < 0 ? count : missing;
  const stopped = ownAt(progress, runs, Infinity), done = stopped?.partsDone ?? 0;
  const isStarted = stopped !== undefined && done > 0 && done < parts;
  const start = { runs, ...(isStarted ? { statistics: stopped.statistics, parts: done } : { parts: 0 }) };
  if (runs > 0 || isStarted) {
    const ofRuns = count > 1 ? `, ${runs} of ${count} runs of blocks` : "";
    onEvent?.({
      kind: "resume",
      message: `${start.parts} of ${parts} parts of the data${ofRuns} were collected before`,
    });
  } else if (exists(progress)) {
    onEvent?.({ kind: "warning", message: `${quote(progress)} is of another calibration and is replaced` });
  }
  const fit: readonly { readonly weights: Float32Array }[] = calibrated.data.fit;
  const positions = fit.reduce((sum, { weights }) => sum + weights.length, 0) / fit.length;
  let saved = performance.now();
  const passes = statisticsByRun(calibrated, {
    ...pass,
    start,
    signal,
    onPart(statistics, { run, runs, done, parts }) {
      const all = runs * parts, now = run * parts + done;
      onProgress?.({
        stage: "calibrating",
        parts: "parts",
        unit: "positions",
        tensor: `(calibrating, part ${now})`,
        tensorsDone: now,
        tensors: all,
        weightsDone: now * positions,
        weights: all * positions,
        bytesDone: now,
        bytes: all,
        bytesResumed: 0,
      });
      const isDue = done % PARTS_BETWEEN_SAVES === 0 ||
        performance.now() - saved > MILLISECONDS_BETWEEN_SAVES;
      if (done < parts && (isDue || signal?.aborted === true) && statistics.isBetweenChunks) {
        writeCalibrationStatistics(progress, statistics, done);
        saved = performance.now();
      }
    },
  });
  let at = runs;
  for await (const statistics of passes) {
    if (count === 1) return { statistics, files: [progress] };
    writeCalibrationStatistics(names[at++]!, statistics);
    remove(progress);
  }
  return { statistics: joined(names, fingerprint), files: [...names, progress] };
}

/** Statistics of files of different layers of one pass; second moments are read when asked for. */
function joined(paths: readonly string[], fingerprint: string): CalibrationStatistics {
  const all = paths.map((path) => readCalibrationStatistics(path, { fingerprint }, 0).statistics),
    [first] = all;
  const inputs = new Map(all.flatMap((each) => [...each.inputs]));
  const { model, groups, second, runs } = first!;
  const ofInput = new Map(
    all.flatMap((each) => [...each.inputs.keys()].map((name) => [name, each] as const)),
  );
  const load: LoadMoments = (name, which) => ofInput.get(name)!.momentsOf(name, which)!;
  const statistics = new CalibrationStatistics({ fingerprint, model, groups, inputs, second, runs, load });
  statistics.takeSums(inputs);
  if (first!.isExact) statistics.markExact();
  return statistics;
}

/** Rows and columns of a model's linear layers. */
const shapesOf = ({ stages }: ModelLayers) =>
  new Map(
    stages.flatMap(({ layers }) =>
      layers.map(({ name, weights: { rows, cols } }) => [name, [rows, cols]] as const)
    ),
  );

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
  keptBytes?: number,
): ReturnType<typeof readCalibrationStatistics> | undefined {
  if (!isOwn(path)) return undefined;
  try {
    return readCalibrationStatistics(path, { fingerprint, allowUnfinished: true }, keptBytes);
  } catch (error) {
    if (error instanceof CalibrationError) return undefined;
    throw error;
  }
}
