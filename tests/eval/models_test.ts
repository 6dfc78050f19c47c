import { afterAll, describe, expect, test } from "bun:test";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { CheckpointError, FormatError } from "../../lib/errors.ts";
import { loadClassifier, loadFeatureStatistics } from "../../lib/eval/classifier.ts";
import {
  drawImages,
  readImages,
  scoreImages,
  timestepErrors,
  trajectoryDrift,
} from "../../lib/eval/images.ts";
import { compareMasked } from "../../lib/eval/masked.ts";
import {
  answerLength,
  maskedSequences,
  puzzleCanvas,
  readPuzzles,
  scoreTasks,
  solvePuzzles,
} from "../../lib/eval/puzzles.ts";
import { FrechetReference } from "../../lib/eval/frechet.ts";
import { imageNoise, loadDit, loadDream, loadScheduler, loadTokenizer } from "../../lib/models/mod.ts";
import { openKernels, withThreads } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { SafetensorsFile } from "../../lib/tensor/mod.ts";
import { MODELS, run, workplace } from "../_checkpoints.ts";
import { relativeError } from "../_reference.ts";
import { thrown } from "../tensor/_files.ts";

const DREAM = join(MODELS, "dream-mini"), GLYPHS = join(MODELS, "glyph-dit");
const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});

async function quantized(input: string, bits: number, solver: string, groupSize: number): Promise<string> {
  const output = place.fresh();
  const { config } = resolveConfig({ overrides: { bit_width: bits, solver, group_size: groupSize } });
  await quantizeCheckpoint({ input, output, config, kernels });
  return output;
}

const full = loadDream(DREAM, withThreads(kernels, 2));
const tokenizer = await loadTokenizer(DREAM);
const puzzles = readPuzzles(join(DREAM, "eval.jsonl"));
/** Some of each task. */
const some = puzzles.filter((_, i) => i % 12 === 0);
const coarse = loadDream(await quantized(DREAM, 2, "round", 0), withThreads(kernels, 2));

describe("puzzles", () => {
  test("are the 900 of the file, in the three forms", () => {
    expect(puzzles.length).toBe(900);
    for (const { prompt, answer } of puzzles) {
      expect([prompt, answerLength(prompt)]).toEqual([prompt, answer.length]);
    }
    expect(answerLength("hello")).toBeUndefined();
  });

  test("become the sequences of the golden traces", () => {
    using golden = SafetensorsFile.open(join(DREAM, "golden.safetensors"));
    for (const name of golden.tensors.keys()) {
      const index = /^trace\.(\d)\./.exec(name)?.[1];
      if (index === undefined) continue;
      const start = Int32Array.from(new BigInt64Array(golden.read(name).buffer), Number).slice(0, 36);
      const { prompt, answer } = puzzles[150 * Number(index)]!;
      expect([...puzzleCanvas(full, tokenizer, prompt, answer.length)]).toEqual([...start]);
    }
    expect(thrown(() => puzzleCanvas(full, tokenizer, "12345678901234567890", 16))).toBeInstanceOf(
      RangeError,
    );
  });

  test("are solved by the stored weights, whatever the batch, and not by coarse ones", () => {
    const solved = solvePuzzles(full, tokenizer, some, { batch: 10 });
    expect(solved.map(({ puzzle }) => puzzle)).toEqual(some);
    const scores = scoreTasks(solved);
    expect(scores.map(({ task, solved: count, prompts }) => [task, count, prompts])).toEqual([
      ["add", 25, 25],
      ["sudoku", 25, 25],
      ["sort", 25, 25],
      ["all", 75, 75],
    ]);
    expect(scores[3]!.exactMatch.high).toBe(1);
    const bad = solvePuzzles(coarse, tokenizer, some);
    expect(scoreTasks(bad).at(-1)!.exactMatch.high).toBeLessThan(0.9);
    for (const { puzzle, answer, isCorrect } of bad) expect(isCorrect).toBe(answer === puzzle.answer);
  });

  test("of a broken file are refused with the line", () => {
    const path = place.fresh("bad.jsonl");
    writeFileSync(path, '{"task": "add", "prompt": "1", "answer": "2"}\n\n{"task": "add"}\n');
    const error = thrown(() => readPuzzles(path));
    expect(error).toBeInstanceOf(FormatError);
    expect(error.message).toContain("line 3");
    expect(thrown(() => readPuzzles(place.fresh("none")))).toBeInstanceOf(CheckpointError);
  });
});

