import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { withThreads } from "../../../lib/native/mod.ts";
import { WeightsError } from "../../../lib/errors.ts";
import { type Ggml, openGgml } from "../../../lib/bench/ggml.ts";
import { linear } from "../../../lib/models/layers/linear.ts";
import {
  dequantize,
  fitTwoLevel,
  groupAffine,
  groupCount,
  type GroupSize,
  packCodes,
  packedBytes,
  packedErrorStatistics,
  quantize,
  relativeRmsError,
  type ScaleBits,
  TWO_LEVEL_GROUP_SIZES,
  type TwoLevelTensor,
  unpackCodes,
} from "../../../lib/quant/mod.ts";
import { allKernels, gaussians, randomStream } from "../../_kernels.ts";

const every = await allKernels();
const scalar = every.find(({ name }) => name.endsWith("scalar"))!.kernels;
afterAll(() => every.forEach(({ kernels }) => kernels.close()));

const f32 = Math.fround;
const half = (bits: number) => new Float16Array(new Uint16Array([bits]).buffer)[0]!;
const f32Weights = (data: Float32Array<ArrayBuffer>) => ({ data, dtype: "F32" as const });
type Floats = Float32Array<ArrayBuffer>;

/** Code `index` of a little-endian bit stream, bit by bit. */
function bitsAt(stream: Uint8Array, start: number, index: number, bits: number): number {
  let code = 0;
  for (let b = 0; b < bits; b++) {
    const at = index * bits + b;
    code += ((stream[start + (at >> 3)]! >> (at & 7)) & 1) << b;
  }
  return code;
}

/** Scale and minimum of every weight, and its code, by docs/format.md alone. */
function parts(tensor: TwoLevelTensor, row: number, col: number) {
  const { cols, bits, groupSize, scaleBits } = tensor;
  const rowBytes = Math.ceil(Math.ceil(cols / groupSize) * scaleBits / 8);
  const group = Math.floor(col / groupSize), supers = Math.ceil(cols / 256);
  const at = row * supers + Math.floor(col / 256);
  const codes = new Uint8Array(tensor.packed.buffer, tensor.packed.byteOffset, tensor.packed.byteLength);
  return {
    scale: f32(half(tensor.superScale[at]!) * bitsAt(tensor.subScale, row * rowBytes, group, scaleBits)),
    minimum: f32(half(tensor.superMin[at]!) * bitsAt(tensor.subMin, row * rowBytes, group, scaleBits)),
    code: bitsAt(codes, row * Math.ceil(cols * bits / 32) * 4, col, bits),
  };
}

/** Weights by the formula, independent of the kernels. */
function decode(tensor: TwoLevelTensor): Floats {
  return Float32Array.from({ length: tensor.rows * tensor.cols }, (_, i) => {
    const { scale, minimum, code } = parts(tensor, Math.floor(i / tensor.cols), i % tensor.cols);
    return f32(f32(scale * code) - minimum);
  });
}

const twoLevel = (...args: Parameters<typeof quantize>) => quantize(...args) as TwoLevelTensor;

const SHAPES: [rows: number, cols: number][] = [[3, 1], [2, 16], [5, 64], [3, 160], [2, 255], [2, 256], [
  3,
  300,
], [
  2,
  1030,
]];

const DISTRIBUTIONS: Record<string, (n: number, seed: number) => Floats> = {
  gaussian: (n, seed) => gaussians(seed, n).map((g) => 0.02 * g),
  "Student t, 3 degrees": (n, seed) => {
    const g = gaussians(seed, 4 * n);
    return Float32Array.from({ length: n }, (_, i) => {
      const [a, b, c, d] = g.subarray(4 * i, 4 * i + 4);
      return 0.02 * a! / Math.sqrt((b! ** 2 + c! ** 2 + d! ** 2) / 3);
    });
  },
  laplace: (n, seed) => {
    const random = randomStream(seed);
    return Float32Array.from({ length: n }, () => 0.02 * Math.log(1 - random()) * (random() < 0.5 ? -1 : 1));
  },
  "log-normal with signs": (n, seed) =>
    gaussians(seed, n).map((g, i) => 0.02 * Math.exp(g) * (Math.sin(i * 12.9898 + seed) < 0 ? -1 : 1)),
};

