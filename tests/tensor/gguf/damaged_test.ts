import { afterAll, describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { CheckpointError, FormatError } from "../../../lib/errors.ts";
import { openCheckpoint } from "../../../lib/tensor/mod.ts";
import { temporaryFolder } from "../_files.ts";
import { floats, ggufBytes, type Value } from "./_files.ts";

const folder = temporaryFolder();
afterAll(folder.remove);

const KEY = ["general.architecture", "string", "flux"] as const;
const A = floats("a.weight", [32, 2]), B = floats("b.weight", [32, 2]);
const good = ggufBytes([KEY], [A, B]);
const key = (...value: Value) => ggufBytes([KEY, ["k", ...value]], [A]);
const changed = (at: number, ...values: number[]) => {
  const bytes = good.slice();
  bytes.set(values, at);
  return bytes;
};
const shaped = (dimensions: (number | bigint)[], type: string | number = "F32") =>
  ggufBytes([], [{ name: "t", type, dimensions, data: new Uint8Array(4096) }]);

/** Files by what is wrong with them, each with what the message must say. */
const DAMAGED: Readonly<Record<string, readonly [Uint8Array, RegExp]>> = {
  "no bytes": [new Uint8Array(0), /end inside the file of 0 bytes/],
  "three bytes": [good.slice(0, 3), /end inside the file of 3 bytes/],
  "the magic alone": [good.slice(0, 4), /the version must end inside/],
  "another magic": [changed(0, 0x46), /begin with "GGUF"/],
  "version 1": [changed(4, 1), /version 2 or 3, got version 1/],
  "version 9": [changed(4, 9), /got version 9/],
  "big-endian": [changed(4, 0, 0, 0, 3), /got a big-endian file/],
  "2^63 tensors": [
    ggufBytes([KEY], [A], { tensorCount: 2n ** 63n }),
    /number of tensors must be at most 1000000/,
  ],
  "2^64 - 1 tensors": [ggufBytes([KEY], [A], { tensorCount: 2n ** 64n - 1n }), /number of tensors/],
  "2^63 keys": [ggufBytes([KEY], [A], { keyCount: 2n ** 63n }), /number of keys must be at most 100000/],
  "more keys than there are": [ggufBytes([KEY], [], { keyCount: 50 }), /key 2 must have a name/],
  "more tensors than there are": [ggufBytes([KEY], [], { tensorCount: 50 }), /name must not be empty/],
  "the counts cut off": [good.slice(0, 20), /must end inside the file/],
  "a key cut off": [good.slice(0, 40), /must end inside the file/],
  "an entry cut off": [good.slice(0, 120), /must end inside the file/],
  "data cut off": [good.slice(0, -1), /"b\.weight".*truncated/],
  "all data cut off": [good.slice(0, -512), /"a\.weight".*truncated/],
  "a key of 2^62 bytes": [changed(24, 0, 0, 0, 0, 0, 0, 0, 64), /length of key 1 must be at most 65535/],
  "a key that is not UTF-8": [ggufBytes([[Uint8Array.of(0xff, 0xfe), "u8", 1]], []), /key 1 must be UTF-8/],
  "an empty key": [ggufBytes([["", "u8", 1]], []), /must have a name/],
  "a key twice": [ggufBytes([KEY, KEY], []), /must be there once/],
  "a value of no type": [key("99", 0), /type of key "k" must be from 0 to 12, got 99/],
  "a bool of 7": [key("bool", 7), /must be true \(1\) or false \(0\), got 7/],
  "an array of arrays": [key("array", ["array", [["u8", [1]]]]), /an array of arrays/],
  "alignment 0": [ggufBytes([["general.alignment", "u32", 0]], []), /a power of 2/],
  "alignment 24": [ggufBytes([["general.alignment", "u32", 24]], []), /a power of 2/],
  "alignment 2^30": [ggufBytes([["general.alignment", "u32", 2 ** 30]], []), /a power of 2/],
  "alignment as a text": [ggufBytes([["general.alignment", "string", "32"]], []), /must be a u32/],
  "one part of two": [ggufBytes([["split.count", "u16", 2]], []), /one of 2 parts/],
  "a tensor twice": [ggufBytes([], [A, A]), /must be there once/],
  "a tensor without a name": [ggufBytes([], [{ ...A, name: "" }]), /name must not be empty/],
  "a name of 5000 bytes": [ggufBytes([], [{ ...A, name: "n".repeat(5000) }]), /at most 4096/],
  "a name of 2000 characters": [ggufBytes([], [{ ...A, name: "n".repeat(2000) }]), /at most 1024 characters/],
  "nine dimensions": [shaped(Array.from({ length: 9 }, () => 1)), /at most 8 dimensions/],
  "2^32 - 1 dimensions": [
    (() => {
      const bytes = ggufBytes([], [A]);
      bytes.set([255, 255, 255, 255], 24 + 8 + 8);
      return bytes;
    })(),
    /at most 8 dimensions/,
  ],
  "a dimension of 2^63": [shaped([2n ** 63n]), /a dimension of "t" must be at most/],
  "2^60 weights": [shaped([2 ** 30, 2 ** 30]), /at most 2\^50 weights/],
  "weights beyond the file": [shaped([2 ** 20, 2 ** 20]), /truncated/],
  "a removed type": [shaped([32], 4), /type must be one of .*, got the number 4/],
  "a type of 2^31": [shaped([32], 2 ** 31), /got the number 2147483648/],
  "half a block": [shaped([48], "Q8_0"), /rows of Q8_0 must be multiples of 32, got 48/],
  "rows that are no blocks": [shaped([128, 2], "Q4_K"), /multiples of 256, got 128/],
  "an offset between": [ggufBytes([], [{ ...A, offset: 8 }]), /offset must be a multiple of 32, got 8/],
  "an offset of 2^63": [
    ggufBytes([], [{ ...A, offset: 2n ** 63n }]),
    /offset of "a\.weight" must be at most/,
  ],
  "an offset beyond": [ggufBytes([], [{ ...A, offset: 2 ** 40 }]), /truncated/],
  "two in one place": [ggufBytes([], [A, { ...B, offset: 0 }]), /behind those of the tensor before/],
  "two that overlap": [ggufBytes([], [A, { ...B, offset: 128 }]), /behind those of the tensor before/],
  "a name of the family twice": [
    ggufBytes([["general.architecture", "string", "dream"]], [
      floats("token_embd.weight", [32, 2]),
      floats("model.embed_tokens.weight", [32, 2]),
    ]),
    /must have one "model\.embed_tokens\.weight"/,
  ],
};

describe("damaged GGUF files", () => {
  for (const [what, [bytes, message]] of Object.entries(DAMAGED)) {
    test(what, () => {
      const path = join(folder.path, "model.gguf");
      writeFileSync(path, bytes);
      let error: unknown;
      try {
        openCheckpoint(path).close();
      } catch (caught) {
        error = caught;
      }
      expect(error instanceof FormatError || error instanceof CheckpointError).toBe(true);
      expect((error as Error).message).toMatch(message);
      expect((error as Error).message).toContain("model.gguf");
    });
  }

  test("the same file undamaged opens", () => {
    const path = join(folder.path, "good.gguf");
    writeFileSync(path, good);
    using checkpoint = openCheckpoint(path);
    expect([...checkpoint.tensors.keys()]).toEqual(["a.weight", "b.weight"]);
  });

  test("a bit anywhere in the head is an error or a file that reads", () => {
    const path = join(folder.path, "bit.gguf"), end = good.length - 512;
    for (let at = 0; at < end; at++) {
      const bytes = good.slice();
      bytes[at]! ^= 1 << at % 8;
      writeFileSync(path, bytes);
      try {
        using checkpoint = openCheckpoint(path);
        for (const name of checkpoint.tensors.keys()) checkpoint.read(name);
      } catch (error) {
        expect(error instanceof FormatError || error instanceof CheckpointError).toBe(true);
      }
    }
  });
});
