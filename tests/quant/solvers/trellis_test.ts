/** Trellis codes: solved, decoded by the format's own words, stored and read again. */
import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type ConfigInForce, resolveConfig } from "../../../lib/config/mod.ts";
import { WeightsError } from "../../../lib/errors.ts";
import { sha256 } from "../../../lib/files/whole.ts";
import * as call from "../../../lib/native/functions.ts";
import { dequantizeCheckpoint, quantizeCheckpoint } from "../../../lib/pipeline/mod.ts";
import {
  accumulateMoment,
  dequantize,
  emptyMoments,
  type FactoredMoment,
  factorMoments,
  type GroupSize,
  packedLayers,
  quantizeByWeights,
  readPackedTensor,
  solveLayer,
  type TwoLevelTensor,
} from "../../../lib/quant/mod.ts";
import { type RefinableLayers, RefinableLinear } from "../../../lib/models/backward/linear.ts";
import { TRELLIS_TABLE } from "../../../lib/quant/packed/checkpoint.ts";
import { TensorSink } from "../../../lib/output/tensor_sink.ts";
import type { TensorReader } from "../../../lib/output/source_digest.ts";
import { rewriteTensor } from "../../../lib/pipeline/quantize_tensor.ts";
import type { PlanRow } from "../../../lib/plan/plan.ts";
import type { RunEvent } from "../../../lib/progress.ts";
import { Workspace } from "../../../lib/models/layers/workspace.ts";
import { openCheckpoint } from "../../../lib/tensor/mod.ts";
import { gaussian, matrix, workplace, writeCheckpoint } from "../../_checkpoints.ts";
import { allInt8Kernels, gaussians } from "../../_kernels.ts";

const every = await allInt8Kernels(), kernels = every.at(-1)!.kernels;
const scalar = every.find(({ name }) => name.endsWith("scalar"))!.kernels;
const place = workplace();
afterAll(() => place.remove());

const WIDTHS = [2, 3] as const;
const TABLES = new Map(WIDTHS.map((bits) => {
  const table = new Float32Array(2 ** (bits + 6));
  call.trellisTable(scalar, "read the table", bits, table);
  return [bits as number, table];
}));
const halves = (bytes: Uint8Array) => new Float16Array(bytes.slice().buffer);

test("levels and their number, which config.json has, change together", () => {
  const digests = WIDTHS.map((bits) => sha256(new Uint8Array(TABLES.get(bits)!.buffer)).slice(0, 16));
  expect([TRELLIS_TABLE, ...digests]).toEqual([2, "ca33373f7a414f67", "09a66db79ec35746"]);
});

/** Weights by docs/format.md: the window is the weight's own bits of the row's stream and the six before them. */
function decode(
  { rows, cols, bits, groupSize, packed, subScale, subMin }: TwoLevelTensor,
): Float32Array<ArrayBuffer> {
  const scale = halves(subScale), offset = halves(subMin), words = packed.length / rows;
  const size = groupSize || cols, groups = Math.ceil(cols / size);
  const bit = (row: number, i: number) => i < 0 ? 0 : packed[row * words + (i >> 5)]! >>> (i & 31) & 1;
  return Float32Array.from({ length: rows * cols }, (_, at) => {
    const row = Math.floor(at / cols), col = at % cols, g = row * groups + Math.floor(col / size);
    let window = 0;
    for (let i = 0; i < bits + 6; i++) window |= bit(row, bits * col - 6 + i) << i;
    return Math.fround(scale[g]! * TABLES.get(bits)![window]!) + offset[g]!;
  });
}

/** A moment of inputs that depend on their neighbours. */
function momentOf(cols: number, block = cols): FactoredMoment {
  const tokens = 3 * cols, x = gaussians(7, tokens * cols), moments = emptyMoments(cols, block);
  for (let i = 1; i < x.length; i++) if (i % cols > 0) x[i]! += 0.8 * x[i - 1]!;
  accumulateMoment(scalar, x, undefined, undefined, tokens, moments.second, block);
  moments.tokens = moments.weight = tokens;
  return factorMoments(scalar, moments);
}

const format = (groupSize: GroupSize, bits: 2 | 3 = 2) =>
  ({ bits, groupSize, zeroPoint: "real", scaleBits: 16, codes: "trellis" }) as const;

