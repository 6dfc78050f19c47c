import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { packZeroPoints } from "../../../lib/quant/packed/entries.ts";
import { resolveConfig } from "../../../lib/config/mod.ts";
import { FormatError } from "../../../lib/errors.ts";
import { openKernels } from "../../../lib/native/mod.ts";
import { dequantizeCheckpoint, quantizeCheckpoint } from "../../../lib/pipeline/mod.ts";
import { dequantize } from "../../../lib/quant/mod.ts";
import { packedLayers, readPackedTensor } from "../../../lib/quant/packed/checkpoint.ts";
import { openCheckpoint } from "../../../lib/tensor/mod.ts";
import {
  gaussian,
  matrix,
  type TestTensor,
  workplace,
  writeCheckpoint,
  writeTensors,
} from "../../_checkpoints.ts";
import { readIndependently, thrown } from "../../tensor/_files.ts";

const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});

const [ROWS, COLS, GROUP] = [45, 150, 32];
const GROUPS = Math.ceil(COLS / GROUP);
const input = writeCheckpoint(place.fresh("input"), {
  "a.weight": matrix(ROWS, COLS, gaussian(ROWS * COLS, 1)),
});

const BITS = [2, 3, 4, 8] as const;
const KINDS = ["real", "integer", "symmetric"] as const;

const outputs = new Map<string, string>();

/** The input quantized; once for each combination. */
async function packed(bits: number, kind: string): Promise<string> {
  const key = `${bits} ${kind}`;
  let output = outputs.get(key);
  if (output !== undefined) return output;
  output = place.fresh();
  outputs.set(key, output);
  const { config } = resolveConfig({
    overrides: { solver: "clip", bit_width: bits, zero_point: kind, group_size: GROUP, num_threads: 1 },
  });
  await quantizeCheckpoint({ kernels, input, output, config });
  return output;
}

function rawTensors(folder: string) {
  return readIndependently(join(folder, "model.safetensors")).tensors;
}

const asU32 = (data: Uint8Array): Uint32Array => new Uint32Array(data.slice().buffer);
const asF16 = (data: Uint8Array): Float16Array => new Float16Array(data.slice().buffer);

/**
 * Element `index` of a stream of `bits`-bit numbers, least significant bits first, in little-endian u32
 * words.
 */
function fromStream(words: readonly number[], index: number, bits: number): number {
  let code = 0;
  for (let b = 0; b < bits; b++) {
    const at = index * bits + b;
    code += ((words[Math.floor(at / 32)]! >>> (at % 32)) & 1) * 2 ** b;
  }
  return code;
}

function weightsOf(folder: string): Float32Array {
  using checkpoint = openCheckpoint(folder);
  const layer = packedLayers(checkpoint).get("a.weight")!;
  return dequantize(kernels, readPackedTensor(checkpoint, layer), "F32");
}

