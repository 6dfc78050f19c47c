/* product.h: products of float32 matrices. Every element is one chain of fused multiply-adds in the order of
 * k, begun at what c holds: the bits of the CPU's aq_product_job. */
#ifndef AQ_CUDA_PRODUCT_H
#define AQ_CUDA_PRODUCT_H

#include "context.h"

/* c[i, j] += a(i, k) b(k, j) for k = 0, 1, ...; or -= where `subtract` is not 0. Element (i, k) of a lies at
 * a[i a_row + k a_col], b likewise: a transposed or a backward matrix is one of other steps. */
struct aq_product {
  const float *a;
  ptrdiff_t a_row, a_col;
  const float *b;
  ptrdiff_t b_row, b_col;
  float *c;
  size_t c_row, k, rows, cols;
  const float *weight; /* null, or [k]: weight[k] a(i, k), rounded, takes the place of a(i, k) */
  bool subtract, upper; /* upper: entries below the diagonal need not be right */
};

/* Puts a product on the stream. */
void aq_cuda_product(const aq_stream_state *on, const aq_product &product);

#endif
