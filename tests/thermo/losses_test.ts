import { afterAll, describe, expect, test } from "bun:test";
import { codeProbabilities } from "../../lib/quant/solvers/annealing.ts";
import { solveBlockTridiagonal, solveGaussMarkov } from "../../lib/thermo/gauss_markov.ts";
import { entropyLoss, markovLoss } from "../../lib/thermo/losses.ts";
import { tokenKl } from "../../lib/thermo/masked_transition.ts";
import { allKernels, gaussians, randomStream } from "../_kernels.ts";

const everywhere = await allKernels();
afterAll(() => {
  for (const { kernels } of everywhere) kernels.close();
});

function differences(x: ArrayLike<number>, loss: (x: Float64Array) => number, step = 1e-5): number[] {
  const at = Float64Array.from(x);
  return Array.from(at, (value, i) => {
    at[i] = value + step;
    const above = loss(at);
    at[i] = value - step;
    const below = loss(at);
    at[i] = value;
    return (above - below) / (2 * step);
  });
}

function expectGradient(actual: ArrayLike<number>, wanted: ArrayLike<number>): void {
  const largest = Math.max(...Array.from(wanted, Math.abs));
  for (let i = 0; i < wanted.length; i++) {
    expect(Math.abs(actual[i]! - wanted[i]!)).toBeLessThanOrEqual(
      1e-3 * Math.abs(wanted[i]!) + 1e-5 * largest,
    );
  }
}

/** A symmetric, positive definite matrix. */
function moment(n: number, seed: number): Float32Array<ArrayBuffer> {
  const x = gaussians(seed, 3 * n * n);
  return Float32Array.from({ length: n * n }, (_, at) => {
    const i = Math.floor(at / n), j = at % n;
    let sum = 0;
    for (let k = 0; k < 3 * n; k++) sum += x[k * n + i]! * x[k * n + j]!;
    return sum / (3 * n);
  });
}

describe("Markov loss", () => {
  test("by hand and against differences", () => {
    expect(markovLoss(Float64Array.of(1, 10, 2, 8), 2, 2)).toEqual({
      loss: 10,
      gradient: Float64Array.of(-4, 8, 4, -8),
    });
    const theta = Float64Array.from(gaussians(4, 15));
    expectGradient(markovLoss(theta, 5, 0.3).gradient, differences(theta, (x) => markovLoss(x, 5, 0.3).loss));
    expect(markovLoss(theta, 1, 1).loss).toBe(0);
  });

  test("bad input", () => {
    expect(() => markovLoss(new Float64Array(3), 2, 1)).toThrow(TypeError);
    for (const weight of [-1, NaN, Infinity]) {
      expect(() => markovLoss(new Float64Array(2), 2, weight)).toThrow("a number ≥ 0");
    }
  });
});

