/* statistics.cu: error statistics: sums in double by thread, warp, block and, on the host, over the blocks, in an order that
 * depends on the size alone. */
#include "context.h"
#include "statistics.h"

static __device__ void reduce_block(aq_error_sums sums, double *partials) {
  __shared__ double parts[AQ_BLOCK / 32][AQ_STATISTICS];
  double values[AQ_STATISTICS] = {sums.aa, sums.bb, sums.ab, sums.dd, sums.max_difference, sums.max_a};
  for (int s = 0; s < AQ_STATISTICS; s++) {
    for (int distance = 16; distance > 0; distance /= 2) {
      const double other = __shfl_xor_sync(0xffffffffu, values[s], distance);
      values[s] = s < 4 ? values[s] + other : other > values[s] ? other : values[s];
    }
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][s] = values[s];
  }
  __syncthreads();
  if (threadIdx.x >= AQ_STATISTICS) return;
  double total = 0.0;
  for (int warp = 0; warp < AQ_BLOCK / 32; warp++) {
    const double part = parts[warp][threadIdx.x];
    total = threadIdx.x < 4 ? total + part : part > total ? part : total;
  }
  partials[blockIdx.x * AQ_STATISTICS + threadIdx.x] = total;
}

static __global__ void flat_statistics(const void *a, int32_t a_dtype, const void *b, int32_t b_dtype, size_t n,
                                       double *partials) {
  aq_error_sums sums = {};
  const aq_flat_pair pair = {a, b, a_dtype, b_dtype, n};
  for (size_t i = aq_thread(); i < aq_flat_chunks(n); i += aq_all_threads()) aq_add_flat_errors(pair, i, &sums);
  reduce_block(sums, partials);
}

static __global__ void packed_statistics(const void *weights, int32_t dtype, aq_packed_matrix matrix,
                                         double *partials) {
  aq_error_sums sums = {};
  for (size_t i = aq_thread(); i < matrix.layout.rows * matrix.layout.chunks; i += aq_all_threads())
    aq_add_packed_errors(weights, dtype, matrix, i, &sums);
  reduce_block(sums, partials);
}

static unsigned blocks_of(size_t chunks) {
  const unsigned blocks = aq_cuda_blocks(chunks, AQ_BLOCK);
  return blocks < AQ_SUM_BLOCKS ? blocks : AQ_SUM_BLOCKS;
}

static int32_t add_blocks(const aq_stream_state *on, unsigned blocks, double *statistics) {
  const int32_t status = aq_cuda_launched();
  if (status != AQ_OK) return status;
  cudaError_t error = cudaMemcpyAsync(on->host, on->partials, blocks * AQ_STATISTICS * sizeof(double),
                                      cudaMemcpyDeviceToHost, on->stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(on->stream);
  if (error != cudaSuccess) return aq_cuda_status(error);
  for (unsigned block = 0; block < blocks; block++)
    for (int s = 0; s < AQ_STATISTICS; s++) {
      const double part = on->host[block * AQ_STATISTICS + s];
      statistics[s] = s < 4 ? statistics[s] + part : part > statistics[s] ? part : statistics[s];
    }
  return AQ_OK;
}

int32_t aq_cuda_error_statistics(aq_cuda_buffer a, int32_t a_dtype, aq_cuda_buffer b, int32_t b_dtype, size_t n,
                                 double *statistics, aq_cuda_stream stream) {
  if (!statistics) return AQ_E_ARGUMENT;
  for (int s = 0; s < AQ_STATISTICS; s++) statistics[s] = 0.0;
  if (n == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_dtype_bytes(a_dtype) || !aq_dtype_bytes(b_dtype)) return AQ_E_ARGUMENT;
  if (!aq_shape_allowed(1, n)) return AQ_E_SHAPE;
  const void *x = aq_cuda_memory(a, n, aq_dtype_bytes(a_dtype), on, &status);
  const void *y = aq_cuda_memory(b, n, aq_dtype_bytes(b_dtype), on, &status);
  if (status != AQ_OK) return status;
  const unsigned blocks = blocks_of(aq_flat_chunks(n));
  aq_launch(on, flat_statistics, blocks, AQ_BLOCK, 0, x, a_dtype, y, b_dtype, n, on->partials);
  return add_blocks(on, blocks, statistics);
}

int32_t aq_cuda_packed_error_statistics(aq_cuda_buffer weights, int32_t dtype, aq_cuda_buffer packed,
                                        aq_cuda_buffer scale, aq_cuda_buffer zero_point, size_t rows, size_t cols,
                                        int32_t bits, size_t group_size, double *statistics, aq_cuda_stream stream) {
  if (!statistics) return AQ_E_ARGUMENT;
  for (int s = 0; s < AQ_STATISTICS; s++) statistics[s] = 0.0;
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_dtype_bytes(dtype)) return AQ_E_ARGUMENT;
  const aq_packed_matrix matrix =
      aq_cuda_packed(packed, scale, zero_point, rows, cols, bits, group_size, on, &status);
  const void *values = aq_cuda_memory(weights, rows * cols, aq_dtype_bytes(dtype), on, &status);
  if (status != AQ_OK) return status;
  const unsigned blocks = blocks_of(rows * matrix.layout.chunks);
  aq_launch(on, packed_statistics, blocks, AQ_BLOCK, 0, values, dtype, matrix, on->partials);
  return add_blocks(on, blocks, statistics);
}
