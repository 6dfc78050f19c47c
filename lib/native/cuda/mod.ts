/**
 * The CUDA library: found and opened like the CPU's, built by `scripts/build.ts --cuda` only. It opens on a
 * machine without a device and says so in one line. docs/cuda.md lists what has been run on a device.
 */
import process from "node:process";
import { KernelError } from "../../errors.ts";
import { buildLibrary, builtLibrary, compilerVersion, cudaPlan } from "../build.ts";
import { closable } from "../kernels.ts";
import {
  type Attempt,
  buildPlace,
  environment,
  openSymbols,
  passing,
  reasonsOf,
  runtimeName,
} from "../library.ts";
import { CUDA_ABI_VERSION, CUDA_SIGNATURES } from "../signatures.ts";
import type { CudaCalls, NativeSize } from "../symbols.ts";

export interface OpenCudaOptions {
  /** Path of a library to use instead of any other. */
  readonly library?: string | undefined;
  /** Told, in one line each, of a build. */
  readonly onMessage?: ((line: string) => void) | undefined;
  /** Build the library with nvcc where none is cached. Default: no, it takes minutes on a small machine. */
  readonly build?: boolean | undefined;
}

/** The opened CUDA library. */
export interface CudaKernels {
  /** Path of the library. */
  readonly library: string;
  /** Devices that can be used; 0 without a device or a driver. */
  readonly devices: number;
  /** One line for logs: the devices, or `no device: ` and the reason. */
  describe(): string;
  /** Releases the library; no call may follow. */
  close(): void;
  [Symbol.dispose](): void;
  /** The functions of kernels/include/arrowquant_cuda.h. */
  readonly calls: CudaCalls;
  /** A count as `calls` take it. */
  size(count: number): NativeSize;
}

/** Room for a line of text from the library, whose longest has about 150 bytes. */
const LINE_BYTES = 512;

/** The line of text that the library writes. */
function line(write: (text: Uint8Array) => number): string {
  const text = new Uint8Array(LINE_BYTES);
  write(text);
  const end = text.indexOf(0);
  return new TextDecoder().decode(text.subarray(0, end < 0 ? LINE_BYTES : end));
}

/** Builds the library into the cache, or finds it there. @returns undefined where it may not be built */
async function cachedLibrary(
  attempts: Attempt[],
  build: boolean,
  onMessage: (line: string) => void,
): Promise<string | undefined> {
  const plan = cudaPlan(), pass = passing(attempts);
  const place = buildPlace("CUDA library", "cuda-", plan, pass);
  if (place === undefined) return undefined;
  const { kernels, folder } = place;
  if (process.platform !== "linux") {
    return pass("build", `it is built on Linux only, this is ${process.platform}`);
  }
  const cached = builtLibrary(plan, folder);
  if (cached !== undefined) return cached;
  if (!build) return pass(`cached build in ${folder}`, "none: run scripts/build.ts --cuda");
  const compiler = environment("NVCC") || "nvcc";
  const version = await compilerVersion(compiler);
  if (version === undefined) return pass("build", `no compiler: "${compiler}" does not run`);
  onMessage(`CUDA kernels: building with ${compiler}, once for this version …`);
  return await buildLibrary(plan, kernels, compiler, folder);
}

/**
 * Opens the CUDA library: the one that `options` name, the one that `ARROWQUANT_CUDA_LIBRARY` names, a cached
 * build, and with `build` one made now. Without a device it opens, too: `devices` is 0 then and `describe()`
 * says why.
 *
 * @throws {KernelError} when there is no library, or it cannot be built or opened
 */
export async function openCuda(options: OpenCudaOptions = {}): Promise<CudaKernels> {
  const attempts: Attempt[] = [];
  const path = await libraryPath(options, attempts);
  if (path === undefined) {
    throw new KernelError(
      `Cannot open the CUDA kernels: ${reasonsOf(attempts)}; name a library with ARROWQUANT_CUDA_LIBRARY`,
    );
  }
  return await openAt(path);
}

/**
 * The CUDA library with a device that can be used.
 *
 * @param wanted whether it is an error that there is none
 * @returns undefined, where none is wanted, without a library and, with a line, without such a device
 * @throws {KernelError} when one is wanted and there is none, or the library does not open
 */
export async function findDevice(
  wanted: boolean,
  onMessage: (line: string) => void,
): Promise<CudaKernels | undefined> {
  const attempts: Attempt[] = [];
  const path = await libraryPath({}, attempts);
  const fail = (reason: string) =>
    new KernelError(`Cannot use the backend "cuda": ${reason}; use the backend "cpu", or "auto"`);
  if (path === undefined) {
    if (wanted) throw fail(reasonsOf(attempts));
    return undefined;
  }
  const cuda = await openAt(path), reason = reasonAgainst(cuda);
  if (reason === undefined) return cuda;
  cuda.close();
  if (wanted) throw fail(reason);
  onMessage(`${reason}; the CPU does the work`);
  return undefined;
}

/** Why nothing can run on the first device: there is none, it is full, or another program's alone. */
function reasonAgainst(cuda: CudaKernels): string | undefined {
  if (cuda.devices === 0) return cuda.describe();
  const stream = new BigUint64Array(1), status = cuda.calls.aq_cuda_create_stream(0, stream);
  if (status !== 0) return `${cuda.describe()}: ${describeCudaStatus(cuda, status)}`;
  cuda.calls.aq_cuda_free_stream(stream[0]!);
  return undefined;
}

async function libraryPath(options: OpenCudaOptions, attempts: Attempt[]): Promise<string | undefined> {
  return options.library ?? (environment("ARROWQUANT_CUDA_LIBRARY") || undefined) ??
    await cachedLibrary(attempts, options.build ?? false, options.onMessage ?? (() => {}));
}

async function openAt(path: string): Promise<CudaKernels> {
  const abi = (calls: CudaCalls) => calls.aq_cuda_abi_version();
  const library = await openSymbols(path, CUDA_SIGNATURES, abi, CUDA_ABI_VERSION);
  const count = new Int32Array(1);
  library.calls.aq_cuda_device_count(count);
  const devices = count[0]!;
  const lines = Array.from(
    { length: Math.max(devices, 1) },
    (_, device) =>
      line((text) => library.calls.aq_cuda_describe_device(device, text, library.size(text.length))),
  );
  return closable(path, library.calls, library.close, {
    library: path,
    devices,
    describe: () => `cuda: ${lines.join("; ")} (${path}), ${runtimeName()}`,
    size: library.size,
  });
}

/** The library's description of a status. */
export function describeCudaStatus(cuda: CudaKernels, status: number): string {
  return line((text) => cuda.calls.aq_cuda_describe_status(status, text, cuda.size(text.length)));
}
