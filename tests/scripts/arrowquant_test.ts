import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseBenchArguments } from "../../scripts/bench.ts";
import { commandOf } from "../../scripts/_command/programs.ts";
import { runProgram } from "../../scripts/_command/run_program.ts";
import { wrongCommands } from "../../scripts/docs.ts";
import { isDeno, MODELS, ROOT, run, workplace } from "../_checkpoints.ts";
import { runtimeBinary } from "../_runtimes.ts";

const place = workplace();
afterAll(place.remove);

const COMMANDS = ["quantize", "merge", "inspect", "generate", "bench", "report", "dequantize", "export"];
const arrowquant = (...args: string[]) => run("arrowquant.ts", args);

describe("arrowquant", () => {
  test("lists its commands, and prints the version of package.json", () => {
    const { code, stdout } = arrowquant("--help");
    expect(code).toBe(0);
    const listed = stdout.split("\nCommands:\n")[1]!.split("\n\n")[0]!.matchAll(/^ {2}(\w+) +\w/gm);
    expect([...listed].map(([, name]) => name!)).toEqual(COMMANDS);
    const { version } = JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8"));
    expect(arrowquant("--version")).toEqual({ code: 0, stdout: `arrowquant ${version}\n`, stderr: "" });
  });

  test("runs the scripts: the same code, under its own name", () => {
    const packed = place.fresh("packed"), plain = place.fresh("plain");
    const model = join(MODELS, "dream-mini");
    expect(arrowquant("quantize", model, packed, "--bits", "4", "--solver", "clip", "--quiet").code).toBe(0);
    expect(arrowquant("export", packed, plain, "--to", "safetensors", "--quiet").code).toBe(0);
    expect(JSON.parse(arrowquant("inspect", plain, "--json").stdout).totals.quantizedTensors).toBe(0);
    const refused = arrowquant("export", packed, plain, "--to", "onnx");
    expect(refused.code).toBe(2);
    expect(refused.stderr).toMatch(
      /--to must be one of .*safetensors, got "onnx"\nUsage: arrowquant export /,
    );
  });

  test("its help begins examples as it was started", () => {
    const help = (command: string) =>
      run("arrowquant.ts", ["inspect", "--help"], { npm_command: command }).stdout;
    expect(help("exec")).toContain("\n  npx arrowquant inspect OUT --verify\n");
    expect(help("exec")).not.toContain("scripts/");
    expect(help("")).toContain(" scripts/arrowquant.ts inspect OUT --verify\n");
  });

  test("is published with the script of every command", () => {
    const { publish: { include } } = JSON.parse(readFileSync(join(ROOT, "deno.json"), "utf8"));
    expect(include).toEqual(expect.arrayContaining(COMMANDS.map((name) => `scripts/${name}.ts`)));
  });

  test("names the command that was probably meant, whatever follows", () => {
    const { code, stderr } = arrowquant("quantise", "a", "b", "--bits", "2");
    expect([code, stderr.split("\n")[0]]).toEqual([
      2,
      'error: Cannot run the command: unknown command "quantise"; did you mean "quantize"?',
    ]);
    expect(arrowquant().stderr).toContain("a command is needed: quantize, merge, inspect");
    expect(arrowquant("toString").code).toBe(2);
  });

  test("every command groups its options and gives examples that it takes itself", async () => {
    // What a command says of itself is the same in both runtimes: Deno need but see one.
    for (const name of isDeno ? COMMANDS.slice(0, 1) : COMMANDS) {
      const help = run(`${name}.ts`, ["--help"]).stdout;
      expect(arrowquant("help", name).stdout).toContain(`Usage: arrowquant ${name} `);
      if (name !== "report") expect(help.match(/^[A-Z][^\n]*:\n {2}-/gm)!.length).toBeGreaterThan(1);
      const examples = help.split("\nExamples:\n")[1]!.split("\n\n")[0]!;
      const commands = examples.split("\n").filter((line) => !line.startsWith("  # ")).map((line) =>
        line.trim()
      );
      expect(commands.length).toBeGreaterThan(1);
      expect(await wrongCommands(commands.join("\n"), () => Promise.resolve(help))).toEqual([]);
    }
  });

  test("Deno runs every command of a checkout without a map, a registry or JSR", async () => {
    const deno = isDeno ? undefined : runtimeBinary("deno");
    if (deno === undefined) return console.log(`skipped: ${isDeno ? "Bun's tests start Deno" : "no Deno"}`);
    // Nothing can be fetched: neither a cache nor a host.
    const environment = {
      DENO_DIR: place.fresh("deno"),
      HTTPS_PROXY: "http://127.0.0.1:9",
      HTTP_PROXY: undefined,
    };
    const outcome = await runProgram(deno, [
      "run",
      "-A",
      "scripts/arrowquant.ts",
      "quantize",
      "--bits",
      "3",
      "--print-config",
    ], { cwd: fileURLToPath(new URL("../..", import.meta.url)), environment });
    expect(outcome.errors).toBe("");
    expect(outcome.output).toMatch(/^bit_width: 3 /m);
    expect(commandOf("bench.ts", []).some((arg) => arg.startsWith("--import-map"))).toBe(false);
  });
});

describe("bench.ts refuses options that would change nothing", () => {
  const refusal = (...args: string[]) => {
    try {
      parseBenchArguments(args);
    } catch (error) {
      return (error as Error).message.replace("Cannot run the command: ", "");
    }
    return undefined;
  };
  const packed = ["--packed", "out/q2", "--against", "tests/models/dream-mini"];

  test("with --packed, each by its name", () => {
    expect(refusal(...packed)).toBe(undefined);
    expect(refusal(...packed, "--bits", "2", "--group-size", "32", "--solver", "clip")).toBe(
      "--bits, --group-size, --solver would change nothing with --packed, which is quantized: leave them out",
    );
    expect(refusal(...packed, "--megabytes", "3")).toContain(
      "--megabytes would change nothing in the suite accuracy",
    );
    expect(refusal(...packed, "--model", "m")).toContain("--packed needs one --against MODEL");
    expect(refusal("--against", "m")).toContain("--against needs --packed");
  });

  test("by suite", () => {
    expect(refusal("--suite", "kernels", "--model", "m", "--ignore-memory")).toContain(
      "--model, --ignore-memory would",
    );
    expect(refusal("--suite", "process", "--megabytes", "64")).toBe(undefined);
    expect(refusal("--shapes", "64x64")).toBe(
      "--shapes is of the suite solver-speed, got the suite accuracy",
    );
    const speed = (...args: string[]) => refusal("--suite", "solver-speed", ...args);
    expect(speed("--parts", "kernels,models")).toBe(undefined);
    expect(speed("--parts", "kernels,rows")).toMatch(/^--parts must list some of kernels, .*, got "rows"$/);
    for (const shapes of ["64", "64x", "63x64", "64x100", "9999999x64", "64x64,", "-64x64"]) {
      expect(speed("--shapes", shapes)).toContain("--shapes must list layers as in 3584x18944");
    }
  });
});
