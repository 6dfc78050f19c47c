/* sizes.h: which sizes and enumerators are allowed, and the sizes of packed matrices, for every library. */
#ifndef AQ_SIZES_H
#define AQ_SIZES_H

#include "group.h"

/* So that no element count times eight bytes wraps. */
AQ_FUNCTION int aq_counts_allowed(size_t rows, size_t cols) { return cols == 0 || rows <= SIZE_MAX / 16 / cols; }

AQ_FUNCTION int aq_bits_allowed(int32_t bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

AQ_FUNCTION int aq_scale_bits_allowed(int32_t scale_bits) { return scale_bits == 4 || scale_bits == 6 || scale_bits == 8; }

/* Of a matrix that is read. */
AQ_FUNCTION int aq_sub_bits_allowed(int32_t scale_bits) {
  return aq_scale_bits_allowed(scale_bits) || scale_bits == AQ_OFFSET_BITS;
}

/* What a matrix can be quantized to. */
AQ_FUNCTION int aq_grid_kind_allowed(int32_t kind) {
  return kind >= AQ_ZERO_POINT_REAL && kind <= AQ_ZERO_POINT_OFFSET;
}

AQ_FUNCTION int aq_zero_point_kind_allowed(int32_t kind) {
  return kind >= AQ_ZERO_POINT_REAL && kind <= AQ_ZERO_POINT_SYMMETRIC;
}

AQ_FUNCTION int aq_refit_allowed(int32_t refit) { return refit >= AQ_REFIT_NOTHING && refit <= AQ_REFIT_SCALES; }

/* Columns of a group of this size, 0 if the size is not allowed; cols > 0. */
AQ_FUNCTION size_t aq_group_columns(size_t group_size, size_t cols) {
  if (group_size == 0) return cols;
  const int power_of_two = (group_size & (group_size - 1)) == 0;
  if (!power_of_two || group_size < 16 || group_size > AQ_SEGMENT) return 0;
  return group_size < cols ? group_size : cols;
}

AQ_FUNCTION int aq_two_level_group_size_allowed(size_t group_size) {
  return group_size != 0 && group_size != AQ_SEGMENT && aq_group_columns(group_size, AQ_SEGMENT) != 0;
}

AQ_FUNCTION size_t aq_words_of(size_t cols, int32_t bits) { return (cols * (size_t)bits + 31) / 32; }

AQ_FUNCTION size_t aq_sub_bytes_of(size_t groups, int32_t scale_bits) { return (groups * (size_t)scale_bits + 7) / 8; }

#endif
