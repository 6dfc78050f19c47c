/** What a command takes from the environment of an array's task. */
import { afterAll, expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { MODELS, run, workplace } from "../_checkpoints.ts";

const place = workplace();
afterAll(() => place.remove());

const model = join(MODELS, "dream-mini");
const slurm = (id: string, more: Record<string, string> = {}) => ({
  ...{
    SLURM_ARRAY_TASK_ID: id,
    SLURM_ARRAY_TASK_COUNT: "3",
    SLURM_ARRAY_TASK_MIN: "0",
    SLURM_ARRAY_TASK_MAX: "2",
  },
  ...more,
});
const quantize = (out: string, environment: Record<string, string>, ...options: string[]) =>
  run("quantize.ts", [model, out, "--solver", "round", "--threads", "1", ...options], environment);

test("quantize.ts takes its part from Slurm and says so; --shard goes before it, and none is the whole", () => {
  const out = place.fresh(), whole = place.fresh();
  const { code, stderr } = quantize(out, slurm("1"));
  expect([code, stderr.split("\n")[0]]).toEqual([
    0,
    "shard 2/3: from SLURM_ARRAY_TASK_ID=1, _MIN=0, _MAX=2, _STEP=1, _COUNT=3; --shard none does the whole",
  ]);
  expect(existsSync(join(out, "shard-2-of-3", "arrowquant.manifest.json"))).toBe(true);
  expect(quantize(out, slurm("1"), "--shard", "1/2").stderr).not.toContain("SLURM");
  expect(existsSync(join(out, "shard-1-of-2", "arrowquant.manifest.json"))).toBe(true);
  expect(quantize(whole, slurm("1"), "--shard", "none").code).toBe(0);
  expect(existsSync(join(whole, "config.json"))).toBe(true);
});

test("an array with gaps, and a part that is none, end with exit code 2", () => {
  const gaps = quantize(place.fresh(), slurm("1", { SLURM_ARRAY_TASK_MAX: "5" }));
  expect([gaps.code, gaps.stderr]).toEqual([2, expect.stringContaining("a range without gaps")]);
  const none = quantize(place.fresh(), {}, "--shard", "4/3");
  expect([none.code, none.stderr]).toEqual([2, expect.stringContaining('got "4/3"')]);
});
