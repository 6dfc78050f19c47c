import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { WeightsError } from "../../../lib/errors.ts";
import { type Ggml, openGgml } from "../../../lib/bench/ggml.ts";
import { GGML_FORMATS, type GgmlFormat, ggmlMethod } from "../../../lib/bench/peers/ggml_method.ts";
import { gptq } from "../../../lib/bench/peers/gptq.ts";
import { fitHqq, hqq } from "../../../lib/bench/peers/hqq.ts";
import type { LayerInputs, Method, MethodResult } from "../../../lib/bench/peers/method.ts";
import { relativeDifference } from "../../../lib/bench/kernels/cases.ts";
import { gaussianWeights } from "../../../lib/bench/random.ts";
import { type Kernels, openKernels } from "../../../lib/native/mod.ts";
import { type BitWidth, type GroupSize, quantize } from "../../../lib/quant/mod.ts";
import { scalesOf } from "../../../lib/quant/solvers/steps.ts";
import { randomStream } from "../../_kernels.ts";
import { identity, ours, outputError, problem } from "./_problems.ts";

let kernels: Kernels;
beforeAll(async () => {
  kernels = await openKernels();
});
afterAll(() => kernels.close());

function result(
  method: Method,
  weights: Float32Array,
  rows: number,
  cols: number,
  inputs?: LayerInputs,
): MethodResult {
  const made = method.quantize(weights, rows, cols, inputs);
  if ("unsupported" in made) throw new Error(made.unsupported);
  return made;
}

/** Gaussian with one in fifty weights eight times as large. */
function heavyTailed(count: number, seed: number): Float32Array {
  const random = randomStream(seed);
  return gaussianWeights(count, seed, 0.5).map((value) => random() < 0.02 ? 8 * value : value);
}

describe("HQQ", () => {
  const ROWS = 16, COLS = 192;
  const powerError = (weights: Float32Array, restored: ArrayLike<number>, power: number) =>
    weights.reduce((sum, value, i) => sum + Math.abs(value - restored[i]!) ** power, 0);

  for (const [bits, groupSize] of [[2, 0], [2, 64], [3, 0], [4, 32]] as [BitWidth, GroupSize][]) {
    test(`lowers its objective below round to nearest's on heavy tails, ${bits} bits, groups of ${groupSize}`, () => {
      const weights = heavyTailed(ROWS * COLS, 3), setting = { bits, groupSize };
      const round = result(ours(kernels, "round", setting), weights, ROWS, COLS);
      const own = result(hqq(setting), weights, ROWS, COLS);
      expect(powerError(weights, own.weights, 0.7)).toBeLessThan(powerError(weights, round.weights, 0.7));
      expect(own.storedBytes).toBe(round.storedBytes);
    });
  }

  test("goes on while the mean absolute error falls, and no further", () => {
    const weights = heavyTailed(ROWS * COLS, 5), setting = { bits: 2, groupSize: 64 } as const;
    const errorAfter = (iterations: number) => {
      const { codes, reciprocal, zero } = fitHqq(weights, ROWS, COLS, setting, { iterations });
      const groups = COLS / 64;
      return powerError(
        weights,
        Array.from(codes, (code, i) => {
          const group = Math.floor(i / COLS) * groups + Math.floor(i % COLS / 64);
          return (code - zero[group]!) / reciprocal[group]!;
        }),
        1,
      );
    };
    const { iterations } = fitHqq(weights, ROWS, COLS, setting);
    expect(iterations).toBeGreaterThan(2);
    const errors = Array.from({ length: iterations }, (_, i) => errorAfter(i)); // before iteration i + 1
    for (let i = 1; i < iterations - 1; i++) expect(errors[i]!).toBeLessThan(errors[i - 1]!);
    if (iterations < 20) expect(errors[iterations - 1]!).toBeGreaterThanOrEqual(errors[iterations - 2]!);
  });

  test("moves the zero point as worked by hand", () => {
    // Range 3, so scale 1 and zero point 1; codes 0 1 1 3, errors 0 −0.2 0.1 0. The threshold 0.2^(−0.3) / 10
    // = 0.162066 leaves −0.037934 of −0.2; that of 0.1 is above it. New zero point: (1 + (1 + 0.2 − 0.037934)
    // + (1 − 0.1) + 1) / 4.
    const weights = Float32Array.of(-1, -0.2, 0.1, 2);
    const { zero, codes } = fitHqq(weights, 1, 4, { bits: 2, groupSize: 0 }, { iterations: 1 });
    expect(zero[0]!).toBeCloseTo(1.0155165, 6);
    expect([...codes]).toEqual([0, 1, 1, 3]);
  });

  test("keeps constant groups and zeros", () => {
    const restored = result(hqq({ bits: 2, groupSize: 32 }), new Float32Array(64).fill(-0.25), 1, 64).weights;
    for (const value of restored) expect(value).toBe(-0.25);
    expect([...result(hqq({ bits: 4, groupSize: 0 }), new Float32Array(8), 2, 4).weights]).toEqual(
      new Array(8).fill(0),
    );
  });
});

