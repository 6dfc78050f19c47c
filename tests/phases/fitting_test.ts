/** What the gradient refinement has time and memory for. */
import { afterAll, describe, expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { mkdirSync, readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { resolveConfig } from "../../lib/config/mod.ts";
import { InterruptedError } from "../../lib/errors.ts";
import { DitGradients } from "../../lib/models/backward/dit.ts";
import { type RefinableLayers, RefinableLinear } from "../../lib/models/backward/linear.ts";
import { MaskedTransformerGradients } from "../../lib/models/backward/mod.ts";
import { gradientCost, HeldWeights, loadModel, modelConfig } from "../../lib/models/mod.ts";
import { Workspace } from "../../lib/models/layers/workspace.ts";
import { dequantize, groupCount, quantize } from "../../lib/quant/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { loadCalibration } from "../../lib/phases/mod.ts";
import { writeKept } from "../../lib/output/kept_file.ts";
import { keepRefinement, keptRefinement } from "../../lib/phases/kept_refinement.ts";
import { memoryThatFits, parametersOf, whatFits } from "../../lib/phases/fitting.ts";
import { refinePhase } from "../../lib/phases/refinement.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { quantizedByWeights } from "../../lib/solve/by_weights.ts";
import { planQuantization } from "../../lib/plan/plan.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { MODELS, rejection, ROOT, workplace } from "../_checkpoints.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

test("a refinement's state of an older build, all in one file, is not gone on with", () => {
  const folder = place.fresh(), own = { folder, identity: "one" };
  mkdirSync(folder);
  const fits = { iterations: 3, batches: 1, stepSeconds: 1, lookSeconds: 1 };
  const arrays = [Float32Array.of(1), Float32Array.of(2)];
  writeKept(join(folder, "solved-refinement"), "one", { header: { fits, progress: "{}" }, arrays });
  expect(keptRefinement(own)).toBeUndefined();
  keepRefinement(own, { fits, state: { progress: "{}", pieces: arrays } });
  expect([...keptRefinement(own)!.state.pieces]).toEqual([Float32Array.of(1, 2)]);
});

describe("the time of a refinement", () => {
  const work = { passSeconds: 2, batches: 30, iterations: 100 };

  test("that suffices changes nothing", () => {
    expect(whatFits({ ...work, seconds: Infinity })).toMatchObject({ iterations: 100, batches: 30 });
    // Four looks of 60 s are a third of 720 s; 100 steps of 6 s fit beside them.
    expect(whatFits({ ...work, seconds: 840 })).toMatchObject({
      iterations: 100,
      batches: 30,
      stepSeconds: 6,
      lookSeconds: 60,
    });
  });

  test("takes held-out samples away first, then steps", () => {
    // A third of 240 s are 80 s: four looks of 20 s, at 10 batches; 160 s are left for steps of 6 s.
    expect(whatFits({ ...work, seconds: 240 })).toMatchObject({
      iterations: 26,
      batches: 10,
      lookSeconds: 20,
    });
    // Four looks at one batch take 8 s: a step of 6 s is left.
    expect(whatFits({ ...work, seconds: 14 })).toMatchObject({ iterations: 1, batches: 1 });
  });

  test("that does not suffice for a step leaves it out, unless it would be over in a moment", () => {
    expect(whatFits({ ...work, seconds: 13 }).iterations).toBe(0);
    const short = whatFits({ passSeconds: 0.01, batches: 30, iterations: 100, seconds: 0.001 });
    expect(short).toMatchObject({ iterations: 1, batches: 30 });
  });
});

describe("the memory of a refinement", () => {
  test("does not grow with a large head: its input's gradient is made of some rows at a time", () => {
    const rows = 2 ** 16 + 3, cols = 260, tokens = 2, workspace = new Workspace();
    const data = Float32Array.from({ length: rows * cols }, (_, i) => (i * 7919 % 101 - 50) / 64);
    const dy = Float32Array.from({ length: tokens * rows }, (_, i) => (i * 104729 % 103 - 51) / 64);
    const plain = { rows, cols, dtype: "F32", data } as const;
    const packed = quantize(kernels, plain, rows, cols, {
      bits: 8,
      groupSize: 0,
      zeroPoint: "real",
      solver: "round",
    });
    for (const weights of [plain, packed]) {
      const values = weights === plain ? data : dequantize(kernels, packed, "F32");
      const dx = new Float32Array(tokens * cols);
      const none = { scales: false, zeroPoints: false, biases: false, timeGroups: 0 };
      const layer = new RefinableLinear({ name: "head.weight", weights, bias: undefined }, none);
      layer.backwardInput({ kernels, workspace } as RefinableLayers, dy, tokens, dx);
      for (let t = 0; t < tokens; t++) {
        const sums = new Float64Array(cols);
        for (let row = 0; row < rows; row++) {
          const own = dy[t * rows + row]!;
          for (let col = 0; col < cols; col++) sums[col]! += own * values[row * cols + col]!;
        }
        for (let col = 0; col < cols; col++) expect(dx[t * cols + col]).toBeCloseTo(sums[col]!, 1);
      }
    }
    // Two forms of 2²⁴ weights, not of all.
    expect(workspace.bytes).toBeLessThan(2 * 4 * 2 ** 24 + 4 * tokens * rows + 2 ** 20);
  });

  for (const name of ["dream-mini", "glyph-dit"]) {
    test(`is foreseen: ${name}`, async () => {
      const output = place.fresh(), input = join(MODELS, name);
      const { config } = resolveConfig({ overrides: { solver: "round", bit_width: 4 } });
      await quantizeCheckpoint({ input, output, config, kernels });
      const { kind, model } = loadModel(output, kernels), batch = 3, tokens = 64;
      using checkpoint = openCheckpoint(output);
      const rows = Int32Array.from({ length: batch * tokens / 2 }, (_, i) => 2 * i);
      const cost = gradientCost(modelConfig(checkpoint), { batch, tokens, rows: rows.length });
      for (const recompute of [false, true]) {
        let bytes: number;
        if (kind === "dit") {
          const gradients = new DitGradients(model, { recompute });
          const samples = new Float32Array(batch * model.imageElements);
          const { length } = gradients.forward(samples, Array(batch).fill(3), Array(batch).fill(1));
          gradients.backward(new Float32Array(length));
          bytes = gradients.scratchBytes;
        } else {
          const gradients = new MaskedTransformerGradients(model, { recompute });
          const { length } = gradients.forward(new Int32Array(batch * tokens), batch, rows);
          gradients.backward(new Float32Array(length));
          bytes = gradients.scratchBytes;
        }
        const foreseen = recompute ? cost.recomputedBytes : cost.scratchBytes;
        expect(foreseen / bytes).toBeGreaterThan(0.95);
        expect(foreseen / bytes).toBeLessThan(1.3);
      }
    });
  }

  test("is that of a block where no more is allowed, with the same result", async () => {
    const input = join(MODELS, "dream-mini");
    using checkpoint = openCheckpoint(input);
    const { config } = resolveConfig({ overrides: { solver: "round", bit_width: 2 } });
    const calibrated = await loadCalibration(loadModel(input, kernels), {
      source: "synthetic",
      samples: 32,
      seed: 1,
    });
    const { rows } = planQuantization(checkpoint, config);
    const packed = quantizedByWeights(calibrated.model, rows.filter(({ action }) => action === "quantize"), {
      ...config,
      solver: "round",
    }, kernels);
    const largest = Math.max(...[...packed.values()].map(({ rows, cols }) => rows * cols * 4));
    const held = new HeldWeights(largest), messages: string[] = [];
    const context = { checkpoint, calibrated, kernels, source: "synthetic", seed: 1 };
    const settings = { maxIterations: 3 };
    const refine = async (more: object) =>
      (await refinePhase({ ...context, ...more }, packed, settings, undefined))!.report;
    const free = await refine({});
    const folder = place.fresh();
    mkdirSync(folder);
    const bound = { held, gradientBytes: 0, place: { folder, identity: "one", fileNumbers: 1000 } };
    // Stopped behind its second look, it goes on to the same end; a lost file begins it again.
    const stopped = async (step: number, how: object = bound) => {
      const steps: number[] = [];
      const onStep = (_phase: string, done: number) => {
        steps.push(done);
        if (done === step) throw new InterruptedError("Stopped by SIGINT", "SIGINT");
      };
      expect(await rejection(refine({ ...how, onStep }))).toBeInstanceOf(InterruptedError);
      return steps;
    };
    expect(await stopped(2)).toEqual([0, 1, 2]);
    expect(readdirSync(folder).filter((name) => name.includes("refinement-")).length).toBeGreaterThan(10);
    expect(await stopped(2)).toEqual([2]);
    const [part] = readdirSync(folder).filter((name) => name.includes("refinement-"));
    rmSync(join(folder, part!));
    expect(await stopped(2)).toEqual([0, 1, 2]);
    // What was kept by blocks is gone on with in memory, and the other way round.
    const inMemory = await refine({ place: bound.place });
    expect([inMemory.losses.total, inMemory.layers]).toEqual([free.losses.total, free.layers]);
    expect(inMemory.parameterBytes).toBe(free.parameterBytes);
    for (const name of readdirSync(folder)) rmSync(join(folder, name));
    expect(await stopped(2, { place: bound.place })).toEqual([0, 1, 2]);
    const blocks = await refine({
      ...bound,
      onPlan: (message: string) => messages.push(message),
    });
    expect(held.bytes).toBeLessThanOrEqual(largest);
    expect(held.bytesRead).toBeGreaterThan(0);
    expect(blocks.scratchBytes).toBeLessThan(free.scratchBytes);
    expect(blocks.parameterBytes).toBeLessThan(free.parameterBytes / 2);
    expect([blocks.losses.total, blocks.best, blocks.layers]).toEqual([
      free.losses.total,
      free.best,
      free.layers,
    ]);
    expect(messages[0]).toStartWith("gradient refinement goes on from its last look");
    expect(messages[1]).toMatch(
      /of one block at a time, which is run again on the way back\), .* of parameters \(of one block at a time, of .* in the work folder\)$/,
    );
    messages.length = 0;
    await refine({ onPlan: (message: string) => messages.push(message) });
    expect(messages[0]).toMatch(
      /^gradient refinement begins: about .* a step of \d+ sequences and .* held-out samples; all 3 steps are expected/,
    );
    expect(messages[1]).toMatch(/of a step's values \(of all blocks\), .* of parameters \(of all blocks\)$/);
    expect(readdirSync(folder).some((name) => name.endsWith(".parameters"))).toBe(false);
  });

  test("of an image model is that of a block with the same result, too", async () => {
    const input = join(MODELS, "glyph-dit"), folder = place.fresh();
    mkdirSync(folder);
    using checkpoint = openCheckpoint(input);
    const { config } = resolveConfig({ overrides: { solver: "round", bit_width: 2 } });
    const source = join(input, "calibration_images.safetensors");
    const calibrated = await loadCalibration(loadModel(input, kernels), { source, samples: 16, seed: 1 });
    const rows = planQuantization(checkpoint, config).rows.filter(({ action }) => action === "quantize");
    const packed = quantizedByWeights(calibrated.model, rows, { ...config, solver: "round" }, kernels);
    const refine = async (more: object) => {
      const context = { checkpoint, calibrated, kernels, source, seed: 1, ...more };
      return (await refinePhase(context, packed, { maxIterations: 2 }, undefined))!.report;
    };
    const free = await refine({}),
      own = await refine({ gradientBytes: 0, place: { folder, identity: "one" } });
    expect([own.layers, own.losses, own.best]).toEqual([free.layers, free.losses, free.best]);
    expect(own.kept).toBe(true);
    expect(own.parameterBytes).toBeLessThan(free.parameterBytes / 2);
    expect(own.scratchBytes).toBeLessThan(free.scratchBytes / 2);
  });

  test("at the size of Dream 7B is that of docs/phases.md", () => {
    const folder = place.fresh();
    const made = spawnSync(process.execPath, [
      ...["run", "scripts/make_checkpoint.ts", folder, "--layers", "28", "--vocabulary", "152064"],
      "--headers-only",
    ], { cwd: ROOT, encoding: "utf8" });
    expect([made.status, made.stderr]).toEqual([0, ""]);
    using checkpoint = openCheckpoint(folder);
    const cost = gradientCost(modelConfig(checkpoint), { batch: 9, tokens: 128 });
    const { config } = resolveConfig({ overrides: { bit_width: 2, group_size: 64, solver: "round" } });
    const layers = planQuantization(checkpoint, config).rows.flatMap(({ name, action, shape, groupSize }) => {
      if (action !== "quantize" || name.includes("embed")) return [];
      const block = /layers\.(\d+)/.exec(name)?.[1], [rows, cols] = shape as [number, number];
      const perRow = Number(checkpoint.tensors.has(name.replace(/weight$/, "bias")));
      const groups = groupCount(cols, groupSize!);
      return [parametersOf(block === undefined ? undefined : +block, { rows, groups, isReal: true, perRow })];
    });
    expect(layers).toHaveLength(28 * 7 + 1);
    const gigabytes = (bytes: number) => (bytes / 1e9).toFixed(1);
    const whole = memoryThatFits(cost, layers, Infinity), own = memoryThatFits(cost, layers, 3e9);
    expect([whole.heldBytes, whole.stepBytes].map(gigabytes)).toEqual(["6.2", "12.3"]);
    expect([own.heldBytes, own.stepBytes].map(gigabytes)).toEqual(["0.2", "2.9"]);
  });

  test("is all or that of the block with most parameters, as the limit allows", () => {
    const cost = { scratchBytes: 5000, recomputedBytes: 900 };
    const layers = [[0, 10], [1, 20], [1, 10], [2, 20]].map(([block, parameters]) => {
      return { block, parameters: parameters!, longest: 5 };
    });
    expect(memoryThatFits(cost, layers, 5000)).toEqual({
      ...{ recomputes: false, stepBytes: 5000, parameterBytes: 28 * 60, heldBytes: 28 * 60 },
    });
    expect(memoryThatFits(cost, layers, 1679)).toMatchObject({
      ...{ recomputes: true, stepBytes: 900, parameterBytes: 28 * 60, heldBytes: 28 * 30 },
    });
    // A head's arrays that are used together are in memory, not all that it has.
    const head = { block: undefined, parameters: 100, longest: 50 };
    expect(memoryThatFits(cost, [...layers, head], 100).heldBytes).toBe(6 * 4 * 50);
  });
});
