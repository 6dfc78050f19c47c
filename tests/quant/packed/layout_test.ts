import { expect, test } from "bun:test";
import * as call from "../../../lib/native/functions.ts";
import { openKernels } from "../../../lib/native/mod.ts";
import {
  GROUP_SIZES,
  groupCount,
  packedWords,
  subCodeBytes,
  superblockCount,
  TWO_LEVEL_GROUP_SIZES,
} from "../../../lib/quant/packed/layout.ts";

test("sizes of packed rows are those that the kernels tell", async () => {
  using native = await openKernels();
  using wasm = await openKernels({ backend: "wasm" });
  const columns = [...Array(600).keys(), 3584, 18_944, 65_537];
  for (const kernels of [native, wasm]) {
    const doing = "compare sizes", one = new BigUint64Array(1), two = new BigUint64Array(2);
    for (const cols of columns) {
      for (const bits of [2, 3, 4, 8] as const) {
        call.packedWords(kernels, doing, cols, bits, one);
        expect(packedWords(cols, bits)).toBe(Number(one[0]));
      }
      for (const size of GROUP_SIZES) {
        call.groupCount(kernels, doing, cols, size, one);
        expect(groupCount(cols, size)).toBe(Number(one[0]));
      }
      for (const size of TWO_LEVEL_GROUP_SIZES) {
        for (const scaleBits of [4, 6, 8] as const) {
          call.twoLevelSizes(kernels, doing, cols, size, scaleBits, two);
          expect([subCodeBytes(cols, size, scaleBits), superblockCount(cols)]).toEqual([...two].map(Number));
        }
      }
    }
  }
});
