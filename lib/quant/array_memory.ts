/**
 * Memory of large arrays that is given back at once. An engine collects what nobody refers to only when it
 * has grown by about as much as it held.
 */

/** Gives the memory of arrays back: they are empty then, and so is every view of their buffers. */
export function giveBack(...arrays: readonly (ArrayBufferView<ArrayBuffer> | undefined)[]): void {
  for (const array of arrays) if (array?.buffer.detached === false) array.buffer.transfer(0);
}

/** Most memory that is set aside: new pages of it take a tenth of the time of 4-bit feedback. */
const SPARE_BYTES = 2 ** 27;

/** Memory that was set aside, the oldest first. */
const spare: ArrayBuffer[] = [];

/** As {@linkcode giveBack}, but the memory is kept for arrays of the same size that soon follow. */
export function setAside(...arrays: readonly ArrayBufferView<ArrayBuffer>[]): void {
  for (const { buffer } of arrays) if (!buffer.detached) spare.push(buffer.transfer());
  let bytes = spare.reduce((sum, { byteLength }) => sum + byteLength, 0);
  while (bytes > SPARE_BYTES) {
    const oldest = spare.shift()!;
    bytes -= oldest.byteLength;
    oldest.transfer(0);
  }
}

/** Memory of so many bytes, with whatever was in it: set aside before, or new. */
export function takeMemory(byteLength: number): ArrayBuffer {
  const at = spare.findIndex((own) => own.byteLength === byteLength);
  return at < 0 ? new ArrayBuffer(byteLength) : spare.splice(at, 1)[0]!;
}

/** Gives all memory back that was set aside. */
export function releaseMemory(): void {
  for (const own of spare.splice(0)) own.transfer(0);
}

/**
 * Doubles rounded to float32, in their own memory; half of it is given back.
 *
 * @param values all of their buffer; empty then
 */
export function narrowed(values: Float64Array<ArrayBuffer>): Float32Array<ArrayBuffer> {
  const { buffer, length } = values, own = new Float32Array(buffer, 0, length);
  for (let i = 0; i < length; i++) own[i] = values[i]!; // behind the float is a double that was read already
  return new Float32Array(buffer.transfer(4 * length));
}
