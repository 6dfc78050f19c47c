import { afterAll, describe, expect, test } from "bun:test";
import { DEFAULT_SOLVER_SETTINGS } from "../../../lib/quant/solvers/settings.ts";
import { factorMoments } from "../../../lib/quant/solvers/factored_moment.ts";
import { RandomStream } from "../../../lib/models/mod.ts";
import { linearPackedInt8, quantizeActivations } from "../../../lib/models/layers/int8.ts";
import { linear } from "../../../lib/models/layers/linear.ts";
import { RefinableLinear } from "../../../lib/models/backward/linear.ts";
import { openKernels, withThreads } from "../../../lib/native/mod.ts";
import {
  dequantize,
  errorStatistics,
  fitLowRank,
  packedBytes,
  packedErrorStatistics,
  packedRows,
  quantize,
  solveLayer,
  solveLowRankLayer,
} from "../../../lib/quant/mod.ts";
import { packedByteLength } from "../../../lib/quant/packed/layout.ts";
import { addLowRank } from "../../../lib/quant/packed/low_rank.ts";
import type { LowRank, PackedTensor } from "../../../lib/quant/mod.ts";
import { accumulateMoment, emptyMoments } from "../../../lib/quant/solvers/moments.ts";
import { allKernels } from "../../_kernels.ts";

const kernels = await openKernels({ threads: 1 });
const others = (await allKernels()).map((each) => each.kernels);
afterAll(() => kernels.close());

const normals = (random: RandomStream, n: number) => Float32Array.from({ length: n }, () => random.normal());

/** A moment of inputs that depend on each other, with a diagonal added. */
function momentOf(random: RandomStream, cols: number): Float32Array<ArrayBuffer> {
  const factors = normals(random, 5 * cols), moment = new Float32Array(cols * cols);
  for (let i = 0; i < cols; i++) {
    for (let j = 0; j < cols; j++) {
      for (let f = 0; f < 5; f++) moment[i * cols + j]! += factors[f * cols + i]! * factors[f * cols + j]!;
    }
    moment[i * cols + i]! += 0.3 + i % 3;
  }
  return moment;
}

/** tr(E M Eᵀ) in float64. */
function objectiveOf(error: ArrayLike<number>, rows: number, cols: number, m: ArrayLike<number>): number {
  let total = 0;
  for (let r = 0; r < rows; r++) {
    for (let i = 0; i < cols; i++) {
      let along = 0;
      for (let j = 0; j < cols; j++) along += m[i * cols + j]! * error[r * cols + j]!;
      total += error[r * cols + i]! * along;
    }
  }
  return total;
}

/**
 * Σ of the eigenvalues of R M Rᵀ behind the first `rank`, by float64 Jacobi: what no correction of that rank
 * can undo.
 */
function leastObjective(r: Float32Array, rows: number, cols: number, m: Float32Array, rank: number): number {
  const a = Array.from({ length: rows }, (_, i) =>
    Float64Array.from({ length: rows }, (_, j) => {
      let sum = 0;
      for (let k = 0; k < cols; k++) {
        for (let l = 0; l < cols; l++) sum += r[i * cols + k]! * m[k * cols + l]! * r[j * cols + l]!;
      }
      return sum;
    }));
  for (let sweep = 0; sweep < 40; sweep++) {
    for (let p = 0; p < rows; p++) {
      for (let q = p + 1; q < rows; q++) {
        const angle = 0.5 * Math.atan2(2 * a[p]![q]!, a[q]![q]! - a[p]![p]!);
        const c = Math.cos(angle), s = Math.sin(angle);
        for (const row of a) [row[p], row[q]] = [c * row[p]! - s * row[q]!, s * row[p]! + c * row[q]!];
        for (let k = 0; k < rows; k++) {
          [a[p]![k], a[q]![k]] = [c * a[p]![k]! - s * a[q]![k]!, s * a[p]![k]! + c * a[q]![k]!];
        }
      }
    }
  }
  const values = a.map((row, i) => row[i]!).sort((x, y) => y - x);
  return values.slice(rank).reduce((sum, value) => sum + value, 0);
}

