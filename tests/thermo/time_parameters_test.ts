import { afterAll, describe, expect, test } from "bun:test";
import { correctOutputs, smoothActivationParameters } from "../../lib/thermo/time_parameters.ts";
import { outputCorrection, TimeGroups, timestepAxis } from "../../lib/time/mod.ts";
import { allKernels, gaussians, randomStream } from "../_kernels.ts";

const everywhere = await allKernels();
const { kernels } = everywhere[0]!;
afterAll(() => {
  for (const { kernels: each } of everywhere) each.close();
});

describe("smooth grids", () => {
  test("cover what calibration saw, with whole zero points; constants and what lies outside stay to the bit", () => {
    for (let seed = 1; seed <= 100; seed++) {
      const random = randomStream(seed), bits = seed % 2 === 0 ? 4 : 8, top = 2 ** bits - 1;
      const groups = new TimeGroups(timestepAxis(50), [0, 9, 10, 25, 50]);
      const scale = Float32Array.from({ length: 4 }, () => 0.1 + random());
      const zeroPoint = Int32Array.from({ length: 4 }, () => Math.floor(random() * (top + 1)));
      const windowSize = 1 + seed % 6;
      const smooth = smoothActivationParameters(groups, { bits, scale, zeroPoint }, { windowSize });
      let moved = 0;
      for (let bin = 0; bin < 50; bin++) {
        const g = groups.groupOfBin(bin), s = smooth.scale[bin]!, z = smooth.zeroPoint[bin]!;
        expect(z >= 0 && z <= top).toBe(true);
        expect(-s * z).toBeLessThanOrEqual(-scale[g]! * zeroPoint[g]! * (1 - 1e-12));
        expect(s * (top - z)).toBeGreaterThanOrEqual(scale[g]! * (top - zeroPoint[g]!) * (1 - 1e-12));
        const isOutside = [9, 10, 25].every((b) => bin < b - windowSize || bin >= b + windowSize);
        if (isOutside) expect([s, z]).toEqual([scale[g]!, zeroPoint[g]!]);
        else if (s !== scale[g]) moved++;
      }
      expect(moved).toBeGreaterThan(0);
      const constant = { bits, scale: scale.fill(0.3), zeroPoint: zeroPoint.fill(5) } as const;
      const same = smoothActivationParameters(groups, constant, { windowSize });
      expect([new Set(same.scale), new Set(same.zeroPoint)]).toEqual([
        new Set([Math.fround(0.3)]),
        new Set([5]),
      ]);
    }
  });
});

describe("output corrections under the Gauss-Markov prior", () => {
  const rows = 3, cols = 5, w = gaussians(1, rows * cols), q = w.map((v, i) => v + 0.3 * Math.sin(5 * i));
  const moments = Array.from({ length: 4 }, (_, g) => {
    const n = 200, x = gaussians(10 + g, n * cols).map((v, i) => (1 + g) * v + (i % cols) * 0.2 * g);
    const second = new Float32Array(cols * cols), mean = new Float32Array(cols);
    for (let t = 0; t < n; t++) {
      for (let i = 0; i < cols; i++) {
        mean[i]! += x[t * cols + i]! / n;
        for (let j = 0; j < cols; j++) second[i * cols + j]! += x[t * cols + i]! * x[t * cols + j]! / n;
      }
    }
    return { second, mean, samples: n };
  });

  test("without it every group has its own closed form", () => {
    const { gain, bias } = correctOutputs(kernels, { weights: w, quantized: q, rows, cols }, moments);
    for (const [g, group] of moments.entries()) {
      const own = outputCorrection(kernels, { weights: w, quantized: q, rows, cols }, group);
      expect(gain.subarray(g * rows, (g + 1) * rows)).toEqual(own.gain);
      expect(bias.subarray(g * rows, (g + 1) * rows)).toEqual(own.bias);
    }
  });

  test("the stronger it is, the less groups differ", () => {
    const spreads = [0, 0.1, 1, 100].map((weight) => {
      const { gain, bias } = correctOutputs(
        kernels,
        { weights: w, quantized: q, rows, cols },
        moments,
        weight,
      );
      let sum = 0;
      for (let i = rows; i < gain.length; i++) {
        sum += (gain[i]! - gain[i - rows]!) ** 2 + (bias[i]! - bias[i - rows]!) ** 2;
      }
      return sum;
    });
    for (let i = 1; i < 4; i++) expect(spreads[i]!).toBeLessThan(spreads[i - 1]!);
    expect(spreads[3]!).toBeLessThan(0.05 * spreads[0]!);
  });

  test("outputs that are always 0 and groups without weight", () => {
    const zero = new Float32Array(rows * cols);
    const { gain } = correctOutputs(kernels, { weights: w, quantized: zero, rows, cols }, moments, 0.5);
    expect([...gain]).toEqual(Array(rows * 4).fill(1));
    const weighted = moments.map((group, g) => ({ ...group, weight: g === 1 ? 0 : 1 }));
    const bridged = correctOutputs(kernels, { weights: w, quantized: q, rows, cols }, weighted, 0.01);
    expect(bridged.gain.every(Number.isFinite)).toBe(true);
    const bad = moments.map((group) => ({ ...group, weight: NaN }));
    expect(() => correctOutputs(kernels, { weights: w, quantized: q, rows, cols }, bad)).toThrow(
      "got NaN for group 0",
    );
    expect(() => correctOutputs(kernels, { weights: w, quantized: q, rows, cols }, moments, 101)).toThrow(
      "markovWeight",
    );
  });
});
