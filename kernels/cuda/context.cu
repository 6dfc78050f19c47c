/* context.cu: devices, streams and buffers. */
#include "context.h"

#include <stdio.h>
#include <stdlib.h>

int32_t aq_cuda_abi_version(void) { return AQ_CUDA_ABI_VERSION; }

int32_t aq_cuda_status(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return AQ_OK;
    case cudaErrorMemoryAllocation: return AQ_E_MEMORY;
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorInitializationError:
    case cudaErrorInvalidDevice:
    case cudaErrorDevicesUnavailable: return AQ_E_DEVICE;
    default: return AQ_E_CUDA - (int32_t)error;
  }
}

/* Devices ---------------------------------------------------------------------------------------------- */

int32_t aq_cuda_device_count(int32_t *count) {
  if (!count) return AQ_E_ARGUMENT;
  int found = 0;
  const cudaError_t error = cudaGetDeviceCount(&found);
  *count = error == cudaSuccess ? found : 0;
  if (error != cudaSuccess) return aq_cuda_status(error);
  return found > 0 ? AQ_OK : AQ_E_DEVICE;
}

int32_t aq_cuda_describe_device(int32_t device, uint8_t *text, size_t bytes) {
  if (!text || bytes == 0) return AQ_E_ARGUMENT;
  char *line = (char *)text;
  int found = 0;
  cudaError_t error = cudaGetDeviceCount(&found);
  if (error == cudaSuccess && found == 0) error = cudaErrorNoDevice;
  if (error != cudaSuccess) {
    snprintf(line, bytes, "no device: %s (CUDA error %d)", cudaGetErrorString(error), (int)error);
    return aq_cuda_status(error);
  }
  cudaDeviceProp properties;
  error = device < 0 || device >= found ? cudaErrorInvalidDevice : cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) {
    snprintf(line, bytes, "no device: number %d of %d: %s", (int)device, found, cudaGetErrorString(error));
    return aq_cuda_status(error);
  }
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  snprintf(line, bytes, "%s, sm_%d%d, %.1f GiB, driver for CUDA %d.%d, runtime %d.%d", properties.name,
           properties.major, properties.minor, (double)properties.totalGlobalMem / 1073741824.0, driver / 1000,
           driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
  return AQ_OK;
}

int32_t aq_cuda_describe_status(int32_t status, uint8_t *text, size_t bytes) {
  if (!text || bytes == 0) return AQ_E_ARGUMENT;
  const char *reason = "unknown status";
  switch (status) {
    case AQ_OK: reason = "success"; break;
    case AQ_E_ARGUMENT: reason = "a handle of nothing, of another device or freed, or an unknown enumerator"; break;
    case AQ_E_SHAPE: reason = "a size that is not allowed, or a buffer smaller than the shape"; break;
    case AQ_E_VALUE: reason = "a negative or non-finite column weight"; break;
    case AQ_E_NONFINITE: reason = "NaN or infinity among the weights"; break;
    case AQ_E_RANGE: reason = "weights too large for a half-precision scale"; break;
    case AQ_E_DEVICE: reason = "no device"; break;
    case AQ_E_MEMORY: reason = "out of memory"; break;
    case AQ_E_UNSUPPORTED: reason = "sizes that no kernel of the device has"; break;
    default:
      if (status < AQ_E_CUDA) reason = cudaGetErrorString((cudaError_t)(AQ_E_CUDA - status));
  }
  snprintf((char *)text, bytes, "%s", reason);
  return AQ_OK;
}

/* Streams ---------------------------------------------------------------------------------------------- */

static void release(aq_stream_state *state) {
  aq_cuda_free_ring(state->ring);
  if (state->stream) cudaStreamDestroy(state->stream);
  if (state->faults) cudaFree(state->faults);
  if (state->scratch) cudaFree(state->scratch);
  if (state->begin) cudaEventDestroy(state->begin);
  if (state->end) cudaEventDestroy(state->end);
  state->magic = 0;
  free(state);
}

int32_t aq_cuda_create_stream(int32_t device, uint64_t *stream) {
  if (!stream) return AQ_E_ARGUMENT;
  *stream = 0;
  int32_t count = 0;
  const int32_t available = aq_cuda_device_count(&count);
  if (available != AQ_OK) return available;
  if (device < 0 || device >= count) return AQ_E_DEVICE;
  aq_stream_state *state = (aq_stream_state *)calloc(1, sizeof *state);
  if (!state) return AQ_E_MEMORY;
  state->magic = AQ_STREAM_MAGIC;
  state->device = device;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&state->stream, cudaStreamNonBlocking);
  if (error == cudaSuccess) error = cudaMalloc((void **)&state->faults, sizeof *state->faults);
  if (error == cudaSuccess) error = cudaEventCreate(&state->begin);
  if (error == cudaSuccess) error = cudaEventCreate(&state->end);
  if (error != cudaSuccess) {
    release(state);
    return aq_cuda_status(error);
  }
  *stream = (uint64_t)(uintptr_t)state;
  return AQ_OK;
}

aq_stream_state *aq_cuda_use(aq_cuda_stream stream, int32_t *status) {
  aq_stream_state *state = (aq_stream_state *)(uintptr_t)stream;
  *status = !state || state->magic != AQ_STREAM_MAGIC ? AQ_E_ARGUMENT : aq_cuda_status(cudaSetDevice(state->device));
  return *status == AQ_OK ? state : 0;
}

