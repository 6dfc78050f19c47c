import { afterAll, describe, expect, test } from "bun:test";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { runProgram } from "../scripts/_run_program.ts";
import { shellBlocks } from "../scripts/docs.ts";
import { ROOT } from "./_checkpoints.ts";
import { runtimeBinary } from "./_runtimes.ts";

const folder = mkdtempSync(join(tmpdir(), "arrowquant-docs-test-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const bun = runtimeBinary("bun");

function runScript(script: string, ...args: string[]) {
  return runProgram(bun!, ["run", join(ROOT, "scripts", script), ...args], { cwd: folder });
}

describe("docs.ts", () => {
  test("finds shell blocks, and the reason why one is not run", () => {
    const text =
      "a\n\n```sh\none\n```\n\n<!-- not run: too long -->\n\n```sh\ntwo\nthree\n```\n\n```ts\nfour\n```\n";
    expect(shellBlocks(text)).toEqual([
      { line: 3, commands: "one\n", notRun: undefined },
      { line: 7, commands: "two\nthree\n", notRun: "too long" },
    ]);
  });

  test("fails when a block fails, in its middle too, and names its line", async () => {
    if (bun === undefined) return console.log("skipped: no Bun");
    const path = join(folder, "page.md");
    writeFileSync(path, "```sh\ntest -f mod.ts\n```\n\n```sh\nfalse\ntrue\n```\n\n```sh\nfalse | cat\n```\n");
    const outcome = await runScript("docs.ts", "--shell", path);
    expect([outcome.code, outcome.output]).toEqual([1, `${path}\n 1 pass\n 2 fail\n`]);
    expect(outcome.errors).toContain(`${path}:5: exit status 1`);
    expect(outcome.errors).toContain(`${path}:10: exit status 1`);
  });
});

describe("release.ts", () => {
  test("says how to use it, and refuses folders that hold anything else before it builds", async () => {
    if (bun === undefined) return console.log("skipped: no Bun");
    expect((await runScript("release.ts", "--help")).output).toContain("Usage: release.ts OUT");
    expect((await runScript("release.ts")).code).toBe(2);
    const full = mkdtempSync(join(folder, "full-"));
    writeFileSync(join(full, "thesis.txt"), "mine");
    const refused = await runScript("release.ts", full);
    expect([refused.code, refused.errors]).toEqual([
      4,
      `error: Cannot release into ${JSON.stringify(full)}: it must be empty or a release, ` +
      "got 1 files without manifest.json\n",
    ]);
    writeFileSync(join(full, "manifest.json"), `{"name": "something else"}`);
    expect((await runScript("release.ts", full)).errors).toContain("format_version must be 1, got nothing");
    const kernels = "0".repeat(64);
    const manifest = {
      format_version: 1,
      version: "0",
      abi: 1,
      kernels,
      libraries: [],
      skipped: [],
      files: {},
    };
    writeFileSync(join(full, "manifest.json"), JSON.stringify(manifest));
    const foreign = await runScript("release.ts", full);
    expect([foreign.code, foreign.errors.includes('not of the release in it: "thesis.txt"')]).toEqual([
      4,
      true,
    ]);
  });
});
