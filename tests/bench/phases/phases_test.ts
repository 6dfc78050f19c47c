import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { resolveConfig } from "../../../lib/config/mod.ts";
import { environmentOf } from "../../../lib/eval/environment.ts";
import { modelDigest } from "../../_digest.ts";
import { benchTables } from "../../../lib/analysis/rows.ts";
import { chartsOf } from "../../../lib/analysis/run_charts.ts";
import { rowsOf } from "../../../lib/analysis/tables.ts";
import { phasesSuite } from "../../../lib/bench/phases/suite.ts";
import { formatReport } from "../../../lib/bench/report.ts";
import type { BenchContext, SuiteReport } from "../../../lib/bench/suite.ts";
import { loadModel } from "../../../lib/models/mod.ts";
import { Workspace } from "../../../lib/models/layers/workspace.ts";
import { type Kernels, openKernels } from "../../../lib/native/mod.ts";
import { quantizeCheckpoint, readManifest, verifyFiles } from "../../../lib/pipeline/mod.ts";
import { loadCalibration } from "../../../lib/calibration/mod.ts";
import { fewHeldOut, layerGuard, mapShared } from "../../../lib/phases/activations.ts";
import { loadPhaseModel, type PhaseContext } from "../../../lib/phases/context.ts";
import { runPhases } from "../../../lib/phases/mod.ts";
import { meanStepKl, StepKlMeter } from "../../../lib/calibration/step_kl.ts";
import { denseWeights } from "../../../lib/solve/dense_weights.ts";
import { dequantize, type OneLevelTensor, quantize } from "../../../lib/quant/mod.ts";
import { packedLayers } from "../../../lib/quant/packed/checkpoint.ts";
import { openCheckpoint } from "../../../lib/tensor/mod.ts";
import {
  equalTimeGroups,
  maskRatioAxis,
  modelFingerprint,
  readTimeParameters,
  TimeParameters,
  writeTimeParameters,
} from "../../../lib/time/mod.ts";
import { parseBenchArguments } from "../../../scripts/bench.ts";
import { commandOf } from "../../../scripts/_command/programs.ts";
import { rejection, workplace } from "../../_checkpoints.ts";
import { ditCheckpoint, dreamCheckpoint, store } from "../../_models.ts";

const DREAM = fileURLToPath(new URL("../../models/dream-mini", import.meta.url));
const DIT = fileURLToPath(new URL("../../models/glyph-dit", import.meta.url));
const WIDTH = 120;

let kernels: Kernels;
const place = workplace();
beforeAll(async () => {
  kernels = await openKernels();
});
afterAll(() => {
  kernels.close();
  place.remove();
});

const context = (args: string): BenchContext => ({
  kernels,
  environment: environmentOf(kernels),
  options: parseBenchArguments([...args.split(" "), "--quick"]).options,
  commandOf,
  progress: () => {},
});

/** A small DiT that learns its variance, with so many timesteps. */
function imageModel(timesteps: number): string {
  const folder = store(place.fresh(), ditCheckpoint());
  const scheduler = readFileSync(join(DIT, "scheduler_config.json"), "utf8");
  const config = { ...JSON.parse(scheduler) as Record<string, unknown>, num_train_timesteps: timesteps };
  writeFileSync(join(folder, "scheduler_config.json"), JSON.stringify(config));
  return folder;
}

/** A model rounded to nearest at 2 bits, with calibration data. */
async function rounded(
  path: string,
  source: string,
): Promise<{ context: PhaseContext; weights: Map<string, OneLevelTensor> }> {
  const checkpoint = openCheckpoint(path);
  const calibrated = await loadCalibration(loadModel(path, kernels), { source, samples: 48, seed: 3 });
  const weights = new Map(
    calibrated.model.stages.flatMap(({ layers }) =>
      layers.filter(({ name }) => /blocks|layers/.test(name)).map((layer) => {
        const { rows, cols } = layer.weights;
        const data = denseWeights(kernels, layer);
        return [
          layer.name,
          quantize(kernels, { data, dtype: "F32" }, rows, cols, { bits: 2, groupSize: 0, solver: "round" }),
        ] as const;
      })
    ),
  );
  return { context: { checkpoint, calibrated, kernels, source, seed: 3 }, weights };
}

const dream = () => rounded(DREAM, join(DREAM, "calibration.jsonl"));

