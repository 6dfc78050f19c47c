/**
 * Builds the kernels with the system's compiler: what is compiled with which flags, the hash that names a
 * build, and the commands. Finding and opening what was built is library.ts's.
 */
import { type ChildProcess, execFile, spawn } from "node:child_process";
import { createHash } from "node:crypto";
import {
  chmodSync,
  closeSync,
  existsSync,
  fsyncSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { promisify } from "node:util";
import { KernelError } from "../errors.ts";
import { readPrivate } from "../files/ownership.ts";
import { sha256 } from "../files/whole.ts";

const COMMON_FLAGS = [
  "-std=c11",
  "-O3",
  "-Wall",
  "-Wextra",
  "-ffp-contract=off", // a fused multiply-add would round once where the oracle rounds twice
  "-fno-math-errno", // square roots are instructions, not calls
  "-fvisibility=hidden",
];

/** Sources of every build, by path from kernels/cpu. */
const COMMON_SOURCES = [
  "dispatch.c",
  "packed.c",
  "stop.c",
  "threads.c",
  ...["quantize", "two_level", "forward", "int8", "product", "backward"].flatMap((family) => [
    `${family}/api.c`,
    `${family}/scalar.c`,
  ]),
  "quantize/elements.c",
  "quantize/ggml.c",
  "forward/experts.c",
  "forward/images.c",
  "forward/linear.c",
  "solver/api.c",
  "solver/rows_api.c",
  "solver/rows_scalar.c",
  "solver/trellis_scalar.c",
  "trellis/api.c",
  "trellis/rotation.c",
  "trellis/scalar.c",
];

const AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"];
const AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"];

/** One source file of the library and the flags only it gets. */
export interface Unit {
  readonly source: string;
  readonly flags: readonly string[];
}

/** What is built for a processor. */
export interface BuildPlan {
  /** Folder of kernels/ that the units are in; `cpu` where nothing is said. */
  readonly folder?: "cuda";
  readonly units: readonly Unit[];
  readonly flags: readonly string[];
  readonly linkFlags: readonly string[];
  readonly fileName: string;
}

const unitsOf = (sources: readonly string[], flags: readonly string[] = []): Unit[] =>
  sources.map((source) => ({ source, flags }));

/** The plan for a platform (`linux`, `darwin`, …) and architecture (`x64`, `arm64`, …) in Node's words. */
export function nativePlan(platform: string, architecture: string): BuildPlan {
  const units = unitsOf(COMMON_SOURCES);
  const flags = [...COMMON_FLAGS, "-fPIC", "-pthread"];
  if (architecture === "x64") {
    flags.push("-DAQ_BUILD_AVX2", "-DAQ_BUILD_AVX512");
    units.push(
      ...unitsOf(
        ["isa/avx2.c", "int8/avx2.c", "backward/avx2.c", "trellis/avx2.c", "trellis/token_avx2.c"],
        AVX2_FLAGS,
      ),
      ...unitsOf(["isa/avx512.c", "int8/avx512.c", "backward/avx512.c", "trellis/avx512.c"], AVX512_FLAGS),
      ...unitsOf(["int8/avx512_vnni.c", "trellis/avx512_vnni.c"], [...AVX512_FLAGS, "-mavx512vnni"]),
      ...unitsOf(["trellis/avx512_vbmi.c"], [...AVX512_FLAGS, "-mavx512vbmi", "-mavx512vnni"]),
    );
  } else if (architecture === "arm64") {
    flags.push("-DAQ_BUILD_NEON");
    units.push(...unitsOf(["isa/neon.c", "int8/neon.c"]));
    units.push(...unitsOf(["int8/neon_dot.c"], ["-march=armv8.2-a+dotprod"]));
  }
  return {
    units,
    flags,
    // A signal handler of the library can run on another thread while the library is closed: it stays mapped.
    linkFlags: ["-shared", "-pthread", ...(platform === "linux" ? ["-Wl,-z,nodelete"] : [])],
    fileName: platform === "darwin" ? "libarrowquant.dylib" : "libarrowquant.so",
  };
}

/** The plan of the embedded WebAssembly module: one command, clang and lld. */
export const WASM_PLAN: BuildPlan = {
  units: unitsOf([...COMMON_SOURCES, "isa/simd128.c", "int8/simd128.c"]),
  flags: [
    ...COMMON_FLAGS,
    "--target=wasm32",
    "-ffreestanding",
    "-nostdlib",
    "-msimd128",
    "-mbulk-memory",
    "-DAQ_BUILD_SIMD128",
    "-DAQ_NO_THREADS",
  ],
  linkFlags: ["--no-entry", "--export-dynamic", "-z,stack-size=524288", "--strip-all", "--export=__heap_base"]
    .map((flag) => `-Wl,${flag}`),
  fileName: "arrowquant.wasm",
};

/** Architectures of the CUDA library: binaries of these, and the last one's PTX for newer ones. */
export type CudaArchitecture = "80" | "90";

/**
 * The plan of the CUDA library on Linux: nvcc, the runtime linked in. Its results are those of the CPU's
 * scalar kernels to the bit, of forward passes within tolerances.
 */
export function cudaPlan(architectures: readonly CudaArchitecture[] = ["80", "90"]): BuildPlan {
  const newest = architectures.at(-1)!;
  return {
    folder: "cuda",
    units: unitsOf(
      [
        "backward",
        "context",
        "copies",
        "forward/activations",
        "forward/experts",
        "forward/forward",
        "forward/int8",
        "forward/linear",
        "product",
        "quantize/dequantize",
        "quantize/quantize",
        "quantize/two_level",
        "rows",
        "solver",
        "tensor",
        "trellis/products",
        "trellis/rotation",
        "trellis/solver",
      ].map((
        name,
      ) => `${name}.cu`),
    ),
    flags: [
      "-O3",
      "-std=c++17",
      "-cudart=static",
      "-fmad=false", // a fused multiply-add would round once where the oracle rounds twice
      "-Werror=all-warnings",
      "-Xcompiler=-fPIC,-Wall,-Wextra,-ffp-contract=off,-fvisibility=hidden",
      ...architectures.map((number) => `-gencode=arch=compute_${number},code=sm_${number}`),
      `-gencode=arch=compute_${newest},code=compute_${newest}`,
    ],
    // the runtime is linked in: its symbols must not meet those of another copy in the process
    linkFlags: ["-shared", "-Xlinker=--exclude-libs=ALL", "-Xlinker=--as-needed", "-ldl"],
    fileName: "libarrowquant_cuda.so",
  };
}

/** Files below `folder`, by path from `root`, sorted by name within each folder. */
function* filesBelow(root: string, folder: string): Generator<string> {
  const entries = readdirSync(join(root, folder), { withFileTypes: true });
  for (const entry of entries.sort((a, b) => a.name < b.name ? -1 : 1)) {
    const path = `${folder}/${entry.name}`;
    if (entry.isDirectory()) yield* filesBelow(root, path);
    else yield path;
  }
}

/** The files of kernels/ that a plan reads, by path from there, in a fixed order. */
function kernelSources(kernels: string, plan: BuildPlan): Map<string, Uint8Array> {
  const sources = new Map<string, Uint8Array>();
  const cuda = plan.folder === "cuda";
  for (const folder of ["include", "arithmetic", cuda ? "cuda" : "cpu"]) {
    for (const path of filesBelow(kernels, folder)) {
      if (!/\.(c|h|cu)$/.test(path) || (!cuda && path === "include/arrowquant_cuda.h")) continue;
      sources.set(path, readFileSync(join(kernels, path)));
    }
  }
  return sources;
}

/** File name of a unit's object: its path with hyphens, because families have files of the same name. */
export const objectName = (unit: Unit) => unit.source.replaceAll("/", "-").replace(/\.cu?$/, ".o");

/** SHA-256, in hex, of a plan and every byte it compiles. */
export function buildHash(plan: BuildPlan, kernels: string, compiler = ""): string {
  const hash = createHash("sha256");
  hash.update(JSON.stringify([plan, compiler]));
  for (const [name, bytes] of kernelSources(kernels, plan)) {
    hash.update(`\0${name}\0${bytes.length}\0`).update(bytes);
  }
  return hash.digest("hex");
}

const execute = promisify(execFile);

/** Most characters of a compiler's messages that are kept. */
const MAX_MESSAGES = 1 << 20;

/** Ends a compiler with the programs that it has started: each has a process group of its own. */
function endGroup(child: ChildProcess): void {
  try {
    process.kill(-child.pid!, "SIGKILL");
  } catch {
    child.kill("SIGKILL"); // ended already, or a system without groups
  }
}

/**
 * Runs a compiler.
 *
 * @param running where it stands while it runs
 * @throws {KernelError} when it cannot be run or ends with another status than 0
 */
function run(command: string, args: readonly string[], running: Set<ChildProcess>): Promise<void> {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, { stdio: ["ignore", "ignore", "pipe"], detached: true });
    let messages = "";
    child.stderr!.setEncoding("utf8").on("data", (text: string) => {
      if (messages.length < MAX_MESSAGES) messages += text;
    });
    running.add(child);
    child.on("error", (cause) => {
      running.delete(child);
      reject(new KernelError(`Cannot run the compiler "${command}"`, { cause }));
    });
    child.on("close", (code, signal) => {
      running.delete(child);
      if (code === 0) return resolve();
      const lines = messages.split("\n"), first = lines.find((line) => /error/i.test(line)) ?? lines[0];
      const reason = `${command} ended with ${code ?? signal}: ${first}`;
      reject(new KernelError(`Cannot build the kernels: ${reason}`, { cause: messages }));
    });
  });
}

