/* product/vector.h: product/kernels.h over vectors of AQ_W floats, included once by each unit of isa/ before
 * the families that multiply matrices.
 *
 * Blocks of a and b are packed so that a tile of c reads both in order; the panels of a stay in the second
 * cache, that of b in the first, the tile in registers:
 *
 *     left[k AQ_TM + i] = a(i, k)    right[k AQ_TN + j] = b(k, j)    AQ_TM rows, AQ_TN columns
 *
 * Expected of an instruction set, beside the primitives of isa/lanes.h: AQ_TM, at most AQ_W or a multiple of
 * it; v_exact_fma(a, b, c), a b + c rounded once. */
#include "kernels.h"

#define AQ_TN (2 * AQ_W)
#define AQ_TK 192 /* steps of k that are packed at once: a panel of b fits the first cache beside one of a */

/* Which lane's element comes after AQ_W steps of k, walked up or down. */
AQ_INLINE void load_steps(const float *from, ptrdiff_t row, size_t rows, ptrdiff_t step, vf r[AQ_W]) {
  const float *first = step > 0 ? from : from - (AQ_W - 1);
  for (size_t i = 0; i < AQ_W; i++) r[i] = v_load(first + (ptrdiff_t)aq_min_size(i, rows - 1) * row);
  v_transpose(r);
  if (step < 0)
    for (int i = 0; i < AQ_W / 2; i++) {
      const vf other = r[i];
      r[i] = r[AQ_W - 1 - i];
      r[AQ_W - 1 - i] = other;
    }
}

/* m <= AQ_TM rows of a from `row` on, k steps from `first` on. Rows beyond m repeat one, and their sums are
 * dropped; up to AQ_W floats behind the panel are written, too. */
AQ_INLINE void pack_left_panel(const aq_product_job *job, size_t row, size_t m, size_t first, size_t k, float *left) {
  const float *a = job->a + (ptrdiff_t)row * job->a_row + (ptrdiff_t)first * job->a_col;
  const float *weight = job->weight ? job->weight + first : 0;
  const float sign = job->subtract ? -1.0f : 1.0f;
  size_t at = 0;
  if (job->a_col == 1 || job->a_col == -1) {
    for (; at + AQ_W <= k; at += AQ_W)
      for (size_t i = 0; i < AQ_TM; i += AQ_W) {
        vf r[AQ_W];
        const size_t from = aq_min_size(i, m - 1);
        load_steps(a + (ptrdiff_t)from * job->a_row + (ptrdiff_t)at * job->a_col, job->a_row, m - from, job->a_col, r);
        for (size_t t = 0; t < AQ_W; t++)
          v_store(left + (at + t) * AQ_TM + i, r[t] * v_splat(sign * (weight ? weight[at + t] : 1.0f)));
      }
  } else if (job->a_row == 1 && m == AQ_TM) {
    for (; at < k; at++) {
      const float factor = sign * (weight ? weight[at] : 1.0f);
      for (size_t i = 0; i < AQ_TM; i++) left[at * AQ_TM + i] = factor * a[(ptrdiff_t)at * job->a_col + (ptrdiff_t)i];
    }
  }
  for (; at < k; at++)
    for (size_t i = 0; i < AQ_TM; i++)
      left[at * AQ_TM + i] = sign * (weight ? weight[at] : 1.0f) *
                             a[(ptrdiff_t)aq_min_size(i, m - 1) * job->a_row + (ptrdiff_t)at * job->a_col];
}

