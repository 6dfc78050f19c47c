import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import type { Solver } from "../../lib/config/names.ts";
import { settingsOf } from "../../lib/bench/settings.ts";
import { spawnSync } from "node:child_process";
import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { ConfigError } from "../../lib/errors.ts";
import { compareSolvers } from "../../lib/analysis/tables.ts";
import { accuracySuite } from "../../lib/bench/accuracy/suite.ts";
import { checkpointSuite } from "../../lib/bench/checkpoint/suite.ts";
import { environmentOf } from "../../lib/eval/environment.ts";
import { convertCase, dequantizeCase, Operands, quantizeCase } from "../../lib/bench/kernels/cases.ts";
import { kernelSuiteOf } from "../../lib/bench/kernels/suite.ts";
import type { BenchOptions } from "../../lib/bench/options.ts";
import { measureStored } from "../../lib/bench/stored.ts";
import { processSuite } from "../../lib/bench/process/suite.ts";
import { TEMPORARY_PREFIX } from "../../lib/bench/temporary_folder.ts";
import { gaussianWeights } from "../../lib/bench/random.ts";
import { formatHeader, formatReport } from "../../lib/bench/report.ts";
import type { CheckpointRow } from "../../lib/bench/rows.ts";
import type { BenchContext, SuiteReport } from "../../lib/bench/suite.ts";
import { type Kernels, openKernels } from "../../lib/native/mod.ts";
import { unchecked, type UncheckedKernels } from "../../lib/native/kernels.ts";
import { type BitWidth, dequantize, type GroupSize } from "../../lib/quant/mod.ts";
import { packedLayers, readPackedTensor } from "../../lib/quant/packed/checkpoint.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { parseBenchArguments } from "../../scripts/bench.ts";
import { commandOf } from "../../scripts/_command/programs.ts";
import { rejection } from "../_checkpoints.ts";

const DREAM = fileURLToPath(new URL("../models/dream-mini", import.meta.url));
const DIT = fileURLToPath(new URL("../models/glyph-dit", import.meta.url));
const WIDTH = 120;

let kernels: Kernels;
let folder: string;

beforeAll(async () => {
  kernels = await openKernels();
  folder = mkdtempSync(join(tmpdir(), "arrowquant-eval-"));
});
afterAll(() => {
  kernels.close();
  rmSync(folder, { recursive: true, force: true });
});

const options = (changes: Partial<BenchOptions> = {}): BenchOptions => ({
  ...parseBenchArguments(["--quick", "--model", DREAM]).options,
  solvers: ["round", "clip"],
  ...changes,
});

const context = (changes: Partial<BenchOptions> = {}, used: Kernels = kernels): BenchContext => ({
  kernels: used,
  environment: environmentOf(used),
  options: options(changes),
  commandOf,
  progress: () => {},
});

/** Kernels whose calls pass through `change` after they were made. */
function changed(name: keyof UncheckedKernels["calls"], change: (args: readonly unknown[]) => void): Kernels {
  const call = unchecked(kernels).calls[name] as (...args: unknown[]) => number;
  const calls = {
    ...unchecked(kernels).calls,
    [name]: (...args: unknown[]) => {
      const status = call(...args);
      change(args);
      return status;
    },
  };
  const made: UncheckedKernels = { ...unchecked(kernels), calls: calls as UncheckedKernels["calls"] };
  return made;
}

function expectNarrow(report: SuiteReport): void {
  const lines = [
    ...formatHeader("bun run scripts/bench.ts", context().environment).slice(0, 5),
    ...formatReport(report),
  ];
  for (const line of lines) expect([line, line.length <= WIDTH]).toEqual([line, true]);
}

