/** bfloat16, the upper half of a float32, for values at hand: whole tensors are converted by kernels. */

/** Values as the bits of bfloat16, rounded to nearest, ties to even; a NaN stays one. */
export function toBfloat16(values: Float32Array<ArrayBuffer>): Uint16Array<ArrayBuffer> {
  const words = new Uint32Array(values.buffer, values.byteOffset, values.length);
  const out = new Uint16Array(words.length);
  for (let i = 0; i < words.length; i++) {
    const word = words[i]!, isNaN = (word & 0x7fffffff) > 0x7f800000;
    out[i] = isNaN ? 0x7fc0 : (word + 0x7fff + (word >>> 16 & 1)) >>> 16;
  }
  return out;
}

/** Values of the bits of bfloat16. */
export function fromBfloat16(bits: Uint16Array): Float32Array<ArrayBuffer> {
  const words = new Uint32Array(bits.length);
  for (let i = 0; i < bits.length; i++) words[i] = bits[i]! << 16;
  return new Float32Array(words.buffer);
}
