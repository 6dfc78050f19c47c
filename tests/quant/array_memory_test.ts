import { expect, test } from "bun:test";
import { giveBack, narrowed } from "../../lib/quant/array_memory.ts";

test("memory that is given back is gone from every view, also when it is given back twice", () => {
  const values = Float32Array.of(1, 2, 3), view = values.subarray(1);
  giveBack(values, undefined, view, values);
  expect([values.length, view.length, values.buffer.byteLength]).toEqual([0, 0, 0]);
});

test("doubles are rounded in their own memory, half of which is given back", () => {
  const doubles = Float64Array.from({ length: 1001 }, (_, i) => (i - 500) / 3 * 10 ** (i % 40 - 20));
  const wanted = new Float32Array(doubles), bytes = doubles.buffer.byteLength;
  const floats = narrowed(doubles);
  expect(floats).toEqual(wanted);
  expect(doubles.length).toBe(0);
  expect(floats.buffer.byteLength).toBe(bytes / 2);
});
