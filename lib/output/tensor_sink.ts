/** The entries of one tensor on their way to disk: each write is read back, compared and hashed. */
import { Buffer } from "node:buffer";
import { createHash, type Hash } from "node:crypto";
import { IntegrityError } from "../errors.ts";
import { quote } from "../files/positional.ts";
import { BYTES_PER_ELEMENT, elementCount, type SafetensorsWriter, type TensorSpec } from "../tensor/mod.ts";
import type { WrittenTensor } from "./journal.ts";

/** Source bytes handled at once, in whole rows: enough for the kernels, little memory. */
export const CHUNK_BYTES = 8 * 2 ** 20;

/** The entries of one tensor: opened with `begin`, filled in order with `write`. */
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

  /** Whether anything is stored. */
  get isStored(): boolean {
    return this.#writer !== undefined;
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
      const path = writer.partialPath, wanted = `bytes from ${entry.bytes} on must be read back as written`;
      const reason = `${wanted}, got others: check disk and memory`;
      const message = `Cannot verify tensor ${quote(name)} of ${quote(path)}: ${reason}`;
      throw new IntegrityError(message, { path, tensor: name });
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

  /** The stored entries with their digests. */
  finish(): WrittenTensor[] {
    const written = [...this.#entries.values()].map(({ spec: { name, dtype, shape }, hash }) => (
      { name, dtype, shape, sha256: hash.digest("hex") }
    ));
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