function leftBy(residual: Float32Array, lowRank: LowRank, rows: number, cols: number): Float32Array {
  const left = residual.slice();
  addLowRank(left, lowRank, rows, cols, -1);
  return left;
}

describe("a low-rank correction", () => {
  for (const [rows, cols, rank] of [[24, 20, 4], [12, 40, 8], [40, 12, 5], [9, 9, 1]] as const) {
    test(`of rank ${rank} for ${rows} × ${cols} leaves what a float64 decomposition leaves`, () => {
      const random = new RandomStream(rows * 100 + cols);
      const moment = momentOf(random, cols), residual = normals(random, rows * cols);
      const least = leastObjective(residual, rows, cols, moment, rank);
      for (const each of others) {
        const fitted = fitLowRank(each, residual, rows, cols, moment, rank);
        const reached = objectiveOf(leftBy(residual, fitted, rows, cols), rows, cols, moment);
        expect(reached).toBeGreaterThan(least * (1 - 1e-3));
        expect(reached).toBeLessThan(least * (1 + 1e-3));
      }
    });
  }

  test("of a residual of lower rank leaves next to nothing, of no residual nothing", () => {
    const random = new RandomStream(3), moment = momentOf(random, 16);
    const a = normals(random, 20 * 2), b = normals(random, 2 * 16);
    const residual = Float32Array.from({ length: 20 * 16 }, (_, i) => {
      const row = Math.floor(i / 16), col = i % 16;
      return a[row * 2]! * b[col]! + a[row * 2 + 1]! * b[16 + col]!;
    });
    const whole = objectiveOf(residual, 20, 16, moment);
    const fitted = fitLowRank(kernels, residual, 20, 16, moment, 4);
    expect(objectiveOf(leftBy(residual, fitted, 20, 16), 20, 16, moment)).toBeLessThan(1e-6 * whole);
    const none = fitLowRank(kernels, new Float32Array(20 * 16), 20, 16, moment, 4);
    expect([...none.a, ...none.b].every((bits) => bits === 0)).toBe(true);
  });

  test("is the same for any number of threads", () => {
    const random = new RandomStream(8), moment = momentOf(random, 96), residual = normals(random, 300 * 96);
    const [one, four] = [1, 4].map((threads) =>
      fitLowRank(withThreads(kernels, threads), residual, 300, 96, moment, 16)
    );
    expect(four).toEqual(one!);
  });

  test("refuses ranks and sizes that do not fit", () => {
    const eye = Float32Array.of(1, 0, 0, 1);
    expect(() => fitLowRank(kernels, new Float32Array(4), 2, 2, eye, 3)).toThrow(/from 1 to 2, got 3/);
    expect(() => fitLowRank(kernels, new Float32Array(4), 2, 2, eye, 0)).toThrow(RangeError);
    expect(() => fitLowRank(kernels, new Float32Array(3), 2, 2, eye, 1)).toThrow(TypeError);
  });
});

