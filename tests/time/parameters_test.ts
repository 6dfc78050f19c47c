import { afterAll, describe, expect, test } from "bun:test";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { CheckpointError, FormatError } from "../../lib/errors.ts";
import { DitGradients } from "../../lib/models/backward/dit.ts";
import { MaskedTransformerGradients } from "../../lib/models/backward/masked_transformer.ts";
import { roundActivations } from "../../lib/models/layers/int8.ts";
import { diffusionGenerate, loadDit, loadDream } from "../../lib/models/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { dequantize, type OneLevelTensor } from "../../lib/quant/mod.ts";
import { openCheckpoint, SafetensorsWriter, SIDECAR_FILE } from "../../lib/tensor/mod.ts";
import {
  activationGrid,
  ActivationHistogram,
  equalTimeGroups,
  type LayerParameters,
  maskRatioAxis,
  modelFingerprint,
  outputCorrection,
  readTimeParameters,
  TimeParameters,
  timestepAxis,
  writeTimeParameters,
} from "../../lib/time/mod.ts";
import { workplace } from "../_checkpoints.ts";
import { allKernels, gaussians, randomStream } from "../_kernels.ts";
import { ditCheckpoint, dreamCheckpoint, store } from "../_models.ts";
import { roundedToGrid } from "../_reference.ts";
import { thrown } from "../tensor/_files.ts";

const everywhere = await allKernels();
const { kernels } = everywhere[0]!;
const place = workplace();
afterAll(() => {
  for (const { kernels: each } of everywhere) each.close();
  place.remove();
});

/** A new empty folder. */
function folderOf(): string {
  const folder = place.fresh();
  mkdirSync(folder);
  return folder;
}

describe("grids of activations", () => {
  test("cover their range and 0, with whole zero points, and are hardly coarser than need be", () => {
    for (let seed = 1; seed <= 500; seed++) {
      const random = randomStream(seed);
      const a = (random() - 0.5) * 10 ** (6 * random() - 3), b = (random() - 0.5) * 10 ** (6 * random() - 3);
      const low = Math.min(a, b), high = Math.max(a, b);
      for (const bits of [4, 8] as const) {
        const { scale, zeroPoint } = activationGrid(low, high, bits), top = 2 ** bits - 1;
        expect(scale).toBe(Math.fround(scale));
        expect(Number.isInteger(zeroPoint) && zeroPoint >= 0 && zeroPoint <= top).toBe(true);
        expect(-scale * zeroPoint).toBeLessThanOrEqual(Math.min(0, low));
        expect(scale * (top - zeroPoint)).toBeGreaterThanOrEqual(Math.max(0, high));
        const width = Math.max(0, high) - Math.min(0, low);
        expect(scale * (top - 1)).toBeLessThanOrEqual(width * 1.2);
      }
    }
    expect(activationGrid(0, 0, 8)).toEqual({ scale: 1, zeroPoint: 0 });
    expect(activationGrid(1e-45, 1e-45, 8).scale).toBe(2 ** -126);
  });

  test("bad ranges", () => {
    expect(() => activationGrid(1, 0, 8)).toThrow("in order, got [1, 0]");
    expect(() => activationGrid(NaN, 0, 8)).toThrow(RangeError);
    expect(() => activationGrid(0, 1, 2 as 4)).toThrow("bits must be 4 or 8, got 2");
  });

  test("values come back to half a step, ties to even, clipped at the ends", () => {
    const x = Float32Array.of(-10, -1, -0.75, -0.25, 0, 0.24, 0.25, 0.75, 1.25, 6.5, 7, 100);
    const out = roundActivations(kernels, x, 1, { bits: 4, grid: { scale: 0.5, zeroPoint: 2 } }, x.slice());
    expect([...out].map((v) => v + 0)).toEqual([-1, -1, -1, 0, 0, 0, 0, 1, 1, 6.5, 6.5, 6.5]);
    const wide = gaussians(1, 1000), low = Math.min(...wide), high = Math.max(...wide);
    const grid = activationGrid(low, high, 8);
    const back = roundActivations(kernels, wide, 1, { bits: 8, grid }, new Float32Array(1000));
    for (let i = 0; i < 1000; i++) {
      expect(Math.abs(back[i]! - wide[i]!)).toBeLessThanOrEqual(grid.scale / 2 * (1 + 1e-6));
      expect(Number.isInteger(Math.round(back[i]! / grid.scale * 1e4) / 1e4)).toBe(true);
    }
  });
});

