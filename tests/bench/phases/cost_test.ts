/** What the phase suite says of time, memory and bytes: overheads, digests, the shapes of a large model, the same run twice. */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { fileURLToPath } from "node:url";
import { environmentOf } from "../../../lib/eval/environment.ts";
import { modelDigest } from "../../_digest.ts";
import { phaseMemory } from "../../../lib/bench/phases/memory.ts";
import { phaseScale } from "../../../lib/bench/phases/scale.ts";
import {
  forwardRatio,
  overhead,
  PHASE_PARTS,
  phaseTimes,
  type PipelineRun,
  pipelineSeconds,
  selectionShare,
} from "../../../lib/bench/phases/time.ts";
import { formatReport } from "../../../lib/bench/report.ts";
import type { SuiteReport } from "../../../lib/bench/suite.ts";
import { loadModel } from "../../../lib/models/mod.ts";
import { type Kernels, openKernels } from "../../../lib/native/mod.ts";
import type { PhasesReport } from "../../../lib/phases/mod.ts";
import type { PhaseModel } from "../../../lib/phases/context.ts";
import { type OneLevelTensor, quantize } from "../../../lib/quant/mod.ts";
import {
  equalTimeGroups,
  type LayerParameters,
  maskRatioAxis,
  TimeParameters,
} from "../../../lib/time/mod.ts";
import { parseBenchArguments } from "../../../scripts/bench.ts";
import { commandOf } from "../../../scripts/_command/programs.ts";
import { run, workplace } from "../../_checkpoints.ts";
import { runIn, runtimeBinary } from "../../_runtimes.ts";

const DREAM = fileURLToPath(new URL("../../models/dream-mini", import.meta.url));

let kernels: Kernels;
const place = workplace();
beforeAll(async () => {
  kernels = await openKernels();
});
afterAll(() => {
  kernels.close();
  place.remove();
});

describe("overhead", () => {
  const runOf = (changes: Partial<PipelineRun>): PipelineRun => ({
    calibrate: 1,
    activations: 2,
    write: 1,
    refinement: 0,
    output: 0,
    timeScales: 0,
    smoothing: 0,
    sampler: 0,
    scores: 0,
    stepKl: 0,
    ...changes,
  });

  test("is the pipeline with the phases over the same without, the median of runs", () => {
    // 0.4, 0.8 and 4 seconds on top of 4: 10, 20 and 100 %.
    const runs = [0.4, 4, 0.8].map((stepKl) => runOf({ stepKl }));
    expect(overhead(runs, 0, 0)).toBeCloseTo(0.2, 12);
    // A solver of 12 seconds in both: 16 seconds without.
    expect(overhead(runs, 12, 12)).toBeCloseTo(0.05, 12);
    // Solved with the phases, rounded without.
    expect(overhead(runs, 12, 0)).toBeCloseTo(3.2, 12);
    expect(pipelineSeconds(runs, 12)).toBeCloseTo(16.8, 12);
  });

  test("is each run's own ratio: a slow run does not meet a quick one's denominator", () => {
    // All parts take ten times as long in the second run, as on a busy machine.
    const runs = [
      runOf({ smoothing: 0.4 }),
      runOf({ calibrate: 10, activations: 20, write: 10, smoothing: 4 }),
    ];
    expect(overhead(runs, 0, 0)).toBeCloseTo(0.1, 12);
  });

  test("counts every part that a report gives milliseconds of, each once", () => {
    const guarded = (milliseconds: number) => ({
      kept: true,
      heldOutBefore: 2,
      heldOutAfter: 1,
      milliseconds,
    });
    const report: PhasesReport = {
      groups: 2,
      boundaries: [0, 5, 10],
      heldOutStepKl: 1,
      perToken: [],
      activations: undefined,
      transitionCache: { hits: 0, misses: 0, evictions: 0, entries: 0 },
      statisticsBytes: 0,
      warnings: [],
      activationMilliseconds: 64_000,
      output: guarded(1000),
      timeScales: guarded(2000),
      sampler: guarded(4000),
      smoothing: { ...guarded(8000), kept: [], rejected: [], samples: 1 },
      refinement: {
        ...guarded(16_000),
        iterations: 1,
        converged: false,
        backOffs: 0,
        losses: { quantization: [1], markov: [0], entropy: [0], total: [1] },
        scratchBytes: 0,
      } as unknown as NonNullable<PhasesReport["refinement"]>,
      validation: {
        markovScore: 1,
        boundaryScores: [1],
        violations: [],
        stepKlByGroup: [1, 1],
        samples: 1,
        milliseconds: 128_000,
        stepKlMilliseconds: 32_000,
      },
    };
    const times = phaseTimes(report);
    expect(times).toEqual({
      output: 1,
      timeScales: 2,
      sampler: 4,
      smoothing: 8,
      refinement: 16,
      stepKl: 32,
      activations: 64,
      scores: 128,
    });
    expect([...PHASE_PARTS, "activations"].sort()).toEqual(Object.keys(times).sort());
    // 191 seconds of phases on top of 64 + 2 of the pipeline's own.
    expect(overhead([{ calibrate: 1, write: 1, ...times }], 0, 0)).toBeCloseTo(191 / 66, 12);
  });

  test("of some parts leaves the others out", () => {
    const runs = [runOf({ smoothing: 1, scores: 0.2, stepKl: 0.8 })];
    expect(overhead(runs, 0, 0, ["smoothing"])).toBeCloseTo(0.25, 12);
    expect(overhead(runs, 0, 0, ["scores", "stepKl"])).toBeCloseTo(0.25, 12);
    expect(overhead(runs, 0, 0)).toBeCloseTo(0.5, 12);
  });
});

