/* context.h: streams, buffers and the checks that every function of the CUDA library begins with, and kernels
 * that are a thread an element or a block a row. */
#ifndef AQ_CUDA_CONTEXT_H
#define AQ_CUDA_CONTEXT_H

#include "chunk.h"

#define AQ_STREAM_MAGIC 0x41715374u
#define AQ_BUFFER_MAGIC 0x41714266u

#define AQ_BLOCK 256

struct aq_stream_state {
  uint32_t magic;
  int device;
  cudaStream_t stream;
  int32_t *faults;        /* of the device, one word */
  cudaEvent_t begin, end; /* of aq_cuda_begin_timing */
  void *scratch;          /* of calls that need some: kept and grown */
  size_t scratch_bytes;
  struct aq_ring *ring; /* of copies.cu: null before the first upload */
};

struct aq_buffer_state {
  uint32_t magic;
  int device;
  void *data;
  size_t bytes;
  bool is_part; /* another buffer's memory */
};

/* The code of a runtime error; AQ_OK for none. */
int32_t aq_cuda_status(cudaError_t error);

/* The stream behind a handle, its device made the calling thread's; null where it is none. */
aq_stream_state *aq_cuda_use(aq_cuda_stream stream, int32_t *status);

/* Clears the word of faults before kernels that may set it, and reads it after them, which waits and finds
 * what their launch left behind. */
int32_t aq_cuda_clear_faults(const aq_stream_state *stream);
int32_t aq_cuda_read_faults(const aq_stream_state *stream);

/* The memory behind a handle, `count` elements of `size` bytes of it at least. With `status` not AQ_OK
 * nothing is done, so that calls can follow each other and the first fault stays. */
void *aq_cuda_memory(aq_cuda_buffer buffer, size_t count, size_t size, const aq_stream_state *stream, int32_t *status);

/* At least `bytes` of scratch, until the next call on the stream; with `status` not AQ_OK nothing is done. */
void *aq_cuda_scratch(aq_stream_state *stream, size_t bytes, int32_t *status);

/* Frees what copies.cu keeps for a stream, whose work has ended; null is fine. */
void aq_cuda_free_ring(aq_ring *ring);

/* What became of launches, without waiting for them. */
static inline int32_t aq_cuda_launched(void) { return aq_cuda_status(cudaGetLastError()); }

/* Cuts memory into arrays that begin at multiples of 256 bytes; of no memory it counts what they take. */
struct aq_cutter {
  uint8_t *memory;
  size_t used;
  template <class T>
  T *take(size_t count) {
    T *at = memory ? (T *)(memory + used) : 0;
    used += (count * sizeof(T) + 255) / 256 * 256;
    return at;
  }
};

template <class T>
static inline T *aq_cuda_view(aq_cuda_buffer buffer, size_t count, const aq_stream_state *stream, int32_t *status) {
  return (T *)aq_cuda_memory(buffer, count, sizeof(T), stream, status);
}

/* Most blocks of kernels that step over the grid; the emulator has them step soon. */
#if defined(AQ_EMULATED)
#define AQ_MOST_BLOCKS 3
#else
#define AQ_MOST_BLOCKS ((size_t)1 << 30)
#endif

/* Blocks for `threads` threads that step over the grid if there are more. */
static inline unsigned aq_cuda_blocks(size_t threads, size_t block) {
  const size_t wanted = (threads + block - 1) / block;
  return (unsigned)(wanted < AQ_MOST_BLOCKS ? wanted : AQ_MOST_BLOCKS);
}

/* Puts a kernel on the stream; what became of it says aq_cuda_read_faults. */
template <class... Parameters, class... Arguments>
static inline void aq_launch(const aq_stream_state *on, void (*kernel)(Parameters...), unsigned blocks, size_t threads,
                             size_t shared, const Arguments &...arguments) {
#if defined(AQ_EMULATED)
  emulator::launch(on->stream, blocks, threads, shared, [&] { kernel(arguments...); });
#else
  kernel<<<blocks, (unsigned)threads, shared, on->stream>>>(arguments...);
#endif
}

/* Shared memory of the size that the launch says. */
#if defined(AQ_EMULATED)
#define AQ_DYNAMIC_SHARED(type, name) type *const name = (type *)emulator::dynamic
#else
#define AQ_DYNAMIC_SHARED(type, name)                   \
  extern __shared__ __align__(128) uint8_t aq_dynamic[]; \
  type *const name = (type *)aq_dynamic
