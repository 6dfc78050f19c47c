/**
 * Kernels whose quantization runs on a GPU: the CPU's, with the calls that quantize in place of the CPU's own, same
 * arguments and same bytes. Nothing else of the package knows which of the two it has.
 */
import { KernelError } from "../errors.ts";
import { type CudaKernels, describeCudaStatus } from "./cuda.ts";
import type { Kernels } from "./kernels.ts";
import type { NativeCalls } from "./symbols.ts";

/** The header's `AQ_OK`, and the first status that is the device's and not the arguments'. */
const OK = 0, DEVICE_STATUS = -100;

type Data = ArrayBufferView | null;

/** Memory of the device by use, kept from call to call and grown when a call needs more. */
class Device {
  readonly #cuda: CudaKernels;
  readonly #stream: bigint;
  readonly #slots = new Map<number, { buffer: bigint; bytes: number }>();

  constructor(cuda: CudaKernels) {
    this.#cuda = cuda;
    const handle = new BigUint64Array(1);
    this.#expect(cuda.calls.aq_cuda_create_stream(0, handle));
    this.#stream = handle[0]!;
  }

  #expect(status: number): void {
    if (status === OK) return;
    throw new KernelError(
      `Cannot quantize on the GPU: ${describeCudaStatus(this.#cuda, status)}; the backend "cpu" needs none`,
      { status },
    );
  }

  #slot(i: number, bytes: number): bigint {
    const { calls, size } = this.#cuda;
    const slot = this.#slots.get(i) ?? { buffer: 0n, bytes: 0 };
    this.#slots.set(i, slot);
    if (slot.buffer === 0n || slot.bytes < bytes) {
      this.#expect(calls.aq_cuda_free(slot.buffer));
      [slot.buffer, slot.bytes] = [0n, 0];
      const handle = new BigUint64Array(1);
      this.#expect(calls.aq_cuda_allocate(size(bytes), handle, this.#stream));
      [slot.buffer, slot.bytes] = [handle[0]!, bytes];
    }
    return slot.buffer;
  }

  /** Uploads inputs, runs a kernel, and downloads outputs when it succeeded. Null is the handle 0. */
  run(
    inputs: readonly Data[],
    outputs: readonly Data[],
    kernel: (inputs: bigint[], outputs: bigint[], stream: bigint) => number,
  ): number {
    const { calls, size } = this.#cuda;
    const none = size(0);
    const from = inputs.map((data, i) => {
      if (data === null) return 0n;
      const buffer = this.#slot(i, data.byteLength);
      this.#expect(calls.aq_cuda_upload(data, size(data.byteLength), buffer, none, this.#stream));
      return buffer;
    });
    const to = outputs.map((data, i) => data === null ? 0n : this.#slot(inputs.length + i, data.byteLength));
    const status = kernel(from, to, this.#stream);
    if (status <= DEVICE_STATUS) this.#expect(status);
    if (status !== OK) return status;
    outputs.forEach((data, i) => {
      if (data === null) return;
      this.#expect(calls.aq_cuda_download(to[i]!, none, data, size(data.byteLength), this.#stream));
    });
    return OK;
  }

  close(): void {
    const { calls } = this.#cuda;
    for (const { buffer } of this.#slots.values()) this.#expect(calls.aq_cuda_free(buffer));
    this.#expect(calls.aq_cuda_free_stream(this.#stream));
    this.#cuda.close();
  }
}

/**
 * `base`, quantizing on the first device of `cuda`: round to nearest, clip search and two-level scales. Closing it closes both.
 * A call whose data is at fault returns the CPU's status.
 *
 * @throws {KernelError} when the device cannot be used; in a call, when it fails or has no room left
 */
export function withCuda(base: Kernels, cuda: CudaKernels): Kernels {
  const device = new Device(cuda), size = (count: number | bigint) => cuda.size(Number(count));
  const quantizing: Pick<NativeCalls, "aq_quantize_round" | "aq_quantize_clip" | "aq_quantize_two_level"> = {
    aq_quantize_round: (weights, dtype, rows, cols, bits, groupSize, kind, packed, scale, zeroPoint) =>
      device.run(
        [weights],
        [packed, scale, zeroPoint],
        ([w], [p, s, z], stream) =>
          cuda.calls.aq_cuda_quantize_round(
            w!,
            dtype,
            size(rows),
            size(cols),
            bits,
            size(groupSize),
            kind,
            p!,
            s!,
            z!,
            stream,
          ),
      ),
    aq_quantize_clip: (
      weights,
      dtype,
      rows,
      cols,
      bits,
      groupSize,
      kind,
      columns,
      packed,
      scale,
      zeroPoint,
    ) =>
      device.run(
        [weights, columns],
        [packed, scale, zeroPoint],
        ([w, h], [p, s, z], stream) =>
          cuda.calls.aq_cuda_quantize_clip(
            w!,
            dtype,
            size(rows),
            size(cols),
            bits,
            size(groupSize),
            kind,
            h!,
            p!,
            s!,
            z!,
            stream,
          ),
      ),
    aq_quantize_two_level: (
      weights,
      dtype,
      rows,
      cols,
      bits,
      groupSize,
      scaleBits,
      search,
      columns,
      packed,
      subScale,
      subMin,
      superScale,
      superMin,
    ) =>
      device.run(
        [weights, columns],
        [packed, subScale, subMin, superScale, superMin],
        ([w, h], [p, s, m, ds, dm], stream) =>
          cuda.calls.aq_cuda_quantize_two_level(
            w!,
            dtype,
            size(rows),
            size(cols),
            bits,
            size(groupSize),
            scaleBits,
            search,
            h!,
            p!,
            s!,
            m!,
            ds!,
            dm!,
            stream,
          ),
      ),
  };
  const calls: NativeCalls = { ...base.calls, ...quantizing };
  let isOpen = true;
  const close = () => {
    if (!isOpen) return;
    isOpen = false;
    device.close();
    base.close();
  };
  return {
    ...base,
    device: cuda.describe(),
    describe: () => `${cuda.describe()}; ${base.describe()}`,
    close,
    [Symbol.dispose]: close,
    get calls() {
      if (!isOpen) throw new KernelError(`Cannot call a kernel of ${cuda.library}: it was closed`);
      return calls;
    },
  };
}
