/**
 * Builds the kernels with the system's compiler: what is compiled with which flags, the hash that names a build,
 * and the commands. Finding and opening what was built is library.ts's.
 */
import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { KernelError } from "../errors.ts";

const COMMON_FLAGS = [
  "-std=c11",
  "-O3",
  "-Wall",
  "-Wextra",
  "-ffp-contract=off", // a fused multiply-add would round once where the oracle rounds twice
  "-fno-math-errno", // square roots are instructions, not calls
  "-fvisibility=hidden",
];

/** One source file of the library and the flags only it gets. */
interface Unit {
  readonly source: string;
  readonly flags: readonly string[];
}

/** What is built for a processor. */
export interface BuildPlan {
  readonly units: readonly Unit[];
  readonly flags: readonly string[];
  readonly linkFlags: readonly string[];
  readonly fileName: string;
}

/** The plan for a platform (`linux`, `darwin`, …) and architecture (`x64`, `arm64`, …) in Node's words. */
export function nativePlan(platform: string, architecture: string): BuildPlan {
  const units: Unit[] = ["api.c", "model_api.c", "scalar.c", "model_scalar.c"].map((source) => ({
    source,
    flags: [],
  }));
  const flags = [...COMMON_FLAGS, "-fPIC", "-pthread"];
  if (architecture === "x64") {
    flags.push("-DAQ_BUILD_AVX2", "-DAQ_BUILD_AVX512");
    units.push({ source: "avx2.c", flags: ["-mavx2", "-mfma", "-mf16c"] });
    units.push({
      source: "avx512.c",
      flags: ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"],
    });
  } else if (architecture === "arm64") {
    flags.push("-DAQ_BUILD_NEON");
    units.push({ source: "neon.c", flags: [] });
  }
  return {
    units,
    flags,
    linkFlags: ["-shared", "-pthread"],
    fileName: platform === "darwin" ? "libarrowquant.dylib" : "libarrowquant.so",
  };
}

/** The plan of the embedded WebAssembly module: one command, clang and lld. */
export const WASM_PLAN: BuildPlan = {
  units: ["api.c", "model_api.c", "scalar.c", "model_scalar.c", "simd128.c"].map((source) => ({
    source,
    flags: [],
  })),
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

/** The files of kernels/ that a build reads, by path from there, in a fixed order. */
export function kernelSources(kernels: string): Map<string, Uint8Array> {
  const sources = new Map<string, Uint8Array>();
  for (const folder of ["include", "cpu"]) {
    for (const name of readdirSync(join(kernels, folder)).sort()) {
      if (/\.[ch]$/.test(name)) sources.set(`${folder}/${name}`, readFileSync(join(kernels, folder, name)));
    }
  }
  return sources;
}

/** SHA-256, in hex, of a plan and every byte it compiles. */
export function buildHash(plan: BuildPlan, kernels: string, compiler = ""): string {
  const hash = createHash("sha256");
  hash.update(JSON.stringify([plan, compiler]));
  for (const [name, bytes] of kernelSources(kernels)) {
    hash.update(`\0${name}\0${bytes.length}\0`).update(bytes);
  }
  return hash.digest("hex");
}

function run(command: string, args: readonly string[]): Promise<void> {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, { stdio: ["ignore", "ignore", "pipe"] });
    let errors = "";
    child.stderr.on("data", (chunk) => errors += chunk);
    child.on("error", (cause) => reject(new KernelError(`Cannot run the compiler "${command}"`, { cause })));
    child.on("close", (code) => {
      if (code === 0) return resolve();
      const first = errors.split("\n").find((line) => /error/i.test(line)) ?? errors.split("\n")[0];
      const reason = `Cannot build the kernels: ${command} ended with ${code}: ${first}`;
      reject(new KernelError(reason, { cause: errors }));
    });
  });
}

/** Whether a compiler answers, and with what version line; undefined if it is not there. */
export async function compilerVersion(command: string): Promise<string | undefined> {
  return await new Promise((resolve) => {
    let child;
    try {
      child = spawn(command, ["--version"], { stdio: ["ignore", "pipe", "ignore"] });
    } catch {
      return resolve(undefined); // Deno throws at once where others emit an error
    }
    let text = "";
    child.stdout.on("data", (chunk) => text += chunk);
    child.on("error", () => resolve(undefined));
    child.on("close", (code) => resolve(code === 0 ? text.split("\n")[0]!.trim() : undefined));
  });
}

/**
 * Compiles a plan into `folder/<fileName>`. Work happens in a folder beside it and the result is renamed into
 * place, so that a library somebody has open is never written over and a stopped build leaves nothing half-made.
 *
 * @returns the library's path
 * @throws {KernelError} when the compiler cannot be run or refuses the sources
 */
export async function build(
  plan: BuildPlan,
  kernels: string,
  compiler: string,
  folder: string,
): Promise<string> {
  const work = `${folder}.${process.pid}.tmp`;
  mkdirSync(work, { recursive: true });
  try {
    const result = join(work, plan.fileName);
    const objects = plan.units.map((unit) => join(work, unit.source.replace(/\.c$/, ".o")));
    await Promise.all(
      plan.units.map((unit, i) =>
        run(compiler, [
          ...plan.flags,
          ...unit.flags,
          "-c",
          join(kernels, "cpu", unit.source),
          "-o",
          objects[i]!,
        ])
      ),
    );
    await run(compiler, [...plan.flags, ...plan.linkFlags, ...objects, "-o", result]);
    mkdirSync(folder, { recursive: true });
    const path = join(folder, plan.fileName);
    renameSync(result, path);
    return path;
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}

/** Source text of wasm_binary.ts for a module and the hash of what it was built from. */
export function wasmBinarySource(module: Uint8Array, hash: string): string {
  const base64 = btoa(Array.from(module, (byte) => String.fromCharCode(byte)).join(""));
  return [
    "// Generated by `bun run scripts/build.ts --wasm` from kernels/; do not edit.",
    `export const WASM_SOURCE_HASH = "${hash}";`,
    `export const WASM_BASE64 =\n  "${base64}";`,
    "",
  ].join("\n");
}

/** Builds the WebAssembly module and writes it into `target`. @returns its bytes' count */
export async function buildWasm(kernels: string, compiler: string, target: string): Promise<number> {
  const folder = `${target}.build`;
  try {
    const path = await build(WASM_PLAN, kernels, compiler, folder);
    const module = readFileSync(path);
    const temporary = `${target}.${process.pid}.tmp`;
    writeFileSync(temporary, wasmBinarySource(module, buildHash(WASM_PLAN, kernels)));
    renameSync(temporary, target);
    return module.length;
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}
