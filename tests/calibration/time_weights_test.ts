import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { DEFAULT_SOLVER_SETTINGS } from "../../lib/quant/solvers/settings.ts";
import { resolveConfig } from "../../lib/config/mod.ts";
import { CalibrationError } from "../../lib/errors.ts";
import { loadModel, loadScheduler } from "../../lib/models/mod.ts";
import { openKernels, withThreads } from "../../lib/native/mod.ts";
import { solvePlan } from "../../lib/solve/candidates.ts";
import { type Calibrated, loadCalibration } from "../../lib/calibration/mod.ts";
import { collectStatistics } from "../../lib/calibration/collect.ts";
import { planQuantization } from "../../lib/plan/plan.ts";
import { solveModel } from "../../lib/solve/solve_model.ts";
import { timeWeights, weightByTime, withTimeWeights } from "../../lib/calibration/time_weights.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { equalTimeGroups, maskRatioAxis, timestepAxis } from "../../lib/time/mod.ts";
import { MODELS, rejection, workplace } from "../_checkpoints.ts";
import { ditCheckpoint, store } from "../_models.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

const DREAM = join(MODELS, "dream-mini"), DIT = join(MODELS, "glyph-dit");
const OWN = { sampler: "ddpm", schedule: "auto" } as const;

/** A small DiT with its own number of timesteps. */
function imageModel(timesteps: number): string {
  const folder = store(place.fresh(), ditCheckpoint());
  const scheduler = JSON.parse(readFileSync(join(DIT, "scheduler_config.json"), "utf8")) as object;
  writeFileSync(
    join(folder, "scheduler_config.json"),
    JSON.stringify({ ...scheduler, num_train_timesteps: timesteps }),
  );
  return folder;
}

const calibration = (path: string, source: string, samples = 40) =>
  loadCalibration(loadModel(path, kernels), { source, samples, seed: 5 });

/** β by DESIGN.md's formulas. */
function betasOf(name: "linear" | "cosine", timesteps: number): number[] {
  const bar = (t: number) => Math.cos((t / timesteps + 0.008) / 1.008 * Math.PI / 2) ** 2;
  return Array.from(
    { length: timesteps },
    (_, t) =>
      name === "linear" ? 1e-4 + 0.0199 * t / (timesteps - 1) : Math.min(0.9999, 1 - bar(t + 1) / bar(t)),
  );
}

/** The 95th percentile by nearest rank. */
const capOf = (weights: number[]) =>
  weights.filter((w) => w < Infinity).sort((a, b) => a - b)[
    Math.ceil(0.95 * weights.filter((w) => w < Infinity).length) - 1
  ]!;

describe("weights of a model's steps", () => {
  test("masked diffusion: ρ of the step out of a bin, cut at its 95th percentile", () => {
    const got = timeWeights(maskRatioAxis(100), undefined, OWN);
    for (let bin = 0; bin < 100; bin++) {
      expect(Math.abs(got[bin]! - Math.min(1 / (bin + 1), 1 / 6))).toBeLessThan(1e-14);
    }
    for (const schedule of ["linear", "cosine"] as const) {
      expect(timeWeights(maskRatioAxis(100), undefined, { sampler: "ddim", schedule })).toEqual(got);
    }
  });

  test("Gaussian diffusion: β²/(2σ²α(1 − ᾱ)) and the displacement of DDIM, of linear and cosine schedules", () => {
    const scheduler = loadScheduler(DIT), T = scheduler.config.trainTimesteps;
    for (const schedule of ["linear", "cosine"] as const) {
      const betas = betasOf(schedule, T);
      let bar = 1;
      const bars = betas.map((beta) => bar *= 1 - beta);
      const ddpm = betas.map((beta, t) => {
        const before = t === 0 ? 1 : bars[t - 1]!, variance = (1 - before) / (1 - bars[t]!) * beta;
        return beta ** 2 / (2 * variance * (1 - beta) * (1 - bars[t]!));
      });
      const ddim = bars.map((own, t) => {
        const before = t === 0 ? 1 : bars[t - 1]!;
        return (Math.sqrt(1 - before) - Math.sqrt(before * (1 - own) / own)) ** 2;
      });
      for (const [sampler, wanted] of [["ddpm", ddpm], ["ddim", ddim]] as const) {
        const got = timeWeights(timestepAxis(T), scheduler, { sampler, schedule }), cap = capOf(wanted);
        for (let t = 0; t < T; t++) {
          const ratio = got[t]! / Math.min(cap, wanted[t]!);
          expect(Math.abs(ratio - 1)).toBeLessThan(1e-6);
        }
      }
    }
    // The model's own schedule is the linear one.
    const own = timeWeights(timestepAxis(T), scheduler, OWN);
    const linear = timeWeights(timestepAxis(T), scheduler, { ...OWN, schedule: "linear" });
    for (let t = 0; t < T; t++) expect(Math.abs(own[t]! / linear[t]! - 1)).toBeLessThan(1e-4);
  });
});

