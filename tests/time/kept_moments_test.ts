/** Second moments while they are gathered. */
import { afterAll, expect, test } from "bun:test";
import { openKernels } from "../../lib/native/mod.ts";
import { KeptMoments } from "../../lib/time/calibration/kept_moments.ts";

const kernels = await openKernels({ threads: 1 });
afterAll(() => kernels.close());

const shape = { cols: 2, block: 2, count: 1 }, inputs = { x: Float32Array.of(3, 4), tokens: 1 };

test("chunks are added to the moments that are there already", () => {
  const kept = new KeptMoments(shape, new Map());
  kept.floats.set([1, 2, 2, 5]);
  kept.add(kernels, 0, inputs, true);
  expect(kept.floats).toEqual(Float32Array.of(10, 14, 14, 21));
});

test("sums begin at nothing, and rounding them changes no more than their type", () => {
  const kept = new KeptMoments(shape, new Map());
  kept.add(kernels, 0, inputs, true);
  kept.add(kernels, 0, inputs, true);
  expect([kept.isOpen, kept.exact]).toEqual([true, Float64Array.of(18, 24, 24, 32)]);
  kept.settle();
  expect([kept.isOpen, kept.exact, kept.floats]).toEqual([false, undefined, Float32Array.of(18, 24, 24, 32)]);
});
