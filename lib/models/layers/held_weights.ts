/**
 * Matrices of a checkpoint that are read when they are first needed and let go when others need their memory:
 * of those of the same size, otherwise of all, the one that was not used for longest.
 */
import { giveBack } from "../../quant/array_memory.ts";
import { throwIfStopped } from "../../progress.ts";

/** Reads a matrix into memory of its size. */
export type ReadMatrix = (target: Uint8Array<ArrayBuffer>) => void;

/** Matrices in memory, up to a limit. A single one may pass it. */
export class HeldWeights {
  /** In the order in which they were last used. */
  readonly #held = new Map<string, Uint8Array<ArrayBuffer>>();
  #bytes = 0;
  #bytesRead = 0;

  /** @param limitBytes that matrices may take together; another one counts from the next that is read */
  constructor(public limitBytes: number) {}

  /** Bytes in memory. */
  get bytes(): number {
    return this.#bytes;
  }

  /** Bytes read so far: more than the model's where matrices were read again. */
  get bytesRead(): number {
    return this.#bytesRead;
  }

  /**
   * A matrix's bytes, valid until another one is asked for; the same view as long as they are held, and
   * another one once memory is read into again.
   */
  take(name: string, byteLength: number, read: ReadMatrix): Uint8Array<ArrayBuffer> {
    const known = this.#held.get(name);
    if (known !== undefined) {
      this.#held.delete(name);
      this.#held.set(name, known);
      return known;
    }
    throwIfStopped();
    const bytes = new Uint8Array(this.#room(byteLength)?.buffer ?? new ArrayBuffer(byteLength));
    read(bytes);
    this.#held.set(name, bytes);
    this.#bytes += byteLength;
    this.#bytesRead += byteLength;
    return bytes;
  }

  /** Lets all matrices go: those that are needed again are read again. */
  release(): void {
    giveBack(...this.#held.values());
    this.#held.clear();
    this.#bytes = 0;
  }

  /**
   * Lets matrices go until one more fits. Blocks are alike: mostly the memory of one of the same size is
   * taken as it is, so that nothing waits to be collected.
   */
  #room(byteLength: number): Uint8Array<ArrayBuffer> | undefined {
    if (this.#bytes + byteLength <= this.limitBytes) return undefined;
    for (const [name, bytes] of this.#held) if (bytes.length === byteLength) return this.#letGo(name, bytes);
    for (const [name, bytes] of this.#held) {
      if (this.#bytes + byteLength <= this.limitBytes) return undefined;
      giveBack(this.#letGo(name, bytes));
    }
    return undefined;
  }

  #letGo(name: string, bytes: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> {
    this.#held.delete(name);
    this.#bytes -= bytes.length;
    return bytes;
  }
}
