/**
 * Finds the native library: where it is looked for, in which order, and why each place was passed over. Every
 * step is recorded, so that nobody has to guess which kernels run.
 */
import { existsSync } from "node:fs";
import { homedir } from "node:os";
import { isAbsolute, join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { InterruptedError, KernelError } from "../errors.ts";
import {
  buildHash,
  buildLibrary,
  type BuildPlan,
  builtLibrary,
  compilerVersion,
  nativePlan,
} from "./build.ts";
import { openInBun } from "./bun.ts";
import { type DenoPermission, denoRuntime, isAllowed, openInDeno } from "./deno.ts";
import { fetchedLibrary, fetchLibrary, type FetchRequest } from "./fetch.ts";
import { IS_REMOTE, PACKAGE_ROOT } from "./location.ts";
import { ABI_VERSION, SIGNATURES } from "./signatures.ts";
import { checkNotWorldWritable, checkPrivateFolders } from "../files/ownership.ts";
import type { OpenedLibrary, OpenedSymbols, SymbolTable } from "./symbols.ts";
import { WASM_SOURCE_HASH } from "./wasm_binary.ts";

/** One place that was tried and what came of it. */
export interface Attempt {
  readonly candidate: string;
  readonly outcome: string;
}

export interface FoundLibrary {
  readonly library: OpenedLibrary;
  readonly path: string;
  /** Where it was found, in words. */
  readonly origin: string;
}

/** An environment variable, undefined where it is unset or must not be read. */
export function environment(name: string): string | undefined {
  return isAllowed({ name: "env", variable: name }) ? process.env[name] : undefined;
}

export function runtimeName(): string {
  const { Bun } = globalThis as { Bun?: { version: string } };
  const deno = denoRuntime();
  if (Bun !== undefined) return `bun ${Bun.version}`;
  if (deno !== undefined) return `deno ${deno.version.deno}`;
  return `node ${process.versions.node}`;
}

/** The first line of what was thrown. */
export const message = (error: unknown) =>
  (error instanceof Error ? error.message : String(error)).split("\n")[0]!;

/**
 * Opens a library and checks its ABI number before anything else is called.
 *
 * @throws {KernelError} when it cannot be opened, or is of another ABI
 */
export async function openSymbols<Table extends SymbolTable>(
  path: string,
  symbols: Table,
  abi: (calls: OpenedSymbols<Table>["calls"]) => number,
  wanted: number,
): Promise<OpenedSymbols<Table>> {
  if (!existsSync(path)) throw new KernelError(`Cannot open the kernel library "${path}": no such file`);
  const inBun = (globalThis as { Bun?: unknown }).Bun !== undefined;
  if (!hasFfi()) throw new KernelError(`Cannot open the kernel library "${path}": ${NO_FFI}`);
  checkNotWorldWritable(path);
  let library: OpenedSymbols<Table>;
  try {
    library = inBun ? await openInBun(path, symbols) : openInDeno(path, symbols);
  } catch (cause) {
    throw new KernelError(`Cannot open the kernel library "${path}": ${message(cause)}`, { cause });
  }
  const version = abi(library.calls);
  if (version !== wanted) {
    library.close();
    throw new KernelError(`Cannot use the kernel library "${path}": its ABI is ${version}, wanted ${wanted}`);
  }
  return library;
}

/** `openSymbols` of the CPU's library. */
export function openLibrary(path: string): Promise<OpenedLibrary> {
  return openSymbols(path, SIGNATURES, (calls) => calls.aq_abi_version(), ABI_VERSION);
}

/** The kernels' sources beside this package, undefined where there are none. */
function sourceFolder(): string | undefined {
  if (PACKAGE_ROOT.protocol !== "file:") return undefined;
  const folder = fileURLToPath(new URL("kernels", PACKAGE_ROOT));
  return existsSync(join(folder, "include", "arrowquant.h")) ? folder : undefined;
}

/**
 * Where builds are kept: `$XDG_CACHE_HOME/arrowquant`, or `~/.cache/arrowquant`; undefined where neither is
 * an absolute path, because native code is never loaded from wherever a command happens to run.
 */
export function cacheFolder(): string | undefined {
  const xdg = environment("XDG_CACHE_HOME");
  if (xdg && isAbsolute(xdg)) return join(xdg, "arrowquant");
  const home = environment("HOME") || (isAllowed({ name: "sys", kind: "homedir" }) ? homedir() : "");
  return isAbsolute(home) ? join(home, ".cache", "arrowquant") : undefined;
}

/** Compilers in order of preference. */
export function compilerCandidates(): string[] {
  const chosen = environment("CC");
  return [...(chosen ? [chosen] : []), "cc", "gcc", "clang"];
}

/** The first compiler that answers. */
export async function findCompiler(): Promise<{ command: string; version: string } | undefined> {
  for (const command of compilerCandidates()) {
    const version = await compilerVersion(command);
    if (version !== undefined) return { command, version };
  }
  return undefined;
}

/** Whether this runtime can open a library. */
const hasFfi = () => (globalThis as { Bun?: unknown }).Bun !== undefined || denoRuntime() !== undefined;

/** Records that a place was passed over. */
export const passing = (attempts: Attempt[]) => (candidate: string, outcome: string): undefined => {
  attempts.push({ candidate, outcome });
};

/** Why every place was passed over. */
export const reasonsOf = (attempts: readonly Attempt[]) =>
  attempts.map(({ candidate, outcome }) => `${candidate}: ${outcome}`).join("; ");

const NO_FFI = "this runtime has no FFI, use Bun or Deno";
const NO_CACHE = "no place for it: neither XDG_CACHE_HOME nor HOME is an absolute path";

/** The kernels' sources and the cache's folder for a build; undefined where nothing can be built. */
export function buildPlace(
  subject: string,
  prefix: string,
  plan: BuildPlan,
  pass: ReturnType<typeof passing>,
): { readonly kernels: string; readonly folder: string } | undefined {
  const denied = (["ffi", "read", "env", "run", "write"] as const).filter((name) => !isAllowed({ name }));
  if (denied.length > 0) {
    return pass(subject, `needs ${denied.map((name) => `--allow-${name}`).join(" ")}`);
  }
  if (!hasFfi()) return pass(subject, NO_FFI);
  const kernels = sourceFolder();
  if (kernels === undefined) return pass("build", "the kernels' sources are not beside this module");
  // The npm package has no sources of CUDA.
  if (!existsSync(join(kernels, plan.folder ?? "cpu"))) {
    return pass(
      "build",
      `the sources of the ${subject} are not beside this module: take a checkout of the project`,
    );
  }
  const cache = cacheFolder();
  if (cache === undefined) return pass("build", NO_CACHE);
  const hash = buildHash(plan, kernels).slice(0, 16);
  const folder = join(cache, `${prefix}${process.platform}-${process.arch}-${hash}`);
  try {
    checkPrivateFolders(cache, folder);
  } catch (error) {
    return pass("build", message(error));
  }
  return { kernels, folder };
}

/**
 * The native library by the documented order: `chosen`, `ARROWQUANT_LIBRARY`; then, of a package on this
 * machine, a cached build and a build made now; of one imported over HTTP, the release's library, fetched
 * before or now. A library that was named and cannot be used is an error; the others are passed over and
 * recorded.
 *
 * @throws {KernelError} when a library that was named cannot be opened, or `ARROWQUANT_FETCH` is neither 0
 * nor 1
 */
export async function findLibrary(
  chosen: string | undefined,
  attempts: Attempt[],
  onMessage: (line: string) => void,
  signal?: AbortSignal,
): Promise<FoundLibrary | undefined> {
  if (chosen !== undefined) return { library: await openLibrary(chosen), path: chosen, origin: "chosen" };
  const named = environment("ARROWQUANT_LIBRARY");
  if (named) return { library: await openLibrary(named), path: named, origin: "ARROWQUANT_LIBRARY" };
  return IS_REMOTE ? await findFetched(attempts, onMessage) : await findBuilt(attempts, onMessage, signal);
}

async function findFetched(
  attempts: Attempt[],
  onMessage: (line: string) => void,
): Promise<FoundLibrary | undefined> {
  const pass = (outcome: string) => passing(attempts)(`release ${PACKAGE_ROOT.href}`, outcome);
  if (!hasFfi()) return pass(NO_FFI);
  const needed: DenoPermission[] = [
    { name: "env", variable: "ARROWQUANT_FETCH" },
    { name: "env", variable: "HOME" },
    { name: "net", host: PACKAGE_ROOT.host },
  ];
  const setting = environment("ARROWQUANT_FETCH") || "1";
  if (setting !== "0" && setting !== "1") {
    throw new KernelError(
      `Cannot open the kernels: ARROWQUANT_FETCH must be 0 or 1, got ${JSON.stringify(setting)}`,
    );
  }
  if (setting === "0") return pass("ARROWQUANT_FETCH is 0");
  const cache = cacheFolder();
  for (const name of ["ffi", "read", "write"] as const) {
    needed.push(cache === undefined ? { name } : { name, path: cache });
  }
  const flags = needed.filter((permission) => !isAllowed(permission)).map(({ name, host }) =>
    `--allow-${name}${host === undefined ? "" : `=${host}`}`
  );
  if (flags.length > 0) return pass(`needs ${[...new Set(flags)].join(" ")}`);
  if (cache === undefined) return pass(NO_CACHE);
  const request: FetchRequest = {
    release: PACKAGE_ROOT,
    platform: process.platform,
    architecture: process.arch,
    abi: ABI_VERSION,
    kernels: WASM_SOURCE_HASH,
    plan: nativePlan(process.platform, process.arch),
    cache,
  };
  try {
    const before = fetchedLibrary(request);
    const path = before ?? await fetchLibrary(request, onMessage);
    const library = await openLibrary(path);
    return { library, path, origin: before === undefined ? "fetched now" : "fetched before" };
  } catch (error) {
    return pass(message(error));
  }
}

async function findBuilt(
  attempts: Attempt[],
  onMessage: (line: string) => void,
  signal?: AbortSignal,
): Promise<FoundLibrary | undefined> {
  const plan = nativePlan(process.platform, process.arch), pass = passing(attempts);
  const place = buildPlace("native library", "", plan, pass);
  if (place === undefined) return undefined;
  const { kernels, folder } = place;
  try {
    const cached = builtLibrary(plan, folder);
    if (cached !== undefined) {
      return { library: await openLibrary(cached), path: cached, origin: "cached build" };
    }
  } catch (error) {
    pass(`cached build in ${folder}`, message(error));
  }
  const compiler = await findCompiler();
  if (compiler === undefined) return pass("build", `no compiler: tried ${compilerCandidates().join(", ")}`);
  try {
    onMessage(`kernels: building with ${compiler.command} (${compiler.version}), once for this version …`);
    const path = await buildLibrary(plan, kernels, compiler.command, folder, { signal, onMessage });
    return { library: await openLibrary(path), path, origin: "new build" };
  } catch (error) {
    if (signal?.aborted) {
      const reason = String(signal.reason);
      throw new InterruptedError(`Stopped by ${reason}: the kernels are built at the next start`, reason);
    }
    onMessage(`kernels: the build failed: ${message(error)}`);
    return pass(`build with ${compiler.command}`, message(error));
  }
}
