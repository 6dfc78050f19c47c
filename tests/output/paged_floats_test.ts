/** Arrays that lie in a file where memory does not suffice, beside plain ones. */
import { afterAll, describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { OutputError } from "../../lib/errors.ts";
import { PagedFloats } from "../../lib/output/paged_floats.ts";
import { workplace } from "../_checkpoints.ts";
import { randomStream } from "../_kernels.ts";

const place = workplace();
afterAll(() => place.remove());
const fileIn = (folder: string) => {
  mkdirSync(folder, { recursive: true });
  return join(folder, "paged");
};

describe("paged arrays", () => {
  for (const memoryBytes of [0, 2000, Infinity]) {
    test(`hold what was written last, within ${memoryBytes} bytes`, () => {
      const path = fileIn(place.fresh());
      using paged = new PagedFloats({ memoryBytes, path });
      const lengths = Array.from({ length: 40 }, (_, i) => 10 + 7 * (i % 5)), longest = 38;
      const wanted = lengths.map((length) => new Float32Array(length)), random = randomStream(5);
      for (let step = 0; step < 3000; step++) {
        const i = Math.floor(random() * 40), name = `array ${i}`, own = wanted[i]!, kind = random();
        if (kind < 0.4) expect(paged.read(name, own.length)).toEqual(own);
        else if (kind < 0.5) {
          paged.clear(name);
          own.fill(0);
        } else {
          const [values, at] = [paged.take(name, own.length), Math.floor(random() * own.length)];
          expect(values).toEqual(own);
          values[at] = own[at] = Math.fround(random());
        }
      }
      for (const [i, own] of wanted.entries()) expect(paged.read(`array ${i}`, own.length)).toEqual(own);
      const all = 4 * lengths.reduce((sum, length) => sum + length, 0);
      expect(paged.mostBytes).toBeLessThanOrEqual(Math.max(6 * 4 * longest, Math.min(all, memoryBytes)));
      expect(paged.fileBytes).toBe(memoryBytes === Infinity ? 0 : all);
      expect(existsSync(path)).toBe(memoryBytes < Infinity);
      paged[Symbol.dispose]();
      expect(existsSync(path)).toBe(false);
    });
  }

  test("six arrays stay as they are while they are used together", () => {
    using paged = new PagedFloats({ memoryBytes: 0, path: fileIn(place.fresh()) });
    const names = Array.from({ length: 20 }, (_, i) => `${i}`);
    for (let i = 0; i + 6 <= names.length; i++) {
      const own = names.slice(i, i + 6).map((name) => paged.take(name, 9));
      for (const values of own) for (let k = 0; k < 9; k++) values[k]! += 1;
    }
    const seen = names.map((name) => paged.read(name, 9)[4]);
    expect(seen).toEqual(names.map((_, i) => Math.min(i + 1, 6, 20 - i)));
  });

  test("a place where no file can be is an error that names it", () => {
    const path = join(place.fresh(), "no", "folder");
    using paged = new PagedFloats({ memoryBytes: 0, path });
    expect(() => {
      for (let i = 0; i < 8; i++) paged.take(`${i}`, 3);
    }).toThrow(OutputError);
    const taken = fileIn(place.fresh());
    writeFileSync(taken, "of an earlier run");
    using again = new PagedFloats({ memoryBytes: 0, path: taken });
    for (let i = 0; i < 8; i++) again.take(`${i}`, 3);
    expect(again.read("0", 3)).toEqual(new Float32Array(3));
  });
});
