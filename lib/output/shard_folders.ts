/** Folders of shards as a merge finds them: all of one run, none missing, none twice. */
import { realpathSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import { CheckpointError } from "../errors.ts";
import { isJsonObject } from "../files/json.ts";
import { reading } from "../files/positional.ts";
import { kindOf, listFolder, quote } from "../files/whole.ts";
import { readManifest, WORK_FOLDER } from "./output_folder.ts";
import { type Identity, type Manifest, MANIFEST_FILE, TOOL_VERSION } from "./record.ts";

/** One of several tasks that do a part each. */
export interface Shard {
  /** From 1 to {@linkcode Shard.count}. */
  readonly index: number;
  readonly count: number;
}

/** Name of a shard's folder, as in `shard-3-of-8`. */
export const shardFolder = ({ index, count }: Shard): string => `shard-${index}-of-${count}`;

/** The shard whose folder has a name; undefined where it is none's. */
export function shardOfFolder(name: string): Shard | undefined {
  const [, index, count] = /^shard-([1-9]\d{0,3})-of-([1-9]\d{0,3})$/.exec(name) ?? [];
  const shard = { index: Number(index), count: Number(count) };
  return index !== undefined && shard.index <= shard.count ? shard : undefined;
}

/** A finished shard. */
export interface ShardResult extends Shard {
  readonly path: string;
  readonly manifest: Manifest;
  /** Settings of the run, without what is the shard's alone. */
  readonly settings: Readonly<Record<string, unknown>>;
  /** Whether its tensors depend on no other weights: their own alone are told, in its records. */
  readonly hasOwnWeights: boolean;
}

/** Most names that a message lists. */
const LISTED = 8;

const fail = (reason: string, path?: string) =>
  new CheckpointError(`Cannot merge: ${reason}`, path === undefined ? {} : { path });

const listed = (names: readonly string[]): string =>
  names.slice(0, LISTED).join(", ") + (names.length > LISTED ? ` and ${names.length - LISTED} more` : "");

/** Folders of shards that paths stand for: those of a shard, or those that hold some. */
function foldersOf(paths: readonly string[]): string[] {
  const folders = paths.flatMap((path) => {
    if (kindOf(path) !== "folder") {
      throw fail(`there must be a folder of shards at ${quote(path)}, got none`, path);
    }
    if (shardOfFolder(basename(resolve(path))) !== undefined) return [path];
    const own = listFolder(path).filter((name) => shardOfFolder(name) !== undefined).map((name) =>
      join(path, name)
    );
    if (own.length > 0) return own;
    throw fail(
      `${quote(path)} must be the folder of a shard, or hold some (shard-1-of-4 …), got neither`,
      path,
    );
  });
  const seen = new Set<string>();
  return folders.filter((path) => {
    const place = reading(path, () => realpathSync(path)), isNew = !seen.has(place);
    seen.add(place);
    return isNew;
  });
}

/** @throws {CheckpointError} where a folder holds no finished shard of this version */
function readShard(path: string): ShardResult {
  const manifest = readManifest(path), named = shardOfFolder(basename(resolve(path)))!;
  const shard = `shard ${named.index}/${named.count}`;
  if (manifest === undefined) {
    const names = listFolder(path);
    if (names.includes(MANIFEST_FILE)) {
      throw fail(
        `${shard} must be as this version wrote it, got a manifest that was changed or of another one: ${
          quote(path)
        }`,
        path,
      );
    }
    const got = names.includes(WORK_FOLDER) ? "one that was stopped or still runs" : "nothing finished";
    throw fail(
      `${shard} must be finished, got ${got}: ${quote(path)}; give its command again with --resume`,
      path,
    );
  }
  const { identity: { operation, toolVersion, settings: text } } = manifest;
  if (toolVersion !== TOOL_VERSION) {
    throw fail(`${shard} must be of version ${TOOL_VERSION}, got ${toolVersion}: ${quote(path)}`, path);
  }
  const all = settingsOf(text), { shard: own, ...settings } = all;
  if (operation !== "quantize" || !isShard(own) || own.index !== named.index || own.count !== named.count) {
    throw fail(`${quote(path)} must hold ${shard}, got another output of this tool`, path);
  }
  return {
    ...{ index: own.index, count: own.count, path, manifest, settings },
    hasOwnWeights: own.weights === "own",
  };
}

function settingsOf(text: string): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(text);
    return isJsonObject(value) ? value : {};
  } catch (error) {
    if (error instanceof SyntaxError) return {}; // as of another program
    throw error;
  }
}

function isShard(value: unknown): value is Shard & { readonly weights: string } {
  return isJsonObject(value) && Number.isSafeInteger(value["index"]) && Number.isSafeInteger(value["count"]);
}

/** @throws {CheckpointError} where two shards are of different runs */
function checkSame(first: ShardResult, other: ShardResult): void {
  const name = ({ index, count, path }: ShardResult) => `${index}/${count} (${quote(path)})`;
  const { settings: a } = first, { settings: b } = other;
  const keys = [...new Set([...Object.keys(a), ...Object.keys(b)])]
    .filter((key) => JSON.stringify(a[key]) !== JSON.stringify(b[key]))
    .map((key) => `${key} ${JSON.stringify(b[key])}, not ${JSON.stringify(a[key])}`);
  const source = ({ manifest: { identity } }: ShardResult) => JSON.stringify(identity.source);
  const differences = [...keys, ...(source(first) === source(other) ? [] : ["another input"])];
  if (differences.length === 0) return;
  throw fail(
    `shards must be of one run, got ${name(other)}, unlike ${name(first)}, with ${differences.join("; ")}`,
    other.path,
  );
}

/**
 * The shards in folders, by index. A path may be a shard's own folder, or one that holds several.
 *
 * @throws {CheckpointError} naming shards that are missing, there twice, unfinished, or of another run,
 * version or division
 */
export function readShards(paths: readonly string[]): ShardResult[] {
  const folders = foldersOf(paths),
    byCount = Map.groupBy(folders, (path) => shardOfFolder(basename(resolve(path)))!.count);
  if (byCount.size > 1) {
    const kinds = [...byCount].map(([count, own]) => `${own.length} of ${count} (${quote(own[0]!)})`);
    throw fail(`shards must be of one division, got ${kinds.join(", ")}: name those that belong together`);
  }
  const [[count, own]] = [...byCount] as [[number, string[]]];
  const byIndex = Map.groupBy(own, (path) => shardOfFolder(basename(resolve(path)))!.index);
  const twice = [...byIndex].filter(([, paths]) => paths.length > 1);
  if (twice.length > 0) {
    const names = twice.map(([index, paths]) => `${index}/${count} (${paths.map(quote).join(", ")})`);
    throw fail(`every shard must be there once, got twice: ${listed(names)}`);
  }
  const missing = Array.from({ length: count }, (_, i) => i + 1).filter((index) => !byIndex.has(index));
  if (missing.length > 0) {
    throw fail(
      `all ${count} shards must be there, missing: ${listed(missing.map((index) => `${index}/${count}`))}`,
    );
  }
  const shards = own.map(readShard).sort((a, b) => a.index - b.index);
  for (const shard of shards) checkSame(shards[0]!, shard);
  return shards;
}

/** Identity of the run whose parts shards are. */
export const identityOf = ({ manifest: { identity }, settings }: ShardResult): Identity => ({
  ...identity,
  settings: JSON.stringify(settings),
});