describe("what calibration saw", () => {
  test("minimum and maximum are exact, however the values came", () => {
    const values = gaussians(2, 5000).map((v, i) => v * (i < 2500 ? 0.01 : 3));
    const whole = new ActivationHistogram(), parts = new ActivationHistogram();
    whole.add(values);
    for (let i = 0; i < 5000; i += 500) parts.add(values.subarray(i, i + 500));
    const range = { low: Math.min(...values), high: Math.max(...values) };
    expect([whole.range, parts.range]).toEqual([range, range]);
    for (const method of ["minmax", "percentile", "mse"] as const) {
      expect(parts.grid(method, 4)).toEqual(whole.grid(method, 4));
    }
    expect(whole.count).toBe(5000);
  });

  test("quantiles are right to a bin", () => {
    const values = gaussians(3, 20_001), sorted = values.toSorted(), histogram = new ActivationHistogram();
    histogram.add(values);
    for (const share of [0.001, 0.01, 0.3, 0.5, 0.99, 0.9995]) {
      const wanted = sorted[Math.floor(share * 20_000)]!;
      expect(Math.abs(histogram.quantile(share) - wanted)).toBeLessThan(0.05 * Math.max(1, Math.abs(wanted)));
    }
    expect([histogram.quantile(0), histogram.quantile(1)]).toEqual([sorted[0]!, sorted.at(-1)!]);
  });

  test("the MSE search beats minimum and maximum where there are outliers, and changes nothing where there are none", () => {
    const errorOf = (values: Float32Array, method: "minmax" | "mse" | "percentile") => {
      const histogram = new ActivationHistogram();
      histogram.add(values);
      const back = roundedToGrid(values, histogram.grid(method, 4), 4);
      return back.reduce((sum, v, i) => sum + (v - values[i]!) ** 2, 0) / values.length;
    };
    const tails = gaussians(4, 20_000);
    tails[7] = 12;
    tails[8] = -9;
    expect(errorOf(tails, "mse")).toBeLessThan(0.4 * errorOf(tails, "minmax"));
    expect(errorOf(tails, "mse")).toBeLessThanOrEqual(errorOf(tails, "percentile"));
    const flat = Float32Array.from({ length: 1000 }, (_, i) => i / 500 - 1);
    expect(errorOf(flat, "mse")).toBeLessThanOrEqual(errorOf(flat, "minmax") * 1.01);
  });

  test("NaN is refused, nothing seen too", () => {
    const histogram = new ActivationHistogram();
    expect(() => histogram.grid("minmax", 8)).toThrow("some must have been seen, got none");
    expect(() => histogram.add(Float32Array.of(1, NaN))).toThrow("got NaN at 1");
    expect(histogram.count).toBe(0);
    histogram.add(new Float32Array(0));
    histogram.add(Float32Array.of(0, 0));
    expect(histogram.grid("mse", 8)).toEqual({ scale: 1, zeroPoint: 0 });
    expect(() => histogram.grid("percentile", 8, 0)).toThrow("percentile must lie in (0, 100]");
    expect(() => histogram.grid("best" as "mse", 8)).toThrow("one of minmax, percentile, mse");
  });
});

