import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { CalibrationError, ConfigError, InterruptedError } from "../../lib/errors.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { storedTimeParameters } from "../../lib/models/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import type { RunEvent } from "../../lib/progress.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { differences, MODELS, rejection, workplace } from "../_checkpoints.ts";
import { shortDream, store } from "../_models.ts";

const kernels = await openKernels();
const place = workplace();
afterAll(() => {
  kernels.close();
  place.remove();
});

const DREAM = store(place.fresh("model"), shortDream());
const SHORT = { bit_width: 2, calibration_data: "synthetic", calibration_samples: 32 };
const VALIDATE = { "thermodynamic.validation.enabled": true };
const OPTIMIZE = { "thermodynamic.transition_optimization.enabled": true };

/** A small run, and the warnings that it gave. */
async function run(overrides: Record<string, unknown>, input = DREAM) {
  const warnings: string[] = [];
  const { config } = resolveConfig({
    overrides: { ...SHORT, solver: "round", ...overrides },
  });
  const report = await quantizeCheckpoint({
    input,
    output: place.fresh(),
    config,
    kernels,
    onEvent: ({ kind, message }) => kind === "warning" && warnings.push(message!),
  });
  return { report, warnings };
}

describe("settings that contradict phases are refused before anything is solved", () => {
  const cases: readonly (readonly [string, Record<string, unknown>, string])[] = [
    ["two-level scales and gradients", { ...OPTIMIZE, scale_bits: 4 }, '"scale_bits": got 4, expected 16'],
    [
      "validation without grids",
      { ...VALIDATE, enable_time_aware: false },
      '"thermodynamic.validation.enabled": got true',
    ],
    [
      "smoothing without grids",
      { "thermodynamic.boundary_smoothing.enabled": true, enable_time_aware: false },
      '"thermodynamic.boundary_smoothing.enabled": got true',
    ],
    [
      "weight scales by time and two levels",
      { ...VALIDATE, time_scales: "per_group", scale_bits: 4 },
      '"time_scales": got "per_group", expected shared',
    ],
  ];
  for (const [name, overrides, message] of cases) {
    test(name, async () => {
      const error = await run(overrides).catch((caught) => caught);
      expect(error).toBeInstanceOf(ConfigError);
      expect(String(error)).toContain(message);
    });
  }

  test("saved statistics", async () => {
    const saved = place.fresh() + ".safetensors";
    const { config } = resolveConfig({
      overrides: { ...SHORT, solver: "feedback" },
    });
    const output = place.fresh();
    await quantizeCheckpoint({
      input: DREAM,
      output,
      config,
      kernels,
      saveCalibration: { path: saved },
    });
    const error = await run({ ...VALIDATE, solver: "feedback", calibration_data: saved }).catch((caught) =>
      caught
    );
    expect(error).toBeInstanceOf(CalibrationError);
    expect(String(error)).toContain("got saved statistics, which hold no samples");
  });
});

test("activations have the bits that the configuration asks for", async () => {
  const { report } = await run({
    ...VALIDATE,
    activation_bits: 4,
    num_time_groups: 2,
    per_token_limit: null,
  });
  using checkpoint = openCheckpoint(report.output);
  const layers = [...storedTimeParameters(checkpoint)!.layers.values()];
  expect(layers.length).toBeGreaterThan(0);
  expect(new Set(layers.map(({ activation }) => activation!.bits))).toEqual(new Set([4]));
});

describe("phases with little to do say so", () => {
  test("no layer is quantized", async () => {
    const { report, warnings } = await run({ ...VALIDATE, ...OPTIMIZE, layer_bit_widths: { ".": 16 } });
    expect(warnings).toContain("the phases have nothing to do: no layer is quantized");
    expect(report.phases).toBeUndefined();
  });

  test("more groups than times observed: equal groups, neighbours' moments", async () => {
    const { report, warnings } = await run({
      ...VALIDATE,
      num_time_groups: 100,
      calibration_data: null,
      calibration_samples: 40,
      layer_bit_widths: { "layers\\.[123]\\.": 16 },
      time_groups: "adaptive",
      output_correction: true,
    }, join(MODELS, "dream-mini"));
    expect(warnings.some((text) => text.startsWith("adaptive time groups were rejected"))).toBe(true);
    expect(report.phases!.groups).toBe(100);
    expect(report.phases!.output!.heldOutBefore).toBeGreaterThan(0);
  });

  test("keys of time without a phase", async () => {
    const { warnings } = await run({ output_correction: true, time_groups: "adaptive" });
    expect(warnings.filter((text) => text.includes("has no effect without a phase"))).toHaveLength(2);
  });
});

