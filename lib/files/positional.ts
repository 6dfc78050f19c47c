/** Positional file access that always moves every byte, and file-system errors in the project's classes. */
import {
  closeSync,
  constants,
  fstatSync,
  lstatSync,
  openSync,
  readSync,
  rmSync,
  statSync,
  writeSync,
} from "node:fs";
import { CheckpointError, OutputError } from "../errors.ts";

/** Bytes of one system call: Linux stops at 2 GiB − 4 KiB, and some runtimes keep lengths in 31 bits. */
const MAX_CALL_BYTES = 2 ** 30;

/** Longest piece of foreign text in a message. */
const MAX_SHOWN_LENGTH = 300;

/** A foreign text for a message: quoted, shortened, with every control and format character escaped. */
export function quote(text: string): string {
  return show(text.length > MAX_SHOWN_LENGTH ? `${text.slice(0, MAX_SHOWN_LENGTH)}…` : text);
}

/** A parsed JSON value for a message, made as harmless as by {@linkcode quote}. */
export function show(value: unknown): string {
  const text = JSON.stringify(value) ?? "nothing";
  const short = text.length > 2 * MAX_SHOWN_LENGTH ? `${text.slice(0, MAX_SHOWN_LENGTH)}…` : text;
  return short.replace(/\p{C}/gu, (c) => `\\u{${c.codePointAt(0)!.toString(16)}}`);
}

/** The `code` of a file-system error, as in `ENOENT`. */
export function errorCode(error: unknown): string | undefined {
  return error instanceof Error && "code" in error && typeof error.code === "string" ? error.code : undefined;
}

/** Reasons of a failed write by code, each with a remedy. */
const REMEDIES: Readonly<Record<string, string>> = {
  ENOSPC: "no space left on the device: free some or choose another folder, then continue with --resume",
  EDQUOT: "the disk quota is used up: free some space or choose another folder, then continue with --resume",
  EFBIG: "the file is larger than the file system or the process limit allows: choose another folder",
  EACCES: "no permission: choose a folder that you may write to",
  EPERM: "no permission: choose a folder that you may write to",
  EROFS: "the file system is read-only: choose another folder",
  EIO: "the device reported an error: check the disk or choose another folder",
  ENOENT: "no such file or folder: create the folder first",
  EEXIST: "something has that name: move it away, or choose another name",
  ENAMETOOLONG: "the name is too long for the file system: choose a shorter one",
  ELOOP: "a link has that name, or links lead in a circle: delete it or choose another path",
  ERR_INVALID_ARG_VALUE: "no path has a null character: choose another one",
  ENOTDIR: "a part of the path is a file: choose another folder",
  EISDIR: "a folder has that name: choose another name",
  ERR_FS_EISDIR: "a folder has that name: move it away",
  EMFILE: "too many files are open: raise the limit (ulimit -n)",
  ENFILE: "too many files are open: raise the limit (ulimit -n)",
};

/** A failed write, sync, rename or the like as an error with a way out. */
export function outputError(doing: string, path: string, cause: unknown): OutputError {
  const why = REMEDIES[errorCode(cause) ?? ""] ?? (cause instanceof Error ? cause.message : String(cause));
  return new OutputError(`Cannot ${doing} ${quote(path)}: ${why}`, { path, cause });
}

/** Runs a step of writing. @throws {OutputError} when it fails */
export function writing<T>(doing: string, path: string, run: () => T): T {
  try {
    return run();
  } catch (cause) {
    throw outputError(doing, path, cause);
  }
}

/** Runs a step of reading an input. @throws {CheckpointError} when it fails */
export function reading<T>(path: string, run: () => T): T {
  try {
    return run();
  } catch (cause) {
    throw inputError(path, cause);
  }
}

/** A failed open or read of an input. */
export function inputError(path: string, cause: unknown): CheckpointError {
  const code = errorCode(cause);
  const why = code === "ENOENT"
    ? lstatSync(path, { throwIfNoEntry: false })?.isSymbolicLink() === true
      ? "a link that leads nowhere: the file it stands for is missing, fetch the model again"
      : "no such file or folder"
    : code === "EACCES" || code === "EPERM"
    ? "no permission to read it: let its owner change that (chmod a+r, for a folder a+rx), or copy it"
    : cause instanceof Error
    ? cause.message
    : String(cause);
  return new CheckpointError(`Cannot open ${quote(path)}: ${why}`, { path, cause });
}