/** Milliseconds between two lines about a build that takes long. */
const REPORT_INTERVAL = 5_000;

/** What a build of the library listens to, and whom it tells how far it is. */
export interface BuildOptions {
  readonly signal?: AbortSignal | undefined;
  readonly onMessage?: ((line: string) => void) | undefined;
}

/** A compiler's version line; undefined if it is not there. */
export async function compilerVersion(command: string): Promise<string | undefined> {
  try {
    return (await execute(command, ["--version"])).stdout.split("\n")[0]!.trim();
  } catch {
    return undefined;
  }
}

/**
 * Compiles a plan. Work happens in a temporary folder beside `folder`, and `publish` takes the finished file
 * from there, so that a stopped build leaves nothing half-made.
 *
 * @throws {KernelError} when the compiler cannot be run or refuses the sources
 */
async function compile<Result>(
  plan: BuildPlan,
  kernels: string,
  compiler: string,
  folder: string,
  publish: (result: string) => Result,
  { signal, onMessage }: BuildOptions = {},
): Promise<Result> {
  const work = mkdtempSync(`${folder}.build-`), running = new Set<ChildProcess>();
  const result = join(work, plan.fileName);
  const objects = plan.units.map((unit) => join(work, objectName(unit)));
  let isEnded = false;
  const end = () => {
    isEnded = true;
    for (const child of running) endGroup(child);
  };
  const start = async (args: readonly string[]) => {
    if (isEnded) throw new KernelError("Cannot build the kernels: the build was ended");
    await run(compiler, args, running);
  };
  signal?.addEventListener("abort", end);
  process.on("exit", end); // a second signal ends the process where it stands
  if (signal?.aborted) end();
  try {
    const waiting = plan.units.map((unit, i) => {
      const source = join(kernels, plan.folder ?? "cpu", unit.source);
      return [...plan.flags, ...unit.flags, "-c", source, "-o", objects[i]!];
    });
    let failure: { readonly reason: unknown } | undefined;
    let done = 0, told = performance.now();
    const compileWaiting = async () => {
      try {
        for (let args = waiting.pop(); args !== undefined; args = waiting.pop()) {
          await start(args);
          done++;
          if (performance.now() - told < REPORT_INTERVAL) continue;
          told = performance.now();
          onMessage?.(`kernels: ${done} of ${objects.length} files compiled`);
        }
      } catch (reason) {
        failure ??= { reason };
        end();
      }
    };
    await Promise.all(Array.from({ length: Math.max(2, availableParallelism()) }, compileWaiting));
    if (failure !== undefined) throw failure.reason;
    await start([...plan.flags, ...plan.linkFlags, ...objects, "-o", result]);
    return publish(result);
  } finally {
    end();
    process.off("exit", end);
    signal?.removeEventListener("abort", end);
    rmSync(work, { recursive: true, force: true });
  }
}

