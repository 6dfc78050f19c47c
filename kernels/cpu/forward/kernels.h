/* model.h: the parts of a forward pass that an instruction set implements. Rounding is the instruction set's own,
 * but never depends on threads, nor on how the API splits rows, tokens or elements into calls. */
#ifndef AQ_MODEL_H
#define AQ_MODEL_H

#include "../kernels.h"

/* Weights of a linear layer: packed if `view.packed` is set, else [rows, cols] of `dtype`. */
typedef struct {
  const float *x;
  size_t tokens;
  const void *weights;
  int32_t dtype;
  aq_packed_view view;
  const float *bias; /* null: none */
  size_t rows, cols;
  float *out;
} aq_linear_job;

typedef struct {
  const float *q, *k, *v;
  const uint8_t *key_mask;
  size_t tokens, heads, kv_heads, head_size;
  float scale;
  float *out;
} aq_attention_job;

/* Element-wise functions. */
enum { AQ_SILU, AQ_GELU_TANH, AQ_SILU_MULTIPLY, AQ_ADD };

struct aq_model_kernels {
  size_t row_tile;   /* rows of a linear layer are split over threads in multiples of this */
  size_t query_tile; /* queries that one call of `attention` takes at most */
  /* out[t, n] for t in [token_begin, token_end), n in [row_begin, row_end); more than one token in the job */
  void (*linear)(const aq_linear_job *job, size_t token_begin, size_t token_end, size_t row_begin, size_t row_end);
  /* the job's one token, rows [row_begin, row_end) */
  void (*linear_vector)(const aq_linear_job *job, size_t row_begin, size_t row_end);
  void (*rms_norm)(const float *x, size_t cols, const float *weight, float epsilon, float *out);
  void (*layer_norm)(const float *x, size_t cols, const float *weight, const float *bias, float epsilon, float *out);
  void (*softmax)(const float *x, size_t cols, float *out);
  /* queries [begin, end) of one head of one batch item */
  void (*attention)(const aq_attention_job *job, size_t item, size_t head, size_t begin, size_t end);
  /* one row of all heads; frequency f64[head_size / 2] */
  void (*rotary)(float *x, double position, const double *frequency, size_t heads, size_t head_size, size_t first,
                 size_t count);
  void (*elementwise)(int32_t function, const float *a, const float *b, size_t n, float *out);
  void (*modulate)(const float *x, const float *scale, const float *shift, size_t cols, float *out);
  void (*gate_add)(const float *residual, const float *gate, const float *x, size_t cols, float *out);
};

extern const aq_model_kernels aq_model_scalar;

#endif