describe("a packed checkpoint read by others", () => {
  for (const bits of BITS) {
    // MLX, `mlx.core.quantize`: w = s q + β, β = -s z here; q unsigned, packed into u32 from the lowest bits
    // up, row by
    // row; https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
    test(`${bits} bits, real zero points: MLX's affine formula`, async () => {
      const folder = await packed(bits, "real");
      const tensors = rawTensors(folder);
      const words = asU32(tensors["a.weight_packed"]!.data);
      const [scales, zeroPoints] = [
        asF16(tensors["a.weight_scale"]!.data),
        asF16(tensors["a.weight_zero_point"]!.data),
      ];
      const perRow = words.length / ROWS;
      const got = weightsOf(folder);
      for (let row = 0; row < ROWS; row++) {
        const rowWords = [...words.subarray(row * perRow, (row + 1) * perRow)];
        for (let col = 0; col < COLS; col++) {
          const group = row * GROUPS + Math.floor(col / GROUP);
          const scale = scales[group]!;
          const bias = -scale * zeroPoints[group]!;
          const code = fromStream(rowWords, col, bits);
          // One rounding to float32 of q - z, one of the product: 2 · 2^-24 of the larger term.
          const tolerance = 2 ** -23 * (Math.abs(scale * code) + Math.abs(bias));
          expect(Math.abs(got[row * COLS + col]! - (scale * code + bias))).toBeLessThanOrEqual(tolerance);
        }
      }
    });

    test(`${bits} bits, integer zero points: packed down the columns as compressed-tensors does`, async () => {
      const folder = await packed(bits, "integer");
      const tensors = rawTensors(folder);
      const stored = tensors["a.weight_zero_point"]!;
      const wordRows = Math.ceil(ROWS * bits / 32);
      expect([stored.dtype, ...stored.shape]).toEqual(["I32", wordRows, GROUPS]);
      const words = asU32(stored.data);
      const codeWords = asU32(tensors["a.weight_packed"]!.data);
      const perRow = codeWords.length / ROWS;
      const scales = asF16(tensors["a.weight_scale"]!.data);
      const got = weightsOf(folder);
      const seen = new Set<number>();
      for (let group = 0; group < GROUPS; group++) {
        const column = Array.from({ length: wordRows }, (_, i) => words[i * GROUPS + group]!);
        for (let row = 0; row < ROWS; row++) {
          const zero = fromStream(column, row, bits);
          seen.add(zero);
          const rowWords = [...codeWords.subarray(row * perRow, (row + 1) * perRow)];
          for (let col = group * GROUP; col < Math.min(COLS, (group + 1) * GROUP); col++) {
            const wanted = Math.fround(
              scales[row * GROUPS + group]! * (fromStream(rowWords, col, bits) - zero),
            );
            expect(got[row * COLS + col]! === wanted).toBe(true);
          }
        }
        expect(column.at(-1)! >>> (ROWS * bits % 32)).toBe(0); // bits behind the last row
      }
      expect(seen.size).toBeGreaterThan(1);
    });

    test(`${bits} bits, symmetric: no zero points, 2^(b-1) in the middle`, async () => {
      const folder = await packed(bits, "symmetric");
      const tensors = rawTensors(folder);
      expect(Object.keys(tensors)).toEqual(["a.weight_packed", "a.weight_scale", "a.weight_shape"]);
      const words = asU32(tensors["a.weight_packed"]!.data);
      const scales = asF16(tensors["a.weight_scale"]!.data);
      const perRow = words.length / ROWS;
      const got = weightsOf(folder);
      for (let row = 0; row < ROWS; row++) {
        const rowWords = [...words.subarray(row * perRow, (row + 1) * perRow)];
        for (let col = 0; col < COLS; col++) {
          const scale = scales[row * GROUPS + Math.floor(col / GROUP)]!;
          const wanted = Math.fround(scale * (fromStream(rowWords, col, bits) - 2 ** (bits - 1)));
          expect(got[row * COLS + col]! === wanted).toBe(true);
        }
      }
    });
  }

  test("holds the shape as two I64", async () => {
    const { dtype, shape, data } = rawTensors(await packed(4, "real"))["a.weight_shape"]!;
    expect([dtype, ...shape]).toEqual(["I64", 2]);
    expect([...new BigInt64Array(data.slice().buffer)]).toEqual([BigInt(ROWS), BigInt(COLS)]);
  });
});

describe("readPackedTensor", () => {
  for (const kind of KINDS) {
    test(`reads any rows, ${kind} zero points`, async () => {
      for (const bits of BITS) {
        using checkpoint = openCheckpoint(await packed(bits, kind));
        const layer = packedLayers(checkpoint).get("a.weight")!;
        const whole = dequantize(kernels, readPackedTensor(checkpoint, layer), "F32");
        for (
          const [begin, end] of [[0, 1], [0, 45], [7, 8], [10, 11], [11, 33], [31, 45], [44, 45], [
            5,
            5,
          ]] as const
        ) {
          const part = dequantize(kernels, readPackedTensor(checkpoint, layer, begin, end), "F32");
          expect(part).toEqual(whole.slice(begin * COLS, end * COLS));
        }
      }
    });
  }

  test("refuses rows that are not there", async () => {
    using checkpoint = openCheckpoint(await packed(4, "real"));
    const layer = packedLayers(checkpoint).get("a.weight")!;
    for (const [begin, end] of [[-1, 2], [3, 2], [0, 46], [0.5, 2]] as const) {
      expect(thrown(() => readPackedTensor(checkpoint, layer, begin, end))).toBeInstanceOf(RangeError);
    }
  });
});

test("packZeroPoints: hand-worked words", () => {
  // Two columns of three 3-bit codes: 5, 2, 7 and 1, 0, 6, from the lowest bits up.
  const packedWords = packZeroPoints(Uint8Array.of(5, 1, 2, 0, 7, 6), 3, 2, 3);
  expect([...packedWords]).toEqual([5 + (2 << 3) + (7 << 6), 1 + (0 << 3) + (6 << 6)]);
  // The 11th 3-bit code straddles two words: bits 30, 31 and 0.
  const straddling = new Uint8Array(11);
  straddling[10] = 0b110;
  expect([...packZeroPoints(straddling, 11, 1, 3)]).toEqual([(0b10 << 30) >>> 0, 0b1]);
});

