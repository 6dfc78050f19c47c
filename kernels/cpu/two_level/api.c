/* two_level/api.c: the functions of arrowquant.h for two-level scales. */
#include "../dispatch.h"
#include "../threads.h"

/* Quantize ----------------------------------------------------------------------------------------------- */

typedef struct {
  aq_two_level_function *quantize;
  aq_two_level_job job;
} quantize_context;

static int32_t quantize_rows(const void *context, size_t begin, size_t end) {
  const quantize_context *c = context;
  return c->quantize(&c->job, begin, end);
}

int32_t aq_quantize_two_level(const void *weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                              size_t group_size, int32_t scale_bits, int32_t search, const float *column_weights,
                              uint32_t *packed, uint8_t *sub_scale, uint8_t *sub_min, uint16_t *super_scale,
                              uint16_t *super_min, int32_t isa, int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!weights || !packed || !sub_scale || !sub_min || !super_scale || !super_min) return AQ_E_ARGUMENT;
  if (!aq_bits_allowed(bits) || !aq_scale_bits_allowed(scale_bits) || !aq_dtype_bytes(dtype)) return AQ_E_ARGUMENT;
  if (!aq_two_level_group_size_allowed(group_size) || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  if (!aq_column_weights_allowed(column_weights, cols)) return AQ_E_VALUE;
  const size_t size = aq_min_size(group_size, cols), groups = (cols - 1) / size + 1;
  const quantize_context context = {
      kernels->two_level,
      {.base = {.weights = weights, .dtype = dtype, .cols = cols, .bits = bits, .group_size = size, .groups = groups,
                .words = aq_words_of(cols, bits), .clip = search != 0, .column_weights = column_weights,
                .packed = packed},
       .scale_bits = scale_bits, .supers = (cols - 1) / AQ_SEGMENT + 1,
       .sub_bytes = aq_sub_bytes_of(groups, scale_bits), .sub_scale = sub_scale, .sub_min = sub_min,
       .super_scale = super_scale, .super_min = super_min}};
  const int32_t status = aq_run_units(quantize_rows, &context, rows, rows * cols, threads);
  return status == AQ_OK || status <= AQ_E_STOPPED ? status : aq_weights_fault(weights, dtype, rows * cols, isa, threads);
}

