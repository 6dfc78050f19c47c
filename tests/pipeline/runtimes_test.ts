/** Bun and Deno, native and WebAssembly: four real processes that must write the same. */
import { afterAll, describe, expect, test } from "bun:test";
import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { packedLayers } from "../../lib/quant/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { differences, MODELS, workplace } from "../_checkpoints.ts";
import { runIn, runtimeBinary } from "../_runtimes.ts";

const place = workplace();
afterAll(place.remove);

const DREAM = join(MODELS, "dream-mini");
const SETTINGS = [[4, "clip", 64], [2, "round", 64], [2, "clip", 64], [2, "round", 0]] as const;
/** Every 50th of 900 puzzles: six a task. */
const EVERY = 50;

const folders = [DREAM];
let hasNative: boolean;
{
  using kernels = await openKernels();
  hasNative = kernels.backend === "native";
  for (const [bit_width, solver, group_size] of SETTINGS) {
    const output = place.fresh();
    const { config } = resolveConfig({ overrides: { bit_width, solver, group_size } });
    await quantizeCheckpoint({ input: DREAM, output, config, kernels });
    folders.push(output);
  }
}

interface Answers {
  readonly backend: string;
  readonly runtime: string;
  readonly answers: readonly (readonly [task: string, answer: string])[][];
}

describe("greedy generations at full precision, 4 and 2 bits", () => {
  const found: { name: string; result: Promise<Answers> }[] = [];
  for (const runtime of ["bun", "deno"] as const) {
    const binary = runtimeBinary(runtime);
    for (const backend of ["native", "wasm"]) {
      const name = `${runtime}, ${backend}`;
      const missing = binary === undefined
        ? `${runtime} is not installed`
        : backend === "native" && !hasNative
        ? "no native library here"
        : undefined;
      if (missing !== undefined) {
        console.log(`skipped: ${name}: ${missing}`);
        continue;
      }
      const args = [backend, `${EVERY}`, ...folders];
      const result = runIn(runtime, binary!, "_generations.ts", args).then((text) =>
        JSON.parse(text) as Answers
      );
      result.catch(() => {}); // its test reports it
      found.push({ name, result });
    }
  }

  const [first, ...others] = found;

  test(`${first!.name}: the models differ, and full precision is right`, async () => {
    const { answers } = await first!.result;
    expect(answers.length).toBe(1 + SETTINGS.length);
    for (const task of ["add", "sudoku", "sort"]) {
      expect(answers[0]!.filter(([each]) => each === task).length).toBe(6);
    }
    expect(answers[3]).not.toEqual(answers[0]);
    expect(answers[4]).not.toEqual(answers[0]);
  });

  for (const { name, result } of others) {
    test(`${name}: the same as ${first!.name}`, async () => {
      const { backend, runtime, answers } = await result;
      expect(`${runtime.split(" ")[0]}, ${backend}`).toBe(name);
      expect(answers).toEqual((await first!.result).answers);
    });
  }
});

/** Folders that quantize.ts wrote in each runtime that is here. */
async function madeInEach(args: readonly string[]): Promise<string[]> {
  const made: string[] = [];
  for (const runtime of ["bun", "deno"] as const) {
    const binary = runtimeBinary(runtime);
    if (binary === undefined) {
      console.log(`skipped: ${runtime} is not installed`);
      continue;
    }
    const output = place.fresh();
    await runIn(runtime, binary, "../scripts/quantize.ts", [DREAM, output, ...args]);
    made.push(output);
  }
  return made;
}

test("the best solver and all phases write the same files in Bun and in Deno", async () => {
  const settings = place.fresh("phases.yaml");
  writeFileSync(settings, "thermodynamic:\n  transition_optimization:\n    max_iterations: 3\n");
  const made = await madeInEach(
    ["--solver", "best", "--phases", "all", "--bits", "2", "--samples", "32", "--config", settings],
  );
  expect(existsSync(join(made[0]!, "time_parameters.safetensors"))).toBe(true);
  for (const other of made.slice(1)) expect(differences(other, made[0]!)).toEqual([]);
}, 400_000);

test("trellis codes of 2 and 3 bits are the same files in Bun and in Deno", async () => {
  const settings = place.fresh("trellis.yaml");
  writeFileSync(settings, "codes: trellis\nlayer_bit_widths:\n  layers.1: 3\n");
  const made = await madeInEach(
    ["--solver", "best", "--effort", "low", "--bits", "2", "--samples", "32", "--config", settings],
  );
  using checkpoint = openCheckpoint(made[0]!);
  const layers = [...packedLayers(checkpoint).values()].filter(({ codes }) => codes === "trellis");
  expect(new Set(layers.map(({ bits }) => bits))).toEqual(new Set([2, 3]));
  for (const other of made.slice(1)) expect(differences(other, made[0]!)).toEqual([]);
}, 400_000);
