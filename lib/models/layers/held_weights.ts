/**
 * Matrices of a checkpoint that are read when they are first needed and let go when others need their memory:
 * of those of the same size, otherwise of all, the one that was not used for longest.
 */
import { CheckpointError, FormatError } from "../../errors.ts";
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
    return this.#known(name) ?? this.#read(name, byteLength, read, this.#room(byteLength));
  }

  /**
   * A matrix's bytes before they are needed: where they fit into the limit, or into the memory of a matrix
   * that is not `needed`. One that cannot be read is left to {@linkcode take}, which says why.
   *
   * @param needed names of matrices that stay
   */
  takeAhead(
    name: string,
    byteLength: number,
    read: ReadMatrix,
    needed: ReadonlySet<string>,
  ): Uint8Array<ArrayBuffer> | undefined {
    const known = this.#known(name);
    if (known !== undefined) return known;
    const other = this.#fits(byteLength)
      ? undefined
      : [...this.#held].find(([own, { length }]) => length === byteLength && !needed.has(own));
    if (other === undefined && !this.#fits(byteLength)) return undefined;
    try {
      return this.#read(name, byteLength, read, other && this.#letGo(...other));
    } catch (error) {
      if (error instanceof CheckpointError || error instanceof FormatError) return undefined;
      throw error;
    }
  }

  /** One that is held; it was used last. */
  #known(name: string): Uint8Array<ArrayBuffer> | undefined {
    const known = this.#held.get(name);
    if (known !== undefined) {
      this.#held.delete(name);
      this.#held.set(name, known);
    }
    return known;
  }

  /** @param memory of a matrix that was let go */
  #read(
    name: string,
    byteLength: number,
    read: ReadMatrix,
    memory: Uint8Array<ArrayBuffer> | undefined,
  ): Uint8Array<ArrayBuffer> {
    throwIfStopped();
    const bytes = new Uint8Array(memory?.buffer ?? new ArrayBuffer(byteLength));
    read(bytes);
    this.#held.set(name, bytes);
    this.#bytes += byteLength;
    this.#bytesRead += byteLength;
    return bytes;
  }

  #fits(byteLength: number): boolean {
    return this.#bytes + byteLength <= this.limitBytes;
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
    if (this.#fits(byteLength)) return undefined;
    for (const [name, bytes] of this.#held) if (bytes.length === byteLength) return this.#letGo(name, bytes);
    for (const [name, bytes] of this.#held) {
      if (this.#fits(byteLength)) return undefined;
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