describe("trellis codes", () => {
  const ROWS = 24, COLS = 100, weights = gaussians(1, ROWS * COLS), moment = momentOf(COLS);

  /** Σ Δ M Δᵀ in float64. */
  const objectiveOf = (values: Float32Array) => {
    let sum = 0;
    for (let row = 0; row < ROWS; row++) {
      const error = Array.from(
        { length: COLS },
        (_, k) => weights[row * COLS + k]! - values[row * COLS + k]!,
      );
      error.forEach((a, i) => error.forEach((b, j) => sum += a * moment.moment[i * COLS + j]! * b));
    }
    return sum;
  };

  test("of 2 and 3 bits are solved to the same bytes everywhere, to less error than uniform codes", () => {
    for (const [groupSize, bits] of [[0, 2], [32, 2], [0, 3], [32, 3]] as const) {
      const problem = { weights, rows: ROWS, cols: COLS, moment, ...format(groupSize, bits) };
      const { tensor, objective, firstObjective } = solveLayer(scalar, "best", problem);
      const values = decode(tensor as TwoLevelTensor);
      expect(dequantize(kernels, tensor)).toEqual(values);
      expect(objective).toBeCloseTo(objectiveOf(values), 2);
      expect(objective).toBeLessThan(firstObjective);
      const uniform = { ...problem, scaleBits: undefined, codes: undefined };
      expect(objective).toBeLessThan(0.9 * solveLayer(kernels, "best", uniform).objective);
      for (const { name, kernels } of every) {
        expect([name, solveLayer(kernels, "best", problem).tensor]).toEqual([name, tensor]);
      }
    }
  });

  test("have scales of a grid of eight and no offsets where those are coded, and still less error", () => {
    for (const [groupSize, bits] of [[0, 2], [32, 2], [0, 3]] as const) {
      const coded = { ...format(groupSize, bits), scaleBits: 3 } as const;
      const problem = { weights, rows: ROWS, cols: COLS, moment, ...coded };
      const { tensor, objective } = solveLayer(scalar, "best", problem), own = tensor as TwoLevelTensor;
      const [first, ratio] = own.scaleGrid!;
      const grid = Array.from({ length: 8 }, (_, i) => Math.f16round(first * ratio ** i));
      expect([...halves(own.subScale)].filter((scale) => !grid.includes(scale))).toEqual([]);
      expect(new Set(own.subScale).size).toBeGreaterThan(1);
      expect([...halves(own.subMin)].filter((offset) => offset !== 0)).toEqual([]);
      const values = decode(own);
      expect(dequantize(kernels, tensor)).toEqual(values);
      expect(objective).toBeCloseTo(objectiveOf(values), 2);
      const uniform = { ...problem, scaleBits: undefined, codes: undefined };
      expect(objective).toBeLessThan(solveLayer(kernels, "best", uniform).objective);
      for (const { name, kernels } of every) {
        expect([name, solveLayer(kernels, "best", problem).tensor]).toEqual([name, tensor]);
      }
    }
  });

  test("with coded scales lose little beside half floats and offsets, also where rows differ by eight times", () => {
    const spread = weights.map((weight, i) => weight * 2 ** (3 * (Math.floor(i / COLS) % 7) / 6));
    for (const bits of [2, 3] as const) {
      const problem = { weights: spread, rows: ROWS, cols: COLS, moment, ...format(0, bits) };
      const half = solveLayer(kernels, "best", problem);
      const coded = solveLayer(kernels, "best", { ...problem, scaleBits: 3 });
      expect((coded.tensor as TwoLevelTensor).scaleGrid).toBeDefined();
      expect(coded.objective).toBeLessThan(1.08 * half.objective); // 1.11 and 1.13 on a grid of the starts
    }
  });

  test("have half floats where coded scales would lose a row, zeros or a mean, or coarsen all others", () => {
    const rows = 40, cols = 128, plain = gaussians(11, rows * cols);
    const kinds: Record<string, [(weight: number, row: number) => number, GroupSize]> = {
      "a tenth of the rows at 1/50": [(weight, row) => row % 10 === 0 ? weight / 50 : weight, 0],
      "rows of zeros": [(weight, row) => row % 10 === 0 ? 0 : weight, 0],
      "rows with a mean": [(weight, row) => row % 10 === 0 ? weight + 3 * 0.1 : weight, 0],
      "a row at 1000": [(weight, row) => row === 0 ? weight * 1000 : weight, 32],
      "alike": [(weight) => weight, 0],
      "twice as large at the end": [(weight, row) => weight * 2 ** (row / rows), 32],
    };
    const deviation = Math.sqrt(plain.reduce((sum, weight) => sum + weight ** 2, 0) / plain.length);
    for (const [kind, [map, groupSize]] of Object.entries(kinds)) {
      const values = plain.map((weight, i) => map(weight / deviation * 0.1, Math.floor(i / cols)));
      const own = { data: new Uint8Array(values.buffer), dtype: "F32" } as const;
      const solve = (scaleBits: 3 | 16) =>
        quantizeByWeights(kernels, own, rows, cols, { ...format(groupSize), scaleBits, solver: "clip" });
      const coded = solve(3) as TwoLevelTensor, isCoded = kind === "alike" || kind.startsWith("twice");
      expect([kind, coded.scaleGrid !== undefined]).toEqual([kind, isCoded]);
      if (!isCoded) expect([kind, coded]).toEqual([kind, solve(16) as TwoLevelTensor]);
      // no row has an error near its own size
      const found = decode(coded);
      for (let row = 0; row < rows; row++) {
        let error = 0, power = 0;
        for (let i = row * cols; i < (row + 1) * cols; i++) {
          error += (found[i]! - values[i]!) ** 2;
          power += values[i]! ** 2;
        }
        expect([kind, row, error <= power / 4 + cols * 1e-12]).toEqual([kind, row, true]);
      }
    }
  });

  test("are solved in blocks of the moment", () => {
    const blocks = momentOf(COLS, 32),
      problem = { weights, rows: ROWS, cols: COLS, moment: blocks, ...format(32) };
    const { tensor } = solveLayer(kernels, "best", problem);
    expect(dequantize(scalar, tensor)).toEqual(decode(tensor as TwoLevelTensor));
  });

  test("have gradients of scales and offsets, and take refined ones", () => {
    const { tensor } = solveLayer(kernels, "best", {
      weights,
      rows: ROWS,
      cols: COLS,
      moment,
      ...format(32),
    });
    const parts = { scales: true, zeroPoints: true, biases: false, timeGroups: 0 };
    const layer = new RefinableLinear({ name: "a.weight", weights: tensor, bias: undefined }, parts);
    const [scale, offset] = layer.parameters,
      tokens = 3,
      dy = gaussians(5, tokens * ROWS),
      x = gaussians(6, tokens * COLS);
    const xT = Float32Array.from(x, (_, i) => x[i % tokens * COLS + Math.floor(i / tokens)]!);
    const own = { kernels, workspace: new Workspace() } as RefinableLayers;
    layer.backwardParameters(own, dy, tokens, () => xT, undefined);
    /** Σ dy y in float64 for other scales and offsets. */
    const loss = (change: (s: Float16Array, o: Float16Array) => void) => {
      const { subScale, subMin, ...rest } = tensor as TwoLevelTensor,
        s = halves(subScale),
        o = halves(subMin);
      change(s, o);
      const w = decode({ ...rest, subScale: new Uint8Array(s.buffer), subMin: new Uint8Array(o.buffer) });
      let sum = 0;
      w.forEach((value, i) => {
        for (let t = 0; t < tokens; t++) {
          sum += dy[t * ROWS + Math.floor(i / COLS)]! * value * x[t * COLS + i % COLS]!;
        }
      });
      return sum;
    };
    for (const at of [0, 5, 7]) { // linear in both: any difference is the gradient
      const before = halves((tensor as TwoLevelTensor).subScale)[at]!;
      const byScale = (loss((s) => s[at] = before * 2) - loss(() => {})) / before;
      const byOffset = (loss((_, o) => o[at] = 4) - loss((_, o) => o[at] = 2)) / 2;
      expect(scale!.gradients[at]! / byScale).toBeCloseTo(1, 3);
      expect(offset!.gradients[at]! / byOffset).toBeCloseTo(1, 3);
    }
    scale!.values[5] = 0.125;
    offset!.values[5] = -0.5;
    layer.store();
    const { subScale, subMin } = layer.layer.weights as TwoLevelTensor;
    expect([halves(subScale)[5], halves(subMin)[5]]).toEqual([0.125, -0.5]);
    expect(halves((tensor as TwoLevelTensor).subMin)[5]).not.toBe(-0.5);
  });

  test("hold weights of any size, and say which they cannot", () => {
    const solve = (data: Float32Array<ArrayBuffer>) =>
      quantizeByWeights(kernels, { data, dtype: "F32" }, 2, 40, {
        ...format(0),
        solver: "clip",
      }) as TwoLevelTensor;
    const far = (value: number) => new Float32Array(80).fill(value);
    for (const value of [0, 1e-9, -3.0001, 6e4]) {
      const largest = Math.max(...decode(solve(far(value))).map((w) => Math.abs(w - value)));
      expect(largest).toBeLessThanOrEqual(Math.abs(value) * 2 ** -12 + 2 ** -24);
    }
    expect(() => solve(far(1e9))).toThrow(WeightsError);
    for (const bad of [NaN, Infinity]) expect(() => solve(far(1).fill(bad, 3, 4))).toThrow(WeightsError);
  });

  test("are never worse than zeros where weights are tiny, and zeros where they are", () => {
    const rows = 64, cols = 64, own = gaussians(8, rows * cols);
    const formats = [
      { scaleBits: 16, groupSize: 32 },
      { scaleBits: 3, groupSize: 0 },
      { scaleBits: 0, groupSize: 0 },
    ] as const;
    const errorOf = (weights: Float32Array, format: typeof formats[number], from = 0, to = rows) => {
      const data = { data: weights, dtype: "F32" } as const;
      const tensor = quantizeByWeights(kernels, data, rows, cols, {
        ...{ bits: 2, zeroPoint: "real", codes: "trellis", solver: "clip" },
        ...format,
      });
      const back = dequantize(kernels, tensor);
      let errors = 0, squares = 0;
      for (let i = from * cols; i < to * cols; i++) {
        errors += (weights[i]! - back[i]!) ** 2;
        squares += weights[i]! ** 2;
      }
      return { errors, squares };
    };
    for (const format of formats) {
      for (const size of [1e-30, 1e-10, 1e-8, 3e-8, 1e-7]) {
        const { errors, squares } = errorOf(own.map((weight) => weight * size), format);
        expect([format, size, errors <= squares * 1.0001]).toEqual([format, size, true]);
      }
      expect(errorOf(new Float32Array(rows * cols), format).errors).toBe(0);
    }
    const mixed = own.map((weight, i) => i < cols ? weight * 1e-9 : weight); // one row
    const { errors, squares } = errorOf(mixed, formats[0]!, 0, 1);
    expect(errors).toBeLessThanOrEqual(squares * 1.0001);

    // a group of zeros needs no half floats
    const gap = { data: own.map((weight, i) => i < 32 ? 0 : weight), dtype: "F32" } as const;
    const format = { bits: 2, groupSize: 32, zeroPoint: "real", scaleBits: 3, codes: "trellis" } as const;
    const tensor = quantizeByWeights(kernels, gap, rows, cols, { ...format, solver: "clip" });
    expect((tensor as TwoLevelTensor).scaleGrid).toBeDefined();
  });

  test("are refused in other forms", () => {
    const problem = { weights, rows: ROWS, cols: COLS, moment, ...format(0) };
    for (
      const wrong of [{ bits: 4 }, { scaleBits: undefined }, { zeroPoint: "symmetric" }, {
        codes: "lattice",
      }] as object[]
    ) expect(() => solveLayer(kernels, "best", { ...problem, ...wrong })).toThrow(RangeError);
  });

  test("with coded scales come back from a checkpoint, and say what they do not go with", async () => {
    const name = "model.layers.0.mlp.up_proj.weight", head = `${name}_super_scale`;
    const input = writeCheckpoint(place.fresh(), {
      [name]: matrix(9, 70, gaussian(630, 2).map((w, i) => w * 1.1 ** (i % 9))),
    });
    const given = { codes: "trellis", bit_width: 2, scale_bits: 3, group_size: 32 };
    const { config } = resolveConfig({ overrides: given }), output = place.fresh(), plain = place.fresh();
    await quantizeCheckpoint({ kernels, input, output, config });
    using checkpoint = openCheckpoint(output);
    const layer = packedLayers(checkpoint).get(name)!;
    // 9 rows of 3 groups: 81 bits of codes, two half floats, the shape
    expect(layer).toMatchObject({
      codes: "trellis",
      scaleBits: 3,
      bitsPerWeight: (9 * 5 * 4 + 11 + 4 + 16) * 8 / 630,
    });
    const [first, ratio] = halves(checkpoint.read(head)), stream = checkpoint.read(`${name}_sub_scale`);
    const whole = readPackedTensor(checkpoint, layer) as TwoLevelTensor;
    const scales = Array.from({ length: 27 }, (_, i) => {
      const code = [0, 1, 2].reduce(
        (sum, bit) => sum | (stream[3 * i + bit >> 3]! >> (3 * i + bit & 7) & 1) << bit,
        0,
      );
      return Math.f16round(first! * ratio! ** code);
    });
    expect([...halves(whole.subScale)]).toEqual(scales);
    expect(new Set(scales).size).toBeGreaterThan(4);
    using source = openCheckpoint(input);
    const weights = { data: source.read(name), dtype: source.tensors.get(name)!.info.dtype as "F32" };
    const wanted = { ...format(32), scaleBits: 3, solver: "clip" } as const;
    expect(whole).toEqual(quantizeByWeights(kernels, weights, 9, 70, wanted) as TwoLevelTensor);
    const part = readPackedTensor(checkpoint, layer, 4, 7);
    expect(dequantize(kernels, part)).toEqual(decode(whole).slice(4 * 70, 7 * 70));
    await dequantizeCheckpoint({ kernels, input: output, output: plain, dtype: "F32" });
    using back = openCheckpoint(plain);
    expect(new Float32Array(back.read(name).buffer)).toEqual(decode(whole));

    const file = join(output, "model.safetensors"), bytes = readFileSync(file);
    const data = 8 + bytes.readUInt32LE(0), header = JSON.parse(bytes.toString("utf8", 8, data));
    bytes.set([0x00, 0x3c, 0x00, 0x38], data + header[head].data_offsets[0]); // 1, and a ratio of 0.5
    writeFileSync(file, bytes);
    using broken = openCheckpoint(output);
    expect(() => packedLayers(broken)).toThrow(
      /super_scale" must hold .* a ratio of at least 1, got \[1, 0.5\]/,
    );

    const refused = { "codes": "uniform", "target_bits_per_weight": 2.5, "bit_plan": "plan.json" };
    for (const [key, value] of Object.entries(refused)) {
      expect(() => resolveConfig({ overrides: { ...given, solver: "best", [key]: value } })).toThrow(
        /"scale_bits": got 3, expected 16/,
      );
    }
  });

  test("are stored with half floats where coded scales would lose a row, and the run says so", async () => {
    const name = "model.layers.0.mlp.up_proj.weight", other = "model.layers.0.mlp.gate_proj.weight";
    const rows = gaussian(640, 2).map((weight, i) => i < 64 ? weight / 100 : weight);
    const input = writeCheckpoint(place.fresh(), {
      [name]: matrix(10, 64, rows),
      [other]: matrix(10, 64, gaussian(640, 3)),
    });
    const given = { codes: "trellis", bit_width: 2, scale_bits: 3, group_size: 0 };
    const events: RunEvent[] = [], output = place.fresh(), { config } = resolveConfig({ overrides: given });
    await quantizeCheckpoint({ kernels, input, output, config, onEvent: (event) => events.push(event) });
    expect(events.filter(({ kind }) => kind === "fallback").map(({ message }) => message)).toEqual([
      `${name}: scales of 3 bits would lose too much of its rows; stored with half-precision scales and offsets, ` +
      "216 bytes instead of 184",
    ]);
    using checkpoint = openCheckpoint(output);
    const layers = packedLayers(checkpoint);
    expect(layers.get(name)).toMatchObject({ codes: "trellis", scaleBits: 16, bytes: 216 });
    expect(layers.get(other)).toMatchObject({ codes: "trellis", scaleBits: 3, bytes: 184 });
    const { layers: records } = JSON.parse(readFileSync(join(output, "arrowquant.manifest.json"), "utf8"));
    const stored = records.map((
      { name, reason, scale_bits, bytes_after }: Record<string, unknown>,
    ) => [name, reason, scale_bits, bytes_after]);
    expect(stored).toContainEqual([name, "coded_scales", 16, 216]);
    using source = openCheckpoint(input);
    const weights = { data: source.read(name), dtype: source.tensors.get(name)!.info.dtype as "F32" };
    const wanted = quantizeByWeights(kernels, weights, 10, 64, { ...format(0), solver: "clip" });
    const whole = readPackedTensor(checkpoint, layers.get(name)!);
    expect(dequantize(kernels, whole)).toEqual(dequantize(kernels, wanted));
  });

  test("with coded scales are not refined, as the grid would not hold the result", () => {
    const coded = { ...format(32), scaleBits: 3 } as const;
    const { tensor } = solveLayer(kernels, "best", { weights, rows: ROWS, cols: COLS, moment, ...coded });
    const parts = { scales: true, zeroPoints: true, biases: false, timeGroups: 0 };
    expect(() => new RefinableLinear({ name: "a.weight", weights: tensor, bias: undefined }, parts)).toThrow(
      'Cannot refine "a.weight": its scales must be half floats, got coded ones',
    );
  });

  test("with coded scales are not stored where the grid does not hold them", async () => {
    const name = "a.weight", coded = { ...format(32), scaleBits: 3 } as const, events: RunEvent[] = [];
    const solved = solveLayer(kernels, "best", { weights, rows: ROWS, cols: COLS, moment, ...coded });
    const tensor = solved.tensor as TwoLevelTensor,
      off = tensor.subScale.slice(),
      offset = tensor.subMin.slice();
    off[20]! ^= 1;
    offset[21] = 0x3c;
    const bytes = new Uint8Array(weights.buffer),
      { config } = resolveConfig({ overrides: { solver: "clip" } });
    const row = { ...coded, name, action: "quantize", reason: "default", dtype: "F32", shape: [ROWS, COLS] };
    const store = (refined: TwoLevelTensor) =>
      rewriteTensor(
        row as unknown as PlanRow,
        {
          path: "a",
          readInto: (_: string, start: number, target: Uint8Array) =>
            target.set(bytes.subarray(start, start + target.length)),
        } as unknown as TensorReader,
        new TensorSink(undefined, () => Promise.resolve()),
        {
          ...{ config: config as ConfigInForce, kernels, onEvent: (event) => events.push(event) },
          ...{ refined: new Map([[name, refined]]), buffer: (length) => new Uint8Array(length) },
        },
      );
    expect(await store(tensor)).toMatchObject({ name, scaleBits: 3 });
    const wanted = 'Cannot store "a.weight": coded scales must lie on the grid, without offsets';
    for (const wrong of [{ subScale: off }, { subMin: offset }]) {
      await expect(store({ ...tensor, ...wrong })).rejects.toThrow(wanted);
    }
  });

  test("come back from a checkpoint of format version 3", async () => {
    const input = writeCheckpoint(place.fresh(), {
      "model.layers.0.mlp.up_proj.weight": matrix(9, 70, gaussian(630, 2)),
      "model.layers.0.mlp.gate_proj.weight": matrix(9, 70, gaussian(630, 4)),
      "model.layers.0.mlp.down_proj.weight": matrix(5, 64, gaussian(320, 3)),
    });
    const layer_bit_widths = { down_proj: 4, gate_proj: 3 },
      overrides = { codes: "trellis", bit_width: 2, layer_bit_widths };
    const { config } = resolveConfig({ overrides }), output = place.fresh(), plain = place.fresh();
    await quantizeCheckpoint({ kernels, input, output, config });
    const { arrowquant } = JSON.parse(readFileSync(join(output, "config.json"), "utf8")).quantization_config;
    expect(arrowquant).toMatchObject({
      format_version: 3,
      trellis_table: 2,
      layers: {
        "model.layers.0.mlp.up_proj.weight": { bits: 2, group_size: 64, codes: "trellis" },
        "model.layers.0.mlp.gate_proj.weight": { bits: 3, group_size: 64, codes: "trellis" },
        "model.layers.0.mlp.down_proj.weight": { bits: 4, group_size: 64 },
      },
    });
    using checkpoint = openCheckpoint(output);
    const layers = packedLayers(checkpoint);
    const [layer, wider] = ["up", "gate"].map((name) =>
      layers.get(`model.layers.0.mlp.${name}_proj.weight`)!
    );
    const bitsPerWeight = (words: number) => (9 * (words * 4 + 2 * 2 + 2 * 2) + 16) * 8 / 630;
    expect(layer).toMatchObject({ codes: "trellis", bitsPerWeight: bitsPerWeight(5) });
    expect(wider).toMatchObject({ codes: "trellis", bitsPerWeight: bitsPerWeight(7) });
    expect(layers.get("model.layers.0.mlp.down_proj.weight")!.codes).toBeUndefined();
    await dequantizeCheckpoint({ kernels, input: output, output: plain, dtype: "F32" });
    using back = openCheckpoint(plain);
    for (const { name } of [layer!, wider!]) {
      const values = decode(readPackedTensor(checkpoint, layers.get(name)!) as TwoLevelTensor);
      expect(new Float32Array(back.read(name).buffer)).toEqual(values);
    }
  });
});