describe("calibration data by time", () => {
  test("a second moment is Σ ω_t H_t, of layers that read positions and of those that read samples", async () => {
    for (const path of [imageModel(8), DREAM]) {
      const isDream = path === DREAM;
      const calibrated = await calibration(path, isDream ? join(DREAM, "calibration.jsonl") : "synthetic");
      const { axis } = calibrated.data;
      const bins = 8, groups = equalTimeGroups(axis, bins);
      // Equal inside a group, so that groups' sums are enough to know the whole.
      const weights = Float64Array.from(
        { length: axis.bins },
        (_, bin) => 1 + Math.floor(bin * bins / axis.bins) ** 2,
      );
      const collect = (data: Calibrated, second: "total" | "groups") =>
        collectStatistics(data, {
          kernels,
          fingerprint: "",
          groups,
          second,
          run: { identity: "", source: "", isSynthetic: true, samples: 1 },
        });
      const parts = await collect(calibrated, "groups");
      const whole = await collect(weightByTime(calibrated, weights), "total");
      const kinds = new Set<number>();
      for (const [name, { cols, groupSecond, second: plain, tokens }] of parts.inputs) {
        const got = whole.moments(name), second = new Float64Array(cols * cols);
        let weight = 0, largest = 0, difference = 0, fromPlain = 0;
        for (let g = 0; g < bins; g++) {
          const own = 1 + g ** 2;
          weight += own * parts.inputOf(name).weight[g]!;
          for (let k = 0; k < second.length; k++) second[k]! += own * groupSecond![g * cols * cols + k]!;
        }
        const plainWeight = parts.moments(name).weight;
        for (let k = 0; k < second.length; k++) {
          largest = Math.max(largest, Math.abs(second[k]! / weight));
          difference = Math.max(difference, Math.abs(got.second[k]! / got.weight - second[k]! / weight));
          fromPlain = Math.max(fromPlain, Math.abs(plain![k]! / plainWeight - second[k]! / weight));
        }
        expect(difference).toBeLessThan(1e-4 * largest);
        expect(fromPlain).toBeGreaterThan(2e-3 * largest);
        kinds.add(tokens.reduce((a, b) => a + b));
      }
      if (!isDream) expect(kinds.size).toBeGreaterThan(1);
    }
  });

  test("equal weights change no byte of what is solved, others do; what is held out stays", async () => {
    const calibrated = await calibration(DREAM, join(DREAM, "calibration.jsonl"));
    const names = calibrated.model.stages.flatMap(({ layers }) => layers.map(({ name }) => name)).slice(0, 5);
    const solve = async (data: Calibrated, threads = 1) =>
      [
        ...await solveModel(data, {
          kernels: withThreads(kernels, threads),
          solver: "best",
          settings: DEFAULT_SOLVER_SETTINGS,
          gridOf: (name) => names.includes(name) ? { bits: 2, groupSize: 0, zeroPoint: "real" } : undefined,
        }),
      ].map(([name, { tensor }]) => [name, tensor]);
    const plain = await solve(calibrated);
    const { bins } = calibrated.data.axis;
    expect(await solve(weightByTime(calibrated, new Float64Array(bins).fill(0.3)))).toEqual(plain);
    const own = withTimeWeights(calibrated, OWN);
    expect(own.data.heldOut).toBe(calibrated.data.heldOut as never);
    const weighted = await solve(own);
    expect(weighted).not.toEqual(plain);
    expect(await solve(own, 3)).toEqual(weighted);
  });

  test("weights that cannot be are refused", async () => {
    const calibrated = await calibration(DREAM, join(DREAM, "calibration.jsonl"));
    const { bins } = calibrated.data.axis;
    expect(() => weightByTime(calibrated, [1, 2])).toThrow(TypeError);
    for (const bad of [NaN, -1, Infinity]) {
      const weights = new Float64Array(bins).fill(1);
      weights[7] = bad;
      expect(() => weightByTime(calibrated, weights)).toThrow(`weights must be numbers ≥ 0, got ${bad}`);
    }
    expect(() => weightByTime(calibrated, new Float64Array(bins))).toThrow("some weight must be above 0");
    const without = { ...calibrated, data: { ...calibrated.data, fit: [] } } as Calibrated;
    expect(() => withTimeWeights(without, OWN)).toThrow(CalibrationError);
  });
});

