/**
 * Kernels whose work a GPU does: the CPU's, with the calls that the CUDA library has replaced by ones of the
 * same arguments. Nothing else of the package knows which of the two it has.
 */
import { KernelError } from "../../errors.ts";
import { type CudaKernels, describeCudaStatus } from "./mod.ts";
import { DeviceArrays } from "./arrays.ts";
import { DeviceMemory } from "./memory.ts";
import { closable, type Kernels, unchecked, type UncheckedKernels } from "../kernels.ts";
import { CUDA_SIGNATURES, SIGNATURES } from "../signatures.ts";
import { kindsOf, type NativeBuffer, type NativeCalls, type ParameterKind } from "../symbols.ts";

/** The header's `AQ_OK`, `AQ_E_MEMORY`, `AQ_E_UNSUPPORTED`, and the first status of the device. */
const OK = 0, E_MEMORY = -101, E_UNSUPPORTED = -102, DEVICE_STATUS = -100;

/** Why the CPU does a call. */
const NO_ROOM = "no room on the device", NO_KERNEL = "no kernel of these sizes on the device";

type Argument = NativeBuffer | number | bigint;
type Call = (...args: Argument[]) => number;

function cudaName(name: string): keyof typeof CUDA_SIGNATURES {
  return name.replace("aq_", "aq_cuda_") as keyof typeof CUDA_SIGNATURES;
}

/** The kinds of parameters that are arrays. */
const isArray = (kind: ParameterKind) => kind === "in" || kind === "out" || kind === "inout";

/**
 * A function of the CUDA library with the parameters of the CPU's. The two differ in three things: where the
 * CPU's has pointers the device's has handles, the last parameters - scratch, `isa`, `threads` - are missing,
 * and a stream comes last.
 *
 * @param without called instead, and told why, where the device has no room or no kernel of these sizes
 */
function onDevice(
  name: string,
  arrays: DeviceArrays,
  without: (why: string, args: readonly Argument[]) => number,
): Call {
  const { memory } = arrays, own = cudaName(name), taken = kindsOf(CUDA_SIGNATURES[own]).length - 1;
  const kinds = kindsOf(SIGNATURES[name as keyof typeof SIGNATURES]).slice(0, taken);
  const kernel = memory.cuda.calls[own] as Call;
  return (...args) => {
    try {
      const handles: Argument[] = [];
      for (const [i, kind] of kinds.entries()) {
        const data = args[i]!;
        if (!isArray(kind)) handles.push(data);
        else if (data === null || (data as ArrayBufferView).byteLength === 0) handles.push(0n);
        else {
          const handle = arrays.handleOf(data as ArrayBufferView, kind !== "out", kind !== "in");
          if (handle === undefined) return without(NO_ROOM, args);
          handles.push(handle);
        }
      }
      let status = kernel(...handles, memory.stream);
      if (status === E_MEMORY) {
        arrays.makeRoom();
        status = kernel(...handles, memory.stream);
        if (status === E_MEMORY) return without(NO_ROOM, args);
      }
      if (status === E_UNSUPPORTED) return without(NO_KERNEL, args);
      if (status <= DEVICE_STATUS) memory.expect(status);
      if (status !== OK) return status;
      for (const [i, kind] of kinds.entries()) {
        if ((kind === "out" || kind === "inout") && handles[i] !== 0n) {
          arrays.wrote(args[i] as ArrayBufferView, handles[i] as bigint);
        }
      }
      return OK;
    } finally {
      arrays.finish();
    }
  };
}

/** A function of the CPU's library on arrays that a device may hold. */
function onHost(name: string, arrays: DeviceArrays, call: Call): Call {
  const kinds = kindsOf(SIGNATURES[name as keyof typeof SIGNATURES]);
  if (!kinds.some(isArray)) return call;
  return (...args) => {
    if (arrays.isHolding) {
      for (const [i, kind] of kinds.entries()) {
        if (isArray(kind) && args[i] !== null) arrays.toHost(args[i] as ArrayBufferView, kind !== "in");
      }
    }
    return call(...args);
  };
}

/**
 * `base` with the work that the first device of `cuda` can do done there. Closing it closes both. A call
 * whose data is at fault returns the CPU's status. A call for which the device has no room, or no kernel of
 * its sizes, is the CPU's, and `onMessage` is told so, once for each function and reason.
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
  const arrays = new DeviceArrays(memory), told = new Set<string>();
  const calls = Object.entries(unchecked(base).calls).map(([name, call]) => {
    const cpu = onHost(name, arrays, call as Call);
    if (!(cudaName(name) in CUDA_SIGNATURES)) return [name, cpu];
    return [
      name,
      onDevice(name, arrays, (why, args) => {
        const line = `cuda: ${why} for ${name.slice(3)}: the CPU does it`;
        if (!told.has(line)) onMessage(line);
        told.add(line);
        return cpu(...args);
      }),
    ];
  });
  const release = () => {
    memory.close();
    cuda.close();
    base.close();
  };
  const all = Object.fromEntries(calls) as NativeCalls;
  const onGpu: UncheckedKernels = closable(cuda.library, all, release, {
    ...unchecked(base),
    arrays,
    device: cuda.describe(),
    describe: () => `${cuda.describe()}; ${base.describe()}`,
  });
  return onGpu;
}
