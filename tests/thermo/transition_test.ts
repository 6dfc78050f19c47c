import { describe, expect, test } from "bun:test";
import { LayerTimeCache } from "../../lib/thermo/lru_cache.ts";
import {
  likeliestTokens,
  tokenKl,
  unmaskProbability,
  unwrittenTokens,
} from "../../lib/thermo/masked_transition.ts";
import {
  capWeights,
  ddimDisplacementWeight,
  noiseSchedule,
  stepKlWeight,
  TransitionComputer,
} from "../../lib/thermo/transition.ts";
import { randomStream } from "../_kernels.ts";

/** Three timesteps with round numbers: β = 0.1, 0.2, 0.5, so ᾱ = 0.9, 0.72, 0.36. */
const TOY = { betas: [0.1, 0.2, 0.5], alphasCumulative: [0.9, 0.72, 0.36] };

describe("noise schedules", () => {
  test("linear ends and middle, ᾱ by product", () => {
    const { betas, alphasCumulative } = noiseSchedule("linear", 1000);
    expect([betas[0], betas[999]]).toEqual([1e-4, 0.02]);
    expect(betas[500]).toBeCloseTo(1e-4 + 0.0199 * 500 / 999, 15);
    expect(alphasCumulative[1]).toBeCloseTo((1 - 1e-4) * (1 - betas[1]!), 15);
    expect(alphasCumulative[999]).toBeCloseTo(4.0358e-5, 8); // DDPM's own schedule
  });

  test("cosine is cos² of its angle, cut at 0.9999", () => {
    const { betas, alphasCumulative } = noiseSchedule("cosine", 1000);
    const cosine = (t: number) => Math.cos((t / 1000 + 0.008) / 1.008 * Math.PI / 2) ** 2;
    for (const t of [0, 10, 500, 900]) {
      expect(alphasCumulative[t]! / (cosine(t + 1) / cosine(0))).toBeCloseTo(1, 10);
    }
    expect(betas[999]).toBe(0.9999);
    expect(Math.max(...(betas as Float64Array))).toBe(0.9999);
  });

  test("bad names and counts", () => {
    expect(() => noiseSchedule("square" as "linear", 10)).toThrow(
      'must be "linear" or "cosine", got "square"',
    );
    for (const count of [0, -1, 1.5, NaN]) expect(() => noiseSchedule("linear", count)).toThrow(RangeError);
  });
});

describe("a Gaussian step", () => {
  test("weights by hand: ε, v, x0, DDIM", () => {
    // β² / (2 σ² α (1 − ᾱ)) = 0.25 / (2 · 0.21875 · 0.5 · 0.64)
    const ofEpsilon = 0.25 / 0.14;
    expect(stepKlWeight(TOY, 2, "epsilon")).toBeCloseTo(ofEpsilon, 13);
    expect(stepKlWeight(TOY, 2, "v_prediction")).toBeCloseTo(0.36 * ofEpsilon, 13);
    expect(stepKlWeight(TOY, 2, "sample")).toBeCloseTo(0.5625 * ofEpsilon, 13);
    expect(stepKlWeight(TOY, 2, "epsilon", { variance: "fixed_large" })).toBeCloseTo(0.25 / 0.32, 13);
    expect(stepKlWeight(TOY, 0, "epsilon")).toBe(Infinity);
    const displacement = Math.sqrt(0.28) - Math.sqrt(0.72 * 0.64 / 0.36);
    expect(ddimDisplacementWeight(TOY, 2, "epsilon")).toBeCloseTo(displacement ** 2, 14);
    expect(ddimDisplacementWeight(TOY, 2, "sample")).toBeCloseTo(0.5625 * displacement ** 2, 14);
  });

  test("weights are the KL of two Gaussians that differ by the prediction", () => {
    const schedule = noiseSchedule("linear", 1000);
    const random = randomStream(3);
    for (const t of [1, 17, 500, 999]) {
      const alphaBar = schedule.alphasCumulative[t]!;
      const alpha = 1 - schedule.betas[t]!, before = schedule.alphasCumulative[t - 1]!;
      const ofEpsilon = (1 - alpha) / Math.sqrt((1 - alphaBar) * alpha);
      const variance = (1 - before) / (1 - alphaBar) * (1 - alpha);
      for (const prediction of ["epsilon", "v_prediction", "sample"] as const) {
        const x = random(), full = random(), quantized = full + 0.1 * random();
        const epsilonOf = (value: number) => {
          if (prediction === "epsilon") return value;
          if (prediction === "sample") return (x - Math.sqrt(alphaBar) * value) / Math.sqrt(1 - alphaBar);
          return Math.sqrt(alphaBar) * value + Math.sqrt(1 - alphaBar) * x;
        };
        const shift = ofEpsilon * (epsilonOf(full) - epsilonOf(quantized));
        const kl = shift ** 2 / (2 * variance); // of Gaussians with equal variances
        const weight = stepKlWeight(schedule, t, prediction);
        expect(weight * (full - quantized) ** 2 / kl).toBeCloseTo(1, 5);
      }
    }
  });

  test("a deterministic DDIM step moves by the displacement", () => {
    const from = TOY.alphasCumulative[2]!, to = TOY.alphasCumulative[0]!;
    const step = (x: number, epsilon: number) =>
      Math.sqrt(to) * (x - Math.sqrt(1 - from) * epsilon) / Math.sqrt(from) + Math.sqrt(1 - to) * epsilon;
    const moved = step(0.4, 0.7) - step(0.4, 0.6);
    expect(ddimDisplacementWeight(TOY, 2, "epsilon", { next: 0 }) * 0.01).toBeCloseTo(moved ** 2, 14);
  });

  test("a learned variance weighs by the second derivative of the KL of two variances", () => {
    // KL of N(0, a) and N(0, b) for ln b = ln a + d is (d² / 4) + O(d³); d = Δv/2 · ln(β/β̃).
    const large = 0.5, small = 0.21875, step = 1e-3, change = Math.exp(step / 2 * Math.log(large / small));
    const kl = 0.5 * (Math.log(change) + 1 / change - 1);
    expect(new TransitionComputer(TOY).varianceWeightOf(2) * step ** 2 / kl).toBeCloseTo(1, 3);
    expect(() => new TransitionComputer().varianceWeightOf(2)).toThrow("needs a noise schedule, got none");
  });

  test("bad input", () => {
    const weight = (t: number, next?: number) =>
      stepKlWeight(TOY, t, "epsilon", next === undefined ? {} : { next });
    for (const t of [-1, 3, 0.5, NaN]) expect(() => weight(t)).toThrow("from 0 to 2");
    expect(() => weight(1, 1)).toThrow("must lead to a lower one");
    const flat = { betas: [0, 0], alphasCumulative: [1, 1] };
    expect(() => stepKlWeight(flat, 1, "epsilon")).toThrow("ᾱ must fall inside (0, 1)");
  });
});

