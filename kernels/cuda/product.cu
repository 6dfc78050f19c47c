/* product.cu: products with packed weights: a few tokens by reading every weight once, and many by tensor cores. */
#include <cuda_bf16.h>
#include <mma.h>

#include "context.h"
#include "product.h"

/* Few tokens ----------------------------------------------------------------------------------------------------------- */

/* Block x: ROWS rows; block y: TOKENS tokens. */
template <int BITS, int TOKENS, int ROWS>
static __global__ void __launch_bounds__(AQ_PRODUCT_THREADS) few_tokens(aq_product_view view) {
  __shared__ float parts[AQ_PRODUCT_THREADS / 32][TOKENS * ROWS];
  const size_t row = (size_t)blockIdx.x * ROWS;
  for (size_t token = (size_t)blockIdx.y * TOKENS; token < view.tokens; token += (size_t)gridDim.y * TOKENS) {
    float sums[TOKENS][ROWS] = {};
    if (BITS == 3)
      aq_add_chunk_products<TOKENS, ROWS>(view, token, row, threadIdx.x, AQ_PRODUCT_THREADS, sums);
    else
      aq_add_word_products<BITS == 3 ? 4 : BITS, TOKENS, ROWS>(view, token, row, threadIdx.x, AQ_PRODUCT_THREADS, sums);
#pragma unroll
    for (int i = 0; i < TOKENS * ROWS; i++) {
      float sum = sums[i / ROWS][i % ROWS];
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][i] = sum;
    }
    __syncthreads();
    if (threadIdx.x < TOKENS * ROWS) {
      const size_t t = token + threadIdx.x / ROWS, r = row + threadIdx.x % ROWS;
      float sum = 0.0f;
      for (int warp = 0; warp < AQ_PRODUCT_THREADS / 32; warp++) sum += parts[warp][threadIdx.x];
      if (t < view.tokens && r < view.matrix.layout.rows)
        view.out[t * view.matrix.layout.rows + r] = sum + (view.bias ? view.bias[r] : 0.0f);
    }
    __syncthreads();
  }
}

template <int BITS>
static void launch_few(const aq_product_view &view, cudaStream_t stream) {
  const size_t rows = view.matrix.layout.rows, most = 65535;
  if (view.tokens == 1) {
    few_tokens<BITS, 1, 4><<<dim3((unsigned)((rows + 3) / 4)), AQ_PRODUCT_THREADS, 0, stream>>>(view);
    return;
  }
  const size_t groups = (view.tokens + 3) / 4;
  const dim3 blocks((unsigned)((rows + 1) / 2), (unsigned)(groups < most ? groups : most));
  few_tokens<BITS, 4, 2><<<blocks, AQ_PRODUCT_THREADS, 0, stream>>>(view);
}

/* Many tokens ----------------------------------------------------------------------------------------------------------
 *
 * Eight warps of 32 tokens by 64 rows each; the next step is fetched into registers while this one is multiplied. */