describe("output correction", () => {
  const rows = 6, cols = 9, n = 4000;
  const x = gaussians(5, n * cols).map((v, i) => v + (i % cols) * 0.3), w = gaussians(6, rows * cols);
  const moments = (samples: number) => {
    const second = new Float32Array(cols * cols), mean = new Float32Array(cols);
    for (let t = 0; t < n; t++) {
      for (let i = 0; i < cols; i++) {
        mean[i]! += x[t * cols + i]! / n;
        for (let j = 0; j < cols; j++) second[i * cols + j]! += x[t * cols + i]! * x[t * cols + j]! / n;
      }
    }
    return { second, mean, samples };
  };
  const output = (weights: Float32Array, t: number, row: number) => {
    let sum = 0;
    for (let i = 0; i < cols; i++) sum += weights[row * cols + i]! * x[t * cols + i]!;
    return sum;
  };

  test("is the regression of the full output on the quantized one", () => {
    const q = w.map((v, i) => 0.8 * v + 0.2 * Math.sin(7 * i));
    for (const { kernels: each } of everywhere) {
      const { gain, bias } = outputCorrection(each, { weights: w, quantized: q, rows, cols }, moments(1e9));
      for (let row = 0; row < rows; row++) {
        let sy = 0, sq = 0, sqq = 0, syq = 0;
        for (let t = 0; t < n; t++) {
          const y = output(w, t, row), z = output(q, t, row);
          sy += y / n;
          sq += z / n;
          sqq += z * z / n;
          syq += y * z / n;
        }
        const slope = (syq - sy * sq) / (sqq - sq * sq);
        expect(gain[row]).toBeCloseTo(slope, 3);
        expect(bias[row]).toBeCloseTo(sy - slope * sq, 3);
      }
    }
  });

  test("equal weights need none; few samples shrink it to (1, 0)", () => {
    const same = outputCorrection(kernels, { weights: w, quantized: w, rows, cols }, moments(100));
    expect([...same.gain]).toEqual(Array(rows).fill(1));
    expect([...same.bias].map(Math.abs)).toEqual(Array(rows).fill(0));
    const q = w.map((v, i) => v + 0.3 * Math.sin(7 * i));
    const many = outputCorrection(kernels, { weights: w, quantized: q, rows, cols }, moments(1e6));
    const few = outputCorrection(kernels, { weights: w, quantized: q, rows, cols }, moments(2));
    for (let row = 0; row < rows; row++) {
      expect(Math.abs(few.gain[row]! - 1)).toBeLessThanOrEqual(Math.abs(many.gain[row]! - 1));
    }
    const dead = outputCorrection(kernels, {
      weights: w,
      quantized: new Float32Array(rows * cols),
      rows,
      cols,
    }, moments(1e6));
    expect([...dead.gain]).toEqual(Array(rows).fill(1)); // nothing to scale: the bias alone
  });

  test("bad input", () => {
    expect(() => outputCorrection(kernels, { weights: w, quantized: w, rows, cols }, { ...moments(1) }))
      .toThrow(
        "at least 2 samples",
      );
    expect(() => outputCorrection(kernels, { weights: w, quantized: w, rows, cols: 8 }, moments(10))).toThrow(
      TypeError,
    );
    const bad = { ...moments(10), mean: new Float32Array(cols).fill(NaN) };
    expect(() => outputCorrection(kernels, { weights: w, quantized: w, rows, cols }, bad)).toThrow(
      "moments must be finite",
    );
  });
});

const axis = timestepAxis(100), groups = equalTimeGroups(axis, 2);
const activation = (scale: number[], zeroPoint: number[], bits: 4 | 8 = 8) => ({
  bits,
  scale: Float32Array.from(scale),
  zeroPoint: Int32Array.from(zeroPoint),
});

describe("selection", () => {
  test("gives the same object for the same group, another for the other", () => {
    const layer: LayerParameters = {
      activation: activation([0.5, 0.25], [3, 4]),
      output: { gain: Float32Array.of(1, 2, 3, 4), bias: Float32Array.of(5, 6, 7, 8) },
    };
    const parameters = new TimeParameters(groups, new Map([["a", layer]]), "f");
    expect(parameters.at("a", 0)).toBe(parameters.at("a", 49)!);
    expect(parameters.at("a", 49)).not.toBe(parameters.at("a", 50)!);
    expect(parameters.at("a", 99)!.grid).toEqual({ scale: 0.25, zeroPoint: 4 });
    expect([...parameters.at("a", 99)!.gainLessOne!]).toEqual([2, 3]);
    expect([...parameters.at("a", 0)!.bias!]).toEqual([5, 6]);
    expect(parameters.at("b", 0)).toBeUndefined();
    expect(() => parameters.at("a", 100)).toThrow(RangeError);
    expect(parameters.bytes).toBe(2 * 4 + 2 * 4 + 4 * 4 + 4 * 4);
  });

  test("by bin where activations were smoothed", () => {
    const scale = Array.from({ length: 100 }, (_, i) => 1 + i);
    const parameters = new TimeParameters(
      groups,
      new Map([["a", { activation: activation(scale, scale) }]]),
      "f",
    );
    expect(parameters.at("a", 37)!.grid).toEqual({ scale: 38, zeroPoint: 38 });
  });

  test("bad θ names its layer", () => {
    const bad: [LayerParameters, string][] = [
      [{ activation: activation([1], [0]) }, "2 (or 100) activation scales"],
      [{ activation: activation([1, NaN], [0, 0]) }, "got NaN at 1"],
      [{ activation: activation([1, 0], [0, 0]) }, "at least 2^-126, got 0 at 1"],
      [{ activation: activation([1, 1], [0, 16], 4) }, "from 0 to 15, got 16 at 1"],
      [{ output: { gain: new Float32Array(3), bias: new Float32Array(3) } }, "[2, rows]"],
      [{ output: { gain: Float32Array.of(1, Infinity), bias: new Float32Array(2) } }, "got Infinity at 1"],
      [
        { weightScales: { scale: Uint16Array.of(0x7e00, 0), zeroPoint: undefined } },
        "weight scales must be finite",
      ],
    ];
    for (const [layer, message] of bad) {
      const error = thrown(() => new TimeParameters(groups, new Map([["a.weight", layer]]), "f"));
      expect(error.message).toContain('"a.weight"');
      expect(error.message).toContain(message);
    }
  });
});

