import { afterAll, describe, expect, test } from "bun:test";
import { createHash } from "node:crypto";
import { DEFAULT_SOLVER_SETTINGS } from "../../../lib/quant/solvers/settings.ts";
import { factorMoments } from "../../../lib/quant/solvers/factored_moment.ts";
import type { WeightFormat } from "../../../lib/quant/packed/layout.ts";
import { RandomStream } from "../../../lib/models/mod.ts";
import { openKernels, withThreads } from "../../../lib/native/mod.ts";
import { annealLayer, codeProbabilities } from "../../../lib/quant/solvers/annealing.ts";
import { dequantize } from "../../../lib/quant/mod.ts";
import { accumulateMoment, emptyMoments } from "../../../lib/quant/solvers/moments.ts";
import { solveLayer } from "../../../lib/quant/solvers/solve_layer.ts";

const kernels = await openKernels({ threads: 1 });
afterAll(() => kernels.close());

const normals = (random: RandomStream, n: number) => Float32Array.from({ length: n }, () => random.normal());

/** Inputs whose columns depend on each other. */
function problem(seed: number, rows: number, cols: number) {
  const random = new RandomStream(11, seed), tokens = 4 * cols;
  const mix = normals(random, cols * cols), x = new Float32Array(tokens * cols);
  for (let t = 0; t < tokens; t++) {
    const z = normals(random, cols);
    for (let k = 0; k < cols; k++) {
      for (let j = 0; j < cols; j++) x[t * cols + k]! += z[j]! * mix[j * cols + k]! / (1 + j);
    }
  }
  const moments = emptyMoments(cols);
  accumulateMoment(kernels, x, undefined, undefined, tokens, moments.second);
  moments.tokens = moments.weight = tokens;
  return { moment: factorMoments(kernels, moments), weights: normals(random, rows * cols) };
}

/** Δ M Δᵀ of a row in float64. */
function cost(delta: ArrayLike<number>, moment: Float32Array): number {
  let sum = 0;
  for (let i = 0; i < delta.length; i++) {
    for (let j = 0; j < delta.length; j++) sum += delta[i]! * moment[i * delta.length + j]! * delta[j]!;
  }
  return sum;
}

