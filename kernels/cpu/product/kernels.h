/* product/kernels.h: products of float32 matrices in cache blocks, and the triangular steps that factor and
 * solve with them. Every element is one chain of fused multiply-adds in the order of k, begun at what c
 * holds: any split into blocks and calls, any number of threads and any instruction set give the same bits.
 *
 * A unit of isa/ includes vector.h, whose static functions other families' vector files call on their own
 * panels: `product_block` on matrices anywhere in memory, `product_tile` on packed panels, `v_exact_fma` on
 * lanes. */
#ifndef AQ_PRODUCT_H
#define AQ_PRODUCT_H

#include "../packed.h"
#include "../stop.h"

/* c[i, j] += a[i, k] b[k, j] for k = 0, 1, ...; or -= where `subtract` is not 0. Element (i, k) of a lies at
 * a[i a_row + k a_col], so that a transposed or a backward matrix is one of other steps; b likewise, one of
 * whose steps is 1 or -1. */
typedef struct {
  const float *a;
  ptrdiff_t a_row, a_col;
  const float *b;
  ptrdiff_t b_row, b_col;
  float *c;
  size_t c_row, k;
  const float *weight; /* null, or [k]: weight[k] a[i, k], rounded, takes the place of a[i, k] */
  int subtract;
} aq_product_job;

/* Rows and columns of c that one call of `block` should get at most: rows are packed together. */
#define AQ_PRODUCT_ROWS 168
#define AQ_PRODUCT_COLS 512

typedef struct {
  /* rows [row, row_end) and columns [col, col_end) of c; `upper`: entries below the diagonal need not be
   * right */
  void (*block)(const aq_product_job *job, size_t row, size_t row_end, size_t col, size_t col_end, int upper);
  /* rows of b [rows, n] become z, z U^T = b, U [n, n] unit upper triangular:
   * z[k] = b[k] - sum_j z[j] U[k, j], j descending from n - 1 */
  void (*backward)(const float *u, size_t u_row, size_t n, float *b, size_t b_row, size_t rows);
  /* the same for z U = b: z[k] = b[k] - sum_j z[j] U[j, k], j ascending from 0 */
  void (*forward)(const float *u, size_t u_row, size_t n, float *b, size_t b_row, size_t rows);
} aq_product_kernels;

extern const aq_product_kernels aq_product_scalar;

/* c as `job` says, [rows, cols], over threads; `upper`: rows = cols, and only j >= i. */
int32_t aq_run_product(const aq_product_kernels *kernels, const aq_product_job *job, size_t rows, size_t cols,
                       int upper, int32_t threads);

/* a b + c rounded once. The product of two floats is exact in double; where the sum is not, and lies in the
 * middle of two floats or below the normal ones, rounding it to odd keeps the second rounding right. */
static inline float aq_fma(float a, float b, float c) {
#if defined(__aarch64__) || defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  const double p = (double)a * (double)b, addend = (double)c;
  double s = p + addend;
  uint64_t bits;
  __builtin_memcpy(&bits, &s, sizeof bits);
  const int tiny = s < 0x1p-126 && s > -0x1p-126;
  if ((bits & 0x1fffffff) != 0x10000000 && !tiny) return (float)s;
  const double other = s - p, error = (p - (s - other)) + (addend - other);
  if ((error > 0 || error < 0) && !(bits & 1)) bits += (error > 0) == (s > 0) ? 1 : (uint64_t)-1;
  __builtin_memcpy(&s, &bits, sizeof s);
  return (float)s;
#endif
}

#endif