int32_t aq_quantize_symmetric_levels(const void *weights, int32_t dtype, const float *scale,
                                     const float *column_weights, size_t rows, size_t cols, int32_t bits,
                                     size_t group_size, int32_t scale_bits, uint32_t *packed, uint8_t *sub_scale,
                                     uint8_t *sub_min, uint16_t *super_scale, uint16_t *super_min, int32_t isa,
                                     int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if ((!scale && !weights) || (weights && !packed) || !sub_scale || !sub_min || !super_scale || !super_min)
    return AQ_E_ARGUMENT;
  if (scale_bits != 8 || !aq_symmetric_bits_allowed(bits) || (weights && !aq_dtype_bytes(dtype))) return AQ_E_ARGUMENT;
  if (!aq_two_level_group_size_allowed(group_size) || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  if (!aq_column_weights_allowed(column_weights, cols)) return AQ_E_VALUE;
  const size_t groups = (cols - 1) / group_size + 1;
  for (size_t i = 0; scale && i < rows * groups; i++)
    if (!(scale[i] - scale[i] == 0.0f)) return AQ_E_NONFINITE;
  const aq_symmetric_job job = {
      kernels->quantize, weights, dtype, scale, column_weights, cols, group_size, groups,
      (cols - 1) / AQ_SEGMENT + 1, aq_symmetric_grid_of(bits), bits, packed, sub_scale, sub_min, super_scale, super_min};
  const quantize_context context = {kernels->two_level, {.symmetric = &job}};
  return aq_run_units(quantize_rows, &context, rows, rows * cols, threads);
}

/* Two levels for given scales ---------------------------------------------------------------------------- */

int32_t aq_fit_two_level(const float *scale, const float *minimum, const float *group_weights, size_t rows, size_t cols,
                         size_t group_size, int32_t scale_bits, uint8_t *sub_scale, uint8_t *sub_min,
                         uint16_t *super_scale, uint16_t *super_min) {
  if (rows == 0 || cols == 0) return AQ_OK;
  if (!scale || !minimum || !sub_scale || !sub_min || !super_scale || !super_min || !aq_scale_bits_allowed(scale_bits))
    return AQ_E_ARGUMENT;
  if (!aq_two_level_group_size_allowed(group_size) || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  const size_t groups = (cols - 1) / group_size + 1, super_groups = AQ_SEGMENT / group_size;
  const size_t supers = (cols - 1) / AQ_SEGMENT + 1, bytes = aq_sub_bytes_of(groups, scale_bits);
  const float sub_max = (float)((1 << scale_bits) - 1), limit = AQ_HALF_MAX * sub_max;
  if (!aq_column_weights_allowed(group_weights, rows * groups)) return AQ_E_VALUE;
  int32_t status = AQ_OK;
  for (size_t i = 0; i < rows * groups; i++) {
    if (!(scale[i] - scale[i] == 0.0f) || !(minimum[i] - minimum[i] == 0.0f)) return AQ_E_NONFINITE;
    if (scale[i] > limit || -scale[i] > limit || minimum[i] > limit || -minimum[i] > limit) status = AQ_E_RANGE;
  }
  if (status != AQ_OK) return status;
  __builtin_memset(sub_scale, 0, rows * bytes);
  __builtin_memset(sub_min, 0, rows * bytes);
  for (size_t row = 0; row < rows; row++) {
    for (size_t super = 0; super < supers; super++) {
      const size_t begin = super * super_groups, n = aq_min_size(super_groups, groups - begin);
      const size_t first = row * groups + begin;
      for (int32_t which = 0; which < 2; which++) {
        uint8_t codes[AQ_SUPER_GROUPS], *out = (which ? sub_min : sub_scale) + row * bytes;
        const float step = aq_fit_levels((which ? minimum : scale) + first, group_weights ? group_weights + first : 0, n,
                                         sub_max, codes);
        for (size_t i = 0; i < n; i++) aq_set_sub_code(out, begin + i, scale_bits, codes[i]);
        (which ? super_min : super_scale)[row * supers + super] = aq_half_from_float(step);
      }
    }
  }
  return AQ_OK;
}

/* Packed matrices ---------------------------------------------------------------------------------------- */

int32_t aq_dequantize_two_level(const uint32_t *packed, const uint8_t *sub_scale, const uint8_t *sub_min,
                                const uint16_t *super_scale, const uint16_t *super_min, size_t rows, size_t cols,
                                int32_t bits, size_t group_size, int32_t scale_bits, void *out, int32_t dtype,
                                int32_t isa, int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  aq_packed_view view;
  const int32_t status = aq_view_two_level(packed, sub_scale, sub_min, super_scale, super_min, rows, cols, bits,
                                           group_size, scale_bits, &view);
  return status == AQ_OK ? aq_dequantize_view(kernels->quantize, &view, rows, out, dtype, threads) : status;
}

int32_t aq_two_level_error_statistics(const void *weights, int32_t dtype, const uint32_t *packed,
                                      const uint8_t *sub_scale, const uint8_t *sub_min, const uint16_t *super_scale,
                                      const uint16_t *super_min, size_t rows, size_t cols, int32_t bits,
                                      size_t group_size, int32_t scale_bits, double *statistics, int32_t isa,
                                      int32_t threads) {
  if (!statistics) return AQ_E_ARGUMENT;
  for (int i = 0; i < AQ_STATISTICS; i++) statistics[i] = 0.0;
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  aq_packed_view view;
  const int32_t status = aq_view_two_level(packed, sub_scale, sub_min, super_scale, super_min, rows, cols, bits,
                                           group_size, scale_bits, &view);
  return status == AQ_OK ? aq_view_statistics(kernels->quantize, &view, rows, weights, dtype, statistics,
                                              threads) : status;
}