describe("sidecar", () => {
  const layers = new Map<string, LayerParameters>([
    ["x.weight", {
      activation: activation([0.5, 0.25], [3, 4]),
      output: { gain: Float32Array.of(1, 2, 3, 4), bias: Float32Array.of(5, 6, 7, 8) },
      weightScales: { scale: Uint16Array.of(1, 2, 3, 4, 5, 6, 7, 8), zeroPoint: undefined },
    }],
    ["y.weight", { activation: activation(Array(100).fill(1), Array(100).fill(9)) }],
  ]);
  const parameters = new TimeParameters(groups, layers, "abcdef012345678");
  const expected = {
    fingerprint: "abcdef012345678",
    layers: new Map([["x.weight", { rows: 2, weightGroups: 2 }], ["y.weight", { rows: 5, weightGroups: 1 }]]),
  };
  const written = () => {
    const folder = folderOf();
    writeTimeParameters(folder, parameters, (layer) => expected.layers.get(layer)!.rows);
    return folder;
  };

  test("comes back as it was", () => {
    const read = readTimeParameters(written(), { ...expected, groups: 2, axis });
    expect(read.layers).toEqual(layers);
    expect([...read.groups.boundaries]).toEqual([0, 50, 100]);
    expect(read.groups.axis.kind).toBe("timesteps");
    expect(read.fingerprint).toBe(parameters.fingerprint);
    const again = folderOf();
    writeTimeParameters(again, read, () => 2);
    expect(readFileSync(join(again, SIDECAR_FILE)).equals(readFileSync(join(written(), SIDECAR_FILE)))).toBe(
      true,
    );
  });

  test("of another model, another G or another axis is refused", () => {
    const folder = written();
    const cases: [object, string][] = [
      [{ fingerprint: "0000" }, "must belong to the model beside it (0000…), got one of another model"],
      [{ groups: 3 }, "must have 3 time groups, got 2"],
      [{ axis: maskRatioAxis(100) }, "must be of 100 bins of mask_ratio, got 100 of timesteps"],
      [{ axis: timestepAxis(99) }, "99 bins"],
    ];
    for (const [change, message] of cases) {
      const error = thrown(() => readTimeParameters(folder, { ...expected, ...change }));
      expect(error).toBeInstanceOf(CheckpointError);
      expect(error.message).toContain(message);
    }
    expect(() => readTimeParameters(folderOf(), expected)).toThrow(CheckpointError);
  });

  test("broken ones are told from whole ones", () => {
    const wrongLayers = (rows: number) => ({
      ...expected,
      layers: new Map([...expected.layers, ["x.weight", { rows, weightGroups: 2 }]]),
    });
    for (const change of [wrongLayers(3), { ...expected, layers: new Map() }]) {
      expect(thrown(() => readTimeParameters(written(), change))).toBeInstanceOf(FormatError);
    }
    const path = join(written(), SIDECAR_FILE);
    const good = readFileSync(path);
    const text = good.toString("latin1");
    const replaced = (from: string, to: string) => {
      expect(text).toContain(from);
      return Buffer.from(text.replace(from, to), "latin1");
    };
    const bits = new Float32Array(1).fill(0.5);
    const half = Buffer.from(bits.buffer);
    const nan = Buffer.from(good);
    nan.writeFloatLE(NaN, good.indexOf(half, 400));
    const broken: [Buffer, string][] = [
      [good.subarray(0, -1), "inside the data"],
      [replaced("arrowquant time parameters", "arrowquant some parameters"), "metadata must say"],
      [replaced('"bins":"100"', '"bins":"0x4"'), "with a number of bins"],
      [replaced('"bins":"100"', '"bins":"101"'), "must be whole numbers from 0 to 101"],
      [replaced('"activation_bits":"8"', '"activation_bits":"7"'), "must be 4 or 8, got 7"],
      [replaced("x.weight.output_bias", "x.weight.output_bond"), "a part of a layer"],
      [replaced("time_groups.boundaries", "time_groups.boundarie_"), "must be I32 of 2 to 101"],
      [nan, "got NaN"],
    ];
    for (const [bytes, message] of broken) {
      writeFileSync(path, bytes);
      const error = thrown(() => readTimeParameters(join(path, ".."), expected));
      expect([error.constructor.name, error.message]).toEqual([
        "FormatError",
        expect.stringContaining(message),
      ]);
    }
  });

  test("half of a pair is refused", () => {
    const folder = folderOf();
    const specs = [
      { name: "time_groups.boundaries", dtype: "I32", shape: [2] },
      { name: "x.weight.output_gain", dtype: "F32", shape: [1, 2] },
    ] as const;
    const metadata = {
      format: "arrowquant time parameters",
      version: "1",
      axis: "timesteps",
      bins: "10",
      activation_bits: "8",
      fingerprint: expected.fingerprint,
    };
    using writer = SafetensorsWriter.create(join(folder, SIDECAR_FILE), {
      reservedHeaderBytes: SafetensorsWriter.headerBytes(specs, metadata),
      metadata,
    });
    writer.add(specs);
    writer.write("time_groups.boundaries", 0, new Uint8Array(Int32Array.of(0, 10).buffer));
    writer.write("x.weight.output_gain", 0, new Uint8Array(8));
    writer.finish();
    expect(() => readTimeParameters(folder, expected)).toThrow("must have both output_gain and output_bias");
  });
});