/* n <= AQ_TN columns of b from `col` on; columns beyond n are zero or repeat one. */
AQ_INLINE void pack_right_panel(const aq_product_job *job, size_t col, size_t n, size_t first, size_t k, float *right) {
  const float *b = job->b + (ptrdiff_t)first * job->b_row + (ptrdiff_t)col * job->b_col;
  size_t at = 0;
  if (job->b_col == 1 && n == AQ_TN) {
    for (; at < k; at++, b += job->b_row, right += AQ_TN) {
      v_store(right, v_load(b));
      v_store(right + AQ_W, v_load(b + AQ_W));
    }
    return;
  }
  if (job->b_row == 1 || job->b_row == -1)
    for (; at + AQ_W <= k; at += AQ_W)
      for (size_t j = 0; j < AQ_TN; j += AQ_W) {
        vf r[AQ_W];
        const size_t from = aq_min_size(j, n - 1);
        load_steps(b + (ptrdiff_t)from * job->b_col + (ptrdiff_t)at * job->b_row, job->b_col, n - from, job->b_row, r);
        for (size_t t = 0; t < AQ_W; t++) v_store(right + (at + t) * AQ_TN + j, r[t]);
      }
  for (; at < k; at++)
    for (size_t j = 0; j < AQ_TN; j++)
      right[at * AQ_TN + j] = j < n ? b[(ptrdiff_t)at * job->b_row + (ptrdiff_t)j * job->b_col] : 0.0f;
}

