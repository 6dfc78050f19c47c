/* tensor.cu: products on tensor cores. Stages of 32 columns go through shared memory by asynchronous copies,
 * two ahead of the one that is multiplied. A warp has M x N fragments of 16 x 16. Tensor cores cut off what
 * they add, so after two stages their sums go to others, which round to nearest. */
#include "tensor.h"

#include <cuda_bf16.h>
#include <cuda_pipeline.h>
#include <mma.h>

namespace wmma = nvcuda::wmma;

#define STEP AQ_TENSOR_STEP
#define STAGES 3
#define STEPS_A_SUM 2
#define PITCH (STEP + 8) /* rows of a stage begin in different banks */
#define FRAGMENT 16
#define WARPS_DOWN 2
#define WARPS_ACROSS 4
#define BAND 8 /* tiles of so many rows share columns of b while these are in the cache */

/* Tiles of the large size that keep a device busy; the emulator has them soon, too. */
#if defined(AQ_EMULATED)
#define ENOUGH_TILES 4
#else
#define ENOUGH_TILES 132
#endif

template <int M, int N, bool LOW>
struct tile_shape {
  static constexpr int ROWS = WARPS_DOWN * M * FRAGMENT, COLS = WARPS_ACROSS * N * FRAGMENT, SUMS_PITCH = COLS + 4;
  static constexpr size_t STAGE = (size_t)(2 * ROWS + (LOW ? 2 : 1) * COLS) * PITCH; /* elements */
  static constexpr size_t STAGE_BYTES = STAGES * STAGE * sizeof(uint16_t);
  static constexpr size_t SUMS_BYTES = (size_t)ROWS * SUMS_PITCH * sizeof(float);
  static constexpr size_t BYTES = STAGE_BYTES > SUMS_BYTES ? STAGE_BYTES : SUMS_BYTES;
};

/* Begins to copy columns [first, first + STEP) of `count` rows; rows behind the last repeat it. */
AQ_DEVICE void fetch_rows(const uint16_t *from, const aq_parts &parts, size_t row, size_t first, int count, uint16_t *to) {
  constexpr int PIECES = STEP / 8; /* of sixteen bytes */
#pragma unroll
  for (int i = (int)threadIdx.x; i < count * PIECES; i += AQ_BLOCK) {
    const size_t own = aq_smaller(row + (size_t)(i / PIECES), parts.rows - 1);
    __pipeline_memcpy_async(to + i / PIECES * PITCH + i % PIECES * 8, from + own * parts.stride + first + (size_t)(i % PIECES) * 8, 16);
  }
}

