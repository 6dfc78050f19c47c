/* reduce.h: kernels of one shape: a thread an element, and a block a row with sums over its threads. */
#ifndef AQ_CUDA_REDUCE_H
#define AQ_CUDA_REDUCE_H

#include "context.h"

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

/* A float32 view that a handle of 0 leaves out. */
static inline const float *aq_cuda_optional(aq_cuda_buffer buffer, size_t n, const aq_stream_state *on, int32_t *status) {
  return buffer ? aq_cuda_view<float>(buffer, n, on, status) : 0;
}

static inline bool aq_three_allowed(size_t a, size_t b, size_t c) {
  return aq_counts_allowed(a, b) && (a * b == 0 || aq_counts_allowed(a * b, c));
}

#endif
