/**
 * Opens the kernels behind one interface: a shared library over Bun's or Deno's FFI, or the same C as
 * WebAssembly. Nothing is opened before `openKernels` is called.
 */
import process from "node:process";
import { KernelError } from "../errors.ts";
import { stopCheck } from "../progress.ts";
import { checkMember, finish } from "./call.ts";
import { IS_REMOTE } from "./location.ts";
import type { Attempt } from "./library.ts";
import { type BackendChoice, BACKENDS } from "../config/names.ts";
import { ABI_VERSION } from "./signatures.ts";
import {
  closable,
  HOST_ARRAYS,
  INSTRUCTION_SETS,
  type InstructionSet,
  type Kernels,
  threadCount,
  type UncheckedKernels,
} from "./kernels.ts";
import type { OpenedLibrary } from "./symbols.ts";

export { ABI_VERSION } from "./signatures.ts";
export type { Attempt } from "./library.ts";
export {
  type ArrayPlaces,
  type ComingArray,
  type InstructionSet,
  type Kernels,
  MAX_THREADS,
  threadCount,
  withThreads,
} from "./kernels.ts";
export { type BackendChoice, BACKENDS } from "../config/names.ts";

/** How the kernels are opened. */
export interface OpenOptions {
  /** Default `auto`. */
  readonly backend?: BackendChoice | undefined;
  /** Path of a library to use instead of any other. */
  readonly library?: string | undefined;
  /** Default: the fastest that the processor has. */
  readonly isa?: InstructionSet | undefined;
  /** Threads of each call: 0, the default, is one per core; WebAssembly has one. No result depends on it. */
  readonly threads?: number | undefined;
  /**
   * SIGHUP, SIGINT and SIGTERM, where the process has handlers for them, also stop a running kernel, which
   * throws an
   * {@linkcode InterruptedError}; a second one ends the process at once. Until the kernels are closed.
   * Default false.
   */
  readonly catchSignals?: boolean | undefined;
  /** Aborted, it ends a build with an {@linkcode InterruptedError}; its reason names the signal. */
  readonly signal?: AbortSignal | undefined;
  /**
   * Called with a line about a build, a download or a fallback. By default nothing is said, except where this
   * package was imported over HTTP, which may download something: there it goes to standard error.
   */
  readonly onMessage?: ((line: string) => void) | undefined;
}

interface Opened {
  readonly library: OpenedLibrary;
  readonly backend: Kernels["backend"];
  readonly path: string;
  readonly origin: string;
  readonly attempts: readonly Attempt[];
  readonly runtime: string;
}

const ISA_NAMES = Object.keys(INSTRUCTION_SETS) as InstructionSet[];

async function kernelsFrom(
  { library, backend, path, origin, attempts, runtime }: Opened,
  { isa, threads = 0, catchSignals = false }: OpenOptions,
): Promise<UncheckedKernels> {
  if (isa !== undefined && library.calls.aq_isa_supported(INSTRUCTION_SETS[isa]) !== 1) {
    const supported = ISA_NAMES.filter((name) =>
      library.calls.aq_isa_supported(INSTRUCTION_SETS[name]) === 1
    );
    library.close();
    throw new KernelError(
      `Cannot use the instruction set "${isa}" of ${path}: supported here are ${supported.join(", ")}`,
    );
  }
  const isaNumber = isa === undefined ? library.calls.aq_best_isa() : INSTRUCTION_SETS[isa];
  const chosen = ISA_NAMES.find((name) => INSTRUCTION_SETS[name] === isaNumber)!;
  if (catchSignals) await startCatching(library, backend);
  const before = stopCheck.run;
  if (catchSignals) {
    stopCheck.run = () => finish("go on", library.calls.aq_stop_status());
  }
  const close = () => {
    if (catchSignals) {
      stopCheck.run = before;
      library.calls.aq_catch_signals(0);
    }
    library.close();
  };
  return closable(path, library.calls, close, {
    backend,
    isa: chosen,
    threads: threadCount(threads, backend),
    library: path,
    runtime,
    abi: ABI_VERSION,
    attempts,
    arrays: HOST_ARRAYS,
    describe: () => `${backend} ${chosen} (${origin}${backend === "native" ? ` ${path}` : ""}), ${runtime}`,
    size: library.size,
    isaNumber,
  });
}