describe("two-level scales", () => {
  test("a matrix is what docs/format.md says, on every kernel and for any number of threads", () => {
    const random = randomStream(1);
    let seed = 1;
    for (const [rows, cols] of SHAPES) {
      for (const bits of [2, 3, 4, 8] as const) {
        for (const scaleBits of [4, 6] as const) {
          const groupSize = TWO_LEVEL_GROUP_SIZES[Math.floor(random() * 4)]!;
          const weights = f32Weights(gaussians(seed++, rows * cols));
          const columnWeights = gaussians(seed++, cols).map((g) => g * g);
          for (const solver of ["clip", "round"] as const) {
            const options = {
              bits,
              groupSize,
              scaleBits,
              solver,
              ...(solver === "clip" && random() < 0.5 ? { columnWeights } : {}),
            };
            const expected = twoLevel(scalar, weights, rows, cols, options);
            const values = decode(expected);
            for (const { kernels } of every) {
              const threads = 1 + Math.floor(random() * 4);
              expect(quantize(withThreads(kernels, threads), weights, rows, cols, options)).toEqual(expected);
              expect(dequantize(withThreads(kernels, threads), expected, "F32")).toEqual(values);
              const { sumSquaredError } = packedErrorStatistics(
                withThreads(kernels, threads),
                weights,
                expected,
              );
              const wanted = values.reduce((sum, v, i) => sum + (v - weights.data[i]!) ** 2, 0);
              expect(Math.abs(sumSquaredError - wanted)).toBeLessThanOrEqual(1e-12 * wanted);
            }
          }
        }
      }
    }
  });

  test("every code is the nearest on its group's grid", () => {
    for (const scaleBits of [4, 6] as const) {
      for (const bits of [2, 4] as const) {
        const weights = gaussians(bits + scaleBits, 4 * 700);
        const tensor = twoLevel(scalar, f32Weights(weights), 4, 700, { bits, scaleBits });
        for (let i = 0; i < weights.length; i++) {
          const { scale, minimum, code } = parts(tensor, Math.floor(i / 700), i % 700);
          if (scale === 0) continue;
          const errors = Array.from(
            { length: 2 ** bits },
            (_, q) => Math.abs(scale * q - minimum - weights[i]!),
          );
          expect(errors[code]!).toBeLessThanOrEqual(Math.min(...errors) + 1e-6 * (scale + Math.abs(minimum)));
        }
      }
    }
  });

  test("round covers every group: no weight is further than half a step from its value", () => {
    for (const [name, make] of Object.entries(DISTRIBUTIONS)) {
      for (const bits of [2, 4, 8] as const) {
        for (const scaleBits of [4, 6] as const) {
          const weights = make(3 * 600, bits);
          const tensor = twoLevel(scalar, f32Weights(weights), 3, 600, { bits, scaleBits, solver: "round" });
          const values = decode(tensor);
          for (let i = 0; i < weights.length; i++) {
            const { scale, minimum } = parts(tensor, Math.floor(i / 600), i % 600);
            const slack = 1e-6 * (Math.abs(minimum) + Math.abs(weights[i]!));
            const error = Math.abs(values[i]! - weights[i]!);
            if (error > scale / 2 + slack) {
              throw new Error(`${name}, ${bits} bits: ${error} of a step ${scale}`);
            }
          }
        }
      }
    }
  });

  test("the search is better than round, and by how much its layout allows", () => {
    const weights = f32Weights(gaussians(5, 64 * 1024));
    const error = (options: Parameters<typeof quantize>[4]) =>
      relativeRmsError(
        packedErrorStatistics(scalar, weights, quantize(scalar, weights, 64, 1024, options)),
      );
    const searched = error({ bits: 2, scaleBits: 4 });
    expect(searched).toBeLessThan(0.85 * error({ bits: 2, scaleBits: 4, solver: "round" }));
    expect(error({ bits: 2, scaleBits: 6 })).toBeLessThan(searched);
    // not far from groups of 16 with half floats of their own, which take 4 bits a weight
    expect(searched).toBeLessThan(1.06 * error({ bits: 2, groupSize: 16 }));
  });

  test("weights far from zero, on either side, keep their small differences", () => {
    for (const sign of [1, -1]) {
      const weights = gaussians(3, 2 * 512).map((g) => sign * (1 + 0.001 * g));
      for (const solver of ["clip", "round"] as const) {
        const tensor = twoLevel(scalar, f32Weights(weights), 2, 512, { bits: 2, scaleBits: 6, solver });
        const largest = Math.max(...decode(tensor).map((v, i) => Math.abs(v - weights[i]!)));
        expect(largest).toBeLessThan(0.02); // a grid that begins at zero has steps of 1/3
      }
    }
  });

  test("zeros stay zeros, beside tiny and beside large weights", () => {
    for (const factor of [0, 1e-7, 1, 1e5]) {
      const weights = gaussians(9, 512).map((g, i) => i % 64 < 32 ? 0 : factor * g);
      for (const solver of ["clip", "round"] as const) {
        const values = decode(
          twoLevel(scalar, f32Weights(weights), 1, 512, { bits: 2, scaleBits: 4, groupSize: 32, solver }),
        );
        weights.forEach((w, i) => {
          if (i % 64 < 32) expect(values[i]! + 0).toBe(0);
          expect(Math.abs(values[i]! - w)).toBeLessThanOrEqual(Math.max(1e-7, 2.5 * factor));
        });
      }
    }
  });

  test("bytes are counted to the last: 2.625 bits a weight for Q2_K's layout", () => {
    expect(packedBytes({ rows: 1024, cols: 4096, bits: 2, groupSize: 16, zeroPoint: "real", scaleBits: 4 }))
      .toBe(1024 * 4096 * 2.625 / 8 + 16);
    expect(packedBytes({ rows: 1024, cols: 4096, bits: 4, groupSize: 32, zeroPoint: "real", scaleBits: 6 }))
      .toBe(1024 * 4096 * 4.5 / 8 + 16);
    for (const [rows, cols] of SHAPES) {
      const tensor = twoLevel(scalar, f32Weights(gaussians(1, rows * cols)), rows, cols, {
        bits: 3,
        scaleBits: 6,
      });
      const { packed, subScale, subMin, superScale, superMin } = tensor;
      const bytes = [packed, subScale, subMin, superScale, superMin].reduce(
        (sum, a) => sum + a.byteLength,
        0,
      );
      expect(packedBytes({ rows, cols, bits: 3, groupSize: 16, zeroPoint: "real", scaleBits: 6 })).toBe(
        bytes + 16,
      );
    }
  });
});

