/** Checkpoints in the layouts of Dream 7B, LLaDA 8B and DiT-XL/2, small and without tasks, through the same commands as the reference models. */
import { afterAll, describe, expect, test } from "bun:test";
import { cpSync, existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { drawImages, predictionErrors, predictionsAt, trajectoryDrift } from "../../lib/eval/images.ts";
import { bootstrapMean, stratifiedMean } from "../../lib/eval/intervals.ts";
import { byMaskRatio, maskedDistances, maskedLogits, syntheticSequences } from "../../lib/eval/masked.ts";
import { trajectoryStates } from "../../lib/eval/yardstick.ts";
import { type LoadedModel, loadModel, loadScheduler } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { MODELS, run, workplace } from "../_checkpoints.ts";
import { dreamCheckpoint, store } from "../_models.ts";
import { thrown } from "../tensor/_files.ts";

const place = workplace();
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});

const LAYOUTS = ["dream", "llada", "dit"] as const;
const folders = Object.fromEntries(LAYOUTS.map((layout) => {
  const folder = place.fresh(layout);
  const tokenizer = layout === "llada" ? ["--tokenizer"] : [];
  const args = ["--layout", layout, "--hidden", "144", "--layers", "2", "--shards", "3", ...tokenizer];
  return [layout, { folder, ...run("make_checkpoint.ts", [folder, ...args]) }];
})) as Record<typeof LAYOUTS[number], { folder: string } & ReturnType<typeof run>>;

const masked = (path: string) => {
  const loaded = loadModel(path, kernels);
  if (loaded.kind === "dit") throw new Error("expected a language model");
  return loaded.model;
};

/** Finds the names of a row's keys, at any depth. */
function keysOf(value: unknown): string[] {
  if (typeof value !== "object" || value === null) return [];
  return Object.entries(value).flatMap(([key, inner]) => [key, ...keysOf(inner)]);
}