describe("entropy loss", () => {
  const weights = gaussians(5, 15);
  const group = {
    cols: 5,
    bits: 2,
    groupSize: 2,
    scale: gaussians(6, 9).map((s) => 0.5 + Math.abs(s)),
    zeroPoint: gaussians(8, 9).map((z) => 1.4 + 0.3 * z),
  };

  test("probabilities: a softmax of distances, the nearest alone at 0", () => {
    const p = new Float64Array(4);
    codeProbabilities(1.2, 4, 0.5, p);
    const e = [0, 1, 2, 3].map((c) => Math.exp(-((1.2 - c) ** 2) / 0.5));
    const sum = e.reduce((a, b) => a + b);
    for (let c = 0; c < 4; c++) expect(p[c]).toBeCloseTo(e[c]! / sum, 14);
    for (const [position, code] of [[-5, 0], [0.49, 0], [0.5, 0], [0.51, 1], [9, 3]] as const) {
      codeProbabilities(position, 4, 0, p);
      expect(p.indexOf(1)).toBe(code);
    }
    codeProbabilities(500, 4, 1e-3, p); // far outside: no overflow
    expect([...p]).toEqual([0, 0, 0, 1]);
  });

  test("is minus the temperature times the entropy of the soft codes", () => {
    const [position, temperature] = [0.3 / 0.7 + 1.4, 0.4];
    const e = [0, 1, 2, 3].map((code) => Math.exp(-((position - code) ** 2) / temperature));
    const sum = e.reduce((a, b) => a + b);
    const wanted = temperature * e.reduce((total, value) => total + value / sum * Math.log(value / sum), 0);
    const one = { cols: 1, bits: 2, groupSize: 0, scale: [0.7], zeroPoint: [1.4] };
    expect(entropyLoss(Float32Array.of(0.3), one, temperature).loss).toBeCloseTo(wanted, 7);
    expect(entropyLoss(Float32Array.of(0.3), one, 0).loss).toBe(0);
    expect(entropyLoss(Float32Array.of(0.3), { ...one, scale: [0] }, temperature).loss).toBe(0);
  });

  test("derivatives against central differences, at every temperature", () => {
    for (const temperature of [0.01, 0.05, 0.5, 5]) {
      const { byScale, byZeroPoint } = entropyLoss(weights, group, temperature);
      expectGradient(
        byScale,
        differences(group.scale, (scale) => entropyLoss(weights, { ...group, scale }, temperature).loss),
      );
      expectGradient(
        byZeroPoint,
        differences(
          group.zeroPoint,
          (zeroPoint) => entropyLoss(weights, { ...group, zeroPoint }, temperature).loss,
        ),
      );
    }
  });

  test("bad input", () => {
    for (const temperature of [-1, 101, NaN]) {
      expect(() => entropyLoss(weights, group, temperature)).toThrow("the temperature must be from 0 to 100");
    }
  });
});

