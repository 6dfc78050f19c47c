/* kernels.h: two-level scales on the CPU: the job of a kernel, and the sub-codes of a row. */
#ifndef AQ_TWO_LEVEL_KERNELS_H
#define AQ_TWO_LEVEL_KERNELS_H

#include "../../arithmetic/two_level.h"
#include "../kernels.h"

struct aq_two_level_job {
  aq_quantize_job base; /* zero_point_kind, scale and zero_point unused; `clip`: search */
  int32_t scale_bits;
  size_t supers;    /* superblocks of a row */
  size_t sub_bytes; /* bytes of a row's sub-scales, and of its sub-minima */
  uint8_t *sub_scale, *sub_min;
  uint16_t *super_scale, *super_min;
};

int32_t aq_quantize_two_level_scalar(const aq_two_level_job *job, size_t row_begin, size_t row_end);

/* Sub-code `i` of a row's bytes; setting wants zeros there. */
static inline uint32_t aq_read_sub_code(const uint8_t *stream, size_t i, int32_t bits) {
  const size_t bit = i * (size_t)bits, byte = bit >> 3, shift = bit & 7;
  uint32_t code = stream[byte] >> shift;
  if (shift + (size_t)bits > 8) code |= (uint32_t)stream[byte + 1] << (8 - shift);
  return code & ((1u << bits) - 1);
}

static inline void aq_set_sub_code(uint8_t *stream, size_t i, int32_t bits, uint32_t code) {
  const size_t bit = i * (size_t)bits, byte = bit >> 3, shift = bit & 7;
  stream[byte] |= (uint8_t)(code << shift);
  if (shift + (size_t)bits > 8) stream[byte + 1] |= (uint8_t)(code >> (8 - shift));
}

/* Scale and minimum of group `group` of a row: w = scale * q - minimum. */
static inline void aq_two_level_grid(const aq_packed_view *view, size_t row, size_t group, float *scale,
                                     float *minimum) {
  const aq_two_level_view *t = &view->two_level;
  const size_t super = row * t->supers + group / t->super_groups, first = row * t->sub_bytes;
  *scale = aq_float_from_half(t->super_scale[super]) * (float)aq_read_sub_code(t->sub_scale + first, group, t->scale_bits);
  *minimum = aq_float_from_half(t->super_min[super]) * (float)aq_read_sub_code(t->sub_min + first, group, t->scale_bits);
}

#endif
