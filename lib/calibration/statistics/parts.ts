/** Statistics in parts, each of some of the samples, and what adds them up to those of one pass. */
import { CalibrationError } from "../../errors.ts";
import { sha256 } from "../../files/whole.ts";
import type { LoadedModel } from "../../models/mod.ts";
import { type Shard, shardFolder } from "../../output/shard_folders.ts";
import { shardText } from "../../plan/shards.ts";
import type { CalibrationRun, CalibrationStatistics } from "../../time/mod.ts";
import type { CalibrationOptions, CalibrationPart } from "../draw.ts";
import { type Calibrated, loadCalibration } from "../mod.ts";
import type { OwnSampleOptions, OwnSampleSettings } from "../own_samples.ts";

/** Most parts that a message lists. */
const LISTED = 8;

/** Name of a part's file, as `stats.shard-1-of-4.safetensors`. */
export const shardPath = (path: string, shard: Shard): string =>
  `${path.replace(/\.safetensors$/, "")}.${shardFolder(shard)}.safetensors`;

/**
 * Calibration data with the samples of one shard: whole chunks, as many as the others' within one. The
 * samples are those that one pass would draw.
 *
 * @throws {CalibrationError} as {@linkcode loadCalibration}, and where there are fewer chunks than shards
 */
export async function loadCalibrationShard(
  loaded: LoadedModel,
  given: CalibrationOptions & { readonly self?: OwnSampleSettings | undefined },
  shard: Shard,
  run: OwnSampleOptions,
): Promise<Calibrated> {
  const whole = await loadCalibration(loaded, { ...given, byChunk: true }, run);
  const part = partOf(whole, shard);
  const samples = part.data.fit.reduce((sum, { samples }) => sum + samples, 0);
  return { ...part, data: { ...part.data, samples } } as Calibrated;
}

/**
 * Data whose batches are of whole or part chunks, with the samples of a shard alone to solve on.
 *
 * @throws {CalibrationError} where there are fewer chunks than shards
 */
export function partOf<Data extends Calibrated>(whole: Data, shard: Shard): Data {
  const { samples, chunk = 1 } = whole.data, { index, count } = shard, chunks = Math.ceil(samples / chunk);
  if (chunks < count) {
    throw new CalibrationError(
      `Cannot calibrate shard ${
        shardText(shard)
      }: of ${samples} samples there must be at most ${chunks} shards, ` +
        `each with ${chunk} samples that are summed up together: take more samples, or fewer shards`,
    );
  }
  const at = (i: number) => Math.floor(i * chunks / count) * chunk, begin = at(index - 1), end = at(index);
  let first = 0;
  const fit = (whole.data.fit as readonly CalibrationPart<unknown>[]).filter(({ samples }) => {
    const isOwn = first >= begin && first < end;
    first += samples;
    return isOwn;
  });
  return { ...whole, data: { ...whole.data, fit } } as Data;
}

/** The run of a pass, or of a part of its samples. */
export function runOf(run: CalibrationRun, shard: Shard | undefined): CalibrationRun {
  if (shard === undefined) return run;
  const { index, count } = shard;
  return {
    ...run,
    identity: sha256(`${run.identity} ${shardText(shard)}`),
    shard: { index, count, of: run.identity },
  };
}

/**
 * Statistics added up in their order; of a pass in parts all parts, whatever their order, as those of the one
 * pass.
 *
 * @throws {CalibrationError} when parts are missing or there twice, or statistics do not belong together
 */
export function mergeStatistics(all: readonly CalibrationStatistics[]): CalibrationStatistics {
  const passes = Map.groupBy(all, ({ runs: [first] }) => first!.shard?.of ?? first!.identity);
  // Missing parts are named for the pass that most of the given parts belong to.
  for (const own of [...passes.values()].toSorted((a, b) => b.length - a.length)) {
    if (own[0]!.runs[0]!.shard !== undefined) checkParts(own, all);
  }
  const whole = [...passes.values()].flatMap((own) =>
    own[0]!.runs[0]!.shard === undefined ? own : [ofParts(own)]
  );
  return whole.slice(1).reduce((merged, other) => merged.merge(other), whole[0]!);
}

const shardOf = ({ runs: [run] }: CalibrationStatistics) => run!.shard!;

/** @param all those given, for messages @throws {CalibrationError} unless these are all of a pass */
function checkParts(parts: readonly CalibrationStatistics[], all: readonly CalibrationStatistics[]): void {
  const { count, of } = shardOf(parts[0]!);
  const fail = (reason: string) =>
    new CalibrationError(`Cannot merge calibration statistics: ${reason} (${parts[0]!.runs[0]!.source})`);
  const others = parts.find((part) => shardOf(part).count !== count);
  if (others !== undefined) {
    throw fail(`parts must be of one division, got some of ${count} and some of ${shardOf(others).count}`);
  }
  const byIndex = Map.groupBy(parts, (part) => shardOf(part).index);
  const twice = [...byIndex].find(([, own]) => own.length > 1);
  if (twice !== undefined) throw fail(`every part must be there once, got twice: ${twice[0]}/${count}`);
  const missing = Array.from({ length: count }, (_, i) => i + 1).filter((index) => !byIndex.has(index));
  if (missing.length > 0) {
    const others = all.flatMap(({ runs: [run] }) => run!.shard ?? []).filter((shard) => shard.of !== of)
      .map(shardText).slice(0, LISTED);
    throw fail(
      `all ${count} parts must be there, missing: ${
        missing.slice(0, LISTED).map((index) => shardText({ index, count })).join(", ")
      }${
        others.length === 0
          ? ""
          : `; ${
            others.join(", ")
          } are of another pass: other weights, data, samples, seed, settings or instruction set`
      }`,
    );
  }
}

/** Statistics of a pass of which these are the parts. */
function ofParts(parts: readonly CalibrationStatistics[]): CalibrationStatistics {
  const { of } = shardOf(parts[0]!);
  const sorted = parts.toSorted((a, b) => shardOf(a).index - shardOf(b).index);
  const merged = sorted.slice(1).reduce((sum, part) => sum.merge(part), sorted[0]!);
  const { source, isSynthetic } = sorted[0]!.runs[0]!;
  const samples = sorted.reduce((sum, { runs }) => sum + runs[0]!.samples, 0);
  return merged.withRuns([{ identity: of, source, isSynthetic, samples }]);
}
