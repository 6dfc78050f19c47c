/**
 * The output folder: checks before it is written into, the work folder inside it, and the step that turns
 * finished work into the output.
 *
 * ```text
 * OUT/arrowquant.partial/   lock, journal and unfinished files of a run; nothing else in OUT changes before the commit
 * OUT/...                   after it: the files, and arrowquant.manifest.json, which names them and is written last
 * ```
 *
 * The commit deletes what the old manifest names, the old manifest, then moves the new files up, the manifest
 * last. A manifest in the work folder means that everything is complete and only the commit is left to do.
 */
import { realpathSync, rmdirSync, statSync } from "node:fs";
import { basename, dirname, isAbsolute, join, relative, resolve, sep } from "node:path";
import { OutputError } from "../errors.ts";
import { reading } from "../files/positional.ts";
import { type Checkpoint, PARTIAL_SUFFIX } from "../tensor/mod.ts";
import {
  digestFile,
  errorCode,
  exists,
  type FileDigest,
  isTemporary,
  kindOf,
  listFolder,
  makeFolder,
  outputError,
  ownKind,
  quote,
  readOwnText,
  remove,
  rename,
  syncFolder,
  writeWhole,
} from "../files/whole.ts";
import { Journal, type JournalContent, type JournalEntry, readJournal } from "./journal.ts";
import type { RunOptions } from "../progress.ts";
import { checkLock, LOCK_PREFIX, makeLocked, removeGone, type Unlock } from "./lock.ts";
import { checkOwnFolder, makeOwnFolder } from "./own_folder.ts";
import {
  type Identity,
  type Manifest,
  MANIFEST_FILE,
  manifestText,
  MAX_MANIFEST_BYTES,
  parseManifest,
} from "./record.ts";

/** Folder inside the output folder that holds an unfinished run. */
export const WORK_FOLDER = `arrowquant${PARTIAL_SUFFIX}`;

/** Prefix of the files of solved layers, which a run keeps in its work folder until it is finished. */
export const SOLVED_PREFIX = "solved-";

const JOURNAL_FILE = "progress.jsonl";

/** How the input's files look to the system. */
export interface SourceState {
  /** Sizes, places and times of writing, and what config.json holds: others mean that a file was changed. */
  readonly written: string;
  /** Times of any change, of its rights as well, in milliseconds. */
  readonly changed: readonly number[];
  /** Paths of the files. */
  readonly paths: readonly string[];
}

/** Milliseconds between times of change, which some runtimes tell in whole seconds. */
export const TIME_STEP = 1000;

/** The output that a run asks for. */
export interface OutputRequest {
  readonly path: string;
  readonly identity: Identity;
  readonly sourceTimes: readonly number[];
  readonly sourceState: () => SourceState;
  /** Digest of all weights that the identity has, where layers depend on them, and how it is made again. */
  readonly weights?: { readonly sha256: string; readonly digest: () => Promise<string> } | undefined;
  /** Every file that will be written, the manifest aside. */
  readonly files: readonly string[];
  readonly resume: boolean;
  readonly force: boolean;
  /** Whether the lock gives signs of life, for runs on other machines. */
  readonly beats?: boolean | undefined;
}

/** How a run starts. */
export type Start =
  | { readonly kind: "fresh"; readonly badLine?: JournalContent["badLine"] }
  /** An unfinished run of the same identity, with what its journal says is complete. */
  | { readonly kind: "resumed" } & Pick<JournalContent, "entries" | "badLine">
  /** Everything is complete; only the commit is left to do. */
  | { readonly kind: "complete"; readonly manifest: Manifest }
  /** The same output was finished before. */
  | { readonly kind: "finished"; readonly manifest: Manifest };

/** An output folder that this run may write into until {@linkcode OutputFolder.release}. */
export class OutputFolder {
  /** Where files are written until the commit. */
  readonly work: string;
  readonly start: Start;
  readonly #request: OutputRequest;
  readonly #created: string | undefined;
  #unlock: Unlock | undefined;
  #journal: Journal | undefined;

  private constructor(request: OutputRequest, start: Start, created: string | undefined, unlock: Unlock) {
    this.work = join(request.path, WORK_FOLDER);
    this.start = start;
    this.#request = request;
    this.#created = created;
    this.#unlock = unlock;
  }

