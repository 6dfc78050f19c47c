/* product.cu: products in tiles: a block's tiles of a and b go through shared memory, a thread has MICRO x
 * MICRO elements of c in registers, and what comes next is read while the present tiles are multiplied. */
#include "product.h"

#define AQ_TILE_K 8
#define AQ_TILE_PAD 4 /* rows of shared memory stay multiples of sixteen bytes in different banks */

/* Tiles of a size that keep a device busy; the emulator has the large ones soon, too. */
#if defined(AQ_EMULATED)
#define AQ_ENOUGH_TILES 4
#else
#define AQ_ENOUGH_TILES 264
#endif

/* The place in a tile of the load number `load`: threads side by side read what lies side by side. */
template <int TILE>
AQ_DEVICE void tile_place(int load, bool k_first, size_t *i, size_t *k) {
  const size_t at = (size_t)load * AQ_BLOCK + threadIdx.x;
  *k = k_first ? at % AQ_TILE_K : at / TILE;
  *i = k_first ? at / AQ_TILE_K : at % TILE;
}

template <int TILE>
struct tile_values {
  float a[TILE * AQ_TILE_K / AQ_BLOCK], b[TILE * AQ_TILE_K / AQ_BLOCK];
};

template <int TILE>
AQ_DEVICE void read_tiles(const aq_product &p, size_t row, size_t col, size_t first, bool a_k, bool b_k,
                          tile_values<TILE> *values) {
#pragma unroll
  for (int load = 0; load < TILE * AQ_TILE_K / AQ_BLOCK; load++) {
    size_t i, k;
    tile_place<TILE>(load, a_k, &i, &k);
    float a = 0.0f, b = 0.0f;
    if (row + i < p.rows && first + k < p.k) {
      a = p.a[(ptrdiff_t)(row + i) * p.a_row + (ptrdiff_t)(first + k) * p.a_col];
      if (p.weight) a = p.weight[first + k] * a;
      if (p.subtract) a = -a;
    }
    tile_place<TILE>(load, b_k, &i, &k);
    if (col + i < p.cols && first + k < p.k) b = p.b[(ptrdiff_t)(first + k) * p.b_row + (ptrdiff_t)(col + i) * p.b_col];
    values->a[load] = a;
    values->b[load] = b;
  }
}

/* Where a thread's element i is in a tile: runs of as many as are read at once. */
template <int MICRO>
AQ_DEVICE size_t micro_place(size_t thread, int i) {
  constexpr int RUN = MICRO < 4 ? MICRO : 4;
  return (size_t)(i / RUN) * 16 * RUN + thread * RUN + (size_t)(i % RUN);
}

template <int MICRO>
AQ_DEVICE void multiply_step(const float *left, const float *right, float sums[MICRO][MICRO]) {
  const size_t x = threadIdx.x % 16, y = threadIdx.x / 16;
  float a[MICRO], b[MICRO];
#pragma unroll
  for (int i = 0; i < MICRO; i++) {
    a[i] = left[micro_place<MICRO>(y, i)];
    b[i] = right[micro_place<MICRO>(x, i)];
  }
#pragma unroll
  for (int i = 0; i < MICRO; i++)
#pragma unroll
    for (int j = 0; j < MICRO; j++) sums[i][j] = AQ_FMA(a[i], b[j], sums[i][j]);
}

