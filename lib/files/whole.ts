/** Whole files: read within a size limit, hashed, written at once or not at all; and file-system calls. */
import { Buffer } from "node:buffer";
import { createHash, randomBytes } from "node:crypto";
import {
  closeSync,
  fstatSync,
  fsyncSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  renameSync,
  rmSync,
  statfsSync,
  statSync,
  writeSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { FormatError, OutputError } from "../errors.ts";
import { pause } from "../progress.ts";
import {
  createNew,
  errorCode,
  inputError,
  openForReading,
  outputError,
  quote,
  readFully,
  writeFully,
  writing,
} from "./positional.ts";

export { errorCode, inputError, outputError, quote };

/** A small file before it is complete: a name that nothing else has. */
const temporaryFor = (path: string): string =>
  join(dirname(path), `.arrowquant-${randomBytes(8).toString("hex")}.tmp`);

/** Whether a name is of a small file that a stopped run did not complete. */
export const isTemporary = (name: string): boolean => /^\.arrowquant-[0-9a-f]{16}\.tmp$/.test(name);

/** Bytes read at once while hashing. */
const HASH_BLOCK_BYTES = 4 * 2 ** 20;

/** SHA-256 in hexadecimal. */
export function sha256(data: string | Uint8Array): string {
  return createHash("sha256").update(data).digest("hex");
}

/** Size and SHA-256 of a file. */
export interface FileDigest {
  readonly bytes: number;
  readonly sha256: string;
}

/**
 * Reads a file through and hashes it; `between` runs after each block.
 *
 * @throws {CheckpointError} when it cannot be read
 */
export async function digestFile(path: string, between?: () => Promise<void>): Promise<FileDigest> {
  const hash = createHash("sha256"), block = Buffer.allocUnsafe(HASH_BLOCK_BYTES);
  let bytes = 0;
  const fd = openForReading(path);
  try {
    for (let got; (got = readFully(fd, block, bytes, path)) > 0; bytes += got) {
      hash.update(block.subarray(0, got));
      await (between ?? pause)();
    }
  } finally {
    closeSync(fd);
  }
  return { bytes, sha256: hash.digest("hex") };
}

/** Most bytes of a file that is read whole where nothing smaller is asked for. */
const MAX_WHOLE_BYTES = 2 ** 30;

/**
 * Reads a whole file into memory.
 *
 * @param refuse error for a file of more than `maxBytes`, which is not read
 * @throws {CheckpointError} when it cannot be read
 */
export function readWhole(
  path: string,
  maxBytes = MAX_WHOLE_BYTES,
  refuse = (reason: string): Error => new FormatError(`Cannot read ${quote(path)}: ${reason}`, { path }),
): Uint8Array<ArrayBuffer> {
  const fd = openForReading(path);
  try {
    const { size } = fstatSync(fd);
    if (size > maxBytes) throw refuse(`must have at most ${maxBytes} bytes, got ${size}`);
    const bytes = new Uint8Array(size);
    return bytes.subarray(0, readFully(fd, bytes, 0, path));
  } finally {
    closeSync(fd);
  }
}

/** Text of a file that a run left in its folder, undefined without one. @throws {OutputError} otherwise */
export function readOwnText(path: string, maxBytes: number): string | undefined {
  try {
    return new TextDecoder().decode(readWhole(path, maxBytes));
  } catch (cause) {
    const { cause: system, message } = cause as Error;
    if (["ENOENT", "ENOTDIR"].includes(errorCode(system) ?? "")) return undefined;
    throw system === undefined
      ? new OutputError(message, { path, cause })
      : outputError("read", path, system);
  }
}

/**
 * Writes a file, at once or in pieces, so that its name stands for all of it or for what it was before, and
 * survives a crash.
 *
 * @param syncs whether the disk has it when this returns; without, the name may stand for less after a loss
 * of power
 * @throws {OutputError} when the system refuses, or a device or pipe has that name: a rename would put a file
 *   in its place
 */
export function writeWhole(
  path: string,
  content: string | Uint8Array | Iterable<string | Uint8Array>,
  syncs = true,
): FileDigest {
  const pieces = typeof content === "string" || content instanceof Uint8Array ? [content] : content;
  const hash = createHash("sha256");
  let size = 0;
  const temporary = temporaryFor(path);
  const existing = writing("write", path, () => statSync(path, { throwIfNoEntry: false }));
  if (existing !== undefined && !existing.isFile() && !existing.isDirectory()) {
    throw new OutputError(`Cannot write ${quote(path)}: it must be a file, got a device or pipe`, { path });
  }
  try {
    const fd = createNew(temporary);
    try {
      for (const piece of pieces) {
        const bytes = typeof piece === "string" ? Buffer.from(piece) : piece;
        for (let done = 0; done < bytes.length;) {
          done += writeSync(fd, bytes, done, bytes.length - done, size + done);
        }
        hash.update(bytes);
        size += bytes.length;
      }
      if (syncs) fsyncSync(fd);
    } finally {
      closeSync(fd);
    }
    renameSync(temporary, path);
  } catch (cause) {
    rmSync(temporary, { force: true });
    throw outputError("write", path, cause);
  }
  return { bytes: size, sha256: hash.digest("hex") };
}

/**
 * Copies a file as {@linkcode writeWhole} writes one; `between` runs after each block.
 *
 * @throws {CheckpointError} when it cannot be read
 * @throws {OutputError} when the system refuses
 */
export async function copyWhole(from: string, to: string, between: () => Promise<void>): Promise<FileDigest> {
  const hash = createHash("sha256"), block = Buffer.allocUnsafe(HASH_BLOCK_BYTES);
  const temporary = temporaryFor(to), source = openForReading(from);
  let bytes = 0, target: number | undefined;
  try {
    const fd = target = writing("write", to, () => createNew(temporary));
    for (let got; (got = readFully(source, block, bytes, from)) > 0; bytes += got) {
      hash.update(block.subarray(0, got));
      writeFully(fd, block.subarray(0, got), bytes, to);
      await between();
    }
    writing("write", to, () => fsyncSync(fd));
  } finally {
    closeSync(source);
    if (target !== undefined) closeSync(target);
  }
  rename(temporary, to);
  return { bytes, sha256: hash.digest("hex") };
}

/** The last part of a path, whichever way its slashes lean. */
export function nameOfPath(path: string): string {
  return path.replace(/[/\\]+$/, "").split(/[/\\]/).at(-1)!;
}

/** Deletes a file that may not be there. @throws {OutputError} when the system refuses */
export function remove(path: string): void {
  writing("delete", path, () => rmSync(path, { force: true }));
}

/**
 * Makes a folder and those above it; returns the first that was made, undefined where all were there.
 *
 * @throws {OutputError} when the system refuses
 */
export function makeFolder(path: string): string | undefined {
  return writing("create", path, () => mkdirSync(path, { recursive: true }));
}

/** Gives a file another name and makes that durable with the next {@linkcode syncFolder}. */
export function rename(from: string, to: string): void {
  writing("rename a finished file to", to, () => renameSync(from, to));
}

/** Makes renames in a folder durable, where the system can do that for folders. */
export function syncFolder(folder: string): void {
  let fd: number | undefined;
  try {
    fd = openSync(folder, "r");
    fsyncSync(fd);
  } catch (cause) {
    const unsupported = ["EISDIR", "EPERM", "EACCES", "EINVAL", "EBADF", "ENOTSUP", "ENOSYS"];
    if (!unsupported.includes(errorCode(cause) ?? "")) throw outputError("sync the folder", folder, cause);
  } finally {
    if (fd !== undefined) closeSync(fd);
  }
}

/** Kind of what has a name itself, links not followed. @throws {OutputError} when the system does not say */
export function ownKind(path: string): "nothing" | "folder" | "file" | "link" | "other" {
  const stat = writing("look at", path, () => lstatSync(path, { throwIfNoEntry: false }));
  if (stat === undefined) return "nothing";
  return stat.isSymbolicLink() ? "link" : stat.isDirectory() ? "folder" : stat.isFile() ? "file" : "other";
}

/** Whether a path leads to anything. @throws {OutputError} when the system does not say */
export function exists(path: string): boolean {
  return kindOf(path) !== "nothing";
}

/** Kind of what a path leads to, links followed. @throws {OutputError} when the system does not say */
export function kindOf(path: string): "nothing" | "folder" | "file" | "other" {
  try {
    const stat = statSync(path);
    return stat.isDirectory() ? "folder" : stat.isFile() ? "file" : "other";
  } catch (cause) {
    if (errorCode(cause) === "ENOENT") return "nothing";
    throw outputError("look at", path, cause);
  }
}

/** Names in a folder, sorted; none when it does not exist. @throws {OutputError} when the system refuses */
export function listFolder(folder: string): string[] {
  try {
    return readdirSync(folder).sort();
  } catch (cause) {
    if (errorCode(cause) === "ENOENT") return [];
    throw outputError("list", folder, cause);
  }
}

/** Bytes of the files in a folder, without those in folders in it; 0 when it does not exist. */
export function folderBytes(folder: string): number {
  let bytes = 0;
  for (const name of listFolder(folder)) {
    const path = join(folder, name);
    if (ownKind(path) === "file") bytes += statSync(path).size;
  }
  return bytes;
}

/** Free bytes where `path` will be, undefined when the system does not say. */
export function freeBytes(path: string): number | undefined {
  for (let place = path;; place = dirname(place)) {
    try {
      const { bavail, bsize } = statfsSync(place);
      return bavail * bsize;
    } catch (cause) {
      if (errorCode(cause) !== "ENOENT" || dirname(place) === place) return undefined;
    }
  }
}