describe("options", () => {
  test("have defaults", () => {
    const { suite, options, json, out } = parseBenchArguments([]);
    expect(suite.name).toBe("accuracy");
    expect([options.tasks, options.limit]).toEqual([undefined, undefined]);
    expect(options.models.length).toBe(2);
    expect([options.bits, options.groupSize, options.solvers]).toEqual([[8, 4, 3, 2], 64, [
      "round",
      "clip",
      "best",
    ]]);
    expect([options.threads, options.backend, options.quick, json, out]).toEqual([
      undefined,
      "auto",
      false,
      false,
      undefined,
    ]);
  });

  test("are taken as given", () => {
    const { suite, options } = parseBenchArguments(
      "--suite checkpoint --model a --model b --bits 2,4 --group-size 0 --solver round --threads 2 --backend wasm --isa simd128 --seed 9"
        .split(" "),
    );
    expect(suite.name).toBe("checkpoint");
    expect([options.models, options.bits, options.solvers]).toEqual([["a", "b"], [2, 4], ["round"]]);
    expect(options.groupSize).toBe(0 as GroupSize);
    expect([options.threads, options.backend, options.isa, options.seed]).toEqual([2, "wasm", "simd128", 9]);
  });

  test("of the peers suite are its own, with a list of group sizes", () => {
    const { suite, options } = parseBenchArguments(["--suite", "peers"]);
    expect([suite.name, options.bits, options.groupSizes]).toEqual(["peers", [2], [0, 32]]);
    const given = parseBenchArguments("--suite peers --bits 3,2 --group-size 64,0,64".split(" ")).options;
    expect([given.bits, given.groupSize, given.groupSizes]).toEqual([[3, 2], 64, [64, 0]]);
    expect(parseBenchArguments([]).options.groupSizes).toEqual([64]);
  });

  for (
    const [args, message] of [
      ["--nope", 'unknown option "--nope"'],
      ["tests/models/dream-mini", "unexpected argument"],
      ["--suite speed", "--suite must be one of"],
      ["--limit 0", "--limit must be a whole number"],
      ["--bits 5", '--bits must list some of 2, 3, 4, 8, got "5"'],
      ["--bits 4,,2", "--bits"],
      ["--group-size 48", "--group-size must be one of"],
      ["--group-size 0,32", "--group-size must be one size for the suite accuracy, got 0,32"],
      ["--suite peers --group-size 0,48", "--group-size must be one of"],
      ["--threads 0", '--threads must be a whole number from 1 to 64, got "0"'],
      ["--threads two", "--threads"],
      ["--backend gpu", "--backend must be one of"],
      ["--backend cuda", "--backend cuda is for the suites kernels and solver-speed, got accuracy"],
      ["--isa sse2", "--isa must be one of"],
      ["--solver gptq", "--solver must be one of"],
      ["--seed=-1", "--seed"],
      ["--out=", '"--out" needs a value'],
    ] as const
  ) {
    test(`${args} is refused`, () => {
      expect(() => parseBenchArguments(args.split(" "))).toThrow(message);
    });
  }

  test("the command ends with 2 on an unknown one", () => {
    const [program, ...args] = commandOf("bench.ts", ["--nope"]);
    const { status, stdout, stderr } = spawnSync(program!, args, { encoding: "utf8" });
    expect([status, stdout]).toEqual([2, ""]);
    expect(stderr).toContain('unknown option "--nope"');
  });
});

describe("kernel cases", () => {
  const operands = () => {
    const F32 = gaussianWeights(4 * 1024, 3);
    const BF16 = new Uint16Array(F32.length);
    return new Operands(kernels, 2, 1024, { F32, BF16 });
  };
  const round = { solver: "round", bits: 4, groupSize: 32, zeroPoint: "real" } as const;

  test("with right results pass their check", () => {
    quantizeCase(operands(), round).check();
    quantizeCase(operands(), { ...round, solver: "clip" }).check();
    dequantizeCase(operands(), round).check();
    convertCase(operands(), "F16", "F32").check();
  });

  test("with one wrong byte are refused before anything is timed", () => {
    const wrongCodes = changed("aq_quantize_round", (args) => (args[7] as Uint32Array)[5]! ^= 1);
    expect(() => quantizeCase(operands().on(wrongCodes), round).check()).toThrow("byte 20");
    const wrongWeights = changed("aq_dequantize", (args) => (args[7] as Float32Array)[1]! += 1);
    expect(() => dequantizeCase(operands().on(wrongWeights), round).check()).toThrow(
      "Cannot time",
    );
  });

  test("whose kernel fails are refused", () => {
    expect(() => quantizeCase(operands(), { ...round, bits: 5 as 4 }).check())
      .toThrow("a null pointer or an unknown enumerator");
  });

  test("in cache get other weights at every call", () => {
    const given = operands();
    const { buffer, refill } = given.input("F32");
    const first = buffer.slice();
    refill!();
    expect(buffer[0] === first[0]).toBe(false);
    refill!();
    expect([...buffer.subarray(0, 4)]).toEqual([...first.subarray(0, 4)]); // the pool of two parts begins again
  });
});

