/**
 * Kernels whose quantization runs on a GPU: the CPU's, with the calls that quantize replaced by ones of the
 * same arguments and the same bytes. Nothing else of the package knows which of the two it has.
 */
import { KernelError } from "../../errors.ts";
import { type CudaKernels, describeCudaStatus } from "./mod.ts";
import { DeviceMemory } from "./memory.ts";
import { closable, type Kernels, unchecked, type UncheckedKernels } from "../kernels.ts";
import { SIGNATURES } from "../signatures.ts";
import { kindsOf, type NativeBuffer, type NativeCalls } from "../symbols.ts";

/** The functions that a GPU takes over: `aq_…` of the CPU's library, `aq_cuda_…` of the CUDA library. */
const QUANTIZING = ["quantize_round", "quantize_clip", "quantize_two_level"] as const;

/** The header's `AQ_OK`, and the first status that is the device's and not the arguments'. */
const OK = 0, DEVICE_STATUS = -100;

type Argument = NativeBuffer | number | bigint;

/**
 * A function of the CUDA library with the parameters of the CPU's. The two differ in three things: where the
 * CPU's has pointers the device's has handles, `isa` and `threads` are missing, and a stream comes last.
 *
 * @param slots buffers by a parameter's position, kept from call to call and grown when a call needs more
 */
function onDevice(
  name: (typeof QUANTIZING)[number],
  memory: DeviceMemory,
  slots: { buffer: bigint; bytes: number }[],
): (...args: Argument[]) => number {
  const kinds = kindsOf(SIGNATURES[`aq_${name}`]).slice(0, -2);
  const kernel = memory.cuda.calls[`aq_cuda_${name}`] as (...args: Argument[]) => number;
  const room = (i: number, bytes: number) => {
    const slot = slots[i] ??= { buffer: 0n, bytes: 0 };
    if (slot.buffer === 0n || slot.bytes < bytes) {
      if (slot.buffer !== 0n) memory.free(slot.buffer);
      [slot.buffer, slot.bytes] = [0n, 0];
      [slot.buffer, slot.bytes] = [memory.allocate(bytes), bytes];
    }
    return slot.buffer;
  };
  return (...args) => {
    const handles = kinds.map((kind, i): Argument => {
      if (kind !== "in" && kind !== "out") return args[i]!;
      const data = args[i] as NativeBuffer;
      if (data === null) return 0n;
      const buffer = room(i, data.byteLength);
      if (kind === "in") memory.upload(data, buffer);
      return buffer;
    });
    const status = kernel(...handles, memory.stream);
    if (status <= DEVICE_STATUS) memory.expect(status);
    if (status !== OK) return status;
    kinds.forEach((kind, i) => {
      if (kind === "out" && args[i] !== null) {
        memory.download(handles[i] as bigint, args[i] as ArrayBufferView);
      }
    });
    return OK;
  };
}

/**
 * `base`, quantizing on the first device of `cuda`: round to nearest, clip search and two-level scales.
 * Closing it closes both. A call whose data is at fault returns the CPU's status.
 *
 * @throws {KernelError} when the device cannot be used; in a call, when it fails or has no room left
 */
export function withCuda(base: Kernels, cuda: CudaKernels): Kernels {
  const memory = new DeviceMemory(cuda, (status) => {
    const reason = describeCudaStatus(cuda, status);
    return new KernelError(`Cannot quantize on the GPU: ${reason}; the backend "cpu" needs none`, { status });
  });
  const slots: { buffer: bigint; bytes: number }[] = [];
  const quantizing = QUANTIZING.map((name) => [`aq_${name}`, onDevice(name, memory, slots)]);
  const calls: NativeCalls = { ...unchecked(base).calls, ...Object.fromEntries(quantizing) };
  const release = () => {
    memory.close();
    cuda.close();
    base.close();
  };
  const onGpu: UncheckedKernels = closable(cuda.library, calls, release, {
    ...unchecked(base),
    device: cuda.describe(),
    describe: () => `${cuda.describe()}; ${base.describe()}`,
  });
  return onGpu;
}
