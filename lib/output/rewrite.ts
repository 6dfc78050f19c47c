/**
 * Writes a checkpoint tensor by tensor, with the same files as the one that is read: in bounded memory,
 * verified, and so that a stopped run can be resumed. A {@linkcode RewriteStep} makes a tensor; nothing here
 * knows quantization.
 */
import { createHash } from "node:crypto";
import { open } from "node:fs/promises";
import { join } from "node:path";
import {
  CalibrationError,
  CheckpointError,
  IntegrityError,
  InterruptedError,
  MemoryError,
  OutputError,
  WeightsError,
} from "../errors.ts";
import {
  copyWhole,
  digestFile,
  errorCode,
  exists,
  type FileDigest,
  freeBytes,
  outputError,
  quote,
  remove,
  sha256,
  writeWhole,
} from "../files/whole.ts";
import { WRITE_IN_PLACE } from "../files/positional.ts";
import { pause, type RunEvent, type RunOptions, stoppable } from "../progress.ts";
import {
  BYTES_PER_ELEMENT,
  elementCount,
  PARTIAL_SUFFIX,
  SafetensorsFile,
  SafetensorsWriter,
  type TensorSpec,
} from "../tensor/mod.ts";
import type { JournalEntry } from "./journal.ts";
import {
  OutputFolder,
  type OutputRequest,
  type SourceState,
  TIME_STEP,
  verifyFiles,
} from "./output_folder.ts";
import type { Identity, LayerRecord, Manifest, RefinementRecord, SolverRecord } from "./record.ts";
import { CHUNK_BYTES, TensorSink } from "./tensor_sink.ts";

/** Written bytes after which the disk is set to work in the background, so that the last sync is short. */
const SYNC_BYTES = 64 * 2 ** 20;

/** One tensor of the input on its way into the output. */
export interface RewriteStep {
  readonly name: string;
  readonly weights: number;
  readonly bytes: number;
  /** Reads the tensor and gives the sink what is to be stored for it; may start over. */
  run(sink: TensorSink): Promise<LayerRecord>;
  /** Reads the tensor for its {@linkcode LayerRecord.sourceSha256} alone; `between` runs after each piece. */
  digest(between: () => Promise<void>): Promise<string>;
}

/** A safetensors file of the output, before it is known what its tensors become. */
export interface RewriteFile {
  readonly name: string;
  readonly metadata: Readonly<Record<string, string>>;
  readonly reservedHeaderBytes: number;
  /** Tensors of the input that it gets, in order. */
  readonly tensors: readonly string[];
}

/** A file of the output beside the tensors. */
export interface SmallFile {
  /** Path in the output, with slashes. */
  readonly name: string;
  readonly content: string | Uint8Array | { readonly copyOf: string };
}

/** An output as it is known before any tensor is made. */
export interface RewriteJob {
  readonly request: OutputRequest;
  readonly files: readonly RewriteFile[];
  /** Bytes that the output will take, about. */
  readonly outputBytes: number;
  /** Stop at the first tensor that cannot be quantized; otherwise name them all. */
  readonly failFast: boolean;
}

/** The content of an output. */
export interface RewriteContent {
  /** The job's files where more is known of them by now; default as they are there. */
  readonly files?: RewriteJob["files"] | undefined;
  /** The step of each tensor that {@linkcode RewriteFile.tensors} names. */
  readonly steps: ReadonlyMap<string, RewriteStep>;
  /** Where the configuration does not name the solver. */
  readonly solver?: SolverRecord | undefined;
  readonly refinement?: RefinementRecord | undefined;
  /** The files beside the tensors, at the end. @param tensorFiles files by the names of stored tensors */
  smallFiles(
    records: readonly LayerRecord[],
    tensorFiles: () => ReadonlyMap<string, string>,
  ): Iterable<SmallFile>;
}

/** Result of a run. */
export interface RewriteResult {
  readonly manifest: Manifest;
  /** Tensors that an earlier run had finished. */
  readonly tensorsResumed: number;
  /** Time of each of the manifest's layers; null where an earlier run had done it. */
  readonly milliseconds: readonly (number | null)[];
}

