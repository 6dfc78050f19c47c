/* model_api.c: the functions of arrowquant.h that run a model: argument checks, and work over threads. */
#include "kernels.h"
#include "elementary.h"

/* a b c, or 2^31 if that is less: an amount of work, not a size. It counts in elements of the functions that quantize,
 * which take some nanoseconds each: starting a thread costs 50 to 100 microseconds. */
static size_t product(size_t a, size_t b, size_t c) {
  const double p = (double)a * (double)b * (double)c;
  return p < 0x1p31 ? a * b * c : (size_t)0x7fffffff;
}

/* Elements of a pass over float32 for one of those. */
#define AQ_CHEAP 16

static int three_allowed(size_t a, size_t b, size_t c) {
  return aq_counts_allowed(a, b) && (a == 0 || b == 0 || aq_counts_allowed(a * b, c));
}

/* Linear ------------------------------------------------------------------------------------------------------------ */

typedef struct {
  const aq_model_kernels *kernels;
  aq_linear_job job;
  int by_tokens;
} linear_context;

static int32_t linear_units(const void *context, size_t begin, size_t end) {
  const linear_context *c = context;
  const aq_linear_job *job = &c->job;
  const size_t tile = c->kernels->row_tile;
  if (c->by_tokens) {
    c->kernels->linear(job, begin, end, 0, job->rows);
    return AQ_OK;
  }
  const size_t row_begin = begin * tile, row_end = aq_min_size(end * tile, job->rows);
  if (job->tokens == 1)
    c->kernels->linear_vector(job, row_begin, row_end);
  else
    c->kernels->linear(job, 0, job->tokens, row_begin, row_end);
  return AQ_OK;
}

static int32_t linear(linear_context *c, int32_t threads) {
  const aq_linear_job *job = &c->job;
  if (job->cols == 0) {
    for (size_t t = 0; t < job->tokens; t++)
      for (size_t row = 0; row < job->rows; row++) job->out[t * job->rows + row] = job->bias ? job->bias[row] : 0.0f;
    return AQ_OK;
  }
  const size_t tiles = (job->rows - 1) / c->kernels->row_tile + 1;
  const size_t work = product(job->tokens, job->rows, job->cols) / (job->tokens == 1 ? 64 : 512);
  /* By rows every weight is prepared once; by tokens once a thread, but the parts come out even. */
  const size_t count = aq_thread_count(job->tokens, work, threads);
  c->by_tokens = tiles < 4 * count && tiles % count != 0 && job->tokens >= 32 * count;
  return aq_run_units(linear_units, c, c->by_tokens ? job->tokens : tiles, work, threads);
}

static int32_t check_linear(const float *x, size_t tokens, size_t rows, size_t cols, const float *out) {
  if (!out || (!x && cols)) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(rows, cols) || !aq_counts_allowed(tokens, cols) || !aq_counts_allowed(tokens, rows))
    return AQ_E_SHAPE;
  return AQ_OK;
}

int32_t aq_linear(const float *x, size_t tokens, const void *weights, int32_t dtype, const float *bias, size_t rows,
                  size_t cols, float *out, int32_t isa, int32_t threads) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  const aq_kernels *kernels = aq_choose_kernels(isa);
  if (!kernels) return AQ_E_ISA;
  if ((!weights && cols) || (dtype != AQ_F32 && dtype != AQ_F16 && dtype != AQ_BF16)) return AQ_E_ARGUMENT;
  const int32_t status = check_linear(x, tokens, rows, cols, out);
  if (status != AQ_OK) return status;
  linear_context context = {kernels->model,
                            {.x = x, .tokens = tokens, .weights = weights, .dtype = dtype, .bias = bias, .rows = rows,
                             .cols = cols, .out = out},
                            0};
  return linear(&context, threads);
}

int32_t aq_linear_packed(const float *x, size_t tokens, const uint32_t *packed, const uint16_t *scale,
                         const uint16_t *zero_point, const float *bias, size_t rows, size_t cols, int32_t bits,
                         size_t group_size, float *out, int32_t isa, int32_t threads) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  const aq_kernels *kernels = aq_choose_kernels(isa);
  if (!kernels) return AQ_E_ISA;
  int32_t status = check_linear(x, tokens, rows, cols, out);
  if (status != AQ_OK) return status;
  linear_context context = {kernels->model,
                            {.x = x, .tokens = tokens, .bias = bias, .rows = rows, .cols = cols, .out = out},
                            0};
  if (cols) {
    status = aq_view_packed(packed, scale, zero_point, rows, cols, bits, group_size, &context.job.view);
    if (status != AQ_OK) return status;
  }
  return linear(&context, threads);
}

int32_t aq_linear_two_level(const float *x, size_t tokens, const uint32_t *packed, const uint8_t *sub_scale,
                            const uint8_t *sub_min, const uint16_t *super_scale, const uint16_t *super_min,
                            const float *bias, size_t rows, size_t cols, int32_t bits, size_t group_size,
                            int32_t scale_bits, float *out, int32_t isa, int32_t threads) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  const aq_kernels *kernels = aq_choose_kernels(isa);
  if (!kernels) return AQ_E_ISA;
  int32_t status = check_linear(x, tokens, rows, cols, out);
  if (status != AQ_OK) return status;
  linear_context context = {kernels->model,
                            {.x = x, .tokens = tokens, .bias = bias, .rows = rows, .cols = cols, .out = out},
                            0};
  if (cols) {
    status = aq_view_two_level(packed, sub_scale, sub_min, super_scale, super_min, rows, cols, bits, group_size,
                               scale_bits, &context.job.view);
    if (status != AQ_OK) return status;
  }
  return linear(&context, threads);
}

