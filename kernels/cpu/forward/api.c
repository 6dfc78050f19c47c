/* forward/api.c: the functions of arrowquant.h that run a model, without linear layers: argument checks, and
 * work over threads. */
#include "../dispatch.h"
#include "../threads.h"
#include "elementary.h"

/* Rows --------------------------------------------------------------------------------------------------- */

enum { RMS_NORM, LAYER_NORM, MODULATE, GATE_ADD };

typedef struct {
  const aq_forward_kernels *kernels;
  int32_t function;
  const float *x, *weight, *bias, *residual;
  float epsilon;
  size_t cols, tokens, stride; /* tokens and stride of MODULATE and GATE_ADD */
  float *out;
} rows_context;

static int32_t run_rows(const void *context, size_t begin, size_t end) {
  const rows_context *c = context;
  for (size_t row = begin; row < end; row++) {
    const float *x = c->x + row * c->cols;
    float *out = c->out + row * c->cols;
    const size_t item = c->tokens ? row / c->tokens * c->stride : 0;
    switch (c->function) {
      case RMS_NORM: c->kernels->rms_norm(x, c->cols, c->weight, c->epsilon, out); break;
      case LAYER_NORM: c->kernels->layer_norm(x, c->cols, c->weight, c->bias, c->epsilon, out); break;
      case MODULATE: c->kernels->modulate(x, c->weight + item, c->bias + item, c->cols, out); break;
      default: c->kernels->gate_add(c->residual + row * c->cols, c->weight + item, x, c->cols, out); break;
    }
  }
  return AQ_OK;
}

static int32_t rows_over_threads(rows_context *c, size_t rows, int32_t isa, int32_t threads) {
  if (rows == 0 || c->cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!c->x || !c->out) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(rows, c->cols)) return AQ_E_SHAPE;
  c->kernels = kernels->forward;
  return aq_run_units(run_rows, c, rows, rows * c->cols / AQ_CHEAP, threads);
}

int32_t aq_rms_norm(const float *x, size_t rows, size_t cols, const float *weight, float epsilon, float *out,
                    int32_t isa, int32_t threads) {
  rows_context context = {.function = RMS_NORM, .x = x, .weight = weight, .epsilon = epsilon, .cols = cols, .out = out};
  return rows_over_threads(&context, rows, isa, threads);
}

int32_t aq_layer_norm(const float *x, size_t rows, size_t cols, const float *weight, const float *bias, float epsilon,
                      float *out, int32_t isa, int32_t threads) {
  rows_context context = {.function = LAYER_NORM, .x = x, .weight = weight, .bias = bias, .epsilon = epsilon,
                          .cols = cols, .out = out};
  return rows_over_threads(&context, rows, isa, threads);
}

int32_t aq_modulate(const float *x, const float *scale, const float *shift, size_t stride, size_t batch, size_t tokens,
                    size_t cols, float *out, int32_t isa, int32_t threads) {
  if (batch == 0 || tokens == 0 || cols == 0) return AQ_OK;
  if (!scale || !shift) return AQ_E_ARGUMENT;
  if (!aq_three_counts_allowed(batch, tokens, cols) || !aq_counts_allowed(batch, stride)) return AQ_E_SHAPE;
  rows_context context = {.function = MODULATE, .x = x, .weight = scale, .bias = shift, .cols = cols, .tokens = tokens,
                          .stride = stride, .out = out};
  return rows_over_threads(&context, batch * tokens, isa, threads);
}

int32_t aq_gate_add(const float *residual, const float *gate, const float *x, size_t stride, size_t batch,
                    size_t tokens, size_t cols, float *out, int32_t isa, int32_t threads) {
  if (batch == 0 || tokens == 0 || cols == 0) return AQ_OK;
  if (!residual || !gate) return AQ_E_ARGUMENT;
  if (!aq_three_counts_allowed(batch, tokens, cols) || !aq_counts_allowed(batch, stride)) return AQ_E_SHAPE;
  rows_context context = {.function = GATE_ADD, .x = x, .weight = gate, .residual = residual, .cols = cols,
                          .tokens = tokens, .stride = stride, .out = out};
  return rows_over_threads(&context, batch * tokens, isa, threads);
}

/* Elements ----------------------------------------------------------------------------------------------- */

#define AQ_ELEMENTS_PER_UNIT 1024

typedef struct {
  const aq_forward_kernels *kernels;
  int32_t function;
  const float *a, *b;
  size_t n;
  float *out;
} elements_context;

static int32_t run_elements(const void *context, size_t begin, size_t end) {
  const elements_context *c = context;
  const size_t first = begin * AQ_ELEMENTS_PER_UNIT, stop = aq_min_size(end * AQ_ELEMENTS_PER_UNIT, c->n);
  c->kernels->elementwise(c->function, c->a + first, c->b ? c->b + first : 0, stop - first, c->out + first);
  return AQ_OK;
}