/** Optimal brain quantization in a given order as in its paper: at each column the inverse of what is left, by elimination. */
function textbookObq(
  row: Float64Array,
  matrix: readonly (readonly number[])[],
  order: readonly number[],
  nearest: (column: number, value: number) => number,
): Float64Array {
  const left = row.slice(), out = new Float64Array(row.length);
  for (let step = 0; step < order.length; step++) {
    const rest = order.slice(step), inverse = inverseOf(rest.map((i) => rest.map((j) => matrix[i]![j]!)));
    const column = rest[0]!;
    out[column] = nearest(column, left[column]!);
    const error = (left[column]! - out[column]!) / inverse[0]![0]!;
    rest.forEach((other, k) => left[other]! -= error * inverse[k]![0]!);
  }
  return out;
}

/** Gauss and Jordan with row exchanges. */
function inverseOf(matrix: readonly (readonly number[])[]): number[][] {
  const size = matrix.length;
  const work = matrix.map((row, i) => [...row, ...row.map((_, j) => i === j ? 1 : 0)]);
  for (let i = 0; i < size; i++) {
    const pivot = work.slice(i).reduce(
      (best, row, k) => Math.abs(row[i]!) > Math.abs(work[best]![i]!) ? i + k : best,
      i,
    );
    [work[i], work[pivot]] = [work[pivot]!, work[i]!];
    const scale = work[i]![i]!;
    work[i] = work[i]!.map((value) => value / scale);
    for (let k = 0; k < size; k++) {
      if (k === i) continue;
      const factor = work[k]![i]!;
      work[k] = work[k]!.map((value, j) => value - factor * work[i]![j]!);
    }
  }
  return work.map((row) => row.slice(size));
}

describe("GPTQ", () => {
  for (
    const [seed, rows, cols, bits, groupSize] of [
      [1, 5, 9, 2, 0],
      [2, 4, 40, 2, 16],
      [3, 4, 33, 3, 32],
      [4, 6, 16, 4, 0],
      [5, 3, 48, 2, 16],
    ] as [number, number, number, BitWidth, GroupSize][]
  ) {
    test(`is textbook optimal brain quantization, ${rows} × ${cols}, ${bits} bits, groups of ${groupSize}`, () => {
      const { weights, inputs } = problem(seed, rows, cols), { secondMoment } = inputs;
      const setting = { bits, groupSize };
      const made = result(gptq(kernels, setting), weights, rows, cols, inputs);
      const matrixOf = { data: weights, dtype: "F32" } as const;
      const { scale, zeroPoint } = scalesOf(
        quantize(kernels, matrixOf, rows, cols, { ...setting, solver: "round" }),
      );
      const size = groupSize === 0 ? cols : groupSize, groups = Math.ceil(cols / size);
      const diagonal = Array.from({ length: cols }, (_, i) => secondMoment[i * cols + i]!);
      const damping = 0.01 * diagonal.reduce((sum, value) => sum + value, 0) / cols;
      const matrix = diagonal.map((_, i) =>
        diagonal.map((_, j) => secondMoment[i * cols + j]! + (i === j ? damping : 0))
      );
      const order = [...diagonal.keys()];
      order.sort((a, b) => diagonal[b]! - diagonal[a]!);
      const wanted = new Float32Array(weights.length);
      for (let row = 0; row < rows; row++) {
        const nearest = (column: number, value: number) => {
          const group = row * groups + Math.floor(column / size);
          const steps = Array.from(
            { length: 2 ** bits },
            (_, code) => scale[group]! * (code - zeroPoint[group]!),
          );
          return steps.reduce((best, step) => Math.abs(step - value) < Math.abs(best - value) ? step : best);
        };
        const begin = row * cols;
        wanted.set(
          textbookObq(Float64Array.from(weights.subarray(begin, begin + cols)), matrix, order, nearest),
          begin,
        );
      }
      const error = outputError(weights, made.weights, cols, secondMoment);
      const wantedError = outputError(weights, wanted, cols, secondMoment);
      expect(Math.abs(error - wantedError)).toBeLessThan(1e-6 * wantedError);
      const round = result(ours(kernels, "round", setting), weights, rows, cols);
      expect(error).toBeLessThan(outputError(weights, round.weights, cols, secondMoment));
      expect(made.storedBytes).toBe(round.storedBytes);
    });
  }

  for (const groupSize of [0, 32] as const) {
    test(`with inputs that do not depend on one another is round to nearest, groups of ${groupSize}`, () => {
      const weights = gaussianWeights(8 * 96, 11), setting = { bits: 3, groupSize } as const;
      const made = result(gptq(kernels, setting), weights, 8, 96, { cols: 96, secondMoment: identity(96) });
      expect([...made.weights]).toEqual([...result(ours(kernels, "round", setting), weights, 8, 96).weights]);
    });
  }

  test("damps singular second moments, more where that is not enough, and says so", () => {
    const cols = 8, weights = gaussianWeights(2 * cols, 5), setting = { bits: 2, groupSize: 0 } as const;
    const rankOne = new Float64Array(cols * cols).fill(1);
    const made = result(gptq(kernels, setting), weights, 2, cols, { cols, secondMoment: rankOne });
    expect(made.note).toBeUndefined();
    expect(made.weights.every(Number.isFinite)).toBe(true);
    const indefinite = identity(cols);
    indefinite[1] = indefinite[cols] = 1.05; // eigenvalue −0.05
    const damped = result(gptq(kernels, setting), weights, 2, cols, { cols, secondMoment: indefinite });
    expect(damped.note).toBe("damping raised from 0.01 to 0.1");
    expect(damped.weights.every(Number.isFinite)).toBe(true);
    const negative = identity(cols).map((value) => -value);
    expect(() => gptq(kernels, setting).quantize(weights, 2, cols, { cols, secondMoment: negative })).toThrow(
      WeightsError,
    );
  });

  test("takes dead columns", () => {
    const cols = 6, { weights, inputs } = problem(8, 3, cols), secondMoment = inputs.secondMoment.slice();
    for (let i = 0; i < cols; i++) secondMoment[2 * cols + i] = secondMoment[i * cols + 2] = 0;
    const setting = { bits: 4, groupSize: 0 } as const;
    const made = result(gptq(kernels, setting), weights, 3, cols, { cols, secondMoment });
    expect(made.weights.every(Number.isFinite)).toBe(true);
    const round = result(ours(kernels, "round", setting), weights, 3, cols);
    expect(outputError(weights, made.weights, cols, secondMoment)).toBeLessThan(
      outputError(weights, round.weights, cols, secondMoment),
    );
  });
});

