import { describe, expect, test } from "bun:test";
import { severityOf, validateMarkov } from "../../lib/thermo/validator.ts";
import { randomStream } from "../_kernels.ts";

describe("Markov score", () => {
  test("by hand", () => {
    const report = validateMarkov({ scale: [2, 3, 1.5], zeroPoint: [100, 151, 151], bits: 8 }, 0.3);
    expect(report.scaleJumps).toEqual([0.5, 0.5]);
    expect(report.zeroPointJumps).toEqual([0.2, 0]);
    expect(report.boundaryScores).toEqual([1 - 0.7 / 2, 0.75]);
    expect(report.markovScore).toBeCloseTo(1 - 1.2 / 4, 15);
    expect(report.violations).toEqual([
      { boundary: 0, kind: "scale", jump: 0.5, severity: "medium" },
      { boundary: 1, kind: "scale", jump: 0.5, severity: "medium" },
    ]);
  });

  test("is 1 for fewer than two groups and for constants, 0 at worst", () => {
    expect(validateMarkov({ scale: [3], zeroPoint: [7], bits: 4 }, 0).markovScore).toBe(1);
    const constant = validateMarkov({ scale: [3, 3, 3], zeroPoint: [7, 7, 7], bits: 4 }, 0);
    expect([constant.markovScore, constant.violations]).toEqual([1, []]);
    expect(validateMarkov({ scale: [1, 1000], zeroPoint: [0, 15], bits: 4 }, 0.3).markovScore).toBe(0);
  });

  test("properties: in [0, 1]; no unit of scale matters; a shift of zero points neither; the order of time does", () => {
    for (let seed = 1; seed <= 200; seed++) {
      const random = randomStream(seed);
      const groups = 2 + Math.floor(random() * 9);
      const scale = Array.from({ length: groups }, () => 0.1 + random());
      const zeroPoint = Array.from({ length: groups }, () => 255 * random());
      const report = validateMarkov({ scale, zeroPoint, bits: 8 }, 0.3);
      expect(report.markovScore).toBeGreaterThanOrEqual(0);
      expect(report.markovScore).toBeLessThanOrEqual(1);
      for (const score of report.boundaryScores) expect(score).toBeLessThanOrEqual(1);
      const other = validateMarkov({
        scale: scale.map((s) => 8 * s),
        zeroPoint: zeroPoint.map((z) => z + 3),
        bits: 8,
      }, 0.3);
      expect(other.markovScore).toBeCloseTo(report.markovScore, 12);
      // one jump made smaller never lowers the score
      const smoother = scale.slice();
      smoother[groups - 1] = (smoother[groups - 1]! + smoother[groups - 2]!) / 2;
      expect(validateMarkov({ scale: smoother, zeroPoint, bits: 8 }, 0.3).markovScore)
        .toBeGreaterThanOrEqual(report.markovScore);
      expect(report.violations.every(({ jump }) => jump > 0.3)).toBe(true);
    }
    const there = validateMarkov({ scale: [1, 2], zeroPoint: [0, 0], bits: 8 }, 0.3).markovScore;
    const back = validateMarkov({ scale: [2, 1], zeroPoint: [0, 0], bits: 8 }, 0.3).markovScore;
    expect([there, back]).toEqual([0.5, 0.75]);
  });

  test("severity grows with the jump; the threshold itself is none", () => {
    expect([0.2, 0.21, 0.29, 0.31, 0.39, 0.41, 9].map((jump) => severityOf(jump, 0.2))).toEqual([
      undefined,
      "low",
      "low",
      "medium",
      "medium",
      "high",
      "high",
    ]);
  });

  test("bad input", () => {
    const good = { scale: [1, 1], zeroPoint: [0, 0], bits: 8 };
    for (const threshold of [-0.1, 1.1, NaN]) {
      expect(() => validateMarkov(good, threshold)).toThrow("smoothnessThreshold must lie in [0, 1]");
    }
    expect(() => validateMarkov({ ...good, scale: [1, 0] }, 0.3)).toThrow(
      "above 0, got 0 for group 1",
    );
    expect(() => validateMarkov({ ...good, scale: [NaN, 1] }, 0.3)).toThrow("got NaN for group 0");
    expect(() => validateMarkov({ ...good, zeroPoint: [0, Infinity] }, 0.3)).toThrow("got Infinity");
    expect(() => validateMarkov({ ...good, zeroPoint: [0] }, 0.3)).toThrow(TypeError);
    expect(() => validateMarkov({ ...good, bits: 0 }, 0.3)).toThrow("bits");
  });
});