const contentHash = (bytes: Uint8Array) => sha256(bytes).slice(0, 32);

/**
 * A library that was built into `folder` before, undefined if there is none. Its name carries the hash of its
 * bytes: one that was cut short or changed is passed over, because opening it could kill the process, and so
 * is one that others could have written.
 */
export function builtLibrary(plan: BuildPlan, folder: string): string | undefined {
  if (!existsSync(folder)) return undefined;
  const [stem, extension] = plan.fileName.split(".") as [string, string];
  for (const name of readdirSync(folder).sort()) {
    const hash = name.startsWith(`${stem}-`) && name.endsWith(`.${extension}`)
      ? name.slice(stem.length + 1, -extension.length - 1)
      : undefined;
    const bytes = hash === undefined ? undefined : readPrivate(folder, name);
    if (bytes !== undefined && contentHash(bytes) === hash) return join(folder, name);
  }
  return undefined;
}

/** Moves a finished library into `folder`, synced, under the hash of its bytes. @returns its path there */
export function publishLibrary(plan: BuildPlan, finished: string, folder: string): string {
  const file = openSync(finished, "r+");
  try {
    fsyncSync(file);
  } finally {
    closeSync(file);
  }
  const [stem, extension] = plan.fileName.split(".");
  const path = join(folder, `${stem}-${contentHash(readFileSync(finished))}.${extension}`);
  chmodSync(finished, 0o700);
  renameSync(finished, path);
  return path;
}