describe("the suite", () => {
  let measured: Awaited<ReturnType<typeof phasesSuite.run>>, report: SuiteReport;
  const row = (name: string) => report.rows.find(({ phase }) => phase === name) as Record<string, never>;

  beforeAll(async () => {
    report = measured = await phasesSuite.run(context(`--phase all --model ${DREAM} --groups 5`));
  });

  test("has every phase, ablation and rival, measured", () => {
    expect(report.rows.map(({ phase }) => phase)).toEqual([
      "full precision",
      "baseline",
      "phase1",
      "phase2",
      "phase3_full",
      "best alone",
      "best + phases 1, 2",
      "best + refinement",
      "best, one candidate",
      "time weights",
      "annealing",
      "best, 8 bits, all static, G 1",
      "best, 8 bits, all static",
      "best, 8 bits, mostly static",
      "best, dynamic 8 bits",
      "best, static 4 bits, G 1",
      "best, static 4 bits, G 10",
      "best, 4 bits, adaptive G 10",
      "best, dynamic 4 bits",
      "phase 1, static 4 bits, G 5",
      "phase 3, static 4 bits, G 5",
      "best + gain, bias",
      "best + gain, bias, prior",
      "round + gain, bias",
      "best + scales by time",
      "baseline, groups of 128",
      "baseline, groups of 64",
      "baseline, groups of 32",
      "best, groups of 32",
      "round, 2.25 bits by budget",
      "best, 2.25 bits by budget",
    ]);
    for (const { phase, stepKl } of report.rows as readonly { phase: string; stepKl: { value: number } }[]) {
      expect([phase, phase === "full precision" ? stepKl.value === 0 : stepKl.value > 0]).toEqual([
        phase,
        true,
      ]);
    }
    const kl = (name: string) => (row(name)["stepKl"] as unknown as { value: number }).value;
    expect(kl("phase3_full")).toBeLessThan(kl("baseline") / 3);
    expect(kl("best, static 4 bits, G 1")).toBeGreaterThan(kl("best, 8 bits, all static, G 1"));
    expect(kl("phase 3, static 4 bits, G 5")).toBeLessThan(kl("phase 1, static 4 bits, G 5"));
    const bits = (name: string) => row(name)["bitsPerWeight"] as unknown as number;
    for (const name of ["round", "best"]) {
      expect(bits(`${name}, 2.25 bits by budget`)).toBeLessThanOrEqual(2.25);
    }
    expect(bits("baseline, groups of 32")).toBeGreaterThan(bits("baseline, groups of 64"));
    const { row: beside, value } = row("time weights")["stepKlOver"] as unknown as {
      row: string;
      value: number;
    };
    expect(beside).toBe("best, one candidate");
    expect(value).toBeCloseTo(kl("time weights") / kl("best, one candidate"), 12);
  });

  test("phase 1 leaves the baseline's weights as they are; phase 3 reports its loss", () => {
    expect(row("phase1")["weightsDigest"]).toEqual(row("baseline")["weightsDigest"]);
    expect([row("phase1")["timeGroups"], row("baseline")["timeGroups"]]).toEqual([5, null] as never[]);
    const metrics = row("phase3_full")["metrics"] as unknown as {
      refinement: {
        iterations: number;
        losses: { readonly total: number[] };
        heldOutBefore: number;
        heldOutAfter: number;
        kept: boolean;
      };
      validation: { markovScore: number; boundaryScores: number[]; stepKlByGroup: number[] };
    };
    const { refinement, validation } = metrics;
    expect(refinement.losses.total.length).toBe(refinement.iterations);
    expect(
      refinement.kept
        ? refinement.heldOutAfter < refinement.heldOutBefore
        : refinement.heldOutAfter === refinement.heldOutBefore,
    )
      .toBe(true);
    expect([validation.boundaryScores.length, validation.stepKlByGroup.length]).toEqual([4, 5]);
    expect(validation.markovScore).toBeLessThanOrEqual(1);
  });

  test("holds every goal against a number, or says why it cannot", () => {
    const goals = report.goals.map(({ goal }) => goal.replace("dream-mini: ", ""));
    expect(goals).toEqual([
      "phase 1 itself, overhead / round",
      "phase 1 itself, overhead / best",
      "phase 1, weights",
      "phase 2 itself, overhead / round",
      "phase 2 itself, overhead / best",
      "phase 2, Markov score",
      "phase 2, accuracy",
      "phase 3, accuracy / baseline",
      "phase 3, step KL / baseline",
      "phase 3, Markov score",
      "phase 3, overhead / best",
      "phase 3 unrefined, overhead / best",
      "refinement / best, step KL",
      "all static / dynamic 8 bits, step KL",
      "mostly static / dynamic 8 bits, step KL",
      "all static / dynamic 8 bits, time",
      "4 bits, G 10 / G 1, step KL",
      "selecting θ / forward pass",
      "phases 1 and 2, memory kept / peak",
      "this run",
    ]);
    for (const { measured, met, reason } of report.goals) {
      expect([measured === null, met === null]).toEqual([reason !== undefined, reason !== undefined]);
    }
    expect(report.goals.find(({ goal }) => goal.endsWith("phase 1, weights"))).toMatchObject({ met: true });
  });

  test("divides a row's pipeline by the same without its phases", () => {
    type Timed = {
      pipelineRuns: Record<string, number>[];
      solveSeconds: number;
      overhead: number;
      overheadOverBest: number | null;
    };
    const one = row("phase1") as unknown as Timed, unrefined = row("best + phases 1, 2") as unknown as Timed;
    const ratios = ({ pipelineRuns, solveSeconds }: Timed) => {
      expect(pipelineRuns.length).toBe(3);
      return pipelineRuns.map(({ calibrate, activations, write, scores, stepKl, smoothing }) =>
        (scores! + stepKl! + smoothing!) / (calibrate! + activations! + write! + solveSeconds)
      ).sort((a, b) => a - b)[1]!;
    };
    expect(one.overhead).toBeCloseTo(ratios(one), 9);
    expect([one.solveSeconds, one.overheadOverBest]).toEqual([0, null]);
    expect(unrefined.solveSeconds).toBeGreaterThan(0);
    expect(unrefined.overheadOverBest!).toBeCloseTo(ratios(unrefined), 9);
    expect(row("baseline")["overhead"]).toBe(null as never);
    expect(row("phase1")["digest"] === row("baseline")["digest"]).toBe(false);
    expect(row("best alone")["digest"] === row("phase1")["digest"]).toBe(false);
    expect(row("best, 8 bits, all static, G 1")["digest"] === row("best, 8 bits, all static")["digest"]).toBe(
      false,
    );
  });

  test("says what was claimed beside what was measured, in lines that fit", () => {
    const text = formatReport(report).join("\n");
    expect(text).toContain("+9.36 % /");
    expect(text).toContain("0.92 /");
    for (const line of text.split("\n")) expect([line, line.length <= WIDTH]).toEqual([line, true]);
  });

  test("its tables: every row, losses, time groups and layers", async () => {
    const tables = await benchTables(measured);
    expect(Object.keys(tables).sort()).toEqual(["losses", "phases", "time"]);

    const phases = rowsOf("phases", tables.phases!);
    const names = report.rows.map(({ phase }) => phase === "full precision" ? "full" : phase as string);
    expect([...new Set(phases.map(({ phase }) => phase))]).toEqual(names);
    expect(new Set(phases.map(({ setting }) => setting))).toEqual(new Set(["2 bits"]));
    const phase3 = report.rows.find(({ phase }) => phase === "phase3_full") as Record<string, unknown>;
    const all = phases.find(({ phase, task }) => phase === "phase3_full" && task === "all")!;
    const kl = phase3["stepKl"] as { value: number; low: number; high: number };
    expect([all.stepKl, all.stepKlLow, all.stepKlHigh]).toEqual([kl.value, kl.low, kl.high]);
    expect([all.overhead, all.seconds] as unknown[]).toEqual([phase3["overhead"], phase3["seconds"]]);
    // Smoothing is of static grids: layers with grids of each token's own have none.
    const { perToken } = phase3["metrics"] as { perToken: string[] };
    expect(all.layersKept! + all.layersRejected!).toBe(28 - perToken.length);

    const losses = rowsOf("losses", tables.losses!);
    const { refinement } = phase3["metrics"] as { refinement: { losses: { total: number[] } } };
    expect(losses.filter(({ setting }) => setting === "2 bits, phase3_full").map(({ total }) => total))
      .toEqual(refinement.losses.total);
    const refined = report.rows.filter(({ metrics }) =>
      ((metrics as { refinement?: { iterations: number } } | null)?.refinement?.iterations ?? 0) > 1
    );
    expect(new Set(losses.map(({ setting }) => setting))).toEqual(
      new Set(refined.map(({ phase }) => `2 bits, ${phase}`)),
    );

    const time = rowsOf("time", tables.time!);
    const transitions = time.filter(({ stepKl }) => stepKl !== null);
    expect(transitions.filter(({ setting }) => setting === "2 bits, phase1").map((row) => row.tBegin))
      .toEqual([0, 0.2, 0.4, 0.6, 0.8]);
    expect(transitions.every(({ layer, stepKl }) => layer === null && stepKl! > 0)).toBe(true);
    const errors = time.filter(({ layer, relativeError }) => layer !== null && relativeError !== null);
    const mean = (setting: string) => {
      const own = errors.flatMap((row) => row.setting === setting ? row.relativeError! : []);
      expect(own.length).toBe(28 * 5);
      return own.reduce((sum, value) => sum + value, 0) / own.length;
    };
    expect(mean("2 bits, phase3_full")).toBeLessThan(mean("2 bits, baseline") / 2);
    // Nothing was kept smoothed here: the ranges of phase 2 are those of phase 1.
    const ranges = (stage: string) => time.filter((row) => row.stage === stage && row.layer !== null).length;
    expect([ranges("before") > 0, ranges("after")]).toEqual([true, ranges("before")]);
    expect(chartsOf(tables).map(({ id }) => id)).toEqual([
      "phases-accuracy",
      "phases-stepKl",
      "phases-markovScore",
      "phases-overhead",
      "layers-heat-relativeError",
      "along-t-stepKl",
      "heat-stepKl",
      "time-parameters",
      "time-parameters-close",
      "losses",
      "loss-terms",
      "loss-terms-2",
      "loss-terms-3",
    ]);
    const full = rowsOf("phases", tables.phases!).filter(({ phase }) => phase === "full");
    expect(full.every(({ accuracy, stepKl, bits }) => accuracy === 1 && stepKl === null && bits === null))
      .toBe(true);
  });

  test("its table of θ: ranges of the time groups, and more of layers that keep theirs smoothed", async () => {
    const smoothed = await phasesSuite.run(
      context(`--phase phase2 --model ${DREAM} --groups 3`),
    );
    const theta = rowsOf("time", (await benchTables(smoothed)).time!).filter(({ stage }) =>
      stage === "after"
    );
    const rows: SuiteReport["rows"] = smoothed.rows;
    const phase2 = rows.find(({ phase }) => phase === "phase2")!;
    const { kept, rejected } = (phase2["metrics"] as { smoothing: Record<string, string[]> }).smoothing;
    expect([kept!.length > 0, rejected!.length > 0]).toEqual([true, true]);
    const count = (layer: string) => theta.filter((row) => row.layer === layer).length;
    for (const layer of kept!) expect(count(layer)).toBeGreaterThanOrEqual(3);
    expect(kept!.some((layer) => count(layer) > 3)).toBe(true);
    for (const layer of rejected!) expect(count(layer)).toBe(3);
    expect(theta.every((row) => row.activationHigh! > row.activationLow!)).toBe(true);
  });

  test("one phase comes with its baseline; the same numbers as with every other", async () => {
    const numbers = (rows: SuiteReport["rows"]) =>
      rows.map(({ phase, stepKl, accuracy, digest }) => ({ phase, stepKl, accuracy, digest }));
    const { rows }: SuiteReport = await phasesSuite.run(
      context(`--phase phase2 --model ${DREAM} --groups 5`),
    );
    expect(rows.map(({ phase }) => phase)).toEqual(["full precision", "baseline", "phase2"]);
    expect(numbers(rows)).toEqual(numbers(["full precision", "baseline", "phase2"].map(row)));
  });
});

