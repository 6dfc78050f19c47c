/* solver/scalar.c: the oracle of solver/kernels.h. */
#include "kernels.h"

static void solve(const float *factor, const float *pivots, size_t n, float *b, size_t rows, float *work) {
  (void)rows;
  (void)work;
  for (size_t k = n; k-- > 0;)
    for (size_t j = n; j-- > k + 1;) b[k] -= factor[k * n + j] * b[j];
  for (size_t k = 0; k < n; k++) b[k] = b[k] / pivots[k];
  for (size_t k = 0; k < n; k++)
    for (size_t j = 0; j < k; j++) b[k] -= factor[j * n + k] * b[j];
}

static void subtract_products(float *h, size_t stride, const float *g, const float *a, size_t block, size_t begin,
                              size_t end, size_t cols) {
  for (size_t i = begin; i < end; i++)
    for (size_t k = 0; k < block; k++)
      for (size_t j = i; j < cols; j++) h[i * stride + j] -= g[k * stride + i] * a[k * stride + j];
}

static void moment(const float *x, const float *y, const float *weight, size_t tokens, size_t rows, size_t cols,
                   size_t begin, size_t end, int symmetric, float *out) {
  for (size_t first = 0; first < tokens; first += AQ_MOMENT_TOKENS) {
    const size_t last = aq_min_size(first + AQ_MOMENT_TOKENS, tokens);
    for (size_t i = 0; i < (symmetric ? end : rows); i++)
      for (size_t j = begin; j < end; j++) {
        float sum = 0;
        for (size_t t = first; t < last; t++) {
          const float left = weight ? weight[t] * y[t * rows + i] : y[t * rows + i];
          sum += left * x[t * cols + j];
        }
        out[i * cols + j] += sum;
      }
  }
}

const aq_solver_kernels aq_solver_scalar = {1, solve, subtract_products, moment};