/** Opening for reading that does not wait for the other end of a pipe; Windows has no such flag. */
const READ_AT_ONCE = constants.O_RDONLY | (constants.O_NONBLOCK ?? 0);

/**
 * Opens a regular file: the only way in which lib opens a file to read it. Pipes, devices and folders are
 * refused: they may have no end, or wait for ever. The kind is looked at before, because opening a device may
 * act on it, and again after, because the name may lead elsewhere by then.
 *
 * @throws {CheckpointError} when it does not exist, is no regular file, or may not be read
 */
export function openForReading(path: string): number {
  const fd = reading(path, () => statSync(path).isFile() ? openSync(path, READ_AT_ONCE) : undefined);
  if (fd !== undefined && fstatSync(fd).isFile()) return fd;
  if (fd !== undefined) closeSync(fd);
  throw new CheckpointError(`Cannot open ${quote(path)}: must be a regular file`, { path });
}

/** Flags that open what is there to write to it, never through a link; Windows has no such flag. */
export const WRITE_IN_PLACE = constants.O_RDWR | (constants.O_NOFOLLOW ?? 0);

/** Opens a file to go on with it; one with another name as well (a hard link) may be somebody's copy. */
export function openToGoOn(path: string): number {
  const fd = openSync(path, WRITE_IN_PLACE), { nlink } = fstatSync(fd);
  if (nlink <= 1) return fd;
  closeSync(fd);
  throw new Error(`it must have one name, got ${nlink} (hard links): copy it, or start over with --force`);
}

/** Opens a new file; whatever has its name, a link as well, is an error of the system (`EEXIST`). */
export function createNew(path: string): number {
  return openSync(path, WRITE_IN_PLACE | constants.O_CREAT | constants.O_EXCL);
}

/**
 * Opens a new file in place of an unfinished one of that name, which begins as `isUnfinished` says. What is
 * something else, a link as well, stays and is an error of the system (`EEXIST`).
 */
export function createInPlaceOf(path: string, isUnfinished: (start: Uint8Array) => boolean): number {
  if (lstatSync(path, { throwIfNoEntry: false })?.isFile()) {
    const fd = openForReading(path), start = new Uint8Array(16);
    const bytes = start.subarray(0, readFully(fd, start, 0, path));
    closeSync(fd);
    // Not emptied: the same bytes may have another name as well, elsewhere.
    if (bytes.length === 0 || isUnfinished(bytes)) rmSync(path);
  }
  return createNew(path);
}

/**
 * Fills `target` from `position` on; stops early only at the end of the file. Returns the bytes read.
 *
 * @throws {CheckpointError} when the system refuses
 */
export function readFully(fd: number, target: Uint8Array, position: number, path: string): number {
  return reading(path, () => {
    let done = 0;
    while (done < target.length) {
      const wanted = Math.min(target.length - done, MAX_CALL_BYTES);
      const got = readSync(fd, target, done, wanted, position + done);
      if (got === 0) break;
      done += got;
    }
    return done;
  });
}

/** Writes all of `bytes` at `position`. @throws {OutputError} when the system refuses */
export function writeFully(fd: number, bytes: Uint8Array, position: number, path: string): void {
  writing("write", path, () => {
    for (let done = 0; done < bytes.length;) {
      const wanted = Math.min(bytes.length - done, MAX_CALL_BYTES);
      const written = writeSync(fd, bytes, done, wanted, position + done);
      if (written === 0) throw new Error(`the system took 0 of ${wanted} bytes`);
      done += written;
    }
  });
}

/**
 * Checks that `[byteStart, byteStart + bytes)` lies inside a tensor of `byteLength` bytes.
 *
 * @throws {RangeError} when it does not
 */
export function checkByteRange(name: string, byteStart: number, bytes: number, byteLength: number): void {
  if (Number.isSafeInteger(byteStart) && byteStart >= 0 && bytes >= 0 && byteStart + bytes <= byteLength) {
    return;
  }
  throw new RangeError(
    `Cannot access tensor ${quote(name)}: range must lie in its ${byteLength} bytes, ` +
      `got [${byteStart}, ${byteStart + bytes})`,
  );
}