describe("products with two-level scales", () => {
  test("are those of the dequantized matrix, on every kernel", () => {
    for (
      const [rows, cols, tokens] of [[5, 64, 1], [33, 300, 1], [70, 1030, 1], [37, 160, 3], [
        130,
        520,
        70,
      ]] as const
    ) {
      for (const [bits, scaleBits, groupSize] of [[2, 4, 16], [3, 6, 32], [4, 6, 64], [8, 4, 128]] as const) {
        const weights = f32Weights(gaussians(rows + bits, rows * cols));
        const tensor = twoLevel(scalar, weights, rows, cols, { bits, scaleBits, groupSize });
        const values = decode(tensor), x = gaussians(tokens, tokens * cols), bias = gaussians(8, rows);
        for (const { name, kernels } of every) {
          const out = linear(kernels, { weights: tensor, bias }, x, tokens);
          for (const threads of [2, 3]) {
            expect(linear(withThreads(kernels, threads), { weights: tensor, bias }, x, tokens)).toEqual(out);
          }
          for (let t = 0; t < tokens; t++) {
            for (let r = 0; r < rows; r++) {
              let wanted = bias[r]!, terms = Math.abs(bias[r]!);
              for (let c = 0; c < cols; c++) {
                wanted += x[t * cols + c]! * values[r * cols + c]!;
                terms += Math.abs(x[t * cols + c]! * values[r * cols + c]!);
              }
              // weights and sums are rounded once or twice an element
              const error = Math.abs(out[t * rows + r]! - wanted);
              if (error > 4e-7 * terms * Math.sqrt(cols)) throw new Error(`${name}: ${error} of ${terms}`);
            }
          }
        }
      }
    }
  });
});

