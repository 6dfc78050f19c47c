/* copies.cu: copies between host and device. An upload overlaps with the work before it: the host fills
 * memory that the device can read, a stream of its own brings that to the device, and the stream of the work
 * takes it from there in its turn.
 *
 *     host    data -> pinned          once the slot's last use was taken
 *     copies           pinned -> staging
 *     work                       staging -> buffer, behind all work before, in front of all behind */
#include "context.h"

#include <stdlib.h>
#include <string.h>

/* Bytes and number of slots. The emulator goes round soon. */
#if defined(AQ_EMULATED)
#define SLOT_BYTES ((size_t)1024)
#define SLOTS 3
#else
#define SLOT_BYTES ((size_t)32 << 20)
#define SLOTS 8
#endif

#define ALIGNMENT 256

struct aq_slot {
  uint8_t *pinned, *staging;
  cudaEvent_t arrived, taken; /* of the last upload */
};

/* Slots are filled one behind another, the present one up to `used`. */
struct aq_ring {
  cudaStream_t copies;
  aq_slot slots[SLOTS];
  size_t made, present, used;
};

static void free_slot(aq_slot *slot) {
  if (slot->pinned) cudaFreeHost(slot->pinned);
  if (slot->staging) cudaFree(slot->staging);
  if (slot->arrived) cudaEventDestroy(slot->arrived);
  if (slot->taken) cudaEventDestroy(slot->taken);
  *slot = {};
}

void aq_cuda_free_ring(aq_ring *ring) {
  if (!ring) return;
  for (size_t i = 0; i < ring->made; i++) free_slot(&ring->slots[i]);
  if (ring->copies) cudaStreamDestroy(ring->copies);
  free(ring);
}

static cudaError_t make_slot(aq_slot *slot) {
  cudaError_t error = cudaHostAlloc((void **)&slot->pinned, SLOT_BYTES, cudaHostAllocDefault);
  if (error == cudaSuccess) error = cudaMalloc((void **)&slot->staging, SLOT_BYTES);
  if (error == cudaSuccess) error = cudaEventCreateWithFlags(&slot->arrived, cudaEventDisableTiming);
  if (error == cudaSuccess) error = cudaEventCreateWithFlags(&slot->taken, cudaEventDisableTiming);
  return error;
}

/* Makes the slot behind the present one the present one, once all of it was taken: a new slot while there are
 * fewer than SLOTS and there is room. */
static cudaError_t turn(aq_ring *ring) {
  ring->used = 0;
  if (ring->made < SLOTS && (ring->made == 0 || ring->present == ring->made - 1)) {
    aq_slot *slot = &ring->slots[ring->made];
    const cudaError_t error = make_slot(slot);
    if (error == cudaSuccess) return ring->present = ring->made++, error;
    free_slot(slot);
    (void)cudaGetLastError(); /* so that the next launch does not find it */
    if (ring->made == 0 || error != cudaErrorMemoryAllocation) return error;
  }
  ring->present = (ring->present + 1) % ring->made;
  return cudaEventSynchronize(ring->slots[ring->present].taken);
}

/* Up to the end of the present slot, or of the next one; `*done` bytes. */
static cudaError_t upload_part(const aq_stream_state *on, const uint8_t *data, size_t bytes, uint8_t *to, size_t *done) {
  aq_ring *ring = on->ring;
  cudaError_t error = cudaSuccess;
  *done = 0;
  if (ring->made == 0 || ring->used == SLOT_BYTES) error = turn(ring);
  if (error != cudaSuccess) return error;
  const aq_slot *slot = &ring->slots[ring->present];
  const size_t at = ring->used, own = SLOT_BYTES - at < bytes ? SLOT_BYTES - at : bytes;
  memcpy(slot->pinned + at, data, own);
  error = cudaMemcpyAsync(slot->staging + at, slot->pinned + at, own, cudaMemcpyHostToDevice, ring->copies);
  if (error == cudaSuccess) error = cudaEventRecord(slot->arrived, ring->copies);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(on->stream, slot->arrived, 0);
  if (error == cudaSuccess) error = cudaMemcpyAsync(to, slot->staging + at, own, cudaMemcpyDeviceToDevice, on->stream);
  if (error == cudaSuccess) error = cudaEventRecord(slot->taken, on->stream);
  ring->used = at + own > SLOT_BYTES - ALIGNMENT ? SLOT_BYTES : (at + own + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  *done = own;
  return error;
}

static cudaError_t upload_all(aq_stream_state *on, const uint8_t *data, size_t bytes, uint8_t *to) {
  cudaError_t error = cudaSuccess;
  if (!on->ring) {
    on->ring = (aq_ring *)calloc(1, sizeof *on->ring);
    if (!on->ring) return cudaErrorMemoryAllocation;
    error = cudaStreamCreateWithFlags(&on->ring->copies, cudaStreamNonBlocking);
  }
  for (size_t done = 0; bytes > 0 && error == cudaSuccess; data += done, to += done, bytes -= done)
    error = upload_part(on, data, bytes, to, &done);
  if (error != cudaErrorMemoryAllocation || on->ring->made > 0) return error;
  /* no room for a slot: straight from the host, which waits */
  error = cudaMemcpyAsync(to, data, bytes, cudaMemcpyHostToDevice, on->stream);
  return error == cudaSuccess ? cudaStreamSynchronize(on->stream) : error;
}

/* The part [offset, offset + bytes) of a buffer. */
static uint8_t *part_of(aq_cuda_buffer buffer, size_t offset, size_t bytes, const aq_stream_state *on, int32_t *status) {
  if (offset + bytes < offset) *status = AQ_E_SHAPE;
  uint8_t *memory = aq_cuda_view<uint8_t>(buffer, offset + bytes, on, status);
  return memory ? memory + offset : 0;
}

int32_t aq_cuda_upload(const void *data, size_t bytes, aq_cuda_buffer buffer, size_t offset, aq_cuda_stream stream) {
  if (bytes == 0) return AQ_OK;
  if (!data) return AQ_E_ARGUMENT;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  uint8_t *to = part_of(buffer, offset, bytes, on, &status);
  if (status != AQ_OK) return status;
  return aq_cuda_status(upload_all(on, (const uint8_t *)data, bytes, to));
}

int32_t aq_cuda_download(aq_cuda_buffer buffer, size_t offset, void *data, size_t bytes, aq_cuda_stream stream) {
  if (bytes == 0) return AQ_OK;
  if (!data) return AQ_E_ARGUMENT;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  const uint8_t *from = part_of(buffer, offset, bytes, on, &status);
  if (status != AQ_OK) return status;
  cudaError_t error = cudaMemcpyAsync(data, from, bytes, cudaMemcpyDeviceToHost, on->stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(on->stream);
  return aq_cuda_status(error);
}

int32_t aq_cuda_copy(aq_cuda_buffer from, aq_cuda_buffer to, size_t bytes, aq_cuda_stream stream) {
  if (bytes == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  const uint8_t *in = aq_cuda_view<uint8_t>(from, bytes, on, &status);
  uint8_t *out = aq_cuda_view<uint8_t>(to, bytes, on, &status);
  if (status != AQ_OK) return status;
  return aq_cuda_status(cudaMemcpyAsync(out, in, bytes, cudaMemcpyDeviceToDevice, on->stream));
}
