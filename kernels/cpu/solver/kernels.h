/* solver/kernels.h: second moments, their factor, and rows solved by it. Every instruction set multiplies and
 * adds in the oracle's order without fusing, so that results are the same to the bit. */
#ifndef AQ_SOLVER_H
#define AQ_SOLVER_H

#include "../packed.h"
#include "../stop.h"

/* Most rows that a kernel works on at once: floats from one column of a panel to the next. */
#define AQ_PANEL 32

/* Columns whose updates of the others are applied together; at least AQ_PANEL. */
#define AQ_SOLVER_BLOCK 48

/* Tokens whose products are added up before they are added to a moment. */
#define AQ_MOMENT_TOKENS 256

/* `solve` leaves with outputs half-made when aq_stopped(). */
typedef struct {
  size_t panel; /* rows of one call, at most AQ_PANEL */
  /* rows of `b` [rows, n] become those of b M^-1, M = U diag(pivots) U^T */
  void (*solve)(const float *factor, const float *pivots, size_t n, float *b, size_t rows, float *work);
  /* h[i, j] -= sum_k g[k, i] a[k, j], k ascending, for i in [begin, end), i <= j < cols; g and a are [block,
   * stride]; entries of a from `cols` to the next multiple of AQ_PANEL are zero */
  void (*subtract_products)(float *h, size_t stride, const float *g, const float *a, size_t block, size_t begin,
                            size_t end, size_t cols);
  /* out[i, j] += sum_t weight[t] y[t, i] x[t, j] for columns j in [begin, end), all rows i (symmetric: i <
   * end) */
  void (*moment)(const float *x, const float *y, const float *weight, size_t tokens, size_t rows, size_t cols,
                 size_t begin, size_t end, int symmetric, float *out);
} aq_solver_kernels;

extern const aq_solver_kernels aq_solver_scalar;

#endif