template <int M, int N, bool LOW>
static __global__ void __launch_bounds__(AQ_BLOCK) tensor_tiles(aq_tensor_product p) {
  typedef tile_shape<M, N, LOW> tile;
  AQ_DYNAMIC_SHARED(uint16_t, memory);
  const int warp = (int)threadIdx.x / 32;
  const int down = warp / WARPS_ACROSS * M * FRAGMENT, right = warp % WARPS_ACROSS * N * FRAGMENT;
  const size_t across = (p.b.rows - 1) / tile::COLS + 1, rows = (p.a.rows - 1) / tile::ROWS + 1;
  const size_t steps = (p.k - 1) / STEP + 1;
  for (size_t unit = blockIdx.x; unit < across * rows; unit += gridDim.x) {
    const size_t band = unit / (BAND * across) * BAND, within = unit % (BAND * across), high = aq_smaller(BAND, rows - band);
    const size_t row = (band + within % high) * tile::ROWS, col = within / high * tile::COLS;
    if (p.upper && col + tile::COLS <= row) continue;
    const auto stage_of = [&](size_t step) { return memory + step % STAGES * tile::STAGE; };
    const auto fetch = [&](size_t step) {
      uint16_t *const stage = stage_of(step);
      fetch_rows(p.a.high, p.a, row, step * STEP, tile::ROWS, stage);
      fetch_rows(p.a.low, p.a, row, step * STEP, tile::ROWS, stage + tile::ROWS * PITCH);
      fetch_rows(p.b.high, p.b, col, step * STEP, tile::COLS, stage + 2 * tile::ROWS * PITCH);
      if (LOW) fetch_rows(p.b.low, p.b, col, step * STEP, tile::COLS, stage + (2 * tile::ROWS + tile::COLS) * PITCH);
    };
    wmma::fragment<wmma::accumulator, FRAGMENT, FRAGMENT, FRAGMENT, float> sums[M][N], totals[M][N];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++) {
        wmma::fill_fragment(sums[m][n], 0.0f);
        wmma::fill_fragment(totals[m][n], 0.0f);
      }
    for (size_t step = 0; step + 1 < STAGES; step++) {
      if (step < steps) fetch(step);
      __pipeline_commit();
    }
    for (size_t step = 0; step < steps; step++) {
      __pipeline_wait_prior(STAGES - 2);
      __syncthreads(); /* this stage is there, and all are done with the one before, which is filled next */
      if (step + STAGES - 1 < steps) fetch(step + STAGES - 1);
      __pipeline_commit();
      const __nv_bfloat16 *const a = (const __nv_bfloat16 *)stage_of(step) + down * PITCH;
      const __nv_bfloat16 *const b = (const __nv_bfloat16 *)stage_of(step) + (2 * tile::ROWS + right) * PITCH;
#pragma unroll
      for (int k = 0; k < STEP; k += FRAGMENT) {
        wmma::fragment<wmma::matrix_b, FRAGMENT, FRAGMENT, FRAGMENT, __nv_bfloat16, wmma::col_major> b_high[N], b_low[N];
#pragma unroll
        for (int n = 0; n < N; n++) {
          wmma::load_matrix_sync(b_high[n], b + n * FRAGMENT * PITCH + k, PITCH);
          if (LOW) wmma::load_matrix_sync(b_low[n], b + (tile::COLS + n * FRAGMENT) * PITCH + k, PITCH);
        }
#pragma unroll
        for (int m = 0; m < M; m++) {
          wmma::fragment<wmma::matrix_a, FRAGMENT, FRAGMENT, FRAGMENT, __nv_bfloat16, wmma::row_major> a_high, a_low;
          wmma::load_matrix_sync(a_high, a + m * FRAGMENT * PITCH + k, PITCH);
          wmma::load_matrix_sync(a_low, a + (tile::ROWS + m * FRAGMENT) * PITCH + k, PITCH);
#pragma unroll
          for (int n = 0; n < N; n++) {
            wmma::mma_sync(sums[m][n], a_low, b_high[n], sums[m][n]);
            if (LOW) wmma::mma_sync(sums[m][n], a_high, b_low[n], sums[m][n]);
            wmma::mma_sync(sums[m][n], a_high, b_high[n], sums[m][n]);
          }
        }
      }
      if (step % STEPS_A_SUM == STEPS_A_SUM - 1 || step + 1 == steps) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < sums[m][n].num_elements; i++) totals[m][n].x[i] += sums[m][n].x[i];
            wmma::fill_fragment(sums[m][n], 0.0f);
          }
      }
    }
    float *const out = (float *)memory;
    __syncthreads(); /* all are done with the stages */
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
        wmma::store_matrix_sync(out + (down + m * FRAGMENT) * tile::SUMS_PITCH + right + n * FRAGMENT, totals[m][n],
                                tile::SUMS_PITCH, wmma::mem_row_major);
    __syncthreads();
    for (size_t i = threadIdx.x; i < (size_t)(tile::ROWS * tile::COLS); i += AQ_BLOCK) {
      const size_t y = i / tile::COLS, x = i % tile::COLS;
      if (row + y < p.a.rows && col + x < p.b.rows) p.c[(row + y) * p.c_row + col + x] += out[y * tile::SUMS_PITCH + x];
    }
    __syncthreads(); /* before the next tile's stages */
  }
}

template <int M, int N, bool LOW>
static int32_t launch_tiles(const aq_stream_state *on, const aq_tensor_product &p) {
  typedef tile_shape<M, N, LOW> tile;
  const int32_t status = aq_cuda_status(
      cudaFuncSetAttribute(tensor_tiles<M, N, LOW>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)tile::BYTES));
  if (status != AQ_OK) return status;
  const size_t tiles = ((p.a.rows - 1) / tile::ROWS + 1) * ((p.b.rows - 1) / tile::COLS + 1);
  aq_launch(on, tensor_tiles<M, N, LOW>, aq_cuda_blocks(tiles, 1), AQ_BLOCK, tile::BYTES, p);
  return aq_cuda_launched();
}