describe("a digest", () => {
  const model = (): {
    weights: Map<string, OneLevelTensor>;
    biases: Map<string, Float32Array<ArrayBuffer>>;
  } => {
    const data = Float32Array.from({ length: 64 }, (_, i) => Math.sin(i));
    const tensor = quantize(kernels, { data, dtype: "F32" }, 4, 16, {
      bits: 2,
      groupSize: 0,
      solver: "round",
    });
    return { weights: new Map([["a.weight", tensor]]), biases: new Map([["a.bias", Float32Array.of(1, 2)]]) };
  };
  const theta = (zeroPoint: number) => {
    const activation = {
      bits: 8,
      scale: Float32Array.of(0.5, 0.5),
      zeroPoint: Int32Array.of(3, zeroPoint),
    } as const;
    return new TimeParameters(
      equalTimeGroups(maskRatioAxis(10), 2),
      new Map([["a.weight", { activation }]]),
      "",
    );
  };
  const corrected = (gain: number) => {
    const { groups, layers } = theta(3);
    const two = (value: number) => Float32Array.of(value, value);
    return new TimeParameters(groups, layers, "", { gain: two(gain), bias: two(0), noiseVariance: two(0) });
  };
  const digest = (changes: Partial<PhaseModel>) =>
    modelDigest({ ...model(), timeParameters: undefined, ...changes });

  test("is the same for equal bytes and another for any other byte", () => {
    const one = digest({});
    expect(one).toMatch(/^[0-9a-f]{64}$/);
    expect(digest({})).toBe(one);
    const others = [
      digest({ timeParameters: theta(3) }),
      digest({ timeParameters: theta(4) }),
      digest({ timeParameters: corrected(0.5) }),
      digest({ timeParameters: corrected(0.25) }),
      digest({ biases: new Map([["a.bias", Float32Array.of(1, -2)]]) }),
      digest({ biases: new Map([["b.bias", Float32Array.of(1, 2)]]) }),
      digest({ biases: new Map() }),
      ...["packed", "scale", "zeroPoint"].map((part) => {
        const { weights } = model();
        (weights.get("a.weight") as unknown as Record<string, Uint16Array>)[part]![0]! ^= 1;
        return digest({ weights });
      }),
    ];
    expect(new Set([one, ...others]).size).toBe(others.length + 1);
  });
});

test("selecting θ takes a share of a forward pass, above nothing", () => {
  const loaded = loadModel(DREAM, kernels);
  const names = loaded.model.stages.flatMap(({ layers }) => layers.map(({ name }) => name));
  const activation = { bits: 8, scale: Float32Array.of(0.5, 0.5), zeroPoint: Int32Array.of(3, 4) } as const;
  const parameters = new TimeParameters(
    equalTimeGroups(maskRatioAxis(10), 2),
    new Map(names.map((name) => [name, { activation }])),
    "",
  );
  const share = selectionShare(loaded, parameters);
  expect(share).toBeGreaterThan(0);
  expect(share).toBeLessThan(1);
});

