/** The CUDA library with a device, and with calls that a test answers in its place. */
import { type CudaKernels, openCuda } from "../../lib/native/cuda/mod.ts";

/** The header's `AQ_E_MEMORY`, and `AQ_E_CUDA` less the runtime's number of a failed launch. */
export const E_MEMORY = -101, LOST = -1719;

/** The library with a device, for a machine without one the emulated one; Bun alone computes. */
export async function device(): Promise<CudaKernels | undefined> {
  if (!("Bun" in globalThis)) return undefined;
  try {
    const cuda = await openCuda();
    if (cuda.devices > 0) return cuda;
    console.log(`skipped: ${cuda.describe()}`);
    cuda.close();
  } catch (error) {
    const reason = (error as Error).message;
    if (!reason.includes("scripts/build.ts --cuda") && !reason.includes("on Linux only")) throw error;
    console.log(`skipped: ${reason}`);
  }
  return undefined;
}

type Call = (...args: unknown[]) => number;

/**
 * The library with calls that `statusOf` answers in its place, told each call's number from 1 on and its
 * arguments. The bytes of its buffers are counted.
 *
 * @param most bytes of all buffers
 */
export function answered(
  cuda: CudaKernels,
  statusOf: (name: string, number: number, args: readonly unknown[]) => number | undefined,
  most = Infinity,
) {
  const all = cuda.calls as unknown as Record<string, Call>, buffers = new Map<unknown, number>();
  let count = 0, bytes = 0, peak = 0;
  const calls = Object.fromEntries(
    Object.entries(all).map(([name, call]) => [name, (...args: unknown[]) => {
      const isCounted = name !== "aq_cuda_describe_status";
      const own = name === "aq_cuda_allocate" ? Number(args[0]) : 0;
      const answer = isCounted ? statusOf(name, ++count, args) : undefined;
      const status = answer ?? (bytes + own > most ? E_MEMORY : call(...args));
      if (status === 0 && (name === "aq_cuda_allocate" || name === "aq_cuda_part")) {
        const handles = args.find((arg) => arg instanceof BigUint64Array) as BigUint64Array;
        buffers.set(handles[0], own);
        peak = Math.max(peak, bytes += own);
      }
      if (name === "aq_cuda_free") {
        bytes -= buffers.get(args[0]) ?? 0;
        buffers.delete(args[0]);
      }
      return status;
    }]),
  );
  const library = { ...cuda, calls, close() {}, [Symbol.dispose]() {} } as unknown as CudaKernels;
  return { library, buffers, count: () => count, peak: () => peak };
}
