/** The suite of the solver's speed at small sizes, and its counts of operations by hand. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { formatReport } from "../../lib/bench/report.ts";
import { countedKernels } from "../../lib/bench/solver_speed/counted.ts";
import { solverSpeedSuiteOf } from "../../lib/bench/solver_speed/suite.ts";
import type { BenchContext, SuiteReport } from "../../lib/bench/suite.ts";
import { environmentOf } from "../../lib/eval/environment.ts";
import { openKernels } from "../../lib/native/mod.ts";
import {
  accumulateMoment,
  correctedTarget,
  emptyMoments,
  factorMoments,
  solveLayer,
} from "../../lib/quant/mod.ts";
import { DEFAULT_SOLVER_SETTINGS } from "../../lib/quant/solvers/settings.ts";
import { parseBenchArguments } from "../../scripts/bench.ts";
import { commandOf } from "../../scripts/_command/programs.ts";
import { MODELS } from "../_checkpoints.ts";
import { gaussians } from "../_kernels.ts";

const kernels = await openKernels({ threads: 1 });
afterAll(() => kernels.close());

const { options } = parseBenchArguments(
  [
    ...["--suite", "solver-speed", "--quick", "--threads", "1", "--model", join(MODELS, "dream-mini")],
    ...["--parts", "kernels,published,models,statistics,effort"],
  ],
);
const context: BenchContext = {
  kernels,
  environment: environmentOf(kernels),
  options,
  commandOf,
  progress: () => {},
};
const SHAPE = { rows: 64, cols: 96, tokens: 64, samples: 2, settings: { ratios: [], rounds: 1 } };
const SCALE = {
  shapes: [SHAPE],
  published: 0,
  hidden: 64,
  calibration: { "self_calibration.records": 8, "self_calibration.tokens": 16, "self_calibration.steps": 4 },
  models: 0,
  effort: { rows: 300, cols: 64, tokens: 96 },
  statistics: 256,
};

const STEPS = ["moments", "factorization", "corrected targets", "feedback", "refinement", "whole solve"];
const OTHERS = [
  "best, Dream 7B, effort medium (forecast)",
  "best, Dream 7B, effort medium memory (forecast)",
  "best, Dream 7B, effort low (forecast)",
  "best, Dream 7B, effort low memory (forecast)",
  "best, LLaDA 8B, effort medium (forecast)",
  "best, LLaDA 8B, effort medium memory (forecast)",
  "best, DiT-XL/2, effort medium (forecast)",
  "best from statistics, Q4_K, FLUX's shape",
  "a step of 256 positions / llama.cpp's",
  "held-out error of best, own / real data",
  "held-out error of best, more bits / fewer",
];

describe("the solver-speed suite", () => {
  test("says of every goal whether it is met, with the rates that it measured", async () => {
    const report: SuiteReport = await solverSpeedSuiteOf(SCALE).run(context);
    const steps = report.rows.filter((row) => "share" in row);
    const own = steps.filter(({ step }) => step !== "product, OpenBLAS");
    expect(own.map(({ step }) => step)).toEqual(["product (SGEMM)", ...STEPS]);
    for (const step of steps) expect(Number(step["share"]) > 0 && Number(step["seconds"]) > 0).toBe(true);
    expect(report.goals.map(({ goal }) => goal)).toEqual([
      ...STEPS.map((step) => `${step}, 64 × 96`),
      ...OTHERS,
    ]);
    const saved = report.rows.filter((row) => "ofClip" in row) as { solver: string; ofClip: number }[];
    expect(saved.map(({ solver }) => solver)).toEqual(["clip", "best"]);
    expect(saved[0]!.ofClip).toBe(1);
    for (const { met, measured } of report.goals.slice(0, STEPS.length)) {
      expect([typeof met, typeof measured]).toEqual(["boolean", "string"]);
    }
    expect(report.rows.filter((row) => "what" in row).map(({ model }) => model)).toEqual([
      "Dream, 2 layers of width 64",
    ]);
    const efforts = report.rows.filter((row) => "steps" in row) as {
      objective: number;
      bits: number;
      groupSize: number;
    }[];
    for (const [bits, groupSize] of [[2, 0], [2, 64], [4, 64]]) {
      const own = efforts.filter((row) => row.bits === bits && row.groupSize === groupSize).map((
        { objective },
      ) => objective);
      expect(own.length).toBeGreaterThan(9);
      // more of the same steps never leave more
      for (const [more, less] of [[2, 1], [4, 2], [7, 5], [8, 4]]) {
        expect(own[more!]!).toBeLessThanOrEqual(own[less!]! * (1 + 1e-5));
      }
      expect(own.at(-1)!).toBeLessThan(own[0]!);
    }
    for (const line of formatReport(report)) expect([line, line.length <= 120]).toEqual([line, true]);
  }, 120_000);

  test("measures the parts and shapes that are asked for, and says how far it is", async () => {
    const lines: string[] = [];
    const { options } = parseBenchArguments(
      ["--suite", "solver-speed", "--threads", "1", "--shapes", "64x128,128x64"],
    );
    expect([options.parts, options.shapes]).toEqual([["kernels"], [{ rows: 64, cols: 128 }, {
      rows: 128,
      cols: 64,
    }]]);
    const asked = { ...context, options, progress: (line: string) => void lines.push(line) };
    const report: SuiteReport = await solverSpeedSuiteOf(undefined).run(asked);
    expect(report.sections.map(({ title }) => title.split(",")[0])).toEqual([
      "The solver's kernels beside a product of matrices",
    ]);
    for (const name of ["64 × 128", "128 × 64"]) {
      for (const step of ["product", "factorization, 2 of 3", "feedback and refinement, 3 of 3"]) {
        expect(lines).toContain(`kernels at ${name}: ${step}`);
      }
      expect(lines.some((line) => line.startsWith(`kernels at ${name}: the whole solve at `))).toBe(true);
    }
    expect(report.goals.length).toBe(2 * STEPS.length + 3);
    expect(report.skipped.map(({ what }) => what)).toContain("the part published");
  }, 120_000);

  test("what does not fit into memory is left out, and the goals say why", async () => {
    const huge = { ...SHAPE, rows: 2 ** 20, cols: 65_536 };
    const scale = { ...SCALE, shapes: [huge], hidden: undefined };
    const report = await solverSpeedSuiteOf(scale).run(context);
    expect(report.goals.map(({ goal }) => goal)).toEqual([
      ...STEPS.map((step) => `${step}, 1048576 × 65536`),
      ...OTHERS,
    ]);
    const saved = report.rows.filter((row) => "ofClip" in row) as { solver: string; ofClip: number }[];
    expect(saved.map(({ solver }) => solver)).toEqual(["clip", "best"]);
    expect(saved[0]!.ofClip).toBe(1);
    for (const { met, reason } of report.goals) expect([met, typeof reason]).toEqual([null, "string"]);
    expect(report.goals[0]!.reason).toMatch(/needs .* GB of memory, got/);
    expect(report.skipped[0]!.what).toBe("kernels at 1048576 × 65536");
  }, 120_000);
});

test("operations are counted as by hand", () => {
  const { kernels: own, take } = countedKernels(kernels), cols = 64, rows = 10, tokens = 20;
  const x = gaussians(1, tokens * cols), weights = gaussians(2, rows * cols);
  const moments = { ...emptyMoments(cols), tokens, weight: tokens }, cross = new Float32Array(cols * cols);
  accumulateMoment(own, x, undefined, undefined, tokens, moments.second);
  expect(take().get("accumulate_moment")!.flops).toBe(tokens * cols * cols);
  accumulateMoment(own, x, x, undefined, tokens, cross);
  expect(take().get("accumulate_moment")!.flops).toBe(2 * tokens * cols * cols);
  accumulateMoment(own, x, undefined, undefined, tokens, new Float32Array(2 * 32 * 32), 32);
  expect(take().get("accumulate_moment")!.flops).toBe(tokens * 2 * 32 * 32);
  const moment = factorMoments(own, moments);
  expect(take().get("factor_moment")!.flops).toBeCloseTo(cols ** 3 / 3, 6);
  correctedTarget(own, { weights, rows, moment, cross }, DEFAULT_SOLVER_SETTINGS);
  const target = take();
  expect(target.get("multiply")!.flops + target.get("solve_moment")!.flops).toBe(4 * rows * cols * cols);
  const problem = { weights, rows, cols, moment, bits: 2, groupSize: 0, zeroPoint: "real" } as const;
  const settings = { ...DEFAULT_SOLVER_SETTINGS, ratios: [], rounds: 3 };
  const { tensor } = solveLayer(own, "best", problem, settings), solve = take();
  expect(solve.get("quantize_feedback")!.flops).toBe(rows * cols * cols);
  expect(solve.get("refine_codes")!.flops).toBe(2 * rows * cols * cols * 4);
  expect(solve.get("refine_codes")!.seconds).toBeGreaterThan(0);
  expect(tensor).toEqual(solveLayer(kernels, "best", problem, settings).tensor);
});