  /**
   * Takes the folder for this run, creating it when there is none.
   *
   * @throws {OutputError} when it is in use, is not empty and not ours, holds a run that was not mentioned in
   *   the request, was changed since a run wrote it, or cannot be written
   */
  static async open(request: OutputRequest, options: RunOptions = {}): Promise<OutputFolder> {
    const work = join(request.path, WORK_FOLDER);
    if (ownKind(work) === "folder") await removeGone(work, options);
    checkOutput(request);
    let created: string | undefined;
    const unlock = makeLocked(work, () => {
      const first = makeFolder(request.path), own = makeOwnFolder(work);
      created ??= first ?? own;
    }, request.beats);
    try {
      const start = findStart(request), { path, force } = request;
      if (force) await checkOurs(path, readManifest(path)?.files ?? {}); // before the work, not only behind it
      return new OutputFolder(request, start, created, unlock);
    } catch (error) {
      unlock();
      if (created === work && listFolder(work).length === 0) rmdirSync(work);
      throw error;
    }
  }

  /** Removes the files that an earlier run left in the work folder, and begins the journal. */
  async begin(entries: readonly JournalEntry[] = []): Promise<void> {
    if (entries.length === 0) await this.#clearWork();
    if (this.start.kind === "fresh") this.#removeSolved();
    const { identity, sourceTimes, files } = this.#request;
    for (const folder of foldersOf(files)) makeOwnFolder(join(this.work, folder));
    this.#journal = Journal.begin(join(this.work, JOURNAL_FILE), { identity, sourceTimes, files }, entries);
  }

  /** Adds a finished tensor to the journal. */
  append(entry: JournalEntry): void {
    this.#unlock?.check();
    this.#journal!.append(entry);
  }

  /** Makes the journal durable. */
  syncJournal(): void {
    this.#journal?.sync();
  }

  /**
   * Turns the work folder's files into the output; the manifest says which.
   *
   * @throws {OutputError} when something is in the way that is not as a run wrote it; the work stays
   */
  async commit(manifest: Manifest): Promise<void> {
    const { path } = this.#request;
    this.#unlock?.check();
    const workManifest = join(this.work, MANIFEST_FILE);
    const manifestPath = join(path, MANIFEST_FILE);
    if (!exists(workManifest)) {
      writeWhole(workManifest, manifestText(manifest));
      syncFolder(this.work);
    }
    const old = readManifest(path);
    if (old !== undefined) {
      await removeOurs(path, old.files);
      remove(manifestPath);
      syncFolder(path);
    }
    const names = Object.keys(manifest.files), folders = foldersOf(names);
    for (const folder of folders) makeFolder(ownPath(path, `${folder}/`));
    const left = names.sort(tensorsFirst).filter((name) => exists(join(this.work, name)));
    const inTheWay = [...left, MANIFEST_FILE].find((name) => ownKind(ownPath(path, name)) !== "nothing");
    if (inTheWay !== undefined) throw cannotWrite(path, `must have no other ${quote(inTheWay)}, ${NOT_OURS}`);
    for (const name of left) rename(join(this.work, name), ownPath(path, name));
    for (const folder of [...folders, ""]) syncFolder(join(path, folder));
    rename(workManifest, manifestPath);
    syncFolder(path);
    await this.clean();
  }

  /** Removes the work folder with the run's files in it. */
  async clean(): Promise<void> {
    this.#removeSolved();
    await this.#clearWork();
    this.release();
    try {
      rmdirSync(this.work);
    } catch (cause) {
      // It holds a file that is not ours, or the next run already.
      if (!["ENOTEMPTY", "EEXIST", "ENOENT"].includes(errorCode(cause) ?? "")) {
        throw outputError("delete", this.work, cause);
      }
    }
  }

  /** Whether solved layers or unfinished shards are there, of this run or an earlier one. */
  holdsWork(): boolean {
    return listFolder(this.work).some((name) => name !== JOURNAL_FILE && !name.startsWith(LOCK_PREFIX));
  }

