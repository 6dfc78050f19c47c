/**
 * The one way through: reads a checkpoint tensor by tensor and writes another with the same files, in bounded memory,
 * verified, resumable. What happens to a tensor is a {@linkcode RewriteStep}; this file knows no quantization.
 */
import { Buffer } from "node:buffer";
import { createHash, type Hash } from "node:crypto";
import { open } from "node:fs/promises";
import { join } from "node:path";
import { pause, type RunEvent, type RunOptions } from "../progress.ts";
import { CalibrationError, IntegrityError, InterruptedError, OutputError, WeightsError } from "../errors.ts";
import {
  BYTES_PER_ELEMENT,
  elementCount,
  PARTIAL_SUFFIX,
  SafetensorsFile,
  SafetensorsWriter,
  type TensorSpec,
} from "../tensor/mod.ts";
import {
  digestFile,
  errorCode,
  exists,
  type FileDigest,
  freeBytes,
  outputError,
  quote,
  sha256,
  writeWhole,
} from "../files/whole.ts";
import type { JournalEntry, WrittenTensor } from "./journal.ts";
import { OutputFolder, type OutputRequest, verifyFiles } from "./output_folder.ts";
import type { LayerRecord, Manifest } from "./record.ts";

/** Source bytes handled at once, in whole rows: large enough for the kernels, small beside the memory promised. */
export const CHUNK_BYTES = 8 * 2 ** 20;

/** Written bytes after which the disk is set to work in the background, so that the last sync is short. */
const SYNC_BYTES = 64 * 2 ** 20;

/** One tensor of the input on its way into the output. */
export interface RewriteStep {
  readonly name: string;
  readonly weights: number;
  readonly bytes: number;
  /** Reads the tensor and gives the sink what is to be stored for it; may start over. */
  run(sink: TensorSink): Promise<LayerRecord>;
}

/** One file of the output. */
export interface RewriteFile {
  readonly name: string;
  readonly metadata: Readonly<Record<string, string>>;
  readonly reservedHeaderBytes: number;
  readonly steps: readonly RewriteStep[];
}

/** A small file of the output. */
export interface SmallFile {
  readonly name: string;
  readonly content: string | Uint8Array;
}

/** A whole run. */
export interface RewriteJob {
  readonly request: OutputRequest;
  readonly files: readonly RewriteFile[];
  /** Bytes that the output will take, about. */
  readonly outputBytes: number;
  /** Stop at the first tensor that cannot be quantized; otherwise name them all. */
  readonly failFast: boolean;
  /** What has to be done before the first tensor that is not done yet; may keep files in the work folder. */
  prepare?(work: string, isDone: (name: string) => boolean): Promise<void>;
  /** The files beside the tensors, once it is known what became of each tensor. */
  smallFiles(
    records: readonly LayerRecord[],
    /** Files by the names of the stored tensors. */
    tensorFiles: () => ReadonlyMap<string, string>,
  ): Iterable<SmallFile>;
}

/** What a run did. */
export interface RewriteResult {
  readonly manifest: Manifest;
  /** Tensors that an earlier run had finished. */
  readonly tensorsResumed: number;
  /** What each of the manifest's layers took; null where an earlier run had done it. */
  readonly milliseconds: readonly (number | null)[];
}

/**
 * Runs a job to its end, or to a state that can be resumed.
 *
 * @throws {OutputError} when the output may not or cannot be written
 * @throws {WeightsError} when tensors cannot be quantized; nothing is left behind
 * @throws {InterruptedError} when the signal stopped it
 * @throws {IntegrityError} when what is read back is not what was written
 */
export async function rewriteCheckpoint(job: RewriteJob, options: RunOptions = {}): Promise<RewriteResult> {
  checkSpace(job);
  const folder = OutputFolder.open(job.request);
  try {
    return await new Run(job, options, folder).run();
  } catch (error) {
    // The same run again would fail again: there is nothing to resume.
    if (error instanceof WeightsError || error instanceof CalibrationError) folder.discard();
    else if (error instanceof InterruptedError) folder.syncJournal();
    throw error;
  } finally {
    folder.release();
  }
}

/** What is stored for one tensor: entries opened with `begin`, filled in order with `write`. */
export class TensorSink {
  readonly #writer: SafetensorsWriter | undefined;
  readonly #between: (weights: number, bytes: number, written: number) => Promise<void>;
  #entries = new Map<string, { readonly spec: TensorSpec; readonly hash: Hash; bytes: number }>();
  #readBack = new Uint8Array(0);
  #written = 0;

