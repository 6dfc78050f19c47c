/** Arrays kept between the stages of a model: in memory up to a limit, else in the work folder. */
import { closeSync } from "node:fs";
import { join } from "node:path";
import {
  createInPlaceOf,
  inputError,
  openForReading,
  readFully,
  writeFully,
  writing,
} from "../files/positional.ts";
import { remove } from "../files/whole.ts";
import { SOLVED_PREFIX } from "../output/output_folder.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Where arrays are kept. */
export interface KeptArraysOptions {
  /** Bytes that may stay in memory; default all. */
  readonly memoryBytes?: number | undefined;
  /** Folder for what is more; without one all stays in memory. */
  readonly folder?: string | undefined;
}

/** Lists of arrays by key. A list that once passed the limit has a file until it is dropped. */
export class KeptArrays {
  readonly #memoryBytes: number;
  readonly #folder: string | undefined;
  readonly #held = new Map<string, Floats>();
  readonly #files = new Set<string>();
  #bytes = 0;

  constructor({ memoryBytes = Infinity, folder }: KeptArraysOptions = {}) {
    this.#memoryBytes = folder === undefined ? Infinity : memoryBytes;
    this.#folder = folder;
  }

  /** Bytes in memory. */
  get bytes(): number {
    return this.#bytes;
  }

  /** Keeps copies of arrays in place of those that the key had. */
  put(key: string, arrays: readonly Float32Array[]): void {
    const elements = arrays.reduce((sum, { length }) => sum + length, 0);
    let held = this.#held.get(key);
    if (held !== undefined && (held.length < elements || held.length > 2 * elements)) {
      this.#bytes -= held.byteLength;
      this.#held.delete(key);
      held = undefined;
    }
    if (held === undefined && this.#bytes + 4 * elements <= this.#memoryBytes) {
      held = new Float32Array(elements);
      this.#held.set(key, held);
      this.#bytes += held.byteLength;
    }
    let at = 0;
    if (held !== undefined) {
      for (const array of arrays) {
        held.set(array, at);
        at += array.length;
      }
      return;
    }
    const path = this.#pathOf(key), fd = writing("create", path, () => createInPlaceOf(path, () => true));
    this.#files.add(key);
    try {
      for (const array of arrays) {
        writeFully(fd, bytesOf(array), at, path);
        at += array.byteLength;
      }
    } finally {
      closeSync(fd);
    }
  }

  /** Copies what a key has into arrays of the lengths that it was put with. */
  get(key: string, arrays: readonly Floats[]): void {
    const held = this.#held.get(key);
    let at = 0;
    if (held !== undefined) {
      for (const array of arrays) {
        array.set(held.subarray(at, at + array.length));
        at += array.length;
      }
      return;
    }
    const path = this.#pathOf(key), fd = openForReading(path);
    try {
      for (const array of arrays) {
        if (readFully(fd, bytesOf(array), at, path) < array.byteLength) {
          throw inputError(path, new Error("the file became shorter"));
        }
        at += array.byteLength;
      }
    } finally {
      closeSync(fd);
    }
  }

  /** Removes the files. */
  drop(): void {
    for (const key of this.#files) remove(this.#pathOf(key));
    this.#files.clear();
    this.#held.clear();
    this.#bytes = 0;
  }

  #pathOf(key: string): string {
    return join(this.#folder!, `${SOLVED_PREFIX}kept-${key}`);
  }
}

const bytesOf = ({ buffer, byteOffset, byteLength }: Float32Array): Uint8Array =>
  new Uint8Array(buffer, byteOffset, byteLength);
