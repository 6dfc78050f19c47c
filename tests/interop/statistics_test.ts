/** Models that run in PyTorch alone, solved here from the statistics that scripts/collect_statistics.py writes there. */
import { afterAll, describe, expect, test } from "bun:test";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { collectStatistics } from "../../lib/calibration/collect.ts";
import { HeldOutMeter } from "../../lib/calibration/held_out.ts";
import { type Calibrated, loadCalibration } from "../../lib/calibration/mod.ts";
import { calibrationGroups } from "../../lib/calibration/saved_statistics.ts";
import { resolveConfig } from "../../lib/config/mod.ts";
import { type DitModel, type ImageBatch, loadModel, type SequenceBatch } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { narrowMoments } from "../../lib/quant/solvers/moments.ts";
import { SafetensorsFile } from "../../lib/tensor/mod.ts";
import { dequantizeCheckpoint, quantizeCheckpoint, type RunEvent } from "../../lib/pipeline/mod.ts";
import { readCalibrationStatistics } from "../../lib/time/mod.ts";
import { MODELS, ROOT, type TestTensor, workplace, writeTensors } from "../_checkpoints.ts";
import { readersPython, runReader } from "../_readers.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

const SCRIPT = "statistics.py";

/** Quantizes a model, and writes its weights as others read them. @returns names of the solved layers, events */
async function solved(input: string, overrides: Record<string, unknown>) {
  const packed = place.fresh("packed"), plain = place.fresh("plain"), events: RunEvent[] = [];
  const { config } = resolveConfig({ overrides: { num_threads: 1, ...overrides } });
  const { layers } = await quantizeCheckpoint({
    input,
    output: packed,
    kernels,
    config,
    onEvent: (event) => events.push(event),
  });
  await dequantizeCheckpoint({ input: packed, output: plain, kernels, dtype: "F32" });
  return {
    names: layers.filter(({ solved }) => solved !== undefined).map(({ name }) => name),
    events,
    file: join(plain, "diffusion_pytorch_model.safetensors"),
  };
}

/** Batches of a model's calibration data as a file that the script reads. */
function batchesFile({ kind, data, model }: Calibrated): string {
  const path = `${place.fresh("batches")}.safetensors`, tensors: Record<string, TestTensor> = {};
  for (const [i, { samples, times, batch }] of data.fit.entries()) {
    tensors[`${i}.times`] = { dtype: "F64", shape: [samples], data: times };
    if (kind === "sequences") {
      const { inputIds } = batch as SequenceBatch;
      tensors[`${i}.tokens`] = {
        dtype: "I32",
        shape: [samples, inputIds.length / samples],
        data: inputIds.slice(),
      };
    } else {
      const { samples: images, labels } = batch as ImageBatch,
        { sampleSize, channels } = (model as DitModel).config;
      const shape = [samples, channels, sampleSize, sampleSize];
      tensors[`${i}.samples`] = { dtype: "F32", shape, data: images.slice() };
      tensors[`${i}.labels`] = { dtype: "I32", shape: [samples], data: Int32Array.from(labels) };
    }
  }
  writeTensors(path, tensors);
  return path;
}

/** Largest difference as part of the largest number. */
function distance(got: ArrayLike<number>, wanted: ArrayLike<number>): number {
  let difference = 0, size = 0;
  for (let i = 0; i < wanted.length; i++) {
    difference = Math.max(difference, Math.abs(got[i]! - wanted[i]!));
    size = Math.max(size, Math.abs(wanted[i]!));
  }
  return difference / size;
}

