/**
 * One large file, written from its start to its end: each write is read back and compared, and the name
 * stands for all of it or for what it was before. Until it is finished it is called `<path>.partial`, and its
 * first bytes are 0, which no reader takes.
 */
import { Buffer } from "node:buffer";
import { createHash } from "node:crypto";
import { closeSync, fsyncSync, rmSync } from "node:fs";
import { dirname } from "node:path";
import { IntegrityError, OutputError } from "../errors.ts";
import { createInPlaceOf, outputError, quote, readFully, writeFully, writing } from "./positional.ts";
import { checkReplaceable } from "./results.ts";
import { type FileDigest, freeBytes, ownKind, rename, syncFolder } from "./whole.ts";

/** Bytes at the start that are written last. */
const START_BYTES = 8;

/** Checks that a file of this name may be written. @throws {OutputError} with the way out */
export function checkStreamedFile(path: string, bytes: number, force: boolean): void {
  const kind = ownKind(path);
  if (kind === "folder") {
    throw new OutputError(`Cannot write ${quote(path)}: must be a file, got a folder`, { path });
  }
  if (kind !== "nothing" && !force) {
    const reason = "must not exist, got a file: choose another name, or give --force to replace it";
    throw new OutputError(`Cannot write ${quote(path)}: ${reason}`, { path });
  }
  checkReplaceable(path);
  const free = freeBytes(dirname(path));
  if (free === undefined || free >= bytes) return;
  const reason = `the file system must have ${bytes} free bytes, got ${free}`;
  throw new OutputError(`Cannot write ${quote(path)}: ${reason}: free some space or choose another folder`, {
    path,
  });
}

/** A file being written; disposed of before it is finished, it leaves nothing behind. */
export class StreamedFile {
  readonly #partial: string;
  readonly #hash = createHash("sha256");
  readonly #start = new Uint8Array(START_BYTES);
  #fd: number | undefined;
  #readBack = new Uint8Array(0);
  #bytes = 0;

  /** Begins a file in place of an unfinished one. @throws {OutputError} when the system refuses */
  constructor(readonly path: string) {
    this.#partial = `${path}.partial`;
    try {
      this.#fd = createInPlaceOf(
        this.#partial,
        (start) => start.subarray(0, START_BYTES).every((byte) => byte === 0),
      );
    } catch (cause) {
      throw outputError("open", this.#partial, cause);
    }
  }

  /** Bytes so far. */
  get bytes(): number {
    return this.#bytes;
  }

  /**
   * Appends bytes, reads them back and compares.
   *
   * @throws {IntegrityError} when something else is read back
   * @throws {OutputError} when the system refuses
   */
  write(data: ArrayBufferView<ArrayBuffer>): void {
    const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    const place = this.#bytes, hidden = Math.min(bytes.length, Math.max(0, START_BYTES - place));
    this.#hash.update(bytes);
    this.#bytes += bytes.length;
    this.#start.set(bytes.subarray(0, hidden), Math.min(place, START_BYTES));
    if (hidden > 0) writeFully(this.#fd!, new Uint8Array(hidden), place, this.#partial);
    if (hidden < bytes.length) this.#put(bytes.subarray(hidden), place + hidden);
  }

  #put(bytes: Uint8Array, position: number): void {
    writeFully(this.#fd!, bytes, position, this.#partial);
    if (this.#readBack.length < bytes.length) this.#readBack = new Uint8Array(bytes.length);
    const readBack = this.#readBack.subarray(0, bytes.length);
    const got = readFully(this.#fd!, readBack, position, this.#partial);
    if (got === bytes.length && Buffer.compare(readBack, bytes) === 0) return;
    const reason =
      `bytes from ${position} on must be read back as written, got others: check disk and memory`;
    throw new IntegrityError(`Cannot verify ${quote(this.#partial)}: ${reason}`, { path: this.#partial });
  }

  /** Makes the file durable and gives it its name. @throws {OutputError} when the system refuses */
  finish(): FileDigest {
    this.#put(this.#start.subarray(0, Math.min(START_BYTES, this.#bytes)), 0);
    const fd = this.#fd!;
    writing("sync", this.#partial, () => fsyncSync(fd));
    this.#close();
    rename(this.#partial, this.path);
    syncFolder(dirname(this.path));
    return { bytes: this.#bytes, sha256: this.#hash.digest("hex") };
  }

  #close(): void {
    const fd = this.#fd;
    this.#fd = undefined;
    if (fd !== undefined) writing("close", this.#partial, () => closeSync(fd));
  }

  [Symbol.dispose](): void {
    if (this.#fd === undefined) return;
    this.#close();
    rmSync(this.#partial, { force: true });
  }
}
