import { describe, expect, test } from "bun:test";
import { type Kernels, withThreads } from "../../lib/native/mod.ts";
import {
  BIT_WIDTHS,
  type BitWidth,
  convertFloats,
  cosine,
  dequantize,
  errorStatistics,
  findNonfinite,
  GROUP_SIZES,
  groupCount,
  type GroupSize,
  type OneLevelTensor,
  packCodes,
  packedErrorStatistics,
  packedWords,
  quantize,
  type QuantizeOptions,
  relativeRmsError,
  unpackCodes,
  ZERO_POINT_KINDS,
} from "../../lib/quant/mod.ts";
import { allKernels, gaussians, randomStream } from "../_kernels.ts";

const every = await allKernels();
const scalar = every.find(({ name }) => name.endsWith("scalar"))!.kernels;

const halfBits = (value: number) => new Uint16Array(new Float16Array([value]).buffer)[0]!;
const halfValue = (bits: number) => new Float16Array(new Uint16Array([bits]).buffer)[0]!;
const f32 = Math.fround;

/** `| 0` of ties to even, from the definition. */
function roundEven(x: number): number {
  const floor = Math.floor(x), rest = x - floor;
  if (rest !== 0.5) return Math.round(x);
  return floor % 2 === 0 ? floor : floor + 1;
}

const f32Weights = (data: Float32Array<ArrayBuffer>) => ({ data, dtype: "F32" as const });

/** Scale, zero point and codes of one group by the textbook, for groups whose range holds zero. */
function textbookRound(
  group: Float32Array,
  bits: BitWidth,
): { scale: number; zeroPoint: number; codes: number[] } {
  const codeMax = 2 ** bits - 1;
  const minimum = Math.min(...group), maximum = Math.max(...group);
  const scale = Math.f16round(f32(f32(maximum - minimum) / codeMax));
  const zeroPoint = Math.f16round(f32(-minimum / scale));
  const codes = [...group].map((w) =>
    roundEven(Math.min(codeMax, Math.max(0, f32(f32(w / scale) + zeroPoint))))
  );
  return { scale, zeroPoint, codes };
}

/** Weights by the formula, independent of the kernels. */
function decode(tensor: OneLevelTensor): Float32Array {
  const words = packedWords(tensor.cols, tensor.bits), groups = groupCount(tensor.cols, tensor.groupSize);
  const out = new Float32Array(tensor.rows * tensor.cols);
  for (let row = 0; row < tensor.rows; row++) {
    let stream = 0n;
    for (let i = words - 1; i >= 0; i--) stream = (stream << 32n) | BigInt(tensor.packed[row * words + i]!);
    for (let col = 0; col < tensor.cols; col++) {
      const code = Number((stream >> BigInt(col * tensor.bits)) & BigInt(2 ** tensor.bits - 1));
      const group = row * groups + (tensor.groupSize === 0 ? 0 : Math.floor(col / tensor.groupSize));
      const zero = tensor.zeroPoint ? halfValue(tensor.zeroPoint[group]!) : 2 ** (tensor.bits - 1);
      out[row * tensor.cols + col] = f32(halfValue(tensor.scale[group]!) * f32(code - zero));
    }
  }
  return out;
}

const bytes = (view: ArrayBufferView | undefined) =>
  view === undefined ? [] : [...new Uint8Array(view.buffer, view.byteOffset, view.byteLength)];

function expectSame(a: OneLevelTensor, b: OneLevelTensor): void {
  expect(bytes(a.packed)).toEqual(bytes(b.packed));
  expect(bytes(a.scale)).toEqual(bytes(b.scale));
  expect(bytes(a.zeroPoint)).toEqual(bytes(b.zeroPoint));
}