describe("models that run here, too", () => {
  const models = [
    { name: "dream-mini", script: "dream", data: "calibration.jsonl", samples: 256 },
    { name: "glyph-dit", script: "dit", data: "calibration_images.safetensors", samples: 128 },
  ] as const;
  for (const { name, script, data, samples } of models) {
    test(`${name}: PyTorch's statistics equal our own, and so do the layers solved from them`, async () => {
      const python = readersPython(), input = join(MODELS, name), path = `${place.fresh("own")}.safetensors`;
      if (python === undefined) return;
      const loaded = loadModel(input, kernels);
      const calibrated = await loadCalibration(loaded, { source: join(input, data), samples, seed: 0 });
      const own = await collectStatistics(calibrated, {
        kernels,
        fingerprint: "",
        groups: calibrationGroups(calibrated.data.axis, 5),
        second: "total",
        run: { identity: "own", source: data, isSynthetic: false, samples },
      });
      const half = `${place.fresh("half")}.safetensors`;
      for (const [file, precision] of [[path, "float32"], [half, "float16"]] as const) {
        await runReader(python, SCRIPT, [script, input, batchesFile(calibrated), file, precision]);
      }
      const { statistics: found } = readCalibrationStatistics(path, { fingerprint: "" });
      const layers = [...own.inputs.values()].flatMap((each) => each.layers);
      const others = new Set([...found.inputs.values()].flatMap((each) => each.layers));
      expect([...others].sort()).toEqual(layers.sort());
      for (const layer of others) {
        const one = found.inputOf(layer), other = own.inputOf(layer);
        // diffusers runs the time embedding of the first block of a DiT a second time, for the last layer.
        const times = layer.startsWith("transformer_blocks.0.norm1.emb.") ? 2 : 1;
        for (const key of ["tokens", "samples"] as const) {
          expect([layer, key, [...one[key]]]).toEqual([layer, key, [
            ...other[key].map((count) => times * count),
          ]]);
        }
        for (const key of ["weight", "sum", "squares", "second"] as const) {
          const halved = one[key]!.map((value) => value / times);
          expect([layer, key, distance(halved, other[key]!) < 1e-4]).toEqual([layer, key, true]);
        }
        for (const [g, histogram] of one.histograms.entries()) {
          const { low, high } = histogram.range, range = other.histograms[g]!.range;
          expect(distance([low, high], [range.low, range.high])).toBeLessThan(1e-4);
        }
      }
      const heldOut = async (calibration_data: string) => {
        const output = place.fresh("solved");
        const { config } = resolveConfig({
          overrides: {
            ...{ bit_width: 2, group_size: 32, solver: "best", calibration_data, calibration_mode: "once" },
            ...{ calibration_samples: samples, num_threads: 1, "solver_options.candidates": 1 },
          },
        });
        await quantizeCheckpoint({ input, output, kernels, config });
        const { model } = loadModel(output, kernels);
        const weights = [...model.stages.flatMap((stage) => stage.layers), ...model.tables];
        return await new HeldOutMeter(calibrated).distance(
          new Map(weights.map((each) => [each.name, each.weights])),
        );
      };
      const [once, from] = [await heldOut(join(input, data)), await heldOut(path)];
      const rounded = await heldOut(half);
      console.log(
        `${name}: held out ${once.toPrecision(4)} by calibration_mode once, ${
          from.toPrecision(4)
        } from PyTorch, ${rounded.toPrecision(4)} from correlations in half precision`,
      );
      expect(Math.abs(from / once - 1)).toBeLessThan(0.02);
      expect(rounded / once).toBeLessThan(1.5);
    }, 300_000);
  }
});