describe("groupAffine", () => {
  test("gives every kind of weights back", () => {
    const weights = gaussians(4, 5 * 300);
    for (
      const options of [
        { bits: 2, scaleBits: 4 },
        { bits: 4, scaleBits: 6, groupSize: 128 },
        { bits: 3, groupSize: 64 },
        { bits: 4, groupSize: 0, zeroPoint: "symmetric" },
        { bits: 8, groupSize: 32, zeroPoint: "integer" },
      ] as const
    ) {
      const tensor = quantize(scalar, f32Weights(weights), 5, 300, options);
      const { scale, offset } = groupAffine(tensor);
      const groups = groupCount(300, tensor.groupSize), size = tensor.groupSize || 300;
      const codes = unpackCodes(scalar, tensor.packed, 5, 300, tensor.bits);
      const values = dequantize(scalar, tensor);
      values.forEach((value, i) => {
        const group = Math.floor(i / 300) * groups + Math.floor(i % 300 / size);
        const found = scale[group]! * codes[i]! + offset[group]!;
        expect(Math.abs(found - value)).toBeLessThanOrEqual(
          1e-6 * (Math.abs(value) + Math.abs(offset[group]!)),
        );
      });
    }
  });
});

describe("fitTwoLevel", () => {
  const shape = { rows: 3, cols: 600, groupSize: 32 as GroupSize, scaleBits: 4 as ScaleBits };
  const groups = 3 * 19;

  test("finds multiples of a half float again, whatever its sign", () => {
    for (const { kernels } of every) {
      for (const scaleBits of [4, 6] as const) {
        for (const sign of [1, -1]) {
          const most = 2 ** scaleBits - 1;
          const random = randomStream(scaleBits);
          const code = (i: number) => i % 8 === 0 ? most : Math.floor(random() * (most + 1));
          const scale = Float32Array.from({ length: groups }, (_, i) => sign * 0.0009765625 * code(i % 19));
          const minimum = Float32Array.from({ length: groups }, (_, i) => 0.0078125 * code(i % 19));
          const levels = fitTwoLevel(kernels, { ...shape, scaleBits }, scale, minimum);
          const codes = new Uint8Array(3 * 600);
          const packed = packCodes(scalar, codes, 3, 600, 2);
          const affine = groupAffine({ ...levels, rows: 3, cols: 600, bits: 2, groupSize: 32, packed });
          expect(affine.scale.map((v) => v + 0)).toEqual(scale.map((v) => v + 0));
          expect(affine.offset.map((v) => v + 0)).toEqual(minimum.map((v) => 0 - v));
        }
      }
    }
  });

  test("is nearly the best step in least squares, by a float64 search over all half floats", () => {
    const scale = gaussians(6, 16).map((g) => Math.exp(0.5 * g)),
      weights = gaussians(7, 16).map((g) => g * g);
    const levels = fitTwoLevel(
      scalar,
      { rows: 1, cols: 256, groupSize: 16, scaleBits: 4 },
      scale,
      scale,
      weights,
    );
    const errorOf = (step: number) =>
      scale.reduce((sum, value, i) => {
        const code = Math.min(15, Math.max(0, Math.round(value / step)));
        return sum + weights[i]! * (value - step * code) ** 2;
      }, 0);
    let best = Infinity;
    for (let bits = 1; bits < 0x7c00; bits++) best = Math.min(best, errorOf(half(bits)));
    const found = errorOf(half(levels.superScale[0]!));
    expect(levels.superMin[0]).toBe(levels.superScale[0]!);
    expect(found).toBeLessThan(1.25 * best);
    expect(found).toBeLessThan(errorOf(Math.f16round(Math.max(...scale) / 15)));
  });

  const ones = new Float32Array(groups).fill(1);
  test("refuses what does not fit", () => {
    const fit = (changes: object, scale: Floats = ones, weights?: Floats) => () =>
      fitTwoLevel(scalar, { ...shape, ...changes }, scale, ones, weights);
    expect(fit({ scaleBits: 5 })).toThrow(/scaleBits must be one of 4, 6, 16, got 5/);
    expect(fit({ groupSize: 256 })).toThrow(/groupSize must be one of 16, 32, 64, 128, got 256/);
    expect(fit({ rows: 1.5 })).toThrow(RangeError);
    expect(fit({}, new Float32Array(4))).toThrow(/scale must be 57 float32 values, got 4/);
    expect(fit({}, ones, new Float32Array(4))).toThrow(/groupWeights must be 57 float32 values, got 4/);
    expect(fit({}, ones, ones.map(() => -1))).toThrow(/finite and ≥ 0, got -1 at 0/);
    for (const bad of [NaN, Infinity, 1e9]) expect(fit({}, ones.map(() => bad))).toThrow(WeightsError);
    expect(
      fitTwoLevel(scalar, { ...shape, rows: 0 }, new Float32Array(0), new Float32Array(0)).superMin.length,
    )
      .toBe(0);
  });
});