int32_t aq_cuda_free_stream(aq_cuda_stream stream) {
  if (stream == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *state = aq_cuda_use(stream, &status);
  if (!state) return status;
  status = aq_cuda_status(cudaStreamSynchronize(state->stream));
  release(state);
  return status;
}

int32_t aq_cuda_begin_timing(aq_cuda_stream stream) {
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  return on ? aq_cuda_status(cudaEventRecord(on->begin, on->stream)) : status;
}

int32_t aq_cuda_end_timing(aq_cuda_stream stream, double *milliseconds) {
  if (!milliseconds) return AQ_E_ARGUMENT;
  *milliseconds = 0.0;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  float elapsed = 0.0f;
  cudaError_t error = cudaEventRecord(on->end, on->stream);
  if (error == cudaSuccess) error = cudaEventSynchronize(on->end);
  if (error == cudaSuccess) error = cudaEventElapsedTime(&elapsed, on->begin, on->end);
  *milliseconds = (double)elapsed;
  return aq_cuda_status(error);
}

int32_t aq_cuda_clear_faults(const aq_stream_state *stream) {
  return aq_cuda_status(cudaMemsetAsync(stream->faults, 0, sizeof *stream->faults, stream->stream));
}

int32_t aq_cuda_read_faults(const aq_stream_state *stream) {
  int32_t faults = 0;
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess)
    error = cudaMemcpyAsync(&faults, stream->faults, sizeof faults, cudaMemcpyDeviceToHost, stream->stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream->stream);
  return error == cudaSuccess ? aq_status_of_faults(faults) : aq_cuda_status(error);
}

void *aq_cuda_scratch(aq_stream_state *stream, size_t bytes, int32_t *status) {
  if (*status != AQ_OK) return 0;
  if (stream->scratch_bytes >= bytes) return stream->scratch;
  cudaError_t error = cudaStreamSynchronize(stream->stream);
  if (error == cudaSuccess && stream->scratch) error = cudaFree(stream->scratch);
  stream->scratch = 0;
  stream->scratch_bytes = 0;
  if (error == cudaSuccess) error = cudaMalloc(&stream->scratch, bytes);
  if (error == cudaSuccess) stream->scratch_bytes = bytes;
  else (void)cudaGetLastError(); /* so that the next launch does not find it */
  *status = aq_cuda_status(error);
  return stream->scratch;
}

/* Buffers ---------------------------------------------------------------------------------------------- */

static aq_buffer_state *buffer_of(aq_cuda_buffer buffer) {
  aq_buffer_state *state = (aq_buffer_state *)(uintptr_t)buffer;
  return state && state->magic == AQ_BUFFER_MAGIC ? state : 0;
}

void *aq_cuda_memory(aq_cuda_buffer buffer, size_t count, size_t size, const aq_stream_state *stream, int32_t *status) {
  if (*status != AQ_OK) return 0;
  const aq_buffer_state *state = buffer_of(buffer);
  if (!state || state->device != stream->device) {
    *status = AQ_E_ARGUMENT;
    return 0;
  }
  if (count > state->bytes / size) {
    *status = AQ_E_SHAPE;
    return 0;
  }
  return state->data;
}

int32_t aq_cuda_allocate(size_t bytes, uint64_t *buffer, aq_cuda_stream stream) {
  if (!buffer) return AQ_E_ARGUMENT;
  *buffer = 0;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  aq_buffer_state *state = (aq_buffer_state *)calloc(1, sizeof *state);
  if (!state) return AQ_E_MEMORY;
  state->magic = AQ_BUFFER_MAGIC;
  state->device = on->device;
  state->bytes = bytes;
  status = aq_cuda_status(cudaMalloc(&state->data, bytes ? bytes : 1));
  if (status != AQ_OK) {
    (void)cudaGetLastError(); /* so that the next launch does not find it */
    free(state);
    return status;
  }
  *buffer = (uint64_t)(uintptr_t)state;
  return AQ_OK;
}

int32_t aq_cuda_part(aq_cuda_buffer buffer, size_t offset, size_t bytes, uint64_t *part) {
  if (!part) return AQ_E_ARGUMENT;
  *part = 0;
  const aq_buffer_state *whole = buffer_of(buffer);
  if (!whole) return AQ_E_ARGUMENT;
  if (offset % 16 != 0 || offset > whole->bytes || bytes > whole->bytes - offset) return AQ_E_SHAPE;
  aq_buffer_state *state = (aq_buffer_state *)calloc(1, sizeof *state);
  if (!state) return AQ_E_MEMORY;
  *state = {AQ_BUFFER_MAGIC, whole->device, (uint8_t *)whole->data + offset, bytes, true};
  *part = (uint64_t)(uintptr_t)state;
  return AQ_OK;
}

int32_t aq_cuda_free(aq_cuda_buffer buffer) {
  if (buffer == 0) return AQ_OK;
  aq_buffer_state *state = buffer_of(buffer);
  if (!state) return AQ_E_ARGUMENT;
  cudaError_t error = state->is_part ? cudaSuccess : cudaSetDevice(state->device);
  if (error == cudaSuccess && !state->is_part) error = cudaFree(state->data);
  state->magic = 0;
  free(state);
  return aq_cuda_status(error);
}
