/* int8/api.c: the functions of arrowquant.h for 8-bit activations: argument checks, and work over threads. */
#include "../dispatch.h"
#include "../threads.h"

/* Quantize ----------------------------------------------------------------------------------------------- */

typedef struct {
  const aq_int8_kernels *kernels;
  const float *x;
  size_t cols;
  int32_t bits, kind;
  uint8_t *codes;
  float *scale;
  int32_t *zero_point;
} quantize_context;

static int32_t quantize_tokens(const void *context, size_t begin, size_t end) {
  const quantize_context *c = context;
  const float code_max = (float)((1 << c->bits) - 1);
  for (size_t t = begin; t < end; t++) {
    const float *x = c->x + t * c->cols;
    if (c->kind == AQ_ACTIVATIONS_PER_TOKEN) {
      float minimum, maximum;
      if (!c->kernels->range(x, c->cols, &minimum, &maximum)) return AQ_E_NONFINITE;
      const float wanted = maximum / code_max - minimum / code_max; /* the difference itself may overflow */
      const float scale = minimum == maximum ? 1.0f : wanted < 0x1p-126f ? 0x1p-126f : wanted;
      c->scale[t] = scale;
      c->zero_point[t] = (int32_t)aq_round_even(-minimum / scale);
      if (c->zero_point[t] > (int32_t)code_max) c->zero_point[t] = (int32_t)code_max;
    }
    if (!c->kernels->encode(x, c->cols, c->scale[t], (float)c->zero_point[t], code_max, c->codes + t * c->cols))
      return AQ_E_NONFINITE;
  }
  return AQ_OK;
}

int32_t aq_quantize_activations(const float *x, size_t tokens, size_t cols, int32_t bits, int32_t kind, uint8_t *codes,
                                float *scale, int32_t *zero_point, int32_t isa, int32_t threads) {
  if (tokens == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!x || !codes || !scale || !zero_point || bits < 2 || bits > 8) return AQ_E_ARGUMENT;
  if (kind != AQ_ACTIVATIONS_STATIC && kind != AQ_ACTIVATIONS_PER_TOKEN) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(tokens, cols)) return AQ_E_SHAPE;
  for (size_t t = 0; t < tokens && kind == AQ_ACTIVATIONS_STATIC; t++)
    if (!aq_activation_grid_allowed(scale[t], zero_point[t], bits)) return AQ_E_VALUE;
  const quantize_context context = {kernels->int8, x, cols, bits, kind, codes, scale, zero_point};
  return aq_run_units(quantize_tokens, &context, tokens, tokens * cols / AQ_CHEAP, threads);
}

typedef struct {
  const aq_int8_kernels *kernels;
  const float *x;
  size_t cols;
  int32_t bits, kind;
  aq_activation_grid given;
  float *out;
} round_context;

static int32_t round_tokens(const void *context, size_t begin, size_t end) {
  const round_context *c = context;
  const float code_max = (float)((1 << c->bits) - 1);
  for (size_t t = begin; t < end; t++) {
    const float *x = c->x + t * c->cols;
    aq_activation_grid grid = c->given;
    if (c->kind == AQ_ACTIVATIONS_PER_TOKEN) {
      float minimum, maximum;
      if (!c->kernels->range(x, c->cols, &minimum, &maximum)) return AQ_E_NONFINITE;
      grid = aq_covering_grid(minimum, maximum, c->bits);
    }
    if (!c->kernels->round(x, c->cols, grid.scale, grid.zero_point, code_max, c->out + t * c->cols))
      return AQ_E_NONFINITE;
  }
  return AQ_OK;
}

int32_t aq_round_activations(const float *x, size_t tokens, size_t cols, int32_t bits, int32_t kind, float scale,
                             int32_t zero_point, float *out, int32_t isa, int32_t threads) {
  if (tokens == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!x || !out || bits < 2 || bits > 8) return AQ_E_ARGUMENT;
  if (kind != AQ_ACTIVATIONS_STATIC && kind != AQ_ACTIVATIONS_PER_TOKEN) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(tokens, cols)) return AQ_E_SHAPE;
  if (kind == AQ_ACTIVATIONS_STATIC && !aq_activation_grid_allowed(scale, zero_point, bits)) return AQ_E_VALUE;
  const round_context context = {kernels->int8, x, cols, bits, kind, {scale, (float)zero_point}, out};
  return aq_run_units(round_tokens, &context, tokens, tokens * cols / AQ_CHEAP, threads);
}

/* Linear ------------------------------------------------------------------------------------------------- */

/* A view of the weights, by `trellis`: whether they are trellis codes, whose offsets stand in zero_point. */
static int32_t linear_int8(const uint8_t *codes, const float *x_scale, const int32_t *x_zero_point, size_t tokens,
                      const uint32_t *packed, const uint16_t *scale, const uint16_t *zero_point, const float *bias,
                      size_t rows, size_t cols, int32_t bits, size_t group_size, float *out, int32_t isa,
                      int32_t threads, int trellis) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  AQ_KERNELS(isa);
  aq_linear_job job = {.codes = codes, .x_scale = x_scale, .x_zero = x_zero_point, .tokens = tokens, .bias = bias,
                       .rows = rows, .cols = cols, .out = out};
  int32_t status = aq_check_linear(&job, x_scale && x_zero_point && (codes || cols == 0));
  if (status != AQ_OK) return status;
  for (size_t t = 0; t < tokens; t++)
    if (x_zero_point[t] < 0 || x_zero_point[t] > 255) return AQ_E_VALUE;
  if (cols && trellis)
    status = aq_view_trellis(packed, scale, zero_point, rows, cols, bits, group_size, kernels->levels, &job.view);
  else if (cols)
    status = aq_view_packed(packed, scale, zero_point, rows, cols, bits, group_size, &job.view);
  if (status != AQ_OK) return status;
  aq_linear_kernels linear = kernels->int8->linear;
  if (trellis && kernels->tokens && cols && job.view.group_size >= 64) linear.one = kernels->tokens->bytes[bits - 2];
  return aq_run_linear(&linear, &job, threads);
}

int32_t aq_linear_packed_int8(const uint8_t *codes, const float *x_scale, const int32_t *x_zero_point, size_t tokens,
                              const uint32_t *packed, const uint16_t *scale, const uint16_t *zero_point,
                              const float *bias, size_t rows, size_t cols, int32_t bits, size_t group_size, float *out,
                              int32_t isa, int32_t threads) {
  return linear_int8(codes, x_scale, x_zero_point, tokens, packed, scale, zero_point, bias, rows, cols, bits, group_size, out,
                isa, threads, 0);
}

int32_t aq_linear_trellis_int8(const uint8_t *codes, const float *x_scale, const int32_t *x_zero_point, size_t tokens,
                               const uint32_t *packed, const uint16_t *scale, const uint16_t *offset, const float *bias,
                               size_t rows, size_t cols, int32_t bits, size_t group_size, float *out, int32_t isa,
                               int32_t threads) {
  return linear_int8(codes, x_scale, x_zero_point, tokens, packed, scale, offset, bias, rows, cols, bits, group_size, out,
                isa, threads, 1);
}
