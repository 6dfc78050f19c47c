/** Memory of a GPU behind one stream of the CUDA library. */
import type { CudaKernels } from "./mod.ts";

/** A buffer of the device. */
export interface DeviceBuffer {
  readonly handle: bigint;
  readonly bytes: number;
}

/** Whether a buffer has room for so many bytes and is not much larger. */
export function suits(buffer: DeviceBuffer, bytes: number): boolean {
  return buffer.bytes >= bytes && buffer.bytes <= 2 * bytes + 4096;
}

/** The header's `AQ_E_MEMORY`. */
const E_MEMORY = -101;

/** Buffers of the first device, freed together with their stream. */
export class DeviceMemory {
  readonly stream: bigint;
  readonly #buffers = new Set<bigint>();
  /** Buffers that were handed back, for the next that need as many bytes. */
  readonly #idle: DeviceBuffer[] = [];
  readonly #handle = new BigUint64Array(1);

  /** @param failure the error for a status that is not `AQ_OK` */
  constructor(readonly cuda: CudaKernels, readonly failure: (status: number) => Error) {
    this.expect(cuda.calls.aq_cuda_create_stream(0, this.#handle));
    this.stream = this.#handle[0]!;
  }

  /** @throws what {@linkcode failure} makes of a status that is not `AQ_OK` */
  expect(status: number): void {
    if (status !== 0) throw this.failure(status);
  }

  /** @returns undefined where the device has no room */
  #tryAllocate(bytes: number): bigint | undefined {
    const { calls, size } = this.cuda;
    const status = calls.aq_cuda_allocate(size(bytes), this.#handle, this.stream);
    if (status === E_MEMORY) return undefined;
    this.expect(status);
    const buffer = this.#handle[0]!;
    this.#buffers.add(buffer);
    return buffer;
  }

  allocate(bytes: number): bigint {
    const buffer = this.#tryAllocate(bytes);
    if (buffer === undefined) throw this.failure(E_MEMORY);
    return buffer;
  }

  /**
   * A buffer of at least so many bytes until it is handed back with {@linkcode giveBack}: an idle one that is
   * not much larger, else a new one. Where the device has no room idle ones are freed.
   *
   * @returns undefined where there is no room even so
   */
  borrow(bytes: number): DeviceBuffer | undefined {
    let buffer = this.borrowBeside(bytes);
    while (buffer === undefined && this.#idle.length > 0) {
      this.free(this.#idle.shift()!.handle);
      buffer = this.borrowBeside(bytes);
    }
    return buffer;
  }

  /** As {@linkcode borrow}, but idle ones that do not suit stay: freeing waits for the device. */
  borrowBeside(bytes: number): DeviceBuffer | undefined {
    let best = -1;
    for (const [i, own] of this.#idle.entries()) {
      if (suits(own, bytes) && !(own.bytes >= this.#idle[best]?.bytes!)) best = i;
    }
    if (best >= 0) return this.#idle.splice(best, 1)[0]!;
    const handle = this.#tryAllocate(bytes);
    return handle === undefined ? undefined : { handle, bytes };
  }

  giveBack(buffer: DeviceBuffer): void {
    this.#idle.push(buffer);
  }

  /** Frees buffers that were handed back. */
  trim(): void {
    for (const { handle } of this.#idle.splice(0)) this.free(handle);
  }

  /** A handle of `bytes` of a buffer from `offset` on, which is freed before the buffer. */
  part(buffer: bigint, offset: number, bytes: number): bigint {
    const { calls, size } = this.cuda;
    this.expect(calls.aq_cuda_part(buffer, size(offset), size(bytes), this.#handle));
    const part = this.#handle[0]!;
    this.#buffers.add(part);
    return part;
  }

  upload(data: ArrayBufferView, buffer: bigint, offset = 0): void {
    const { calls, size } = this.cuda;
    this.expect(calls.aq_cuda_upload(data, size(data.byteLength), buffer, size(offset), this.stream));
  }

  download(buffer: bigint, into: ArrayBufferView, offset = 0): void {
    const { calls, size } = this.cuda;
    this.expect(calls.aq_cuda_download(buffer, size(offset), into, size(into.byteLength), this.stream));
  }

  free(buffer: bigint): void {
    this.#buffers.delete(buffer);
    this.expect(this.cuda.calls.aq_cuda_free(buffer));
  }

  /** Frees all buffers and the stream. A device that was lost has none: what it says is not looked at. */
  close(): void {
    const { calls } = this.cuda;
    for (const buffer of this.#buffers) calls.aq_cuda_free(buffer);
    calls.aq_cuda_free_stream(this.stream);
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