describe("phases", () => {
  test("phase 1 changes no byte", async () => {
    const { context, weights } = await dream();
    const activations = { groups: 4, bits: 8 } as const;
    const plain = await runPhases(context, weights, { activations });
    const validated = await runPhases(context, weights, {
      activations,
      validation: { smoothnessThreshold: 0.3 },
    });
    expect(modelDigest(validated.model)).toBe(modelDigest(plain.model));
    const other = await runPhases(context, weights, { activations: { groups: 5, bits: 8 } });
    expect(modelDigest(other.model) === modelDigest(plain.model)).toBe(false);
    const { validation } = validated.report;
    expect(validation!.stepKlByGroup.every((kl) => kl > 0)).toBe(true);
    expect(plain.report.validation).toBeUndefined();
  });

  test("models that share scratch choose and measure what models with their own do", async () => {
    let changed = 0;
    for (const { context, weights } of [await dream(), await rounded(imageModel(1000), "synthetic")]) {
      const settings = {
        activations: { groups: 3, bits: 4, grouping: "adaptive", perTokenLimit: 1 },
        validation: { smoothnessThreshold: 0.3 },
        smoothing: {},
        refinement: { learningRate: 0.01, maxIterations: 3, convergenceThreshold: 0 },
        sampler: context.calibrated.kind === "images" ? { groups: 3 } : undefined,
      } as const;
      const workspace = new Workspace();
      const own = await runPhases(context, weights, settings);
      const shared = await runPhases({ ...context, workspace }, weights, settings);
      expect(workspace.bytes).toBeGreaterThan(0);
      changed += own.report.perToken.length;
      expect(shared.report.perToken).toEqual(own.report.perToken);
      expect(shared.report.heldOutStepKl).toBe(own.report.heldOutStepKl!);
      expect(modelDigest(shared.model)).toBe(modelDigest(own.model));
      // A second model adds no scratch.
      const [first, second] = [0, 1].map(() => loadPhaseModel({ ...context, workspace }, shared.model));
      const bytes = workspace.bytes, meter = new StepKlMeter(context.calibrated);
      expect(meter.measure(second!)).toEqual(meter.measure(first!));
      expect(workspace.bytes).toBe(bytes);
    }
    expect(changed).toBeGreaterThan(0);
  });

  test("phase 2 never shrinks a range, leaves what is outside windows, and is kept only where errors do not rise", async () => {
    const { context, weights } = await dream();
    const activations = { groups: 4, bits: 8 } as const, smoothing = { windowSize: 100 };
    const before = (await runPhases(context, weights, { activations })).model.timeParameters!;
    const { model, report } = await runPhases(context, weights, { activations, smoothing });
    const { kept, rejected, heldOutBefore, heldOutAfter, samples } = report.smoothing!;
    expect(kept.length + rejected.length).toBe(weights.size);
    expect(samples).toBeGreaterThan(0);
    expect(heldOutAfter).toBeLessThanOrEqual(heldOutBefore);
    const { groups } = before;
    for (const [name, { activation }] of model.timeParameters!.layers) {
      const old = before.layers.get(name)!.activation!, own = activation!;
      if (!kept.includes(name)) {
        expect(own).toEqual(old);
        continue;
      }
      for (let bin = 0; bin < groups.axis.bins; bin++) {
        const g = groups.groupOfBin(bin), { start, end } = groups.range(g);
        const isOutside = bin - start >= 100 && end - bin > 100;
        if (isOutside) expect([own.scale[bin], own.zeroPoint[bin]]).toEqual([old.scale[g], old.zeroPoint[g]]);
        const low = ({ scale, zeroPoint }: typeof own, i: number) => -scale[i]! * zeroPoint[i]!;
        const high = ({ scale, zeroPoint }: typeof own, i: number) => scale[i]! * (255 - zeroPoint[i]!);
        const slack = 1e-5 * old.scale[g]! * 255;
        expect(low(own, bin)).toBeLessThanOrEqual(low(old, g) + slack);
        expect(high(own, bin)).toBeGreaterThanOrEqual(high(old, g) - slack);
      }
    }
  });

  test("phase 3 lowers the held-out step KL of a rounded model, changes no code, and is what a stored model would be", async () => {
    const { context, weights } = await dream();
    const codes = new Map([...weights].map(([name, { packed }]) => [name, packed.slice()]));
    const scales = new Map([...weights].map(([name, { scale }]) => [name, scale.slice()]));
    const refinement = { learningRate: 0.02, maxIterations: 12, convergenceThreshold: 0 };
    const { model, report } = await runPhases(context, weights, { refinement });
    expect(report.refinement!.kept).toBe(true);
    expect(report.refinement!.heldOutAfter).toBeLessThan(0.7 * report.refinement!.heldOutBefore);
    for (const [name, tensor] of model.weights) {
      const { packed, scale } = tensor as OneLevelTensor;
      expect(packed).toEqual(codes.get(name)!);
      expect(weights.get(name)!.scale).toEqual(scales.get(name)!); // what came in is as it was
      expect(scale.every((bits) => Number.isFinite(new Float16Array(Uint16Array.of(bits).buffer)[0]!))).toBe(
        true,
      );
    }
    for (const bias of model.biases.values()) { // bfloat16, as the checkpoint has them
      expect(new Uint32Array(bias.slice().buffer).every((word) => (word & 0xffff) === 0)).toBe(true);
    }
    const meter = new StepKlMeter(context.calibrated);
    const klOf = (own: Parameters<typeof loadPhaseModel>[1]) =>
      meanStepKl(meter.measure(loadPhaseModel(context, own)));
    expect(klOf(model)).toBeLessThan(klOf({ weights }));
  });

  test("phase 3 is rejected when the held-out step KL does not fall, and everything stays", async () => {
    const { context, weights } = await dream();
    const refinement = { learningRate: 50, maxIterations: 4, convergenceThreshold: 0 };
    const { model, report } = await runPhases(context, weights, { refinement });
    expect(report.refinement!.kept).toBe(false);
    expect(report.refinement!.heldOutAfter).toBe(report.refinement!.heldOutBefore);
    expect(model.weights).toBe(weights);
    expect(model.biases.size).toBe(0);
    expect(report.warnings.join()).toContain("the refinement was rejected");
  });

  test("images with a learned variance, on made-up data, with biases by time group", async () => {
    const { context, weights } = await rounded(imageModel(1000), "synthetic");
    const { model, report } = await runPhases(context, weights, {
      activations: { groups: 3, bits: 8 },
      validation: { smoothnessThreshold: 0.3 },
      smoothing: {},
      refinement: { learningRate: 0.01, maxIterations: 6, convergenceThreshold: 0, timeBiases: 0.1 },
    });
    expect(report.groups).toBe(3);
    const { refinement, validation } = report;
    expect(
      refinement!.kept ? refinement!.heldOutAfter < refinement!.heldOutBefore : model.weights === weights,
    ).toBe(true);
    expect(validation!.boundaryScores.length).toBe(2);
    expect(
      [...model.timeParameters!.layers.values()].every(({ output }) =>
        (output !== undefined) === refinement!.kept
      ),
    ).toBe(true);
  });
});