describe("Gauss-Markov prior", () => {
  test("block-tridiagonal systems against the dense equations", () => {
    for (const [groups, n] of [[1, 1], [1, 4], [5, 1], [4, 3], [20, 2]] as const) {
      const diagonal = new Float64Array(groups * n * n), random = randomStream(groups + n);
      for (let g = 0; g < groups; g++) {
        const block = moment(n, 10 * g + n);
        diagonal.set(Float64Array.from(block, (v, i) => v + (i % (n + 1) === 0 ? 2 * n : 0)), g * n * n);
      }
      const upper = Float64Array.from({ length: (groups - 1) * n * n }, () => random() - 0.5);
      const right = Float64Array.from({ length: groups * n }, () => random());
      const x = solveBlockTridiagonal(diagonal, upper, right, n);
      for (let g = 0; g < groups; g++) {
        for (let i = 0; i < n; i++) {
          let sum = 0;
          for (let j = 0; j < n; j++) {
            sum += diagonal[(g * n + i) * n + j]! * x[g * n + j]!;
            if (g + 1 < groups) sum += upper[(g * n + i) * n + j]! * x[(g + 1) * n + j]!;
            if (g > 0) sum += upper[((g - 1) * n + j) * n + i]! * x[(g - 1) * n + j]!;
          }
          expect(sum).toBeCloseTo(right[g * n + i]!, 11);
        }
      }
    }
  });

  test("the solution's gradient is 0", () => {
    const groups = 6, n = 2, target = Float64Array.from(gaussians(8, groups * n));
    const curvature = new Float64Array(groups * n * n);
    for (let g = 0; g < groups; g++) curvature.set(moment(n, 40 + g), g * n * n);
    const lambda = 0.7;
    const units = [0, 1].map((i) => {
      let sum = 0;
      for (let g = 0; g < groups; g++) sum += curvature[(g * n + i) * n + i]! / groups;
      return sum;
    });
    const loss = (theta: Float64Array) => {
      let sum = 0;
      for (let g = 0; g < groups; g++) {
        for (let i = 0; i < n; i++) {
          for (let j = 0; j < n; j++) {
            sum += (theta[g * n + i]! - target[g * n + i]!) * curvature[(g * n + i) * n + j]! *
              (theta[g * n + j]! - target[g * n + j]!);
          }
          if (g > 0) sum += lambda * units[i]! * (theta[g * n + i]! - theta[(g - 1) * n + i]!) ** 2;
        }
      }
      return sum;
    };
    const theta = solveGaussMarkov({ curvature, target, n }, lambda);
    for (const slope of differences(theta, loss)) expect(Math.abs(slope)).toBeLessThan(1e-9);
  });

  test("no weight: the targets; much: nearly one for all; constants stay", () => {
    const curvature = Float64Array.of(1, 4, 1), target = Float64Array.of(0, 1, 5);
    expect([...solveGaussMarkov({ curvature, target, n: 1 }, 0)]).toEqual([0, 1, 5]);
    const stiff = solveGaussMarkov({ curvature, target, n: 1 }, 100);
    for (const value of stiff) expect(value).toBeCloseTo(9 / 6, 1); // the weighted mean
    const constant = solveGaussMarkov({ curvature, target: Float64Array.of(3, 3, 3), n: 1 }, 10);
    for (const value of constant) expect(value).toBeCloseTo(3, 12);
    // A group without data takes what its neighbours say.
    const between = solveGaussMarkov({
      curvature: Float64Array.of(1, 0, 1),
      target: Float64Array.of(1, 99, 3),
      n: 1,
    }, 0.01);
    expect(between[1]).toBeCloseTo(2, 1);
  });

  test("bad input", () => {
    const good = { curvature: Float64Array.of(1, 1), target: Float64Array.of(0, 1), n: 1 };
    for (const weight of [-0.1, 101, NaN]) {
      expect(() => solveGaussMarkov(good, weight)).toThrow("markovWeight must lie in [0, 100]");
    }
    expect(() => solveGaussMarkov({ ...good, target: Float64Array.of(NaN, 1) }, 1)).toThrow(
      "target must be finite",
    );
    expect(() => solveGaussMarkov({ ...good, curvature: Float64Array.of(0, 0) }, 1)).toThrow(
      "positive definite",
    );
    expect(() => solveGaussMarkov({ ...good, curvature: Float64Array.of(1) }, 1)).toThrow(TypeError);
    expect(() => solveBlockTridiagonal(Float64Array.of(1), new Float64Array(0), Float64Array.of(1), 0))
      .toThrow(TypeError);
  });
});

for (const temperature of [1, 3]) {
  test(`the token KL's gradient at temperature ${temperature} against central differences`, () => {
    const full = gaussians(11, 12), quantized = gaussians(12, 12), weights = [0.5, 2, 1];
    const gradient = new Float32Array(12).fill(NaN);
    const kl = tokenKl(full, quantized, { vocabularySize: 4, maskToken: 1 }, {
      gradient,
      weights,
      temperature,
    });
    const loss = (logits: ArrayLike<number>) => {
      let sum = 0;
      for (let row = 0; row < 3; row++) {
        const p = [0, 2, 3].map((i) => Math.exp(full[4 * row + i]! / temperature)),
          q = [0, 2, 3].map((i) => Math.exp(logits[4 * row + i]! / temperature));
        const total = (values: number[]) => values.reduce((a, b) => a + b);
        for (let i = 0; i < 3; i++) {
          const share = p[i]! / total(p);
          sum += temperature ** 2 * weights[row]! * share * Math.log(share / (q[i]! / total(q)));
        }
      }
      return sum;
    };
    expect(kl.reduce((sum, value, row) => sum + weights[row]! * value, 0)).toBeCloseTo(loss(quantized), 10);
    expectGradient(gradient, differences(quantized, loss));
    expect([gradient[1], gradient[5], gradient[9]]).toEqual([0, 0, 0]);
  });
}
