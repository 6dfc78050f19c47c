/** A bench in parts, and the one run that is made of them. */
import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { isRunOf, mergeRuns, type RunShard } from "../../lib/analysis/report/merge_runs.ts";
import { readRun, type Run } from "../../lib/analysis/run.ts";
import { benchOptions } from "../../lib/bench/mod.ts";
import { shardOptions } from "../../lib/bench/shards.ts";
import { MODELS, rejection, run, workplace } from "../_checkpoints.ts";

const place = workplace();
afterAll(() => place.remove());

const settingsOf = (shards: readonly { readonly index: number; readonly count: number }[]) =>
  shards.flatMap((shard) =>
    shardOptions("accuracy", benchOptions(["a", "b"], { bits: [4, 2], solvers: ["round", "best"] }), shard)
  ).map(({ models, bits, solvers }) => [models, bits, solvers].join(" ")).sort();

describe("parts of a bench", () => {
  test("are every model at every width, once, with the calibrated solver at the fewest bits alone", () => {
    const all = ["a 2 round,best", "a 4 round", "b 2 round,best", "b 4 round"];
    for (const count of [1, 2, 3, 7]) {
      expect(settingsOf(Array.from({ length: count }, (_, i) => ({ index: i + 1, count })))).toEqual(all);
    }
  });
  test("are none of a suite that measures the machine", () => {
    expect(() => shardOptions("kernels", benchOptions([]), { index: 1, count: 2 })).toThrow(
      "accuracy, checkpoint",
    );
  });
});

const args = [
  "--suite",
  "accuracy",
  "--model",
  join(MODELS, "dream-mini"),
  "--bits",
  "4,2",
  "--solver",
  "clip",
];
const limits = ["--limit", "1", "--tasks", "add"];

/** A run without what differs from time to time: times, dates and names. */
const comparable = ({ sections, tables }: Run) =>
  JSON.stringify(
    [sections, Object.entries(tables).map(([name, table]) => [name, table.objects()])],
    (key, value) => /seconds|milliseconds|time/i.test(key) ? null : value,
  );

test(
  "of two parts one run is made, with the rows of a whole one; missing, doubled and other parts are refused",
  async () => {
    const [whole, parts, merged] = [place.fresh(), place.fresh(), place.fresh()];
    const done = (script: string, own: readonly string[]) => {
      const { code, stderr } = run(script, own);
      expect([code, code === 0 ? "" : stderr]).toEqual([0, ""]);
    };
    done("bench.ts", [...args, ...limits, "--report", whole]);
    for (const shard of ["2/2", "1/2"]) {
      done("bench.ts", [...args, ...limits, "--report", parts, "--shard", shard]);
    }
    // Restarted, a part that is done is left as it is.
    const file = join(parts, "shard-1-of-2", "run.json"), before = readFileSync(file);
    const again = (...own: string[]) =>
      run("bench.ts", [...args, ...own, "--report", parts, "--shard", "1/2"]);
    expect(again(...limits)).toMatchObject({ code: 0, stderr: expect.stringContaining("is measured") });
    expect(readFileSync(file).equals(before)).toBe(true);
    expect(again("--limit", "2").stderr).toContain("got a run of another version, suite, settings or models");
    const first = await readRun(join(parts, "shard-1-of-2")), { configuration } = first;
    expect(isRunOf(first, "accuracy", configuration)).toBe(true);
    expect(isRunOf(first, "peers", configuration)).toBe(false);
    for (const key of Object.keys(configuration)) {
      expect(isRunOf(first, "accuracy", { ...configuration, [key]: "other" })).toBe(false);
    }
    expect(isRunOf({ ...first, toolVersion: "0" }, "accuracy", configuration)).toBe(false);
    done("merge.ts", [parts, merged]);
    const made = await readRun(merged);
    expect(comparable(made)).toBe(comparable(await readRun(whole)));
    expect(made.configuration["shard"]).toBeUndefined();
    const shards = await Promise.all([1, 2].map(async (i): Promise<RunShard> => {
      const path = join(parts, `shard-${i}-of-2`);
      return { path, run: await readRun(path) };
    }));
    const refused = async (own: readonly RunShard[]) => (await rejection(mergeRuns("x", own))).message;
    expect(await refused([shards[0]!])).toContain("missing: 2/2");
    expect(await refused([...shards, shards[1]!])).toContain("got twice: 2/2");
    const other = { ...shards[1]!.run, configuration: { ...shards[1]!.run.configuration, seed: 7 } };
    expect(await refused([shards[0]!, { path: "other", run: other }])).toContain("2/2 with other seed");
    expect(await refused([{ path: whole, run: await readRun(whole) }])).toContain("got a whole one");
  },
  120_000,
);
