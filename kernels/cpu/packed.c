/* packed.c: sizes of packed matrices and the checks of packed.h. */
#include "packed.h"

int aq_three_counts_allowed(size_t a, size_t b, size_t c) {
  return aq_counts_allowed(a, b) && (a == 0 || b == 0 || aq_counts_allowed(a * b, c));
}

int aq_column_weights_allowed(const float *weights, size_t cols) {
  for (size_t i = 0; weights && i < cols; i++)
    if (!(weights[i] >= 0.0f && weights[i] < __builtin_inff())) return 0;
  return 1;
}

int32_t aq_packed_words(size_t cols, int32_t bits, uint64_t *words) {
  if (!words || !aq_bits_allowed(bits)) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(1, cols)) return AQ_E_SHAPE;
  *words = aq_words_of(cols, bits);
  return AQ_OK;
}

int32_t aq_group_count(size_t cols, size_t group_size, uint64_t *groups) {
  if (!groups) return AQ_E_ARGUMENT;
  const size_t size = aq_group_columns(group_size, cols == 0 ? 1 : cols);
  if (size == 0) return AQ_E_SHAPE;
  *groups = cols == 0 ? 0 : (cols - 1) / size + 1;
  return AQ_OK;
}

int32_t aq_two_level_sizes(size_t cols, size_t group_size, int32_t scale_bits, uint64_t *sizes) {
  if (!sizes || !aq_sub_bits_allowed(scale_bits)) return AQ_E_ARGUMENT;
  if (!aq_two_level_group_size_allowed(group_size) || !aq_counts_allowed(1, cols)) return AQ_E_SHAPE;
  sizes[0] = cols == 0 ? 0 : aq_sub_bytes_of((cols - 1) / group_size + 1, scale_bits);
  sizes[1] = cols == 0 ? 0 : (cols - 1) / AQ_SEGMENT + 1;
  return AQ_OK;
}

int32_t aq_view_packed(const uint32_t *packed, const uint16_t *scale, const uint16_t *zero_point, size_t rows,
                       size_t cols, int32_t bits, size_t group_size, aq_packed_view *view) {
  if (!packed || !scale || !aq_bits_allowed(bits)) return AQ_E_ARGUMENT;
  const size_t size = aq_group_columns(group_size, cols);
  if (size == 0 || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  *view = (aq_packed_view){.packed = packed, .scale = scale, .zero_point = zero_point, .cols = cols, .bits = bits,
                           .group_size = size, .groups = (cols - 1) / size + 1, .words = aq_words_of(cols, bits)};
  return AQ_OK;
}

int32_t aq_view_trellis(const uint32_t *packed, const uint16_t *scale, const uint16_t *offset, size_t rows, size_t cols,
                        int32_t bits, size_t group_size, aq_levels_function *const levels[2], aq_packed_view *view) {
  if (!offset || !aq_trellis_bits_allowed(bits)) return AQ_E_ARGUMENT;
  const int32_t status = aq_view_packed(packed, scale, offset, rows, cols, bits, group_size, view);
  view->levels = levels[bits - 2];
  return status;
}

int32_t aq_view_two_level(const uint32_t *packed, const uint8_t *sub_scale, const uint8_t *sub_min,
                          const uint16_t *super_scale, const uint16_t *super_min, size_t rows, size_t cols,
                          int32_t bits, size_t group_size, int32_t scale_bits, aq_packed_view *view) {
  if (!packed || !sub_scale || !sub_min || !super_scale || !super_min) return AQ_E_ARGUMENT;
  if (!aq_bits_allowed(bits) || !aq_sub_bits_allowed(scale_bits)) return AQ_E_ARGUMENT;
  if (!aq_two_level_group_size_allowed(group_size) || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  const size_t size = aq_min_size(group_size, cols), groups = (cols - 1) / size + 1;
  *view = (aq_packed_view){
      .packed = packed, .cols = cols, .bits = bits, .group_size = size, .groups = groups,
      .words = aq_words_of(cols, bits),
      .two_level = {scale_bits, sub_scale, sub_min, super_scale, super_min, AQ_SEGMENT / group_size,
                    (cols - 1) / AQ_SEGMENT + 1, aq_sub_bytes_of(groups, scale_bits)}};
  return AQ_OK;
}
