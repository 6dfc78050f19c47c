/* backward/kernels.h: gradients of the parts of a forward pass, as plain loops. No sum is taken in another
 * order than the loops say and nothing is fused, so that every instruction set gives the same bits: scalar.c
 * compiles them for every processor of an architecture, avx2.c and avx512.c for wider vectors. */
#ifndef AQ_BACKWARD_H
#define AQ_BACKWARD_H

#include "../../arithmetic/gradients.h"
#include "../quantize/kernels.h"

/* Rows and columns of the blocks that a transposition copies, and of the scores that attention's backward
 * holds. */
#define AQ_BLOCK 64
#define AQ_BLOCK_QUERIES 32

typedef struct {
  const float *q, *k, *v, *out, *dout;
  const uint8_t *key_mask;
  size_t tokens, heads, kv_heads, head_size;
  float scale;
  float *dq, *dk, *dv;
} aq_attention_backward_job;

enum { AQ_SILU_BACKWARD, AQ_GELU_TANH_BACKWARD };

typedef struct {
  void (*transpose)(const float *in, size_t rows, size_t cols, size_t row_begin, size_t row_end, float *out);
  /* one group of one row: codes u8[n], dw f32[n] -> sums[0] = sum dw q, sums[1] = sum dw */
  void (*code_sums)(const uint8_t *codes, const float *dw, size_t n, double sums[2]);
  void (*rms_norm)(const float *x, const float *dy, size_t cols, const float *weight, float epsilon, float *dx);
  void (*layer_norm)(const float *x, const float *dy, size_t cols, const float *weight, float epsilon, float *dx);
  void (*attention)(const aq_attention_backward_job *job, size_t item, size_t kv_head);
  void (*elementwise)(int32_t function, const float *x, const float *dy, size_t n, float *dx);
  void (*silu_multiply)(const float *gate, const float *up, const float *dy, size_t n, float *dgate, float *dup);
  /* out[col] = sum over `rows` rows of a (times b), columns [begin, end) */
  void (*column_sums)(const float *a, const float *b, size_t rows, size_t cols, size_t begin, size_t end, float *out);
  void (*adam)(float *values, const float *gradients, float *first, float *second, size_t n, const aq_adam *step);
} aq_backward_kernels;

#endif