const quantized = async (made: Parameters<typeof store>[1]) => {
  const output = place.fresh();
  const { config } = resolveConfig({ overrides: { solver: "clip", bit_width: 4, group_size: 16 } });
  await quantizeCheckpoint({ input: store(place.fresh(), made), output, config, kernels });
  return output;
};
const dream = await quantized(dreamCheckpoint()), dit = await quantized(ditCheckpoint());

describe("models with time parameters", () => {
  const masks = equalTimeGroups(maskRatioAxis(10), 2);
  const ids = Int32Array.from({ length: 3 * 8 }, (_, i) => (i * 7) % 49);

  test("one that changes nothing gives identical bytes, with and without rows", () => {
    const plain = loadDream(dream, kernels);
    const linears = plain.parts.blocks.flatMap((
      block,
    ) => [block.query, block.feedForward!.up, block.feedForward!.down]);
    const layers = new Map<string, LayerParameters>();
    for (const { name, weights } of linears) {
      const packed = weights as OneLevelTensor;
      const twice = (values: Uint16Array): Uint16Array<ArrayBuffer> =>
        Uint16Array.from([...values, ...values]);
      layers.set(name, { weightScales: { scale: twice(packed.scale), zeroPoint: twice(packed.zeroPoint!) } });
    }
    const timeParameters = new TimeParameters(masks, layers, "f");
    const other = loadDream(dream, kernels, { timeParameters });
    for (const rows of [undefined, Int32Array.of(1, 20, 9)]) {
      const wanted = Float32Array.from(plain.forward(ids, 3, { rows }));
      expect(other.forward(ids, 3, { rows, t: 0.3 })).toEqual(wanted);
      expect(other.forward(ids, 3, { rows, t: [0.9, 0.1, 0.9] })).toEqual(wanted);
    }
    // Without θ, t means nothing.
    expect([...plain.forward(ids, 3, { t: 0.3 })]).toEqual([...plain.forward(ids, 3)]);
  });

  test("every sequence of a batch gets its own time's", () => {
    const plain = loadDream(dream, kernels);
    const [{ query, feedForward }] = plain.parts.blocks as [typeof plain.parts.blocks[0]];
    const { up, down } = feedForward!;
    const layers = new Map<string, LayerParameters>([
      [query!.name, {
        output: {
          gain: Float32Array.from(gaussians(7, 2 * 48), (v) => 1 + 0.1 * v),
          bias: gaussians(8, 2 * 48),
        },
      }],
      [up.name, { activation: activation([0.05, 0.5], [128, 120]) }],
      [down.name, { activation: activation([0.05, 0.01], [12, 8], 4) }],
    ]);
    // 8 and 4 bits in one model are fine at run time; a sidecar has one width.
    const timeParameters = new TimeParameters(masks, layers, "f");
    const model = loadDream(dream, kernels, { timeParameters });
    const times = [0.2, 0.7, 1];
    const together = model.forward(ids, 3, { t: times }).slice();
    const rows = Int32Array.of(23, 2, 9, 8);
    const some = model.forward(ids, 3, { t: times, rows }).slice();
    const width = model.config.vocabularySize;
    const alone = times.map((t, i) => model.forward(ids.subarray(i * 8, (i + 1) * 8), 1, { t }).slice());
    for (let i = 0; i < 3; i++) {
      expect(together.subarray(i * 8 * width, (i + 1) * 8 * width)).toEqual(alone[i]!);
    }
    for (const [i, row] of rows.entries()) {
      const wanted = together.subarray(row * width, (row + 1) * width);
      expect(some.subarray(i * width, (i + 1) * width)).toEqual(wanted);
    }
    expect(model.forward(ids, 3, { t: 0.2 }).slice()).not.toEqual(model.forward(ids, 3, { t: 0.7 }).slice());
    expect(() => writeTimeParameters(folderOf(), timeParameters)).toThrow("same bits, got 8 and 4");
  });

  test("gain and bias are what they say: y = gain (Ŵ x) + bias, beside the layer's own bias", () => {
    const plain = loadDream(dream, kernels), block = plain.parts.blocks[0]!;
    const name = block.key.name, rows = block.key.weights.rows;
    const gain = gaussians(9, 2 * rows), bias = gaussians(10, 2 * rows);
    const timeParameters = new TimeParameters(masks, new Map([[name, { output: { gain, bias } }]]), "f");
    // The same model with scaled weights and another bias instead.
    const tensor = block.key.weights as OneLevelTensor, dense = dequantize(kernels, tensor);
    const changed = {
      rows,
      cols: tensor.cols,
      dtype: "F32" as const,
      data: Float32Array.from(dense, (v, i) => v * gain[rows + Math.floor(i / tensor.cols)]!),
    };
    const model = loadDream(dream, kernels, { timeParameters });
    const other = loadDream(dream, kernels);
    Object.assign(other.parts.blocks[0]!.key, {
      weights: changed,
      bias: Float32Array.from(block.key.bias!, (v, i) => v + bias[rows + i]!),
    });
    const got = model.forward(ids, 3, { t: 1 }).slice(), wanted = other.forward(ids, 3);
    for (let i = 0; i < got.length; i++) expect(Math.abs(got[i]! - wanted[i]!)).toBeLessThan(1e-4);
  });

  test("generation hands the time over; DiT has it anyway", () => {
    const timeParameters = new TimeParameters(
      masks,
      new Map([["lm_head.weight", {
        output: { gain: new Float32Array(100).fill(1), bias: gaussians(11, 100) },
      }]]),
      "f",
    );
    const model = loadDream(dream, kernels, { timeParameters });
    const canvas = Int32Array.of(3, 4, 49, 49, 49, 49);
    expect(diffusionGenerate(model, canvas, 1).sequences.includes(49)).toBe(false);
    expect(() => model.forward(ids, 3)).toThrow("t must be given");
    expect(() => model.forward(ids, 3, { t: [0.5] })).toThrow("one number or 3, got 1");
    expect(() => model.forward(ids, 3, { t: 0 })).toThrow("must lie in (0, 1]");

    const name = "transformer_blocks.1.ff.net.0.proj.weight";
    const images = new TimeParameters(
      groups,
      new Map([[name, { activation: activation([0.5, 0.02], [128, 128]) }]]),
      "f",
    );
    const plain = loadDit(dit, kernels), aware = loadDit(dit, kernels, { timeParameters: images });
    const samples = gaussians(12, 2 * plain.imageElements);
    const together = aware.forward(samples, [10, 90], [0, 1]).slice(), half = together.length / 2;
    expect(together).not.toEqual(plain.forward(samples, [10, 90], [0, 1]).slice());
    const second = aware.forward(samples.subarray(plain.imageElements), [90], [1]);
    for (let i = 0; i < half; i++) expect(Math.abs(second[i]! - together[half + i]!)).toBeLessThan(1e-5);
    expect(() => aware.forward(samples, [10, 100], [0, 1])).toThrow("must lie in [0, 100)");
    expect(() => new DitGradients(aware)).toThrow("must be loaded without time parameters");
  });

  test("other weights and runs block by block are refused: θ belongs to the weights that were loaded", () => {
    const layer = { output: { gain: new Float32Array(100).fill(1), bias: new Float32Array(100) } };
    const theta = (name: string) => new TimeParameters(masks, new Map([[name, layer]]), "f");
    const model = loadDream(dream, kernels, { timeParameters: theta("lm_head.weight") });
    const weights = new Map([["lm_head.weight", model.parts.head.weights]]);
    expect(() => model.forward(ids, 3, { t: 0.5, weights })).toThrow("must have no time parameters");
    expect(() => model.start({ inputIds: ids, batch: 3 })).toThrow(TypeError);
    expect(model.forward(ids, 3, { t: 0.5 }).length).toBe(24 * 50);
  });

  test("two-level scales have no weight scales by time, and are not refined", async () => {
    const path = place.fresh();
    const { config } = resolveConfig({ overrides: { solver: "clip", bit_width: 4, scale_bits: 6 } });
    await quantizeCheckpoint({
      input: store(place.fresh(), dreamCheckpoint()),
      output: path,
      config,
      kernels,
    });
    const name = "model.layers.0.mlp.up_proj.weight";
    const weightScales = { scale: new Uint16Array(4), zeroPoint: new Uint16Array(4) };
    const timeParameters = new TimeParameters(masks, new Map([[name, { weightScales }]]), "f");
    expect(() => loadDream(path, kernels, { timeParameters })).toThrow("got two-level scales");
    expect(() => new MaskedTransformerGradients(loadDream(path, kernels))).toThrow("got two-level scales");
  });

  test("θ of layers that the model has not, or of other sizes, is refused", () => {
    const load = (name: string, layer: LayerParameters) => () =>
      loadDream(dream, kernels, { timeParameters: new TimeParameters(masks, new Map([[name, layer]]), "f") });
    const output = { gain: new Float32Array(2), bias: new Float32Array(2) };
    expect(load("model.nothing.weight", { output })).toThrow(
      'must be of its linear layers, got "model.nothing.weight"',
    );
    expect(load("lm_head.weight", { output })).toThrow("must have 50 gains, got 1");
    const scales = { scale: new Uint16Array(4), zeroPoint: undefined };
    expect(load("lm_head.weight", { weightScales: scales })).toThrow(TypeError);
    expect(load("model.layers.0.mlp.up_proj.weight", { weightScales: scales })).toThrow(
      "weight scales and zero points",
    );
  });

  test("fingerprints: of the same bytes the same, of other quantizations and models another", async () => {
    const of = (path: string) => {
      using checkpoint = openCheckpoint(path);
      return modelFingerprint(checkpoint);
    };
    const again = await quantized(dreamCheckpoint());
    expect(of(again)).toBe(of(dream));
    expect(of(dit)).not.toBe(of(dream));
    const output = place.fresh();
    const { config } = resolveConfig({ overrides: { bit_width: 4, group_size: 16, solver: "round" } });
    await quantizeCheckpoint({ input: store(place.fresh(), dreamCheckpoint()), output, config, kernels });
    expect(of(output)).not.toBe(of(dream));
  });
});