describe("a folder made in a published layout", () => {
  for (const layout of LAYOUTS) {
    test(`${layout}: sharded BF16 with the published names`, () => {
      const { folder, code } = folders[layout];
      expect(code).toBe(0);
      using checkpoint = openCheckpoint(folder);
      expect([checkpoint.kind, checkpoint.files.length]).toEqual([layout, 3]);
      expect([...checkpoint.tensors.values()].every(({ info }) => info.dtype === "BF16")).toBe(true);
      const name = {
        dream: "model.layers.1.self_attn.k_proj.bias",
        llada: "model.transformer.blocks.1.ff_proj.weight",
        dit: "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight",
      }[layout];
      expect(checkpoint.tensors.has(name)).toBe(true);
    });

    test(`${layout}: bench.ts --model measures it against itself and prints no accuracy`, () => {
      const { code, stdout, stderr } = run("bench.ts", [
        "--model",
        folders[layout].folder,
        "--bits",
        "8,2",
        "--quick",
        "--json",
      ]);
      expect([code, stderr.includes("error")]).toEqual([0, false]);
      expect(stderr).toMatch(/5 settings: needs \d+ MB of memory \([\d.]+ MB weights \+ /);
      expect(stderr).toMatch(
        /takes about [\d.]+ s \(estimate: .* one product timed now\) and .* to quantize/,
      );
      const { rows, skipped, sections, goals } = JSON.parse(stdout);
      expect(rows.map(({ setting }: { setting: string }) => setting)).toEqual([
        "full",
        "8 round",
        "8 clip",
        "2 round",
        "2 clip",
      ]);
      const keys = keysOf([rows, goals]);
      for (const key of ["exactMatch", "accuracy", "classAccuracy"]) expect(keys).not.toContain(key);
      expect(sections[0].title).toContain("no accuracy");
      expect(skipped[0].reason).toContain("synthetic inputs instead");
      const distance = rows.map((row: Record<string, never>) =>
        layout === "dit"
          ? row["noiseError"]!["value"]
          : (row["byMaskRatio"]! as { kl: { value: number } }[]).at(-1)!.kl.value
      ) as number[];
      expect(distance[0]).toBe(0);
      expect(distance[1]!).toBeGreaterThan(0);
      expect(distance[3]!).toBeGreaterThan(20 * distance[1]!);
      for (const { seconds, bitsPerWeight } of rows.slice(1)) {
        expect(seconds).toBeGreaterThan(0);
        expect(bitsPerWeight).toBeGreaterThan(2);
      }
    });
  }

  test("generate.ts writes with its made-up vocabulary and draws its latents, full and packed", () => {
    const packed = place.fresh("packed");
    expect(
      run("quantize.ts", [folders.llada.folder, packed, "--bits", "4", "--solver", "clip", "--quiet"]).code,
    ).toBe(0);
    for (const folder of [folders.llada.folder, packed]) {
      const { code, stdout } = run("generate.ts", [
        folder,
        "--prompt",
        "w5 w9",
        "--length",
        "6",
        "--block-length",
        "3",
        "--quiet",
      ]);
      expect(code).toBe(0);
      expect(stdout.trim().split(" ").length).toBeLessThanOrEqual(6); // an <eos> ends it
      expect(stdout).toMatch(/^(w\d+ ?)*\n$/);
    }
    const out = place.fresh("latents.png");
    const drawn = run("generate.ts", [folders.dit.folder, "--class", "1", "--steps", "2", "--out", out]);
    expect([drawn.code, existsSync(out)]).toEqual([0, true]);
    expect(drawn.stderr).toContain("4 channels are no colours");
  });

  test("bench.ts takes a diffusers pipeline, and one file", () => {
    const pipeline = place.fresh("pipeline"), { folder } = folders.dit;
    mkdirSync(join(pipeline, "scheduler"), { recursive: true });
    cpSync(folder, join(pipeline, "transformer"), { recursive: true });
    renameSync(
      join(pipeline, "transformer", "scheduler_config.json"),
      join(pipeline, "scheduler", "scheduler_config.json"),
    );
    writeFileSync(join(pipeline, "model_index.json"), "{}");
    const file = join(store(place.fresh("one"), dreamCheckpoint()), "model.safetensors");
    const models = ["--model", pipeline, "--model", file];
    const { code, stdout } = run("bench.ts", [
      ...models,
      "--bits",
      "2",
      "--solver",
      "round",
      "--limit",
      "1",
      "--json",
    ]);
    expect(code).toBe(0);
    expect(JSON.parse(stdout).rows.map(({ kind }: { kind: string }) => kind)).toEqual([
      ...Array(2).fill("image model, synthetic trajectories"),
      ...Array(2).fill("masked language model, synthetic sequences"),
    ]);
  });

  test("generate.ts says what is missing where there is no tokenizer", () => {
    const { code, stdout, stderr } = run("generate.ts", [folders.dream.folder, "--prompt", "w5"]);
    expect([code, stdout]).toEqual([3, ""]);
    expect(stderr).toContain("must have tokenizer.json");
  });

  test("make_checkpoint.ts refuses what no layout has", () => {
    const none = place.fresh("none");
    for (
      const [args, message] of [
        [["--layout", "gpt"], "--layout must be one of dream, llada, dit"],
        [["--layout", "dit", "--tokenizer"], "are for language models"],
        [["--layout", "dit", "--hidden", "150"], "--hidden must be a multiple of 4"],
        [["--hidden", "77"], "--hidden must be a multiple of 2"],
      ] as const
    ) {
      const { code, stderr } = run("make_checkpoint.ts", [none, ...args]);
      expect([args, code, stderr.includes(message), existsSync(none)]).toEqual([args, 2, true, false]);
    }
  });
});

describe("bench.ts refuses before it measures", () => {
  const DREAM = join(MODELS, "dream-mini");
  const copy = (change: (folder: string) => void) => {
    const folder = place.fresh("copy");
    cpSync(DREAM, folder, { recursive: true });
    change(folder);
    return folder;
  };
  const cases: [string, () => string[], number, string][] = [
    [
      "a second model that is broken",
      () => [
        DREAM,
        copy((folder) => {
          const path = join(folder, "config.json");
          writeFileSync(
            path,
            readFileSync(path, "utf8").replace('"intermediate_size": 160', '"intermediate_size": 161'),
          );
        }),
      ],
      3,
      "must be [161, 64], got [160, 64]",
    ],
    [
      "tasks that do not fit the vocabulary",
      () => [copy((folder) => {
        writeFileSync(join(folder, "eval.jsonl"), '{"task": "x", "prompt": "47-12=", "answer": "35"}\n');
      })],
      3,
      'got \\"-\\"',
    ],
    [
      "tasks that are too long",
      () => [copy((folder) => {
        writeFileSync(
          join(folder, "eval.jsonl"),
          `{"task": "x", "prompt": "${"1".repeat(40)}", "answer": "35"}\n`,
        );
      })],
      3,
      "prompt and answer may have 34 tokens",
    ],
    [
      "a DiT without a schedule",
      () => [(() => {
        const folder = place.fresh("unscheduled");
        cpSync(folders.dit.folder, folder, { recursive: true });
        rmSync(join(folder, "scheduler_config.json"));
        return folder;
      })()],
      3,
      "must have scheduler_config.json",
    ],
  ];
  for (const [what, paths, code, message] of cases) {
    test(what, () => {
      const result = run("bench.ts", ["--json", "--quick", ...paths().flatMap((path) => ["--model", path])]);
      expect(result.code).toBe(code);
      expect(result.stdout).toContain(message);
      expect(result.stderr).not.toContain(", full"); // the first thing that is measured
      expect(result.stderr).not.toMatch(/^ +at /m);
    });
  }

  test("tasks where no model has any", () => {
    const { code, stderr } = run("bench.ts", ["--model", folders.dit.folder, "--tasks", "add"]);
    expect([code, stderr.includes("tasks need a model with tokenizer.json and eval.jsonl")]).toEqual([
      2,
      true,
    ]);
  });
});

describe("fidelity", () => {
  const model = masked(folders.dream.folder);
  const { config } = model;

  test("sequences mask as many positions as they say, and have ordinary tokens elsewhere", () => {
    const sequences = syntheticSequences(config, { sequences: 200, tokens: 40, seed: 3 });
    let expected = 0, variance = 0, found = 0;
    for (const { maskRatio, tokens, places } of sequences) {
      expect([...tokens.keys()].filter((i) => tokens[i] === config.maskToken)).toEqual([...places]);
      expect(tokens.every((token, i) => places.includes(i) ? true : token >= 4)).toBe(true);
      expect(places.length).toBeGreaterThan(0);
      expected += 40 * maskRatio;
      variance += 40 * maskRatio * (1 - maskRatio);
      found += places.length;
    }
    expect(Math.abs(found - expected)).toBeLessThan(4 * Math.sqrt(variance) + 2);
    const again = syntheticSequences(config, { sequences: 200, tokens: 40, seed: 3 });
    expect(again).toEqual(sequences);
    expect(thrown(() => syntheticSequences({ ...config, vocabularySize: 4 }, { sequences: 1, tokens: 4 })))
      .toBeInstanceOf(RangeError);
  });

  test("reads Dream's logits a place before and LLaDA's at the place itself", () => {
    for (const [path, shift] of [[folders.dream.folder, true], [folders.llada.folder, false]] as const) {
      const each = masked(path), size = each.config.vocabularySize;
      const [sequence] = syntheticSequences(each.config, { sequences: 1, tokens: 12, seed: 1 });
      const all = each.forward(sequence!.tokens, 1).slice();
      const [got] = maskedLogits(each, [sequence!]);
      for (const [row, place] of sequence!.places.entries()) {
        const at = shift ? Math.max(0, place - 1) : place;
        const wanted = all.subarray(at * size, (at + 1) * size);
        const own = got!.subarray(row * size, (row + 1) * size);
        expect(Math.max(...own.map((value, i) => Math.abs(value - wanted[i]!)))).toBeLessThan(1e-4);
      }
    }
  });

  test("is KL and agreement by the definition, the mask left out", () => {
    const tiny = { vocabularySize: 3, maskToken: 1 };
    const sequences = [{ maskRatio: 0.2, tokens: Int32Array.of(1, 1), places: [0, 1] }];
    const p = [Float32Array.of(1, 9, 0, 0, 9, 2)], q = [Float32Array.of(0, 9, 0.5, 0, -9, 1)];
    const softmax = (a: number, b: number) =>
      [Math.exp(a), Math.exp(b)].map((v) => v / (Math.exp(a) + Math.exp(b)));
    const kl = (a: number[], b: number[]) => a.reduce((sum, v, i) => sum + v * Math.log(v / b[i]!), 0);
    const wanted = (kl(softmax(1, 0), softmax(0, 0.5)) + kl(softmax(0, 2), softmax(0, 1))) / 2;
    const few = { bins: 4, resamples: 10 };
    const [bin, all] = byMaskRatio(maskedDistances(tiny, sequences, p, q), few);
    expect(bin!.kl.value).toBeCloseTo(wanted, 12);
    expect([bin!.low, bin!.high, all!.agreement.value, all!.positions]).toEqual([0, 0.25, 0.5, 2]);
    expect(byMaskRatio(maskedDistances(tiny, sequences, p, p), few)[0]!.kl.value).toBe(0);
  });

  test("along trajectories is the error at full precision's states, whatever the batch", () => {
    const scheduler = loadScheduler(folders.dit.folder);
    const two = place.fresh("two");
    expect(run("quantize.ts", [folders.dit.folder, two, "--bits", "2", "--solver", "clip", "--quiet"]).code)
      .toBe(0);
    const [full, other] = [folders.dit.folder, two].map((path) => {
      const loaded = loadModel(path, kernels);
      if (loaded.kind !== "dit") throw new Error("expected an image model");
      return loaded.model;
    }) as [Extract<LoadedModel, { kind: "dit" }>["model"], Extract<LoadedModel, { kind: "dit" }>["model"]];
    const options = { sampler: "ddim", steps: 4, seed: 5, trajectory: true } as const;
    const drawn = drawImages(full, scheduler, 3, options), timesteps = scheduler.timesteps(4);
    const states = trajectoryStates(drawn, timesteps), reference = predictionsAt(full, states);
    const errorsOf = (predictions: Float32Array[]) =>
      predictionErrors(states, reference, predictions, full.imageElements, { resamples: 20 });
    const byTimestep = errorsOf(predictionsAt(other, states, 2));
    const drift = trajectoryDrift(drawn, drawImages(other, scheduler, 3, { ...options, batch: 2 }), {
      resamples: 20,
    });
    expect(byTimestep.map(({ timestep }) => timestep)).toEqual([...timesteps]);
    const { elements, trajectory } = drawn;
    const state = trajectory![2]!, timestep = scheduler.timesteps(4)[2]!;
    const predict = (each: typeof full) =>
      each.forward(state, [timestep, timestep, timestep], [0, 1, 2]).slice();
    const [wanted, got] = [predict(full), predict(other)];
    let error = 0, norm = 0;
    for (let i = 0; i < 3; i++) {
      for (let k = 0; k < elements; k++) {
        const at = i * 2 * elements + k; // a learned variance follows each image's prediction
        error += (got[at]! - wanted[at]!) ** 2;
        norm += wanted[at]! ** 2;
      }
    }
    expect(byTimestep[2]!.relativeError.value).toBeCloseTo(error / norm, 4);
    expect(drift[0]!.relativeDistance.value).toBe(0);
    expect(drift.at(-1)!.relativeDistance.value).toBeGreaterThan(0);
    const self = errorsOf(predictionsAt(full, states));
    expect(self.map(({ relativeError }) => relativeError.value)).toEqual([0, 0, 0, 0]);
  });
});

describe("a mean over timesteps", () => {
  test("has an interval of chance inside each of them only", () => {
    const strata = [[1, 1, 1], [100, 100, 100, 100]];
    expect(stratifiedMean(strata)).toEqual({ value: 50.5, low: 50.5, high: 50.5, confidence: 0.95 });
    const noisy = [
      Float64Array.from({ length: 50 }, (_, i) => i),
      Float64Array.from({ length: 50 }, (_, i) => 1000 + i),
    ];
    const { value, low, high } = stratifiedMean(noisy);
    expect(value).toBe(524.5);
    // ± 1.96 standard errors of each mean, halved and added in squares
    const half = 1.96 * Math.sqrt(2 * (50 ** 2 - 1) / 12 / 50) / 2;
    expect(Math.abs(high - low - 2 * half)).toBeLessThan(0.15 * 2 * half);
    expect(bootstrapMean([...noisy[0]!, ...noisy[1]!]).high).toBeGreaterThan(high + 50);
    expect(thrown(() => stratifiedMean([]))).toBeInstanceOf(RangeError);
    expect(thrown(() => stratifiedMean([[1], []]))).toBeInstanceOf(RangeError);
  });
});
