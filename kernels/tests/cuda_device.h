/* cuda_device.h: the stream of the CUDA driver and its buffers. */
#ifndef AQ_CUDA_DEVICE_H
#define AQ_CUDA_DEVICE_H

#include "../include/arrowquant_cuda.h"
#include "cuda_cases.h"

static aq_cuda_stream stream;

static void require(int32_t status, const char *what) {
  if (status == AQ_OK) return;
  uint8_t text[256];
  aq_cuda_describe_status(status, text, sizeof text);
  printf("FAILED %s: status %d, %s\n", what, (int)status, (const char *)text);
  exit(1);
}

/* A buffer of the device with GUARD bytes behind its contents that no kernel may touch; null stays the handle 0. */
struct device_bytes {
  aq_cuda_buffer handle;
  size_t size;
  device_bytes(const void *from, size_t n) : handle(0), size(n) {
    if (!from) return;
    uint64_t made = 0;
    require(aq_cuda_allocate(n + GUARD, &made, stream), "allocate");
    handle = (aq_cuda_buffer)made;
    require(aq_cuda_upload(from, n, handle, 0, stream), "upload");
    const bytes guard(GUARD, 0xa5);
    require(aq_cuda_upload(guard.data(), GUARD, handle, n, stream), "upload");
  }
  device_bytes(const device_bytes &) = delete;
  ~device_bytes() { require(aq_cuda_free(handle), "free"); }
  /* Contents and guard, so that a kernel that wrote too far is found by the host's check of its own guard. */
  void read(void *to, int guarded) const {
    if (handle) require(aq_cuda_download(handle, 0, to, size + (guarded ? GUARD : 0), stream), "download");
  }
};

template <class T>
static device_bytes uploaded(const std::vector<T> &values) {
  return device_bytes(values.data(), values.size() * sizeof(T));
}

/* Waits for a kernel's work and brings an output, its guard checked, to where the oracle's is compared with. */
static bytes downloaded(const device_bytes &from) {
  bytes to(from.size + GUARD);
  from.read(to.data(), 1);
  return to;
}

/* An output of `size` bytes that no kernel has written. */
static device_bytes unwritten(size_t size) { return device_bytes(bytes(size, 0xcd).data(), size); }

template <class T>
static bytes bytes_of(const std::vector<T> &values) {
  bytes b(values.size() * sizeof(T) + GUARD, 0xa5);
  memcpy(b.data(), values.data(), values.size() * sizeof(T));
  return b;
}

#endif