/** Builds and downloads under way in this process, by folder. */
const underWay = new Map<string, Promise<string>>();

/** Runs `make` for a folder, unless it is under way: whoever asks meanwhile waits for the same one. */
export function onceAtATime(folder: string, make: () => Promise<string>): Promise<string> {
  const existing = underWay.get(folder);
  if (existing !== undefined) return existing;
  const promise = make().finally(() => underWay.delete(folder));
  underWay.set(folder, promise);
  return promise;
}

/**
 * Builds the library into `folder`, synced and renamed into place under the hash of its bytes.
 *
 * @param options its signal ends the compiler and the build
 * @returns the library's path
 * @throws {KernelError} when the compiler cannot be run or refuses the sources, or was ended
 */
export function buildLibrary(
  plan: BuildPlan,
  kernels: string,
  compiler: string,
  folder: string,
  options?: BuildOptions,
): Promise<string> {
  const publish = (result: string) => publishLibrary(plan, result, folder);
  return onceAtATime(folder, () => {
    mkdirSync(folder, { recursive: true, mode: 0o700 });
    return compile(plan, kernels, compiler, folder, publish, options);
  });
}

/** Source text of wasm_binary.ts for a module and the hash of what it was built from. */
function wasmBinarySource(module: Uint8Array, hash: string): string {
  const base64 = btoa(Array.from(module, (byte) => String.fromCharCode(byte)).join(""));
  return [
    "// Generated by `bun run scripts/build.ts --wasm` from kernels/; do not edit.",
    `export const WASM_SOURCE_HASH = "${hash}";`,
    `export const WASM_BASE64 =\n  "${base64}";`,
    "",
  ].join("\n");
}

/** Builds the WebAssembly module and writes it into `target`. @returns its bytes' count */
export function buildWasm(kernels: string, compiler: string, target: string): Promise<number> {
  return compile(WASM_PLAN, kernels, compiler, target, (result) => {
    const module = readFileSync(result);
    writeFileSync(`${result}.ts`, wasmBinarySource(module, buildHash(WASM_PLAN, kernels)));
    renameSync(`${result}.ts`, target);
    return module.length;
  });
}