#endif

static __device__ __forceinline__ size_t aq_thread(void) { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }
static __device__ __forceinline__ size_t aq_all_threads(void) { return (size_t)gridDim.x * blockDim.x; }

/* Kernels of one shape ----------------------------------------------------------------------------------- */

/* f(i) for every i below n; f is a struct of pointers and numbers. */
template <class F>
static __global__ void __launch_bounds__(AQ_BLOCK) aq_each_element(F f, size_t n) {
  for (size_t i = aq_thread(); i < n; i += aq_all_threads()) f(i);
}

template <class F>
static int32_t aq_run_elements(const aq_stream_state *on, const F &f, size_t n) {
  aq_launch(on, aq_each_element<F>, aq_cuda_blocks(n, AQ_BLOCK), AQ_BLOCK, 0, f, n);
  return aq_cuda_launched();
}

/* f(row) for every row, all threads of a block together. */
template <class F>
static __global__ void __launch_bounds__(AQ_BLOCK) aq_each_row(F f, size_t rows) {
  for (size_t row = blockIdx.x; row < rows; row += gridDim.x) f(row);
}

template <class F>
static int32_t aq_run_rows(const aq_stream_state *on, const F &f, size_t rows) {
  aq_launch(on, aq_each_row<F>, aq_cuda_blocks(rows, 1), AQ_BLOCK, 0, f, rows);
  return aq_cuda_launched();
}

/* f.put(j, i, f.at(i, j)) for every element of [rows, cols], in tiles that f.wants by their first row and
 * column: both sides in the order of their memory. */
template <class F>
static __global__ void __launch_bounds__(AQ_BLOCK) aq_each_turned(F f, size_t rows, size_t cols) {
  constexpr size_t SIDE = 32, STEP = AQ_BLOCK / SIDE;
  __shared__ float tile[SIDE][SIDE + 1];
  const size_t across = (cols - 1) / SIDE + 1, tiles = across * ((rows - 1) / SIDE + 1);
  const size_t x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
  for (size_t unit = blockIdx.x; unit < tiles; unit += gridDim.x) {
    const size_t row = aq_quotient(unit, across) * SIDE, col = (unit - aq_quotient(unit, across) * across) * SIDE;
    if (!f.wants(row, col)) continue;
    for (size_t i = y; i < SIDE; i += STEP)
      if (row + i < rows && col + x < cols) tile[i][x] = f.at(row + i, col + x);
    __syncthreads();
    for (size_t j = y; j < SIDE; j += STEP)
      if (col + j < cols && row + x < rows) f.put(col + j, row + x, tile[x][j]);
    __syncthreads(); /* before the next tile */
  }
}

template <class F>
static int32_t aq_run_turned(const aq_stream_state *on, const F &f, size_t rows, size_t cols) {
  const size_t tiles = ((rows - 1) / 32 + 1) * ((cols - 1) / 32 + 1);
  aq_launch(on, aq_each_turned<F>, aq_cuda_blocks(tiles, 1), AQ_BLOCK, 0, f, rows, cols);
  return aq_cuda_launched();
}

/* The sum over a block's threads, in all of them, in an order that does not change. */
AQ_DEVICE double aq_block_sum(double value) {
  __shared__ double parts[AQ_BLOCK / 32];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  __syncthreads(); /* all have read what was there */
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
  for (int warp = 0; warp < AQ_BLOCK / 32; warp++) total += parts[warp];
  return total;
}

/* The stream of work on [rows, cols]. */
static inline int32_t aq_cuda_use_for(size_t rows, size_t cols, aq_stream_state **on, aq_cuda_stream stream) {
  int32_t status;
  *on = aq_cuda_use(stream, &status);
  return *on && !aq_counts_allowed(rows, cols) ? AQ_E_SHAPE : status;
}

/* A float32 view that a handle of 0 leaves out. */
static inline const float *aq_cuda_optional(aq_cuda_buffer buffer, size_t n, const aq_stream_state *on, int32_t *status) {
  return buffer ? aq_cuda_view<float>(buffer, n, on, status) : 0;
}

static inline bool aq_three_allowed(size_t a, size_t b, size_t c) {
  return aq_counts_allowed(a, b) && (a * b == 0 || aq_counts_allowed(a * b, c));
}

#endif