/* c [AQ_TM, AQ_TN] += left right */
static void product_tile(const float *left, const float *right, size_t k, float *c, size_t c_row) {
  vf sum[AQ_TM][2];
#pragma GCC unroll 16
  for (int i = 0; i < AQ_TM; i++) {
    sum[i][0] = v_load(c + (size_t)i * c_row);
    sum[i][1] = v_load(c + (size_t)i * c_row + AQ_W);
  }
  for (; k > 0; k--, left += AQ_TM, right += AQ_TN) {
    const vf right0 = v_load(right), right1 = v_load(right + AQ_W);
#pragma GCC unroll 16
    for (int i = 0; i < AQ_TM; i++) {
      const vf factor = v_splat(left[i]);
      sum[i][0] = v_exact_fma(factor, right0, sum[i][0]);
      sum[i][1] = v_exact_fma(factor, right1, sum[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < AQ_TM; i++) {
    v_store(c + (size_t)i * c_row, sum[i][0]);
    v_store(c + (size_t)i * c_row + AQ_W, sum[i][1]);
  }
}

/* The same where only m rows and n columns of c are there. */
static void product_part(const float *left, const float *right, size_t k, float *c, size_t c_row, size_t m, size_t n) {
  float part[AQ_TM * AQ_TN] = {0};
  for (size_t i = 0; i < m; i++) __builtin_memcpy(part + i * AQ_TN, c + i * c_row, n * sizeof(float));
  product_tile(left, right, k, part, AQ_TN);
  for (size_t i = 0; i < m; i++) __builtin_memcpy(c + i * c_row, part + i * AQ_TN, n * sizeof(float));
}

static void product_block(const aq_product_job *job, size_t row, size_t row_end, size_t col, size_t col_end,
                          int upper) {
  float left[AQ_PRODUCT_ROWS * AQ_TK + AQ_W], right[AQ_TK * AQ_TN];
  for (size_t first = 0; first < job->k && !aq_stopped(); first += AQ_TK) {
    const size_t k = aq_min_size(AQ_TK, job->k - first);
    for (size_t top = row; top < row_end; top += AQ_PRODUCT_ROWS) {
      const size_t rows = aq_min_size(AQ_PRODUCT_ROWS, row_end - top);
      for (size_t i = 0; i < rows; i += AQ_TM)
        pack_left_panel(job, top + i, aq_min_size(AQ_TM, rows - i), first, k, left + i * k);
      for (size_t j = col; j < col_end; j += AQ_TN) {
        const size_t n = aq_min_size(AQ_TN, col_end - j);
        if (upper && j + n <= top) continue;
        pack_right_panel(job, j, n, first, k, right);
        for (size_t i = 0; i < rows && !(upper && j + n <= top + i); i += AQ_TM) {
          float *c = job->c + (top + i) * job->c_row + j;
          const size_t m = aq_min_size(AQ_TM, rows - i);
          if (m == AQ_TM && n == AQ_TN)
            product_tile(left + i * k, right, k, c, job->c_row);
          else
            product_part(left + i * k, right, k, c, job->c_row, m, n);
        }
      }
    }
  }
}

/* Triangles ---------------------------------------------------------------------------------------------- */

#define AQ_TRIANGLE 32        /* columns that are solved one after the other, rows in the lanes */
#define AQ_TRIANGLE_BLOCK 256 /* and that take the others' products at once: a multiple of AQ_TRIANGLE */

/* n <= AQ_TRIANGLE columns of `rows` rows, against U (`back`: its transpose). */
static void solve_triangle(const float *u, size_t u_row, size_t n, float *b, size_t b_row, size_t rows, int back) {
  for (size_t row = 0; row < rows; row += AQ_W) {
    const size_t m = aq_min_size(AQ_W, rows - row);
    vf z[AQ_TRIANGLE];
    float *lanes = (float *)z, *at = b + row * b_row;
    for (size_t k = 0; k < n; k++)
      for (size_t i = 0; i < AQ_W; i++) lanes[k * AQ_W + i] = at[aq_min_size(i, m - 1) * b_row + k];
    if (back)
      for (size_t k = n; k-- > 0;)
        for (size_t j = 0; j < k; j++) z[j] = v_exact_fma(v_splat(-u[j * u_row + k]), z[k], z[j]);
    else
      for (size_t k = 0; k < n; k++)
        for (size_t j = k + 1; j < n; j++) z[j] = v_exact_fma(v_splat(-u[k * u_row + j]), z[k], z[j]);
    for (size_t i = 0; i < m; i++)
      for (size_t k = 0; k < n; k++) at[i * b_row + k] = lanes[k * AQ_W + i];
  }
}

static void product_backward(const float *u, size_t u_row, size_t n, float *b, size_t b_row, size_t rows) {
  const ptrdiff_t stride = (ptrdiff_t)u_row, b_stride = (ptrdiff_t)b_row;
  for (size_t end = n; end > 0 && !aq_stopped();) {
    const size_t begin = end - aq_min_size(AQ_TRIANGLE_BLOCK, end);
    const aq_product_job later = {b + n - 1, b_stride, -1, u + begin * u_row + n - 1, -1, stride, b + begin, b_row,
                                  n - end, 0, 1};
    product_block(&later, 0, rows, 0, end - begin, 0);
    for (size_t last = end; last > begin;) {
      const size_t first = last - aq_min_size(AQ_TRIANGLE, last - begin);
      solve_triangle(u + first * u_row + first, u_row, last - first, b + first, b_row, rows, 1);
      const aq_product_job solved = {b + last - 1, b_stride, -1, u + begin * u_row + last - 1, -1, stride, b + begin,
                                     b_row, last - first, 0, 1};
      product_block(&solved, 0, rows, 0, first - begin, 0);
      last = first;
    }
    end = begin;
  }
}

static void product_forward(const float *u, size_t u_row, size_t n, float *b, size_t b_row, size_t rows) {
  const ptrdiff_t stride = (ptrdiff_t)u_row, b_stride = (ptrdiff_t)b_row;
  for (size_t begin = 0; begin < n && !aq_stopped(); begin += AQ_TRIANGLE_BLOCK) {
    const size_t end = aq_min_size(begin + AQ_TRIANGLE_BLOCK, n);
    const aq_product_job earlier = {b, b_stride, 1, u + begin, stride, 1, b + begin, b_row, begin, 0, 1};
    product_block(&earlier, 0, rows, 0, end - begin, 0);
    for (size_t first = begin; first < end; first += AQ_TRIANGLE) {
      const size_t last = aq_min_size(first + AQ_TRIANGLE, end);
      solve_triangle(u + first * u_row + first, u_row, last - first, b + first, b_row, rows, 0);
      const aq_product_job solved = {b + first, b_stride, 1, u + first * u_row + last, stride, 1, b + last, b_row,
                                     last - first, 0, 1};
      product_block(&solved, 0, rows, 0, end - last, 0);
    }
  }
}

const aq_product_kernels AQ_NAMED(product) = {product_block, product_backward, product_forward};