/**
 * Opens an output for `use`, which makes its content and writes it with {@linkcode Rewrite.write}. An error
 * leaves a state that can be resumed, or nothing where the same run would fail again.
 *
 * @throws {OutputError} when the output may not or cannot be written
 */
export async function withRewrite<T>(
  job: RewriteJob,
  options: RunOptions,
  use: (output: Rewrite) => Promise<T>,
): Promise<T> {
  checkSpace(job);
  const folder = await OutputFolder.open(job.request, options);
  try {
    const output = new Rewrite(job, options, folder);
    await output.begin();
    return await use(output);
  } catch (error) {
    // What an earlier run has done is not given up for data or files that can be put right.
    const isResumed = folder.start.kind === "resumed";
    const final = [WeightsError, SourceChangedError, ...(isResumed ? [] : [CalibrationError])];
    // With more memory the same run goes on from what it has.
    // So does one that was refused for want of space, which no system call has told.
    const isRefused = error instanceof MemoryError ||
      (error instanceof OutputError && error.cause === undefined);
    const isFinal = final.some((kind) => error instanceof kind) || (isRefused && !folder.holdsWork());
    if (isFinal) await folder.discard();
    else if (error instanceof InterruptedError || error instanceof MemoryError) folder.syncJournal();
    throw error;
  } finally {
    folder.release();
  }
}

/** The input was changed while it was read: what was made of it is of no use. */
class SourceChangedError extends CheckpointError {}

/** An output that is being written; {@linkcode withRewrite} opens one. */
export class Rewrite {
  readonly #job: RewriteJob;
  readonly #options: RunOptions;
  readonly #folder: OutputFolder;
  /** The journal's entries by tensor. One that was done again stands there twice: the later line counts. */
  readonly #entries: ReadonlyMap<string, JournalEntry>;
  /** Finished tensors; their digests stay in the journal. */
  readonly #records: LayerRecord[] = [];
  readonly #milliseconds: (number | null)[] = [];
  /** Names of the tensors of each finished file. */
  readonly #names = new Map<string, readonly string[]>();
  readonly #digests: Record<string, FileDigest> = {};
  readonly #failures: WeightsError[] = [];
  #totals = { tensors: 0, weights: 0, bytes: 0 };
  #tensor = "";
  #weightsDone = 0;
  #bytesDone = 0;
  #bytesResumed = 0;
  #tensorsResumed = 0;
  #unsynced = 0;
  #sync: Promise<void> | undefined;
  #syncError: unknown;
  readonly #begun = Date.now();
  readonly #sourceState: SourceState;

  constructor(job: RewriteJob, options: RunOptions, folder: OutputFolder) {
    this.#job = job;
    this.#sourceState = job.request.sourceState();
    this.#options = options;
    this.#folder = folder;
    const { start } = folder, journaled = start.kind === "resumed" ? start.entries : [];
    this.#entries = new Map(journaled.map((entry) => [entry.record.name, entry]));
  }

  /** Makes the folder ready for what is left to do. */
  async begin(): Promise<void> {
    const { start } = this.#folder, journaled = start.kind === "resumed" ? start.entries : [];
    if (this.isComplete) return;
    await this.#folder.begin(journaled);
    if ("badLine" in start && start.badLine !== undefined) {
      const found = `line ${start.badLine} of the journal is not as it was written`;
      this.#event("warning", `${found}: what it and the lines behind it name is done again`);
    }
    if (journaled.length === 0) return;
    const tensors = this.#job.files.reduce((sum, file) => sum + file.tensors.length, 0);
    this.#event("resume", `the journal names ${journaled.length} of ${tensors} tensors`);
  }

  /** Folder that gets the result. */
  get path(): string {
    return this.#job.request.path;
  }

  /** Folder of the unfinished files; others may keep their files there until the run is finished. */
  get work(): string {
    return this.#folder.work;
  }

  /** Equal identities give equal bytes. */
  get identity(): Identity {
    return this.#job.request.identity;
  }

  /** Of an earlier run that has made every file. */
  get manifest(): Manifest | undefined {
    const { start } = this.#folder;
    return "manifest" in start ? start.manifest : undefined;
  }