/** Signals that the kernels catch where the process handles them. */
const CAUGHT = ["SIGHUP", "SIGINT", "SIGTERM"] as const;
/** Longest wait for handlers, and time between looks at them. */
const HANDLERS_MILLISECONDS = 1000, LOOK_MILLISECONDS = 5;

/**
 * Has the library catch signals once the system has the process's handlers: Deno sets one some time after
 * `process.on` has returned. WebAssembly catches none.
 */
async function startCatching({ calls }: OpenedLibrary, backend: Kernels["backend"]): Promise<void> {
  const handled = backend === "wasm" ? 0 : CAUGHT.filter((name) => process.listenerCount(name) > 0).length;
  const begin = performance.now();
  while (calls.aq_catch_signals(1) < handled && performance.now() - begin < HANDLERS_MILLISECONDS) {
    calls.aq_catch_signals(0);
    await new Promise((resolve) => setTimeout(resolve, LOOK_MILLISECONDS));
  }
}

const tellByDefault = (line: string) => {
  if (IS_REMOTE) console.error(line);
};

/**
 * Opens the kernels by the documented order: the library or backend that `options` name; the library that
 * `ARROWQUANT_LIBRARY` names; a cached build, or a build made now if there is a compiler; where this package
 * was imported over HTTP instead, the library of its release, fetched before or now, unless
 * `ARROWQUANT_FETCH` is 0; WebAssembly.
 *
 * With `auto` and `cuda` the CUDA library is looked for, too: the one that `ARROWQUANT_CUDA_LIBRARY` names,
 * or a cached build. Where there is none, `auto` uses the CPU silently; where there is one but no GPU, it
 * says so in one line.
 *
 * @throws {KernelError} when what was asked for cannot be had; `auto` always finds something, unless the CUDA
 * library that was named or built does not open
 *
 * @example
 * ```ts
 * const kernels = await openKernels();
 * console.log(kernels.describe());
 * kernels.close();
 * ```
 */
export async function openKernels(options: OpenOptions = {}): Promise<Kernels> {
  const { backend = "auto", onMessage = tellByDefault } = options, doing = "open the kernels";
  checkMember(doing, "backend", backend, BACKENDS);
  if (backend !== "auto" && backend !== "cuda") return await openCpu({ ...options, backend, onMessage });
  const base = await openCpu({ ...options, backend: "cpu", onMessage });
  try {
    const { findDevice } = await import("./cuda/mod.ts");
    const cuda = await findDevice(backend === "cuda", onMessage);
    if (cuda === undefined) return base;
    const { withCuda } = await import("./cuda/kernels.ts");
    return withCuda(base, cuda, onMessage);
  } catch (error) {
    base.close();
    throw error;
  }
}

interface CpuOptions extends OpenOptions {
  readonly backend: "cpu" | "native" | "wasm";
  readonly onMessage: (line: string) => void;
}

async function openCpu(options: CpuOptions): Promise<Kernels> {
  const { backend, library, isa, onMessage } = options;
  threadCount(options.threads ?? 0, "native");
  if (isa !== undefined) checkMember("open the kernels", "the instruction set", isa, ISA_NAMES);
  if (backend === "wasm" && library !== undefined) {
    throw new TypeError('Cannot open the kernels: a library was named, and the backend "wasm" has none');
  }
  // loaded on the first call: an import of this file needs no compilers, downloads or WebAssembly
  const { findLibrary, reasonsOf, runtimeName } = await import("./library.ts");
  const runtime = runtimeName();
  const attempts: Attempt[] = [];
  if (backend !== "wasm") {
    const found = await findLibrary(library, attempts, onMessage, options.signal);
    if (found) {
      return await kernelsFrom({ ...found, backend: "native", attempts, runtime }, options);
    }
    const reasons = reasonsOf(attempts);
    if (backend === "native") {
      throw new KernelError(
        `Cannot open a native kernel library: ${reasons}; name one with ARROWQUANT_LIBRARY, or use the backend "wasm"`,
      );
    }
    onMessage(`kernels: WebAssembly, slower than a native library (${reasons})`);
  }
  const { openWasm } = await import("./wasm.ts");
  const embedded = { library: openWasm(), path: "embedded", origin: "embedded" };
  return await kernelsFrom({ ...embedded, backend: "wasm", attempts, runtime }, options);
}
