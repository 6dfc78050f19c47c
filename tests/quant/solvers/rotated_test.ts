/** Trellis codes of rotated weights: the rotation by its definition, solved, multiplied, stored and read again. */
import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../../lib/config/mod.ts";
import { RefinableLinear } from "../../../lib/models/backward/linear.ts";
import { takesIntegers } from "../../../lib/models/layers/int8.ts";
import { linear } from "../../../lib/models/layers/linear.ts";
import * as call from "../../../lib/native/functions.ts";
import { dequantizeCheckpoint, quantizeCheckpoint } from "../../../lib/pipeline/mod.ts";
import {
  accumulateMoment,
  dequantize,
  emptyMoments,
  type FactoredMoment,
  factorMoments,
  packedLayers,
  packedRows,
  quantizeByWeights,
  readPackedTensor,
  solveLayer,
  type TwoLevelTensor,
} from "../../../lib/quant/mod.ts";
import { openCheckpoint } from "../../../lib/tensor/mod.ts";
import { gaussian, matrix, workplace, writeCheckpoint } from "../../_checkpoints.ts";
import { allInt8Kernels, gaussians } from "../../_kernels.ts";

const every = await allInt8Kernels(), kernels = every.at(-1)!.kernels;
const scalar = every.find(({ name }) => name.endsWith("scalar"))!.kernels;
const place = workplace();
afterAll(() => place.remove());

const FORMAT = { bits: 2, groupSize: 0, zeroPoint: "real", scaleBits: 0, codes: "trellis" } as const;

/** The sign of docs/format.md. */
function signOf(seed: number, i: number): number {
  let hash = Math.imul(i, 0x9e3779b1) + seed >>> 0;
  hash = Math.imul(hash ^ hash >>> 16, 0x85ebca6b) >>> 0;
  hash = Math.imul(hash ^ hash >>> 13, 0xc2b2ae35) >>> 0;
  return (hash ^ hash >>> 16) >>> 31 === 1 ? -1 : 1;
}

/** The rotation of a side as a matrix, by docs/format.md in float64: `f64[side, side]`. */
function rotationOf(side: number, seed: number): number[][] {
  let block = 1;
  while (side % (2 * block) === 0) block *= 2;
  const parity = (n: number): number => n === 0 ? 1 : -parity(n & n - 1);
  return Array.from({ length: side }, (_, i) =>
    Array.from(
      { length: side },
      (_, j) => {
        if (Math.floor(i / block) !== Math.floor(j / block)) return 0;
        return parity(i % block & j % block) * signOf(seed, j) / Math.sqrt(block);
      },
    ));
}

const times = (a: number[][], b: number[][]): number[][] =>
  a.map((row) => b[0]!.map((_, j) => row.reduce((sum, value, k) => sum + value * b[k]![j]!, 0)));
const transposed = (a: number[][]): number[][] => a[0]!.map((_, j) => a.map((row) => row[j]!));
const rowsOf = (values: ArrayLike<number>, cols: number): number[][] =>
  Array.from(
    { length: values.length / cols },
    (_, i) => Array.from({ length: cols }, (_, j) => values[i * cols + j]!),
  );

/** Weights of a rotated tensor: those of its words, rotated back. */
function decode(tensor: TwoLevelTensor): number[][] {
  const { rotationSeed, ...words } = tensor, { rows, cols } = tensor;
  const own = rowsOf(dequantize(scalar, words), cols); // checked in trellis_test.ts
  return times(
    times(transposed(rotationOf(rows, ~rotationSeed!)), own),
    rotationOf(cols, rotationSeed!),
  );
}

const largestDifference = (a: readonly number[], b: readonly number[]): number =>
  Math.max(...a.map((value, i) => Math.abs(value - b[i]!)));

function momentOf(cols: number, block = cols): FactoredMoment {
  const tokens = 3 * cols, x = gaussians(7, tokens * cols), moments = emptyMoments(cols, block);
  for (let i = 1; i < x.length; i++) if (i % cols > 0) x[i]! += 0.8 * x[i - 1]!;
  accumulateMoment(scalar, x, undefined, undefined, tokens, moments.second, block);
  moments.tokens = moments.weight = tokens;
  return factorMoments(scalar, moments);
}

test("a rotation is its matrix, its inverse the transpose, of the same bytes everywhere", () => {
  for (const [batch, rows, cols] of [[3, 1, 1], [2, 7, 5], [3, 24, 1], [2, 96, 3], [1, 128, 4], [5, 8, 2]]) {
    for (const seed of [0, 1, -1, 0x7fffffff]) {
      const x = gaussians(rows! + cols!, batch! * rows! * cols!), own = rotationOf(rows!, seed);
      for (const [inverse, wanted] of [[0, own], [1, transposed(own)]] as const) {
        const out = new Float32Array(x.length);
        call.rotate(scalar, "rotate", x, batch!, rows!, cols!, seed, inverse, out);
        for (let item = 0; item < batch!; item++) {
          const part = (values: Float32Array) =>
            rowsOf(values.subarray(item * rows! * cols!, (item + 1) * rows! * cols!), cols!);
          expect(largestDifference(times(wanted, part(x)).flat(), part(out).flat())).toBeLessThan(3e-6);
        }
        for (const { name, kernels } of every) {
          const same = x.slice(); // in place
          call.rotate(kernels, "rotate", same, batch!, rows!, cols!, seed, inverse, same);
          expect([name, same]).toEqual([name, out]);
        }
      }
    }
  }
});

