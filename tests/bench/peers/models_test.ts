import { afterAll, describe, expect, test } from "bun:test";
import { cpSync, rmSync } from "node:fs";
import { join } from "node:path";
import { paretoFront } from "../../../lib/analysis/tables.ts";
import { CheckpointError } from "../../../lib/errors.ts";
import { environmentOf } from "../../../lib/eval/environment.ts";
import { calibrationOf, collectInputs, hasPositionWeights } from "../../../lib/bench/peers/calibration.ts";
import { methodContender, pipelineContender } from "../../../lib/bench/peers/contender.ts";
import { gptq } from "../../../lib/bench/peers/gptq.ts";
import type { LayerInputs } from "../../../lib/bench/peers/method.ts";
import {
  type QuantizedModel,
  quantizeModel,
  type QuantizeModelOptions,
  targetOf,
} from "../../../lib/bench/peers/quantized_model.ts";
import { ReplacedCheckpoint } from "../../../lib/bench/peers/replaced_checkpoint.ts";
import { comparisonSuite, PEERS, peersSuite } from "../../../lib/bench/peers/suite.ts";
import { yardstickOf } from "../../../lib/eval/yardstick.ts";
import { formatReport } from "../../../lib/bench/report.ts";
import type { BenchContext, Suite, SuiteReport } from "../../../lib/bench/suite.ts";
import { modelFrom } from "../../../lib/models/mod.ts";
import { openKernels, withThreads } from "../../../lib/native/mod.ts";
import { openCheckpoint } from "../../../lib/tensor/mod.ts";
import { parseBenchArguments } from "../../../scripts/bench.ts";
import { MODELS, rejection, workplace } from "../../_checkpoints.ts";
import { ditCheckpoint, dreamCheckpoint, SMALL_IMAGE, store } from "../../_models.ts";
import { relativeError } from "../../_reference.ts";
import { thrown } from "../../tensor/_files.ts";
import { ours } from "./_problems.ts";

const DREAM = join(MODELS, "dream-mini"), GLYPHS = join(MODELS, "glyph-dit");
const place = workplace();
const kernels = await openKernels();
const checkpoint = openCheckpoint(DREAM);
const full = modelFrom(checkpoint, withThreads(kernels, 2));
const target = await targetOf({ path: DREAM, checkpoint, full, kernels });
const { layers, data } = target, calibrated = data.by_role;
const inputs = await target.inputsOf("by_role", layers);
afterAll(() => {
  checkpoint.close();
  kernels.close();
  place.remove();
});

function quantized(made: Awaited<ReturnType<typeof quantizeModel>>): QuantizedModel {
  if ("unsupported" in made) throw new Error(made.unsupported);
  return made;
}