describe("docs/statistics.md", () => {
  const blocks = [
    ...readFileSync(join(ROOT, "docs", "statistics.md"), "utf8").matchAll(/```python\n(.*?)```/gs),
  ];
  const cases = [["pipeline", "prompts.txt", 15], ["masked", "texts.txt", 8]] as const;
  for (const [i, [kind, prompts, least]] of cases.entries()) {
    test(
      `its lines for a ${kind} run, the command does the same, and layers are solved from what they leave`,
      async () => {
        const python = readersPython(), folder = place.fresh(kind), code = `${place.fresh("lines")}.py`;
        if (python === undefined) return;
        mkdirSync(folder);
        writeFileSync(code, blocks[i]![1]!);
        await runReader(python, SCRIPT, [kind, folder]);
        const saved = await runReader(python, SCRIPT, ["lines", folder, code]) as Record<string, number[]>;
        expect(await runReader(python, SCRIPT, ["by_command", folder, prompts])).toEqual(
          Object.keys(saved).sort(),
        );
        const { config } = resolveConfig({
          overrides: {
            ...{ bit_width: 3, group_size: 32, solver: "feedback", num_threads: 1 },
            calibration_data: `${join(folder, "statistics.safetensors")},${
              join(folder, "by_command.safetensors")
            }`,
          },
        });
        const output = place.fresh("solved");
        const { layers } = await quantizeCheckpoint({
          input: join(folder, "model"),
          output,
          kernels,
          config,
        });
        expect(layers.filter((layer) => layer.solved !== undefined).length).toBeGreaterThan(least);
      },
      120_000,
    );
  }

  test("blocks, time groups and layers that share an input are what float64 sums say", async () => {
    const python = readersPython(), folder = place.fresh("pair"), cols = 40, rows = 5, times = [50, 500, 950];
    if (python === undefined) return;
    mkdirSync(folder);
    await runReader(python, SCRIPT, ["pair", folder]);
    using file = SafetensorsFile.open(join(folder, "x.safetensors"));
    const x = new Float32Array(file.read("x").buffer);
    // Of the second layer only what it read by itself, twice the second pass.
    const seen = { first: { from: 0, scale: 1 }, second: { from: times.length * rows, scale: 2 } };
    const files = [["whole", cols, 1e-6], ["blocks", 16, 1e-6], ["whole16", cols, 5e-4], [
      "blocks16",
      16,
      5e-4,
    ]];
    for (const [name, block, tolerance] of files as [string, number, number][]) {
      const { statistics } = readCalibrationStatistics(join(folder, `${name}.safetensors`), {
        fingerprint: "",
      });
      expect([...statistics.groups.boundaries]).toEqual([0, 250, 500, 750, 1000]);
      for (const [layer, { from, scale }] of Object.entries(seen)) {
        const wanted = new Float64Array(cols * cols),
          squares = new Float64Array(4 * cols),
          tokens = [0, 0, 0, 0];
        for (let row = from; row < x.length / cols; row++) {
          const group = statistics.groups.groupOf(times[Math.floor(row / rows) % times.length]!);
          const own = x.subarray(row * cols, (row + 1) * cols);
          tokens[group]!++;
          for (let i = 0; i < cols; i++) {
            squares[group * cols + i]! += (scale * own[i]!) ** 2;
            for (let k = 0; k < cols; k++) wanted[i * cols + k]! += scale ** 2 * own[i]! * own[k]!;
          }
        }
        const input = statistics.inputOf(`${layer}.weight`);
        expect([...input.tokens]).toEqual(tokens);
        expect(distance(input.squares, squares)).toBeLessThan(1e-6);
        const whole = { cols, tokens: 0, weight: 0, second: Float32Array.from(wanted) };
        const { second } = statistics.moments(`${layer}.weight`);
        expect(distance(second, narrowMoments(whole, block).second)).toBeLessThan(tolerance);
      }
    }
  }, 120_000);

  test("experts that one parameter holds are layers of their own", async () => {
    const python = readersPython(), folder = place.fresh("experts");
    if (python === undefined) return;
    const counts = await runReader(python, SCRIPT, ["experts", folder]) as Record<string, number>;
    const path = join(folder, "statistics.safetensors");
    const { statistics } = readCalibrationStatistics(path, { fingerprint: "" });
    for (const [layer, count] of Object.entries(counts)) {
      expect([layer, statistics.tokensOf(layer)]).toEqual([layer, count]);
      expect(statistics.inputOf(layer).tokens.filter((tokens) => tokens > 0).length).toBeGreaterThan(1);
    }
    const { config } = resolveConfig({
      overrides: { bit_width: 3, group_size: 32, solver: "feedback", num_threads: 1, calibration_data: path },
    });
    const output = place.fresh("solved");
    const { layers } = await quantizeCheckpoint({ input: folder, output, kernels, config });
    const solved = layers.filter((layer) => layer.solved !== undefined).map(({ name }) => name);
    expect(solved.filter((name) => name.includes(".experts.")).length).toBe(12);
    expect(solved.some((name) => name.endsWith("mlp.gate.weight"))).toBe(false);
  }, 120_000);

  test(
    "times above 1 are timesteps, and so are a sampler's small ones behind them; others are shares of 1",
    async () => {
      const python = readersPython(), folder = place.fresh("times");
      if (python === undefined) return;
      mkdirSync(folder);
      expect(await runReader(python, SCRIPT, ["by_time", folder])).toEqual({
        timesteps: [2, 1, 0, 1],
        shares: [1, 1, 0, 1],
        tenths: [0, 1, 1, 1, 1, 1, 1, 1, 1, 2],
        masks: [1, 1, 1, 1, 1], // one to five masked of five
      });
    },
    120_000,
  );

  test("under autocast moments are those of float32", async () => {
    const python = readersPython(), folder = place.fresh("mixed");
    if (python === undefined) return;
    mkdirSync(folder);
    expect(await runReader(python, SCRIPT, ["mixed", folder])).toBeLessThan(1e-6);
  }, 120_000);

  test("compiled, wrapped, adapted and fused models are collected as plain ones", async () => {
    const python = readersPython(), folder = place.fresh("wrapped");
    if (python === undefined) return;
    mkdirSync(folder);
    const kinds = [
      "compiled",
      "in_place",
      "by_blocks",
      "parallel",
      "hands_on",
      "fused",
      "offloaded",
      "adapted",
      "injected",
      "adapted, offloaded",
    ];
    expect(await runReader(python, SCRIPT, ["wrapped", folder])).toEqual(
      Object.fromEntries(kinds.map((kind) => [kind, []])),
    );
  }, 120_000);

  test("batches in lists and times by token are those of samples one by one", async () => {
    const python = readersPython(), folder = place.fresh("batched");
    if (python === undefined) return;
    mkdirSync(folder);
    const found = { lists: [], "lists, groups": [1, 8], tokens: [], "tokens, groups": [1, 9] };
    expect(await runReader(python, SCRIPT, ["batched", folder])).toEqual(found);
  }, 120_000);

  test("a layer in codes leaves the weights of the others known", async () => {
    const python = readersPython(), folder = place.fresh("unknown");
    if (python === undefined) return;
    mkdirSync(folder);
    expect(await runReader(python, SCRIPT, ["unknown", folder])).toEqual([false, true]);
  }, 120_000);

  test("interrupted half-way, nothing is left", async () => {
    const python = readersPython(), folder = place.fresh("interrupted");
    if (python === undefined) return;
    mkdirSync(folder);
    expect(await runReader(python, SCRIPT, ["interrupted", folder])).toEqual([]);
  }, 120_000);
});

