import { afterAll, describe, expect, test } from "bun:test";
import { copyFileSync, cpSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { CalibrationError, FormatError, InterruptedError } from "../../lib/errors.ts";
import { compareMasked } from "../../lib/eval/masked.ts";
import { maskedSequences, readPuzzles } from "../../lib/eval/puzzles.ts";
import { loadDream, loadTokenizer } from "../../lib/models/mod.ts";
import { openKernels, withThreads } from "../../lib/native/mod.ts";
import { quantizeCheckpoint, type QuantizeCheckpointOptions, type RunEvent } from "../../lib/pipeline/mod.ts";
import { loadSolvedLayers, saveSolvedLayer } from "../../lib/solve/solved_layers.ts";
import { fitBudget, type LayerOption, readPlan } from "../../lib/plan/budget.ts";
import {
  contents,
  differences,
  matrix,
  MODELS,
  rejection,
  workplace,
  writeCheckpoint,
  writeTensors,
} from "../_checkpoints.ts";
import { ditCheckpoint } from "../_models.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

const DREAM = join(MODELS, "dream-mini"), DIT = join(MODELS, "glyph-dit");
const DATA = join(DREAM, "calibration.jsonl");

/** Few samples and one candidate: what is promised of the machinery does not need more. */
const QUICK = {
  bit_width: 2,
  group_size: 0,
  solver: "best",
  calibration_data: DATA,
  calibration_samples: 64,
  solver_options: undefined,
  "solver_options.candidates": 1,
};

async function run(
  output: string,
  overrides: Record<string, unknown> = {},
  more: Partial<Pick<QuantizeCheckpointOptions, "resume" | "signal" | "onEvent" | "onProgress" | "input">> =
    {},
) {
  const { solver_options: _, ...quick } = QUICK;
  const { config } = resolveConfig({ overrides: { ...quick, num_threads: 1, ...overrides } });
  return await quantizeCheckpoint({ input: DREAM, output, config, kernels, ...more });
}

describe("calibrated solvers", () => {
  test("at 2 bits best loses a twentieth of rounding's KL on held-out data, or less", async () => {
    const tokenizer = await loadTokenizer(DREAM);
    const full = loadDream(DREAM, withThreads(kernels, 2));
    const puzzles = readPuzzles(join(DREAM, "eval.jsonl")).filter((_, i) => i % 3 === 0);
    const sequences = maskedSequences(full, tokenizer, puzzles, { seed: 11 });
    const klOf = async (name: string, overrides: Record<string, unknown>) => {
      const output = place.fresh(name);
      await run(output, { calibration_samples: 512, num_threads: 2, ...overrides });
      const other = loadDream(output, withThreads(kernels, 2));
      return compareMasked(full, other, sequences, { bins: 1 }).at(-1)!.kl.value;
    };
    for (const groupSize of [0, 32]) {
      const rounded = await klOf(`round-${groupSize}`, { solver: "round", group_size: groupSize });
      const best = await klOf(`best-${groupSize}`, { group_size: groupSize });
      expect(best).toBeLessThan(rounded / 20);
    }
  }, 120_000);

  test("the same bytes for any number of threads, and after a stop while solving", async () => {
    const wanted = place.fresh("one-thread");
    await run(wanted);
    const two = place.fresh("two-threads");
    await run(two, { num_threads: 2 });
    expect(differences(two, wanted)).toEqual([]);

    const stopped = place.fresh("stopped");
    const controller = new AbortController();
    let solved = 0;
    const error = await rejection(run(stopped, {}, {
      signal: controller.signal,
      onProgress: () => {
        if (++solved === 9) controller.abort("SIGINT");
      },
    }));
    expect(error).toBeInstanceOf(InterruptedError);
    const events: RunEvent[] = [];
    await run(stopped, {}, { resume: true, onEvent: (event) => events.push(event) });
    expect(events.map(({ message }) => message).join("\n")).toMatch(/9 of 28 layers were solved before/);
    expect(differences(stopped, wanted)).toEqual([]);
  }, 120_000);

  test("data of another vocabulary, shape or form are refused, and nothing is left behind", async () => {
    const file = (name: string, text: string) => {
      const path = place.fresh(name);
      writeFileSync(path, text);
      return path;
    };
    const cases: [string, RegExp][] = [
      [
        file("letters.jsonl", '{"prompt": "é=", "answer": "1"}\n'),
        /line 1 must be text of the model's vocabulary/,
      ],
      [
        file("tokens.jsonl", '{"input_ids": [1, 2]}\n{"input_ids": [1, 99]}\n'),
        /line 2 .* from 0 to 34, got 99/,
      ],
      [file("broken.jsonl", '{"input_ids": [1, 2'), /line 1 must be JSON/],
      [file("form.jsonl", '{"question": "?"}'), /line 1 must be {"prompt", "answer"}/],
      [file("empty.jsonl", "\n\n"), /must hold records/],
      [place.fresh("absent.jsonl"), /got nothing there/],
    ];
    for (const [data, message] of cases) {
      const output = place.fresh("refused");
      const error = await rejection(run(output, { calibration_data: data }));
      expect(error).toBeInstanceOf(CalibrationError);
      expect(error.message).toMatch(message);
      expect(() => contents(output)).toThrow();
    }
    const tensors = `${place.fresh("tokens")}.safetensors`;
    writeTensors(tensors, { input_ids: matrix(1, 1, Float32Array.of(1)) });
    expect((await rejection(run(place.fresh("refused"), { calibration_data: tensors }))).message).toMatch(
      /I32 or I64/,
    );
    const images = await rejection(
      run(place.fresh("refused"), { calibration_data: tensors }, { input: DIT }),
    );
    expect(images.message).toMatch(/must hold "images"/);
  });

  test("synthetic data say so, and too few inputs are warned of", async () => {
    const events: RunEvent[] = [];
    await run(place.fresh("synthetic"), { calibration_data: "synthetic", calibration_samples: 32 }, {
      onEvent: (event) => events.push(event),
    });
    const text = events.map(({ message }) => message).join("\n");
    expect(text).toMatch(/synthetic sequences .*NOT real data/);
    const one = place.fresh("one.jsonl");
    writeFileSync(one, '{"input_ids": [2, 8, 9, 10]}\n');
    events.length = 0;
    await run(place.fresh("few"), { calibration_data: one, calibration_samples: 32 }, {
      onEvent: (event) => events.push(event),
    });
    expect(events.map(({ message }) => message).join("\n")).toMatch(
      /only 1 records.*at least \d+ different positions, got 4/s,
    );
  });
});

describe("what must not pass unseen", () => {
  test("a solved layer on disk that is not whole is solved again", () => {
    const folder = place.fresh("solved");
    mkdirSync(folder);
    const tensor = {
      rows: 1,
      cols: 16,
      bits: 2,
      groupSize: 0,
      zeroPointKind: "symmetric",
      packed: Uint32Array.of(7),
      scale: Uint16Array.of(0x3c00),
      zeroPoint: undefined,
    } as const;
    const numbers = {
      relativeError: 0,
      gain: 1,
      damping: 0.01,
      deadColumns: 0,
      inputs: 1,
      milliseconds: 1,
      moment: "full",
    };
    saveSolvedLayer(folder, 0, "same", { name: "a.weight", tensor, ...numbers });
    expect(loadSolvedLayers(folder, 0, "same").get("a.weight")?.tensor).toMatchObject({
      packed: tensor.packed,
    });
    expect(loadSolvedLayers(folder, 0, "other").size).toBe(0);
    const path = join(folder, readdirSync(folder)[0]!), whole = readFileSync(path);
    for (const bytes of [whole.subarray(0, -1), whole.subarray(0, 70), whole.subarray(0, 0)]) {
      writeFileSync(path, bytes);
      expect(loadSolvedLayers(folder, 0, "same").size).toBe(0);
    }
    const changed = Uint8Array.from(whole);
    changed[100]! ^= 1;
    writeFileSync(path, changed);
    expect(loadSolvedLayers(folder, 0, "same").size).toBe(0);
  });

  test("the candidate with the least held-out error is taken", async () => {
    for (const seed of [0, 1, 2]) {
      const events: RunEvent[] = [];
      await run(place.fresh("candidates"), { "solver_options.candidates": 3, calibration_seed: seed }, {
        onEvent: (event) => events.push(event),
      });
      const [, list, taken] = /held out, [^:]*: (.*); candidate (\d) taken/.exec(
        events.map(({ message }) => message).join("\n"),
      )!;
      const distances = list!.split(", ").map(Number);
      expect(distances.length).toBe(3);
      expect(Number(taken)).toBe(distances.indexOf(Math.min(...distances)) + 1);
    }
  }, 120_000);

  test("prompts that leave no room, NaN weights and contradicting settings", async () => {
    const long = place.fresh("long.jsonl");
    const limit = loadDream(DREAM, kernels).config.maxTokens;
    writeFileSync(
      long,
      JSON.stringify({ input_ids: new Array(limit + 9).fill(8), prompt_length: limit + 1 }),
    );
    expect((await rejection(run(place.fresh("x"), { calibration_data: long }))).message).toMatch(
      /leave room/,
    );
    expect((await rejection(run(place.fresh("x"), { min_accuracy: 0.9 }))).message).toMatch(/"min_accuracy"/);
    const broken = place.fresh("broken");
    cpSync(DREAM, broken, { recursive: true });
    const name = "model.layers.1.self_attn.v_proj.weight";
    const file = readdirSync(broken).filter((each) =>
      each.endsWith(".safetensors") && each.startsWith("model")
    )
      .map((each) => join(broken, each)).find((path) => readFileSync(path).includes(name))!;
    const bytes = readFileSync(file), headerBytes = Number(bytes.readBigUInt64LE(0));
    const header = JSON.parse(bytes.subarray(8, 8 + headerBytes).toString());
    bytes.writeUInt16LE(0x7fc0, 8 + headerBytes + header[name].data_offsets[0] + 2 * 3);
    writeFileSync(file, bytes);
    const error = await rejection(run(place.fresh("x"), {}, { input: broken }));
    expect(error.message).toContain(`"${name}": weights must be finite, got NaN at row 0, column 3`);
  }, 120_000);
});

describe("bits by budget", () => {
  test("the plan of least cost, found as an exhaustive search finds it", () => {
    const option = (bits: 2 | 3 | 4 | 8, bytes: number, cost: number): LayerOption => ({
      bits,
      groupSize: 0,
      zeroPoint: "real",
      bytes,
      cost,
    });
    const layers = Array.from({ length: 5 }, (_, i) => ({
      name: `layer ${i}`,
      options: [
        option(2, 20 + i, 9 + 3 * i),
        option(3, 31 + 2 * i, 4 + i * i % 3),
        option(4, 40 + i, 2),
        option(8, 83, 0.1 * i),
      ],
    }));
    for (const budget of [115, 150, 187, 240, 400]) {
      let least = Infinity;
      for (let choice = 0; choice < 4 ** 5; choice++) {
        let bytes = 0, cost = 0;
        for (const [i, { options }] of layers.entries()) {
          const picked = options[Math.floor(choice / 4 ** i) % 4]!;
          bytes += picked.bytes;
          cost += picked.cost;
        }
        if (bytes <= budget) least = Math.min(least, cost);
      }
      const found = fitBudget(layers, budget);
      expect(found.bytes).toBeLessThanOrEqual(budget);
      expect(Math.abs(found.cost - least)).toBeLessThan(1e-9);
    }
    expect(() => fitBudget(layers, 100)).toThrow(/smallest forms need 110/);
  });

  test("a budget is kept, its plan saved, and replayed to the same bytes", async () => {
    const output = place.fresh("budget");
    const report = await run(output, { target_bits_per_weight: 2.7, solver: "feedback" });
    expect(report.totals.bitsPerWeight).toBeLessThanOrEqual(2.7);
    expect(report.totals.bitsPerWeight).toBeGreaterThan(2.6);
    expect(new Set(report.layers.map(({ bits }) => bits)).size).toBeGreaterThan(2);
    const plan = join(output, "arrowquant.plan.json");
    const replayed = place.fresh("replayed");
    await run(replayed, { bit_plan: plan, solver: "feedback" });
    const weights = (folder: string) =>
      readFileSync(join(folder, "model-00001-of-00002.safetensors")).toString("base64");
    expect(weights(replayed)).toBe(weights(output));
  }, 120_000);

  test("a budget respects the floors of rules and the bits of layer_bit_widths", async () => {
    const { tensors, config } = ditCheckpoint();
    const input = writeCheckpoint(place.fresh("dit"), tensors, config), output = place.fresh("budget");
    copyFileSync(join(DIT, "scheduler_config.json"), join(input, "scheduler_config.json"));
    const widths = { "attn1\\.to_k": 3, "transformer_blocks.0.ff.net.2": 8 };
    const overrides = {
      calibration_data: "synthetic",
      calibration_samples: 32,
      layer_bit_widths: widths,
      solver: "feedback",
    };
    await run(output, { ...overrides, target_bits_per_weight: 6 }, { input });
    const { layers } = JSON.parse(readFileSync(join(output, "arrowquant.plan.json"), "utf8")) as {
      layers: Record<string, { bits: number }>;
    };
    const bitsOf = (pattern: RegExp) =>
      Object.entries(layers).flatMap(([name, { bits }]) => pattern.test(name) ? [bits] : []);
    expect(new Set(bitsOf(/timestep_embedder/))).toEqual(new Set([8]));
    expect(Math.min(...bitsOf(/norm1\.linear|proj_out_1/))).toBe(4);
    expect(new Set(bitsOf(/to_k/))).toEqual(new Set([3]));
    expect(bitsOf(/blocks\.0\.ff\.net\.2/)).toEqual([8]);
    const error = await rejection(
      run(place.fresh("x"), { ...overrides, target_bits_per_weight: 3 }, { input }),
    );
    expect(error.message).toMatch(/smallest forms need \d+.* hold \d+ of them above 2 bits/);
  }, 120_000);

  test("a budget below the smallest form, and plans that do not fit the model, are refused", async () => {
    const error = await rejection(
      run(place.fresh("small"), { target_bits_per_weight: 2, calibration_samples: 32 }),
    );
    expect(error).toBeInstanceOf(CalibrationError);
    expect(error.message).toMatch(/smallest forms need \d+, 2\.235 bits per weight/);
    const file = (text: string) => {
      const path = place.fresh("plan.json");
      writeFileSync(path, text);
      return path;
    };
    const known = new Set(["a.weight"]);
    const layers = (name: string, bits: number, groupSize: number) =>
      JSON.stringify({ version: 1, layers: { [name]: { bits, group_size: groupSize, zero_point: "real" } } });
    expect(readPlan(file(layers("a.weight", 3, 64)), known).get("a.weight")).toMatchObject({
      bits: 3,
      groupSize: 64,
    });
    expect(() => readPlan(file(layers("b.weight", 3, 64)), known)).toThrow(CalibrationError);
    expect(() => readPlan(file(layers("a.weight", 5, 64)), known)).toThrow(FormatError);
    expect(() => readPlan(file(layers("a.weight", 3, 65)), known)).toThrow(/group_size/);
    expect(() => readPlan(file("{"), known)).toThrow(/must be JSON/);
    expect(() => readPlan(file("null"), known)).toThrow(/version/);
    expect(() => readPlan(file('{"version": 1, "version": 1, "layers": {}}'), known)).toThrow(
      /"version".*twice/,
    );
    expect(() => readPlan(file('{"version": 1, "layers": {"a": {"bits": {"deep": 1}}}}'), known)).toThrow(
      /3 deep/,
    );
    expect(() => readPlan(file('{"version": 1, "layers": [2]}'), known)).toThrow(FormatError);
    expect(() => readPlan(file('{"version": 2, "layers": {}}'), known)).toThrow(/version/);
  });
});
