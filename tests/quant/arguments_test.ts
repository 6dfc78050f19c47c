import { describe, expect, test } from "bun:test";
import { type Kernels, openKernels } from "../../lib/native/mod.ts";
import {
  accumulateMoment,
  correctedTarget,
  DEFAULT_SOLVER_SETTINGS,
  emptyMoments,
  type FactoredMoment,
  factorMoments,
  solveLayer,
} from "../../lib/quant/mod.ts";

const kernels: Kernels = await openKernels({ threads: 1 });
const rows = 3, cols = 8;
const x = Float32Array.from({ length: 20 * cols }, (_, i) => Math.sin(i * i));
const moments = emptyMoments(cols);
accumulateMoment(kernels, x, undefined, undefined, 20, moments.second);
moments.tokens = moments.weight = 20;
const moment = factorMoments(kernels, moments);
const weights = x.slice(0, rows * cols);
const problem = { weights, rows, cols, moment, bits: 2, groupSize: 0, zeroPoint: "real" } as const;

/** An array of the right length that is a view of a larger buffer: what is written outside of it shows. */
function guarded(bytes: number) {
  const whole = new Uint8Array(bytes + 4096);
  return { whole, part: new Uint8Array(whole.buffer, 0, bytes) };
}

const faults: [string, Partial<Record<keyof FactoredMoment, unknown>>, RegExp][] = [
  [
    "a short factor",
    { factor: moment.factor.subarray(1) },
    /moment\.factor must be 64 float32 values, got 63/,
  ],
  [
    "a factor of doubles",
    { factor: new Float64Array(64) },
    /moment\.factor must be 64 float32 values, got Float64Array/,
  ],
  ["a short moment", { moment: new Float32Array(1) }, /moment\.moment must be 64/],
  ["missing pivots", { pivots: undefined }, /moment\.pivots must be 8 float32 values, got undefined/],
  ["an order of other numbers", { order: new Uint8Array(8) }, /moment\.order must be 8 int32 values/],
  [
    "an order beyond the columns",
    { order: Int32Array.of(0, 1, 2, 3, 4, 5, 6, 99) },
    /hold every column once/,
  ],
  [
    "an order with a column twice",
    { order: Int32Array.of(0, 1, 2, 3, 4, 5, 6, 6) },
    /hold every column once/,
  ],
  ["other columns", { cols: 7 }, /must have 8 columns, got 7/],
];

describe("arrays that do not fit are refused before a kernel sees them", () => {
  for (const [name, change, message] of faults) {
    test(`a moment with ${name}`, () => {
      const wrong = { ...moment, ...change } as FactoredMoment;
      expect(() => solveLayer(kernels, "feedback", { ...problem, moment: wrong }, DEFAULT_SOLVER_SETTINGS))
        .toThrow(message);
      if (change.cols !== undefined) return;
      expect(() => correctedTarget(kernels, { weights, rows, moment: wrong }, DEFAULT_SOLVER_SETTINGS))
        .toThrow(message);
    });
  }

  test("sums of a moment", () => {
    const { whole, part } = guarded(4 * cols * cols);
    const add = (out: unknown, y?: unknown, inputs: unknown = x) => () =>
      accumulateMoment(kernels, inputs as never, y as never, undefined, 20, out as never);
    expect(add(part)).toThrow(TypeError);
    expect(add(new Float32Array(cols * cols), new Uint8Array(20 * cols))).toThrow(
      /y must be of Float32Array/,
    );
    expect(add(new Float32Array(cols * cols), undefined, new Float64Array(x))).toThrow(
      /x must be of Float32Array/,
    );
    expect(add(new Float32Array(1))).toThrow(/8 × 8 sums, got 1/);
    expect(() => accumulateMoment(kernels, x, undefined, undefined, -1, moments.second)).toThrow(/tokens/);
    expect(whole.every((byte) => byte === 0)).toBe(true);
  });

  test("weights, and what was lost before a layer", () => {
    const correct = (change: object) => () =>
      correctedTarget(kernels, { weights, rows, moment, ...change }, DEFAULT_SOLVER_SETTINGS);
    expect(correct({ rows: 100_000 })).toThrow(/weights must be 800000 float32 values, got 24/);
    expect(correct({ cross: new Float32Array(3) })).toThrow(/cross must be 64/);
    expect(correct({ residual: new Float64Array(rows * cols) })).toThrow(/residual must be 24/);
    expect(() => solveLayer(kernels, "clip", { ...problem, rows: 4 })).toThrow(/weights must be 32/);
    expect(() => solveLayer(kernels, "magic" as never, problem)).toThrow(/solver must be one of clip, round/);
    expect(() => solveLayer(kernels, "best", { ...problem, moment: undefined })).toThrow(/needs the moments/);
    expect(() => factorMoments(kernels, { ...moments, second: new Float32Array(3) })).toThrow(
      /second must be 64/,
    );
  });
});
