/** LLaDA-MoE and SDAR against an independent implementation: tests/interop/language_models.py. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import {
  forwardCost,
  lladaGenerate,
  loadLladaMoe,
  loadModel,
  loadSdar,
  type MaskedTransformer,
  modelRequirements,
  sdarGenerate,
} from "../../lib/models/mod.ts";
import { requirementsAt } from "../../lib/models/requirements.ts";
import { openKernels, withThreads } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { openCheckpoint, SafetensorsFile } from "../../lib/tensor/mod.ts";
import { rejection, workplace } from "../_checkpoints.ts";
import { allKernels } from "../_kernels.ts";
import { readersPython, runReader } from "../_readers.ts";
import { configOf } from "../pipeline/_runs.ts";

const kernels = await openKernels(), place = workplace();
afterAll(() => {
  kernels.close();
  place.remove();
});
const python = readersPython();
const folder = place.fresh("golden");
const names = python === undefined
  ? []
  : await runReader(python, "language_models.py", ["make", folder]) as string[];

function golden(name: string): { inputIds: Int32Array; logits: Float32Array } {
  using file = SafetensorsFile.open(join(folder, name, "golden.safetensors"));
  return {
    inputIds: new Int32Array(file.read("input_ids").buffer),
    logits: new Float32Array(file.read("logits").buffer),
  };
}

const load = (path: string) =>
  (path.includes("sdar") ? loadSdar(path, kernels) : loadLladaMoe(path, kernels)) as MaskedTransformer;
const largest = (a: Float32Array, b: Float32Array) =>
  a.reduce((most, value, i) => Math.max(most, Math.abs(value - b[i]!)), 0);

describe.skipIf(python === undefined)("golden outputs", () => {
  for (const name of names) {
    const path = join(folder, name);
    test(`${name}: logits to 1e-4 with every instruction set, whatever the threads`, async () => {
      const { inputIds, logits } = golden(name);
      for (const { kernels } of await allKernels()) {
        const { model } = loadModel(path, kernels);
        const own = (model as MaskedTransformer).forward(inputIds, 2).slice();
        expect(own.length).toBe(logits.length);
        expect(largest(own, logits)).toBeLessThan(1e-4);
        const threaded = loadModel(path, withThreads(kernels, 3)).model as MaskedTransformer;
        expect(threaded.forward(inputIds, 2)).toEqual(own);
      }
    });

    test(`${name}: observed, block by block, and for single rows it gives the same`, () => {
      const { inputIds, logits } = golden(name), model = load(path), { vocabularySize, blocks } = model.config;
      const seen = new Map<string, number>();
      const all = model.forward(inputIds, 2, { observe: ({ name }, _x, rows) => void seen.set(name, rows) }).slice();
      expect(largest(all, logits)).toBeLessThan(1e-4);
      expect([...seen.keys()].sort()).toEqual(model.linearLayers.map(({ name }) => name).sort());
      expect(new Set(seen.values())).toEqual(new Set([inputIds.length]));
      const rows = Int32Array.of(5, 40, 0, 21);
      const some = model.forward(inputIds, 2, { rows }).slice();
      for (const [i, row] of rows.entries()) {
        const part = (of: Float32Array, at: number) => of.slice(at * vocabularySize, (at + 1) * vocabularySize);
        expect(largest(part(some, i), part(logits, row))).toBeLessThan(1e-4);
      }
      const batch = { inputIds, batch: 2 }, hidden = model.start(batch);
      for (let block = 0; block < blocks; block++) model.runBlock(block, batch, hidden, {});
      expect(largest(model.finish(batch, hidden, {}), logits)).toBeLessThan(1e-4);
      expect(requirementsAt(path).matrices.length).toBeGreaterThan(0);
    });
  }

  test("experts without a token read zeros, and others their tokens' rows", () => {
    const model = load(join(folder, "llada_moe")), { inputIds } = golden("llada_moe");
    const used = new Map<string, number>();
    model.forward(inputIds, 2, {
      observe({ name, weights: { cols } }, x, rows) {
        if (!/experts\.\d+\.gate_proj/.test(name)) return;
        const own = Array.from({ length: rows }, (_, i) => x.subarray(i * cols, (i + 1) * cols));
        const block = name.replace(/\.mlp.*/, "");
        used.set(block, (used.get(block) ?? 0) + own.filter((row) => row.some((value) => value !== 0)).length);
      },
    });
    // every position goes through two experts of each block
    expect([...used.values()]).toEqual([2 * inputIds.length, 2 * inputIds.length]);
  });
});

