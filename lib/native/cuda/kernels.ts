/**
 * Kernels whose work a GPU does: the CPU's, with the calls that the CUDA library has replaced by ones of the same
 * arguments. Nothing else of the package knows which of the two it has.
 */
import { KernelError } from "../../errors.ts";
import { type CudaKernels, describeCudaStatus } from "./mod.ts";
import { type DeviceBuffer, DeviceMemory } from "./memory.ts";
import { closable, type Kernels, unchecked, type UncheckedKernels } from "../kernels.ts";
import { CUDA_SIGNATURES, SIGNATURES } from "../signatures.ts";
import { kindsOf, type NativeBuffer, type NativeCalls } from "../symbols.ts";

/** The functions that a GPU takes over: `aq_…` of the CPU's library that the CUDA library has as `aq_cuda_…`. */
const TAKEN_OVER = Object.keys(SIGNATURES).filter((name) => cudaName(name) in CUDA_SIGNATURES);

/** The header's `AQ_OK` and `AQ_E_MEMORY`, and the first status that is the device's and not the arguments'. */
const OK = 0, E_MEMORY = -101, DEVICE_STATUS = -100;

type Argument = NativeBuffer | number | bigint;
type Call = (...args: Argument[]) => number;

function cudaName(name: string): keyof typeof CUDA_SIGNATURES {
  return name.replace("aq_", "aq_cuda_") as keyof typeof CUDA_SIGNATURES;
}

/**
 * A function of the CUDA library with the parameters of the CPU's. The two differ in three things: where the
 * CPU's has pointers the device's has handles, the last parameters - scratch, `isa`, `threads` - are missing, and a
 * stream comes last.
 *
 * @param without called instead where the device has no room
 */
function onDevice(name: string, memory: DeviceMemory, without: Call): Call {
  const own = cudaName(name), taken = kindsOf(CUDA_SIGNATURES[own]).length - 1;
  const kinds = kindsOf(SIGNATURES[name as keyof typeof SIGNATURES]).slice(0, taken);
  const kernel = memory.cuda.calls[own] as Call;
  return (...args) => {
    const borrowed: DeviceBuffer[] = [];
    try {
      const handles: Argument[] = [];
      for (const [i, kind] of kinds.entries()) {
        if (kind !== "in" && kind !== "out" && kind !== "inout") {
          handles.push(args[i]!);
          continue;
        }
        const data = args[i] as NativeBuffer;
        const buffer = data === null ? undefined : memory.borrow(data.byteLength);
        if (buffer !== undefined) borrowed.push(buffer);
        else if (data !== null) return without(...args);
        if (data !== null && kind !== "out") memory.upload(data, buffer!.handle);
        handles.push(buffer?.handle ?? 0n);
      }
      let status = kernel(...handles, memory.stream);
      if (status === E_MEMORY) {
        memory.trim();
        status = kernel(...handles, memory.stream);
        if (status === E_MEMORY) return without(...args);
      }
      if (status <= DEVICE_STATUS) memory.expect(status);
      if (status !== OK) return status;
      for (const [i, kind] of kinds.entries()) {
        if ((kind === "out" || kind === "inout") && args[i] !== null) {
          memory.download(handles[i] as bigint, args[i] as ArrayBufferView);
        }
      }
      return OK;
    } finally {
      for (const buffer of borrowed) memory.giveBack(buffer);
    }
  };
}

/**
 * `base` with the work that the first device of `cuda` can do done there. Closing it closes both. A call whose data
 * is at fault returns the CPU's status. A call for which the device has no room is the CPU's, and `onMessage` is told
 * so, once for each function.
 *
 * @throws {KernelError} when the device cannot be used; in a call, when it fails
 */
export function withCuda(
  base: Kernels,
  cuda: CudaKernels,
  onMessage: (line: string) => void = () => {},
): Kernels {
  const memory = new DeviceMemory(cuda, (status) => {
    const reason = describeCudaStatus(cuda, status);
    return new KernelError(
      `Cannot go on with the GPU: ${reason}; a run that keeps what it has done goes on with --resume; the backend "cpu" needs none`,
      { status },
    );
  });
  const { calls } = unchecked(base), told = new Set<string>();
  const taken = TAKEN_OVER.map((name) => {
    const cpu = calls[name as keyof NativeCalls] as Call;
    return [
      name,
      onDevice(name, memory, (...args) => {
        if (!told.has(name)) onMessage(`cuda: no room on the device for ${name.slice(3)}: the CPU does it`);
        told.add(name);
        return cpu(...args);
      }),
    ];
  });
  const release = () => {
    memory.close();
    cuda.close();
    base.close();
  };
  const onGpu: UncheckedKernels = closable(
    cuda.library,
    { ...calls, ...Object.fromEntries(taken) },
    release,
    {
      ...unchecked(base),
      device: cuda.describe(),
      describe: () => `${cuda.describe()}; ${base.describe()}`,
    },
  );
  return onGpu;
}
