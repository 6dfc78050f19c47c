import { afterAll, describe, expect, test } from "bun:test";
import { correctedTarget, factorMoments } from "../../../lib/quant/solvers/factored_moment.ts";
import { DEFAULT_SOLVER_SETTINGS } from "../../../lib/quant/solvers/settings.ts";
import type { WeightFormat } from "../../../lib/quant/packed/layout.ts";
import { openKernels, withThreads } from "../../../lib/native/mod.ts";
import { unchecked } from "../../../lib/native/kernels.ts";
import { RandomStream } from "../../../lib/models/mod.ts";
import { accumulateMoment, emptyMoments, type InputMoments } from "../../../lib/quant/solvers/moments.ts";
import { solveLayer } from "../../../lib/quant/solvers/solve_layer.ts";
import { dequantize, type OneLevelTensor, quantize, unpackCodes } from "../../../lib/quant/mod.ts";
import { allKernels } from "../../_kernels.ts";

const kernels = await openKernels({ threads: 1 });
const others = (await allKernels()).map((each) => each.kernels);
afterAll(() => kernels.close());

function normals(random: RandomStream, n: number): Float32Array<ArrayBuffer> {
  return Float32Array.from({ length: n }, () => random.normal());
}

/** Inputs whose columns depend on each other and differ in size. */
function inputs(random: RandomStream, tokens: number, cols: number): Float32Array<ArrayBuffer> {
  const rank = Math.max(1, Math.floor(cols / 3));
  const mix = normals(random, rank * cols), x = new Float32Array(tokens * cols);
  for (let t = 0; t < tokens; t++) {
    const factors = normals(random, rank);
    for (let k = 0; k < cols; k++) {
      let value = 0.3 * random.normal();
      for (let r = 0; r < rank; r++) value += factors[r]! * mix[r * cols + k]!;
      x[t * cols + k] = value * (1 + k % 5);
    }
  }
  return x;
}

function momentsOf(x: Float32Array, tokens: number, cols: number): InputMoments {
  const moments = emptyMoments(cols);
  accumulateMoment(kernels, x, undefined, undefined, tokens, moments.second);
  moments.tokens = moments.weight = tokens;
  return moments;
}

/** Σ Δ M Δᵀ in float64. */
function objectiveOf(
  target: ArrayLike<number>,
  got: ArrayLike<number>,
  rows: number,
  m: ArrayLike<number>,
): number {
  const cols = target.length / rows;
  let total = 0;
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < cols; i++) {
      const di = target[row * cols + i]! - got[row * cols + i]!;
      for (let j = 0; j < cols; j++) {
        total += di * m[i * cols + j]! * (target[row * cols + j]! - got[row * cols + j]!);
      }
    }
  }
  return total;
}

/** Inverse of a symmetric positive definite matrix, float64, Gauss-Jordan. */
function inverse(m: ArrayLike<number>, n: number): Float64Array {
  const a = Float64Array.from(m), out = new Float64Array(n * n);
  for (let i = 0; i < n; i++) out[i * n + i] = 1;
  for (let k = 0; k < n; k++) {
    const pivot = a[k * n + k]!;
    for (let j = 0; j < n; j++) {
      a[k * n + j]! /= pivot;
      out[k * n + j]! /= pivot;
    }
    for (let i = 0; i < n; i++) {
      if (i === k) continue;
      const factor = a[i * n + k]!;
      for (let j = 0; j < n; j++) {
        a[i * n + j]! -= factor * a[k * n + j]!;
        out[i * n + j]! -= factor * out[k * n + j]!;
      }
    }
  }
  return out;
}

/**
 * Optimal brain quantization as its paper states it: round a column, spread its error by the inverse moment,
 * eliminate it.
 */