  /** Gives up: removes the work, and the output folder where this run created it. */
  async discard(): Promise<void> {
    await this.clean();
    if (this.#created === undefined || this.#created === this.work) return;
    try {
      rmdirSync(this.#request.path);
    } catch {
      // Not empty any more: then it is no longer this run's to remove.
    }
  }

  /** Closes the journal and gives the folder back; the work stays, to be resumed. */
  release(): void {
    this.#journal?.close();
    this.#unlock?.();
    this.#unlock = undefined; // from here on the lock is the next run's
  }

  #removeSolved(): void {
    if (!exists(this.work)) return;
    for (const name of listFolder(this.work)) {
      if (name.startsWith(SOLVED_PREFIX)) remove(join(this.work, name));
    }
  }

  async #clearWork(): Promise<void> {
    this.#journal?.close();
    // A commit that was cut off: what it moved up is of no use without the rest. Its manifest goes before
    // anything else in the work folder, because from then on a name missing there does not mean that it was
    // moved.
    const moved = Object.entries(readManifest(this.work)?.files ?? {})
      .filter(([name]) => !exists(join(this.work, name)));
    await removeOurs(this.#request.path, Object.fromEntries(moved));
    remove(join(this.work, MANIFEST_FILE));
    const { header } = readJournal(join(this.work, JOURNAL_FILE));
    const files = [...(header?.files ?? []).filter(isOwnName), ...this.#request.files];
    const names = new Set([...files, MANIFEST_FILE]);
    for (const name of names) {
      for (const suffix of ["", PARTIAL_SUFFIX]) remove(ownPath(this.work, name + suffix));
    }
    for (const folder of ["", ...foldersOf([...names])]) {
      const place = ownPath(this.work, `${folder}/`);
      for (const name of listFolder(place).filter(isTemporary)) remove(join(place, name));
    }
    removeEmpty(this.work, [...names]);
    remove(join(this.work, JOURNAL_FILE));
  }
}

/** Checks that a run may write into a folder, changing nothing. @throws {OutputError} with the way out */
export function checkOutput(
  { path, files, resume, force }: Pick<OutputRequest, "path" | "files" | "resume" | "force">,
): void {
  const refuse = (wanted: string, found: string) => cannotWrite(path, `${wanted}, got ${found}`);
  const kind = kindOf(path), itself = ownKind(path);
  if (kind === "nothing" && itself === "nothing") return;
  if (kind !== "folder") {
    throw refuse("must be a folder or not exist", itself === "link" ? "a link to none" : "a file");
  }
  const work = join(path, WORK_FOLDER);
  checkOwnFolder(work);
  for (const name of files) ownPath(path, name);
  checkLock(work);
  const names = listFolder(path).filter((name) => name !== WORK_FOLDER);
  const hasWork = [JOURNAL_FILE, MANIFEST_FILE].some((name) => exists(join(work, name)));
  const manifest = readManifest(path);

  if (hasWork && !resume && !force) {
    throw refuse(
      "must be empty",
      "a run that was stopped: give --resume to finish it, or --force to start over",
    );
  }
  if (manifest !== undefined && !resume && !force) throw refuse("must be empty", FINISHED);
  if (manifest === undefined && !hasWork && names.includes(MANIFEST_FILE)) {
    const found = `${quote(MANIFEST_FILE)} changed since, or one of another version`;
    throw refuse("must be empty or an output as this tool wrote it", `${found}: choose another folder`);
  }
  if (manifest === undefined && !hasWork && names.length > 0) {
    const found = `${names.length} other files (${quote(names[0]!)} …)`;
    throw refuse(
      "must be empty or an output of this tool",
      `${found}, which --force does not delete: choose another folder`,
    );
  }
  const committed = readManifest(work);
  const ours = new Set([...Object.keys(manifest?.files ?? {}), ...Object.keys(committed?.files ?? {})]);
  const foreign = [...files, MANIFEST_FILE].find((name) =>
    ownKind(join(path, name)) !== "nothing" && !ours.has(name) &&
    !(name === MANIFEST_FILE && manifest !== undefined)
  );
  if (foreign !== undefined) throw cannotWrite(path, `must have no other ${quote(foreign)}, ${NOT_OURS}`);
}

const NOT_OURS = "got one that this tool did not write: move it away, or choose another folder";

const FINISHED = "a finished output: choose another folder, or give --force to replace it";

const cannotWrite = (path: string, reason: string) =>
  new OutputError(`Cannot write ${quote(path)}: ${reason}`, { path });

/**
 * Checks that the output is not the input, behind symbolic links, nor a folder around it, where replacing an
 * output would delete it.
 *
 * @throws {OutputError} when it is
 */
export function checkNotInput(checkpoint: Checkpoint, output: string): void {
  const place = resolveExisting(output);
  const inputs = new Set(
    [checkpoint.path, checkpoint.folder, checkpoint.root, ...checkpoint.files.map(({ file }) => file.path)]
      .flatMap((path) => {
        const real = reading(path, () => realpathSync(path));
        return [real, ...(kindOf(real) === "file" ? [dirname(real), dirname(resolve(path))] : [])];
      }),
  );
  const isSame = inputs.has(place) ||
    (exists(place) && [...inputs].some((input) => isSameFile(input, place)));
  const got = isSame ? "the same place as" : "a folder around";
  if (!isSame && ![...inputs].some((input) => isInside(input, place))) return;
  throw cannotWrite(output, `must not be the input's folder, got ${got} ${quote(checkpoint.path)}`);
}

/** Whether a real path lies below a real folder. */
export function isInside(path: string, folder: string): boolean {
  const way = relative(folder, path);
  return way !== "" && way.split(sep)[0] !== ".." && !isAbsolute(way);
}

/** Reads a folder's manifest; undefined when there is none that this version understands. */
export function readManifest(folder: string): Manifest | undefined {
  const text = readOwnText(join(folder, MANIFEST_FILE), MAX_MANIFEST_BYTES);
  const manifest = text === undefined ? undefined : parseManifest(text);
  return manifest !== undefined && Object.keys(manifest.files).every(isOwnName) ? manifest : undefined;
}

/** A file that is not as its manifest says. */
export interface Mismatch {
  readonly name: string;
  readonly reason: string;
}

/** Compares every file of a manifest with it: size, then SHA-256. */
export async function verifyFiles(folder: string, { files }: Manifest): Promise<Mismatch[]> {
  const mismatches: Mismatch[] = [];
  for (const [name, wanted] of Object.entries(files)) {
    const reason = await mismatch(join(folder, name), wanted);
    if (reason !== undefined) mismatches.push({ name, reason });
  }
  return mismatches;
}

async function mismatch(path: string, wanted: FileDigest): Promise<string | undefined> {
  if (ownKind(path) !== "file") return "must be there, got no such file";
  const { size } = statSync(path);
  if (size !== wanted.bytes) return `must have ${wanted.bytes} bytes, got ${size}`;
  const { sha256 } = await digestFile(path);
  return sha256 === wanted.sha256 ? undefined : `must have SHA-256 ${wanted.sha256}, got ${sha256}`;
}

/** Checks that an output's names lead to what a run wrote. @throws {OutputError} naming what is not */
async function checkOurs(path: string, files: Manifest["files"]): Promise<void> {
  for (const [name, wanted] of Object.entries(files)) {
    const place = ownPath(path, name);
    if (ownKind(place) === "nothing" || await mismatch(place, wanted) === undefined) continue;
    const reason = `must have ${quote(name)} as this tool wrote it, got one that was changed since`;
    throw cannotWrite(path, `${reason}: move it away, or choose another folder`);
  }
}

/** Deletes the files of an output, all or, where one is not ours, none. @throws as {@linkcode checkOurs} */
async function removeOurs(path: string, files: Manifest["files"]): Promise<void> {
  await checkOurs(path, files);
  // config.json and the index first: without them nothing takes a mixture of old and new for a model.
  const names = Object.keys(files).sort((a, b) => tensorsFirst(b, a));
  for (const name of names) remove(ownPath(path, name));
  removeEmpty(path, names);
}

/** Decides how to start; the lock is held. */
function findStart(request: OutputRequest): Start {
  checkOutputUnlocked(request);
  const { path, identity, resume } = request;
  const work = join(path, WORK_FOLDER);
  if (!resume) return { kind: "fresh" };
  const committed = readManifest(work);
  const { header, entries, badLine } = readJournal(join(work, JOURNAL_FILE));
  const manifest = readManifest(path);
  if (header === undefined && committed === undefined) {
    if (manifest === undefined) return { kind: "fresh", badLine };
    // Also where a run with --force was killed before its journal: then the old output is what there is.
    checkIdentity(path, "no stopped run but a finished output", manifest.identity, identity, REPLACE);
    return { kind: "finished", manifest };
  }
  if (header !== undefined) {
    checkIdentity(path, "a run that was stopped", header.identity, identity);
    if (header.sourceTimes.join() !== request.sourceTimes.join()) {
      throw cannotResume(path, "the input's files must not have changed since, got other times of change");
    }
  }
  if (committed !== undefined) {
    checkIdentity(path, "a run that was stopped", committed.identity, identity);
    return { kind: "complete", manifest: committed };
  }
  // Cut off behind the commit, or before anything was written over the same output: its bytes decide.
  if (manifest !== undefined && isSameIdentity(manifest.identity, identity)) {
    return { kind: "finished", manifest };
  }
  return { kind: "resumed", entries, badLine };
}

/** {@linkcode checkOutput} again under the lock: another run may have finished in between. */
function checkOutputUnlocked(request: OutputRequest): void {
  const { path, resume, force } = request;
  if (resume || force || readManifest(path) === undefined) return;
  throw cannotWrite(path, `must be empty, got ${FINISHED}`);
}

function isSameIdentity(a: Identity, b: Identity): boolean {
  return JSON.stringify(a) === JSON.stringify(b);
}

function checkIdentity(path: string, what: string, found: Identity, wanted: Identity, remedy = GO_ON): void {
  if (isSameIdentity(found, wanted)) return;
  const differences = (["operation", "toolVersion"] as const).filter((key) => found[key] !== wanted[key])
    .map((key) => `${key === "toolVersion" ? "version" : key} ${found[key]}, not ${wanted[key]}`);
  differences.push(...settingDifferences(found.settings, wanted.settings));
  if (JSON.stringify(found.source) !== JSON.stringify(wanted.source)) differences.push("another input");
  throw cannotResume(path, `must be the same run again, got ${what} with ${differences.join("; ")}`, remedy);
}

function settingDifferences(found: string, wanted: string): string[] {
  if (found === wanted) return [];
  const [a, b] = [found, wanted].map((text) => {
    try {
      return JSON.parse(text) as Record<string, unknown>;
    } catch {
      return {}; // from another version
    }
  }) as [Record<string, unknown>, Record<string, unknown>];
  return [...new Set([...Object.keys(a), ...Object.keys(b)])]
    .filter((key) => JSON.stringify(a[key]) !== JSON.stringify(b[key]))
    .map((key) => `${key} ${JSON.stringify(a[key])}, not ${JSON.stringify(b[key])}`);
}

/** Remedies for a run that cannot be resumed. */
const GO_ON = "repeat the first command with --resume, or start over with --force";
const REPLACE = "replace it with --force instead of --resume, also where a run with --force was stopped";

function cannotResume(path: string, reason: string, remedy: string = GO_ON): OutputError {
  return new OutputError(`Cannot resume ${quote(path)}: ${reason}; ${remedy}`, { path });
}

const isTensors = (name: string): number => Number(name.endsWith(".safetensors"));
const tensorsFirst = (a: string, b: string): number => isTensors(b) - isTensors(a);
const isPlainName = (name: string): boolean => basename(name) === name && !["", ".", ".."].includes(name);
/** Whether a name stays in the output: those of a pipeline have folders in front, with slashes. */
const isOwnName = (name: string): boolean => name.split("/").every(isPlainName);

/** The folders of names, outer ones first. */
function foldersOf(names: readonly string[]): string[] {
  const folders = names.flatMap((name) => {
    const parts = name.split("/").slice(0, -1);
    return parts.map((_, i) => parts.slice(0, i + 1).join("/"));
  });
  return [...new Set(folders)].sort();
}

/** The path of a file of ours, in folders that are none of somebody else's by way of a link. */
function ownPath(root: string, name: string): string {
  for (const folder of foldersOf([name])) checkOwnFolder(join(root, folder));
  return join(root, name);
}

/** Removes the folders of names where nothing is left in them. */
function removeEmpty(root: string, names: readonly string[]): void {
  for (const folder of foldersOf(names).reverse()) {
    try {
      rmdirSync(join(root, folder));
    } catch (cause) {
      if (!["ENOTEMPTY", "EEXIST", "ENOENT", "ENOTDIR"].includes(errorCode(cause) ?? "")) {
        throw outputError("delete", join(root, folder), cause);
      }
    }
  }
}

/** The real path of what exists, with the rest of the path behind it. */
function resolveExisting(path: string): string {
  const absolute = resolve(path);
  try {
    return realpathSync(absolute);
  } catch (cause) {
    const parent = dirname(absolute);
    if (errorCode(cause) !== "ENOENT" || parent === absolute) throw outputError("look at", path, cause);
    return join(resolveExisting(parent), basename(absolute));
  }
}

function isSameFile(a: string, b: string): boolean {
  const [first, second] = [statSync(a), statSync(b)];
  return first.ino === second.ino && first.dev === second.dev;
}
