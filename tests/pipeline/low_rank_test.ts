import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { CheckpointError, ConfigError, FormatError, InterruptedError } from "../../lib/errors.ts";
import { loadDit, loadDream, requirementsAt } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import {
  dequantizeCheckpoint,
  quantizeCheckpoint,
  type QuantizeCheckpointOptions,
  readManifest,
} from "../../lib/pipeline/mod.ts";
import { dequantize, rotationBlock } from "../../lib/quant/mod.ts";
import { packedLayers, readPackedTensor } from "../../lib/quant/packed/checkpoint.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import {
  contents,
  differences,
  MODELS,
  rejection,
  type TestTensor,
  workplace,
  writeTensors,
} from "../_checkpoints.ts";

const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});

const DREAM = join(MODELS, "dream-mini");
const RANK = { "solver_options.low_rank": 4 }, ROTATION = { "solver_options.rotation": "hadamard" };

function run(
  output: string,
  overrides: Record<string, unknown>,
  more: Partial<Pick<QuantizeCheckpointOptions, "input" | "resume" | "signal" | "onProgress">> = {},
) {
  const { config } = resolveConfig({
    overrides: {
      bit_width: 2,
      group_size: 0,
      solver: "feedback",
      calibration_samples: 32,
      num_threads: 1,
      ...overrides,
    },
  });
  return quantizeCheckpoint({ input: DREAM, output, config, kernels, ...more });
}

type Tensors = Record<string, TestTensor>;

/** The tensors of all shards. */
function allTensors(folder: string): Tensors {
  using checkpoint = openCheckpoint(folder);
  return Object.fromEntries(
    [...checkpoint.tensors.values()].map(({ info: { name, dtype, shape } }) => [name, {
      dtype,
      shape,
      data: checkpoint.read(name),
    }]),
  );
}

/** A checkpoint of one file. */
function writeFolder(folder: string, tensors: Tensors, config: unknown): void {
  mkdirSync(folder);
  writeTensors(join(folder, "model.safetensors"), tensors);
  writeFileSync(join(folder, "config.json"), JSON.stringify(config));
}

const TOKENS = Int32Array.from({ length: 40 }, (_, i) => 2 + i * 7 % 30);
const logitsOf = (path: string) => loadDream(path, kernels).forward(TOKENS, 2).slice();

/** ‖a − b‖ / ‖b‖ */
function distance(a: Float32Array, b: Float32Array): number {
  let error = 0, power = 0;
  for (const [i, value] of b.entries()) {
    error += (a[i]! - value) ** 2;
    power += value ** 2;
  }
  return Math.sqrt(error / power);
}

const both = place.fresh("both");
beforeAll(async () => {
  await run(both, { ...RANK, ...ROTATION });
}, 60_000);