function textbookFeedback(
  weights: Float32Array,
  rows: number,
  moment: Float32Array,
  order: Int32Array,
  scale: Float64Array,
  zero: Float64Array,
  bits: number,
): Float64Array {
  const n = order.length, w = Float64Array.from(weights), out = new Float64Array(rows * n);
  const inv = inverse(moment, n);
  for (const k of order) {
    const pivot = inv[k * n + k]!;
    for (let row = 0; row < rows; row++) {
      const code = Math.min(
        2 ** bits - 1,
        Math.max(0, Math.round(w[row * n + k]! / scale[row]! + zero[row]!)),
      );
      out[row * n + k] = scale[row]! * (code - zero[row]!);
      const error = (w[row * n + k]! - out[row * n + k]!) / pivot;
      for (let j = 0; j < n; j++) w[row * n + j]! -= error * inv[k * n + j]!;
    }
    for (let i = 0; i < n; i++) {
      if (i === k) continue;
      const factor = inv[i * n + k]! / pivot;
      for (let j = 0; j < n; j++) inv[i * n + j]! -= factor * inv[k * n + j]!;
    }
    for (let j = 0; j < n; j++) inv[k * n + j] = inv[j * n + k] = j === k ? 1 : 0;
  }
  return out;
}

const row2: WeightFormat = { bits: 2, groupSize: 0, zeroPoint: "real" };

