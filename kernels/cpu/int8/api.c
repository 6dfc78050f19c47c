/* int8_api.c: the functions of arrowquant.h for 8-bit activations: argument checks, and work over threads. */
#include "kernels.h"

static const aq_int8_kernels *int8_of(int32_t isa) {
  const int32_t chosen = isa == AQ_ISA_BEST ? aq_best_isa() : isa;
  if (!aq_choose_kernels(chosen)) return 0;
  switch (chosen) {
#if defined(AQ_BUILD_AVX2)
    case AQ_ISA_AVX2: return &aq_int8_avx2;
#endif
#if defined(AQ_BUILD_AVX512)
    case AQ_ISA_AVX512: return &aq_int8_avx512;
    case AQ_ISA_AVX512_VNNI: return &aq_int8_avx512_vnni;
#endif
#if defined(AQ_BUILD_NEON)
    case AQ_ISA_NEON: return &aq_int8_neon;
    case AQ_ISA_NEON_DOT: return &aq_int8_neon_dot;
#endif
#if defined(AQ_BUILD_SIMD128)
    case AQ_ISA_SIMD128: return &aq_int8_simd128;
#endif
    default: return &aq_int8_scalar;
  }
}

/* Quantize ---------------------------------------------------------------------------------------------------------- */

/* Elements of a pass over float32 for one of the functions that quantize weights, whose threads are counted by those. */
#define AQ_CHEAP 16

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
  const aq_int8_kernels *kernels = int8_of(isa);
  if (!kernels) return AQ_E_ISA;
  if (!x || !codes || !scale || !zero_point || bits < 2 || bits > 8) return AQ_E_ARGUMENT;
  if (kind != AQ_ACTIVATIONS_STATIC && kind != AQ_ACTIVATIONS_PER_TOKEN) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(tokens, cols)) return AQ_E_SHAPE;
  for (size_t t = 0; t < tokens && kind == AQ_ACTIVATIONS_STATIC; t++)
    if (!(scale[t] >= 0x1p-126f && scale[t] < __builtin_inff()) || zero_point[t] < 0 || zero_point[t] >= 1 << bits)
      return AQ_E_VALUE;
  const quantize_context context = {kernels, x, cols, bits, kind, codes, scale, zero_point};
  return aq_run_units(quantize_tokens, &context, tokens, tokens * cols / AQ_CHEAP, threads);
}

/* Linear ------------------------------------------------------------------------------------------------------------ */

/* Up to as many tokens are taken one by one: unpacking into panels costs more than it saves. */
#define AQ_FEW_TOKENS 2

typedef struct {
  const aq_int8_kernels *kernels;
  aq_int8_job job;
  int by_tokens;
} linear_context;

static int32_t linear_units(const void *context, size_t begin, size_t end) {
  const linear_context *c = context;
  const aq_int8_job *job = &c->job;
  if (c->by_tokens) {
    c->kernels->linear(job, begin, end, 0, job->rows);
    return AQ_OK;
  }
  const size_t row_begin = begin * c->kernels->row_tile, row_end = aq_min_size(end * c->kernels->row_tile, job->rows);
  if (job->tokens > AQ_FEW_TOKENS) c->kernels->linear(job, 0, job->tokens, row_begin, row_end);
  for (size_t t = 0; t < job->tokens && job->tokens <= AQ_FEW_TOKENS; t++)
    c->kernels->linear_vector(job, t, row_begin, row_end);
  return AQ_OK;
}

int32_t aq_linear_packed_int8(const uint8_t *codes, const float *x_scale, const int32_t *x_zero_point, size_t tokens,
                              const uint32_t *packed, const uint16_t *scale, const uint16_t *zero_point,
                              const float *bias, size_t rows, size_t cols, int32_t bits, size_t group_size, float *out,
                              int32_t isa, int32_t threads) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  const aq_int8_kernels *kernels = int8_of(isa);
  if (!kernels) return AQ_E_ISA;
  if (!out || !x_scale || !x_zero_point || (!codes && cols)) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(rows, cols) || !aq_counts_allowed(tokens, cols) || !aq_counts_allowed(tokens, rows))
    return AQ_E_SHAPE;
  for (size_t t = 0; t < tokens; t++)
    if (x_zero_point[t] < 0 || x_zero_point[t] > 255) return AQ_E_VALUE;
  if (cols == 0) {
    for (size_t t = 0; t < tokens; t++)
      for (size_t row = 0; row < rows; row++) out[t * rows + row] = bias ? bias[row] : 0.0f;
    return AQ_OK;
  }
  linear_context context = {kernels,
                            {.codes = codes, .x_scale = x_scale, .x_zero = x_zero_point, .tokens = tokens, .bias = bias,
                             .rows = rows, .cols = cols, .out = out},
                            0};
  const int32_t status = aq_view_packed(packed, scale, zero_point, rows, cols, bits, group_size, &context.job.view);
  if (status != AQ_OK) return status;
  const size_t tiles = (rows - 1) / kernels->row_tile + 1;
  /* in elements of the functions that quantize weights, which take some nanoseconds each */
  const double products = (double)tokens * (double)rows * (double)cols / (tokens <= AQ_FEW_TOKENS ? 64.0 : 1024.0);
  const size_t work = products < 0x1p30 ? (size_t)products : (size_t)1 << 30;
  const size_t count = aq_thread_count(tokens, work, threads);
  context.by_tokens = tiles < 4 * count && tiles % count != 0 && tokens >= 32 * count;
  return aq_run_units(linear_units, &context, context.by_tokens ? tokens : tiles, work, threads);
}