static int32_t elements(int32_t function, const float *a, const float *b, size_t n, float *out, int32_t isa,
                        int32_t threads) {
  if (n == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!a || !out || (!b && (function == AQ_SILU_MULTIPLY || function == AQ_ADD))) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(1, n)) return AQ_E_SHAPE;
  const elements_context context = {kernels->forward, function, a, b, n, out};
  return aq_run_units(run_elements, &context, (n - 1) / AQ_ELEMENTS_PER_UNIT + 1, n / AQ_CHEAP, threads);
}

int32_t aq_silu_multiply(const float *gate, const float *up, size_t n, float *out, int32_t isa, int32_t threads) {
  return elements(AQ_SILU_MULTIPLY, gate, up, n, out, isa, threads);
}

int32_t aq_silu(const float *x, size_t n, float *out, int32_t isa, int32_t threads) {
  return elements(AQ_SILU, x, 0, n, out, isa, threads);
}

int32_t aq_gelu_tanh(const float *x, size_t n, float *out, int32_t isa, int32_t threads) {
  return elements(AQ_GELU_TANH, x, 0, n, out, isa, threads);
}

int32_t aq_add(const float *a, const float *b, size_t n, float *out, int32_t isa, int32_t threads) {
  return elements(AQ_ADD, a, b, n, out, isa, threads);
}

/* Attention ---------------------------------------------------------------------------------------------- */

typedef struct {
  const aq_forward_kernels *kernels;
  aq_attention_job job;
  size_t blocks; /* of queries, for each head */
} attention_context;

static int32_t run_attention(const void *context, size_t begin, size_t end) {
  const attention_context *c = context;
  const aq_attention_job *job = &c->job;
  for (size_t unit = begin; unit < end; unit++) {
    const size_t block = unit % c->blocks, head = unit / c->blocks % job->heads, item = unit / c->blocks / job->heads;
    c->kernels->attention(job, item, head, job->tokens * block / c->blocks, job->tokens * (block + 1) / c->blocks);
  }
  return AQ_OK;
}

int32_t aq_attention(const float *q, const float *k, const float *v, const uint8_t *key_mask, size_t batch,
                     size_t tokens, size_t heads, size_t kv_heads, size_t head_size, size_t block, float scale,
                     float *out, int32_t isa, int32_t threads) {
  if (batch == 0 || tokens == 0 || heads == 0 || head_size == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!q || !k || !v || !out) return AQ_E_ARGUMENT;
  if (kv_heads == 0 || heads % kv_heads != 0) return AQ_E_SHAPE;
  if (!aq_three_counts_allowed(batch, tokens, heads) || !aq_counts_allowed(batch * tokens * heads,
                                                                           head_size)) return AQ_E_SHAPE;
  const attention_context context = {
      kernels->forward,
      {q, k, v, key_mask, tokens, heads, kv_heads, head_size, block, scale, out},
      (tokens - 1) / kernels->forward->query_tile + 1};
  const size_t work = aq_work((double)(batch * heads) * (double)(tokens * head_size / 64 + 1) * (double)tokens);
  return aq_run_units(run_attention, &context, batch * heads * context.blocks, work, threads);
}

/* Rotary embedding --------------------------------------------------------------------------------------- */

/* Frequencies held at once. */
#define AQ_FREQUENCIES 64

typedef struct {
  const aq_forward_kernels *kernels;
  float *x;
  const int32_t *positions;
  size_t heads, head_size;
  double log_theta;
} rotary_context;

static int32_t run_rotary(const void *context, size_t begin, size_t end) {
  const rotary_context *c = context;
  for (size_t first = 0; first < c->head_size / 2; first += AQ_FREQUENCIES) {
    double frequency[AQ_FREQUENCIES];
    const size_t count = aq_min_size(AQ_FREQUENCIES, c->head_size / 2 - first);
    for (size_t i = 0; i < count; i++)
      frequency[i] = aq_exp(-2.0 * (double)(first + i) / (double)c->head_size * c->log_theta);
    for (size_t row = begin; row < end; row++)
      c->kernels->rotary(c->x + row * c->heads * c->head_size, (double)c->positions[row], frequency, c->heads,
                         c->head_size, first, count);
  }
  return AQ_OK;
}

int32_t aq_rotary(float *x, const int32_t *positions, size_t rows, size_t heads, size_t head_size, double theta,
                  int32_t isa, int32_t threads) {
  if (rows == 0 || heads == 0 || head_size == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!x || !positions) return AQ_E_ARGUMENT;
  if (head_size % 2 != 0 || !aq_three_counts_allowed(rows, heads, head_size)) return AQ_E_SHAPE;
  if (!(theta >= 1.0 && theta < 1e300)) return AQ_E_VALUE;
  for (size_t row = 0; row < rows; row++)
    if (positions[row] > AQ_MAX_POSITION || positions[row] < -AQ_MAX_POSITION) return AQ_E_VALUE;
  const rotary_context context = {kernels->forward, x, positions, heads, head_size, aq_log(theta)};
  return aq_run_units(run_rotary, &context, rows, rows * heads * head_size / AQ_CHEAP, threads);
}