  /** Whether an earlier run has made every file: there is nothing to compute. */
  get isComplete(): boolean {
    return this.manifest !== undefined;
  }

  /** Whether an earlier run has stored a tensor. */
  isDone(name: string): boolean {
    return this.isComplete || this.#entries.has(name);
  }

  /**
   * Writes everything that is not there yet and commits it.
   *
   * @throws {OutputError} when the system refuses
   * @throws {WeightsError} when tensors cannot be quantized; nothing is left behind
   * @throws {InterruptedError} when the signal stopped it
   * @throws {IntegrityError} when what is read back is not what was written
   * @throws {CheckpointError} when the input was changed meanwhile; nothing is left behind
   */
  async write(content: RewriteContent): Promise<RewriteResult> {
    const steps = [...content.steps.values()];
    this.#totals = {
      tensors: steps.length,
      weights: steps.reduce((sum, { weights }) => sum + weights, 0),
      bytes: steps.reduce((sum, { bytes }) => sum + bytes, 0),
    };
    const { start } = this.#folder;
    if ("manifest" in start) {
      const { manifest } = start;
      await this.#checkSource(content, manifest.layers);
      if (start.kind === "finished") await this.#checkFinished(manifest);
      else await this.#commitComplete(manifest);
      return { manifest, tensorsResumed: steps.length, milliseconds: manifest.layers.map(() => null) };
    }
    await this.#checkSource(content, [...this.#entries.values()].map(({ record }) => record));
    for (const file of content.files ?? this.#job.files) await this.#file(file, content.steps);
    this.#throwFailures();
    await this.#checkUnchanged(content);
    return {
      manifest: await this.#finish(content),
      tensorsResumed: this.#tensorsResumed,
      milliseconds: this.#milliseconds,
    };
  }

