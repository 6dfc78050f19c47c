/**
 * Memory of large arrays that is given back at once. An engine collects what nobody refers to only when it
 * has grown by about as much as it held.
 */

/** Gives the memory of arrays back: they are empty then, and so is every view of their buffers. */
export function giveBack(...arrays: readonly (ArrayBufferView<ArrayBuffer> | undefined)[]): void {
  for (const array of arrays) if (array?.buffer.detached === false) array.buffer.transfer(0);
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