describe("the kernel suite", () => {
  // Every call takes a quarter of a millisecond by this clock, so that what the rows must say is known.
  let now = 0;
  const clock = () => now += 0.25;
  const tiny = { samples: 2, warmUpMilliseconds: 0, sampleMilliseconds: 0, clock };
  const suite = kernelSuiteOf({
    inCacheRows: 1,
    fromMemoryRows: 2,
    threadedRows: 8,
    productSide: 48,
    vectorRows: 32,
    poolRows: 16,
    inCache: tiny,
    fromMemory: tiny,
    wasmWarmUpMilliseconds: 0,
    settleMilliseconds: 0,
  });
  let report: SuiteReport;
  beforeAll(async () => {
    report = await suite.run(context());
  });

  test("says with every row where and how it was measured", () => {
    const timed = report.rows.filter((row) => row["group"] !== "Weight error");
    expect(timed.length).toBeGreaterThan(60);
    for (const row of timed) {
      for (const key of ["kernel", "backend", "isa", "dtype", "shape", "threads", "runtime", "processor"]) {
        expect([row["kernel"], key, row[key] === undefined]).toEqual([row["kernel"], key, false]);
      }
    }
  });

  test("takes every rate from the clock and the work of a call", () => {
    for (const row of report.rows.filter(({ group }) => group !== "Weight error")) {
      const { count, median } = row["bytesPerSecond"] as { count: number; median: number };
      expect([row["kernel"], count, row["callsPerSample"]]).toEqual([row["kernel"], 2, 1]);
      expect(median).toBeCloseTo((row["bytesPerCall"] as number) / 0.25e-3, 3);
      // All calls of a group take the same time here: what has twice the weights is twice as fast, nothing
      // else.
      if (row["group"] === "Float32 products") continue; // of different sizes
      for (const ratio of row["ratios"] as { median: number }[]) expect(ratio.median).toBeCloseTo(1, 9);
    }
  });

  test("holds every goal against a number of its own or says why it cannot", () => {
    expect(report.goals.length).toBeGreaterThan(15);
    for (const { measured, met, reason } of report.goals) {
      expect(measured === null).toBe(met === null);
      if (measured === null) expect(reason!.length).toBeGreaterThan(0);
    }
  });

  test("fits a terminal", () => expectNarrow(report));
});

describe("the checkpoint suite", () => {
  let report: SuiteReport<CheckpointRow>;
  beforeAll(async () => {
    report = await checkpointSuite.run(context({ bits: [4, 2] }));
  });

  test("has a row for each width and solver, clip search with the smaller error", () => {
    expect(report.rows.map(({ bits, solver }) => `${bits} ${solver}`)).toEqual([
      "4 round",
      "4 clip",
      "2 round",
      "2 clip",
    ]);
    const errors = report.rows.map(({ relativeRmsError }) => relativeRmsError as number);
    expect(errors[1]!).toBeLessThan(errors[0]!);
    expect(errors[3]!).toBeLessThan(errors[2]!);
    expect(errors[0]!).toBeLessThan(errors[2]!);
  });

  test("counts all stored bytes of the quantized tensors", () => {
    // A layer: 512 rows of 64 weights (32 bytes of codes, a half scale, a half zero point), 64 rows of 160
    // weights (80 bytes, 3 groups), and the shapes of 7 matrices, 16 bytes each.
    const bytes = 512 * (32 + 2 + 2) + 64 * (80 + 3 * 4) + 7 * 16;
    const { bitsPerWeight, weights } = report.rows[0]!;
    expect(weights).toBe(4 * (512 * 64 + 64 * 160));
    expect(bitsPerWeight!).toBeCloseTo(bytes * 8 / (512 * 64 + 64 * 160), 9);
  });

  test("fits a terminal", () => expectNarrow(report));

  test("a comparison of solvers comes from its rows", () => {
    const compared = compareSolvers(report.rows);
    expect(compared.map(({ bits, models }) => [bits, models])).toEqual([[2, 1], [4, 1]]);
    const error = (solver: string) =>
      report.rows.find((row) => row["bits"] === 2 && row["solver"] === solver)!["relativeRmsError"] as number;
    expect(compared[0]!.errorRatio).toBeCloseTo(error("clip") / error("round"), 12);
    expect(compareSolvers([])).toEqual([]);
  });
});