  /** Checks that what an earlier run read is what is read now. */
  async #checkSource({ steps }: RewriteContent, records: readonly LayerRecord[]): Promise<void> {
    for (const { name, sourceSha256 } of records) {
      if (await steps.get(name)?.digest(this.#breathe) === sourceSha256) continue;
      throw this.#cannotResume(`the input must have the weights that it had, got others in ${quote(name)}`);
    }
  }

  /** Checks that the input is what it was when the run began. */
  async #checkUnchanged({ steps }: RewriteContent): Promise<void> {
    const { request: { sourceState, weights } } = this.#job,
      [before, now] = [this.#sourceState, sourceState()];
    const fail = (got: string, path?: string) => {
      const wanted = `the input must not change meanwhile, got ${got}: start over`;
      return new SourceChangedError(`Cannot finish ${quote(this.path)}: ${wanted}`, { path });
    };
    if (now.written !== before.written) throw fail("other times, sizes or settings of its files");
    // Times of writing can be set back.
    const young = now.changed.findIndex((time, i) =>
      time !== before.changed[i] || time + TIME_STEP >= this.#begun
    );
    const isOld = young < 0, path = now.paths[young];
    // Layers were solved on what was read before their tensors were read to be written.
    if (!isOld && weights !== undefined && await weights.digest() !== weights.sha256) {
      throw fail(`other weights than those that layers were solved on, ${quote(path!)} was changed`, path);
    }
    for (const { name, sourceSha256 } of isOld ? [] : this.#records) {
      if (await steps.get(name)!.digest(this.#breathe) !== sourceSha256) {
        throw fail(`other weights in ${quote(name)}`);
      }
    }
  }

  async #checkFinished(manifest: Manifest): Promise<void> {
    const { path } = this.#job.request;
    const [mismatch] = await verifyFiles(path, manifest);
    if (mismatch !== undefined) {
      const reason = `${quote(mismatch.name)} ${mismatch.reason}; move it away`; // not --force's to delete
      throw this.#cannotResume(reason, join(path, mismatch.name));
    }
    this.#event("resume", "the output is complete: nothing is left to do");
    await this.#folder.clean();
  }

  #cannotResume(reason: string, path = this.path): IntegrityError {
    const output = quote(this.#job.request.path);
    return new IntegrityError(`Cannot resume ${output}: ${reason}; start over with --force`, { path });
  }

  async #file(file: RewriteFile, steps: ReadonlyMap<string, RewriteStep>): Promise<void> {
    const own = file.tensors.map((name) => steps.get(name)!);
    if (this.#failures.length > 0) {
      for (const step of own) await this.#step(step, undefined);
      return;
    }
    const path = join(this.#folder.work, file.name);
    const missing = own.findIndex(({ name }) => this.#entries.get(name)?.record.file !== file.name);
    let known = own.slice(0, missing < 0 ? own.length : missing).map(({ name }) => this.#entries.get(name)!);
    if (exists(path)) {
      if (known.length === own.length && await this.#isFinished(path, known)) {
        this.#resume(own, known);
        this.#names.set(file.name, known.flatMap(({ tensors }) => tensors.map(({ name }) => name)));
        this.#digests[file.name] = await digestFile(path, this.#breathe);
        return;
      }
      known = [];
    }
    using writer = await this.#writer(path, file, known);
    known = known.slice(0, entriesOf(known, writer.tensors.length));
    this.#resume(own, known);
    try {
      for (const step of own.slice(known.length)) await this.#step(step, writer);
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
      const record = await this.#stoppable(() => step.run(sink));
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
  #resume(steps: readonly RewriteStep[], known: readonly JournalEntry[]): void {
    for (const [i, entry] of known.entries()) {
      this.#records.push(entry.record);
      this.#milliseconds.push(null);
      const { weights, bytes } = steps[i]!;
      this.#weightsDone += weights;
      this.#bytesDone += bytes;
      this.#bytesResumed += bytes;
    }
    this.#tensorsResumed += known.length;
    this.#report();
  }

  /** Opens the file to be written, with those of the journal's tensors whose bytes are there. */
  async #writer(path: string, file: RewriteFile, known: readonly JournalEntry[]): Promise<SafetensorsWriter> {
    const { metadata, reservedHeaderBytes } = file;
    for (let count = exists(path + PARTIAL_SUFFIX) ? known.length : 0; count > 0; count--) {
      const tensors = known.slice(0, count).flatMap((entry) => entry.tensors);
      let writer: SafetensorsWriter;
      try {
        writer = SafetensorsWriter.resume(path, { metadata, reservedHeaderBytes, tensors });
      } catch (error) {
        if (error instanceof IntegrityError || error instanceof RangeError) continue; // too short
        throw error;
      }
      const good = await this.#countIntact(known.slice(0, count), writer);
      if (good < count) {
        writer.removeLast(known.slice(good, count).flatMap((entry) => entry.tensors).length);
        this.#event(
          "warning",
          `${file.name}: ${count - good} tensors of the journal are not intact, done again`,
        );
      }
      return writer;
    }
    remove(path + PARTIAL_SUFFIX); // whatever is left of it
    return SafetensorsWriter.create(path, { metadata, reservedHeaderBytes });
  }

  /** Number of the first entries whose bytes have the journal's digests. */
  async #countIntact(
    entries: readonly JournalEntry[],
    file: Pick<SafetensorsFile, "readInto">,
  ): Promise<number> {
    const buffer = new Uint8Array(CHUNK_BYTES);
    for (const [i, { tensors }] of entries.entries()) {
      for (const { name, dtype, shape, sha256: wanted } of tensors) {
        const hash = createHash("sha256");
        const byteLength = (elementCount(shape) ?? 0) * BYTES_PER_ELEMENT[dtype];
        for (let start = 0; start < byteLength; start += CHUNK_BYTES) {
          const chunk = buffer.subarray(0, Math.min(CHUNK_BYTES, byteLength - start));
          file.readInto(name, start, chunk);
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
      return await this.#countIntact(known, file) === known.length;
    } catch (error) {
      if (error instanceof InterruptedError) throw error;
      return false; // unreadable: written again
    }
  }

  async #commitComplete(manifest: Manifest): Promise<void> {
    this.#event("resume", "every file is complete: only the last step is left to do");
    const { work } = this.#folder;
    const { path } = this.#job.request;
    for (const [name, wanted] of Object.entries(manifest.files)) {
      const place = exists(join(work, name)) ? join(work, name) : join(path, name);
      const found = exists(place) ? await digestFile(place, this.#breathe) : undefined;
      if (found?.sha256 === wanted.sha256) continue;
      const got = found?.sha256 ?? "no such file";
      throw this.#cannotResume(`${quote(name)} must have SHA-256 ${wanted.sha256}, got ${got}`, place);
    }
    await this.#folder.commit(manifest);
  }

  async #finish({ smallFiles, solver, refinement }: RewriteContent): Promise<Manifest> {
    const { request } = this.#job, records = this.#records;
    const tensorFiles = () =>
      new Map([...this.#names].flatMap(([file, names]) => names.map((name) => [name, file] as const)));
    await this.#breathe();
    for (const { name, content } of smallFiles(records, tensorFiles)) {
      const path = join(this.#folder.work, name);
      this.#digests[name] = typeof content === "object" && "copyOf" in content
        ? await copyWhole(content.copyOf, path, this.#breathe)
        : writeWhole(path, content);
    }
    const files = Object.fromEntries(
      Object.entries(this.#digests).sort(([a], [b]) => a < b ? -1 : a > b ? 1 : 0),
    );
    const { identity } = request, settingsSha256 = sha256(identity.settings);
    const manifest: Manifest = {
      formatVersion: 1,
      identity,
      settingsSha256,
      files,
      solver,
      refinement,
      layers: records,
    };
    await this.#breathe();
    this.#event("commit", `moving ${Object.keys(files).length} finished files into ${quote(request.path)}`);
    await this.#folder.commit(manifest);
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
  readonly #breathe = (): Promise<void> =>
    this.#stoppable(async () => {
      await pause(this.#options.signal);
      this.#throwSyncError();
    });

  #stoppable<T>(run: () => T | Promise<T>): Promise<T> {
    const done = `${this.#records.length} of ${this.#totals.tensors} tensors are done`;
    return stoppable(this.#options.signal, `${done}; repeat the command with --resume to go on`, run);
  }

  /** Sets the disk to work while the next chunks are computed. */
  #startSync(written: number, partialPath: string): void {
    this.#unsynced += written;
    if (this.#unsynced < SYNC_BYTES || this.#sync !== undefined) return;
    this.#unsynced = 0;
    const sync = async () => {
      const file = await open(partialPath, WRITE_IN_PLACE);
      try {
        await file.datasync();
      } finally {
        await file.close();
      }
    };
    this.#sync = sync()
      .catch((cause) => void (this.#syncError = outputError("sync", partialPath, cause)))
      .finally(() => this.#sync = undefined);
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
    const { message, path, cause } = error;
    return new OutputError(`${message} (about ${Math.ceil(left)} more bytes are needed)`, { path, cause });
  }

  #throwFailures(): void {
    const [first] = this.#failures;
    if (first === undefined) return;
    if (this.#failures.length === 1) throw first;
    const lines = this.#failures.map(({ message }) => `\n  ${message}`);
    const { path, tensor } = first,
      message = `Cannot quantize ${this.#failures.length} tensors:${lines.join("")}`;
    throw new WeightsError(message, { path, tensor, cause: first });
  }
}

/** Number of journal entries that the first `count` written tensors are. */
function entriesOf(known: readonly JournalEntry[], count: number): number {
  let entries = 0;
  for (let tensors = 0; entries < known.length && tensors < count; entries++) {
    tensors += known[entries]!.tensors.length;
  }
  return entries;
}

/** Refuses at once a disk that has too little space. */
function checkSpace({ request: { path, resume }, outputBytes }: RewriteJob): void {
  if (resume && exists(path)) return; // part of it is there already
  const free = freeBytes(path);
  if (free === undefined || free >= outputBytes) return;
  const reason = `the file system must have ${outputBytes} free bytes, got ${free}`;
  throw new OutputError(`Cannot write ${quote(path)}: ${reason}: free some space or choose another folder`, {
    path,
  });
}
