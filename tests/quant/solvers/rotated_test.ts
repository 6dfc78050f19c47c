/** Trellis codes of rotated weights: the rotation by its definition; solved, multiplied, stored, read. */
import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../../lib/config/mod.ts";
import { FormatError, InterruptedError } from "../../../lib/errors.ts";
import { RefinableLinear } from "../../../lib/models/backward/linear.ts";
import { takesIntegers } from "../../../lib/models/layers/int8.ts";
import { linear } from "../../../lib/models/layers/linear.ts";
import { loadModel } from "../../../lib/models/mod.ts";
import * as call from "../../../lib/native/functions.ts";
import { openKernels } from "../../../lib/native/mod.ts";
import {
  dequantizeCheckpoint,
  mergeCheckpoint,
  quantizeCheckpoint,
  readManifest,
} from "../../../lib/pipeline/mod.ts";
import { filesOf } from "../../../lib/pipeline/write_run.ts";
import type { RunEvent } from "../../../lib/progress.ts";
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
import { rotateMatrix } from "../../../lib/quant/rotation.ts";
import { openCheckpoint, SafetensorsWriter } from "../../../lib/tensor/mod.ts";
import { differences, gaussian, matrix, workplace, writeCheckpoint } from "../../_checkpoints.ts";
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

test("a rotation of many rows is the same on several threads", async () => {
  const x = gaussians(1, 512 * 1024), out = new Float32Array(x.length), other = new Float32Array(x.length);
  const threaded = await openKernels({ threads: 3 });
  call.rotate(scalar, "rotate", x, 512, 1024, 1, 5, 1, out);
  call.rotate(threaded, "rotate", x, 512, 1024, 1, 5, 1, other);
  threaded.close();
  expect(other).toEqual(out);
});

