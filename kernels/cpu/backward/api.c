/* backward/api.c: the functions of arrowquant.h that compute gradients and follow them: argument checks, and
 * work over threads. */
#include "../dispatch.h"
#include "../threads.h"

#define AQ_ELEMENTS_PER_UNIT 4096

typedef struct {
  const aq_backward_kernels *kernels;
  const float *x, *dy, *weight;
  float *out, *other;
  size_t rows, cols, tokens, stride, blocks;
  float epsilon;
  int32_t function;
} rows_context;

/* Transposition ------------------------------------------------------------------------------------------ */

static int32_t run_transpose(const void *context, size_t begin, size_t end) {
  const rows_context *c = context;
  c->kernels->transpose(c->x, c->rows, c->cols, begin * AQ_BLOCK, aq_min_size(end * AQ_BLOCK, c->rows), c->out);
  return AQ_OK;
}

int32_t aq_transpose(const float *in, size_t rows, size_t cols, float *out, int32_t isa, int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!in || !out) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  const rows_context context = {.kernels = kernels->backward, .x = in, .rows = rows, .cols = cols, .out = out};
  return aq_run_units(run_transpose, &context, (rows - 1) / AQ_BLOCK + 1, rows * cols / AQ_CHEAP, threads);
}

/* Scales and zero points --------------------------------------------------------------------------------- */

typedef struct {
  const aq_backward_kernels *kernels;
  const aq_quantize_kernels *unpacking;
  const float *dw;
  aq_packed_view view;
  float *dscale, *dzero; /* or doffset */
} packed_context;

static void level_codes(const aq_packed_view *view, size_t row, size_t col, size_t n, uint8_t *codes) {
  int8_t levels[AQ_SEGMENT + 32 + AQ_LEVELS_BEHIND];
  view->levels((const uint8_t *)(view->packed + row * view->words), 4 * view->words, col, n, levels);
  for (size_t i = 0; i < n; i++) codes[i] = (uint8_t)(levels[i] + AQ_LEVEL_ZERO);
}

static int32_t run_packed(const void *context, size_t begin, size_t end) {
  const packed_context *c = context;
  const aq_packed_view *view = &c->view;
  uint8_t codes[AQ_SEGMENT + 32];
  for (size_t row = begin; row < end; row++)
    for (size_t group = 0; group < view->groups; group++) {
      const size_t first = group * view->group_size, stop = aq_min_size(first + view->group_size, view->cols);
      double products = 0.0, plain = 0.0;
      for (size_t col = first; col < stop; col += AQ_SEGMENT) {
        const size_t n = aq_min_size(AQ_SEGMENT, stop - col);
        double sums[2];
        /* a group may begin inside a word: unpacked with the codes before it */
        const size_t inside = col % 32;
        if (view->levels)
          level_codes(view, row, col - inside, n + inside, codes);
        else
          c->unpacking->unpack_row(view->packed + row * view->words + (col - inside) * (size_t)view->bits / 32,
                                   n + inside, view->bits, codes);
        c->kernels->code_sums(codes + inside, c->dw + row * view->cols + col, n, sums);
        products += sums[0];
        plain += sums[1];
      }
      const size_t index = row * view->groups + group;
      if (view->levels) {
        c->dscale[index] = (float)((products - AQ_LEVEL_ZERO * plain) * (double)AQ_TRELLIS_UNIT);
        c->dzero[index] = (float)plain;
        continue;
      }
      const double scale = aq_float_from_half(view->scale[index]);
      const double zero =
          view->zero_point ? (double)aq_float_from_half(view->zero_point[index]) : (double)(1 << (view->bits - 1));
      c->dscale[index] = (float)(products - zero * plain);
      if (c->dzero) c->dzero[index] = (float)(-scale * plain);
    }
  return AQ_OK;
}

int32_t aq_packed_gradient(const float *dw, const uint32_t *packed, const uint16_t *scale, const uint16_t *zero_point,
                           size_t rows, size_t cols, int32_t bits, size_t group_size, float *dscale, float *dzero,
                           int32_t isa, int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!dw || !dscale || (dzero && !zero_point)) return AQ_E_ARGUMENT;
  packed_context context = {
      .kernels = kernels->backward, .unpacking = kernels->quantize, .dw = dw, .dscale = dscale, .dzero = dzero};
  const int32_t status = aq_view_packed(packed, scale, zero_point, rows, cols, bits, group_size, &context.view);
  if (status != AQ_OK) return status;
  return aq_run_units(run_packed, &context, rows, rows * cols / AQ_CHEAP, threads);
}

