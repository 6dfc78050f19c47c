import { afterAll, describe, expect, spyOn, test } from "bun:test";
import { cpSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { KeptSamples } from "../../lib/calibration/kept_samples.ts";
import { loadCalibration } from "../../lib/calibration/mod.ts";
import {
  draftOwnSamples,
  makeOwnSamples,
  type OwnSequences,
  type OwnTrajectories,
  SEQUENCES,
  TRAJECTORIES,
  withinBound,
} from "../../lib/calibration/own_samples.ts";
import { resolveConfig } from "../../lib/config/mod.ts";
import {
  drawPuzzle,
  imageNoise,
  loadModel,
  loadScheduler,
  loadTokenizer,
  RandomStream,
} from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import type { Progress, RunEvent } from "../../lib/progress.ts";
import { MODELS, rejection, workplace } from "../_checkpoints.ts";
import { ditCheckpoint, dreamCheckpoint, lladaCheckpoint, store } from "../_models.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

const DREAM = join(MODELS, "dream-mini");
const folders = {
  dream: store(place.fresh("dream"), dreamCheckpoint()),
  llada: store(place.fresh("llada"), lladaCheckpoint()),
  dit: store(place.fresh("dit"), ditCheckpoint()),
};
cpSync(join(MODELS, "glyph-dit", "scheduler_config.json"), join(folders.dit, "scheduler_config.json"));
const SMALL = { records: 24, tokens: 24, steps: 6 };

const sequences = async (path: string, seed = 1, settings = SMALL, options = {}) =>
  await makeOwnSamples(loadModel(path, kernels), settings, seed, options) as OwnSequences;

describe("work within its bound", () => {
  const cost = (share: number) => SEQUENCES.multiplyAdds * share;
  const free = { records: null, steps: null };
  test("takes the usual numbers where they fit, then fewer steps, then fewer records", () => {
    expect(withinBound(free, SEQUENCES, cost(1 / 512 / 32))).toEqual({ records: 512, steps: 32 });
    expect(withinBound(free, SEQUENCES, cost(1 / 511 / 32))).toEqual({ records: 256, steps: 32 });
    expect(withinBound(free, SEQUENCES, cost(1 / 256 / 32))).toEqual({ records: 256, steps: 32 });
    expect(withinBound(free, SEQUENCES, cost(1 / 256 / 16))).toEqual({ records: 256, steps: 16 });
    expect(withinBound(free, SEQUENCES, cost(1 / 64 / 4))).toEqual({ records: 64, steps: 4 });
    expect(withinBound(free, SEQUENCES, cost(1))).toEqual({ records: 32, steps: 4 });
    expect(withinBound(free, TRAJECTORIES, cost(100))).toEqual({ records: 16, steps: 6 });
  });

  test("takes what is asked for whatever it costs", () => {
    expect(withinBound({ records: 500, steps: 100 }, SEQUENCES, cost(1))).toEqual({
      records: 500,
      steps: 100,
    });
    expect(withinBound({ records: null, steps: 64 }, SEQUENCES, cost(1 / 64 / 64))).toEqual({
      records: 64,
      steps: 64,
    });
  });
});

describe("a draft", () => {
  for (const [kind, path] of Object.entries(folders)) {
    test(`${kind}: has the form of what is made, and the work of all steps`, async () => {
      const loaded = loadModel(path, kernels), lengths: number[] = [];
      const settings = { records: 16, tokens: 24, steps: 3 };
      const made = await makeOwnSamples(loaded, settings, 1, {
        onProgress: (progress) => void lengths.push(progress.tensors),
      });
      const { samples, positions, passes } = await draftOwnSamples(loaded, settings, 1);
      const form = (own: typeof made) =>
        own.kind === "sequences"
          ? own.rows.map(({ tokens, answerStart }) => [tokens.length, answerStart])
          : [[...own.labels], own.timesteps, own.states.map(({ length }) => length)];
      expect(form(samples)).toEqual(form(made));
      const each = loaded.kind === "dit"
        ? (loaded.model.config.sampleSize / loaded.model.config.patchSize) ** 2
        : 1;
      expect(positions).toBe(lengths[0]! * each);
      expect(passes).toBe(lengths.length);
      if (samples.kind === "sequences" && loaded.kind !== "dit") {
        const { maskToken } = loaded.model.config;
        expect(samples.rows.some(({ tokens }) => tokens.includes(maskToken))).toBe(false);
      }
    });
  }
});

describe("sequences that a model writes", () => {
  for (const kind of ["dream", "llada"] as const) {
    test(`${kind}: whole, of the vocabulary, the same for a seed and others for another`, async () => {
      const { rows } = await sequences(folders[kind]),
        { config } = loadModel(folders[kind], kernels).model as {
          config: { maskToken: number; padToken?: number; vocabularySize: number };
        };
      expect(rows.length).toBe(SMALL.records);
      expect(new Set(rows.map(({ tokens }) => tokens.length))).toEqual(new Set([24, 12, 6]));
      for (const { tokens } of rows) {
        for (const token of tokens) {
          expect(token).not.toBe(config.maskToken);
          expect(token).toBeGreaterThanOrEqual(0);
          expect(token).toBeLessThan(config.vocabularySize);
        }
      }
      expect(await sequences(folders[kind])).toEqual({ kind: "sequences", rows });
      expect(await sequences(folders[kind], 2)).not.toEqual({ kind: "sequences", rows });
    });
  }

  test("take as long as by the second step: the first one also reads the weights", async () => {
    let clock = 0, done = 0;
    const counts: number[] = [], announced: unknown[] = [];
    const now = spyOn(performance, "now").mockImplementation(() => clock);
    try {
      await sequences(folders.dream, 1, SMALL, {
        onEvent({ kind, data }: RunEvent) {
          if (kind === "stage") clock += 100_000;
          if (kind === "calibrate") announced.push(data);
        },
        onProgress({ tensorsDone, tensors }: Progress) {
          counts.push(tensorsDone - done);
          [done, clock] = [tensorsDone, clock + 1000];
          if (counts.length === 1) counts.unshift(tensors);
        },
      });
    } finally {
      now.mockRestore();
    }
    const [total, first, second] = counts as [number, number, number];
    expect(announced).toEqual([{ seconds: 101 + (total - first - second) / second }]);
  });

  test("are answers to puzzles where the model reads those, and most of them are right", async () => {
    const { rows } = await sequences(DREAM, 1, { records: 60, tokens: 128, steps: 32 });
    const tokenizer = await loadTokenizer(DREAM);
    let right = 0;
    for (const { tokens } of rows) {
      const text = tokenizer.decode(tokens), [prompt, answer] = text.split(/(?<=[=>])/) as [string, string];
      right += Number(answer === solution(prompt));
    }
    expect(right).toBeGreaterThan(50);
  });

  test("their prompts are puzzles that have a solution", () => {
    for (let i = 0; i < 60; i++) {
      const { prompt, answer } = drawPuzzle(new RandomStream(1, i), i);
      expect(solution(prompt)?.length).toBe(answer);
    }
  });

  test("are stopped by a signal, and say how far they are", async () => {
    const controller = new AbortController(), shares: number[] = [];
    const error = await rejection(sequences(folders.dream, 1, SMALL, {
      signal: controller.signal,
      onProgress: ({ bytesDone, bytes }: { bytesDone: number; bytes: number }) => {
        shares.push(bytesDone / bytes);
        if (shares.length === 3) controller.abort("SIGINT");
      },
    }));
    expect(String(error)).toContain("SIGINT");
    expect(shares.length).toBe(3);
    const all: number[] = [];
    await sequences(folders.dream, 1, SMALL, {
      onProgress: ({ bytesDone, bytes }: { bytesDone: number; bytes: number }) => all.push(bytesDone / bytes),
    });
    expect(all).toEqual(all.toSorted((a, b) => a - b));
    expect(all.at(-1)).toBe(1);
  });
});

/** The answer of a puzzle by its rules; of a grid any, as the model may choose, undefined where there is none. */
function solution(prompt: string): string | undefined {
  const sum = /^(\d\d)\+(\d\d)=$/.exec(prompt);
  if (sum !== null) return String(Number(sum[1]) + Number(sum[2])).padStart(3, "0");
  const sort = /^([a-p]{8})>$/.exec(prompt);
  if (sort !== null) return [...sort[1]!].sort().join("");
  const cells = [.../^S([0-4]{16})>$/.exec(prompt)![1]!].map(Number);
  const fits = (at: number, digit: number) =>
    cells.every((other, i) => {
      const sees = (i >> 2) === (at >> 2) || (i & 3) === (at & 3) ||
        ((i >> 3) === (at >> 3) && ((i & 3) >> 1) === ((at & 3) >> 1));
      return i === at || !sees || other !== digit;
    });
  const fill = (at: number): boolean => {
    if (at === 16) return true;
    if (cells[at] !== 0) return fits(at, cells[at]!) && fill(at + 1);
    for (let digit = 1; digit <= 4; digit++) {
      cells[at] = digit;
      if (fits(at, digit) && fill(at + 1)) return true;
    }
    cells[at] = 0;
    return false;
  };
  return fill(0) ? cells.join("") : undefined;
}

describe("states on an image model's own trajectories", () => {
  const loaded = loadModel(folders.dit, kernels);
  if (loaded.kind !== "dit") throw new Error("a DiT is needed");
  const { model } = loaded, { classes } = model.config, elements = model.imageElements;

  test("have all classes and none, all timesteps, and follow the sampler from the seed's noise", async () => {
    const settings = { records: 40, tokens: 128, steps: 5 };
    const own = await makeOwnSamples(loaded, settings, 1, {}) as OwnTrajectories;
    expect(new Set(own.labels)).toEqual(new Set(Array.from({ length: classes + 1 }, (_, i) => i)));
    for (const visited of own.timesteps) {
      expect(visited.length).toBe(5);
      for (const [k, timestep] of visited.entries()) expect(Math.floor(timestep / 200)).toBe(4 - k);
    }
    const scheduler = loadScheduler(folders.dit, "ddim");
    for (const i of [0, 7, 39]) {
      const [label, visited, states] = [own.labels[i]!, own.timesteps[i]!, own.states[i]!];
      const x = imageNoise(1 + 6, i, 1, elements);
      for (let k = 0; k < 5; k++) {
        const state = states.subarray(k * elements, (k + 1) * elements);
        for (let e = 0; e < elements; e++) {
          expect(Math.abs(state[e]! - x[e]!)).toBeLessThan(1e-4 * (1 + Math.abs(x[e]!)));
        }
        const output = model.forward(x, [visited[k]!], [label]).slice(0, elements);
        scheduler.stepDdim(x, output, visited[k]!, visited[k + 1], {}, new Float32Array(0));
      }
    }
    expect(await makeOwnSamples(loaded, settings, 1, {})).toEqual(own);
    expect(await makeOwnSamples(loaded, settings, 2, {})).not.toEqual(own);
  });

  test("samples are the states nearest to their times", async () => {
    const self = { records: 16, tokens: 128, steps: 10 };
    const calibrated = await loadCalibration(loaded, { source: "self", samples: 64, seed: 3, self });
    if (calibrated.kind !== "images") throw new Error("images are needed");
    const { data } = calibrated;
    const own = data.own as OwnTrajectories;
    const times = data.fit.flatMap(({ times }) => [...times]).sort((a, b) => a - b);
    expect(times.length).toBe(64);
    for (let i = 0; i < 64; i++) expect(Math.abs(times[i]! - (i + 0.5) * 1000 / 64)).toBeLessThan(120);
    for (const { batch, times } of data.fit) {
      for (const [i, time] of times.entries()) {
        const state = batch.samples.slice(i * elements, (i + 1) * elements);
        const found = own.states.findIndex((states, record) => {
          const k = own.timesteps[record]!.indexOf(time);
          return k >= 0 && own.labels[record] === batch.labels[i] &&
            states.subarray(k * elements, (k + 1) * elements).every((value, e) => value === state[e]);
        });
        expect(found).toBeGreaterThanOrEqual(0);
      }
    }
    expect([data.isSynthetic, data.heldOut.length > 0]).toEqual([false, true]);
  });
});

describe("a run without calibration data", () => {
  for (const kind of ["dream", "llada", "dit"] as const) {
    test(`${kind}: is solved on what the model makes itself`, async () => {
      const lines: string[] = [];
      const { config } = resolveConfig({
        overrides: {
          num_threads: 1,
          bit_width: 4,
          group_size: 16,
          calibration_samples: 32,
          "self_calibration.records": 16,
          "self_calibration.steps": 4,
          "self_calibration.tokens": 16,
        },
      });
      const { layers, solver } = await quantizeCheckpoint({
        input: folders[kind],
        output: place.fresh(),
        config,
        kernels,
        onEvent: ({ message }) => void lines.push(message),
      });
      expect(solver?.name).toBe("best");
      expect(layers.filter(({ solved }) => solved !== undefined).length).toBeGreaterThan(5);
      expect(lines.join("\n")).toMatch(/that the model (wrote|drew) itself/);
    });
  }
});

describe("a stopped run", () => {
  for (const kind of ["dream", "llada", "dit"] as const) {
    test(`goes on behind the last batch it kept: ${kind}`, async () => {
      const settings = { records: 300, tokens: 24, steps: 3 }, folder = place.fresh("work");
      mkdirSync(folder);
      const loaded = () => loadModel(folders[kind], kernels);
      const whole = await makeOwnSamples(loaded(), settings, 1, {});
      let steps = 0;
      const stop = new AbortController();
      const onProgress = ({ bytesDone, bytes }: { bytesDone: number; bytes: number }) => {
        steps++;
        if (bytesDone > bytes / 2) stop.abort("SIGINT");
      };
      const kept = () => new KeptSamples(folder, "run");
      const stopped = makeOwnSamples(loaded(), settings, 1, {
        kept: kept(),
        signal: stop.signal,
        onProgress,
      });
      expect(await stopped.then(() => "done", String)).toBe("SIGINT");
      const before = steps;
      steps = 0;
      const left = await draftOwnSamples(loaded(), settings, 1, kept());
      expect(left.passes).toBeLessThan((await draftOwnSamples(loaded(), settings, 1)).passes);
      const resumed = await makeOwnSamples(loaded(), settings, 1, {
        kept: kept(),
        onProgress: () => void steps++,
      });
      expect(resumed).toEqual(whole);
      expect(steps).toBe(left.passes);
      const total = before + steps;
      // Another run's batches, and those that were changed, are made anew.
      steps = 0;
      const other = new KeptSamples(folder, "another"), target = new Int32Array(1);
      expect(other.load(0, target)).toBe(false);
      for (const name of readdirSync(folder)) {
        const path = join(folder, name), bytes = readFileSync(path);
        bytes[bytes.length - 1]! ^= 1;
        writeFileSync(path, bytes);
      }
      const again = await makeOwnSamples(loaded(), settings, 1, {
        kept: kept(),
        onProgress: () => void steps++,
      });
      expect(again).toEqual(whole);
      expect(steps).toBeGreaterThanOrEqual(total - 3);
    });
  }
});

test("a small language model has three times as many sequences held out: few positions make up most of a KL", async () => {
  const counts = async (path: string, samples: number) => {
    const { data } = await loadCalibration(loadModel(path, kernels), {
      source: "self",
      samples,
      seed: 1,
      self: SMALL,
    });
    const sum = (parts: readonly { readonly samples: number }[]) =>
      parts.reduce((n, part) => n + part.samples, 0);
    return [sum(data.fit), sum(data.heldOut)];
  };
  expect(await counts(folders.dream, 128)).toEqual([128, 384]);
  // Errors of images are alike: half as many, 256 at least of few positions.
  expect(await counts(folders.dit, 600)).toEqual([600, 300]);
});
