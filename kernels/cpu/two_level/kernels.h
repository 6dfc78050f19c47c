/* two_level.h: two-level scales. A superblock is AQ_SEGMENT columns of a row; its groups' scales and minima are whole
 * multiples of the superblock's two half floats:
 *
 *     w = (super_scale * sub_scale) * q - super_min * sub_min       float32: three products, each rounded, then minus
 *
 * The layout is that of ggml's Q2_K and Q4_K, and so is the search's objective. What every instruction set shares. */
#ifndef AQ_TWO_LEVEL_H
#define AQ_TWO_LEVEL_H

#include "../kernels.h"

/* Groups of a superblock: at least 16 columns each. */
#define AQ_SUPER_GROUPS (AQ_SEGMENT / 16)

/* Ranges tried for each group, half of them clipped on both sides, half beginning at the minimum. */
#define AQ_TWO_LEVEL_STEPS 12
/* Rounds of least squares after the best of them. */
#define AQ_TWO_LEVEL_REFITS 2
/* Super scales tried when the groups' real scales are fitted: (largest code + k / 4) / largest scale, |k| <= this. */
#define AQ_SUPER_STEPS 4
/* Rounds that choose sub-codes for given super scales and then fit the super scales to them. */
#define AQ_TWO_LEVEL_ROUNDS 2
/* A column weight counts at least this part of the superblock's largest, so that every group has a solution. */
#define AQ_LEAST_IMPORTANCE 0x1p-20f
/* The smallest super scale of a superblock that is not zero. */
#define AQ_HALF_MIN 0x1p-24f

struct aq_two_level_job {
  aq_quantize_job base; /* zero_point_kind, scale and zero_point unused; `clip`: search */
  int32_t scale_bits;
  size_t supers;    /* superblocks of a row */
  size_t sub_bytes; /* bytes of a row's sub-scales, and of its sub-minima */
  uint8_t *sub_scale, *sub_min;
  uint16_t *super_scale, *super_min;
};

/* Range `step` of a group: t * inverse + offset is a position among the codes, where t = w - minimum,
 * inverse = factor / (maximum - minimum) and offset = minimum * shift * inverse. */
static inline void aq_two_level_step(int32_t step, float code_max, float *factor, float *shift) {
  if (step & 1) {
    const float clipped = (float)step * (0.7f / AQ_TWO_LEVEL_STEPS);
    *factor = code_max / (1.0f - clipped);
    *shift = clipped;
  } else {
    *factor = code_max - 0.9f + (float)step * (1.8f / (AQ_TWO_LEVEL_STEPS - 1));
    *shift = 0.0f;
  }
}

/* Half-precision step for real values of a superblock's groups, by weighted least squares among several. */
float aq_fit_super(const float *values, const float *weights, size_t n, float code_max);

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