describe("what a checkpoint's error is measured from", () => {
  test("is the files: a changed byte changes it", async () => {
    const { quantizeCheckpoint } = await import("../../lib/pipeline/mod.ts");
    const { resolveConfig } = await import("../../lib/config/mod.ts");
    const output = join(folder, "quantized"), spoilt = join(folder, "spoilt");
    const { config } = resolveConfig({ overrides: { bit_width: 4, solver: "round" } });
    const { totals } = await quantizeCheckpoint({ input: DREAM, output, config, kernels });
    const stored = measureStored(kernels, DREAM, output);
    expect(stored.relativeRmsError).toBeCloseTo(totals.relativeRmsError!, 12);

    // The same, from the dequantized weights, in plain arithmetic.
    let squares = 0, error = 0;
    {
      using before = openCheckpoint(DREAM);
      using after = openCheckpoint(output);
      for (const layer of packedLayers(after).values()) {
        const halves = new Uint16Array(before.read(layer.name).buffer);
        const wide = new Float32Array(Uint32Array.from(halves, (bits) => bits << 16).buffer);
        const restored = dequantize(kernels, readPackedTensor(after, layer));
        wide.forEach((value, i) => {
          squares += value * value;
          error += (value - restored[i]!) ** 2;
        });
      }
    }
    expect(stored.relativeRmsError).toBeCloseTo(Math.sqrt(error / squares), 9);

    cpSync(output, spoilt, { recursive: true });
    const shard = readdirSync(spoilt).find((name) => name.endsWith(".safetensors"))!;
    const bytes = readFileSync(join(spoilt, shard));
    let at = 0;
    {
      using after = openCheckpoint(spoilt);
      const [layer] = packedLayers(after).values();
      at = after.tensors.get(layer!.tensors.packed)!.info.byteOffset;
    }
    bytes[at]! ^= 0xff;
    writeFileSync(join(spoilt, shard), bytes);
    expect(measureStored(kernels, DREAM, spoilt).relativeRmsError === stored.relativeRmsError).toBe(false);
  });
});

describe("the accuracy suite", () => {
  const exact = (row: Readonly<Record<string, unknown>>) =>
    row["exactMatch"] as { task: string; solved: number; prompts: number; exactMatch: { value: number } }[];

  test("counts what each setting solves, and full precision has no divergence from itself", async () => {
    const report: SuiteReport = await accuracySuite.run(context({ models: [DREAM], bits: [2], limit: 12 }));
    expect(report.rows.map(({ setting }) => setting)).toEqual(["full", "2 round", "2 clip"]);
    for (const row of report.rows) {
      expect(exact(row).map(({ task, prompts }) => [task, prompts])).toEqual([
        ["add", 12],
        ["sudoku", 12],
        ["sort", 12],
        ["all", 36],
      ]);
      for (const { solved, prompts, exactMatch } of exact(row)) {
        expect(exactMatch.value).toBe(solved / prompts);
      }
    }
    const [full, round] = report.rows;
    expect(exact(full!).at(-1)!.solved).toBe(36);
    expect(exact(round!).at(-1)!.solved).toBeLessThan(30);
    const kl = report.rows.map((row) => (row["byMaskRatio"] as { kl: { value: number } }[]).at(-1)!.kl.value);
    expect(kl[0]).toBe(0);
    expect(kl[1]).toBeGreaterThan(0.1);
    expect(report.goals.map(({ met }) => met)).toEqual([true, true, true, true]);
    expectNarrow(report);
  });

  test("takes the tasks asked for, and says when there are none", async () => {
    const options = { models: [DREAM], bits: [8] as BitWidth[], solvers: ["round"] as Solver[], limit: 3 };
    const report: SuiteReport = await accuracySuite.run(context({ ...options, tasks: ["sort"] }));
    expect(exact(report.rows[0]!).map(({ task }) => task)).toEqual(["sort", "all"]);
    for (const tasks of [["chess"], ["sort", "chess"]]) {
      const error = await rejection(accuracySuite.run(context({ ...options, tasks })) as Promise<unknown>);
      expect(error).toBeInstanceOf(ConfigError);
      expect(error.message).toContain("must be of add, sudoku, sort, got chess");
    }
  });

  test("draws the same noise at every setting", async () => {
    const report: SuiteReport = await accuracySuite.run(
      context({ models: [DIT], bits: [2], solvers: ["round"], limit: 4 }),
    );
    expect(report.rows.map(({ setting, images }) => [setting, images])).toEqual([["full", 4], [
      "2 round",
      4,
    ]]);
    const error = report.rows.map((row) =>
      (row["byTimestep"] as { relativeError: { value: number } }[]).map(({ relativeError }) =>
        relativeError.value
      )
    );
    expect(error[0]!.every((value) => value === 0)).toBe(true);
    expect(error[1]!.every((value) => value > 0)).toBe(true);
    const noise = report.rows.map((row) => row["noiseError"] as { value: number; low: number; high: number });
    expect(noise[0]).toEqual({ value: 0, low: 0, high: 0, confidence: 0.95 } as never);
    const mean = error[1]!.reduce((sum, value) => sum + value, 0) / error[1]!.length;
    // means of ratios against ratios of means: the noises of images are about equally long
    expect(Math.abs(noise[1]!.value / mean - 1)).toBeLessThan(0.1);
    expect(noise[1]!.low).toBeLessThan(noise[1]!.value);
    expect(report.goals.find(({ goal }) => goal.includes("noise error"))).toMatchObject({ met: true });
    const drift = report.rows.map((row) => row["drift"] as { relativeDistance: { value: number } }[]);
    expect(drift[1]![0]!.relativeDistance.value).toBe(0);
    expect(drift[1]!.at(-1)!.relativeDistance.value).toBeGreaterThan(0);
    expectNarrow(report);
  });
});

