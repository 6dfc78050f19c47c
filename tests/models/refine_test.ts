import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { maskedSequences, PUZZLE_TOKENS, readPuzzles } from "../../lib/eval/puzzles.ts";
import {
  type DitBatch,
  type MaskedBatch,
  refineDit,
  refineMaskedTransformer,
  type RefinementReport,
  timeBiasesOf,
} from "../../lib/models/backward/refine.ts";
import { loadDit, loadDream, loadTokenizer } from "../../lib/models/mod.ts";
import { openKernels, withThreads } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { PagedFloats } from "../../lib/output/paged_floats.ts";
import type { OneLevelTensor } from "../../lib/quant/mod.ts";
import { tokenKl } from "../../lib/thermo/masked_transition.ts";
import { equalTimeGroups, maskRatioAxis, TimeParameters } from "../../lib/time/mod.ts";
import { MODELS, workplace } from "../_checkpoints.ts";
import { gaussians, randomStream } from "../_kernels.ts";
import { ditCheckpoint, dreamCheckpoint, SMALL_IMAGE, SMALL_LANGUAGE, store } from "../_models.ts";

const kernels = await openKernels({ threads: 1 });
const place = workplace();
afterAll(() => {
  kernels.close();
  place.remove();
});

async function quantized(input: string, overrides: Record<string, unknown>): Promise<string> {
  const output = place.fresh();
  await quantizeCheckpoint({ input, output, config: resolveConfig({ overrides: { solver: "clip", ...overrides } }).config, kernels });
  return output;
}

/** Load options that put refined parameters in place of a checkpoint's. */
const replacing = ({ layers }: RefinementReport) => ({
  weights: new Map(layers.map(({ name, weights }) => [name, weights])),
  biases: new Map(
    layers.flatMap(({ name, bias }) => bias === undefined ? [] : [[name.replace(/weight$/, "bias"), bias]]),
  ),
});

const dreamTokenizer = await loadTokenizer(join(MODELS, "dream-mini"));
const dreamFolder = await quantized(join(MODELS, "dream-mini"), {
  bit_width: 2,
  group_size: 0,
  solver: "clip",
});
const ditFolder = store(place.fresh(), ditCheckpoint());
const ditPacked = await quantized(ditFolder, { bit_width: 2, group_size: 16 });

