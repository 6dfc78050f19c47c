/* product/scalar.c: the oracle of product/kernels.h, an element at a time. */
#include "kernels.h"

static void block(const aq_product_job *job, size_t row, size_t row_end, size_t col, size_t col_end, int upper) {
  for (size_t i = row; i < row_end && !aq_stopped(); i++)
    for (size_t k = 0; k < job->k; k++) {
      float a = job->a[(ptrdiff_t)i * job->a_row + (ptrdiff_t)k * job->a_col];
      if (job->weight) a = job->weight[k] * a;
      if (job->subtract) a = -a;
      const float *b = job->b + (ptrdiff_t)k * job->b_row;
      float *c = job->c + i * job->c_row;
      for (size_t j = upper && i > col ? i : col; j < col_end; j++) c[j] = aq_fma(a, b[(ptrdiff_t)j * job->b_col], c[j]);
    }
}

static void backward(const float *u, size_t u_row, size_t n, float *b, size_t b_row, size_t rows) {
  for (float *z = b; z < b + rows * b_row && !aq_stopped(); z += b_row)
    for (size_t k = n; k-- > 0;)
      for (size_t j = n; j-- > k + 1;) z[k] = aq_fma(-z[j], u[k * u_row + j], z[k]);
}

static void forward(const float *u, size_t u_row, size_t n, float *b, size_t b_row, size_t rows) {
  for (float *z = b; z < b + rows * b_row && !aq_stopped(); z += b_row)
    for (size_t k = 0; k < n; k++)
      for (size_t j = k + 1; j < n; j++) z[j] = aq_fma(-z[k], u[k * u_row + j], z[j]);
}

const aq_product_kernels aq_product_scalar = {block, backward, forward};
