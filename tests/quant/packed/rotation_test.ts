import { describe, expect, test } from "bun:test";
import { RandomStream } from "../../../lib/models/mod.ts";
import {
  rotateMoment,
  rotateRows,
  type Rotation,
  rotationBlock,
} from "../../../lib/quant/packed/rotation.ts";

const normals = (random: RandomStream, n: number) => Float32Array.from({ length: n }, () => random.normal());
const rotationOf = (cols: number, seed = 7): Rotation => ({
  kind: "hadamard",
  block: rotationBlock(cols),
  seed,
});

/**
 * H by its definition, from docs/format.md alone: signs by MurmurHash3's finalizer, ±1 by the parity of i &
 * j.
 */
function definition(cols: number, { block, seed }: Rotation): number[][] {
  const multiply = (a: number, b: number) => Number(BigInt(a) * BigInt(b) & 0xffffffffn);
  const sign = (k: number) => {
    let hash = (seed + multiply(k + 1, 0x9e3779b9)) % 2 ** 32;
    hash = multiply((hash ^ (hash >>> 16)) >>> 0, 0x85ebca6b);
    hash = multiply((hash ^ (hash >>> 13)) >>> 0, 0xc2b2ae35);
    return ((hash ^ (hash >>> 16)) & 1) === 1 ? -1 : 1;
  };
  const parity = (value: number) => value.toString(2).replaceAll("0", "").length % 2;
  return Array.from({ length: cols }, (_, i) =>
    Array.from({ length: cols }, (_, j) => {
      if (Math.floor(i / block) !== Math.floor(j / block)) return 0;
      const entry = parity((i % block) & (j % block)) === 1 ? -1 : 1;
      return entry * sign(j) / Math.sqrt(block);
    }));
}

describe("a Hadamard rotation", () => {
  test("has the largest block that divides the columns", () => {
    expect([64, 96, 60, 7, 1, 3584].map(rotationBlock)).toEqual([64, 32, 4, 1, 1, 512]);
  });

  for (const cols of [1, 2, 7, 12, 64, 96]) {
    test(`of ${cols} columns is what docs/format.md says, and its transpose undoes it`, () => {
      const random = new RandomStream(cols), rotation = rotationOf(cols), x = normals(random, 3 * cols);
      const h = definition(cols, rotation), rotated = rotateRows(x.slice(), cols, rotation);
      for (let row = 0; row < 3; row++) {
        for (let i = 0; i < cols; i++) {
          const wanted = h[i]!.reduce((sum, entry, j) => sum + entry * x[row * cols + j]!, 0);
          expect(Math.abs(rotated[row * cols + i]! - wanted)).toBeLessThan(2e-6 * Math.sqrt(cols));
        }
      }
      const back = rotateRows(rotated, cols, rotation, { inverse: true });
      for (const [i, value] of x.entries()) expect(Math.abs(back[i]! - value)).toBeLessThan(2e-6);
    });
  }

  test("of a moment is the moment of rotated inputs", () => {
    const cols = 24, rotation = rotationOf(cols), x = normals(new RandomStream(1), 2 * cols);
    const outer = (a: Float32Array) => {
      const out = new Float32Array(cols * cols);
      for (let i = 0; i < cols; i++) {
        for (let j = 0; j < cols; j++) out[i * cols + j] = a[i]! * a[cols + j]!;
      }
      return out;
    };
    const moment = outer(x); // not symmetric: a cross moment
    rotateMoment(moment, cols, rotation);
    const wanted = outer(rotateRows(x, cols, rotation));
    for (const [i, value] of wanted.entries()) expect(Math.abs(moment[i]! - value)).toBeLessThan(1e-5);
  });

  test("depends on the seed, and spreads one column over its block", () => {
    const spread = (seed: number) => {
      const x = new Float32Array(64);
      x[9] = 8;
      return [...rotateRows(x, 64, rotationOf(64, seed))];
    };
    expect(spread(1).every((value) => Math.abs(value) === 1)).toBe(true);
    const seeds = Array.from({ length: 16 }, (_, seed) => spread(seed)[0]!);
    expect(new Set(seeds).size).toBe(2);
  });

  test("refuses what does not fit", () => {
    const rotation = rotationOf(8);
    expect(() => rotateRows(new Float32Array(9), 8, rotation)).toThrow(TypeError);
    expect(() => rotateRows(new Float32Array(8), 8, { ...rotation, block: 16 })).toThrow(RangeError);
    expect(() => rotateRows(new Float32Array(8), 8, { ...rotation, seed: 0.5 })).toThrow(/seed/);
  });
});
