/** Builds the kernels: the native library into the cache, and with --wasm the embedded WebAssembly module. */
import { copyFileSync, readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { KernelError } from "../lib/errors.ts";
import { buildHash, buildWasm, compilerVersion, WASM_PLAN } from "../lib/native/build.ts";
import { openCuda } from "../lib/native/cuda/mod.ts";
import { openKernels } from "../lib/native/mod.ts";
import type { Arguments, Usage } from "./_command/options.ts";
import { defineCommand } from "./_command/run.ts";
import { print } from "./_command/text.ts";
import { functionsSource, signaturesSource } from "./_build/signatures.ts";

const USAGE = {
  name: "build.ts",
  operands: "",
  about: "Builds the kernel library for this machine into the cache (done by itself at first use, too).",
  options: {
    "--wasm": "build lib/native/wasm_binary.ts instead; needs clang and lld",
    "--signatures":
      "write lib/native/signatures.ts and functions.ts from the headers instead; needs no compiler",
    "--check-wasm": "say whether that file was made from these sources; exit status 1 if not",
    "--check-signatures": "say whether those files were made from these headers; exit status 1 if not",
    "--cuda": "build the CUDA library instead; needs nvcc, but no device",
    "--cc COMPILER":
      "the compiler to use (default: CC, cc, gcc, clang; for --wasm: clang; for --cuda: NVCC, nvcc)",
    "--output FILE": "with --wasm: write there instead; of the library: a copy of it",
  },
} as const satisfies Usage;

const path = (relative: string) => fileURLToPath(new URL(relative, import.meta.url));
const kernels = path("../kernels");
const onMessage = (line: string) => console.error(line);

async function run(parsed: Arguments<typeof USAGE>): Promise<number | void> {
  const { flags, values: { cc, output: copy, output = path("../lib/native/wasm_binary.ts") } } = parsed;
  parsed.operands();
  if (flags["check-wasm"]) return checkWasm(output);
  if (flags.signatures || flags["check-signatures"]) return signatures(flags.signatures);
  if (flags.wasm) {
    const compiler = cc ?? "clang", version = await compilerVersion(compiler);
    if (version === undefined) {
      throw new KernelError(
        `Cannot build WebAssembly: "${compiler}" does not run; install clang and lld, or name one with --cc`,
      );
    }
    const bytes = await buildWasm(kernels, compiler, output);
    return print(`${output}: ${bytes} bytes of WebAssembly, ${version}`);
  }
  if (cc !== undefined) process.env[flags.cuda ? "NVCC" : "CC"] = cc;
  using opened = flags.cuda
    ? await openCuda({ build: true, onMessage })
    : await openKernels({ backend: "native", onMessage });
  if (copy !== undefined && !flags.cuda) copyFileSync(opened.library, copy);
  print(opened.describe());
}

function checkWasm(target: string): number | void {
  const recorded = /WASM_SOURCE_HASH = "([0-9a-f]*)"/.exec(readFileSync(target, "utf8"))?.[1];
  const current = buildHash(WASM_PLAN, kernels);
  if (recorded === current) return print("lib/native/wasm_binary.ts was built from these sources");
  onMessage(`lib/native/wasm_binary.ts is of other sources (${recorded}, now ${current}): run with --wasm`);
  return 1;
}

function signatures(areWritten: boolean): number | void {
  const texts = { signatures: signaturesSource(kernels), functions: functionsSource(kernels) };
  for (const [name, text] of Object.entries(texts)) {
    const file = path(`../lib/native/${name}.ts`);
    if (areWritten) writeFileSync(file, text);
    else if (readFileSync(file, "utf8") !== text) {
      onMessage(`lib/native/${name}.ts is of other headers: run with --signatures`);
      return 1;
    }
    print(`lib/native/${name}.ts is of these headers`);
  }
}

export const main = defineCommand(USAGE, run);
if (import.meta.main) await main();