describe("dream-mini at 2 bits", () => {
  const path = join(MODELS, "dream-mini");
  const full = loadDream(path, withThreads(kernels, 2));
  const load = (threads = 2, options = {}) => loadDream(dreamFolder, withThreads(kernels, threads), options);
  const batches = (file: string, seed: number, count: number): MaskedBatch[] => {
    const sequences = maskedSequences(full, dreamTokenizer, readPuzzles(join(path, file)), {
      seed,
      repeats: 1,
    });
    return Array.from({ length: count }, (_, b) => {
      const part = Array.from({ length: 32 }, (_, i) => sequences[(b * 32 + i) * 307 % sequences.length]!);
      const inputIds = new Int32Array(32 * PUZZLE_TOKENS);
      for (const [i, { tokens }] of part.entries()) inputIds.set(tokens, i * PUZZLE_TOKENS);
      const rows = part.flatMap(({ places }, i) => places.map((place) => i * PUZZLE_TOKENS + place - 1));
      return { inputIds, batch: 32, rows: Int32Array.from(rows) };
    });
  };
  const data = {
    train: batches("calibration.jsonl", 1, 20),
    heldOut: batches("calibration.jsonl", 2, 2),
  };
  const unseen = batches("eval.jsonl", 3, 4);
  const options = {
    learningRate: 0.02,
    maxIterations: 40,
    convergenceThreshold: 0,
    validateEvery: 20,
  };
  const klOf = (model: ReturnType<typeof load>) => {
    let sum = 0, count = 0;
    for (const batch of unseen) {
      const { inputIds, rows, attentionMask } = batch;
      const wanted = full.forward(inputIds, 32, { rows, attentionMask }).slice();
      const got = model.forward(inputIds, 32, { rows, attentionMask });
      const kl = tokenKl(wanted, got, full.config);
      sum += kl.reduce((a, b) => a + b, 0);
      count += kl.length;
    }
    return sum / count;
  };

  test("forty steps take most of the step KL away, on prompts never seen, and touch no code", () => {
    const model = load();
    const before = klOf(model);
    const codes = model.parts.blocks.map(({ feedForward }) => feedForward!).map(({ up }) => "packed" in up.weights && up.weights.packed.slice());
    const report = refineMaskedTransformer(model, full, data, options);
    expect([report.kept, report.diverged, report.iterations]).toEqual([true, false, 40]);
    expect(report.heldOutAfter).toBeLessThan(0.25 * report.heldOutBefore);
    expect(klOf(model)).toBe(before); // neither model is changed
    const refined = load(2, replacing(report));
    expect(klOf(refined)).toBeLessThan(0.25 * before);
    expect(refined.parts.blocks.map(({ feedForward }) => feedForward!).map(({ up }) => "packed" in up.weights && up.weights.packed)).toEqual(codes);
    expect(report.parameters).toBe(
      report.layers.reduce(
        (sum, { weights, bias }) => sum + (weights as OneLevelTensor).scale.length * 2 + (bias?.length ?? 0),
        0,
      ),
    );
  });

  test("a temperature is of the gradients alone: what is held out is the step KL, and falls as well", () => {
    const plain = refineMaskedTransformer(load(), full, data, options);
    const tempered = refineMaskedTransformer(load(), full, data, { ...options, temperature: 3 });
    expect(tempered.heldOutBefore).toBe(plain.heldOutBefore);
    expect(tempered.losses.total[0]).not.toBe(plain.losses.total[0]);
    expect(tempered.heldOutAfter).toBeLessThan(0.25 * tempered.heldOutBefore);
  });

  test("runs are the same to the bit, for any number of threads, with or without recomputing", () => {
    const few = { ...options, maxIterations: 5, validateEvery: 5 };
    const first = refineMaskedTransformer(load(), full, data, few);
    const second = refineMaskedTransformer(load(1), full, data, { ...few, recompute: true });
    expect(second.layers).toEqual(first.layers);
    expect(second.losses.total).toEqual(first.losses.total);
    expect(second.scratchBytes).toBeLessThan(first.scratchBytes);
  });

  test("a refinement that only makes it worse is not kept", () => {
    const report = refineMaskedTransformer(load(), full, data, {
      ...options,
      learningRate: 50,
      maxIterations: 10,
    });
    expect([report.backOffs > 0, report.kept, report.layers]).toEqual([true, false, []]);
    expect(report.heldOutAfter).toBe(report.heldOutBefore);
    expect(report.reason).toContain("diverged");
  });

  test("biases by time group: the refined model's own runtime finds the loss that the refinement reports", () => {
    const timeGroups = equalTimeGroups(maskRatioAxis(10), 4);
    const timed = (batches: readonly MaskedBatch[]) =>
      batches.map((batch, b) => ({
        ...batch,
        times: Array.from({ length: 32 }, (_, i) => (i + b % 2 + 1) / 33),
      }));
    const few = { ...options, maxIterations: 10, validateEvery: 5, timeGroups };
    const all = { train: timed(data.train), heldOut: timed(data.heldOut) };
    const report = refineMaskedTransformer(load(), full, all, few);
    expect(report.kept).toBe(true);
    const timeParameters = new TimeParameters(timeGroups, timeBiasesOf(report.layers), "f");
    expect(timeParameters.layers.size).toBe(report.layers.length);
    const model = loadDream(dreamFolder, kernels, { timeParameters, ...replacing(report) });
    let sum = 0;
    for (const batch of all.heldOut) {
      const { inputIds, rows, attentionMask } = batch;
      const wanted = full.forward(inputIds, 32, { rows, attentionMask }).slice();
      const kl = tokenKl(
        wanted,
        model.forward(inputIds, 32, { rows, attentionMask, t: batch.times }),
        full.config,
      );
      sum += kl.reduce((a, b) => a + b, 0) / kl.length / all.heldOut.length;
    }
    expect(sum).toBeCloseTo(report.heldOutAfter, 5);

    // The prior holds groups together.
    const spread = (report: RefinementReport) =>
      report.layers.reduce((sum, { timeBias, weights: { rows } }) => {
        for (let i = rows; i < timeBias!.length; i++) sum += (timeBias![i]! - timeBias![i - rows]!) ** 2;
        return sum;
      }, 0);
    const held = refineMaskedTransformer(load(), full, all, { ...few, markovWeight: 100 });
    expect(held.kept).toBe(true);
    expect(spread(held)).toBeLessThan(0.2 * spread(report));
    // The Markov term is 0 while all groups are alike, and without a weight.
    expect([held.losses.markov[0], report.losses.markov.every((loss) => loss === 0)]).toEqual([0, true]);
    expect(held.losses.markov.slice(1).every((loss) => loss > 0)).toBe(true);
    expect(() => refineMaskedTransformer(load(), full, data, few)).toThrow(
      "every one of 32 items must have a time",
    );
    expect(() => refineMaskedTransformer(load(), full, all, { ...few, markovWeight: -1 })).toThrow(
      "markovWeight",
    );
  });

  test("the entropy term begins at its weight and falls to 0; the total is the sum of the terms", () => {
    const few = { ...options, maxIterations: 4, validateEvery: 4 };
    const { losses } = refineMaskedTransformer(load(), full, data, { ...few, entropyWeight: 0.5 });
    const { quantization, markov, entropy, total } = losses;
    // Relative to the first loss: at most τ ln 4 with 4 codes, at least a tenth of that at half a step
    // squared.
    const most = (iteration: number) => 0.5 * (1 - iteration / 4) * quantization[0]! * Math.log(4);
    for (const [i, loss] of entropy.entries()) {
      expect([-loss > 0.1 * most(i), -loss < most(i)]).toEqual([true, true]);
      expect(total[i]).toBe(quantization[i]! + markov[i]! + loss);
    }
    const plain = refineMaskedTransformer(load(), full, data, few).losses;
    expect(plain.entropy).toEqual([0, 0, 0, 0]);
    expect(plain.quantization[0]).toBe(quantization[0]!);
    expect(plain.quantization[1]).not.toBe(quantization[1]!); // its gradient moved scales or zero points
    expect(() => refineMaskedTransformer(load(), full, data, { ...few, entropyWeight: 101 })).toThrow(
      "entropyWeight must lie in [0, 100], got 101",
    );
  });

  test("parts can be left alone; weights count", () => {
    const few = { ...options, maxIterations: 2 };
    const report = refineMaskedTransformer(load(), full, data, {
      ...few,
      parts: { zeroPoints: false, biases: false },
    });
    const original = new Map(load().parts.blocks.map(({ feedForward }) => feedForward!).map(({ up }) => [up.name, up.weights]));
    for (const { name, weights } of report.layers) {
      const before = original.get(name);
      if (before === undefined || !("packed" in before) || before.scaleBits !== undefined) continue;
      expect((weights as OneLevelTensor).zeroPoint).toEqual(before.zeroPoint);
    }
    const [batch] = data.train;
    const weights = Array.from(batch!.rows, (_, i) => i % 2);
    const weighted = refineMaskedTransformer(load(), full, { ...data, train: [{ ...batch!, weights }] }, few);
    const plain = refineMaskedTransformer(load(), full, { ...data, train: [batch!] }, few);
    expect(weighted.losses.total[0]).not.toBe(plain.losses.total[0]);
  });

  test("bad input", () => {
    expect(() => refineMaskedTransformer(load(), full, { train: [], heldOut: [] }, options)).toThrow(
      "there must be batches to train on and held out, got 0 and 0",
    );
    expect(() => refineMaskedTransformer(full, full, data, options)).toThrow(
      "it must have packed layers with something to refine",
    );
    const [batch] = data.train;
    for (const weights of [[1], Array.from(batch!.rows, () => 0), Array.from(batch!.rows, () => NaN)]) {
      expect(() =>
        refineMaskedTransformer(load(), full, { ...data, train: [{ ...batch!, weights }] }, options)
      )
        .toThrow("a batch must have");
    }
    expect(() => refineMaskedTransformer(load(), full, data, { ...options, learningRate: -1 })).toThrow(
      "learningRate",
    );
  });
});