describe("second moments", () => {
  for (const positions of ["by_role", "alike"] as const) {
    test(`are the mean of x xᵀ over every position of the pipeline's data, ${positions}`, async () => {
      const name = "model.layers.2.mlp.down_proj.weight";
      const { cols, secondMoment } = (await target.inputsOf(positions, layers)).get(name)!;
      expect([cols, secondMoment.length]).toEqual([160, 160 * 160]);
      if (calibrated.kind !== "sequences") throw new Error("not a language model");
      const checked = Array.from({ length: 10 }, (_, i) => 16 * i + i % 7); // rows of the moment
      const sum = new Float64Array(checked.length * cols);
      let total = 0, samples = 0;
      for (const { batch, weights } of calibrated.data.fit) {
        samples += batch.batch;
        calibrated.model.forward(batch.inputIds, batch.batch, {
          observe: (layer, x, tokens) => {
            if (layer.name !== name) return;
            expect(tokens).toBe(weights.length);
            for (let t = 0; t < tokens; t++) {
              const weight = positions === "alike" ? 1 : weights[t]!;
              total += weight;
              for (const [i, row] of checked.entries()) {
                const scaled = weight * x[t * cols + row]!;
                for (let j = 0; j < cols; j++) sum[i * cols + j]! += scaled * x[t * cols + j]!;
              }
            }
          },
        });
      }
      expect(samples).toBe(512);
      // Sums of 18,432 products in float32, each element's in the order of positions.
      const rows = checked.flatMap((row) => [...secondMoment.subarray(row * cols, (row + 1) * cols)]);
      expect(relativeError(Float32Array.from(rows), sum.map((value) => value / total))).toBeLessThan(5e-5);
    });
  }

  test("count positions as the pipeline does, or all alike", () => {
    expect(hasPositionWeights(calibrated)).toBe(true);
    expect(hasPositionWeights(data.alike)).toBe(false);
    const weights = calibrated.data.fit.flatMap((part) => [...part.weights]);
    expect([...new Set(weights)].sort()).toEqual([0.1, 0.3, 1].map(Math.fround));
  });

  test("are there for every layer that is quantized, the same for layers of one input, others for others", () => {
    expect([...inputs.keys()].sort()).toEqual(layers.map(({ name }) => name).sort());
    for (const { name, cols } of layers) expect(inputs.get(name)!.cols).toBe(cols);
    const of = (part: string) => inputs.get(`model.layers.1.${part}_proj.weight`)!.secondMoment;
    expect([...of("self_attn.q")]).toEqual([...of("self_attn.v")]);
    expect([...of("self_attn.q")]).not.toEqual([...of("self_attn.o")]);
    expect([...of("self_attn.q")]).not.toEqual([...of("mlp.up")]);
  });

  test("of an image model are taken at all timesteps and stay apart for layers that share a buffer", async () => {
    using glyphs = openCheckpoint(GLYPHS);
    const model = modelFrom(glyphs, withThreads(kernels, 2));
    const images = await calibrationOf(model, glyphs, {});
    expect(hasPositionWeights(images)).toBe(false);
    const block = "transformer_blocks.3";
    const names = [
      `${block}.attn1.to_q.weight`,
      `${block}.attn1.to_out.0.weight`,
      `${block}.norm1.emb.timestep_embedder.linear_1.weight`,
    ];
    const found = await collectInputs(model, images, names, withThreads(kernels, 2));
    const [query, out, waves] = names.map((name) => found.get(name)!);
    expect([...query!.secondMoment]).not.toEqual([...out!.secondMoment]);
    // cos² + sin² = 1 for each of 128 frequencies
    const trace = (of: LayerInputs) => {
      let sum = 0;
      for (let i = 0; i < of.cols; i++) sum += of.secondMoment[i * of.cols + i]!;
      return sum;
    };
    expect(trace(waves!)).toBeCloseTo(128, 2);
    // The fastest frequency is 1: its second moment is the mean of cos² t over the timesteps of the data,
    // about a half.
    const times = images.kind === "images" ? images.data.fit.flatMap((part) => [...part.times]) : [];
    const mean = times.reduce((sum, t) => sum + Math.cos(t) ** 2, 0) / times.length;
    expect([times.length, Math.abs(mean - 0.5) < 0.05]).toEqual([512, true]);
    expect(waves!.secondMoment[0]!).toBeCloseTo(mean, 5);
    expect(await rejection(collectInputs(full, images, names, kernels))).toBeInstanceOf(TypeError);
    expect(await rejection(collectInputs(model, calibrated, names, kernels))).toBeInstanceOf(TypeError);
  });
});

describe("a replaced checkpoint", () => {
  test("has other weights where they were given, and the rest as it was", () => {
    const name = "lm_head.weight", { info } = checkpoint.tensors.get(name)!;
    const values = new Float32Array(info.elements).fill(0.5);
    const replaced = new ReplacedCheckpoint(checkpoint, new Map([[name, values]]));
    expect(replaced.tensors.get(name)!.info.dtype).toBe("F32");
    expect([...new Float32Array(replaced.read(name).buffer)]).toEqual([...values]);
    const target = new Uint8Array(8);
    replaced.readInto(name, 4, target);
    expect([...new Float32Array(target.buffer)]).toEqual([0.5, 0.5]);
    expect(replaced.read("model.norm.weight")).toEqual(checkpoint.read("model.norm.weight"));
    const model = modelFrom(replaced, kernels);
    if (model.kind === "dit") throw new Error("not a language model");
    const logits = model.model.forward(new Int32Array(4).fill(3), 1);
    for (let i = 1; i < 35; i++) expect(logits[i]!).toBeCloseTo(logits[0]!, 5); // all rows of the head are alike
  });

  test("refuses tensors that are not there", () => {
    for (const [name, size] of [["lm_head.weight", 3], ["no.such", 3]] as const) {
      const error = thrown(() =>
        new ReplacedCheckpoint(checkpoint, new Map([[name, new Float32Array(size)]]))
      );
      expect(error).toBeInstanceOf(CheckpointError);
      expect(error.message).toContain(name);
    }
  });
});