test("forward passes of two models are timed in turn, on the integer kernels of either kind of grid", () => {
  const loadWith = (own: LayerParameters | undefined) => {
    const plain = loadModel(DREAM, kernels);
    const { stages } = plain.model;
    const layers = stages.flatMap(({ layers }) => layers).filter(({ name }) => name.includes("layers."));
    const weights = new Map(layers.map(({ name, weights: { rows, cols } }) => {
      const data = Float32Array.from({ length: rows * cols }, (_, i) => Math.sin(i));
      return [
        name,
        quantize(kernels, { data, dtype: "F32" }, rows, cols, { bits: 2, groupSize: 0, solver: "round" }),
      ];
    }));
    const timeParameters = own && new TimeParameters(
      equalTimeGroups(maskRatioAxis(10), 2),
      new Map(layers.map(({ name }) => [name, own])),
      "",
    );
    return loadModel(DREAM, kernels, { weights, timeParameters });
  };
  const grids = loadWith({
    activation: { bits: 8, scale: Float32Array.of(0.1, 0.1), zeroPoint: Int32Array.of(128, 128) },
  });
  const { count, median, minimum, maximum } = forwardRatio(grids, loadWith({ perToken: 8 }));
  expect(count).toBeGreaterThanOrEqual(15);
  expect([minimum > 0, minimum <= median, median <= maximum]).toEqual([true, true, true]);
  // A clock that passes alone move, by 3 and by 2: what is divided by what, and in which order they run.
  let clock = 0;
  const order: number[] = [];
  const taking = (seconds: number) => ({
    ...grids,
    model: new Proxy(grids.model, {
      get: (model, key) => {
        if (key !== "forward") return Reflect.get(model, key, model);
        return () => {
          order.push(seconds);
          clock += seconds;
        };
      },
    }),
  } as typeof grids);
  const { now } = performance;
  performance.now = () => clock;
  try {
    expect(forwardRatio(taking(3), taking(2))).toMatchObject({ count, minimum: 1.5, maximum: 1.5 });
  } finally {
    performance.now = now;
  }
  expect(order.every((seconds, i) => seconds === (i % 2 === 0 ? 3 : 2))).toBe(true);
  const drawing = loadModel(DREAM.replace("dream-mini", "glyph-dit"), kernels);
  expect(() => forwardRatio(grids, drawing)).toThrow("Cannot compare a language model");
});

test("memory is the peaks of two processes, and what the phases hold of it", async () => {
  const memory = await phaseMemory(commandOf, {
    path: DREAM,
    source: `${DREAM}/calibration.jsonl`,
    bits: 2,
    groupSize: 0,
    groups: 3,
    threads: 1,
  });
  const { baseline, phases, statistics } = memory;
  for (const bytes of [baseline, phases]) expect(bytes).toBeGreaterThan(20e6);
  expect(statistics).toBeGreaterThan(0);
  expect(statistics).toBeLessThan(phases);
});

test("a row says what it measured at a large model's shapes and reckoned for all blocks, and no accuracy", async () => {
  const messages: string[] = [];
  const context = {
    kernels,
    environment: environmentOf(kernels),
    options: parseBenchArguments(["--model-size", "7B", "--quick"]).options,
    commandOf,
    progress: (line: string) => messages.push(line),
  };
  const report: SuiteReport = await phaseScale(context, 64);
  const text = formatReport(report).join("\n");
  expect(messages.findIndex((line) => line.startsWith("forecast: about"))).toBe(1);
  expect(text).toContain("synthetic weights");
  expect(text).toContain("EXTRAPOLATED");
  expect(text.toLowerCase()).not.toContain("exact match");
  for (const line of text.split("\n")) expect([line, line.length <= 120]).toEqual([line, true]);
  const part = (name: string) => report.rows.find((row) => row["part"] === name) as Record<string, number>;
  const write = part("round, check, write");
  expect(write["measuredSeconds"]!).toBeGreaterThan(0);
  expect(write["extrapolatedSeconds"]!).toBeCloseTo(28 * write["measuredSeconds"]!, 9);
  const round = write["extrapolatedSeconds"]! + part("static activations")["extrapolatedSeconds"]!;
  const smoothing = part("phase 2, smoothing and its guards");
  expect(smoothing["overhead"]!).toBeCloseTo(smoothing["extrapolatedSeconds"]! / round, 9);
  expect(report.rows.every((row) => !("accuracy" in row) && !("stepKl" in row))).toBe(true);
  expect(report.rows.filter((row) => "memory" in row).length).toBe(2);
  expect(report.skipped).toEqual([{ what: "accuracy", reason: "synthetic weights have none" }]);
});

