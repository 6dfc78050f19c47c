/**
 * Writing safetensors files tensor by tensor, in bounded memory, resumable. The header comes last, into space
 * reserved for it; until then the file is called `<path>.partial` and starts with a length of 0, which no
 * reader takes.
 */
import { Buffer } from "node:buffer";
import { closeSync, fstatSync, fsyncSync, ftruncateSync, renameSync } from "node:fs";
import { dirname } from "node:path";
import { IntegrityError, OutputError } from "../errors.ts";
import {
  checkByteRange,
  createInPlaceOf,
  errorCode,
  openToGoOn,
  outputError,
  quote,
  readFully,
  writeFully,
  writing,
} from "../files/positional.ts";
import { syncFolder } from "../files/whole.ts";
import { BYTES_PER_ELEMENT, isDtype } from "./dtype.ts";
import {
  elementCount,
  LENGTH_BYTES,
  MAX_DIMENSIONS,
  MAX_HEADER_BYTES,
  MAX_TENSOR_BYTES,
  MAX_TENSORS,
  METADATA_KEY,
  nameFault,
  type TensorInfo,
  type TensorSpec,
} from "./safetensors.ts";

/** Suffix of an unfinished file's name. */
export const PARTIAL_SUFFIX = ".partial";

/** How to begin a file. */
export interface WriterOptions {
  /** Room for the header, a multiple of 8; see {@linkcode SafetensorsWriter.headerBytes}. */
  readonly reservedHeaderBytes: number;
  /** Text about the file. */
  readonly metadata?: Readonly<Record<string, string>>;
}

/** How to go on with a file. */
export interface ResumeOptions extends WriterOptions {
  /** The tensors that are complete, in the order in which they were added. */
  readonly tensors: readonly TensorSpec[];
}

/** Entries of a header, and spaces behind them, that are written at once. */
const ENTRIES_PER_BLOCK = 2000, SPACES_PER_BLOCK = 2 ** 18;

/** Of a tensor that nothing was written to. */
const NOTHING: Entry["written"] = Object.freeze([]);

/** A tensor on its way into the file. */
interface Entry {
  readonly info: TensorInfo;
  readonly headerBytes: number;
  /** Written byte ranges inside the tensor: ascending, not touching. */
  written: readonly (readonly [start: number, end: number])[] | "all";
}

/**
 * A safetensors file being written.
 *
 * A stopped run leaves `<path>.partial`; {@linkcode SafetensorsWriter.resume} goes on with it, and the
 * finished file is the same to the byte. Only after {@linkcode SafetensorsWriter.finish} is there a file at
 * `path`; one that was there before is replaced at that moment, in one step.
 *
 * @example
 * ```ts
 * import { mkdtempSync } from "node:fs";
 * import { tmpdir } from "node:os";
 *
 * const specs = [{ name: "weight", dtype: "F16", shape: [2, 3] }] as const;
 * using writer = SafetensorsWriter.create(`${mkdtempSync(`${tmpdir()}/example-`)}/model.safetensors`, {
 *   reservedHeaderBytes: SafetensorsWriter.headerBytes(specs),
 * });
 * writer.add(specs);
 * writer.write("weight", 0, new Uint8Array(12));
 * writer.finish();
 * ```
 */
export class SafetensorsWriter {
  /** Path of the unfinished file. */
  readonly partialPath: string;
  readonly #metadataText: string;
  readonly #reserved: number;
  readonly #entries: Entry[] = [];
  readonly #byName = new Map<string, Entry>();
  #headerBytes: number;
  #fd: number | undefined;

