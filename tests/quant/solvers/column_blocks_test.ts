/** Moments of blocks on the diagonal, and of the diagonal alone, against formulas in float64. */
import { afterAll, describe, expect, test } from "bun:test";
import { RandomStream } from "../../../lib/models/mod.ts";
import { openKernels } from "../../../lib/native/mod.ts";
import {
  accumulateMoment,
  dequantize,
  emptyMoments,
  type InputMoments,
  type OneLevelTensor,
  solveLayer,
} from "../../../lib/quant/mod.ts";
import { correctedTarget, factorMoments } from "../../../lib/quant/solvers/factored_moment.ts";
import { momentBlocks, narrowMoments } from "../../../lib/quant/solvers/moments.ts";
import { DEFAULT_SOLVER_SETTINGS } from "../../../lib/quant/solvers/settings.ts";
import { refine } from "../../../lib/quant/solvers/steps.ts";

const kernels = await openKernels({ threads: 2 });
afterAll(() => kernels.close());

const normals = (random: RandomStream, n: number): Float32Array<ArrayBuffer> =>
  Float32Array.from({ length: n }, () => random.normal());

/** Inputs whose neighbours depend on each other and differ in size. */
function inputs(random: RandomStream, tokens: number, cols: number): Float32Array<ArrayBuffer> {
  const x = new Float32Array(tokens * cols);
  for (let t = 0; t < tokens; t++) {
    let last = random.normal();
    for (let k = 0; k < cols; k++) {
      last = 0.8 * last + 0.6 * random.normal();
      x[t * cols + k] = last * (1 + k % 5);
    }
  }
  return x;
}

function momentsOf(x: Float32Array, tokens: number, cols: number, block?: number): InputMoments {
  const moments = { ...emptyMoments(cols, block), tokens, weight: tokens };
  accumulateMoment(kernels, x, undefined, undefined, tokens, moments.second, block);
  return moments;
}

/** Σ x xᵀ / tokens in float64, 0 outside the blocks, with the part of the mean diagonal that damps it. */
function denseMoment(x: Float32Array, tokens: number, cols: number, block: number, damping: number) {
  const m = new Float64Array(cols * cols);
  let power = 0;
  for (let i = 0; i < cols; i++) {
    for (let j = 0; j < cols; j++) {
      if (Math.floor(i / block) !== Math.floor(j / block)) continue;
      for (let t = 0; t < tokens; t++) m[i * cols + j]! += x[t * cols + i]! * x[t * cols + j]! / tokens;
    }
    power += m[i * cols + i]! / cols;
  }
  for (let i = 0; i < cols; i++) m[i * cols + i]! += damping * power;
  return m;
}

/** Δ M Δᵀ of each row, float64. */
function objectives(target: ArrayLike<number>, got: ArrayLike<number>, rows: number, m: Float64Array) {
  const cols = target.length / rows;
  return Array.from({ length: rows }, (_, row) => {
    let sum = 0;
    for (let i = 0; i < cols; i++) {
      const d = target[row * cols + i]! - got[row * cols + i]!;
      for (let j = 0; j < cols; j++) {
        sum += d * m[i * cols + j]! * (target[row * cols + j]! - got[row * cols + j]!);
      }
    }
    return sum;
  });
}

const sum = (values: readonly number[]) => values.reduce((a, b) => a + b, 0);
const ROWS = 12, COLS = 320, TOKENS = 500;