describe("rotated trellis codes", () => {
  const ROWS = 48, COLS = 64, weights = gaussians(1, ROWS * COLS), moment = momentOf(COLS);
  const problem = { weights, rows: ROWS, cols: COLS, moment, ...FORMAT };

  test("are solved to the same bytes everywhere, with one scale, to less error than uniform codes", () => {
    for (const bits of [2, 3] as const) {
      const { tensor, objective, firstObjective } = solveLayer(scalar, "best", { ...problem, bits });
      const own = tensor as TwoLevelTensor, wanted = decode(own);
      expect(new Set(new Uint16Array(own.subScale.buffer)).size).toBe(1);
      expect(own.subMin.some((byte) => byte !== 0)).toBe(false);
      expect(largestDifference([...dequantize(kernels, tensor)], wanted.flat())).toBeLessThan(1e-5);
      let sum = 0;
      for (const [row, values] of wanted.entries()) {
        const error = values.map((value, k) => weights[row * COLS + k]! - value);
        error.forEach((a, i) => error.forEach((b, j) => sum += a * moment.moment[i * COLS + j]! * b));
      }
      expect(objective / sum).toBeCloseTo(1, 3);
      expect(objective).toBeLessThan(firstObjective);
      const uniform = { ...problem, bits, scaleBits: undefined, codes: undefined };
      expect(objective).toBeLessThan(solveLayer(kernels, "best", uniform).objective);
      for (const { name, kernels } of every) {
        expect([name, solveLayer(kernels, "best", { ...problem, bits }).tensor]).toEqual([name, tensor]);
      }
    }
  });

  test("are solved from blocks of the moment", () => {
    const blocks = { ...problem, moment: momentOf(COLS, 32) };
    const own = solveLayer(kernels, "best", blocks).tensor as TwoLevelTensor;
    expect(own.rotationSeed).toBeDefined();
    expect(largestDifference([...dequantize(scalar, own)], decode(own).flat())).toBeLessThan(1e-5);
  });

  test("give the products of their weights, with a bias, and take no 8-bit activations", () => {
    const { tensor } = solveLayer(kernels, "best", problem), bias = gaussians(3, ROWS), tokens = 5;
    const x = gaussians(4, tokens * COLS), before = x.slice();
    const wanted = times(rowsOf(x, COLS), transposed(decode(tensor as TwoLevelTensor)));
    for (const { name, kernels } of every) {
      for (const own of [bias, undefined]) {
        const out = linear(kernels, { weights: tensor, bias: own }, x, tokens);
        const all = wanted.flatMap((row) => row.map((value, i) => value + (own?.[i] ?? 0)));
        expect([name, largestDifference([...out], all) < 1e-4]).toEqual([name, true]);
      }
    }
    expect(x).toEqual(before);
    expect(takesIntegers(tensor)).toBe(false);
  });

  test("have half floats where rows differ too much", () => {
    const solve = (map: (weight: number, row: number) => number) => {
      const values = weights.map((weight, i) => map(weight, Math.floor(i / COLS)));
      return quantizeByWeights(kernels, { data: values, dtype: "F32" }, ROWS, COLS, {
        ...FORMAT,
        solver: "clip",
      }) as TwoLevelTensor;
    };
    expect(solve((weight) => weight).rotationSeed).toBeDefined();
    expect(solve((weight, row) => row % 16 === 0 ? weight / 50 : weight).rotationSeed).toBeUndefined();
    expect(solve((weight, row) => row === 0 ? 0 : weight).rotationSeed).toBeUndefined();
    expect(solve((weight, row) => row < 16 ? weight / 50 : weight).rotationSeed).toBeDefined(); // a block
  });

  test("belong together, and are not refined", () => {
    const { tensor } = solveLayer(kernels, "best", problem);
    expect(() => packedRows(tensor, 0, 16)).toThrow(RangeError);
    const parts = { scales: true, zeroPoints: true, biases: false, timeGroups: 0 };
    expect(() => new RefinableLinear({ name: "a.weight", weights: tensor, bias: undefined }, parts)).toThrow(
      "its weights must not be rotated: quantize with scale_bits 16",
    );
    for (const wrong of [{ groupSize: 32 }, { codes: undefined }] as object[]) {
      expect(() => solveLayer(kernels, "best", { ...problem, ...wrong })).toThrow(RangeError);
    }
  });

  test("come back from a checkpoint, whose scale and seed they have", async () => {
    const [long, odd, short] = ["up", "gate", "down"].map((part) => `model.layers.0.mlp.${part}_proj.weight`);
    const input = writeCheckpoint(place.fresh(), {
      [short!]: matrix(96, 64, gaussian(96 * 64, 2)),
      [odd!]: matrix(96, 70, gaussian(96 * 70, 3)),
      [long!]: matrix(32, 1632, gaussian(32 * 1632, 4)),
    });
    const given = { codes: "trellis", bit_width: 2, scale_bits: 0 },
      output = place.fresh(),
      plain = place.fresh();
    const { config } = resolveConfig({ overrides: given });
    expect(config.groupSize).toBe(0);
    await quantizeCheckpoint({ kernels, input, output, config });
    {
      using checkpoint = openCheckpoint(output);
      const layers = packedLayers(checkpoint), layer = layers.get(short!)!;
      // four words a row, a scale, a seed, the shape
      expect(layer).toMatchObject({ scaleBits: 0, bitsPerWeight: (96 * 16 + 2 + 4 + 16) * 8 / (96 * 64) });
      for (const name of [odd, long]) expect([name, layers.get(name!)!.scaleBits]).toEqual([name, 16]);
      const own = readPackedTensor(checkpoint, layer) as TwoLevelTensor;
      using source = openCheckpoint(input);
      const weights = { data: source.read(short!), dtype: source.tensors.get(short!)!.info.dtype as "F32" };
      expect(own).toEqual(
        quantizeByWeights(kernels, weights, 96, 64, { ...FORMAT, solver: "clip" }) as TwoLevelTensor,
      );
      expect(() => readPackedTensor(checkpoint, layer, 0, 32)).toThrow(RangeError);
      await dequantizeCheckpoint({ kernels, input: output, output: plain, dtype: "F32" });
      using back = openCheckpoint(plain);
      expect(new Float32Array(back.read(short!).buffer)).toEqual(dequantize(kernels, own));
    }
    const file = join(output, "model.safetensors"), bytes = readFileSync(file);
    const data = 8 + bytes.readUInt32LE(0), header = JSON.parse(bytes.toString("utf8", 8, data));
    bytes.writeInt32LE(-7, data + header[`${short}_seed`].data_offsets[0]);
    writeFileSync(file, bytes);
    using other = openCheckpoint(output);
    const reseeded = readPackedTensor(other, packedLayers(other).get(short!)!) as TwoLevelTensor;
    expect(reseeded.rotationSeed).toBe(-7);
    expect(largestDifference([...dequantize(kernels, reseeded)], decode(reseeded).flat())).toBeLessThan(1e-5);
  });

  test("are refused in a checkpoint that does not hold what they need", async () => {
    const name = "model.layers.0.mlp.up_proj.weight", output = place.fresh();
    const input = writeCheckpoint(place.fresh(), { [name]: matrix(32, 64, gaussian(32 * 64, 2)) });
    const { config } = resolveConfig({ overrides: { codes: "trellis", bit_width: 2, scale_bits: 0 } });
    await quantizeCheckpoint({ kernels, input, output, config });
    const file = join(output, "config.json"), text = readFileSync(file, "utf8");
    const faults = {
      '"group_size": 32': /group_size must be one of 0, got 32/,
      '"scale_bits": 4': /scale_bits must be one of 3, 0, or absent, with trellis codes, got 4/,
      '"scale_bits": 3': /sub_scale" must be U8/,
      '"codes": "uniform"': /scale_bits must be one of 4, 6, 8, 16, or absent, got 0/,
    };
    for (const [fault, message] of Object.entries(faults)) {
      const [key] = fault.split(":");
      writeFileSync(file, text.replace(new RegExp(`${key}: *("trellis"|0)`), fault));
      using broken = openCheckpoint(output);
      expect(() => packedLayers(broken)).toThrow(message);
    }
  });

  test("are refused with what does not know them", () => {
    const given = { codes: "trellis", bit_width: 2, scale_bits: 0, solver: "best" };
    const refused: [object, RegExp][] = [
      [{ codes: "uniform" }, /"scale_bits": got 0, expected 16/],
      [{ target_bits_per_weight: 2.5 }, /"scale_bits": got 0, expected 16 with a bit plan or a budget/],
      [{ bit_plan: "plan.json" }, /"scale_bits": got 0, expected 16/],
      [{ group_size: 32 }, /"group_size": got 32, expected 0 with scale_bits 0/],
      [{ target: "mlx" }, /"target": got "mlx", expected null/],
      [{ "thermodynamic.transition_optimization.enabled": true }, /"scale_bits": got 0, expected 16/],
      [{ time_scales: "per_group" }, /"time_scales": got "per_group", expected shared/],
    ];
    for (const [keys, message] of refused) {
      expect(() => resolveConfig({ overrides: { ...given, ...keys } })).toThrow(message);
    }
  });
});