describe("ggml", () => {
  let ggml: Ggml | undefined;
  beforeAll(async () => {
    const opened = await openGgml();
    if ("reason" in opened) console.log(`skipped: tests of ggml's formats: ${opened.reason}`);
    else ggml = opened;
  });
  afterAll(() => ggml?.close());

  const ROWS = 16, COLS = 512, weights = gaussianWeights(ROWS * COLS, 7);
  const importances = identity(COLS).map((value, i) => value * (i % 16 === 0 ? 100 : 1));
  const inputs = { cols: COLS, secondMoment: importances };
  /** Bits per weight by the formats' block sizes, and the relative error on Gaussian weights to two digits. */
  const KNOWN: Record<GgmlFormat, readonly [number, number]> = {
    q2_K: [2.625, 0.30],
    q3_K: [3.4375, 0.15],
    q4_K: [4.5, 0.07],
    q8_0: [8.5, 0.0053],
    tq2_0: [2.0625, 0.81],
    iq2_xxs: [2.0625, 0.37],
    iq2_xs: [2.3125, 0.31],
    iq2_s: [2.5625, 0.26],
  };

  for (const [format, [bits, error]] of Object.entries(KNOWN) as [GgmlFormat, readonly [number, number]][]) {
    test(`${format} has ${bits} bits a weight and its error`, () => {
      if (!ggml) return;
      const flatInputs = { cols: COLS, secondMoment: identity(COLS) };
      const importance = GGML_FORMATS[format] === "required";
      const { weights: restored, storedBytes } = result(
        ggmlMethod(ggml, format, { importance }),
        weights,
        ROWS,
        COLS,
        importance ? flatInputs : undefined,
      );
      expect(storedBytes * 8 / weights.length).toBe(bits);
      const found = relativeDifference(restored, weights);
      expect([format, found > 0.9 * error, found < 1.1 * error]).toEqual([format, true, true]);
    });
  }

  test("importance weights lower the error where they lie", () => {
    if (!ggml) return;
    for (const format of ["q2_K", "q3_K", "q4_K", "iq2_s"] as const) {
      const errors = [false, true].map((importance) => {
        const { weights: restored } = result(
          ggmlMethod(ggml!, format, { importance }),
          weights,
          ROWS,
          COLS,
          inputs,
        );
        return outputError(weights, restored, COLS, importances);
      });
      expect([format, errors[1]! < errors[0]!]).toEqual([format, true]);
    }
  });

  test("across rows gives the same where rows are whole super-blocks", () => {
    if (!ggml) return;
    for (const format of ["q2_K", "iq2_xs", "iq2_s"] as const) {
      const made = [false, true].map((acrossRows) =>
        result(ggmlMethod(ggml!, format, { importance: true, acrossRows }), weights, ROWS, COLS, inputs)
      );
      expect(made[0]!.storedBytes).toBe(made[1]!.storedBytes);
      expect([...made[0]!.weights]).toEqual([...made[1]!.weights]);
    }
  });

  test("across rows pads the last super-block and weighs the right columns", () => {
    if (!ggml) return;
    const cols = 100, rows = 3, own = gaussianWeights(rows * cols, 9);
    const secondMoment = identity(cols).map((value, i) => value * (i % cols % 10 === 0 ? 1e3 : 1));
    const method = (importance: boolean) => ggmlMethod(ggml!, "q2_K", { importance, acrossRows: true });
    const [plain, weighted] = [false, true].map((importance) =>
      result(method(importance), own, rows, cols, { cols, secondMoment })
    );
    expect(plain!.storedBytes).toBe(2 * 84);
    expect(outputError(own, weighted!.weights, cols, secondMoment)).toBeLessThan(
      0.5 * outputError(own, plain!.weights, cols, secondMoment),
    );
    expect(ggmlMethod(ggml, "q2_K").quantize(own, rows, cols, undefined)).toEqual({
      unsupported: "columns must be a multiple of 256, got 100",
    });
  });

  test("survives columns without importance and weights of 0, refuses what a half cannot scale", () => {
    if (!ggml) return;
    for (const format of ["q2_K", "iq2_xs", "iq2_s"] as const) {
      const method = ggmlMethod(ggml, format, { importance: true });
      const dead = { cols: COLS, secondMoment: new Float64Array(COLS * COLS) };
      expect(result(method, weights, ROWS, COLS, dead).weights.every(Number.isFinite)).toBe(true);
      const zeros = result(method, new Float32Array(COLS), 1, COLS, inputs).weights;
      expect(zeros.every((value) => value === 0)).toBe(true);
      expect(() => method.quantize(new Float32Array(COLS).fill(1e6), 1, COLS, inputs)).toThrow(WeightsError);
    }
  });

  test("importance weights that a format ignores or needs", () => {
    if (!ggml) return;
    expect(() => ggmlMethod(ggml!, "tq2_0", { importance: true })).toThrow(RangeError);
    expect(() => ggmlMethod(ggml!, "iq2_xs")).toThrow("required");
  });

  test("refuses what no method can quantize", () => {
    if (!ggml) return;
    refusesBadInput(ggmlMethod(ggml, "q2_K", { importance: true, acrossRows: true }));
  });
});