/* Rows -------------------------------------------------------------------------------------------------------------- */

enum { RMS_NORM, LAYER_NORM, SOFTMAX, MODULATE, GATE_ADD };

typedef struct {
  const aq_model_kernels *kernels;
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
      case SOFTMAX: c->kernels->softmax(x, c->cols, out); break;
      case MODULATE: c->kernels->modulate(x, c->weight + item, c->bias + item, c->cols, out); break;
      default: c->kernels->gate_add(c->residual + row * c->cols, c->weight + item, x, c->cols, out); break;
    }
  }
  return AQ_OK;
}

static int32_t rows_over_threads(rows_context *c, size_t rows, int32_t isa, int32_t threads) {
  if (rows == 0 || c->cols == 0) return AQ_OK;
  const aq_kernels *kernels = aq_choose_kernels(isa);
  if (!kernels) return AQ_E_ISA;
  if (!c->x || !c->out) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(rows, c->cols)) return AQ_E_SHAPE;
  c->kernels = kernels->model;
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

int32_t aq_softmax(const float *x, size_t rows, size_t cols, float *out, int32_t isa, int32_t threads) {
  rows_context context = {.function = SOFTMAX, .x = x, .cols = cols, .out = out};
  return rows_over_threads(&context, rows, isa, threads);
}

int32_t aq_modulate(const float *x, const float *scale, const float *shift, size_t stride, size_t batch, size_t tokens,
                    size_t cols, float *out, int32_t isa, int32_t threads) {
  if (batch == 0 || tokens == 0 || cols == 0) return AQ_OK;
  if (!scale || !shift) return AQ_E_ARGUMENT;
  if (!three_allowed(batch, tokens, cols) || !aq_counts_allowed(batch, stride)) return AQ_E_SHAPE;
  rows_context context = {.function = MODULATE, .x = x, .weight = scale, .bias = shift, .cols = cols, .tokens = tokens,
                          .stride = stride, .out = out};
  return rows_over_threads(&context, batch * tokens, isa, threads);
}

int32_t aq_gate_add(const float *residual, const float *gate, const float *x, size_t stride, size_t batch,
                    size_t tokens, size_t cols, float *out, int32_t isa, int32_t threads) {
  if (batch == 0 || tokens == 0 || cols == 0) return AQ_OK;
  if (!residual || !gate) return AQ_E_ARGUMENT;
  if (!three_allowed(batch, tokens, cols) || !aq_counts_allowed(batch, stride)) return AQ_E_SHAPE;
  rows_context context = {.function = GATE_ADD, .x = x, .weight = gate, .residual = residual, .cols = cols,
                          .tokens = tokens, .stride = stride, .out = out};
  return rows_over_threads(&context, batch * tokens, isa, threads);
}

/* Elements ---------------------------------------------------------------------------------------------------------- */

#define AQ_ELEMENTS_PER_UNIT 1024

typedef struct {
  const aq_model_kernels *kernels;
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
  const aq_kernels *kernels = aq_choose_kernels(isa);
  if (!kernels) return AQ_E_ISA;
  if (!a || !out || (!b && (function == AQ_SILU_MULTIPLY || function == AQ_ADD))) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(1, n)) return AQ_E_SHAPE;
  const elements_context context = {kernels->model, function, a, b, n, out};
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

/* Attention --------------------------------------------------------------------------------------------------------- */

typedef struct {
  const aq_model_kernels *kernels;
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
                     size_t tokens, size_t heads, size_t kv_heads, size_t head_size, float scale, float *out,
                     int32_t isa, int32_t threads) {
  if (batch == 0 || tokens == 0 || heads == 0 || head_size == 0) return AQ_OK;
  const aq_kernels *kernels = aq_choose_kernels(isa);
  if (!kernels) return AQ_E_ISA;
  if (!q || !k || !v || !out) return AQ_E_ARGUMENT;
  if (kv_heads == 0 || heads % kv_heads != 0) return AQ_E_SHAPE;
  if (!three_allowed(batch, tokens, heads) || !aq_counts_allowed(batch * tokens * heads, head_size)) return AQ_E_SHAPE;
  const aq_model_kernels *model = kernels->model;
  const attention_context context = {
      model,
      {q, k, v, key_mask, tokens, heads, kv_heads, head_size, scale, out},
      (tokens - 1) / model->query_tile + 1};
  const size_t work = product(batch * heads, tokens * head_size / 64 + 1, tokens);
  return aq_run_units(run_attention, &context, batch * heads * context.blocks, work, threads);
}

/* Rotary embedding -------------------------------------------------------------------------------------------------- */

/* Frequencies held at once. */
#define AQ_FREQUENCIES 64

typedef struct {
  const aq_model_kernels *kernels;
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
  const aq_kernels *kernels = aq_choose_kernels(isa);
  if (!kernels) return AQ_E_ISA;
  if (!x || !positions) return AQ_E_ARGUMENT;
  if (head_size % 2 != 0 || !three_allowed(rows, heads, head_size)) return AQ_E_SHAPE;
  if (!(theta >= 1.0 && theta < 1e300)) return AQ_E_VALUE;
  for (size_t row = 0; row < rows; row++)
    if (positions[row] > AQ_MAX_POSITION || positions[row] < -AQ_MAX_POSITION) return AQ_E_VALUE;
  const rotary_context context = {kernels->model, x, positions, heads, head_size, aq_log(theta)};
  return aq_run_units(run_rotary, &context, rows, rows * heads * head_size / AQ_CHEAP, threads);
}