describe("capped weights", () => {
  test("the 95th percentile of the finite weights, by nearest rank", () => {
    const { weights, cap, capped, percentile } = capWeights(
      Array.from({ length: 101 }, (_, i) => i < 100 ? i + 1 : Infinity),
    );
    expect([cap, capped, percentile]).toEqual([95, 6, 95]);
    expect([weights[0], weights[94], weights[95], weights[100]]).toEqual([1, 95, 95, 95]);
  });

  test("NaN, negative and only infinite weights are refused", () => {
    for (const weights of [[NaN, 1], [-1, 1], [Infinity], []]) {
      expect(() => capWeights(weights)).toThrow(RangeError);
    }
  });
});

describe("TransitionComputer", () => {
  test("weights of a run go from each visited timestep to the next", () => {
    const computer = new TransitionComputer(TOY, {
      prediction: "epsilon",
      sampler: "ddim",
      timesteps: [2, 0],
    });
    expect(computer.weightOf(0)).toBeCloseTo(ddimDisplacementWeight(TOY, 0, "epsilon"), 15);
    expect(computer.weightOf(2)).toBeCloseTo(ddimDisplacementWeight(TOY, 2, "epsilon", { next: 0 }), 15);
    expect(() => computer.weightOf(1)).toThrow("the run must visit the timestep, got 1");
  });

  test("DDPM's infinite last weight is cut, and says so", () => {
    const computer = new TransitionComputer(noiseSchedule("linear", 1000), {
      prediction: "epsilon",
      sampler: "ddpm",
    });
    expect(computer.cap!.capped).toBe(50); // of 999 finite weights 49 lie above rank 950, and the infinite one
    expect(computer.weightOf(0)).toBe(computer.cap!.cap);
    expect(computer.cap!.cap).toBeLessThan(Infinity);
  });

  test("a layer's step KLs are measured once at a timestep", () => {
    const computer = new TransitionComputer(TOY, { prediction: "epsilon", sampler: "ddim" });
    let asked = 0;
    const measure = () => {
      asked++;
      return [2, 3];
    };
    expect([...computer.stepKl("a", 2, measure)]).toEqual([2, 3]);
    expect([...computer.stepKl("a", 2, measure)]).toEqual([2, 3]);
    computer.stepKl("b", 2, measure);
    expect(asked).toBe(2);
    expect(computer.cacheStatistics).toEqual({ hits: 1, misses: 2, evictions: 0, entries: 2 });
  });

  test("masked diffusion: every mask ratio weighs 1", () => {
    const computer = new TransitionComputer();
    expect([computer.weightOf(0.37), computer.weightOf(1), computer.cap]).toEqual([1, 1, undefined]);
    expect([...computer.stepKl("model", 0.37, () => [0.5])]).toEqual([0.5]);
  });
});