int32_t aq_trellis_gradient(const float *dw, const uint32_t *packed, size_t rows, size_t cols, int32_t bits,
                            size_t group_size, float *dscale, float *doffset, int32_t isa, int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!dw || !dscale || !doffset) return AQ_E_ARGUMENT;
  packed_context context = {.kernels = kernels->backward, .dw = dw, .dscale = dscale, .dzero = doffset};
  static const uint16_t unread[1]; /* the gradient does not depend on scales and offsets */
  const int32_t status =
      aq_view_trellis(packed, unread, unread, rows, cols, bits, group_size, kernels->levels, &context.view);
  if (status != AQ_OK) return status;
  return aq_run_units(run_packed, &context, rows, rows * cols / AQ_CHEAP, threads);
}

/* Norms -------------------------------------------------------------------------------------------------- */

static int32_t run_norm(const void *context, size_t begin, size_t end) {
  const rows_context *c = context;
  for (size_t row = begin; row < end; row++) {
    const size_t at = row * c->cols;
    (c->function ? c->kernels->layer_norm : c->kernels->rms_norm)(c->x + at, c->dy + at, c->cols, c->weight,
                                                                  c->epsilon, c->out + at);
  }
  return AQ_OK;
}

static int32_t norm(int32_t layer, const float *x, const float *dy, size_t rows, size_t cols, const float *weight,
                    float epsilon, float *dx, int32_t isa, int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!x || !dy || !dx) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  const rows_context context = {.kernels = kernels->backward, .x = x, .dy = dy, .weight = weight, .cols = cols,
                                .epsilon = epsilon, .out = dx, .function = layer};
  return aq_run_units(run_norm, &context, rows, rows * cols / AQ_CHEAP, threads);
}

int32_t aq_rms_norm_backward(const float *x, const float *dy, size_t rows, size_t cols, const float *weight,
                             float epsilon, float *dx, int32_t isa, int32_t threads) {
  return norm(0, x, dy, rows, cols, weight, epsilon, dx, isa, threads);
}

int32_t aq_layer_norm_backward(const float *x, const float *dy, size_t rows, size_t cols, const float *weight,
                               float epsilon, float *dx, int32_t isa, int32_t threads) {
  return norm(1, x, dy, rows, cols, weight, epsilon, dx, isa, threads);
}

/* Elements ----------------------------------------------------------------------------------------------- */

static int32_t run_elements(const void *context, size_t begin, size_t end) {
  const rows_context *c = context;
  const size_t first = begin * AQ_ELEMENTS_PER_UNIT, n = aq_min_size(end * AQ_ELEMENTS_PER_UNIT, c->rows) - first;
  if (c->other)
    c->kernels->silu_multiply(c->x + first, c->weight + first, c->dy + first, n, c->out + first, c->other + first);
  else
    c->kernels->elementwise(c->function, c->x + first, c->dy + first, n, c->out + first);
  return AQ_OK;
}

static int32_t elements(int32_t function, const float *x, const float *up, const float *dy, size_t n, float *dx,
                        float *dup, int32_t isa, int32_t threads) {
  if (n == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!x || !dy || !dx) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(1, n)) return AQ_E_SHAPE;
  const rows_context context = {.kernels = kernels->backward, .x = x, .weight = up, .dy = dy, .rows = n, .out = dx,
                                .other = dup, .function = function};
  return aq_run_units(run_elements, &context, (n - 1) / AQ_ELEMENTS_PER_UNIT + 1, n / AQ_CHEAP, threads);
}

int32_t aq_silu_backward(const float *x, const float *dy, size_t n, float *dx, int32_t isa, int32_t threads) {
  return elements(AQ_SILU_BACKWARD, x, 0, dy, n, dx, 0, isa, threads);
}

int32_t aq_gelu_tanh_backward(const float *x, const float *dy, size_t n, float *dx, int32_t isa, int32_t threads) {
  return elements(AQ_GELU_TANH_BACKWARD, x, 0, dy, n, dx, 0, isa, threads);
}

int32_t aq_silu_multiply_backward(const float *gate, const float *up, const float *dy, size_t n, float *dgate,
                                  float *dup, int32_t isa, int32_t threads) {
  if (n == 0) return AQ_OK;
  if (!up || !dup) return aq_choose_kernels(isa) ? AQ_E_ARGUMENT : AQ_E_ISA;
  return elements(0, gate, up, dy, n, dgate, dup, isa, threads);
}