describe.skipIf(python === undefined)("quantizing", () => {
  for (const name of ["sdar", "llada_moe-all"]) {
    test(`${name}: best on the model's own samples beats rounding, and what is written runs`, async () => {
      const input = join(folder, name), config = { bit_width: 2, group_size: 16, calibration_data: "self", calibration_samples: 32 };
      const own = { ...config, "self_calibration.records": 16, "self_calibration.tokens": 24, "self_calibration.steps": 6 };
      const logits = async (overrides: Record<string, unknown>) => {
        const output = place.fresh(name);
        const report = await quantizeCheckpoint({ input, output, kernels, config: configOf(overrides) });
        const { inputIds } = golden(name), { model } = loadModel(output, kernels);
        return { report, output: (model as MaskedTransformer).forward(inputIds, 2).slice() };
      };
      const [solved, rounded] = [await logits({ ...own, solver: "best" }), await logits({ bit_width: 2, group_size: 16, solver: "round" })];
      const power = (values: Float32Array) => values.reduce((sum, value, i) => sum + (value - golden(name).logits[i]!) ** 2, 0);
      expect(power(solved.output)).toBeLessThan(power(rounded.output));
      const quantized = solved.report.layers.filter(({ action }) => action === "quantize");
      expect(quantized.every(({ solved, reason }) => solved !== undefined || /_bits$/.test(reason))).toBe(true);
      const kept = solved.report.layers.filter(({ name }) => /mlp\.(?:gate\.weight|expert_bias)$/.test(name));
      expect(kept.every(({ action }) => action === "keep")).toBe(true);
      expect(kept.length).toBe(name === "sdar" ? 0 : 2);
    });
  }

  test("phase 3 is refused before any work", async () => {
    const config = configOf({ solver: "best", bit_width: 2, calibration_data: "self", "thermodynamic.transition_optimization.enabled": true });
    const output = place.fresh();
    const error = await rejection(quantizeCheckpoint({ input: join(folder, "sdar"), output, kernels, config }));
    expect(error.message).toContain("phase 3 has gradients of Dream, LLaDA and DiT, got sdar");
  });
});

describe.skipIf(python === undefined)("generation", () => {
  test("SDAR writes block after block, the most probable of a block first", () => {
    const model = load(join(folder, "sdar")), { maskToken, vocabularySize } = model.config;
    const canvas = new Int32Array(14).fill(maskToken);
    canvas.set([5, 9, 17, 30, 8, 44]); // the second block of four begins with two tokens
    const { sequences, trace } = sdarGenerate(model, canvas, 1, { trace: true });
    expect(sequences.includes(maskToken)).toBe(false);
    expect([...sequences.subarray(0, 6)]).toEqual([5, 9, 17, 30, 8, 44]);
    // a loop of its own: the prefix up to the block's end, the largest softmax among its masks
    const x = canvas.slice();
    const written: number[] = [];
    for (const [begin, end] of [[6, 8], [8, 12], [12, 14]] as const) {
      for (let step = begin; step < end; step++) {
        const logits = model.forward(x.slice(0, end), 1).slice();
        let best = { place: -1, token: -1, share: -1 };
        for (let place = begin; place < end; place++) {
          if (x[place] !== maskToken) continue;
          const own = Array.from(logits.subarray(place * vocabularySize, (place + 1) * vocabularySize));
          own[maskToken] = -Infinity;
          const top = Math.max(...own), sum = own.reduce((total, value) => total + Math.exp(value - top), 0);
          if (1 / sum > best.share) best = { place, token: own.indexOf(top), share: 1 / sum };
        }
        x[best.place] = best.token;
        written.push(best.place);
      }
    }
    expect(sequences).toEqual(x);
    const orders = trace!.slice(1).map((state, i) => state.findIndex((token, k) => token !== trace![i]![k]));
    expect(orders.filter((place) => place >= 0)).toEqual(written);
    // what follows a block changes nothing in it
    const longer = new Int32Array(22).fill(maskToken);
    longer.set(canvas.subarray(0, 6));
    expect(sdarGenerate(model, longer, 1).sequences.subarray(0, 12)).toEqual(sequences.subarray(0, 12));
  });

  test("SDAR's batch does not change a sequence, at a temperature too; options out of range are refused", () => {
    const model = load(join(folder, "sdar")), { maskToken } = model.config;
    const canvas = new Int32Array(24).fill(maskToken);
    canvas.set([5, 9, 17], 0);
    canvas.set([30, 8, 44], 12);
    const options = { temperature: 1, seed: 4 };
    const both = sdarGenerate(model, canvas, 2, options).sequences;
    expect(sdarGenerate(model, canvas.slice(12), 1, { ...options, firstStream: 1 }).sequences).toEqual(both.slice(12));
    expect(sdarGenerate(model, canvas, 2, { ...options, seed: 5 }).sequences).not.toEqual(both);
    expect(() => sdarGenerate(model, canvas, 2, { steps: 0 })).toThrow("steps");
    expect(() => sdarGenerate(model, canvas, 2, { temperature: -1 })).toThrow("temperature");
  });

  test("LLaDA-MoE writes as LLaDA does", () => {
    const model = load(join(folder, "llada_moe")), prompt = Int32Array.of(5, 9, 17, 30);
    const { sequences } = lladaGenerate(model, prompt, 1, { generationLength: 8, blockLength: 4 });
    expect(sequences.length).toBe(12);
    expect(sequences.includes(model.config.maskToken)).toBe(false);
  });
});

test.skipIf(python === undefined)("costs from sizes alone are those of a pass", () => {
  for (const name of names) {
    const path = join(folder, name), { inputIds } = golden(name);
    using checkpoint = openCheckpoint(path);
    const needs = modelRequirements(checkpoint);
    expect(["sdar", "llada_moe"]).toContain(needs.model.kind);
    const model = load(path);
    expect(model.weightBytes).toBe(needs.weightBytes);
    model.forward(inputIds, 2);
    const cost = forwardCost(needs.model, { batch: 2, tokens: inputIds.length / 2 });
    expect(model.scratchBytes).toBe(cost.activationBytes);
  }
});