static __global__ void __launch_bounds__(AQ_TILE_THREADS) many_tokens(aq_product_view view) {
  using namespace nvcuda;
  __shared__ __align__(32) uint16_t x[2][AQ_TILE * AQ_TILE_PITCH], w[2][AQ_TILE * AQ_TILE_PITCH];
  __shared__ __align__(32) float results[AQ_TILE_THREADS / 32][16 * 16];
  const aq_layout &layout = view.matrix.layout;
  const size_t row = (size_t)blockIdx.x * AQ_TILE;
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  const int warp_token = warp / 2 * 32, warp_row = warp % 2 * 64;
  for (size_t token = (size_t)blockIdx.y * AQ_TILE; token < view.tokens; token += (size_t)gridDim.y * AQ_TILE) {
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums[2][4];
#pragma unroll
    for (int i = 0; i < 8; i++) wmma::fill_fragment(sums[i / 4][i % 4], 0.0f);
    aq_fetched next;
    aq_fetch_step(view, token, row, 0, threadIdx.x, &next);
    aq_commit_step(next, layout.bits, threadIdx.x, x[0], w[0]);
    __syncthreads();
    int current = 0;
    for (size_t col = 0; col < layout.cols; col += AQ_TILE_DEPTH, current ^= 1) {
      const bool more = col + AQ_TILE_DEPTH < layout.cols;
      if (more) aq_fetch_step(view, token, row, col + AQ_TILE_DEPTH, threadIdx.x, &next);
#pragma unroll
      for (int depth = 0; depth < AQ_TILE_DEPTH; depth += 16) {
        wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> left[2];
        wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::col_major> right[4];
#pragma unroll
        for (int i = 0; i < 2; i++)
          wmma::load_matrix_sync(left[i], (const __nv_bfloat16 *)x[current] + (warp_token + 16 * i) * AQ_TILE_PITCH + depth, AQ_TILE_PITCH);
#pragma unroll
        for (int j = 0; j < 4; j++)
          wmma::load_matrix_sync(right[j], (const __nv_bfloat16 *)w[current] + (warp_row + 16 * j) * AQ_TILE_PITCH + depth, AQ_TILE_PITCH);
#pragma unroll
        for (int i = 0; i < 8; i++)
          wmma::mma_sync(sums[i / 4][i % 4], left[i / 4], right[i % 4], sums[i / 4][i % 4]);
      }
      if (more) aq_commit_step(next, layout.bits, threadIdx.x, x[current ^ 1], w[current ^ 1]);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      wmma::store_matrix_sync(results[warp], sums[i / 4][i % 4], 16, wmma::mem_row_major);
      __syncwarp();
      for (int e = lane; e < 256; e += 32) {
        const size_t t = token + (size_t)(warp_token + 16 * (i / 4) + e / 16);
        const size_t r = row + (size_t)(warp_row + 16 * (i % 4) + e % 16);
        if (t < view.tokens && r < layout.rows)
          view.out[t * layout.rows + r] = results[warp][e] + (view.bias ? view.bias[r] : 0.0f);
      }
      __syncwarp();
    }
  }
}

/* ---------------------------------------------------------------------------------------------------------------------- */

static int32_t linear(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                      aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols, int32_t bits,
                      size_t group_size, aq_cuda_buffer out, bool tensor_cores, aq_cuda_stream stream) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  /* a grid has 2^31 - 1 blocks of at least two rows */
  if (cols == 0 || rows > 0x7fffffff || !aq_shape_allowed(tokens, cols) || !aq_shape_allowed(tokens, rows))
    return AQ_E_SHAPE;
  aq_product_view view = {};
  view.matrix = aq_cuda_packed(packed, scale, zero_point, rows, cols, bits, group_size, on, &status);
  view.x = aq_cuda_view<float>(x, tokens * cols, on, &status);
  view.tokens = tokens;
  view.bias = bias ? aq_cuda_view<float>(bias, rows, on, &status) : 0;
  view.out = aq_cuda_view<float>(out, tokens * rows, on, &status);
  if (status != AQ_OK) return status;
  if (tensor_cores) {
    const size_t tiles = (tokens - 1) / AQ_TILE + 1;
    const dim3 blocks((unsigned)((rows - 1) / AQ_TILE + 1), (unsigned)(tiles < 65535 ? tiles : 65535));
    many_tokens<<<blocks, AQ_TILE_THREADS, 0, on->stream>>>(view);
  } else {
    switch (bits) {
      case 2: launch_few<2>(view, on->stream); break;
      case 3: launch_few<3>(view, on->stream); break;
      case 4: launch_few<4>(view, on->stream); break;
      default: launch_few<8>(view, on->stream); break;
    }
  }
  return aq_cuda_launched();
}

int32_t aq_cuda_linear_packed(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                              aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols, int32_t bits,
                              size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream) {
  return linear(x, tokens, packed, scale, zero_point, bias, rows, cols, bits, group_size, out, false, stream);
}

int32_t aq_cuda_linear_packed_bf16(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                                   aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols,
                                   int32_t bits, size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream) {
  return linear(x, tokens, packed, scale, zero_point, bias, rows, cols, bits, group_size, out, true, stream);
}
