/** Seeded random numbers for synthetic weights; the same in every runtime. */

/** Uniform numbers in (0, 1): xoshiro128**, seeded through splitmix32. */
export function uniformGenerator(seed: number): () => number {
  let mix = seed >>> 0;
  const next = () => {
    mix = (mix + 0x9e3779b9) >>> 0;
    let z = mix;
    z = Math.imul(z ^ (z >>> 16), 0x21f0aaad);
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
    return (z ^ (z >>> 15)) >>> 0;
  };
  let a = next(), b = next(), c = next(), d = next();
  const rotate = (x: number, k: number) => (x << k) | (x >>> (32 - k));
  return () => {
    const result = Math.imul(rotate(Math.imul(b, 5), 7), 9) >>> 0;
    const t = b << 9;
    c ^= a;
    d ^= b;
    b ^= c;
    a ^= d;
    c ^= t;
    d = rotate(d, 11);
    return (result + 0.5) / 2 ** 32;
  };
}

/** `count` Gaussian values of mean 0, by Box and Muller. */
export function gaussianWeights(count: number, seed: number, deviation = 0.02): Float32Array<ArrayBuffer> {
  const uniform = uniformGenerator(seed);
  const values = new Float32Array(count);
  for (let i = 0; i < count; i += 2) {
    const radius = deviation * Math.sqrt(-2 * Math.log(uniform())), angle = 2 * Math.PI * uniform();
    values[i] = radius * Math.cos(angle);
    if (i + 1 < count) values[i + 1] = radius * Math.sin(angle);
  }
  return values;
}
