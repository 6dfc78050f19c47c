/* solver/vector.h: panels of rows over vectors of AQ_W floats, included once by each unit of isa/ behind
 * quantize/vector.h. A panel holds two vectors of rows; every lane repeats the oracle's operations in its
 * order.
 *
 *     panel[k * AQ_ROWS + lane] = column k of the panel's row `lane`
 */
#include "kernels.h"

#define AQ_ROWS (2 * AQ_W)
#if AQ_W >= 16 || defined(AQ_BUILD_NEON)
#define AQ_ST 12 /* columns of a tile: 2 AQ_ST sums, and a few more, fit the registers */
#else
#define AQ_ST 4
#endif

/* sum[i] (+-)= sum_j x[j x_stride + i] y[j y_stride ...], j ascending, multiplied and added apart. */
AQ_INLINE void add_products(const int m, const int subtract, const float *x, size_t x_stride, const float *y,
                            size_t y_stride, size_t n, vf sum[AQ_ST][2]) {
  for (size_t j = 0; j < n; j++) {
    const vf y0 = v_load(y + j * y_stride), y1 = v_load(y + j * y_stride + AQ_W);
    const float *at = x + j * x_stride;
#pragma GCC unroll 16
    for (int i = 0; i < m; i++) {
      const vf factor = v_splat(at[i]);
      if (subtract) {
        sum[i][0] = sum[i][0] - factor * y0;
        sum[i][1] = sum[i][1] - factor * y1;
      } else {
        sum[i][0] = sum[i][0] + factor * y0;
        sum[i][1] = sum[i][1] + factor * y1;
      }
    }
  }
}

/* The same on sums in memory, m of them `stride` floats apart. */
AQ_INLINE void tile_products_of(const int m, const int subtract, const float *x, size_t x_stride, const float *y,
                                size_t y_stride, size_t n, float *out, size_t stride) {
  vf sum[AQ_ST][2];
#pragma GCC unroll 16
  for (int i = 0; i < m; i++) {
    sum[i][0] = v_load(out + (size_t)i * stride);
    sum[i][1] = v_load(out + (size_t)i * stride + AQ_W);
  }
  add_products(m, subtract, x, x_stride, y, y_stride, n, sum);
#pragma GCC unroll 16
  for (int i = 0; i < m; i++) {
    v_store(out + (size_t)i * stride, sum[i][0]);
    v_store(out + (size_t)i * stride + AQ_W, sum[i][1]);
  }
}

#define AQ_TILE_PRODUCTS(name, m, subtract)                                                                  \
  static void name(const float *x, size_t xs, const float *y, size_t ys, size_t n, float *out, size_t stride) { \
    tile_products_of(m, subtract, x, xs, y, ys, n, out, stride);                                               \
  }
AQ_TILE_PRODUCTS(tile_add_whole, AQ_ST, 0)
AQ_TILE_PRODUCTS(tile_add_four, 4, 0)
AQ_TILE_PRODUCTS(tile_add_one, 1, 0)
AQ_TILE_PRODUCTS(tile_subtract_whole, AQ_ST, 1)
AQ_TILE_PRODUCTS(tile_subtract_four, 4, 1)
AQ_TILE_PRODUCTS(tile_subtract_one, 1, 1)

/* out[i] (+-)= sum_j x[j, i] y[j] for m columns i. */
static void columns_products(int subtract, size_t m, const float *x, size_t xs, const float *y, size_t ys, size_t n,
                             float *out, size_t stride) {
  size_t i = 0;
  for (; i + AQ_ST <= m; i += AQ_ST)
    (subtract ? tile_subtract_whole : tile_add_whole)(x + i, xs, y, ys, n, out + i * stride, stride);
  for (; i + 4 <= m; i += 4)
    (subtract ? tile_subtract_four : tile_add_four)(x + i, xs, y, ys, n, out + i * stride, stride);
  for (; i < m; i++) (subtract ? tile_subtract_one : tile_add_one)(x + i, xs, y, ys, n, out + i * stride, stride);
}

/* Rows of a matrix into the lanes of a panel; lanes beyond `rows` repeat the last row. */
static void load_panel(const float *from, size_t rows, size_t n, float *panel) {
  for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
    const float *row[AQ_W];
    for (size_t lane = 0; lane < AQ_W; lane++) row[lane] = from + aq_min_size(v + lane, rows - 1) * n;
    size_t k = 0;
    for (; k + AQ_W <= n; k += AQ_W) {
      vf r[AQ_W];
      for (size_t lane = 0; lane < AQ_W; lane++) r[lane] = v_load(row[lane] + k);
      v_transpose(r);
      for (size_t j = 0; j < AQ_W; j++) v_store(panel + (k + j) * AQ_ROWS + v, r[j]);
    }
    for (; k < n; k++)
      for (size_t lane = 0; lane < AQ_W; lane++) panel[k * AQ_ROWS + v + lane] = row[lane][k];
  }
}