test("a matrix is rotated to the same bytes in parts, where WebAssembly gets it in several", async () => {
  const rows = 4096 + 64, cols = 1056, wasm = await openKernels({ backend: "wasm" });
  const own = gaussians(2, rows * cols), other = own.slice();
  for (const direction of ["forth", "back"] as const) {
    rotateMatrix(scalar, own, rows, cols, 3, direction);
    rotateMatrix(wasm, other, rows, cols, 3, direction);
    expect(Buffer.compare(Buffer.from(own.buffer), Buffer.from(other.buffer))).toBe(0);
  }
  wasm.close();
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

  test("have half floats where means of rows would cost more than a small factor", () => {
    const rowMeans = gaussians(5, ROWS), found: boolean[] = [];
    for (const mean of [0, 0.5, 0.8, 1, 2, 4, 8]) {
      for (const shift of [() => mean, (row: number) => mean * rowMeans[row]!]) {
        const shifted = weights.map((weight, i) => weight + shift(Math.floor(i / COLS)));
        const own = solveLayer(kernels, "best", { ...problem, weights: shifted });
        const half = solveLayer(kernels, "best", { ...problem, weights: shifted, scaleBits: 16 });
        expect([mean, own.objective / half.objective < 5]).toEqual([mean, true]);
        found.push((own.tensor as TwoLevelTensor).rotationSeed !== undefined);
      }
    }
    expect(found.slice(0, 4)).toEqual([true, true, true, true]);
    expect(found.slice(-6)).toEqual([false, false, false, false, false, false]);
  });

  test("have a moment of at most 8192 columns, which a multiple of the unit need not be rotated for", () => {
    const cols = 16_384, long = gaussians(6, cols);
    const alone = quantizeByWeights(kernels, { data: long, dtype: "F32" }, 1, cols, {
      ...FORMAT,
      solver: "clip",
    });
    expect((alone as TwoLevelTensor).rotationSeed).toBeDefined();
    const moments = emptyMoments(cols, 32);
    for (let k = 0; k < moments.second.length; k += 33) moments.second[k] = 1 + k % 2;
    moments.tokens = moments.weight = 2;
    const wide = { ...FORMAT, weights: long, rows: 1, cols, moment: factorMoments(kernels, moments) };
    expect(() => solveLayer(kernels, "best", wide)).toThrow(
      "rotated weights must have at most 8192 columns, got 16384; take scaleBits 16",
    );
  });

  test("are refused for a table of tokens, whose rows are looked up, when it is loaded", () => {
    const zeros = { data: new Float32Array(35 * 64), dtype: "F32" } as const;
    const name = "model.embed_tokens.weight";
    const weights = new Map([[
      name,
      quantizeByWeights(kernels, zeros, 35, 64, { ...FORMAT, solver: "clip" }),
    ]]);
    expect(() => loadModel("tests/models/dream-mini", kernels, { weights })).toThrow(
      /embed_tokens.*must not be rotated: quantize with scale_bits 16/,
    );
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
    const short = "model.layers.0.mlp.up_proj.weight", output = place.fresh(), plain = place.fresh();
    const input = writeCheckpoint(place.fresh(), { [short]: matrix(96, 64, gaussian(96 * 64, 2)) });
    const { config } = resolveConfig({ overrides: { codes: "trellis", bit_width: 2, scale_bits: 0 } });
    expect(config.groupSize).toBe(0);
    await quantizeCheckpoint({ kernels, input, output, config });
    {
      using checkpoint = openCheckpoint(output);
      const layers = packedLayers(checkpoint), layer = layers.get(short)!;
      // four words a row, a scale, a seed, the shape
      expect(layer).toMatchObject({ scaleBits: 0, bitsPerWeight: (96 * 16 + 2 + 4 + 16) * 8 / (96 * 64) });
      const own = readPackedTensor(checkpoint, layer) as TwoLevelTensor;
      using source = openCheckpoint(input);
      const weights = { data: source.read(short), dtype: source.tensors.get(short)!.info.dtype as "F32" };
      expect(own).toEqual(
        quantizeByWeights(kernels, weights, 96, 64, { ...FORMAT, solver: "clip" }) as TwoLevelTensor,
      );
      expect(() => readPackedTensor(checkpoint, layer, 0, 32)).toThrow(RangeError);
      await dequantizeCheckpoint({ kernels, input: output, output: plain, dtype: "F32" });
      using back = openCheckpoint(plain);
      expect(new Float32Array(back.read(short).buffer)).toEqual(dequantize(kernels, own));
    }
    const file = join(output, "model.safetensors"), bytes = readFileSync(file);
    const data = 8 + bytes.readUInt32LE(0), header = JSON.parse(bytes.toString("utf8", 8, data));
    bytes.writeInt32LE(-7, data + header[`${short}_seed`].data_offsets[0]);
    writeFileSync(file, bytes);
    using other = openCheckpoint(output);
    const reseeded = readPackedTensor(other, packedLayers(other).get(short)!) as TwoLevelTensor;
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

  test("are refused with a scale that is negative or not finite", async () => {
    const name = "model.layers.0.mlp.up_proj.weight", output = place.fresh();
    const input = writeCheckpoint(place.fresh(), { [name]: matrix(32, 64, gaussian(32 * 64, 2)) });
    const { config } = resolveConfig({ overrides: { codes: "trellis", bit_width: 2, scale_bits: 0 } });
    await quantizeCheckpoint({ kernels, input, output, config });
    const file = join(output, "model.safetensors"), bytes = readFileSync(file);
    const data = 8 + bytes.readUInt32LE(0), header = JSON.parse(bytes.toString("utf8", 8, data));
    const layersWith = (half: number) => {
      bytes.writeUInt16LE(half, data + header[`${name}_scale`].data_offsets[0]);
      writeFileSync(file, bytes);
      using checkpoint = openCheckpoint(output);
      return packedLayers(checkpoint);
    };
    for (const [half, got] of [[0x7c00, "Infinity"], [0x7e00, "NaN"], [0xbc00, "-1"]] as const) {
      expect(() => layersWith(half)).toThrow(`must hold a finite scale of at least 0, got ${got}`);
      expect(() => layersWith(half)).toThrow(FormatError);
    }
    expect(layersWith(0).size).toBe(1);
  });

  test("are planned where rows are short and a power of two divides both sides", async () => {
    const shapes = [[96, 64], [96, 1600], [96, 1632], [96, 70], [48, 64], [64, 16]] as const;
    const name = (i: number) => `model.layers.${i}.mlp.up_proj.weight`;
    const input = writeCheckpoint(
      place.fresh(),
      Object.fromEntries(
        shapes.map(([rows, cols], i) => [name(i), matrix(rows, cols, gaussian(rows * cols, i))]),
      ),
    );
    for (
      const [scale_bits, wanted] of [[0, [0, 0, 16, 16, 16, 16]], [16, [16, 16, 16, 16, 16, 16]]] as const
    ) {
      const { config } = resolveConfig({ overrides: { codes: "trellis", bit_width: 2, scale_bits } });
      const { plan } = await quantizeCheckpoint({
        kernels,
        input,
        output: place.fresh(),
        config,
        dryRun: true,
      });
      const found = shapes.map((_, i) => plan.rows.find((row) => row.name === name(i))!.scaleBits);
      expect(found).toEqual([...wanted]);
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

  test("are planned to the byte, resumed and merged to the same bytes, or have half floats and say so", async () => {
    const names = ["up", "gate", "down"].map((part) => `model.layers.0.mlp.${part}_proj.weight`);
    const uneven = gaussian(32 * 64, 4).map((weight, i) => i < 64 ? weight / 100 : weight);
    const input = writeCheckpoint(place.fresh(), {
      [names[0]!]: matrix(32, 64, gaussian(32 * 64, 2)),
      [names[1]!]: matrix(64, 32, gaussian(64 * 32, 3)),
      [names[2]!]: matrix(32, 64, uneven),
    });
    const { config } = resolveConfig({ overrides: { codes: "trellis", bit_width: 2, scale_bits: 0 } });
    const whole = place.fresh(), resumed = place.fresh(), parts = place.fresh(), merged = place.fresh();
    const given = { kernels, input, config }, events: RunEvent[] = [];
    const { plan } = await quantizeCheckpoint({ ...given, output: place.fresh(), dryRun: true });
    await quantizeCheckpoint({ ...given, output: whole, onEvent: (event) => void events.push(event) });
    const stored = readManifest(whole)!.layers;
    const of = (rows: readonly { readonly name: string; readonly bytesAfter: number }[], name: string) =>
      rows.find((row) => row.name === name)!.bytesAfter;
    for (const name of names.slice(0, 2)) {
      expect([name, of(stored, name)]).toEqual([name, of(plan.rows, name)]);
    }
    expect(stored.find(({ name }) => name === names[2])).toMatchObject({
      reason: "one_scale",
      scaleBits: 16,
    });
    expect(events.filter(({ kind }) => kind === "fallback").map(({ message }) => message)).toEqual([
      `${
        names[2]
      }: one scale would lose too much of its rows; stored with half-precision scales and offsets, ` +
      `${of(stored, names[2]!)} bytes instead of ${of(plan.rows, names[2]!)}`,
    ]);

    const controller = new AbortController();
    await expect(quantizeCheckpoint({
      ...given,
      output: resumed,
      signal: controller.signal,
      onProgress: ({ tensorsDone }) => tensorsDone >= 1 && controller.abort("SIGINT"),
    })).rejects.toBeInstanceOf(InterruptedError);
    await quantizeCheckpoint({ ...given, output: resumed, resume: true });
    for (const index of [2, 1]) {
      await quantizeCheckpoint({ ...given, output: parts, shard: { index, count: 2 } });
    }
    await mergeCheckpoint({ input, output: merged, shards: [parts] });
    for (const output of [resumed, merged]) expect(differences(output, whole)).toEqual([]);
  });

  test("have room in the header where all of a file's have half floats", async () => {
    const rows = 256,
      cols = 32,
      names = Array.from({ length: 3 }, (_, i) => `model.layers.${i}.mlp.up_proj.weight`);
    const uneven = gaussian(rows * cols, 4).map((weight, i) => i < cols ? weight / 100 : weight);
    const input = writeCheckpoint(
      place.fresh(),
      Object.fromEntries(names.map((name) => [name, matrix(rows, cols, uneven)])),
    );
    const { config } = resolveConfig({ overrides: { codes: "trellis", bit_width: 2, scale_bits: 0 } });
    const output = place.fresh();
    const { plan } = await quantizeCheckpoint({ kernels, input, config, output });
    using from = openCheckpoint(input);
    using checkpoint = openCheckpoint(output);
    const [file] = filesOf(from, { plan }), specs = [...checkpoint.tensors.values()].map(({ info }) => info);
    // room that would do wherever the tensors lay
    expect(file!.reservedHeaderBytes).toBeGreaterThanOrEqual(SafetensorsWriter.headerBytes(specs));
    expect(readManifest(output)!.layers.map(({ reason }) => reason)).toEqual(names.map(() => "one_scale"));
  });

  test("name the weight that is not finite", async () => {
    const data = gaussian(32 * 64, 2);
    data[70] = NaN;
    const input = writeCheckpoint(place.fresh(), { "a.weight": matrix(32, 64, data) });
    const { config } = resolveConfig({ overrides: { codes: "trellis", bit_width: 2, scale_bits: 0 } });
    await expect(quantizeCheckpoint({ kernels, input, output: place.fresh(), config })).rejects.toThrow(
      /NaN or infinity at row 1, column 6/,
    );
  });
});