describe("solvers", () => {
  test("the same bytes from every instruction set, WebAssembly and any number of threads", () => {
    const random = new RandomStream(1, 0);
    for (
      const [rows, cols, tokens, options] of [
        [1, 1, 3, row2],
        [5, 33, 70, row2],
        [33, 64, 300, { bits: 2, groupSize: 16, zeroPoint: "real" }],
        [67, 130, 400, { bits: 3, groupSize: 32, zeroPoint: "integer" }],
        [40, 97, 260, { bits: 4, groupSize: 64, zeroPoint: "symmetric" }],
        [17, 160, 500, { bits: 8, groupSize: 32, zeroPoint: "real" }],
      ] satisfies [number, number, number, WeightFormat][]
    ) {
      const x = inputs(random, tokens, cols), y = normals(random, tokens * rows);
      const weights = normals(random, rows * cols), tokenWeights = normals(random, tokens).map(Math.abs);
      const solveWith = (each: typeof kernels, threads: number) => {
        const moments = { ...emptyMoments(cols), tokens, weight: tokens };
        accumulateMoment(withThreads(each, threads), x, undefined, tokenWeights, tokens, moments.second);
        const residual = new Float32Array(rows * cols);
        accumulateMoment(withThreads(each, threads), x, y, undefined, tokens, residual);
        const moment = factorMoments(withThreads(each, threads), moments);
        const target = correctedTarget(withThreads(each, threads), {
          weights,
          rows,
          moment,
          residual: residual.map((value) => value / tokens / 10),
        }, DEFAULT_SOLVER_SETTINGS);
        const { tensor, objective } = solveLayer(withThreads(each, threads), "best", {
          weights: target,
          rows,
          cols,
          moment,
          ...options,
        });
        return { second: moments.second, residual, moment, target, tensor, objective };
      };
      const wanted = solveWith(others[0]!, 1);
      for (const each of others.slice(1)) expect(solveWith(each, 1)).toEqual(wanted);
      for (const threads of [2, 3, 7]) expect(solveWith(kernels, threads)).toEqual(wanted);
    }
  });

  test("a moment is Σ w y xᵀ", () => {
    const random = new RandomStream(2, 0);
    const tokens = 301, cols = 35, rows = 14;
    const x = normals(random, tokens * cols), y = normals(random, tokens * rows), w = normals(random, tokens);
    const got = new Float32Array(rows * cols).fill(1);
    accumulateMoment(kernels, x, y, w, tokens, got);
    for (let i = 0; i < rows; i++) {
      for (let j = 0; j < cols; j++) {
        let sum = 1;
        for (let t = 0; t < tokens; t++) sum += w[t]! * y[t * rows + i]! * x[t * cols + j]!;
        expect(Math.abs(got[i * cols + j]! - sum)).toBeLessThan(2e-4);
      }
    }
  });

  test("feedback is the textbook's: the same objective to 1e-5 on small random problems", () => {
    for (let seed = 0; seed < 20; seed++) {
      const random = new RandomStream(3, seed);
      const rows = 4, cols = 6 + seed, tokens = 200;
      const moments = momentsOf(inputs(random, tokens, cols), tokens, cols);
      const weights = normals(random, rows * cols);
      const moment = factorMoments(kernels, moments);
      // one grid for both: that of rounding
      const grid = quantize(kernels, { data: weights, dtype: "F32" }, rows, cols, {
        ...row2,
        solver: "round",
      }) as OneLevelTensor;
      const halves = (bits: Uint16Array) => Float64Array.from(new Float16Array(bits.slice().buffer));
      const scale = halves(grid.scale), zero = halves(grid.zeroPoint!);
      const wanted = textbookFeedback(weights, rows, moment.moment, moment.order, scale, zero, 2);
      const codes = new Uint8Array(rows * cols), objective = new Float64Array(rows);
      const own = unchecked(kernels);
      const status = own.calls.aq_quantize_feedback(
        weights,
        own.size(rows),
        own.size(cols),
        2,
        own.size(0),
        Float32Array.from(scale),
        Float32Array.from(zero),
        own.size(cols),
        moment.factor,
        moment.pivots,
        moment.order,
        codes,
        objective,
        new Float32Array(1 << 20),
        own.isaNumber,
        1,
      );
      expect(status).toBe(0);
      const got = Float64Array.from(
        codes,
        (code, i) => scale[Math.floor(i / cols)]! * (code - zero[Math.floor(i / cols)]!),
      );
      const [a, b] = [
        objectiveOf(weights, got, rows, moment.moment),
        objectiveOf(weights, wanted, rows, moment.moment),
      ];
      const reported = objective.reduce((sum, value) => sum + value, 0);
      expect(Math.abs(reported - a)).toBeLessThan(1e-4 * a);
      const isEqual = Math.abs(a - b) < 1e-5 * b;
      expect({ seed, isEqual }).toEqual({ seed, isEqual: true });
    }
  });

  test("with a unit moment feedback equals clip search", () => {
    const random = new RandomStream(4, 0);
    const rows = 20, cols = 96;
    const moments = { ...emptyMoments(cols), tokens: 1, weight: 1 };
    for (let k = 0; k < cols; k++) moments.second[k * cols + k] = 1;
    const weights = normals(random, rows * cols);
    for (const groupSize of [0, 32] as const) {
      const { tensor } = solveLayer(kernels, "feedback", {
        weights,
        rows,
        cols,
        moment: factorMoments(kernels, moments, { damping: 0 }),
        ...row2,
        groupSize,
      });
      const clip = quantize(kernels, { data: weights, dtype: "F32" }, rows, cols, {
        ...row2,
        groupSize,
        solver: "clip",
      });
      expect(tensor).toEqual(clip);
    }
  });

  test("each step of the ladder lowers the objective, descent and refits never raise it", () => {
    const random = new RandomStream(5, 0);
    const rows = 48, cols = 128, tokens = 600;
    const moment = factorMoments(kernels, momentsOf(inputs(random, tokens, cols), tokens, cols));
    const weights = normals(random, rows * cols);
    for (const groupSize of [0, 32] as const) {
      const objective = (solver: "round" | "clip" | "feedback" | "best", rounds = 4, refit = true) => {
        const { tensor, objective } = solveLayer(kernels, solver, {
          weights,
          rows,
          cols,
          moment,
          ...row2,
          groupSize,
        }, {
          ...DEFAULT_SOLVER_SETTINGS,
          rounds,
          refit,
        });
        const independent = objectiveOf(weights, dequantize(kernels, tensor), rows, moment.moment);
        expect(Math.abs(objective - independent) / independent).toBeLessThan(1e-3);
        return independent;
      };
      const ladder = [objective("round"), objective("feedback"), objective("best")];
      expect(ladder[1]!).toBeLessThan(0.8 * ladder[0]!);
      expect(ladder[2]!).toBeLessThan(0.8 * ladder[1]!);
      let last = objective("best", 0);
      for (const rounds of [1, 2, 5]) {
        const next = objective("best", rounds);
        expect(next).toBeLessThanOrEqual(last * (1 + 1e-6));
        last = next;
      }
      expect(objective("best", 2, false)).toBeLessThanOrEqual(objective("best", 0) * (1 + 1e-6));
    }
  });

  test("two-level scales: each step lowers the objective, in whole superblocks and in parts of one", () => {
    const random = new RandomStream(10, 0);
    for (
      const [rows, cols, groupSize, scaleBits] of [[20, 256, 16, 4], [9, 160, 16, 4], [
        8,
        320,
        32,
        6,
      ]] as const
    ) {
      const tokens = 3 * cols;
      const moment = factorMoments(kernels, momentsOf(inputs(random, tokens, cols), tokens, cols));
      const weights = normals(random, rows * cols);
      const options = { bits: 2, groupSize, zeroPoint: "real", scaleBits } as const;
      const objectives = (["round", "feedback", "best"] as const).map((solver) => {
        const { tensor, objective } = solveLayer(kernels, solver, {
          weights,
          rows,
          cols,
          moment,
          ...options,
        });
        expect(tensor.scaleBits).toBe(scaleBits);
        const independent = objectiveOf(weights, dequantize(kernels, tensor), rows, moment.moment);
        expect(Math.abs(objective - independent) / independent).toBeLessThan(1e-3);
        return independent;
      });
      expect(objectives[1]!).toBeLessThan(0.8 * objectives[0]!);
      expect(objectives[2]!).toBeLessThan(objectives[1]!);
    }
  });

  test("symmetric two-level scales: calibrated codes are better, and end where the grid does", () => {
    const random = new RandomStream(12, 0), rows = 10, cols = 256, tokens = 600;
    const moment = factorMoments(kernels, momentsOf(inputs(random, tokens, cols), tokens, cols));
    const weights = normals(random, rows * cols);
    for (const [bits, most, gain] of [[3, 7, 0.6], [8, 63, 0.7]] as const) {
      const options = { bits, groupSize: 16, zeroPoint: "symmetric", scaleBits: 8 } as const;
      const [byWeights, solved] = (["clip", "best"] as const).map((solver) => {
        const { tensor } = solveLayer(kernels, solver, { weights, rows, cols, moment, ...options });
        expect(Math.max(...unpackCodes(kernels, tensor.packed, rows, cols, bits))).toBeLessThanOrEqual(most);
        return objectiveOf(weights, dequantize(kernels, tensor), rows, moment.moment);
      });
      expect([bits, solved! / byWeights! < gain]).toEqual([bits, true]);
    }
  });

  test("after some rounds the normal equations of all scales together hold up to the rounding to half floats", () => {
    const random = new RandomStream(6, 0);
    const rows = 6, cols = 64, tokens = 400, groupSize = 16;
    const moment = factorMoments(kernels, momentsOf(inputs(random, tokens, cols), tokens, cols));
    const weights = normals(random, rows * cols);
    const start = quantize(kernels, { data: weights, dtype: "F32" }, rows, cols, {
      bits: 4,
      groupSize,
      solver: "round",
    }) as OneLevelTensor;
    const groups = cols / groupSize;
    const halves = (bits: Uint16Array) => Float32Array.from(new Float16Array(bits.slice().buffer));
    const scale = halves(start.scale), zero = halves(start.zeroPoint!);
    const codes = new Uint8Array(rows * cols);
    for (let i = 0; i < codes.length; i++) {
      const g = Math.floor(i / cols) * groups + Math.floor(i % cols / groupSize);
      codes[i] = Math.min(15, Math.max(0, Math.round(weights[i]! / scale[g]! + zero[g]!)));
    }
    /** Length of the objective's gradient in all scales and offsets. */
    const gradient = () => {
      let sum = 0;
      for (let row = 0; row < rows; row++) {
        const at = (k: number) => row * groups + Math.floor(k / groupSize);
        const delta = Float64Array.from(
          { length: cols },
          (_, k) => weights[row * cols + k]! - scale[at(k)]! * (codes[row * cols + k]! - zero[at(k)]!),
        );
        const byScale = new Float64Array(groups), byOffset = new Float64Array(groups);
        for (let k = 0; k < cols; k++) {
          let product = 0;
          for (let j = 0; j < cols; j++) product += delta[j]! * moment.moment[j * cols + k]!;
          byScale[Math.floor(k / groupSize)]! += codes[row * cols + k]! * product;
          byOffset[Math.floor(k / groupSize)]! += product;
        }
        for (let g = 0; g < groups; g++) sum += byScale[g]! ** 2 + byOffset[g]! ** 2;
      }
      return Math.sqrt(sum);
    };
    // scales so coarse that the start is far off, and a result that half floats hold well
    for (let g = 0; g < scale.length; g++) scale[g]! *= 1.25;
    const before = gradient();
    const work = new Float32Array(1 << 20), objective = new Float64Array(rows);
    const own = unchecked(kernels);
    const status = own.calls.aq_refine_codes(
      weights,
      own.size(rows),
      own.size(cols),
      4,
      own.size(groupSize),
      0,
      own.size(cols),
      moment.moment,
      1,
      40,
      1,
      codes,
      scale,
      zero,
      objective,
      work,
      own.isaNumber,
      1,
    );
    expect(status).toBe(0);
    expect(gradient()).toBeLessThan(0.02 * before);
  });

  test("indefinite and singular moments raise the damping and say so; broken ones are refused", () => {
    const random = new RandomStream(7, 0);
    const cols = 40, tokens = 8; // rank 8
    const moments = momentsOf(inputs(random, tokens, cols), tokens, cols);
    const undamped = factorMoments(kernels, moments, { damping: 0 });
    expect(undamped.damping).toBeGreaterThan(0);
    expect(undamped.factor.every(Number.isFinite)).toBe(true);
    expect(factorMoments(kernels, moments).damping).toBe(0.01);
    const indefinite = { ...moments, second: moments.second.slice() };
    indefinite.second[1] = indefinite.second[cols] = 10 * indefinite.second[0]!;
    const raised = factorMoments(kernels, indefinite);
    expect(raised.damping).toBeGreaterThan(0.01);
    const { tensor } = solveLayer(kernels, "best", {
      weights: normals(random, 3 * cols),
      rows: 3,
      cols,
      moment: raised,
      ...row2,
    });
    expect(dequantize(kernels, tensor).every(Number.isFinite)).toBe(true);
    const broken = { ...moments, second: moments.second.slice() };
    broken.second[3] = NaN;
    expect(() => factorMoments(kernels, broken)).toThrow("must be finite");
    broken.second[3] = 0;
    broken.second[0] = -1;
    expect(() => factorMoments(kernels, broken)).toThrow("diagonal must be ≥ 0");
    expect(() => factorMoments(kernels, { ...moments, weight: 0 })).toThrow("> 0");
  });

  test("dead columns, equal rows and inputs that were all 0 are solved", () => {
    const random = new RandomStream(8, 0);
    const cols = 48, rows = 5, tokens = 100;
    const x = inputs(random, tokens, cols);
    for (let t = 0; t < tokens; t++) x[t * cols + 7] = 0;
    const moments = momentsOf(x, tokens, cols);
    const moment = factorMoments(kernels, moments);
    expect(moment.deadColumns).toBe(1);
    const equal = new Float32Array(rows * cols).fill(0.25);
    const { tensor } = solveLayer(kernels, "best", { weights: equal, rows, cols, moment, ...row2 });
    for (const value of dequantize(kernels, tensor)) expect(Math.abs(value - 0.25)).toBeLessThan(1e-3);
    const nothing = factorMoments(kernels, { ...emptyMoments(cols), tokens: 3, weight: 3 });
    expect(nothing.deadColumns).toBe(cols);
    const weights = normals(random, rows * cols);
    const solved = solveLayer(kernels, "best", { weights, rows, cols, moment: nothing, ...row2 });
    expect(dequantize(kernels, solved.tensor).every(Number.isFinite)).toBe(true);
  });

  test("the corrected target undoes an error of the inputs", () => {
    const random = new RandomStream(9, 0);
    const cols = 24, rows = 6, tokens = 500;
    const right = inputs(random, tokens, cols);
    // what the layer reads has lost a tenth and got some noise
    const read = right.map((value) => 0.9 * value + 0.05 * random.normal());
    const moments = momentsOf(read, tokens, cols);
    const cross = new Float32Array(cols * cols);
    accumulateMoment(kernels, read, right.map((value, i) => value - read[i]!), undefined, tokens, cross);
    const weights = normals(random, rows * cols);
    const moment = factorMoments(kernels, moments, { damping: 1e-4 });
    const target = correctedTarget(kernels, {
      weights,
      rows,
      moment,
      cross: cross.map((value) => value / tokens),
    }, DEFAULT_SOLVER_SETTINGS);
    const outputError = (w: Float32Array) => {
      let sum = 0;
      for (let t = 0; t < tokens; t++) {
        for (let n = 0; n < rows; n++) {
          let difference = 0;
          for (let k = 0; k < cols; k++) {
            difference += weights[n * cols + k]! * right[t * cols + k]! -
              w[n * cols + k]! * read[t * cols + k]!;
          }
          sum += difference ** 2;
        }
      }
      return sum;
    };
    expect(outputError(target)).toBeLessThan(0.05 * outputError(weights));
  });
});