test("options of the size", () => {
  const parsed = parseBenchArguments(["--model-size", "7B", "--phase", "phase2"]);
  expect([parsed.suite.name, parsed.options.modelSize, parsed.options.phase]).toEqual([
    "phases",
    "7B",
    "phase2",
  ]);
  expect(() => parseBenchArguments(["--model-size", "8B"])).toThrow("must be one of 7B");
  expect(() => parseBenchArguments(["--model-size", "7B", "--suite", "kernels"])).toThrow(
    "of the suite phases",
  );
  expect(() => parseBenchArguments(["--model-size", "7B", "--model", DREAM])).toThrow("takes no --model");
});

test("two runs give the same bytes and the same accuracies, in Bun and in Deno", async () => {
  const args = [
    "--phase",
    "baseline",
    "--quick",
    "--limit",
    "4",
    "--model",
    DREAM,
    "--json",
  ];
  const numbers = (text: string) =>
    (JSON.parse(text).rows as Record<string, never>[]).map((
      { phase, digest, accuracy, differenceToBaseline },
    ) => ({
      phase,
      digest,
      accuracy,
      differenceToBaseline,
    }));
  const runs: { readonly name: string; readonly rows: ReturnType<typeof numbers> }[] = [];
  for (const name of ["bun", runtimeBinary("deno") === undefined ? "bun" : "deno"] as const) {
    const binary = runtimeBinary(name);
    if (binary === undefined) {
      console.log(`skipped: there is no ${name}`);
      continue;
    }
    runs.push({ name, rows: numbers(await runIn(name, binary, "../scripts/bench.ts", args)) });
  }
  expect(runs.length).toBeGreaterThan(1);
  expect(runs[0]!.rows.map(({ digest }) => typeof digest)).toEqual(["object", "string"]);
  for (const { name, rows } of runs.slice(1)) expect({ name, rows }).toEqual({ name, rows: runs[0]!.rows });
});

test("the log is one JSON object a line, with a phase's numbers; the report has them, too", () => {
  const config = {
    ARROW_QUANT_THERMODYNAMIC_VALIDATION_ENABLED: "true",
    ARROW_QUANT_THERMODYNAMIC_BOUNDARY_SMOOTHING_ENABLED: "true",
  };
  const { code, stdout, stderr } = run("quantize.ts", [
    DREAM,
    place.fresh(),
    "--bits",
    "2",
    "--group-size",
    "0",
    "--samples",
    "32",
    "--solver",
    "clip",
    "--json",
    "--log",
    "json",
  ], config);
  expect([code, stderr.includes("undefined")]).toEqual([0, false]);
  const events = stderr.trim().split("\n").map((line) => JSON.parse(line) as Record<string, unknown>);
  for (const { time, event, message } of events) {
    expect([Number.isNaN(Date.parse(String(time))), typeof event, typeof message]).toEqual([
      false,
      "string",
      "string",
    ]);
  }
  const count = (kind: string) => events.filter(({ event }) => event === kind).length;
  expect([count("progress") > 0, count("layer"), count("result")]).toEqual([true, 28, 1]);
  const [{ stage, elapsedSeconds }] = events.filter(({ event }) => event === "progress") as [
    Record<string, unknown>,
  ];
  expect([typeof stage, typeof elapsedSeconds]).toEqual(["string", "number"]);
  for (const { name, bits, error } of events.filter(({ event }) => event === "layer")) {
    expect([typeof name, bits, typeof error]).toEqual(["string", 2, "number"]);
  }
  type Data = Record<string, unknown>;
  const data = (phase: string) =>
    events.flatMap((each) =>
      (each["data"] as Data | undefined)?.["phase"] === phase ? [each["data"] as Data] : []
    );
  const { phases } = JSON.parse(stdout) as { phases: Record<string, Data> };
  const [validation] = data("validation"), [smoothing] = data("smoothing");
  for (const key of ["markovScore", "boundaryScores", "violations", "stepKlByGroup", "milliseconds"]) {
    expect([key, validation![key]]).toEqual([key, phases["validation"]![key]]);
  }
  for (const key of ["kept", "rejected", "heldOutBefore", "heldOutAfter", "milliseconds"]) {
    expect([key, smoothing![key]]).toEqual([key, phases["smoothing"]![key]]);
  }
  expect(data("violation").length).toBe((validation!["violations"] as unknown[]).length);
  expect(run("quantize.ts", [DREAM, place.fresh(), "--log", "xml"]).stderr).toContain(
    "--log must be one of text, json",
  );
});
