/* moment.cu: second moments by tensor cores. Each float32 factor is split into two TF32 numbers, whose three larger products
 * are added; sums are float32, and those of AQ_MOMENT_TOKENS tokens are added to the whole's. */
#include <mma.h>

#include "context.h"

#include "../cpu/solver.h"

/* A block's tile of the result, four warps of half of it each way, and the tokens of one step. */
#define TILE 64
#define DEPTH 16
#define PITCH (TILE + 8)
#define THREADS 128

struct moment_view {
  const float *x, *weight; /* weight null: ones */
  size_t tokens, cols;
  float *out;
};

/* token-major columns [col, col + TILE) of DEPTH tokens as high and low parts; zeros where there is none. */
static __device__ void stage(const moment_view &view, size_t token, size_t col, bool weighted, float *high, float *low) {
  for (int e = (int)threadIdx.x; e < DEPTH * TILE; e += THREADS) {
    const size_t t = token + (size_t)(e / TILE), c = col + (size_t)(e % TILE);
    float value = 0.0f;
    if (t < view.tokens && c < view.cols) {
      value = view.x[t * view.cols + c];
      if (weighted) value = view.weight[t] * value;
    }
    const float upper = nvcuda::wmma::__float_to_tf32(value);
    high[e / TILE * PITCH + e % TILE] = upper;
    low[e / TILE * PITCH + e % TILE] = nvcuda::wmma::__float_to_tf32(value - upper);
  }
}

static __global__ void __launch_bounds__(THREADS) accumulate(moment_view view) {
  using namespace nvcuda;
  typedef wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, wmma::col_major> left_fragment;
  typedef wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, wmma::row_major> right_fragment;
  typedef wmma::fragment<wmma::accumulator, 16, 16, 8, float> sum_fragment;
  __shared__ __align__(32) float left[2][DEPTH * PITCH], right[2][DEPTH * PITCH];
  __shared__ __align__(32) float results[THREADS / 32][16 * 16];
  if (blockIdx.y > blockIdx.x) return; /* below the diagonal: written by the tile above it */
  const size_t row = (size_t)blockIdx.y * TILE, col = (size_t)blockIdx.x * TILE;
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  const int warp_row = warp / 2 * 32, warp_col = warp % 2 * 32;
  sum_fragment total[2][2];
  for (int i = 0; i < 4; i++) wmma::fill_fragment(total[i / 2][i % 2], 0.0f);
  for (size_t first = 0; first < view.tokens; first += AQ_MOMENT_TOKENS) {
    sum_fragment sums[2][2];
    for (int i = 0; i < 4; i++) wmma::fill_fragment(sums[i / 2][i % 2], 0.0f);
    const size_t last = aq_smaller(first + AQ_MOMENT_TOKENS, view.tokens);
    for (size_t token = first; token < last; token += DEPTH) {
      stage(view, token, row, view.weight != 0, left[0], left[1]);
      stage(view, token, col, false, right[0], right[1]);
      __syncthreads();
#pragma unroll
      for (int depth = 0; depth < DEPTH; depth += 8) {
        left_fragment a[2][2]; /* [part][tile] */
        right_fragment b[2][2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          wmma::load_matrix_sync(a[i / 2][i % 2], left[i / 2] + depth * PITCH + warp_row + 16 * (i % 2), PITCH);
          wmma::load_matrix_sync(b[i / 2][i % 2], right[i / 2] + depth * PITCH + warp_col + 16 * (i % 2), PITCH);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) { /* the smaller products first */
          sum_fragment &sum = sums[i / 2][i % 2];
          wmma::mma_sync(sum, a[1][i / 2], b[0][i % 2], sum);
          wmma::mma_sync(sum, a[0][i / 2], b[1][i % 2], sum);
          wmma::mma_sync(sum, a[0][i / 2], b[0][i % 2], sum);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      for (int e = 0; e < total[0][0].num_elements; e++) total[i / 2][i % 2].x[e] += sums[i / 2][i % 2].x[e];
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    wmma::store_matrix_sync(results[warp], total[i / 2][i % 2], 16, wmma::mem_row_major);
    __syncwarp();
    for (int e = lane; e < 256; e += 32) {
      const size_t r = row + (size_t)(warp_row + 16 * (i / 2) + e / 16);
      const size_t c = col + (size_t)(warp_col + 16 * (i % 2) + e % 16);
      if (r > c || c >= view.cols) continue;
      const float sum = view.out[r * view.cols + c] + results[warp][e];
      view.out[r * view.cols + c] = sum;
      view.out[c * view.cols + r] = sum;
    }
    __syncwarp();
  }
}

int32_t aq_cuda_accumulate_moment(aq_cuda_buffer x, aq_cuda_buffer weight, size_t tokens, size_t cols,
                                  aq_cuda_buffer out, aq_cuda_stream stream) {
  if (tokens == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (cols > AQ_MAX_SOLVER_COLS || !aq_shape_allowed(tokens, cols)) return AQ_E_SHAPE;
  const moment_view view = {aq_cuda_view<float>(x, tokens * cols, on, &status),
                            weight ? aq_cuda_view<float>(weight, tokens, on, &status) : 0, tokens, cols,
                            aq_cuda_view<float>(out, cols * cols, on, &status)};
  if (status != AQ_OK) return status;
  const unsigned tiles = (unsigned)((cols - 1) / TILE + 1);
  aq_launch(on, accumulate, dim3(tiles, tiles), THREADS, 0, view);
  return aq_cuda_launched();
}