describe("masked sequences", () => {
  const sequences = maskedSequences(full, tokenizer, some, { seed: 3, repeats: 2 });

  test("mask answer positions only, at the rate they say", () => {
    let expected = 0, variance = 0, found = 0;
    for (
      const { maskRatio, tokens, places, targets, task } of maskedSequences(full, tokenizer, puzzles, {
        seed: 1,
      })
    ) {
      const length = { add: 4, sudoku: 17, sort: 9 }[task]!;
      const start = tokens.indexOf(1);
      expect(places[0]).toBe(start);
      expect(places.length).toBeLessThanOrEqual(length);
      expect([...tokens].filter((token) => token === 1).length).toBe(places.length);
      expect(targets.length).toBe(places.length);
      // a sequence is left out when nothing is masked
      const some = 1 - (1 - maskRatio) ** length;
      const mean = length * maskRatio / some;
      expected += mean;
      variance += (length * maskRatio * (1 - maskRatio) + (length * maskRatio) ** 2) / some - mean ** 2;
      found += places.length;
    }
    expect(Math.abs(found - expected)).toBeLessThan(4 * Math.sqrt(variance));
  });

  test("put together give the answer", () => {
    const texts = some.map(({ prompt, answer }) => prompt + answer);
    for (const { tokens, places, targets } of sequences) {
      const whole = tokens.slice();
      for (const [k, at] of places.entries()) whole[at] = targets[k]!;
      expect(texts).toContain(tokenizer.decode(whole));
    }
  });

  test("tell a model from itself by nothing, from a coarse one by much", () => {
    const same = compareMasked(full, full, sequences, { bins: 4, resamples: 200 });
    expect(same.map(({ kl }) => kl.value)).toEqual(same.map(() => 0));
    const total = same.at(-1)!;
    expect([total.low, total.high, total.sequences]).toEqual([0, 1, sequences.length]);
    expect(same.slice(0, -1).reduce((sum, bin) => sum + bin.positions, 0)).toBe(total.positions);
    expect(total.accuracy.value).toBeGreaterThan(0.98);
    const rough = compareMasked(full, coarse, sequences, { bins: 1, resamples: 200 }).at(-1)!;
    expect(rough.kl.low).toBeGreaterThan(0.05);
    expect(rough.accuracy.value).toBeLessThan(rough.fullAccuracy.value);
  });

  test("have the KL divergence of the definition, pads and masks left out", () => {
    const sequence = sequences.find(({ places }) => places.length >= 3)!;
    const [p, q] = [full, coarse].map((model) => {
      const logits = model.forward(sequence.tokens, 1).slice();
      return sequence.places.map((at) => {
        const row = [...logits.subarray((at - 1) * 35, at * 35)].map((v, token) =>
          token < 2 ? 0 : Math.exp(v)
        );
        const total = row.reduce((sum, v) => sum + v, 0);
        return row.map((v) => v / total);
      });
    });
    const wanted = p!.flatMap((row, i) => row.map((v, j) => v === 0 ? 0 : v * Math.log(v / q![i]![j]!)));
    const [got] = compareMasked(full, coarse, [sequence], { bins: 1 });
    expect(got!.kl.value).toBeCloseTo(wanted.reduce((sum, v) => sum + v, 0) / sequence.places.length, 5);
  });
});

describe("images", () => {
  const classifier = loadClassifier(join(GLYPHS, "classifier.safetensors"), kernels);
  const real = readImages(join(GLYPHS, "eval_images.safetensors"));
  const reference = new FrechetReference(
    loadFeatureStatistics(join(GLYPHS, "reference_features.safetensors")),
  );
  const scheduler = loadScheduler(GLYPHS);
  const model = loadDit(GLYPHS, withThreads(kernels, 2));

  test("are read by the classifier as in the golden file", () => {
    using golden = SafetensorsFile.open(join(GLYPHS, "golden.safetensors"));
    const { logits } = classifier.classify(real.images.subarray(992 * 256));
    expect(relativeError(logits, new Float32Array(golden.read("classifier.logits").buffer))).toBeLessThan(
      1e-5,
    );
  });

  test("that are real are recognized as often as the reference says, and near the reference's features", () => {
    const { classAccuracy, frechetDistance } = scoreImages(real, classifier, reference, { resamples: 20 });
    expect(classAccuracy.low).toBeLessThan(0.9938);
    expect(classAccuracy.high).toBeGreaterThan(0.9938);
    expect(frechetDistance.value).toBeLessThan(4);
    const noise = { images: imageNoise(1, 0, 1000, 256), labels: real.labels };
    expect(scoreImages(noise, classifier, reference, { resamples: 5 }).frechetDistance.value).toBeGreaterThan(
      100,
    );
  });

  test("drawn do not depend on the batch, and most are what they should be", () => {
    const drawn = drawImages(model, scheduler, 40, { steps: 12, batch: 40 });
    const again = drawImages(model, scheduler, 40, { steps: 12, batch: 7 });
    expect(relativeError(again.images, drawn.images)).toBeLessThan(1e-3);
    expect([...drawn.labels.subarray(8, 12)]).toEqual([8, 9, 0, 1]);
    expect(scoreImages(drawn, classifier, reference, { resamples: 5 }).classAccuracy.high).toBeGreaterThan(
      0.7,
    );
  });

  test("of a quantized model differ by timestep and drift with the steps", async () => {
    const two = loadDit(await quantized(GLYPHS, 2, "clip", 64), withThreads(kernels, 2));
    const eight = loadDit(await quantized(GLYPHS, 8, "clip", 64), withThreads(kernels, 2));
    const options = { timesteps: [999, 500, 20], imagesPerTimestep: 16, resamples: 100 };
    const self = timestepErrors(model, model, scheduler, real, options);
    expect(self.map(({ timestep, relativeError: { value } }) => [timestep, value])).toEqual([[999, 0], [
      500,
      0,
    ], [20, 0]]);
    const errors = [eight, two].map((other) => timestepErrors(model, other, scheduler, real, options));
    for (let i = 0; i < 3; i++) {
      expect(errors[0]![i]!.relativeError.value).toBeLessThan(1e-2);
      expect(errors[1]![i]!.relativeError.low).toBeGreaterThan(errors[0]![i]!.relativeError.high);
    }
    const draw = { steps: 5, trajectory: true };
    const paths = [model, eight, two].map((each) => drawImages(each, scheduler, 6, draw));
    const drift = trajectoryDrift(paths[0]!, paths[2]!, { resamples: 50 });
    expect(drift.map(({ step }) => step)).toEqual([0, 1, 2, 3, 4, 5]);
    expect(drift[0]!.relativeDistance.value).toBe(0);
    expect(drift[5]!.relativeDistance.value).toBeGreaterThan(
      trajectoryDrift(paths[0]!, paths[1]!, { resamples: 50 })[5]!.relativeDistance.value,
    );
    expect(thrown(() => trajectoryDrift(paths[0]!, drawImages(two, scheduler, 6, { steps: 2 }))))
      .toBeInstanceOf(TypeError);
  });

  test("of files that are not it are refused", () => {
    expect(thrown(() => loadClassifier(join(GLYPHS, "golden.safetensors"), kernels))).toBeInstanceOf(
      CheckpointError,
    );
    expect(thrown(() => readImages(join(GLYPHS, "golden.safetensors")))).toBeInstanceOf(CheckpointError);
    expect(thrown(() => classifier.classify(new Float32Array(5)))).toBeInstanceOf(TypeError);
  });
});