describe("moments of blocks", () => {
  const random = new RandomStream(21, 0),
    x = inputs(random, TOKENS, COLS),
    weights = normals(random, ROWS * COLS);
  const whole = momentsOf(x, TOKENS, COLS);

  test("hold the whole moment's blocks, as they are gathered and as they are taken from it", () => {
    for (const block of [1, 64, 96, 128]) {
      const gathered = momentsOf(x, TOKENS, COLS, block);
      for (const { first, cols, at } of momentBlocks(COLS, block)) {
        for (let i = 0; i < cols; i++) {
          for (let j = 0; j < cols; j++) {
            const got = gathered.second[at + i * cols + j]!;
            const wanted = whole.second[(first + i) * COLS + first + j]!;
            if (!(Math.abs(got - wanted) <= 1e-4 * Math.abs(wanted) + 1e-2)) {
              expect([block, first + i, first + j, got]).toEqual([block, first + i, first + j, wanted]);
            }
          }
        }
      }
      const narrow = narrowMoments(whole, block);
      expect([narrow.block, narrow.second.length]).toEqual([block, gathered.second.length]);
      const again = narrowMoments(narrowMoments(whole, 128), block === 96 ? 128 : block);
      if (block !== 96) expect(again.second).toEqual(narrow.second);
    }
    expect(() => narrowMoments(momentsOf(x, TOKENS, COLS, 128), 96)).toThrow("must divide 128, got 96");
  });

  for (const solver of ["round", "clip", "feedback", "best"] as const) {
    test(`${solver}: the objective is that of the blocks, in float64`, () => {
      for (const groupSize of [0, 32] as const) {
        for (const block of [1, 64, 128]) {
          const moment = factorMoments(kernels, momentsOf(x, TOKENS, COLS, block));
          const problem = {
            weights,
            rows: ROWS,
            cols: COLS,
            moment,
            bits: 2,
            groupSize,
            zeroPoint: "real",
          } as const;
          const { tensor, objective } = solveLayer(kernels, solver, problem);
          const m = denseMoment(x, TOKENS, COLS, block, moment.damping);
          const independent = sum(objectives(weights, dequantize(kernels, tensor), ROWS, m));
          expect(Math.abs(objective - independent) / independent).toBeLessThan(1e-3);
        }
      }
    });
  }

  test("better structure finds better codes for the real moment", () => {
    const real = denseMoment(x, TOKENS, COLS, COLS, 0);
    for (const groupSize of [0, 32] as const) {
      const errors = [1, 64, 160, COLS].map((block) => {
        const moment = factorMoments(kernels, momentsOf(x, TOKENS, COLS, block));
        const problem = {
          weights,
          rows: ROWS,
          cols: COLS,
          moment,
          bits: 2,
          groupSize,
          zeroPoint: "real",
        } as const;
        return sum(
          objectives(weights, dequantize(kernels, solveLayer(kernels, "best", problem).tensor), ROWS, real),
        );
      });
      expect(errors[1]!).toBeLessThan(0.7 * errors[0]!);
      expect(errors[3]!).toBeLessThan(errors[1]!);
      expect(errors[2]!).toBeLessThan(1.1 * errors[1]!);
    }
  });

  test("groups within a block: each block is solved as a layer by itself would be", () => {
    // One range: of several a row takes the one that is best for all its blocks.
    const block = 128, settings = { ...DEFAULT_SOLVER_SETTINGS, ratios: [] };
    for (
      const form of [
        { bits: 3, groupSize: 32, zeroPoint: "integer" },
        { bits: 4, groupSize: 64, zeroPoint: "symmetric" },
        { bits: 2, groupSize: 16, zeroPoint: "real" },
      ] as const
    ) {
      const moment = factorMoments(kernels, momentsOf(x, TOKENS, COLS, block), { damping: 0 });
      const { tensor } = solveLayer(
        kernels,
        "best",
        { weights, rows: ROWS, cols: COLS, moment, ...form },
        settings,
      );
      const all = dequantize(kernels, tensor);
      for (const { first, cols } of momentBlocks(COLS, block)) {
        const part = (values: Float32Array, count: number) =>
          Float32Array.from(
            { length: count * cols },
            (_, i) => values[Math.floor(i / cols) * COLS + first + i % cols]!,
          );
        const own = factorMoments(kernels, momentsOf(part(x, TOKENS), TOKENS, cols), { damping: 0 });
        const problem = { weights: part(weights, ROWS), rows: ROWS, cols, moment: own, ...form };
        expect(part(all, ROWS)).toEqual(
          dequantize(kernels, solveLayer(kernels, "best", problem, settings).tensor),
        );
      }
    }
  });

  test("superblocks of two-level scales and offsets lie within blocks", () => {
    const cols = 640, wide = inputs(random, TOKENS, cols), w = normals(random, ROWS * cols);
    const moment = factorMoments(kernels, momentsOf(wide, TOKENS, cols, 256));
    const m = denseMoment(wide, TOKENS, cols, 256, moment.damping);
    for (
      const form of [
        { bits: 2, groupSize: 16, scaleBits: 4 },
        { bits: 4, groupSize: 32, scaleBits: 6 },
        { bits: 4, groupSize: 32, scaleBits: 16 },
      ] as const
    ) {
      const problem = { weights: w, rows: ROWS, cols, moment, zeroPoint: "real", ...form } as const;
      const { tensor, objective } = solveLayer(kernels, "best", problem);
      const independent = sum(objectives(w, dequantize(kernels, tensor), ROWS, m));
      expect(Math.abs(objective - independent) / independent).toBeLessThan(1e-3);
    }
    const narrow = factorMoments(kernels, momentsOf(wide, TOKENS, cols, 64));
    const problem = {
      weights: w,
      rows: ROWS,
      cols,
      moment: narrow,
      bits: 2,
      groupSize: 16,
      zeroPoint: "real",
    } as const;
    expect(() => solveLayer(kernels, "best", { ...problem, scaleBits: 4 })).toThrow(
      "blocks of the moment must be of a multiple of 256 columns, got 64",
    );
  });

  test("a diagonal alone: feedback rounds every weight to its nearest code", () => {
    for (const groupSize of [0, 32] as const) {
      const moment = factorMoments(kernels, momentsOf(x, TOKENS, COLS, 1));
      const problem = {
        weights,
        rows: ROWS,
        cols: COLS,
        moment,
        bits: 3,
        groupSize,
        zeroPoint: "real",
      } as const;
      const { tensor } = solveLayer(kernels, "feedback", problem),
        { scale, zeroPoint } = tensor as OneLevelTensor;
      const [s, z] = [scale, zeroPoint!].map((bits) => new Float16Array(bits.slice().buffer));
      const got = dequantize(kernels, tensor), groups = scale.length / ROWS, width = groupSize || COLS;
      for (let i = 0; i < got.length; i++) {
        const g = Math.floor(i / COLS) * groups + Math.floor(i % COLS / width), own = s![g]!, zero = z![g]!;
        const distances = Array.from({ length: 8 }, (_, code) => Math.abs(own * (code - zero) - weights[i]!));
        expect(Math.abs(got[i]! - weights[i]!)).toBeLessThanOrEqual(Math.min(...distances) + 1e-5);
      }
    }
  });

  test("a whole row's refit is the least squares over all blocks", () => {
    const block = 128, moment = factorMoments(kernels, momentsOf(x, TOKENS, COLS, block));
    const m = denseMoment(x, TOKENS, COLS, block, moment.damping);
    for (const zeroPoint of ["real", "integer", "symmetric"] as const) {
      const problem = {
        kernels,
        weights,
        rows: ROWS,
        cols: COLS,
        moment,
        bits: 4,
        groupSize: 0,
        zeroPoint,
      } as const;
      const codes = Uint8Array.from(
        weights,
        (value) => Math.min(15, Math.max(0, Math.round(value / 0.4 + 8))),
      );
      const scales = { scale: new Float32Array(ROWS).fill(0.4), zeroPoint: new Float32Array(ROWS).fill(8) };
      const found = { codes, ...scales, objective: new Float64Array(ROWS) };
      refine(problem, found, { rounds: 30, sweeps: 1, refit: true });
      /** Objective of a row with a scale and a zero point. */
      const at = (row: number, scale: number, zero: number) => {
        const from = row * COLS, own = codes.subarray(from, from + COLS);
        return objectives(
          weights.subarray(from, from + COLS),
          Array.from(own, (code) => scale * (code - zero)),
          1,
          m,
        )[0]!;
      };
      for (let row = 0; row < ROWS; row++) {
        const s = found.scale[row]!, z = found.zeroPoint[row]!, least = at(row, s, z);
        expect(least).toBeLessThan(at(row, 0.4, 8));
        for (const change of [0.99, 1.01]) {
          expect(least).toBeLessThan(at(row, s * change, z));
          if (zeroPoint === "real") expect(least).toBeLessThan(at(row, s, z + (change - 1) * 10));
        }
        if (zeroPoint === "symmetric") expect(z).toBe(8);
        if (zeroPoint === "integer") expect(Number.isInteger(z)).toBe(true);
      }
    }
  });

  test("the corrected target of blocks solves each block's equations", () => {
    const block = 64, cols = 160, read = inputs(random, TOKENS, cols), w = normals(random, ROWS * cols);
    const lost = read.map((value) => 0.1 * value + 0.05 * random.normal());
    const moments = momentsOf(read, TOKENS, cols, block);
    const cross = new Float32Array(moments.second.length);
    accumulateMoment(kernels, read, lost, undefined, TOKENS, cross, block);
    const moment = factorMoments(kernels, moments, { damping: 1e-3 });
    const target = correctedTarget(
      kernels,
      { weights: w, rows: ROWS, moment, cross: cross.map((value) => value / TOKENS) },
      DEFAULT_SOLVER_SETTINGS,
    );
    // (target − w) M = w · cross, block by block, in float64
    const m = denseMoment(read, TOKENS, cols, block, moment.damping);
    let off = 0, size = 0;
    for (let row = 0; row < ROWS; row++) {
      for (let j = 0; j < cols; j++) {
        let left = 0, right = 0;
        for (let i = 0; i < cols; i++) {
          left += (target[row * cols + i]! - w[row * cols + i]!) * m[i * cols + j]!;
          if (Math.floor(i / block) !== Math.floor(j / block)) continue;
          let product = 0;
          for (let t = 0; t < TOKENS; t++) product += lost[t * cols + i]! * read[t * cols + j]!;
          right += w[row * cols + i]! * product / TOKENS;
        }
        off += (left - right) ** 2;
        size += right ** 2;
      }
    }
    expect(Math.sqrt(off / size)).toBeLessThan(1e-3);
  });

  test("a layer of 18,944 columns is solved in blocks", () => {
    const cols = 18_944, rows = 4, tokens = 16, wide = normals(random, tokens * cols);
    const moment = factorMoments(kernels, momentsOf(wide, tokens, cols, 512)),
      w = normals(random, rows * cols);
    expect(moment.moment.byteLength).toBe(4 * 512 * cols);
    const settings = { ...DEFAULT_SOLVER_SETTINGS, ratios: [], rounds: 1 };
    for (const groupSize of [0, 64] as const) {
      const problem = { weights: w, rows, cols, moment, bits: 2, groupSize, zeroPoint: "real" } as const;
      const [feedback, best] = (["feedback", "best"] as const).map((solver) =>
        solveLayer(kernels, solver, problem, settings)
      );
      expect(best!.objective).toBeLessThan(feedback!.objective);
      expect(best!.tensor.packed.length).toBe(rows * cols / 16);
    }
  }, 120_000);
});