describe("models", () => {
  const yardstick = yardstickOf(checkpoint, withThreads(kernels, 2), {
    seed: 1,
    puzzles: 12,
    sequences: 16,
    images: 4,
  }).then(
    (made) => {
      made.measure(full);
      return made;
    },
  );
  test("through a method are what the pipeline makes of them", async () => {
    const measure = await yardstick;
    const setting = { bits: 2, groupSize: 64 } as const;
    const direct = quantized(await methodContender(ours(kernels, "clip", setting)).quantize(target));
    const piped = quantized(await pipelineContender("clip", setting, { solver: "clip" }).quantize(target));
    expect([piped.weights, piped.bitsPerWeight]).toEqual([direct.weights, direct.bitsPerWeight]);
    expect(piped.relativeRmsError).toBeCloseTo(direct.relativeRmsError, 9);
    const [a, b] = [direct, piped].map(({ model }) => measure.measure(model));
    expect(a!.distance.value).toBeGreaterThan(0.01);
    expect(Math.abs(a!.distance.value - b!.distance.value)).toBeLessThan(1e-3 * a!.distance.value);
    expect(measure.measure(full).distance.value).toBe(0);
  });

  test("GPTQ is far nearer to full precision than round to nearest, with the blocks before quantized too", async () => {
    const measure = await yardstick;
    const setting = { bits: 2, groupSize: 0 } as const;
    const kl = async (solver: "round" | "gptq", options: QuantizeModelOptions) => {
      const method = solver === "round" ? ours(kernels, "round", setting) : gptq(kernels, setting);
      return measure.measure(quantized(await quantizeModel(target, method, options)).model).distance.value;
    };
    const round = await kl("round", {}), atOnce = await kl("gptq", {});
    const blockwise = await kl("gptq", { blockwise: true });
    const alike = await kl("gptq", { blockwise: true, positions: "alike" });
    expect(blockwise).toBeLessThan(round / 5);
    expect(atOnce).toBeLessThan(round / 5);
    expect(alike).toBeLessThan(round / 5);
    expect(new Set([blockwise, atOnce, alike]).size).toBe(3);
    expect(await kl("round", { blockwise: true })).toBe(round);
  });
});

const context = (args: string): BenchContext => ({
  kernels,
  environment: environmentOf(kernels),
  options: parseBenchArguments(["--suite", "peers", "--quick", "--threads", "2", ...args.split(" ")]).options,
  progress: () => {},
});
const WITHOUT_GGML = { ...PEERS, openGgml: () => Promise.resolve({ reason: "not asked for" }) };
const noGgml: Suite = comparisonSuite(WITHOUT_GGML);
/** One contender of ours and one of another project's: for what does not depend on who takes part. */
const few: Suite = comparisonSuite({
  ...WITHOUT_GGML,
  contenders: (...given) => PEERS.contenders(...given).filter(({ name }) => / round,| HQQ,/.test(name)),
});

function methods({ rows }: SuiteReport): unknown[] {
  return rows.map(({ method }) => method);
}

