import { describe, expect, test } from "bun:test";
import {
  blendTable,
  blendWeight,
  INTERPOLATIONS,
  keepWhereErrorDoesNotRise,
  smoothActivation,
  validateSmooth,
} from "../../lib/thermo/smoother.ts";
import { validateMarkov } from "../../lib/thermo/validator.ts";
import { TimeGroups, timestepAxis } from "../../lib/time/mod.ts";
import { randomStream } from "../_kernels.ts";

/** Random groups of 60 bins and random 8-bit activation parameters. */
function randomCase(seed: number) {
  const random = randomStream(seed);
  const inner = new Set(
    Array.from({ length: 1 + Math.floor(random() * 6) }, () => 1 + Math.floor(random() * 59)),
  );
  const groups = new TimeGroups(timestepAxis(60), [0, ...[...inner].sort((a, b) => a - b), 60]);
  const scale = Array.from({ length: groups.count }, () => 0.1 + random());
  const zeroPoint = Array.from({ length: groups.count }, () => 255 * random());
  const options = {
    windowSize: 1 + Math.floor(random() * 12),
    interpolation: INTERPOLATIONS[seed % 3]!,
  };
  return { groups, series: { scale, zeroPoint, bits: 8 }, options, random };
}

const lowOf = (scale: number, zeroPoint: number) => -scale * zeroPoint;
const highOf = (scale: number, zeroPoint: number) => scale * (255 - zeroPoint);

describe("blend weights", () => {
  test("by hand", () => {
    expect(blendWeight(0.25, "linear")).toBe(0.25);
    expect(blendWeight(0.25, "cubic")).toBe(3 / 16 - 2 / 64);
  });

  for (const interpolation of INTERPOLATIONS) {
    test(`${interpolation}: from 0 to 1, rising, the same from both ends`, () => {
      expect([0, 0.5, 1].map((a) => blendWeight(a, interpolation))).toEqual([0, 0.5, 1]);
      for (let i = 0; i < 100; i++) {
        const a = i / 100;
        expect(blendWeight(a + 0.01, interpolation)).toBeGreaterThan(blendWeight(a, interpolation));
        expect(blendWeight(a, interpolation) + blendWeight(1 - a, interpolation)).toBeCloseTo(1, 14);
      }
    });
  }

  test("bad input", () => {
    expect(() => blendWeight(1.1, "linear")).toThrow(RangeError);
    expect(() => blendWeight(0.5, "round" as "linear")).toThrow('one of linear, cubic, sigmoid, got "round"');
    const groups = new TimeGroups(timestepAxis(10), [0, 5, 10]);
    for (const windowSize of [0, -1, 1.5, 1001, NaN]) {
      expect(() => blendTable(groups, { windowSize })).toThrow("windowSize must be a whole number");
    }
  });
});

test("a boundary by hand: the smaller range grows, the larger stays", () => {
  const groups = new TimeGroups(timestepAxis(8), [0, 4, 8]);
  const { scale, zeroPoint } = smoothActivation(groups, { scale: [1, 2], zeroPoint: [0, 0], bits: 8 }, {
    windowSize: 2,
  });
  expect([...scale]).toEqual([1, 1, 1.25, 1.75, 2, 2, 2, 2]);
  expect([...zeroPoint].map(Math.abs)).toEqual(Array(8).fill(0));
});

