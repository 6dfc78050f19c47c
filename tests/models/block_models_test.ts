/** LLaDA-MoE and SDAR against an independent implementation: tests/interop/language_models.py. */
import { afterAll, describe, expect, test } from "bun:test";
import { cpSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  forwardCost,
  lladaGenerate,
  loadLladaMoe,
  loadModel,
  loadStoredModel,
  loadSdar,
  type MaskedTransformer,
  modelRequirements,
  sdarGenerate,
} from "../../lib/models/mod.ts";
import { requirementsAt } from "../../lib/models/requirements.ts";
import { openKernels, withThreads } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { openCheckpoint, SafetensorsFile } from "../../lib/tensor/mod.ts";
import { MODELS, rejection, run, workplace } from "../_checkpoints.ts";
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
const withPython = python === undefined ? () => {} : describe;

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

withPython("golden outputs", () => {
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

withPython("quantizing", () => {
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

  test.each([["llada_moe-all", 18], ["sdar", 0]])("%s: statistics are saved, and layers and %i experts solved from them; phases 1 and 2 run", async (name, experts) => {
    const input = join(folder, name), saved = `${place.fresh("saved")}.safetensors`;
    const own = {
      ...{ bit_width: 2, group_size: 16, solver: "best", calibration_data: "self", calibration_samples: 32 },
      ...{ "self_calibration.records": 16, "self_calibration.tokens": 24, "self_calibration.steps": 6 },
    };
    const phases = {
      "thermodynamic.validation.enabled": true,
      "thermodynamic.boundary_smoothing.enabled": true,
      num_time_groups: 2,
    };
    const first = place.fresh("phases");
    await quantizeCheckpoint({
      ...{ input, output: first, kernels, config: configOf({ ...own, ...phases }) },
      saveCalibration: { path: saved, groupMoments: false },
    });
    expect(loadStoredModel(first, kernels).model.timeParameters).toBeDefined();
    const config = configOf({ ...own, calibration_data: saved });
    const { layers } = await quantizeCheckpoint({ input, output: place.fresh(), kernels, config });
    const solved = layers.filter(({ solved }) => solved !== undefined).map(({ name }) => name);
    expect(solved.filter((name) => name.includes("experts")).length).toBe(experts);
    expect(solved.length).toBeGreaterThan(experts);
  });

  test("phase 3 is refused before any work", async () => {
    const config = configOf({ solver: "best", bit_width: 2, calibration_data: "self", "thermodynamic.transition_optimization.enabled": true });
    const output = place.fresh();
    const error = await rejection(quantizeCheckpoint({ input: join(folder, "sdar"), output, kernels, config }));
    expect(error.message).toContain("phase 3 has gradients of Dream, LLaDA and DiT, got sdar");
  });
});

withPython("generation", () => {
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

  test("SDAR with a threshold writes all that is surer at once", () => {
    const model = load(join(folder, "sdar")), { maskToken } = model.config;
    const canvas = new Int32Array(16).fill(maskToken);
    canvas.set([5, 9, 17, 30]);
    const steps = (threshold?: number) => {
      const { trace, sequences } = sdarGenerate(model, canvas, 1, { threshold, trace: true });
      const masks = trace!.map((state) => state.filter((token) => token === maskToken).length);
      return { written: masks.slice(1).map((count, i) => masks[i]! - count).filter((count) => count > 0), sequences };
    };
    expect(steps().written).toEqual(Array(12).fill(1));
    expect(steps(1).written).toEqual(Array(12).fill(1)); // none is surer than certain
    expect(steps(0).written).toEqual([4, 4, 4]);
    expect(steps(1).sequences).toEqual(steps().sequences);
    expect(() => sdarGenerate(model, canvas, 1, { threshold: NaN })).toThrow("threshold");
  });

  test("the command writes from them, and says which options they lack", () => {
    const made = ["sdar", "llada_moe"].map((name) => {
      const path = place.fresh(name);
      cpSync(join(folder, name), path, { recursive: true });
      rmSync(join(path, "golden.safetensors"));
      for (const file of ["tokenizer.json", "tokenizer_config.json"]) {
        cpSync(join(MODELS, "dream-mini", file), join(path, file));
      }
      const config = JSON.parse(readFileSync(join(path, "config.json"), "utf8"));
      const tokens = { mask_token_id: 1, bos_token_id: 2, eos_token_id: 3 };
      writeFileSync(join(path, "config.json"), JSON.stringify({ ...config, ...tokens }));
      return path;
    });
    const outcome = (path: string, ...more: string[]) =>
      run("generate.ts", [path, "--prompt", "47+", "--length", "6", "--json", ...more]);
    for (const path of made) {
      const { code, stdout, stderr } = outcome(path);
      expect([code, code === 0 ? "" : stderr]).toEqual([0, ""]);
      const { tokens, kind } = JSON.parse(stdout) as { tokens: number[]; kind: string };
      expect([tokens.length, tokens.includes(1)]).toEqual([6, false]);
      expect(path).toContain(kind);
    }
    expect(outcome(made[0]!, "--block-length", "2").stderr).toContain("--block-length is not for an SDAR model");
    expect(outcome(made[1]!, "--top-k", "2").stderr).toContain("--top-k is not for a LLaDA-MoE model");
    expect(outcome(made[1]!, "--block-length", "3").code).toBe(0);
    writeFileSync(
      join(made[0]!, "generation_config.json"),
      JSON.stringify({ remasking_strategy: "low_confidence_dynamic", confidence_threshold: 0, block_length: 4 }),
    );
    const { trace } = JSON.parse(outcome(made[0]!, "--trace").stdout) as { trace: string[] };
    const masks = trace.map((text) => [...text].filter((sign) => sign === "░").length);
    expect([...new Set(masks)]).toEqual([6, 5, 1, 0]); // blocks of four: one behind the prompt, four, one
  });

  test("LLaDA-MoE writes as LLaDA does", () => {
    const model = load(join(folder, "llada_moe")), prompt = Int32Array.of(5, 9, 17, 30);
    const { sequences } = lladaGenerate(model, prompt, 1, { generationLength: 8, blockLength: 4 });
    expect(sequences.length).toBe(12);
    expect(sequences.includes(model.config.maskToken)).toBe(false);
  });
});

withPython("costs", () => {
  test("from sizes alone are those of a pass", () => {
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
});
