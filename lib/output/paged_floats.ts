/**
 * Arrays of numbers by name that together take more than memory: those that were used last are held, the
 * others lie in a file.
 */
import { closeSync } from "node:fs";
import { throwIfStopped } from "../progress.ts";
import { createInPlaceOf, inputError, readFully, writeFully, writing } from "../files/positional.ts";
import { remove } from "../files/whole.ts";
import { giveBack } from "../quant/array_memory.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Arrays as long as the longest that always have room, so that a step may use as many at once. */
export const TOGETHER = 6;

/** Where arrays are. */
export interface PagedFloatsOptions {
  /** Bytes that may be held; default all. Six arrays as long as the longest are held in any case. */
  readonly memoryBytes?: number | undefined;
  /** File for what is more, begun anew; without one all is held. */
  readonly path?: string | undefined;
}

/** An array in memory. */
interface HeldArray {
  readonly values: Floats;
  /** Whether the file has other values. */
  isChanged: boolean;
}

/** Arrays by name, at first of zeros. Each keeps its length. */
export class PagedFloats {
  readonly #memoryBytes: number;
  readonly #path: string | undefined;
  /** In the order in which they were last used. */
  readonly #held = new Map<string, HeldArray>();
  /** Places in the file. */
  readonly #places = new Map<string, number>();
  /** Of which the file has nothing, because they are zeros. */
  readonly #cleared = new Set<string>();
  #fd: number | undefined;
  #fileBytes = 0;
  #bytes = 0;
  #mostBytes = 0;
  #longest = 0;

  constructor({ memoryBytes = Infinity, path }: PagedFloatsOptions = {}) {
    this.#memoryBytes = path === undefined ? Infinity : memoryBytes;
    this.#path = path;
  }

  /** Most bytes that were in memory at once. */
  get mostBytes(): number {
    return this.#mostBytes;
  }

  /** Bytes of the file. */
  get fileBytes(): number {
    return this.#fileBytes;
  }

  /** An array that may be changed, valid until six others were asked for. */
  take(name: string, length: number): Floats {
    const held = this.#hold(name, length);
    held.isChanged = true;
    return held.values;
  }

  /** The same to be read alone: it is not written again. */
  read(name: string, length: number): Float32Array {
    return this.#hold(name, length).values;
  }

  /** Makes an array one of zeros, without reading it. */
  clear(name: string): void {
    const held = this.#held.get(name);
    if (held === undefined) this.#cleared.add(name);
    else {
      held.values.fill(0);
      held.isChanged = true;
    }
  }

  /** Lets all arrays go, and removes the file. */
  [Symbol.dispose](): void {
    this.#held.clear();
    this.#bytes = 0;
    const fd = this.#fd;
    if (fd === undefined) return;
    this.#fd = undefined;
    closeSync(fd);
    remove(this.#path!);
  }

  #hold(name: string, length: number): HeldArray {
    const known = this.#held.get(name);
    if (known !== undefined) {
      this.#held.delete(name);
      this.#held.set(name, known);
      return known;
    }
    this.#longest = Math.max(this.#longest, 4 * length);
    const place = this.#places.get(name), isStored = place !== undefined && !this.#cleared.has(name);
    const values = this.#room(length) ?? new Float32Array(length);
    if (isStored) this.#readInto(values, place);
    else values.fill(0);
    this.#cleared.delete(name);
    const held = { values, isChanged: !isStored };
    this.#held.set(name, held);
    this.#bytes += values.byteLength;
    this.#mostBytes = Math.max(this.#mostBytes, this.#bytes);
    return held;
  }

  /** Lets arrays go until one of this length fits. @returns memory of one of them that has that length */
  #room(length: number): Floats | undefined {
    const limit = Math.max(this.#memoryBytes, TOGETHER * this.#longest);
    let own: Floats | undefined;
    for (const [name, held] of this.#held) {
      if (this.#bytes + 4 * length <= limit) break;
      const { values } = held;
      if (held.isChanged) this.#write(name, values);
      this.#held.delete(name);
      this.#bytes -= values.byteLength;
      if (own === undefined && values.length === length) own = values;
      else giveBack(values);
    }
    return own;
  }

  #write(name: string, values: Floats): void {
    throwIfStopped();
    const path = this.#path!;
    this.#fd ??= writing("create", path, () => createInPlaceOf(path, () => true));
    let place = this.#places.get(name);
    if (place === undefined) {
      this.#places.set(name, place = this.#fileBytes);
      this.#fileBytes += values.byteLength;
    }
    writeFully(this.#fd, bytesOf(values), place, path);
  }

  #readInto(values: Floats, place: number): void {
    throwIfStopped();
    const path = this.#path!;
    if (readFully(this.#fd!, bytesOf(values), place, path) < values.byteLength) {
      throw inputError(path, new Error("the file became shorter"));
    }
  }
}

const bytesOf = ({ buffer, byteOffset, byteLength }: Floats): Uint8Array =>
  new Uint8Array(buffer, byteOffset, byteLength);
