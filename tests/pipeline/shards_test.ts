/** Parts of a checkpoint by tasks that share nothing, and what brings them together. */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { cpSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { mergeFor, quantizeFor } from "../../lib/interop/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { manifestText } from "../../lib/output/record.ts";
import { MANIFEST_FILE, mergeCheckpoint, readManifest } from "../../lib/pipeline/mod.ts";
import {
  differences,
  gaussian,
  isDeno,
  matrix,
  rejection,
  workplace,
  writeTensors,
} from "../_checkpoints.ts";
import { configOf, DIT, DREAM, type Options, pipelineRuns } from "./_runs.ts";

const kernels = await openKernels();
const place = workplace();
afterAll(() => {
  kernels.close();
  place.remove();
});
const { quantizeTo, twoShards } = pipelineRuns(kernels, place);

/** All shards of a run, in the order given. */
async function quantizeShards(input: string, count: number, options: Options, order?: readonly number[]) {
  const parts = place.fresh();
  for (const index of order ?? Array.from({ length: count }, (_, i) => i + 1)) {
    await quantizeTo(parts, input, { ...options, shard: { index, count } });
  }
  return parts;
}

async function merged(input: string, shards: readonly string[]): Promise<string> {
  const output = place.fresh();
  await mergeCheckpoint({ input, output, shards });
  return output;
}

/** A test of what is solved, which is the same in both runtimes: Bun alone runs it. */
function testSolving(name: string, body: () => Promise<void>): void {
  if (!isDeno) test(name, body, 120_000);
}

describe("merged shards are byte for byte one task's output", () => {
  test("weights alone: 1, 2, 3 and 7 shards, finished in any order", async () => {
    const input = twoShards(), options = { config: { solver: "clip", min_accuracy: 0.98, bit_width: 2 } };
    const whole = place.fresh();
    await quantizeTo(whole, input, options);
    const orders = [[1], [2, 1], [3, 1, 2], [7, 2, 5, 1, 6, 4, 3]];
    for (const order of orders) {
      const parts = await quantizeShards(input, order.length, options, order);
      expect(differences(await merged(input, [parts]), whole)).toEqual([]);
    }
  });

  test("more shards than tensors: some have nothing to do", async () => {
    const input = twoShards(), whole = place.fresh();
    await quantizeTo(whole, input);
    const parts = await quantizeShards(input, 9, {});
    expect(differences(await merged(input, [parts]), whole)).toEqual([]);
  });

  test("separate folders, named in any order", async () => {
    const input = twoShards(), whole = place.fresh(), parts = await quantizeShards(input, 3, {});
    await quantizeTo(whole, input);
    const moved = place.fresh();
    cpSync(join(parts, "shard-2-of-3"), join(moved, "shard-2-of-3"), { recursive: true });
    rmSync(join(parts, "shard-2-of-3"), { recursive: true });
    expect(differences(await merged(input, [moved, parts]), whole)).toEqual([]);
    expect(differences(await merged(input, [parts, join(moved, "shard-2-of-3")]), whole)).toEqual([]);
  });

  for (const [model, input, solver] of [["Dream", DREAM, "best"], ["DiT", DIT, "feedback"]] as const) {
    testSolving(`${model}: solved on saved statistics`, async () => {
      const path = join(place.fresh(), "..", `${model}.safetensors`), samples = { calibration_samples: 32 };
      await quantizeTo(place.fresh(), input, {
        config: { solver: "round", ...samples, calibration_data: "synthetic" },
        saveCalibration: { path },
      });
      const options = { config: { solver, bit_width: 2, calibration_data: path } };
      const whole = place.fresh();
      await quantizeTo(whole, input, options);
      for (const count of [3]) {
        const parts = await quantizeShards(input, count, options);
        expect(differences(await merged(input, [parts]), whole)).toEqual([]);
      }
    });
  }

  testSolving("solved on data in calibration_mode once, of one candidate", async () => {
    const options = {
      config: {
        ...{ solver: "feedback", bit_width: 3, calibration_mode: "once", calibration_samples: 32 },
        "solver_options.candidates": 1,
      },
    };
    const whole = place.fresh();
    await quantizeTo(whole, DREAM, options);
    const parts = await quantizeShards(DREAM, 3, options, [2, 3, 1]);
    expect(differences(await merged(DREAM, [parts]), whole)).toEqual([]);
  });

  testSolving("with a LoRA merged in, of which a tensor is kept", async () => {
    const folder = place.fresh(), rank = 2, layer = "base_model.model.model.layers.0.self_attn.q_proj";
    mkdirSync(folder);
    writeTensors(join(folder, "lora.safetensors"), {
      [`${layer}.lora_A.weight`]: matrix(rank, 64, gaussian(rank * 64, 8)),
      [`${layer}.lora_B.weight`]: matrix(64, rank, gaussian(rank * 64, 9)),
    });
    for (const keep_patterns of [["q_proj"], []]) {
      const options = {
        config: { solver: "clip", keep_patterns },
        loras: [{ path: join(folder, "lora.safetensors") }],
      };
      const whole = place.fresh();
      await quantizeTo(whole, DREAM, options);
      const parts = await quantizeShards(DREAM, 2, options);
      expect(differences(await merged(DREAM, [parts]), whole)).toEqual([]);
    }
  });

  test("by a bit plan", async () => {
    const plan = `${place.fresh()}.json`, layer = "model.layers.1.mlp.down_proj.weight";
    const layers = { [layer]: { bits: 2, group_size: 32, zero_point: "real" } };
    writeFileSync(plan, JSON.stringify({ version: 1, layers }));
    const options = { config: { solver: "clip", bit_plan: plan } }, whole = place.fresh();
    await quantizeTo(whole, DREAM, options);
    const parts = await quantizeShards(DREAM, 3, options);
    expect(differences(await merged(DREAM, [parts]), whole)).toEqual([]);
  });

  test("by a merge that was stopped and resumed", async () => {
    const input = twoShards(),
      whole = place.fresh(),
      output = place.fresh(),
      parts = await quantizeShards(input, 2, {});
    await quantizeTo(whole, input);
    const controller = new AbortController(), run = { input, output, shards: [parts] };
    const onProgress = ({ tensorsDone }: { tensorsDone: number }) =>
      tensorsDone > 2 && controller.abort("SIGTERM");
    const error = await rejection(mergeCheckpoint({ ...run, signal: controller.signal, onProgress }));
    expect(error.message).toContain("--resume");
    const { tensorsResumed } = await mergeCheckpoint({ ...run, resume: true });
    expect(tensorsResumed).toBeGreaterThan(0);
    expect(differences(output, whole)).toEqual([]);
  });

  testSolving("for llama.cpp: one GGUF", async () => {
    const config = configOf({ solver: "clip", target: "llama.cpp", bit_width: 4 });
    const run = { input: DREAM, config, kernels }, folders = [place.fresh(), place.fresh()];
    const [whole, own] = folders.map((folder) => {
      mkdirSync(folder);
      return join(folder, "dream.gguf"); // which names the model in the file
    }) as [string, string];
    await quantizeFor({ ...run, output: whole });
    const parts = place.fresh();
    for (const index of [2, 1]) await quantizeFor({ ...run, output: parts, shard: { index, count: 2 } });
    await mergeFor({ input: DREAM, output: own, shards: [parts], kernels });
    expect(readFileSync(own).equals(readFileSync(whole))).toBe(true);
  });
});

describe("a merge refuses", () => {
  let input: string, parts: string;
  beforeAll(async () => {
    input = twoShards();
    parts = await quantizeShards(input, 3, {});
  });
  const copyOf = () => {
    const copy = place.fresh();
    cpSync(parts, copy, { recursive: true });
    return copy;
  };
  const refused = (shards: readonly string[], model = input) =>
    rejection(mergeCheckpoint({ input: model, output: place.fresh(), shards })).then(({ message }) =>
      message
    );

  test("a missing shard, by its number", async () => {
    const copy = copyOf();
    rmSync(join(copy, "shard-2-of-3"), { recursive: true });
    expect(await refused([copy])).toContain("missing: 2/3");
  });
  test("a shard that is there twice, with its places", async () => {
    const message = await refused([parts, join(copyOf(), "shard-3-of-3")]);
    expect(message).toMatch(/got twice: 3\/3 \(".*", ".*"\)/);
  });
  test("a shard of another configuration, with what differs", async () => {
    const copy = copyOf(), other = await quantizeShards(input, 3, { config: { bit_width: 2 } }, [2]);
    rmSync(join(copy, "shard-2-of-3"), { recursive: true });
    expect(await refused([copy, other])).toMatch(/2\/3 .*unlike 1\/3 .*bit_width 2, not 4/);
  });
  test("a shard of another input, and another model", async () => {
    const other = twoShards();
    writeFileSync(join(other, "config.json"), '{"model_type": "Dream", "changed": 1}');
    const copy = copyOf(), foreign = await quantizeShards(other, 3, {}, [3]);
    rmSync(join(copy, "shard-3-of-3"), { recursive: true });
    expect(await refused([copy, foreign])).toContain("another input");
    expect(await refused([parts], other)).toContain("another input");
  });
  test("a shard of another version", async () => {
    const copy = copyOf(), manifest = join(copy, "shard-1-of-3", MANIFEST_FILE);
    writeFileSync(
      manifest,
      readFileSync(manifest, "utf8").replace('"tool_version": "', '"tool_version": "9'),
    );
    expect(await refused([copy])).toContain("shard 1/3 must be as this version wrote it");
  });
  test("shards whose trellis codes have other levels", async () => {
    const parts = await quantizeShards(input, 1, {
      config: { codes: "trellis", bit_width: 2, solver: "auto" },
    });
    const whole = await merged(input, [parts]), shard = join(parts, "shard-1-of-1");
    expect(readFileSync(join(whole, "config.json"), "utf8")).toMatch(/"trellis_table": ?2/);
    const { identity, ...manifest } = readManifest(shard)!;
    const settings = identity.settings.replace('"trellis_table":2', '"trellis_table":1');
    const text = [...manifestText({ ...manifest, identity: { ...identity, settings } })].join("");
    writeFileSync(join(shard, MANIFEST_FILE), text);
    expect(await refused([parts])).toContain("trellis_table must be 2, got 1: quantize the shards again");
  });
  test("a shard that was stopped", async () => {
    const copy = copyOf();
    rmSync(join(copy, "shard-1-of-3", MANIFEST_FILE));
    expect(await refused([copy])).toMatch(/shard 1\/3 must be finished, .*--resume/);
  });
  test("a file that was changed since", async () => {
    const copy = copyOf(), shard = join(copy, "shard-1-of-3");
    const path = join(shard, readdirSync(shard).find((name) => name.endsWith(".safetensors"))!);
    const bytes = readFileSync(path);
    bytes[bytes.length - 1]! ^= 1;
    writeFileSync(path, bytes);
    expect(await refused([copy])).toMatch(/shard 1\/3: .*model-0000.*must have SHA-256/);
  });
  test("shards of two divisions, and what is no shard", async () => {
    const copy = copyOf();
    await quantizeTo(copy, input, { shard: { index: 1, count: 2 } });
    expect(await refused([copy])).toContain("of one division");
    expect(await refused([place.path])).toContain("got neither");
    renameSync(join(parts, "shard-1-of-3"), join(parts, "shard-1-of-2"));
    expect(await refused([join(parts, "shard-1-of-2")])).toContain("missing: 2/2");
    renameSync(join(parts, "shard-1-of-2"), join(parts, "shard-1-of-3"));
  });
});

describe("what cannot be divided says so", () => {
  const refused = async (config: Record<string, unknown>) => {
    const shard = { index: 1, count: 2 };
    return (await rejection(quantizeTo(place.fresh(), DREAM, { shard, config }))).message;
  };
  test("calibration_mode blocks", async () => {
    const message = await refused({ solver: "best", bit_width: 2, calibration_samples: 32 });
    expect(message).toMatch(
      /every block is solved on what the quantized blocks before it give.*calibration_mode: once/,
    );
  });
  test("several candidates, which are compared by the whole model", async () => {
    const message = await refused({
      solver: "best",
      bit_width: 2,
      calibration_mode: "once",
      calibration_samples: 32,
    });
    expect(message).toMatch(/2 solutions of the whole model.*solver_options.candidates: 1/);
  });
  test("phases", async () => {
    expect(await refused({ "thermodynamic.validation.enabled": true })).toContain("phases measure the whole");
  });
});

test("a finished shard is skipped, and one folder holds one shard's run at a time", async () => {
  const input = twoShards(), parts = place.fresh(), shard = { index: 2, count: 2 };
  await quantizeTo(parts, input, { shard });
  const again = await quantizeTo(parts, input, { shard, resume: true });
  expect(again.tensorsResumed).toBe(again.layers.length);
  const both = await Promise.allSettled(
    [0, 1].map(() => quantizeTo(parts, input, { shard: { index: 1, count: 2 } })),
  );
  const failed = both.filter(({ status }) => status === "rejected") as PromiseRejectedResult[];
  expect(failed.length).toBeGreaterThan(0);
  for (const { reason } of failed) expect(String(reason)).toMatch(/one run at a time|finished output/);
});
