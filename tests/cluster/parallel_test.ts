/** The line for GNU parallel, with real GNU parallel. */
import { afterAll, expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { join } from "node:path";
import process from "node:process";
import { differences, isDeno, MODELS, ROOT, run, workplace } from "../_checkpoints.ts";

const place = workplace();
afterAll(() => place.remove());

test("three tasks by GNU parallel, and the merge: the bytes of one task", () => {
  const version = spawnSync("parallel", ["--version"], { encoding: "utf8" });
  if (isDeno || !version.stdout?.startsWith("GNU parallel")) {
    return console.log(`skipped: ${isDeno ? "Bun runs it" : "no GNU parallel (Debian: parallel)"}`);
  }
  const model = join(MODELS, "dream-mini"),
    [parts, merged, whole] = [place.fresh(), place.fresh(), place.fresh()];
  const options = ["--bits", "3", "--solver", "clip", "--quiet"];
  const command = [
    process.execPath,
    "run",
    join(ROOT, "scripts", "arrowquant.ts"),
    "quantize",
    model,
    parts,
    ...options,
  ];
  const line = [
    "--will-cite",
    "--halt",
    "soon,fail=1",
    "-j",
    "2",
    ...command,
    "--resume",
    "--threads",
    "1",
    "--shard",
    "{}/3",
  ];
  const tasks = spawnSync("parallel", [...line, ":::", "1", "2", "3"], { encoding: "utf8" });
  expect([tasks.status, tasks.stdout]).toEqual([0, ""]);
  expect(run("merge.ts", [parts, merged, "--model", model, "--quiet"]).code).toBe(0);
  expect(run("quantize.ts", [model, whole, ...options]).code).toBe(0);
  expect(differences(merged, whole)).toEqual([]);
});