  private constructor(
    /** Path of the finished file. */
    readonly path: string,
    options: WriterOptions,
    mode: "w+" | "r+",
  ) {
    const { reservedHeaderBytes: reserved, metadata = {} } = options;
    this.partialPath = path + PARTIAL_SUFFIX;
    this.#metadataText = metadataText(metadata);
    this.#headerBytes = 2 + Buffer.byteLength(this.#metadataText);
    this.#reserved = reserved;
    if (!Number.isInteger(reserved) || reserved % 8 !== 0 || reserved < 8 || reserved > MAX_HEADER_BYTES) {
      const wanted = `a multiple of 8 from 8 to ${MAX_HEADER_BYTES}`;
      throw new RangeError(
        `Cannot write ${quote(path)}: reservedHeaderBytes must be ${wanted}, got ${reserved}`,
      );
    }
    this.#checkHeaderFits(this.#headerBytes);
    try {
      this.#fd = mode === "w+"
        ? createInPlaceOf(this.partialPath, isUnfinished)
        : openToGoOn(this.partialPath);
    } catch (cause) {
      if (mode === "w+" || errorCode(cause) !== "ENOENT") throw outputError("open", this.partialPath, cause);
      const reason = "it must exist, got no such file: start again without --resume";
      throw new OutputError(`Cannot resume ${quote(this.partialPath)}: ${reason}`, {
        path: this.partialPath,
        cause,
      });
    }
  }

  /**
   * Begins a file; an unfinished one of the same name is overwritten.
   *
   * @throws {OutputError} when the system refuses
   * @throws {RangeError} when the reserved header is not a multiple of 8, too large, or too small for the
   *   metadata
   */
  static create(path: string, options: WriterOptions): SafetensorsWriter {
    return new SafetensorsWriter(path, options, "w+");
  }