describe("a layer solved with a low-rank correction", () => {
  const random = new RandomStream(17), rows = 48, cols = 40;
  const weights = normals(random, rows * cols), x = normals(random, 200 * cols);
  for (let i = 0; i < x.length; i++) x[i]! += 2 * x[i - i % cols]!;
  const moments = emptyMoments(cols);
  accumulateMoment(kernels, x, undefined, undefined, 200, moments.second);
  moments.tokens = moments.weight = 200;
  const moment = factorMoments(kernels, moments);
  const solve = (rank: number, scaleBits?: 4) => {
    const options = {
      bits: 2,
      groupSize: scaleBits === undefined ? 0 : 16,
      zeroPoint: "real",
      scaleBits,
    } as const;
    const problem = { weights, rows, cols, moment, ...options };
    const settings = { ...DEFAULT_SOLVER_SETTINGS, rounds: 1, lowRank: rank };
    return (rank === 0 ? solveLayer : solveLowRankLayer)(kernels, "best", problem, settings);
  };

  test("has an objective that falls with the rank, and is the stored tensor's", () => {
    for (const scaleBits of [undefined, 4] as const) {
      let last = solve(0, scaleBits).objective;
      for (const rank of [4, 8, 32]) {
        const { tensor, objective } = solve(rank, scaleBits);
        expect(objective).toBeLessThan(last);
        const error = dequantize(kernels, tensor).map((value, i) => weights[i]! - value);
        const found = objectiveOf(error, rows, cols, moment.moment);
        expect(Math.abs(found / objective - 1)).toBeLessThan(1e-3);
        last = objective;
      }
    }
  });

  test("gives the outputs, rows, bytes and errors of its dequantized matrix", () => {
    const { tensor } = solve(8);
    for (
      const each of [tensor, {
        ...tensor,
        rotation: { kind: "hadamard", block: 8, seed: 5 },
      }] as PackedTensor[]
    ) {
      const dense = dequantize(kernels, each), bias = normals(random, rows);
      for (const own of others) {
        const got = linear(own, { weights: each, bias }, x, 200);
        const wanted = linear(own, { weights: { rows, cols, dtype: "F32", data: dense }, bias }, x, 200);
        let error = 0, power = 0;
        for (const [i, value] of wanted.entries()) {
          error += (got[i]! - value) ** 2;
          power += value ** 2;
        }
        expect(Math.sqrt(error / power)).toBeLessThan(1e-5);
        expect(dequantize(own, each)).toEqual(dense);
      }
      expect(dequantize(kernels, packedRows(each, 5, 9))).toEqual(dense.slice(5 * cols, 9 * cols));
      const halves = new Float16Array(dequantize(kernels, each, "F16").buffer);
      expect([...halves]).toEqual([...Float16Array.from(dense)]);
      const data = { data: weights, dtype: "F32" } as const;
      expect(packedErrorStatistics(kernels, data, each)).toEqual(
        errorStatistics(kernels, data, { data: dense, dtype: "F32" }, dense.length),
      );
      expect(packedByteLength(each) + 16).toBe(
        packedBytes({ rows, cols, bits: 2, groupSize: 0, zeroPoint: "real", rank: 8 }),
      );
    }
  });

  test("is refused where its parts do not fit", () => {
    const tensor = quantize(kernels, { data: weights, dtype: "F32" }, rows, cols, { bits: 4, groupSize: 0 });
    const a = new Uint16Array(rows * 4), b = new Uint16Array(4 * cols);
    const wrong = (lowRank: LowRank) => () => dequantize(kernels, { ...tensor, lowRank });
    expect(wrong({ rank: 4, a, b: a })).toThrow(/lowRank.b must be 160 half floats, got 192/);
    expect(wrong({ rank: 5, a, b })).toThrow(TypeError);
    expect(wrong({ rank: 65, a, b })).toThrow(/rank must be from 1 to 64, got 65/);
    const turned = (block: number, seed = 0) => () =>
      linear(kernels, { weights: { ...tensor, rotation: { kind: "hadamard", block, seed } } }, x, 200);
    expect(turned(16)).toThrow(/power of two that divides 40 columns, got 16/);
    expect(turned(3)).toThrow(RangeError);
    expect(turned(8, -1)).toThrow(/seed/);
    const activations = quantizeActivations(kernels, x, 200, cols);
    const rotation = { kind: "hadamard", block: 8, seed: 0 } as const;
    for (const more of [{ rotation }, { lowRank: { rank: 4, a, b } }]) {
      expect(() => linearPackedInt8(kernels, { weights: { ...tensor, ...more } }, activations)).toThrow(
        /codes and scales alone/,
      );
    }
    expect(() =>
      new RefinableLinear({ name: "a", weights: { ...tensor, rotation }, bias: undefined }, {
        scales: true,
        zeroPoints: true,
        biases: false,
        timeGroups: 0,
      })
    ).toThrow(/must not be rotated/);
  });
});