int32_t aq_cuda_tensor_product(const aq_stream_state *on, const aq_tensor_product &p) {
  if (p.a.rows == 0 || p.b.rows == 0 || p.k == 0) return AQ_OK;
  typedef tile_shape<4, 2, true> large;
  if (((p.a.rows - 1) / large::ROWS + 1) * ((p.b.rows - 1) / large::COLS + 1) >= ENOUGH_TILES)
    return p.b.low ? launch_tiles<4, 2, true>(on, p) : launch_tiles<4, 2, false>(on, p);
  return p.b.low ? launch_tiles<2, 1, true>(on, p) : launch_tiles<2, 1, false>(on, p);
}

/* Columns become rows of parts; rows behind the k-th are zeros. */
struct column_parts {
  const float *x;
  size_t k, rows;
  const float *weight;
  aq_parts parts;
  __device__ bool wants(size_t, size_t) const { return true; }
  __device__ float at(size_t i, size_t j) const {
    if (i >= k) return 0.0f;
    const float value = x[i * rows + j];
    return weight ? weight[i] * value : value;
  }
  __device__ void put(size_t j, size_t i, float value) const {
    const size_t to = j * parts.stride + i;
    aq_split(value, parts.high + to, parts.low + to);
  }
};

int32_t aq_cuda_split_columns(const aq_stream_state *on, const float *x, size_t k, size_t rows, const float *weight,
                              const aq_parts &parts) {
  return aq_run_turned(on, column_parts{x, k, rows, weight, parts}, parts.stride, rows);
}

/* Linear layers ------------------------------------------------------------------------------------------ */

static __global__ void __launch_bounds__(AQ_BLOCK) set_rows(const float *bias, size_t tokens, size_t rows, float *out) {
  for (size_t i = aq_thread(); i < tokens * rows; i += aq_all_threads()) out[i] = bias ? bias[i % rows] : 0.0f;
}

/* The parts of x [tokens, cols]; element i is a chunk, padding behind the columns included. */
struct token_parts {
  const float *x;
  size_t cols;
  aq_parts parts;
  __device__ void operator()(size_t i) const {
    const size_t chunks = parts.stride / AQ_CHUNK, token = aq_quotient(i, chunks), begin = (i - token * chunks) * AQ_CHUNK;
    const size_t n = begin < cols ? aq_smaller(AQ_CHUNK, cols - begin) : 0;
    float values[AQ_CHUNK];
    if (n > 0) aq_load_chunk(x, AQ_F32, token * cols + begin, n, values);
    aq_split_chunk(values, n, parts, token, begin / AQ_CHUNK);
  }
};

/* Both are parts a slice of rows at a time. */
int32_t aq_cuda_tensor_linear(aq_stream_state *on, const aq_tensor_weights &weights, const float *x, size_t tokens,
                              const float *bias, float *out) {
  const size_t rows = weights.rows, cols = weights.cols;
  const size_t slice = weights.whole ? rows : aq_tensor_slice(rows, cols), token_slice = aq_tensor_slice(tokens, cols);
  aq_parts own = {(uint16_t *)weights.whole, 0, rows, cols}, x_parts = {};
  const auto cut = [&](aq_cutter cutter) {
    x_parts = aq_take_parts(&cutter, token_slice, cols);
    if (!weights.whole) own = aq_take_parts(&cutter, slice, cols);
    return cutter.used;
  };
  int32_t status = AQ_OK;
  uint8_t *memory = (uint8_t *)aq_cuda_scratch(on, cut({}), &status);
  if (status != AQ_OK) return status;
  cut({memory, 0});
  aq_launch(on, set_rows, aq_cuda_blocks(tokens * rows, AQ_BLOCK), AQ_BLOCK, 0, bias, tokens, rows, out);
  for (size_t row = 0; row < rows && status == AQ_OK; row += slice) {
    own.rows = slice < rows - row ? slice : rows - row;
    if (!weights.whole) status = weights.split(on, weights.source, row, own);
    for (size_t token = 0; token < tokens && status == AQ_OK; token += token_slice) {
      x_parts.rows = token_slice < tokens - token ? token_slice : tokens - token;
      status = aq_run_elements(on, token_parts{x + token * cols, cols, x_parts}, x_parts.rows * (x_parts.stride / AQ_CHUNK));
      const aq_tensor_product p = {x_parts, own, cols, out + token * rows + row, rows, false};
      if (status == AQ_OK) status = aq_cuda_tensor_product(on, p);
    }
  }
  return status;
}