describe("the pipeline", () => {
  const configOf = (overrides: Record<string, unknown>) =>
    resolveConfig({
      overrides: {
        solver: "clip",
        bit_width: 2,
        group_size: 0,
        calibration_samples: 48,
        num_time_groups: 3,
        ...overrides,
      },
    }).config;
  const enabled = (...phases: string[]) =>
    Object.fromEntries(phases.map((phase) => [`thermodynamic.${phase}.enabled`, true]));

  test("without a phase it needs no calibration data and writes no sidecar; phase 1 changes no byte of the model", async () => {
    const [plain, validated] = [place.fresh(), place.fresh()];
    const { phases } = await quantizeCheckpoint({
      input: DREAM,
      output: plain,
      config: configOf({}),
      kernels,
    });
    expect(phases).toBeUndefined();
    const messages: string[] = [];
    const report = await quantizeCheckpoint({
      input: DREAM,
      output: validated,
      config: configOf({ ...enabled("validation"), "thermodynamic.validation.smoothness_threshold": 0 }),
      kernels,
      onEvent: ({ kind, message }) => kind === "phase" && messages.push(message),
    });
    const files = (folder: string) =>
      readdirSync(folder).filter((name) => name.endsWith(".safetensors")).sort();
    expect(files(validated)).toEqual([...files(plain), "time_parameters.safetensors"]);
    for (const name of files(plain)) {
      expect(readFileSync(join(validated, name)).equals(readFileSync(join(plain, name)))).toBe(true);
    }
    expect(messages.filter((line) => line.startsWith("violation (")).length).toBe(
      report.phases!.validation!.violations.length,
    );
    expect(report.phases!.validation!.violations.length).toBeGreaterThan(0);
  });

  test("phase 3 writes what was refined; the stored model with its sidecar is the one that was measured", async () => {
    const output = place.fresh();
    const config = configOf({
      ...enabled("validation", "transition_optimization"),
      solver: "feedback",
      "thermodynamic.transition_optimization.learning_rate": 0.02,
      "thermodynamic.transition_optimization.max_iterations": 10,
    });
    const { phases } = await quantizeCheckpoint({ input: DREAM, output, config, kernels });
    expect(phases!.refinement!.kept).toBe(true);
    using checkpoint = openCheckpoint(output);
    const packed = packedLayers(checkpoint);
    const timeParameters = readTimeParameters(output, {
      fingerprint: modelFingerprint(checkpoint),
      layers: new Map([...packed].map(([name, { rows }]) => [name, { rows, weightGroups: 1 }])),
      groups: 3,
    });
    const calibrated = await loadCalibration(loadModel(DREAM, kernels), {
      source: join(DREAM, "calibration.jsonl"),
      samples: 48,
      seed: 0,
    });
    const stored = loadModel(output, kernels, { timeParameters });
    const same = fewHeldOut(calibrated, phases!.validation!.samples);
    expect(meanStepKl(new StepKlMeter(same).measure(stored))).toBe(phases!.heldOutStepKl!);
    expect(await verifyFiles(output, readManifest(output)!)).toEqual([]);
  });

  test("a phase without calibration data takes what the model makes itself", async () => {
    const input = store(place.fresh(), dreamCheckpoint()), few = { "self_calibration.records": 16 };
    const config = configOf({ ...enabled("validation"), ...few }), lines: string[] = [];
    const { phases } = await quantizeCheckpoint({
      input,
      output: place.fresh(),
      config,
      kernels,
      onEvent: ({ message }) => void lines.push(message),
    });
    expect(phases!.validation!.stepKlByGroup.every((kl) => kl > 0)).toBe(true);
  });
});

