import { afterAll, describe, expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { countedKernels } from "../../lib/bench/solver_speed/counted.ts";
import { type Calibrated, type CalibrationPart, loadCalibration } from "../../lib/calibration/mod.ts";
import { resolveConfig } from "../../lib/config/mod.ts";
import { InterruptedError, MemoryError } from "../../lib/errors.ts";
import { loadModel, type SequenceBatch } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { chooseSolver } from "../../lib/pipeline/choose_solver.ts";
import { announce, countRun } from "../../lib/pipeline/forecast/announce.ts";
import { TimedWork } from "../../lib/pipeline/forecast/timed_work.ts";
import { MemoryShares } from "../../lib/pipeline/forecast/memory_shares.ts";
import { planQuantization, quantizeCheckpoint, type RunEvent } from "../../lib/pipeline/mod.ts";
import { formatOf, isTokenTable, type PlanRow } from "../../lib/plan/plan.ts";
import { solverSettings } from "../../lib/solve/candidates.ts";
import { solveModel } from "../../lib/solve/solve_model.ts";
import { secondsText } from "../../lib/progress.ts";
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

const PART: Calibrated["data"]["fit"][number] = small.data.fit[0]!;

/** The same with about as many millions of positions: a part again and again. */
const large = (millions: number): Calibrated =>
  ({
    ...small,
    data: {
      ...small.data,
      samples: 1024,
      heldOut: [],
      fit: Array.from({ length: millions * 1e6 / PART.weights.length }, () => PART),
    },
  }) as unknown as Calibrated;

/** Work that takes no time but for some kinds. */
const untimed = (own: Partial<TimedWork>): TimedWork =>
  new Proxy(own, { get: (_, key) => own[key as keyof TimedWork] ?? (() => 0) }) as TimedWork;

/** Whether a layer of the plan is solved. */
const isSolved = (row: PlanRow) => row.action === "quantize" && !isTokenTable(row);

const configOf = (overrides: Record<string, unknown>) =>
  resolveConfig({ overrides: { solver: "clip", bit_width: 2, calibration_samples: 1024, ...overrides } })
    .config;

function forecast(
  calibrated: Calibrated,
  memoryBytes: number,
  overrides: Record<string, unknown>,
  folder?: string,
): RunEvent[] {
  const config = chooseSolver(checkpoint, configOf(overrides)), events: RunEvent[] = [];
  const memory = new MemoryShares(memoryBytes);
  const options = { onEvent: (event: RunEvent) => void events.push(event) };
  announce(
    { checkpoint, config, kernels, memory, folder, options },
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
  const { hidden_size: width, intermediate_size: widest } = checkpoint.config as Record<string, number>;
  /** Of 50 million positions: what a block makes of them, and what its widest layers read. */
  const states = 4 * 50e6 * (width! + widest!);

  test("holds the states of all data, once more where layers read what quantized ones make", () => {
    const needed = (overrides: Record<string, unknown>) => refusal(large(50), 1, overrides).neededBytes;
    const once = needed({ ...best, calibration_mode: "once" }), blocks = needed(best);
    expect(once).toBeGreaterThan(states);
    expect(Math.abs(blocks - once - states)).toBeLessThan(states / 10);
  });

  const bytesOf = (overrides: Record<string, unknown>, stage = "solving") => {
    const config = chooseSolver(checkpoint, configOf({ ...best, calibration_mode: "once", ...overrides }));
    const { rows } = planQuantization(checkpoint, config);
    const stages = countRun({ calibrated: small, checkpoint, rows, memoryBytes: 1e9 }).stages(
      config,
    );
    return stages.find(({ name }) => name.startsWith(stage))!.bytes;
  };

  test("holds one more factor of the widest moment where layers get trellis codes", () => {
    const of = (bit_width: number) => bytesOf({ bit_width, codes: "trellis" }) - bytesOf({ bit_width });
    expect(of(2)).toBe(4 * widest! ** 2);
    expect(of(4)).toBe(0); // those of 4 bits are uniform
  });

  test("holds a whole moment and its factor where weights are rotated, whatever the blocks", () => {
    for (const [moment, block] of [["full", widest!], ["block", 32], ["diagonal", 1]] as const) {
      const asked = { "solver_options.moment": moment, "solver_options.moment_block": 32 };
      const of = (scale_bits: number) =>
        bytesOf({ bit_width: 2, codes: "trellis", group_size: 0, scale_bits, ...asked });
      expect([moment, of(0) - of(16)]).toEqual([moment, 8 * widest! ** 2 - 4 * widest! * block]);
    }
  });

  test("holds the inputs that stay for other layers, where layers are solved as they are written", () => {
    const solvingOf = (overrides: Record<string, unknown>) => {
      const config = chooseSolver(checkpoint, configOf({ solver: "feedback", ...overrides }));
      const { rows } = planQuantization(checkpoint, config);
      const calibrated = { ...small, data: { ...small.data, fit: [], heldOut: [], distinctPositions: 1e9 } };
      const counted = countRun({ calibrated, checkpoint, rows, memoryBytes: 1e9 });
      const solving = counted.stages(config).find(({ name }) => name.startsWith("solving"))!;
      return { bytes: solving.bytes, packed: counted.packedBytes };
    };
    // A moment and its factor of every stage: all of this model's fit into what is kept.
    const all = small.model.stages.reduce((sum, { layers }) => sum + 8 * layers[0]!.weights.cols ** 2, 0);
    const onDemand = solvingOf({}), before = solvingOf({ "thermodynamic.validation.enabled": true });
    const stays = onDemand.bytes - (before.bytes - before.packed);
    expect(stays).toBeGreaterThan(all / 2);
    expect(stays).toBeLessThan(all);
  });

  const writing = (overrides: Record<string, unknown>) => {
    const config = chooseSolver(checkpoint, configOf({ ...best, codes: "trellis", ...overrides }));
    const { rows } = planQuantization(checkpoint, config);
    /** Bytes where some layers have something to be solved on. */
    const writingOf = (isKnown: (name: string) => boolean) => {
      const stages = small.model.stages.map(({ block, layers }) => {
        return { block, layers: layers.filter(({ name }) => isKnown(name)) };
      }).filter(({ layers }) => layers.length > 0);
      const model = Object.create(small.model, { stages: { value: stages } });
      const calibrated = { ...small, model } as Calibrated;
      return countRun({ calibrated, checkpoint, rows, memoryBytes: 1e9 }).stages(config)
        .find(({ name }) => name === "writing")!.bytes;
    };
    return { rows, writingOf };
  };

  test("of writing holds a whole moment and its factor for rotated weights that have none to be solved on", () => {
    const { writingOf } = writing({ bit_width: 2, group_size: 0, scale_bits: 0 });
    const one = writingOf((own) => own.includes("head")) - writingOf(() => true);
    expect(one).toBe(8 * widest! ** 2);
  });

  test("of writing holds a whole matrix with coded scales that has nothing to be solved on", () => {
    const { rows, writingOf } = writing({ scale_bits: 3 });
    const coded = rows.filter((row) => isSolved(row) && row.scaleBits === 3);
    const all = writingOf(() => true), [{ name, shape, bytesBefore }] = coded as [PlanRow];
    // As stored, as float32 and as codes.
    const one = writingOf((own) => own !== name) - all;
    expect(one).toBeGreaterThan(bytesBefore + 5 * shape[0]! * shape[1]!);
    expect(writingOf((own) => own.includes("head")) - all).toBeGreaterThanOrEqual(one);
  });

  test("that does not fit is refused with a setting that does", () => {
    const peak = refusal(large(50), 1, best).neededBytes - process.memoryUsage().rss;
    const at = (share: number) => refusal(large(50), process.memoryUsage().rss + share * peak, best).message;
    expect(at(0.7)).toMatch(/--max-memory.*; it fits with calibration_mode: once$/);
    expect(at(0.3)).toMatch(/; it fits with --samples 256$/);
    expect(at(0.0001)).toMatch(/; with --solver clip a tensor at a time is in memory$/);
    forecast(large(12.5), process.memoryUsage().rss + 0.3 * peak, best); // as said: a quarter of the samples
    forecast(large(50), process.memoryUsage().rss + 0.7 * peak, { ...best, calibration_mode: "once" });
  });

  test("with a folder goes to files, where the disk has room", () => {
    // Few enough that the disk of a small machine has room.
    const limit = process.memoryUsage().rss + states / 20;
    expect(() => forecast(large(5), limit, best)).toThrow(MemoryError);
    const [event] = forecast(large(5), limit, best, place.fresh("states"));
    expect((event!.data as { bytes: number }).bytes).toBeLessThanOrEqual(limit * 1.01);
    // A hundred thousand parts of 12.8 million positions: more than disks hold.
    const own = { ...PART, samples: 1e5, weights: { length: 1.28e7 } };
    const data = { ...small.data, heldOut: [], fit: Array.from({ length: 1e5 }, () => own) };
    const far = { ...small, data } as unknown as Calibrated;
    expect(() => forecast(far, 1e12, best, place.fresh("states"))).toThrow(
      /the file system must have .* free until the run is finished .*--max-memory/,
    );
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

test("durations have the unit that fits", () => {
  const texts = [0, 0.034, 1, 9.94, 9.96, 99.6, 110.4, 119.9, 120, 3600, 5340, 36_000].map(secondsText);
  expect(texts).toEqual(
    [
      "0.01 s",
      "0.03 s",
      "1.0 s",
      "9.9 s",
      "10 s",
      "100 s",
      "110 s",
      "120 s",
      "2 min",
      "1 h",
      "1 h 29 min",
      "10 h",
    ],
  );
});

describe("time of calibrated work", () => {
  test("is announced by stage, and grows with the data", () => {
    const secondsOf = (parts: number, overrides: Record<string, unknown>) => {
      const [event] = forecast(large(parts), Infinity, overrides);
      expect(event!.message).toMatch(
        /^forecast: about .*(s|min|h) \(.*timed now\) and .*B of memory(; .*: .*)?$/,
      );
      return event!.data as { seconds: number; stages: { name: string; seconds: number }[] };
    };
    const one = secondsOf(2, { solver: "best" });
    expect(one.stages.map(({ name }) => name)).toEqual(["solving", "writing"]);
    const budget = secondsOf(2, { solver: "feedback", target_bits_per_weight: 3 });
    expect(budget.stages[0]!.name).toBe("sensitivities");
    const phases = secondsOf(2, { solver: "clip", "thermodynamic.validation.enabled": true });
    expect(phases.stages.map(({ name }) => name)).toEqual(["phases", "writing"]);
    // Counted by the same rates: between two forecasts the machine may become slower or faster.
    const config = chooseSolver(checkpoint, configOf({ solver: "best" }));
    const { rows } = planQuantization(checkpoint, config);
    using work = new TimedWork(kernels, small, checkpoint);
    const counted = (millions: number) =>
      countRun({ calibrated: large(millions), checkpoint, rows, memoryBytes: 1e12 }).stages(config)
        .reduce((sum, stage) => sum + stage.seconds(work), 0);
    expect(counted(20)).toBeGreaterThan(2 * counted(2));
    expect(counted(20)).toBeLessThan(20 * counted(2));
  });

  test("has what the refinement will do in its minutes, and the memory of its gradients", () => {
    const of = (overrides: Record<string, unknown>) => {
      const [event] = forecast(large(20), 1e15, { solver: "feedback", ...overrides });
      const { stages } = event!.data as { stages: { name: string; seconds: number; bytes: number }[] };
      return { message: event!.message, ...stages.find(({ name }) => name === "phases") };
    };
    const refined = (minutes: number) =>
      of({
        enable_time_aware: false,
        "thermodynamic.transition_optimization.enabled": true,
        "thermodynamic.transition_optimization.max_minutes": minutes,
      });
    const many = refined(1e5), few = refined(0.05);
    expect(many.message).toContain("with 300 of 300 steps of gradients");
    expect(Number(/with (\d+) of 300 steps/.exec(few.message)![1])).toBeLessThan(300);
    expect(few.seconds!).toBeLessThan(many.seconds!);
    const bytesOf = (memoryBytes: number, isRefined: boolean) => {
      const config = chooseSolver(
        checkpoint,
        configOf({
          solver: "feedback",
          "thermodynamic.validation.enabled": true,
          "thermodynamic.transition_optimization.enabled": isRefined,
        }),
      );
      const { rows } = planQuantization(checkpoint, config);
      const stages = countRun({ calibrated: small, checkpoint, rows, memoryBytes }).stages(config);
      return stages.find(({ name }) => name === "phases")!.bytes;
    };
    // Values of all blocks, or of one where they would take more than a quarter of the limit.
    const all = bytesOf(1e9, true) - bytesOf(1e9, false), one = bytesOf(1e6, true) - bytesOf(1e6, false);
    expect(all).toBeGreaterThan(1e7);
    expect(one).toBeLessThan(0.7 * all);
  });

  test("has the refinement's state that is hashed and written at each look", () => {
    const config = chooseSolver(
      checkpoint,
      configOf({ solver: "feedback", "thermodynamic.transition_optimization.enabled": true }),
    );
    const { rows } = planQuantization(checkpoint, config);
    const counted = countRun({ calibrated: small, checkpoint, rows, memoryBytes: 1e9 });
    let hashed = 0, written = 0;
    counted.stages(config).find(({ name }) => name === "phases")!.seconds(untimed({
      hashing: (bytes) => (hashed += bytes) * 0,
      reading: (bytes) => (written += bytes) * 0,
    }));
    // Two states have room in the work folder; at four looks one of them is written.
    expect([hashed, written]).toEqual([2 * counted.refinementBytes(config), hashed]);
    expect(hashed).toBeGreaterThan(1e5);
  });

  test("is announced with what cheaper settings take", () => {
    const [event] = forecast(large(50), Infinity, { solver: "best" });
    const { seconds, cheaper } = event!.data as {
      seconds: number;
      cheaper: { name: string; seconds: number }[];
    };
    expect(cheaper.at(-1)!.name).toBe("--solver clip");
    for (const other of cheaper) {
      expect(other.seconds).toBeLessThan(seconds);
      expect(event!.message).toContain(`; ${other.name}: `);
    }
  });

  for (const isRounded of [false, true]) {
    test(`begins with the model's own samples${isRounded ? " at 8 bits" : ""}, where it makes them`, () => {
      const config = chooseSolver(checkpoint, configOf({ solver: "feedback" })), events: RunEvent[] = [];
      const run = { checkpoint, config, kernels, memory: new MemoryShares(24e9) };
      const options = { onEvent: (event: RunEvent) => void events.push(event) };
      const { rows } = planQuantization(checkpoint, config);
      const [few, many] = [500, 5_000_000].map((passes) => {
        events.length = 0;
        announce({ ...run, options }, large(0.1), rows, { positions: 2e6, passes, isRounded });
        const { stages } = events.find(({ kind }) => kind === "calibrate")!.data as {
          stages: { name: string; seconds: number }[];
        };
        expect(stages.filter(({ name }) => name === "its own samples")).toEqual(stages.slice(0, 1));
        return stages[0]!.seconds;
      });
      expect(few).toBeGreaterThan(0);
      if (isRounded) expect(many).toBeGreaterThan(2 * few!); // all weights are rounded in each pass
    });
  }

  test("has the layers left that no stopped run has solved", () => {
    const config = chooseSolver(checkpoint, configOf({ solver: "feedback" }));
    const { rows } = planQuantization(checkpoint, config), work = new TimedWork(kernels, small, checkpoint);
    const secondsOf = (isSolved?: (candidate: number, name: string) => boolean) => {
      const [solving] = countRun({ calibrated: small, checkpoint, rows, memoryBytes: 1e9, isSolved }).stages(
        config,
      );
      return solving!.seconds(work);
    };
    const all = secondsOf(),
      half = secondsOf((_, name) => name.includes("layers.0.")),
      none = secondsOf(() => true);
    expect(half).toBeLessThan(all);
    expect(none).toBeLessThan(half);
    expect(none).toBeGreaterThan(0); // states are taken through the solved blocks
  });

  for (const moment of ["full", "block", "diagonal"] as const) {
    test(`counts all products that are summed up, chunk by chunk, for moments ${moment}`, async () => {
      const asked = { moment, moment_block: 32, effort: "low" };
      const options = Object.entries(asked).map(([key, value]) => [`solver_options.${key}`, value]);
      const config = chooseSolver(
        checkpoint,
        configOf({ solver: "best", group_size: 32, ...Object.fromEntries(options) }),
      );
      const { rows } = planQuantization(checkpoint, config), counted = countedKernels(kernels);
      const forms = new Map(rows.filter(isSolved).map((row) => [row.name, formatOf(row)]));
      const settings = solverSettings(config), gridOf = (name: string) => forms.get(name);
      await solveModel(small, { kernels: counted.kernels, solver: "best", settings, gridOf });
      const { samples, chunk, fit } = small.data, sums: number[] = [];
      const timed = untimed({
        adding(elements, chunks) {
          expect(chunks).toBe(samples / chunk!);
          return sums.push(elements) * 0;
        },
      });
      const [solving] = countRun({ calibrated: small, checkpoint, rows, memoryBytes: 1e9 }).stages(config);
      solving!.seconds(timed);
      const positions = fit.reduce((sum, { weights }) => sum + weights.length, 0);
      const forecast = positions * sums.reduce((sum, own) => sum + own, 0);
      expect(forecast / (counted.take().get("accumulate_moment")!.flops / 2)).toBeCloseTo(1, 9);
    });
  }

  test("of a layer whose weights are rotated is that of a whole moment, whatever the blocks", () => {
    using work = new TimedWork(kernels, small, checkpoint);
    const form = { bits: 2, groupSize: 0, zeroPoint: "real", codes: "trellis", scaleBits: 0 } as const;
    const how = { form, solver: "best", settings: solverSettings(configOf({})) } as const;
    expect(work.solving(32, 64, 32, how)).toBe(work.solving(32, 64, 64, how));
  });

  test("solves in blocks as they were saved", () => {
    const config = chooseSolver(checkpoint, configOf({ solver: "best", calibration_mode: "once" }));
    const { rows } = planQuantization(checkpoint, config);
    const blocksOf = (calibrated: Calibrated) => {
      const blocks = new Set<number>();
      const timed = untimed({ solving: (_rows, _cols, block) => +blocks.add(block).has(0) });
      countRun({ calibrated, checkpoint, rows, memoryBytes: 1e9 }).stages(config)[0]!.seconds(timed);
      return [...blocks].sort((a, b) => a - b);
    };
    const saved = {
      ...small,
      statistics: { has: () => true, inputOf: () => ({ block: 32 }) },
    } as unknown as Calibrated;
    expect(blocksOf(small)).toEqual([64, 160]); // the widths of dream-mini
    expect(blocksOf(saved)).toEqual([32]);
  });

  test("reads weights once, and again for each pass where memory does not hold them", () => {
    const config = chooseSolver(checkpoint, configOf({ solver: "best", "solver_options.candidates": 2 }));
    const { rows } = planQuantization(checkpoint, config);
    const bytes = (memoryBytes: number) => {
      let read = 0;
      const timed = untimed({ reading: (bytes) => (read += bytes) * 0 });
      const counted = countRun({ calibrated: small, checkpoint, rows, memoryBytes });
      for (const stage of counted.stages(config).slice(0, 2)) stage.seconds(timed);
      return read / counted.weights.bytes;
    };
    expect(bytes(1e9)).toBe(1);
    expect(bytes(1e3)).toBe(3); // for each candidate, and for the full-precision model's outputs
  });

  test("of a moment is not", () => {
    const { batch: { inputIds }, samples, weights: { length } } = PART as CalibrationPart<SequenceBatch>;
    const one = { ...PART, samples: 1, weights: PART.weights.subarray(0, length / samples) };
    const batch = { inputIds: inputIds.subarray(0, length / samples), batch: 1 };
    const data = { ...small.data, samples: 1, fit: [{ ...one, batch }], heldOut: [] };
    const few = { ...small, data } as unknown as Calibrated;
    expect(forecast(few, Infinity, { solver: "feedback" })).toEqual([]);
  });
});
