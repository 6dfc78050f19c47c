/** Builds the kernels: the native library into the cache, and with --wasm the embedded WebAssembly module. */
import { parseArgs } from "@std/cli/parse-args";
import { readFileSync, writeFileSync } from "node:fs";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { KernelError } from "../lib/errors.ts";
import { buildHash, buildWasm, compilerVersion, WASM_PLAN } from "../lib/native/build.ts";
import { openCuda } from "../lib/native/cuda/mod.ts";
import { openKernels } from "../lib/native/mod.ts";
import { functionsSource, signaturesSource } from "./_signatures.ts";

const HELP =
  `Usage: bun run scripts/build.ts [--wasm [--output FILE] | --signatures | --check-wasm | --check-signatures |
                                --cuda] [--cc COMPILER]

Builds the kernel library for this machine into the cache (done by itself at first use, too).

  --wasm         build lib/native/wasm_binary.ts instead; needs clang and lld
  --signatures   write lib/native/signatures.ts and functions.ts from the headers instead; needs no compiler
  --check-wasm, --check-signatures
                 say whether those files were made from these sources; exit status 1 if not
  --cuda         build the CUDA library instead; needs nvcc, but no device
  --cc COMPILER  the compiler to use (default: CC, cc, gcc, clang; for --wasm: clang; for --cuda: NVCC, nvcc)
  --output FILE  with --wasm: write there instead
`;

const args = parseArgs(process.argv.slice(2), {
  boolean: ["wasm", "check-wasm", "signatures", "check-signatures", "cuda", "help"],
  string: ["cc", "output"],
  unknown: (name: string) => {
    console.error(`Unknown argument ${name}\n\n${HELP}`);
    process.exit(2);
  },
});
const path = (relative: string) => fileURLToPath(new URL(relative, import.meta.url));
const kernels = path("../kernels");
const target = args.output ?? path("../lib/native/wasm_binary.ts");

if (args.help) {
  console.log(HELP);
} else if (args["check-wasm"]) {
  const recorded = /WASM_SOURCE_HASH = "([0-9a-f]*)"/.exec(readFileSync(target, "utf8"))?.[1];
  const current = buildHash(WASM_PLAN, kernels);
  if (recorded !== current) {
    console.error(
      `lib/native/wasm_binary.ts is of other sources (${recorded}, now ${current}): run with --wasm`,
    );
    process.exit(1);
  }
  console.log("lib/native/wasm_binary.ts was built from these sources");
} else if (args.signatures || args["check-signatures"]) {
  for (
    const [name, text] of [["signatures", signaturesSource(kernels)], ["functions", functionsSource(kernels)]]
  ) {
    const file = path(`../lib/native/${name}.ts`);
    if (args.signatures) writeFileSync(file, text!);
    else if (readFileSync(file, "utf8") !== text) {
      console.error(`lib/native/${name}.ts is of other headers: run with --signatures`);
      process.exit(1);
    }
    console.log(`lib/native/${name}.ts is of these headers`);
  }
} else if (args.cuda) {
  if (args.cc !== undefined) process.env["NVCC"] = args.cc;
  try {
    const cuda = await openCuda({ build: true, onMessage: (line) => console.error(line) });
    console.log(cuda.describe());
    cuda.close();
  } catch (error) {
    if (!(error instanceof KernelError)) throw error;
    console.error(error.message);
    process.exit(5);
  }
} else if (args.wasm) {
  const compiler = args.cc ?? "clang";
  const version = await compilerVersion(compiler);
  if (version === undefined) {
    console.error(
      `Cannot build WebAssembly: "${compiler}" does not run; install clang and lld, or name one with --cc`,
    );
    process.exit(5);
  }
  const bytes = await buildWasm(kernels, compiler, target);
  console.log(`${target}: ${bytes} bytes of WebAssembly, ${version}`);
} else {
  if (args.cc !== undefined) process.env["CC"] = args.cc;
  const opened = await openKernels({ backend: "native", onMessage: (line) => console.error(line) });
  console.log(opened.describe());
  opened.close();
}