describe("invariants over random groups and parameters", () => {
  test("no bin's range is smaller than its group's", () => {
    for (let seed = 1; seed <= 200; seed++) {
      const { groups, series, options } = randomCase(seed);
      const smooth = smoothActivation(groups, series, options);
      for (let bin = 0; bin < 60; bin++) {
        const g = groups.groupOfBin(bin);
        const own = [series.scale[g]!, series.zeroPoint[g]!] as const;
        const now = [smooth.scale[bin]!, smooth.zeroPoint[bin]!] as const;
        expect(lowOf(...now)).toBeLessThanOrEqual(lowOf(...own) + 1e-10);
        expect(highOf(...now)).toBeGreaterThanOrEqual(highOf(...own) - 1e-10);
      }
    }
  });

  test("outside every window nothing changes, to the bit", () => {
    for (let seed = 1; seed <= 200; seed++) {
      const { groups, series, options } = randomCase(seed);
      const smooth = smoothActivation(groups, series, options);
      let outside = 0;
      for (let bin = 0; bin < 60; bin++) {
        const inner = [...groups.boundaries.subarray(1, -1)];
        if (inner.some((b) => bin >= b - options.windowSize && bin < b + options.windowSize)) continue;
        const g = groups.groupOfBin(bin);
        expect([smooth.scale[bin], smooth.zeroPoint[bin]]).toEqual([series.scale[g], series.zeroPoint[g]]);
        outside++;
      }
      if (seed === 3) expect(outside).toBeGreaterThan(0);
    }
  });

  test("constants stay constant, to the bit", () => {
    for (let seed = 1; seed <= 60; seed++) {
      const { groups, options } = randomCase(seed);
      const count = groups.count;
      const smooth = smoothActivation(groups, {
        scale: Array(count).fill(0.3),
        zeroPoint: Array(count).fill(17.1),
        bits: 8,
      }, options);
      expect(new Set(smooth.scale)).toEqual(new Set([0.3]));
      expect(new Set(smooth.zeroPoint)).toEqual(new Set([17.1]));
    }
  });

  test("order does not matter: time run backwards gives the mirror image", () => {
    for (let seed = 1; seed <= 100; seed++) {
      const { groups, series, options } = randomCase(seed);
      const smooth = smoothActivation(groups, series, options);
      const mirrored = smoothActivation(
        new TimeGroups(groups.axis, [...groups.boundaries].reverse().map((b) => 60 - b)),
        { scale: series.scale.toReversed(), zeroPoint: series.zeroPoint.toReversed(), bits: 8 },
        options,
      );
      for (let bin = 0; bin < 60; bin++) {
        expect(mirrored.scale[59 - bin]).toBeCloseTo(smooth.scale[bin]!, 12);
        expect(mirrored.zeroPoint[59 - bin]).toBeCloseTo(smooth.zeroPoint[bin]!, 9);
      }
    }
  });
});

test("the score of smooth parameters: not below the groups' own, equal without smoothing", () => {
  for (let seed = 1; seed <= 100; seed++) {
    const { groups, series } = randomCase(seed);
    const flat = {
      scale: Float64Array.from({ length: 60 }, (_, bin) => series.scale[groups.groupOfBin(bin)]!),
      zeroPoint: Float64Array.from({ length: 60 }, (_, bin) => series.zeroPoint[groups.groupOfBin(bin)]!),
      bits: 8,
    };
    const before = validateMarkov(series, 0.3);
    expect(validateSmooth(groups, flat, 0.3).markovScore).toBeCloseTo(before.markovScore, 12);
  }
  const groups = new TimeGroups(timestepAxis(40), [0, 20, 40]);
  const series = { scale: [1, 2], zeroPoint: [50, 90], bits: 8 };
  const smooth = smoothActivation(groups, series, { windowSize: 10 });
  expect(validateMarkov(series, 0.3).markovScore).toBeLessThan(0.5);
  expect(validateSmooth(groups, smooth, 0.3).markovScore).toBeGreaterThan(0.9);
});

describe("the guard", () => {
  test("keeps what does not rise, and says what it saw", () => {
    const errors: Record<string, [number, number]> = { a: [1, 0.5], b: [1, 1], c: [1, 1.001] };
    const report = keepWhereErrorDoesNotRise(Object.keys(errors), (name) => ({
      before: errors[name]![0],
      after: errors[name]![1],
    }));
    expect([report.kept, report.rejected]).toEqual([["a", "b"], ["c"]]);
    expect(report.errors.get("c")).toEqual({ before: 1, after: 1.001 });
  });

  test("NaN decides nothing", () => {
    expect(() => keepWhereErrorDoesNotRise(["a"], () => ({ before: 1, after: NaN }))).toThrow(
      'Cannot decide on "a"',
    );
  });
});

test("bad parameters", () => {
  const groups = new TimeGroups(timestepAxis(10), [0, 5, 10]);
  expect(() => smoothActivation(groups, { scale: [1], zeroPoint: [0], bits: 8 })).toThrow(TypeError);
  expect(() => smoothActivation(groups, { scale: [1, 0], zeroPoint: [0, 0], bits: 8 })).toThrow(
    "for group 1",
  );
  expect(() => smoothActivation(groups, { scale: [1, 1], zeroPoint: [NaN, 0], bits: 8 })).toThrow(
    "for group 0",
  );
});
