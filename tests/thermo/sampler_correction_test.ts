import { describe, expect, test } from "bun:test";
import {
  correctedDeviation,
  correctPredictions,
  PredictionRegression,
} from "../../lib/thermo/sampler_correction.ts";
import { noiseSchedule } from "../../lib/thermo/transition.ts";
import { gaussians } from "../_kernels.ts";

describe("the sampler's correction", () => {
  const n = 50_000, full = gaussians(1, n), noise = gaussians(2, n);
  const quantized = full.map((v, i) => 0.9 * v + 0.05 + 0.2 * noise[i]!);

  test("finds gain, bias and noise, in any number of parts", () => {
    const whole = new PredictionRegression(), parts = new PredictionRegression();
    whole.add(full, quantized);
    for (let i = 0; i < n; i += 1000) parts.add(full.subarray(i, i + 1000), quantized.subarray(i, i + 1000));
    const { gain, bias, noiseVariance } = whole.correction();
    expect(gain).toBeCloseTo(0.9, 2);
    expect(bias).toBeCloseTo(0.05, 2);
    expect(noiseVariance).toBeCloseTo(0.04, 3);
    expect(parts.correction()).toEqual(whole.correction());
  });

  test("corrected predictions are unbiased and nearer; equal models need none", () => {
    const regression = new PredictionRegression();
    regression.add(full, quantized);
    const out = quantized.slice();
    correctPredictions(out, regression.correction(), out);
    const error = (values: Float32Array) => values.reduce((sum, v, i) => sum + (v - full[i]!) ** 2, 0) / n;
    const mean = out.reduce((sum, v, i) => sum + v - full[i]!, 0) / n;
    expect(Math.abs(mean)).toBeLessThan(1e-4);
    expect(error(out)).toBeLessThan(error(quantized.map((v) => v + 0.05)));
    const same = new PredictionRegression();
    same.add(full, full);
    expect(same.correction()).toEqual({ gain: 1, bias: 0, noiseVariance: 0 });
  });

  test("a step's whole variance stays what it was", () => {
    const schedule = noiseSchedule("linear", 1000);
    for (const t of [1, 10, 500, 999]) {
      const [from, to] = [t, t - 1].map((t) => schedule.alphasCumulative[t]!) as [number, number];
      const beta = 1 - from / to, deviation = Math.sqrt((1 - to) / (1 - from) * beta);
      const step = { ofEpsilon: beta / Math.sqrt((1 - from) * (1 - beta)), deviation };
      const correction = { gain: 0.9, bias: 0, noiseVariance: 0.04 };
      const left = correctedDeviation(step, correction);
      const brought = (step.ofEpsilon * 0.2 / 0.9) ** 2;
      if (brought < step.deviation ** 2) {
        expect(left ** 2 + brought).toBeCloseTo(step.deviation ** 2, 12);
        expect(left).toBeGreaterThan(0);
      } else expect(left).toBe(0);
    }
    expect(
      correctedDeviation({ ofEpsilon: 5, deviation: 0.1 }, {
        gain: 1,
        bias: 0,
        noiseVariance: 1,
      }),
    )
      .toBe(0);
  });

  test("alike, opposite, too few and broken predictions", () => {
    const of = (full: number[], quantized: number[]) => {
      const regression = new PredictionRegression();
      regression.add(full, quantized);
      return regression.correction();
    };
    expect(of([2, 2], [3, 3])).toEqual({ gain: 1, bias: 1, noiseVariance: 0 });
    expect(of([0, 1], [1, 0]).gain).toBe(1);
    expect(() => of([1], [1])).toThrow("at least 2 predictions, got 1");
    expect(() => of([1, NaN], [1, 1])).toThrow("got NaN and 1 at 1");
    expect(() => of([1, 2], [1])).toThrow(TypeError);
  });
});