  /** Without a writer nothing is stored: the run only looks for more tensors that cannot be quantized. */
  constructor(
    writer: SafetensorsWriter | undefined,
    between: (weights: number, bytes: number, written: number) => Promise<void>,
  ) {
    this.#writer = writer;
    this.#between = between;
  }

  /** Opens the entries that will be stored, in this order. */
  begin(specs: readonly TensorSpec[]): void {
    this.#writer?.add(specs);
    for (const spec of specs) this.#entries.set(spec.name, { spec, hash: createHash("sha256"), bytes: 0 });
  }

  /**
   * Appends bytes to an entry, reads them back and compares.
   *
   * @throws {IntegrityError} when something else is read back
   * @throws {OutputError} when the system refuses
   */
  write(name: string, data: ArrayBufferView<ArrayBuffer>): void {
    const writer = this.#writer;
    if (writer === undefined) return;
    const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    const entry = this.#entries.get(name)!;
    writer.write(name, entry.bytes, bytes);
    if (this.#readBack.length < bytes.length) this.#readBack = new Uint8Array(bytes.length);
    const readBack = this.#readBack.subarray(0, bytes.length);
    writer.readInto(name, entry.bytes, readBack);
    if (Buffer.compare(readBack, bytes) !== 0) {
      throw new IntegrityError(
        `Cannot verify tensor ${quote(name)} of ${
          quote(writer.partialPath)
        }: bytes from ${entry.bytes} on must be ` +
          "read back as written, got others: check disk and memory",
        { path: writer.partialPath, tensor: name },
      );
    }
    entry.hash.update(bytes);
    entry.bytes += bytes.length;
    this.#written += bytes.length;
  }

  /** Drops everything since `begin`, so that something else can be stored for the tensor. */
  discard(): void {
    this.#writer?.removeLast(this.#entries.size);
    this.#entries = new Map();
  }

  /** Reports progress and lets the process breathe; throws when it is to stop. */
  async advance(weights: number, bytes: number): Promise<void> {
    const written = this.#written;
    this.#written = 0;
    await this.#between(weights, bytes, written);
  }

  /** What was stored, with digests. */
  finish(): WrittenTensor[] {
    const written = [...this.#entries.values()].map(({ spec: { name, dtype, shape }, hash }) => ({
      name,
      dtype,
      shape,
      sha256: hash.digest("hex"),
    }));
    this.#entries = new Map();
    return written;
  }
}

/** Copies a tensor into the sink as it is. `source.readInto` fills a buffer from a byte on. */
export async function copyTensor(
  sink: TensorSink,
  spec: TensorSpec,
  readInto: (byteStart: number, target: Uint8Array<ArrayBuffer>) => void,
  buffer: Uint8Array<ArrayBuffer>,
): Promise<void> {
  const width = BYTES_PER_ELEMENT[spec.dtype];
  const byteLength = (elementCount(spec.shape) ?? 0) * width;
  sink.begin([{ name: spec.name, dtype: spec.dtype, shape: spec.shape }]);
  for (let start = 0; start < byteLength;) {
    const chunk = buffer.subarray(0, Math.min(CHUNK_BYTES, byteLength - start));
    readInto(start, chunk);
    sink.write(spec.name, chunk);
    start += chunk.length;
    await sink.advance(chunk.length / width, chunk.length);
  }
}

/** The state of one run. */
class Run {
  readonly #job: RewriteJob;
  readonly #options: RunOptions;
  readonly #folder: OutputFolder;
  /** What was finished; digests stay in the journal. */
  readonly #records: LayerRecord[] = [];
  readonly #milliseconds: (number | null)[] = [];
  /** Names of the tensors of each finished file. */
  readonly #names = new Map<string, readonly string[]>();
  readonly #digests: Record<string, FileDigest> = {};
  readonly #failures: WeightsError[] = [];
  readonly #totals: { readonly tensors: number; readonly weights: number; readonly bytes: number };
  #tensor = "";
  #weightsDone = 0;
  #bytesDone = 0;
  #bytesResumed = 0;
  #tensorsResumed = 0;
  #unsynced = 0;
  #sync: Promise<void> | undefined;
  #syncError: unknown;

