/* two_level/kernels.h: quantizing with two-level scales; arithmetic/two_level.h has the definition. */
#ifndef AQ_TWO_LEVEL_H
#define AQ_TWO_LEVEL_H

#include "../../arithmetic/symmetric.h"
#include "../quantize/kernels.h"

/* A matrix on a symmetric grid, symmetric.h. */
typedef struct {
  const aq_quantize_kernels *kernels;
  const void *weights; /* of `dtype`; null: only levels for `scale` are wanted */
  int32_t dtype;
  const float *scale, *column_weights;
  size_t cols, group_size, groups, supers;
  aq_symmetric_grid grid;
  int32_t bits;
  uint32_t *packed;
  uint8_t *sub_scale, *sub_min;
  uint16_t *super_scale, *super_min;
} aq_symmetric_job;

typedef struct {
  aq_quantize_job base; /* zero_point_kind, scale and zero_point unused; `clip`: search */
  int32_t scale_bits;
  size_t supers;    /* superblocks of a row */
  size_t sub_bytes; /* bytes of a row's sub-scales, and of its sub-minima */
  uint8_t *sub_scale, *sub_min;
  uint16_t *super_scale, *super_min;
  const aq_symmetric_job *symmetric; /* not null: the rest is unused */
} aq_two_level_job;

/* Quantizes rows [row_begin, row_end): one for each instruction set, named aq_two_level_<set>. */
typedef int32_t aq_two_level_function(const aq_two_level_job *job, size_t row_begin, size_t row_end);
extern aq_two_level_function aq_two_level_scalar;

/* Adds sub-code `i` to a row's bytes, which hold zeros there. */
static inline void aq_set_sub_code(uint8_t *stream, size_t i, int32_t bits, uint32_t code) {
  const size_t bit = i * (size_t)bits, byte = bit >> 3, shift = bit & 7;
  stream[byte] |= (uint8_t)(code << shift);
  if (shift + (size_t)bits > 8) stream[byte + 1] |= (uint8_t)(code >> (8 - shift));
}

#endif