describe("phase 3's terms, by configuration", () => {
  const solve = async (calibrated: Calibrated, path: string, overrides: Record<string, unknown>) => {
    const { config } = resolveConfig({
      overrides: {
        bit_width: 2,
        group_size: 0,
        solver: "best",
        "thermodynamic.transition_optimization.enabled": true,
        layer_bit_widths: { [path === DREAM ? "layers\\.[1-9]" : "blocks\\.[1-9]"]: 16 },
        ...overrides,
      },
    });
    const messages: string[] = [];
    const checkpoint = openCheckpoint(path);
    const plan = planQuantization(checkpoint, config);
    const solved = await solvePlan({ calibrated, plan, config: { ...config, solver: "best" }, kernels }, {
      onEvent: ({ message }) => messages.push(message),
    });
    return { solved, messages: messages.join("\n") };
  };
  const WEIGHTS = "thermodynamic.transition_optimization.time_weights";
  const ANNEALING = "thermodynamic.transition_optimization.entropy_weight";
  const SCHEDULE = "thermodynamic.transition_optimization.beta_schedule";

  test("are compared with doing without, and the least held-out error decides", async () => {
    const calibrated = await calibration(DREAM, join(DREAM, "calibration.jsonl"));
    const plain = await solve(calibrated, DREAM, { [WEIGHTS]: "none", "solver_options.candidates": 1 });
    for (
      const terms of [
        { [WEIGHTS]: "ddpm" },
        { [WEIGHTS]: "ddim", [ANNEALING]: 0.1 },
        { [ANNEALING]: 0.1 },
      ] as Record<string, unknown>[]
    ) {
      const { solved, messages } = await solve(calibrated, DREAM, terms);
      expect(solved.distances.length).toBe(2);
      expect(solved.distances[1]).toBe(plain.solved.distances[0]!);
      expect(solved.chosen).toBe(solved.distances[0]! <= solved.distances[1]! ? 0 : 1);
      const outcome = solved.chosen === 0 ? "kept" : "rejected";
      expect(messages.includes(`weights by time (${String(terms[WEIGHTS])}): ${outcome}`)).toBe(
        WEIGHTS in terms,
      );
      if (ANNEALING in terms) expect(messages).toContain(`annealed codes: ${outcome}`);
    }
    const all = await solve(calibrated, DREAM, {
      [WEIGHTS]: "ddpm",
      [ANNEALING]: 0.1,
      "solver_options.candidates": 4,
    });
    expect(all.solved.distances.length).toBe(4);
    expect(all.solved.distances[all.solved.chosen]).toBe(Math.min(...all.solved.distances));
  }, 120_000);

  test("a schedule and a sampler have an effect on images, neither has one without phase 3", async () => {
    const path = imageModel(20), calibrated = await calibration(path, "synthetic", 64);
    const codes = async (overrides: Record<string, unknown>) =>
      JSON.stringify(
        [...(await solve(calibrated, path, { "solver_options.candidates": 1, ...overrides })).solved.layers]
          .map(([name, { tensor }]) => [name, Array.from(tensor.packed)]),
      );
    const own = await codes({});
    const others = await Promise.all([
      codes({ [SCHEDULE]: "cosine" }),
      codes({ [WEIGHTS]: "ddim" }),
      codes({ [WEIGHTS]: "none" }),
      codes({ [ANNEALING]: 0.5 }),
    ]);
    expect(new Set([own, ...others]).size).toBe(5);
    expect(await codes({ [WEIGHTS]: "ddpm" })).toBe(own); // auto, on an image model
    const off = { "thermodynamic.transition_optimization.enabled": false };
    expect(await codes({ ...off, [SCHEDULE]: "cosine", [ANNEALING]: 0.5 })).toBe(others[2]!);
  }, 120_000);

  test("need data, or statistics by time group", async () => {
    const calibrated = await calibration(DREAM, join(DREAM, "calibration.jsonl"));
    const without = { ...calibrated, data: { ...calibrated.data, fit: [], heldOut: [] } } as Calibrated;
    const error = await rejection(solve(without, DREAM, { [WEIGHTS]: "ddpm" }));
    expect(error).toBeInstanceOf(CalibrationError);
    expect(error.message).toContain("there must be samples or statistics of them, got none");
  });
});