test("LRU: what was not used for longest goes first; statistics count", () => {
  const cache = new LayerTimeCache<number>(2);
  cache.get("a", 1, () => 1);
  cache.get("a", 2, () => 2);
  cache.get("a", 1, () => -1); // used: 2 is the oldest now
  cache.get("b", 1, () => 3);
  expect(cache.get("a", 1, () => -1)).toBe(1);
  expect(cache.get("a", 2, () => 4)).toBe(4); // had gone; b goes
  expect(cache.statistics).toEqual({ hits: 2, misses: 4, evictions: 2, entries: 2 });
  expect(() =>
    cache.get("x", 1, () => {
      throw new Error("no");
    })
  ).toThrow("no");
  expect(cache.statistics.entries).toBe(2);
  expect(() => new LayerTimeCache(0)).toThrow(RangeError);
});

describe("masked diffusion", () => {
  const softmax = (logits: number[]) => {
    const sum = logits.reduce((total, l) => total + Math.exp(l), 0);
    return logits.map((l) => Math.exp(l) / sum);
  };

  test("step KL against enumeration of a toy chain", () => {
    // Two masked positions, three tokens: every outcome of a step, mask (−1) or a token at each position.
    const full = [[0.3, -1, 2], [1, 0.5, -0.2]], quantized = [[0.1, -0.5, 1.5], [0.2, 1.5, 0]];
    const from = 0.8, to = 0.5, rho = 1 - to / from;
    const chance = (logits: number[], outcome: number) =>
      outcome < 0 ? 1 - rho : rho * softmax(logits)[outcome]!;
    let wanted = 0, total = 0;
    for (let a = -1; a < 3; a++) {
      for (let b = -1; b < 3; b++) {
        const p = chance(full[0]!, a) * chance(full[1]!, b);
        const q = chance(quantized[0]!, a) * chance(quantized[1]!, b);
        wanted += p * Math.log(p / q);
        total += p;
      }
    }
    expect(total).toBeCloseTo(1, 14);
    const flat = (rows: number[][]) => Float32Array.from(rows.flat());
    const kl = tokenKl(flat(full), flat(quantized), { vocabularySize: 3 });
    expect(rho * kl.reduce((sum, value) => sum + value, 0)).toBeCloseTo(wanted, 7);
    expect(unmaskProbability(from, to)).toBeCloseTo(rho, 15);
  });

  test("excluded tokens have no probability in either", () => {
    const full = Float32Array.of(1, 2, 30), quantized = Float32Array.of(2, 1, -5);
    const [kl] = tokenKl(full, quantized, { vocabularySize: 3, maskToken: 2 });
    const p = softmax([1, 2]), q = softmax([2, 1]);
    expect(kl).toBeCloseTo(p[0]! * Math.log(p[0]! / q[0]!) + p[1]! * Math.log(p[1]! / q[1]!), 12);
  });

  test("padding is excluded unless the model ends its text with it; the most probable token is of the others", () => {
    const vocabulary = { vocabularySize: 4, maskToken: 0, padToken: 3, eosToken: 2 };
    expect(unwrittenTokens(vocabulary)).toEqual([0, 3]);
    expect(unwrittenTokens({ ...vocabulary, eosToken: 3 })).toEqual([0]);
    expect(unwrittenTokens({ vocabularySize: 4, maskToken: 0 })).toEqual([0]);
    const logits = Float32Array.of(9, 1, 2, 3, 9, 4, 4, 5);
    expect([...likeliestTokens(logits, vocabulary)]).toEqual([2, 1]);
    expect([...likeliestTokens(logits, { ...vocabulary, eosToken: 3 })]).toEqual([3, 3]);
  });

  test("large logits do not overflow, equal ones give 0", () => {
    const large = Float32Array.of(1e4, -1e4, 0);
    expect([...tokenKl(large, large, { vocabularySize: 3 })]).toEqual([0]);
    expect(tokenKl(large, Float32Array.of(0, 0, 0), { vocabularySize: 3 })[0]).toBeCloseTo(Math.log(3), 12);
  });

  test("bad input", () => {
    expect(() => unmaskProbability(0.5, 0.5)).toThrow("0 ≤ to < from ≤ 1");
    expect(() => unmaskProbability(1.1, 0.5)).toThrow(RangeError);
    const two = { vocabularySize: 2 }, zeros = new Float32Array(2);
    expect(() => tokenKl(new Float32Array(5), new Float32Array(5), two)).toThrow(TypeError);
    expect(() => tokenKl(Float32Array.of(NaN, 1), Float32Array.of(0, 1), two)).toThrow("got others in row 0");
    expect(() => tokenKl(zeros, zeros, { ...two, maskToken: 0, padToken: 1 })).toThrow("got none");
    expect(() => likeliestTokens(zeros, { ...two, maskToken: 2 })).toThrow("from 0 to 1, got 2");
    for (const temperature of [0, -1, 101, NaN]) {
      expect(() => tokenKl(zeros, zeros, two, { temperature })).toThrow(
        `the temperature must lie in [0.01, 100], got ${temperature}`,
      );
    }
  });
});