describe("annealing of codes", () => {
  test("a softmax of squared distances to 1e-14, at every temperature, by Math.exp", () => {
    const p = new Float64Array(8);
    for (const temperature of [1e-3, 0.05, 0.7, 5, 100]) {
      for (const position of [-3, 0.2, 0.5, 3.49, 7, 11]) {
        codeProbabilities(position, 8, temperature, p);
        const e = Array.from({ length: 8 }, (_, c) => Math.exp(-((position - c) ** 2) / temperature));
        const least = Math.max(...e), sum = e.reduce((a, b) => a + b);
        if (least < 1e-280) continue; // the oracle underflows
        for (let c = 0; c < 8; c++) expect(Math.abs(p[c]! - e[c]! / sum)).toBeLessThan(1e-14);
      }
    }
  });

  test("the same bits in every runtime", () => {
    const hash = createHash("sha256"), p = new Float64Array(4);
    for (let i = 0; i < 2000; i++) {
      codeProbabilities(i / 400 - 1, 4, 0.01 + (i * 7 % 100) / 50, p);
      hash.update(new Uint8Array(p.buffer));
    }
    expect(hash.digest("hex").slice(0, 16)).toBe("2f892bbca69c7d3a");
  });

  test("comes nearer to the least of all codes, by enumeration, than descent from the same codes", () => {
    const cols = 7, scale = Float32Array.of(0.6), zeroPoint = Float32Array.of(1.5);
    let annealed = 0, descended = 0, least = 0;
    for (let seed = 0; seed < 60; seed++) {
      const { moment: { moment }, weights: target } = problem(seed, 1, cols);
      const start = Uint8Array.from(target, (w) => Math.min(3, Math.max(0, Math.round(w / 0.6 + 1.5))));
      const found = (temperature: number) => {
        const codes = start.slice();
        annealLayer(
          { target, rows: 1, cols, bits: 2, groupSize: 0, moment, scale, zeroPoint },
          codes,
          temperature,
        );
        return cost(target.map((w, k) => w - scale[0]! * (codes[k]! - 1.5)), moment);
      };
      let best = Infinity;
      for (let all = 0; all < 4 ** cols; all++) {
        const delta = target.map((w, k) => w - scale[0]! * ((all >> (2 * k) & 3) - 1.5));
        best = Math.min(best, cost(delta, moment));
      }
      const [warm, cold] = [found(0.5), found(0)];
      expect(warm).toBeGreaterThanOrEqual(best * (1 - 1e-5));
      annealed += warm;
      descended += cold;
      least += best;
    }
    expect(annealed - least).toBeLessThan(0.8 * (descended - least));
  });

  const grids: [number, number, WeightFormat][] = [
    [24, 64, { bits: 2, groupSize: 0, zeroPoint: "real" }],
    [9, 70, { bits: 3, groupSize: 32, zeroPoint: "symmetric" }],
    [8, 160, { bits: 2, groupSize: 16, zeroPoint: "real", scaleBits: 4 }],
  ];

  test("`best` with it never has a larger objective than without, and a smaller one somewhere", () => {
    for (const [rows, cols, options] of grids) {
      const { moment, weights } = problem(3, rows, cols);
      const solve = (annealing: number) => {
        const settings = { ...DEFAULT_SOLVER_SETTINGS, annealing };
        const solution = solveLayer(kernels, "best", { weights, rows, cols, moment, ...options }, settings);
        const got = dequantize(kernels, solution.tensor);
        return Array.from(
          { length: rows },
          (_, row) =>
            cost(
              Float64Array.from({ length: cols }, (_, k) => weights[row * cols + k]! - got[row * cols + k]!),
              moment.moment,
            ),
        );
      };
      const plain = solve(0), annealed = solve(0.3);
      for (let row = 0; row < rows; row++) {
        expect(annealed[row]!).toBeLessThanOrEqual(plain[row]! * (1 + 1e-4));
      }
      expect(annealed.some((value, row) => value < plain[row]! * 0.999)).toBe(true);
    }
  });

  test("a temperature near 0 leaves what descent has finished, to the byte", () => {
    for (const [rows, cols, options] of grids) {
      const { moment, weights } = problem(5, rows, cols);
      const solve = (annealing: number) =>
        solveLayer(kernels, "best", { weights, rows, cols, moment, ...options }, {
          ...DEFAULT_SOLVER_SETTINGS,
          rounds: 30,
          refit: false, // a refit's last bits may move a code
          annealing,
        });
      expect(solve(1e-9).tensor).toEqual(solve(0).tensor);
    }
  });

  test("the same bytes for any number of threads", () => {
    for (const [rows, cols, options] of grids) {
      const { moment, weights } = problem(6, rows, cols);
      const [one, three] = [1, 3].map((threads) =>
        solveLayer(withThreads(kernels, threads), "best", { weights, rows, cols, moment, ...options }, {
          ...DEFAULT_SOLVER_SETTINGS,
          annealing: 0.2,
        })
      );
      expect(three).toEqual(one!);
    }
  });

  test("columns of no input and scales of 0 stay; temperatures out of range are refused", () => {
    const layer = {
      target: Float32Array.of(1, 2, 3, 4),
      rows: 2,
      cols: 2,
      bits: 2,
      groupSize: 0,
      moment: Float32Array.of(1, 0, 0, 0),
      scale: Float32Array.of(1, 0),
      zeroPoint: new Float32Array(2),
    };
    const codes = Uint8Array.of(3, 3, 2, 2);
    annealLayer(layer, codes, 1);
    expect([...codes]).toEqual([1, 3, 2, 2]);
    const { moment, weights } = problem(7, 2, 8);
    for (const annealing of [-1, 100.1, NaN, Infinity]) {
      expect(() => annealLayer(layer, codes, annealing)).toThrow("the temperature must be from 0 to 100");
      expect(() =>
        solveLayer(kernels, "best", {
          weights,
          rows: 2,
          cols: 8,
          moment,
          bits: 2,
          groupSize: 0,
          zeroPoint: "real",
        }, {
          ...DEFAULT_SOLVER_SETTINGS,
          annealing,
        })
      ).toThrow("the temperature must be from 0 to 100");
    }
  });
});
