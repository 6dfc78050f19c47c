import { afterAll, describe, expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { type Calibrated, loadCalibration } from "../../lib/calibration/mod.ts";
import { resolveConfig } from "../../lib/config/mod.ts";
import { InterruptedError, MemoryError } from "../../lib/errors.ts";
import { loadModel } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { chooseSolver } from "../../lib/pipeline/choose_solver.ts";
import { announce } from "../../lib/pipeline/forecast.ts";
import { planQuantization, quantizeCheckpoint, type RunEvent } from "../../lib/pipeline/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { MODELS, rejection, workplace } from "../_checkpoints.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
const DREAM = join(MODELS, "dream-mini");
const checkpoint = openCheckpoint(DREAM);
afterAll(() => {
  checkpoint.close();
  kernels.close();
  place.remove();
});

const small = await loadCalibration(loadModel(DREAM, kernels), { source: "synthetic", samples: 32, seed: 1 });

/** The same with as many parts of a million positions: only their number is looked at. */
const large = (parts: number): Calibrated =>
  ({
    ...small,
    data: {
      ...small.data,
      heldOut: [],
      fit: Array.from({ length: parts }, () => ({ samples: 50_000, weights: { length: 1_000_000 } })),
    },
  }) as unknown as Calibrated;

const configOf = (overrides: Record<string, unknown>) =>
  resolveConfig({ overrides: { solver: "clip", bit_width: 2, calibration_samples: 1024, ...overrides } })
    .config;

function forecast(
  calibrated: Calibrated,
  memoryBytes: number,
  overrides: Record<string, unknown>,
): RunEvent[] {
  const config = configOf(overrides), events: RunEvent[] = [];
  const options = { onEvent: (event: RunEvent) => void events.push(event) };
  announce(
    { checkpoint, config: chooseSolver(checkpoint, config), kernels, memoryBytes, options },
    calibrated,
    planQuantization(checkpoint, config).rows,
  );
  return events;
}

function refusal(
  calibrated: Calibrated,
  memoryBytes: number,
  overrides: Record<string, unknown>,
): MemoryError {
  try {
    forecast(calibrated, memoryBytes, overrides);
  } catch (error) {
    if (error instanceof MemoryError) return error;
    throw error;
  }
  throw new Error("expected a refusal");
}

describe("memory of calibrated work", () => {
  const best = { solver: "best" };
  const hidden = 4 * 100e6 * (checkpoint.config!["hidden_size"] as number);

  test("holds the hidden states of all data, once more where layers read what quantized ones make", () => {
    const needed = (overrides: Record<string, unknown>) => refusal(large(100), 1, overrides).neededBytes;
    const once = needed({ ...best, calibration_mode: "once" }), blocks = needed(best);
    expect(once).toBeGreaterThan(hidden);
    expect(Math.abs(blocks - once - hidden)).toBeLessThan(hidden / 10);
  });

  test("that does not fit is refused with a setting that does", () => {
    const peak = refusal(large(100), 1, best).neededBytes - process.memoryUsage().rss;
    const at = (share: number) => refusal(large(100), process.memoryUsage().rss + share * peak, best).message;
    expect(at(0.7)).toMatch(/--max-memory.*; it fits with calibration_mode: once$/);
    expect(at(0.3)).toMatch(/; it fits with --samples 256$/);
    expect(at(0.0001)).toMatch(/; with --solver clip a tensor at a time is in memory$/);
    forecast(large(25), process.memoryUsage().rss + 0.3 * peak, best); // as said: a quarter of the samples
    forecast(large(100), process.memoryUsage().rss + 0.7 * peak, { ...best, calibration_mode: "once" });
  });

  test("is looked at before a weight is read, and nothing is left behind", async () => {
    const output = place.fresh("refused");
    const error = await rejection(
      quantizeCheckpoint({ input: DREAM, output, config: configOf(best), kernels, maxMemoryBytes: 1 }),
    );
    expect(error).toBeInstanceOf(MemoryError);
    expect(error.message).toMatch(/--max-memory.*--solver clip/);
    expect(existsSync(output)).toBe(false);
  });

  test("refused when a run goes on costs nothing of what was solved", async () => {
    const output = place.fresh("resumed"), controller = new AbortController();
    const config = configOf({ solver: "feedback", calibration_samples: 32 });
    const job = { input: DREAM, output, config, kernels };
    const stopped = await rejection(quantizeCheckpoint({
      ...job,
      signal: controller.signal,
      onEvent: ({ kind }) => kind === "layer" && controller.abort("SIGINT"),
    }));
    expect(stopped).toBeInstanceOf(InterruptedError);
    expect(await rejection(quantizeCheckpoint({ ...job, resume: true, maxMemoryBytes: 1 })))
      .toBeInstanceOf(MemoryError);
    const messages: string[] = [];
    await quantizeCheckpoint({ ...job, resume: true, onEvent: ({ message }) => messages.push(message) });
    expect(messages.join("\n")).toMatch(/layers were solved before/);
  });
});

describe("time of calibrated work", () => {
  test("is announced by stage, and grows with the data", () => {
    const secondsOf = (parts: number, overrides: Record<string, unknown>) => {
      const [event] = forecast(large(parts), Infinity, overrides);
      expect(event!.message).toMatch(
        /^forecast: about .*(s|min|h) \(.*products timed now\) and .*B of memory$/,
      );
      return event!.data as { seconds: number; stages: { name: string; seconds: number }[] };
    };
    const one = secondsOf(10, { solver: "best" }), ten = secondsOf(100, { solver: "best" });
    expect(ten.seconds).toBeGreaterThan(2 * one.seconds);
    expect(one.stages.map(({ name }) => name)).toEqual(["solving", "held-out distances"]);
    const budget = secondsOf(10, { solver: "feedback", target_bits_per_weight: 3 });
    expect(budget.stages[0]!.name).toBe("sensitivities");
  });

  test("of a moment is not", () => {
    expect(forecast(small, Infinity, { solver: "feedback" })).toEqual([]);
  });
});
