import { describe, expect, test } from "bun:test";
import {
  adaptiveTimeGroups,
  equalTimeGroups,
  maskRatioAxis,
  TimeGroups,
  timestepAxis,
} from "../../lib/time/mod.ts";
import { randomStream } from "../_kernels.ts";

describe("time axes", () => {
  test("timesteps are their own bins; outside is refused", () => {
    const axis = timestepAxis(1000);
    expect([axis.binOf(0), axis.binOf(999), axis.binOf(12.75)]).toEqual([0, 999, 12]);
    for (const t of [-1, 1000, NaN, Infinity]) {
      expect(() => axis.binOf(t)).toThrow(`a timestep must lie in [0, 1000), got ${t}`);
    }
  });

  test("mask ratios: every bin is open below and closed above", () => {
    const axis = maskRatioAxis(10);
    expect([1, 0.901, 0.9, 0.5, 0.1, 0.1001, 1e-9].map((t) => axis.binOf(t))).toEqual([9, 9, 8, 4, 0, 1, 0]);
    for (const t of [0, -0.1, 1.0001, NaN]) {
      expect(() => axis.binOf(t)).toThrow(`a mask ratio must lie in (0, 1], got ${t}`);
    }
  });

  test("bins are counted", () => {
    for (const bins of [0, -1, 1.5, NaN, 100_001]) {
      expect(() => timestepAxis(bins)).toThrow(RangeError);
      expect(() => maskRatioAxis(bins)).toThrow(RangeError);
    }
  });
});

describe("equal groups", () => {
  test("cover every bin once, in order, widths at most one apart, for any G", () => {
    for (const bins of [1, 7, 100, 1000]) {
      for (let count = 1; count <= Math.min(100, bins); count++) {
        const groups = equalTimeGroups(timestepAxis(bins), count);
        const widths = Array.from({ length: count }, (_, g) => {
          const { start, end } = groups.range(g);
          for (let t = start; t < end; t++) expect(groups.groupOf(t)).toBe(g);
          return end - start;
        });
        expect(widths.reduce((a, b) => a + b)).toBe(bins);
        expect(Math.max(...widths) - Math.min(...widths)).toBeLessThanOrEqual(1);
      }
    }
  });

  test("G must fit", () => {
    expect(() => equalTimeGroups(timestepAxis(10), 11)).toThrow("groups must be at most the 10 bins");
    for (const count of [0, -1, 101, 2.5, NaN]) {
      expect(() => equalTimeGroups(timestepAxis(1000), count)).toThrow(
        `groups must be a whole number from 1 to 100, got ${count}`,
      );
    }
  });

  test("times outside are refused, not clamped", () => {
    const groups = equalTimeGroups(timestepAxis(10), 2);
    expect(() => groups.groupOf(10)).toThrow(RangeError);
    expect(() => groups.groupOfBin(10)).toThrow(RangeError);
    expect(() => groups.range(2)).toThrow(RangeError);
  });
});

test("boundaries must ascend from 0 to the end", () => {
  const axis = timestepAxis(10);
  expect(() => new TimeGroups(axis, [0, 4, 4, 10])).toThrow("no group may be empty, got [4, 4) for group 1");
  for (const boundaries of [[1, 10], [0, 9], [0, 3.5, 10], [0, NaN, 10], [0, 12, 10]]) {
    expect(() => new TimeGroups(axis, boundaries)).toThrow(RangeError);
  }
});

describe("adaptive groups", () => {
  /** Sum of squares inside the groups of observed bins that begin at `starts`. */
  const costOf = (values: number[][], weights: number[], starts: number[]) => {
    let cost = 0;
    for (let g = 0; g < starts.length; g++) {
      const begin = starts[g]!, end = starts[g + 1] ?? values.length;
      const weight = weights.slice(begin, end).reduce((a, b) => a + b);
      for (let d = 0; d < values[0]!.length; d++) {
        let mean = 0;
        for (let i = begin; i < end; i++) mean += weights[i]! * values[i]![d]! / weight;
        for (let i = begin; i < end; i++) cost += weights[i]! * (values[i]![d]! - mean) ** 2;
      }
    }
    return cost;
  };
  const choose = (n: number, count: number): number[][] =>
    count === 1
      ? [[0]]
      : choose(n, count - 1).flatMap((starts) =>
        Array.from({ length: n }, (_, i) => i).filter((i) => i > starts.at(-1)!).map((i) => [...starts, i])
      );

  test("have the least variance of all divisions (enumerated)", () => {
    for (let seed = 1; seed <= 20; seed++) {
      const random = randomStream(seed);
      const values = Array.from({ length: 9 }, () => [random() * 5, random()]);
      const weights = Array.from({ length: 9 }, () => 0.1 + random());
      for (const count of [1, 2, 3, 4, 9]) {
        const groups = adaptiveTimeGroups(timestepAxis(9), count, {
          bins: values.map((_, i) => i),
          values: values.flat(),
          weights,
        });
        const got = costOf(values, weights, [...groups.boundaries.subarray(0, -1)]);
        const least = Math.min(...choose(9, count).map((starts) => costOf(values, weights, starts)));
        expect(Math.abs(got - least)).toBeLessThan(1e-12);
      }
    }
  });

  test("follow the change; between observed bins the boundary is in the middle", () => {
    const groups = adaptiveTimeGroups(timestepAxis(1000), 3, {
      bins: [0, 100, 200, 300, 900],
      values: [1, 1, 7, 7, 20],
    });
    expect([...groups.boundaries]).toEqual([0, 151, 601, 1000]);
  });

  test("statistics must be there for every group and finite", () => {
    const axis = timestepAxis(10);
    expect(() => adaptiveTimeGroups(axis, 3, { bins: [1, 2], values: [0, 0] })).toThrow(
      "every group must have a bin with statistics, got 2 such bins for 3 groups",
    );
    expect(() => adaptiveTimeGroups(axis, 1, { bins: [1, 2], values: [0, NaN] })).toThrow("got NaN at bin 2");
    expect(() => adaptiveTimeGroups(axis, 1, { bins: [2, 1], values: [0, 0] })).toThrow("must ascend");
    expect(() => adaptiveTimeGroups(axis, 1, { bins: [1, 10], values: [0, 0] })).toThrow("must ascend");
    expect(() => adaptiveTimeGroups(axis, 1, { bins: [1, 2], values: [0, 0, 0] })).toThrow(TypeError);
    expect(() => adaptiveTimeGroups(axis, 1, { bins: [1], values: [0], weights: [0] })).toThrow("above 0");
  });
});
