/** Grids whose two numbers are half floats: `w = scale · code + offset`. */
import { describe, expect, test } from "bun:test";
import { linear } from "../../../lib/models/layers/linear.ts";
import type { Kernels } from "../../../lib/native/mod.ts";
import {
  accumulateMoment,
  BIT_WIDTHS,
  DEFAULT_SOLVER_SETTINGS,
  dequantize,
  emptyMoments,
  factorMoments,
  groupCount,
  packedErrorStatistics,
  quantize,
  type QuantizeOptions,
  relativeRmsError,
  solveLayer,
  type TwoLevelTensor,
  unpackCodes,
} from "../../../lib/quant/mod.ts";
import { allKernels, gaussians } from "../../_kernels.ts";

const every = await allKernels();
const scalar = every.find(({ name }) => name.endsWith("scalar"))!.kernels;
const ROWS = 5, COLS = 150;
const halves = (bytes: Uint8Array) => new Float16Array(bytes.slice().buffer);

/** Weights by the formula, in float32: the product of a half float and a code is exact. */
function decode(tensor: TwoLevelTensor): Float32Array<ArrayBuffer> {
  const { rows, cols, bits, groupSize } = tensor,
    codes = unpackCodes(scalar, tensor.packed, rows, cols, bits);
  const scale = halves(tensor.subScale), offset = halves(tensor.subMin), groups = groupCount(cols, groupSize);
  return new Float32Array(Array.from(codes, (code, i) => {
    const at = Math.floor(i / cols) * groups + Math.floor(i % cols / groupSize);
    return Math.fround(scale[at]! * code) + offset[at]!;
  }));
}

/** Groups around 0, groups far from it, a group of one value and one of zeros. */
const weights = gaussians(3, ROWS * COLS);
weights.forEach((w, i) => {
  const row = Math.floor(i / COLS), col = i % COLS;
  if (row >= 3 && col < 64) weights[i] = row === 3 ? 0.40625 : 0;
  else weights[i] = row === 2 ? w / 8 + 1 : col < 64 ? w : w * 1e-6;
});

const offsets = (kernels: Kernels, options: Omit<QuantizeOptions, "scaleBits">) =>
  quantize(kernels, { data: weights, dtype: "F32" }, ROWS, COLS, {
    ...options,
    scaleBits: 16,
  }) as TwoLevelTensor;

describe("offset grids", () => {
  test("weights are scale · code + offset in float32, the same bytes on every instruction set", () => {
    const x = gaussians(4, 2 * COLS), ones = new Uint16Array(ROWS).fill(0x3c00);
    for (const bits of BIT_WIDTHS) {
      for (const groupSize of [16, 32, 64, 128] as const) {
        for (const solver of ["clip", "round"] as const) {
          const options = { bits, groupSize, solver }, wanted = offsets(scalar, options);
          const data = dequantize(scalar, wanted);
          expect(data).toEqual(decode(wanted));
          expect(wanted.superScale.subarray(0, ROWS)).toEqual(ones);
          const matrix = { data, dtype: "F32" as const, rows: ROWS, cols: COLS };
          const product = linear(scalar, { weights: matrix }, x, 2);
          const statistics = packedErrorStatistics(scalar, matrix, wanted);
          expect(statistics.sumSquaredError).toBe(0);
          expect(statistics.sumSquares).toBeCloseTo(data.reduce((sum, w) => sum + w * w, 0), 3);
          for (const { kernels } of every) {
            expect(offsets(kernels, options)).toEqual(wanted);
            expect(dequantize(kernels, wanted)).toEqual(data);
            const own = linear(kernels, { weights: wanted }, x, 2);
            own.forEach((value, i) =>
              expect(Math.abs(value - product[i]!)).toBeLessThan(1e-4 * (1 + Math.abs(product[i]!)))
            );
          }
        }
      }
    }
  });

  test("codes are the nearest, and errors those of real zero points", () => {
    for (const bits of BIT_WIDTHS) {
      const rounded = offsets(scalar, { bits, groupSize: 64, solver: "round" }),
        values = dequantize(scalar, rounded);
      const scale = halves(rounded.subScale), groups = groupCount(COLS, 64), codeMax = 2 ** bits - 1;
      weights.forEach((w, i) => {
        const step = scale[Math.floor(i / COLS) * groups + Math.floor(i % COLS / 64)]!;
        // half a step, and what rounding two numbers to half floats takes from the range
        const slack = 2 ** -11 * (Math.abs(w) + step * codeMax) + 2 ** -24;
        expect(Math.abs(w - values[i]!)).toBeLessThanOrEqual(step / 2 + slack);
      });
      const error = (options: QuantizeOptions) => {
        const tensor = quantize(scalar, { data: weights, dtype: "F32" }, ROWS, COLS, options);
        return relativeRmsError(packedErrorStatistics(scalar, { data: weights, dtype: "F32" }, tensor));
      };
      const own = error({ bits, groupSize: 32, scaleBits: 16 }), real = error({ bits, groupSize: 32 });
      expect(own).toBeLessThan(real * 1.1);
      expect(own).toBeLessThanOrEqual(error({ bits, groupSize: 32, scaleBits: 16, solver: "round" }));
    }
  });

  test("error feedback and descent aim at them", () => {
    const tokens = 600, x = gaussians(5, tokens * COLS), second = new Float32Array(COLS * COLS);
    for (let i = COLS; i < x.length; i++) x[i]! += 0.9 * x[i - COLS + (i % 7)]!;
    accumulateMoment(scalar, x, undefined, undefined, tokens, second);
    const moment = factorMoments(scalar, { ...emptyMoments(COLS), second, tokens, weight: tokens }, {
      damping: 0.01,
    });
    const data = gaussians(6, ROWS * COLS);
    const solved = (solver: "clip" | "feedback" | "best", scaleBits?: 16) => {
      const problem = {
        weights: data,
        rows: ROWS,
        cols: COLS,
        moment,
        bits: 3,
        groupSize: 32,
        zeroPoint: "real",
        scaleBits,
      } as const;
      return solveLayer(scalar, solver, problem, DEFAULT_SOLVER_SETTINGS);
    };
    const best = solved("best", 16);
    expect(best.objective).toBeLessThan(solved("clip", 16).objective * 0.9);
    expect(best.objective).toBeLessThan(solved("best").objective * 1.1);
    expect(dequantize(scalar, best.tensor)).toEqual(decode(best.tensor as TwoLevelTensor));
  });

  test("weights that no half-precision offset holds are refused", () => {
    const data = Float32Array.of(7e4, 7e4, 7e4, 7e4);
    expect(() => quantize(scalar, { data, dtype: "F32" }, 1, 4, { bits: 4, scaleBits: 16 })).toThrow(
      "too large",
    );
  });
});
