/**
 * The gate: format, lint, types, kernels under sanitizers and emulators, tests in Bun and in Deno, the docs'
 * examples. Prints a line a step and closes with `N passed, N failed, N skipped`.
 */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { availableParallelism, tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { stripVTControlCharacters } from "node:util";
import { compilerVersion, cudaPlan, nativePlan, objectName } from "../lib/native/build.ts";
import { findCompiler } from "../lib/native/library.ts";
import type { Arguments, Usage } from "./_command/options.ts";
import { processorShares } from "./_command/processors.ts";
import { denoBinary } from "./_command/programs.ts";
import { defineCommand } from "./_command/run.ts";
import { type Outcome, runProgram } from "./_command/run_program.ts";

const USAGE = {
  name: "ok.ts",
  operands: "",
  about:
    "Runs every check of the project. Checks whose tool this machine lacks are skipped, with the reason.",
  options: {
    "--only NAME[,NAME…]": "these checks alone",
    "--list": "print the names of the checks",
  },
} as const satisfies Usage;

const root = fileURLToPath(new URL("..", import.meta.url));
const bun = process.execPath;
const deno = denoBinary();
const importMap = "--import-map=tests/deno/import_map.json";
const documents = [
  "README.md",
  ...readdirSync(join(root, "docs")).filter((name) => name.endsWith(".md")).map((name) => `docs/${name}`),
];
const shellDocuments = documents.filter((path) => readFileSync(join(root, path), "utf8").includes("```sh\n"));

/** A step of the gate: commands run in order, or the reason why they cannot be. */
interface Step {
  readonly name: string;
  readonly commands: readonly (readonly string[])[];
  readonly skip?: string;
}

/** Commands that compile a plan's units, each into its object. */
const compiled = (
  compile: readonly string[],
  folder: string,
  units: ReturnType<typeof nativePlan>["units"],
  objects: readonly string[],
): string[][] =>
  units.map((
    { source, flags },
    i,
  ) => [...compile, ...flags, "-c", `kernels/${folder}/${source}`, "-o", objects[i]!]);

/** The C drivers linked with kernels, and how they are run. */
function drivers(
  compile: readonly string[],
  kernels: readonly string[],
  output: string,
  run: (driver: string) => readonly string[],
): (readonly string[])[] {
  return [
    "quantize",
    "two_level",
    "forward",
    "int8",
    "product",
    "solver",
    "trellis",
    "trellis_search",
    "backward",
  ]
    .flatMap((name) => [
      [...compile, `kernels/tests/${name}.c`, ...kernels, "-o", `${output}-${name}`, "-lm"],
      run(`${output}-${name}`),
    ]);
}

/** An architecture's kernels compiled with these flags, and the drivers run on them. */
function kernelChecks(
  compiler: string,
  architecture: string,
  output: string,
  runs: readonly string[],
  flags: readonly string[] = [],
  emulator: readonly string[] = [],
): (readonly string[])[] {
  const plan = nativePlan("linux", architecture);
  const compile = [compiler, ...plan.flags.filter((flag) => flag !== "-fPIC"), "-Werror", ...flags];
  const objects = plan.units.map((unit) => `${output}.${objectName(unit)}`);
  return [
    ...compiled(compile, "cpu", plan.units, objects),
    ...drivers(compile, objects, output, (driver) => [...emulator, driver, ...runs]),
  ];
}

/** Builds the library that tests and users open, or takes it from the cache; then a copy of it. */
const buildLibrary = (...copy: readonly string[]) => [bun, "run", "scripts/build.ts", ...copy];

/** The drivers on that library. */
function libraryChecks(compiler: string, library: string): (readonly string[])[] {
  const compile = [compiler, ...nativePlan(process.platform, process.arch).flags, "-Werror"];
  return [
    buildLibrary("--output", library),
    ...drivers(compile, [library], `${library}-tested`, (driver) => [driver, "1", "4"]),
  ];
}

/** A CUDA library loaded and quantized with, in Bun and in Deno. */
function cudaTests(library: string): string[][] {
  const opened = ["env", `ARROWQUANT_CUDA_LIBRARY=${library}`];
  const tests = ["", "_faults", "_ahead"].map((part) => `tests/native/cuda${part}_test.ts`);
  return [
    [...opened, bun, "test", ...tests, "--timeout", "120000"],
    [...opened, deno, "test", "-A", "--no-check", importMap, ...tests],
  ];
}

/**
 * The CUDA sources compiled for the host, with the emulator's headers in place of CUDA's: the library's
 * tests, then the driver against the oracle, plainly and under sanitizers.
 */
function cudaHostChecks(work: string, sanitize: readonly string[]): string[][] {
  const oracle = join(work, "oracle-of-host.so");
  const plan = cudaPlan(["90"]);
  const sources = plan.units.map((unit) => `kernels/cuda/${unit.source}`), driver = "kernels/tests/cuda.cu";
  const warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"];
  const base = ["c++", "-std=c++17", ...warnings, "-ffp-contract=off", "-Ikernels/tests/emulator"];
  const library = join(work, `emulated-${plan.fileName}`);
  const plain = join(work, "cuda-host"), sanitized = join(work, "cuda-host-sanitized");
  const libraries = ["-lm", "-pthread", "-ldl"];
  const shared = ["-O2", "-fPIC", "-fvisibility=hidden", "-shared", "-x", "c++"];
  const asLibrary = ["-x", "none", oracle];
  return [
    ["kernels/tests/cuda/device.sh", "oracle"],
    buildLibrary("--output", oracle),
    [...base, ...shared, ...sources, "-o", library, "-ldl"],
    ...cudaTests(library),
    [...base, "-O2", "-x", "c++", driver, ...asLibrary, library, "-o", plain, ...libraries],
    [plain, "1", "quick"],
    [plain, "bench", "small"],
    [
      ...base,
      "-O1",
      ...sanitize,
      "-x",
      "c++",
      driver,
      ...sources,
      ...asLibrary,
      "-o",
      sanitized,
      ...libraries,
    ],
    [sanitized, "2", "quick"],
  ];
}

/** The CUDA library for one architecture, its tests, and the driver, which needs a device. */
function cudaChecks(work: string): string[][] {
  const plan = cudaPlan(["90"]), { flags, units } = plan;
  const objects = units.map((unit) => join(work, objectName(unit)));
  const library = join(work, plan.fileName), driver = join(work, "cuda");
  const oracle = join(work, "oracle-of-device.so");
  return [
    ...compiled(["nvcc", ...flags], "cuda", units, objects),
    ["nvcc", ...flags, ...plan.linkFlags, ...objects, "-o", library],
    ...cudaTests(library),
    buildLibrary("--output", oracle),
    ["nvcc", ...flags, "kernels/tests/cuda.cu", oracle, library, "-o", driver, "-lm", "-ldl"],
    [driver, "1", "quick"],
  ];
}

/** Exit status of a program that lacks what it needs, and has printed the reason. */
const SKIPPED = 77;

/** Programs that checks need beside Bun and Deno. */
const TOOLS = ["clang", "wasm-ld", "aarch64-linux-gnu-gcc", "qemu-aarch64", "nvcc", "c++"] as const;
const NO_COMPILER = "no C compiler (cc, gcc or clang)";

/**
 * Tests that Bun alone runs: what they promise is computed, by code and kernels that are the same in both
 * runtimes. Deno runs all others: of FFI, files, processes, streams, WebAssembly, packages and commands. That
 * it computes the same, tests/pipeline/runtimes_test.ts and tests/bench/phases/cost_test.ts see, in which Bun
 * starts Deno: solvers, phases and generation on whole models, compared byte by byte.
 */
const BUN_ALONE = [
  "tests/architecture_test.ts",
  ...["charts", "rows"].map((name) => `tests/analysis/${name}_test.ts`), // the charts' test starts Deno itself
  "tests/bench",
  "tests/calibration",
  ...["intervals", "layer_errors", "layouts", "models", "statistics", "table"].map((name) =>
    `tests/eval/${name}_test.ts`
  ),
  ...[
    "activations",
    "backward",
    "bad_input",
    "block_models",
    "dit",
    "dream",
    "refine",
    "requirements",
    "variants",
  ]
    .map((name) => `tests/models/${name}_test.ts`),
  "tests/interop", // what is opened or collected there is Python's and C's work
  "tests/lora",
  "tests/names/families_test.ts",
  "tests/native/remote_test.ts", // starts Deno itself
  ...["fp8_readers", "recognition", "scaled_fp8"].map((name) => `tests/tensor/${name}_test.ts`),
  "tests/phases",
  ...["budget_resume", "choose_solver", "forecast", "headlines", "runtimes", "stages", "together"].map((
    name,
  ) => `tests/pipeline/${name}_test.ts`),
  "tests/plan",
  ...["extremes", "packed/symmetric_levels", "packed/two_level"].map((name) => `tests/quant/${name}_test.ts`),
  "tests/quant/solvers",
  ...["docs", "notebooks"].map((name) => `tests/scripts/${name}_test.ts`), // commands that Bun alone runs
  "tests/solve",
  "tests/thermo",
  "tests/time", // stops and kills of a run, too: in Deno those of tests/output
];

/** Folders of tests that measure and solve whole models: about half of the time that Bun's tests take. */
const OF_WHOLE_MODELS = ["bench", "calibration", "phases", "pipeline", "solve"];

/** Arguments of `bun test` that run the tests of those folders, or all others. */
function bunTests(ofWholeModels: boolean): string[] {
  const entries = readdirSync(join(root, "tests"), { withFileTypes: true });
  const names = entries.flatMap((entry) =>
    entry.isDirectory() || entry.name.endsWith("_test.ts") ? entry.name : []
  );
  const chosen = names.filter((name) => OF_WHOLE_MODELS.includes(name) === ofWholeModels);
  return [bun, "test", "--timeout", "120000", ...chosen.map((name) => `./tests/${name}`)];
}

/** Commands of documents are tried, not measured: what they leave open is small. */
const SMALL = [
  "env",
  "ARROW_QUANT_CALIBRATION_SAMPLES=32",
  "ARROW_QUANT_THERMODYNAMIC_TRANSITION_OPTIMIZATION_MAX_ITERATIONS=3",
];

/** The checks of sources, documents and tests, which need Bun and Deno alone. */
function sourceSteps(): Step[] {
  const scripts = readdirSync(join(root, "scripts")).filter((name) =>
    name.endsWith(".ts") && !name.startsWith("_")
  );
  const build = (check: string) => [[bun, "run", "scripts/build.ts", check]];
  const denoTest = [deno, "test", "-A", "--no-check", importMap];
  return [
    { name: "format", commands: [[deno, "fmt", "--check"]] },
    { name: "lint", commands: [[deno, "lint"]] },
    { name: "types", commands: [[bun, "node_modules/typescript/bin/tsc", "-p", "."]] },
    {
      name: "types in Deno",
      commands: [[deno, "check", importMap, "mod.ts", ...scripts.map((name) => `scripts/${name}`)]],
    },
    { name: "embedded WebAssembly is of these sources", commands: build("--check-wasm") },
    { name: "signatures are of these headers", commands: build("--check-signatures") },
    // The longest first, so that both workers have work to the end.
    { name: "tests in Bun", commands: [bunTests(false)] },
    { name: "tests of whole models in Bun", commands: [bunTests(true)] },
    { name: "tests in Deno", commands: [[...denoTest, `--ignore=${BUN_ALONE.join()}`, "tests/"]] },
    { name: "examples in docstrings", commands: [[...denoTest, "--doc", "mod.ts", "lib/"]] },
    { name: "every public symbol is documented", commands: [[bun, "run", "scripts/docs.ts", "--check"]] },
    {
      name: "shell examples in documents",
      commands: shellDocuments.map((path) => [...SMALL, bun, "run", "scripts/docs.ts", "--shell", path]),
    },
    { name: "examples in documents", commands: [[...denoTest, "--doc", ...documents]] },
    // Without Jupyter they are type-checked; the command says that they were not executed.
    { name: "notebooks", commands: [[bun, "run", "scripts/notebooks.ts"]] },
  ];
}

/** The checks that compile; those whose tool is missing are skipped. */
async function nativeSteps(work: string): Promise<Step[]> {
  const compiler = await findCompiler(), cc = compiler?.command ?? "cc";
  const versions = await Promise.all(TOOLS.map((tool) => compilerVersion(tool)));
  const step = (
    name: string,
    commands: Step["commands"],
    ...needs: readonly ("cc" | typeof TOOLS[number])[]
  ): Step => {
    const missing = needs.find((tool) => tool !== "cc" && versions[TOOLS.indexOf(tool)] === undefined);
    if (needs.includes("cc") && compiler === undefined) return { name, commands, skip: NO_COMPILER };
    return missing === undefined ? { name, commands } : { name, commands, skip: `no ${missing}` };
  };
  const at = (name: string) => join(work, name), cross = "aarch64-linux-gnu-gcc", emulator = "qemu-aarch64";
  const sanitize = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
  const sanitized = kernelChecks(cc, process.arch, at("sanitized"), ["2", "quick"], ["-O0", ...sanitize]);
  const neon = kernelChecks(cross, "arm64", at("neon"), ["4", "32"], ["-static"], [emulator]);
  const wasm = [[bun, "run", "scripts/build.ts", "--wasm", "--output", at("wasm_binary.ts")]];
  return [
    step("native library", [buildLibrary()], "cc"),
    // The longest first here, too: the last ones take half a minute each.
    step("CUDA kernels on the host", cudaHostChecks(work, sanitize), "cc", "c++"),
    step("CUDA", cudaChecks(work), "cc", "nvcc"),
    // Fetched, installed and imported as users do; what cannot be tried here it says.
    step("release", [[bun, "run", "scripts/release.ts", at("release")]], "cc"),
    step("kernels under address and undefined-behaviour sanitizers", sanitized, "cc"),
    step("NEON kernels under emulation", neon, cross, emulator),
    step("kernels built by clang", kernelChecks("clang", process.arch, at("clang"), ["3", "quick"]), "clang"),
    step("kernels against the oracle", libraryChecks(cc, at("library.so")), "cc"),
    step("WebAssembly builds", wasm, "clang", "wasm-ld"),
  ];
}

/** Passed and failed tests as the runners' own closing lines count them; a step without any counts as one. */
function count(
  { code, output }: Pick<Outcome, "code" | "output">,
): { passed: number; failed: number; skipped: number } {
  const sum = (pattern: RegExp) =>
    [...output.matchAll(pattern)].reduce((total, match) => total + Number(match[1]), 0);
  const passed = sum(/^ *(\d+) pass$/gm) + sum(/\| (\d+) passed/g);
  const failed = sum(/^ *(\d+) fail$/gm) + sum(/\| \d+ passed(?: \(\d+ steps?\))? \| (\d+) failed/g);
  const skipped = sum(/^ *(\d+) skip$/gm) + sum(/\| (\d+) ignored/g);
  if (passed + failed === 0) {
    return { passed: code === 0 ? 1 : 0, failed: code === 0 ? 0 : 1, skipped };
  }
  return { passed, failed: code !== 0 && failed === 0 ? 1 : failed, skipped };
}

/** Steps that run at once: most have one busy thread. */
const MAX_STEPS_AT_ONCE = 2;

const total = { passed: 0, failed: 0, skipped: 0 };

/** What failed, a line each: named again at the end, where a log that is cut still shows it. */
const failures: string[] = [];

/** Names of failed tests in the runners' output: `(fail) name` in Bun, `name => file:line:column` in Deno. */
const failedTests = (output: string): string[] => [
  ...new Set(
    [...output.matchAll(/^\(fail\) (.*)$|^(.* => \S+_test\.ts:\d+:\d+)$/gm)].map((match) =>
      match[1] ?? match[2]!
    ),
  ),
];

/** Runs a step's commands, on these processors, up to the first that fails, and prints its line. */
async function perform(step: Step, processors?: string): Promise<void> {
  if (step.skip !== undefined) {
    console.log(`skip    ${step.name}: ${step.skip}`);
    total.skipped++;
    return;
  }
  const started = performance.now();
  let code = 0, output = "";
  const held = processors === undefined ? [] : ["taskset", "-c", processors];
  for (const command of step.commands) {
    const [program, ...args] = [...held, ...command];
    const outcome = await runProgram(program!, args, { cwd: root });
    output += outcome.output + outcome.errors;
    code = outcome.code === SKIPPED ? 0 : outcome.code;
    if (code !== 0) break;
  }
  const counts = count({ code, output });
  total.passed += counts.passed;
  total.failed += counts.failed;
  total.skipped += counts.skipped;
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  const detail = counts.passed + counts.failed > 1
    ? `, ${counts.passed} passed, ${counts.failed} failed`
    : "";
  console.log(`${code === 0 ? "ok    " : "FAILED"}  ${step.name} (${seconds} s${detail})`);
  for (const line of output.matchAll(/^ *skipped:? .*$/gm)) {
    console.log(`        ${line[0].trim()}`);
  }
  if (code !== 0) {
    const tests = failedTests(stripVTControlCharacters(output));
    failures.push(
      ...(tests.length > 0 ? tests : [`exit code ${code}`]).map((name) => `${step.name}: ${name}`),
    );
    console.log(output.trimEnd().split("\n").slice(-80).map((line) => `    ${line}`).join("\n"));
  }
}

async function run({ flags, values }: Arguments<typeof USAGE>): Promise<number> {
  const only = values.only?.split(","), work = mkdtempSync(join(tmpdir(), "arrowquant-ok-"));
  try {
    const [library, ...native] = await nativeSteps(work);
    const all = [library!, ...sourceSteps(), ...native];
    const todo = all.filter(({ name }) => only === undefined || only.includes(name));
    if (flags.list) { for (const { name } of todo.splice(0)) console.log(name); }
    // Alone: processes that run at the same time would each build it.
    if (todo[0] === library) await perform(todo.shift()!);
    const count = Math.min(MAX_STEPS_AT_ONCE, availableParallelism()), shares = await processorShares(count);
    const worker = async (_: unknown, i: number): Promise<void> => {
      for (let step = todo.shift(); step !== undefined; step = todo.shift()) await perform(step, shares?.[i]);
    };
    await Promise.all(Array.from({ length: count }, worker));
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
  for (const failure of failures) console.log(`FAILED  ${failure}`);
  console.log(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`);
  return total.failed === 0 ? 0 : 1;
}

export const main = defineCommand(USAGE, run);
if (import.meta.main) await main();