describe("a checkpoint with low-rank corrections and rotations", () => {
  test("runs as its dequantized form does, and counts every byte", async () => {
    for (const [name, overrides] of [["rank", RANK], ["rotation", ROTATION], ["both", undefined]] as const) {
      const output = overrides === undefined ? both : place.fresh(name);
      const report = overrides === undefined ? undefined : await run(output, overrides);
      const plain = place.fresh(`${name}-plain`);
      await dequantizeCheckpoint({ input: output, output: plain, kernels });
      // The original is stored as half floats or bfloat16, so the way back rounds each weight once.
      expect(distance(logitsOf(output), logitsOf(plain))).toBeLessThan(0.02);
      using checkpoint = openCheckpoint(output);
      const layers = [...packedLayers(checkpoint).values()];
      expect(layers.length).toBe(28);
      let bytes = 0, weights = 0;
      for (const layer of layers) {
        expect(layer.rank).toBe(name === "rotation" ? 0 : 4);
        expect(layer.rotation?.block).toBe(name === "rank" ? undefined : rotationBlock(layer.cols));
        const parts = Object.values(layer.tensors).filter((part) => part !== undefined);
        const stored = parts.reduce((sum, part) => sum + checkpoint.tensors.get(part)!.info.byteLength, 0);
        expect(layer.bytes).toBe(stored);
        bytes += stored;
        weights += layer.rows * layer.cols;
        const whole = dequantize(kernels, readPackedTensor(checkpoint, layer));
        expect(dequantize(kernels, readPackedTensor(checkpoint, layer, 3, 5))).toEqual(
          whole.slice(3 * layer.cols, 5 * layer.cols),
        );
      }
      const found = readManifest(output)!.layers.filter(({ action }) => action === "quantize");
      expect(found.reduce((sum, { bytesAfter }) => sum + bytesAfter, 0)).toBe(bytes);
      if (report !== undefined) expect(report.totals.bitsPerWeight).toBeCloseTo(bytes * 8 / weights, 9);
      expect(loadDream(output, kernels).weightBytes).toBe(requirementsAt(output).weightBytes);
    }
  }, 60_000);

  test("with a rotation and 8 bits has the outputs of full precision", async () => {
    const output = place.fresh("eight"), plain = place.fresh("eight-plain");
    await run(output, { bit_width: 8, ...ROTATION });
    await run(plain, { bit_width: 8 });
    const full = logitsOf(DREAM);
    expect(distance(logitsOf(output), full)).toBeLessThan(0.02);
    expect(distance(logitsOf(output), logitsOf(plain))).toBeLessThan(0.02);
  }, 60_000);

  test("of images, with both and 8 bits, has the predictions of full precision", async () => {
    const input = join(MODELS, "glyph-dit"), output = place.fresh("dit");
    const rest = String.raw`^transformer_blocks\.[1-9]`; // one block will do
    await run(output, { bit_width: 8, keep_patterns: [rest], ...RANK, ...ROTATION }, { input });
    const predicted = (path: string) => {
      const model = loadDit(path, kernels);
      const images = Float32Array.from({ length: 2 * model.imageElements }, (_, i) => Math.sin(i * 0.7));
      return model.forward(images, [900, 100], [1, 3]).slice();
    };
    expect(distance(predicted(output), predicted(input))).toBeLessThan(0.02);
  }, 120_000);

  test("a correction brings the outputs nearer", async () => {
    const without = place.fresh("without"), output = place.fresh("with");
    await run(without, {});
    await run(output, { "solver_options.low_rank": 8 });
    const full = logitsOf(DREAM);
    expect(distance(logitsOf(output), full)).toBeLessThan(distance(logitsOf(without), full));
  }, 60_000);

  test("the same bytes for two threads, and after a stop while solving", async () => {
    const two = place.fresh("two");
    await run(two, { ...RANK, ...ROTATION, num_threads: 2 });
    expect(differences(two, both)).toEqual([]);
    const stopped = place.fresh("stopped"), controller = new AbortController();
    let solved = 0;
    const error = await rejection(run(stopped, { ...RANK, ...ROTATION }, {
      signal: controller.signal,
      onProgress: () => {
        if (++solved === 5) controller.abort("SIGINT");
      },
    }));
    expect(error).toBeInstanceOf(InterruptedError);
    await run(stopped, { ...RANK, ...ROTATION }, { resume: true });
    expect(differences(stopped, both)).toEqual([]);
  }, 60_000);

  test("a budget counts the correction's bytes", async () => {
    const report = await run(place.fresh("budget"), { ...RANK, target_bits_per_weight: 4.6 });
    expect(report.totals.bitsPerWeight).toBeLessThanOrEqual(4.6);
    expect(report.layers.some(({ lowRank }) => lowRank === 4)).toBe(true);
  }, 60_000);

  test("is never called compressed-tensors", async () => {
    const output = place.fresh("symmetric");
    await run(output, { zero_point: "symmetric", ...RANK });
    const { quantization_config: config } = JSON.parse(readFileSync(join(output, "config.json"), "utf8"));
    expect(config.quant_method).toBe("arrowquant");
    expect(config.arrowquant.format_version).toBe(2);
  }, 60_000);
});

