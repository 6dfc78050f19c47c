/* forward/kernels.h: the parts of a forward pass. Rounding may differ between instruction sets, but never
 * depends on threads, nor on how the API splits rows, tokens or elements into calls. */
#ifndef AQ_FORWARD_H
#define AQ_FORWARD_H

#include "linear.h"

typedef struct {
  const float *q, *k, *v;
  const uint8_t *key_mask;
  size_t tokens, heads, kv_heads, head_size;
  size_t block; /* tokens of a block, 0 where every query sees all keys */
  float scale;
  float *out;
} aq_attention_job;

/* Keys that a query sees: the first so many. */
static inline size_t aq_visible_keys(const aq_attention_job *job, size_t query) {
  if (job->block == 0) return job->tokens;
  const size_t left = job->tokens - query, inside = job->block - query % job->block;
  return query + (inside < left ? inside : left);
}

/* Element-wise functions. */
enum { AQ_SILU, AQ_GELU_TANH, AQ_SILU_MULTIPLY, AQ_ADD };

typedef struct {
  aq_linear_kernels linear;
  size_t query_tile; /* queries that one call of `attention` takes at most */
  void (*rms_norm)(const float *x, size_t cols, const float *weight, float epsilon, float *out);
  void (*layer_norm)(const float *x, size_t cols, const float *weight, const float *bias, float epsilon, float *out);
  /* queries [begin, end) of one head of one batch item */
  void (*attention)(const aq_attention_job *job, size_t item, size_t head, size_t begin, size_t end);
  /* one row of all heads; frequency f64[head_size / 2] */
  void (*rotary)(float *x, double position, const double *frequency, size_t heads, size_t head_size, size_t first,
                 size_t count);
  void (*elementwise)(int32_t function, const float *a, const float *b, size_t n, float *out);
  void (*modulate)(const float *x, const float *scale, const float *shift, size_t cols, float *out);
  void (*gate_add)(const float *residual, const float *gate, const float *x, size_t cols, float *out);
} aq_forward_kernels;

extern const aq_forward_kernels aq_forward_scalar;

#endif
