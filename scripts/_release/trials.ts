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
import { serveFolder } from "./static_server.ts";

/** What came of a trial. */
export interface Trial {
  readonly name: string;
  readonly outcome: "passed" | "failed" | "skipped";
  /** What was seen, or why not. */
  readonly detail: string;
}

/** What is tried. */
export interface TrialOptions {
  /** The release. */
  readonly folder: string;
  /** Path of the npm package. */
  readonly tarball: string;
  /** Its libraries. */
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
  // 4 bits over a sine's range: a sixteenth of it a step, a step's error uniform, against the sine's own 1/√2.
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

/** Tries a release in folders of its own, which are deleted. @returns the trials' outcomes in order */
export async function tryRelease(options: TrialOptions): Promise<Trial[]> {
  const { folder, tarball, libraries, onTrial } = options;
  const hasLibrary = libraries.some((each) =>
    each.platform === process.platform && each.architecture === process.arch
  );
  const work = mkdtempSync(join(tmpdir(), "arrowquant-trial-"));
  const trials: Trial[] = [];
  const bun = bunBinary(), deno = denoBinary();
  const isThere = async (command: string) =>
    (await runProgram(command, ["--version"], { cwd: work })).code === 0;

  /** An empty folder. */
  let folders = 0;
  const empty = () => {
    const path = join(work, String(folders++));
    mkdirSync(path);
    return path;
  };
  async function attempt(name: string, body: () => Promise<string>): Promise<void> {
    let trial: Trial;
    try {
      trial = { name, outcome: "passed", detail: await body() };
    } catch (error) {
      const detail = error instanceof Error ? error.message : String(error);
      trial = { name, outcome: error instanceof Skip ? "skipped" : "failed", detail };
    }
    trials.push(trial);
    onTrial(trial);
  }
  const native = hasLibrary ? "native" : undefined;

  try {
    await attempt("Deno imports mod.ts from a URL", async () => {
      if (!await isThere(deno)) throw new Skip("no Deno");
      const server = await serveFolder(folder);
      try {
        const cwd = empty();
        writeFileSync(join(cwd, "program.ts"), program(`${server.url}mod.ts`));
        const environment = {
          HOME: cwd,
          XDG_CACHE_HOME: join(cwd, "cache"),
          DENO_DIR: join(cwd, "deno"),
          ARROWQUANT_LIBRARY: undefined,
          ARROWQUANT_FETCH: undefined,
        };
        const run = () => runProgram(deno, ["run", "-A", "--no-prompt", "program.ts"], { cwd, environment });
        const first = judge(await run(), native);
        if (hasLibrary) {
          const libraries = () => server.requests.filter((path) => path.startsWith("/libraries/")).length;
          if (libraries() !== 1) throw new Error(`the library must be fetched once, got ${libraries()}`);
          rmSync(join(cwd, "packed"), { recursive: true });
          judge(await run(), native);
          if (libraries() !== 1) throw new Error("the second program must find the library in the cache");
        }
        return first;
      } finally {
        server.close();
      }
    });

    const arm = libraries.find(({ platform, architecture }) =>
      platform === "linux" && architecture === "arm64"
    );
    if (arm !== undefined && process.arch !== "arm64") {
      await attempt("the linux-arm64 library under emulation", () => emulated(join(folder, arm.file)));
    }

    for (const [runtime, command, args] of [["Bun", bun, ["run"]], ["Deno", deno, ["run", "-A"]]] as const) {
      await attempt(`${runtime} runs the single file arrowquant.js`, async () => {
        if (!await isThere(command)) throw new Skip(`no ${runtime}`);
        const cwd = empty();
        writeFileSync(join(cwd, "program.js"), program(join(folder, "arrowquant.js")));
        return judge(await runProgram(command, [...args, "program.js"], { cwd }), undefined);
      });
    }

    await attempt("Bun uses the npm package in an empty project", async () => {
      const cwd = empty();
      writeFileSync(join(cwd, "package.json"), JSON.stringify({ name: "trial", private: true }));
      const args = ["add", "--omit=optional", "--omit=peer", tarball];
      const added = await runProgram(bun, args, { cwd });
      if (added.code !== 0) throw new Error(`bun add: ${added.errors}`);
      writeFileSync(join(cwd, "program.ts"), program("arrowquant"));
      const said = judge(await runProgram(bun, ["run", "program.ts"], { cwd }), undefined);
      return `${said}; ${await command(cwd, bun, ["x", "--bun", "--no-install"])}`;
    });

    await attempt("npx of Node runs the npm package in an empty project", async () => {
      const npm = findProgram("npm"), npx = findProgram("npx"), node = findProgram("node");
      if (npm === undefined || npx === undefined || node === undefined) {
        throw new Skip("no node, npm and npx");
      }
      const cwd = empty();
      writeFileSync(join(cwd, "package.json"), JSON.stringify({ name: "trial", private: true }));
      const args = ["install", "--omit=optional", "--offline", "--no-audit", "--no-fund", tarball];
      const added = await runProgram(npm, args, { cwd });
      if (added.code !== 0) throw new Error(`npm install: ${added.errors}`);
      const { output } = await runProgram(node, ["--version"], { cwd });
      return `Node ${output.trim()}: ${await command(cwd, npx, ["--no-install"])}`;
    });

    await attempt("JSR takes the package (dry run)", async () => {
      if (!await isThere(deno)) throw new Skip("no Deno");
      const cwd = fileURLToPath(PACKAGE_ROOT);
      if (!existsSync(join(cwd, "deno.json"))) throw new Skip("no deno.json");
      const args = ["publish", "--dry-run", "--allow-dirty"];
      const { code, errors, output } = await runProgram(deno, args, { cwd });
      const text = `${output}\n${errors}`;
      if (code !== 0 && /dns error|error sending request|client error \(Connect\)/i.test(text)) {
        throw new Skip(`it needs the network: ${text.trim().split("\n").at(-1)}`);
      }
      if (code !== 0) throw new Error(text.trim().split("\n").slice(-30).join("\n"));
      const files = [...text.matchAll(/^\s+file:\/\//gm)].length;
      return `${files} files, ${[...text.matchAll(/^warning\[/gm)].length} warnings`;
    });
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
  return trials;

  /** The C driver that compares every kernel with the scalar ones, linked with a shipped library and run by an emulator. */
  async function emulated(library: string): Promise<string> {
    const compiler = "aarch64-linux-gnu-gcc", emulator = "qemu-aarch64";
    for (const tool of [compiler, emulator]) if (!await isThere(tool)) throw new Skip(`no ${tool}`);
    const cwd = empty(), driver = join(cwd, "compare");
    const sources = fileURLToPath(new URL("kernels/tests/compare.c", PACKAGE_ROOT));
    const run = async (command: string, args: readonly string[]) => {
      const { code, output, errors } = await runProgram(command, args, { cwd });
      if (code !== 0) throw new Error(`${command}: exit status ${code}: ${errors || output}`);
      return output.trim();
    };
    await run(compiler, ["-O2", "-std=c11", sources, library, "-o", driver, "-lm"]);
    const system = join(await run(compiler, ["-print-file-name=libc.so.6"]), "..", "..");
    const path = `LD_LIBRARY_PATH=${join(library, "..")}`;
    const said = await run(emulator, ["-L", system, "-E", path, driver, "1", "quick"]);
    return said.split("\n").at(-1)!;
  }

  /** Quantizes and looks into the result with the package's commands. */
  async function command(cwd: string, runner: string, args: readonly string[]): Promise<string> {
    const model = join(fileURLToPath(PACKAGE_ROOT), "tests", "models", "dream-mini");
    const path = `${process.env["PATH"] ?? ""}:${join(bun, "..")}`;
    const run = async (...rest: readonly string[]) => {
      const outcome = await runProgram(runner, [...args, ...rest], { cwd, environment: { PATH: path } });
      if (outcome.code !== 0) throw new Error(`${rest[0]}: exit status ${outcome.code}: ${outcome.errors}`);
      return outcome.output;
    };
    await run("arrowquant-quantize", "--help");
    const report = JSON.parse(
      await run("arrowquant-quantize", model, "by-command", "--bits", "4", "--json"),
    ) as {
      readonly backend: string;
      readonly totals: { readonly tensors: number };
    };
    const found = JSON.parse(await run("arrowquant-inspect", "by-command", "--json")) as object;
    if (report.totals.tensors < 1 || Object.keys(found).length === 0) {
      throw new Error("the commands must quantize and inspect a model");
    }
    return `arrowquant-quantize: ${report.totals.tensors} tensors, ${report.backend}`;
  }
}