template <int MICRO>
static __global__ void __launch_bounds__(AQ_BLOCK) product_tiles(aq_product p) {
  constexpr int TILE = 16 * MICRO;
  __shared__ __align__(16) float left[AQ_TILE_K][TILE + AQ_TILE_PAD], right[AQ_TILE_K][TILE + AQ_TILE_PAD];
  const size_t across = (p.cols - 1) / TILE + 1, tiles = across * ((p.rows - 1) / TILE + 1);
  const size_t x = threadIdx.x % 16, y = threadIdx.x / 16;
  const bool a_k = p.a_col == 1 || p.a_col == -1, b_k = p.b_row == 1 || p.b_row == -1;
  for (size_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const size_t row = tile / across * TILE, col = tile % across * TILE;
    if (p.upper && col + TILE <= row) continue;
    float sums[MICRO][MICRO];
#pragma unroll
    for (int i = 0; i < MICRO; i++)
#pragma unroll
      for (int j = 0; j < MICRO; j++) {
        const size_t at_row = row + micro_place<MICRO>(y, i), at_col = col + micro_place<MICRO>(x, j);
        sums[i][j] = at_row < p.rows && at_col < p.cols ? p.c[at_row * p.c_row + at_col] : 0.0f;
      }
    tile_values<TILE> next;
    read_tiles<TILE>(p, row, col, 0, a_k, b_k, &next);
    for (size_t first = 0; first < p.k; first += AQ_TILE_K) {
      __syncthreads(); /* the tiles before were multiplied */
#pragma unroll
      for (int load = 0; load < TILE * AQ_TILE_K / AQ_BLOCK; load++) {
        size_t i, k;
        tile_place<TILE>(load, a_k, &i, &k);
        left[k][i] = next.a[load];
        tile_place<TILE>(load, b_k, &i, &k);
        right[k][i] = next.b[load];
      }
      __syncthreads();
      if (first + AQ_TILE_K < p.k) read_tiles<TILE>(p, row, col, first + AQ_TILE_K, a_k, b_k, &next);
      if (first + AQ_TILE_K <= p.k) {
#pragma unroll
        for (int k = 0; k < AQ_TILE_K; k++) multiply_step<MICRO>(left[k], right[k], sums);
      } else { /* steps beyond the end would turn -0 into 0 */
        for (size_t k = 0; k < p.k - first; k++) multiply_step<MICRO>(left[k], right[k], sums);
      }
    }
#pragma unroll
    for (int i = 0; i < MICRO; i++)
#pragma unroll
      for (int j = 0; j < MICRO; j++) {
        const size_t at_row = row + micro_place<MICRO>(y, i), at_col = col + micro_place<MICRO>(x, j);
        if (at_row < p.rows && at_col < p.cols) p.c[at_row * p.c_row + at_col] = sums[i][j];
      }
  }
}

template <int MICRO>
static bool launch_tiles(const aq_stream_state *on, const aq_product &p, size_t least) {
  const size_t tile = 16 * MICRO, tiles = ((p.cols - 1) / tile + 1) * ((p.rows - 1) / tile + 1);
  if (tiles < least) return false;
  aq_launch(on, product_tiles<MICRO>, aq_cuda_blocks(tiles, 1), AQ_BLOCK, 0, p);
  return true;
}

void aq_cuda_product(const aq_stream_state *on, const aq_product &p) {
  if (p.rows == 0 || p.cols == 0 || p.k == 0) return;
  if (launch_tiles<8>(on, p, AQ_ENOUGH_TILES)) return;
  if (launch_tiles<4>(on, p, AQ_ENOUGH_TILES)) return;
  launch_tiles<2>(on, p, 0);
}

int32_t aq_cuda_multiply(aq_cuda_buffer a, aq_cuda_buffer b, size_t rows, size_t k, size_t cols, aq_cuda_buffer c,
                         aq_cuda_stream stream) {
  if (rows == 0 || cols == 0 || k == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_counts_allowed(rows, k) || !aq_counts_allowed(k, cols) || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  aq_product p = {};
  p.a = aq_cuda_view<float>(a, rows * k, on, &status);
  p.b = aq_cuda_view<float>(b, k * cols, on, &status);
  p.c = aq_cuda_view<float>(c, rows * cols, on, &status);
  p.a_row = (ptrdiff_t)k;
  p.b_row = (ptrdiff_t)cols;
  p.a_col = p.b_col = 1;
  p.rows = rows;
  p.k = k;
  p.cols = p.c_row = cols;
  if (status != AQ_OK) return status;
  aq_cuda_product(on, p);
  return aq_cuda_launched();
}