  constructor(job: RewriteJob, options: RunOptions, folder: OutputFolder) {
    this.#job = job;
    this.#options = options;
    this.#folder = folder;
    const steps = job.files.flatMap((file) => file.steps);
    this.#totals = {
      tensors: steps.length,
      weights: steps.reduce((sum, { weights }) => sum + weights, 0),
      bytes: steps.reduce((sum, { bytes }) => sum + bytes, 0),
    };
  }

  async run(): Promise<RewriteResult> {
    const { start } = this.#folder;
    const done = (manifest: Manifest) => ({
      manifest,
      tensorsResumed: this.#totals.tensors,
      milliseconds: manifest.layers.map(() => null),
    });
    if (start.kind === "finished") {
      const path = this.#job.request.path;
      const [mismatch] = await verifyFiles(path, start.manifest);
      if (mismatch === undefined) {
        this.#event("resume", "the output is complete: nothing is left to do");
        this.#folder.clean();
        return done(start.manifest);
      }
      throw new IntegrityError(
        `Cannot resume ${quote(path)}: ${quote(mismatch.name)} ${mismatch.reason}; start over with --force`,
        { path: join(path, mismatch.name) },
      );
    }
    if (start.kind === "complete") {
      this.#event("resume", "every file is complete: only the last step is left to do");
      await this.#verifyComplete(start.manifest);
      this.#folder.commit(start.manifest);
      return done(start.manifest);
    }

    const journaled = start.kind === "resumed" ? start.entries : [];
    this.#folder.begin(journaled);
    if (journaled.length > 0) {
      this.#event("resume", `the journal names ${journaled.length} of ${this.#totals.tensors} tensors`);
    }
    // A tensor that had to be done again stands in the journal twice: the later line counts.
    const entries = new Map(journaled.map((entry) => [entry.record.name, entry]));
    await this.#job.prepare?.(this.#folder.work, (name) => entries.has(name));
    for (const file of this.#job.files) {
      if (this.#failures.length > 0) {
        for (const step of file.steps) await this.#step(step, undefined);
      } else {
        const missing = file.steps.findIndex(({ name }) => entries.get(name)?.record.file !== file.name);
        const known = missing < 0 ? file.steps : file.steps.slice(0, missing);
        await this.#file(file, known.map(({ name }) => entries.get(name)!));
      }
    }
    this.#throwFailures();
    return {
      manifest: await this.#finish(),
      tensorsResumed: this.#tensorsResumed,
      milliseconds: this.#milliseconds,
    };
  }

  async #file(file: RewriteFile, journaled: readonly JournalEntry[]): Promise<void> {
    const path = join(this.#folder.work, file.name);
    let known = journaled;
    if (exists(path)) {
      if (known.length === file.steps.length && await this.#isFinished(path, known)) {
        this.#resume(file, known);
        this.#names.set(file.name, known.flatMap(({ tensors }) => tensors.map(({ name }) => name)));
        this.#digests[file.name] = await digestFile(path, this.#breathe);
        return;
      }
      known = [];
    }
    using writer = await this.#writer(path, file, known);
    known = known.slice(0, entriesOf(known, writer.tensors.length));
    this.#resume(file, known);
    try {
      for (const step of file.steps.slice(known.length)) await this.#step(step, writer);
      await this.#sync;
      this.#throwSyncError();
      if (this.#failures.length > 0) return;
      writer.finish();
      this.#names.set(file.name, writer.tensors.map(({ name }) => name));
    } catch (error) {
      await this.#sync;
      if (error instanceof InterruptedError) writer.sync();
      throw this.#withNeed(error);
    }
    this.#digests[file.name] = await digestFile(path, this.#breathe);
  }

  async #step(step: RewriteStep, writer: SafetensorsWriter | undefined): Promise<void> {
    this.#tensor = step.name;
    const [weightsBefore, bytesBefore] = [this.#weightsDone, this.#bytesDone];
    const isLost = this.#failures.length > 0;
    const sink = new TensorSink(isLost ? undefined : writer, async (weights, bytes, written) => {
      // A tensor that is tried again does not count twice.
      this.#weightsDone = Math.min(this.#weightsDone + weights, weightsBefore + step.weights);
      this.#bytesDone = Math.min(this.#bytesDone + bytes, bytesBefore + step.bytes);
      this.#report();
      if (writer !== undefined) this.#startSync(written, writer.partialPath);
      await this.#breathe();
    });
    const started = performance.now();
    try {
      const record = await step.run(sink);
      const tensors = sink.finish();
      if (!isLost) {
        this.#folder.append({ record, tensors });
        this.#records.push(record);
        this.#milliseconds.push(performance.now() - started);
      }
    } catch (error) {
      if (!(error instanceof WeightsError) || this.#job.failFast) throw error;
      this.#failures.push(error);
    }
    this.#weightsDone = weightsBefore + step.weights;
    this.#bytesDone = bytesBefore + step.bytes;
    this.#report();
  }

  /** Takes over what an earlier run finished. */
  #resume(file: RewriteFile, known: readonly JournalEntry[]): void {
    for (const [i, entry] of known.entries()) {
      this.#records.push(entry.record);
      this.#milliseconds.push(null);
      this.#weightsDone += file.steps[i]!.weights;
      this.#bytesDone += file.steps[i]!.bytes;
      this.#bytesResumed += file.steps[i]!.bytes;
    }
    this.#tensorsResumed += known.length;
    this.#report();
  }

  /** Opens the file to be written, with those of the journal's tensors whose bytes are there. */
  async #writer(
    path: string,
    file: RewriteFile,
    known: readonly JournalEntry[],
  ): Promise<SafetensorsWriter> {
    const { metadata, reservedHeaderBytes } = file;
    if (known.length === 0 || !exists(path + PARTIAL_SUFFIX)) {
      return SafetensorsWriter.create(path, { metadata, reservedHeaderBytes });
    }
    for (let count = known.length; count > 0; count--) {
      const tensors = known.slice(0, count).flatMap((entry) => entry.tensors);
      let writer: SafetensorsWriter;
      try {
        writer = SafetensorsWriter.resume(path, { metadata, reservedHeaderBytes, tensors });
      } catch (error) {
        if (error instanceof IntegrityError || error instanceof RangeError) continue; // shorter than the journal
        throw error;
      }
      const good = await this.#countIntact(known.slice(0, count), (name, start, target) => {
        writer.readInto(name, start, target);
      });
      if (good < count) {
        const dropped = known.slice(good, count).flatMap((entry) => entry.tensors).length;
        writer.removeLast(dropped);
        this.#event(
          "warning",
          `${file.name}: ${count - good} tensors of the journal are not intact, done again`,
        );
      }
      return writer;
    }
    return SafetensorsWriter.create(path, { metadata, reservedHeaderBytes });
  }

  /** How many of the first entries have the bytes that the journal says. */
  async #countIntact(
    entries: readonly JournalEntry[],
    readInto: (name: string, byteStart: number, target: Uint8Array) => void,
  ): Promise<number> {
    const buffer = new Uint8Array(CHUNK_BYTES);
    for (const [i, { tensors }] of entries.entries()) {
      for (const { name, dtype, shape, sha256: wanted } of tensors) {
        const hash = createHash("sha256");
        const byteLength = (elementCount(shape) ?? 0) * BYTES_PER_ELEMENT[dtype];
        for (let start = 0; start < byteLength; start += CHUNK_BYTES) {
          const chunk = buffer.subarray(0, Math.min(CHUNK_BYTES, byteLength - start));
          readInto(name, start, chunk);
          hash.update(chunk);
          await this.#breathe();
        }
        if (hash.digest("hex") !== wanted) return i;
      }
    }
    return entries.length;
  }

  /** Whether a file that has its name holds exactly these tensors. */
  async #isFinished(path: string, known: readonly JournalEntry[]): Promise<boolean> {
    try {
      using file = SafetensorsFile.open(path);
      const specs = ({ name, dtype, shape }: TensorSpec) => ({ name, dtype, shape });
      const found = JSON.stringify([...file.tensors.values()].map(specs));
      if (found !== JSON.stringify(known.flatMap(({ tensors }) => tensors.map(specs)))) return false;
      const readInto = (name: string, start: number, target: Uint8Array) =>
        file.readInto(name, start, target);
      return await this.#countIntact(known, readInto) === known.length;
    } catch (error) {
      if (error instanceof InterruptedError) throw error;
      return false; // unreadable: written again
    }
  }

  async #verifyComplete(manifest: Manifest): Promise<void> {
    const { work } = this.#folder;
    const { path } = this.#job.request;
    for (const [name, wanted] of Object.entries(manifest.files)) {
      const place = exists(join(work, name)) ? join(work, name) : join(path, name);
      const found = exists(place) ? await digestFile(place, this.#breathe) : undefined;
      if (found?.sha256 === wanted.sha256) continue;
      throw new IntegrityError(
        `Cannot resume ${quote(path)}: ${quote(name)} must have SHA-256 ${wanted.sha256}, got ` +
          `${found?.sha256 ?? "no such file"}; start over with --force`,
        { path: place },
      );
    }
  }

  async #finish(): Promise<Manifest> {
    const { request } = this.#job;
    const records = this.#records;
    const tensorFiles = () =>
      new Map([...this.#names].flatMap(([file, names]) => names.map((name) => [name, file] as const)));
    await this.#breathe();
    for (const { name, content } of this.#job.smallFiles(records, tensorFiles)) {
      this.#digests[name] = writeWhole(join(this.#folder.work, name), content);
    }
    const files = Object.fromEntries(
      Object.entries(this.#digests).sort(([a], [b]) => a < b ? -1 : a > b ? 1 : 0),
    );
    const manifest: Manifest = {
      formatVersion: 1,
      identity: request.identity,
      settingsSha256: sha256(request.identity.settings),
      files,
      layers: records,
    };
    await this.#breathe();
    this.#event("commit", `moving ${Object.keys(files).length} finished files into ${quote(request.path)}`);
    this.#folder.commit(manifest);
    return manifest;
  }

  #report(): void {
    this.#options.onProgress?.({
      tensor: this.#tensor,
      tensorsDone: this.#records.length + this.#failures.length,
      ...this.#totals,
      weightsDone: this.#weightsDone,
      bytesDone: this.#bytesDone,
      bytesResumed: this.#bytesResumed,
    });
  }

  #event(kind: RunEvent["kind"], message: string): void {
    this.#options.onEvent?.({ kind, message });
  }

  /** Lets signals and finished syncs in; throws when the run is to stop. */
  readonly #breathe = async (): Promise<void> => {
    await pause();
    this.#throwSyncError();
    const { signal } = this.#options;
    if (!signal?.aborted) return;
    const name = typeof signal.reason === "string" ? signal.reason : "a signal";
    throw new InterruptedError(
      `Stopped by ${name} after ${this.#records.length} of ${this.#totals.tensors} tensors; ` +
        "repeat the command with --resume to go on",
      name,
    );
  };

  /** Sets the disk to work while the next chunks are computed. */
  #startSync(written: number, partialPath: string): void {
    this.#unsynced += written;
    if (this.#unsynced < SYNC_BYTES || this.#sync !== undefined) return;
    this.#unsynced = 0;
    const sync = async () => {
      const file = await open(partialPath, "r+");
      try {
        await file.datasync();
      } finally {
        await file.close();
      }
    };
    this.#sync = sync()
      .catch((cause) => {
        this.#syncError = outputError("sync", partialPath, cause);
      })
      .finally(() => {
        this.#sync = undefined;
      });
  }

  #throwSyncError(): void {
    const error = this.#syncError;
    this.#syncError = undefined;
    if (error !== undefined) throw error;
  }

  /** On a full disk, how much more it needs. */
  #withNeed(error: unknown): unknown {
    if (!(error instanceof OutputError) || !["ENOSPC", "EDQUOT"].includes(errorCode(error.cause) ?? "")) {
      return error;
    }
    const left = this.#job.outputBytes * (1 - this.#bytesDone / Math.max(1, this.#totals.bytes));
    return new OutputError(`${error.message} (about ${Math.ceil(left)} more bytes are needed)`, {
      ...(error.path === undefined ? {} : { path: error.path }),
      cause: error.cause,
    });
  }

  #throwFailures(): void {
    const [first] = this.#failures;
    if (first === undefined) return;
    if (this.#failures.length === 1) throw first;
    const lines = this.#failures.map(({ message }) => `\n  ${message}`);
    throw new WeightsError(`Cannot quantize ${this.#failures.length} tensors:${lines.join("")}`, {
      ...(first.path === undefined ? {} : { path: first.path }),
      ...(first.tensor === undefined ? {} : { tensor: first.tensor }),
      cause: first,
    });
  }
}

/** How many journal entries the first `count` written tensors are. */
function entriesOf(known: readonly JournalEntry[], count: number): number {
  let entries = 0;
  for (let tensors = 0; entries < known.length && tensors < count; entries++) {
    tensors += known[entries]!.tensors.length;
  }
  return entries;
}

/** Refuses early what a full disk would refuse late. */
function checkSpace({ request: { path, resume }, outputBytes }: RewriteJob): void {
  if (resume && exists(path)) return; // part of it is there already
  const free = freeBytes(path);
  if (free === undefined || free >= outputBytes) return;
  throw new OutputError(
    `Cannot write ${
      quote(path)
    }: the file system must have ${outputBytes} free bytes, got ${free}: free some ` +
      "space or choose another folder",
    { path },
  );
}
