/**
 * Calibration as a configuration asks for it: whether it does, where the data are, and a model opened with
 * them.
 */
import { existsSync } from "node:fs";
import { basename, join } from "node:path";
import { type Config, hasBudget } from "../config/mod.ts";
import { type HeldWeights, modelFrom, runLimits } from "../models/mod.ts";
import type { Kernels } from "../native/mod.ts";
import type { Checkpoint } from "../tensor/mod.ts";
import { type CalibrationStatistics, modelFingerprint } from "../time/mod.ts";
import { draftOwnSamples, type OwnSampleOptions, type OwnSampleWork } from "./own_samples.ts";
import { chooseMoment } from "./moment_structure.ts";
import { type Calibrated, loadCalibration, withStatistics } from "./mod.ts";
import { digestFile, exists } from "../files/whole.ts";
import { acquireFileLock, fileLock, removeGone } from "../output/lock.ts";
import { digestTensors } from "../output/source_digest.ts";
import type { Shard } from "../output/shard_folders.ts";
import { pause, type RunOptions, stoppable } from "../progress.ts";
import { loadCalibrationShard, shardPath } from "./statistics/parts.ts";
import { loadStatistics, saveMerged, saveStatistics, statisticsFiles } from "./saved_statistics.ts";
import { layersWith, type Solvable } from "./statistics/alone.ts";

/** Data that lie beside a checkpoint and are used when none are named. */
const BESIDE = ["calibration.jsonl", "calibration_images.safetensors", "calibration.safetensors"];

/** The calibration data that lie beside a checkpoint, if any do. */
export function calibrationBeside(folder: string): string | undefined {
  return BESIDE.map((name) => join(folder, name)).find((path) => existsSync(path));
}

/**
 * The calibration data of a configuration: the file that it names, what lies beside the checkpoint, or
 * `self`, what the model makes itself.
 */
export const calibrationSource = ({ folder, root }: Checkpoint, { calibrationData }: Config): string =>
  calibrationData ?? calibrationBeside(folder) ?? calibrationBeside(root) ?? "self";

/** Whether a configuration names saved statistics as its calibration data. */
export const hasStatistics = ({ calibrationData }: Config): boolean =>
  calibrationData !== null && statisticsFiles(calibrationData) !== undefined;

/** A digest of the data's bytes; data that are made have none but their name. */
export async function calibrationDigest(source: string): Promise<string> {
  const paths = source === "synthetic" || source === "self"
    ? undefined
    : existsSync(source)
    ? [source]
    : statisticsFiles(source);
  if (paths === undefined) return source;
  const digests: string[] = [];
  for (const path of paths) digests.push((await digestFile(path)).sha256);
  return digests.join();
}

/** Statistics to be saved. */
export interface SaveCalibration {
  /** A safetensors file. */
  readonly path: string;
  /** Also the second moment of each time group, which output corrections need. */
  readonly groupMoments?: boolean | undefined;
  /** A part of the samples only, into a file of its own beside the path. */
  readonly shard?: Shard | undefined;
}

/** What a checkpoint calls its architecture, or is called. */
function modelName({ config, path }: Checkpoint): string {
  const { architectures, _class_name: className } = config ?? {};
  const [first] = Array.isArray(architectures) ? architectures as unknown[] : [className];
  return typeof first === "string" ? first : basename(path);
}