/* Sums of columns ---------------------------------------------------------------------------------------- */

static int32_t run_columns(const void *context, size_t begin, size_t end) {
  const rows_context *c = context;
  for (size_t unit = begin; unit < end; unit++) {
    const size_t item = unit / c->blocks, first = unit % c->blocks * AQ_BLOCK, at = item * c->tokens * c->cols;
    c->kernels->column_sums(c->x + at, c->dy ? c->dy + at : 0, c->tokens, c->cols, first,
                            aq_min_size(first + AQ_BLOCK, c->cols), c->out + item * c->stride);
  }
  return AQ_OK;
}

int32_t aq_column_sums(const float *a, const float *b, size_t batch, size_t tokens, size_t cols, size_t stride,
                       float *out, int32_t isa, int32_t threads) {
  if (batch == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!out || (!a && tokens)) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(batch, cols) || (tokens && !aq_counts_allowed(batch * cols, tokens)) || stride < cols ||
      !aq_counts_allowed(batch, stride))
    return AQ_E_SHAPE;
  const rows_context context = {.kernels = kernels->backward, .x = a, .dy = b, .tokens = tokens, .cols = cols,
                                .stride = stride,
                                .out = out, .blocks = (cols - 1) / AQ_BLOCK + 1};
  return aq_run_units(run_columns, &context, batch * context.blocks,
                      aq_work((double)batch * (double)tokens * (double)cols / AQ_CHEAP), threads);
}

/* Attention ---------------------------------------------------------------------------------------------- */

typedef struct {
  const aq_backward_kernels *kernels;
  aq_attention_backward_job job;
} attention_context;

static int32_t run_attention(const void *context, size_t begin, size_t end) {
  const attention_context *c = context;
  for (size_t unit = begin; unit < end; unit++)
    c->kernels->attention(&c->job, unit / c->job.kv_heads, unit % c->job.kv_heads);
  return AQ_OK;
}

int32_t aq_attention_backward(const float *q, const float *k, const float *v, const float *out, const float *dout,
                              const uint8_t *key_mask, size_t batch, size_t tokens, size_t heads, size_t kv_heads,
                              size_t head_size, float scale, float *dq, float *dk, float *dv, int32_t isa,
                              int32_t threads) {
  if (batch == 0 || tokens == 0 || heads == 0 || head_size == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!q || !k || !v || !out || !dout || !dq || !dk || !dv) return AQ_E_ARGUMENT;
  if (kv_heads == 0 || heads % kv_heads != 0) return AQ_E_SHAPE;
  if (!aq_three_counts_allowed(batch, tokens, heads) || !aq_counts_allowed(batch * tokens * heads, head_size))
    return AQ_E_SHAPE;
  const attention_context context = {
      kernels->backward, {q, k, v, out, dout, key_mask, tokens, heads, kv_heads, head_size, scale, dq, dk, dv}};
  const size_t work = aq_work((double)(batch * heads) * (double)(tokens * head_size / 16 + 1) * (double)tokens);
  return aq_run_units(run_attention, &context, batch * kv_heads, work, threads);
}

/* Adam --------------------------------------------------------------------------------------------------- */

typedef struct {
  const aq_backward_kernels *kernels;
  float *values, *first, *second;
  const float *gradients;
  size_t n;
  const aq_adam *step;
} step_context;

static int32_t run_step(const void *context, size_t begin, size_t end) {
  const step_context *c = context;
  const size_t at = begin * AQ_ELEMENTS_PER_UNIT, n = aq_min_size(end * AQ_ELEMENTS_PER_UNIT, c->n) - at;
  c->kernels->adam(c->values + at, c->gradients + at, c->first + at, c->second + at, n, c->step);
  return AQ_OK;
}

int32_t aq_adam_step(float *values, const float *gradients, float *first, float *second, size_t n, double rate,
                     double beta1, double beta2, double epsilon, int32_t step, int32_t isa, int32_t threads) {
  if (n == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!values || !gradients || !first || !second) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(1, n)) return AQ_E_SHAPE;
  if (!aq_adam_allowed(beta1, beta2, epsilon, step)) return AQ_E_VALUE;
  const aq_adam adam = aq_adam_of(rate, beta1, beta2, epsilon, step);
  const step_context context = {kernels->backward, values, first, second, gradients, n, &adam};
  return aq_run_units(run_step, &context, (n - 1) / AQ_ELEMENTS_PER_UNIT + 1, n / AQ_CHEAP, threads);
}