describe("by blocks", () => {
  const options = { learningRate: 0.001, maxIterations: 4, convergenceThreshold: 0, validateEvery: 1 };
  const tokens = 8, batch = 2, rows = Int32Array.of(1, 3, 4, 9, 14);
  const batches = (seed: number, count: number): MaskedBatch[] =>
    Array.from({ length: count }, (_, b) => {
      const random = randomStream(seed + b);
      return { inputIds: Int32Array.from({ length: batch * tokens }, () => Math.floor(50 * random())), batch, rows };
    });
  // The same, so that a step surely helps.
  const data = { train: batches(1, 1), heldOut: batches(1, 1) };

  test("memory does not grow with their number, and the result is that of all at once", async () => {
    const results = [];
    for (const blocks of [3, 9]) {
      const input = store(place.fresh(), dreamCheckpoint({ ...SMALL_LANGUAGE, blocks }));
      const packed = await quantized(input, { bit_width: 2, group_size: 16 });
      const refine = (more: object) =>
        refineMaskedTransformer(loadDream(packed, kernels), loadDream(input, kernels), data, { ...options, ...more });
      const whole = refine({});
      using memory = new PagedFloats({ memoryBytes: 0, path: place.fresh() });
      const own = refine({ memory, recompute: true });
      expect([own.layers, own.losses, own.best]).toEqual([whole.layers, whole.losses, whole.best]);
      expect([own.kept, own.layers.length]).toEqual([true, 7 * blocks]);
      // A value, its gradient, its unit and the optimizer's four.
      expect(whole.parameterBytes).toBe(28 * whole.parameters);
      expect(memory.fileBytes).toBe(28 * own.parameters);
      results.push({ blocks, own, whole });
    }
    const [few, many] = results as [typeof results[0], typeof results[0]];
    expect(many.own.parameterBytes).toBe(few.own.parameterBytes);
    expect(many.own.parameterBytes).toBeLessThan(many.whole.parameterBytes / 9);
    // What blocks read is kept of each, their values of one.
    expect(many.own.scratchBytes - few.own.scratchBytes).toBe(6 * 4 * batch * tokens * SMALL_LANGUAGE.width);
    expect(many.whole.scratchBytes - few.whole.scratchBytes).toBeGreaterThan(
      5 * (many.own.scratchBytes - few.own.scratchBytes),
    );
  });
});

