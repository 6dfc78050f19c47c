/* trellis/api.c: the functions of arrowquant.h for matrices of trellis codes; the work is the other
 * families', on a view whose levels are the instruction set's. */
#include "../dispatch.h"

int32_t aq_trellis_table(int32_t bits, float *levels) {
  if (!levels || !aq_trellis_bits_allowed(bits)) return AQ_E_ARGUMENT;
  for (uint32_t w = 0; w < AQ_TRELLIS_WINDOWS(bits); w++)
    levels[w] = (float)aq_trellis_level_of(aq_trellis_terms[bits - 2], w, bits) * AQ_TRELLIS_UNIT;
  return AQ_OK;
}

int32_t aq_dequantize_trellis(const uint32_t *packed, const uint16_t *scale, const uint16_t *offset, size_t rows,
                              size_t cols, int32_t bits, size_t group_size, void *out, int32_t dtype, int32_t isa,
                              int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  aq_packed_view view;
  const int32_t status =
      aq_view_trellis(packed, scale, offset, rows, cols, bits, group_size, kernels->levels, &view);
  return status == AQ_OK ? aq_dequantize_view(kernels->quantize, &view, rows, out, dtype, threads) : status;
}

int32_t aq_trellis_error_statistics(const void *weights, int32_t dtype, const uint32_t *packed, const uint16_t *scale,
                                    const uint16_t *offset, size_t rows, size_t cols, int32_t bits, size_t group_size,
                                    double *statistics, int32_t isa, int32_t threads) {
  if (!statistics) return AQ_E_ARGUMENT;
  for (int i = 0; i < AQ_STATISTICS; i++) statistics[i] = 0.0;
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  aq_packed_view view;
  const int32_t status =
      aq_view_trellis(packed, scale, offset, rows, cols, bits, group_size, kernels->levels, &view);
  return status == AQ_OK ? aq_view_statistics(kernels->quantize, &view, rows, weights, dtype, statistics, threads)
                         : status;
}

/* Whether no sum of x times levels overflows, which a token alone takes before the scales. */
static int are_moderate(const float *x, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (!(__builtin_fabsf(x[i]) < 0x1p100f)) return 0;
  return 1;
}

int32_t aq_linear_trellis(const float *x, size_t tokens, const uint32_t *packed, const uint16_t *scale,
                          const uint16_t *offset, const float *bias, size_t rows, size_t cols, int32_t bits,
                          size_t group_size, float *out, int32_t isa, int32_t threads) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  AQ_KERNELS(isa);
  aq_linear_job job = {.x = x, .tokens = tokens, .bias = bias, .rows = rows, .cols = cols, .out = out};
  int32_t status = aq_check_linear(&job, x || cols == 0);
  if (status == AQ_OK && cols)
    status = aq_view_trellis(packed, scale, offset, rows, cols, bits, group_size, kernels->levels, &job.view);
  if (status != AQ_OK) return status;
  aq_linear_kernels linear = kernels->forward->linear;
  if (tokens <= linear.few_tokens && !are_moderate(x, tokens * cols))
    linear.few_tokens = 0; /* with whole weights, as many tokens */
  else if (kernels->tokens && cols && job.view.group_size >= 64)
    linear.one = kernels->tokens->floats[bits - 2];
  return aq_run_linear(&linear, &job, threads);
}