describe("held-out samples", () => {
  test("few of them are spread over all times, the same every time", async () => {
    const { context: { calibrated } } = await dream();
    const timesOf = ({ data }: typeof calibrated) =>
      (data.heldOut as readonly { times: Float64Array; samples: number }[]).flatMap(({ times, samples }) => {
        expect(times.length).toBe(samples);
        return [...times];
      });
    const all = timesOf(calibrated).sort((a, b) => a - b);
    const few = timesOf(fewHeldOut(calibrated, 8)).sort((a, b) => a - b);
    // One from the middle of each eighth.
    expect(few).toEqual(Array.from({ length: 8 }, (_, i) => all[Math.floor((i + 0.5) * all.length / 8)]!));
    expect(timesOf(fewHeldOut(calibrated, 8)).sort((a, b) => a - b)).toEqual(few);
    expect(fewHeldOut(calibrated, all.length)).toBe(calibrated);
  });

  test("a run that is looked into measures the same, with and without outputs that are kept", async () => {
    for (
      const { context, weights } of [await dream(), await rounded(imageModel(1000), "synthetic")]
    ) {
      const calibrated = fewHeldOut(context.calibrated, 10);
      const model = loadPhaseModel(context, { weights });
      const meter = new StepKlMeter(calibrated);
      const plain = meter.measure(model);
      expect(meter.bytes).toBeGreaterThan(0);
      const bytes = meter.bytes, seen = new Set<string>();
      const observed = meter.measure(model, (times, { name, weights: { cols } }, x, rows) => {
        seen.add(name);
        expect([x.length >= rows * cols, rows % times.length]).toEqual([true, 0]);
      });
      expect(meter.bytes).toBe(bytes);
      expect(seen.size).toBeGreaterThanOrEqual(weights.size);
      expect(observed.times).toEqual(plain.times);
      for (const [i, sum] of observed.sums.entries()) {
        expect(Math.abs(sum - plain.sums[i]!)).toBeLessThanOrEqual(1e-5 * Math.abs(plain.sums[i]!));
      }
    }
  });

  test("the guard's errors are ‖Ŵ (Q(x) − x)‖² of every second row where grids differ", async () => {
    const { context, weights } = await dream();
    const { model } = await runPhases(context, weights, { activations: { groups: 2, bits: 8 } });
    const { groups, layers } = model.timeParameters!;
    const before = new Map([...layers].map(([name, { activation }]) => [name, activation!]));
    // Above half the axis all scales are 1.5 times as wide; below nothing changes.
    const after = mapShared(before, (own) => ({
      bits: own.bits,
      scale: Float32Array.from(
        { length: groups.axis.bins },
        (_, bin) => own.scale[groups.groupOfBin(bin)]! * (bin < 500 ? 1 : 1.5),
      ),
      zeroPoint: Int32Array.from(
        { length: groups.axis.bins },
        (_, bin) => own.zeroPoint[groups.groupOfBin(bin)]!,
      ),
    }));
    const guard = layerGuard(context, groups, before, after);
    const wanted = ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight"];
    const expected = new Map(wanted.map((name) => [name, { before: 0, after: 0 }]));
    const meter = new StepKlMeter(fewHeldOut(context.calibrated, 6));
    meter.measure(loadPhaseModel(context, model), (times, layer, x, rows) => {
      guard.observe(times, layer, x, rows);
      const sums = expected.get(layer.name);
      if (sums === undefined) return;
      const tensor = weights.get(layer.name)!, { cols } = tensor;
      const dense = Float64Array.from(dequantize(kernels, tensor));
      const each = rows / times.length;
      for (const [item, time] of times.entries()) {
        const bin = groups.axis.binOf(time);
        if (bin < 500) continue;
        for (let row = item * each; row < (item + 1) * each; row += 2) {
          for (
            const [key, grids, at] of [["before", before, groups.groupOfBin(bin)], [
              "after",
              after,
              bin,
            ]] as const
          ) {
            const { scale, zeroPoint } = grids.get(layer.name)!;
            const s = scale[at]!, z = zeroPoint[at]!;
            const lost = Float64Array.from({ length: cols }, (_, k) => {
              const value = x[row * cols + k]!;
              return s * (Math.min(255, Math.max(0, Math.round(value / s) + z)) - z) - value;
            });
            for (let r = 0; r < tensor.rows; r++) {
              let out = 0;
              for (let k = 0; k < cols; k++) out += dense[r * cols + k]! * lost[k]!;
              sums[key] += out * out;
            }
          }
        }
      }
    });
    const { errors, kept, rejected } = guard.report();
    for (const [name, { before, after }] of expected) {
      const own = errors.get(name)!;
      expect(before).toBeGreaterThan(0);
      expect(Math.abs(own.before / before - 1)).toBeLessThan(1e-3); // ties round half away here, half to even there
      expect(Math.abs(own.after / after - 1)).toBeLessThan(1e-3);
      expect((own.after <= own.before ? kept : rejected).includes(name)).toBe(true);
    }
  });
});