test("a refinement's time is told before it, and what became of it stands in the manifest", async () => {
  const output = place.fresh(), messages: string[] = [];
  const { config } = resolveConfig({
    overrides: {
      ...OPTIMIZE,
      ...SHORT,
      solver: "feedback",
      enable_time_aware: false,
      "thermodynamic.transition_optimization.max_iterations": 20,
      "thermodynamic.transition_optimization.max_minutes": 1e-4,
    },
  });
  const onEvent = ({ kind, message }: RunEvent) => void (kind === "phase" && messages.push(message!));
  await quantizeCheckpoint({ input: DREAM, output, config, kernels, onEvent });
  const plan = messages.findIndex((message) => message.startsWith("gradient refinement: "));
  expect(messages[plan]).toMatch(
    /^gradient refinement: 1 of 20 steps of \d+ sequences, 2 looks at held-out samples, about .* a step; it may take 0.0001 min/,
  );
  const end = messages.findIndex((message) => message.startsWith("refinement: "));
  expect(end).toBeGreaterThan(plan);
  expect(messages[end]).toContain("in 1 iterations");
  const manifest = JSON.parse(readFileSync(join(output, "arrowquant.manifest.json"), "utf8"));
  expect(manifest.refinement).toMatchObject({
    iterations: 1,
    reason: "the time allowed 1 of 20 iterations",
    kept: expect.any(Boolean),
    held_out_before: expect.any(Number),
    held_out_after: expect.any(Number),
  });
});

describe("a refinement that is stopped", () => {
  const config = resolveConfig({
    overrides: {
      ...OPTIMIZE,
      ...SHORT,
      solver: "feedback",
      enable_time_aware: false,
      "thermodynamic.transition_optimization.max_iterations": 12,
    },
  }).config;

  /** Steps of the refinement that a run makes, until `last` is reached, and what it says. */
  async function run(output: string, { resume = false, last = Infinity } = {}) {
    const steps: number[] = [], messages: string[] = [];
    let error: unknown;
    try {
      await quantizeCheckpoint({
        ...{ input: DREAM, output, config, kernels, resume },
        onEvent: ({ message }) => messages.push(message!),
        onProgress({ stage, tensorsDone }) {
          if (stage !== "gradient refinement") return;
          steps.push(tensorsDone);
          if (tensorsDone >= last) throw new InterruptedError("Stopped by SIGINT", "SIGINT");
        },
      });
    } catch (cause) {
      error = cause;
    }
    return { steps, messages, error };
  }

  test("goes on from its last look, to the same bytes; a broken state is begun again", async () => {
    const reference = place.fresh("reference"), output = place.fresh("stopped");
    const whole = await run(reference);
    expect(whole.error).toBe(undefined);
    expect(whole.steps.length).toBe(12);
    expect((await run(output, { last: 5 })).error).toBeInstanceOf(InterruptedError);
    const state = join(output, "arrowquant.partial", "solved-refinement");
    const again = await run(output, { resume: true, last: 9 });
    expect(again.error).toBeInstanceOf(InterruptedError);
    expect(again.steps[0]).toBe(4); // a look every two steps
    expect(again.messages.join("\n")).toContain("gradient refinement goes on from its last look");
    const bytes = readFileSync(state);
    bytes[bytes.length - 1]! ^= 1;
    writeFileSync(state, bytes);
    const last = await run(output, { resume: true });
    expect([last.error, last.steps.length]).toEqual([undefined, 12]);
    expect(differences(output, reference)).toEqual([]);
  });

  test("behind its end is not made again", async () => {
    const output = place.fresh("ended"), controller = new AbortController();
    const stopped = await rejection(quantizeCheckpoint({
      ...{ input: DREAM, output, config, kernels, signal: controller.signal },
      onEvent: ({ message }) => message!.startsWith("refinement: ") && controller.abort("SIGINT"),
    }));
    expect(stopped).toBeInstanceOf(InterruptedError);
    const { steps, error } = await run(output, { resume: true });
    expect([error, steps]).toEqual([undefined, []]);
  });
});
