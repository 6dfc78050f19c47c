/** Uses a release as its users will: imported from a URL, installed by npm, as a single file. */
import { existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { PACKAGE_ROOT } from "../../lib/native/location.ts";
import type { ReleaseLibrary } from "../../lib/native/release_manifest.ts";
import { bunBinary, denoBinary, findProgram } from "../_command/programs.ts";
import { type Outcome, runProgram } from "../_command/run_program.ts";
import { doors } from "./reference.ts";
import { serveFolder } from "./static_server.ts";

export interface Trial {
  readonly name: string;
  readonly outcome: "passed" | "failed" | "skipped";
  /** What was seen, or why not. */
  readonly detail: string;
}

export interface TrialOptions {
  readonly folder: string;
  /** Path of the npm package. */
  readonly tarball: string;
  readonly libraries: readonly Pick<ReleaseLibrary, "platform" | "architecture" | "file">[];
  readonly onTrial: (trial: Trial) => void;
}

/** Quantizes a .safetensors file that it writes, and prints what ran and how near the weights came back. */
const program = (specifier: string) => `
import { readFileSync, writeFileSync } from "node:fs";
import {
  DEFAULT_CONFIG, dequantize, openCheckpoint, openKernels, packedLayers, quantizeCheckpoint, readPackedTensor,
} from ${JSON.stringify(specifier)};
const rows = 64, cols = 128, name = "block.up.weight";
const weights = Float32Array.from({ length: rows * cols }, (_, i) => Math.sin(i * i));
const header = new TextEncoder().encode(
  JSON.stringify({ [name]: { dtype: "F32", shape: [rows, cols], data_offsets: [0, weights.byteLength] } }),
);
const file = new Uint8Array(8 + header.length + weights.byteLength);
new DataView(file.buffer).setBigUint64(0, BigInt(header.length), true);
file.set(header, 8);
file.set(new Uint8Array(weights.buffer), 8 + header.length);
writeFileSync("model.safetensors", file);
const kernels = await openKernels({ onMessage: (line) => console.error(line) });
const report = await quantizeCheckpoint({ input: "model.safetensors", output: "packed", config: DEFAULT_CONFIG, kernels });
const checkpoint = openCheckpoint("packed");
const layers = [...packedLayers(checkpoint).keys()];
checkpoint.close();
const { bitsPerWeight, relativeRmsError } = report.totals;
console.log(JSON.stringify({ backend: kernels.backend, layers, bitsPerWeight, relativeRmsError }));
`;

/** Checks what {@linkcode program} printed. @returns what to say of it */
function judge({ code, output, errors }: Outcome, backend: string | undefined): string {
  if (code !== 0) throw new Error(`exit status ${code}: ${errors || output}`);
  const result = JSON.parse(output) as {
    readonly backend: string;
    readonly layers: readonly string[];
    readonly bitsPerWeight: number;
    readonly relativeRmsError: number;
  };
  if (result.layers.join() !== "block.up.weight") throw new Error(`layers must be one, got ${output}`);
  // 4 bits over a sine's range: a sixteenth of it a step, a step's error uniform, against the sine's own
  // 1/√2.
  if (!(result.relativeRmsError > 0 && result.relativeRmsError < 0.1)) {
    throw new Error(`the error must lie in (0, 0.1), got ${output}`);
  }
  if (backend !== undefined && result.backend !== backend) {
    throw new Error(`the backend must be ${backend}, got ${result.backend}: ${errors}`);
  }
  return `${result.backend}, relative RMS error ${
    result.relativeRmsError.toPrecision(3)
  } at ${result.bitsPerWeight} bits per weight`;
}

/** A reason not to try. */
class Skip extends Error {}

/** A trial: its name, and the work that returns what was seen or throws. */
type Attempt = readonly [name: string, body: () => Promise<string>];

const bun = bunBinary(), deno = denoBinary();

/** Tries a release in temporary folders. @returns the trials' outcomes in order */
export async function tryRelease(options: TrialOptions): Promise<Trial[]> {
  const work = mkdtempSync(join(tmpdir(), "arrowquant-trial-"));
  let folders = 0;
  const empty = () => {
    const path = join(work, String(folders++));
    mkdirSync(path);
    return path;
  };
  const trials: Trial[] = [];
  try {
    for (const [name, body] of attempts(options, empty)) {
      const trial = await body().then(
        (detail): Trial => ({ name, outcome: "passed", detail }),
        (error: unknown): Trial => ({
          name,
          outcome: error instanceof Skip ? "skipped" : "failed",
          detail: error instanceof Error ? error.message : String(error),
        }),
      );
      trials.push(trial);
      options.onTrial(trial);
    }
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
  return trials;
}

/** The trials that make sense for a release on this machine; each gets folders from `empty`. */
function attempts({ folder, tarball, libraries }: TrialOptions, empty: () => string): Attempt[] {
  const hasLibrary = libraries.some((each) =>
    each.platform === process.platform && each.architecture === process.arch
  );
  const arm = libraries.find(({ platform, architecture }) =>
    platform === "linux" && architecture === "arm64"
  );
  const emulation: Attempt[] = arm === undefined || process.arch === "arm64" ? [] : [
    ["the linux-arm64 library under emulation", () => emulated(join(folder, arm.file), empty())],
  ];
  const single = ([["Bun", bun, ["run"]], ["Deno", deno, ["run", "-A"]]] as const).map(
    ([runtime, command, args]): Attempt => [`${runtime} runs the single file arrowquant.js`, async () => {
      await need(command, runtime);
      const cwd = empty();
      writeFileSync(join(cwd, "program.js"), program(join(folder, "arrowquant.js")));
      return judge(await runProgram(command, [...args, "program.js"], { cwd }), undefined);
    }],
  );
  return [
    ["Deno imports mod.ts from a URL", () => fromUrl(folder, hasLibrary, empty())],
    ["Deno imports arrowquant.js from a URL", () => singleFromUrl(folder, empty())],
    ["Deno imports every public module from a URL", () => doorsFromUrl(folder, empty())],
    ...emulation,
    ...single,
    ["Bun uses the npm package in an empty project", () => npmInBun(tarball, empty())],
    ["Deno runs the npm package in an empty project", () => npmInDeno(tarball, empty())],
    ["npx of Node runs the npm package in an empty project", () => npmInNode(tarball, empty())],
    ["JSR takes the package (dry run)", () => jsrDryRun()],
  ];
}

async function isThere(command: string): Promise<boolean> {
  return (await runProgram(command, ["--version"], { cwd: tmpdir() })).code === 0;
}

/** @throws {Skip} where a program is not there */
async function need(command: string, name = command): Promise<void> {
  if (!await isThere(command)) throw new Skip(`no ${name}`);
}

/** Runs a program of Deno without a cache; a server of the release answers its imports. */
async function served(
  folder: string,
  cwd: string,
  program: (url: string) => string,
  use: (run: () => Promise<Outcome>, requests: readonly string[]) => Promise<string> | string,
): Promise<string> {
  await need(deno, "Deno");
  const server = await serveFolder(folder), args = ["run", "-A", "--no-prompt", "program.ts"];
  try {
    writeFileSync(join(cwd, "program.ts"), program(server.url));
    return await use(() => runProgram(deno, args, { cwd, environment: cleanDeno(cwd) }), server.requests);
  } finally {
    server.close();
  }
}

const fromUrl = (folder: string, hasLibrary: boolean, cwd: string): Promise<string> =>
  served(folder, cwd, (url) => program(`${url}mod.ts`), async (run, requests) => {
    const native = hasLibrary ? "native" : undefined, first = judge(await run(), native);
    if (!hasLibrary) return first;
    const fetched = () => requests.filter((path) => path.startsWith("/libraries/")).length;
    if (fetched() !== 1) throw new Error(`the library must be fetched once, got ${fetched()}`);
    rmSync(join(cwd, "packed"), { recursive: true });
    judge(await run(), native);
    if (fetched() !== 1) throw new Error("the second program must find the library in the cache");
    return first;
  });

const singleFromUrl = (folder: string, cwd: string): Promise<string> =>
  served(folder, cwd, (url) => program(`${url}arrowquant.js`), async (run) => judge(await run(), undefined));

/** Variables of a Deno that has no cache yet. */
const cleanDeno = (cwd: string) => ({
  HOME: cwd,
  XDG_CACHE_HOME: join(cwd, "cache"),
  DENO_DIR: join(cwd, "deno"),
  ARROWQUANT_LIBRARY: undefined,
  ARROWQUANT_FETCH: undefined,
});

/** A program that imports modules and prints how many names each has. */
const importing = (specifiers: readonly string[]) =>
  `const counts = [];
for (const specifier of ${JSON.stringify(specifiers)}) {
  counts.push(Object.keys(await import(specifier)).length);
}
console.log(JSON.stringify(counts));\n`;

/** @throws {Error} where a module could not be imported or is empty */
function judgeImports({ code, output, errors }: Outcome): string {
  if (code !== 0) throw new Error(`exit status ${code}: ${errors || output}`);
  const counts = JSON.parse(output) as number[];
  if (counts.some((count) => count === 0)) {
    throw new Error(`every module must export something, got ${output}`);
  }
  return `${counts.length} public modules`;
}

const doorsFromUrl = (folder: string, cwd: string): Promise<string> =>
  served(
    folder,
    cwd,
    (url) => importing(Object.values(doors()).map((path) => new URL(path, url).href)),
    async (run) => judgeImports(await run()),
  );

async function npmInBun(tarball: string, cwd: string): Promise<string> {
  writeFileSync(join(cwd, "package.json"), JSON.stringify({ name: "trial", private: true }));
  const added = await runProgram(bun, ["add", "--omit=optional", "--omit=peer", tarball], { cwd });
  if (added.code !== 0) throw new Error(`bun add: ${added.errors}`);
  writeFileSync(join(cwd, "program.ts"), program("arrowquant"));
  const said = judge(await runProgram(bun, ["run", "program.ts"], { cwd }), undefined);
  writeFileSync(
    join(cwd, "doors.ts"),
    importing(Object.keys(doors()).map((door) => join("arrowquant", door))),
  );
  const imported = judgeImports(await runProgram(bun, ["run", "doors.ts"], { cwd }));
  return `${said}; ${imported}; ${await useCommands(cwd, bun, ["x", "--bun", "--no-install"])}`;
}

/** The installed package's file of the command, as `deno run npm:arrowquant` starts it. */
async function npmInDeno(tarball: string, cwd: string): Promise<string> {
  await need(deno, "Deno");
  writeFileSync(join(cwd, "package.json"), JSON.stringify({ name: "trial", private: true }));
  const added = await runProgram(bun, ["add", "--omit=optional", "--omit=peer", tarball], { cwd });
  if (added.code !== 0) throw new Error(`bun add: ${added.errors}`);
  return await useCommands(cwd, deno, ["run", "-A"], (name) => `node_modules/arrowquant/bin/${name}.js`);
}

async function npmInNode(tarball: string, cwd: string): Promise<string> {
  const npm = findProgram("npm"), npx = findProgram("npx"), node = findProgram("node");
  if (npm === undefined || npx === undefined || node === undefined) throw new Skip("no node, npm and npx");
  writeFileSync(join(cwd, "package.json"), JSON.stringify({ name: "trial", private: true }));
  const args = ["install", "--omit=optional", "--offline", "--no-audit", "--no-fund", tarball];
  const added = await runProgram(npm, args, { cwd });
  if (added.code !== 0) throw new Error(`npm install: ${added.errors}`);
  const { output } = await runProgram(node, ["--version"], { cwd });
  return `Node ${output.trim()}: ${await useCommands(cwd, npx, ["--no-install"])}`;
}

async function jsrDryRun(): Promise<string> {
  await need(deno, "Deno");
  const cwd = fileURLToPath(PACKAGE_ROOT);
  if (!existsSync(join(cwd, "deno.json"))) throw new Skip("no deno.json");
  const args = ["publish", "--dry-run", "--allow-dirty", "--allow-slow-types"];
  const { code, errors, output } = await runProgram(deno, args, { cwd });
  const text = `${output}\n${errors}`;
  if (code !== 0 && /dns error|error sending request|client error \(Connect\)/i.test(text)) {
    throw new Skip(`it needs the network: ${text.trim().split("\n").at(-1)}`);
  }
  if (code !== 0) throw new Error(text.trim().split("\n").slice(-30).join("\n"));
  const files = [...text.matchAll(/^\s+file:\/\//gm)].length;
  return `${files} files, ${[...text.matchAll(/^warning\[/gm)].length} warnings`;
}

/** The C driver of every kernel against the scalar ones, with a shipped library, by an emulator. */
async function emulated(library: string, cwd: string): Promise<string> {
  const compiler = "aarch64-linux-gnu-gcc", emulator = "qemu-aarch64";
  for (const tool of [compiler, emulator]) await need(tool);
  const driver = join(cwd, "compare");
  const sources = fileURLToPath(new URL("kernels/tests/quantize.c", PACKAGE_ROOT));
  const run = async (command: string, args: readonly string[]) => {
    const { code, output, errors } = await runProgram(command, args, { cwd });
    if (code !== 0) throw new Error(`${command}: exit status ${code}: ${errors || output}`);
    return output.trim();
  };
  await run(compiler, ["-O2", "-std=c11", sources, library, "-o", driver, "-lm"]);
  const system = join(await run(compiler, ["-print-file-name=libc.so.6"]), "..", "..");
  const path = `LD_LIBRARY_PATH=${join(library, "..")}`;
  const said = await run(emulator, ["-L", system, "-E", path, driver, "1", "64"]);
  return said.split("\n").at(-1)!;
}

/** Quantizes and looks into the result with the commands of the package. */
async function useCommands(
  cwd: string,
  runner: string,
  args: readonly string[],
  pathOf = (name: string) => name,
): Promise<string> {
  const model = join(fileURLToPath(PACKAGE_ROOT), "tests", "models", "dream-mini");
  const path = `${process.env["PATH"] ?? ""}:${join(bun, "..")}`;
  const run = async (name: string, ...rest: readonly string[]) => {
    const command = [...args, pathOf(name), ...rest];
    const outcome = await runProgram(runner, command, { cwd, environment: { PATH: path } });
    if (outcome.code !== 0) throw new Error(`${name}: exit status ${outcome.code}: ${outcome.errors}`);
    return outcome.output;
  };
  const version = (await run("arrowquant", "--version")).trim();
  await run("arrowquant-quantize", "--help");
  const report = JSON.parse(
    await run("arrowquant", "quantize", model, "by-command", "--bits", "4", "--json"),
  ) as { readonly backend: string; readonly totals: { readonly tensors: number } };
  const found = JSON.parse(await run("arrowquant", "inspect", "by-command", "--json")) as object;
  await run("arrowquant", "export", "by-command", "plain", "--to", "safetensors", "--quiet");
  if (report.totals.tensors < 1 || Object.keys(found).length === 0) {
    throw new Error("the commands must quantize and inspect a model");
  }
  return `${version}: ${report.totals.tensors} tensors, ${report.backend}`;
}
