/** Memory of a GPU behind one stream of the CUDA library. */
import type { CudaKernels } from "./mod.ts";

/** Buffers of the first device, freed together with their stream. */
export class DeviceMemory {
  readonly stream: bigint;
  readonly #buffers = new Set<bigint>();
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

  allocate(bytes: number): bigint {
    const { calls, size } = this.cuda;
    this.expect(calls.aq_cuda_allocate(size(bytes), this.#handle, this.stream));
    const buffer = this.#handle[0]!;
    this.#buffers.add(buffer);
    return buffer;
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

  close(): void {
    for (const buffer of this.#buffers) this.free(buffer);
    this.expect(this.cuda.calls.aq_cuda_free_stream(this.stream));
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