describe("a small DiT with a learned variance", () => {
  const full = loadDit(ditFolder, kernels), elements = 3 * 8 * 8;
  const batches = (seed: number, count: number): DitBatch[] =>
    Array.from({ length: count }, (_, b) => ({
      samples: gaussians(seed + b, 4 * elements),
      timesteps: [0, 300, 600, 999],
      labels: [0, 1, SMALL_IMAGE.classes, 3],
      weights: [1, 1, 2, 0.5],
      varianceWeights: [0.1, 0.1, 0.1, 0.1],
    }));
  const data = { train: batches(100, 6), heldOut: batches(200, 2) };
  const options = { learningRate: 0.02, maxIterations: 20, convergenceThreshold: 0, validateEvery: 10 };

  test("gets nearer to full precision on images never seen", () => {
    const model = loadDit(ditPacked, kernels);
    const errorOf = (model: ReturnType<typeof loadDit>) => {
      const [{ samples, timesteps, labels }] = batches(300, 1) as [DitBatch];
      const wanted = full.forward(samples, timesteps, labels).slice();
      return model.forward(samples, timesteps, labels).reduce((sum, v, i) => sum + (v - wanted[i]!) ** 2, 0);
    };
    const before = errorOf(model);
    const report = refineDit(model, full, data, options);
    expect(report.heldOutAfter).toBeLessThan(0.7 * report.heldOutBefore);
    expect(errorOf(loadDit(ditPacked, kernels, replacing(report)))).toBeLessThan(0.7 * before);
  });

  test("the variance's weights must be there, and weights must be numbers", () => {
    const model = loadDit(ditPacked, kernels);
    const without = data.train.map(({ varianceWeights: _, ...batch }) => batch);
    expect(() => refineDit(model, full, { ...data, train: without }, options)).toThrow(
      "batches must have varianceWeights for a learned variance",
    );
    const bad = data.train.map((batch) => ({ ...batch, weights: [1, 1, 1, NaN] }));
    expect(() => refineDit(model, full, { ...data, train: bad }, options)).toThrow(
      "weights must be 4 finite",
    );
  });
});