describe("packedLayers", () => {
  test("says what is there", async () => {
    using checkpoint = openCheckpoint(await packed(3, "real"));
    const layer = packedLayers(checkpoint).get("a.weight")!;
    const bytes = Object.values(rawTensors(await packed(3, "real"))).reduce(
      (sum, { data }) => sum + data.length,
      0,
    );
    expect(layer).toEqual({
      name: "a.weight",
      rows: ROWS,
      cols: COLS,
      bits: 3,
      groupSize: 32,
      zeroPointKind: "real",
      scaleBits: undefined,
      dtype: "F32",
      tensors: {
        packed: "a.weight_packed",
        scale: "a.weight_scale",
        zeroPoint: "a.weight_zero_point",
        subScale: undefined,
        subMin: undefined,
        superScale: undefined,
        superMin: undefined,
        seed: undefined,
        shape: "a.weight_shape",
      },
      bytes,
      bitsPerWeight: bytes * 8 / (ROWS * COLS),
    });
  });

  test("is empty for a plain checkpoint", () => {
    using checkpoint = openCheckpoint(input);
    expect(packedLayers(checkpoint).size).toBe(0);
  });

  type Tensors = Record<string, TestTensor>;
  type Config = {
    quantization_config: { arrowquant: Record<string, unknown> & { layers: Record<string, unknown> } };
  };

  /** A quantized checkpoint after a change of its tensors or its config.json. */
  async function changed(kind: string, change: (tensors: Tensors, config: Config) => void): Promise<Error> {
    const from = await packed(4, kind);
    const tensors: Tensors = Object.fromEntries(
      Object.entries(rawTensors(from)).map(([name, { dtype, shape, data }]) => [name, {
        dtype,
        shape,
        data: data as Uint8Array<ArrayBuffer>,
      }]),
    );
    const config = JSON.parse(readFileSync(join(from, "config.json"), "utf8"));
    change(tensors, config);
    const folder = writeCheckpoint(place.fresh("changed"), {}, config);
    writeTensors(join(folder, "model.safetensors"), tensors);
    writeFileSync(join(folder, "config.json"), JSON.stringify(config));
    using checkpoint = openCheckpoint(folder);
    const error = thrown(() => packedLayers(checkpoint));
    expect(error).toBeInstanceOf(FormatError);
    expect(error.path).toContain(folder);
    return error;
  }

  const bytes = (count: number) => new Uint8Array(count);
  const cases: [
    what: string,
    kind: string,
    message: string,
    change: (tensors: Tensors, config: Config) => void,
  ][] = [
    ["no scale", "real", '"a.weight_scale" must be F16 [45,5], got no such tensor', (tensors) => {
      delete tensors["a.weight_scale"];
    }],
    ["no zero point", "real", '"a.weight_zero_point" must be F16 [45,5], got no such tensor', (tensors) => {
      delete tensors["a.weight_zero_point"];
    }],
    ["a short scale", "real", "got F16 [45,4]", (tensors) => {
      tensors["a.weight_scale"] = { dtype: "F16", shape: [45, 4], data: bytes(360) };
    }],
    ["another type", "real", "got I16 [45,5]", (tensors) => {
      tensors["a.weight_zero_point"] = { dtype: "I16", shape: [45, 5], data: bytes(450) };
    }],
    [
      "codes of too few words",
      "real",
      '"a.weight_packed" must be I32 [45,19], got I32 [45,18]',
      (tensors) => {
        tensors["a.weight_packed"] = { dtype: "I32", shape: [45, 18], data: bytes(45 * 18 * 4) };
      },
    ],
    ["zero points of too few words", "integer", "must be I32 [6,5], got I32 [5,5]", (tensors) => {
      tensors["a.weight_zero_point"] = { dtype: "I32", shape: [5, 5], data: bytes(100) };
    }],
    ["zero points where none belong", "symmetric", "must not be there", (tensors) => {
      tensors["a.weight_zero_point"] = { dtype: "F16", shape: [45, 5], data: bytes(450) };
    }],
    ["the plain tensor as well", "real", "must not be there", (tensors) => {
      tensors["a.weight"] = matrix(1, 1, Float32Array.of(1));
    }],
    ["no shape", "real", '"a.weight_shape" must be I64 [2], got no such tensor', (tensors) => {
      delete tensors["a.weight_shape"];
    }],
    ["an impossible shape", "real", "must hold two sizes above 0, got [-45, 150]", (tensors) => {
      tensors["a.weight_shape"] = { dtype: "I64", shape: [2], data: BigInt64Array.of(-45n, 150n) };
    }],
    ["an enormous shape", "real", "must hold two sizes above 0", (tensors) => {
      tensors["a.weight_shape"] = { dtype: "I64", shape: [2], data: BigInt64Array.of(2n ** 62n, 150n) };
    }],
    ["another shape", "real", "must be I32 [46,19]", (tensors) => {
      tensors["a.weight_shape"] = { dtype: "I64", shape: [2], data: BigInt64Array.of(46n, 150n) };
    }],
    ["a layer that is not named", "real", "must name every quantized tensor", (tensors) => {
      tensors["b.weight_packed"] = { dtype: "I32", shape: [1, 1], data: bytes(4) };
    }],
    ["a layer that is not there", "real", '"b.weight_shape" must be I64 [2]', (_, config) => {
      config.quantization_config.arrowquant.layers["b.weight"] = { bits: 4, group_size: 32, dtype: "F32" };
    }],
    ["no section", "real", "got no such section", (_, config) => {
      delete (config.quantization_config as Partial<Config["quantization_config"]>).arrowquant;
    }],
    [
      "a newer version",
      "real",
      "format_version must be 1 or 3, which this version reads, got 4",
      (_, config) => {
        config.quantization_config.arrowquant["format_version"] = 4;
      },
    ],
    ["a version with low-rank corrections", "real", "quantize the original again", (_, config) => {
      config.quantization_config.arrowquant["format_version"] = 2;
    }],
    [
      "unknown codes",
      "real",
      '["a.weight"].codes must be one of uniform, trellis, or absent',
      (_, config) => {
        const { arrowquant } = config.quantization_config;
        arrowquant["format_version"] = 3;
        Object.assign(arrowquant.layers["a.weight"] as object, { codes: "lattice" });
      },
    ],
    [
      "trellis codes of 4 bits",
      "real",
      '["a.weight"].bits must be one of 2, 3 with trellis codes',
      (_, config) => {
        const { arrowquant } = config.quantization_config;
        arrowquant["format_version"] = 3;
        Object.assign(arrowquant.layers["a.weight"] as object, { codes: "trellis" });
      },
    ],
    ["codes in version 1", "real", '["a.weight"].codes must be absent in version 1', (_, config) => {
      const { layers } = config.quantization_config.arrowquant;
      Object.assign(layers["a.weight"] as object, { codes: "trellis" });
    }],
    ...([["no table of trellis codes", undefined, "nothing"], [
      "another table of trellis codes",
      1,
      "1",
    ]] as const)
      .map(([what, table, got]): (typeof cases)[number] => [
        what,
        "real",
        "trellis_table must be 2 with trellis codes (those of other levels are no longer read: quantize the " +
        `original again), got ${got}`,
        (_, config) => {
          const { arrowquant } = config.quantization_config;
          Object.assign(arrowquant, { format_version: 3, trellis_table: table });
          Object.assign(arrowquant.layers["a.weight"] as object, { bits: 2, codes: "trellis" });
        },
      ]),
    ["a rotated layer", "real", '["a.weight"].rotation must be absent', (_, config) => {
      const { layers } = config.quantization_config.arrowquant;
      Object.assign(layers["a.weight"] as object, { rotation: { kind: "hadamard", block: 2, seed: 0 } });
    }],
    ["5 bits", "real", ".bits must be one of 2, 3, 4, 8, got 5", (_, config) => {
      config.quantization_config.arrowquant.layers["a.weight"] = { bits: 5, group_size: 32, dtype: "F32" };
    }],
    ["groups of 48", "real", ".group_size must be one of", (_, config) => {
      config.quantization_config.arrowquant.layers["a.weight"] = { bits: 4, group_size: 48, dtype: "F32" };
    }],
    ["no type", "real", ".dtype must be a floating-point element type", (_, config) => {
      config.quantization_config.arrowquant.layers["a.weight"] = { bits: 4, group_size: 32 };
    }],
    ["an unknown zero point", "real", ".zero_point must be one of", (_, config) => {
      config.quantization_config.arrowquant["zero_point"] = "imaginary";
    }],
    ["layers as a list", "real", ".layers must be an object", (_, config) => {
      (config.quantization_config.arrowquant as Record<string, unknown>)["layers"] = [];
    }],
  ];
  for (const [what, kind, message, change] of cases) {
    test(`refuses ${what}`, async () => {
      expect((await changed(kind, change)).message).toContain(message);
    });
  }
});

test("the way back gives what dequantize gives", async () => {
  for (const kind of KINDS) {
    const folder = await packed(3, kind);
    const output = place.fresh("plain");
    await dequantizeCheckpoint({ kernels, input: folder, output });
    expect(new Float32Array(rawTensors(output)["a.weight"]!.data.slice().buffer)).toEqual(
      new Float32Array(weightsOf(folder)),
    );
  }
});
