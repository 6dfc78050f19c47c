/* rotation.cu: rotations, with the bytes of the CPU's: sums and differences of rows that lie 1, 2, 4 … apart,
 * in this order. A pass reads and writes every value once and does as many of these stages as a tile in
 * shared memory has rows for. */
#include "../context.h"

#include "../../arithmetic/rotation.h"

#define AQ_TILE 2048   /* numbers in shared memory */
#define AQ_TILE_COLS 32 /* columns of a tile at least, where there are as many */

/* Values [outers, n, inner], of which those n apart by `inner` are transformed. */
struct rotation_pass {
  const float *x;
  float *out;
  size_t outers, n, inner;
  size_t width, height; /* of a tile: columns, and items of n rows */
  size_t rows, cols;    /* of an item of the batch */
  uint32_t seed;
  float length;
  bool before, after; /* whether values are multiplied by factors */
};

AQ_DEVICE float factor_at(const rotation_pass &p, size_t at) {
  const size_t row = aq_quotient(at, p.cols);
  return aq_rotation_factor(p.seed, row - aq_quotient(row, p.rows) * p.rows, p.length);
}

static __global__ void __launch_bounds__(AQ_BLOCK) rotate_tiles(rotation_pass p, size_t tiles, size_t across) {
  __shared__ float tile[AQ_TILE];
  const size_t size = p.height * p.n * p.width;
  for (size_t unit = blockIdx.x; unit < tiles; unit += gridDim.x) {
    const size_t down = aq_quotient(unit, across), first = down * p.height * p.n, left = (unit - down * across) * p.width;
    for (size_t e = threadIdx.x; e < size; e += blockDim.x) {
      const size_t row = aq_quotient(e, p.width), col = left + (e - row * p.width), at = (first + row) * p.inner + col;
      const bool there = first + row < p.outers * p.n && col < p.inner;
      const float value = there ? p.x[at] : 0.0f;
      tile[e] = p.before && there ? factor_at(p, at) * value : value;
    }
    __syncthreads();
    for (size_t run = 1; run < p.n; run *= 2) {
      for (size_t e = threadIdx.x; e < size / 2; e += blockDim.x) {
        const size_t pair = aq_quotient(e, p.width), row = pair + (pair & ~(run - 1));
        float *const a = tile + row * p.width + (e - pair * p.width), *const b = a + run * p.width;
        const float sum = *a + *b, difference = *a - *b;
        *a = sum;
        *b = difference;
      }
      __syncthreads();
    }
    for (size_t e = threadIdx.x; e < size; e += blockDim.x) {
      const size_t row = aq_quotient(e, p.width), col = left + (e - row * p.width), at = (first + row) * p.inner + col;
      if (first + row < p.outers * p.n && col < p.inner) p.out[at] = p.after ? factor_at(p, at) * tile[e] : tile[e];
    } /* no barrier: a thread loads into what it alone has stored */
  }
}

int32_t aq_cuda_rotate(aq_cuda_buffer x, size_t batch, size_t rows, size_t cols, int32_t seed, int32_t inverse,
                       aq_cuda_buffer out, aq_cuda_stream stream) {
  if (batch == 0 || rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(batch, rows, &on, stream);
  if (status != AQ_OK) return status;
  if (!aq_counts_allowed(batch * rows, cols)) return AQ_E_SHAPE;
  const size_t count = batch * rows * cols, block = aq_rotation_block(rows);
  rotation_pass p = {};
  p.x = aq_cuda_view<float>(x, count, on, &status);
  p.out = aq_cuda_view<float>(out, count, on, &status);
  if (status != AQ_OK) return status;
  p.rows = rows;
  p.cols = cols;
  p.seed = (uint32_t)seed;
  p.length = aq_rotation_length(block);
  size_t done = 1;
  do {
    p.inner = done * cols;
    p.n = 1;
    while (p.n * done < block && 2 * p.n * (p.inner < AQ_TILE_COLS ? p.inner : AQ_TILE_COLS) <= AQ_TILE) p.n *= 2;
    p.outers = count / (p.n * p.inner);
    p.width = p.inner < AQ_TILE / p.n ? p.inner : AQ_TILE / p.n;
    p.height = p.width < p.inner ? 1 : AQ_TILE / (p.n * p.width);
    p.before = done == 1 && !inverse;
    done *= p.n;
    p.after = done == block && inverse;
    const size_t across = (p.inner - 1) / p.width + 1, tiles = across * ((p.outers - 1) / p.height + 1);
    aq_launch(on, rotate_tiles, aq_cuda_blocks(tiles, 1), AQ_BLOCK, 0, p, tiles, across);
    p.x = p.out;
  } while (done < block);
  return aq_cuda_launched();
}