describe("the suite", () => {
  test("measures every contender alike", async () => {
    const report = await peersSuite.run(context(`--model ${DREAM} --limit 4 --group-size 32`));
    const byName = new Map(report.rows.map((row) => [row["method"], row]));
    const isThere = report.skipped.every(({ what }) => !what.endsWith(": ggml"));
    if (!isThere) console.log("skipped: rows of ggml in the peers' suite");
    expect(methods(report).slice(0, 11)).toEqual([
      "full precision",
      "2 round, g 32",
      "2 clip, g 32",
      "2 feedback, g 32",
      "2 best, g 32",
      "2 best, positions alike, g 32",
      "2 best, trellis codes, g 32",
      "2 HQQ, g 32",
      "2 GPTQ, g 32",
      "2 GPTQ at once, g 32",
      "2 GPTQ, positions alike, g 32",
    ]);
    expect(byName.get("full precision")!["distance"]).toMatchObject({ value: 0 });
    const value = (name: string) => (byName.get(name)!["distance"] as { value: number }).value;
    expect(value("2 best, positions alike, g 32") === value("2 best, g 32")).toBe(false);
    const bits = (name: string) => byName.get(name)!["bitsPerWeight"] as number;
    for (const name of ["2 clip, g 32", "2 best, g 32", "2 HQQ, g 32", "2 GPTQ, g 32"]) {
      expect(bits(name)).toBe(bits("2 round, g 32"));
    }
    if (isThere) {
      expect(methods(report).length).toBe(23);
      expect(report.goals.map(({ met }) => typeof met)).toEqual(["boolean", "boolean", "boolean", "boolean"]);
      expect(bits("Q2_K + imatrix, flat")).toBe(2.625);
      expect(bits("Q8_0")).toBe(8.5);
      const kl = (name: string) => (byName.get(name)!["distance"] as { value: number }).value;
      expect(kl("Q8_0")).toBeLessThan(kl("Q4_K, flat"));
      expect(kl("Q4_K, flat")).toBeLessThan(kl("Q2_K, flat"));
      expect(report.skipped.map(({ reason }) => reason).join()).toContain("multiple of 256, got 64, 160");
    }
    for (const row of report.rows.slice(1) as readonly Record<string, unknown>[]) {
      const { distance, exactMatch, quantizeSeconds } = row as {
        distance: { value: number; low: number; high: number };
        exactMatch: { task: string; prompts: number }[];
        quantizeSeconds: number;
      };
      expect(distance.low).toBeLessThanOrEqual(distance.value);
      expect(distance.high).toBeGreaterThanOrEqual(distance.value);
      expect(exactMatch.map(({ task, prompts }) => [task, prompts])).toEqual([
        ["add", 4],
        ["sudoku", 4],
        ["sort", 4],
        ["all", 12],
      ]);
      expect(quantizeSeconds).toBeGreaterThan(0);
    }
    for (const line of formatReport(report)) {
      if (!line.startsWith("skipped")) expect([line, line.length <= 132]).toEqual([line, true]);
    }
    const front = paretoFront(report.rows);
    for (let i = 1; i < front.length; i++) {
      expect(front[i]!.bitsPerWeight).toBeGreaterThan(front[i - 1]!.bitsPerWeight);
      expect(front[i]!.distance).toBeLessThan(front[i - 1]!.distance);
    }
    expect(front.length).toBeGreaterThan(0);
  }, 120_000);

  test("does without ggml, giving the reason", async () => {
    const report = await few.run(
      context(`--model ${DREAM} --limit 3 --bits 2,3 --group-size 0,64 --tasks add`),
    );
    expect(methods(report)).toEqual([
      "full precision",
      ...["2 round, row", "2 HQQ, row", "2 round, g 64", "2 HQQ, g 64"],
      ...["3 round, row", "3 HQQ, row", "3 round, g 64", "3 HQQ, g 64"],
    ]);
    expect(report.skipped).toEqual([{ what: "dream-mini: ggml", reason: "not asked for" }]);
    const wrong = await few.run(context(`--model ${DREAM} --tasks chess`));
    expect([wrong.rows, wrong.skipped.length]).toEqual([[], 1]);
    expect(wrong.skipped[0]!.reason).toContain("chess");
  }, 120_000);

  test(
    "takes a model of any width, and one without data is measured on synthetic ones that say so",
    async () => {
      const folder = store(place.fresh("wide"), dreamCheckpoint());
      const { rows, sections, skipped } = await noGgml.run(
        context(`--model ${folder} --bits 2 --group-size 16`),
      );
      expect(rows.length).toBe(1 + 10);
      for (const row of rows) {
        expect(row["evaluation"]).toContain("synthetic");
        expect(row["calibration"]).toContain("synthetic");
        expect((row["distance"] as { value: number }).value).toBeGreaterThanOrEqual(0);
      }
      expect(sections[0]!.notes.join()).toContain("synthetic");
      expect(skipped[0]!.reason).toContain("there is no tokenizer.json, eval.jsonl");
    },
    120_000,
  );

  test("measures image models by their noise error, without what draws and reads glyphs too", async () => {
    const folder = store(
      place.fresh("image"),
      ditCheckpoint({ ...SMALL_IMAGE, channels: 1, outputChannels: 1 }),
    );
    const args = `--model ${folder} --group-size 0`;
    const none = await noGgml.run(context(args));
    expect([none.rows, none.skipped[0]!.reason.includes("scheduler_config.json")]).toEqual([[], true]);
    cpSync(join(GLYPHS, "scheduler_config.json"), join(folder, "scheduler_config.json"));
    const { rows, sections, skipped } = await noGgml.run(context(args));
    expect(methods({ rows } as SuiteReport)).toEqual([
      "full precision",
      ...["round", "clip", "feedback", "best", "best, trellis codes", "HQQ", "GPTQ", "GPTQ at once"].map((
        name,
      ) => `2 ${name}, row`),
    ]);
    // Every method has the same bits in every matrix, whatever rules give ours more by default.
    expect(new Set(rows.slice(1).map((row) => row["bitsPerWeight"])).size).toBe(1);
    for (const row of rows) {
      expect([row["measure"], row["exactMatch"]]).toEqual(["noise error", []]);
      const { value, low, high } = row["distance"] as { value: number; low: number; high: number };
      const errors = (row["byTimestep"] as { relativeError: { value: number } }[]).map((e) =>
        e.relativeError.value
      );
      expect(errors.length).toBe(10);
      // A mean of ratios over the images of a timestep beside a ratio of sums.
      const mean = errors.reduce((sum, error) => sum + error, 0) / 10;
      expect(Math.abs(value - mean)).toBeLessThanOrEqual(0.25 * mean);
      expect([low <= value, value <= high, row["method"] === "full precision" || low < high]).toEqual([
        true,
        true,
        true,
      ]);
    }
    expect(sections[0]!.columns.map(({ title }) => title)).toContain("worst timestep");
    expect(skipped[0]).toEqual({
      what: `${folder.split("/").at(-1)}: drawn glyphs`,
      reason: "there is no classifier.safetensors, reference_features.safetensors, eval_images.safetensors",
    });
  }, 120_000);

  test("draws glyphs with a limit", async () => {
    const { rows } = await few.run(context(`--model ${GLYPHS} --group-size 0 --limit 2`));
    expect(rows.length).toBe(3);
    for (const row of rows) {
      expect(
        (row["exactMatch"] as { task: string; prompts: number }[]).map((
          { task, prompts },
        ) => [task, prompts]),
      )
        .toEqual([["recognized", 2]]);
    }
  }, 120_000);

  test("uses what is there when only the calibration data are missing", async () => {
    const folder = place.fresh("dream");
    cpSync(DREAM, folder, { recursive: true });
    rmSync(join(folder, "calibration.jsonl"));
    const { rows } = await few.run(context(`--model ${folder} --limit 3 --group-size 0`));
    expect(rows[0]!["calibration"]).toContain("synthetic");
    expect(rows[0]!["evaluation"]).toContain("9 puzzles of eval.jsonl");
  }, 120_000);
});

describe("the Pareto front", () => {
  test("holds what no other beats, each model by itself", () => {
    const row = (model: string, method: string, bitsPerWeight: number | null, value: number) => ({
      model,
      method,
      kind: "ours",
      bitsPerWeight,
      distance: { value },
    });
    const front = paretoFront([
      row("a", "full", null, 0),
      row("a", "x", 3, 0.1),
      row("a", "y", 2, 0.5),
      row("a", "z", 3, 0.2),
      row("a", "same as y", 2, 0.5),
      row("a", "worse", 2.5, 0.6),
      row("b", "alone", 9, 9),
    ]);
    expect(front.map(({ method }) => method)).toEqual(["y", "same as y", "x", "alone"]);
    expect(paretoFront([])).toEqual([]);
  });
});