/** A checkpoint's model with its calibration data, or with saved statistics of them. */
export async function openCalibration(
  checkpoint: Checkpoint,
  config: Config,
  kernels: Kernels,
  save: SaveCalibration | undefined,
  options: OwnSampleOptions & {
    readonly force?: boolean | undefined;
    /** As {@linkcode modelFrom} takes it. */
    readonly held?: HeldWeights | undefined;
    /** Bytes of statistics in memory at once where they are gathered to be saved. */
    readonly bytesAtOnce?: number | undefined;
    /** As {@linkcode loadCalibration} takes it. */
    readonly batchPositions?: number | undefined;
    readonly byChunk?: boolean | undefined;
    /** Called before a model makes its own samples, with a draft of them and what making them takes. */
    readonly onDraft?: ((draft: Calibrated, work: OwnSampleWork) => void) | undefined;
  },
): Promise<Solvable> {
  const source = calibrationSource(checkpoint, config), files = statisticsFiles(source);
  const fingerprint = files === undefined && save === undefined ? "" : modelFingerprint(checkpoint);
  const statistics = files && loadStatistics(files, fingerprint);
  options.onEvent?.({ kind: "stage", message: "opening the model" });
  if (statistics !== undefined && (statistics.fingerprint === "" || runLimits(checkpoint) !== undefined)) {
    if (save !== undefined) saveMerged(save.path, statistics, options);
    return layersWith(statistics, kernels, { checkpoint, path: source, held: options.held });
  }
  const loaded = modelFrom(checkpoint, kernels, { held: options.held });
  const samples = config.calibrationSamples ?? undefined, seed = config.calibrationSeed;
  // A saved pass goes on from its number of parts: they are always alike.
  const batchPositions = save === undefined ? options.batchPositions : undefined;
  const data = {
    source,
    samples,
    seed,
    batchPositions,
    byChunk: options.byChunk,
    self: config.selfCalibration,
  };
  const shard = save?.shard;
  const calibrated = statistics === undefined
    ? await stoppable(
      options.signal,
      options.kept === undefined
        ? "repeat the command, where it had begun with --resume"
        : "go on with --resume, what the model has made is kept",
      async () => {
        if (source === "self" && options.onDraft !== undefined) {
          const { selfCalibration: self } = config;
          const { samples: own, ...work } = await draftOwnSamples(loaded, self, seed, options.kept);
          // Where a stopped run has made all of them, its forecast follows with the samples.
          if (work.positions > 0) options.onDraft(await loadCalibration(loaded, { ...data, own }), work);
        }
        return shard === undefined
          ? await loadCalibration(loaded, data, options)
          : await loadCalibrationShard(loaded, data, shard, options);
      },
    )
    : withStatistics(loaded, statistics);
  if (save === undefined) return calibrated;
  const saved = await statisticsSaved(checkpoint, calibrated, config, save, {
    ...options,
    source,
    fingerprint,
    kernels,
  });
  const isUsed = statistics !== undefined || config.calibrationMode === "once" || hasBudget(config);
  return isUsed ? { ...calibrated, statistics: saved } : calibrated;
}

/** Statistics of calibrated data, saved. */
async function statisticsSaved(
  checkpoint: Checkpoint,
  calibrated: Calibrated,
  config: Config,
  save: SaveCalibration,
  options: RunOptions & {
    readonly source: string;
    readonly fingerprint: string;
    readonly kernels: Kernels;
    readonly force?: boolean | undefined;
    readonly bytesAtOnce?: number | undefined;
  },
): Promise<CalibrationStatistics> {
  const { groupMoments = false, shard } = save,
    { source, fingerprint, kernels, signal, onEvent, onProgress } = options;
  const path = shard === undefined ? save.path : shardPath(save.path, shard), { force = false } = options;
  const remedy = "give the same command again, what is collected is kept";
  const weights = await stoppable(
    signal,
    remedy,
    () => digestTensors(checkpoint, checkpoint.tensors.keys(), () => pause(signal)),
  );
  const dataIdentity = JSON.stringify([
    await calibrationDigest(source),
    config.calibrationSamples ?? undefined,
    config.calibrationSeed,
    weights,
    ...(source === "self" ? [config.selfCalibration] : []),
  ]);
  if (shard !== undefined && exists(fileLock(path))) await removeGone(fileLock(path), options);
  const release = acquireFileLock(path, shard !== undefined);
  return await stoppable(
    signal,
    remedy,
    () =>
      saveStatistics(calibrated, {
        path,
        force,
        second: groupMoments ? "groups" : "total",
        groups: config.numTimeGroups,
        blockOf: (cols) =>
          chooseMoment(config.solverOptions, { cols, positions: calibrated.data.distinctPositions }).block,
        fingerprint,
        modelName: modelName(checkpoint),
        dataIdentity,
        kernels,
        shard,
        signal,
        onEvent,
        onProgress,
        bytesAtOnce: options.bytesAtOnce,
      }),
  ).finally(release);
}
