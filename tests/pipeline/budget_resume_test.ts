/** A budget's measurements over a stop. */
import { afterAll, describe, expect, test } from "bun:test";
import { cpSync, existsSync, readdirSync, readFileSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { CalibrationError, InterruptedError, OutputError } from "../../lib/errors.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { WORK_FOLDER } from "../../lib/pipeline/mod.ts";
import { differences, rejection, workplace } from "../_checkpoints.ts";
import { shortDream, store } from "../_models.ts";
import { type Options, pipelineRuns } from "./_runs.ts";

const place = workplace();
const DREAM = store(place.fresh("model"), shortDream());
const kernels = await openKernels();
afterAll(() => {
  kernels.close();
  place.remove();
});
const { quantizeTo } = pipelineRuns(kernels, place);
const config = {
  solver: "feedback",
  target_bits_per_weight: 2.6,
  calibration_data: "synthetic",
  calibration_samples: 32,
};

interface Ran {
  readonly messages: readonly string[];
  /** Layers that were measured, in order. */
  readonly measured: readonly string[];
}

/** A run that keeps what it says. */
async function ran(output: string, options: Options & { input?: string } = {}): Promise<Ran> {
  const messages: string[] = [], measured: string[] = [];
  const { input = DREAM, ...others } = options;
  await quantizeTo(output, input, {
    config,
    ...others,
    onEvent: ({ message }) => messages.push(message),
    onProgress: ({ stage, tensor }) => stage === "sensitivities" && measured.push(tensor),
  });
  return { messages, measured };
}

/** Stops when so many layers are measured. */
function stopAfter(output: string, layers: number, options: Options & { input?: string } = {}) {
  const controller = new AbortController(), { input = DREAM, ...others } = options;
  return rejection(quantizeTo(output, input, {
    config,
    ...others,
    signal: controller.signal,
    onProgress: ({ stage, tensorsDone }) => {
      if (stage === "sensitivities" && tensorsDone >= layers) controller.abort("SIGINT");
    },
  }));
}

describe("a run with a budget that is stopped while it measures", () => {
  const reference = place.fresh("reference"), ready = ran(reference);

  test("goes on from the layer in hand, again and again, to the same bytes", async () => {
    const all = (await ready).measured, output = place.fresh();
    const error = await stopAfter(output, 3);
    expect(error).toBeInstanceOf(InterruptedError);
    expect(error.message).toContain("--resume");
    await stopAfter(output, 7, { resume: true });
    const { measured, messages } = await ran(output, { resume: true });
    expect(messages.join("\n")).toContain(`sensitivities of 7 of ${all.length} layers were measured before`);
    expect(measured).toEqual(all.slice(7));
    expect(differences(output, reference)).toEqual([]);
    expect(readdirSync(output)).not.toContain(WORK_FOLDER);
  });

  test("measures nothing again when it was stopped behind them, nor when it is finished", async () => {
    await ready;
    const output = place.fresh(), controller = new AbortController();
    await rejection(quantizeTo(output, DREAM, {
      config,
      signal: controller.signal,
      onProgress: ({ stage }) => stage === "solving" && controller.abort("SIGINT"),
    }));
    expect((await ran(output, { resume: true })).measured).toEqual([]);
    expect(differences(output, reference)).toEqual([]);
    const again = await ran(output, { resume: true });
    expect(again.measured).toEqual([]);
    expect(again.messages.join("\n")).toContain("nothing is left to do");
    expect(differences(output, reference)).toEqual([]);
  });

  test("needs --resume or --force, and --force measures anew", async () => {
    const all = (await ready).measured, output = place.fresh();
    await stopAfter(output, 3);
    expect((await rejection(quantizeTo(output, DREAM, { config }))).message).toMatch(/--resume.*--force/);
    expect((await ran(output, { force: true })).measured).toEqual([...all]);
    expect(differences(output, reference)).toEqual([]);
  });

  test("is not gone on with for another budget, or a checkpoint that was changed", async () => {
    const output = place.fresh(), input = place.fresh("input");
    cpSync(DREAM, input, { recursive: true });
    await stopAfter(output, 3, { input });
    const other = await rejection(
      quantizeTo(output, input, { config: { ...config, target_bits_per_weight: 3 }, resume: true }),
    );
    expect(other).toBeInstanceOf(OutputError);
    expect(other.message).toContain("target_bits_per_weight 2.6, not 3");
    const weights = join(input, "model.safetensors"), bytes = readFileSync(weights);
    bytes[bytes.length - 1]! ^= 1;
    writeFileSync(weights, bytes);
    utimesSync(weights, new Date(1e12), new Date(1e12));
    const changed = await rejection(quantizeTo(output, input, { config, resume: true }));
    expect(changed).toBeInstanceOf(OutputError);
    expect(changed.message).toMatch(/weights_sha256|must not have changed/);
  });

  test("does not take a file that is not as it was written", async () => {
    const all = (await ready).measured, output = place.fresh();
    await stopAfter(output, 3);
    const work = join(output, WORK_FOLDER);
    const [first] = readdirSync(work).filter((name) => name.startsWith("solved-costs-"));
    const path = join(work, first!);
    writeFileSync(path, readFileSync(path, "latin1").replace('"bits":2', '"bits":3'), "latin1");
    expect((await ran(output, { resume: true })).measured.length).toBe(all.length - 2);
    expect(differences(output, reference)).toEqual([]);
  });
});

test("a budget below the smallest forms is refused before anything is measured or made", async () => {
  const output = place.fresh(), measured: string[] = [];
  const error = await rejection(quantizeTo(output, DREAM, {
    config: { ...config, target_bits_per_weight: 2 },
    onProgress: ({ tensor }) => measured.push(tensor),
  }));
  expect(error).toBeInstanceOf(CalibrationError);
  expect(error.message).toContain("their smallest forms need");
  expect(measured).toEqual([]);
  expect(existsSync(output)).toBe(false);
});
