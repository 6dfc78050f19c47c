/* solver/vector.h: solver/kernels.h over vectors of AQ_W floats, included once by each unit of isa/ behind
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

/* out[i] -= sum_j x[i, j] y[j], j descending: rows of x this time. */
AQ_INLINE void subtract_rows(const int m, const float *x, size_t x_rows, const float *y, size_t n, float *out) {
  vf sum[4][2];
  for (int i = 0; i < m; i++) {
    sum[i][0] = v_load(out + i * AQ_ROWS);
    sum[i][1] = v_load(out + i * AQ_ROWS + AQ_W);
  }
  for (size_t j = n; j-- > 0;) {
    const vf y0 = v_load(y + j * AQ_ROWS), y1 = v_load(y + j * AQ_ROWS + AQ_W);
#pragma GCC unroll 4
    for (int i = 0; i < m; i++) {
      const vf factor = v_splat(x[(size_t)i * x_rows + j]);
      sum[i][0] = sum[i][0] - factor * y0;
      sum[i][1] = sum[i][1] - factor * y1;
    }
  }
  for (int i = 0; i < m; i++) {
    v_store(out + i * AQ_ROWS, sum[i][0]);
    v_store(out + i * AQ_ROWS + AQ_W, sum[i][1]);
  }
}

static void solve(const float *factor, const float *pivots, size_t n, float *b, size_t rows, float *work) {
  float *x = work;
  load_panel(b, rows, n, x);
  for (size_t end = n; end > 0 && !aq_stopped();) {
    const size_t block = end >= 4 ? 4 : 1, first = end - block;
    const float *right = factor + first * n + end;
    if (block == 4)
      subtract_rows(4, right, n, x + end * AQ_ROWS, n - end, x + first * AQ_ROWS);
    else
      subtract_rows(1, right, n, x + end * AQ_ROWS, n - end, x + first * AQ_ROWS);
    for (size_t k = end; k-- > first;)
      subtract_rows(1, factor + k * n + k + 1, n, x + (k + 1) * AQ_ROWS, end - k - 1, x + k * AQ_ROWS);
    end = first;
  }
  for (size_t k = 0; k < n; k++)
    for (size_t v = k * AQ_ROWS; v < (k + 1) * AQ_ROWS; v += AQ_W) v_store(x + v, v_load(x + v) / v_splat(pivots[k]));
  for (size_t first = 0; first < n && !aq_stopped(); first += AQ_ST) {
    const size_t block = aq_min_size(AQ_ST, n - first);
    columns_products(1, block, factor + first, n, x, AQ_ROWS, first, x + first * AQ_ROWS, AQ_ROWS);
    for (size_t k = first; k < first + block; k++)
      tile_subtract_one(factor + first * n + k, n, x + first * AQ_ROWS, AQ_ROWS, k - first, x + k * AQ_ROWS, AQ_ROWS);
  }
  for (size_t lane = 0; lane < rows; lane++)
    for (size_t k = 0; k < n; k++) b[lane * n + k] = x[k * AQ_ROWS + lane];
}

static void subtract_products(float *h, size_t stride, const float *g, const float *a, size_t block, size_t begin,
                              size_t end, size_t cols) {
  size_t i = begin;
  while (i < end) {
    const size_t m = i + AQ_ST <= end ? AQ_ST : i + 4 <= end ? 4 : 1;
    void (*subtract)(const float *, size_t, const float *, size_t, size_t, float *, size_t) =
        m == 1 ? tile_subtract_one : m == 4 ? tile_subtract_four : tile_subtract_whole;
    /* a tile that crosses the diagonal also changes entries below it, which nobody reads */
    for (size_t j = i / AQ_ROWS * AQ_ROWS; j < cols; j += AQ_ROWS)
      subtract(g + i, stride, a + j, stride, block, h + i * stride + j, stride);
    i += m;
  }
}

static void moment(const float *x, const float *y, const float *weight, size_t tokens, size_t rows, size_t cols,
                   size_t begin, size_t end, int symmetric, float *out) {
  float right[AQ_MOMENT_TOKENS * AQ_ROWS], left[AQ_MOMENT_TOKENS * AQ_ST], sum[AQ_ST * AQ_ROWS];
  for (size_t first = 0; first < tokens; first += AQ_MOMENT_TOKENS) {
    const size_t count = aq_min_size(AQ_MOMENT_TOKENS, tokens - first);
    for (size_t j = begin; j < end; j += AQ_ROWS) {
      const size_t n = aq_min_size(AQ_ROWS, end - j);
      for (size_t t = 0; t < count; t++)
        for (size_t lane = 0; lane < AQ_ROWS; lane++)
          right[t * AQ_ROWS + lane] = lane < n ? x[(first + t) * cols + j + lane] : 0.0f;
      for (size_t i = 0; i < (symmetric ? j + n : rows); i += AQ_ST) {
        const size_t m = aq_min_size(AQ_ST, rows - i);
        for (size_t t = 0; t < count; t++)
          for (size_t k = 0; k < m; k++) {
            const float value = y[(first + t) * rows + i + k];
            left[t * AQ_ST + k] = weight ? weight[first + t] * value : value;
          }
        __builtin_memset(sum, 0, sizeof sum);
        columns_products(0, m, left, AQ_ST, right, AQ_ROWS, count, sum, AQ_ROWS);
        for (size_t k = 0; k < m; k++)
          for (size_t lane = 0; lane < n; lane++) out[(i + k) * cols + j + lane] += sum[k * AQ_ROWS + lane];
      }
    }
  }
}

const aq_solver_kernels AQ_NAMED(solver) = {AQ_ROWS, solve, subtract_products, moment};
