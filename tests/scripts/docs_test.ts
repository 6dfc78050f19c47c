import { afterAll, describe, expect, test } from "bun:test";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { parseConfig } from "../../lib/config/mod.ts";
import { runProgram } from "../../scripts/_command/run_program.ts";
import { shellBlocks, wrongCommands } from "../../scripts/docs.ts";
import { ROOT } from "../_checkpoints.ts";
import { runtimeBinary } from "../_runtimes.ts";

const folder = mkdtempSync(join(tmpdir(), "arrowquant-docs-test-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const bun = runtimeBinary("bun");

function runScript(script: string, ...args: string[]) {
  return runProgram(bun!, ["run", join(ROOT, "scripts", script), ...args], { cwd: folder });
}

describe("docs.ts", () => {
  test("finds shell blocks, and the reason why one is only checked", () => {
    const text =
      "a\n\n```sh\none\n```\n\n<!-- checked: too long -->\n\n```sh\ntwo\nthree\n```\n\n```ts\nfour\n```\n";
    expect(shellBlocks(text)).toEqual([
      { line: 3, commands: "one\n", checked: undefined },
      { line: 7, commands: "two\nthree\n", checked: "too long" },
    ]);
  });

  test("of commands that are not run, scripts, options, names and paths must exist", async () => {
    const help = "  --suite NAME   kernels   each kernel\n  -o, --output FILE\n  --only-this";
    const wrong = async (commands: string) =>
      (await wrongCommands(commands, () => Promise.resolve(help))).map((text) => text.replace(/^.*: /, ""));
    expect(await wrong("bun run scripts/bench.ts --suite kernels -o x   # --nonsense")).toEqual([]);
    expect(
      await wrong("npm install && npx bun run bench --suite kernels\nbun test tests/scripts/docs_test.ts"),
    )
      .toEqual([]);
    expect(await wrong("deno run -A scripts/bench.ts --suite kernls")).toEqual([
      "--help does not have kernls",
    ]);
    expect(await wrong("bun run scripts/bench.ts --only x --out=y \\\n  --prompt '--a b'")).toEqual([
      "--help does not have --only",
      "--help does not have x",
      "--help does not have --out",
      "--help does not have --prompt",
    ]);
    expect(await wrong("bun run scripts/none.ts\nnpm run none\nrm -rf x\nbun test tests/none.ts")).toEqual([
      "there is no scripts/none.ts",
      "this command is not known",
      "this command is not known",
      "there is no tests/none.ts",
    ]);
    expect(await wrong("npx arrowquant bench --suite kernels\nbunx arrowquant export OUT PLAIN")).toEqual([]);
    expect(await wrong("npx arrowquant bench --nope\nnpx arrowquant quantise M OUT")).toEqual([
      "--help does not have --nope",
      "there is no scripts/quantise.ts",
    ]);
    expect(await wrong("bun run scripts/bench.ts tests/models/none")).toEqual([
      "there is no tests/models/none",
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

test("YAML in the documents is a configuration, and JSON is JSON", async () => {
  const blocks: Record<string, string[]> = { yaml: [], json: [] };
  for (const name of readdirSync(join(ROOT, "docs")).filter((name) => name.endsWith(".md"))) {
    const text = readFileSync(join(ROOT, "docs", name), "utf8");
    for (const [, language, content] of text.matchAll(/^```(yaml|json)\n([\s\S]*?)^```$/gm)) {
      blocks[language!]!.push(content!);
    }
  }
  expect([blocks["yaml"]!.length, blocks["json"]!.length]).toEqual([1, 1]);
  const { config } = await parseConfig(blocks["yaml"]![0]!);
  // As its comments say: the profile's bits, its own group size.
  expect([config.bitWidth, config.groupSize, config.thermodynamic.validation.enabled]).toEqual([2, 64, true]);
  expect(Object.keys(JSON.parse(blocks["json"]![0]!))).toEqual(["quantization_config"]);
});

test("each symptom of docs/troubleshooting.md has a command that exists, with its options", async () => {
  const text = readFileSync(join(ROOT, "docs", "troubleshooting.md"), "utf8").split("## By error code")[0]!;
  const rows = text.split("\n").filter((line) => line.startsWith("| ") && !line.startsWith("| ---"))
    .map((line) => line.split(/(?<!\\) \| /).map((cell) => cell.replace(/^\| | *\|$/g, "").trim()))
    .filter(([first]) => first !== "what is seen");
  expect(rows.length).toBeGreaterThan(40);
  const helps = new Map<string, string>();
  const helpOf = async (script: string) => {
    const help = helps.get(script) ??
      (await runProgram(bun!, ["run", join(ROOT, script), "--help"], { cwd: ROOT })).output;
    helps.set(script, help);
    return help;
  };
  for (const [symptom, command, remedy] of rows) {
    expect([symptom, command !== "" && remedy !== ""]).toEqual([symptom, true]);
    const own = /`((?:quantize|inspect|generate|bench|report|dequantize|export) [^`]*)`/.exec(command!)?.[1];
    if (own === undefined || bun === undefined) continue;
    expect([symptom, await wrongCommands(`npx arrowquant ${own.replace(/"[^"]*"/g, "TEXT")}`, helpOf)])
      .toEqual([symptom, []]);
  }
});

test("measured numbers of docs/tuning.md stand in the table that they are from", () => {
  const read = (path: string) => readFileSync(join(ROOT, path), "utf8");
  const [, measured] = /printed by `npm run bench`([\s\S]*?)## Group size/.exec(read("docs/tuning.md"))!;
  const table = read("docs/benchmarks.md");
  const numbers = measured!.match(/\b\d\.\d{2,}\b/g)!;
  expect(numbers.length).toBeGreaterThan(5);
  expect(numbers.filter((number) => !table.includes(number))).toEqual([]);
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

/** A document's text without its blocks of code. */
const proseOf = (path: string) => readFileSync(join(ROOT, path), "utf8").replace(/^```[^]*?^```/gm, "");

/** The names by which links find a document's headings, as GitHub makes them. */
function anchorsOf(path: string): Set<string> {
  const found = new Set<string>();
  for (const [, heading] of proseOf(path).matchAll(/^#+ (.*)$/gm)) {
    const text = heading!.replace(/`/g, "").replace(/\[([^\]]*)\]\([^)]*\)/g, "$1").trim().toLowerCase();
    const name = text.replace(/[^\p{L}\p{N}_ -]/gu, "").replaceAll(" ", "-");
    let own = name;
    for (let count = 1; found.has(own); count++) own = `${name}-${count}`;
    found.add(own);
  }
  return found;
}

test("links of documents lead to files and headings that are there", () => {
  const documents = readdirSync(join(ROOT, "docs")).filter((name) => name.endsWith(".md"));
  const broken = ["README.md", "CHANGELOG.md", ...documents.map((name) => `docs/${name}`)].flatMap((path) =>
    [...proseOf(path).matchAll(/\]\(([^)\s]+)\)/g)].map(([, link]) => link!).filter((link) => {
      if (/^\w+:/.test(link)) return false;
      const [file, anchor] = link.split("#") as [string, string?];
      const target = file === "" ? path : join(dirname(path), file);
      if (!existsSync(join(ROOT, target))) return true;
      return anchor !== undefined && target.endsWith(".md") && !anchorsOf(target).has(anchor);
    }).map((link) => `${path}: ${link}`)
  );
  expect(broken).toEqual([]);
});