/** Relative output errors by layer, of a model's layers with each file's weights. */
type Errors = readonly Readonly<Record<string, number>>[];

describe("families that do not run here", () => {
  test(
    "layers solved from statistics err at most a third as much as rounded ones, at 2 and 3 bits",
    async () => {
      const python = readersPython(), root = place.fresh("families"), list = place.fresh("list.json");
      if (python === undefined) return;
      const families = Object.keys(await runReader(python, SCRIPT, ["draw", root]) as Record<string, number>);
      const bits = [2, 3] as const, group_size = 32, tasks = [];
      for (const family of families) {
        const folder = join(root, family), calibration_data = join(folder, "statistics.safetensors");
        for (const bit_width of bits) {
          const { names, file } = await solved(folder, {
            bit_width,
            group_size,
            solver: "best",
            calibration_data,
          });
          expect([family, names.length > 5]).toEqual([family, true]);
          const rounded = await solved(folder, { bit_width, group_size, solver: "round" });
          tasks.push({ folder, layers: names, files: [file, rounded.file] });
        }
      }
      writeFileSync(list, JSON.stringify(tasks));
      const found = await runReader(python, SCRIPT, ["errors", list]) as Errors[];
      const lines = ["family | bits | layers | median ratio | largest ratio"];
      for (const [i, { layers }] of tasks.entries()) {
        const [best, round] = found[i]!, ratio = (name: string) => best![name]! / round![name]!;
        const sorted = [...layers].sort((one, other) => ratio(one) - ratio(other)), worst = sorted.at(-1)!;
        const family = families[Math.floor(i / bits.length)]!, width = bits[i % bits.length]!;
        const figures = [ratio(sorted[sorted.length >> 1]!), ratio(worst)].map((value) => value.toFixed(3));
        lines.push([family, width, layers.length, ...figures, worst].join(" | "));
      }
      console.log(lines.join("\n"));
      for (const [i, { layers }] of tasks.entries()) {
        const [best, round] = found[i]!;
        expect([lines[i + 1], layers.filter((name) => best![name]! > round![name]! / 3)]).toEqual([
          lines[i + 1],
          [],
        ]);
      }
    },
    300_000,
  );
});