describe("arguments of two-level scales", () => {
  const weights = f32Weights(gaussians(1, 2 * 300));
  const quantized = (options: object) => () =>
    quantize(scalar, weights, 2, 300, { bits: 2, scaleBits: 4, ...options });

  test("are checked before a kernel is called", () => {
    expect(quantized({ scaleBits: 5 })).toThrow(/scaleBits must be one of 4, 6, 8, 16, got 5/);
    for (const groupSize of [0, 256, 48]) {
      expect(quantized({ groupSize })).toThrow(/must be one of 16, 32, 64, 128/);
    }
    for (const zeroPoint of ["integer", "symmetric"]) {
      expect(quantized({ zeroPoint })).toThrow(/must be one of real/);
    }
    expect(quantized({ solver: "round", columnWeights: new Float32Array(300) })).toThrow(
      /need the solver "clip"/,
    );
  });

  test("arrays of another length or type are refused by every function", () => {
    const good = twoLevel(scalar, weights, 2, 300, { bits: 2, scaleBits: 4 });
    const changes: Record<string, object> = {
      "subScale must be 20 bytes": { subScale: new Uint8Array(19) },
      "subMin must be 20 bytes": { subMin: new Uint32Array(20) },
      "superScale must be 4 half floats": { superScale: new Uint16Array(2) },
      "superMin must be 4 half floats": { superMin: undefined },
      "packed must be 38 u32 words": { packed: new Uint32Array(37) },
      "groupSize must be one of 16, 32, 64, 128": { groupSize: 0 },
      "scaleBits must be one of 4, 6, 8": { scaleBits: 5 },
    };
    for (const [message, change] of Object.entries(changes)) {
      const bad = { ...good, ...change } as TwoLevelTensor;
      expect(() => dequantize(scalar, bad)).toThrow(message);
      expect(() => packedErrorStatistics(scalar, weights, bad)).toThrow(message);
      expect(() => linear(scalar, { weights: bad }, new Float32Array(300), 1)).toThrow(message);
      expect(() => groupAffine(bad)).toThrow(message);
    }
  });

  test("a NaN, an infinity and a weight beyond every half-precision scale are named", () => {
    for (
      const [value, message] of [[NaN, "row 1, column 7"], [-Infinity, "row 1, column 7"], [
        1e30,
        "too large",
      ]] as const
    ) {
      for (const { kernels } of every) {
        const data = gaussians(1, 2 * 300);
        data[307] = value;
        for (const solver of ["clip", "round"] as const) {
          expect(() => quantize(kernels, f32Weights(data), 2, 300, { bits: 2, scaleBits: 4, solver }))
            .toThrow(
              message,
            );
        }
      }
    }
  });

  test("nothing is quantized to nothing", () => {
    for (const [rows, cols] of [[0, 300], [3, 0], [0, 0]] as const) {
      const tensor = twoLevel(scalar, f32Weights(new Float32Array(0)), rows, cols, { bits: 2, scaleBits: 4 });
      expect(dequantize(scalar, tensor).length).toBe(0);
      expect(packedErrorStatistics(scalar, f32Weights(new Float32Array(0)), tensor).sumSquares).toBe(0);
    }
  });
});

