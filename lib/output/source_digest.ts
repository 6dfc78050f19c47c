/** Digests of what a run reads: of a tensor while it is read, and of tensors read for their digest alone. */
import { createHash, type Hash } from "node:crypto";
import { CHUNK_BYTES } from "./tensor_sink.ts";
import { pause } from "../progress.ts";
import type { Checkpoint, TensorFile } from "../tensor/mod.ts";

/** Reads a tensor of a file. */
export type TensorReader = Pick<TensorFile, "path" | "readInto">;

/** Reads as `file` does, and hashes what is read of a tensor as long as it comes in order. */
export class HashingReader implements TensorReader {
  #hash: Hash = createHash("sha256");
  #end = 0;

  constructor(readonly file: TensorFile) {}

  get path(): string {
    return this.file.path;
  }

  readInto(name: string, byteStart: number, target: Uint8Array): void {
    this.file.readInto(name, byteStart, target);
    if (byteStart === 0) [this.#hash, this.#end] = [createHash("sha256"), 0]; // from the start, also again
    if (byteStart !== this.#end) return;
    this.#hash.update(target);
    this.#end += target.length;
  }

  /** SHA-256 of the first `bytes` bytes; undefined where not exactly these were read in order. */
  digest(bytes: number): string | undefined {
    return this.#end === bytes ? this.#hash.copy().digest("hex") : undefined;
  }
}

/** SHA-256 of the bytes of tensors, one after the other; `between` runs after each piece and may stop it. */
export async function digestTensors(
  checkpoint: Checkpoint,
  names: Iterable<string>,
  between: () => Promise<void> = pause,
): Promise<string> {
  const hash = createHash("sha256"), buffer = new Uint8Array(CHUNK_BYTES);
  for (const name of names) {
    const { byteLength } = checkpoint.tensors.get(name)!.info;
    for (let start = 0; start < byteLength; start += CHUNK_BYTES) {
      const piece = buffer.subarray(0, Math.min(CHUNK_BYTES, byteLength - start));
      checkpoint.readInto(name, start, piece);
      hash.update(piece);
      await between();
    }
  }
  return hash.digest("hex");
}