/** NaN, infinities and sizes that do not fit are refused with the kind of error that the place calls for. */
function refusesBadInput(method: Method): void {
  const cols = 32, good = gaussianWeights(2 * cols, 3), inputs = { cols, secondMoment: identity(cols) };
  expect(() => method.quantize(good, 3, cols, inputs)).toThrow(TypeError);
  expect(() => method.quantize(good, 0, cols, inputs)).toThrow(TypeError);
  for (const bad of [NaN, Infinity, -Infinity]) {
    const weights = good.slice();
    weights[cols + 5] = bad;
    expect(() => method.quantize(weights, 2, cols, inputs)).toThrow(WeightsError);
    expect(() => method.quantize(weights, 2, cols, inputs)).toThrow("row 1, column 5");
  }
  if (!method.needsInputs) return;
  expect(() => method.quantize(good, 2, cols, undefined)).toThrow("needs the second moment");
  expect(() => method.quantize(good, 2, cols, { cols: 16, secondMoment: identity(16) })).toThrow(TypeError);
  const secondMoment = identity(cols);
  secondMoment[3 * cols + 7] = NaN;
  expect(() => method.quantize(good, 2, cols, { cols, secondMoment })).toThrow("at row 3, column 7");
}

describe("bad input", () => {
  const setting = { bits: 2, groupSize: 32 } as const;
  test("is refused by HQQ", () => refusesBadInput(hqq(setting)));
  test("is refused by GPTQ", () => refusesBadInput(gptq(kernels, setting)));
  test("is refused by our solvers", () => refusesBadInput(ours(kernels, "round", setting)));
  test("too large for a half-precision scale is refused", () => {
    const weights = Float32Array.of(-3e5, 3e5);
    for (const method of [hqq(setting), gptq(kernels, setting), ours(kernels, "clip", setting)]) {
      expect(() => method.quantize(weights, 1, 2, { cols: 2, secondMoment: identity(2) })).toThrow(
        WeightsError,
      );
    }
  });
});