describe("files with odd parts are refused", () => {
  const NAME = "model.layers.0.mlp.up_proj.weight";
  type Section = { format_version: unknown; layers: Record<string, Record<string, unknown>> };

  /** What reading the checkpoint says after a change; all its tensors are in one file. */
  function changed(change: (section: Section, tensors: Tensors) => void): Error {
    const folder = place.fresh("changed");
    const tensors = allTensors(both);
    const config = JSON.parse(readFileSync(join(both, "config.json"), "utf8"));
    change(config.quantization_config.arrowquant, tensors);
    writeFolder(folder, tensors, config);
    using checkpoint = openCheckpoint(folder);
    let error: unknown;
    try {
      packedLayers(checkpoint);
    } catch (caught) {
      error = caught;
    }
    expect(error).toBeInstanceOf(FormatError);
    expect(() => loadDream(folder, kernels)).toThrow(FormatError);
    return error as Error;
  }

  const entry = (part: string, value: unknown) => (section: Section) => {
    section.layers[NAME]![part] = value;
  };
  const rotation = (part: string, value: unknown) => (section: Section) => {
    section.layers[NAME]!["rotation"] = { kind: "hadamard", block: 64, seed: 0, [part]: value };
  };
  const cases: [what: string, message: string, change: (section: Section, tensors: Tensors) => void][] = [
    ["no A", '_low_rank_a" must be F16', (_, tensors) => delete tensors[`${NAME}_low_rank_a`]],
    ["no B", '_low_rank_b" must be F16', (_, tensors) => delete tensors[`${NAME}_low_rank_b`]],
    ["another rank", '_low_rank_a" must be F16 [160,5], got F16 [160,4]', entry("low_rank", 5)],
    [
      "a correction without a rank",
      "must not be there",
      (section) => delete section.layers[NAME]!["low_rank"],
    ],
    ["a rank of 0", ".low_rank must be a whole number from 1 to 64", entry("low_rank", 0)],
    ["a rank of 1.5", ".low_rank must be a whole number", entry("low_rank", 1.5)],
    ["a rank of text", ".low_rank must be a whole number", entry("low_rank", "4")],
    ["a rank of 65", ".low_rank must be", entry("low_rank", 65)],
    ["a rotation of text", ".rotation must be an object", entry("rotation", "hadamard")],
    ["an unknown rotation", ".rotation.kind must be hadamard", rotation("kind", "random")],
    ["a block of 48", ".rotation.block must be a power of two", rotation("block", 48)],
    ["a block beyond the columns", "rotation's block 128 divides, got 64", rotation("block", 128)],
    ["a block of 0", ".rotation.block must be a power of two", rotation("block", 0)],
    ["a seed below 0", ".rotation.seed must be", rotation("seed", -1)],
    ["no seed", ".rotation.seed must be", rotation("seed", undefined)],
    ["version 1 with them", "absent in format_version 1", (section) => void (section.format_version = 1)],
  ];
  for (const [what, message, change] of cases) {
    test(what, () => expect(changed(change).message).toContain(message));
  }
});

describe("configuration", () => {
  const resolve = (overrides: Record<string, unknown>) => () => resolveConfig({ overrides });

  test("takes 0, 4 to 64 and hadamard, with a solver on calibration data", () => {
    for (const rank of [0, 4, 64]) {
      const { config } = resolveConfig({ overrides: { solver: "best", "solver_options.low_rank": rank } });
      expect(config.solverOptions.lowRank).toBe(rank);
    }
    expect(resolveConfig({ overrides: {} }).config.solverOptions).toMatchObject({
      lowRank: 0,
      rotation: "none",
    });
  });

  test("refuses other values, and either with another solver", () => {
    for (const rank of [-1, 1, 3, 65, 4.5, "four"]) {
      expect(resolve({ solver: "best", "solver_options.low_rank": rank })).toThrow(
        /low_rank.*0, or 4 to 64/s,
      );
    }
    expect(resolve({ solver: "best", "solver_options.rotation": "random" })).toThrow(ConfigError);
    for (const solver of ["round", "clip"]) {
      expect(resolve({ solver, ...RANK })).toThrow(/low_rank.*expected 0 with solver/s);
      expect(resolve({ solver, ...ROTATION })).toThrow(/rotation.*expected none with solver/s);
    }
  });
});

test("a checkpoint with an entry under a correction's name is refused", async () => {
  const folder = place.fresh("taken"), tensors = allTensors(DREAM);
  tensors["model.layers.0.mlp.up_proj.weight_low_rank_a"] = tensors["model.norm.weight"]!;
  writeFolder(folder, tensors, JSON.parse(readFileSync(join(DREAM, "config.json"), "utf8")));
  const { config } = resolveConfig({ overrides: { bit_width: 4 } });
  const output = place.fresh();
  const error = await rejection(quantizeCheckpoint({ input: folder, output, config, kernels }));
  expect(error).toBeInstanceOf(CheckpointError);
  expect(() => contents(output)).toThrow();
});
