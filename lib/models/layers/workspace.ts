/** Scratch memory of a forward pass: allocated once for the largest call, cut to size for each. */

/** Named float32 buffers that grow and never shrink. A view is the same object while its length stays. */
export class Workspace {
  readonly #buffers = new Map<string, Float32Array<ArrayBuffer>>();
  readonly #views = new Map<string, Float32Array<ArrayBuffer>>();

  /** A buffer of this length, with whatever content the last user of the name left. */
  take(name: string, length: number): Float32Array<ArrayBuffer> {
    const view = this.#views.get(name);
    if (view?.length === length) return view;
    let buffer = this.#buffers.get(name);
    if (buffer === undefined || buffer.length < length) {
      buffer = new Float32Array(length);
      this.#buffers.set(name, buffer);
    }
    const fresh = buffer.subarray(0, length);
    this.#views.set(name, fresh);
    return fresh;
  }

  /** Lets all buffers go. */
  release(): void {
    this.#buffers.clear();
    this.#views.clear();
  }

  /** Bytes held. */
  get bytes(): number {
    return [...this.#buffers.values()].reduce((sum, buffer) => sum + buffer.byteLength, 0);
  }
}