for (const { name, kernels } of every) {
  describe(name, () => {
    test("2 bits by hand: 0 1 2 3 is its own codes", () => {
      const tensor = quantize(kernels, f32Weights(Float32Array.of(0, 1, 2, 3)), 1, 4, {
        bits: 2,
        solver: "round",
      });
      expect([...tensor.packed]).toEqual([0b11_10_01_00]);
      expect([halfValue(tensor.scale[0]!), halfValue(tensor.zeroPoint![0]!)]).toEqual([1, 0]);
      expect([...dequantize(kernels, tensor)]).toEqual([0, 1, 2, 3]);
    });

    test("4 bits by hand: −7.5 … 7.5 in halves of 1, ties to even", () => {
      const weights = Float32Array.of(-7.5, -7, -6.5, 0, 0.5, 1, 7, 7.5);
      const tensor = quantize(kernels, f32Weights(weights), 1, 8, { bits: 4, solver: "round" });
      expect([halfValue(tensor.scale[0]!), halfValue(tensor.zeroPoint![0]!)]).toEqual([1, 7.5]);
      // positions 0 0.5 1 7.5 8 8.5 14.5 15: ties go to the even code
      expect([...unpackCodes(kernels, tensor.packed, 1, 8, 4)]).toEqual([0, 0, 1, 8, 8, 8, 14, 15]);
      expect(tensor.packed[0]).toBe(0xfe888100);
    });

    test("symmetric by hand: the larger side gets the extra step, by the scale's sign", () => {
      const options = { bits: 4, solver: "round", zeroPoint: "symmetric" } as const;
      const negative = quantize(kernels, f32Weights(Float32Array.of(-8, -1, 1, 7)), 1, 4, options);
      expect(halfValue(negative.scale[0]!)).toBe(1);
      expect([...dequantize(kernels, negative)]).toEqual([-8, -1, 1, 7]);
      const positive = quantize(kernels, f32Weights(Float32Array.of(8, 1, -1, -7)), 1, 4, options);
      expect(halfValue(positive.scale[0]!)).toBe(-1);
      expect([...dequantize(kernels, positive)]).toEqual([8, 1, -1, -7]);
      expect(positive.zeroPoint).toBe(undefined);
    });

    test("round to nearest is the textbook's, code for code", () => {
      for (const bits of BIT_WIDTHS) {
        for (const groupSize of [16, 32, 64] as const) {
          const rows = 5, cols = 3 * groupSize + 7;
          const weights = gaussians(bits * 100 + groupSize, rows * cols);
          const tensor = quantize(kernels, f32Weights(weights), rows, cols, {
            bits,
            groupSize,
            solver: "round",
          });
          const codes = unpackCodes(kernels, tensor.packed, rows, cols, bits);
          for (let row = 0; row < rows; row++) {
            for (let group = 0; group < 4; group++) {
              const begin = row * cols + group * groupSize;
              const end = Math.min(begin + groupSize, (row + 1) * cols);
              const expected = textbookRound(weights.subarray(begin, end), bits);
              expect(tensor.scale[row * 4 + group]).toBe(halfBits(expected.scale));
              expect(tensor.zeroPoint![row * 4 + group]).toBe(halfBits(expected.zeroPoint));
              expect([...codes.subarray(begin, end)]).toEqual(expected.codes);
            }
          }
        }
      }
    });

    test("same bytes as scalar for every width, group size, zero point, solver and number of threads", () => {
      const random = randomStream(7);
      for (const cols of [1, 31, 64, 257, 300]) {
        const rows = 33;
        const weights = f32Weights(gaussians(cols, rows * cols));
        const columnWeights = Float32Array.from({ length: cols }, random);
        for (const bits of BIT_WIDTHS) {
          for (const groupSize of GROUP_SIZES) {
            const zeroPoint = ZERO_POINT_KINDS[Math.floor(random() * 3)]!;
            for (const solver of ["round", "clip"] as const) {
              const options: QuantizeOptions & { scaleBits?: undefined } = {
                bits,
                groupSize,
                zeroPoint,
                solver,
                ...(solver === "clip" && random() < 0.5 ? { columnWeights } : {}),
              };
              const expected = quantize(scalar, weights, rows, cols, options);
              expectSame(
                quantize(withThreads(kernels, 1 + Math.floor(random() * 4)), weights, rows, cols, options),
                expected,
              );
              const threads = 1 + Math.floor(random() * 4);
              expect(bytes(dequantize(withThreads(kernels, threads), expected, "F32"))).toEqual(
                bytes(dequantize(scalar, expected)),
              );
              expect(packedErrorStatistics(withThreads(kernels, threads), weights, expected)).toEqual(
                packedErrorStatistics(scalar, weights, expected),
              );
            }
          }
        }
      }
    });

    test("threads do not change a byte of a matrix large enough to be split", () => {
      const weights = f32Weights(gaussians(3, 600 * 512));
      const one = quantize(kernels, weights, 600, 512, { bits: 3 });
      for (const threads of [2, 3, 8]) {
        expectSame(quantize(withThreads(kernels, threads), weights, 600, 512, { bits: 3 }), one);
      }
    });

    test("dequantizing is the formula, bit for bit", () => {
      for (const bits of BIT_WIDTHS) {
        for (const zeroPoint of ZERO_POINT_KINDS) {
          const tensor = quantize(kernels, f32Weights(gaussians(bits, 7 * 100)), 7, 100, {
            bits,
            groupSize: 32,
            zeroPoint,
          });
          const expected = decode(tensor);
          expect(bytes(dequantize(kernels, tensor))).toEqual(bytes(expected));
          const half = new Uint16Array(Float16Array.from(expected).buffer);
          expect([...dequantize(kernels, tensor, "F16")]).toEqual([...half]);
        }
      }
    });

    test("packing every code of every width and back", () => {
      for (const bits of BIT_WIDTHS) {
        for (const cols of [0, 1, 10, 31, 32, 33, 64, 100, 256]) {
          const codes = Uint8Array.from({ length: 3 * cols }, (_, i) => (i * 7 + 3) % 2 ** bits);
          const packed = packCodes(kernels, codes, 3, cols, bits);
          expect(packed.length).toBe(3 * packedWords(cols, bits));
          expect([...unpackCodes(kernels, packed, 3, cols, bits)]).toEqual([...codes]);
        }
        if (bits < 8) {
          expect(() => packCodes(kernels, Uint8Array.of(0, 2 ** bits), 1, 2, bits)).toThrow(/at most/);
          const long = new Uint8Array(64);
          long[40] = 2 ** bits;
          expect(() => packCodes(kernels, long, 1, 64, bits)).toThrow(/at most/);
        }
      }
      // 3-bit codes 0..7 four times, from the published layout of dense packing
      const codes = Uint8Array.from({ length: 32 }, (_, i) => i % 8);
      expect([...packCodes(kernels, codes, 1, 32, 3)]).toEqual([0x88fac688, 0xc688fac6, 0xfac688fa]);
    });

    test("statistics agree with float64 sums", () => {
      for (const n of [1, 7, 8, 9, 255, 256, 257, 5000, 300001]) {
        const a = gaussians(n, n), b = gaussians(n + 1, n);
        const got = errorStatistics(withThreads(kernels, 2), f32Weights(a), f32Weights(b), n);
        let aa = 0, ab = 0, dd = 0, maximum = 0;
        for (let i = 0; i < n; i++) {
          aa += a[i]! ** 2;
          ab += a[i]! * b[i]!;
          dd += (a[i]! - b[i]!) ** 2;
          maximum = Math.max(maximum, Math.abs(a[i]! - b[i]!));
        }
        // each float64 sum of n terms is within n · 2^-53 of the sum of magnitudes
        const tolerance = n * 2 ** -52;
        expect(Math.abs(got.sumSquares - aa)).toBeLessThanOrEqual(tolerance * aa);
        expect(Math.abs(got.sumSquaredError - dd)).toBeLessThanOrEqual(tolerance * dd);
        expect(Math.abs(got.dot - ab)).toBeLessThanOrEqual(tolerance * (aa + got.sumSquaresOther));
        expect(got.maxError).toBe(f32(maximum));
      }
    });

    test("every half and bfloat16 value, there and back", () => {
      const all = Uint16Array.from({ length: 65536 }, (_, i) => i);
      const fromHalf = new Float32Array(
        convertFloats(kernels, { data: all, dtype: "F16" }, 65536, "F32").buffer,
      );
      const values = new Float16Array(all.buffer);
      for (let i = 0; i < 65536; i++) {
        if (!Object.is(fromHalf[i], values[i])) throw new Error(`half ${i}: ${fromHalf[i]}`);
      }
      const fromBfloat = convertFloats(kernels, { data: all, dtype: "BF16" }, 65536, "F32");
      expect(bytes(fromBfloat)).toEqual(bytes(Uint32Array.from(all, (bits) => bits << 16)));
      for (const dtype of ["F16", "BF16"] as const) {
        const wide = convertFloats(kernels, { data: all, dtype }, 65536, "F32");
        const back = new Uint16Array(
          convertFloats(kernels, { data: wide, dtype: "F32" }, 65536, dtype).buffer,
        );
        const quiet = dtype === "F16" ? 0x200 : 0x40, infinity = dtype === "F16" ? 0x7c00 : 0x7f80;
        for (let i = 0; i < 65536; i++) {
          const expected = (i & 0x7fff) > infinity ? i | quiet : i; // a NaN becomes quiet
          if (back[i] !== expected) throw new Error(`${dtype} ${i} came back as ${back[i]}`);
        }
      }
    });

    test("float32 to half rounds as Float16Array does, around every boundary", () => {
      const random = randomStream(11);
      const raw = Uint32Array.from(
        { length: 200000 },
        (_, i) => i < 131072 ? (i << 15) + Math.floor(random() * 3) - 1 : random() * 2 ** 32,
      );
      const values = new Float32Array(raw.buffer);
      const got = new Uint16Array(convertFloats(kernels, f32Weights(values), values.length, "F16").buffer);
      const expected = new Uint16Array(Float16Array.from(values).buffer);
      for (let i = 0; i < values.length; i++) {
        if (Number.isNaN(values[i])) expect((got[i]! & 0x7fff) > 0x7c00).toBe(true);
        else if (got[i] !== expected[i]) throw new Error(`${values[i]}: ${got[i]}, wanted ${expected[i]}`);
      }
    });

    test("fp8 by its definition, every value and the midpoints between", () => {
      for (
        const [dtype, exponentBits, bias, largest] of [["F8_E4M3", 4, 7, 448], [
          "F8_E5M2",
          5,
          15,
          57344,
        ]] as const
      ) {
        const mantissaBits = 7 - exponentBits;
        const value = (code: number) => {
          const exponent = (code >> mantissaBits) & (2 ** exponentBits - 1),
            mantissa = code & (2 ** mantissaBits - 1);
          const sign = code & 0x80 ? -1 : 1;
          if (dtype === "F8_E4M3" && (code & 0x7f) === 0x7f) return NaN;
          if (dtype === "F8_E5M2" && exponent === 31) return mantissa ? NaN : sign * Infinity;
          if (exponent === 0) return sign * mantissa * 2 ** (1 - bias - mantissaBits);
          return sign * (1 + mantissa / 2 ** mantissaBits) * 2 ** (exponent - bias);
        };
        const codes = Uint8Array.from({ length: 256 }, (_, i) => i);
        const got = new Float32Array(convertFloats(kernels, { data: codes, dtype }, 256, "F32").buffer);
        for (let code = 0; code < 256; code++) expect(Object.is(got[code], f32(value(code)))).toBe(true);
        const finite = [...codes].filter((code) => code < 0x80 && value(code) <= largest);
        for (let i = 0; i + 1 < finite.length; i++) {
          const low = value(finite[i]!), high = value(finite[i + 1]!), middle = (low + high) / 2;
          const probes = Float32Array.of(low, middle, f32(middle * (1 - 1e-6)), f32(middle * (1 + 1e-6)));
          const even = finite[i]! % 2 === 0 ? finite[i]! : finite[i + 1]!;
          expect([...convertFloats(kernels, f32Weights(probes), 4, dtype)]).toEqual([
            finite[i]!,
            even,
            finite[i]!,
            finite[i + 1]!,
          ]);
        }
        const beyond = Float32Array.of(1e6, -1e6, Infinity, NaN);
        const over = [...convertFloats(kernels, f32Weights(beyond), 4, dtype)];
        if (dtype === "F8_E4M3") expect(over.slice(0, 3)).toEqual([0x7f, 0xff, 0x7f]);
        else expect(over.slice(0, 3)).toEqual([0x7c, 0xfc, 0x7c]);
        expect(Number.isNaN(value(over[3]!))).toBe(true);
      }
    });

    test("doubles are rounded once, not twice", () => {
      const trap = 1 + 2 ** -11 + 2 ** -40; // to float32 first it becomes the tie 1 + 2^-11, then 1
      const got = convertFloats(kernels, { data: Float64Array.of(trap, -trap), dtype: "F64" }, 2, "F16");
      expect([...new Float16Array(got.buffer)]).toEqual([1 + 2 ** -10, -1 - 2 ** -10]);
    });

    test("clip search beats round to nearest, and reaches 0.357 on Gaussian weights at 2 bits", () => {
      const weights = f32Weights(gaussians(1, 256 * 1024));
      const error = (options: QuantizeOptions) =>
        relativeRmsError(
          packedErrorStatistics(kernels, weights, quantize(kernels, weights, 256, 1024, options)),
        );
      const clip = error({ bits: 2, groupSize: 64 });
      expect(clip).toBeLessThanOrEqual(0.357);
      expect(clip).toBeLessThan(0.8 * error({ bits: 2, groupSize: 64, solver: "round" }));
    });

    test("constant groups come back exactly, all-zero groups as zero, without NaN", () => {
      for (const bits of BIT_WIDTHS) {
        for (const zeroPoint of ZERO_POINT_KINDS) {
          for (const solver of ["round", "clip"] as const) {
            for (const value of [0, -0, 1, -1, 0.5, -0.01171875, 3.140625, 1e-3, 300, -65504, 2 ** -20]) {
              const constant = zeroPoint === "real" ? f32(value) : Math.f16round(value);
              const weights = f32Weights(new Float32Array(70).fill(constant));
              const tensor = quantize(kernels, weights, 2, 35, { bits, groupSize: 16, zeroPoint, solver });
              for (const back of dequantize(kernels, tensor)) {
                if (back !== constant && !(back === 0 && constant === 0)) {
                  throw new Error(`${value} at ${bits} bits, ${zeroPoint}, ${solver} came back as ${back}`);
                }
              }
            }
          }
        }
      }
    });

    test("NaN and infinity are refused with their place", () => {
      for (const [value, index] of [[NaN, 0], [Infinity, 77], [-Infinity, 199]] as const) {
        for (const solver of ["round", "clip"] as const) {
          const data = gaussians(5, 200);
          data[index] = value;
          const place = new RegExp(`row ${Math.floor(index / 50)}, column ${index % 50} `);
          expect(() => quantize(kernels, f32Weights(data), 4, 50, { bits: 4, solver })).toThrow(place);
          expect(findNonfinite(kernels, f32Weights(data), 200)).toBe(index);
        }
      }
      expect(findNonfinite(kernels, f32Weights(gaussians(5, 200)), 200)).toBe(-1);
    });

    test("weights beyond half-precision scales are refused", () => {
      const data = Float32Array.of(3e38, -3e38, 1, 2);
      expect(() => quantize(kernels, f32Weights(data), 1, 4, { bits: 4 })).toThrow(
        /too large for a half-precision scale/,
      );
    });

    test("empty and one-element matrices", () => {
      for (const [rows, cols] of [[0, 5], [5, 0], [0, 0]] as const) {
        const tensor = quantize(kernels, f32Weights(new Float32Array(0)), rows, cols, { bits: 3 });
        expect([tensor.packed.length, tensor.scale.length, dequantize(kernels, tensor).length]).toEqual([
          0,
          0,
          0,
        ]);
      }
      const one = quantize(kernels, f32Weights(Float32Array.of(0.3)), 1, 1, { bits: 2 });
      expect([...dequantize(kernels, one)]).toEqual([f32(0.3)]);
    });

    test("views that start in the middle of a buffer", () => {
      const data = gaussians(9, 128 + 3);
      const expected = quantize(kernels, f32Weights(data.slice(3)), 2, 64, { bits: 4 });
      expectSame(quantize(kernels, f32Weights(data.subarray(3)), 2, 64, { bits: 4 }), expected);
      const shifted = new Uint8Array(128 * 4 + 1);
      shifted.set(new Uint8Array(data.buffer, 12), 1);
      expectSame(
        quantize(kernels, { data: shifted.subarray(1), dtype: "F32" }, 2, 64, { bits: 4 }),
        expected,
      );
    });

    test("column weights of zero for a whole group count as ones", () => {
      const weights = f32Weights(gaussians(21, 4 * 64));
      const zero = quantize(kernels, weights, 4, 64, {
        bits: 2,
        groupSize: 32,
        columnWeights: new Float32Array(64),
      });
      expectSame(zero, quantize(kernels, weights, 4, 64, { bits: 2, groupSize: 32 }));
    });
  });
}