describe("bad input", () => {
  test("unknown phases, groups of 0, options of another suite", () => {
    expect(() => parseBenchArguments(["--phase", "phase4"])).toThrow(
      '--phase must be one of all, baseline, phase1, phase2, phase3_full, got "phase4"',
    );
    expect(() => parseBenchArguments(["--phase", "all", "--groups", "0"])).toThrow(
      '--groups must be a whole number from 1 to 100, got "0"',
    );
    expect(() => parseBenchArguments(["--phase", "all", "--suite", "kernels"])).toThrow(
      "of the suite phases",
    );
    expect(() => parseBenchArguments(["--groups", "4"])).toThrow("of the suite phases");
    expect(parseBenchArguments(["--phase", "phase1"]).suite.name).toBe("phases");
    expect(parseBenchArguments(["--suite", "phases"]).options.phase).toBe("all");
    const codes = (phase: string) => parseBenchArguments(["--phase", phase, "--suite", "codes"]);
    expect(codes("phase3_full").options.phase).toBe("phase3_full");
    expect(codes("phase3_full").suite.name).toBe("codes");
    expect(() => codes("phase1")).toThrow("--phase must be phase3_full with --suite codes, got phase1");
  });

  test("more groups than timesteps", async () => {
    const folder = imageModel(20);
    const error = await rejection(
      Promise.resolve(phasesSuite.run(context(`--phase baseline --model ${folder} --groups 21`))),
    );
    expect(String(error)).toContain("groups must be at most the 20 bins of the axis, got 21");
  });

  test("a sidecar of another model", async () => {
    const quantized = async (bits: number) => {
      const output = place.fresh();
      const { config } = resolveConfig({ overrides: { solver: "clip", bit_width: bits } });
      await quantizeCheckpoint({ input: DREAM, output, config, kernels });
      return output;
    };
    const [two, four] = [await quantized(2), await quantized(4)];
    const fingerprint = (path: string) => {
      using checkpoint = openCheckpoint(path);
      return modelFingerprint(checkpoint);
    };
    const { context, weights } = await dream();
    const { model } = await runPhases(context, weights, { activations: { groups: 2, bits: 8 } });
    const { groups, layers } = model.timeParameters!;
    writeTimeParameters(two, new TimeParameters(groups, layers, fingerprint(four)));
    const expected = {
      fingerprint: fingerprint(two),
      layers: new Map([...weights].map(([name, { rows }]) => [name, { rows, weightGroups: 1 }])),
    };
    expect(() => readTimeParameters(two, expected)).toThrow("got one of another model");
    writeTimeParameters(two, new TimeParameters(groups, layers, fingerprint(two)));
    expect(() => readTimeParameters(two, { ...expected, groups: 3 })).toThrow(
      "it must have 3 time groups, got 2",
    );
    expect(readTimeParameters(two, expected).groups.count).toBe(2);
  });

  test("what takes the place of weights and biases has to fit", async () => {
    const { weights } = await dream();
    const up = weights.get("model.layers.0.mlp.up_proj.weight")!;
    const load = (options: Parameters<typeof loadModel>[2]) => () => loadModel(DREAM, kernels, options);
    expect(load({ weights: new Map([["model.layers.0.mlp.down_proj.weight", up]]) })).toThrow(
      'in place of "model.layers.0.mlp.down_proj.weight" must be [64, 160], got [160, 64]',
    );
    expect(load({ weights: new Map([["nothing.weight", up]]) })).toThrow("there is no such tensor");
    const bias = "model.layers.0.self_attn.q_proj.bias";
    expect(load({ biases: new Map([[bias, new Float32Array(3)]]) })).toThrow("must be [64], got [3]");
    const { model } = load({ biases: new Map([[bias, new Float32Array(64).fill(2)]]) })();
    expect("parts" in model && "query" in model.parts.blocks[0]! && model.parts.blocks[0].query.bias![0])
      .toBe(2);
  });

  test("nothing held out", async () => {
    const { context, weights } = await dream();
    const calibrated = {
      ...context.calibrated,
      data: { ...context.calibrated.data, heldOut: [] },
    } as PhaseContext["calibrated"];
    const error = await rejection(
      runPhases({ ...context, calibrated }, weights, { activations: { groups: 2, bits: 8 } }),
    );
    expect(String(error)).toContain("must have at least 8 records");
  });

  test("the axis of a language model takes all 100 groups", () => {
    expect(equalTimeGroups(maskRatioAxis(1000), 100).count).toBe(100);
  });
});
