/** Shards that solve a model together, block by block: sums of their samples and solved layers go through the output folder. */
import { afterAll, describe, expect, test } from "bun:test";
import { readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { openKernels } from "../../lib/native/mod.ts";
import { mergeCheckpoint } from "../../lib/pipeline/mod.ts";
import { differences, rejection, workplace } from "../_checkpoints.ts";
import { dreamCheckpoint, store } from "../_models.ts";
import { DIT, DREAM, type Options, pipelineRuns } from "./_runs.ts";

const kernels = await openKernels({ threads: 1 });
const place = workplace();
afterAll(() => {
  kernels.close();
  place.remove();
});
const { quantizeTo } = pipelineRuns(kernels, place);

const BEST = { solver: "best", bit_width: 2, calibration_samples: 32, "solver_options.effort": "low" };
const MINUTE = 60_000;

const together = (input: string, parts: string, count: number, options: Options) =>
  Array.from(
    { length: count },
    (_, i) =>
      quantizeTo(parts, input, { togetherMilliseconds: MINUTE, ...options, shard: { index: i + 1, count } }),
  );

async function merged(input: string, parts: string): Promise<string> {
  const output = place.fresh();
  await mergeCheckpoint({ input, output, shards: [parts] });
  return output;
}

/** What one task writes, made once for each input and configuration. */
const wholes = new Map<string, Promise<string>>();
function wholeOf(input: string, config: Record<string, unknown>): Promise<string> {
  const key = JSON.stringify([input, config]), output = place.fresh();
  const made = wholes.get(key) ?? quantizeTo(output, input, { config }).then(() => output);
  wholes.set(key, made);
  return made;
}

describe("shards that solve together write byte for byte what one task writes", () => {
  const cases: [string, string, Record<string, unknown>, number[]][] = [
    ["a language model", DREAM, BEST, [1, 3]],
    ["an image model, whose time layers read a row a sample", DIT, BEST, [2]],
    ["feedback", DREAM, { ...BEST, solver: "feedback" }, [2]],
    [
      "diagonals alone, whose targets are corrected with the inputs themselves",
      DREAM,
      { ...BEST, "solver_options.moment": "diagonal" },
      [2],
    ],
  ];
  for (const [name, input, config, counts] of cases) {
    test(name, async () => {
      const whole = await wholeOf(input, config);
      for (const count of counts) {
        const parts = place.fresh();
        await Promise.all(together(input, parts, count, { config }));
        expect(differences(await merged(input, parts), whole)).toEqual([]);
        const exchanged = readdirSync(
          join(parts, readdirSync(parts).find((name) => name.startsWith("blocks-"))!),
        );
        expect(exchanged.filter((name) => name.startsWith("sums-"))).toEqual([]);
      }
    });
  }
});

test("a task that is stopped and one that is lost go on where they were: same bytes", async () => {
  const parts = place.fresh(), config = BEST, whole = await wholeOf(DREAM, config);
  // One stops in the middle, the other waits for it in vain.
  const stop = new AbortController();
  let layers = 0;
  const [first, second] = await Promise.allSettled([
    quantizeTo(parts, DREAM, {
      ...{ config, shard: { index: 1, count: 2 }, togetherMilliseconds: MINUTE, signal: stop.signal },
      onEvent: ({ kind }) => void (kind === "layer" && ++layers === 9 && stop.abort("stopped")),
    }),
    quantizeTo(parts, DREAM, { config, shard: { index: 2, count: 2 }, togetherMilliseconds: 1500 }),
  ]);
  expect([first!.status, second!.status]).toEqual(["rejected", "rejected"]);
  expect(String((second as PromiseRejectedResult).reason)).toMatch(
    /from shard 1\/2 must be in .* within 0\.03 minutes.*all shards must run at the same time.*--resume/,
  );
  await Promise.all(together(DREAM, parts, 2, { config, resume: true }));
  expect(differences(await merged(DREAM, parts), whole)).toEqual([]);
  // A lost part needs no other task: the layers are still there.
  rmSync(join(parts, "shard-1-of-2"), { recursive: true });
  await quantizeTo(parts, DREAM, { config, shard: { index: 1, count: 2 }, togetherMilliseconds: 1000 });
  expect(differences(await merged(DREAM, parts), whole)).toEqual([]);
});

test("a task that comes late does not wait for a layer that nobody solves: its weights are not finite", async () => {
  const made = dreamCheckpoint(), name = "model.layers.1.mlp.down_proj.weight", tensor = made.tensors[name]!;
  const { buffer, byteOffset, byteLength } = tensor.data,
    data = new Uint8Array(buffer, byteOffset, byteLength).slice();
  new Float32Array(data.buffer)[0] = NaN;
  const input = store(place.fresh(), made, { tensors: { [name]: { ...tensor, data } } }),
    parts = place.fresh();
  const config = { ...BEST, calibration_data: "synthetic", non_finite: "keep" };
  await Promise.all(together(input, parts, 2, { config }));
  rmSync(join(parts, "shard-2-of-2"), { recursive: true });
  await quantizeTo(parts, input, { config, shard: { index: 2, count: 2 }, togetherMilliseconds: 300 });
  const { layers } = await mergeCheckpoint({ input, output: place.fresh(), shards: [parts] });
  expect(layers.find((layer) => layer.name === name)!.action).toBe("keep");
});

test("a task of another configuration is not waited for by mistake: neither takes the other's sums", async () => {
  const parts = place.fresh(),
    results = await Promise.allSettled(
      [{}, { "solver_options.damping": 0.02 }].map((own, i) =>
        quantizeTo(parts, DREAM, {
          config: { ...BEST, ...own },
          shard: { index: i + 1, count: 2 },
          togetherMilliseconds: 500,
        })
      ),
    );
  for (const result of results) {
    expect(String((result as PromiseRejectedResult).reason)).toMatch(
      /from shard [12]\/2 must be .*blocks-[0-9a-f]{16} beside it is of another configuration/,
    );
  }
});

test("what shares nothing is not solved together, and blocks say how they are", async () => {
  const refused = async (config: Record<string, unknown>, togetherMilliseconds?: number, count = 2) =>
    (await rejection(
      quantizeTo(place.fresh(), DREAM, { config, shard: { index: 1, count }, togetherMilliseconds }),
    )).message;
  expect(await refused({ solver: "clip" }, MINUTE)).toContain(
    "--together is for layers that are solved on data",
  );
  expect(await refused(BEST)).toContain("give --together MINUTES");
  expect(await refused({ ...BEST, "solver_options.candidates": 2 }, MINUTE)).toContain("candidates: 1");
  expect(await refused(BEST, MINUTE, 100)).toContain("there must be at most");
});
