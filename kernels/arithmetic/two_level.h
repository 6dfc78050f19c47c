/* two_level.h: two-level scales. A superblock is AQ_SEGMENT columns of a row; its groups' scales and minima
 * are whole multiples of the superblock's two half floats:
 *
 *     w = (super_scale * sub_scale) * q - super_min * sub_min      float32: each product rounded, then minus
 *
 * The layout and the search's objective are those of ggml's Q2_K and Q4_K. */
#ifndef AQ_TWO_LEVEL_ARITHMETIC_H
#define AQ_TWO_LEVEL_ARITHMETIC_H

#include "group.h"

/* Groups of a superblock: at least 16 columns each. */
#define AQ_SUPER_GROUPS (AQ_SEGMENT / 16)

/* Ranges tried for each group, half of them clipped on both sides, half beginning at the minimum. */
#define AQ_TWO_LEVEL_STEPS 12
/* Rounds of least squares after the best of them. */
#define AQ_TWO_LEVEL_REFITS 2
/* Super scales tried when the groups' real scales are fitted: (largest code + k / 4) / largest scale, |k| <=
 * this. */
#define AQ_SUPER_STEPS 4
/* Rounds that choose sub-codes for given super scales and then fit the super scales to them. */
#define AQ_TWO_LEVEL_ROUNDS 2
/* A column weight counts at least this part of the superblock's largest, so that every group has a
 * solution. */
#define AQ_LEAST_IMPORTANCE 0x1p-20f
/* Range `step` of a group: t * inverse + offset is a position among the codes, where t = w - minimum,
 * inverse = factor / (maximum - minimum) and offset = minimum * shift * inverse. */
AQ_FUNCTION void aq_two_level_step(int32_t step, float code_max, float *factor, float *shift) {
  if (step & 1) {
    const float clipped = (float)step * (0.7f / AQ_TWO_LEVEL_STEPS);
    *factor = code_max / (1.0f - clipped);
    *shift = clipped;
  } else {
    *factor = code_max - 0.9f + (float)step * (1.8f / (AQ_TWO_LEVEL_STEPS - 1));
    *shift = 0.0f;
  }
}

#endif