describe("properties, on the fastest kernels", () => {
  const kernels: Kernels = every[every.length > 2 ? 1 : 0]!.kernels;

  test("inside the range no weight moves by more than half a step", () => {
    for (let seed = 1; seed <= 400; seed++) {
      const random = randomStream(seed);
      const bits = BIT_WIDTHS[seed % 4]!, groupSize = GROUP_SIZES[seed % 6]!;
      const zeroPoint = ZERO_POINT_KINDS[Math.floor(random() * 3)]!;
      const cols = 1 + Math.floor(random() * 300), magnitude = 10 ** (random() * 9 - 7);
      const offset = zeroPoint === "real" ? (random() - 0.5) * 10 ** (random() * 3) : 0;
      const data = Float32Array.from(gaussians(seed, 3 * cols), (w) => (w + offset) * magnitude);
      const tensor = quantize(kernels, f32Weights(data), 3, cols, {
        bits,
        groupSize,
        zeroPoint,
        solver: "round",
      });
      const back = dequantize(kernels, tensor), groups = groupCount(cols, groupSize);
      for (let i = 0; i < data.length; i++) {
        const group = Math.floor(i / cols) * groups +
          (groupSize === 0 ? 0 : Math.floor(i % cols / groupSize));
        const step = Math.abs(halfValue(tensor.scale[group]!));
        const slack = Math.abs(data[i]!) * 2 ** -22; // rounding of the quotient and of the product
        if (!(Math.abs(back[i]! - data[i]!) <= step * (0.5 + 1e-5) + slack)) {
          throw new Error(
            `seed ${seed}, ${bits} bits, ${zeroPoint}: ${data[i]} came back as ${back[i]}, step ${step}`,
          );
        }
      }
    }
  });

  test("clip search never has a larger weighted error than round to nearest", () => {
    for (let seed = 1; seed <= 200; seed++) {
      const random = randomStream(seed);
      const bits = BIT_WIDTHS[seed % 4]!,
        groupSize = GROUP_SIZES[seed % 6]!,
        zeroPoint = ZERO_POINT_KINDS[seed % 3]!;
      const cols = 16 + Math.floor(random() * 200);
      const columnWeights = Float32Array.from({ length: cols }, () => random() ** 3);
      const data = Float32Array.from(gaussians(seed, cols), (w) => w * Math.exp(random()));
      const error = (options: QuantizeOptions) => {
        const back = dequantize(kernels, quantize(kernels, f32Weights(data), 1, cols, options));
        return data.reduce((sum, w, i) => sum + columnWeights[i]! * (w - back[i]!) ** 2, 0);
      };
      const clip = error({ bits, groupSize, zeroPoint, columnWeights });
      const round = error({ bits, groupSize, zeroPoint, solver: "round" });
      // the kernel compares float32 sums of at most 256 terms
      if (!(clip <= round * (1 + 256 * 2 ** -23))) throw new Error(`seed ${seed}: ${clip} above ${round}`);
    }
  });

  test("groups are independent", () => {
    const data = gaussians(4, 4 * 128);
    const before = quantize(kernels, f32Weights(data), 4, 128, { bits: 2, groupSize: 32 });
    const changed = data.slice();
    for (let i = 32; i < 64; i++) changed[i] = 5 * data[i]!;
    const after = quantize(kernels, f32Weights(changed), 4, 128, { bits: 2, groupSize: 32 });
    const differing = [...before.scale].map((scale, i) => scale === after.scale[i] ? -1 : i).filter((i) =>
      i >= 0
    );
    expect(differing).toEqual([1]);
  });

  test("error falls with bits and rises with the group size", () => {
    const weights = f32Weights(gaussians(6, 64 * 1024));
    const error = (bits: BitWidth, groupSize: GroupSize) =>
      relativeRmsError(
        packedErrorStatistics(kernels, weights, quantize(kernels, weights, 64, 1024, { bits, groupSize })),
      );
    expect(error(3, 64)).toBeLessThan(error(2, 64));
    expect(error(4, 64)).toBeLessThan(error(3, 64));
    expect(error(8, 64)).toBeLessThan(error(4, 64));
    expect(error(4, 16)).toBeLessThan(error(4, 256));
    expect(error(4, 256)).toBeLessThan(error(4, 0));
  });

  test("every source type gives what its float32 values give", () => {
    const data = gaussians(8, 8 * 96);
    for (const dtype of ["F64", "F16", "BF16", "F8_E4M3", "F8_E5M2"] as const) {
      const narrow = convertFloats(kernels, f32Weights(data), data.length, dtype);
      const wide = new Float32Array(
        convertFloats(kernels, { data: narrow, dtype }, data.length, "F32").buffer,
      );
      expectSame(
        quantize(kernels, { data: narrow, dtype }, 8, 96, { bits: 3, groupSize: 32 }),
        quantize(kernels, f32Weights(wide), 8, 96, { bits: 3, groupSize: 32 }),
      );
    }
  });

  test("a fault in any thread's share is reported", () => {
    for (const row of [0, 299, 599]) {
      const data = gaussians(2, 600 * 512);
      data[row * 512 + 5] = NaN;
      const place = new RegExp(`row ${row}, column 5 `);
      expect(() => quantize(withThreads(kernels, 3), f32Weights(data), 600, 512, { bits: 4 })).toThrow(place);
      const codes = new Uint8Array(600 * 512);
      codes[row * 512] = 4;
      expect(() => packCodes(withThreads(kernels, 3), codes, 600, 512, 2)).toThrow(/at most 3/);
    }
  });

  test("cosine and relative error at the edges", () => {
    const statistics = {
      sumSquares: 0,
      sumSquaresOther: 0,
      dot: 0,
      sumSquaredError: 0,
      maxError: 0,
      maxMagnitude: 0,
    };
    expect([cosine(statistics), relativeRmsError(statistics)]).toEqual([1, 0]);
    expect(cosine({ ...statistics, sumSquaresOther: 1 })).toBe(0);
    expect(cosine({ ...statistics, sumSquares: 4, sumSquaresOther: 9, dot: -6 })).toBe(-1);
  });

  test("arguments are checked before any kernel runs", () => {
    const weights = f32Weights(new Float32Array(8));
    const call = (change: Record<string, unknown>) => () =>
      quantize(kernels, weights, 2, 4, { bits: 4, ...change } as QuantizeOptions);
    expect(call({ bits: 5 })).toThrow(/bits must be one of 2, 3, 4, 8, got 5/);
    expect(call({ groupSize: 48 })).toThrow(/groupSize must be one of/);
    expect(call({ solver: "magic" })).toThrow(/solver/);
    expect(call({ zeroPoint: "none" })).toThrow(/zeroPoint/);
    expect(call({ columnWeights: new Float32Array(3) })).toThrow(/columnWeights must be 4/);
    expect(call({ columnWeights: Float32Array.of(1, -1, 1, 1) })).toThrow(/finite and ≥ 0, got -1 at 1/);
    expect(() => quantize(kernels, weights, 2, 5, { bits: 4 })).toThrow(
      /10 elements of F32 are 40 bytes, got 32/,
    );
    expect(() => quantize(kernels, weights, -2, -4, { bits: 4 })).toThrow(/rows/);
    expect(() => quantize(kernels, weights, 1.5, 4, { bits: 4 })).toThrow(/rows/);
    expect(() =>
      quantize(kernels, { data: new Int8Array(8) as never, dtype: "I8" as never }, 2, 4, { bits: 4 })
    ).toThrow(/floating/);
    expect(() => quantize(kernels, { data: [1] as never, dtype: "F32" }, 1, 1, { bits: 4 })).toThrow(
      TypeError,
    );
    const tensor = quantize(kernels, weights, 2, 4, { bits: 4 });
    expect(() => dequantize(kernels, { ...tensor, cols: 5 })).not.toThrow();
    expect(() => dequantize(kernels, { ...tensor, cols: 9 })).toThrow(/packed must be 4/);
    expect(() => dequantize(kernels, { ...tensor, zeroPoint: undefined })).toThrow(/zero points/);
    for (const zeroPoint of [new Uint8Array(2), new Float32Array(2)]) {
      expect(() => dequantize(kernels, { ...tensor, zeroPoint: zeroPoint as never })).toThrow(/zero points/);
    }
    expect(() => dequantize(kernels, tensor, "F64" as never)).toThrow(/dtype/);
  });
});
