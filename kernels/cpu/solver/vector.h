/* solver/vector.h: chunks of rows over vectors of AQ_W floats, included once by each unit of isa/ behind
 * quantize/vector.h and product/vector.h. A chunk holds two vectors of rows; every lane repeats the oracle's
 * operations in its order.
 *
 *     chunk[k * AQ_ROWS + lane] = column k of the chunk's row `lane`
 */
#include "kernels.h"

#define AQ_ROWS (2 * AQ_W)
#if AQ_W >= 16 || defined(AQ_BUILD_NEON)
#define AQ_ST 12 /* columns of a tile: 2 AQ_ST sums, and a few more, fit the registers */
#else
#define AQ_ST 4
#endif

/* out[i] (+-)= sum_j x[j x_stride + i] y[j AQ_ROWS ...], j ascending, m sums AQ_ROWS floats apart. */
AQ_INLINE void tile_products_of(const int m, const int subtract, const float *x, size_t x_stride, const float *y,
                                size_t n, float *out) {
  vf sum[AQ_ST][2];
#pragma GCC unroll 16
  for (int i = 0; i < m; i++) {
    sum[i][0] = v_load(out + i * AQ_ROWS);
    sum[i][1] = v_load(out + i * AQ_ROWS + AQ_W);
  }
  for (size_t j = 0; j < n; j++) {
    const vf y0 = v_load(y + j * AQ_ROWS), y1 = v_load(y + j * AQ_ROWS + AQ_W);
    const float *at = x + j * x_stride;
#pragma GCC unroll 16
    for (int i = 0; i < m; i++) {
      const vf factor = v_splat(subtract ? -at[i] : at[i]);
      sum[i][0] = v_exact_fma(factor, y0, sum[i][0]);
      sum[i][1] = v_exact_fma(factor, y1, sum[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < m; i++) {
    v_store(out + i * AQ_ROWS, sum[i][0]);
    v_store(out + i * AQ_ROWS + AQ_W, sum[i][1]);
  }
}

#define AQ_TILE_PRODUCTS(name, m, subtract)                                                  \
  static void name(const float *x, size_t x_stride, const float *y, size_t n, float *out) { \
    tile_products_of(m, subtract, x, x_stride, y, n, out);                                   \
  }
AQ_TILE_PRODUCTS(tile_add_whole, AQ_ST, 0)
AQ_TILE_PRODUCTS(tile_add_four, 4, 0)
AQ_TILE_PRODUCTS(tile_add_one, 1, 0)
AQ_TILE_PRODUCTS(tile_subtract_whole, AQ_ST, 1)
AQ_TILE_PRODUCTS(tile_subtract_four, 4, 1)
AQ_TILE_PRODUCTS(tile_subtract_one, 1, 1)

/* out[i] (+-)= sum_j x[j, i] y[j] for m columns i of a chunk, j < n. */
static void columns_products(int subtract, size_t m, const float *x, size_t x_stride, const float *y, size_t n,
                             float *out) {
  size_t i = 0;
  for (; i + AQ_ST <= m; i += AQ_ST)
    (subtract ? tile_subtract_whole : tile_add_whole)(x + i, x_stride, y, n, out + i * AQ_ROWS);
  for (; i + 4 <= m; i += 4)
    (subtract ? tile_subtract_four : tile_add_four)(x + i, x_stride, y, n, out + i * AQ_ROWS);
  for (; i < m; i++) (subtract ? tile_subtract_one : tile_add_one)(x + i, x_stride, y, n, out + i * AQ_ROWS);
}

/* n columns of a matrix's rows into the lanes of a chunk; lanes beyond `rows` repeat the last row. */
static void load_chunk(const float *from, size_t stride, size_t rows, size_t n, float *chunk) {
  for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
    const float *row[AQ_W];
    for (size_t lane = 0; lane < AQ_W; lane++) row[lane] = from + aq_min_size(v + lane, rows - 1) * stride;
    size_t k = 0;
    for (; k + AQ_W <= n; k += AQ_W) {
      vf r[AQ_W];
      for (size_t lane = 0; lane < AQ_W; lane++) r[lane] = v_load(row[lane] + k);
      v_transpose(r);
      for (size_t j = 0; j < AQ_W; j++) v_store(chunk + (k + j) * AQ_ROWS + v, r[j]);
    }
    for (; k < n; k++)
      for (size_t lane = 0; lane < AQ_W; lane++) chunk[k * AQ_ROWS + v + lane] = row[lane][k];
  }
}

/* And back. */
static void store_chunk(const float *chunk, size_t rows, size_t n, float *to, size_t stride) {
  for (size_t v = 0; v < rows; v += AQ_W) {
    const size_t lanes = aq_min_size(AQ_W, rows - v);
    size_t k = 0;
    for (; k + AQ_W <= n; k += AQ_W) {
      vf r[AQ_W];
      for (size_t j = 0; j < AQ_W; j++) r[j] = v_load(chunk + (k + j) * AQ_ROWS + v);
      v_transpose(r);
      for (size_t lane = 0; lane < lanes; lane++) v_store(to + (v + lane) * stride + k, r[lane]);
    }
    for (; k < n; k++)
      for (size_t lane = 0; lane < lanes; lane++) to[(v + lane) * stride + k] = chunk[k * AQ_ROWS + v + lane];
  }
}