  /**
   * Goes on with an unfinished file: keeps the bytes of the tensors given, drops whatever follows them. The
   * reserved header and the metadata must be what the file was begun with.
   *
   * @throws {IntegrityError} when the unfinished file is shorter than these tensors
   * @throws {OutputError} when there is no unfinished file or the system refuses
   */
  static resume(path: string, options: ResumeOptions): SafetensorsWriter {
    const writer = new SafetensorsWriter(path, options, "r+");
    try {
      writer.add(options.tensors);
      for (const entry of writer.#entries) entry.written = "all";
      const dataEnd = writer.#dataEnd();
      const size = writer.#attempt("read", (fd) => fstatSync(fd).size);
      if (size < dataEnd && options.tensors.length > 0) {
        throw new IntegrityError(
          `Cannot resume ${quote(writer.partialPath)}: it must have the ${dataEnd} bytes of its ` +
            `${options.tensors.length} complete tensors, got ${size}: start again without --resume`,
          { path: writer.partialPath },
        );
      }
      writer.#attempt("truncate", (fd) => ftruncateSync(fd, Math.min(size, dataEnd)));
      // A run stopped inside finish() may have left a header that is about to become wrong.
      writeFully(writer.#open(), new Uint8Array(LENGTH_BYTES), 0, writer.partialPath);
      return writer;
    } catch (error) {
      writer.close();
      throw error;
    }
  }

  /**
   * An upper bound of the header of these tensors wherever they come to lie, a multiple of 8. If a tensor may
   * change on the way (more bits), give its largest shape.
   *
   * @throws {RangeError} when no file can have such a header
   */
  static headerBytes(specs: Iterable<TensorSpec>, metadata: Readonly<Record<string, string>> = {}): number {
    let bytes = 2 + Buffer.byteLength(metadataText(metadata));
    let tensors = 0;
    for (const spec of specs) {
      tensors++;
      bytes += 1 + Buffer.byteLength(entryText(spec, MAX_TENSOR_BYTES, MAX_TENSOR_BYTES));
    }
    bytes = Math.ceil(bytes / 8) * 8;
    if (bytes <= MAX_HEADER_BYTES) return bytes;
    throw new RangeError(
      `Cannot write ${tensors} tensors to one file: header must have at most ${MAX_HEADER_BYTES} bytes, got ${bytes}`,
    );
  }

  /** Tensors added so far, in their order. */
  get tensors(): readonly TensorInfo[] {
    return this.#entries.map(({ info }) => info);
  }

  /**
   * Gives the tensors the next bytes of the file, in this order, and returns their places. Adds all or none.
   *
   * The shapes are kept, not copied.
   *
   * @throws {RangeError} on a repeated or impossible name, an impossible shape, or when the header would not
   *   fit
   */
  add(specs: readonly TensorSpec[]): TensorInfo[] {
    const added: Entry[] = [];
    const names = new Set<string>();
    let byteOffset = this.#dataEnd();
    let headerBytes = this.#headerBytes;
    for (const spec of specs) {
      const byteLength = this.#checkSpec(spec, byteOffset);
      if (this.#byName.has(spec.name) || names.has(spec.name)) {
        throw this.#rejection(spec.name, "name must be new, got one that was added before");
      }
      names.add(spec.name);
      const { name, dtype, shape } = spec;
      const elements = byteLength / BYTES_PER_ELEMENT[dtype];
      const info: TensorInfo = { name, dtype, shape, byteOffset, byteLength, elements };
      const entryBytes = 1 + Buffer.byteLength(this.#entryText(info));
      added.push({ info, headerBytes: entryBytes, written: NOTHING });
      byteOffset += byteLength;
      headerBytes += entryBytes;
    }
    this.#checkHeaderFits(headerBytes);
    if (this.#entries.length + added.length > MAX_TENSORS) {
      throw new RangeError(
        `Cannot write ${quote(this.path)}: it must have at most ${MAX_TENSORS} tensors, got more`,
      );
    }
    for (const entry of added) {
      this.#entries.push(entry);
      this.#byName.set(entry.info.name, entry);
    }
    this.#headerBytes = headerBytes;
    return added.map(({ info }) => info);
  }

  /**
   * Drops the newest `count` tensors with their bytes, so that others can take their place.
   *
   * @throws {RangeError} when there are fewer
   * @throws {OutputError} when the system refuses
   */
  removeLast(count: number): void {
    if (!Number.isInteger(count) || count < 0 || count > this.#entries.length) {
      const wanted = `count must be from 0 to ${this.#entries.length}`;
      throw new RangeError(`Cannot remove tensors of ${quote(this.path)}: ${wanted}, got ${count}`);
    }
    for (const { info, headerBytes } of this.#entries.splice(this.#entries.length - count)) {
      this.#byName.delete(info.name);
      this.#headerBytes -= headerBytes;
    }
    const dataEnd = this.#dataEnd();
    this.#attempt("truncate", (fd) => {
      if (fstatSync(fd).size > dataEnd) ftruncateSync(fd, dataEnd);
    });
  }

  /**
   * Writes bytes of a tensor from `byteStart` on; ranges may come in any order and again.
   *
   * @throws {RangeError} when the range leaves the tensor or no such tensor was added
   * @throws {OutputError} when the system refuses
   */
  write(name: string, byteStart: number, bytes: Uint8Array): void {
    const entry = this.#entry(name);
    const { byteOffset, byteLength } = entry.info;
    checkByteRange(name, byteStart, bytes.length, byteLength);
    writeFully(this.#open(), bytes, byteOffset + byteStart, this.partialPath);
    if (bytes.length === 0 || entry.written === "all") return;
    const written = joinRanges(entry.written, byteStart, byteStart + bytes.length);
    entry.written = written[0]![1] - written[0]![0] === byteLength ? "all" : written;
  }

  /**
   * Fills `target` with what was written to a tensor, from `byteStart` on.
   *
   * @throws {RangeError} when the range leaves the tensor or no such tensor was added
   * @throws {IntegrityError} when some of it was never written or is gone
   */
  readInto(name: string, byteStart: number, target: Uint8Array): void {
    const { info, written } = this.#entry(name);
    checkByteRange(name, byteStart, target.length, info.byteLength);
    const byteEnd = byteStart + target.length;
    const known = target.length === 0 || written === "all" ||
      written.some(([start, end]) => start <= byteStart && byteEnd <= end);
    if (
      known &&
      readFully(this.#open(), target, info.byteOffset + byteStart, this.partialPath) === target.length
    ) return;
    const path = this.partialPath, got = known ? "a shorter file" : "not all of them";
    const reason = `bytes [${byteStart}, ${byteEnd}) must have been written, got ${got}`;
    const message = `Cannot read back tensor ${quote(name)} of ${quote(path)}: ${reason}`;
    throw new IntegrityError(message, { path, tensor: name });
  }

  /**
   * Makes everything written so far survive a crash of the machine.
   *
   * @throws {OutputError} when the system refuses
   */
  sync(): void {
    this.#attempt("sync", fsyncSync);
  }

  /**
   * Writes the header, makes the file durable and gives it its name.
   *
   * @throws {IntegrityError} when a tensor is not completely written or the file has not the size it must
   *   have
   * @throws {OutputError} when the system refuses; the unfinished file stays
   */
  finish(): { path: string; bytes: number } {
    for (const { info, written } of this.#entries) {
      if (written === "all") continue;
      const bytes = written.reduce((sum, [start, end]) => sum + end - start, 0);
      if (bytes !== info.byteLength) {
        throw new IntegrityError(
          `Cannot finish ${quote(this.path)}: tensor ${quote(info.name)} must have its ${info.byteLength} ` +
            `bytes written, got ${bytes}`,
          { path: this.partialPath, tensor: info.name },
        );
      }
    }
    this.#writeHeader();
    this.sync();
    const bytes = this.#attempt("read", (fd) => fstatSync(fd).size);
    if (bytes !== this.#dataEnd()) {
      throw new IntegrityError(
        `Cannot finish ${quote(this.path)}: file must have ${this.#dataEnd()} bytes, got ${bytes}`,
        { path: this.partialPath },
      );
    }
    this.close();
    writing("rename the finished file to", this.path, () => renameSync(this.partialPath, this.path));
    syncFolder(dirname(this.path));
    return { path: this.path, bytes };
  }

  /** Closes the file unfinished, to be resumed. @throws {OutputError} when the system refuses */
  close(): void {
    const fd = this.#fd;
    this.#fd = undefined;
    if (fd !== undefined) writing("close", this.partialPath, () => closeSync(fd));
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /** Writes the header in blocks, then its length, which makes it one. */
  #writeHeader(): void {
    const end = LENGTH_BYTES + this.#reserved;
    let position = LENGTH_BYTES;
    const put = (text: string) => {
      const bytes = Buffer.from(text);
      writeFully(this.#open(), bytes, position, this.partialPath);
      position += bytes.length;
    };
    put(`{${this.#metadataText}`);
    let separator = this.#metadataText === "" ? "" : ",";
    for (let begin = 0; begin < this.#entries.length; begin += ENTRIES_PER_BLOCK) {
      const block = this.#entries.slice(begin, begin + ENTRIES_PER_BLOCK);
      put(separator + block.map(({ info }) => this.#entryText(info)).join(","));
      separator = ",";
    }
    put("}");
    while (position < end) put(" ".repeat(Math.min(SPACES_PER_BLOCK, end - position)));
    const length = Buffer.alloc(LENGTH_BYTES);
    length.writeBigUInt64LE(BigInt(this.#reserved));
    writeFully(this.#open(), length, 0, this.partialPath);
  }

  #open(): number {
    if (this.#fd !== undefined) return this.#fd;
    throw new TypeError(`Cannot access ${quote(this.partialPath)}: it must be open, got a closed file`);
  }

  #attempt<T>(doing: string, call: (fd: number) => T): T {
    const fd = this.#open();
    return writing(doing, this.partialPath, () => call(fd));
  }

  #entry(name: string): Entry {
    const entry = this.#byName.get(name);
    if (entry === undefined) throw this.#rejection(name, "it must have been added, got no such name");
    return entry;
  }

  #dataEnd(): number {
    const last = this.#entries.at(-1)?.info;
    return last === undefined ? LENGTH_BYTES + this.#reserved : last.byteOffset + last.byteLength;
  }

  #entryText(info: TensorInfo): string {
    const start = info.byteOffset - LENGTH_BYTES - this.#reserved;
    return entryText(info, start, start + info.byteLength);
  }

  #rejection(name: string, reason: string): RangeError {
    return new RangeError(`Cannot write tensor ${quote(name)} to ${quote(this.path)}: ${reason}`);
  }

  #checkHeaderFits(bytes: number): void {
    if (bytes <= this.#reserved) return;
    const wanted = `header must fit the ${this.#reserved} bytes reserved for it`;
    throw new RangeError(`Cannot write ${quote(this.path)}: ${wanted}, got ${bytes}`);
  }

  /** Bytes of a tensor that may be written at `byteOffset`. */
  #checkSpec({ name, dtype, shape }: TensorSpec, byteOffset: number): number {
    const fault = name === METADATA_KEY ? "that name is not a tensor's in this format" : nameFault(name);
    if (fault !== undefined) throw this.#rejection(name, fault);
    if (!isDtype(dtype)) {
      throw this.#rejection(name, `dtype must be a known one, got ${quote(String(dtype))}`);
    }
    if (shape.length > MAX_DIMENSIONS || !shape.every((d) => Number.isSafeInteger(d) && d >= 0)) {
      throw this.#rejection(name, `shape must be at most ${MAX_DIMENSIONS} integers ≥ 0, got [${shape}]`);
    }
    const bytes = (elementCount(shape) ?? Infinity) * BYTES_PER_ELEMENT[dtype];
    if (!Number.isInteger(bytes) && bytes < MAX_TENSOR_BYTES) {
      throw this.#rejection(name, `${dtype} must fill whole bytes, got shape [${shape}]`);
    }
    if (byteOffset + bytes > MAX_TENSOR_BYTES) {
      throw this.#rejection(name, `file must have at most 2^53 − 1 bytes, got shape [${shape}] of ${dtype}`);
    }
    return bytes;
  }
}

/** Whether a file begins with a length of 0, or with a header: stopped just before it got its name. */
const isUnfinished = (start: Uint8Array): boolean =>
  start.subarray(0, LENGTH_BYTES).every((byte) => byte === 0) || start[LENGTH_BYTES] === 0x7b;

function metadataText(metadata: Readonly<Record<string, string>>): string {
  const entries = Object.entries(metadata);
  for (const [key, value] of entries) {
    if (typeof value !== "string") {
      throw new TypeError(`Cannot write metadata ${quote(key)}: value must be a string, got ${typeof value}`);
    }
    if (!key.isWellFormed() || !value.isWellFormed()) {
      throw new RangeError(
        `Cannot write metadata ${quote(key)}: text must be valid Unicode, got half of a surrogate pair`,
      );
    }
  }
  return entries.length === 0 ? "" : `"${METADATA_KEY}":${JSON.stringify(metadata)}`;
}

function entryText({ name, dtype, shape }: TensorSpec, start: number, end: number): string {
  return `${JSON.stringify(name)}:{"dtype":"${dtype}","shape":[${shape}],"data_offsets":[${start},${end}]}`;
}

/** Adds a range to ascending ranges and joins those that touch it. */
function joinRanges(
  ranges: Exclude<Entry["written"], "all">,
  start: number,
  end: number,
): Exclude<Entry["written"], "all"> {
  const before = ranges.filter((range) => range[1] < start);
  const after = ranges.filter((range) => range[0] > end);
  for (const [s, e] of ranges.slice(before.length, ranges.length - after.length)) {
    start = Math.min(start, s);
    end = Math.max(end, e);
  }
  return [...before, [start, end], ...after];
}