describe("the process suite", () => {
  test("measures a process and leaves nothing behind", async () => {
    const before = readdirSync(tmpdir()).filter((name) =>
      name.startsWith(`${TEMPORARY_PREFIX}${process.pid}-`)
    );
    const report: SuiteReport = await processSuite.run(context({ syntheticBytes: 8e6 }));
    const after = readdirSync(tmpdir()).filter((name) =>
      name.startsWith(`${TEMPORARY_PREFIX}${process.pid}-`)
    );
    expect(after.filter((name) => !before.includes(name))).toEqual([]);
    const [small, large, start, ...others] = report.rows;
    expect(others).toEqual([]);
    for (const row of [small!, large!]) {
      expect(row["weights"] as number).toBeGreaterThan(0);
      expect((row["seconds"] as { median: number }).median).toBeGreaterThan(0);
    }
    // So small a checkpoint says nothing of the goal, and the goals say so.
    expect(report.goals.slice(0, 3).map(({ met }) => met)).toEqual([null, null, null]);
    const { importMilliseconds, reports } = start!["startUp"] as {
      importMilliseconds: { median: number };
      reports: { layers: number; milliseconds: { median: number }; bytes: number }[];
    };
    expect(importMilliseconds.median).toBeGreaterThan(0);
    expect(reports.map(({ layers }) => layers)).toEqual([300, 10_000]);
    // Sizes are no timings: they are the same everywhere.
    for (const { bytes } of reports) expect(bytes > 500_000 && bytes < 5e6).toBe(true);
    expect(report.goals.slice(3).map(({ measured }) => measured)).toEqual([
      expect.stringContaining(" ms"),
      expect.stringMatching(/^\d+\.\d\d s, \d\.\d\d MB$/),
    ]);
    for (const row of [small!, large!]) {
      const { weightBytes, peakResidentBytes, baselineBytes } = row["inference"] as Record<string, number>;
      expect(weightBytes!).toBeGreaterThan(0);
      expect(peakResidentBytes!).toBeGreaterThan(baselineBytes!);
    }
    expectNarrow(report);
  });
});

test("the command writes what it prints, and JSON that a machine reads", () => {
  const out = join(folder, "out");
  const [program, ...args] = commandOf("bench.ts", [
    "--suite",
    "checkpoint",
    "--quick",
    "--bits",
    "4",
    "--model",
    DREAM,
    "--json",
    "--out",
    out,
  ]);
  const { status, stdout } = spawnSync(program!, args, { encoding: "utf8" });
  expect(status).toBe(0);
  const result = JSON.parse(stdout);
  expect(result.rows.length).toBe(2);
  expect(result.command).toContain("scripts/bench.ts --suite checkpoint --quick --bits 4");
  expect(JSON.parse(readFileSync(join(out, "bench.json"), "utf8"))).toEqual(result);
  const text = readFileSync(join(out, "bench.txt"), "utf8");
  expect(text).toContain("command ");
  expect(text).toContain("bits/weight");
});

describe("settings", () => {
  test("a calibrated solver among others is measured at the fewest bits, where calibration data lie beside the model", () => {
    const names = (changes: Partial<BenchOptions>, path: string) =>
      settingsOf(context(changes), path).map(({ name }) => name);
    const solvers = ["round", "best"] as const;
    expect(names({ bits: [4, 2], solvers }, DREAM)).toEqual(["full", "4 round", "2 round", "2 best"]);
    expect(names({ bits: [4, 2], solvers }, folder)).toEqual(["full", "4 round", "2 round"]);
    expect(names({ bits: [4, 2], solvers: ["best"] }, DREAM)).toEqual(["full", "4 best", "2 best"]);
  });

  test("packed folders take the place of what would be quantized", () => {
    expect(() => settingsOf(context({ packed: [DREAM] }), DREAM)).toThrow(/without quantized tensors/);
    expect(() => parseBenchArguments(["--packed", "out"])).toThrow(
      /needs one --against MODEL \(or --model\)/,
    );
  });
});
