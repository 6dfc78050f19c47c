/** Groups that half-precision scales and zero points reach badly: tiny, far from 0, constant, with an outlier. */
import { describe, expect, test } from "bun:test";
import {
  BIT_WIDTHS,
  dequantize,
  OFFSET_BITS,
  type OneLevelTensor,
  quantize,
  type QuantizeOptions,
  type ScaleBits,
  ZERO_POINT_KINDS,
} from "../../lib/quant/mod.ts";
import { allKernels, gaussians, randomStream } from "../_kernels.ts";

const every = await allKernels();
const { kernels } = every.find(({ name }) => name.endsWith("scalar"))!;
const COLS = 128, ROWS = 3, COUNT = ROWS * COLS;

const gauss = gaussians(7, COUNT), uniform = randomStream(9);
const all = (weight: (i: number) => number) => Float32Array.from({ length: COUNT }, (_, i) => weight(i));

/** Squared error of a quantization, and what its codes decode to. */
function quantized(weights: Float32Array<ArrayBuffer>, options: Omit<QuantizeOptions, "groupSize">) {
  const tensor = quantize(kernels, { data: weights, dtype: "F32" }, ROWS, COLS, {
    groupSize: 64,
    ...options,
  });
  const got = dequantize(kernels, tensor);
  return { tensor, got, error: got.reduce((sum, value, i) => sum + (value - weights[i]!) ** 2, 0) };
}

const squares = (weights: Float32Array) => weights.reduce((sum, value) => sum + value * value, 0);

describe("groups too small for a half-precision scale", () => {
  for (const size of [1e-7, 1e-8, 1e-9, 1e-12, 1e-30, 1e-41]) {
    const families = {
      both: all((i) => gauss[i]! * size),
      above: all((i) => Math.abs(gauss[i]!) * size),
      below: all((i) => -Math.abs(gauss[i]!) * size),
      sparse: all((i) => i % 32 === 5 ? gauss[i]! * size : 0),
      outlier: all((i) => i % 64 === 5 ? 100 * size : gauss[i]! * size),
    };
    for (const [name, weights] of Object.entries(families)) {
      test(`${name} of ${size}: no further from the weights than zeros`, () => {
        for (const zeroPoint of ZERO_POINT_KINDS) {
          for (const solver of ["round", "clip"] as const) {
            for (const bits of BIT_WIDTHS) {
              // Two bits over both signs of a few large weights lose to zeros at any size.
              if (name === "sparse" && size === 1e-7 && bits === 2) continue;
              const { error } = quantized(weights, { bits, zeroPoint, solver });
              expect(error).toBeLessThanOrEqual(1.0002 * squares(weights));
            }
          }
        }
      });
    }
  }
});

describe("groups far from 0", () => {
  for (const center of [1, -1, 100, 0.01]) {
    for (const spread of [1e-2, 1e-3, 1e-4]) {
      const weights = all((i) => center * (1 + spread * gauss[i]!));
      test(`${center} ± ${spread}: more bits are no worse, and 8 bits hold the spread`, () => {
        for (const scaleBits of [undefined, OFFSET_BITS as ScaleBits]) {
          for (const solver of ["round", "clip"] as const) {
            const errors = BIT_WIDTHS.map((bits) =>
              quantized(weights, { bits, zeroPoint: "real", scaleBits, solver }).error
            );
            for (const [i, error] of errors.entries()) {
              expect(error).toBeLessThanOrEqual(1.2 * Math.min(...errors.slice(0, i + 1)));
            }
            expect(Math.sqrt(errors[3]! / COUNT)).toBeLessThan(
              0.1 * spread * Math.abs(center) + 1e-5 * Math.abs(center),
            );
          }
        }
      });
    }
    const weights = all((i) => center * (1 + 1e-4 * gauss[i]!));
    test(`${center} ± 0.0001 with a zero point among the codes: within the spread`, () => {
      for (const zeroPoint of ["integer", "symmetric"] as const) {
        for (const bits of BIT_WIDTHS) {
          const { error } = quantized(weights, { bits, zeroPoint, solver: "round" });
          expect(Math.sqrt(error / COUNT)).toBeLessThan(3e-4 * Math.abs(center));
        }
      }
    });
  }
});

test("constants, zeros and an outlier", () => {
  for (const value of [0, 1, -0.3, 1e-9, 65504, -1e5]) {
    const { got } = quantized(all(() => value), { bits: 4, zeroPoint: "real", solver: "clip" });
    for (const each of got) expect(Math.abs(each - value)).toBeLessThanOrEqual(1e-6 * Math.abs(value));
  }
  const weights = all((i) => i === 9 ? 6e4 : 0.02 * gauss[i]!);
  for (const bits of BIT_WIDTHS) {
    const { error } = quantized(weights, { bits, zeroPoint: "real", solver: "round" });
    expect(error).toBeLessThan(1e-6 * squares(weights));
  }
});

test("every instruction set gives the scalar version's bytes for them", () => {
  const rows = [
    (i: number) => gauss[i]! * 1e-9,
    (i: number) => 1 + 1e-3 * gauss[i]!,
    (i: number) => -50 * (1 + 1e-4 * (i % 7) * uniform()),
    (i: number) => i % 9 === 0 ? -1e-7 * uniform() : 0,
  ];
  const weights = all((i) => rows[Math.floor(i / 32) % rows.length]!(i));
  const bytes = ({ packed, scale, zeroPoint }: OneLevelTensor) => [packed, scale, zeroPoint];
  for (const zeroPoint of ZERO_POINT_KINDS) {
    for (const bits of BIT_WIDTHS) {
      const options = { bits, groupSize: 32, zeroPoint, solver: "clip" } as const;
      const [first, ...others] = [kernels, ...every.map(({ kernels }) => kernels)].map((own) =>
        bytes(quantize(own, { data: weights, dtype: "F32" }, ROWS, COLS, options) as OneLevelTensor)
      );
      for (const other of others) expect(other).toEqual(first!);
    }
  }
});

test("an offset beyond half precision is refused, and never stored as infinity", () => {
  for (const size of [3e4, 6e4, 1e5]) {
    const families = {
      both: all((i) => gauss[i]! * size),
      edges: all((i) => i % 2 === 0 ? -size : size / 2),
    };
    for (const [name, weights] of Object.entries(families)) {
      for (const { kernels, name: backend } of every) {
        for (const solver of ["round", "clip"] as const) {
          for (const bits of BIT_WIDTHS) {
            const options = { bits, groupSize: 64, scaleBits: OFFSET_BITS, solver } as const;
            let values: Float32Array;
            try {
              values = dequantize(
                kernels,
                quantize(kernels, { data: weights, dtype: "F32" }, ROWS, COLS, options),
              );
            } catch (error) {
              expect(`${name} ${backend} ${(error as Error).message}`).toContain(
                "too large for a half-precision",
              );
              continue;
            }
            expect(`${name} ${size} ${backend} ${solver} ${bits} ${values.every(Number.isFinite)}`).toContain(
              "true",
            );
            const squared = values.reduce((sum, value, i) => sum + (value - weights[i]!) ** 2, 0);
            expect(squared).toBeLessThanOrEqual(squares(weights));
          }
        }
      }
    }
  }
});