describe("generate.ts", () => {
  test("solves a puzzle with a full and a packed checkpoint, natively and in WebAssembly", async () => {
    const packed = await quantized(DREAM, 4, "clip", 64);
    for (const [folder, ...more] of [[DREAM], [packed], [packed, "--backend", "wasm"]]) {
      const { code, stdout, stderr } = run("generate.ts", [folder!, "--prompt", "47+38=", ...more]);
      expect([code, stdout, stderr.includes("error")]).toEqual([0, "085\n", false]);
    }
  });

  test("shows masks being filled, or tells machines", () => {
    const { stdout } = run("generate.ts", [DREAM, "--prompt", "47+38=", "--trace", "--quiet"]);
    const lines = stdout.trimEnd().split("\n");
    expect(lines.length).toBe(6);
    expect(lines[0]).toBe("0/4  t 1.000  <bos>47+38=░░░░");
    expect(lines[4]).toBe("4/4  t 0.001  <bos>47+38=085<eos>");
    const json = JSON.parse(run("generate.ts", [DREAM, "--prompt", "47+38=", "--trace", "--json"]).stdout);
    expect([json.text, json.tokens, json.trace.length]).toEqual(["085", [4, 12, 9, 3], 5]);
  });

  test("draws glyphs into a PNG", () => {
    const out = place.fresh("glyphs.png");
    const { code, stdout } = run("generate.ts", [
      GLYPHS,
      "--class",
      "3,7",
      "--steps",
      "4",
      "--out",
      out,
      "--zoom",
      "2",
    ]);
    expect([code, stdout]).toEqual([0, `${out}\n`]);
    const view = new DataView(new Uint8Array(readFileSync(out)).buffer);
    expect([view.getUint32(16), view.getUint32(20)]).toEqual([64, 32]);
  });

  test("says what is wrong with its options, without a stack and before any work", () => {
    const none = place.fresh("never.png");
    for (
      const [args, message] of [
        [[DREAM], "--prompt is needed"],
        [[DREAM, "--prompt", "47+Z="], 'got "Z"'],
        [
          [DREAM, "--prompt", "47+38=", "--steps", "0"],
          '--steps must be a whole number from 1 to 1000000, got "0"',
        ],
        [[DREAM, "--prompt", "47+38", "--length", "300"], "may have 256 tokens"],
        [[DREAM, "--prompt", "47+38=", "--top-p", "7"], "topP must lie in (0, 1], got 7"],
        [[DREAM, "--prompt", "47+38=", "--algorithm", "greedy"], "--algorithm must be one of"],
        [[DREAM, "--class", "1"], "--class is not for a model that writes"],
        [[GLYPHS, "--class", "10", "--out", none], "--class must be from 0 to 9, got 10"],
        [
          [GLYPHS, "--class", "1", "--steps", "1001", "--out", none],
          "steps must be a whole number from 1 to 1000",
        ],
        [[], "one MODEL is needed"],
      ] as const
    ) {
      const { code, stdout, stderr } = run("generate.ts", [...args]);
      expect([args, code, stdout, stderr.includes(message), stderr.includes("    at ")]).toEqual([
        args,
        2,
        "",
        true,
        false,
      ]);
    }
    expect(existsSync(none)).toBe(false);
    expect(run("generate.ts", [place.path]).code).toBe(3);
    expect(run("generate.ts", ["--help"]).stdout).toContain("Usage: generate.ts MODEL");
  });
});
