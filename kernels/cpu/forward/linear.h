/* forward/linear.h: linear layers, with activations in float32 or in 8 bits (int8/), shared out over
 * threads. */
#ifndef AQ_LINEAR_H
#define AQ_LINEAR_H

#include "../packed.h"

/* Weights are packed if `view.packed` is set, else [rows, cols] of `dtype`. */
typedef struct {
  const float *x;        /* [tokens, cols], or: */
  const uint8_t *codes;  /* x = x_scale (code - x_zero) */
  const float *x_scale;  /* [tokens] */
  const int32_t *x_zero; /* [tokens], 0..255 */
  size_t tokens;
  const void *weights;
  int32_t dtype;
  aq_packed_view view;
  const float *bias; /* null: none */
  size_t rows, cols;
  float *out; /* [tokens, rows] */
} aq_linear_job;

typedef struct {
  size_t row_tile;   /* rows are split over threads in multiples of this */
  size_t few_tokens; /* up to as many tokens are taken one by one */
  double per_work;   /* multiply-adds of many tokens that take as long as a unit of threads.h's work */
  /* out[t, n] for t in [token_begin, token_end), n in [row_begin, row_end) */
  void (*many)(const aq_linear_job *job, size_t token_begin, size_t token_end, size_t row_begin, size_t row_end);
  /* one token */
  void (*one)(const aq_linear_job *job, size_t token, size_t row_begin, size_t row_end);
} aq_linear_kernels;

/* Checks sizes; `some`: whether every pointer is there that must be. */
int32_t aq_check_linear(const aq_linear_job *job, int some);
int32_t aq_run_linear(const aq_linear_kernels *kernels, const aq_linear_job *job, int32_t threads);

#endif