describe("against ggml's Q2_K and Q4_K, at the same bits per weight", () => {
  let ggml: Ggml | undefined;
  beforeAll(async () => {
    const opened = await openGgml();
    if ("reason" in opened) console.log(`skipped: two-level scales against ggml: ${opened.reason}`);
    else ggml = opened;
  });
  afterAll(() => ggml?.close());

  const [rows, cols] = [64, 4096];
  const importance = gaussians(99, cols).map((g) => Math.exp(g));

  /**
   * Relative RMS error plain, weighted by column, and with ggml's objective: column · √(mean square + w²).
   */
  function errors(weights: Floats, values: Floats, columns: Floats | undefined): number[] {
    const sums = [0, 0, 0, 0, 0, 0];
    for (let begin = 0; begin < weights.length; begin += 256) {
      let mean = 0;
      for (let i = begin; i < begin + 256; i++) mean += weights[i]! ** 2 / 256;
      for (let i = begin; i < begin + 256; i++) {
        const w = weights[i]!, square = (w - values[i]!) ** 2, column = columns?.[i % cols] ?? 1;
        [1, column, column * Math.sqrt(mean + w * w)].forEach((weight, k) => {
          sums[2 * k]! += weight * square;
          sums[2 * k + 1]! += weight * w * w;
        });
      }
    }
    return [0, 1, 2].map((k) => Math.sqrt(sums[2 * k]! / sums[2 * k + 1]!));
  }

  for (const [name, make] of Object.entries(DISTRIBUTIONS)) {
    for (const [type, bits, scaleBits, groupSize] of [["q2_K", 2, 4, 16], ["q4_K", 4, 6, 32]] as const) {
      for (const columns of [undefined, importance]) {
        test(`${type}, ${name}, ${columns ? "with" : "without"} importance: the error is not larger`, () => {
          if (!ggml) return;
          const weights = make(rows * cols, 17);
          const packed = new Uint8Array(weights.length);
          const restored = new Float32Array(weights.length);
          const bytes = ggml.quantize(type, weights, packed, rows, cols, columns);
          ggml.dequantizeRow(type, packed, restored, weights.length);
          expect(packedBytes({ rows, cols, bits, groupSize, zeroPoint: "real", scaleBits }) - 16).toBe(bytes);
          const kernels = every[0]!.kernels;
          const tensor = quantize(kernels, f32Weights(weights), rows, cols, {
            bits,
            scaleBits,
            groupSize,
            columnWeights: columns,
          });
          const theirs = errors(weights, restored, columns);
          errors(weights, dequantize(kernels, tensor), columns).forEach((ours, k) => {
            if (columns && k === 0) return; // with importance nobody minimises the plain error
            expect(ours).toBeLessThanOrEqual(theirs[k]!);
          });
        });
      }
    }
  }
});
