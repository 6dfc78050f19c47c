import { describe, expect, test } from "bun:test";
import { median, pairedRatio, summarize } from "../../lib/eval/statistics.ts";

describe("median", () => {
  test("is the middle value, or the mean of the two in the middle", () => {
    expect(median([3])).toBe(3);
    expect(median([5, 1, 3])).toBe(3);
    expect(median([4, 1, 3, 2])).toBe(2.5);
    expect(median([10, 9, 100, -1])).toBe(9.5);
  });

  test("sorts numbers as numbers and leaves the argument alone", () => {
    const values = [100, 9, 20];
    expect(median(values)).toBe(20);
    expect(values).toEqual([100, 9, 20]);
  });

  test("refuses nothing and NaN", () => {
    expect(() => median([])).toThrow(RangeError);
    expect(() => median([1, NaN])).toThrow("got NaN");
  });
});

test("a summary has the extremes and the median of the deviations", () => {
  // Deviations from 4: 3, 2, 0, 1, 96; in order 0, 1, 2, 3, 96.
  expect(summarize([1, 2, 4, 5, 100])).toEqual({
    count: 5,
    median: 4,
    minimum: 1,
    maximum: 100,
    medianDeviation: 2,
  });
});

describe("paired ratios", () => {
  test("are the summary of the ratios, not the ratio of the medians", () => {
    // Ratios 2, 2, 2 although the medians alone would also say 20 / 10; and 1/4, 4, 1: medians 2 and 2 say 1.
    expect(pairedRatio([2, 20, 200], [1, 10, 100])).toEqual({
      count: 3,
      median: 2,
      minimum: 2,
      maximum: 2,
      medianDeviation: 0,
    });
    const skewed = pairedRatio([1, 8, 2, 6], [4, 2, 1, 3]); // 0.25, 4, 2, 2; medians 4 and 2.5 would say 1.6
    expect(skewed.median).toBe(2);
    expect(skewed.minimum).toBe(0.25);
    expect(skewed.maximum).toBe(4);
  });

  test("need as many of one as of the other", () => {
    expect(() => pairedRatio([1, 2], [1])).toThrow("got 2 and 1");
  });
});
